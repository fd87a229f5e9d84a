"""NAS-Bench-201: a space of small cells whose accuracies are all known, in a table.

A cell has four nodes; node 0 is its input, node 3 its output, and each of the six edges from an
earlier to a later node is one of five operations: 5^6 = 15,625 cells. Source: Dong and Yang 2020.
"""

import csv
import hashlib
import itertools
import lzma
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # (from, to), as a cell is written
CELL = re.compile(r"\|(\w+)~0\|\+\|(\w+)~0\|(\w+)~1\|\+\|(\w+)~0\|(\w+)~1\|(\w+)~2\|")
LARGEST = 2**28  # bytes of a table, unpacked
DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "imagenet16": "imagenet16_120"}


@dataclass
class Table:
    """Accuracies in percent, (cells,), at a cell's number: its operations' places as digits.

    A table may have fewer operations than the benchmark, a smaller space of its own; whatever
    operations occur in it, all cells of them are there.
    """

    operations: tuple[str, ...]
    val: np.ndarray
    test: np.ndarray
    sha256: str

    def __len__(self) -> int:
        return len(self.val)

    @property
    def factors(self) -> list[int]:
        """What one step on each edge adds to a cell's number."""
        return [len(self.operations) ** place for place in reversed(range(len(EDGES)))]

    def decisions(self, number: int) -> list[int]:
        """A cell's operations' places, edge by edge."""
        return [number // factor % len(self.operations) for factor in self.factors]

    def cell(self, number: int) -> str:
        return write_cell([self.operations[place] for place in self.decisions(number)])

    def describe(self, dataset: str) -> dict:
        """As it stands in a run's record."""
        names = {"dataset": dataset, "operations": list(self.operations)}
        return names | {"cells": len(self), "sha256": self.sha256}


def write_cell(operations: list[str]) -> str:
    """`|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`: the operations into nodes 1, 2, 3, and from where."""
    parts = [f"{name}~{start}|" for name, (start, _) in zip(operations, EDGES)]
    return f"|{parts[0]}+|{parts[1]}{parts[2]}+|{parts[3]}{parts[4]}{parts[5]}"


def read_cell(text: str) -> tuple[str, ...]:
    """The operations of a cell, edge by edge. Raises ValueError that says what is wrong."""
    match = CELL.fullmatch(text)
    if match is None:
        raise ValueError(f"cell {text[:200]!r}; expected {write_cell(['op'] * len(EDGES))}")
    for name in match.groups():
        if name not in OPERATIONS:
            raise ValueError(f"unknown operation {name!r}; the benchmark has {OPERATIONS}")
    return match.groups()


def read_table(path: str | Path, dataset: str) -> Table:
    """The accuracies on `dataset`, a key of DATASETS, from a CSV file, which may be .xz.

    Its first line names the columns: `cell`, and `<dataset>_val`, `<dataset>_test` in percent.
    Raises FileNotFoundError, or ValueError with file and line, if it is not as it must be.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}; table= names the benchmark's CSV file")
    found: dict[tuple[str, ...], tuple[int, float, float]] = {}
    line = 0
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        text = content.decode()
        rows = csv.reader(text.splitlines(), strict=True)
        for row in rows:
            line = rows.line_num
            if line == 1:
                columns = _columns(row, DATASETS[dataset])
                width = len(row)
            elif row:
                if len(row) != width:
                    raise ValueError(f"{len(row)} fields; the first line has {width}")
                cell = read_cell(row[columns[0]])
                if cell in found:
                    raise ValueError(f"this cell is in line {found[cell][0]} already")
                found[cell] = (line, *(_percent(row[column]) for column in columns[1:]))
    except (ValueError, csv.Error) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}, line {max(line, 1)}: {error}") from None
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is a damaged .xz file: {error}") from None
    operations = tuple(name for name in OPERATIONS if any(name in cell for cell in found))
    cells = list(itertools.product(operations, repeat=len(EDGES)))
    missing = [cell for cell in cells if cell not in found] or ([()] if not found else [])
    if missing:
        first = f"; without {write_cell(missing[0])}" if found else ""
        raise ValueError(
            f"{path} ends at line {max(line, 1)} with {len(found):,} cells, not all {len(cells):,} "
            f"of its operations{first}"
        )
    val, test = (np.array([found[cell][place] for cell in cells]) for place in (1, 2))
    return Table(operations, val, test, hashlib.sha256(text.encode()).hexdigest())


def _columns(header: list[str], dataset: str) -> list[int]:
    """Places of the cell, validation and test columns."""
    names = ["cell", f"{dataset}_val", f"{dataset}_test"]
    for name in names:
        if header.count(name) != 1:
            raise ValueError(f"{header.count(name)} columns {name!r}; expected one of {names} each")
    return [header.index(name) for name in names]


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise ValueError(f"accuracy {text[:80]!r}; expected percent, 0 to 100")
    return value


def curves(table: Table, asked: np.ndarray, points: list[int]) -> dict[str, np.ndarray]:
    """What searches had found when they had asked for as many cells as each of `points` says.

    `asked` are the cells' numbers, (searches, cells). Returns arrays (searches, points): `best_val`
    and `best_test` of the cell that has the best validation accuracy so far, the first if several
    have; `drawn_val`, the mean validation accuracy of the cells since the point before.
    """
    val = table.val[asked]
    rows = np.arange(len(asked))
    best = [asked[rows, val[:, :point].argmax(1)] for point in points]
    starts = [0, *points]
    drawn = [val[:, start:point].mean(1) for start, point in zip(starts, points)]
    return {
        "best_val": np.stack([table.val[cells] for cells in best], 1),
        "best_test": np.stack([table.test[cells] for cells in best], 1),
        "drawn_val": np.stack(drawn, 1),
    }

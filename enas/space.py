"""The micro search space: what an architecture is, how one is drawn, written and read.

A cell has two inputs, entries 0 and 1, and nodes 2, 3, ... A node adds two operations, each on an
earlier entry. The entries that no node uses are the cell's output. An architecture is a normal and
a reduction cell. Source: Pham et al. 2018, section 2.4.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# the official code's numbers 0 to 4
OPERATIONS = ("sep_conv_3x3", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3", "identity")
SEPARABLE = 2  # the first two are separable convolutions
CELLS = ("normal", "reduction")


@dataclass(frozen=True)
class Node:
    """left(entry left_input) + right(entry right_input); operations by their number."""

    left_input: int
    left: int
    right_input: int
    right: int


@dataclass(frozen=True)
class Architecture:
    """Nodes of the normal and of the reduction cell; node k of a cell is its entry k + 2."""

    normal: tuple[Node, ...]
    reduction: tuple[Node, ...]

    @classmethod
    def from_decisions(cls, decisions: Tensor) -> "Architecture":
        """From a controller's decisions (2 cells, nodes, 4)."""
        cells = (tuple(Node(*node) for node in cell) for cell in decisions.tolist())
        return cls(*cells)

    def decisions(self) -> Tensor:
        """(2 cells, nodes, 4) in a node's order: left input, left, right input, right."""
        cells = (self.normal, self.reduction)
        return torch.tensor(
            [[[n.left_input, n.left, n.right_input, n.right] for n in cell] for cell in cells]
        )


def loose_ends(cell: tuple[Node, ...]) -> list[int]:
    """Entries that no node uses, the inputs included: they make the cell's output."""
    used = {entry for node in cell for entry in (node.left_input, node.right_input)}
    return [entry for entry in range(len(cell) + 2) if entry not in used]


def random_decisions(
    count: int, nodes: int, operations: int = len(OPERATIONS), generator=None
) -> Tensor:
    """`count` architectures drawn uniformly: (count, 2 cells, nodes, 4)."""
    decisions = torch.empty(count, 2, nodes, 4, dtype=torch.long)
    for node in range(nodes):
        for place in range(4):
            choices = operations if place % 2 else node + 2
            drawn = torch.randint(choices, (count, 2), generator=generator)
            decisions[:, :, node, place] = drawn
    return decisions


def to_json(architecture: Architecture) -> dict[str, list[list]]:
    """{"normal": [[left input, left, right input, right], ...], "reduction": ...} by name."""
    return {
        name: [
            [n.left_input, OPERATIONS[n.left], n.right_input, OPERATIONS[n.right]]
            for n in getattr(architecture, name)
        ]
        for name in CELLS
    }


def from_json(values: dict) -> Architecture:
    """Read what `to_json` wrote. Raises ValueError that says what is wrong."""
    if not isinstance(values, dict) or not all(isinstance(values.get(c), list) for c in CELLS):
        raise ValueError(f"an architecture has lists of nodes under {' and '.join(CELLS)}")
    cells = [
        tuple(_read_node(node, f"{name} node {k}", k) for k, node in enumerate(values[name]))
        for name in CELLS
    ]
    if not cells[0] or len(cells[0]) != len(cells[1]):
        raise ValueError(f"the cells have {len(cells[0])} and {len(cells[1])} nodes; expected one "
                         "number of nodes, 1 or more")  # fmt: skip
    return Architecture(*cells)


def _read_node(node, where: str, index: int) -> Node:
    if not isinstance(node, list) or len(node) != 4:
        raise ValueError(f"{where}: expected [input, operation, input, operation], got {node!r}")
    for entry in node[::2]:
        if type(entry) is not int or not 0 <= entry < index + 2:
            raise ValueError(f"{where}: input {entry!r}; expected an entry from 0 to {index + 1}")
    for name in node[1::2]:
        if name not in OPERATIONS:
            raise ValueError(f"{where}: unknown operation {name!r}; choose from {OPERATIONS}")
    left_input, left, right_input, right = node
    return Node(left_input, OPERATIONS.index(left), right_input, OPERATIONS.index(right))


def read_architecture(path: str | Path) -> Architecture:
    """The architecture of a JSON file: its own, or under "architecture", as a search's summary.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    if not Path(path).is_file():  # to open a pipe would wait for ever
        raise FileNotFoundError(f"no architecture file {path}")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(values, dict):
            values = values.get("architecture", values)
        return from_json(values)
    except json.JSONDecodeError:
        raise ValueError(f"{path} is no JSON; expected a search's summary.json") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None

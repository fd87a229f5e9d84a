"""Draw figures of run records: one look, colours, intervals, a CSV of what is drawn beside each.

Like `common.records`, without torch.
"""

import argparse
import csv
import itertools
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common.pages import plural
from common.records import (
    ROOT,
    RUNS_HELP,
    STATISTICS,
    Run,
    Spread,
    describe_differences,
    differences,
    fail,
    load_runs,
    over_seeds,
    own_values,
    recipes,
    repeated_seeds,
    without_searches,
    writing,
)
from matplotlib.lines import Line2D

# One colour per norm and statistic in every figure (Okabe and Ito, safe for colour-blind readers).
COLORS = {"bn": "#0072B2", "gn": "#E69F00", "sn": "#000000", "in": "#009E73", "ln": "#D55E00"}
COLORS |= {"sn_in_ln": "#CC79A7", "sn_with_bn": "#56B4E9", "none": "#999999", "sn_x10": "#CC79A7"}
COLORS |= {"brn": "#999999", "bkn": "#CC79A7"}
PARTS = {"mean": "mean weights", "var": "variance weights"}
STYLES = {"mean": "-", "var": "--"}
INTERVAL = "whiskers and bands: 95 % t intervals of the mean over seeds, cut at the axis"
FEW = 12  # runs whose dots and lines can be told apart


def color(norm: str) -> str:
    return COLORS.get(norm, "#56B4E9")


# --- the command line and the runs


def arguments(description: str, folder: str = "figures") -> argparse.ArgumentParser:
    """The options that every plotting script has; `folder`: where it draws below --runs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "results", metavar="ROOT", help=RUNS_HELP
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"write here alone (default: ROOT/{folder})"
    )
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="(default: png)")
    return parser


def read(root: Path, task: str = "imagenet") -> list[Run]:
    """The runs of a task; a folder that is missing ends the script."""
    try:
        return without_searches(load_runs(root, task))
    except FileNotFoundError as error:
        fail(str(error))


def from_to(counts: Sequence[int]) -> str:
    """Rising numbers in words: `5`, or `5 to 26`."""
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])


def warn(line: str) -> str:
    """Print a warning, and return it for the caption."""
    print(f"warning: {line}", file=sys.stderr)
    return line


def by_recipe(
    groups: dict[str, list[Run]],
    cell: Callable,
    free: Collection[str] = (),
    of_norm: Collection[str] = (),
) -> dict[str, tuple[list[Run], list[str]]]:
    """Groups of runs by name, unlike runs apart, each with lines for its caption.

    `cell(run)` is what a figure averages over (see `records.recipes`). The recipe of most runs
    keeps the group's name; the others add what they differ in, `_gate_lr_factor_10`, with a
    warning.
    """
    found: dict[str, tuple[list[Run], list[str]]] = {}
    for name, runs in groups.items():
        first, *others = recipes(runs, cell, free, of_norm)
        apart, differing = {name: first}, {}
        for alike in others:
            what = unlike(alike, first, cell, free)
            own = _unused(name + ending(alike[0], what), apart)
            apart[own], differing[own] = alike, describe_differences(what)
        for own, alike in apart.items():
            lines = []
            if alike is first:
                if differing:
                    names = ", ".join(differing)
                    lines.append(f"Other recipes have figures of their own: {names}.")
            else:
                lines.append(f"Drawn apart from {name}, which differs in {differing[own]}.")
                warn(f"{own}: {plural(len(alike), 'run')}, first {alike[0].path}, drawn apart from "
                     f"{name}: {differing[own]}")  # fmt: skip
            cells = defaultdict(list)
            for run in alike:
                cells[cell(run)].append(run)
            for same in cells.values():
                for seed, count in repeated_seeds(same).items():
                    where = Path(same[0].name).parent
                    lines.append(warn(f"{count} runs of seed {seed} of {where} count as one seed, "
                                      "by their average."))  # fmt: skip
            found[own] = alike, lines
    return found


def ending(run: Run, keys: Collection[str]) -> str:
    """What a figure's name adds for a run that differs from others in `keys`: these, its values."""
    values = own_values(run, keys).items()
    words = "".join(f"_{key.split('.')[-1]}_{value[:16]}" for key, value in values)
    return re.sub(r"[^\w.-]+", "-", words)[:60]


def _unused(name: str, names: Collection[str]) -> str:
    """The name, numbered if it is there already."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in names else next(one for one in numbered if one not in names)


def unlike(
    ours: list[Run], theirs: list[Run], cell: Callable, free: Collection[str] = ()
) -> dict[str, list[str]]:
    """What two lists of runs differ in; of equal cells if there are some, else in general."""
    cells = {cell(run): run for run in ours}
    pairs = [(cells[cell(run)], run) for run in theirs if cell(run) in cells]
    return next(
        (found for pair in pairs if (found := differences(pair, free=free))),
        differences([ours[0], theirs[0]], one_cell=False, free=free),
    )


# --- panels


def draw_seeds(panel, curves: dict, line_color: str, style: str = "-", width: float = 2.0) -> None:
    """A line per run, their mean over seeds where all go so far, and its 95 % t interval.

    curves: (seed, anything that tells runs apart) -> [(x, y), ...].
    """
    at = defaultdict(list)
    for (seed, _), points in curves.items():
        if len(curves) > 1:
            alpha = 0.35 * ink(len(curves))
            panel.plot(*zip(*points), style, color=line_color, alpha=alpha, linewidth=0.8)
        for x, y in points:
            at[x].append((seed, y))
    means = [(x, over_seeds(found)) for x, found in sorted(at.items()) if len(found) == len(curves)]
    if not means:
        return
    xs, found = zip(*means)
    marker = {"marker": "o", "markersize": 4} if len(xs) == 1 else {}
    panel.plot(xs, [s.mean for s in found], style, color=line_color, linewidth=width, **marker)
    if found[0].half is not None:
        low, high = zip(*((s.mean - s.half, s.mean + s.half) for s in found))
        panel.fill_between(xs, low, high, color=line_color, alpha=0.1, linewidth=0)


def ink(count: int) -> float:
    """Opacity of one of `count` runs beside that of one of a few: together they hide nothing."""
    return max(0.15, min(1.0, FEW / count))


def clear(panel, axis: str = "both") -> None:
    """A light grid and no frame."""
    panel.grid(axis=axis, alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def mark_start(panel, statistics: Collection[int]) -> None:
    """Dashed lines at 1/K, where K statistics of equal weight stand."""
    for count in sorted(set(statistics)):
        panel.axhline(1 / count, color="0.35", linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        panel.annotate(f"1/{count}", (1, 1 / count), xycoords=("axes fraction", "data"),
                       xytext=(3, 0), textcoords="offset points", va="center", fontsize=8,
                       color="0.35")  # fmt: skip


def fit(panels: Iterable, least: float = 0.002) -> None:
    """Scale the y axis that panels share to their lines; few seeds have bands much wider.

    least: how wide it is at least, for weights that hardly move.
    """
    panels = list(panels)
    values = [y for panel in panels for line in panel.lines for y in line.get_ydata()]
    if not values:
        return
    low, high = reach(values, least)
    if panels[0].get_yscale() == "log":
        positive = [value for value in values if value > 0] or [1]
        low, high = min(positive) / 1.3, max(positive) * 1.3
    for panel in panels:
        panel.set_ylim(low, high)


def reach(values: Iterable[float], least: float = 0.002) -> tuple[float, float]:
    """An axis from the smallest to the largest value, with a margin, at least `least` wide."""
    values = list(values)
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), (least - (high - low)) / 2, 0.0)
    return low - margin, high + margin


def reach_of(
    spreads: Iterable[Spread], also: Iterable[float], least: float = 0.002
) -> tuple[float, float]:
    """The same for means with intervals; an interval wider than all the means is cut."""
    spreads = list(spreads)
    values = [s.mean for s in spreads] + list(also)
    low, high = reach(values, least)
    ends = [s.mean + sign * s.half for s in spreads if s.half is not None for sign in (-1, 1)]
    room = high - low
    return (
        max(min([low, *(e - 0.02 * room for e in ends)]), low - room),
        min(max([high, *(e + 0.02 * room for e in ends)]), high + room),
    )


def statistic_lines(statistics: Iterable[str], parts: bool = True) -> list[Line2D]:
    """Legend handles: a colour per statistic, a style for mean and variance weights."""
    handles = [Line2D([], [], color=COLORS[s], linewidth=2, label=s.upper()) for s in statistics]
    for part in PARTS if parts else ():
        handles.append(Line2D([], [], color="0.3", linestyle=STYLES[part], label=PARTS[part]))
    return handles


def present(weights: Iterable[dict[str, float]]) -> list[str]:
    """The statistics that occur, in the order of `STATISTICS`."""
    found = {s for weight in weights for s in weight}
    return [s for s in STATISTICS if s in found]


def legend(figure, handles: list) -> None:
    """One legend above all panels."""
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


# --- files


def save(
    figure, path: Path, lines: Iterable[str], header: list[str], rows: list[list], width: int = 130
) -> None:
    """Write the figure with its caption below, and `rows`, what it draws, as a CSV beside it.

    Neither holds a date, so that the same records give the same bytes. width: of the caption, in
    characters.
    """
    caption = "\n".join(fill(line, width) for line in lines)
    figure.text(0.5, -0.01, caption, ha="center", va="top", fontsize=9)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        nothing = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        with plt.rc_context({"svg.hashsalt": "sn", "svg.fonttype": "none"}):
            figure.savefig(path, dpi=130, bbox_inches="tight", metadata=nothing)
        plt.close(figure)
        with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    print(path)


def tidy(value: float, digits: int = 6) -> float:
    """A number of a CSV, rounded; 0 never as -0."""
    return round(value, digits) + 0.0 if math.isfinite(value) else value

"""Draw the two cells of an architecture.

    python -m enas.draw outputs/enas/digits_1x8_2nodes/sn_ln_gn/seed0/summary.json --out cells.png

Entries run from left to right by how far they are from the inputs. An arrow is an operation; two
arrows meet in a node, which names them with the entries they read, and are added. The entries that
no node reads make the output.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text

from .space import CELLS, OPERATIONS, Architecture, Node, loose_ends, read_architecture

COLORS = {  # Okabe and Ito
    "sep_conv_3x3": "#0072B2",
    "sep_conv_5x5": "#56B4E9",
    "avg_pool_3x3": "#E69F00",
    "max_pool_3x3": "#D55E00",
    "identity": "#666666",
}
LABELS = {name: name.replace("_", " ") for name in OPERATIONS}
OUTPUT = "output"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m enas.draw", description="Draw the cells of an architecture."
    )
    parser.add_argument("arch", type=Path, help="its JSON file, such as a search's summary.json")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="(default: cells.png beside the file)"
    )
    parser.add_argument("--title", default="", help="a line above the cells")
    args = parser.parse_args(argv)
    out = args.out or args.arch.with_name("cells.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_architecture(read_architecture(args.arch), out, args.title)
    except (OSError, ValueError) as error:
        print(f"draw.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(out)


def draw_architecture(architecture: Architecture, path: Path, title: str = "") -> None:
    """Write a picture of the normal and the reduction cell to `path`."""
    cells = [getattr(architecture, name) for name in CELLS]
    columns = max(max(depths(cell).values()) for cell in cells) + 1
    figure, panels = plt.subplots(
        2, 1, figsize=(2.5 + 2.9 * columns, 6.5), layout="constrained", dpi=130, sharex=True
    )
    for panel, name, cell in zip(panels, CELLS, cells):
        draw_cell(panel, cell)
        panel.set_title(f"{name} cell")
    panels[0].set_xlim(-0.5, columns - 0.5)  # of both: one may be deeper than the other
    handles = [plt.Line2D([], [], color=COLORS[n], linewidth=2.5, label=LABELS[n]) for n in COLORS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    if title:
        figure.suptitle(title)
    figure.canvas.draw()  # places the boxes that the arrows begin and end at
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def depths(cell: tuple[Node, ...]) -> dict:
    """How many operations an entry is from the inputs, at most; the output is beyond them all."""
    result = {0: 0, 1: 0}
    for index, node in enumerate(cell):
        result[index + 2] = 1 + max(result[node.left_input], result[node.right_input])
    result[OUTPUT] = 1 + max(result[entry] for entry in loose_ends(cell))
    return result


def places(cell: tuple[Node, ...]) -> dict:
    """(x, y) of every entry: x by depth, those of one depth above one another.

    Columns are shifted a little up and down in turn, so that arrows pass beside the entries.
    """
    columns: dict[int, list] = {}
    for entry, depth in depths(cell).items():
        columns.setdefault(depth, []).append(entry)
    result = {}
    for depth, entries in columns.items():
        shift = 0.0 if depth == 0 or OUTPUT in entries else 0.3 * (-1) ** depth
        for row, entry in enumerate(entries):
            result[entry] = (float(depth), (len(entries) - 1) / 2 - row + shift)
    return result


def draw_cell(panel: Axes, cell: tuple[Node, ...]) -> None:
    """One cell into `panel`."""
    at = places(cell)
    names = {0: "0: cell\nbefore last", 1: "1: last cell", OUTPUT: "concat,\n1x1 conv"}
    for index, node in enumerate(cell):
        left, right = (LABELS[OPERATIONS[operation]] for operation in (node.left, node.right))
        names[index + 2] = (
            f"{index + 2}: {left} of {node.left_input}\n+ {right} of {node.right_input}"
        )
    boxes = {}
    for entry, (x, y) in at.items():
        shade = "#DDEEDD" if entry in (0, 1) else "#EEEEEE" if entry == OUTPUT else "white"
        style = {"boxstyle": "round,pad=0.35", "facecolor": shade, "edgecolor": "0.25"}
        centred = {"ha": "center", "va": "center", "fontsize": 9}
        boxes[entry] = panel.text(x, y, names[entry], bbox=style, zorder=3, **centred)
    for index, node in enumerate(cell):
        sides = ((node.left_input, node.left), (node.right_input, node.right))
        same = node.left_input == node.right_input
        for (entry, operation), bend in zip(sides, (0.28, -0.28) if same else (0.12, -0.12)):
            arrow(panel, boxes[entry], boxes[index + 2], OPERATIONS[operation], bend)
    for entry in loose_ends(cell):
        arrow(panel, boxes[entry], boxes[OUTPUT], None, 0.0)
    heights = [y for _, y in at.values()]
    panel.set_ylim(min(heights) - 0.55, max(heights) + 0.55)
    panel.axis("off")


def arrow(panel: Axes, start: Text, end: Text, operation: str | None, bend: float) -> None:
    """A bent arrow from box to box; without an operation a thin grey one."""
    style = {"color": COLORS[operation], "linewidth": 2.0} if operation else {"color": "0.6"}
    panel.add_patch(
        FancyArrowPatch(
            start.get_position(),
            end.get_position(),
            patchA=start.get_bbox_patch(),
            patchB=end.get_bbox_patch(),
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=14,
            zorder=2,
            **style,
        )
    )


if __name__ == "__main__":
    main()

"""Draw style transfer runs: loss curves (Fig 5(a)), importance weights, a picture grid (Fig 6).

    python scripts/plot_style.py                        # results/ -> results/figures/, README table
    python scripts/plot_style.py --runs outputs --checkpoints outputs --photos photos/*.jpg

Curves and weights come from the records alone; the grid applies the checkpoints below
--checkpoints to the photographs given. The paper's curves stand in a panel of their own: its loss
weights and smoothing are not stated, so ratios of norms compare, levels do not.

Source: Fig 5(a) from results/paper.yaml; Fig 6.
"""

import argparse
import csv
import re
import sys
from collections import defaultdict
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common.records import (
    COLORS,
    ROOT,
    RUNS_HELP,
    STATISTICS,
    Run,
    block_importance,
    fail,
    load_paper,
    load_runs,
    mean_and_sd,
)

NORMS = ("bn", "in", "sn")  # Fig 5(a)'s; others follow
PARTS = {"loss": "total", "content": "content", "style": "style"}
NOTES = re.compile(r"<!-- notes -->\n(.*?)<!-- /notes -->", re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw style transfer runs (Figs 5(a) and 6).")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "results", metavar="ROOT", help=RUNS_HELP
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to draw in (default: ROOT/figures)"
    )
    parser.add_argument(
        "--window", type=int, default=25, help="steps that a curve's point averages"
    )
    parser.add_argument(
        "--checkpoints", type=Path, metavar="ROOT", help="tree of outputs: draw the picture grid"
    )
    parser.add_argument("--photos", type=Path, nargs="+", metavar="FILE", help="grid: contents")
    parser.add_argument("--styles", type=Path, metavar="DIR", help="grid: <style's name>.jpg")
    parser.add_argument("--size", type=int, default=320, help="grid: long side of a picture")
    args = parser.parse_args(argv)
    if args.window < 1:
        fail(f"--window {args.window}: expected 1 or more")
    if args.checkpoints and not args.photos:
        fail("--checkpoints needs --photos, the pictures to stylize")

    groups = choose(args.runs)
    out = args.out or args.runs / "figures"
    out.mkdir(parents=True, exist_ok=True)
    for name, cells in groups.items():
        path = out / f"style_loss_{name}.png"
        draw_curves(cells, args.window, load_paper()["fig_5a"], path)
        print(path)
        if any(run.importance for runs in cells.values() for run in runs):
            path = out / f"style_importance_{name}.png"
            draw_importance(cells, path)
            print(path)
    readme = args.runs / "style_transfer" / "README.md"
    if readme.parent.is_dir():
        write_readme(groups, args.window, readme)
        print(readme)
    if args.checkpoints:
        path = out / "style_grid.jpg"
        draw_grid(groups, args, path)
        print(path)


def choose(root: Path) -> dict[str, dict[str, list[Run]]]:
    """Runs by group (photos, style and pixels, batch), then norm, then seed; at least one."""
    try:
        runs = load_runs(root, "style_transfer")
    except FileNotFoundError as error:
        fail(str(error))
    runs = [run for run in runs if run.metrics and not run.diverged]
    if not runs:
        fail(f"no finished style transfer runs below {root}")
    groups = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run.seed):
        name = f"{run.name.split('/')[1]}_b{run.summary['batch_size']}"
        groups[name][run.summary["norm"]].append(run)
    return {name: {norm: cells[norm] for norm in order(cells)} for name, cells in groups.items()}


def order(norms) -> list[str]:
    return sorted(norms, key=lambda norm: (NORMS.index(norm) if norm in NORMS else 9, norm))


def curve(run: Run, part: str) -> list[float]:
    """The recorded losses of every step."""
    values = [line[f"train/{part}"] for line in run.metrics]
    return [value for value in values if value is not None]


def windows(values: list[float], size: int) -> list[tuple[int, float]]:
    """(last step, mean) of consecutive windows of `size` steps; a rest is left out."""
    ends = range(size, len(values) + 1, size)
    return [(end, sum(values[end - size : end]) / size) for end in ends]


def draw_curves(cells: dict[str, list[Run]], window: int, paper: dict, path: Path) -> None:
    """Total, content and style loss of every seed and their mean; the paper's curves beside."""
    figure, panels = plt.subplots(1, 4, figsize=(17, 4.6), layout="constrained")
    rows = []
    for panel, (part, title) in zip(panels, PARTS.items()):
        for norm, runs in cells.items():
            found = defaultdict(list)
            for run in runs:
                points = windows(curve(run, part), window)
                if not points:
                    continue
                panel.plot(*zip(*points), color=COLORS[norm], alpha=0.35, linewidth=0.9)
                for step, value in points:
                    found[step].append(value)
                    rows.append(["ours", norm, run.seed, title, step, f"{value:.6g}"])
            mean = [(s, mean_and_sd(v)[0]) for s, v in found.items() if len(v) == len(runs)]
            if not mean:
                continue
            label = f"{norm.upper()} ({len(runs)} seed{'s' * (len(runs) > 1)})"
            panel.plot(*zip(*mean), color=COLORS[norm], linewidth=2.2, label=label)
        panel.set_yscale("log")
        panel.set_title(f"Ours: {title} loss", fontsize=11)
        if rows:
            panel.legend(frameon=False, fontsize=9)
    for norm, values in paper["loss"].items():
        panels[3].plot(paper["steps"], values, "o-", color=COLORS[norm], label=norm.upper())
        rows += [["paper, Fig 5(a)", norm, "", "total", s, 1e5 * v]
                 for s, v in zip(paper["steps"], values)]  # fmt: skip
    panels[3].set_title(
        "Paper, Fig 5(a): total loss (1e5), read off\nthe figure, ± 0.05", fontsize=11
    )
    panels[3].legend(frameon=False, fontsize=9)
    panels[3].set_xticks(range(0, paper["steps"][-1] + 1, 10_000))
    for panel in panels:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path, f"{describe(cells)} Each point: the mean of {window} steps of training; "
         "thin: every seed, thick: their mean as far as all seeds go.")  # fmt: skip
    header = ["source", "norm", "seed", "loss", "step", "value"]
    write_csv(path, header, rows)


def draw_importance(cells: dict[str, list[Run]], path: Path) -> None:
    """Mean (solid) and variance (dashed) weights of each block over the steps, all seeds."""
    runs = [run for norm, found in cells.items() if norm == "sn" for run in found if run.importance]
    if not runs:
        return
    blocks = list(block_importance(runs[0].importance[0]))
    figure, panels = plt.subplots(
        1,
        len(blocks),
        figsize=(2.6 * max(2, len(blocks)), 3.6),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    panels, rows = panels[0], []
    for panel, block in zip(panels, blocks):
        for run in runs:
            for part, line in (("mean", "-"), ("var", "--")):
                steps = [record["step"] for record in run.importance]
                weights = [block_importance(r, part)[block] for r in run.importance]
                for s in weights[0]:
                    values = [weight[s] for weight in weights]
                    panel.plot(steps, values, line, color=COLORS[s], linewidth=1.3)
                    rows += [[run.seed, block, part, s, step, round(value, 6)]
                             for step, value in zip(steps, values)]  # fmt: skip
        panel.set_title(block, fontsize=11)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("importance weight")
    present = [s for s in STATISTICS if s in weights[0]]
    handles = [plt.Line2D([], [], color=COLORS[s], linewidth=2, label=s.upper()) for s in present]
    handles += [
        plt.Line2D([], [], color="0.3", linestyle=line, label=f"{name} weights")
        for name, line in (("mean", "-"), ("variance", "--"))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    note = "The start is 1/3 each. Each block: the average over its SN layers; a line per seed."
    save(figure, path, f"{describe({'sn': runs})} {note}")
    write_csv(path, ["seed", "block", "weights", "statistic", "step", "value"], rows)


def describe(cells: dict[str, list[Run]]) -> str:
    """One line on what was run."""
    summaries = [run.summary for runs in cells.values() for run in runs]
    first = summaries[0]
    steps = sorted({s["steps"] for s in summaries})
    steps = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
    return (
        f"{first['scale'].capitalize()} runs: style {first['style']['name']}, "
        f"{first['data']['train_images']:,} photos ({first['data']['name']}), {steps} steps of "
        f"{first['batch_size']} crops of {first['image_size']} px, VGG16 {first['vgg']['weights']}."
    )


def draw_grid(groups: dict, args: argparse.Namespace, path: Path) -> None:
    """Fig 6: a row per photograph and style, the style inset, a column per norm."""
    from sn.training.style.photos import read_image, resize_long_side, to_pil, to_tensor
    from sn.training.style.stylize import load_style_net, stylize

    rows, columns = [], []
    for cells in groups.values():
        runs = {
            norm: max(found, key=lambda run: run.summary["steps"]) for norm, found in cells.items()
        }
        missing = [r.name for r in runs.values() if not checkpoint(args.checkpoints, r).is_file()]
        if missing:
            print(f"left out of the grid: no checkpoint of {missing[0]}", file=sys.stderr)
            continue
        columns = order({*columns, *runs})
        rows += [(photo, runs) for photo in args.photos]
    if not rows:
        fail(f"no checkpoints of these runs below {args.checkpoints}")
    nets = {}
    shape = (len(rows), 1 + len(columns))
    figure, panels = plt.subplots(
        *shape, figsize=(3.2 * shape[1], 2.6 * shape[0]), layout="constrained", squeeze=False
    )
    for line, (photo, runs) in zip(panels, rows):
        image = resize_long_side(read_image(photo), args.size)
        style = next(iter(runs.values())).summary["style"]["name"]
        line[0].imshow(image)
        if args.styles:
            inset = line[0].inset_axes([0, 0.62, 0.38, 0.38])
            inset.imshow(read_image(args.styles / f"{style}.jpg"), aspect="auto")
            inset.set_xticks([])
            inset.set_yticks([])
        for panel, norm in zip(line[1:], columns):
            panel.set_visible(norm in runs)
            if norm not in runs:
                continue
            run = runs[norm]
            if run.name not in nets:
                nets[run.name] = load_style_net(checkpoint(args.checkpoints, run))
            panel.imshow(to_pil(stylize(nets[run.name], to_tensor(image))))
            panel.set_title(f"{norm.upper()}, {style}, {run.summary['steps']} steps", fontsize=9)
    for panel in panels.flat:
        panel.axis("off")
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 88})
    plt.close(figure)


def checkpoint(root: Path, run: Run) -> Path:
    return root / run.name / "checkpoint.pt"


def write_readme(groups: dict, window: int, path: Path) -> None:
    """The table of all runs; what stands between the notes markers is kept."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    notes = match[1] if (match := NOTES.search(old)) else ""
    lines = [
        "<!-- generated by scripts/plot_style.py; write between the notes markers only -->",
        "",
        "# Style transfer (section 4.3, Figs 5(a) and 6)",
        "",
        f"<!-- notes -->\n{notes}<!-- /notes -->",
    ]
    for name, cells in groups.items():
        lines += ["", f"## {name}", "", describe(cells), ""]
        lines += [
            f"Training loss, mean of {window} steps up to the one named; evaluation: centre crops, "
            "the network as in stylizing.",
            "",
        ]
        marks = common_steps(cells, window)
        lines.append("| norm | seed | " + " | ".join(f"step {s}" for s in marks)
                     + " | steps | last, content | last, style | evaluation | minutes | commit | "
                     "date | note |")  # fmt: skip
        lines.append("| --- | --- |" + " --- |" * (len(marks) + 8))
        for norm, runs in cells.items():
            lines += [table_row(norm, run, marks, window) for run in runs]
        lines += ["", *ratios(cells, marks, window)]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def common_steps(cells: dict[str, list[Run]], window: int) -> list[int]:
    """Some steps that at least one run of every norm has passed, spread by doubling."""
    last = min(max(len(curve(run, "loss")) for run in runs) for runs in cells.values())
    marks = [window * 2**k for k in range(12) if window * 2**k < last]
    ends = {len(curve(run, "loss")) // window * window for runs in cells.values() for run in runs}
    return sorted({*marks, *(end for end in ends if 0 < end <= last)})


def at_step(run: Run, step: int, window: int, part: str = "loss") -> float | None:
    values = curve(run, part)
    return sum(values[step - window : step]) / window if len(values) >= step else None


def table_row(norm: str, run: Run, marks: list[int], window: int) -> str:
    summary, last = run.summary, len(curve(run, "loss"))
    cells = [at_step(run, step, window) for step in marks]
    cells = ["" if value is None else f"{value:.3g}" for value in cells]
    parts = [f"{at_step(run, last, min(window, last), part):.3g}" for part in ("content", "style")]
    evaluation = "" if summary["loss"] is None else f"{summary['loss']:.3g}"
    link = f"[{norm}]({run.name.removeprefix('style_transfer/')})"
    rest = [f"{summary['wall_s'] / 60:.1f}", str(summary["commit"])[:10], summary["date"][:10]]
    row = [link, str(run.seed), *cells, str(summary["steps"]), *parts, evaluation, *rest,
           summary.get("note") or ""]  # fmt: skip
    return "| " + " | ".join(row) + " |"


def ratios(cells: dict[str, list[Run]], marks: list[int], window: int) -> list[str]:
    """How often SN < IN, IN < BN and SN < IN < BN held, seed by seed."""
    if not set(NORMS) <= cells.keys() or not marks:
        return []
    lines = [
        "| step | seeds | SN / IN, each seed | IN / BN, each seed | SN < IN | IN < BN | "
        "SN < IN < BN |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for step in marks:
        found = defaultdict(dict)
        for norm in NORMS:
            for run in cells[norm]:
                value = at_step(run, step, window)
                if value is not None:
                    found[run.seed][norm] = value
        whole = [v for v in found.values() if len(v) == len(NORMS)]
        if not whole:
            continue
        sn_in = [v["sn"] / v["in"] for v in whole]
        in_bn = [v["in"] / v["bn"] for v in whole]
        both = sum(a < 1 and b < 1 for a, b in zip(sn_in, in_bn))
        listed = [", ".join(f"{value:.2f}" for value in values) for values in (sn_in, in_bn)]
        held = [sum(v < 1 for v in sn_in), sum(v < 1 for v in in_bn), both]
        counts = [f"{count} of {len(whole)}" for count in held]
        lines.append("| " + " | ".join([str(step), str(len(whole)), *listed, *counts]) + " |")
    return lines


def save(figure, path: Path, caption: str) -> None:
    figure.supxlabel(fill(caption, 150), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header, *rows])


if __name__ == "__main__":
    main()

"""Draw the learned importance weights: the paper's Fig 2 and Fig 3 from logged runs.

    python scripts/plot_importance.py                      # results/ -> results/figures/
    python scripts/plot_importance.py --runs outputs/demo --weights var --average blocks

Three figures per data set and model, each with a CSV of what it draws:
importance_by_setting (Fig 2), importance_by_block (Fig 3) and importance_over_epochs; of detectors
importance_by_part: the stages of the backbone, FPN and heads. The paper's bars stand beside ours in
a panel of their own. The paper does not say which weights Fig 2 draws nor how layers are averaged,
so each title says what ours does.

Source: Fig 2 and Fig 3, from results/paper.yaml.
"""

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common.records import (
    COLORS,
    FIGURE_SETTINGS,
    ROOT,
    RUNS_HELP,
    STATISTICS,
    Run,
    average_importance,
    block_importance,
    by_group,
    describe_differences,
    differences,
    fail,
    group_name,
    load_paper,
    load_runs,
    mean_and_sd,
    setting_label,
    sort_settings,
)
from matplotlib.patches import Patch

WEIGHTS = {
    "mean": "mean weights",
    "var": "variance weights",
    "both": "average of mean and variance weights",
}
PARTS = ("mean", "var")
HATCH = "////"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw importance weights per setting (Fig 2), per block (Fig 3), over epochs."
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "results", metavar="ROOT", help=RUNS_HELP
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to draw in (default: ROOT/figures)"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="both", help="Fig 2: which weights (both: averaged)"
    )
    parser.add_argument(
        "--average",
        choices=("layers", "blocks"),
        default="layers",
        help="Fig 2: every layer counts the same, or every block",
    )
    parser.add_argument("--data", metavar="DATA_MODEL", help="only this group, as cifar10_resnet20")
    parser.add_argument(
        "--norm", default="sn", help="the norm whose weights are drawn (default: sn)"
    )
    parser.add_argument(
        "--settings", nargs="+", metavar="GxB", help="Fig 3's settings (8x32 and 8x2 if present)"
    )
    args = parser.parse_args(argv)

    paper = load_paper()
    out = args.out or args.runs / "figures"
    if draw_detectors(args, out) and (args.data or not has_classifiers(args.runs)):
        return
    for name, cells in choose(args).items():
        out.mkdir(parents=True, exist_ok=True)
        settings = chosen_settings(args.settings, cells)
        default = (args.weights, args.average) == ("both", "layers")
        choice = "" if default else f"_{args.weights}_{args.average}"
        norm = "" if args.norm == "sn" else f"_{args.norm}"
        path = out / f"importance_by_setting_{name}{norm}{choice}.png"
        draw_by_setting(cells, args.weights, args.average, paper["fig_2"], path)
        print(path)
        path = out / f"importance_by_block_{name}{norm}.png"
        draw_by_block(cells, settings, paper["fig_3"], path)
        print(path)
        path = out / f"importance_over_epochs_{name}{norm}.png"
        draw_over_epochs(cells, settings, path)
        print(path)


def choose(args: argparse.Namespace) -> dict[str, dict[str, list[Run]]]:
    """The runs to draw: by group, then by setting in the figure's order; at least one."""
    try:
        runs = load_runs(args.runs)
    except FileNotFoundError as error:
        fail(str(error))
    if not runs:
        fail(f"no runs below {args.runs}")
    runs = [run for run in runs if run.importance]
    if not runs:
        fail(f"no runs with importance weights below {args.runs}")
    names = sorted({group_name(run.group) for run in runs})
    if args.data and args.data not in names:
        fail(f"no runs of {args.data} with importance weights; there are: {', '.join(names)}")
    norms = sorted({run.norm for run in runs})
    if args.norm not in norms:
        fail(f"no runs of norm {args.norm} with importance weights; there are: {', '.join(norms)}")

    chosen = {}
    for group, found in by_group(runs).items():
        cells = defaultdict(list)
        for run in found:
            if run.norm != args.norm or args.data not in (None, group_name(group)):
                continue
            if run.diverged:
                print(f"warning: {run.path} diverged; its weights are left out", file=sys.stderr)
                continue
            cells[run.setting].append(run)
        if cells:
            order = sort_settings(cells, FIGURE_SETTINGS)
            chosen[group_name(group)] = {setting: cells[setting] for setting in order}
    if not chosen:
        fail(f"no finished runs of norm {args.norm} with importance weights below {args.runs}")
    return chosen


def chosen_settings(wanted: list[str] | None, cells: dict[str, list[Run]]) -> list[str]:
    """Fig 3's settings: those asked for, or (8,32) and (8,2), or the first and the last."""
    if wanted:
        if unknown := [setting for setting in wanted if setting not in cells]:
            fail(f"no runs of setting {', '.join(unknown)}; there are: {', '.join(cells)}")
        return list(dict.fromkeys(wanted))
    paper = [setting for setting in ("8x32", "8x2") if setting in cells]
    return paper if len(paper) == 2 else list(dict.fromkeys([list(cells)[0], list(cells)[-1]]))


def draw_by_setting(cells, weights: str, average: str, paper: dict, path: Path) -> None:
    """Fig 2: a group of bars per setting, averaged over the network."""
    ours = {
        setting: [average_importance(run.importance[-1], weights, average) for run in runs]
        for setting, runs in cells.items()
    }
    published = {setting: [bars] for setting, bars in paper["weights"].items()}
    figure, panels = plt.subplots(2, 1, figsize=(10, 7.6), layout="constrained")
    statistics = present([bars for found in ours.values() for bars in found])
    how = f"{WEIGHTS[weights]}, over all {'SN layers' if average == 'layers' else average} alike"
    bar_groups(panels[0], ours, statistics)
    panels[0].set_title(f"Ours ({title(cells)})\n{how}")
    bar_groups(panels[1], published, present([bars for (bars,) in published.values()]))
    panels[1].set_title(
        "Paper, Fig 2 (ResNet-50 on ImageNet; read off the figure, ± 0.006)\n"
        "the paper does not say which weights and which average it draws"
    )
    for panel, found in zip(panels, (ours, published)):
        panel.set_xticks(range(len(found)), [setting_label(setting) for setting in found])
        finish(panel)
    panels[1].set_xlabel("(GPUs, images per GPU)")
    legend(figure, statistics, split=False)
    save(figure, path, captions(cells))
    rows = []
    for source, found in (("ours", ours), ("paper, Fig 2", published)):
        for setting, bars in found.items():
            seeds = [run.seed for run in cells[setting]] if source == "ours" else [""]
            which = [weights, average] if source == "ours" else ["not stated", "not stated"]
            for seed, bar in zip(seeds, bars):
                rows += [[source, setting, seed, *which, s, round(v, 6)] for s, v in bar.items()]
    header = ["source", "setting", "seed", "weights", "average", "statistic", "value"]
    write_csv(path, header, rows)


def draw_by_block(cells, settings: list[str], paper: dict, path: Path) -> None:
    """Fig 3: mean weights (plain) and variance weights (hatched) of each block."""
    figure, panels = plt.subplots(
        len(settings),
        2,
        figsize=(12.5, 0.8 + 3.4 * len(settings)),
        layout="constrained",
        squeeze=False,
    )
    rows, statistics = [], []
    for (left, right), setting in zip(panels, settings):
        runs = cells[setting]
        ours = defaultdict(list)
        for run in runs:
            parts = {part: block_importance(run.importance[-1], part) for part in PARTS}
            for block in parts["mean"]:
                bars = {part: parts[part][block] for part in PARTS}
                ours[block].append(bars)
                rows += block_rows("ours", setting, run.seed, block, bars)
        found = present([bar["mean"] for bars in ours.values() for bar in bars])
        statistics += found
        bar_groups(left, ours, found, split=True)
        left.set_title(f"Ours {setting_label(setting)}: {title({setting: runs})}", fontsize=11)
        left.set_xticks(range(len(ours)), list(ours))
        published = {block: [bars] for block, bars in paper["weights"].get(setting, {}).items()}
        for block, (bars,) in published.items():
            rows += block_rows("paper, Fig 3", setting, "", block, bars)
        right.set_title(
            f"Paper {setting_label(setting)}: Fig 3, ResNet-50 on ImageNet", fontsize=11
        )
        if published:
            bar_groups(right, published, ["in", "ln", "bn"], split=True)
            names = [block.replace("_", " ") for block in published]
            right.set_xticks(range(len(names)), names)
        else:
            right.text(0.5, 0.5, "not in the paper", ha="center", transform=right.transAxes)
            right.set_xticks([])
        for panel in (left, right):
            finish(panel)
    legend(figure, [s for s in STATISTICS if s in statistics], split=True)
    lines = [
        "Each block: the average over its SN layers.",
        "Paper: read off the figure, ± 0.01; what a block is, is not stated "
        "(probably the stem and the four stages).",
    ]
    save(figure, path, lines + captions({setting: cells[setting] for setting in settings}))
    header = ["source", "setting", "seed", "block", "weights", "statistic", "value"]
    write_csv(path, header, rows)


def draw_over_epochs(cells, settings: list[str], path: Path) -> None:
    """Mean (solid) and variance (dashed) weights of each block as training goes on."""
    curves, rows = {}, []
    for setting in settings:
        for run in cells[setting]:
            for record in run.importance:
                parts = {part: block_importance(record, part) for part in PARTS}
                for block in parts["mean"]:
                    curve = curves.setdefault(setting, {}).setdefault(block, defaultdict(list))
                    for part in PARTS:
                        for s, value in parts[part][block].items():
                            curve[part, s].append((record["epoch"], value))
                            rows.append(
                                [
                                    setting,
                                    run.seed,
                                    record["epoch"],
                                    block,
                                    part,
                                    s,
                                    round(value, 6),
                                ]
                            )
    columns = max(map(len, curves.values()))
    figure, panels = plt.subplots(
        len(settings),
        columns,
        figsize=(0.8 + 2.9 * columns, 0.8 + 2.7 * len(settings)),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for line, setting in zip(panels, settings):
        for panel in line[len(curves[setting]) :]:
            panel.set_visible(False)
        for panel, (block, curve) in zip(line, curves[setting].items()):
            for (part, s), points in curve.items():
                by_epoch = defaultdict(list)
                for epoch, value in points:
                    by_epoch[epoch].append(value)
                means = [mean_and_sd(values)[0] for values in by_epoch.values()]
                style = "-" if part == "mean" else "--"
                panel.plot(list(by_epoch), means, style, color=COLORS[s], linewidth=1.8)
            panel.set_title(f"{setting_label(setting)} {block}", fontsize=11)
            panel.set_ylim(0, 1)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("importance weight")
    for panel in panels[-1]:
        panel.set_xlabel("epoch")
    drawn = present([{s: 0} for row in curves.values() for c in row.values() for _, s in c])
    handles = [plt.Line2D([], [], color=COLORS[s], linewidth=2, label=s.upper()) for s in drawn]
    handles += [
        plt.Line2D([], [], color="0.3", linestyle=style, label=WEIGHTS[part])
        for part, style in zip(PARTS, ("-", "--"))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False)
    runs = {setting: cells[setting] for setting in settings}
    save(
        figure,
        path,
        [f"{title(runs)}; each block: the average over its SN layers."] + captions(runs),
    )
    write_csv(path, ["setting", "seed", "epoch", "block", "weights", "statistic", "value"], rows)


def has_classifiers(root: Path) -> bool:
    return any(run.importance for run in load_runs(root))


def draw_detectors(args: argparse.Namespace, out: Path) -> bool:
    """Draw a figure for each data set and detector; whether there was any."""
    try:
        runs = [run for run in load_runs(args.runs, "detection") if run.importance]
    except FileNotFoundError as error:
        fail(str(error))
    groups = by_group(run for run in runs if not run.diverged)
    groups = {g: found for g, found in groups.items() if args.data in (None, group_name(g))}
    for group, found in groups.items():
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"importance_by_part_{group_name(group)}.png"
        draw_by_part(found, path)
        print(path)
    return bool(groups)


def draw_by_part(runs: list[Run], path: Path) -> None:
    """Mean (plain) and variance (hatched) weights of a detector's stages, FPN and heads."""
    cells = defaultdict(list)
    for run in runs:
        cells[run.parts, run.summary["init"]["name"], run.setting].append(run)
    figure, panels = plt.subplots(
        len(cells), 1, figsize=(11, 0.8 + 3.4 * len(cells)), layout="constrained", squeeze=False
    )
    rows, statistics = [], []
    for panel, ((norms, start, setting), found) in zip(panels[:, 0], cells.items()):
        bars = defaultdict(list)
        for run in found:
            parts = {part: block_importance(run.importance[-1], part) for part in PARTS}
            for block in parts["mean"]:
                bars[block].append({part: parts[part][block] for part in PARTS})
                rows += [
                    [norms, start, *row]
                    for row in block_rows("ours", setting, run.seed, block, bars[block][-1])
                ]
        drawn = present([bar["mean"] for found_bars in bars.values() for bar in found_bars])
        statistics += drawn
        bar_groups(panel, bars, drawn, split=True)
        panel.set_xticks(range(len(bars)), [block.replace("backbone.", "") for block in bars])
        steps = "/".join(sorted({str(run.importance[-1]["step"]) for run in found}))
        panel.set_title(f"{norms}, {start}, {setting_label(setting)}, {steps} steps", fontsize=11)
        finish(panel)
    legend(figure, [s for s in STATISTICS if s in statistics], split=True)
    data, model, scale = runs[0].group
    save(figure, path, [f"{model} on {data}, {scale}. Each block: the average over its SN layers."])
    header = ["norms", "start", "source", "setting", "seed", "block", "weights", "statistic"]
    write_csv(path, [*header, "value"], rows)


def bar_groups(panel, groups: dict[str, list], statistics: list[str], split: bool = False) -> None:
    """A group of bars per key: the mean over seeds, and each seed as a dot.

    groups: for each key one {statistic: weight} per seed, or with `split` one for each part.
    """
    slots = [(part, s) for part in (PARTS if split else (None,)) for s in statistics]
    width = 0.84 / len(slots)
    for x, found in enumerate(groups.values()):
        for i, (part, s) in enumerate(slots):
            bars = [bar[part] if part else bar for bar in found]
            values = [bar[s] for bar in bars if s in bar]
            at = x + (i - (len(slots) - 1) / 2) * width
            if not values:
                panel.text(at, 0.015, "absent", rotation=90, fontsize=8, ha="center", va="bottom",
                           color=COLORS[s])  # fmt: skip
                continue
            hatch = HATCH if part == "var" else None
            panel.bar(at, mean_and_sd(values)[0], width * 0.94, color=COLORS[s], hatch=hatch,
                      edgecolor="white", linewidth=0)  # fmt: skip
            if len(values) > 1:
                panel.plot([at] * len(values), values, "o", color="white", markeredgecolor="black",
                           markersize=3.5)  # fmt: skip


def finish(panel) -> None:
    panel.set_ylim(0, 1)
    panel.set_ylabel("importance weight")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def legend(figure, statistics: list[str], split: bool) -> None:
    """One legend above all panels."""
    handles = [Patch(color=COLORS[s], label=s.upper()) for s in statistics]
    if split:
        handles += [
            Patch(facecolor="0.5", label=WEIGHTS["mean"]),
            Patch(
                facecolor="0.5", edgecolor="white", hatch=HATCH, linewidth=0, label=WEIGHTS["var"]
            ),
        ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def present(bars: list[dict]) -> list[str]:
    """The statistics that occur, in the house order."""
    return [s for s in STATISTICS if any(s in bar for bar in bars)]


def title(cells: dict[str, list[Run]]) -> str:
    """`resnet20 on cifar10, proxy, 8 epochs`."""
    runs = [run for found in cells.values() for run in found]
    data, model, scale = runs[0].group
    epochs = "/".join(map(str, sorted({run.importance[-1]["epoch"] for run in runs})))
    return f"{model} on {data}, {scale}, {epochs} epochs"


def captions(cells: dict[str, list[Run]]) -> list[str]:
    """What a reader has to know about our bars."""
    lines = []
    if any("bn" not in present_in(run) for runs in cells.values() for run in runs):
        lines.append("absent: left out of the layer by construction (IN and LN only), not learned.")
    seeds = sorted({len(runs) for runs in cells.values()})
    if seeds != [1]:
        lines.append(f"Ours: the mean over {'/'.join(map(str, seeds))} seeds.")
    for setting, runs in cells.items():
        if unlike := differences(runs):
            where = setting_label(setting)
            lines.append(f"Runs of {where} are not alike: {describe_differences(unlike)}.")
    if unlike := differences([run for runs in cells.values() for run in runs], one_cell=False):
        lines.append(f"Runs differ in: {describe_differences(unlike)}.")
    for line in lines:
        if " alike" in line or line.startswith("Runs differ"):
            print(f"warning: {line}", file=sys.stderr)
    return lines


def present_in(run: Run) -> list[str]:
    return present([layer["mean"] for layer in run.importance[-1]["layers"].values()])


def block_rows(source: str, setting: str, seed, block: str, bars: dict) -> list[list]:
    return [
        [source, setting, seed, block, part, s, round(value, 6)]
        for part in PARTS
        for s, value in bars[part].items()
    ]


def save(figure, path: Path, lines: list[str]) -> None:
    """Write the PNG with its caption lines below; without a date, so that it is reproducible."""
    caption = "\n".join(fill(line, 120) for line in lines)
    figure.text(0.5, -0.01, caption, ha="center", va="top", fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()

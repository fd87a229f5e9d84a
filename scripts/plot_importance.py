"""Draw the learned importance weights: the paper's Fig 2 and Fig 3 from logged runs.

    python scripts/plot_importance.py                      # results/ -> results/figures/
    python scripts/plot_importance.py --runs outputs --weights var --average blocks

Three figures per data set, model and recipe, each with a CSV of what it draws:
importance_by_setting (Fig 2, and how the weights changed in training), importance_by_block (Fig 3)
and importance_over_epochs; of detectors importance_by_part: the stages of the backbone, FPN and
heads. Bars begin where the run did: at 1/K, the weight of each of K statistics that count alike,
unless it was fine-tuned; axes show what occurs. The paper's bars stand beside ours in a panel of
their own. The paper does not say which weights Fig 2 draws nor how layers are averaged, so each
title says what ours does.

Source: Fig 2 and Fig 3, from results/paper.yaml.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from common import figures
from common.records import (
    FIGURE_SETTINGS,
    STATISTICS,
    Run,
    average_importance,
    block_importance,
    by_group,
    differences,
    fail,
    group_name,
    load_paper,
    none_of,
    over_seeds,
    setting_label,
    sort_settings,
)
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

WEIGHTS = figures.PARTS | {"both": "average of mean and variance weights"}
HATCH = "////"
ONLY = "IN and LN only, BN left out of the layer by construction"
ABSENT = "absent: left out of the layer by construction (IN and LN only), not learned."
BLOCKS = "Each block: the average over its SN layers."
BARS = "Bars begin where training did, the paper's at 1/K; each panel has a scale of its own."


def main(argv: list[str] | None = None) -> None:
    parser = figures.arguments(
        "Draw importance weights per setting (Fig 2), per block (Fig 3), in time."
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

    out = args.out or args.runs / "figures"
    every_detector = figures.read(args.runs, "detection")
    detectors = with_weights(every_detector, args.data)
    classifiers = figures.read(args.runs)
    draw_detectors(detectors, every_detector, out, args.format)
    if detectors and (args.data or not any(run.importance for run in classifiers)):
        return
    paper = load_paper()
    groups = choose(classifiers, args)
    for name, (runs, lines) in figures.by_recipe(groups, lambda run: run.setting).items():
        cells = defaultdict(list)
        for run in runs:
            cells[run.setting].append(run)
        cells = {setting: cells[setting] for setting in sort_settings(cells, FIGURE_SETTINGS)}
        settings = chosen_settings(args.settings, cells)
        gone = diverged_like([run for run in classifiers if run.norm == args.norm], runs)
        default = (args.weights, args.average) == ("both", "layers")
        choice = "" if default else f"_{args.weights}_{args.average}"
        end = f"{name}{'' if args.norm == 'sn' else f'_{args.norm}'}"
        path = out / f"importance_by_setting_{end}{choice}.{args.format}"
        said = captions(runs) + lines + left_out(gone)
        draw_by_setting(cells, args.weights, args.average, paper["fig_2"], path, said)
        if not settings:
            figures.warn(f"no runs of {', '.join(args.settings)} in {name}: blocks not drawn")
            continue
        shown = captions([run for s in settings for run in cells[s]], marked=False) + lines
        shown += left_out([run for run in gone if run.setting in settings])
        path = out / f"importance_by_block_{end}.{args.format}"
        draw_by_block(cells, settings, paper["fig_3"], path, shown)
        path = out / f"importance_over_epochs_{end}.{args.format}"
        draw_over_epochs(cells, settings, path, shown)


def with_weights(runs: list[Run], data: str | None) -> dict[str, list[Run]]:
    """Runs with importance weights that did not diverge, by the group's name."""
    found = {}
    for group, same in by_group(run for run in runs if run.importance).items():
        same = [run for run in same if not run.diverged]
        if same and data in (None, group_name(group)):
            found[group_name(group)] = same
    return found


def diverged_like(every: list[Run], runs: list[Run]) -> list[Run]:
    """Those of some runs that diverged and are of the group and the recipe of `runs`."""
    return [
        run
        for run in every
        if run.diverged
        and run.group == runs[0].group
        and not differences([runs[0], run], one_cell=False, free={"epochs", "steps"})
    ]


def left_out(diverged: list[Run]) -> list[str]:
    """A caption's line on the runs that diverged, none if there are none."""
    if not diverged:
        return []
    cells = defaultdict(list)
    for run in diverged:
        name = setting_label(run.setting)
        cells[name if run.summary.get("norm") else f"{run.parts} {name}"].append(run.seed)
    said = (
        f"{name} seed {', '.join(map(str, sorted(seeds)))}" for name, seeds in sorted(cells.items())
    )
    return [f"Diverged and left out: {'; '.join(said)}."]


def choose(runs: list[Run], args: argparse.Namespace) -> dict[str, list[Run]]:
    """The classifiers to draw, by group; at least one."""
    if not runs:
        fail(none_of("classification", args.runs))
    runs = [run for run in runs if run.importance]
    if not runs:
        fail(f"no runs with importance weights below {args.runs}")
    names = sorted({group_name(run.group) for run in runs})
    if args.data and args.data not in names:
        fail(f"no runs of {args.data} with importance weights; there are: {', '.join(names)}")
    norms = sorted({run.norm for run in runs})
    if args.norm not in norms:
        fail(f"no runs of norm {args.norm} with importance weights; there are: {', '.join(norms)}")
    runs = [run for run in runs if run.norm == args.norm]
    for run in runs:
        if run.diverged:
            figures.warn(f"{run.path} diverged; its weights are left out")
    chosen = with_weights(runs, args.data)
    if not chosen:
        fail(f"no finished runs of norm {args.norm} with importance weights below {args.runs}")
    if args.settings:
        there = {run.setting for found in chosen.values() for run in found}
        if unknown := [setting for setting in args.settings if setting not in there]:
            there = ", ".join(sort_settings(there, FIGURE_SETTINGS))
            fail(f"no runs of setting {', '.join(unknown)}; there are: {there}")
    return chosen


def chosen_settings(wanted: list[str] | None, cells: dict[str, list[Run]]) -> list[str]:
    """Fig 3's settings: those asked for, or (8,32) and (8,2), or the first and the last."""
    found = [setting for setting in dict.fromkeys(wanted or ("8x32", "8x2")) if setting in cells]
    if wanted or len(found) == 2:
        return found
    return list(dict.fromkeys([list(cells)[0], list(cells)[-1]]))


def draw_by_setting(
    cells, weights: str, average: str, paper: dict, path: Path, lines: list[str]
) -> None:
    """Fig 2: bars per setting, averaged over the network; below, their change in training."""
    first, last = (
        {
            setting: [(run.seed, average_importance(run.importance[which], weights, average))
                      for run in runs]
            for setting, runs in cells.items()
        }
        for which in (0, -1)
    )  # fmt: skip
    published = {setting: [(0, bars)] for setting, bars in paper["weights"].items()}
    figure = plt.figure(figsize=(10, 10.5), layout="constrained")
    ours, change, theirs = figure.subfigures(3, 1, height_ratios=(3.6, 3, 3.8))
    panel = ours.subplots()
    how = f"{WEIGHTS[weights]}, over all {'SN layers' if average == 'layers' else average} alike"
    draw_bars(panel, last, starts=first)
    panel.set_title(f"Ours ({title(cells)})\n{how}")
    panels = change.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for small, (setting, runs) in zip(panels, cells.items()):
        draw_change(small, runs, lambda record: average_importance(record, weights, average))
        small.set_title(setting_label(setting), fontsize=10)
    figures.fit(panels)
    panels[0].set_ylabel("change")
    change.suptitle("Ours: change of these weights in training", fontsize=12)
    panel = theirs.subplots()
    draw_bars(panel, published)
    panel.set_title(
        "Paper, Fig 2 (ResNet-50 on ImageNet; read off the figure, ± 0.006)\n"
        "the paper does not say which weights and which average it draws"
    )
    panel.set_xlabel("(GPUs, images per GPU)")
    statistics = figures.present(bars for found in last.values() for _, bars in found)
    figures.legend(figure, bar_handles(statistics, split=False))
    rows = []
    for source, found in (("ours", last), ("paper, Fig 2", published)):
        for setting, bars in found.items():
            which = [weights, average] if source == "ours" else ["not stated", "not stated"]
            for seed, bar in bars:
                seed = seed if source == "ours" else ""
                rows += [
                    [source, setting, seed, *which, s, figures.tidy(v)] for s, v in bar.items()
                ]
    header = ["source", "setting", "seed", "weights", "average", "statistic", "value"]
    figures.save(figure, path, [BARS, *lines], header, rows)


def draw_by_block(cells, settings: list[str], paper: dict, path: Path, lines: list[str]) -> None:
    """Fig 3: mean weights (plain) and variance weights (hatched) of each block."""
    size = (12.5, 0.8 + 3.4 * len(settings))
    figure, panels = plt.subplots(
        len(settings), 2, figsize=size, layout="constrained", squeeze=False
    )
    rows, statistics = [], set()
    for (left, right), setting in zip(panels, settings):
        runs = cells[setting]
        ours = bars_by_block(runs)
        rows += block_rows("ours", setting, ours)
        statistics |= {s for found in ours.values() for _, bars in found for s in bars["mean"]}
        draw_bars(left, ours, True, bars_by_block(runs, 0))
        left.set_title(f"Ours {setting_label(setting)}: {title({setting: runs})}", fontsize=11)
        weights = paper["weights"].get(setting, {})
        published = {block: [("", bars)] for block, bars in weights.items()}
        rows += block_rows("paper, Fig 3", setting, published)
        right.set_title(
            f"Paper {setting_label(setting)}: Fig 3, ResNet-50 on ImageNet", fontsize=11
        )
        if published:
            names = {block.replace("_", " "): bars for block, bars in published.items()}
            draw_bars(right, names, split=True)
        else:
            right.text(0.5, 0.5, "not in the paper", ha="center", transform=right.transAxes)
            right.set_xticks([])
            figures.clear(right, "y")
    figures.legend(figure, bar_handles([s for s in STATISTICS if s in statistics], split=True))
    note = (
        "Paper: read off the figure, ± 0.01; what a block is, is not stated "
        "(probably the stem and the four stages)."
    )
    header = ["source", "setting", "seed", "block", "weights", "statistic", "value"]
    figures.save(figure, path, [f"{BLOCKS} {BARS}", note, *lines], header, rows)


def draw_over_epochs(cells, settings: list[str], path: Path, lines: list[str]) -> None:
    """Mean (solid) and variance (dashed) weights of each block as training goes on."""
    shown = {setting: blocks_of(cells[setting]) for setting in settings}
    columns = max(map(len, shown.values()))
    size = (0.8 + 2.9 * columns, 0.8 + 2.7 * len(settings))
    figure, panels = plt.subplots(
        *(len(settings), columns), figsize=size, layout="constrained", sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    rows, drawn = [], set()
    for line, (setting, blocks) in zip(panels, shown.items()):
        for panel in line[len(blocks) :]:
            panel.set_visible(False)
        for panel, block in zip(line, blocks):
            counts = set()
            for part in figures.PARTS:

                def weights(record: dict, part=part, block=block) -> dict[str, float]:
                    return block_importance(record, part)[block]

                curves = weight_curves(cells[setting], weights)
                for s, found in curves.items():
                    figures.draw_seeds(panel, found, figures.COLORS[s], figures.STYLES[part], 1.8)
                    drawn.add(s)
                counts.add(len(curves))
            figures.mark_start(panel, counts)
            panel.set_title(f"{setting_label(setting)} {block}", fontsize=11)
            figures.clear(panel)
        line[0].set_ylabel("importance weight")
        rows += [row for run in cells[setting] for row in run_rows(setting, run)]
    figures.fit(panels.flat)
    for panel in panels[-1]:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figures.legend(figure, figures.statistic_lines([s for s in STATISTICS if s in drawn]))
    header = ["setting", "seed", "epoch", "block", "weights", "statistic", "value"]
    first = f"{title({s: cells[s] for s in settings})}. {BLOCKS}"
    figures.save(figure, path, [first, *lines], header, rows)


def draw_detectors(groups: dict[str, list[Run]], every: list[Run], out: Path, suffix: str) -> None:
    """A figure for each data set, detector and recipe; every: diverged runs, too."""
    for name, (runs, lines) in figures.by_recipe(groups, part_cell).items():
        drawn = {run.parts for run in runs}
        gone = [run for run in diverged_like(every, runs) if run.parts in drawn]
        lines = lines + left_out(gone)
        draw_by_part(runs, out / f"importance_by_part_{name}.{suffix}", lines)


def part_cell(run: Run) -> tuple[str, str, str]:
    """What detectors may differ in within a figure: parts, start, setting."""
    return run.parts, run.summary["init"]["name"], run.setting


def draw_by_part(runs: list[Run], path: Path, lines: list[str]) -> None:
    """Weights of a detector's stages, FPN and heads; beside them their change in training."""
    cells = defaultdict(list)
    for run in runs:
        cells[part_cell(run)].append(run)
    figure, panels = plt.subplots(
        len(cells), 2, figsize=(13.5, 0.8 + 3.4 * len(cells)), layout="constrained", squeeze=False,
        width_ratios=(3, 1),
    )  # fmt: skip
    rows, statistics = [], set()
    for (panel, change), ((norms, start, setting), found) in zip(panels, cells.items()):
        bars = bars_by_block(found)
        rows += [[norms, start, *row] for row in block_rows("ours", setting, bars)]
        statistics |= {s for same in bars.values() for _, bar in same for s in bar["mean"]}
        draw_bars(panel, bars, True, bars_by_block(found, 0))
        steps = "/".join(sorted({str(count(run.importance[-1])) for run in found}))
        panel.set_title(f"{norms}, {start}, {setting_label(setting)}, {steps} steps", fontsize=11)
        for part in figures.PARTS:
            draw_change(
                change,
                found,
                lambda r, part=part: average_importance(r, part),
                figures.STYLES[part],
            )
        figures.fit([change])
        change.set_title("change in training, all layers", fontsize=11)
    figures.legend(figure, bar_handles([s for s in STATISTICS if s in statistics], split=True))
    data, model, scale = runs[0].group
    note = (
        f"{model} on {data}, {scale}. {BLOCKS} {BARS} Right: mean weights solid, variance dashed."
    )
    header = ["norms", "start", "source", "setting", "seed", "block", "weights", "statistic"]
    figures.save(figure, path, [note, *captions(runs), *lines], [*header, "value"], rows)


# --- panels


def draw_bars(
    panel, groups: dict[str, list[tuple]], split: bool = False, starts: dict | None = None
) -> None:
    """Bars from the start to the mean over seeds, each run as a dot, intervals as error bars.

    groups: for each key (seed, {statistic: weight}) of each run, with `split` the same for each
    part: (seed, {"mean": ..., "var": ...}). starts: the same before training; None: all at 1/K.
    """
    parts = tuple(figures.PARTS) if split else (None,)

    def of(bars: dict, part: str | None) -> dict[str, float]:
        return bars[part] if part else bars

    everything = [of(bars, p) for found in groups.values() for _, bars in found for p in parts]
    slots = [(part, s) for part in parts for s in figures.present(everything)]
    width = 0.84 / len(slots)
    alike, spreads, missing, dots = set(), [], [], []
    for x, (key, found) in enumerate(groups.items()):
        count = len(figures.present(of(bars, p) for _, bars in found for p in parts))
        for i, (part, s) in enumerate(slots):
            values = [(seed, of(bars, part)[s]) for seed, bars in found if s in of(bars, part)]
            at = x + (i - (len(slots) - 1) / 2) * width
            if not values:
                missing.append((at, s))
                continue
            spreads.append(spread := over_seeds(values))
            before = [(seed, of(bars, part)[s]) for seed, bars in (starts or {}).get(key, ())]
            start = over_seeds(before).mean if before else 1 / count
            if abs(start - 1 / count) < 1e-4:
                alike.add(count)
            else:
                half = 0.47 * width
                panel.hlines(start, at - half, at + half, color=figures.COLORS[s], linewidth=2)
            dots.append(start)
            panel.bar(at, spread.mean - start, width * 0.94, start, color=figures.COLORS[s],
                      linewidth=0, hatch=HATCH if part == "var" else None,
                      edgecolor="white")  # fmt: skip
            if len(values) > 1:
                dots += [weight for _, weight in values]
                few = len(values) <= figures.FEW
                step = 0 if few else 0.8 * width / (len(values) - 1)  # side by side, by seed
                places = [at + step * (k - (len(values) - 1) / 2) for k in range(len(values))]
                look = {"color": "white", "markeredgecolor": "black", "markersize": 3}
                if not few:
                    look = {"color": "black", "markersize": 1, "alpha": 0.5}
                panel.plot(places, [weight for _, weight in values], "o", **look)
            if spread.half is not None:
                panel.errorbar(at, spread.mean, spread.half, color="0.25", linewidth=1)
    low, high = figures.reach_of(spreads, dots)
    low, high = max(low, 0), min(high, 1)
    panel.set_ylim(low, high)
    room = max(0, 3 - len(groups)) / 2
    if room or missing:  # whose places have no bar
        panel.set_xlim(-0.5 - room, len(groups) - 0.5 + room)
    figures.mark_start(panel, alike)
    for at, s in missing:
        panel.text(at, low, " absent", rotation=90, fontsize=8, ha="center", va="bottom",
                   color=figures.COLORS[s])  # fmt: skip
    panel.set_xticks(range(len(groups)), [label_of(key) for key in groups])
    panel.set_ylabel("importance weight")
    figures.clear(panel, "y")


def label_of(key: str) -> str:
    """A setting as the paper writes it; anything else as it is."""
    return setting_label(key) if key.replace("x", "", 1).isdigit() else key.replace("backbone.", "")


def draw_change(panel, runs: list[Run], weights: Callable, style: str = "-") -> None:
    """What was added to the weights since the first record, against epochs or steps."""

    def change(run: Run) -> Callable:
        first = weights(run.importance[0])
        return lambda record: {s: w - first.get(s, 0.0) for s, w in weights(record).items()}

    for s, found in weight_curves(runs, change, of_run=True).items():
        figures.draw_seeds(panel, found, figures.COLORS[s], style, 1.8)
    panel.axhline(0, color="0.35", linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    panel.set_xlabel("epoch" if "epoch" in runs[0].importance[0] else "step")
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figures.clear(panel)


def weight_curves(runs: list[Run], weights: Callable, of_run: bool = False) -> dict[str, dict]:
    """For each statistic (seed, folder) -> [(epoch or step, weight), ...], as `draw_seeds` wants.

    weights: of a record; with `of_run` of a run, which gives that of its records.
    """
    curves = defaultdict(dict)
    for run in runs:
        of_record = weights(run) if of_run else weights
        for record in run.importance:
            for s, weight in of_record(record).items():
                curves[s].setdefault((run.seed, run.path), []).append((count(record), weight))
    return {s: curves[s] for s in STATISTICS if s in curves}


def bar_handles(statistics: list[str], split: bool) -> list[Patch]:
    handles = [Patch(color=figures.COLORS[s], label=s.upper()) for s in statistics]
    if split:
        look = {"facecolor": "0.5", "edgecolor": "white", "linewidth": 0}
        handles += [Patch(label=figures.PARTS["mean"], **look)]
        handles += [Patch(label=figures.PARTS["var"], hatch=HATCH, **look)]
    return handles


# --- values


def count(record: dict) -> int:
    """The epoch or step of a record."""
    return record["epoch"] if "epoch" in record else record["step"]


def blocks_of(runs: list[Run]) -> list[str]:
    return list(block_importance(runs[0].importance[-1]))


def bars_by_block(runs: list[Run], which: int = -1) -> dict[str, list[tuple]]:
    """The weights of each block in a record, (seed, {part: weights}) for each run."""
    bars = defaultdict(list)
    for run in runs:
        parts = {part: block_importance(run.importance[which], part) for part in figures.PARTS}
        for block in parts["mean"]:
            bars[block].append((run.seed, {part: parts[part][block] for part in figures.PARTS}))
    return bars


def block_rows(source: str, setting: str, groups: dict[str, list[tuple]]) -> list[list]:
    """Rows of a CSV, run by run."""
    return [
        [source, setting, found[i][0], block, part, s, figures.tidy(value)]
        for i in range(max(map(len, groups.values()), default=0))
        for block, found in groups.items()
        if i < len(found)
        for part in figures.PARTS
        for s, value in found[i][1][part].items()
    ]


def run_rows(setting: str, run: Run) -> list[list]:
    rows = []
    for record in run.importance:
        parts = {part: block_importance(record, part) for part in figures.PARTS}
        for block in parts["mean"]:
            for part in figures.PARTS:
                rows += [[setting, run.seed, count(record), block, part, s, figures.tidy(value)]
                         for s, value in parts[part][block].items()]  # fmt: skip
    return rows


def title(cells: dict[str, list[Run]]) -> str:
    """`resnet20 on cifar10, proxy, 8 epochs`."""
    runs = [run for found in cells.values() for run in found]
    data, model, scale = runs[0].group
    epochs = "/".join(map(str, sorted({count(run.importance[-1]) for run in runs})))
    return f"{model} on {data}, {scale}, {epochs} epochs"


def captions(runs: list[Run], marked: bool = True) -> list[str]:
    """What a reader has to know about our bars; marked: a statistic that is absent has its word."""
    without = [
        run.setting
        for run in runs
        if any("bn" not in layer["mean"] for layer in run.importance[-1]["layers"].values())
    ]
    lines = [ABSENT] if without else []
    if without and not marked:
        lines = [f"{', '.join(map(setting_label, sort_settings(set(without))))}: {ONLY}."]
    seeds = defaultdict(set)
    for run in runs:
        seeds[Path(run.name).parent].add(run.seed)
    counts = sorted({len(found) for found in seeds.values()})
    if counts != [1]:
        seen = f"the mean over {figures.from_to(counts)} seeds"
        lines.append(f"Ours: {seen}; dots, thin lines: runs; {figures.INTERVAL}.")
    return lines


if __name__ == "__main__":
    main()

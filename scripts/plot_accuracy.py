"""Draw top-1 against the (GPUs, images per GPU) setting, a line per norm: the paper's Fig 4.

    python scripts/plot_accuracy.py                        # results/ -> results/figures/
    python scripts/plot_accuracy.py --runs outputs --metric top1_batch_average

One figure and one CSV per data set, model and recipe. The paper's figure is a panel of its own.

Source: Fig 4, from results/paper.yaml.
"""

import matplotlib.pyplot as plt
from common import figures
from common.records import (
    FIGURE_SETTINGS,
    Run,
    by_cell,
    by_group,
    fail,
    group_name,
    load_paper,
    none_of,
    over_seeds,
    setting_label,
    sort_norms,
    sort_settings,
)

METRICS = {"top1": "BN by moving average", "top1_batch_average": "BN by batch average"}
LR = "schedule.lr_per_256"  # may be chosen for each norm
NAMES = {"sn_with_bn": "SN with BN"}
MARKERS = {"bn": "o", "gn": "s", "sn": "D", "in": "^", "ln": "v", "brn": "*", "bkn": "X"}


def main(argv: list[str] | None = None) -> None:
    parser = figures.arguments(
        "Draw top-1 against the setting, a line per norm, the paper's Fig 4 beside."
    )
    parser.add_argument("--metric", choices=METRICS, default="top1", help="(default: top1)")
    parser.add_argument("--data", metavar="DATA_MODEL", help="only this group, as cifar10_resnet20")
    args = parser.parse_args(argv)
    groups = {group_name(group): runs for group, runs in by_group(figures.read(args.runs)).items()}
    if not groups:
        fail(none_of("classification", args.runs))
    if args.data and args.data not in groups:
        fail(f"no runs of {args.data} below {args.runs}; there are: {', '.join(sorted(groups))}")

    out = args.out or args.runs / "figures"
    paper = load_paper()["fig_4"]
    groups = {name: runs for name, runs in groups.items() if args.data in (None, name)}
    groups = figures.by_recipe(groups, lambda run: (run.norm, run.setting), of_norm=[LR])
    for name, (runs, lines) in groups.items():
        suffix = "" if args.metric == "top1" else "_batch_average"
        path = out / f"accuracy_by_setting_{name}{suffix}.{args.format}"
        draw(runs, args.metric, paper, path, lines)


def draw(runs: list[Run], metric: str, paper: dict, path, lines: list[str]) -> None:
    """Our runs in one panel, the paper's Fig 4 in the other, on axes of their own."""
    data, model, scale = runs[0].group
    figure, (ours, published) = plt.subplots(1, 2, figsize=(12.5, 5.2), layout="constrained")
    draw_runs(ours, runs, metric)
    epochs = "/".join(map(str, sorted({run.summary.get("epochs") or 0 for run in runs})))
    ours.set_title(f"Ours ({scale}): {model} on {data}, {epochs} epochs\n{METRICS[metric]}")
    draw_paper(published, paper)
    published.set_title("Paper, Fig 4: ResNet-50 on ImageNet\nread off the figure, ± 0.1")
    for panel in (ours, published):
        panel.set_xlabel("(GPUs, images per GPU)")
        panel.set_ylabel("top-1 (%)")
        figures.clear(panel, "y")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False)
    header, rows = table(runs, metric, paper)
    figures.save(figure, path, captions(runs) + lines, header, rows, width=150)


def draw_runs(panel, runs: list[Run], metric: str) -> None:
    """Runs as dots, means over seeds as a line that breaks where the number of GPUs changes."""
    cells = by_cell(runs)
    settings = sort_settings({s for _, s in cells}, FIGURE_SETTINGS)
    norms = sort_norms({n for n, _ in cells})
    diverged, spreads, points = [], [], []
    for i, norm in enumerate(norms):
        shift = 0.06 * (i - (len(norms) - 1) / 2)  # norms of one value would hide each other
        means = []
        for x, setting in enumerate(settings):
            found = cells.get((norm, setting), [])
            values = [(r.seed, v) for r in found if (v := r.metric(metric)) is not None]
            means.append(None)
            if values:
                spreads.append(spread := over_seeds(values))
                points += [v for _, v in values]
                means[-1] = spread.mean
                if len(values) > 1:
                    panel.plot([x + shift] * len(values), [v for _, v in values], ".",
                               color=figures.color(norm),
                               alpha=0.5 * figures.ink(len(values)))  # fmt: skip
                if spread.half is not None:
                    panel.errorbar(x + shift, spread.mean, spread.half, color=figures.color(norm),
                                   linewidth=1.2, capsize=3, alpha=0.7)  # fmt: skip
            if any(run.diverged for run in found):
                diverged.append((x + shift, norm))
        draw_line(panel, settings, means, norm, shift)
    low, high = figures.reach_of(spreads, points, least=1.0) if spreads else panel.get_ylim()
    for x, norm in diverged:
        panel.plot(x, low, "X", color=figures.color(norm), markersize=10, clip_on=False, zorder=5)
        panel.annotate(f"{norm} diverged", (x, low), (0, 8), textcoords="offset points", fontsize=8,
                       rotation=90, ha="center", va="bottom",
                       color=figures.color(norm))  # fmt: skip
    panel.set_ylim(low, high)
    panel.set_xticks(range(len(settings)), [setting_label(s) for s in settings])


def draw_paper(panel, paper: dict) -> None:
    settings = paper["settings"]
    for i, norm in enumerate(sort_norms(paper["top1"])):
        draw_line(panel, settings, paper["top1"][norm], norm, 0.06 * (i - 1))
    panel.set_ylim(72, 77.5)
    x = settings.index("8x2")
    panel.annotate("BN (8,2) is below\nthe axis (65.3)", (x, 72), (x - 0.2, 72.6), ha="center",
                   fontsize=8, color=figures.color("bn"),
                   arrowprops={"arrowstyle": "->"})  # fmt: skip
    panel.set_xticks(range(len(settings)), [setting_label(s) for s in settings])


def draw_line(panel, settings: list[str], values: list, norm: str, shift: float) -> None:
    """One norm's points, joined within a number of GPUs."""
    style = {"color": figures.color(norm), "marker": MARKERS.get(norm, "P"), "markersize": 6}
    label = label_of(norm)
    gpus = [setting.split("x")[0] for setting in settings]
    for g in dict.fromkeys(gpus):
        xs = [x for x, v in enumerate(values) if gpus[x] == g and v is not None]
        if xs:
            panel.plot([x + shift for x in xs], [values[x] for x in xs], label=label, **style)
            label = None


def label_of(norm: str) -> str:
    return NAMES.get(norm) or (norm.upper() if norm in MARKERS else norm)


def captions(runs: list[Run]) -> list[str]:
    """What a reader has to know about our panel."""
    lines = []
    seeds = sorted({len({run.seed for run in found}) for found in by_cell(runs).values()})
    if seeds != [1]:
        lines.append(f"Ours: line = mean over {figures.from_to(seeds)} seeds, dots = runs, "
                     f"{figures.INTERVAL}.")  # fmt: skip
    lrs = {run.norm: run.config.get("schedule", {}).get("lr_per_256") for run in runs}
    if len(set(lrs.values())) > 1:
        values = ", ".join(f"{label_of(norm)} {lrs[norm]}" for norm in sort_norms(lrs))
        lines.append(f"lr per 256 images: {values}.")
    if any(run.norm == "sn" and run.without_bn for run in runs):
        lines.append("SN at one image per GPU: IN and LN only, as in the paper.")
    return lines


def table(runs: list[Run], metric: str, paper: dict) -> tuple[list[str], list[list]]:
    """The plotted values, one line per run and per point of the paper's figure."""
    rows = []
    for run in runs:
        value = run.metric(metric)
        row = ["ours", run.norm, run.setting, run.seed, "" if value is None else value]
        rows.append([*row, run.summary["status"]])
    for norm, values in paper["top1"].items():
        for setting, value in zip(paper["settings"], values):
            rows.append(["paper, Fig 4", norm, setting, "", value or "", ""])
    return ["source", "norm", "setting", "seed", metric, "status"], rows


if __name__ == "__main__":
    main()

"""Draw top-1 against the (GPUs, images per GPU) setting, a line per norm: the paper's Fig 4.

    python scripts/plot_accuracy.py                        # results/ -> results/figures/
    python scripts/plot_accuracy.py --runs outputs/demo --metric top1_batch_average

One PNG and one CSV per data set and model. The paper's figure is a panel of its own.

Source: Fig 4, from results/paper.yaml.
"""

import argparse
import csv
import sys
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
    Run,
    by_cell,
    by_group,
    describe_differences,
    differences,
    fail,
    group_name,
    load_paper,
    load_runs,
    mean_and_sd,
    setting_label,
    sort_norms,
    sort_settings,
)

METRICS = {"top1": "BN by moving average", "top1_batch_average": "BN by batch average"}
MARKERS = {"bn": "o", "gn": "s", "sn": "D", "in": "^", "ln": "v"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw top-1 against the setting, a line per norm, the paper's Fig 4 beside it."
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "results", metavar="ROOT", help=RUNS_HELP
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to draw in (default: ROOT/figures)"
    )
    parser.add_argument("--metric", choices=METRICS, default="top1", help="(default: top1)")
    parser.add_argument("--data", metavar="DATA_MODEL", help="only this group, as cifar10_resnet20")
    args = parser.parse_args(argv)
    try:
        groups = by_group(load_runs(args.runs))
    except FileNotFoundError as error:
        fail(str(error))
    if not groups:
        fail(f"no runs below {args.runs}")
    names = {group_name(group) for group in groups}
    if args.data and args.data not in names:
        fail(f"no runs of {args.data} below {args.runs}; there are: {', '.join(sorted(names))}")

    out = args.out or args.runs / "figures"
    out.mkdir(parents=True, exist_ok=True)
    paper = load_paper()["fig_4"]
    for group, runs in groups.items():
        if args.data in (None, group_name(group)):
            suffix = "" if args.metric == "top1" else "_batch_average"
            path = out / f"accuracy_by_setting_{group_name(group)}{suffix}.png"
            draw(runs, args.metric, paper, path)
            write_csv(runs, args.metric, paper, path.with_suffix(".csv"))
            print(path)


def draw(runs: list[Run], metric: str, paper: dict, path: Path) -> None:
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
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False)
    caption = "\n".join(fill(line, 150) for line in captions(runs))
    figure.text(0.5, -0.005, caption, ha="center", va="top", fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw_runs(panel, runs: list[Run], metric: str) -> None:
    """Seeds as dots, their mean as a line that breaks where the number of GPUs changes."""
    cells = by_cell(runs)
    settings = sort_settings({s for _, s in cells}, FIGURE_SETTINGS)
    norms = sort_norms({n for n, _ in cells})
    diverged = []
    for i, norm in enumerate(norms):
        shift = 0.06 * (i - (len(norms) - 1) / 2)  # norms of one value would hide each other
        means = []
        for x, setting in enumerate(settings):
            found = cells.get((norm, setting), [])
            values = [v for run in found if (v := run.metric(metric)) is not None]
            means.append(mean_and_sd(values)[0] if values else None)
            if len(values) > 1:
                panel.plot([x + shift] * len(values), values, ".", color=color(norm), alpha=0.5)
            if any(run.diverged for run in found):
                diverged.append((x + shift, norm))
        draw_line(panel, settings, means, norm, shift)
    low, high = panel.get_ylim()
    for x, norm in diverged:
        panel.plot(x, low, "X", color=color(norm), markersize=10, clip_on=False, zorder=5)
        panel.annotate(f"{norm} diverged", (x, low), (0, 8), textcoords="offset points", fontsize=8,
                       rotation=90, ha="center", va="bottom", color=color(norm))  # fmt: skip
    panel.set_ylim(low, high)
    if ideal := ideal_bn(runs, metric):
        setting, value = ideal
        label = f"ideal BN: BN at {setting_label(setting)}"
        panel.axhline(value, color=color("bn"), linestyle="--", linewidth=1, label=label)
    panel.set_xticks(range(len(settings)), [setting_label(s) for s in settings])


def draw_paper(panel, paper: dict) -> None:
    settings = paper["settings"]
    for i, norm in enumerate(sort_norms(paper["top1"])):
        draw_line(panel, settings, paper["top1"][norm], norm, 0.06 * (i - 1))
    label = f"ideal BN: BN at {setting_label(settings[0])}"
    panel.axhline(paper["ideal_bn"], color=color("bn"), linestyle="--", linewidth=1, label=label)
    panel.set_ylim(72, 77.5)
    x = settings.index("8x2")
    panel.annotate("BN (8,2) is below\nthe axis (65.3)", (x, 72), (x - 0.2, 72.6), ha="center",
                   fontsize=8, color=color("bn"), arrowprops={"arrowstyle": "->"})  # fmt: skip
    panel.set_xticks(range(len(settings)), [setting_label(s) for s in settings])


def draw_line(panel, settings: list[str], values: list, norm: str, shift: float) -> None:
    """One norm's points, joined within a number of GPUs."""
    style = {"color": color(norm), "marker": MARKERS.get(norm, "P"), "markersize": 6}
    label = norm.upper() if norm in MARKERS else norm
    gpus = [setting.split("x")[0] for setting in settings]
    for g in dict.fromkeys(gpus):
        xs = [x for x, v in enumerate(values) if gpus[x] == g and v is not None]
        if xs:
            panel.plot([x + shift for x in xs], [values[x] for x in xs], label=label, **style)
            label = None


def ideal_bn(runs: list[Run], metric: str) -> tuple[str, float] | None:
    """BN's top-1 at the most images per GPU on 8 GPUs: what BN would give at any batch size."""
    found = [run for run in runs if run.norm == "bn" and run.summary["setting"]["gpus"] == 8]
    found = [run for run in found if run.metric(metric) is not None]
    if not found:
        return None
    largest = max(found, key=lambda run: run.summary["setting"]["images_per_gpu"]).setting
    values = [run.metric(metric) for run in found if run.setting == largest]
    return largest, mean_and_sd(values)[0]


def captions(runs: list[Run]) -> list[str]:
    """What a reader has to know about our panel."""
    lines = []
    seeds = sorted({len(found) for found in by_cell(runs).values()})
    if seeds != [1]:
        lines.append(f"Ours: line = mean over {'/'.join(map(str, seeds))} seeds, dots = seeds.")
    if any(run.norm == "sn" and run.without_bn for run in runs):
        lines.append("SN at one image per GPU: IN and LN only, as in the paper.")
    for (norm, setting), found in by_cell(runs).items():
        if unlike := differences(found):
            where = f"{norm} {setting_label(setting)}"
            lines.append(f"Runs of {where} are not alike: {describe_differences(unlike)}.")
    if unlike := differences(runs, one_cell=False):
        lines.append(f"Runs differ in: {describe_differences(unlike)}.")
    for line in lines:
        if " alike" in line or line.startswith("Runs differ"):
            print(f"warning: {line}", file=sys.stderr)
    return lines


def write_csv(runs: list[Run], metric: str, paper: dict, path: Path) -> None:
    """The plotted values, one line per run and per point of the paper's figure."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["source", "norm", "setting", "seed", metric, "status"])
        for run in runs:
            value = run.metric(metric)
            row = ["ours", run.norm, run.setting, run.seed, "" if value is None else value]
            writer.writerow([*row, run.summary["status"]])
        for norm, values in paper["top1"].items():
            for setting, value in zip(paper["settings"], values):
                writer.writerow(["paper, Fig 4", norm, setting, "", value or "", ""])


def color(norm: str) -> str:
    return COLORS.get(norm, "#56B4E9")


if __name__ == "__main__":
    main()

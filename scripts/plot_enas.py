"""Draw architecture searches: Fig 5(b) from logged runs, the controller, its importance weights.

    python scripts/plot_enas.py                    # results/ -> results/enas/README.md and figures/
    python scripts/plot_enas.py --runs outputs --out searches    # page and figures in one folder

Three figures for each data set and child, each with a CSV of what it draws: search (the accuracy of
drawn architectures with shared weights; the paper's curves in a panel of their own), controller
(entropy, reward, baseline) and importance (LN and GN at each place of the cell). README.md has a
table of every run; what stands between its notes markers is kept.

Source: Fig 5(b), from results/paper.yaml.
"""

from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from common import figures, pages
from common.records import (
    SPENT,
    Run,
    block_importance,
    by_group,
    fail,
    group_name,
    load_paper,
    mean_and_sd,
    over_seeds,
)
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

SCRIPT = Path(__file__).stem
# in this order everywhere; "random" is the sampler without a controller
LABELS = {
    "none": ("no norm", figures.COLORS["none"]),
    "ln": ("LN", figures.COLORS["ln"]),
    "gn": ("GN", figures.COLORS["gn"]),
    "sn_ln_gn": ("SN (LN + GN)", figures.COLORS["sn"]),
    "random": ("random search", figures.COLORS["bn"]),
}
# what the labels of curves say, so that it may differ within a figure
NAMED = ("sampler", "controller.norm", "names.controller", "names.random")
CONTROLLER = {  # quantity -> its name, the least height of its axis
    "controller/entropy": ("entropy of an architecture (nats)", 0.5),
    "controller/reward": ("reward", 0.02),
    "controller/baseline": ("baseline", 0.02),
}
SHARED = (
    "`shared_top1`: architectures drawn by the sampler after the last epoch, each on one batch of "
    "held-out images, with shared weights and the batch's statistics. `best`: the best of some "
    "candidates drawn at the end, on held-out images, with shared weights: the largest of several "
    "noisy numbers. Neither is the accuracy of a trained network. The controller's rewards come "
    "from the same held-out images, as in ENAS."
)
PROXY = (
    "Proxy runs: a few images, a small child, a few epochs. They can show whether a trend of the "
    "paper appears, not whether its accuracy is reached; no published figure stands beside them."
)
RETRAINED = (
    "One architecture trained from scratch, with running statistics in evaluation. `val` are the "
    "held-out images that the searches were rewarded on, `test` images that no search has seen."
)


def main(argv: list[str] | None = None) -> None:
    parser = figures.arguments(
        "Draw architecture searches (Fig 5(b)) and write their table.", "enas"
    )
    args = parser.parse_args(argv)
    every = figures.read(args.runs, "enas")
    runs = [run for run in every if run.summary["status"] == "finished"]
    diverged = [run for run in every if run.diverged]
    if not runs:
        fail(f"no searches below {args.runs}")
    out = args.out or args.runs / "enas"
    try:
        notes = pages.kept_notes(out / "README.md", SCRIPT)
    except ValueError as error:
        fail(str(error))

    groups = {group_name(group): found for group, found in by_group(runs).items()}
    groups = figures.by_recipe(groups, label, NAMED)
    folder = out if args.out else out / "figures"
    for name, (found, lines) in groups.items():
        draw_search(by_label(found), folder / f"search_{name}.{args.format}", lines)
        draw_controller(by_label(found), folder / f"controller_{name}.{args.format}", lines)
        if any(run.importance for run in found):
            path = folder / f"importance_{name}.{args.format}"
            draw_importance([run for run in found if run.importance], path, lines)
    retrained = figures.read(args.runs, "enas_retrain")
    pictures = {name: (folder / f"search_{name}.{args.format}").relative_to(out) for name in groups}
    pages.write(out / "README.md", markdown(groups, diverged, retrained, notes, out, pictures))
    print(out / "README.md")


def label(run: Run) -> str:
    """The controller's norm, or random."""
    return run.summary["norm"] if run.summary["sampler"] == "controller" else "random"


def by_label(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by the controller's norm or random, in the order of LABELS, in each by seed."""
    found = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        found[label(run)].append(run)
    return {name: found[name] for name in sorted(found, key=place)}


def place(name: str) -> int:
    """Where a norm stands in the order of LABELS; others follow."""
    return list(LABELS).index(name) if name in LABELS else len(LABELS)


def look(name: str) -> tuple[str, str]:
    """The label and the colour of a curve."""
    return LABELS.get(name, (name, figures.color(name)))


def draw_search(found: dict[str, list[Run]], path: Path, lines: list[str]) -> None:
    """Fig 5(b): ours on the left, the paper's points on the right."""
    figure, (ours, paper) = plt.subplots(1, 2, figsize=(12.5, 4.6), layout="constrained")
    rows = curves(ours, found, "val/shared_top1", 2.0)
    ours.set_title(f"Ours: {title(found)}")
    ours.set_ylabel("accuracy of drawn architectures,\nshared weights, held-out images (%)")
    published = load_paper()["fig_5b"]
    for name, values in published["accuracy"].items():
        values = [100 * value for value in values]
        paper.plot(published["epochs"], values, "o-", color=figures.color(name), markersize=3.5)
        rows += [["paper, Fig 5(b)", name, "", e, v] for e, v in zip(published["epochs"], values)]
    paper.set_title("Paper, Fig 5(b): 150 epochs on CIFAR-10 (read off, ± 1)")
    paper.set_ylabel("validation accuracy (%)")
    first = [f"Thin: each run. Thick: their mean; {figures.INTERVAL}."] if several(found) else []
    first += ["The paper has no random search."] if "random" in found else []
    names = {"sn_ln_gn" if name == "sn" else name for name in published["accuracy"]}
    finish(figure, (ours, paper), sorted(names | found.keys(), key=place))
    figures.save(
        figure, path, first + lines, ["source", "run", "seed", "epoch", "shared_top1"], rows
    )


def draw_controller(found: dict[str, list[Run]], path: Path, lines: list[str]) -> None:
    """Entropy, reward and baseline over the epochs."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    rows = []
    for panel, (key, (name, least)) in zip(panels, CONTROLLER.items()):
        rows += [[key, *row[1:]] for row in curves(panel, found, key, least)]
        panel.set_title(name)
    finish(figure, panels, found)
    first = [f"{title(found)}. Each point: the mean over an epoch's updates."]
    if several(found):
        first[0] += f" Thin: each run. Thick: their mean; {figures.INTERVAL}."
    if "random" in found:
        first += [
            "Random search: the entropy of the uniform distribution; its rewards update nothing."
        ]
    figures.save(figure, path, first + lines, ["quantity", "run", "seed", "epoch", "value"], rows)


def several(found: dict[str, list[Run]]) -> bool:
    """Whether there is anything to average."""
    return any(len(runs) > 1 for runs in found.values())


def curves(panel, found: dict[str, list[Run]], key: str, least: float) -> list[list]:
    """Each run's curve of `key` and their mean, into `panel`; return the rows drawn.

    least: the least height of the axis.
    """
    rows = []
    for name, runs in found.items():
        points = {}
        for run in runs:
            lines = [line for line in run.metrics if line.get(key) is not None]
            points[run.seed, run.path] = [(line["epoch"], line[key]) for line in lines]
            rows += [
                ["ours", name, run.seed, line["epoch"], figures.tidy(line[key])] for line in lines
            ]
        figures.draw_seeds(panel, {k: v for k, v in points.items() if v}, look(name)[1], width=2.4)
    figures.fit([panel], least)
    return rows


def draw_importance(runs: list[Run], path: Path, lines: list[str]) -> None:
    """Importance weights of LN and GN at each place: of the mean solid, of the variance dashed."""
    blocks = list(block_importance(runs[0].importance[0]))
    figure, panels = plt.subplots(
        1, len(blocks), figsize=(1 + 4.2 * len(blocks), 4), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    rows = []
    for panel, block in zip(panels[0], blocks):
        for part in figures.PARTS:
            points = defaultdict(lambda: defaultdict(list))
            for run in runs:
                for record in run.importance:
                    for s, value in block_importance(record, part).get(block, {}).items():
                        points[s][run.seed, run.path].append((record["epoch"], value))
                        rows.append(
                            [run.seed, record["epoch"], block, part, s, figures.tidy(value)]
                        )
            for s, found in points.items():
                figures.draw_seeds(panel, found, figures.COLORS[s], figures.STYLES[part])
            figures.mark_start(panel, [len(points)])
        panel.set_title(f"norm of the {PLACES.get(block, block)}")
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figures.clear(panel)
    figures.fit(panels[0])
    panels[0][0].set_ylabel("importance weight")
    figures.legend(figure, figures.statistic_lines(("ln", "gn")))
    first = f"{title(by_label(runs))}. The scale is cut to what occurs."
    if len(runs) > 1:
        first += f" Thin: each run. Thick: their mean; {figures.INTERVAL}."
    header = ["seed", "epoch", "place", "weights", "statistic", "value"]
    figures.save(figure, path, [first, *lines], header, rows)


PLACES = {
    "input": "input's part of the gates",
    "hidden": "hidden state's part of the gates",
    "cell": "cell state",
}


def finish(figure, panels, found) -> None:
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figures.clear(panel)
    names = [look(name) for name in found]
    figures.legend(
        figure, [Line2D([], [], color=c, linewidth=2.4, label=name) for name, c in names]
    )


def title(found: dict[str, list[Run]]) -> str:
    """`2x8_3nodes on cifar10, proxy, 3 seeds`."""
    runs = [run for same in found.values() for run in same]
    data, model, scale = runs[0].group
    seeds = sorted({len({run.seed for run in same}) for same in found.values()})
    return f"{model} on {data}, {scale}, {'/'.join(map(str, seeds))} seed{'s' * (seeds != [1])}"


def markdown(
    groups: dict,
    diverged: list[Run],
    retrained: list[Run],
    notes: str,
    folder: Path,
    pictures: dict[str, Path],
) -> list[str]:
    """The parts of the page; `folder` is where it will lie, for its links.

    Searches that diverged are in no curve, mean or lead: each is named.
    """
    parts = [*pages.begin(SCRIPT, "# Architecture search", notes), SHARED]
    for name, (runs, lines) in groups.items():
        data, model, scale = runs[0].group
        found = by_label(runs)
        parts += [f"## {data}, child {model} ({'proxy runs' if scale == 'proxy' else scale})"]
        parts += [PROXY] if scale == "proxy" else []
        parts += lines
        parts += [f"![search]({pictures[name].as_posix()})"]
        parts += [pages.md_table(spread_table(found)), *budget(found), *leads(found)]
        parts += ["### Every run", pages.md_table(run_table(found, folder))]
    if diverged:
        rows = [["run", "seed", "epochs done", *pages.ORIGIN]]
        for run in sorted(diverged, key=lambda run: (run.name, run.seed)):
            done = max((line["epoch"] for line in run.metrics), default=0)
            link = pages.link(run, folder, f"{run.group[0]}, {run.group[1]}, {label(run)}")
            rows.append([link, run.seed, done, *pages.origin(run)])
        parts += ["## Diverged", "These searches are in no curve, mean or lead above."]
        parts += [pages.md_table(rows)]
    if retrained:
        parts += ["## Retrained architectures", RETRAINED]
        parts += [pages.md_table(retrain_table(retrained, folder))]
    return parts


def spread_table(found: dict[str, list[Run]]) -> list[list[str]]:
    """Mean and sample deviation over the seeds."""
    rows = [["", "seeds", "shared_top1", "best", "entropy at the end", "reward at the end"]]
    for name, runs in found.items():
        row = [look(name)[0], ", ".join(str(run.seed) for run in runs)]
        for key, digits in (
            ("shared_top1", 2), ("best_shared_top1", 2), ("entropy", 3), ("reward", 4),
        ):  # fmt: skip
            spread = over_seeds((run.seed, run.summary[key]) for run in runs)
            row.append(pages.spread_text(spread, digits).replace(f" (n={spread.seeds})", ""))
        rows.append(row)
    return rows


def budget(found: dict[str, list[Run]]) -> list[str]:
    """What each search spent, and whether that was the same for all."""
    keys = ("epochs", *SPENT)
    spent = {tuple(run.summary[key] for key in keys) for runs in found.values() for run in runs}
    if len(spent) > 1:
        return [f"The budgets differ: {sorted(spent)} ({', '.join(keys)})."]
    epochs, steps, updates, seen, scored = spent.pop()
    return [
        f"Budget of every search, random or not: {pages.plural(epochs, 'epoch')}, {steps:,} child "
        f"steps ({seen:,} images) and {updates:,} architectures scored for a reward ({scored:,} "
        "images)."
    ]


def leads(found: dict[str, list[Run]]) -> list[str]:
    """SN against each of the others, seed by seed."""
    if "sn_ln_gn" not in found:
        return []
    top1 = {name: by_seed(runs) for name, runs in found.items()}
    ours, lines = top1.pop("sn_ln_gn"), []
    for name, theirs in top1.items():
        gaps = [ours[seed] - theirs[seed] for seed in theirs if seed in ours]
        if not gaps:
            continue
        mean, sd = mean_and_sd(gaps)
        wins = sum(gap > 0 for gap in gaps)
        spread = f" ± {sd:.2f}" if sd is not None else ""
        lines.append(
            f"- SN minus {look(name)[0]}: {mean:+.2f}{spread} points of shared_top1; "
            f"ahead in {wins} of {len(gaps)} seeds"
        )
    return ["\n".join(lines)] if lines else []


def by_seed(runs: list[Run]) -> dict[int, float]:
    """shared_top1 of each seed, the average of its runs."""
    values = defaultdict(list)
    for run in runs:
        values[run.seed].append(run.summary["shared_top1"])
    return {seed: mean_and_sd(found)[0] for seed, found in values.items()}


def run_table(found: dict[str, list[Run]], folder: Path) -> list[list]:
    header = ["run", "seed", "shared_top1", "best", "entropy", "reward", "epochs", "train images"]
    rows = [[*header, *pages.ORIGIN]]
    for name, runs in found.items():
        for run in runs:
            s = run.summary
            cells = [f"{s['shared_top1']:.2f}", f"{s['best_shared_top1']:.2f}"]
            cells += [f"{s['entropy']:.3f}", f"{s['reward']:.4f}", s["epochs"]]
            cells += [s["data"].get("train_images"), *pages.origin(run)]
            rows.append([pages.link(run, folder, name), run.seed, *cells])
    return rows


def retrain_table(runs: list[Run], folder: Path) -> list[list]:
    header = ["run", "seed", "val top-1", "test top-1", "test images", "parameters", "epochs"]
    rows = [[*header, "train images", *pages.ORIGIN]]
    for run in sorted(runs, key=lambda run: (run.summary["name"], run.seed)):
        s = run.summary
        val, tested = run.metric("retrained_val_top1"), s.get("retrained_test_top1")
        val = "diverged" if run.diverged else "" if val is None else f"{val:.2f}"
        cells = [val, "" if tested is None else f"{tested:.2f}", s.get("test_images") or ""]
        cells += [f"{s['parameters']:,}", s["epochs"], s["data"].get("train_images")]
        rows.append([pages.link(run, folder, s["name"]), run.seed, *cells, *pages.origin(run)])
    return rows


if __name__ == "__main__":
    main()

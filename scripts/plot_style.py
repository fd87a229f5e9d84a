"""Draw style transfer runs: loss curves (Fig 5(a)), importance weights, a picture grid (Fig 6).

    python scripts/plot_style.py                        # results/ -> results/figures/, README table
    python scripts/plot_style.py --runs outputs --checkpoints outputs --photos photos/*.jpg

Curves and weights come from the records alone; the grid applies the checkpoints below
--checkpoints to the photographs given. The paper's curves stand in a panel of their own: its loss
weights and smoothing are not stated, so ratios of norms compare, levels do not.

Source: Fig 5(a) from results/paper.yaml; Fig 6.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from common import figures, pages
from common.records import Run, block_importance, fail, load_paper, mean_and_sd

SCRIPT = Path(__file__).stem
NORMS = ("bn", "in", "sn")  # Fig 5(a)'s; others follow
LOSSES = {"loss": "total", "content": "content", "style": "style"}
# The lr is constant: a longer run begins as a shorter one, and means end where the first run does.
LENGTH = ("steps", "schedule.steps")
FREE = (*LENGTH, "optimizer.gate_lr_factor")  # of the recipe; `norm_of` tells the factors apart


def main(argv: list[str] | None = None) -> None:
    parser = figures.arguments("Draw style transfer runs (Figs 5(a) and 6).")
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
    if args.size < 1:
        fail(f"--size {args.size}: expected 1 or more")
    if args.checkpoints and not args.photos:
        fail("--checkpoints needs --photos, the pictures to stylize")

    groups = choose(args.runs)
    out = args.out or args.runs / "figures"
    page = (args.out or args.runs / "style_transfer") / "README.md"
    try:
        notes = pages.kept_notes(page, SCRIPT)
    except ValueError as error:
        fail(str(error))
    for name, (cells, lines) in groups.items():
        path = out / f"style_loss_{name}.{args.format}"
        draw_curves(cells, fitting(cells, args.window), load_paper()["fig_5a"], path, lines)
        for norm in ("sn", "sn_x10"):
            weighted = [run for run in cells.get(norm, ()) if run.importance]
            if weighted:
                file = f"style_importance_{name}{norm.removeprefix('sn')}.{args.format}"
                draw_importance(weighted, out / file, lines)
    if page.parent.is_dir():
        pages.write(page, markdown(groups, args.window, notes, page.parent))
        print(page)
    if args.checkpoints:
        path = out / "style_grid.jpg"
        try:
            draw_grid([cells for cells, _ in groups.values()], args, path)
        except (OSError, ValueError) as error:
            fail(str(error))
        print(path)


def choose(root: Path) -> dict[str, tuple[dict[str, list[Run]], list[str]]]:
    """Runs by group (photos, style, pixels, batch, recipe), then norm, then seed; at least one."""
    runs = [run for run in figures.read(root, "style_transfer") if not run.diverged]
    runs = [run for run in runs if all(curve(run, part) for part in LOSSES)]
    if not runs:
        fail(f"no finished style transfer runs below {root}")
    named = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        s = run.summary
        photos = f"{s['data']['name']}_{s['style']['name']}_{s['image_size']}px"
        named[f"{photos}_b{s['batch_size']}"].append(run)
    groups = {}
    for name, (found, lines) in figures.by_recipe(named, norm_of, FREE).items():
        norms = order({norm_of(run) for run in found})
        cells = {norm: [run for run in found if norm_of(run) == norm] for norm in norms}
        groups[name] = cells, lines
    return groups


def norm_of(run: Run) -> str:
    """The norm, with the factor of its control parameters' lr if it is not 1: sn_x10."""
    factor = gate_factor(run)
    return run.summary["norm"] + (f"_x{factor:g}" if factor != 1 else "")


def gate_factor(run: Run) -> float:
    """How many times the weights' lr the control parameters' is."""
    return (run.config.get("optimizer") or {}).get("gate_lr_factor", 1)


def order(norms) -> list[str]:
    return sorted(norms, key=lambda norm: (NORMS.index(norm) if norm in NORMS else 9, norm))


def curve(run: Run, part: str) -> dict[int, float]:
    """Step -> recorded loss; a step that was skipped has none."""
    values = {line["step"]: line.get(f"train/{part}") for line in run.metrics}
    return {step: value for step, value in values.items() if value is not None}


def length(run: Run) -> int:
    """The steps that the records are of, skipped ones included."""
    return max(line["step"] for line in run.metrics)


def windows(run: Run, size: int, part: str = "loss") -> list[tuple[int, float]]:
    """(last step, mean) of consecutive windows of `size` steps; a rest is left out."""
    values = curve(run, part)
    points = [(end, _mean(values, end, size)) for end in range(size, length(run) + 1, size)]
    return [(end, value) for end, value in points if value is not None]


def _mean(values: dict[int, float], step: int, window: int) -> float | None:
    known = [values[s] for s in range(step - window + 1, step + 1) if s in values]
    return sum(known) / len(known) if known else None


def fitting(cells: dict[str, list[Run]], window: int) -> int:
    """The window, or a quarter of runs that are shorter than two of them."""
    longest = max(length(run) for runs in cells.values() for run in runs)
    return window if longest >= 2 * window else max(1, longest // 4)


def draw_curves(cells, window: int, paper: dict, path: Path, lines: list[str]) -> None:
    """Total, content and style loss of every run and their mean; the paper's curves beside."""
    figure, panels = plt.subplots(1, 4, figsize=(17, 4.6), layout="constrained")
    rows = []
    for panel, (part, title) in zip(panels, LOSSES.items()):
        for norm, runs in cells.items():
            found = {(run.seed, run.path): windows(run, window, part) for run in runs}
            for (seed, _), points in found.items():
                rows += [["ours", norm, seed, title, s, f"{value:.6g}"] for s, value in points]
            found = {key: points for key, points in found.items() if points}
            figures.draw_seeds(panel, found, figures.color(norm), width=2.2)
            seeds = pages.plural(len({run.seed for run in runs}), "seed")
            panel.plot(
                [], [], color=figures.color(norm), linewidth=2.2, label=f"{norm.upper()} ({seeds})"
            )
        panel.set_yscale("log")
        figures.fit([panel])
        panel.set_title(f"Ours: {title} loss", fontsize=11)
        panel.legend(frameon=False, fontsize=9)
    for norm, values in paper["loss"].items():
        panels[3].plot(paper["steps"], values, "o-", color=figures.COLORS[norm], label=norm.upper())
        rows += [["paper, Fig 5(a)", norm, "", "total", s, 1e5 * v]
                 for s, v in zip(paper["steps"], values)]  # fmt: skip
    panels[3].set_title(
        "Paper, Fig 5(a): total loss (1e5), read off\nthe figure, ± 0.05", fontsize=11
    )
    panels[3].legend(frameon=False, fontsize=9)
    panels[3].set_xticks(range(0, paper["steps"][-1] + 1, 10_000))
    for panel in panels:
        panel.set_xlabel("step")
        figures.clear(panel)
    first = (
        f"{describe(cells)} Each point: the mean of {pages.plural(window, 'step')} of training; "
        f"thin: every run, thick: their mean as far as all go; {figures.INTERVAL}."
    )
    header = ["source", "norm", "seed", "loss", "step", "value"]
    figures.save(figure, path, [first, *lines], header, rows, width=150)


def draw_importance(runs: list[Run], path: Path, lines: list[str]) -> None:
    """Mean (solid) and variance (dashed) weights of SN's blocks over the steps."""
    blocks = list(block_importance(runs[0].importance[0]))
    size = (2.6 * max(2, len(blocks)), 3.6)
    figure, panels = plt.subplots(
        1, len(blocks), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    rows, statistics = [], []
    for panel, block in zip(panels[0], blocks):
        points = defaultdict(lambda: defaultdict(list))
        for run in runs:
            for part in figures.PARTS:
                found = [(r["step"], block_importance(r, part).get(block, {}))
                         for r in run.importance]  # fmt: skip
                statistics = figures.present(weights for _, weights in found)
                for s in statistics:
                    points[part, s][run.seed, run.path] = [(step, w[s]) for step, w in found]
                    rows += [
                        [run.seed, block, part, s, step, figures.tidy(w[s])] for step, w in found
                    ]
        for (part, s), found in points.items():
            figures.draw_seeds(panel, found, figures.COLORS[s], figures.STYLES[part], 1.5)
        figures.mark_start(panel, [len(points) // len(figures.PARTS)])
        panel.set_title(block, fontsize=11)
        panel.set_xlabel("step")
        figures.clear(panel)
    figures.fit(panels[0])
    panels[0][0].set_ylabel("importance weight")
    figures.legend(figure, figures.statistic_lines(statistics))
    first = (
        f"{describe({'sn': runs})} Each block: the average over its SN layers; {figures.INTERVAL}."
    )
    if (factor := gate_factor(runs[0])) != 1:
        first += f" Control parameters at {factor:g} times the lr of the weights."
    header = ["seed", "block", "weights", "statistic", "step", "value"]
    figures.save(figure, path, [first, *lines], header, rows)


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


def draw_grid(groups: list[dict[str, list[Run]]], args: argparse.Namespace, path: Path) -> None:
    """Fig 6: a row per photograph and style, the style inset, a column per norm."""
    from sn.training.run.images import read_image
    from sn.training.style.photos import resize_long_side, to_pil, to_tensor
    from sn.training.style.stylize import load_style_net, stylize

    rows, columns = [], []
    for cells in groups:
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
        image = resize_long_side(read_image(photo, "picture"), args.size)
        style = next(iter(runs.values())).summary["style"]["name"]
        line[0].imshow(image)
        if args.styles:
            inset = line[0].inset_axes([0, 0.62, 0.38, 0.38])
            inset.imshow(read_image(args.styles / f"{style}.jpg", "picture"), aspect="auto")
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


def markdown(groups: dict, window: int, notes: str, folder: Path) -> list[str]:
    """The parts of the page; `folder` is where it will lie, for its links."""
    parts = pages.begin(SCRIPT, "# Style transfer (section 4.3, Figs 5(a) and 6)", notes)
    for name, (cells, lines) in groups.items():
        steps = fitting(cells, window)
        parts += [f"## {name}", describe(cells), *lines]
        parts += [
            f"Training loss, mean of {pages.plural(steps, 'step')} up to the one named; "
            "evaluation: centre crops, the network as in stylizing."
        ]
        marks = common_steps(cells, steps)
        header = ["norm", "seed", *(f"step {s}" for s in marks), "steps", "last, content"]
        table = [[*header, "last, style", "evaluation", "minutes", "commit", "date", "note"]]
        for norm, runs in cells.items():
            table += [table_row(norm, run, marks, steps, folder) for run in runs]
        parts += [pages.md_table(table), *ratios(cells, marks, steps)]
    return parts


def common_steps(cells: dict[str, list[Run]], window: int) -> list[int]:
    """Some steps that at least one run of every norm has passed, spread by doubling."""
    last = min(max(length(run) for run in runs) for runs in cells.values())
    marks = [window * 2**k for k in range(12) if window * 2**k < last]
    ends = {length(run) // window * window for runs in cells.values() for run in runs}
    return sorted({*marks, *(end for end in ends if 0 < end <= last)})


def at_step(run: Run, step: int, window: int, part: str = "loss") -> float | None:
    """The mean of the recorded losses of the `window` steps up to `step`; None without any."""
    return _mean(curve(run, part), step, window) if length(run) >= step else None


def table_row(norm: str, run: Run, marks: list[int], window: int, folder: Path) -> list:
    summary, last = run.summary, length(run)
    cells = [at_step(run, step, window) for step in marks]
    cells = ["" if value is None else f"{value:.3g}" for value in cells]
    parts = [at_step(run, last, min(window, last), part) for part in ("content", "style")]
    parts = ["" if value is None else f"{value:.3g}" for value in [*parts, summary.get("loss")]]
    minutes, _, _, commit, date = pages.origin(run)
    row = [pages.link(run, folder, norm), run.seed, *cells, summary["steps"], *parts]
    return [*row, minutes, commit, date, summary.get("note")]


def ratios(cells: dict[str, list[Run]], marks: list[int], window: int) -> list[str]:
    """How often SN < IN, IN < BN and SN < IN < BN held, seed by seed."""
    if not set(NORMS) <= cells.keys() or not marks:
        return []
    header = ["step", "seeds", "SN / IN, each seed", "IN / BN, each seed", "SN < IN", "IN < BN"]
    table = [[*header, "SN < IN < BN"]]
    for step in marks:
        found = defaultdict(lambda: defaultdict(list))
        for norm in NORMS:
            for run in cells[norm]:
                if (value := at_step(run, step, window)) is not None:
                    found[run.seed][norm].append(value)
        whole = [
            {norm: mean_and_sd(values)[0] for norm, values in norms.items()}
            for norms in found.values()
            if len(norms) == len(NORMS)
        ]
        if not whole:
            continue
        sn_in = [v["sn"] / v["in"] for v in whole]
        in_bn = [v["in"] / v["bn"] for v in whole]
        both = sum(a < 1 and b < 1 for a, b in zip(sn_in, in_bn))
        listed = [", ".join(f"{value:.2f}" for value in values) for values in (sn_in, in_bn)]
        held = [sum(v < 1 for v in sn_in), sum(v < 1 for v in in_bn), both]
        counts = [f"{count} of {len(whole)}" for count in held]
        table.append([step, len(whole), *listed, *counts])
    return [pages.md_table(table)]


if __name__ == "__main__":
    main()

"""Write the results tables: Tables 4.1-4.4 as paper | ours | run, and proxy runs apart.

    python scripts/make_tables.py                          # results/ -> results/README.md
    python scripts/make_tables.py --runs outputs --print

What stands between `<!-- notes -->` and `<!-- /notes -->` in the output file is kept.

Source: Tables 4.1-4.4 and Sec. 4.1, from results/paper.yaml.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import pages
from common.records import (
    ROOT,
    RUNS_HELP,
    Run,
    by_cell,
    by_group,
    describe_differences,
    differences,
    fail,
    load_paper,
    load_runs,
    none_of,
    over_seeds,
    setting_label,
    sort_norms,
    sort_settings,
    variants,
    without_searches,
)

SCRIPT = Path(__file__).stem
METRICS = {"top1": "moving average", "top1_batch_average": "batch average"}
IN_LN = "† IN and LN only: BN is left out, as in the paper at one image per GPU."
UNLIKE = "‡ The runs in this cell are not alike and are not averaged: "
OURS = (
    "Ours: mean ± sample deviation over seeds, with BN's statistics by moving average and by batch "
    "average (the paper does not say which it reports). A blank is a run not made."
)
AP_NAMES = ("ap", "ap50", "ap75", "ap_l", "ap_m", "ap_s")
METRICS_OF = dict.fromkeys(("table_4_2", "table_4_3"), [f"box_{name}" for name in AP_NAMES])
METRICS_OF["table_4_4"] = [f"{kind}_{name}" for kind in ("box", "mask") for name in AP_NAMES[:3]]
PAPER_NORMS = {"frozen_bn": "frozenBN", "bn": "BN", "gn": "GN", "sn": "SN", "sn_in_ln": "SN"}
DROPOUT = (
    "§ With dropout before the classifier, as in SN's code; the paper's BN and GN have none "
    "where they are the Group Normalization paper's."
)
OTHER = "Not the paper's network or not its recipe: no published figure stands beside these."
PROXY = (
    "A proxy run trains a small data set, a small network or few epochs. It can show whether a "
    "trend of the paper appears, not whether its accuracy is reached; no published figure stands "
    "beside it."
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write Tables 4.1-4.4 (paper | ours | run) and the tables of proxy runs.",
        epilog="What stands between the notes markers of the output file is kept.",
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "results", metavar="ROOT", help=RUNS_HELP
    )
    parser.add_argument(
        "--out", metavar="FILE", help="Markdown file, - for stdout (default: ROOT/README.md)"
    )
    parser.add_argument("--print", action="store_true", help="plain tables on stdout, no file")
    args = parser.parse_args(argv)
    if args.print and args.out:
        parser.error("--print writes no file; leave out --out")

    try:
        runs = without_searches(load_runs(args.runs))
        detectors = without_searches(load_runs(args.runs, "detection"))
    except FileNotFoundError as error:
        fail(str(error))
    if args.print:
        if not runs and not detectors:
            fail(none_of("classification or detection", args.runs))
        parts = [console(runs, load_paper())] if runs else []
        print("\n\n".join(parts + detection_console(detectors)))
        return
    out = None if args.out == "-" else Path(args.out or args.runs / "README.md")
    try:
        notes = pages.kept_notes(out, SCRIPT) if out else ""
    except ValueError as error:
        fail(str(error))
    folder = out.parent if out else args.runs
    parts = markdown(runs, load_paper(), notes, folder, detectors)
    if out is None:
        print("\n\n".join(parts))
        return
    if not out.parent.is_dir():
        fail(f"no folder {out.parent}")
    pages.write(out, parts)
    print(f"{out}: {pages.plural(len(runs) + len(detectors), 'run')}")


def markdown(
    runs: list[Run], paper: dict, notes: str, folder: Path, detectors: list[Run] = ()
) -> list[str]:
    """The parts of the results page; `folder` is where it will lie, for its links."""
    parts = pages.begin(SCRIPT, "# Results", notes)
    published = [run for run in runs if is_published(run, paper)]
    table_4_1 = ["## " + paper["table_4_1"]["caption"], OURS]
    table_4_1 += full_tables(published, paper, folder)
    parts += table_4_1 if published else []
    for group, found in by_group(run for run in runs if not is_published(run, paper)).items():
        data, model, scale = group
        parts += [f"## {data}, {model} ({'proxy runs' if scale == 'proxy' else scale})"]
        parts += [PROXY] if scale == "proxy" else [OTHER]
        for metric, label in METRICS.items():
            table, marks = accuracy_table(found, metric, paper)
            parts += [f"### Top-1 (%), {label}", pages.md_table(table), *marks]
        parts += compared(found)
        parts += ["### Runs", pages.md_table(run_table(found, folder))]
    parts += [] if published else table_4_1
    return parts + detection_markdown(detectors, paper, folder)


def console(runs: list[Run], paper: dict) -> str:
    """The tables of the runs as plain aligned text."""
    parts = []
    for group, found in by_group(runs).items():
        data, model, scale = group
        epochs = sorted({run.summary.get("epochs") or 0 for run in found})
        seeds = len({run.seed for run in found})
        length = "/".join(map(str, epochs))
        parts += [f"{data}, {model}: {scale} runs, {length} epochs, {pages.plural(seeds, 'seed')}"]
        for metric, label in METRICS.items():
            table, marks = accuracy_table(found, metric, paper)
            table[0][0] = f"top-1 (%), {label}"
            parts += ["\n".join([plain_table(table), *marks])]
        parts += compared(found)
        if any(is_published(run, paper) for run in found):
            parts += ["The paper's figures stand beside these in the Markdown form (--out -)."]
        elif scale == "proxy":
            parts += [PROXY]
    return "\n\n".join(parts)


def is_published(run: Run, paper: dict) -> bool:
    """Whether a run may stand beside Table 4.1's figures: its size and recipe are the table's."""
    table = paper["table_4_1"]
    return run.group == (table["data"], table["model"], "full") and run.follows(table["recipe"])


def full_tables(runs: list[Run], paper: dict, folder: Path) -> list[str]:
    """Table 4.1 in long form, a line per cell: paper | ours | run; and the runs behind it."""
    cells = by_cell(runs)
    figures = published_figures(paper)
    norms = sort_norms({norm for norm, _ in figures} | {norm for norm, _ in cells})
    order = paper["table_4_1"]["settings"]
    header = ["norm", "setting", "paper", *(f"ours, {label}" for label in METRICS.values()), "run"]
    table, marks = [header], []
    for norm in norms:
        row = {s for n, s in [*figures, *cells] if n == norm}
        for setting in sort_settings(row, order):
            found = cells.get((norm, setting), [])
            ours = [cell(found, metric) for metric in METRICS]
            marks += [mark for _, found_marks in ours for mark in found_marks]
            links = ", ".join(pages.link(run, folder, f"seed{run.seed}") for run in found)
            figure = figures.get((norm, setting), "")
            table.append([norm, setting_label(setting), figure, *(text for text, _ in ours), links])
    if ("sn", "8x1") in figures:
        marks += [IN_LN]
    parts = [pages.md_table(table), *dict.fromkeys(marks)]
    notes = [*paper["table_4_1"]["notes"], *paper["text_imagenet"]["notes"]]
    parts += ["About the paper's figures:\n\n" + "\n".join(f"- {note}" for note in notes)]
    if runs:
        parts += [*compared(runs), "### Runs", pages.md_table(run_table(runs, folder))]
    return parts


def published_figures(paper: dict) -> dict[tuple[str, str], str]:
    """The published top-1 of each (norm, setting), as it is written in the table."""
    table, figures = paper["table_4_1"], {}
    for norm, values in table["top1"].items():
        for setting, value in zip(table["settings"], values):
            figures[norm, setting] = "does not converge" if value is None else f"{value:.1f}"
    for setting, values in paper["text_imagenet"]["top1"].items():
        for norm, value in values.items():
            figures.setdefault((norm, setting), f"{value:.1f}")
    figures["sn", "8x1"] += " †"
    return figures


def accuracy_table(runs: list[Run], metric: str, paper: dict) -> tuple[list[list[str]], list[str]]:
    """Norms × settings, a row for each recipe, and the footnotes that the cells refer to."""
    settings = sort_settings({run.setting for run in runs}, paper["table_4_1"]["settings"])
    table, marks = [["norm", *map(setting_label, settings)]], []
    for norm in sort_norms({run.norm for run in runs}):
        for name, alike in variants(run for run in runs if run.norm == norm).items():
            cells, row = by_cell(alike), [name]
            for setting in settings:
                text, found = cell(cells.get((norm, setting), []), metric)
                row.append(text)
                marks += found
            table.append(row)
    return table, list(dict.fromkeys(marks))


def cell(runs: list[Run], metric: str) -> tuple[str, list[str]]:
    """One cell's text and footnotes: the mean over seeds, or each value where runs are unlike."""
    if not runs:
        return "", []
    marks, unlike = [], differences(runs)
    text = values_text(runs, metric, unlike, " ‡") or "not recorded"
    if unlike:
        where = f"{runs[0].norm} {setting_label(runs[0].setting)}"
        marks.append(f"{UNLIKE}{where}, {describe_differences(unlike)}.")
    if runs[0].norm == "sn" and any(run.without_bn for run in runs):
        text += " †"
        marks.append(IN_LN)
    if all((run.config.get("model") or {}).get("dropout") for run in runs):
        text += " §"
        marks.append(DROPOUT)
    return text, marks


def values_text(runs: list[Run], metric: str, unlike: dict, mark: str) -> str:
    """The mean over seeds, or where runs are unlike each value and a mark; "" if there is none."""
    values = [(run.seed, value) for run in runs if (value := run.metric(metric)) is not None]
    diverged = sum(run.diverged for run in runs)
    if not values:
        return "diverged" if diverged else ""
    if unlike:
        text = ", ".join(f"{value:.1f}" for _, value in values) + mark
    else:
        text = pages.spread_text(over_seeds(values))
    return text + (f", {diverged} of {len(runs)} diverged" if diverged else "")


def compared(runs: list[Run]) -> list[str]:
    """A warning where the cells of one table come from different recipes."""
    unlike = differences(runs, one_cell=False)
    if not unlike:
        return []
    return [f"Across this table the runs differ in more than the norm and the setting: "
            f"{describe_differences(unlike)}."]  # fmt: skip


def run_table(runs: list[Run], folder: Path) -> list[list[str]]:
    """Every run with what it took: one line per seed."""
    header = ["run", "seed", "top-1", "top-1, batch average", "epochs", "images seen"]
    header += ["train images", *pages.ORIGIN, "note"]
    order = load_paper()["table_4_1"]["settings"]
    norms, settings = (
        sort_norms(r.norm for r in runs),
        sort_settings((r.setting for r in runs), order),
    )
    table = [header]
    for run in sorted(
        runs,
        key=lambda r: (norms.index(r.norm), settings.index(r.setting), r.summary["norm"], r.seed),
    ):
        link = pages.link(run, folder, f"{run.summary['norm']}_{run.setting}")
        table.append(run_line(run, link, METRICS, "epochs"))
    return table


def run_line(run: Run, link: str, metrics: Sequence[str], length: str) -> list[str]:
    """A run's results, and what it took; `length` is the summary's key of how long it went on."""
    summary, values = run.summary, [run.metric(metric) for metric in metrics]
    return [
        link,
        run.seed,
        *("diverged" if run.diverged else "" if v is None else f"{v:.2f}" for v in values),
        summary.get(length),
        summary.get("images_seen"),
        summary["data"].get("train_images"),
        *pages.origin(run),
        summary.get("note"),
    ]


# --- detection


def detection_markdown(runs: list[Run], paper: dict, folder: Path) -> list[str]:
    """Proxy runs of detectors, then Tables 4.2-4.4."""
    parts = []
    for group, found in by_group(runs).items():
        data, model, scale = group
        parts += [f"## {data}, {model} ({'proxy runs' if scale == 'proxy' else scale})"]
        parts += [PROXY.replace("accuracy", "AP")] if scale == "proxy" else []
        parts += [pages.md_table(ap_table(found)), *compared(found)]
        parts += ["### Runs", pages.md_table(detection_run_table(found, folder))]
    for name in ("table_4_2", "table_4_3", "table_4_4"):
        parts += published_detection(name, runs, paper, folder)
    return parts


def detection_console(runs: list[Run]) -> list[str]:
    """The AP of detectors as plain aligned text."""
    parts = []
    for (data, model, scale), found in by_group(runs).items():
        parts += [f"{data}, {model}: {scale} runs", plain_table(ap_table(found)), *compared(found)]
    return parts


def cells_of_detection(runs: list[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """Runs by (parts, start, setting), by seed in each."""
    cells = {}
    order = [f"{norm}-" for norm in ("frozen_bn", "bn", "gn", "sn")]

    def key(run: Run) -> tuple:
        place = next((i for i, n in enumerate(order) if f"{run.parts}-".startswith(n)), 9)
        return place, run.parts, run.summary["init"]["name"], run.setting, run.seed

    for run in sorted(runs, key=key):
        cell = run.parts, run.summary["init"]["name"], run.setting
        cells.setdefault(cell, []).append(run)
    return cells


def ap_table(runs: list[Run]) -> list[list[str]]:
    """A line per choice of norms, with box AP and, of Mask R-CNN, mask AP."""
    metrics = [f"box_{name}" for name in AP_NAMES]
    if any(run.metric("mask_ap") is not None for run in runs):
        metrics += [f"mask_{name}" for name in AP_NAMES]
    header = [m.replace("_ap", " AP").replace("_", "") for m in metrics]
    table = [["norms (backbone-FPN-heads)", "start", "setting", *header]]
    for (parts, init, setting), found in cells_of_detection(runs).items():
        row = [parts, init, setting_label(setting)]
        table.append([*row, *(ap_cell(found, metric) for metric in metrics)])
    return table


def ap_cell(runs: list[Run], metric: str) -> str:
    return values_text(runs, metric, differences(runs), " (runs unlike)")


def published_detection(name: str, runs: list[Run], paper: dict, folder: Path) -> list[str]:
    """One of Tables 4.2-4.4: paper | ours | run, a line per row of the paper."""
    table = paper[name]
    group = (table["data"], table["model"], "full")
    full = [run for run in runs if run.group == group and run.setting == table["setting"]]
    columns = " / ".join(table["columns"])
    lines = [["start", "backbone", "head", f"paper: {columns}", f"ours: {columns}", "run"]]
    for start in ("finetune", "scratch", "rows"):
        for row in table.get(start, []):
            scratch = start == "scratch"
            recipe = table[f"recipe_{start}"] | row.get("recipe", {})
            found = [run for run in full if is_row(run, row, scratch) and run.follows(recipe)]
            ours = " / ".join(ap_cell(found, metric) for metric in METRICS_OF[name])
            lines.append(
                [
                    "scratch" if scratch else "pretrained",
                    row["backbone"],
                    row["head"] + (" (suspect)" if row.get("suspect") else ""),
                    " / ".join(f"{value:.1f}" for value in row["values"]),
                    ours if found else "",
                    ", ".join(pages.link(run, folder, f"seed{run.seed}") for run in found),
                ]
            )
    notes = [*table.get("notes", []), *table.get("suspect", [])]
    listed = "About the paper's figures:\n\n" + "\n".join(f"- {note}" for note in notes)
    return [f"## {table['caption']}", pages.md_table(lines), *([listed] if notes else [])]


def is_row(run: Run, row: dict, scratch: bool) -> bool:
    """Whether a run's norms and start are those of a row of Tables 4.2-4.4."""
    backbone, *heads = [PAPER_NORMS.get(norm, norm) for norm in run.summary["parts"].values()]
    same = backbone == row["backbone"] and set(heads) == {row["head"]}
    return same and (run.summary["init"]["name"] == "scratch") == scratch


def detection_run_table(runs: list[Run], folder: Path) -> list[list[str]]:
    """Every run with what it took: one line per seed."""
    header = ["run", "seed", "box AP", "mask AP", "steps", "images seen", "train images"]
    table = [[*header, *pages.ORIGIN, "note"]]
    for run in (run for found in cells_of_detection(runs).values() for run in found):
        link = pages.link(run, folder, run.name.split("/")[-2])
        table.append(run_line(run, link, ("box_ap", "mask_ap"), "steps"))
    return table


def plain_table(table: list[list[str]]) -> str:
    """Columns aligned with spaces; the first row is the header."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)) for row in table]
    return "\n".join(
        line.rstrip() for line in [lines[0], "-" * sum(widths, 2 * len(widths) - 2), *lines[1:]]
    )


if __name__ == "__main__":
    main()

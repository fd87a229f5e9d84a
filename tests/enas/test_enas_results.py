"""scripts/plot_enas.py on made-up records, and the records that are kept."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from workers import config

from sn.training.run.config import recorded

ROOT = Path(__file__).resolve().parents[2]
KEPT = sorted(path.parent for path in (ROOT / "results/enas").rglob("summary.json"))
RETRAINED = sorted(path.parent for path in (ROOT / "results/enas_retrain").rglob("summary.json"))
BUDGET = ("epochs", "child_steps", "controller_updates", "images_seen", "images_scored")


@pytest.fixture
def plot(load_script):
    """`main` of scripts/plot_enas.py."""
    return load_script("plot_enas").main


def write_search(root, norm, seed, top1, **changes):
    """A small record as enas.search writes it."""
    name = norm or "random"
    folder = Path(root) / f"enas/cifar10_2x8_3nodes/{name}/seed{seed}"
    folder.mkdir(parents=True)
    summary = {
        "task": "enas", "run": folder.relative_to(root).as_posix(), "status": "finished",
        "sampler": "controller" if norm else "random", "norm": norm, "seed": seed,
        "data": {"name": "cifar10", "train_images": 100, "val_images": 50, "sha256": "ab"},
        "model": "2x8_3nodes", "scale": "proxy", "shared_top1": top1, "best_shared_top1": top1 + 3,
        "entropy": 30.0, "reward": 0.2, "epochs": 2, "child_steps": 6, "controller_updates": 8,
        "images_seen": 48, "images_scored": 64, "wall_s": 66, "device": "CPU", "precision": "fp32",
        "versions": {"torch": "2.15.0"}, "commit": "c0ffee" * 5, "date": "2026-01-02T03:04:05",
    } | changes  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump({"epochs": 2, "seed": seed}))
    metrics = [
        {"epoch": e, "val/shared_top1": top1 - 2 + e, "controller/entropy": 31.0 - e,
         "controller/reward": 0.1 * e, "controller/baseline": 0.01 * e}
        for e in (1, 2)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    if norm == "sn_ln_gn":
        layers = {
            f"cell.norms.{place}": {
                "block": place, "mean": {"ln": 0.4, "gn": 0.6}, "var": {"ln": 0.7, "gn": 0.3},
            }
            for place in ("input", "hidden", "cell")
        }  # fmt: skip
        lines = [json.dumps({"epoch": e, "layers": layers}) + "\n" for e in (0, 1, 2)]
        (folder / "importance.jsonl").write_text("".join(lines))


@pytest.fixture
def searches(tmp_path):
    for seed, (ln, sn, random) in enumerate([(20.0, 23.0, 22.0), (21.0, 20.5, 22.0)]):
        write_search(tmp_path, "ln", seed, ln)
        write_search(tmp_path, "sn_ln_gn", seed, sn)
        write_search(tmp_path, None, seed, random)
    return tmp_path


def test_diverged_searches_are_named(searches, plot):
    """They are in no mean and no lead, and the page says which."""
    write_search(searches, "sn_ln_gn", 2, 90.0, status="diverged", shared_top1=None)
    write_search(searches, "ln", 2, 40.0)
    plot(["--runs", str(searches)])
    text = (searches / "enas/README.md").read_text()
    assert "- SN minus LN: +1.25 ± 2.47 points of shared_top1; ahead in 1 of 2 seeds" in text
    means, diverged = text.split("## Diverged\n")
    assert "in no curve, mean or lead" in diverged
    link = "[cifar10, 2x8_3nodes, sn_ln_gn](cifar10_2x8_3nodes/sn_ln_gn/seed2)"
    assert f"| {link} | 2 | 2 |" in diverged and "90.0" not in means


def test_table_by_hand(searches, plot):
    plot(["--runs", str(searches)])
    text = (searches / "enas/README.md").read_text()
    assert "| LN | 0, 1 | 20.50 ± 0.71 | 23.50 ± 0.71 |" in text
    assert "- SN minus LN: +1.25 ± 2.47 points of shared_top1; ahead in 1 of 2 seeds" in text
    assert "- SN minus random search: -0.25 ± 1.77" in text and "ahead in 1 of 2" in text
    assert "2 epochs, 6 child steps (48 images) and 8 architectures scored" in text
    assert "[random](cifar10_2x8_3nodes/random/seed1) | 1 | 22.00" in text
    for line in text.splitlines():
        if line.startswith("![") or line.startswith("| ["):
            target = line.split("](")[1].split(")")[0]
            assert (searches / "enas" / target).exists(), target


def test_figures_draw_what_the_records_say(searches, plot):
    plot(["--runs", str(searches)])
    figures = searches / "enas/figures"
    rows = list(csv.DictReader((figures / "search_cifar10_2x8_3nodes.csv").open()))
    values = {(r["source"], r["run"], r["seed"], r["epoch"]): r["shared_top1"] for r in rows}
    ours = {key: value for key, value in values.items() if key[0] == "ours"}
    assert len(ours) == 3 * 2 * 2 and float(ours["ours", "sn_ln_gn", "0", "2"]) == 23.0
    assert len(values) - len(ours) == 3 * 17
    assert float(values["paper, Fig 5(b)", "sn", "", "150"]) == pytest.approx(73)
    rows = list(csv.DictReader((figures / "importance_cifar10_2x8_3nodes.csv").open()))
    assert {r["place"] for r in rows} == {"input", "hidden", "cell"} and len(rows) == 2 * 3 * 3 * 4
    values = {(r["weights"], r["statistic"]): float(r["value"]) for r in rows}
    assert values["mean", "gn"] == 0.6 and values["var", "ln"] == 0.7
    rows = list(csv.DictReader((figures / "controller_cifar10_2x8_3nodes.csv").open()))
    assert len(rows) == 3 * 3 * 2 * 2
    for path in figures.glob("*.csv"):
        assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_legend_names_the_papers_curves(searches, plot):
    for folder in (searches / "enas").glob("*/*"):
        if folder.name != "sn_ln_gn":
            shutil.rmtree(folder)
    plot(["--runs", str(searches), "--format", "svg"])
    figure = (searches / "enas/figures/search_cifar10_2x8_3nodes.svg").read_text()
    assert all(f">{name}</text>" in figure for name in ("LN", "GN", "SN (LN + GN)"))


def test_notes_are_kept_and_a_foreign_file_is_not_overwritten(searches, plot, capsys):
    plot(["--runs", str(searches)])
    page = searches / "enas/README.md"
    start = "<!-- notes -->"
    page.write_text(page.read_text().replace(start, f"{start}\nby hand", 1))
    plot(["--runs", str(searches)])
    assert page.read_text().count("by hand") == 1
    page.write_text("mine")
    with pytest.raises(SystemExit):
        plot(["--runs", str(searches)])
    assert (
        page.read_text() == "mine" and "was not written by plot_enas.py" in capsys.readouterr().err
    )


def test_unequal_budgets_are_said(searches, plot):
    write_search(searches, "gn", 0, 20.0, images_seen=96)
    plot(["--runs", str(searches)])
    assert "The budgets differ" in (searches / "enas/README.md").read_text()


def test_unlike_searches_are_drawn_apart(searches, plot, capsys):
    """A search of other epochs has figures and a table of its own, and no part in the averages."""
    write_search(searches / "long", "ln", 2, 80.0, epochs=9)
    plot(["--runs", str(searches)])
    assert "epochs: 2 / 9" in capsys.readouterr().err
    text = (searches / "enas/README.md").read_text()
    assert "| LN | 0, 1 | 20.50 ± 0.71 |" in text and "| LN | 2 | 80.00 |" in text
    assert (searches / "enas/figures/search_cifar10_2x8_3nodes_epochs_9.png").is_file()


def test_two_runs_of_a_seed_are_not_two_seeds(searches, plot, capsys):
    write_search(searches / "again", "ln", 0, 24.0)
    plot(["--runs", str(searches)])
    text = (searches / "enas/README.md").read_text()
    # seed 0: (20 + 24) / 2 = 22, seed 1: 21
    assert "| 21.50 ± 0.71 (3 runs of 2 seeds) |" in text
    assert "- SN minus LN: +0.25 ± 1.06 points" in text
    assert "2 runs of seed 0" in capsys.readouterr().err


def test_no_searches(tmp_path, plot, capsys):
    with pytest.raises(SystemExit):
        plot(["--runs", str(tmp_path)])
    assert "no searches" in capsys.readouterr().err


# --- what is kept


def composed(root: str, *overrides):
    return recorded(config(*overrides, root=root))


@pytest.mark.parametrize("folder", KEPT, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_kept_searches_are_those_of_the_config(folder):
    """The command in the README still makes the config of the record."""
    summary = json.loads((folder / "summary.json").read_text())
    choice = "sampler=random" if summary["norm"] is None else f"controller.norm={summary['norm']}"
    cfg = composed("enas", "experiment=enas/cifar10_proxy", choice, f"seed={summary['seed']}")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == cfg
    assert not summary["commit"].endswith("-dirty")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["val/shared_top1"] == summary["shared_top1"]


def test_kept_searches_had_one_budget():
    budgets = set()
    for folder in KEPT:
        summary = json.loads((folder / "summary.json").read_text())
        budgets.add(tuple(summary[key] for key in BUDGET))
    assert len(budgets) <= 1


@pytest.mark.parametrize("folder", RETRAINED, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_retrained_architecture_is_the_one_that_was_found(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    if config["arch"] != "random":
        source = json.loads((ROOT / config["arch"]).read_text())
        assert source["architecture"] == summary["architecture"]

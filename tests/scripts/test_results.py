"""results/paper.yaml, scripts/common/records.py and the scripts that read run records."""

import csv
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from common import records as results
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
STATISTICS = {"sn": ["in", "ln", "bn"], "sn_in_ln": ["in", "ln"]}


@pytest.fixture(scope="module")
def paper():
    return results.load_paper()


def write_run(root, norm, setting, seed=0, /, *, config=None, weights=None, **changes):
    """A small record as train_imagenet.py writes it; returns its folder."""
    gpus, images = map(int, setting.split("x"))
    data, model = changes.pop("data", "cifar10"), changes.pop("model", "resnet20")
    run = f"imagenet/{data}_{model}/{norm}_{setting}/seed{seed}"
    folder = Path(root) / run
    folder.mkdir(parents=True)
    summary = {
        "task": "imagenet",
        "run": run,
        "status": "finished",
        "norm": norm,
        "statistics": STATISTICS.get(norm),
        "setting": {"gpus": gpus, "images_per_gpu": images, "name": setting},
        "data": {"name": data, "train_images": 10000, "val_images": 5000, "sha256": "ab" * 32},
        "model": model,
        "top1": 70.0,
        "top1_batch_average": 71.0,
        "epochs": 2,
        "seed": seed,
        "images_seen": 20000,
        "wall_s": 60.0,
        "lr": 0.1,
        "precision": "fp32",
        "scale": "proxy",
        "versions": {"torch": "2.15.0"},
        "device": "cpu",
        "commit": "0123456789abcdef",
        "date": "2025-01-01T00:00:00",
    } | changes
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {"seed": seed, "schedule": {"epochs": 2, "weight_decay": 1e-4}} | (config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    if norm in STATISTICS:
        lines = [importance(STATISTICS[norm], weights, epoch) for epoch in range(3)]
        (folder / "importance.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def importance(statistics, weights=None, epoch=0):
    """One line of importance.jsonl: a stem of one layer and a stage of three."""
    even = {s: 1 / len(statistics) for s in statistics}
    layers = {"bn1": {"block": "stem", "mean": even, "var": weights or even}}
    for i in range(3):
        layers[f"layer1.{i}.bn1"] = {"block": "layer1", "mean": weights or even, "var": even}
    return {"epoch": epoch, "layers": layers}


def sweep(root):
    """Two seeds of BN, GN and SN in three settings; BN diverges at (8,1)."""
    for seed in (0, 1):
        for setting in ("8x32", "8x2", "8x1"):
            failed = {"status": "diverged", "top1": None, "top1_batch_average": None}
            write_run(root, "bn", setting, seed, **(failed if setting == "8x1" else {}))
            write_run(root, "gn", setting, seed, top1=68.0 + seed)
            sn = "sn_in_ln" if setting == "8x1" else "sn"
            write_run(root, sn, setting, seed, top1=72.0 + 2 * seed)
    return root


# results/paper.yaml


def test_paper_differences_follow_from_the_rows(paper):
    table = paper["table_4_1"]
    assert len(table["settings"]) == 9
    for name, row in table["top1"].items():
        assert len(row) == 9, name
    for name, printed in table["differences"].items():
        left, right = name.split("_minus_")
        for a, b, difference in zip(
            table["top1"][left], table["top1"][right], printed, strict=True
        ):
            assert difference == (None if a is None or b is None else round(a - b, 1))
    for setting, total in zip(table["settings"], table["total_batch"], strict=True):
        gpus, images = map(int, setting.split("x"))
        assert gpus * images == total
    for setting, best in table["best"].items():
        i = table["settings"].index(setting)
        top1 = {norm: row[i] for norm, row in table["top1"].items() if row[i] is not None}
        assert max(top1, key=top1.get) == best
    text = paper["text_imagenet"]
    for setting, found in text["differences"].items():
        for name, difference in found.items():
            left, right = name.split("_minus_")
            row = text["top1"][setting]
            assert round(row[left] - row[right], 1) == difference


def test_paper_text_and_figure_agree_with_the_table(paper):
    table, text, figure = paper["table_4_1"], paper["text_imagenet"], paper["fig_4"]
    top1 = {
        (norm, setting): value
        for norm, row in table["top1"].items()
        for setting, value in zip(table["settings"], row)
    }
    for setting, row in text["top1"].items():
        for norm, value in row.items():
            assert top1.get((norm, setting), value) == value
    for norm, row in figure["top1"].items():
        for setting, value in zip(figure["settings"], row, strict=True):
            if value is not None:
                assert value == pytest.approx(top1[norm, setting], abs=figure["error"] + 1e-9)
    assert figure["ideal_bn"] == top1["bn", "8x32"]


def test_paper_weights_sum_to_one_and_follow_its_trends(paper):
    weights, error = paper["fig_2"]["weights"], paper["fig_2"]["sum_error"] + 1e-9
    for setting, bars in weights.items():
        assert sum(bars.values()) == pytest.approx(1, abs=error), setting
    assert set(weights["8x1"]) == {"in", "ln"}
    bn = [weights[f"8x{images}"]["bn"] for images in (32, 16, 8, 4, 2)]
    assert bn == sorted(bn, reverse=True)
    figure = paper["fig_3"]
    for blocks in figure["weights"].values():
        assert list(blocks) == [f"block_{i}" for i in range(1, 6)]
        for parts in blocks.values():
            for bars in parts.values():
                assert sum(bars.values()) == pytest.approx(1, abs=figure["sum_error"] + 1e-9)
    for block in figure["weights"]["8x2"]:
        small, large = (figure["weights"][s][block]["var"]["bn"] for s in ("8x2", "8x32"))
        assert small < large


def test_paper_coco_differences_follow_from_the_rows(paper):
    scratch = {row["head"]: row["values"][0] for row in paper["table_4_2"]["scratch"]}
    text = paper["text_coco"]
    assert round(scratch["SN"] - scratch["BN"], 1) == text["c4_scratch"]["sn_minus_bn"]
    assert round(scratch["SN"] - scratch["GN"], 1) == text["c4_scratch"]["sn_minus_gn"]
    for name in ("table_4_2", "table_4_3", "table_4_4"):
        table = paper[name]
        for row in [row for key in ("rows", "finetune", "scratch") for row in table.get(key, [])]:
            assert len(row["values"]) == len(table["columns"])
    suspects = [row for row in paper["table_4_4"]["rows"] if row.get("suspect")]
    assert [(row["backbone"], row["head"]) for row in suspects] == [("frozenBN", "SN")]


def test_paper_blocks_are_described(paper):
    for name, block in paper.items():
        assert {"caption", "source", "run"} <= set(block), name
        assert block.get("printed", False) != block.get("read_off_figure", False), name
        assert "error" in block or block.get("printed"), name
        tasks = ("imagenet", "detection", "style_transfer", "enas")
        assert block["run"] is None or block["run"].split("/")[0] in tasks, name
    for curves in (paper["fig_5a"]["loss"], paper["fig_5b"]["accuracy"]):
        assert len(set(map(len, curves.values()))) == 1


# scripts/common/records.py


def test_load_runs_and_its_order(tmp_path):
    sweep(tmp_path)
    runs = results.load_runs(tmp_path)
    assert len(runs) == 18
    assert [run.path for run in runs] == sorted(run.path for run in runs)
    run = next(run for run in runs if run.name.endswith("sn_8x2/seed1"))
    assert (run.norm, run.setting, run.seed) == ("sn", "8x2", 1)
    assert [line["epoch"] for line in run.importance] == [0, 1, 2]
    assert run.config["schedule"]["epochs"] == 2
    with pytest.raises(FileNotFoundError, match="absent"):
        results.load_runs(tmp_path / "absent")


def test_other_tasks_are_no_imagenet_runs(tmp_path):
    write_run(tmp_path, "bn", "8x2")
    write_run(tmp_path, "bn", "8x4", task="other")
    assert len(results.load_runs(tmp_path)) == 1
    assert len(results.load_runs(tmp_path, task=None)) == 2


def test_of_a_resumed_run_the_later_line_counts(tmp_path):
    folder = write_run(tmp_path, "sn", "8x2")
    even, moved = (
        importance(["in", "ln", "bn"], w, 1) for w in (None, {"in": 1, "ln": 0, "bn": 0})
    )
    with (folder / "importance.jsonl").open("a") as file:
        file.write(f"{json.dumps(even)}\n\n{json.dumps(moved)}\n")
    (run,) = results.load_runs(tmp_path)
    assert [line["epoch"] for line in run.importance] == [0, 1, 2]
    assert run.importance[1] == moved


def test_sn_at_one_image_per_gpu_is_in_and_ln(tmp_path):
    write_run(tmp_path, "sn_in_ln", "8x1")
    write_run(tmp_path, "sn_in_ln", "8x4")
    write_run(tmp_path, "sn", "8x1")
    runs = {run.summary["run"].split("/")[2]: run for run in results.load_runs(tmp_path)}
    norms = {name: run.norm for name, run in runs.items()}
    assert norms == {"sn_in_ln_8x1": "sn", "sn_in_ln_8x4": "sn_in_ln", "sn_8x1": "sn_with_bn"}
    assert runs["sn_in_ln_8x1"].without_bn and not runs["sn_8x1"].without_bn


def test_setting_is_what_ran_and_diverged_runs_have_no_metric(tmp_path):
    setting = {"gpus": 4, "images_per_gpu": 4, "name": "8x32"}  # an override kept the old name
    write_run(tmp_path, "bn", "8x32", setting=setting, top1=None)
    write_run(tmp_path, "gn", "8x32", status="diverged", top1=float("nan"))
    bn, gn = results.load_runs(tmp_path)
    assert bn.setting == "4x4"
    assert bn.metric("top1") is None and bn.metric("top1_batch_average") == 71.0
    assert gn.metric("top1") is None


def test_settings_are_sorted_like_the_paper(paper):
    order = paper["table_4_1"]["settings"]
    found = results.sort_settings(["4x4", "1x8", "8x64", "8x2", "8x32", "8x1"], order)
    assert found == ["8x32", "8x2", "8x1", "1x8", "8x64", "4x4"]
    assert set(results.FIGURE_SETTINGS) == set(order) == set(paper["fig_2"]["weights"])
    assert list(results.FIGURE_SETTINGS) == list(paper["fig_2"]["weights"])


def test_average_importance_over_layers_and_blocks():
    record = importance(["in", "ln", "bn"], {"bn": 0.7, "in": 0.1, "ln": 0.2})
    assert list(results.average_importance(record)) == ["in", "ln", "bn"]
    third = 1 / 3
    # mean weights: one even layer in the stem, three of 0.7 in layer1
    assert results.average_importance(record, "mean")["bn"] == pytest.approx((third + 2.1) / 4)
    by_block = results.average_importance(record, "mean", "blocks")
    assert by_block["bn"] == pytest.approx((third + 0.7) / 2)
    assert results.average_importance(record, "var")["bn"] == pytest.approx((0.7 + 3 * third) / 4)
    blocks = results.block_importance(record, "both")
    assert list(blocks) == ["stem", "layer1"]
    assert blocks["stem"]["bn"] == pytest.approx((third + 0.7) / 2)
    for weights in ("mean", "var", "both"):
        for average in ("layers", "blocks"):
            found = results.average_importance(record, weights, average)
            assert sum(found.values()) == pytest.approx(1)


def test_unlike_recipes_are_found(tmp_path):
    write_run(tmp_path, "bn", "8x2", 0, config={"data": {"root": "here", "workers": 1}})
    write_run(tmp_path, "bn", "8x2", 1, config={"data": {"root": "there", "workers": 9}})
    write_run(tmp_path, "bn", "8x2", 2, epochs=3, config={"schedule": {"epochs": 3}})
    write_run(tmp_path, "gn", "8x4", 0, lr=0.0125, config={"norm": {"name": "gn"}})
    first, second, third, other = results.load_runs(tmp_path)
    assert results.differences([first, second]) == {}
    found = results.differences([first, third])
    assert found["epochs"] == ["2", "3"] and "schedule.epochs" not in found
    assert found["schedule.weight_decay"] == ["0.0001", "(not set)"]
    assert results.differences([first, other], one_cell=False) == {}
    assert "epochs: 2 / 3" in results.describe_differences(found)


def test_fine_tuned_runs_are_of_another_recipe(script, tmp_path, capsys):
    for norm, setting in (("bn", "8x32"), ("bn", "8x2"), ("sn", "8x32")):
        write_run(tmp_path, norm, setting)
    init = {"name": "checkpoint", "gate_start": 0.0}
    weights = {"name": "checkpoint", "sha256": "cd" * 32}
    write_run(tmp_path, "sn", "8x2", config={"init": init}, init=weights)
    runs = results.load_runs(tmp_path)
    found = results.differences(runs, one_cell=False)
    assert found == {"init.name": ["checkpoint", "scratch"]}
    assert sorted(map(len, results.recipes(runs, lambda run: (run.norm, run.setting)))) == [1, 3]
    script("make_tables", "--runs", tmp_path, "--print")
    assert "init.name: checkpoint / scratch" in capsys.readouterr().out
    # BN from a classifier with BN, SN from one with SN are one recipe; gates from elsewhere are not
    bn = results.read_run(
        write_run(
            tmp_path / "a", "bn", "8x2", config={"init": init}, init=weights | {"sha256": "e"}
        )
    )
    sn = next(run for run in runs if run.summary.get("init"))
    assert results.differences([bn, sn], one_cell=False) == {}
    init = {"init": init | {"gate_start": 2.0}}
    other = results.read_run(write_run(tmp_path / "b", "sn", "8x2", 1, config=init, init=weights))
    assert results.differences([sn, other]) == {"init.gate_start": ["0.0", "2.0"]}
    for run in (sn, other):
        run.config["norm"] = {"name": "sn", "momentum": 0.1}
    assert results.differences([sn, other], False) == {"init.gate_start": ["(not set)", "2.0"]}
    assert results.differences([bn, other], False) == {}  # BN has no gates


def test_options_of_a_norm_may_differ_between_norms_alone(tmp_path):
    """SN without BN at one image per GPU is another norm than SN, whatever its name."""

    def run(norm, setting, options, **changes):
        config = {"norm": {"name": norm} | options}
        return results.read_run(write_run(tmp_path, norm, setting, config=config, **changes))

    sn = run("sn", "8x32", {"momentum": 0.1, "statistics": ["in", "ln", "bn"]})
    in_ln = {"momentum": 0.1, "statistics": ["in", "ln"]}
    others = [run("gn", "8x32", {"num_groups": 32}), run("sn_in_ln", "8x1", in_ln)]
    others.append(run("sn", "4x1", in_ln, statistics=["in", "ln"]))
    assert results.differences([sn, *others], one_cell=False) == {}
    assert len(results.recipes([sn, *others], lambda run: (run.norm, run.setting))) == 1
    slow = run("sn", "8x2", {"momentum": 0.003, "statistics": ["in", "ln", "bn"]})
    found = results.differences([*others, sn, slow], one_cell=False)
    assert found == {"norm.momentum": ["0.003", "0.1"]}
    assert len(results.recipes([sn, slow], lambda run: run.setting)) == 2
    parts = {"backbone": "sn", "fpn": "sn"}
    config = [{"parts": {"backbone": {"name": "sn", "momentum": m}}} for m in (0.1, 0.003)]
    two = [
        results.Run(tmp_path, sn.summary | {"norm": None, "parts": parts}, {**sn.config, **own})
        for own in config
    ]
    assert list(results.differences(two, one_cell=False)) == ["parts.backbone.momentum"]


# scripts/make_tables.py


def test_tables_of_proxy_runs(script, tmp_path, capsys):
    script("make_tables", "--runs", sweep(tmp_path))
    assert "18 runs" in capsys.readouterr().out
    text = (tmp_path / "README.md").read_text()
    proxies, published = text.split("## Table 4.1")
    assert "| norm | (8,32) | (8,2) | (8,1) |" in proxies
    assert "| bn | 70.0 ± 0.0 (n=2) | 70.0 ± 0.0 (n=2) | diverged |" in proxies
    assert "| sn | 73.0 ± 1.4 (n=2) | 73.0 ± 1.4 (n=2) | 73.0 ± 1.4 (n=2) † |" in proxies
    assert "batch average" in proxies and "71.0 ± 0.0 (n=2)" in proxies
    link = "imagenet/cifar10_resnet20/sn_in_ln_8x1/seed1"
    assert f"| [sn_in_ln_8x1]({link}) | 1 | 74.00 | 71.00 | 2 | 20000 | 10000 |" in proxies
    assert (tmp_path / link).is_dir()
    for figure in ("76.4", "76.9", "75.9", "65.3"):  # no published figure among the proxies
        assert figure in published and figure not in proxies
    for line in published.splitlines():
        if line.startswith("| sn | (8,32)"):
            assert line == "| sn | (8,32) | 76.9 |  |  |  |"
    assert str(tmp_path) not in text


def test_full_runs_stand_beside_the_paper(script, tmp_path, capsys):
    recipe = recipe_of_table_4_1()
    full = {"data": "imagenet", "model": "resnet50", "scale": "full", "config": recipe}
    for seed, top1 in enumerate((76.0, 77.0)):
        write_run(tmp_path, "sn", "8x32", seed, top1=top1, **full)
    write_run(tmp_path, "sn_in_ln", "8x1", top1=75.5, **full)
    write_run(tmp_path, "bn", "4x4", top1=70.0, **full)
    write_run(tmp_path, "bn", "8x32", top1=33.0, **(full | {"scale": "proxy"}))
    script("make_tables", "--runs", tmp_path, "--out", "-")
    text = capsys.readouterr().out
    path = "imagenet/imagenet_resnet50/sn_8x32"
    links = f"[seed0]({path}/seed0), [seed1]({path}/seed1)"
    assert f"| sn | (8,32) | 76.9 | 76.5 ± 0.7 (n=2) | 71.0 ± 0.0 (n=2) | {links} |" in text
    assert "| sn | (8,1) | 75.0 † | 75.5 † | 71.0 † |" in text
    assert "| bn | (8,1) | does not converge |  |  |  |" in text
    assert "| bn | (8,32) | 76.4 |  |  |  |" in text  # the proxy is not there ...
    assert "| bn | (4,4) |  | 70.0 |" in text
    assert "## imagenet, resnet50 (proxy runs)" in text and "| bn | 33.0 |" in text  # ... but here
    assert not (tmp_path / "README.md").exists()


def recipe_of_table_4_1(**changes):
    config = {}
    for key, value in results.load_paper()["table_4_1"]["recipe"].items():
        group, dot, name = key.partition(".")
        config[group] = config.get(group, {}) | {name: value} if dot else value
    return config | changes


def test_other_recipes_do_not_stand_beside_the_paper(script, tmp_path, capsys):
    """The schedule of another of its figures, 77.49; other images; dropout is told."""
    full = {"data": "imagenet", "model": "resnet50", "scale": "full"}
    cosine = recipe_of_table_4_1(schedule={"name": "cosine120", "epochs": 120, "lr_per_256": 0.1})
    write_run(tmp_path, "sn", "8x32", top1=77.7, config=cosine, **full)
    small = recipe_of_table_4_1(data={"image_size": 64, "resize": 74})
    write_run(tmp_path, "sn", "8x16", top1=66.6, config=small, **full)
    dropout = recipe_of_table_4_1(model={"dropout": 0.5})
    write_run(tmp_path, "sn", "8x4", top1=75.5, config=dropout, **full)
    script("make_tables", "--runs", tmp_path, "--out", "-")
    published, others = capsys.readouterr().out.split("## imagenet, resnet50 (full)")
    assert "| sn | (8,32) | 76.9 |  |  |  |" in published
    assert "| sn | (8,16) | 76.7 |  |  |  |" in published
    assert "| sn | (8,4) | 75.9 | 75.5 § | 71.0 § |" in published
    assert "§ With dropout before the classifier" in published
    assert "77.7" in others and "66.6" in others and "75.5" not in others
    assert "no published figure stands beside these" in others and "§" not in others


def test_unlike_runs_are_not_averaged(script, tmp_path, capsys):
    write_run(tmp_path, "bn", "8x2", 0, top1=60.0)
    write_run(tmp_path, "bn", "8x2", 1, top1=70.0, epochs=9)
    script("make_tables", "--runs", tmp_path, "--print")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("bn")]
    assert ["bn", "60.0"] in rows and ["bn,", "epochs", "9", "70.0"] in rows and "65.0" not in out
    assert "epochs: 2 / 9" in out
    assert "proxy" in out and "76.4" not in out


def test_cells_of_unlike_recipes_are_reported(script, tmp_path, capsys):
    write_run(tmp_path, "bn", "8x2")
    write_run(tmp_path, "gn", "8x2", data="cifar10")
    changed = {"name": "cifar10", "train_images": 50000, "val_images": 5000, "sha256": "ab" * 32}
    folder = write_run(tmp_path, "sn", "8x2")
    summary = json.loads((folder / "summary.json").read_text()) | {"data": changed}
    (folder / "summary.json").write_text(json.dumps(summary))
    script("make_tables", "--runs", tmp_path, "--print")
    assert "data.train_images: 10000 / 50000" in capsys.readouterr().out


def test_hand_written_notes_are_kept(script, tmp_path, capsys):
    write_run(tmp_path, "bn", "8x2")
    readme = tmp_path / "README.md"
    script("make_tables", "--runs", tmp_path)
    notes = "## What we see\n\nBN falls | SN does not.\n\nTwo sentences."
    readme.write_text(readme.read_text().replace("<!-- /notes -->", f"{notes}\n<!-- /notes -->"))
    script("make_tables", "--runs", tmp_path)
    once = readme.read_text()
    script("make_tables", "--runs", tmp_path)
    assert notes in once and readme.read_text() == once
    for text in ("written by hand\n", once.replace("<!-- /notes -->", "")):
        readme.write_text(text)
        with pytest.raises(SystemExit) as error:
            script("make_tables", "--runs", tmp_path)
        assert error.value.code == 2 and readme.read_text() == text
    assert "README.md" in capsys.readouterr().err


# scripts/plot_accuracy.py and scripts/plot_importance.py


def test_plots_and_their_values(script, tmp_path):
    sweep(tmp_path / "runs")
    for name in ("first", "second"):
        script("plot_accuracy", "--runs", tmp_path / "runs", "--out", tmp_path / name)
    script("plot_importance", "--runs", tmp_path / "runs", "--out", tmp_path / "first")
    made = sorted(path.name for path in (tmp_path / "first").iterdir())
    stems = [
        f"importance_{kind}_cifar10_resnet20" for kind in ("by_block", "by_setting", "over_epochs")
    ]
    stems = ["accuracy_by_setting_cifar10_resnet20", *stems]
    assert made == sorted(f"{stem}{end}" for stem in stems for end in (".csv", ".png"))
    for name in (f"{stems[0]}.csv", f"{stems[0]}.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()

    rows = read_csv(tmp_path / "first" / f"{stems[0]}.csv")
    ours = [row for row in rows if row["source"] == "ours"]
    assert len(ours) == 18
    assert {row["top1"] for row in ours if row["status"] == "diverged"} == {""}
    rows = read_csv(tmp_path / "first" / "importance_by_setting_cifar10_resnet20.csv")
    at_8_1 = {row["statistic"] for row in rows if row["setting"] == "8x1"}
    assert at_8_1 == {"in", "ln"}  # BN is absent, not 0, in ours and in the paper's
    assert {row["weights"] for row in rows} == {"both", "not stated"}
    rows = read_csv(tmp_path / "first" / "importance_by_block_cifar10_resnet20.csv")
    assert {row["setting"] for row in rows} == {"8x32", "8x2"}
    assert {row["block"] for row in rows if row["source"] == "ours"} == {"stem", "layer1"}


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_choices_of_the_plots(script, tmp_path, capsys):
    write_run(tmp_path, "sn", "4x4", weights={"in": 0.1, "ln": 0.2, "bn": 0.7})
    write_run(tmp_path, "sn", "2x4", data="digits", status="diverged")
    write_run(tmp_path, "bn", "2x4", data="digits", status="diverged")
    args = ("--weights", "var", "--average", "blocks", "--data", "cifar10_resnet20")
    script("plot_importance", "--runs", tmp_path, *args, "--settings", "4x4")
    script("plot_accuracy", "--runs", tmp_path, "--metric", "top1_batch_average")
    figures = tmp_path / "figures"
    rows = read_csv(figures / "importance_by_setting_cifar10_resnet20_var_blocks.csv")
    bn = next(row for row in rows if row["source"] == "ours" and row["statistic"] == "bn")
    assert float(bn["value"]) == pytest.approx((0.7 + 1 / 3) / 2, abs=1e-6)
    assert (figures / "accuracy_by_setting_digits_resnet20_batch_average.png").is_file()
    assert str(figures) in capsys.readouterr().out


def test_settings_that_a_group_lacks_are_not_replaced(script, tmp_path, capsys):
    weights = {"in": 0.1, "ln": 0.2, "bn": 0.7}
    for setting in ("8x8", "8x2"):
        write_run(tmp_path, "sn", setting, weights=weights)
        other = setting.replace("8x8", "8x4")
        write_run(tmp_path, "sn", other, model="resnet8", weights=weights)
    script("plot_importance", "--runs", tmp_path, "--settings", "8x8")
    assert "no runs of 8x8 in cifar10_resnet8" in capsys.readouterr().err
    figures = tmp_path / "figures"
    rows = read_csv(figures / "importance_by_block_cifar10_resnet20.csv")
    assert {row["setting"] for row in rows if row["source"] == "ours"} == {"8x8"}
    assert (figures / "importance_by_setting_cifar10_resnet8.csv").is_file()
    assert not (figures / "importance_by_block_cifar10_resnet8.csv").exists()


def test_norms_may_have_lrs_of_their_own(script, tmp_path, capsys):
    """In one figure, which says so; runs of one norm with two lrs stay apart."""
    write_run(tmp_path, "bn", "8x2", 0, top1=50.0, config={"schedule": {"lr_per_256": 0.4}})
    write_run(tmp_path, "sn", "8x2", 0, top1=60.0, config={"schedule": {"lr_per_256": 0.8}})
    write_run(tmp_path / "z", "sn", "8x4", top1=80.0, config={"schedule": {"lr_per_256": 0.2}})
    write_run(tmp_path / "z", "sn", "8x2", top1=70.0, config={"schedule": {"lr_per_256": 1.6}})
    script("plot_accuracy", "--runs", tmp_path, "--format", "svg")
    drawn = {
        end: sorted(
            row["top1"]
            for row in read_csv(tmp_path / f"figures/accuracy_by_setting_cifar10_resnet20{end}.csv")
            if row["source"] == "ours"
        )
        for end in ("", "_lr_per_256_1.6", "_lr_per_256_0.2")
    }
    assert list(drawn.values()) == [["50.0", "60.0"], ["70.0"], ["80.0"]]
    figure = (tmp_path / "figures/accuracy_by_setting_cifar10_resnet20.svg").read_text()
    [others] = re.findall("figures of their own: ([^<]*)", figure)
    assert "256_1.6" in others and "256_0.2" in others
    runs = results.load_runs(tmp_path)
    for run in runs:
        run.summary["lr"] = run.config["schedule"]["lr_per_256"] / 8  # what follows is not named
    two = [run for run in runs if run.norm == "sn" and run.setting == "8x2"]
    assert results.differences(two) == {"schedule.lr_per_256": ["0.8", "1.6"]}


def test_bars_begin_where_training_did(load_script):
    """A fine-tuned run's at its first record, in its colour where nothing moved; else at 1/K."""
    drawing = load_script("plot_importance")
    _, (panel, plain) = drawing.plt.subplots(1, 2)
    last = {"8x2": [(0, {"in": 0.1, "bn": 0.9}), (1, {"in": 0.1, "bn": 0.7})]}
    first = {"8x2": [(0, {"in": 0.1, "bn": 0.75}), (1, {"in": 0.1, "bn": 0.75})]}
    drawing.draw_bars(panel, last, starts=first)
    assert [bar.get_y() for bar in panel.patches] == pytest.approx([0.1, 0.75])
    assert [bar.get_height() for bar in panel.patches] == pytest.approx([0.0, 0.05])
    assert not panel.texts  # no line at 1/2
    drawing.draw_bars(plain, last)
    assert [bar.get_y() for bar in plain.patches] == pytest.approx([0.5, 0.5])
    assert [text.get_text() for text in plain.texts] == ["1/2"]


def test_unlike_runs_are_drawn_apart(script, tmp_path, capsys):
    """A 10-epoch and a 2-epoch run, both seed 0: two figures, and never their average."""
    for seed in (0, 1):
        write_run(tmp_path, "sn", "8x2", seed, top1=60.0)
    write_run(tmp_path / "long", "sn", "8x2", 0, top1=80.0, epochs=10)
    write_run(tmp_path, "bn", "8x2", 0, top1=50.0)
    for name in ("plot_accuracy", "plot_importance"):
        script(name, "--runs", tmp_path, "--data", "cifar10_resnet20")
        error = capsys.readouterr().err
        assert "drawn apart" in error and "epochs: 10 / 2" in error and "long" in error
    figures = tmp_path / "figures"
    drawn = {}
    for end in ("", "_epochs_10"):
        rows = read_csv(figures / f"accuracy_by_setting_cifar10_resnet20{end}.csv")
        drawn[end] = sorted(row["top1"] for row in rows if row["source"] == "ours")
        rows = read_csv(figures / f"importance_by_setting_cifar10_resnet20{end}.csv")
        assert {row["seed"] for row in rows if row["source"] == "ours"} == (
            {"0"} if end else {"0", "1"}
        )
    assert drawn == {"": ["50.0", "60.0", "60.0"], "_epochs_10": ["80.0"]}


def test_recipes_are_alike_within(tmp_path):
    write_run(tmp_path, "bn", "8x2", 0)
    write_run(tmp_path, "bn", "8x2", 1)
    write_run(tmp_path, "gn", "8x2", 0, config={"norm": {"name": "gn", "num_groups": 32}})
    write_run(tmp_path, "gn", "8x2", 1, config={"norm": {"name": "gn", "num_groups": 16}})
    write_run(tmp_path, "gn", "8x4", 0, lr=0.2)
    write_run(tmp_path, "sn", "8x2", 0, precision="bf16")
    found = results.recipes(results.load_runs(tmp_path), lambda run: (run.norm, run.setting))
    names = [[run.name.split("/", 2)[2] for run in runs] for runs in found]
    assert names == [
        ["bn_8x2/seed0", "bn_8x2/seed1", "gn_8x2/seed0", "gn_8x4/seed0"],
        ["gn_8x2/seed1"],
        ["sn_8x2/seed0"],
    ]


def test_mean_and_interval_over_seeds():
    """Two runs of one seed count as one; the interval is Student's (scipy's own)."""
    values = [(0, 1.0), (0, 3.0), (1, 4.0), (2, 9.0)]
    spread = results.over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=5.0, scale=stats.sem([2.0, 4.0, 9.0]))
    assert (spread.mean, spread.seeds, spread.runs) == (5.0, 3, 4)
    assert spread.sd == pytest.approx(13**0.5)
    assert [spread.mean - spread.half, spread.mean + spread.half] == pytest.approx([low, high])
    assert results.over_seeds([(7, 1.0), (7, 2.0)]) == (1.5, None, None, 1, 2)


def test_two_runs_of_a_seed_are_not_two_seeds(script, tmp_path, capsys):
    write_run(tmp_path, "sn", "8x2", 0, top1=60.0)
    write_run(tmp_path / "again", "sn", "8x2", 0, top1=62.0)
    script("make_tables", "--runs", tmp_path, "--print")
    out = capsys.readouterr().out
    assert "61.0 (2 runs of 1 seed)" in out and "1 seed\n" in out and "n=2" not in out
    write_run(tmp_path, "sn", "8x2", 1, top1=65.0)
    script("make_tables", "--runs", tmp_path, "--print")
    assert "63.0 ± 2.8 (n=2) (3 runs of 2 seeds)" in capsys.readouterr().out
    script("plot_accuracy", "--runs", tmp_path)
    assert "2 runs of seed 0 of imagenet/cifar10_resnet20/sn_8x2 count as one" in (
        capsys.readouterr().err
    )


def test_a_figure_is_written_nowhere_else_and_as_svg(script, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    write_run(runs, "sn", "8x2")
    before = sorted(runs.rglob("*"))
    for name in ("plot_accuracy", "plot_importance"):
        script(name, "--runs", runs, "--out", out, "--format", "svg")
    assert sorted(runs.rglob("*")) == before
    assert {path.suffix for path in out.iterdir()} == {".svg", ".csv"}
    assert "importance weight" in (out / "importance_by_block_cifar10_resnet20.svg").read_text()


def test_demo_and_smoke_runs_lie_where_no_plot_reads():
    """`--runs outputs` reads all below; what shows that things run writes elsewhere."""
    for path in (ROOT / "configs/experiment").rglob("*.yaml"):
        if path.stem in ("demo", "smoke"):
            root = yaml.safe_load(path.read_text())["output_root"]
            assert Path("outputs") not in [Path(root), *Path(root).parents], path
    assert "outputs/" not in (ROOT / "scripts/demo.sh").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plot_importance", "--runs", "{root}/absent"), "no folder"),
        (("plot_importance", "--runs", "{root}/empty"), "no runs below"),
        (("plot_importance", "--runs", "{root}/bn"), "no runs with importance weights"),
        (("plot_importance", "--runs", "{root}/sn", "--data", "x"), "there are: cifar10_resnet20"),
        (("plot_importance", "--runs", "{root}/sn", "--settings", "8x3"), "there are: 8x2"),
        (("plot_importance", "--runs", "{root}/sn", "--norm", "sn_in_ln"), "there are: sn"),
        (("plot_importance", "--runs", "{root}/sn", "--weights", "x"), "invalid choice"),
        (("plot_accuracy", "--runs", "{root}/absent"), "no folder"),
        (("plot_accuracy", "--runs", "{root}/empty"), "no runs below"),
        (("plot_accuracy", "--runs", "{root}/bn", "--data", "x"), "there are: cifar10_resnet20"),
        (("make_tables", "--runs", "{root}/absent"), "no folder"),
        (("make_tables", "--runs", "{root}/empty", "--print"), "no runs below"),
        (("make_tables", "--runs", "{root}/bn", "--out", "{root}/absent/x.md"), "no folder"),
        (("make_tables", "--runs", "{root}/bn", "--print", "--out", "-"), "--print writes no file"),
        (("plot_accuracy", "--runs", "{root}/bn", "--out", "{root}/file/x"), "cannot write"),
        (("plot_importance", "--runs", "{root}/sn", "--out", "{root}/file"), "cannot write"),
        (("make_tables", "--runs", "{root}/bn", "--out", "{root}/empty"), "cannot write"),
        (("keep_records", "{root}/absent"), "no folder"),
        (("keep_records", "{root}/empty", "--to", "{root}/kept"), "no runs below"),
        (("keep_records", "{root}/bn", "--to", "{root}/bn"), "where the records would go"),
    ],
)
def test_bad_input_ends_with_one_line(script, tmp_path, capsys, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    write_run(tmp_path / "bn", "bn", "8x2")
    write_run(tmp_path / "sn", "sn", "8x2")
    with pytest.raises(SystemExit) as error:
        script(*(arg.format(root=tmp_path) for arg in args))
    assert error.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and "error: " in last


@pytest.mark.parametrize(
    "args", [("make_tables", "--print"), ("plot_accuracy",), ("plot_importance",)]
)
def test_where_runs_of_other_tasks_lie_that_is_said(script, tmp_path, capsys, args):
    folder = write_run(tmp_path, "sn", "8x2", task="enas_nasbench201")
    with pytest.raises(SystemExit):
        script(args[0], "--runs", tmp_path, *args[1:])
    what = "classification or detection" if args[0] == "make_tables" else "classification"
    said = f"no {what} runs below {tmp_path}; there are runs of enas_nasbench201"
    assert capsys.readouterr().err.strip().endswith(said)
    assert results.none_of("x", folder.parent) == said.replace(what, "x").replace(
        str(tmp_path), str(folder.parent)
    )


def test_a_diverged_run_is_said_where_weights_are_drawn(script, tmp_path):
    for setting in ("8x32", "8x2"):
        write_run(tmp_path, "sn", setting)
    write_run(tmp_path, "sn_in_ln", "8x1", 3, status="diverged", top1=None, epochs=1)
    write_run(tmp_path, "sn", "8x2", 4, status="diverged", config={"gates": "bilevel"})  # other
    script("plot_importance", "--runs", tmp_path, "--format", "svg")
    [by_setting] = (tmp_path / "figures").glob("importance_by_setting_*.svg")
    [by_block] = (tmp_path / "figures").glob("importance_by_block_*.svg")
    assert "Diverged and left out: (8,1) seed 3." in by_setting.read_text()
    assert "Diverged" not in by_block.read_text()  # of (8,32) and (8,2)


def test_a_key_that_most_configs_lack_makes_a_variant(tmp_path):
    """A config without `gates` is of joint training: no setting's cell may take a bilevel run."""
    for seed in range(3):
        write_run(tmp_path / "a", "sn", "8x2", seed, config={"gates": "bilevel"}, top1=50.0)
    for setting in ("8x4", "8x2"):
        write_run(tmp_path / "b", "sn", setting)
    found = results.variants(results.load_runs(tmp_path))
    values = {
        name: sorted((run.setting, run.summary["top1"]) for run in runs)
        for name, runs in found.items()
    }
    others = [("8x2", 70.0), ("8x4", 70.0)]
    assert sorted(values.values()) == [[("8x2", 50.0)] * 3, others]


# scripts/keep_records.py


def test_records_are_kept_under_their_run(script, tmp_path, capsys):
    source, kept = tmp_path / "outputs", tmp_path / "results"
    folder = write_run(source / "demo", "sn", "8x2")
    (folder / "checkpoint.pt").write_text("large")
    (folder / "events.out.tfevents.1").write_text("large")
    write_run(source, "bn", "8x1", status="diverged")
    write_run(source, "gn", "8x1", status="running")
    script("keep_records", source, "--to", kept)
    target = kept / "imagenet" / "cifar10_resnet20" / "sn_8x2" / "seed0"
    names = {"config.yaml", "importance.jsonl", "metrics.jsonl", "summary.json"}
    assert {path.name for path in target.iterdir()} == names
    assert (target / "importance.jsonl").read_bytes() == (folder / "importance.jsonl").read_bytes()
    out = capsys.readouterr().out
    assert "2 of 3 runs copied" in out and "left out" in out
    assert len(results.load_runs(kept)) == 2
    script("keep_records", source, "--to", kept)
    assert "0 of 3 runs copied" in capsys.readouterr().out


def test_a_copy_that_a_full_disk_ended_is_made_again(script, tmp_path, capsys):
    """Nothing of it stays, which would be taken for another record."""
    write_run(tmp_path / "outputs", "sn", "8x2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(SystemExit):
            script("keep_records", tmp_path / "outputs", "--to", tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in capsys.readouterr().err
    script("keep_records", tmp_path / "outputs", "--to", tmp_path / "kept")
    assert "1 of 1 runs copied" in capsys.readouterr().out


def test_searches_of_the_lr_are_kept_as_such_and_are_no_seeds(script, tmp_path, capsys):
    outputs, kept = tmp_path / "outputs", tmp_path / "results"
    write_run(outputs, "bn", "8x2", 1, top1=60.0)
    write_run(outputs / "lr_search", "bn", "8x2", 0, top1=10.0)
    script("make_tables", "--runs", outputs, "--print")
    assert "60.0" in (text := capsys.readouterr().out) and "n=2" not in text
    script("keep_records", outputs, "--to", kept)
    assert [run.seed for run in results.without_searches(results.load_runs(kept))] == [1]
    assert (kept / "lr_search/imagenet/cifar10_resnet20/bn_8x2/seed0/summary.json").is_file()
    script("keep_records", outputs / "lr_search", "--to", tmp_path / "lr_search")
    assert (tmp_path / "lr_search/imagenet").is_dir()


def test_a_run_that_diverged_before_its_first_evaluation_is_kept(script, tmp_path):
    folder = write_run(tmp_path / "outputs", "bn", "8x2", status="diverged")
    (folder / "metrics.jsonl").unlink()
    script("keep_records", tmp_path / "outputs", "--to", tmp_path / "kept")
    (run,) = results.load_runs(tmp_path / "kept")
    assert run.diverged and not run.metrics


def test_a_record_that_differs_is_not_overwritten(script, tmp_path, capsys):
    source, kept = tmp_path / "outputs", tmp_path / "results"
    folder = write_run(source, "bn", "8x2")
    script("keep_records", source, "--to", kept)
    target = kept / "imagenet" / "cifar10_resnet20" / "bn_8x2" / "seed0" / "metrics.jsonl"
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(SystemExit) as error:
        script("keep_records", source, "--to", kept)
    assert error.value.code == 2 and "--force" in capsys.readouterr().err
    assert target.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
    script("keep_records", source, "--to", kept, "--force")
    assert target.read_text() == '{"epoch": 1}\n'


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.yaml", "data: {root: /home/me/cifar10}\n"),
        ("config.yaml", "data: {root: ~/cifar10}\n"),
        ("config.yaml", "data: {root: 'C:\\data'}\n"),
        ("config.yaml", "argv: [train_imagenet.py, data.root=/data/cifar10]\n"),
        ("metrics.jsonl", '{"epoch": 1, "note": "wrote to /tmp/x"}\n'),
        ("config.yaml", "a: [\n"),
        ("metrics.jsonl", '{"epoch": 1\n'),
        ("metrics.jsonl", None),
    ],
)
def test_unfit_records_are_refused(script, tmp_path, capsys, file, text):
    folder = write_run(tmp_path / "outputs", "bn", "8x2")
    write_run(tmp_path / "outputs", "gn", "8x2")
    (folder / file).unlink()
    if text:
        (folder / file).write_text(text)
    with pytest.raises(SystemExit) as error:
        script("keep_records", tmp_path / "outputs", "--to", tmp_path / "kept")
    assert error.value.code == 2
    assert file in capsys.readouterr().err
    assert [run.norm for run in results.load_runs(tmp_path / "kept")] == ["gn"]


def test_paths_that_are_not_local_are_kept(script, tmp_path):
    config = {
        "source": "https://arxiv.org/abs/1806.10779",
        "output_dir": "outputs/imagenet/cifar10_resnet20/bn_8x2",
        "unit": "images / s, 1/256",
        "ratio": "a:b 8x2",
    }
    write_run(tmp_path / "outputs", "bn", "8x2", config=config)
    script("keep_records", tmp_path / "outputs", "--to", tmp_path / "kept")


@pytest.mark.parametrize("run", ["../outside", "/outside", "", "a//b", "a\\\\b/c"])
def test_a_run_path_cannot_leave_the_results(script, tmp_path, capsys, run):
    write_run(tmp_path / "outputs", "bn", "8x2", run=run)
    with pytest.raises(SystemExit):
        script("keep_records", tmp_path / "outputs", "--to", tmp_path / "kept")
    assert "expected a relative path" in capsys.readouterr().err
    assert not (tmp_path / "outside").exists() and not (tmp_path / "kept").exists()


def test_two_runs_of_one_name_are_refused(script, tmp_path, capsys):
    """Unlike or alike, neither is kept; copies of one run are one run."""
    outputs = tmp_path / "outputs"
    write_run(outputs, "bn", "8x2")
    write_run(outputs / "other", "bn", "8x2", epochs=10)
    write_run(outputs, "gn", "8x2")
    write_run(outputs / "other", "gn", "8x2", top1=1.0)
    write_run(outputs, "sn", "8x2")
    write_run(outputs / "other", "sn", "8x2")
    with pytest.raises(SystemExit):
        script("keep_records", outputs, "--to", tmp_path / "kept", "--force")
    error = capsys.readouterr().err
    assert error.count("another recipe (epochs: 10 / 2)") == 2
    assert error.count("two runs of one seed") == 2
    assert [run.norm for run in results.load_runs(tmp_path / "kept")] == ["sn"]


def test_a_seed_of_another_recipe_than_those_beside_it_is_warned_of(script, tmp_path, capsys):
    kept = tmp_path / "kept"
    for seed, epochs in ((1, 2), (2, 2), (3, 10)):
        write_run(tmp_path / f"outputs{seed}", "bn", "8x2", seed, epochs=epochs)
        script("keep_records", tmp_path / f"outputs{seed}", "--to", kept)
        error = capsys.readouterr().err
        assert ("seed3: another recipe than seed1 beside it (epochs: 10 / 2)" in error) == (
            seed == 3
        )
    assert len(results.load_runs(kept)) == 3


def test_an_unlike_record_is_never_replaced(script, tmp_path, capsys):
    write_run(tmp_path / "short", "bn", "8x2", epochs=2, top1=50.0)
    write_run(tmp_path / "long", "bn", "8x2", epochs=10, top1=60.0)
    write_run(tmp_path / "again", "bn", "8x2", epochs=2, top1=51.0)
    kept = tmp_path / "kept"
    script("keep_records", tmp_path / "short", "--to", kept)
    with pytest.raises(SystemExit):
        script("keep_records", tmp_path / "long", "--to", kept, "--force")
    assert "another run of that name (epochs: 10 / 2)" in capsys.readouterr().err
    assert results.load_runs(kept)[0].metric("top1") == 50.0
    script("keep_records", tmp_path / "again", "--to", kept, "--force")
    assert results.load_runs(kept)[0].metric("top1") == 51.0
    assert not list(kept.rglob("*.part"))


# as a user calls them


@pytest.mark.parametrize(
    "name", ["plot_importance", "plot_accuracy", "make_tables", "keep_records"]
)
def test_scripts_run_from_any_folder_without_torch(tmp_path, name):
    blocker = tmp_path / "block" / "torch"
    blocker.mkdir(parents=True)
    (blocker / "__init__.py").write_text("raise ImportError('scripts must not need torch')\n")
    write_run(tmp_path / "runs", "sn", "8x2")
    args = {"make_tables": ["--runs", "runs", "--print"], "keep_records": ["runs", "--to", "kept"]}
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", *args.get(name, ["--runs", "runs"])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "block")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and not result.stderr, result.stderr

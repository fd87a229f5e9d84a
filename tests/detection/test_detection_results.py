"""Tables 4.2-4.4, tables of detection proxies and the figure of weights per part, from records."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from common import records as results

ROOT = Path(__file__).resolve().parents[2]
AP = {"box_ap": 12.0, "box_ap50": 30.0, "box_ap75": 5.0, "box_ap_l": 20.0, "box_ap_m": 10.0}
AP |= {"box_ap_s": None, "mask_ap": None}
RECIPES = {  # images of training, short side of the image
    "c4": (703_596, 600),
    "c4_3x": (4_320_000, 800),
    "fpn": (2_880_000, 800),
    "fpn_1x": (1_440_000, 800),
    "mask": (2_880_000, 800),
}
MODELS = {"c4": "faster_rcnn_r50_c4", "fpn": "faster_rcnn_r50_fpn", "mask": "mask_rcnn_r50_fpn"}


def write_run(root, parts, init="scratch", seed=0, /, **changes):
    """A small record as train_detection.py writes it; returns its folder."""
    names = ("backbone", "fpn", "box_head", "mask_head")
    config = changes.pop("config", {})
    parts = dict(zip(names if len(parts) > 2 else ("backbone", "box_head"), parts))
    data, model = changes.pop("data", "digits_coco"), changes.pop("model", "faster_rcnn_r18_fpn")
    run = f"detection/{data}_{model}/{'-'.join(parts.values())}_8x2_{init}/seed{seed}"
    folder = Path(root) / run
    folder.mkdir(parents=True)
    summary = {
        "task": "detection",
        "run": run,
        "status": "finished",
        "parts": parts,
        "init": {"name": init, "sha256": None},
        "setting": {"gpus": 8, "images_per_gpu": 2, "name": "8x2"},
        "data": {"name": data, "train_images": 100, "val_images": 50, "sha256": "ab" * 32},
        "model": model,
        **AP,
        "steps": 20,
        "seed": seed,
        "images_seen": 320,
        "wall_s": 60.0,
        "lr": 0.02,
        "precision": "fp32",
        "scale": "proxy",
        "versions": {"torch": "2.15.0"},
        "device": "cpu",
        "commit": "0123456789abcdef",
        "date": "2025-01-01T00:00:00",
    } | changes
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {"seed": seed, "parts": parts} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    if "sn" in parts.values():
        even = {s: 1 / 3 for s in ("in", "ln", "bn")}
        layers = {
            f"{part}.{i}": {
                "block": f"{part}.layer1" if part == "backbone" else part,
                "mean": even,
                "var": {"in": 0.5, "ln": 0.3, "bn": 0.2},
            }
            for part, norm in parts.items()
            if norm == "sn"
            for i in range(2)
        }
        record = [json.dumps({"step": step, "layers": layers}) + "\n" for step in (0, 20)]
        (folder / "importance.jsonl").write_text("".join(record))
    return folder


def test_steps_of_two_settings_follow_from_the_images(tmp_path):
    """Runs of as many images compare, in however many steps; those of one setting do not."""
    many = write_run(tmp_path, ("sn", "sn"), steps=20)
    few = write_run(tmp_path, ("bn", "bn"), steps=160)
    more = write_run(tmp_path, ("gn", "gn"), steps=200)
    for folder, images in ((many, 320), (few, 320), (more, 400)):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config |= {"schedule": {"images": images}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    many, few, more = (results.read_run(folder) for folder in (many, few, more))
    assert results.differences([many, few], one_cell=False) == {}
    assert results.differences([many, few])["steps"] == ["160", "20"]
    found = results.differences([few, more], one_cell=False)
    assert found == {"schedule.images": ["320", "400"]}


def tables(script, root):
    script("make_tables", "--runs", root)
    return (Path(root) / "README.md").read_text()


def row_of(text, *starts):
    """The first table row whose cells begin with `starts`, as cells."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[: len(starts)] == list(starts):
            return cells
    raise AssertionError(f"no row {starts}")


def test_published_tables_without_runs(script, tmp_path):
    """Every row of the three tables, the paper's figures as they stand, ours blank."""
    text = tables(script, tmp_path)
    paper = results.load_paper()
    rows = 0
    for name in ("table_4_2", "table_4_3", "table_4_4"):
        assert f"## {paper[name]['caption']}" in text
        section = text.split(paper[name]["caption"])[1].split("\n## ")[0]
        for start in ("finetune", "scratch", "rows"):
            for row in paper[name].get(start, []):
                begin = "scratch" if start == "scratch" else "pretrained"
                head = row["head"] + (" (suspect)" if row.get("suspect") else "")
                cells = row_of(section, begin, row["backbone"], head)
                assert cells[3] == " / ".join(f"{value:.1f}" for value in row["values"])
                assert cells[4:] == ["", ""]
                rows += 1
    assert rows == 18


@pytest.mark.parametrize(
    "parts, init, kind, where",
    [
        (("frozen_bn",) * 2, "torchvision", "c4", ("pretrained", "frozenBN", "frozenBN")),
        (("sn", "sn"), "checkpoint", "c4", ("pretrained", "SN", "SN")),
        (("sn", "sn"), "scratch", "c4_3x", ("scratch", "SN", "SN")),
        (
            ("frozen_bn",) + ("none",) * 2,
            "checkpoint",
            "fpn_1x",
            ("pretrained", "frozenBN", "none"),
        ),
        (("frozen_bn", "gn", "gn"), "checkpoint", "fpn", ("pretrained", "frozenBN", "GN")),
        (("gn",) + ("sn_in_ln",) * 3, "checkpoint", "mask", ("pretrained", "GN", "SN")),
    ],
)
def test_a_full_run_stands_beside_the_paper(parts, init, kind, where, script, tmp_path):
    """In its own row of its own table, and nowhere else."""
    images, size = RECIPES[kind]
    kind = kind.partition("_")[0]
    write_run(
        tmp_path,
        parts,
        init,
        data="coco",
        model=MODELS[kind],
        scale="full",
        config={"schedule": {"images": images}, "data": {"test_size": size}},
        box_ap=33.33,
        mask_ap=30.0 if kind == "mask" else None,
    )
    text = tables(script, tmp_path)
    table = {"c4": "Table 4.2", "fpn": "Table 4.3", "mask": "Table 4.4"}[kind]
    section = text.split(f"## {table}")[1].split("\n## ")[0]
    cells = row_of(section, *where)
    assert cells[4].startswith("33.3 / 30.0 / 5.0") and "[seed0](detection/coco_" in cells[5]
    assert text.count("[seed0](") == 1


def test_other_runs_do_not(script, tmp_path):
    """A proxy, another setting or recipe, norms that the paper mixed otherwise."""
    recipe = {"schedule": {"images": 2_880_000}, "data": {"test_size": 800}}
    full = {"data": "coco", "model": MODELS["fpn"], "scale": "full", "config": recipe}
    short = full | {"config": recipe | {"schedule": {"images": 1_440_000}}}
    write_run(tmp_path, ("frozen_bn", "sn", "sn"), "checkpoint", **short)
    write_run(tmp_path, ("frozen_bn", "none", "none"), "checkpoint", **full)
    write_run(tmp_path, ("sn", "sn", "sn"), "checkpoint", **full | {"scale": "proxy"})
    write_run(tmp_path, ("sn", "sn", "none"), "checkpoint", **full)
    one = {"gpus": 1, "images_per_gpu": 2, "name": "1x2"}
    write_run(tmp_path, ("gn", "gn", "gn"), "checkpoint", **full, setting=one)
    text = tables(script, tmp_path)
    section = text.split("## Table 4.3")[1].split("\n## ")[0]
    for row in results.load_paper()["table_4_3"]["rows"]:
        assert row_of(section, "pretrained", row["backbone"], row["head"])[4:] == ["", ""]


def test_proxies_have_tables_of_their_own(script, tmp_path, capsys):
    for norm, ap in (("sn", 15.0), ("gn", 14.0), ("bn", 9.0)):
        for seed in (0, 1):
            write_run(tmp_path, (norm,) * 3, "scratch", seed, box_ap=ap + 2 * seed)
    text = tables(script, tmp_path)
    section = text.split("## digits_coco, faster_rcnn_r18_fpn (proxy runs)")[1].split("\n## ")[0]
    assert "no published figure stands" in section
    bn = row_of(section, "bn-bn-bn", "scratch", "(8,2)")
    assert bn[3] == "10.0 ± 1.4 (n=2)" and bn[8] == ""  # no small objects
    order = [
        line.split(" | ")[0].strip("| ") for line in section.splitlines() if "| scratch" in line
    ]
    assert order == ["bn-bn-bn", "gn-gn-gn", "sn-sn-sn"]
    assert "mask AP" not in section.split("### Runs")[0]
    assert section.count("(detection/digits_coco_faster_rcnn_r18_fpn/") == 6
    capsys.readouterr()
    script("make_tables", "--runs", tmp_path, "--print")
    printed = capsys.readouterr().out
    assert "10.0 ± 1.4" in printed and "digits_coco, faster_rcnn_r18_fpn: proxy runs" in printed


def test_masks_and_divergence(script, tmp_path):
    write_run(tmp_path, ("sn",) * 4, model="mask_rcnn_r18_fpn", mask_ap=7.0, mask_ap50=20.0)
    write_run(tmp_path, ("bn",) * 4, model="mask_rcnn_r18_fpn", status="diverged", box_ap=None)
    text = tables(script, tmp_path)
    header = row_of(text, "norms (backbone-FPN-heads)")
    assert header[3:5] == ["box AP", "box AP50"] and header[9] == "mask AP"
    assert row_of(text, "sn-sn-sn-sn")[9:11] == ["7.0", "20.0"]
    assert row_of(text, "bn-bn-bn-bn")[3] == "diverged"


def test_unlike_runs_are_not_averaged(script, tmp_path):
    write_run(tmp_path, ("sn",) * 3, "scratch", 0)
    folder = write_run(tmp_path, ("sn",) * 3, "scratch", 1, box_ap=20.0)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 1, "momentum": 7}))
    assert row_of(tables(script, tmp_path), "sn-sn-sn")[3] == "12.0, 20.0 (runs unlike)"


def test_a_broken_record_is_left_out(script, tmp_path, caplog):
    write_run(tmp_path, ("sn",) * 3)
    folder = write_run(tmp_path, ("gn",) * 3)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["parts"]
    (folder / "summary.json").write_text(json.dumps(summary))
    text = tables(script, tmp_path)
    assert "sn-sn-sn" in text and "gn-gn-gn" not in text
    assert "no 'parts'" in caplog.text


def test_weights_by_part(script, tmp_path):
    """A figure and its CSV: every block, both moments; the figure is made without classifiers."""
    write_run(tmp_path, ("sn", "sn", "sn"))
    write_run(tmp_path, ("gn", "gn", "sn"))
    write_run(tmp_path, ("gn",) * 3)
    script("plot_importance", "--runs", tmp_path, "--data", "digits_coco_faster_rcnn_r18_fpn")
    path = tmp_path / "figures" / "importance_by_part_digits_coco_faster_rcnn_r18_fpn.png"
    assert path.stat().st_size > 10_000
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    own = [row for row in rows if row["norms"] == "sn-sn-sn"]
    assert [row["block"] for row in own[::6]] == ["backbone.layer1", "fpn", "box_head"]
    assert {row["block"] for row in rows if row["norms"] == "gn-gn-sn"} == {"box_head"}
    variances = {
        r["statistic"]: float(r["value"])
        for r in own
        if r["weights"] == "var" and r["block"] == "fpn"
    }
    assert variances == {"in": 0.5, "ln": 0.3, "bn": 0.2}


@pytest.mark.slow
def test_bench_writes_what_it_measures(script, tmp_path, capsys, monkeypatch):
    """One round on the smallest detector; steps per second, ratios, memory, the circumstances."""
    size = ("--size", "32", "64", "--images", "1")
    bench = [sys.executable, str(ROOT / "scripts/bench_detection.py"), *size]
    own = subprocess.run(  # a process of its own: what it measures is how far its memory rises
        [*bench, "--norms", "sn", "--measure", "sn"], capture_output=True, text=True, check=True
    )
    mebibytes = own.stdout
    assert float(mebibytes) > 1
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, mebibytes, "")

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "bench.json"
    args = ("--norms", "frozen_bn", "sn", "--rounds", "1", "--clock", "cpu", "--out", out)
    script("bench_detection", *size, *args)
    measured = [command[-1] for command in commands if "--measure" in command]
    assert measured == ["frozen_bn", "sn"]
    result = json.loads(out.read_text())
    assert list(result["norms"]) == ["frozen_bn", "sn"]
    assert result["norms"]["frozen_bn"]["time_over_frozen_bn"] == 1
    assert all(row["steps_per_s"] > 0 and row["peak_mib"] > 1 for row in result["norms"].values())
    assert result["settings"]["rounds"] == 1 and result["versions"]["torch"]
    assert "time over frozen bn" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script("bench_detection", "--norms", "batch")
    assert "unknown norm batch" in capsys.readouterr().err

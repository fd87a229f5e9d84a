"""Broken records of every kind are left out with one warning; none ends a table or a figure."""

import copy
import json
import os

import pytest
import yaml
from common import records

DATA = {"name": "digits", "train_images": 100, "val_images": 50, "sha256": "ab"}
BASE = {
    "status": "finished", "seed": 0, "data": DATA, "scale": "proxy", "wall_s": 60.0, "note": None,
    "versions": {"torch": "2.15.0"}, "device": "CPU", "commit": "c0ffee", "date": "2026-01-01",
    "images_seen": 200, "precision": "fp32",
}  # fmt: skip
CELL = {"model": "net", "setting": {"gpus": 8, "images_per_gpu": 2, "name": "8x2"}}
SUMMARIES = {
    "imagenet": CELL
    | {"norm": "sn", "statistics": ["in", "ln", "bn"], "top1": 70.0, "epochs": 2, "lr": 0.1},
    "detection": CELL
    | {"parts": {"backbone": "sn", "box_head": "sn"}, "init": {"name": "scratch"}, "box_ap": 9.0},
    "style_transfer": {
        "norm": "sn", "style": {"name": "wave", "sha256": "a"}, "image_size": 96,
        "vgg": {"weights": "x", "sha256": "b", "input": "caffe"}, "loss_weights": {"content": 1.0},
        "batch_size": 2, "steps": 2, "loss": 1.0, "statistics": ["in", "ln"],
    },
    "enas": {
        "sampler": "controller", "norm": "ln", "model": "2x8", "shared_top1": 20.0, "epochs": 2,
        "best_shared_top1": 21.0, "entropy": 1.0, "reward": 0.1, "child_steps": 6,
        "controller_updates": 6, "images_scored": 9,
    },
    "enas_retrain": {
        "name": "best", "model": "2x8", "parameters": 7, "epochs": 2, "retrained_val_top1": 50.0,
    },
}  # fmt: skip
CONFIG = {"seed": 0, "schedule": {"epochs": 2, "milestones": [0.3, 0.6]}}
EVEN = {"in": 0.3, "ln": 0.3, "bn": 0.4}


def write_run(root, task, name="run", seed=0, **changes):
    """A whole record of a task."""
    folder = root / task / "data_model" / name / f"seed{seed}"
    folder.mkdir(parents=True)
    run = folder.relative_to(root).as_posix()
    summary = BASE | SUMMARIES[task] | {"task": task, "run": run, "seed": seed} | changes
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    unit = "step" if task in ("detection", "style_transfer") else "epoch"
    losses = {f"train/{part}": 2.0 for part in ("loss", "content", "style")}
    lines = [{unit: n, "val/shared_top1": 9.0, **losses} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    layers = {"bn1": {"block": "stem", "mean": EVEN, "var": EVEN}}
    lines = [{unit: n, "layers": layers} for n in (0, 1)]
    (folder / "importance.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_whole_records_of_every_task_are_read(tmp_path, caplog):
    for task in SUMMARIES:
        write_run(tmp_path, task)
    assert [run.summary["task"] for run in records.load_runs(tmp_path, None)] == sorted(SUMMARIES)
    assert not caplog.records


def values(tree, path=()):
    """Every place in a tree of mappings and lists."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, list) else items
    for key, value in items:
        yield from values(value, (*path, key))


def changed(tree, path, value):
    """A copy with another value in one place; ... takes it away."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return tree


OTHERS = (..., None, True, -1, 0, 2.5, 10**400, float("nan"), float("inf"), "", "a/b", "..")
OTHERS += ("x" * 500, [], {}, [None], [[]], {"name": []}, [1], {"": 1})


def broken_texts():
    """(file, text or a function of the path): what is no record, by hand."""
    layer = {"block": "stem", "mean": dict(EVEN), "var": dict(EVEN)}
    importance = {"epoch": 1, "layers": {"bn1": layer}}
    lines = [
        changed(importance, path, value)
        for path in values(importance)
        for value in (..., None, "x", [], {}, -0.5, float("nan"), 7)
        if (path[-1], value) not in (("epoch", 7), ("block", "x"))  # no faults
    ]
    lines += [importance | {"epoch": "1"}, importance | {"epoch": True}]
    lines.append(changed(importance, ("layers", "bn1", "mean"), EVEN | {"xn": 0.0}))
    other = json.dumps({"epoch": 5, "layers": {"bn2": layer}})
    yield "importance.jsonl", f"{json.dumps(importance)}\n{other}"
    yield from (("importance.jsonl", json.dumps(line)) for line in lines)
    for file in ("summary.json", "metrics.jsonl", "importance.jsonl"):
        for text in ("{", "7", "null", "[1]", '"x"', "[" * 100_000, "9" * 5000, "\0", '{"a": nan}'):
            yield file, text
    yield "metrics.jsonl", '{"epoch": 1, "val/top1": NaN}'
    yield "metrics.jsonl", '{"epoch": 1, "val/top1": [1e999]}'
    yield "metrics.jsonl", '{"epoch": 1}\n{"epoch": 2, "tor'
    for text in ("", "7", "[1]", "a: [", "{", "1: 2", "a: {null: 1}", "a: !!python/name:os.system",
                 "a: &a\n  b: *a", "a: &a [*a]", "a: &a {b: {c: *a}}", "[" * 5000, "\0",
                 "a: 2026-13-45", "a: !!int ''", "a: *b"):  # fmt: skip
        yield "config.yaml", text
    doubled = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    yield "config.yaml", "\n".join(doubled)
    for file in ("summary.json", "config.yaml", "metrics.jsonl", "importance.jsonl"):
        yield file, b"\xff\xfe\x00"
        yield file, os.mkfifo
        yield file, os.mkdir
    yield "config.yaml", lambda path: None  # missing


@pytest.mark.parametrize("file, text", list(broken_texts()))
def test_a_broken_file_leaves_its_run_out(tmp_path, caplog, file, text):
    folder = write_run(tmp_path, "imagenet", "broken")
    write_run(tmp_path, "imagenet", "whole")
    (folder / file).unlink()
    if callable(text):
        text(folder / file)
    elif isinstance(text, bytes):
        (folder / file).write_bytes(text)
    else:
        (folder / file).write_text(text)
    assert [run.path.parent.name for run in records.load_runs(tmp_path)] == ["whole"]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(folder / file) in warning and "\n" not in warning and len(warning) < 800


@pytest.mark.parametrize("task", SUMMARIES)
def test_changed_summaries_are_left_out_or_harmless(tmp_path, caplog, task):
    """Every value of a summary in turn taken away or replaced: a warning, or the tables go on."""
    import make_tables

    summary = json.loads((write_run(tmp_path, task) / "summary.json").read_text())
    folder = tmp_path / task / "data_model" / "run" / "seed0"
    needed, kept = {"seed", "run", "task", "status", "data"}, []
    for path in values(summary):
        for value in OTHERS:
            caplog.clear()
            (folder / "summary.json").write_text(json.dumps(changed(summary, path, value)))
            runs = records.load_runs(tmp_path, None)
            if runs:
                kept += runs
                assert not caplog.records
                assert value is not ... or len(path) > 1 or path[0] not in needed
            else:
                (warning,) = [record.getMessage() for record in caplog.records]
                assert str(folder / "summary.json") in warning and len(warning) < 800
    paper = records.load_paper()
    classifiers = [run for run in kept if run.summary["task"] == "imagenet"]
    detectors = [run for run in kept if run.summary["task"] == "detection"]
    parts = make_tables.markdown(classifiers, paper, "", tmp_path, detectors)
    assert len("".join(parts)) > 1000
    if classifiers:
        make_tables.console(classifiers, paper)
    make_tables.detection_console(detectors)
    assert all(run.without_bn in (True, False) for run in kept)
    groups = records.recipes(kept, lambda run: None)
    assert sorted(run.path for group in groups for run in group) == sorted(run.path for run in kept)

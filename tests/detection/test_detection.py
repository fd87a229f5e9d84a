"""train_detection.py as a user meets it: records, settings, resumption, modes, errors."""

import contextlib
import copy
import functools
import json
import math
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from coco_files import annotation, content, write
from faults import assert_same
from hydra import compose, initialize_config_dir
from PIL import Image
from workers import CONFIGS, run_in_group

import sn
import train_detection
from sn.training.detection.data import write_digits_coco

ROOT = Path(__file__).resolve().parents[2]
TINY = (  # 4 steps of (2,1) on pictures of 48 pixels
    *("device=cpu", "setting.gpus=2", "setting.images_per_gpu=1", "schedule.images=8"),
    *("schedule.warmup_images=4", "data.sizes=[32,48]", "data.test_size=48", "data.max_size=64"),
    *("data.generate={train_images: 6, val_images: 3, size: 64, seed: 0}", "log_steps=2"),
    *("model.fpn_channels=16", "model.box_features=16", "model.rois_per_image=8"),
    *("model.proposals_train=20", "model.proposals_test=10", "evaluation.pictures=2"),
)
REQUIRED = (
    *("task", "run", "status", "parts", "init", "setting", "data", "model", "box_ap", "box_ap50"),
    *("steps", "seed", "images_seen", "wall_s", "lr", "schedule", "scale", "versions", "device"),
    *("commit", "date", "skipped_steps", "precision"),
)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of digits drawn once."""
    root = tmp_path_factory.mktemp("digits") / "coco"
    write_digits_coco(root, 6, 3, size=64)
    return root


@functools.cache
def composed(*overrides):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose("detection", [*TINY, *overrides])


def tiny_config(digits, out, *overrides):
    cfg = copy.deepcopy(composed(*overrides))
    cfg.data.root, cfg.output_dir = str(digits), str(out)
    return cfg


def train(digits, out, *overrides):
    return train_detection.train(tiny_config(digits, out, *overrides))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(folder):
    """What a run leaves, without timing: everything that must not depend on interruptions."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["progress"].pop("wall_s")
    metrics = lines(folder / "metrics.jsonl")
    for line in metrics:
        line.pop("steps_per_s")
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("wall_s", "date", "commit", "device"):
        summary.pop(key)
    importance = folder / "importance.jsonl"
    return {
        "metrics": metrics,
        "importance": lines(importance) if importance.exists() else None,
        "summary": summary,
        "config": (folder / "config.yaml").read_text(),
        "predictions": json.loads((folder / "predictions.json").read_text()),
        "checkpoint": state,
    }


# --- records


def test_run_writes_every_record(digits, tmp_path, capsys):
    summary = train(digits, tmp_path, "model=mask_rcnn_r18_fpn", "evaluation.every_images=4")
    printed = capsys.readouterr().out
    for words in (
        "backbone.layer1",
        "SwitchNorm2d",
        "(2,1) on 1 x cpu",
        "lr 0.02 per 16",
        "box AP",
    ):
        assert words in printed
    files = {path.name for path in tmp_path.iterdir()}
    wanted = {"config.yaml", "metrics.jsonl", "importance.jsonl", "summary.json", "checkpoint.pt"}
    assert files >= wanted | {"tensorboard", "predictions.json", "predictions.png"}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert not set(REQUIRED) - summary.keys()
    assert summary["status"] == "finished" and summary["scale"] == "proxy"
    assert summary["parts"] == dict.fromkeys(("backbone", "fpn", "box_head", "mask_head"), "sn")
    assert summary["steps"] == 4 and summary["images_seen"] == 8
    assert summary["lr"] == pytest.approx(0.02 * 2 / 16)
    assert summary["run"] == "detection/digits_coco_mask_rcnn_r18_fpn/sn-sn-sn-sn_2x1_scratch/seed0"
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [2, 4]
    losses = (
        "loss",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    )
    for line in metrics:
        assert all(math.isfinite(line[f"train/{name}"]) for name in losses)
        parts = sum(line[f"train/{name}"] for name in losses[1:])
        assert line["train/loss"] == pytest.approx(parts, rel=1e-5)
        assert "val/box_ap" in line and "val/mask_ap" in line
    importance = lines(tmp_path / "importance.jsonl")
    assert [line["step"] for line in importance] == [0, 1, 2, 3, 4] or len(importance) >= 3
    blocks = {layer["block"] for layer in importance[-1]["layers"].values()}
    assert blocks >= {"backbone.stem", "backbone.layer4", "fpn", "box_head", "mask_head"}
    assert str(tmp_path) not in (tmp_path / "config.yaml").read_text()
    assert str(digits) not in (tmp_path / "config.yaml").read_text()
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert recorded["parts"]["fpn"]["name"] == "sn" and "mode" not in recorded


def test_second_call_is_a_no_op(digits, tmp_path, capsys):
    first = train(digits, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(digits, tmp_path) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert "ended already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="parts.fpn.name: sn there, gn asked for"):
        train(digits, tmp_path, "norm@parts.fpn=gn")


@pytest.mark.parametrize(
    "options",
    [
        [
            "parts=bn",
            "model=faster_rcnn_r50_c4",
            "model.backbone=resnet18",
            "model.anchor_sizes=[16]",
        ],
        ["parts=gn", "norm@parts.fpn=none", "optimizer.clip=1.0", "precision=fp64"],
        ["parts=none", "model.box_head=mlp", "data.aspect_grouping=false"],
        ["norm@parts.backbone=sn_in_ln", "channels_last=true", "evaluation.batch_size=2"],
        ["precision=bf16", "optimizer.gate_lr_factor=0.1"],
        ["parts=sn", "data.workers=1", "data.categories=['3','4']"],
    ],
    ids=" ".join,
)
def test_switches_run(options, tmp_path):
    """On digits enough for every class to occur."""
    root = tmp_path / "coco"
    write_digits_coco(root, 12, 4, size=64)
    generate = "data.generate={train_images: 12, val_images: 4, size: 64, seed: 0}"
    summary = train(root, tmp_path / "run", generate, "schedule.images=4", *options)
    assert summary["status"] == "finished" and summary["box_ap"] is not None
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    wanted = torch.float64 if "precision=fp64" in options else torch.float32
    assert {v.dtype for k, v in state["model"].items() if "num_batches" not in k} == {wanted}


# --- the setting


FP64 = ("precision=fp64", "setting.gpus=4", "setting.images_per_gpu=2", "schedule.images=24")
RUNS = {"1 process": 1, "2 processes": 2}


@pytest.mark.parametrize(
    "parts, model", [("bn", "faster_rcnn_r18_fpn"), ("sn", "mask_rcnn_r18_fpn")]
)
def test_accumulated_steps_equal_processes(parts, model, digits, tmp_path):
    """(4,2) in four forward passes of one process equals two processes, in float64."""
    results = {}
    options = (*TINY, *FP64, f"parts={parts}", f"model={model}", f"data.root={digits}")
    for name, world_size in RUNS.items():
        out = tmp_path / str(world_size)
        run_in_group(world_size, _train, (*options, f"output_dir={out}"))
        results[name] = record(out)
    one, two = results.values()
    assert two["summary"]["setting"]["world_size"] == 2
    assert one["metrics"][-1]["step"] == 3
    for ours, theirs in zip(two["metrics"], one["metrics"]):
        for key, value in theirs.items():
            if isinstance(value, float):
                assert ours[key] == pytest.approx(value, abs=1e-9), key
    assert one["checkpoint"]["model"].keys() == two["checkpoint"]["model"].keys()
    for key, value in one["checkpoint"]["model"].items():
        torch.testing.assert_close(two["checkpoint"]["model"][key], value, rtol=0, atol=1e-9)
    for a, b in zip(two["predictions"], one["predictions"]):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-9)


def _train(rank, overrides):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose("detection", list(overrides))
    try:
        train_detection.train(cfg)
    finally:
        train_detection.distributed.stop()


def test_one_step_by_hand(digits, tmp_path, monkeypatch):
    """The mean over GPUs of each GPU's gradient, SGD with the groups' rules, in float64."""
    captured = {}
    build = train_detection.build

    def captured_build(*args):
        run = build(*args)
        captured["model"] = copy.deepcopy(run.model)
        captured["images"] = run.loader.dataset
        captured["sampler"] = list(copy.deepcopy(run.sampler))
        return run

    monkeypatch.setattr(train_detection, "build", captured_build)
    options = ["precision=fp64", "schedule.images=2", "schedule.warmup_images=0", "seed=3"]
    train(digits, tmp_path, *options, "parts=gn")
    model = captured["model"].train()
    (keys,) = captured["sampler"]
    for gpu, key in enumerate(keys):
        image, target = captured["images"][key]
        target = {k: v.double() if v.is_floating_point() else v for k, v in target.items()}
        torch.manual_seed(train_detection.mix_seed(3, 1, 0, gpu))
        (sum(model([image.double()], [target]).values()) / 2).backward()
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    lr = 0.02 * 2 / 16
    norms = {id(layer) for layer in model.modules() if "Norm" in type(layer).__name__}
    owner = {id(p): layer for layer in model.modules() for p in layer.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        decay = 1e-4 if name.endswith("weight") and id(owner[id(parameter)]) not in norms else 0
        factor = 2 if name.endswith("bias") else 1
        expected = parameter - lr * factor * (parameter.grad + decay * parameter)
        torch.testing.assert_close(trained[name], expected.detach(), rtol=0, atol=1e-12, msg=name)


def test_lr_by_images(digits, tmp_path, monkeypatch):
    """Warm-up and decays are counted in images, so that they hold for any setting."""
    seen = []
    step = train_detection.train_step

    def watched(run, *args):
        seen.append([group["lr"] for group in run.optimizer.param_groups])
        return step(run, *args)

    monkeypatch.setattr(train_detection, "train_step", watched)
    options = ["schedule.images=12", "schedule.milestones=[0.5,0.8]", "schedule.warmup_images=4"]
    train(digits, tmp_path, *options, "parts=gn")
    base = 0.02 * 2 / 16
    factors = [1 / 3, 2 / 3, 1, 0.1, 0.1, 0.01]
    assert [lrs[0] for lrs in seen] == pytest.approx([base * factor for factor in factors])
    assert [max(lrs) for lrs in seen] == pytest.approx([2 * base * factor for factor in factors])


# --- resumption


class Crash(Exception):
    """What a crash raises: nothing in the code catches it."""


@contextlib.contextmanager
def crash_at(event):
    """Raise Crash at the `event`-th moment just before or after a call that matters."""
    passed = []

    def moment(name):
        passed.append(name)
        if len(passed) - 1 == event:
            raise Crash(name)

    def wrap(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            moment(f"before {name}")
            result = function(*args, **kwargs)
            moment(f"after {name}")
            return result

        patch.setattr(owner, name, wrapped)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_step", "evaluate", "save_checkpoint", "write_predictions"):
            wrap(train_detection, name)
        for name in ("open", "metrics", "importance", "finish"):
            wrap(train_detection.Recorder, name)
        yield passed


RESUMED = ("checkpoint_steps=1", "evaluation.every_images=4", "evaluation.pictures=0")


def crash_and_compare(digits, tmp_path, choose, *options):
    """Crash at the moments that `choose` picks, each time resume and compare with no crash."""
    with crash_at(None) as moments:
        train(digits, tmp_path / "whole", *RESUMED, *options)
    expected = record(tmp_path / "whole")
    moments = list(moments)
    assert {"before evaluate", "after metrics", "before finish"} <= set(moments)
    failures = []
    for event in choose(moments):
        out = tmp_path / str(event)
        with crash_at(event), pytest.raises(Crash):
            train(digits, out, *RESUMED, *options)
        train(digits, out, *RESUMED, *options)
        try:
            assert_same(record(out), expected, "not equal")
        except AssertionError as error:
            failures.append(f"{moments[event]} ({event}): {str(error).splitlines()[0]}")
    assert not failures, "\n".join(failures)


def test_resumed_run_equals_unbroken_one(digits, tmp_path):
    """Killed in mid-run, during an evaluation and at the end, it ends with the same bits."""

    def some(moments):
        for name, turn in (
            ("after train_step", 2),
            ("before evaluate", 0),
            ("after metrics", 0),
            ("after evaluate", 1),
            ("before finish", 0),
        ):
            yield [place for place, moment in enumerate(moments) if moment == name][turn]

    crash_and_compare(digits, tmp_path, some)


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["sn", "bn"])
def test_resumed_run_equals_unbroken_one_wherever_it_crashes(parts, digits, tmp_path):
    crash_and_compare(digits, tmp_path, lambda m: range(len(m)), f"parts={parts}")


def test_a_checkpoint_between_lines_of_metrics(digits, tmp_path):
    """The losses summed since the last line survive."""
    options = ("checkpoint_steps=3", "log_steps=4", "evaluation.pictures=0")
    train(digits, tmp_path / "whole", *options)
    with crash_at(None) as moments:
        train(digits, tmp_path / "count", *options)
    place = [i for i, moment in enumerate(moments) if moment == "before train_step"][3]
    with crash_at(place), pytest.raises(Crash):
        train(digits, tmp_path / "broken", *options)
    train(digits, tmp_path / "broken", *options)
    assert_same(record(tmp_path / "broken"), record(tmp_path / "whole"), "between lines")


def test_two_processes_resume(digits, tmp_path):
    options = (*TINY, f"data.root={digits}", "checkpoint_steps=1", "evaluation.pictures=0")
    run_in_group(2, _train, (*options, f"output_dir={tmp_path / 'whole'}"))
    out = f"output_dir={tmp_path / 'broken'}"
    with pytest.raises(RuntimeError, match="exit codes"):
        run_in_group(2, _train_and_fail, (*options, out), timeout=120)
    assert not (tmp_path / "broken" / "summary.json").exists()
    run_in_group(2, _train, (*options, out))
    assert_same(record(tmp_path / "broken"), record(tmp_path / "whole"), "two processes")


def _train_and_fail(rank, overrides):
    """`_train`, but both processes die before their third step."""
    step, calls = train_detection.train_step, 0

    def dying_step(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            os._exit(7)
        return step(*args)

    train_detection.train_step = dying_step
    _train(rank, overrides)


def test_resume_on_other_data_is_refused(digits, tmp_path):
    with crash_at(12), pytest.raises(Crash):
        train(digits, tmp_path / "run", "checkpoint_steps=1")
    cfg = tiny_config(digits, tmp_path / "run", "checkpoint_steps=1")
    other = tmp_path / "other"
    write_digits_coco(other, 6, 3, size=64)
    file = other / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text() + " ")
    cfg.data.root = str(other)
    with pytest.raises(ValueError, match="trained on other data"):
        train_detection.train(cfg)


# --- divergence


def test_diverged_run_is_a_result(digits, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train(digits, tmp_path, "schedule.lr_per_16=1e30", "schedule.warmup_images=0")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged" and summary["box_ap"] is None
    assert not set(REQUIRED) - summary.keys() - {"box_ap50"}
    with pytest.raises(FloatingPointError, match="ended already: it diverged"):  # not tried again
        train(digits, tmp_path, "schedule.lr_per_16=1e30", "schedule.warmup_images=0")


def test_a_bad_step_is_skipped_if_allowed(digits, tmp_path, monkeypatch):
    step, calls = train_detection.train_step, []

    def poisoned(run, images, *args):
        calls.append(1)
        factor = math.nan if len(calls) == 2 else 1
        return step(run, [image * factor for image in images], *args)

    monkeypatch.setattr(train_detection, "train_step", poisoned)
    summary = train(digits, tmp_path, "max_skipped_steps=1", "parts=bn")
    assert summary["status"] == "finished" and summary["skipped_steps"] == 1
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


# --- what may not be trained


@pytest.mark.parametrize(
    "options, words",
    [
        (["model.freeze_at=2"], "random layers frozen"),
        (["norm@parts.backbone=frozen_bn"], "parts.backbone=frozen_bn"),
        (["setting.emulation=grouped"], "forward pass of its own"),
        (["mode=tran"], "mode=tran; expected train, evaluate or predict"),
        (["model.architecture=yolo"], "model.architecture='yolo'"),
        (["data.sizes=[]"], "data.sizes="),
        (["schedule.milestones=[2]"], "schedule.milestones="),
        (["optimizer.clip=0"], "optimizer.clip=0"),
        (["optimizer.bias_lr_factor=x"], "optimizer.bias_lr_factor=x"),
        (["evaluation.threshold=7"], "evaluation.threshold=7"),
        (["model.box_head=mlp"], "mlp has no norm"),
        (["data.categories=[cat]"], r"\['cat'\] not in"),
        (["run_name=a/b"], "run_name=a/b"),
        (["init=checkpoint", "init.path=/no/such.pt"], "/no/such.pt"),
        (["setting.gpus=0"], "setting.gpus=0"),
        (["precision=fp8"], "precision=fp8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_value_is_named(options, words, digits, tmp_path):
    with pytest.raises((ValueError, OSError), match=words):
        train(digits, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_pretrained_and_frozen(digits, tmp_path):
    """A classifier's checkpoint goes in, the frozen stages come out as they went in."""
    from sn.training.classification.models import build_model

    torch.manual_seed(1)
    classifier = build_model("resnet18", "torchvision", 10, sn.make_norm("bn"))
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pt")
    options = [
        *("init=checkpoint", f"init.path={tmp_path / 'c.pt'}", "model.freeze_at=2"),
        *("norm@parts.backbone=frozen_bn", "schedule.warmup_images=0"),
    ]
    summary = train(digits, tmp_path / "run", *options)
    assert summary["init"]["name"] == "checkpoint" and len(summary["init"]["sha256"]) == 64
    assert str(tmp_path) not in (tmp_path / "run" / "config.yaml").read_text()
    trained = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    start = classifier.state_dict()
    same = {
        key: torch.equal(trained[f"backbone.body.{key}"], value)
        for key, value in start.items()
        if not key.startswith("fc") and "num_batches" not in key
    }
    assert all(same[key] for key in same if key.startswith(("conv1", "bn1", "layer1")))
    assert not same["layer2.0.conv1.weight"] and same["layer2.0.bn1.weight"]  # frozen norm
    with pytest.raises(ValueError, match="do not fit"):
        train(digits, tmp_path / "gn", *options[:3], "parts=gn")


# --- evaluate and predict


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(digits, out, "model=mask_rcnn_r18_fpn", "evaluation.threshold=0.05")
    return out


def test_evaluate_mode(trained, digits, capsys):
    cfg = tiny_config(digits, trained, "model=mask_rcnn_r18_fpn", "mode=evaluate")
    (trained / "predictions.png").unlink()
    metrics = train_detection.evaluate_checkpoint(cfg)
    assert (trained / "predictions.png").stat().st_size > 1000
    summary = json.loads((trained / "summary.json").read_text())
    assert {key: summary[key] for key in metrics} == metrics
    assert json.loads((trained / "evaluation.json").read_text())["box_ap"] == summary["box_ap"]
    assert "mask AP" in capsys.readouterr().out


def test_predict_mode(trained, digits, tmp_path):
    """Needs no annotations: the checkpoint knows the classes. Any image, or a folder of them."""
    out = tmp_path / "out"
    cfg = tiny_config("/nowhere", trained, "model=mask_rcnn_r18_fpn", "mode=predict")
    cfg.predict.images, cfg.predict.out = str(digits / "val2017"), str(out)
    results = train_detection.predict(cfg)
    assert json.loads((out / "predictions.json").read_text()) == results
    assert {path.name for path in out.glob("*.png")} == {f"{i:06d}.png.png" for i in (1, 2, 3)}
    for result in results:
        assert result["category"] in "0123456789" and result["file_name"].endswith(".png")
        assert "segmentation" in result
    cfg.predict.images = str(digits / "val2017" / "000001.png")
    assert {r["file_name"] for r in train_detection.predict(cfg)} <= {"000001.png"}


@pytest.mark.parametrize(
    "images, checkpoint, words",
    [
        (None, None, "predict.images"),
        ("/no/such.png", None, "/no/such.png"),
        ("empty", None, "no image"),
        ("val2017", "/no/such.pt", "/no/such.pt"),
        ("val2017", "text", "text"),
        ("val2017", "other", "no checkpoint of train_detection.py: it has no 'classes'"),
    ],
)
def test_predict_says_what_is_wrong(images, checkpoint, words, trained, digits, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no checkpoint")
    torch.save({"model": {}}, tmp_path / "other")
    places = {"empty": tmp_path, "val2017": digits, "text": tmp_path, "other": tmp_path}
    cfg = tiny_config("/nowhere", trained, "model=mask_rcnn_r18_fpn", "mode=predict")
    cfg.predict.images = str(places[images] / images) if images in places else images
    cfg.checkpoint.path = (
        str(places[checkpoint] / checkpoint) if checkpoint in places else checkpoint
    )
    cfg.predict.out = str(tmp_path / "out")
    with pytest.raises((ValueError, OSError), match=words):
        train_detection.predict(cfg)


def test_predict_leaves_out_what_it_cannot_read(trained, digits, tmp_path, capsys):
    """All others are done, results written; then it is an error."""
    folder, out = tmp_path / "my photos", tmp_path / "out"
    folder.mkdir()
    (folder / "a.png").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    (folder / "c.png").write_bytes((digits / "val2017" / "000001.png").read_bytes())
    Image.new("RGB", (300, 1)).save(folder / "thin.png")
    cfg = tiny_config("/nowhere", trained, "model=mask_rcnn_r18_fpn", "mode=predict")
    cfg.predict.images, cfg.predict.out = str(folder), str(out)
    with pytest.raises(ValueError, match="2 of 3 images were left out: cannot read .*a.png"):
        train_detection.predict(cfg)
    assert sorted(path.name for path in out.iterdir()) == ["c.png.png", "predictions.json"]
    assert "thin.png has 300 x 1 pixels: nothing is left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["parts=bn", "norm@parts.fpn=gn"], "fpn is .*'bn'.* there, .*'gn'.* asked for"),
        (["model.anchor_sizes=[8,16,32,64,99]"], "anchor_sizes is .* there"),
        (["parts=bn", "parts.backbone.momentum=0.5"], None),
    ],
)
def test_checkpoint_of_weights_that_mean_something_else(options, words, digits, tmp_path):
    """Group norm of other groups, or as layer norm, has parameters of the same shapes."""
    out, base = tmp_path / "run", ["parts=bn"] if "parts=bn" in options else []
    train(digits, out, *base)
    cfg = tiny_config(digits, out, "mode=evaluate", *options)
    refused = pytest.raises(ValueError, match=words) if words else contextlib.nullcontext()
    with refused:
        train_detection.evaluate_checkpoint(cfg)


def test_resume_with_other_initial_weights_is_refused(digits, tmp_path):
    from sn.training.classification.models import build_model

    for name in ("a.pt", "b.pt"):
        torch.save(build_model("resnet18", "torchvision", 10, sn.make_norm("sn")).state_dict(),
                   tmp_path / name)  # fmt: skip
    options = ["init=checkpoint", "checkpoint_steps=1"]
    with crash_at(12), pytest.raises(Crash):
        train(digits, tmp_path / "run", *options, f"init.path={tmp_path / 'a.pt'}")
    with pytest.raises(ValueError, match="started from other weights than those of init.path=.*b"):
        train(digits, tmp_path / "run", *options, f"init.path={tmp_path / 'b.pt'}")


def test_checkpoint_of_other_parts(trained, digits):
    cfg = tiny_config(digits, trained, "model=mask_rcnn_r18_fpn", "mode=evaluate", "parts=gn")
    with pytest.raises(ValueError, match="not of this model and these parts"):
        train_detection.evaluate_checkpoint(cfg)


# --- COCO files of one's own


def test_other_coco_files_from_the_command_line(tmp_path):
    """`data=coco data.root=...`: ids with gaps, crowds, an image without objects."""
    root = write(tmp_path / "mine")
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose(
            "detection",
            [
                *("data=coco", "model=mask_rcnn_r18_fpn", f"data.root={root}", "data.name=mine"),
                *(option for option in TINY if not option.startswith("data.generate")),
                *("data.workers=0", f"output_dir={tmp_path / 'run'}"),
            ],
        )
    summary = train_detection.train(cfg)
    assert summary["data"]["train_images"] == 2 and summary["data"]["val_images"] == 4
    assert summary["data"]["classes"] == 3
    results = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert {r["category_id"] for r in results} <= {3, 17, 44}


def command_line(tmp_path, *arguments):
    """Exit code and stderr of the script in a process of its own."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_imagenet"])
    process = context.Process(target=_command, args=(arguments, tmp_path))
    process.start()
    process.join(120)
    return process.exitcode, (tmp_path / "err").read_text()


def _command(arguments, folder):
    os.dup2(os.open(folder / "err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.chdir(folder)
    torch.set_num_threads(1)
    script = str(ROOT / "train_detection.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def test_errors_are_one_line(tmp_path):
    """From a data worker too: the annotation file, the picture, the id."""
    broken = content()
    broken["annotations"].append(annotation(77, 10, 4, (1, 1, 5, 5)))
    cases = [("data.root=none", ["no annotation file", "<root>/annotations"])]
    cases.append(
        (f"data.root={write(tmp_path / 'a', broken)}", ["annotation 77 has category_id 4"])
    )
    root = write(tmp_path / "b")
    (root / "train2017" / "a.png").write_bytes(b"no picture")
    (root / "train2017" / "b.png").write_bytes(b"no picture")
    cases.append((f"data.root={root}", [".png", "image "]))
    options = [option for option in TINY if not option.startswith("data.generate")]
    options = [
        "data=coco",
        "model=faster_rcnn_r18_fpn",
        "data.workers=1",
        "output_dir=run",
        *options,
    ]
    for argument, words in cases:
        code, err = command_line(tmp_path, *options, argument)
        assert code == 2 and "Traceback" not in err, err
        (line,) = [line for line in err.splitlines() if line.startswith("train_detection.py: ")]
        assert all(word in line for word in words), line


# --- learning


@pytest.mark.slow
def test_overfits_eight_images(tmp_path):
    """Box AP above 80 on the eight images it is trained on."""
    root = tmp_path / "coco"
    write_digits_coco(root, 8, 8, size=96)
    (root / "annotations" / "instances_val2017.json").write_bytes(
        (root / "annotations" / "instances_train2017.json").read_bytes()
    )
    for path in (root / "train2017").iterdir():
        (root / "val2017" / path.name).write_bytes(path.read_bytes())
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = compose(
            "detection",
            [
                *("device=cpu", "parts=gn", f"data.root={root}", f"output_dir={tmp_path / 'run'}"),
                *("data.generate=null", "setting.gpus=1", "setting.images_per_gpu=4"),
                *("schedule.images=1600", "schedule.lr_per_16=0.08", "schedule.warmup_images=160"),
            ],
        )
    assert train_detection.train(cfg)["box_ap"] > 80

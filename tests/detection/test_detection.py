"""train_detection.py as a user meets it: records, settings, resumption, modes, errors."""

import contextlib
import copy
import functools
import io
import json
import math
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from coco_files import write
from faults import Crash, assert_same, crash_at
from PIL import Image
from workers import composed, config, run_in_group

import sn
import train_detection
from sn.training.classification.models import build_model
from sn.training.classification.pretrained import network_facts
from sn.training.detection import detectors, predict
from sn.training.detection.detectors import build_detector
from sn.training.detection.digits import write_digits_coco
from sn.training.run import session
from sn.training.run.config import Setting, typed
from sn.training.run.precision import Precision
from sn.training.run.schedule import mix_seed

ROOT = Path(__file__).resolve().parents[2]
TINY = (  # 4 steps of (2,1) on pictures of 48 pixels
    *("model=faster_rcnn_r10_fpn", "device=cpu", "setting.gpus=2", "setting.images_per_gpu=1"),
    "schedule.images=8",
    *("schedule.warmup_images=4", "data.sizes=[32,48]", "data.test_size=48", "data.max_size=64"),
    *("data.generate={train_images: 6, val_images: 3, size: 64, seed: 0}", "log_steps=2"),
    *("model.fpn_channels=16", "model.box_features=16", "model.rois_per_image=8"),
    *("model.proposals_train=20", "model.proposals_test=10", "evaluation.pictures=2"),
)
MASKS = ("model=mask_rcnn_r10_fpn", "evaluation.threshold=0.05")
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


@pytest.fixture(scope="module")
def every_class(tmp_path_factory):
    """A folder of digits enough for every class to occur."""
    root = tmp_path_factory.mktemp("digits") / "coco"
    write_digits_coco(root, 12, 4, size=64)
    return root


@functools.cache
def tiny(*overrides):
    return composed("detection", *TINY, *overrides)


def tiny_config(digits, out, *overrides):
    cfg = copy.deepcopy(tiny(*overrides))
    cfg.data.root, cfg.output_dir = str(digits), str(out)
    return typed(cfg)


def train(digits, out, *overrides):
    return train_detection.train(tiny_config(digits, out, *overrides))


def coco_config(root, out, *overrides):
    """COCO files of one's own."""
    options = [option for option in TINY if not option.startswith("data.generate")]
    options += ["data=coco", "data.workers=0", f"data.root={root}", f"output_dir={out}"]
    return config("model=faster_rcnn_r10_fpn", *options, *overrides, root="detection")


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """(folder, summary, what was printed) of a run with masks that is evaluated twice."""
    out, printed = tmp_path_factory.mktemp("trained"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        summary = train(digits, out, *MASKS, "evaluation.every_images=4")
    return out, summary, printed.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(folder):
    """What a run leaves, without timing: everything that must not depend on interruptions."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["progress"].pop("wall_s")
    steps = lines(folder / "steps.jsonl")
    for line in steps:
        assert line.pop("steps_per_s") > 0 and line.pop("images_per_s") > 0
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("wall_s", "date", "commit", "device"):
        summary.pop(key)
    importance = folder / "importance.jsonl"
    best = torch.load(folder / "checkpoint_best.pt", weights_only=True)
    best["progress"].pop("wall_s")
    return {
        "metrics": lines(folder / "metrics.jsonl"),
        "steps": steps,
        "importance": lines(importance) if importance.exists() else None,
        "summary": summary,
        "config": (folder / "config.yaml").read_text(),
        "predictions": json.loads((folder / "predictions.json").read_text()),
        "checkpoint": state,
        "best": best,
    }


# --- records


def test_run_writes_every_record(digits, trained):
    tmp_path, summary, printed = trained
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
    wanted |= {"checkpoint_best.pt"}
    assert files >= wanted | {"tensorboard", "predictions.json", "predictions.png"}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert not set(REQUIRED) - summary.keys()
    assert summary["status"] == "finished" and summary["scale"] == "proxy"
    assert summary["bad_images"] == 0
    assert summary["parts"] == dict.fromkeys(("backbone", "fpn", "box_head", "mask_head"), "sn")
    assert summary["steps"] == 4 and summary["images_seen"] == 8
    assert summary["lr"] == pytest.approx(0.02 * 2 / 16)
    assert summary["run"] == "detection/digits_coco_mask_rcnn_r10_fpn/sn-sn-sn-sn_2x1_scratch/seed0"
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
    assert summary["best_box_ap"] == max(line["val/box_ap"] for line in metrics)


def test_second_call_is_a_no_op(digits, trained, capsys):
    out, summary, _ = trained
    options = [*MASKS, "evaluation.every_images=4"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert train(digits, out, *options) == summary
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert "ended already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="parts.fpn.name: sn there, gn asked for"):
        train(digits, out, *options, "norm@parts.fpn=gn")


def test_the_best_checkpoint_is_kept(digits, tmp_path, monkeypatch):
    """The one whose weights were evaluated best, whatever came after it."""
    scores, evaluated = iter([5.0, 3.0]), []
    evaluate = train_detection.evaluate_detections

    def scored(images, results, masks):
        metrics, results = evaluate(images, results, masks)
        return metrics | {"box_ap": next(scores)}, results

    def seen(model, *args):
        evaluated.append(copy.deepcopy(model.state_dict()))
        return detect(model, *args)

    detect = train_detection.detect
    monkeypatch.setattr(train_detection, "evaluate_detections", scored)
    monkeypatch.setattr(train_detection, "detect", seen)
    options = ("evaluation.every_images=4", "evaluation.pictures=0", "parts=bn")
    summary = train(digits, tmp_path, *options)
    assert summary["box_ap"] == 3.0 and summary["best_box_ap"] == 5.0
    for name, weights in (("checkpoint_best", evaluated[0]), ("checkpoint", evaluated[1])):
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert_same(state["model"], dict(weights), name)


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
def test_switches_run(options, every_class, tmp_path):
    generate = "data.generate={train_images: 12, val_images: 4, size: 64, seed: 0}"
    summary = train(every_class, tmp_path / "run", generate, "schedule.images=4", *options)
    assert summary["status"] == "finished" and summary["box_ap"] is not None
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    wanted = torch.float64 if "precision=fp64" in options else torch.float32
    assert {v.dtype for k, v in state["model"].items() if "num_batches" not in k} == {wanted}


# --- the setting


FP64 = ("precision=fp64", "setting.gpus=4", "setting.images_per_gpu=2", "schedule.images=16")
OPTIONS = {  # norm -> options of a run of two steps
    "bn": (*FP64, "parts=bn"),
    "sn": (*FP64, "parts=sn", "model=mask_rcnn_r10_fpn", "checkpoint_steps=1"),
}


@pytest.fixture(scope="module")
def two_processes(digits, tmp_path_factory):
    """The folder of a norm's run in two processes."""

    @functools.cache
    def run(norm):
        out = tmp_path_factory.mktemp("two")
        run_in_group(2, _train, (*OPTIONS[norm], f"data.root={digits}", f"output_dir={out}"))
        return out

    return run


@pytest.mark.parametrize("norm", OPTIONS)
def test_accumulated_steps_equal_processes(norm, two_processes, digits, tmp_path):
    """(4,2) in four forward passes of one process equals two processes, in float64."""
    train(digits, tmp_path, *OPTIONS[norm])
    one, two = record(tmp_path), record(two_processes(norm))
    assert two["summary"]["setting"]["world_size"] == 2
    assert one["metrics"][-1]["step"] == 2
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
    try:
        train_detection.train(config(*TINY, *overrides, root="detection"))
    finally:
        train_detection.distributed.stop()


def test_one_step_by_hand(digits, tmp_path, monkeypatch):
    """The mean over GPUs of each GPU's gradient, SGD with the groups' rules, in float64."""
    captured = {}
    build = train_detection.build

    def captured_build(*args):
        task = build(*args)
        captured["model"] = copy.deepcopy(task.model)
        captured["images"] = task.loader.dataset
        captured["sampler"] = list(copy.deepcopy(task.sampler))
        return task

    monkeypatch.setattr(train_detection, "build", captured_build)
    options = ["precision=fp64", "schedule.images=2", "schedule.warmup_images=0", "seed=3"]
    train(digits, tmp_path, *options, "parts=gn")
    model = captured["model"].train()
    (keys,) = captured["sampler"]
    for gpu, key in enumerate(keys):
        image, target = captured["images"][key]
        target = {k: v.double() if v.is_floating_point() else v for k, v in target.items()}
        torch.manual_seed(mix_seed(3, 1, 0, gpu))
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

    def watched(task, *args):
        seen.append([group["lr"] for group in task.optimizer.param_groups])
        return step(task, *args)

    monkeypatch.setattr(train_detection, "train_step", watched)
    options = ["schedule.images=12", "schedule.milestones=[0.5,0.8]", "schedule.warmup_images=4"]
    train(digits, tmp_path, *options, "parts=gn")
    base = 0.02 * 2 / 16
    factors = [1 / 3, 2 / 3, 1, 0.1, 0.1, 0.01]
    assert [lrs[0] for lrs in seen] == pytest.approx([base * factor for factor in factors])
    assert [max(lrs) for lrs in seen] == pytest.approx([2 * base * factor for factor in factors])


# --- resumption


CALLS = (
    (train_detection, ("train_step", "evaluate", "write_predictions")),
    (session, ("save_checkpoint", "keep_best")),
)
crash_at = functools.partial(crash_at, calls=CALLS)


# lines of metrics after steps 2 and 4, evaluations with them; a checkpoint after every step
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
    """Killed in an evaluation it ends with the same bits; in training: tests/run/test_faults.py."""
    crash_and_compare(digits, tmp_path, lambda moments: [moments.index("before write_predictions")])


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["sn", "bn"])
def test_resumed_run_equals_unbroken_one_wherever_it_crashes(parts, digits, tmp_path):
    crash_and_compare(digits, tmp_path, lambda m: range(len(m)), f"parts={parts}")


@pytest.mark.slow  # its own part; the Session's is in test_entrypoints
def test_two_processes_resume(two_processes, digits, tmp_path):
    """Both die before their second step; the run still equals an unbroken one bit by bit."""
    options = (*OPTIONS["sn"], f"data.root={digits}", f"output_dir={tmp_path}")
    with pytest.raises(RuntimeError, match="exit codes"):
        run_in_group(2, _train_and_fail, options, timeout=120)
    assert not (tmp_path / "summary.json").exists()
    run_in_group(2, _train, options)
    assert_same(record(tmp_path), record(two_processes("sn")), "two processes")


def _train_and_fail(rank, overrides):
    """`_train`, but both processes die before their second step."""
    step, calls = train_detection.train_step, 0

    def dying_step(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            os._exit(7)
        return step(*args)

    train_detection.train_step = dying_step
    _train(rank, overrides)


def test_a_run_from_before_its_weights_were_refused_goes_on(digits, tmp_path, monkeypatch):
    """Its own weights are loaded over those of another eps; only a new run is refused."""
    model = build_model("resnet10", "thin", 10, sn.make_norm("bn", eps=0.01), width=16)
    content = {"model": model.state_dict(), "network": network_facts(model, 10)}
    torch.save(content, tmp_path / "c.pt")
    options = ["parts=bn", "init=checkpoint", f"init.path={tmp_path}/c.pt", *RESUMED]
    with pytest.raises(ValueError, match="eps=0.01 in bn1"):
        train(digits, tmp_path / "new", *options)
    event = ("after save_checkpoint", 1)
    with monkeypatch.context() as patch, crash_at(event), pytest.raises(Crash):
        patch.setattr(detectors, "differences", lambda *_: [])
        train(digits, tmp_path / "old", *options)
    assert (tmp_path / "old" / "checkpoint.pt").exists()
    assert train(digits, tmp_path / "old", *options)["status"] == "finished"


def interrupted(folder, out):
    """A run's folder as it was before its end."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("summary.json", "tensorboard"))
    return out


def test_resume_on_other_data_is_refused(trained, tmp_path):
    out, other = interrupted(trained[0], tmp_path / "run"), tmp_path / "other"
    write_digits_coco(other, 6, 3, size=64)
    file = other / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match="trained with other data: .*sha256"):
        train(other, out, *MASKS, "evaluation.every_images=4")


# --- divergence


def test_diverged_run_is_a_result(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Setting, "lr", lambda *_: 1e30)  # which no config may have
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train(digits, tmp_path, "schedule.warmup_images=0")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged" and summary["box_ap"] is None
    assert not set(REQUIRED) - summary.keys() - {"box_ap50"}
    with pytest.raises(FloatingPointError, match="ended already: it diverged"):  # not tried again
        train(digits, tmp_path, "schedule.warmup_images=0")


def test_a_bad_step_is_skipped_if_allowed(digits, tmp_path, monkeypatch):
    step, calls = train_detection.train_step, []

    def poisoned(task, run, images, targets):
        calls.append(1)
        factor = math.nan if len(calls) == 2 else 1
        return step(task, run, [image * factor for image in images], targets)

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
        (["mode=tran"], "mode=tran; expected one of train, evaluate, predict"),
        (["model.architecture=yolo"], "model.architecture=yolo; expected one of faster_rcnn_c4"),
        (["init.name=imagenet"], "init.name=imagenet; expected one of scratch, checkpoint"),
        (["init=checkpoint"], "init.path is not set"),
        (["data.root=null"], "data.root is not set"),
        (["parts.backbone.momentum=2"], "parts.backbone.momentum=2; expected a number, 0 to 1"),
        (["norm@parts.fpn=gn", "parts.fpn.num_groups=x"], "num_groups"),
        (["norm@parts.fpn=gn", "+parts.fpn.groups=2"], "groups"),
        (["+data.size=3"], "unknown key data.size; did you mean sizes. data has name, root"),
        (["model.fpn_channels=2147483648"], "model.fpn_channels=2147483648; expected .* 65536"),
        (["data.generate.size=8"], "data.generate.size=8; expected a whole number, 48"),
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
    place = (f"data.root={digits}", f"output_dir={tmp_path / 'out'}")
    with pytest.raises((ValueError, OSError), match=words):
        train_detection.train(config(*TINY, *place, *options, root="detection"))
    assert not (tmp_path / "out").exists()


def test_pretrained_and_frozen(digits, tmp_path):
    """A classifier's checkpoint goes in, the frozen stages come out as they went in."""
    torch.manual_seed(1)
    classifier = build_model("resnet18", "torchvision", 10, sn.make_norm("bn"))
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pt")
    options = [
        *("init=checkpoint", f"init.path={tmp_path / 'c.pt'}", "model.freeze_at=2"),
        *("norm@parts.backbone=frozen_bn", "schedule.warmup_images=0"),
        "model=faster_rcnn_r18_fpn",
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
        train(digits, tmp_path / "gn", *options[:3], options[-1], "parts=gn")

    start["conv1.weight"] += 1
    torch.save({"model": start}, tmp_path / "other.pt")
    out = interrupted(tmp_path / "run", tmp_path / "again")
    with pytest.raises(ValueError, match="trained with other init: .*sha256.* there, .* now"):
        train(digits, out, *options, f"init.path={tmp_path / 'other.pt'}")


# --- evaluate and predict


def test_evaluate_mode(trained, digits, tmp_path, capsys):
    folder, summary, _ = trained
    place = [f"checkpoint.path={folder / 'checkpoint.pt'}", "mode=evaluate"]
    metrics = predict.evaluate_checkpoint(tiny_config(digits, tmp_path / "e", *MASKS, *place))
    assert (tmp_path / "e" / "predictions.png").stat().st_size > 1000
    assert {key: summary[key] for key in metrics} == metrics
    evaluation = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert evaluation["box_ap"] == summary["box_ap"]
    found = [json.loads((f / "predictions.json").read_text()) for f in (folder, tmp_path / "e")]
    assert found[0] == found[1]
    assert "mask AP" in capsys.readouterr().out


def predicted(trained, images, out, *overrides):
    options = [*MASKS, "mode=predict", f"predict.out={out}", *overrides]
    options += [] if images is None else [f"predict.images='{images}'"]
    return predict.predict(tiny_config("/nowhere", trained[0], *options))


def test_predict_mode(trained, digits, tmp_path):
    """Needs no annotations: the checkpoint knows the classes. Any image, or a folder of them."""
    out = tmp_path / "out"
    results = predicted(trained, digits / "val2017", out)
    assert json.loads((out / "predictions.json").read_text()) == results
    assert {path.name for path in out.glob("*.png")} == {f"{i:06d}.png" for i in (1, 2, 3)}
    for result in results:
        assert result["category"] in "0123456789" and result["file_name"].endswith(".png")
        assert "segmentation" in result
    assert max(Image.open(out / "000001.png").size) >= 480
    one = predicted(trained, digits / "val2017" / "000001.png", out)
    assert {r["file_name"] for r in one} <= {"000001.png"}


def test_other_modes_need_neither_data_nor_initial_weights():
    """An experiment's file as it is, with data=coco and init=checkpoint."""
    options = ("experiment=detection/mask_sn_sn", "mode=predict")
    assert config(*options, root="detection").data.root is None
    with pytest.raises(ValueError, match="data.root is not set; add data.root=... to the command"):
        config(options[0], "mode=evaluate", root="detection")
    with pytest.raises(ValueError, match="init.path is not set; add init.path=... to the command"):
        config(options[0], "data.root=/data", root="detection")


def test_names_of_predicted_pictures(trained, digits, tmp_path):
    """a.png and a.jpg get one each, and no image is written over."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "a.jpg", "b.jpg", "c_jpg.png"):
        Image.open(digits / "val2017" / "000001.png").save(folder / name)
    predicted(trained, folder, out)
    names = {path.name for path in out.glob("*.png")}
    assert names == {"a_png.png", "a_jpg.png", "b.png", "c_jpg.png"}
    files = [folder / name for name in ("a.jpg", "a.png", "a_jpg.png", "b.JPG")]
    assert predict.picture_names(files) == ["a_jpg", "a_png", "a_jpg_png", "b_JPG"]
    with pytest.raises(ValueError, match="is where the images are; choose another folder"):
        predicted(trained, folder, folder)


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
    images = places[images] / images if images in places else images
    path = places[checkpoint] / checkpoint if checkpoint in places else checkpoint
    options = [] if path is None else [f"checkpoint.path={path}"]
    with pytest.raises((ValueError, OSError), match=words):
        predicted(trained, images, tmp_path / "out", *options)


def test_predict_leaves_out_what_it_cannot_read(trained, digits, tmp_path, capsys):
    """All others are done, results written; then it is an error."""
    folder, out = tmp_path / "my photos", tmp_path / "out"
    folder.mkdir()
    (folder / "a.png").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    (folder / "c.png").write_bytes((digits / "val2017" / "000001.png").read_bytes())
    Image.new("RGB", (300, 1)).save(folder / "thin.png")
    with pytest.raises(ValueError, match="2 of 3 images were left out: cannot read .*a.png"):
        predicted(trained, folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["c.png", "predictions.json"]
    assert "thin.png has 300 x 1 pixels: nothing is left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["parts=bn", "norm@parts.fpn=gn"], "fpn is .*'bn'.* there, .*'gn'.* asked for"),
        (["model.anchor_sizes=[8,16,32,64,99]"], "anchor_sizes is .* there"),
        (["parts=gn"], "backbone is .*'sn'.* there, .*'gn'.* asked for"),
        (["model=mask_rcnn_r10_fpn"], "not of this model and these parts"),
        (["parts=bn", "parts.backbone.momentum=0.5"], None),
    ],
)
def test_checkpoint_of_weights_that_mean_something_else(options, words, tmp_path):
    """Group norm of other groups, or as layer norm, has parameters of the same shapes."""
    mine = tiny_config("/nowhere", tmp_path, *(["parts=bn"] if "parts=bn" in options else []))
    state = {"model": build_detector(num_classes=2, **mine.detector()).state_dict()}
    state |= {"classes": ["a", "b"], "category_ids": [1, 2]}
    torch.save(state | {"detector": predict.detector_options(mine)}, tmp_path / "checkpoint.pt")
    asked = tiny_config("/nowhere", tmp_path, *options)
    refused = pytest.raises(ValueError, match=words) if words else contextlib.nullcontext()
    with refused:
        predict.trained_model(asked, Precision("fp32", torch.device("cpu")))


# --- COCO files of one's own


def test_other_coco_files_from_the_command_line(tmp_path):
    """`data=coco data.root=...`: ids with gaps, crowds, an image without objects."""
    root = write(tmp_path / "mine")
    options = ("model=mask_rcnn_r10_fpn", "data.name=mine")
    summary = train_detection.train(coco_config(root, tmp_path / "run", *options))
    assert summary["data"]["train_images"] == 2 and summary["data"]["val_images"] == 4
    assert summary["data"]["classes"] == 3
    results = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert {r["category_id"] for r in results} <= {3, 17, 44}


def test_bad_images_are_skipped(tmp_path, capsys):
    """Up to data.max_bad_images: listed, counted, and the run goes on; one more is an error."""
    root = write(tmp_path / "mine")
    for name in ("train2017/a.png", "val2017/b.png"):
        (root / name).write_bytes(b"no picture")
    out = tmp_path / "run"
    summary = train_detection.train(coco_config(root, out))
    assert summary["status"] == "finished" and summary["bad_images"] == 2
    listed = (out / "bad_images.txt").read_text().splitlines()
    assert sorted(line.partition(" of ")[0] for line in listed) == ["image 10", "image 7"]
    results = json.loads((out / "predictions.json").read_text())
    assert results and 7 not in {result["image_id"] for result in results}
    assert (out / "predictions.png").exists()
    assert "max_bad_images" not in (out / "config.yaml").read_text()
    assert "skipped" in capsys.readouterr().err
    with pytest.raises(ValueError, match="2 unreadable images, more than data.max_bad_images=1"):
        train_detection.train(coco_config(root, tmp_path / "few", "data.max_bad_images=1"))


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
    root = write(tmp_path / "b")
    for name in ("a.png", "b.png"):
        (root / "train2017" / name).write_bytes(b"no picture")
    options = [option for option in TINY if not option.startswith("data.generate")]
    options += ["data=coco", "model=faster_rcnn_r10_fpn", "output_dir=run", f"data.root={root}"]
    code, err = command_line(tmp_path, *options, "data.workers=1", "data.max_bad_images=0")
    assert code == 2 and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("train_detection.py: ")]
    assert ".png" in line and "image " in line


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
    cfg = config(
        *("device=cpu", "parts=gn", f"data.root={root}", f"output_dir={tmp_path / 'run'}"),
        *("data.generate=null", "setting.gpus=1", "setting.images_per_gpu=4"),
        *("schedule.images=1600", "schedule.lr_per_16=0.08", "schedule.warmup_images=160"),
        root="detection",
    )
    assert train_detection.train(cfg)["box_ap"] > 80


def test_pictures_of_a_folder(tmp_path):
    for name in ("b.png", "a.JPG", "._a.JPG", "text.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "c.png").symlink_to("nowhere")  # named when it is read
    names = [path.name for path in predict.picture_files(tmp_path)]
    assert names == ["a.JPG", "b.png", "c.png"]
    with pytest.raises(ValueError, match="no image"):
        predict.picture_files(tmp_path / "folder.png")

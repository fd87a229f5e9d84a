"""The records of a run: config, lines per epoch, importance per block, TensorBoard events."""

import json
import math
import os
import re
import resource
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from workers import config

import sn
from sn.training.classification.models import build_model
from sn.training.run.config import machine_keys, recorded
from sn.training.run.lock import FolderLock
from sn.training.run.record import (
    Recorder,
    block_averages,
    block_names,
    environment,
    importance_figure,
    read_jsonl,
    write_text,
)

CONFIG = {
    "seed": 0,
    "norm": {"name": "sn", "statistics": ["in", "ln", "bn"]},
    "data": {"name": "imagenet"},
    "setting": {"gpus": 8, "images_per_gpu": 32},
    "model": {"name": "resnet20"},
    "schedule": {"milestones": [0.3, 0.6]},
}
MACHINE = [  # overrides that say where and how fast, not what
    *("data.workers=8", "device=cpu", "note=old", "compile=true", "setting.emulation=grouped"),
    *("output_dir=/home/someone/x", "checkpoint_steps=3", "data.max_bad_images=7"),
    *("keep_checkpoints=5", "max_skipped_steps=1", "timeout_minutes=3", "deterministic=true"),
    *("output_root=/home/someone", "data.root=/home/someone/data", "data.download=true"),
]


def changed(**values):
    """CONFIG with other values, keys written group__key."""
    config = json.loads(json.dumps(CONFIG))
    for path, value in values.items():
        *groups, key = path.split("__")
        inner = config
        for group in groups:
            inner = inner[group]
        inner[key] = value
    return config


def write(folder, config=CONFIG, epoch=-1):
    """A recorder that has begun after `epoch` epochs; -1: there is no checkpoint."""
    recorder = Recorder(folder, config)
    recorder.open(epoch)
    return recorder


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = sn.SwitchNorm2d(4)
        self.layer1 = nn.Sequential(sn.SwitchNorm2d(4), sn.SwitchNorm2d(4))
        self.layer2 = nn.Sequential(sn.SwitchNorm2d(4))


# --- config


def test_config_is_written_without_the_machine(tmp_path):
    """The same experiment on another machine has the same record, and may go on."""
    here = recorded(config("data=cifar10"))
    there = config("data=cifar10", *MACHINE)
    write(tmp_path, recorded(there)).close()
    text = (tmp_path / "config.yaml").read_text()
    for word in ("someone", "old", "output", "workers", "cpu", "root", "emulation", "steps:"):
        assert word not in text
    assert yaml.safe_load(text) == here
    assert there.data.root == "/home/someone/data"  # not changed in place
    write(tmp_path, here).close()


@pytest.mark.parametrize("name", ["bn_8x2", "sn_8x32"])
def test_recorded_config_of_old_runs(name):
    """The command of a run of November 2026 still stands for that run: it could go on."""
    norm, setting = name.split("_")
    command = ("experiment=imagenet/cifar10_proxy", f"norm={norm}", f"setting={setting}")
    path = Path(__file__).parent / "old_configs" / f"{name}.yaml"
    assert recorded(config(*command, "data.root=/x")) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    "values, shown",
    [
        ({"seed": 1}, "seed: 0 there, 1 asked for"),
        ({"norm__name": "bn"}, "norm.name: sn there, bn asked for"),
        ({"norm__statistics": ["in"]}, "norm.statistics: [in, ln, bn] there, [in] asked"),
        ({"schedule__milestones": [0.3]}, "schedule.milestones: [0.3, 0.6] there, [0.3] asked for"),
        ({"seed": None}, "seed: 0 there, null asked for"),
        ({"model__dropout": 0.5}, "model.dropout: the default there, 0.5 asked for"),
    ],
)
@pytest.mark.parametrize("is_main", [True, False])
def test_another_experiment_is_refused(values, shown, is_main, tmp_path):
    """By every process, with all differences, before anything is written."""
    write(tmp_path).close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run of another config") as error:
        Recorder(tmp_path, changed(**values), is_main)
    assert shown in str(error.value) and str(tmp_path) in str(error.value)
    assert "output_dir=" in str(error.value)
    assert str(error.value).count(" there, ") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_keys_of_later_versions(tmp_path):
    """What runs did before a key existed has no place in a record; anything else has."""
    plain = recorded(config("data=cifar10"))
    assert "image_size" not in plain["data"] and "gates" not in plain
    assert not {"width", "fused_activation"} & plain["model"].keys()
    write(tmp_path, plain).close()
    for option in ("data.image_size=16", "model.width=8", "gates=bilevel"):
        with pytest.raises(ValueError, match="the default there, (16|8|bilevel) asked for"):
            Recorder(tmp_path, recorded(config("data=cifar10", option)))


def test_all_differences_are_shown(tmp_path):
    write(tmp_path).close()
    with pytest.raises(ValueError) as error:
        Recorder(tmp_path, changed(seed=3, norm__name="gn", setting__gpus=1))
    for key in ("seed", "norm.name", "setting.gpus"):
        assert f"{key}: " in str(error.value)


def test_a_missing_key_is_a_difference(tmp_path):
    """Shown from both sides."""
    write(tmp_path, changed(model__dropout=0.5)).close()
    with pytest.raises(ValueError, match="model.dropout: 0.5 there, the default asked for"):
        Recorder(tmp_path, CONFIG)


def test_values_that_yaml_changes(tmp_path):
    """Tuples, floats and None come back equal to what was asked for."""
    config = changed(schedule__warmup=5 / 120, model__dropout=None, schedule__gamma=1e-4)
    write(tmp_path, config).close()
    write(tmp_path, config).close()


# --- lines


def test_lines_per_epoch(tmp_path):
    recorder = write(tmp_path)
    for epoch in (1, 2):
        recorder.metrics(epoch, {"train/loss": 0.1 * epoch, "lr": 0.5})
        recorder.importance(epoch, Net())
    recorder.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"epoch": 1, "train/loss": 0.1, "lr": 0.5},
        {"epoch": 2, "train/loss": 0.2, "lr": 0.5},
    ]
    first, second = read_jsonl(tmp_path / "importance.jsonl")
    assert first["epoch"] == 1 and list(first["layers"]) == [
        "bn1",
        "layer1.0",
        "layer1.1",
        "layer2.0",
    ]
    assert first["layers"]["layer1.0"]["block"] == "layer1"
    assert first["layers"]["bn1"]["mean"] == pytest.approx(dict.fromkeys(("in", "ln", "bn"), 1 / 3))


def fill(folder, epochs):
    recorder = write(folder)
    recorder.importance(0, Net())
    for epoch in range(1, epochs + 1):
        recorder.metrics(epoch, {"train/loss": 1 / epoch})
        recorder.importance(epoch, Net())
    recorder.close()


@pytest.mark.parametrize("epoch", [-1, 0, 1, 2, 3])
def test_resume_drops_later_lines(epoch, tmp_path):
    fill(tmp_path, 3)
    recorder = write(tmp_path, epoch=epoch)
    assert [line["epoch"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [
        *range(1, epoch + 1)
    ]
    kept = [line["epoch"] for line in read_jsonl(tmp_path / "importance.jsonl")]
    assert kept == [*range(epoch + 1)]
    recorder.metrics(4, {"train/loss": 9.0})
    recorder.close()
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1] == {"epoch": 4, "train/loss": 9.0}


def test_torn_last_line(tmp_path):
    """A kill in the middle of a line: the line is dropped, and the next is whole."""
    fill(tmp_path, 2)
    for name in ("metrics.jsonl", "importance.jsonl"):
        path = tmp_path / name
        text = path.read_text()
        path.write_text(text[: -len(text.splitlines()[-1]) // 2])
    recorder = write(tmp_path, epoch=1)
    recorder.metrics(2, {"train/loss": 0.5})
    recorder.close()
    assert [line["epoch"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [line["epoch"] for line in read_jsonl(tmp_path / "importance.jsonl")] == [0, 1]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")


def test_other_processes_write_nothing(tmp_path):
    recorder = Recorder(tmp_path / "run", CONFIG, is_main=False)
    recorder.open(0)
    recorder.metrics(1, {"loss": 1.0})
    recorder.importance(1, Net(), figure=True)
    recorder.finish({"top1": 1.0})
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_model_without_switchable_layers(tmp_path):
    recorder = write(tmp_path)
    recorder.importance(0, nn.Sequential(nn.BatchNorm2d(3)), figure=True)
    recorder.close()
    assert not (tmp_path / "importance.jsonl").exists()


def test_summary(tmp_path):
    recorder = write(tmp_path)
    assert recorder.summary() is None
    summary = {"status": "finished", "top1": 12.5, "note": "größer"}
    recorder.finish(summary)
    assert Recorder(tmp_path, CONFIG).summary() == summary
    assert Recorder(tmp_path, CONFIG, is_main=False).summary()["top1"] == 12.5
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("text", ["{}", "[1]", "{", "[" * 100_000])
def test_summary_that_is_none(text, tmp_path):
    write(tmp_path).close()
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match="summary.json is damaged"):
        Recorder(tmp_path, CONFIG).summary()


def test_damaged_lines_take_no_others_with_them(tmp_path):
    fill(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, b"\0\xff\0", b"7", b'{"epok": 2}', third]) + b"\n")
    write(tmp_path, epoch=3).close()
    assert [line["epoch"] for line in read_jsonl(path)] == [1, 3]


def test_full_disk_names_the_file(tmp_path):
    recorder = write(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*metrics.jsonl: .*No space left"):
        recorder.metrics(1, {"loss": 1.0})


def test_a_full_disk_names_tensorboards_folder(tmp_path, monkeypatch):
    recorder = Recorder(str(tmp_path), {}, True, "epoch")
    recorder.open(-1, 0, 1)

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder.writer, "flush", full)
    with pytest.raises(OSError, match=r"cannot write \S+/tensorboard: .*No space.* is whole"):
        recorder.metrics(1, {"loss": 1.0})
    with pytest.raises(OSError, match=r"cannot write \S+/tensorboard: "):
        recorder.step(1, {"loss": 1.0})


def test_whole_files_on_a_full_disk_are_named(tmp_path):
    """The system's error does not say which; what was there stays, and no rest of the new one."""
    (tmp_path / "summary.json").write_text("{}")
    lock = FolderLock(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*summary.json: "):
            write_text(tmp_path / "summary.json", "{1}")
        with pytest.raises(OSError, match=r"cannot write .*\.lock: "):
            lock.acquire()
        lock.release()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "summary.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "summary.json"]


def test_lines_are_on_disk_when_asked(tmp_path, monkeypatch):
    """`sync` and `finish` alone wait for the disk: once for each file that has new lines."""
    recorder, fsync, waited = write(tmp_path), os.fsync, []

    def watched(descriptor):
        waited.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    recorder.sync()
    monkeypatch.setattr(os, "fsync", watched)
    for epoch in (3, 4):
        recorder.metrics(epoch, {"loss": 1.0})
    recorder.step(9, {"loss": 1.0})
    assert waited == []
    recorder.sync()
    assert sorted(waited) == ["metrics.jsonl", "steps.jsonl"]
    recorder.sync()
    recorder.metrics(5, {"loss": 1.0})
    recorder.finish({"status": "finished"})
    assert waited[2:] == ["metrics.jsonl", "summary.json.tmp"]


def test_write_text_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def broken(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"


# --- blocks


def blocks_of(model):
    """{block: number of its norm layers} in network order."""
    names = block_names(model)
    kinds = (nn.BatchNorm2d, sn.SwitchNorm2d)
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            counts[names[name]] = counts.get(names[name], 0) + 1
    return counts


def test_blocks_of_resnet50():
    """Stem and four stages: 1 + 10 + 13 + 19 + 10 norm layers."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    assert blocks_of(model) == {"stem": 1, "layer1": 10, "layer2": 13, "layer3": 19, "layer4": 10}


def test_blocks_of_other_models():
    with torch.device("meta"):
        norm = sn.make_norm("sn")
        resnet20 = build_model("resnet20", "cifar", 10, norm)
        resnet18 = build_model("cifar_resnet18", "cifar", 10, norm)
        mobilenet = torchvision.models.mobilenet_v2(norm_layer=norm)
        timm_resnet18 = timm.create_model("resnet18", norm_layer=norm)
        timm_deep_stem = timm.create_model("resnet26d", norm_layer=norm)
    assert blocks_of(resnet20) == {"stem": 1, "layer1": 6, "layer2": 6, "layer3": 6}
    assert blocks_of(resnet18) == {"stem": 1, "layer1": 4, "layer2": 5, "layer3": 5, "layer4": 5}
    stages = {"stem": 1, "layer1": 4, "layer2": 5, "layer3": 5, "layer4": 5}
    assert blocks_of(timm_resnet18) == stages
    assert blocks_of(timm_deep_stem)["stem"] == 3
    assert list(blocks_of(timm_deep_stem)) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    blocks = blocks_of(mobilenet)
    assert list(blocks) == [f"features.{number}" for number in range(19)]
    assert blocks["features.0"] == 1 and blocks["features.2"] == 3


def test_block_averages():
    """Every layer counts the same; a statistic that a layer lacks counts as 0 there."""
    layers = {
        "a": {"block": "x", "mean": {"in": 0.2, "bn": 0.8}, "var": {"in": 0.5, "bn": 0.5}},
        "b": {"block": "x", "mean": {"in": 0.6, "bn": 0.4}, "var": {"in": 0.1, "bn": 0.9}},
        "c": {"block": "y", "mean": {"in": 1.0, "bn": 0.0}, "var": {"in": 0.0, "bn": 1.0}},
    }
    averages = block_averages(layers)
    assert list(averages) == ["x", "y"]
    assert averages["x"]["mean"] == pytest.approx({"in": 0.4, "bn": 0.6})
    assert averages["x"]["var"] == pytest.approx({"in": 0.3, "bn": 0.7})
    assert averages["y"]["mean"] == {"in": 1.0, "bn": 0.0}
    figure = importance_figure(averages)
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx([0.4, 1.0, 0.6, 0.0])
    assert [bar.get_y() for bar in right.patches] == pytest.approx([0, 0, 0.3, 0.0])


def test_block_averages_of_mixed_layers():
    """Layers of one block with other statistics: all of them appear, and they still sum to 1."""
    layers = {
        "a": {"block": "x", "mean": {"in": 0.5, "ln": 0.5}, "var": {"in": 0.5, "ln": 0.5}},
        "b": {"block": "x", "mean": {"ln": 0.3, "bn": 0.7}, "var": {"ln": 0.3, "bn": 0.7}},
    }
    mean = block_averages(layers)["x"]["mean"]
    assert mean == pytest.approx({"in": 0.25, "ln": 0.4, "bn": 0.35})
    assert list(mean) == ["in", "ln", "bn"]
    importance_figure(block_averages(layers))


# --- TensorBoard


def events(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    return accumulator.Reload()


def test_tensorboard(tmp_path):
    recorder = write(tmp_path)
    model = Net()
    with torch.no_grad():
        model.layer1[0].mean_weight.copy_(torch.tensor([3.0, 2.0, 1.0]))
    recorder.importance(0, model)
    recorder.step(7, {"epoch": 1, "loss": 2.0})
    recorder.metrics(1, {"train/loss": 2.5, "val/top1": 40.0, "lr": 0.1, "nothing": None})
    recorder.importance(1, model, figure=True)
    recorder.finish({})
    log = events(tmp_path)
    tags = set(log.Tags()["scalars"])
    layers = ("bn1", "layer1.0", "layer1.1", "layer2.0")
    wanted = {"1_train/loss", "2_val/top1", "4_run/lr", "3_steps/loss"}
    for moment in ("mean", "var"):
        for statistic in ("in", "ln", "bn"):
            wanted |= {f"7_importance_layers/{moment}/{layer}/{statistic}" for layer in layers}
            wanted |= {
                f"6_importance/{moment}/{block}/{statistic}"
                for block in ("stem", "layer1", "layer2")
            }
    assert tags == wanted
    assert log.Tags()["images"] == ["importance"]
    assert [(event.step, event.value) for event in log.Scalars("1_train/loss")] == [(1000, 2.5)]
    softmax = torch.tensor([3.0, 2.0, 1.0]).softmax(0)
    first, second = log.Scalars("7_importance_layers/mean/layer1.0/in")
    assert (first.step, second.step) == (0, 1000)
    assert first.value == pytest.approx(softmax[0].item())
    block = log.Scalars("6_importance/mean/layer1/in")[0].value
    assert block == pytest.approx((softmax[0].item() + 1 / 3) / 2)


def test_tensorboard_after_a_resume(tmp_path):
    """One curve without a second value for any epoch."""
    fill(tmp_path, 3)
    recorder = write(tmp_path, epoch=2)
    recorder.metrics(3, {"train/loss": 7.0})
    recorder.finish({})
    curve = events(tmp_path).Scalars("1_train/loss")
    assert [event.step for event in curve] == [1000, 2000, 3000]
    assert curve[-1].value == 7.0


def test_tensorboard_after_a_start_from_nothing(tmp_path):
    """Killed before its first checkpoint, a run begins anew: no value comes twice."""
    fill(tmp_path, 1)
    recorder = write(tmp_path)
    recorder.importance(0, Net())
    recorder.metrics(1, {"train/loss": 7.0})
    recorder.finish({})
    log = events(tmp_path)
    assert [event.value for event in log.Scalars("1_train/loss")] == [7.0]
    assert [event.step for event in log.Scalars("7_importance_layers/mean/bn1/in")] == [0]


def test_tensorboard_has_a_page_of_importance_weights(tmp_path):
    """Two charts a block, each with the curves of its statistics alone."""
    recorder = write(tmp_path)
    recorder.importance(0, Net())
    recorder.finish({})
    log = events(tmp_path)
    (event,) = log.Tensors("custom_scalars__config__")
    page = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    mean, variance = page.category
    assert (mean.title, variance.title) == tuple(
        f"importance weights of the {moment}" for moment in ("mean", "variance")
    )
    for category, moment in ((mean, "mean"), (variance, "var")):
        assert [chart.title for chart in category.chart] == ["stem", "layer1", "layer2"]
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            found = {key for key in log.Tags()["scalars"] if re.match(pattern, key)}
            wanted = {f"6_importance/{moment}/{chart.title}/{s}" for s in ("in", "ln", "bn")}
            assert found == wanted


PER_EPOCH = 3000  # more steps than TensorBoard's axis has places in an epoch


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("done", [0, 1, 700, 701, 3000, 3001, 4400, 6000])
def test_lines_of_steps_after_a_resume(unit, done, tmp_path):
    """Wherever the checkpoint was, no line and no event is missing or there twice."""

    def steps_to(recorder, first, last):
        for step in range(first, last + 1):
            if step % 700 == 0 or step == last:
                recorder.step(step, {"loss": float(step)})
            if unit == "epoch" and step % PER_EPOCH == 0:
                recorder.metrics(step // PER_EPOCH, {"train/loss": float(step)})

    def begun(done):
        recorder = Recorder(tmp_path, CONFIG, unit=unit)
        count = done // PER_EPOCH if unit == "epoch" else done
        recorder.open(count if done else -1, done, PER_EPOCH)
        return recorder

    recorder = begun(0)
    steps_to(recorder, 1, 6300)
    recorder.close()
    recorder = begun(done)
    steps_to(recorder, done + 1, 6300)
    recorder.finish({})
    expected = [*range(700, 6301, 700)]
    found = read_jsonl(tmp_path / "steps.jsonl")
    assert found == [{"step": step, "loss": float(step)} for step in expected]
    log = events(tmp_path)
    curve = log.Scalars("3_steps/loss")
    assert [event.value for event in curve] == expected
    places = expected if unit == "step" else [math.ceil(step / 3) for step in expected]
    assert [event.step for event in curve] == places
    if unit == "epoch":
        assert [(e.step, e.value) for e in log.Scalars("1_train/loss")] == [
            (1000, 3000),
            (2000, 6000),
        ]


def test_keys_that_say_nothing(tmp_path):
    """A key that became the machine's stands in old records, and does not stop them."""
    write(tmp_path, CONFIG | {"log_steps": 20}).close()
    with pytest.raises(ValueError, match="log_steps: 20 there, the default asked for"):
        Recorder(tmp_path, CONFIG)
    cfg = config("data=cifar10")
    Recorder(tmp_path, CONFIG, unrecorded=machine_keys(type(cfg)))
    assert {"data.root", "setting.emulation", "log_steps"} <= machine_keys(type(cfg))
    assert not {"data.name", "seed", "data"} & machine_keys(type(cfg))


def test_environment():
    record = environment(torch.device("cpu"))
    assert set(record) == {"versions", "device", "commit", "date"}
    assert record["device"].startswith("CPU")
    assert record["versions"]["torch"] in torch.__version__
    assert record["commit"] is None or len(record["commit"].removesuffix("-dirty")) == 40


@pytest.mark.parametrize("name", ["metrics.jsonl", "importance.jsonl"])
def test_lines_that_are_gone_are_missed(name, tmp_path):
    """A checkpoint knows how many there were; those of a broken run beyond it do not count."""
    recorder = write(tmp_path)
    for count in (1, 2, 3):
        recorder.metrics(count, {"loss": 1.0})
        recorder.importance(count, nn.Sequential(sn.SwitchNorm2d(2)))
    known = dict(recorder.lines)
    assert known == {"metrics.jsonl": 3, "importance.jsonl": 3}
    recorder.close()
    again = Recorder(tmp_path, CONFIG)
    again.count_lines(3, known)
    assert again.lines == known | {"steps.jsonl": 0}
    path = tmp_path / name
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=f"{name} has only 2 of the 3 lines"):
        again.count_lines(3, known)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} has only 0 of the 3 lines"):
        again.count_lines(3, known)
    again.count_lines(3, {})  # a checkpoint from before does not say


@pytest.mark.parametrize("content", ["a: &x {b: *x}", "a: &x [*x]", "- 1", "a: [", b"\xff", None])
def test_config_that_is_none(content, tmp_path):
    """A self-referring one too; None: a pipe, which to open would wait for ever."""
    path = tmp_path / "config.yaml"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{tmp_path}.* (is not a run's config|another config)"):
        Recorder(tmp_path, CONFIG)


def test_summary_that_is_a_pipe(tmp_path):
    recorder = write(tmp_path)
    os.mkfifo(tmp_path / "summary.json")
    recorder.close()
    with pytest.raises(ValueError, match="summary.json is damaged"):
        recorder.summary()

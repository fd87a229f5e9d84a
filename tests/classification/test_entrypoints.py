"""train_imagenet.py as a user meets it: records, resumption, settings, switches, errors."""

import contextlib
import copy
import functools
import json
import math
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import workers
import yaml
from faults import Crash, assert_same, crash_at
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from workers import config, processes, run_in_group

import sn
import train_imagenet
from sn.training.classification import task as task_module
from sn.training.classification.models import DropoutLinear
from sn.training.run import record as record_module
from sn.training.run import session
from sn.training.run.config import Setting
from sn.training.run.stopping import Preempted

ROOT = Path(__file__).resolve().parents[2]
TINY = [  # 2 epochs of 4 steps of (2,4)
    "device=cpu",
    "setting.gpus=2",
    "setting.images_per_gpu=4",
    "schedule.epochs=2",
    "data.train_images=29",
    "evaluation.batch_average.batch_size=8",
]
REQUIRED = (
    *("top1", "top5", "top1_batch_average", "epochs", "seed", "images_seen", "wall_s", "versions"),
    *("device", "commit", "scale", "status", "norm", "setting", "data", "model", "lr", "run"),
)


class TinyNet(nn.Module):
    """Two norms of the kind asked for and dropout: everything a checkpoint must carry."""

    def __init__(self, norm, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = norm(6)
        self.layer1 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, bias=False), norm(8))
        self.fc = DropoutLinear(nn.Linear(8, num_classes), 0.3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.layer1(x)).mean((2, 3)))


@pytest.fixture
def few(monkeypatch, no_git):
    """`train_imagenet` with 24 validation images, no drawing."""
    build = train_imagenet.build_data

    def build_data(**options):
        data = build(**options)
        data.val.images, data.val.labels = data.val.images[:24], data.val.labels[:24]
        return data

    monkeypatch.setattr(train_imagenet, "build_data", build_data)
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *_: None)
    monkeypatch.setattr(record_module, "importance_figure", lambda averages: None)


@pytest.fixture
def tiny(monkeypatch, few):
    """The same with TinyNet for the model asked for."""
    monkeypatch.setattr(
        task_module, "build_model", lambda num_classes, norm, **_: TinyNet(norm, num_classes)
    )


@functools.cache
def composed(*overrides):
    return config(*TINY, *overrides)


def train(out, *overrides):
    cfg = copy.deepcopy(composed(*overrides))
    cfg.output_dir = str(out)
    return train_imagenet.train(cfg)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(folder):
    """What a run leaves, without timing: everything that must not depend on interruptions."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["progress"].pop("wall_s")
    metrics = lines(folder / "metrics.jsonl")
    for line in metrics:
        line.pop("images_per_s")
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("wall_s", "date", "commit", "device"):
        summary.pop(key)
    importance = folder / "importance.jsonl"
    return {
        "metrics": metrics,
        "importance": lines(importance) if importance.exists() else None,
        "summary": summary,
        "config": (folder / "config.yaml").read_text(),
        "checkpoint": state,
    }


# --- records


@pytest.mark.parametrize(
    "own, pass_", [(True, 1), (False, 3)], ids=["this process, validation", "another, at the end"]
)
def test_signal_during_an_evaluation(own, pass_, tiny, tmp_path, monkeypatch):
    """A signalled process still takes part in the sums, and all stop after them together."""
    train(tmp_path / "whole")
    evaluate, evaluations, sums = train_imagenet.evaluate, [], []

    def signalled(*arguments):
        evaluations.append(1)
        if len(evaluations) == pass_ and own:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    def summed(values):
        sums.append(1)
        if len(evaluations) == pass_ and values.dim() == 0 and not own:
            values += 1
        return values

    with monkeypatch.context() as patch:
        patch.setattr(train_imagenet, "evaluate", signalled)
        patch.setattr("sn.training.classification.evaluation.sum_over_processes", summed)
        patch.setattr(train_imagenet.distributed, "sum_over_processes", summed)
        with pytest.raises(Preempted, match="the same command goes on"):
            train(tmp_path / "broken")
    assert len(evaluations) == pass_ and not (tmp_path / "broken" / "summary.json").exists()
    train(tmp_path / "broken")
    assert_same(record(tmp_path / "broken"), record(tmp_path / "whole"), "after a signal")


def test_smoke_writes_every_record(tmp_path):
    out = tmp_path / "a run with spaces"
    summary = train_imagenet.train(
        config("experiment=imagenet/smoke", "device=cpu", f"output_dir='{out}'")
    )
    files = {path.name for path in out.iterdir()}
    wanted = {"config.yaml", "metrics.jsonl", "importance.jsonl", "summary.json", "checkpoint.pt"}
    assert files >= wanted | {"tensorboard"}
    assert not [name for name in files if name.endswith(".tmp")]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert not set(REQUIRED) - summary.keys()
    assert summary["status"] == "finished" and summary["scale"] == "proxy"
    assert 0 <= summary["top1"] <= 100 and 0 <= summary["top1_batch_average"] <= 100
    assert summary["images_seen"] == 256 and summary["epochs"] == 1 and summary["seed"] == 0
    assert summary["data"]["train_images"] == 64 and summary["data"]["val_images"] == 360
    assert summary["setting"]["name"] == "8x32" and summary["statistics"] == ["in", "ln", "bn"]
    assert torch.__version__.startswith(summary["versions"]["torch"])
    assert summary["run"] == "imagenet/digits_resnet20/sn_8x32/seed0"
    (metrics,) = lines(out / "metrics.jsonl")
    keys = ("epoch", "lr", "train/loss", "train/top1", "val/loss", "val/top1", "images_per_s")
    assert not set(keys) - metrics.keys()
    assert metrics["epoch"] == 1 and metrics["lr"] == 0.1
    assert metrics["val/top1"] == summary["top1"]
    importance = lines(out / "importance.jsonl")
    assert [line["epoch"] for line in importance] == [0, 1]
    assert len(importance[0]["layers"]) == 19
    for layer in importance[0]["layers"].values():
        assert layer["mean"] == pytest.approx({"in": 1 / 3, "ln": 1 / 3, "bn": 1 / 3})
    recorded = yaml.safe_load((out / "config.yaml").read_text())
    assert recorded["norm"]["name"] == "sn" and recorded["schedule"]["epochs"] == 1
    assert str(tmp_path) not in (out / "config.yaml").read_text()
    assert str(tmp_path) not in (out / "summary.json").read_text()


def test_learns_the_digits(tmp_path):
    """Forty steps are enough to be far from guessing (10 percent), by both averages."""
    summary = train_imagenet.train(
        config(
            *("device=cpu", "norm=sn", "setting.gpus=2", "setting.images_per_gpu=16"),
            *("schedule.epochs=4", "data.train_images=320", "schedule.lr_per_256=0.4"),
            f"output_dir={tmp_path}",
        )
    )
    assert summary["top1"] > 35 and summary["top1_batch_average"] > 35
    assert summary["top5"] >= summary["top1"]


def test_second_call_is_a_no_op(tmp_path, tiny, capsys):
    first = train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(tmp_path) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert "ended already" in capsys.readouterr().out


def test_two_runs_are_equal_and_seeds_differ(tmp_path, tiny):
    for name in ("a", "b"):
        train(tmp_path / name)
    train(tmp_path / "c", "seed=1")
    a, b, c = (record(tmp_path / name) for name in "abc")
    assert_same(a, b, "same seed")
    assert a["metrics"][0]["train/loss"] != c["metrics"][0]["train/loss"]
    conv = "conv1.weight"
    assert not torch.equal(a["checkpoint"]["model"][conv], c["checkpoint"]["model"][conv])


def test_checkpoint_speaks_plain_types_and_names(tmp_path, tiny):
    train(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(state["model"]) >= {"bn1.mean_weight", "bn1.running_var", "fc.weight"}
    assert TinyNet(sn.SwitchNorm2d).load_state_dict(state["model"])
    averaged = state["batch_average"]
    assert set(averaged) == {name for name in state["model"] if "running" in name or "num_" in name}
    assert not torch.equal(averaged["bn1.running_var"], state["model"]["bn1.running_var"])


def test_metrics_of_a_padded_epoch(tmp_path, tiny):
    """29 images at (2,4) are 4 steps of 8: images seen counts what was trained on."""
    summary = train(tmp_path)
    assert summary["images_seen"] == 2 * 4 * 8
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [4, 8]
    assert [line["images_seen"] for line in metrics] == [32, 64]
    assert metrics[0]["train/top1"] * 32 / 100 == pytest.approx(
        round(metrics[0]["train/top1"] * 32 / 100)
    )


# --- resumption


CALLS = (
    (train_imagenet, ("train_step", "validate", "train_one_epoch")),
    (session, ("save_checkpoint",)),
    (train_imagenet.sn, ("batch_average",)),
    (torch, ("save",)),
)
crash_at = functools.partial(crash_at, calls=CALLS)


RESUMED = {
    "sn, mid-epoch": ["norm=sn", "checkpoint_steps=3"],
    "bn, epoch ends": ["norm=bn", "checkpoint_steps=0"],
    "accumulated": ["norm=bn", "checkpoint_steps=2", "setting.emulation=accumulated"],
}


def crash_everywhere(tmp_path, options, choose):
    """Crash at the moments that `choose` picks, each time resume and compare with no crash."""
    whole = tmp_path / "whole"
    with crash_at(None) as moments:
        train(whole, *options)
    expected = record(whole)
    moments = list(moments)
    assert len(moments) > 40 and {"before save", "before finish"} <= set(moments)
    states = expected["checkpoint"]["optimizer"]["state"].values()
    assert all(state["momentum_buffer"].abs().sum() > 0 for state in states)
    failures = []
    for event in choose(moments):
        out = tmp_path / str(event)
        with crash_at(event), pytest.raises(Crash):
            train(out, *options)
        train(out, *options)
        try:
            assert_same(record(out), expected, "not equal")
        except AssertionError as error:
            first = str(error).splitlines()[0]
            failures.append(f"crash {moments[event]} ({event} of {len(moments)}): {first}")
        shutil.rmtree(out)
    assert not failures, "\n".join(failures)


def one_of_each(moments):
    """In the second epoch: in a step, in its validation; at the end: in the final evaluation."""
    steps = [place for place, name in enumerate(moments) if name == "before train_step"]
    yield steps[len(steps) * 3 // 4]
    yield moments.index("after validate", steps[-1])
    if "before batch_average" in moments:
        yield moments.index("after batch_average")


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_resumed_run_equals_unbroken_one(options, tmp_path, tiny):
    """Killed at each kind of place, the same command ends with the same bits.

    Every other place to crash is Session's: tests/run/test_session.py.
    """
    crash_everywhere(tmp_path, options, one_of_each)


@pytest.mark.slow
@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_resumed_run_equals_unbroken_one_wherever_it_crashes(options, tmp_path, tiny):
    """Killed around every single call."""
    crash_everywhere(tmp_path, options, lambda moments: range(len(moments)))


def test_resume_says_where(tmp_path, tiny, capsys):
    with crash_at(30), pytest.raises(Crash):
        train(tmp_path, "checkpoint_steps=1")
    capsys.readouterr()
    train(tmp_path, "checkpoint_steps=1")
    assert "resuming after" in capsys.readouterr().out


def test_resume_with_another_number_of_workers(tmp_path, tiny):
    """Workers and checkpoint interval are the machine's: they change nothing."""
    train(tmp_path / "whole")
    with crash_at(30), pytest.raises(Crash):
        train(tmp_path / "broken", "checkpoint_steps=1", "data.workers=1")
    train(tmp_path / "broken", "checkpoint_steps=3")
    assert_same(record(tmp_path / "broken"), record(tmp_path / "whole"), "workers")


def test_gates_and_scaler_resume(tmp_path, tiny):
    options = ["optimizer.gate_lr_factor=0.1", "optimizer.gate_weight_decay=0", "precision=bf16"]
    train(tmp_path / "whole", *options)
    with crash_at(30), pytest.raises(Crash):
        train(tmp_path / "broken", "checkpoint_steps=1", *options)
    train(tmp_path / "broken", *options)
    ours = record(tmp_path / "broken")
    assert_same(ours, record(tmp_path / "whole"), "two groups, bf16")
    groups = ours["checkpoint"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0]
    assert groups[1]["lr"] == pytest.approx(groups[0]["lr"] / 10)


def test_resume_of_two_processes_after_one_was_killed(tmp_path):
    """SIGKILL hits one of two processes in mid-epoch; started again, they end with the same bits.

    The machine keys may change meanwhile: here the checkpoint interval does.
    """
    options = (*TINY, "norm=sn", "checkpoint_steps=3")
    run_in_group(2, _train_tiny, (*options, f"output_dir={tmp_path / 'whole'}"))
    out = tmp_path / "broken"
    with pytest.raises(RuntimeError, match=str(-signal.SIGKILL)):
        run_in_group(2, _train_and_die, (*options, f"output_dir={out}"), timeout=60)
    assert (out / "checkpoint.pt").exists() and not (out / "summary.json").exists()
    run_in_group(2, _train_tiny, (*options, f"output_dir={out}"))
    assert_same(record(out), record(tmp_path / "whole"), "two processes")


def test_batch_average_of_synchronised_layers(tmp_path):
    """Of three batches on two processes: as many of one as of the other."""
    options = ["norm=sync_sn", "schedule.epochs=1"]
    options += [f"evaluation.batch_average.{key}" for key in ("batch_size=9", "batches=3")]
    run_in_group(2, _train_tiny, (*TINY, *options, f"output_dir={tmp_path}"), timeout=60)
    summary = record(tmp_path)["summary"]
    assert summary["status"] == "finished" and summary["batch_average_images"] == 27


def _train_and_die(rank, overrides):
    """The same, but rank 1 is killed in step 2 of epoch 2."""
    step, calls = train_imagenet.train_step, 0

    def dying_step(*args):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)

    train_imagenet.train_step = dying_step
    _train_tiny(rank, overrides)


def _train_tiny(rank, overrides):
    """`workers._train` with TinyNet, in a process of its own."""
    task_module.build_model = lambda num_classes, norm, **_: TinyNet(norm, num_classes)
    workers._train(rank, overrides)


def test_another_config_in_the_same_folder(tmp_path, tiny):
    """Refused, whether the run there has ended or not, and nothing is touched."""
    with crash_at(30), pytest.raises(Crash):
        train(tmp_path, "checkpoint_steps=1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="another config") as error:
        train(tmp_path, "norm=bn")
    assert "norm.name: sn there, bn asked for" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    train(tmp_path)
    with pytest.raises(ValueError, match="another config"):
        train(tmp_path, "norm=bn")


def test_resume_on_other_data_is_refused(tmp_path, tiny, monkeypatch):
    """The path is the machine's, but the images are the experiment's: their hash must not change.

    With more images than before the step of the checkpoint even means another place.
    """
    with crash_at(30), pytest.raises(Crash):
        train(tmp_path, "checkpoint_steps=1")
    build = train_imagenet.build_data

    def other_images(**options):
        data = build(**options | {"train_images": 11})
        data.sha256 = "0" * 64
        return data

    monkeypatch.setattr(train_imagenet, "build_data", other_images)
    with pytest.raises(ValueError, match="data"):
        train(tmp_path)


# --- divergence


def test_diverged_run_is_a_result(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(Setting, "lr", lambda *_: 1e30)  # which no config may have
    options = ["schedule.epochs=3"]
    with pytest.raises(FloatingPointError, match="loss is not finite at epoch 1, step"):
        train(tmp_path, *options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged" and "not finite" in summary["error"]
    assert summary["top1"] is None and summary["epochs"] == 0
    assert not set(REQUIRED) - summary.keys()
    before = (tmp_path / "summary.json").read_bytes()
    with pytest.raises(FloatingPointError, match="ended already: it diverged"):  # not tried again
        train(tmp_path, *options)
    assert (tmp_path / "summary.json").read_bytes() == before


def test_divergence_in_the_last_step_is_seen(tmp_path, tiny, monkeypatch):
    """No later step would notice: weights that are not finite are no finished run."""
    monkeypatch.setattr(Setting, "lr", lambda *_: 1e38)
    options = ["schedule.epochs=1", "data.train_images=8"]
    with contextlib.suppress(FloatingPointError):
        train(tmp_path, *options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged"
    for name in ("summary.json", "metrics.jsonl"):
        if (tmp_path / name).exists():  # NaN is not JSON
            for line in (tmp_path / name).read_text().splitlines():
                assert "NaN" not in line and "Infinity" not in line


def poison(monkeypatch, step, what):
    """Make the loss or one gradient of training step `step` (1 is the first) not finite."""
    cross_entropy, calls = F.cross_entropy, []

    def poisoned(logits, target, **options):
        if not logits.requires_grad:
            return cross_entropy(logits, target, **options)
        calls.append(step)
        if len(calls) != step:
            return cross_entropy(logits, target, **options)
        if what == "loss":
            return cross_entropy(logits, target, **options) * math.nan
        logits.register_hook(lambda grad: grad * math.inf)
        return cross_entropy(logits, target, **options)

    needs = train_imagenet.Task.needs

    def uncounted(task, run):
        estimated = needs(task, run)
        calls.clear()  # its forward pass is no step
        return estimated

    monkeypatch.setattr(F, "cross_entropy", poisoned)
    monkeypatch.setattr(train_imagenet.Task, "needs", uncounted)


@pytest.fixture(params=["host", "device"])
def decides(request):
    """Who decides whether an update is made."""
    return request.getfixturevalue("late") if request.param == "device" else None


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_stops_before_the_update(what, decides, tmp_path, tiny, monkeypatch):
    """The last checkpoint is that of the step before, whole and finite."""
    poison(monkeypatch, 7, what)
    with pytest.raises(FloatingPointError, match=f"{what} is not finite at epoch 2, step 3 of 4"):
        train(tmp_path, "checkpoint_steps=1")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (1, 2)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize(
    "what, emulation", [("loss", "grouped"), ("gradient", "accumulated")], ids=str
)
def test_a_skipped_step_changes_nothing_but_the_count(
    what, emulation, decides, tmp_path, tiny, monkeypatch
):
    options = ["max_skipped_steps=1", f"setting.emulation={emulation}", "schedule.epochs=1"]
    before, after = [], []
    step = train_imagenet.train_step

    def watched(run, *args):
        before.append(copy.deepcopy(run.model.state_dict()))
        result = step(run, *args)
        after.append(copy.deepcopy(run.model.state_dict()))
        return result

    monkeypatch.setattr(train_imagenet, "train_step", watched)
    poison(monkeypatch, 2, what)  # accumulated: one micro-batch of the first step
    summary = train(tmp_path, *options)
    bad = 1 if emulation == "grouped" else 0
    for name, value in before[bad].items():
        assert torch.equal(value, after[bad][name]), name
    moved = [not torch.equal(before[i]["fc.weight"], after[i]["fc.weight"]) for i in range(4)]
    assert moved == [i != bad for i in range(4)]
    assert summary["skipped_steps"] == 1 and summary["status"] == "finished"
    assert summary["images_seen"] == 32
    assert math.isfinite(lines(tmp_path / "metrics.jsonl")[0]["train/loss"])


def test_a_decision_of_the_device_is_known_a_step_later(tmp_path, tiny, late, monkeypatch):
    """Between checkpoints: the step is named, the weights are those of before it."""
    seen, step = [], train_imagenet.train_step

    def watched(task, run, *args):
        seen.append(copy.deepcopy(task.model.state_dict()))
        return step(task, run, *args)

    monkeypatch.setattr(train_imagenet, "train_step", watched)
    poison(monkeypatch, 2, "gradient")
    with pytest.raises(FloatingPointError) as error:
        train(tmp_path, "checkpoint_steps=0")
    assert "gradient is not finite at epoch 1, step 2 of 4" in str(error.value)
    assert "the gradient of" in str(error.value)  # that of step 2, though step 3 has made its own
    assert len(seen) == 3  # and no fourth
    for name, value in seen[1].items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, seen[2][name]), name


def test_who_decides_changes_no_bit(tmp_path, tiny, request):
    for name in ("host", "device"):
        train(tmp_path / name, "checkpoint_steps=3", "optimizer.gate_clip=0.1")
        request.getfixturevalue("late")
    states = [torch.load(tmp_path / name / "checkpoint.pt") for name in ("host", "device")]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    metrics = [lines(tmp_path / name / "metrics.jsonl") for name in ("host", "device")]
    for ours, theirs in zip(*metrics):
        assert ours | {"images_per_s": 0} == theirs | {"images_per_s": 0}


@pytest.mark.parametrize(
    "options",
    [
        ["norm=sn", "optimizer.gate_clip=0.1", "max_skipped_steps=1"],
        ["norm=bn", "setting.emulation=accumulated"],
    ],
    ids=" ".join,
)
def test_a_step_waits_for_nothing(options, tmp_path, tiny, late, monkeypatch, synchronisations):
    """Nothing of a step asks the device for a number; the first one may."""
    counts = {}

    def counting(owner, name):
        function, found = getattr(owner, name), counts.setdefault(name, [])

        def counted(*args, **kwargs):
            with synchronisations() as waits:
                result = function(*args, **kwargs)
            found.append(list(waits))
            return result

        monkeypatch.setattr(owner, name, counted)

    counting(train_imagenet, "train_step")
    counting(session.Session, "step_done")
    train(tmp_path, "checkpoint_steps=0", "schedule.epochs=1", *options)
    assert len(counts["train_step"]) == 4 and counts["train_step"][1:] == [[]] * 3
    assert counts["step_done"][:-1] == [[]] * 3  # the last one saves


def test_bad_images_of_a_run_are_counted(tmp_path, capsys):
    from PIL import Image

    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (9, 9)).save(tmp_path / part / label / f"{index}.png")
    for name in ("train/a/1.png", "train/b/2.png", "val/a/0.png"):
        (tmp_path / name).write_bytes(b"no image")
    options = ["data=imagenet", f"data.root={tmp_path}", "data.image_size=8", "data.resize=8"]
    options += ["model=resnet20", "schedule.epochs=2", "data.workers=0", "setting.gpus=2"]
    options += ["setting.images_per_gpu=2", "device=cpu", "data.max_bad_images=3"]
    out = tmp_path / "out"
    summary = train_imagenet.train(config(*options, f"output_dir={out}"))
    assert summary["bad_images"] == 3 and summary["status"] == "finished"
    listed = (out / "bad_images.txt").read_text()
    assert all(name in listed for name in ("train/a/1.png", "train/b/2.png", "val/a/0.png"))
    with pytest.raises(ValueError, match="3 unreadable images, more than data.max_bad_images=2"):
        train_imagenet.train(config(*options, "data.max_bad_images=2", f"output_dir={out}2"))


# --- settings


class ForeignNet(TinyNet):
    """TinyNet with one plain nn.BatchNorm2d, as some library models have."""

    def __init__(self, norm, num_classes=10):
        super().__init__(norm, num_classes)
        self.layer1[1] = nn.BatchNorm2d(8)
        self.fc.dropout = 0.0


def test_foreign_batch_norm_is_accumulated(tmp_path, monkeypatch, few):
    """A model with layers that know no groups equals its grouped twin, in float64."""

    def twin(num_classes, norm, **_):
        model = ForeignNet(norm, num_classes)
        plain = copy.deepcopy(model.layer1[1].state_dict())
        model.layer1[1] = sn.GhostBatchNorm2d(8)
        model.layer1[1].load_state_dict(plain)
        return model

    monkeypatch.setattr(
        task_module, "build_model", lambda num_classes, norm, **_: ForeignNet(norm, num_classes)
    )
    foreign = train(tmp_path / "foreign", "precision=fp64")
    monkeypatch.setattr(task_module, "build_model", twin)
    grouped = train(tmp_path / "grouped", "precision=fp64")
    assert foreign["setting"]["emulation"] == "accumulated"
    assert grouped["setting"]["emulation"] == "grouped"
    ours, theirs = (record(tmp_path / name) for name in ("foreign", "grouped"))
    for key, value in theirs["checkpoint"]["model"].items():
        torch.testing.assert_close(ours["checkpoint"]["model"][key], value, rtol=0, atol=1e-10)
    for key in ("train/loss", "val/loss"):
        assert ours["metrics"][1][key] == pytest.approx(theirs["metrics"][1][key], abs=1e-10)
    with pytest.raises(ValueError, match="compile=true would compile anew for every micro-batch"):
        train(tmp_path / "compiled", "compile=true", "setting.emulation=accumulated")
    with pytest.raises(ValueError, match="setting.emulation=accumulated"):
        monkeypatch.setattr(
            task_module,
            "build_model",
            lambda num_classes, norm, **_: ForeignNet(norm, num_classes),
        )
        train(tmp_path / "refused", "setting.emulation=grouped")


def test_timm_model_trains(tmp_path, few):
    summary = train(
        tmp_path,
        *("model=timm", "model.name=resnet10t", "norm=sn", "schedule.epochs=1"),
        *("data.train_images=8", "evaluation.batch_size=400"),
    )
    assert summary["status"] == "finished" and summary["setting"]["emulation"] == "grouped"
    assert summary["model"] == "resnet10t"


def test_lr_of_every_step(tmp_path, tiny, monkeypatch):
    """The rule 0.1 x total / 256, decayed within epochs at fractions of the run, gates apart."""
    seen = []
    step = train_imagenet.train_step

    def watched(run, *args):
        seen.append([group["lr"] for group in run.optimizer.param_groups])
        return step(run, *args)

    monkeypatch.setattr(train_imagenet, "train_step", watched)
    train(tmp_path, "optimizer.gate_lr_factor=0.5", "schedule.milestones=[0.25,0.6]")
    base = 0.1 * 8 / 256
    factors = [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
    assert [lr for lr, _ in seen] == pytest.approx([base * factor for factor in factors])
    assert [gate for _, gate in seen] == pytest.approx([base * f * 0.5 for f in factors])


def test_one_sgd_step_by_hand(tmp_path, tiny, monkeypatch):
    """Two steps of SGD with momentum and decay on every parameter, gates included, in float64."""
    from sn.training.classification.data import SettingSampler, TransformedImages

    captured = {}
    build = train_imagenet.build

    def captured_build(*args):
        run = build(*args)
        run.model.fc.dropout = 0.0
        captured["model"] = copy.deepcopy(run.model)
        captured["data"] = run.data
        return run

    monkeypatch.setattr(train_imagenet, "build", captured_build)
    options = ["precision=fp64", "schedule.epochs=1", "schedule.milestones=[]", "seed=3"]
    train(tmp_path, *options, "data.train_images=16")
    model, data = captured["model"].train(), captured["data"]
    images = TransformedImages(data.train, data.augmentation, 1, 3)
    velocity = {name: 0.0 for name, _ in model.named_parameters()}
    sampler = SettingSampler(16, 2, 4, seed=3)
    assert len(sampler) == 2
    for keys in sampler:
        x = torch.stack([images[key][0] for key in keys]).double()
        y = torch.tensor([images[key][1] for key in keys])
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = parameter.grad + 1e-4 * parameter
                velocity[name] = 0.9 * velocity[name] + gradient
                parameter -= 0.1 * 8 / 256 * velocity[name]
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-12, msg=name)


# --- switches


@pytest.mark.parametrize(
    "options",
    [
        ["precision=bf16"],
        ["precision=bf16", "channels_last=true", "norm=bn"],
        ["precision=fp16"],
        ["precision=fp64", "norm=gn"],
        ["model.dropout=0.5", "norm=ln"],
        ["schedule=cosine120", "schedule.epochs=2", "norm=in"],
        ["norm=sn_in_ln", "setting.images_per_gpu=1", "data.train_images=4"],
        ["norm=sn", "norm.statistics=[bn,gn]", "+norm.num_groups=4"],
    ],
    ids=" ".join,
)
def test_switches_run(options, tmp_path, few):
    summary = train(
        tmp_path, "schedule.epochs=1", "data.train_images=16", "evaluation.batch_size=400", *options
    )
    assert summary["status"] == "finished"
    assert summary["top1_batch_average"] is not None
    (line,) = lines(tmp_path / "metrics.jsonl")[-1:]
    assert math.isfinite(line["train/loss"]) and math.isfinite(line["val/loss"])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    wanted = torch.float64 if "precision=fp64" in options else torch.float32
    assert {v.dtype for k, v in state["model"].items() if "num_batches" not in k} == {wanted}
    if "norm.statistics=[bn,gn]" in options:
        assert summary["statistics"] == ["gn", "bn"]


def test_fp16_survives_that_its_first_steps_overflow(tmp_path, tiny, monkeypatch):
    """As ResNet-50's do at the usual scale. Memory that nothing has written is NaN here."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**30, enabled=enabled)
    )
    train(tmp_path, "schedule.epochs=8", "precision=fp16", "deterministic=true")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    steps, scale = lines(tmp_path / "metrics.jsonl")[-1]["step"], state["scaler"]["scale"]
    overflows = round(math.log2(2.0**30 / scale))
    assert 0 < overflows < steps
    momenta = [one["momentum_buffer"] for one in state["optimizer"]["state"].values()]
    assert momenta and all(torch.isfinite(momentum).all() for momentum in momenta)


def test_channels_last_is_the_same_run(tmp_path, tiny):
    a, b = (
        train(tmp_path / str(flag), "precision=fp64", f"channels_last={flag}")
        for flag in (False, True)
    )
    assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a compiler"
)
def test_compile_is_the_same_run(tmp_path, tiny):
    a, b = (
        train(tmp_path / str(flag), "schedule.epochs=1", f"compile={flag}")
        for flag in (False, True)
    )
    assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-3)
    assert_same(
        sorted(record(tmp_path / "True")["checkpoint"]["model"]),
        sorted(record(tmp_path / "False")["checkpoint"]["model"]),
        "names in the checkpoint",
    )


# --- the command line


def command_line(tmp_path, *arguments, world_size=1):
    """Exit code, stdout and stderr of `train_imagenet.py arguments` in a process of its own."""
    outputs = [(tmp_path / f"{rank}.out", tmp_path / f"{rank}.err") for rank in range(world_size)]
    group = [
        processes.Process(target=_command, args=(arguments, rank, world_size, *outputs[rank]))
        for rank in range(world_size)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    codes = {process.exitcode for process in group}
    for process in group:
        if process.is_alive():
            process.kill()
    assert len(codes) == 1, codes
    out, err = (path.read_text() for path in outputs[0])
    return codes.pop(), out, err


def _command(arguments, rank, world_size, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getppid() % 20000)}
    os.chdir(out.parent)
    torch.set_num_threads(1)
    script = str(ROOT / "train_imagenet.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["data=imagenet"], ["data.root"]),
        (["data=imagenet", "data.root=/no/such"], ["/no/such", "<root>/train/<class>/<image>"]),
        (["norm=gn", "norm.num_groups=7"], ["num_groups=7", "[1, 2, 4, 8, 16]"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_error_is_one_line(arguments, wanted, tmp_path):
    """Exit code 2 and a line without traceback that names the key, the value and what is valid."""
    code, out, err = command_line(tmp_path, "device=cpu", "output_dir=out", *arguments)
    assert code == 2, (code, out, err)
    assert err.startswith("train_imagenet.py: ") and err.count("\n") == 1, err
    for words in wanted:
        assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["data=cifar10", "data.root=/no/such"], ["/no/such", "cifar-10-batches-py"]),
        (["model=torchvision"], ["model.name"]),
        (["model=torchvision", "model.name=resnet5000"], ["resnet5000", "resnet50"]),
        (["norm.statistics=[xy]"], ["'xy'", "'bn'"]),
        (["data.train_images=5000"], ["5000", "1437"]),
        (["model.dropout=abc"], ["model.dropout=abc"]),
        (["model.dropout=1"], ["model.dropout=1"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_value_is_named(arguments, wanted, tmp_path, monkeypatch):
    """An error of the kind that `main` prints as one line: the key, the value, what is valid."""
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    options = ["schedule.epochs=1"]
    if "data" not in arguments[0]:
        options.append("data.train_images=8")
    with pytest.raises((ValueError, TypeError, OSError, OmegaConfBaseException)) as error:
        train(tmp_path / "out", *options, *arguments)
    for words in wanted:
        assert words in str(error.value)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["norm=xy"], ["norm=xy", "sn_in_ln"]),
        (["experiment=imagenet/table_9"], ["table_9"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_misspelt_option(arguments, wanted, tmp_path):
    """Hydra's own errors: no traceback, the word that is wrong, and not success."""
    code, out, err = command_line(tmp_path, *arguments, "output_dir=out")
    assert code not in (0, 3)
    assert "Traceback" not in out + err
    for words in wanted:
        assert words in err
    assert not (tmp_path / "out").exists()


def test_world_size_that_does_not_divide(tmp_path):
    code, _, err = command_line(
        tmp_path, "device=cpu", "setting.gpus=3", "output_dir=out", world_size=2
    )
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("train_imagenet.py")]
    assert "2 processes" in line and "[1, 3]" in line and "Traceback" not in err


def test_diverged_run_exits_with_3(tmp_path):
    options = ["device=cpu", "setting.gpus=1", "setting.images_per_gpu=4", "output_dir=out"]
    options += ["data.train_images=12", "schedule.epochs=4"]
    options += ["schedule.lr_per_256=1e4", "optimizer.weight_decay=1e4"]  # *10^6 a step
    for _ in range(2):  # and again when it is repeated
        code, _, err = command_line(tmp_path, *options)
        assert code == 3
        assert "not finite" in err and "Traceback" not in err
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "diverged"


def test_corrupt_image_is_one_line(tmp_path):
    """Its path reaches the user, from a loader's worker process too."""
    from PIL import Image

    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (9, 9)).save(tmp_path / part / label / f"{index}.png")
    bad = tmp_path / "train" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    options = ["device=cpu", "data=imagenet", f"data.root={tmp_path}", "data.image_size=8"]
    options += ["data.resize=8", "setting.gpus=1", "setting.images_per_gpu=4", "output_dir=out"]
    options += ["model=resnet20", "schedule.epochs=1"]
    code, _, err = command_line(tmp_path, *options, "data.workers=1", "data.max_bad_images=0")
    assert code == 2 and str(bad) in err
    assert "Traceback" not in err and err.count("\n") == 1


def test_progress_is_plain_lines_off_a_terminal(tmp_path):
    options = ["device=cpu", "setting.gpus=2", "setting.images_per_gpu=4", "output_dir=out"]
    code, out, err = command_line(
        tmp_path, *options, "data.train_images=8", "schedule.epochs=2", "schedule.lr_per_256=0.01"
    )
    assert code == 0 and err == ""
    assert "\r" not in out
    assert [line[:9] for line in out.splitlines() if line.startswith("epoch")] == [
        "epoch 1/2",
        "epoch 2/2",
    ]
    for word in ("loss", "top-1", "images/s", "left", "(2,4)", "8 training"):
        assert word in out
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", "0.out", "0.err"}  # no hydra folder, no log file

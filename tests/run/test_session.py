"""A run from its start to its end, on a toy task: no data, no time, every place to crash.

What holds here holds for every entrypoint, since all of them run through Session.
"""

import contextlib
import functools
import json
import math
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import assert_same, outcome, readable, wait_for
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader
from workers import processes, run_in_group

import sn
import style_transfer
from sn.training.classification.data import make_loader
from sn.training.detection.data import training_loader
from sn.training.run import checkpoint, entry, lock, record, session
from sn.training.run.config import RunConfig
from sn.training.run.session import Session
from sn.training.run.stopping import HANG_EXIT_CODE, Preempted, spare_worker

EPOCHS, STEPS, IMAGES = 3, 2, 6
SCORES = {2: 1.0, 4: 3.0, 6: 2.0}  # after so many steps: the best is neither first nor last
NAN = math.nan


def config(folder, **changed):
    values = dict(
        seed=0, precision="fp32", channels_last=False, device="cpu", deterministic=False,
        plan=False, log_steps=2, checkpoint_steps=0, keep_checkpoints=2,
        max_skipped_steps=0, timeout_minutes=30.0, note=None, run_name="toy",
        output_root="outputs", output_dir=str(folder),
    )  # fmt: skip
    return RunConfig(**(values | changed))


def begin(run, identity="these images", **options):
    """A linear model with a switchable norm; running statistics and momentum make a state."""
    torch.manual_seed(run.config.seed)
    model = nn.Sequential(nn.Linear(3, 4), sn.SwitchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run.begin(
        parts={"model": model, "optimizer": optimizer, "scaler": run.scaler},
        identity={"data": identity},
        facts={"task": "toy"},
        headline=("score", "loss"),
        importance=model,
        score="score",
        **options,
    )
    return model, optimizer


def images(number):
    return torch.randn(IMAGES, 3, generator=torch.Generator().manual_seed(number))


def train_step(run, model, optimizer, number):
    """One update towards the sum of the inputs; its loss, which counts unless it is skipped."""
    x = images(number)
    optimizer.zero_grad()
    run.guard.begin(model)
    loss = loss_of(model, x)
    loss.backward()
    if run.allows(loss, model, lambda: model(x)):
        optimizer.step()
        run.progress.add(loss=loss.item(), count=1)
        return loss.detach()
    return None


def loss_of(model, x):
    return (model(x)[:, 0] - x.sum(1)).square().mean()


@torch.no_grad()
def evaluate(run, model):
    model.eval()
    losses = [loss_of(model, images(-number)).item() for number in run.evaluating(range(1, 4))]
    model.train()
    return sum(losses)


def mean_loss(run):
    sums, run.progress.sums = run.progress.sums, {}
    return sums["loss"] / sums["count"] if sums else None


def by_epochs(cfg, identity="these images"):
    """As the classifiers: an evaluation ends an epoch, then metrics, then the checkpoint."""
    with Session(cfg) as run:
        if run.summary is not None:
            return run.has_ended("score", "score")
        model, optimizer = begin(run, identity, epochs=EPOCHS, steps=STEPS)
        for epoch in run.epochs():
            first = epoch * STEPS
            for _, step in run.steps(range(run.progress.step, STEPS), STEPS):
                loss = train_step(run, model, optimizer, first + step)
                run.step_done(IMAGES, lr=0.1, loss=loss)
            sums = run.progress.sums
            metrics = {"loss": sums["loss"] / sums["count"], "val": evaluate(run, model)}
            run.end_epoch(metrics, SCORES[first + STEPS])
        return run.finish({"score": 0.5, "loss": evaluate(run, model)})


def by_steps(cfg, identity="these images"):
    """As style transfer: a line of metrics for every step, before its checkpoint."""
    with Session(cfg, "step") as run:
        if run.summary is not None:
            return run.has_ended("score", "score")
        total = EPOCHS * STEPS
        model, optimizer = begin(run, identity, steps=total)
        for _, step in run.steps(range(run.progress.step, total), total):
            loss = train_step(run, model, optimizer, step)
            run.recorder.metrics(step + 1, {"loss": mean_loss(run)})
            if (step + 1) % 3 == 0:
                run.record_importance(step + 1)
            run.step_done(IMAGES, lr=0.1, loss=loss)
        return run.finish({"score": 0.5, "loss": evaluate(run, model)})


def by_steps_evaluated(cfg, identity="these images"):
    """As detection: a checkpoint, then the evaluation, then the metrics since the last ones."""
    with Session(cfg, "step") as run:
        if run.summary is not None:
            return run.has_ended("score", "score")
        total = EPOCHS * STEPS
        model, optimizer = begin(run, identity, steps=total, records_after_saving=True)

        def recorded(count):
            run.recorder.metrics(count, {"loss": mean_loss(run), "val": evaluate(run, model)})
            run.record_importance(count)
            run.scored(SCORES[count])

        if run.progress.sums and run.progress.step in SCORES:  # stopped before it was recorded
            recorded(run.progress.step)
        for _, step in run.steps(range(run.progress.step, total), total):
            loss = train_step(run, model, optimizer, step)
            run.step_done(IMAGES, step + 1 in SCORES, lr=0.1, loss=loss)
            if step + 1 in SCORES:
                recorded(step + 1)
        return run.finish({"score": 0.5, "loss": evaluate(run, model)})


KINDS = [by_epochs, by_steps, by_steps_evaluated]
kinds = pytest.mark.parametrize("train", KINDS)


class Events:
    """In place of TensorBoard's writer."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None


@pytest.fixture
def quick(monkeypatch, no_git):
    """No events, no figures, no waiting for the disk."""
    monkeypatch.setattr(session, "environment", lambda device: {"versions": {"python": "3"}})
    monkeypatch.setattr(record, "importance_figure", lambda averages: None)
    monkeypatch.setattr(record, "SummaryWriter", Events)
    monkeypatch.setattr(os, "fsync", lambda file: None)


# --- crashes


class Crash(BaseException):
    """What a crash raises: nothing in the code catches it."""


@contextlib.contextmanager
def crash_at(event, folder=None):
    """Raise Crash at the `event`-th moment just before or after a call that matters.

    Yields the moments passed: (name, the files of `folder` then), so that a run with None counts.
    """
    passed = []

    def moment(name):
        passed.append((name, on_disk(folder) if folder else None))
        if len(passed) - 1 == event:
            raise Crash(name)

    def wrap(owner, name):
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            moment(f"before {name}")
            result = function(*args, **kwargs)
            moment(f"after {name}")
            return result

        patch.setattr(owner, name, wrapped)

    def evaluating(self, batches, where="evaluation"):
        for batch in given(self, batches, where):
            moment("in the evaluation")
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_step", "evaluate"):
            wrap(sys.modules[__name__], name)
        for name in ("step_done", "end_epoch", "scored"):
            wrap(Session, name)
        for name in ("open", "metrics", "step", "importance", "finish"):
            wrap(session.Recorder, name)
        for name in ("save_checkpoint", "newest_checkpoint"):
            wrap(session, name)
        wrap(torch, "save")
        for name in ("replace", "link"):  # of every file that is put in place
            wrap(os, name)
        given = Session.evaluating
        patch.setattr(Session, "evaluating", evaluating)
        yield passed


def on_disk(folder):
    """Which files there are and whether they are others than before; not who holds the lock."""
    found = folder.iterdir() if folder.exists() else ()
    stats = {path.name: path.stat() for path in found if path.name != ".lock"}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def crash_everywhere(train, tmp_path, every, **options):
    """Crash at every moment, or at the first of those with the same files: nothing else is left."""
    whole = tmp_path / "whole"
    with crash_at(None, whole) as moments:
        train(config(whole, **options))
    expected = outcome(whole)
    names = [name for name, _ in moments]
    assert len(names) > 50 and ("before link" in names or train is by_steps)
    assert {"after replace", "in the evaluation", "before save", "after finish"} <= set(names)
    momenta = expected["checkpoint"]["optimizer"]["state"].values()
    assert all(state["momentum_buffer"].abs().sum() > 0 for state in momenta)
    failures, before = [], None
    for event, (name, left) in enumerate(list(moments)):
        if left == before and not every:
            continue
        before = left
        folder = tmp_path / str(event)
        with crash_at(event), pytest.raises(Crash):
            train(config(folder, **options))
        readable(folder)
        train(config(folder, **options))
        try:
            assert_same(outcome(folder), expected)
        except AssertionError as error:
            failures.append(f"{name} ({event} of {len(moments)}): {str(error).splitlines()[0]}")
        left = list(folder.glob("*.tmp"))
        failures += [f"{name} ({event} of {len(moments)}): leaves {left}"] if left else []
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("checkpoint_steps", [0, 1])
@kinds
def test_resumed_run_equals_unbroken_one(train, checkpoint_steps, tmp_path, quick):
    """Wherever it crashes, bit for bit: weights, momenta, records, the best checkpoint."""
    crash_everywhere(train, tmp_path, every=False, checkpoint_steps=checkpoint_steps)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [2, 3])
@kinds
def test_resumed_run_equals_unbroken_one_at_every_moment(train, keep, tmp_path, quick):
    crash_everywhere(train, tmp_path, every=True, checkpoint_steps=1, keep_checkpoints=keep)


@kinds
def test_crashes_again_and_again(train, tmp_path, quick):
    """Each attempt gets a little further, as on a machine that keeps being taken away."""
    train(config(tmp_path / "whole", checkpoint_steps=1))
    attempts, folder = 0, tmp_path / "broken"
    while not (folder / "summary.json").exists() and attempts < 60:
        attempts += 1
        with crash_at(34), contextlib.suppress(Crash):
            train(config(folder, checkpoint_steps=1))
    assert 2 < attempts < 60
    assert_same(outcome(folder), outcome(tmp_path / "whole"), f"{attempts} attempts")


@kinds
def test_the_newest_checkpoint_is_broken(train, tmp_path, quick, monkeypatch, capsys):
    """The one before is taken, with a warning; the broken one cannot become the best."""
    train(config(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        send_at(patch, HERE, "train_step", 5, signal.SIGTERM)
        with pytest.raises(Preempted):
            train(config(tmp_path / "broken", checkpoint_steps=4))
    newest = tmp_path / "broken" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    train(config(tmp_path / "broken"))
    assert "cannot read checkpoint" in capsys.readouterr().err
    assert_same(outcome(tmp_path / "broken"), outcome(tmp_path / "whole"))


@kinds
def test_best_checkpoint_is_that_of_the_highest_score(train, tmp_path, quick):
    """SCORES is highest in the middle; a run by steps without a validation keeps none."""
    summary = train(config(tmp_path, keep_checkpoints=2))
    if train is by_steps:
        assert summary["best_score"] is None
        assert not (tmp_path / "checkpoint_best.pt").exists()
        return
    assert summary["best_score"] == 3.0
    best = checkpoint.load_checkpoint(tmp_path / "checkpoint_best.pt")["progress"]
    last = checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")["progress"]
    assert (best["epoch"] * STEPS + best["step"], last["epoch"] * STEPS + last["step"]) == (4, 6)


def test_lines_are_on_disk_before_the_checkpoint_that_counts_them(tmp_path, quick, monkeypatch):
    order, sync, save = [], session.Recorder.sync, session.save_checkpoint

    def synced(recorder):
        sync(recorder)
        order.append("sync")

    def saved(path, state, *rest):
        order.append(state["lines"]["metrics.jsonl"] if "metrics.jsonl" in state["lines"] else 0)
        save(path, state, *rest)

    monkeypatch.setattr(session.Recorder, "sync", synced)
    monkeypatch.setattr(session, "save_checkpoint", saved)
    by_epochs(config(tmp_path))
    counts = [count for count in order if count != "sync"]
    assert order[:-1] == [x for count in counts for x in ("sync", count)]
    assert sorted(set(counts)) == list(range(EPOCHS + 1)) and order[-1] == "sync"


# --- when a checkpoint is due


def saves(train, monkeypatch, cfg):
    """(epochs, steps) done at each checkpoint of the run."""
    found = []
    save = session.save_checkpoint

    def watched(path, state, *rest):
        found.append((state["progress"]["epoch"], state["progress"]["step"]))
        save(path, state, *rest)

    monkeypatch.setattr(session, "save_checkpoint", watched)
    train(cfg)
    return found


def test_checkpoints_are_due(tmp_path, quick, monkeypatch):
    """After `checkpoint_steps` steps, before an evaluation, after the one that ends an epoch."""
    ends = [[(epoch, STEPS), (epoch + 1, 0)] for epoch in range(EPOCHS)]
    assert saves(by_epochs, monkeypatch, config(tmp_path / "0")) == [*ends[0], *ends[1], *ends[2]]
    found = saves(by_epochs, monkeypatch, config(tmp_path / "1", checkpoint_steps=1))
    assert found == [(0, 1), *ends[0], (1, 1), *ends[1], (2, 1), *ends[2]]
    assert saves(by_steps, monkeypatch, config(tmp_path / "2")) == [(0, 6)]
    found = saves(by_steps, monkeypatch, config(tmp_path / "3", checkpoint_steps=3))
    assert found == [(0, 3), (0, 6)]
    found = saves(by_steps, monkeypatch, config(tmp_path / "5", checkpoint_steps=5))
    assert found == [(0, 5), (0, 6)]
    found = saves(by_steps_evaluated, monkeypatch, config(tmp_path / "4", checkpoint_steps=3))
    assert found == [(0, 2), (0, 3), (0, 4), (0, 6)]


def test_number_of_checkpoints_kept(tmp_path, quick):
    by_steps(config(tmp_path, checkpoint_steps=1, keep_checkpoints=3))
    found = {
        path.name: checkpoint.load_checkpoint(path)["progress"]["step"]
        for path in tmp_path.glob("*.pt")
    }
    names = ("checkpoint.pt", "checkpoint_previous.pt", "checkpoint_previous2.pt")
    assert found == dict(zip(names, (6, 5, 4)))


# --- signals


def send_at(monkeypatch, owner, name, call, number):
    """Let this process get a signal in the `call`-th call of a function."""
    function, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HERE = sys.modules[__name__]
PLACES = {  # what the process is in when the signal comes, and the call of it
    "a step": ("train_step", 3),
    "the last step of an epoch": ("train_step", 4),
    "the last step": ("train_step", 6),
    "an evaluation": ("loss_of", STEPS + 2),
    "the final evaluation": ("evaluate", -1),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("place", PLACES)
@kinds
def test_told_to_stop(train, place, number, tmp_path, quick, monkeypatch, capsys):
    """Saved, exit code 75, no file broken; the same command ends like a run never told to."""
    if number != signal.SIGTERM and place != "a step":
        return
    name, call = PLACES[place]
    if call == -1:
        call = 1 if train is by_steps else EPOCHS + 1
    if place == "an evaluation" and train is by_steps:
        call = EPOCHS * STEPS + 2
    before = signal.getsignal(number)
    train(config(tmp_path / "whole"))
    folder, cfg = tmp_path / "stopped", OmegaConf.structured(config(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        send_at(patch, HERE, name, call, number)
        with pytest.raises(SystemExit) as end:
            entry.run(train, cfg)
    assert end.value.code == 75
    line = capsys.readouterr().err
    assert "stopped by a signal" in line and "the same command goes on" in line
    assert line.count("\n") == 1 and "Traceback" not in line
    assert ("saved after" in line) == ("step" in place)
    readable(folder)
    assert not list(folder.glob("*.tmp")) and not (folder / "summary.json").exists()
    progress = checkpoint.load_checkpoint(folder / "checkpoint.pt")["progress"]
    if place == "a step":
        assert progress["epoch"] * STEPS + progress["step"] == 3
    assert signal.getsignal(number) == before
    train(config(folder))
    assert_same(outcome(folder), outcome(tmp_path / "whole"), place)


# --- lines of steps


@pytest.mark.parametrize("log_steps", [0, 1, 2, 3])
@kinds
def test_lines_of_steps(train, log_steps, tmp_path, quick, monkeypatch, capsys):
    """Means of the steps since the last line, which an epoch's end forgets; metrics are others."""
    losses, step = [], HERE.train_step

    def watched(*args):
        losses.append(step(*args))
        return losses[-1]

    monkeypatch.setattr(HERE, "train_step", watched)
    train(config(tmp_path, log_steps=log_steps, max_skipped_steps=1))
    losses = [loss.item() for loss in losses]
    total, ends = EPOCHS * STEPS, set()
    if train is by_epochs:
        due = [
            n for n in range(1, total + 1) if log_steps and ((n - 1) % STEPS + 1) % log_steps == 0
        ]
        ends = set(range(0, total, STEPS))
    else:
        also = SCORES if train is by_steps_evaluated else {total}
        due = [n for n in range(1, total + 1) if n in also or log_steps and n % log_steps == 0]
    path = tmp_path / "steps.jsonl"
    found = record.read_jsonl(path) if path.exists() else []
    assert [line["step"] for line in found] == due
    printed = capsys.readouterr().out
    for line, last, this in zip(found, [0, *due], due):
        first = max(n for n in {last, *ends} if n < this)
        assert line["loss"] == pytest.approx(sum(losses[first:this]) / (this - first))
        assert line["lr"] == 0.1 and line["images_per_s"] > line["steps_per_s"] > 0
        assert line.get("epoch") == ((this - 1) // STEPS + 1 if train is by_epochs else None)
        assert printed.count(f"loss {line['loss']:.4g}  lr 0.1  ") == 1
    assert printed.count(" left") == len(due)


@kinds
def test_lines_of_steps_pass_over_skipped_updates(train, tmp_path, quick, monkeypatch):
    """One whose updates were all skipped is left out; and nothing is not a number in one."""
    poison(monkeypatch, [1, 2, 4], "loss")
    options = dict(max_skipped_steps=3, log_steps=1 if train is by_epochs else 2)
    with contextlib.suppress(KeyError):  # the toy's epoch without a step
        train(config(tmp_path, **options))
    if train is by_epochs:
        assert not (tmp_path / "steps.jsonl").exists()
        return
    found = record.read_jsonl(tmp_path / "steps.jsonl")
    assert [line["step"] for line in found] == [4, 6]
    assert all(math.isfinite(line["loss"]) for line in found)


def test_no_lines_of_steps_on_a_terminal(tmp_path, quick, monkeypatch, capsys):
    """A bar is there; a log beside it still gets them."""
    monkeypatch.setattr(session, "is_terminal", lambda stream: True)
    bar = session.progress_bar
    monkeypatch.setattr(session, "progress_bar", lambda *args: shown(bar(*args)))
    by_epochs(config(tmp_path, log_steps=1))
    assert " left" not in capsys.readouterr().out
    assert len(record.read_jsonl(tmp_path / "steps.jsonl")) == EPOCHS * STEPS


def shown(bar):
    bar.disable = False
    bar.set_postfix_str = bar.update = bar.close = lambda *_, **__: None
    return bar


def test_events_of_a_stopped_run_are_not_lost(tmp_path, no_git, monkeypatch):
    """What was recorded before the signal is in TensorBoard's file when the process ends."""
    send_at(monkeypatch, HERE, "train_step", STEPS + 1, signal.SIGTERM)
    with pytest.raises(Preempted):
        by_epochs(config(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("6_importance/mean/stem/bn")] == [0, 1000]


@pytest.mark.parametrize("place, told", [("step 2 of 2", 1), ("evaluation", 0)])
def test_a_signal_to_another_process_stops_this_one_too(place, told, tmp_path, quick, monkeypatch):
    """The sum over processes says so: `together` in a step, `evaluating` at its end."""
    sums = []

    def summed(values):
        if len(sums) == told:
            values.view(-1)[-1] += 1
        sums.append(1)
        return values

    with Session(config(tmp_path)) as run:
        begin(run, epochs=EPOCHS, steps=STEPS)
        object.__setattr__(run.processes, "world_size", 2)
        monkeypatch.setattr(session.distributed, "in_main", lambda write, _: write())
        monkeypatch.setattr(session.distributed, "sum_over_processes", summed)
        with pytest.raises(Preempted, match=place):
            for _, _ in run.steps(range(STEPS), STEPS):
                if place == "evaluation":
                    list(run.evaluating([1, 2]))
                totals = run.together(torch.ones(2, dtype=torch.float64))
                assert totals.tolist() == [1, 1]
                run.step_done(IMAGES)
        assert not run.stop.requested


def test_nohup_is_respected(monkeypatch):
    """A signal that the process was started to ignore does not stop it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with session.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- numbers that are not finite


def poison(monkeypatch, steps, what):
    """Make the loss or a gradient of these steps (1 is the first) not finite."""
    given, count = HERE.loss_of, iter(range(1, 1000))

    def poisoned(model, x):
        loss = given(model, x)
        if not loss.requires_grad or next(count) not in steps:
            return loss
        if what == "loss":
            return loss * NAN
        loss.register_hook(lambda grad: grad * math.inf)
        return loss

    monkeypatch.setattr(HERE, "loss_of", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@kinds
def test_divergence_is_a_result(train, what, tmp_path, quick, monkeypatch, capsys):
    """A summary that says so, the checkpoint of the step before, exit code 3, repeated too."""
    poison(monkeypatch, [4], what)
    cfg = OmegaConf.structured(config(tmp_path, checkpoint_steps=1))
    where = "epoch 2, step 2 of 2" if train is by_epochs else "step 4 of 6"
    for said in (f"{what} is not finite at {where}", "has ended already: it diverged"):
        with pytest.raises(SystemExit) as end:
            entry.run(train, cfg)
        assert end.value.code == 3 and said in capsys.readouterr().err
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["status"] == "diverged" and where in summary["error"]
        assert summary["score"] is None and summary["loss"] is None and summary["task"] == "toy"
        assert summary["images_seen"] == 3 * IMAGES and summary["wall_s"] >= 0
        state = checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")
        done = (state["progress"]["epoch"], state["progress"]["step"])
        assert done == ((1, 1) if train is by_epochs else (0, 3))
        assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_fp16_that_makes_no_step_any_more_has_diverged(tmp_path, quick, monkeypatch):
    """GradScaler itself would go on for ever, at a scale of 0."""
    with Session(config(tmp_path, precision="fp16")) as run:
        model, optimizer = begin(run, epochs=1, steps=1000)
        run.where = "step 7"
        with pytest.raises(FloatingPointError, match="gradient is not finite at step 7, however"):
            for _ in range(100):
                optimizer.zero_grad()
                loss = run.scaler.scale(loss_of(model, images(0)))
                loss.register_hook(lambda grad: grad * math.inf)
                loss.backward()
                run.update(optimizer, loss.detach(), model)
        assert not optimizer.state and 0 < run.scaler.get_scale() < 2.0**-19


@pytest.mark.parametrize("what", ["loss", "gradient"])
@kinds
def test_skipped_steps(train, what, tmp_path, quick, monkeypatch, capsys):
    """They change no weight and no statistic, count, and are remembered by a resumed run."""
    cfg = dict(checkpoint_steps=1, max_skipped_steps=2)
    seen, step = [], HERE.train_step

    def watched(run, model, *rest):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        loss = step(run, model, *rest)
        same = [torch.equal(value, before[name]) for name, value in model.state_dict().items()]
        seen.append(all(same) if all(same) or not any(same[:2]) else None)
        return loss

    with monkeypatch.context() as patch:
        poison(patch, [2, 5], what)
        patch.setattr(HERE, "train_step", watched)
        summary = train(config(tmp_path / "whole", **cfg))
    assert seen == [number in (2, 5) for number in range(1, 7)]
    assert summary["skipped_steps"] == 2 and summary["status"] == "finished"
    assert capsys.readouterr().err.count("step skipped") == 2
    with monkeypatch.context() as patch:
        poison(patch, [2], what)
        send_at(patch, HERE, "train_step", 3, signal.SIGTERM)
        with pytest.raises(Preempted):
            train(config(tmp_path / "more", **cfg))
    poison(monkeypatch, [1, 2], what)  # one too many, with the one before the signal
    with pytest.raises(FloatingPointError, match="2 steps were skipped before"):
        train(config(tmp_path / "more", **cfg))
    summary = json.loads((tmp_path / "more" / "summary.json").read_text())
    assert summary["skipped_steps"] == 2 and summary["status"] == "diverged"


# --- the folder


@kinds
def test_a_finished_run_is_left_alone(train, tmp_path, quick, capsys):
    first = train(config(tmp_path))
    before = files(tmp_path)
    assert train(config(tmp_path)) == first
    assert files(tmp_path) == before
    assert "has ended already: score 0.5" in capsys.readouterr().out


@kinds
def test_other_data_or_config_is_refused(train, tmp_path, quick, monkeypatch):
    """Before anything is written."""
    send_at(monkeypatch, HERE, "train_step", 3, signal.SIGTERM)
    with pytest.raises(Preempted):
        train(config(tmp_path))
    before = files(tmp_path)
    lock_file = tmp_path / ".lock"
    for changed, message in (
        ({"identity": "other images"}, "trained with other data: these images there, other images"),
        ({"seed": 1}, "seed: 0 there, 1 asked for"),
    ):
        identity = changed.pop("identity", "these images")
        with pytest.raises(ValueError, match=message):
            train(config(tmp_path, **changed), identity)
        assert files(tmp_path) | {lock_file: b""} == before | {lock_file: b""}
    train(config(tmp_path, checkpoint_steps=2, note="moved", timeout_minutes=5.0))  # the machine's


def test_a_network_that_refuses_the_images_is_one_line(tmp_path):
    """timm's and torchvision's transformers assert their size, of which a run would die later."""

    def need():
        raise AssertionError("Input height (8) doesn't match model (224).")

    with pytest.raises(ValueError, match=r"network refuses its input: Input height \(8\)"):
        with Session(config(tmp_path)) as run:
            run.warn_of(need)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, quick, monkeypatch):
    send_at(monkeypatch, HERE, "train_step", 3, signal.SIGTERM)
    with pytest.raises(Preempted):
        by_epochs(config(tmp_path))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["model"]["0.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt does not fit this run"):
        by_epochs(config(tmp_path))


def test_what_another_run_wrote_meanwhile_is_seen(tmp_path, quick, monkeypatch):
    """Both began in an empty folder; the second gets the lock when the first has ended."""
    take = lock.FolderLock.acquire

    def second(self, *args):
        monkeypatch.setattr(lock.FolderLock, "acquire", take)
        by_epochs(config(tmp_path, seed=first))
        take(self, *args)

    for first, error, message in (
        (1, ValueError, "run of another config"),
        (0, lock.Busy, "ended meanwhile"),
    ):
        monkeypatch.setattr(lock.FolderLock, "acquire", second)
        with pytest.raises(error, match=message):
            by_epochs(config(tmp_path, seed=0))
        assert json.loads((tmp_path / "summary.json").read_text())["seed"] == first
        for path in tmp_path.glob("*.*"):
            path.unlink() if path.is_file() else None


# --- a run in a process of its own


def in_process(function, *args):
    process = processes.Process(target=function, args=args)
    process.start()
    return process


def long_run(folder, worker=False, timeout=30.0):
    """A run whose steps take no time but that never ends; with `worker`, a forked one as data."""
    torch.set_num_threads(1)
    step = HERE.train_step

    def slow(run, *rest):
        if worker and not (folder / "worker").exists():
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            (folder / "worker").write_text(str(child))
        (folder / "begun").touch()
        time.sleep(60)
        step(run, *rest)

    HERE.train_step = slow
    entry.run(by_epochs, OmegaConf.structured(config(folder, timeout_minutes=timeout)))


@contextlib.contextmanager
def running(folder, **options):
    process = processes.Process(target=long_run, args=(folder,), kwargs=options)
    process.start()
    try:
        wait_for((folder / "begun").exists, 60)
        yield process
    finally:
        process.kill()
        process.join()


def try_now(folder):
    """Start the same run in this process; the exit code (None: it was allowed to) and what it says.

    POSIX locks do not stop their own process, but this one holds none.
    """
    with pytest.MonkeyPatch.context() as patch:
        acquire = lock.FolderLock.acquire
        patch.setattr(lock.FolderLock, "acquire", lambda self: acquire(self, patience=0.3))
        try:
            entry.run(by_epochs, OmegaConf.structured(config(folder)))
        except SystemExit as end:
            return end.code
    return None


def test_one_writer_per_folder(tmp_path, quick, capsys):
    """A second run says who has the folder; a suspended owner keeps it, a killed one does not."""
    with running(tmp_path) as owner:
        before = files(tmp_path)
        for suspended in (False, True):
            if suspended:
                os.kill(owner.pid, signal.SIGSTOP)
            assert try_now(tmp_path) == 73
            line = capsys.readouterr().err
            assert f"is in use by process {owner.pid} on {os.uname().nodename} since 20" in line
            assert line.count("\n") == 1
        assert files(tmp_path) == before
        os.kill(owner.pid, signal.SIGKILL)
        owner.join()
        assert try_now(tmp_path) is None
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


def one_of_a_group(rank, folder, summary_for=None):
    """Start the run as a rank of a group; `summary_for`: the one rank that sees a summary."""
    if summary_for is not None:
        read = record.Recorder.summary
        record.Recorder.summary = lambda self: read(self) if rank == summary_for else None
    lock.FolderLock.acquire = functools.partialmethod(lock.FolderLock.acquire, 0.3)
    entry.run(by_epochs, OmegaConf.structured(config(folder)))


def test_all_ranks_end_with_the_code_of_a_folder_in_use(tmp_path, quick):
    with running(tmp_path), pytest.raises(RuntimeError, match=r"exit codes \[73, 73\]"):
        run_in_group(2, one_of_a_group, tmp_path)


def test_the_main_rank_says_for_all_whether_a_run_has_ended(tmp_path, quick):
    """Another machine may see the summary late, or that of a run which ends just now early."""
    by_epochs(config(tmp_path))
    for sees_it in range(2):  # else one would end, the other wait for it
        run_in_group(2, one_of_a_group, tmp_path, sees_it)


def asked_otherwise(rank, folder, values):
    with open(f"{folder}{rank}", "w") as said, contextlib.redirect_stderr(said):
        entry.run(by_epochs, OmegaConf.structured(config(folder, **(values if rank else {}))))


@pytest.mark.parametrize(
    "values, wanted",
    [
        ({"seed": 8}, "different seed;"),
        ({"checkpoint_steps": 1, "precision": "fp64"}, "different precision, checkpoint_steps;"),
        ({"log_steps": 3, "note": "mine", "timeout_minutes": 7.0}, None),
    ],
)
def test_processes_with_different_commands_all_say_so(values, wanted, tmp_path):
    """On several machines each is typed by hand; an lr of its own would let the weights drift."""
    if wanted is None:  # where they belong to the machine
        return run_in_group(2, asked_otherwise, tmp_path, values)
    with pytest.raises(RuntimeError, match=r"exit codes \[2, 2\]"):
        run_in_group(2, asked_otherwise, tmp_path, values)
    said = [Path(f"{tmp_path}{rank}").read_text() for rank in range(2)]
    assert all(f"the processes were started with {wanted}" in text for text in said), said
    assert not list(tmp_path.iterdir())


def with_own_images(rank, folder, crash, **changed):
    """Forward passes over images of the process's own; `crash`: where it ends without a word."""
    with Session(config(folder, **changed)) as run:
        model = nn.Sequential(sn.SwitchNorm1d(200), nn.BatchNorm1d(200))
        run.begin({"model": model}, {"data": ""}, {}, (), epochs=2, steps=7)
        for epoch in run.epochs():
            for _, step in run.steps(range(run.progress.step, 7), 7):
                if (epoch, step) == crash:
                    return
                generator = torch.Generator().manual_seed(100 * epoch + 10 * step + rank)
                model(torch.randn(4, 200, generator=generator) + rank)
                run.step_done()
            run.end_epoch({})
        run.finish({})


def test_of_two_processes_each_goes_on_with_its_own_running_statistics(tmp_path):
    """Averaged at every checkpoint, they would be rounded where one is due or a signal comes."""
    run_in_group(2, with_own_images, tmp_path / "whole", None)
    often = functools.partial(with_own_images, checkpoint_steps=3)
    for crash in ((0, 5), (1, 4), None):
        run_in_group(2, often, tmp_path / "b", crash)
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "b")
    )
    assert "running_statistics" not in whole
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    expected = torch.zeros(200, dtype=torch.double)
    for rank in range(2):
        mean = torch.zeros(200, dtype=torch.double)
        for number in (*range(7), *range(10, 17)):
            generator = torch.Generator().manual_seed(10 * number + rank)
            x = torch.randn(4, 200, generator=generator) + rank
            mean = 0.9 * mean + 0.1 * x.double().mean(0)
        expected += mean / 2
    torch.testing.assert_close(whole["model"]["0.running_mean"].double(), expected)


def apart(rank, folder, what):
    """Start the run as a rank of a group whose second machine sees other files."""
    if rank == 1 and what != "other data":
        found = session.newest_checkpoint
        number = 1 if what == "an older checkpoint" else None

        def seen(path, needed):
            older = checkpoint._previous(Path(path), number) if number else None
            return (older, found(older, needed)[1]) if older else None

        session.newest_checkpoint = seen
    identity = f"images of {rank}" if what == "other data" else "these images"
    with open(f"{folder}{rank}", "w") as said, contextlib.redirect_stderr(said):
        task = functools.partial(by_epochs, identity=identity)
        entry.run(task, OmegaConf.structured(config(folder)))


@pytest.mark.parametrize("what", ["no checkpoint", "an older checkpoint", "other data"])
def test_processes_that_would_begin_apart_all_say_so(what, tmp_path, quick, monkeypatch):
    """A folder on each machine instead of a shared one, a file that is seen late, other images."""
    if what != "other data":
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            send_at(patch, HERE, "train_step", 4, signal.SIGTERM)
            by_epochs(config(tmp_path, checkpoint_steps=1))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    with pytest.raises(RuntimeError, match=r"exit codes \[2, 2\]"):
        run_in_group(2, apart, tmp_path, what)
    said = [Path(f"{tmp_path}{rank}").read_text() for rank in range(2)]
    assert all("the processes do not begin alike" in line for line in said), said
    if what == "no checkpoint":
        assert "process 0 finds checkpoint.pt after epoch 1 and step 2" in said[0]
        assert "process 1 finds no checkpoint" in said[1]
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_data_worker_outlives_a_signal_to_its_group(number):
    """As torchrun and Slurm send it: the run has to save, for which its workers must not end."""
    loader = DataLoader(range(40), num_workers=1, worker_init_fn=spare_worker)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    assert len(list(batches)) == 39


def test_a_data_worker_ends_when_the_main_process_says_so():
    """With the run, too: else every run that fails would wait for its workers."""
    batches = iter(DataLoader(range(40), num_workers=1, worker_init_fn=spare_worker))
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_every_training_loader_spares_its_workers(tmp_path):
    cpu = torch.device("cpu")
    task = SimpleNamespace(crops=[], config=SimpleNamespace())
    task.config.schedule = SimpleNamespace(batch_size=1, steps=1)
    task.config.photos = SimpleNamespace(workers=1)
    for loader in (
        make_loader([], [], 1, cpu),
        training_loader([], [], 1, cpu),
        style_transfer.photo_loader(task, SimpleNamespace(device=cpu), 0),
    ):
        assert loader.worker_init_fn is spare_worker


def test_a_data_worker_does_not_keep_the_folder(tmp_path, quick):
    """It outlives a killed owner for a while, with a copy of the lock's open file."""
    with running(tmp_path, worker=True) as owner:
        wait_for(lambda: (tmp_path / "worker").exists() and (tmp_path / "worker").read_text())
        worker = int((tmp_path / "worker").read_text())
        os.kill(owner.pid, signal.SIGKILL)
        owner.join()
        try:
            os.kill(worker, 0)  # it is alive
            assert try_now(tmp_path) is None
        finally:
            os.kill(worker, signal.SIGKILL)


def output_is(fd, path, folder):
    """A whole run, twice, whose stdout (1) or stderr (2) is closed or takes nothing."""
    torch.set_num_threads(1)
    if path is None:
        os.close(fd)
        if fd == 2:
            sys.stderr = None  # as Python itself does
        else:
            sys.stdout = None
    else:
        os.dup2(os.open(path, os.O_WRONLY), fd)
        stream = open(fd, "w", closefd=False)
        setattr(os.sys, "stdout" if fd == 1 else "stderr", stream)
    poison(pytest.MonkeyPatch(), [3], "loss")  # a warning on stderr
    for _ in range(2):  # the second says that it has ended
        entry.run(by_epochs, OmegaConf.structured(config(folder, max_skipped_steps=1)))


OUTPUTS = [  # stdout and stderr, full and closed: each alike in the short suite
    (1, "/dev/full"),
    (2, None),
    pytest.param(1, None, marks=pytest.mark.slow),
    pytest.param(2, "/dev/full", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("fd, path", OUTPUTS)
def test_an_output_that_is_gone_does_not_end_a_run(fd, path, tmp_path):
    process = in_process(output_is, fd, path, tmp_path)
    process.join(60)
    assert process.exitcode == 0
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


def test_exit_code_of_a_run_whose_output_is_gone():
    """What is left in the buffer of stdout must not turn a good end into exit code 120."""
    source = Path(session.__file__).with_name("display.py").read_text()  # alone: without torch
    program = f"{source}\nsay('first')\nsay('second')\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-c", program]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def on_a_terminal(folder, slave):
    torch.set_num_threads(1)
    os.setsid()
    file = os.open(slave, os.O_RDWR)  # the controlling terminal of the new session
    for fd in (0, 1, 2):
        os.dup2(file, fd)
    os.close(file)
    sys.stderr = open(2, "w", closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    step = HERE.train_step

    def slow(run, *rest):
        step(run, *rest)
        run.say("a step")
        (folder / "begun").touch()
        for _ in range(600):
            if run.stop.requested:
                break
            time.sleep(0.1)

    HERE.train_step = slow
    entry.run(by_epochs, OmegaConf.structured(config(folder)))


def test_the_terminal_is_closed(tmp_path):
    """SIGHUP, and neither lines nor the progress bar have an output: saved all the same."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    process = in_process(on_a_terminal, tmp_path, os.ttyname(slave))
    try:
        wait_for((tmp_path / "begun").exists, 60)
        seen = b""
        while b"a step" not in seen or b"epoch 1/3" not in seen:  # a line, and the bar
            seen += os.read(master, 1 << 16)
        os.close(slave)
        os.close(master)
        process.join(60)
        assert process.exitcode == 75
    finally:
        process.kill()
        process.join()
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint.pt")["progress"]["step"] == 1


def test_suspended_time_is_no_hang(tmp_path):
    """The watchdog of a run that was stopped for longer than it waits; then of one that hangs."""
    with running(tmp_path, timeout=2 / 60) as process:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(process.pid, signal.SIGCONT)
        process.join(0.5)
        assert process.exitcode is None
        process.join(60)
        assert process.exitcode == HANG_EXIT_CODE

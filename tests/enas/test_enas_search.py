"""enas.search as a user meets it: records, resumption, budgets, errors; its configs."""

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import workers
import yaml
from faults import Crash, assert_same, crash_at
from torch.utils.tensorboard import SummaryWriter

from enas import search as search_module
from enas.child import Child
from enas.controller import Samples
from enas.space import from_json
from sn.training.run import session
from sn.training.run.distributed import Processes
from sn.training.run.schedule import cosine_restarts
from sn.training.run.stopping import Preempted

ROOT = Path(__file__).resolve().parents[2]
TINY = [  # 2 epochs of 3 child steps and 4 updates on 24 images
    *("device=cpu", "data.train_images=24", "epochs=2", "controller.updates=4"),
    *("controller.batch_size=8", "controller.hidden_size=8", "controller.num_groups=2"),
    *("child.layers=1", "child.filters=4", "child.nodes=2", "optimizer.batch_size=8"),
    *("evaluation.batch_size=8", "evaluation.images=20", "evaluation.candidates=2"),
]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment/enas").glob("*.yaml"))


@functools.cache
def composed(*overrides):
    return workers.config(*overrides, root="enas")


def run(out, *overrides, max_lr=None):
    """`max_lr`: one that no config may have."""
    config = copy.deepcopy(composed(*TINY, *overrides))
    config.output_dir = str(out)
    config.optimizer.max_lr = max_lr or config.optimizer.max_lr
    return search_module.search(config)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """TensorBoard's figures take longer than these runs; tests/run/test_record.py draws them."""
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *_: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run as TINY says; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummaryWriter, "add_figure", lambda *_: None)
        run(folder)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(folder):
    """What a run leaves, without timing: everything that must not depend on interruptions."""
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
        "checkpoint": checkpoint(folder / "checkpoint.pt"),
        "best": checkpoint(folder / "checkpoint_best.pt"),
    }


def checkpoint(path):
    state = torch.load(path, weights_only=True)
    state["progress"].pop("wall_s")
    return state


# --- records


def test_smoke_writes_every_record(tmp_path):
    out = tmp_path / "a run with spaces"
    summary = search_module.search(composed("experiment=enas/smoke", f"output_dir='{out}'"))
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "importance.jsonl", "summary.json"}
    assert {"checkpoint.pt", "checkpoint_best.pt", "tensorboard"} <= names
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["status"] == "finished" and summary["scale"] == "proxy"
    assert summary["norm"] == "sn_ln_gn" and summary["sampler"] == "controller"
    assert summary["run"] == "enas/digits_1x8_2nodes/sn_ln_gn/seed0"
    assert summary["child_steps"] == summary["controller_updates"] == 2
    assert summary["images_seen"] == 64 and summary["images_scored"] == 128
    assert summary["best_shared_top1"] == max(summary["candidates_shared_top1"])
    assert "retrained_top1" not in summary  # another figure, of another program
    assert len(from_json(summary["architecture"]).normal) == 2
    (metrics,) = lines(out / "metrics.jsonl")
    for key in ("reward", "baseline", "entropy", "accuracy", "log_prob", "gradient_norm"):
        assert math.isfinite(metrics[f"controller/{key}"])
    assert metrics["val/shared_top1"] == summary["shared_top1"]
    reward = metrics["controller/accuracy"] + 1e-4 * metrics["controller/entropy"]
    assert metrics["controller/reward"] == pytest.approx(reward, abs=1e-12)
    start, end = lines(out / "importance.jsonl")
    assert [layer["block"] for layer in end["layers"].values()] == ["input", "hidden", "cell"]
    assert start["layers"]["cell.norms.cell"]["mean"] == {"ln": 0.5, "gn": 0.5}
    assert end["layers"]["cell.norms.cell"]["mean"]["ln"] != 0.5
    for name in ("config.yaml", "summary.json"):
        assert str(tmp_path) not in (out / name).read_text()


def test_tensorboard_follows_the_epochs(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("5_controller/entropy")] == [1000, 2000]
    tag = "6_importance/mean/hidden/ln"
    assert [e.step for e in events.Scalars(tag)] == [0, 1000, 2000]


def test_second_call_is_a_no_op(whole, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert run(whole) == json.loads(before[whole / "summary.json"])
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    assert "ended already" in capsys.readouterr().out


def test_equal_seeds_are_equal_and_others_are_not(tmp_path, whole):
    run(tmp_path / "a")
    run(tmp_path / "b", "seed=1")
    a, b = (record(tmp_path / name) for name in "ab")
    assert_same(a, record(whole), "same seed")
    assert a["metrics"][0]["train/loss"] != b["metrics"][0]["train/loss"]


def test_best_checkpoint_is_kept(whole):
    """The one of the epoch whose drawn architectures did best, the later of two alike."""
    scores = [line["val/shared_top1"] for line in lines(whole / "metrics.jsonl")]
    best = max(range(2), key=lambda epoch: (scores[epoch], epoch))
    progress = checkpoint(whole / "checkpoint_best.pt")["progress"]
    assert progress["epoch"] == best + 1 and progress["best"] == scores[best]


def test_shared_weights_learn_the_digits(tmp_path, monkeypatch):
    """A sampler that always draws one architecture trains that network: far from guessing."""
    decisions = torch.tensor([[[0, 0, 1, 4], [0, 4, 1, 0]]] * 2)  # sep_conv_3x3 and identity

    def always(count, nodes):
        return Samples(decisions.expand(count, -1, -1, -1), torch.zeros(count), torch.zeros(count))

    monkeypatch.setattr(search_module, "draw_uniformly", always)
    options = ["sampler=random", "epochs=2", "controller.updates=1", "optimizer.first_period=2"]
    options += ["evaluation.candidates=1", "child.stem_stride=1", "device=cpu"]
    summary = search_module.search(composed(*options, f"output_dir={tmp_path}"))
    assert summary["shared_top1"] > 50
    assert summary["best_shared_top1"] == pytest.approx(summary["shared_top1"], abs=5)


# --- what the sampler does


def test_random_search_has_the_same_budget(tmp_path, whole):
    """Equal steps, images trained on and scored; uniform entropy; nothing of a controller."""
    ours = json.loads((whole / "summary.json").read_text())
    random = run(tmp_path, "sampler=random")
    for key in ("child_steps", "controller_updates", "images_seen", "images_scored", "epochs"):
        assert ours[key] == random[key], key
    assert random["norm"] is None and random["run"].split("/")[2] == "random"
    entropy = 2 * 2 * (math.log(2 * 5) + math.log(3 * 5))
    assert random["entropy"] == pytest.approx(entropy)
    assert 0.9 * entropy < ours["entropy"] < entropy
    assert not (tmp_path / "importance.jsonl").exists()
    assert "controller" not in checkpoint(tmp_path / "checkpoint.pt")


def test_child_and_controller_learn_in_turn(tmp_path, monkeypatch):
    """The controller stands still while the child learns, and the other way round."""
    seen = {}

    def states(task):
        return [
            {k: v.clone() for k, v in module.state_dict().items()}
            for module in (task.child, task.controller)
        ]

    def watched(name):
        function = getattr(search_module, name)

        def call(task, *arguments):
            before = states(task)
            function(task, *arguments)
            seen.setdefault(name, (before, states(task)))

        monkeypatch.setattr(search_module, name, call)

    watched("train_child")
    watched("train_controller")
    run(tmp_path, "epochs=1")

    def moved(before, after):
        return any(not torch.equal(before[key], after[key]) for key in before)

    child, controller = (list(map(moved, *seen[f"train_{n}"])) for n in ("child", "controller"))
    assert child == [True, False] and controller == [False, True]


def test_rewards_and_baseline_by_hand(tmp_path, monkeypatch):
    """The loss of every update is -(reward - baseline) log p, the baseline updated before it."""
    seen = []
    loss = search_module.reinforce_loss

    def watched(samples, reward, baseline):
        value = loss(samples, reward, baseline)
        seen.append((reward, baseline, samples.log_prob.item(), value.item()))
        return value

    monkeypatch.setattr(search_module, "reinforce_loss", watched)
    run(tmp_path)
    expected = 0.0
    assert len(seen) == 2 * 4
    for reward, baseline, log_prob, value in seen:
        expected = 0.99 * expected + 0.01 * reward
        assert baseline == pytest.approx(expected, abs=1e-12)
        assert value == pytest.approx(-(reward - baseline) * log_prob, rel=1e-5)
    assert lines(tmp_path / "metrics.jsonl")[-1]["controller/baseline"] == baseline


def test_clipping_limits_the_step(tmp_path, monkeypatch):
    """The norm asked for is what the optimizer sees; without it the gradient is as it was."""
    norms = {}

    def watched(name):
        step = torch.optim.Adam.step

        def call(optimizer, *arguments):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms[name].append(sum(g.square().sum() for g in grads if g is not None).sqrt().item())
            return step(optimizer, *arguments)

        norms[name] = []
        return call

    for name, options in (("free", []), ("clipped", ["controller.grad_clip=0.001"])):
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", watched(name))
            run(tmp_path / name, "epochs=1", *options)
    assert max(norms["clipped"]) == pytest.approx(0.001, rel=1e-3)
    assert min(norms["free"]) > 0.001
    logged = lines(tmp_path / "clipped" / "metrics.jsonl")[0]["controller/gradient_norm"]
    assert logged > 0.001  # before clipping


def test_lr_restarts():
    """Periods 10, 20, 40: full at 0, 10, 30, 70; half way down in the middle."""
    shares = [cosine_restarts(epoch, 10, 2) for epoch in range(150)]
    assert [epoch for epoch, share in enumerate(shares) if share == 1] == [0, 10, 30, 70]
    assert shares[5] == shares[20] == shares[50] == shares[110] == pytest.approx(0.5)
    assert shares[9] == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)


def test_lr_of_every_epoch(tmp_path):
    run(tmp_path, "epochs=3", "optimizer.first_period=2", "optimizer.max_lr=0.1")
    rates = [line["lr"] for line in lines(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([0.1, 0.0005 + 0.0995 / 2, 0.1])


def test_control_parameters_have_a_learning_rate_of_their_own():
    """Adam's first step moves by the lr, whatever the gradient; theirs by 10 times that."""
    config = composed(*TINY, "controller.gate_lr_factor=10", "controller.eps=1e-12")
    controller = search_module.build_controller(config).double()
    before = {name: p.detach().clone() for name, p in controller.named_parameters()}
    controller(3).log_prob.sum().backward()
    search_module.build_adam(controller, config.controller).step()
    moved = {
        name: ((p - before[name])[p.grad != 0].abs() / config.controller.lr).tolist()
        for name, p in controller.named_parameters()
    }
    for name, shares in moved.items():
        expected = 10 if name.endswith(("mean_weight", "var_weight")) else 1
        assert shares == pytest.approx([expected] * len(shares), rel=1e-3), name
    assert sum(bool(shares) for name, shares in moved.items() if "mean_weight" in name) == 3


def test_factor_of_one_is_left_out_of_the_record(whole):
    """Records from before the option are those of runs with factor 1."""
    assert "gate_lr_factor" not in (whole / "config.yaml").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ["controller.norm=none"],
        ["controller.norm=ln", "precision=fp64"],
        ["controller.norm=gn", "precision=bf16"],
        ["controller.per_gate=true", "channels_last=false"],
        ["controller.places=[hidden]", "controller.tanh_constant=null", "deterministic=true"],
        ["optimizer.grad_clip=1", "child.drop_path=0.5", "child.dropout=0.5"],
    ],
    ids=" ".join,
)
def test_switches_run(options, tmp_path):
    assert run(tmp_path, "epochs=1", *options)["status"] == "finished"
    blocks = {"controller.places=[hidden]": ["hidden"], "controller.per_gate=true": 9}
    if options[0] in blocks:
        layers = lines(tmp_path / "importance.jsonl")[-1]["layers"].values()
        found = [layer["block"] for layer in layers]
        assert found == blocks[options[0]] or len(found) == blocks[options[0]]


# --- resumption


CALLS = (
    (search_module, ("child_step", "controller_step", "validate", "choose")),
    (session, ("save_checkpoint",)),
)
crash_at = functools.partial(crash_at, calls=CALLS)


NOISE = ["child.dropout=0.3", "child.drop_path=0.3"]  # everything that draws random numbers
OFTEN = ["checkpoint_steps=2", *NOISE]


def assert_resumed_is_unbroken(events, expected, folder, *options):
    """Crash at each of `events` and run the same command again: the same bits in the end."""
    for event in events:
        with crash_at(event), pytest.raises(Crash):
            run(folder, *options)
        run(folder, *options)
        assert_same(record(folder), expected, f"after a crash at {event}")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """(the record of an unbroken run that draws all it can, its moments)."""
    folder = tmp_path_factory.mktemp("noisy")
    with pytest.MonkeyPatch.context() as patch, crash_at(None) as moments:
        patch.setattr(SummaryWriter, "add_figure", lambda *_: None)
        run(folder, *OFTEN)
    return record(folder), list(moments)


@pytest.mark.parametrize(
    "event",
    [("before child_step", 2), ("after controller_step", 7), ("after validate", 1)],
    ids=lambda event: event[0],
)
def test_resumed_search_equals_unbroken_one(event, tmp_path, noisy):
    """Killed between a child's steps, between updates and in an evaluation."""
    assert_resumed_is_unbroken([event], noisy[0], tmp_path / "broken", *OFTEN)


def test_resumed_choice_equals_unbroken_one(tmp_path):
    """The last epoch's results come from the checkpoint; random search, saved at epochs' ends."""
    options = ["sampler=random", "checkpoint_steps=0", "epochs=1"]
    run(tmp_path / "whole", *options)
    events = [("before choose", 1)]
    expected = record(tmp_path / "whole")
    assert_resumed_is_unbroken(events, expected, tmp_path / "broken", *options)


@pytest.mark.slow
def test_resumed_search_equals_unbroken_one_wherever_it_crashes(tmp_path, noisy):
    expected, moments = noisy
    assert {"before validate", "after child_step", "before finish"} <= set(moments)
    assert_resumed_is_unbroken(range(len(moments)), expected, tmp_path / "broken", *OFTEN)


@pytest.mark.parametrize("phase", ["child_step", "controller_step", "validate", "score"])
def test_a_signal_saves_and_stops(phase, tmp_path, monkeypatch, whole):
    """SIGTERM in the middle of a phase: saved, and the same bits at the end."""
    function, last = getattr(search_module, phase), {"score": 9}.get(phase, 2)  # the choice's first
    calls = []

    def signalled(*arguments):
        calls.append(phase)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(search_module, phase, signalled)
        with pytest.raises(Preempted, match="the same command goes on"):
            run(tmp_path / "broken")
    run(tmp_path / "broken")
    assert_same(record(tmp_path / "broken"), record(whole), "after a signal")


# --- errors


def test_diverged_search_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match="epoch 1, child step"):
        run(tmp_path, "optimizer.weight_decay=1", max_lr=1e30)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged" and summary["shared_top1"] is None
    with pytest.raises(FloatingPointError, match="ended already: it diverged"):  # not tried again
        run(tmp_path, "optimizer.weight_decay=1", max_lr=1e30)


def test_skips_bad_steps_up_to_the_limit(tmp_path, monkeypatch):
    calls = []
    forward = Child.forward

    def poisoned(child, x, *arguments):
        calls.append(1)
        return forward(child, x * (math.nan if len(calls) == 2 else 1), *arguments)

    monkeypatch.setattr(Child, "forward", poisoned)
    assert run(tmp_path, "max_skipped_steps=1")["skipped_steps"] == 1
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["child"].values())


def test_a_skipped_update_of_the_controller_is_not_in_the_mean(tmp_path, monkeypatch):
    norms, losses = [], iter((1.0, math.inf))
    loss, norm = search_module.reinforce_loss, search_module.gradient_norm

    def recorded(model):
        norms.append(norm(model))
        return norms[-1]

    monkeypatch.setattr(search_module, "reinforce_loss", lambda *a: loss(*a) * next(losses, 1.0))
    monkeypatch.setattr(search_module, "gradient_norm", recorded)
    assert run(tmp_path, "max_skipped_steps=1")["skipped_steps"] == 1
    first, *_ = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["controller/gradient_norm"] == pytest.approx(
        sum(norms[at].item() for at in (0, 2, 3)) / 3
    )
    assert not norms[1].isfinite()


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (["sampler=evolution"], ["sampler=evolution", "random"]),
        (["controller.norm=bn"], ["controller.norm=bn", "sn_ln_gn"]),
        (["controller.hidden_size=2147483648"], ["controller.hidden_size=2147483648", "8192"]),
        (["child.filters=2147483648"], ["child.filters=2147483648"]),
        (["optimizer.momentum=1e30"], ["optimizer.momentum=1e+30", "0 to 1"]),
        (["controller.gate_lr_factor=-1"], ["controller.gate_lr_factor=-1", "0 to 10000"]),
        (["+controller.gate_lr=1"], ["unknown key controller.gate_lr", "gate_lr_factor"]),
        (["controller.num_groups=3"], ["num_groups=3", "[1, 2, 4, 8]"]),
        (["controller.places=[output]"], ["controller.places", "hidden"]),
        (["controller.places=hidden"], ["controller.places=hidden", "list"]),
        (["controller.updates=0"], ["controller.updates=0"]),
        (["optimizer.min_lr=1", "optimizer.max_lr=0.1"], ["optimizer.min_lr=1.0", "max_lr=0.1"]),
        (["child.layers=201"], ["child.layers=201", "1 to 200"]),
        (["controller.lr=abc"], ["controller.lr=abc"]),
        (["controller.baseline_decay=1"], ["controller.baseline_decay=1"]),
        (["controller.grad_clip=0"], ["controller.grad_clip=0"]),
        (["child.nodes=0"], ["child.nodes=0"]),
        (["child.aux_weight=0.4"], ["child.aux_weight", "2x2"]),
        (["precision=fp16"], ["precision=fp16", "bf16"]),
        (["data.train_images=5000"], ["5000", "1437"]),
        (["data=cifar10", "data.root=/no/such"], ["/no/such", "cifar-10-batches-py"]),
        (["run_name=a/b"], ["run_name=a/b"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_value_is_named(overrides, wanted, tmp_path):
    with pytest.raises((ValueError, OSError)) as error:
        run(tmp_path / "out", *overrides)
    for words in wanted:
        assert words in str(error.value)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_another_config_is_refused(whole):
    with pytest.raises(ValueError, match="controller.norm: sn_ln_gn there, ln asked for"):
        run(whole, "controller.norm=ln")


def test_several_processes_are_refused(tmp_path, monkeypatch):
    two = Processes(0, 2, torch.device("cpu"))
    monkeypatch.setattr(session.distributed, "start", lambda *_: two)
    with pytest.raises(ValueError, match="one process"):
        run(tmp_path)


def test_command_line(tmp_path):
    """From another folder: the run's lines, no folder of Hydra's."""
    command = [sys.executable, "-m", "enas.search", "output_dir=out", *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [line[:9] for line in done.stdout.splitlines() if line[:5] == "epoch"] == [
        "epoch 1/2",
        "epoch 2/2",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


# --- configs


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_config_builds(name):
    """On the meta device: the child and the controller."""
    config = composed(f"experiment=enas/{name}")
    with torch.device("meta"):
        child = Child(10, image_size=32, **vars(config.child))
        search_module.build_controller(config)
    assert len(child.cells) == config.child.layers + 2
    text = (ROOT / f"configs/experiment/enas/{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n#"), "what it is for"
    assert isinstance(yaml.safe_load(text), dict)


def test_recipe_of_the_paper():
    """ENAS's micro script on CIFAR-10, as shared with the paper's 150 epochs."""
    cfg = dataclasses.asdict(composed("experiment=enas/paper"))
    assert cfg["data"]["name"] == "cifar10" and cfg["data"]["train_images"] is None
    assert cfg["epochs"] == 150 and cfg["sampler"] == "controller"
    assert cfg["child"] == {
        "layers": 6, "filters": 20, "nodes": 5, "stem_stride": 1,
        "dropout": 0.1, "drop_path": 0.4, "aux_weight": 0.4,
    }  # fmt: skip
    assert cfg["optimizer"] == {
        "batch_size": 160, "momentum": 0.9, "weight_decay": 2e-4, "max_lr": 0.05,
        "min_lr": 0.0005, "first_period": 10, "period_factor": 2, "grad_clip": None,
    }  # fmt: skip
    controller = cfg["controller"]
    assert (controller["hidden_size"], controller["init"]) == (64, 0.1)
    assert (controller["tanh_constant"], controller["operation_temperature"]) == (1.10, 2.5)
    assert (controller["updates"], controller["batch_size"]) == (300, 160)
    assert (controller["lr"], controller["beta1"], controller["eps"]) == (0.0035, 0.0, 1e-3)
    assert (controller["entropy_weight"], controller["baseline_decay"]) == (1e-4, 0.99)
    assert controller["grad_clip"] is None and controller["operation_bias"] == 0.25


def test_run_folder_is_the_runs_own():
    runs = [("controller.norm=ln",), ("controller.norm=gn",), ("sampler=random",), ("seed=1",), ()]
    folders = [composed(*overrides).output_dir for overrides in runs]
    assert len(set(folders)) == len(folders)
    assert folders[-1] == "outputs/enas/digits_1x8_2nodes/sn_ln_gn/seed0"


@pytest.mark.parametrize("override", ["controler.norm=ln", "controller.norms=ln", "epoch=3"])
def test_unknown_key_is_an_error(override):
    with pytest.raises(ValueError, match="unknown key .*; did you mean"):
        composed(override)

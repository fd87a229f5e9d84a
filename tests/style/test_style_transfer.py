"""style_transfer.py as a user meets it: records, resumption, equal terms, stylizing, errors."""

import copy
import functools
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import workers
import yaml
from faults import assert_same, outcome
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import sn
import style_transfer
from sn.training.run import distributed
from sn.training.run import record as record_module
from sn.training.run.config import typed
from sn.training.run.images import read_image
from sn.training.run.session import Session
from sn.training.run.stopping import Preempted
from sn.training.style import photos as style_data
from sn.training.style.networks import PARTS, gram, load_loss_network
from sn.training.style.stylize import load_style_net, output_files, stylize_images

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("device=cpu", "vgg.weights=random", "model.width=4", "model.residual_blocks=1"),
    *("photos=folder", "photos.image_size=16", "photos.workers=0", "style.size=24"),
    *("loss.style_layers=[relu1_2,relu2_2]", "schedule.steps=6", "schedule.batch_size=2"),
    *("importance_steps=2", "checkpoint_steps=2", "evaluation.images=2"),
]


@functools.cache
def composed(*overrides):
    return workers.composed("style_transfer", *overrides)


def config(*overrides, **machine):
    """The typed config of `overrides`, paths by `machine`: photos, output."""
    cfg = copy.deepcopy(composed(*overrides))
    if "photos" in machine:
        cfg.photos.root = str(machine["photos"])
    if "output" in machine:
        cfg.output_dir = str(machine["output"])
    return typed(cfg)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(5):
        coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((30 + number, 24)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def train(photos):
    """train(folder, *overrides) of a small network; the random loss network is made once.

    `lr`: one that no config may have.
    """

    def run(out, *overrides, photos=photos, lr=None):
        cfg = config(*TINY, *overrides, photos=photos, output=out)
        cfg.schedule.lr = lr or cfg.schedule.lr
        return style_transfer.train(cfg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style_transfer, "load_loss_network", _loss_network)
        patch.setattr(SummaryWriter, "add_figure", lambda *_: None)
        patch.setattr(record_module, "importance_figure", lambda averages: None)
        yield run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


_cached_network = functools.cache(load_loss_network)


def _loss_network(*options):
    return copy.deepcopy(_cached_network(*options))  # a run may convert it


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- records


def test_records(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["scale"] == "proxy"
    assert summary["steps"] == 6 and summary["images_seen"] == 12
    assert summary["vgg"]["weights"] == "random", "a run with a random loss network says so"
    assert summary["loss_weights"] == {"content": 1e5, "style": 1e10, "tv": 0.0}
    assert summary["statistics"] == ["in", "ln", "bn"]
    assert summary["run"] == "style_transfer/folder_drawn_16px/sn_b2/seed0"
    assert summary["loss"] == pytest.approx(sum(summary[f"{part}_loss"] for part in PARTS))
    metrics = lines(whole / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    for line in metrics:
        total = sum(line[f"train/{part}"] for part in PARTS)
        assert line["train/loss"] == pytest.approx(total) and total > 0
    importance = lines(whole / "importance.jsonl")
    assert [line["step"] for line in importance] == [0, 2, 4, 6]
    layers = importance[0]["layers"]
    assert len(layers) == 7 and layers["residual.0.first.norm"]["block"] == "residual.0"
    assert layers["up.1.norm"]["mean"] == pytest.approx({"in": 1 / 3, "ln": 1 / 3, "bn": 1 / 3})
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["norm"]["name"] == "sn" and "stylize" not in config and "mode" not in config
    assert "optimizer" not in config, "a key younger than records is left out at its old value"
    for name in ("config.yaml", "summary.json"):
        assert str(whole.parent) not in (whole / name).read_text()


def test_losses_are_those_of_the_definitions(tmp_path, train, photos):
    """The first recorded step, computed anew from the crops, the network and VGG's features."""
    train(tmp_path, "norm=in", "loss.tv_weight=2", "loss.style_weight=3", "loss.content_weight=5")
    first = lines(tmp_path / "metrics.jsonl")[0]
    cfg = config(*TINY, "norm=in", photos=photos, output=tmp_path / "unused")
    with Session(cfg, unit="step") as session:
        run = style_transfer.build(cfg, session)
    crops = style_data.Crops(run.photos, 16, 16, seed=0)
    x = torch.stack([crops[0], crops[1]])
    vgg, layers = run.vgg, ["relu1_2", "relu2_2"]
    style, _ = style_data.load_style(None, 24)
    with torch.no_grad():
        y = run.model(x)
        ours, theirs, targets = vgg(y, layers), vgg(x, layers), vgg(style, layers)
    content = (ours["relu2_2"] - theirs["relu2_2"]).square().mean()
    assert first["train/content"] == pytest.approx(5 * content.item(), rel=1e-4)
    styles = [(gram(ours[k]) - gram(targets[k])).square().mean() for k in layers]
    assert first["train/style"] == pytest.approx(3 * sum(styles).item(), rel=1e-4)
    tv = 255**2 * (y.diff(dim=2).square().sum() + y.diff(dim=3).square().sum()) / 2
    assert first["train/tv"] == pytest.approx(2 * tv.item(), rel=1e-4)


def test_training_lowers_the_loss(tmp_path, train):
    train(tmp_path, "schedule.steps=40", "norm=in", "checkpoint_steps=0")
    losses = [line["train/loss"] for line in lines(tmp_path / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def first_steps(train, out, norm):
    """The crops and the weights outside the norms that a run starts with, and its summary."""
    seen, before, step = [], {}, style_transfer.train_step

    def watched(task, run, images):
        if not before:
            state = task.model.state_dict()
            before.update({k: v.clone() for k, v in state.items() if ".norm" not in k})
        seen.append(images.clone())
        return step(task, run, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style_transfer, "train_step", watched)
        train(out, f"norm={norm}", "schedule.steps=3", "evaluation.images=0")
    return {"images": seen, "weights": before}


@pytest.fixture(scope="module")
def without_norm(train, tmp_path_factory):
    return first_steps(train, tmp_path_factory.mktemp("none") / "run", "none")


@pytest.mark.parametrize("norm", ["bn", "in", "sn", "ln", "gn", "ssn", "brn", "bkn"])
def test_equal_terms_for_all_norms(norm, tmp_path, train, without_norm):
    """The same crops in the same order, and the same weights of convolutions to start from."""
    assert_same(first_steps(train, tmp_path, norm), without_norm)


def test_two_runs_are_equal_and_seeds_differ(tmp_path, train, whole):
    train(tmp_path / "again")
    assert_same(outcome(tmp_path / "again"), outcome(whole))
    train(tmp_path / "other", "seed=1", "schedule.steps=1")
    first, other = (lines(path / "metrics.jsonl")[0] for path in (whole, tmp_path / "other"))
    assert first["train/content"] != other["train/content"]


def test_second_call_is_a_no_op(train, whole, capsys):
    summary = json.loads((whole / "summary.json").read_text())
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert train(whole) == summary
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    loss, photos = f"{summary['loss']:.4g}", summary["data"]
    told = f"{loss}; data {photos['name']} ({photos['train_images']} training images), style drawn"
    assert f"has ended already: loss {told}" in capsys.readouterr().out


def test_control_parameters_at_a_multiple_of_the_lr(tmp_path, train):
    """Adam's first update is proportional to the lr: theirs is four times as large, no other."""
    train(tmp_path / "usual", "schedule.steps=1")
    train(tmp_path / "faster", "schedule.steps=1", "optimizer.gate_lr_factor=4")
    usual, faster = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("usual", "faster")
    )
    own = [name for name in usual if name.endswith(("mean_weight", "var_weight"))]
    assert len(own) == 14  # of 7 layers
    for name, theirs in usual.items():
        if name in own:  # they start at 1
            assert (theirs - 1).abs().max() > 5e-4, "they move by about the lr"
            torch.testing.assert_close(faster[name] - 1, 4 * (theirs - 1), rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(faster[name], theirs), name
    recorded = yaml.safe_load((tmp_path / "faster" / "config.yaml").read_text())
    assert recorded["optimizer"] == {"gate_lr_factor": 4.0}
    with pytest.raises(
        ValueError, match="optimizer.gate_lr_factor: the default there, 4.0 asked for"
    ):
        train(tmp_path / "usual", "optimizer.gate_lr_factor=4")


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_precisions(tmp_path, train, whole, precision):
    """bf16 within its rounding of fp32, fp64 within fp32's."""
    train(tmp_path, "schedule.steps=1", f"precision={precision}")
    exact, ours = (lines(folder / "metrics.jsonl")[0] for folder in (whole, tmp_path))
    tolerance = 0.1 if precision == "bf16" else 1e-3
    assert ours["train/loss"] == pytest.approx(exact["train/loss"], rel=tolerance)
    assert ours["train/loss"] != exact["train/loss"]


@pytest.mark.parametrize("switch", ["channels_last=true", "model.fused_activation=true"])
def test_switches_change_no_result(tmp_path, train, whole, switch):
    train(tmp_path, "schedule.steps=2", switch)
    plain, switched = (lines(folder / "metrics.jsonl") for folder in (whole, tmp_path))
    for ours, theirs in zip(switched, plain):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


@pytest.mark.slow
def test_compiled(tmp_path, train, whole):
    train(tmp_path, "schedule.steps=2", "compile=true")
    plain, compiled = (lines(folder / "metrics.jsonl") for folder in (whole, tmp_path))
    for ours, theirs in zip(compiled, plain):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


# --- resumption


class Crash(Exception):
    """What a crash raises: nothing in the code catches it."""


def broken_off(train, out, what, happens, *overrides):
    """Train, with `happens()` called before what `what` names: a step's number, or "evaluation".

    In an evaluation it is the second image.
    """
    losses_of, evaluated = style_transfer.losses_of, []

    def watched(task, run, images):
        if not task.model.training:
            evaluated.append(images)
        if len(evaluated) == 2 if what == "evaluation" else run.where == f"step {what} of 6":
            happens()
        return losses_of(task, run, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style_transfer, "losses_of", watched)
        train(out, *overrides)


def crash():
    raise Crash


@pytest.mark.parametrize("what", [4, "evaluation"])  # checkpoints are at 2, 4 and 6
def test_resumed_run_equals_unbroken_one(what, tmp_path, train, whole):
    """Broken off in a step or in the evaluation, the same command ends with the same bits."""
    with pytest.raises(Crash):
        broken_off(train, tmp_path, what, crash)
    assert not (tmp_path / "summary.json").exists()
    train(tmp_path)
    assert_same(outcome(tmp_path), outcome(whole))
    assert (tmp_path / "config.yaml").read_text() == (whole / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["sn", "bn", "ssn", "bkn"])
def test_resumed_from_everywhere(norm, tmp_path, train):
    train(tmp_path / "whole", f"norm={norm}")
    for what in (*range(1, 7), "evaluation"):
        with pytest.raises(Crash):
            broken_off(train, tmp_path / str(what), what, crash, f"norm={norm}")
        train(tmp_path / str(what), f"norm={norm}")
        assert_same(outcome(tmp_path / str(what)), outcome(tmp_path / "whole"), str(what))


def test_more_steps_continue_a_finished_run(tmp_path, train, whole):
    """3 steps, then 6: the same as 6 at once, evaluation and records included."""
    train(tmp_path, "schedule.steps=3")
    with pytest.raises(Crash):
        broken_off(train, tmp_path, 5, crash)
    assert not (tmp_path / "summary.json").exists(), "it is no longer finished"
    assert train(tmp_path)["steps"] == 6
    ours, theirs = outcome(tmp_path), outcome(whole)
    ours["importance.jsonl"] = [x for x in ours["importance.jsonl"] if x["step"] != 3]
    assert [line["step"] for line in ours.pop("steps.jsonl")] == [3, 6]  # each run's end
    assert [line["step"] for line in theirs.pop("steps.jsonl")] == [6]
    counts = [found["checkpoint"].pop("lines") for found in (ours, theirs)]
    assert counts[0]["importance.jsonl"] == counts[1]["importance.jsonl"] + 1
    assert_same(ours, theirs)


def test_more_steps_are_another_run_where_a_norm_follows_the_share_done(tmp_path, train):
    train(tmp_path, "norm=ssn", "schedule.steps=2")
    with pytest.raises(ValueError, match="other .*schedule.steps 2 there, 3 now"):
        train(tmp_path, "norm=ssn", "schedule.steps=3")
    assert train(tmp_path, "norm=ssn", "schedule.steps=2")["steps"] == 2


def test_a_checkpoint_from_before_the_session(tmp_path, train, whole):
    """Its progress does not say how many images were seen, its optimizer has no lr factor."""
    shutil.copytree(whole, tmp_path / "run")
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    state["progress"] = {key: state["progress"][key] for key in ("step", "skipped_steps", "wall_s")}
    del state["optimizer"]["param_groups"][0]["lr_factor"]
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    summary = train(tmp_path / "run", "schedule.steps=7")
    assert (summary["steps"], summary["images_seen"]) == (7, 14)


def test_other_style_or_weights_are_refused(tmp_path, train, whole):
    """Paths are the machine's, contents are the experiment's."""
    shutil.copytree(whole, tmp_path / "run")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    more = "schedule.steps=8"
    with pytest.raises(ValueError, match="was trained with other .*style.sha256 .* there, .* now"):
        train(tmp_path / "run", more, f"style.image={tmp_path / 'red.png'}")
    other = _loss_network("random", "caffe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style_transfer, "load_loss_network", lambda *_: other)
        with pytest.raises(
            ValueError, match="was trained with other .*vgg.input torchvision there"
        ):
            train(tmp_path / "run", more)
    with pytest.raises(ValueError, match="has ended already, with other style: sha256 .* there, "):
        train(tmp_path / "run", f"style.image={tmp_path / 'red.png'}")
    with pytest.raises(ValueError, match="has ended already, with other vgg: weights random there"):
        train(tmp_path / "run", "vgg.weights=IMAGENET1K_V1")
    assert (tmp_path / "run" / "summary.json").exists(), "a refusal changes nothing"
    train(tmp_path / "run", f"style.image={tmp_path / 'gone.png'}")  # it cannot be told


def test_another_config_in_the_same_folder(train, whole):
    with pytest.raises(ValueError, match="norm.name: sn there, bn asked for"):
        train(whole, "norm=bn")


@pytest.mark.parametrize("what, where", [(3, "saved after step 3 of 6"), ("evaluation",) * 2])
def test_a_signal_stops_and_the_same_command_goes_on(what, where, tmp_path, train, whole):
    """No checkpoint is due: the one that the signal makes holds the step it came in."""
    with pytest.raises(Preempted, match=f"{where}; the same command goes on"):
        broken_off(
            *(train, tmp_path, what, lambda: os.kill(os.getpid(), signal.SIGTERM)),
            "checkpoint_steps=0",
        )
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == (3 if what == 3 else 6)
    assert not (tmp_path / "summary.json").exists()
    train(tmp_path, "checkpoint_steps=0")
    assert_same(outcome(tmp_path), outcome(whole))


def test_the_largest_number_of_steps_begins_at_once(tmp_path, train):
    """The numbers of all images are not listed beforehand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style_transfer, "train_step", lambda *_: crash())
        with pytest.raises(Crash):
            train(tmp_path, "schedule.steps=2147483647")


@pytest.mark.slow
def test_sigterm_from_outside(tmp_path, train, photos):
    """A real command told to stop in mid-run ends cleanly, to be requeued (exit code 75)."""
    overrides = [f"photos.root={photos}", "schedule.steps=400", "checkpoint_steps=0"]
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "style_transfer.py"), *TINY, *overrides, f"output_dir={out}"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len(lines(out / "metrics.jsonl")) > 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "saved after" in errors and "Traceback" not in errors
    done = torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert 3 < done < 400 and len(lines(out / "metrics.jsonl")) == done


# --- divergence and damaged input


def test_diverged_run_is_a_result(tmp_path, train):
    options = ["schedule.lr=1e4", "norm=none"]
    with pytest.raises(FloatingPointError, match="not finite"):
        train(tmp_path, *options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged" and summary["loss"] is None and summary["steps"] < 6
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FloatingPointError, match="ended already: it diverged"):  # not tried again
        train(tmp_path, *options)


def test_divergence_in_the_last_step_is_seen(tmp_path, train):
    with pytest.raises(FloatingPointError, match="not finite"):
        train(tmp_path, "norm=none", "schedule.steps=1", lr=1e30)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "diverged"


def test_a_corrupt_photo_is_named_and_passed_over(tmp_path, train, photos, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "2.png").write_bytes(b"gone")
    summary = train(tmp_path / "run", photos=folder)
    assert summary["status"] == "finished" and summary["bad_images"] == 1
    assert f"warning: cannot read image {folder / '2.png'}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot read image .*2.png"):
        train(tmp_path / "strict", "photos.max_bad_images=0", photos=folder)


@pytest.mark.parametrize("decides", ["host", "device"])
def test_skipped_steps_are_counted_and_change_nothing(
    decides, tmp_path, train, monkeypatch, capsys, request
):
    """One step's loss is not finite: no update, no trace in the running statistics, a null line."""
    if decides == "device":
        request.getfixturevalue("late")
    losses_of, calls = style_transfer.losses_of, []

    def poisoned(task, run, images):
        calls.append(copy.deepcopy(task.model.state_dict()))
        return losses_of(task, run, images * (math.nan if len(calls) == 4 else 1))

    monkeypatch.setattr(style_transfer, "losses_of", poisoned)
    summary = train(tmp_path, "norm=bn", "max_skipped_steps=1")
    assert summary["skipped_steps"] == 1 and summary["status"] == "finished"
    assert_same(calls[4], calls[3])  # the first call is the estimate of the memory
    metrics = lines(tmp_path / "metrics.jsonl")
    assert metrics[2]["train/loss"] is None and metrics[3]["train/loss"] > 0
    assert "step 3 of 6, step skipped" in capsys.readouterr().err
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]


def test_a_step_waits_for_nothing(tmp_path, train, monkeypatch, late, synchronisations):
    """Nothing of a step asks the device for a number; the first one may."""
    step, found = style_transfer.train_step, []

    def counted(*args):
        with synchronisations() as waits:
            step(*args)
        found.append(list(waits))

    monkeypatch.setattr(style_transfer, "train_step", counted)
    train(tmp_path, "norm=sn", "max_skipped_steps=1", "checkpoint_steps=0")
    assert len(found) == 6 and found[1:] == [[]] * 5, found
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_host_waits_for_nothing_but_the_optimizers_own_counts(
    tmp_path, train, monkeypatch, synchronisations
):
    """On the CPU Adam is not fused: for the rounding of recorded runs, it counts by itself."""
    step, found = style_transfer.train_step, []

    def counted(task, *args):
        with synchronisations() as waits:
            step(task, *args)
        found.append(waits.count("aten._local_scalar_dense.default"))
        with synchronisations() as waits:
            task.optimizer.step()
        found.append(waits.count("aten._local_scalar_dense.default"))

    monkeypatch.setattr(style_transfer, "train_step", counted)
    train(tmp_path, "schedule.steps=2", "evaluation.images=0")
    assert found[0] == found[1] and found[2] == found[3]


# --- stylizing


def stylize(**options):
    cfg = copy.deepcopy(composed("mode=stylize", "device=cpu"))
    for key, value in options.items():
        cfg.stylize[key] = value
    return stylize_images(typed(cfg))


def test_stylizes_files_folders_and_lists(tmp_path, whole, photos, capsys):
    checkpoint = str(whole / "checkpoint.pt")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    Image.new("L", (9, 6), 80).save(tmp_path / "deep" / "er" / "grey.jpg")
    Image.new("RGBA", (7, 10), (9, 200, 90, 128)).save(tmp_path / "deep" / "grey.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    files = stylize(
        checkpoint=checkpoint,
        images=[str(tmp_path / "deep"), str(tmp_path / "dot.png")],
        output=str(tmp_path / "out"),
    )
    assert [path.relative_to(tmp_path / "out").as_posix() for path in files] == [
        "er/grey.png", "grey.png", "dot.png"
    ]  # fmt: skip
    assert [Image.open(path).size for path in files] == [(9, 6), (7, 10), (1, 1)]
    net = load_style_net(checkpoint)
    image = read_image(photos / "0.png", "picture")  # 30 x 24: padded to 32
    (file,) = stylize(
        checkpoint=checkpoint, images=str(photos / "0.png"), output=str(tmp_path / "one")
    )
    padded = torch.nn.functional.pad(style_data.to_tensor(image)[None], (0, 2, 0, 0), "replicate")
    with torch.no_grad():
        expected = style_data.to_pil(net(padded)[0, :, :, :30])
    assert np.array_equal(Image.open(file), expected)
    stylize(checkpoint=checkpoint, images=str(photos / "0.png"), output=str(tmp_path / "two"),
            size=15)  # fmt: skip
    assert Image.open(tmp_path / "two" / "0.png").size == (15, 12)
    stylize(checkpoint=checkpoint, images=str(photos / "0.png"), output=str(tmp_path / "three"),
            strip_pixels=200)  # fmt: skip
    whole, strips = (np.asarray(Image.open(tmp_path / n / "0.png")).astype(int) for n in
                     ("one", "three"))  # fmt: skip
    assert np.abs(whole - strips).max() <= 1, "strips and whole, in grey levels"


def test_stylizing_names_what_it_cannot_read(tmp_path, whole):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"gone")
    Image.new("RGB", (8, 8)).save(folder / "b.png")
    options = {"checkpoint": str(whole / "checkpoint.pt"), "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"1 of 2 images could not be read: .*a.jpg"):
        stylize(images=str(folder), **options)
    assert (tmp_path / "out" / "b.png").exists(), "the others are done all the same"
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        stylize(images=str(tmp_path / "nowhere"), **options)
    with pytest.raises(ValueError, match="would overwrite the image"):
        stylize(images=str(folder), **options | {"output": str(folder)})


def test_a_huge_image_by_a_setting(tmp_path, whole, capsys):
    Image.new("RGB", (120, 100)).save(tmp_path / "big.png")
    options = {"checkpoint": str(whole / "checkpoint.pt"), "output": str(tmp_path / "out")}
    options |= {"images": str(tmp_path / "big.png"), "size": 20}
    with pytest.raises(ValueError, match="1 of 1 images could not be read"):
        stylize(max_megapixels=0.01, **options)
    assert "or raise stylize.max_megapixels; left out" in capsys.readouterr().err
    (file,) = stylize(max_megapixels=0.02, **options)
    assert Image.open(file).size == (20, 17)


def test_same_names_do_not_overwrite_one_another(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    targets = output_files([str(tmp_path)], tmp_path / "out")
    assert [path.name for path in targets.values()] == ["a.png", "a.png.png"]
    for name in "xyz":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    with pytest.raises(ValueError, match="would overwrite"):
        output_files([str(tmp_path / name) for name in "xyz"], tmp_path / "out")


# --- configs and errors


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "loss.style_layers=[relu1_2,relu1_2]",
            "loss.style_layers=['relu1_2', 'relu1_2'] names one",
        ),
        ("stylize.images=[[x]]", "stylize.images=[['x']]; expected a file, a folder, or a list"),
        ("schedule.steps=0", "schedule.steps=0; expected a whole number, 1 to 2147483647"),
        ("schedule.batch_size=1.5", "schedule.batch_size=1.5; expected a whole number, 1 to 65536"),
        ("schedule.lr=0", "schedule.lr=0.0; expected a number, above 0"),
        ("loss.style_weight=-1", "loss.style_weight=-1.0; expected a number, 0 to 1e+15, or null"),
        ("loss.content_layer=conv2", "loss.content_layer=conv2; expected one of relu1_1, "),
        ("loss.style_layers=[relu9_9]", "loss.style_layers=['relu9_9']; expected a list, each one"),
        ("loss.style_layers=[]", "loss.style_layers=[]; expected at least one of relu1_1, "),
        ("photos.image_size=30", "photos.image_size=30; expected a multiple of 4"),
        ("photos.resize=8", "photos.resize=8; expected a whole number, 16 to 16384"),
        (
            "photos.resize=24 photos.image_size=32",
            "photos.resize=24; expected photos.image_size=32",
        ),
        ("model.width=2147483648", "model.width=2147483648; expected a whole number, 1 to 1024"),
        ("model.blocks=3", "unknown key model.blocks; model has width, residual_blocks, "),
        ("+schedule.epochs=3", "unknown key schedule.epochs; schedule has steps, batch_size, lr"),
        ("keep_checkpoints=1", "keep_checkpoints=1; expected a whole number, 2 to 1000"),
        ("timeout_minutes=0", "timeout_minutes=0.0; expected a number, 0.001 to 1e+06"),
        ("optimizer.gate_lr_factor=-1", "optimizer.gate_lr_factor=-1.0; expected a number, 0 to"),
        ("precision=fp8", "precision=fp8; expected one of fp32, bf16, fp16, fp64"),
        ("compile=maybe", "compile=maybe; expected true or false"),
        ("run_name=../x", "run_name=../x; expected a name without /"),
        ("vgg.input=bgr", "vgg.input=bgr; expected one of caffe, torchvision, caffe_bgr, or null"),
        ("norm=frozen_bn", "norm=frozen_bn would stay the identity: a style network starts from"),
        ("mode=paint", "mode=paint; expected one of train, stylize, export"),
        ("device=tpu", "device=tpu; expected one of auto, cpu, cuda"),
        ("mode=stylize", "mode=stylize needs a run's checkpoint; add stylize.checkpoint=... to"),
        ("mode=export", "mode=export needs a run's checkpoint; add export.checkpoint=... to the"),
        ("mode=stylize stylize.checkpoint=x", "mode=stylize needs images; add stylize.images=..."),
        (
            "mode=stylize stylize.checkpoint=x stylize.images={a:1}",
            "stylize.images={'a': 1}; expected a file, a folder, or a list of them",
        ),
        ("mode=stylize stylize.size=0", "stylize.size=0; expected a whole number, 1 to 65536, or"),
    ],
)
def test_bad_config(override, message):
    with pytest.raises(ValueError) as error:
        workers.config(*TINY, "photos.root=x", *override.split(), root="style_transfer")
    assert message in str(error.value)


def test_a_folder_whose_name_is_a_number():
    given = ["mode=stylize", "stylize.checkpoint=x", "stylize.images=[2024,a.png]"]
    assert workers.config(*given, root="style_transfer").stylize.paths() == ["2024", "a.png"]


def test_unknown_norm_leaves_nothing_behind(tmp_path, train):
    with pytest.raises(ValueError, match="unknown norm 'xn'"):
        train(tmp_path / "run", "norm.name=xn")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(train, tmp_path, monkeypatch):
    started = distributed.Processes(0, 2, torch.device("cpu"))
    monkeypatch.setattr(distributed, "start", lambda *_: started)
    with pytest.raises(ValueError, match="runs in one process, not 2: the paper's batch is 4"):
        train(tmp_path)


@pytest.mark.parametrize(
    "override, message",
    [
        ("style=starry_night", "style.image is not set; add style.image=... to the command"),
        ("photos.root=nowhere", "photos.root=nowhere: no file or folder nowhere"),
        ("vgg.weights=nowhere.pth", "vgg.weights=nowhere.pth: no such file"),
        ("mode=stylize", "mode=stylize needs a run's checkpoint; add stylize.checkpoint=... to"),
        ("norm=xyz", "norm=xyz: no such option; choose one of bkn, bn, "),
    ],
)
def test_command_line_errors_are_one_line(override, message, tmp_path, photos, monkeypatch, capsys):
    overrides = [*TINY, f"photos.root={photos}", override]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "style_transfer.py"), *overrides])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(sys.argv[0], run_name="__main__")
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == ""
    assert shown.err.startswith(f"style_transfer.py: {message}"), shown.err
    assert len(shown.err.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def required(option):
    """What such an option cannot do without."""
    return {"style": ["style.image=x.jpg"], "photos": ["photos.root=x"]}.get(option, [])


OPTIONS = [
    f"{group}={path.stem}"
    for group in ("norm", "photos", "style")
    for path in sorted((ROOT / "configs" / group).glob("*.yaml"))
    if path.stem != "frozen_bn"  # refused
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_says_its_own_name(option):
    """An inherited name would let two options share a run folder."""
    group, name = option.split("=")
    cfg = workers.config(option, *required(group), root="style_transfer")
    assert (cfg.norm["name"] if group == "norm" else getattr(cfg, group).name) == name
    sn.make_norm(**cfg.norm)


EXPERIMENTS = sorted(
    path.stem for path in (ROOT / "configs/experiment/style_transfer").glob("*.yaml")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name):
    """Its values fit the schema; its head says its command."""
    given = [] if name == "smoke" else [*required("photos"), *required("style")]
    workers.config(f"experiment=style_transfer/{name}", *given, root="style_transfer")
    path = ROOT / f"configs/experiment/style_transfer/{name}.yaml"
    assert f"style_transfer/{name}" in path.read_text() or name == "smoke"


def test_recipe_of_the_paper():
    """Johnson et al.: 40,000 steps of 4 images of 256 px, Adam at 1e-3, relu2_2 and four styles."""
    for style in ("starry_night", "wave"):
        cfg = composed(f"experiment=style_transfer/{style}")
        assert (cfg.schedule.steps, cfg.schedule.batch_size, cfg.schedule.lr) == (40000, 4, 1e-3)
        assert (cfg.photos.name, cfg.photos.image_size, cfg.style.name) == ("coco", 256, style)
        assert cfg.loss.content_layer == "relu2_2"
        assert cfg.loss.style_layers == ["relu1_2", "relu2_2", "relu3_3", "relu4_3"]
        assert (cfg.model.width, cfg.model.residual_blocks) == (32, 5)
        assert cfg.vgg.weights == "IMAGENET1K_V1"


def test_bare_default_needs_no_file_but_vgg():
    cfg = composed()
    assert cfg.photos.root is None and cfg.style.image is None
    assert cfg.output_dir == "outputs/style_transfer/samples_drawn_64px/sn_b4/seed0"
    assert math.isclose(cfg.schedule.lr, 1e-3)

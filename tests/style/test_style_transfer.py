"""style_transfer.py as a user meets it: records, resumption, equal terms, stylizing, errors."""

import copy
import functools
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from faults import assert_same
from hydra import compose, initialize_config_dir
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import sn
import style_transfer
from sn.training.run import record as record_module
from sn.training.run.stopping import Preempted, StopSignal, Watchdog
from sn.training.style import photos as style_data
from sn.training.style.networks import gram, load_loss_network
from sn.training.style.stylize import load_style_net

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("device=cpu", "vgg.weights=random", "model.width=4", "model.residual_blocks=1"),
    *("photos=folder", "photos.image_size=16", "photos.workers=0", "style.size=24"),
    *("loss.style_layers=[relu1_2,relu2_2]", "schedule.steps=6", "schedule.batch_size=2"),
    *("importance_steps=2", "checkpoint_steps=2", "evaluation.images=2"),
]
PARTS = ("content", "style", "tv")


@functools.cache
def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("style_transfer", list(overrides))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(5):
        coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((30 + number, 24)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def train(photos, monkeypatch):
    """train(folder, *overrides) of a small network; the random loss network is made once."""
    monkeypatch.setattr(style_transfer, "load_loss_network", _loss_network)
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *_: None)
    monkeypatch.setattr(record_module, "importance_figure", lambda averages: None)

    def run(out, *overrides):
        cfg = copy.deepcopy(composed(*TINY, *overrides))
        cfg.photos.root, cfg.output_dir = str(photos), str(out)
        return style_transfer.train(cfg)

    return run


_cached_network = functools.cache(load_loss_network)


def _loss_network(*options):
    return copy.deepcopy(_cached_network(*options))  # a run may convert it


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(folder):
    """Everything a run leaves that must not depend on interruptions."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["progress"].pop("wall_s")
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("wall_s", "date", "commit", "device"):
        summary.pop(key)
    importance = folder / "importance.jsonl"
    return {
        "metrics": lines(folder / "metrics.jsonl"),
        "importance": lines(importance) if importance.exists() else None,
        "summary": summary,
        "config": (folder / "config.yaml").read_text(),
        "checkpoint": state,
    }


# --- records


def test_records(tmp_path, train):
    summary = train(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["status"] == "finished" and summary["scale"] == "proxy"
    assert summary["steps"] == 6 and summary["images_seen"] == 12
    assert summary["vgg"]["weights"] == "random", "a run with a random loss network says so"
    assert summary["loss_weights"] == {"content": 1e5, "style": 1e10, "tv": 0.0}
    assert summary["statistics"] == ["in", "ln", "bn"]
    assert summary["run"] == "style_transfer/folder_drawn_16px/sn_b2/seed0"
    assert summary["loss"] == pytest.approx(sum(summary[f"{part}_loss"] for part in PARTS))
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    for line in metrics:
        total = sum(line[f"train/{part}"] for part in PARTS)
        assert line["train/loss"] == pytest.approx(total) and total > 0
    importance = lines(tmp_path / "importance.jsonl")
    assert [line["step"] for line in importance] == [0, 2, 4, 6]
    layers = importance[0]["layers"]
    assert len(layers) == 7 and layers["residual.0.first.norm"]["block"] == "residual.0"
    assert layers["up.1.norm"]["mean"] == pytest.approx({"in": 1 / 3, "ln": 1 / 3, "bn": 1 / 3})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["norm"]["name"] == "sn" and "stylize" not in config and "mode" not in config
    for name in ("config.yaml", "summary.json"):
        assert str(tmp_path.parent) not in (tmp_path / name).read_text()


def test_losses_are_those_of_the_definitions(tmp_path, train, photos):
    """The first recorded step, computed anew from the crops, the network and VGG's features."""
    train(tmp_path, "norm=in", "loss.tv_weight=2", "loss.style_weight=3", "loss.content_weight=5")
    first = lines(tmp_path / "metrics.jsonl")[0]
    cfg = copy.deepcopy(composed(*TINY, "norm=in"))
    cfg.photos.root = str(photos)
    run = style_transfer.build(cfg, torch.device("cpu"), StopSignal(), Watchdog(30))
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


@pytest.mark.parametrize("norm", ["bn", "in", "sn", "ln", "gn", "ssn", "brn", "bkn", "none"])
def test_equal_terms_for_all_norms(norm, tmp_path, train, monkeypatch):
    """The same crops in the same order, and the same weights of convolutions to start from."""

    def first_steps(norm, out):
        seen, before = [], {}
        step = style_transfer.train_step

        def watched(run, images, where):
            if not before:
                state = run.model.state_dict()
                before.update({k: v.clone() for k, v in state.items() if ".norm" not in k})
            seen.append(images.clone())
            return step(run, images, where)

        monkeypatch.setattr(style_transfer, "train_step", watched)
        train(out, f"norm={norm}", "schedule.steps=3", "evaluation.images=0")
        monkeypatch.setattr(style_transfer, "train_step", step)
        return {"images": seen, "weights": before}

    assert_same(first_steps(norm, tmp_path / "a"), first_steps("none", tmp_path / "b"))


def test_two_runs_are_equal_and_seeds_differ(tmp_path, train):
    for name in ("a", "b"):
        train(tmp_path / name)
    train(tmp_path / "c", "seed=1")
    assert_same(record(tmp_path / "a"), record(tmp_path / "b"))
    first, other = (lines(tmp_path / name / "metrics.jsonl")[0] for name in "ac")
    assert first["train/content"] != other["train/content"]


def test_second_call_is_a_no_op(tmp_path, train, capsys):
    summary = train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(tmp_path) == summary
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert "has ended already" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_precisions(tmp_path, train, precision):
    """bf16 within its rounding of fp32, fp64 within fp32's."""
    options = ["norm=in", "schedule.steps=1"]
    train(tmp_path / "fp32", *options)
    train(tmp_path / precision, *options, f"precision={precision}")
    exact, ours = (lines(tmp_path / n / "metrics.jsonl")[0] for n in ("fp32", precision))
    tolerance = 0.1 if precision == "bf16" else 1e-3
    assert ours["train/loss"] == pytest.approx(exact["train/loss"], rel=tolerance)
    assert ours["train/loss"] != exact["train/loss"]


@pytest.mark.parametrize("switch", ["channels_last=true", "model.fused_activation=true"])
def test_switches_change_no_result(tmp_path, train, switch):
    options = ["schedule.steps=2"]
    train(tmp_path / "plain", *options)
    train(tmp_path / "switched", *options, switch)
    plain, switched = (lines(tmp_path / n / "metrics.jsonl") for n in ("plain", "switched"))
    for ours, theirs in zip(switched, plain):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


@pytest.mark.slow
def test_compiled(tmp_path, train):
    options = ["schedule.steps=2"]
    train(tmp_path / "plain", *options)
    train(tmp_path / "compiled", *options, "compile=true")
    plain, compiled = (lines(tmp_path / n / "metrics.jsonl") for n in ("plain", "compiled"))
    for ours, theirs in zip(compiled, plain):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


# --- resumption


class Crash(Exception):
    """What a crash raises: nothing in the code catches it."""


@pytest.mark.parametrize("norm", ["sn", "bn", pytest.param("ssn", marks=pytest.mark.slow)])
def test_resumed_run_equals_unbroken_one(norm, tmp_path, train, monkeypatch):
    """Broken off before or after an update, the same command ends with the same bits."""
    train(tmp_path / "whole", f"norm={norm}")
    expected = record(tmp_path / "whole")
    step = style_transfer.train_step
    for broken in (1, 4, 5, 6):  # checkpoints are at 2, 4 and 6
        out = tmp_path / str(broken)

        def crash(run, images, where, broken=broken):
            now = where == f"step {broken} of 6"
            if now and broken % 2:
                raise Crash
            losses = step(run, images, where)
            if now:
                raise Crash
            return losses

        monkeypatch.setattr(style_transfer, "train_step", crash)
        with pytest.raises(Crash):
            train(out, f"norm={norm}")
        monkeypatch.setattr(style_transfer, "train_step", step)
        train(out, f"norm={norm}")
        assert_same(record(out), expected, f"broken in step {broken}")


def test_more_steps_continue_a_finished_run(tmp_path, train, monkeypatch):
    """3 steps, then 6: the same as 6 at once, evaluation and records included."""
    train(tmp_path / "whole")
    train(tmp_path / "longer", "schedule.steps=3")
    step = style_transfer.train_step

    def crash(run, images, where):
        if where == "step 5 of 6":
            raise Crash
        return step(run, images, where)

    monkeypatch.setattr(style_transfer, "train_step", crash)
    with pytest.raises(Crash):
        train(tmp_path / "longer")
    assert not (tmp_path / "longer" / "summary.json").exists(), "it is no longer finished"
    monkeypatch.setattr(style_transfer, "train_step", step)
    assert train(tmp_path / "longer")["steps"] == 6
    ours, theirs = (record(tmp_path / name) for name in ("longer", "whole"))
    ours["importance"] = [line for line in ours["importance"] if line["step"] != 3]
    assert_same(ours, theirs)


def test_other_photos_style_or_weights_are_refused(tmp_path, train, photos):
    """Paths are the machine's, contents are the experiment's."""
    train(tmp_path / "run", "schedule.steps=2")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    changes = {"style": [f"style.image={tmp_path / 'red.png'}"], "vgg": ["vgg.weights=other"]}
    other = _loss_network("random", "caffe")
    for what, overrides in changes.items():
        with pytest.MonkeyPatch.context() as patch:
            if what == "vgg":
                patch.setattr(style_transfer, "load_loss_network", lambda *_: other)
            with pytest.raises(ValueError, match=f"was trained with other {what}: "):
                train(tmp_path / "run", *overrides)


def test_another_config_in_the_same_folder(tmp_path, train):
    train(tmp_path)
    with pytest.raises(ValueError, match="norm.name: sn there, bn asked for"):
        train(tmp_path, "norm=bn")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(number, tmp_path, train, monkeypatch):
    """No checkpoint is due: the one that the signal makes holds the step it came in."""
    train(tmp_path / "whole", "checkpoint_steps=0")
    step = style_transfer.train_step

    def signalled(run, images, where):
        if where.startswith("step 3 "):
            os.kill(os.getpid(), number)
        return step(run, images, where)

    monkeypatch.setattr(style_transfer, "train_step", signalled)
    with pytest.raises(Preempted, match="saved after step 3 of 6; the same command goes on"):
        train(tmp_path / "run", "checkpoint_steps=0")
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 3
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(style_transfer, "train_step", step)
    train(tmp_path / "run", "checkpoint_steps=0")
    assert_same(record(tmp_path / "run"), record(tmp_path / "whole"))


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
    options = ["schedule.lr=1e30", "norm=none"]
    with pytest.raises(FloatingPointError, match="not finite"):
        train(tmp_path, *options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged" and summary["loss"] is None and summary["steps"] < 6
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FloatingPointError, match="ended already: it diverged"):  # not tried again
        train(tmp_path, *options)


def test_divergence_in_the_last_step_is_seen(tmp_path, train):
    with pytest.raises(FloatingPointError, match="not finite"):
        train(tmp_path, "schedule.lr=1e30", "norm=none", "schedule.steps=1")
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "diverged"


def test_a_corrupt_photo_is_named_and_passed_over(tmp_path, train, photos, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "2.png").write_bytes(b"gone")
    cfg = copy.deepcopy(composed(*TINY))
    cfg.photos.root, cfg.output_dir = str(folder), str(tmp_path / "run")
    summary = style_transfer.train(cfg)
    assert summary["status"] == "finished" and summary["bad_images"] == 1
    assert f"warning: cannot read image {folder / '2.png'}" in capsys.readouterr().err
    cfg.photos.max_bad_images, cfg.output_dir = 0, str(tmp_path / "strict")
    with pytest.raises(ValueError, match="cannot read image .*2.png"):
        style_transfer.train(cfg)


def test_skipped_steps_are_counted_and_change_nothing(tmp_path, train, monkeypatch, capsys):
    """One step's loss is not finite: no update, no trace in the running statistics, a null line."""
    losses_of, calls = style_transfer.losses_of, []

    def poisoned(run, images):
        calls.append(copy.deepcopy(run.model.state_dict()))
        return losses_of(run, images * (math.nan if len(calls) == 3 else 1))

    monkeypatch.setattr(style_transfer, "losses_of", poisoned)
    summary = train(tmp_path, "norm=bn", "max_skipped_steps=1")
    assert summary["skipped_steps"] == 1 and summary["status"] == "finished"
    assert_same(calls[3], calls[2])
    metrics = lines(tmp_path / "metrics.jsonl")
    assert metrics[2]["train/loss"] is None and metrics[3]["train/loss"] > 0
    assert "step 3 of 6, step skipped" in capsys.readouterr().err


# --- stylizing


def stylize(**options):
    cfg = copy.deepcopy(composed("mode=stylize", "device=cpu"))
    for key, value in options.items():
        cfg.stylize[key] = value
    return style_transfer.stylize_images(cfg)


def test_stylizes_files_folders_and_lists(tmp_path, train, photos, capsys):
    train(tmp_path / "run", "schedule.steps=2")
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
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
    image = style_data.read_image(photos / "0.png")  # 30 x 24: padded to 32
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


def test_stylizing_names_what_it_cannot_read(tmp_path, train, photos):
    train(tmp_path / "run", "schedule.steps=1")
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"gone")
    Image.new("RGB", (8, 8)).save(folder / "b.png")
    options = {"checkpoint": str(tmp_path / "run/checkpoint.pt"), "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"1 of 2 images could not be read: .*a.jpg"):
        stylize(images=str(folder), **options)
    assert (tmp_path / "out" / "b.png").exists(), "the others are done all the same"
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        stylize(images=str(tmp_path / "nowhere"), **options)
    with pytest.raises(ValueError, match="would overwrite the image"):
        stylize(images=str(folder), **options | {"output": str(folder)})


def test_same_names_do_not_overwrite_one_another(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    targets = style_transfer.output_files([str(tmp_path)], tmp_path / "out")
    assert [path.name for path in targets.values()] == ["a.png", "a.png.png"]
    for name in "xyz":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    with pytest.raises(ValueError, match="would overwrite"):
        style_transfer.output_files([str(tmp_path / name) for name in "xyz"], tmp_path / "out")


# --- configs and errors


@pytest.mark.parametrize(
    "override, message",
    [
        ("schedule.steps=0", "schedule.steps=0; expected a whole number, 1 or more"),
        ("schedule.batch_size=1.5", "schedule.batch_size=1.5; expected"),
        ("schedule.lr=0", "schedule.lr=0; expected a number above 0"),
        ("loss.style_weight=-1", "loss.style_weight=-1; expected"),
        ("loss.content_layer=conv2", "loss.content_layer=conv2; expected one of"),
        ("loss.style_layers=[relu9_9]", "expected a list of"),
        ("loss.style_layers=[]", "at least one"),
        ("photos.image_size=30", "photos.image_size=30; expected a multiple of 4"),
        ("photos.resize=8", "photos.resize=8; expected a whole number, 16 or more"),
        ("keep_checkpoints=1", "keep_checkpoints=1; expected a whole number, 2 to 1000"),
        ("timeout_minutes=0", "timeout_minutes=0; expected"),
        ("precision=fp8", "precision=fp8; expected one of"),
        ("compile=1", "compile=1; expected true or false"),
        ("run_name=../x", "run_name=../x; expected a name without /"),
        ("vgg.input=bgr", "unknown vgg.input='bgr'"),
        ("norm.name=xn", "unknown norm 'xn'"),
        ("device=tpu", "unknown device='tpu'"),
    ],
)
def test_bad_config(override, message, tmp_path, train):
    with pytest.raises((ValueError, TypeError)) as error:
        train(tmp_path / "run", override)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists(), "an error leaves nothing behind"


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"unknown mode='paint'; choose one of \['train', "):
        style_transfer.dispatch(composed("mode=paint"))


def test_several_processes_are_refused(train, tmp_path, monkeypatch):
    started = style_transfer.distributed.Processes(0, 2, torch.device("cpu"))
    monkeypatch.setattr(style_transfer.distributed, "start", lambda *_: started)
    with pytest.raises(ValueError, match="runs in one process, not 2"):
        train(tmp_path)


@pytest.mark.parametrize(
    "override, message",
    [
        ("style=starry_night", "style.image is not set; add style.image=... to the command"),
        ("photos.root=nowhere", "photos.root=nowhere: no file or folder nowhere"),
        ("vgg.weights=nowhere.pth", "vgg.weights=nowhere.pth: no such file"),
        ("mode=stylize", "stylize.checkpoint is not set; add stylize.checkpoint=..."),
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


OPTIONS = [
    f"{group}={path.stem}"
    for group in ("norm", "photos", "style")
    for path in sorted((ROOT / "configs" / group).glob("*.yaml"))
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_says_its_own_name(option):
    """An inherited name would let two options share a run folder."""
    group, name = option.split("=")
    cfg = composed(option)
    assert cfg[group].name == name
    style_transfer.check_config(copy.deepcopy(cfg))
    sn.make_norm(**cfg.norm)


EXPERIMENTS = sorted(
    path.stem for path in (ROOT / "configs/experiment/style_transfer").glob("*.yaml")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name):
    cfg = copy.deepcopy(composed(f"experiment=style_transfer/{name}"))
    style_transfer.check_config(cfg)
    assert (
        f"style_transfer/{name}"
        in (ROOT / f"configs/experiment/style_transfer/{name}.yaml").read_text()
        or name == "smoke"
    )


def test_experiments_invent_no_keys():
    """An unknown key on the command line is an error, in a YAML file it is not: so, here."""

    def keys(value, prefix=""):
        for key in value:
            inner = value._get_node(key)
            if hasattr(inner, "keys"):
                yield from keys(inner, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    known = set(keys(composed()))
    for name in EXPERIMENTS:
        assert set(keys(composed(f"experiment=style_transfer/{name}"))) <= known, name


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

"""Whatever is wrong in a config is said in one line before training starts, and nothing is written.

The configs are generated: a key of the composed config and a value that it cannot have.
"""

import copy
import functools
import importlib
import subprocess
import sys

import pytest
from faults import ROOT, RUNS, report, user_environment
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sn.training.run.entry import KNOWN, message

# root config -> (module, its function, what it calls when training starts)
ENTRYPOINTS = {
    "imagenet": ("train_imagenet", "train", "train_one_epoch"),
    "detection": ("train_detection", "train", "train_steps"),
    "style_transfer": ("style_transfer", "train", "train_steps"),
    "enas": ("enas.search", "search", "train_child"),
    "enas_retrain": ("enas.retrain", "retrain", "train_one_epoch"),
}
SMALL = {  # whatever is right is quick
    root: ["device=cpu", *RUNS[root][1:]] for root in ENTRYPOINTS
}
# keys whose value is a free text, path or name: any text is right; and those of other modes
FREE = {
    *("note", "output_dir", "output_root", "run_name", "model.name", "data.name", "data.root"),
    *("norm.name", "setting.emulation", "schedule.name", "model.parts_name", "photos.name"),
    *("style.name", "init.name", "names.controller", "names.random", "mode", "checkpoint.path"),
    *("predict.images", "predict.out", "stylize.output", "stylize.size", "stylize.strip_pixels"),
    "export.output",
}


class Started(Exception):
    """Training would have begun."""


@functools.cache
def composed(root, *overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(root, [*SMALL[root], *overrides])


def leaves(config, prefix=""):
    for key in config:
        if OmegaConf.is_missing(config, key):
            continue
        value = config[key]
        if OmegaConf.is_dict(value):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def attempt(root, key, value, folder, monkeypatch):
    """Start the entrypoint with one value changed; return what it raised."""
    name, function, begins = ENTRYPOINTS[root]
    module = importlib.import_module(name)

    def started(*_, **__):
        raise Started

    monkeypatch.setattr(module, begins, started)
    cfg = copy.deepcopy(composed(root))
    cfg.output_dir = str(folder)
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(Exception) as error:
        module.entry.prepare(cfg)
        getattr(module, function)(cfg)
    return error.value


nan, inf = float("nan"), float("inf")
words = st.text(st.characters(categories=["L", "P", "Zs"]), min_size=1, max_size=12)
containers = st.one_of(
    st.lists(st.integers(), max_size=2), st.dictionaries(words, st.integers(), max_size=2)
)


def wrong_values(default):
    """Values that a key with this default cannot have, whatever it means."""
    if isinstance(default, bool):
        return st.one_of(words, st.integers(), st.none(), containers, st.floats())
    if isinstance(default, int):
        fractions = st.floats().filter(lambda v: v != v or v in (inf, -inf) or v != int(v))
        return st.one_of(words, st.integers(max_value=-1), fractions, st.booleans(), containers)
    if isinstance(default, float):
        negative = st.floats(max_value=-1e-9)
        return st.one_of(words, negative, st.just(nan), st.just(inf), st.booleans(), containers)
    if OmegaConf.is_list(default):
        return st.one_of(words, st.integers(), st.lists(words, min_size=1, max_size=3))
    if isinstance(default, str):
        return st.one_of(words, st.integers(), containers)
    return st.one_of(words, st.just(nan), st.dictionaries(words, st.integers(), min_size=1))


def check_generated(root, data, folder, monkeypatch):
    keys = dict(leaves(composed(root)))
    free = sorted(key for key in keys if key not in FREE)
    key = data.draw(st.sampled_from(free), label="key")
    value = data.draw(wrong_values(keys[key]), label="value")
    assume(value != keys[key])
    error = attempt(root, key, value, folder, monkeypatch)
    assert isinstance(error, KNOWN), f"{key}={value!r}: {type(error).__name__}: {error}"
    text = message(error)
    assert text and len(text) < 2000, text
    assert not folder.exists() or not list(folder.iterdir()), f"{key}={value!r} left files"
    return key, repr(value)


SETTINGS = dict(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # an example builds a model: too slow to shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("root", ENTRYPOINTS)
@settings(max_examples=60, **SETTINGS)
@given(data=st.data())
def test_wrong_value_is_refused(root, data, tmp_path, monkeypatch):
    check_generated(root, data, tmp_path / "run", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("root", ENTRYPOINTS)
def test_three_hundred_wrong_values_are_refused(root, tmp_path, monkeypatch):
    tried = set()

    @settings(max_examples=300, **SETTINGS)
    @given(data=st.data())
    def each(data):
        tried.add(check_generated(root, data, tmp_path / "run", monkeypatch))

    each()
    report(test="wrong_value", entrypoint=root, different_values=len(tried), refused=len(tried))


@pytest.mark.parametrize("root", ENTRYPOINTS)
def test_the_unchanged_config_would_start(root, tmp_path, monkeypatch):
    """What is generated fails for the changed key alone."""
    assert isinstance(attempt(root, "seed", 1, tmp_path / "run", monkeypatch), Started)


@pytest.mark.parametrize("root", ENTRYPOINTS)
@settings(max_examples=40, **SETTINGS)
@given(key=st.text("abcdefghijklmnopqrstuvwxyz_.", min_size=1, max_size=20), value=words)
def test_unknown_key_does_not_compose(root, key, value):
    assume(OmegaConf.select(composed(root), key, throw_on_resolution_failure=False) is None)
    assume(key not in ("hydra", *dict(leaves(composed(root)))))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        with pytest.raises(HydraException):
            compose(root, [f"{key}='{value}'".replace("''", "'")])


COMMANDS = [
    ("train_imagenet.py", "nrom=bn"),
    ("train_imagenet.py", "norm=batchnorm"),
    ("train_imagenet.py", "setting=8_32"),
    ("train_imagenet.py", "=="),
    ("train_imagenet.py", "seed=abc", "device=cpu"),
    ("train_imagenet.py", "data=imagenet", "device=cpu"),
    ("train_imagenet.py", "data=imagenet", "data.root=nowhere", "device=cpu"),
    ("train_imagenet.py", "data=cifar10", "data.root='no where; $(touch hit)'", "device=cpu"),
    ("train_imagenet.py", "run_name='../../outside'", "device=cpu"),
    ("train_imagenet.py", "data.name=../up", "device=cpu"),
    ("train_imagenet.py", "output_dir=/dev/null/x", "device=cpu", "data.train_images=8"),
    ("train_imagenet.py", "keep_checkpoints=0", "device=cpu"),
    ("train_imagenet.py", "experiment=imagenet/none"),
    ("train_detection.py", "mode=nothing", "device=cpu"),
    ("train_detection.py", "parts.backbone.name=bnn", "device=cpu", "data.root=d"),
    ("train_detection.py", "data=coco", "data.root='no where'", "device=cpu"),
    ("train_detection.py", "model.freeze_at=2", "device=cpu"),
    ("style_transfer.py", "vgg.weights=none.pth", "device=cpu"),
    ("style_transfer.py", "mode=stylize", "device=cpu"),
    ("style_transfer.py", "mode=stylize", "stylize.checkpoint=no.pt", "stylize.images=x"),
    ("style_transfer.py", "photos=folder", "photos.root=nowhere", "vgg.weights=random"),
    ("enas.search", "controller.norm=bn", "device=cpu"),
    ("enas.search", "controller.num_groups=7", "device=cpu"),
    ("enas.retrain", "device=cpu"),
    ("enas.retrain", "arch=nowhere.json", "device=cpu"),
    ("scripts/make_tables.py", "--runs", "nowhere"),
    ("scripts/plot_accuracy.py", "--runs", "nowhere"),
    ("scripts/plot_importance.py", "--runs", "nowhere"),
    ("scripts/plot_style.py", "--runs", "nowhere"),
    ("scripts/plot_enas.py", "--runs", "nowhere"),
    ("scripts/keep_records.py", "nowhere"),
    ("scripts/evaluate_checkpoint.py", "nowhere.pt", "--device", "cpu"),
    ("scripts/convert_checkpoint.py", "nowhere.pth", "out.pt"),
]


def slow_but(quick, cases):
    """Test cases of which only those whose index is in `quick` are in the short suite."""
    return [
        pytest.param(case, marks=[] if index in quick else pytest.mark.slow)
        for index, case in enumerate(cases)
    ]


@pytest.mark.parametrize("words", slow_but({2, 8, 13, 17, 21, 25}, COMMANDS), ids=" ".join)
def test_bad_command(words, tmp_path):
    """As a user types it: an exit code, a short message, no traceback, no file."""
    script, *overrides = words
    program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    done = subprocess.run(
        [sys.executable, *program, *overrides],
        cwd=tmp_path,
        env=user_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode > 0, done.stdout
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 25, done.stderr
    assert done.stderr.strip()
    assert not list(tmp_path.iterdir())

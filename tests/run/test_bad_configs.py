"""What only a real start can show: a bad config ends in one line, and nothing is written.

Types, ranges and unknown keys are in test_config.py; here are the open mappings, whose values the
code that takes them checks, and the command lines.
"""

import importlib
import subprocess
import sys
import typing

import pytest
from faults import ROOT, user_environment
from test_config import base, fields, has_schema
from workers import schema, slow_but, with_value

from sn.training.run.entry import KNOWN, message
from sn.training.run.session import Session

ENTRYPOINTS = {  # root config -> module, its function
    "imagenet": ("train_imagenet", "train"),
    "detection": ("train_detection", "train"),
    "style_transfer": ("style_transfer", "train"),
    "enas": ("enas.search", "search"),
    "enas_retrain": ("enas.retrain", "retrain"),
}
roots = pytest.mark.parametrize(
    "root",
    [
        pytest.param(root, marks=pytest.mark.skipif(not has_schema(root), reason="no schema yet"))
        for root in ENTRYPOINTS
    ],
)


class Started(Exception):
    """Training would have begun."""


def attempt(root, key, value, folder, monkeypatch, add=False):
    """Start the entrypoint with one value changed; return what it raised before its first step."""
    name, function = ENTRYPOINTS[root]

    def started(*_, **__):
        raise Started

    monkeypatch.setattr(Session, "begin", started)
    with pytest.raises(Exception) as error:
        config = with_value(root, base(root), key, value, add)
        config.output_dir = str(folder)
        getattr(importlib.import_module(name), function)(config)
    return error.value


def open_values(mapping, prefix):
    """(key, value) of every value in an open mapping."""
    for key, value in mapping.items():
        if hasattr(value, "items"):
            yield from open_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def wrong_values(value):
    """Values that a key with this one cannot have, whatever it means."""
    if isinstance(value, bool):
        return ["abc", 7.5]
    if isinstance(value, int):
        return ["abc", -1]
    if isinstance(value, float):
        return ["abc", -0.5]
    if isinstance(value, str):
        return ["no such thing", {"a": 1}]
    return ["abc"]


@roots
def test_wrong_value_in_an_open_mapping_is_refused(root, tmp_path, monkeypatch):
    """One line that names the value, and no file; an unknown key as well."""
    for prefix, hint, *_ in fields(schema(root)):
        if typing.get_origin(hint) is dict:
            mapping = base(root)
            for part in prefix.split("."):
                mapping = mapping[part]
            values = [
                (key, wrong, False)
                for key, value in open_values(mapping, f"{prefix}.")
                if value is not None and not key.endswith((".name", "_name"))
                for wrong in wrong_values(value)
            ]
            for key, value, add in [*values, (f"{prefix}.xyzzy", 1, True)]:
                error = attempt(root, key, value, tmp_path / "run", monkeypatch, add)
                assert isinstance(error, KNOWN), f"{key}={value!r}: {error!r}"
                assert message(error) and len(message(error)) < 2000
                left = (tmp_path / "run").exists() and list((tmp_path / "run").iterdir())
                assert not left, f"{key}={value!r} left {left}"


@roots
def test_the_unchanged_config_would_start(root, tmp_path, monkeypatch):
    """What is refused above is refused for the changed key alone."""
    assert isinstance(attempt(root, "seed", 1, tmp_path / "run", monkeypatch), Started)


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


@pytest.mark.parametrize("words", slow_but({2, 25}, COMMANDS), ids=" ".join)
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

"""Every command block of README, CONTRIBUTING and docs is one that the program takes.

A block of ``` or ```bash holds commands, ```python holds code, ```text neither. Commands are
composed with the typed configs, or parsed by the script's own parser; `make test-slow` runs those
of `RUN` at a small scale, one after the other in one folder.
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from workers import config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRYPOINTS = {
    "train_imagenet.py": "imagenet",
    "train_detection.py": "detection",
    "style_transfer.py": "style_transfer",
    "enas.search": "enas",
    "enas.retrain": "enas_retrain",
    "enas.nasbench201": "nasbench201",
    "enas.darts": "darts",
}
OF_IMAGES = ("device=cpu", "schedule.epochs=1", "data.train_images=16", "setting.images_per_gpu=2",
             "evaluation.batch_average.batch_size=8")  # fmt: skip
OF_FILES = ("data.image_size=32", "data.resize=32", "data.workers=0", "model.name=resnet18",
            "model.source=torchvision", "data.root=images")  # fmt: skip
OF_DIGITS = ("schedule.images=16", "data.generate.train_images=16", "data.generate.val_images=2",
             "data.generate.size=96", "log_steps=1")  # fmt: skip
OF_SEARCH = ("data.train_images=64", "epochs=1", "controller.updates=2", "evaluation.images=64",
             "evaluation.candidates=2")  # fmt: skip
RUN = {  # beginning of a command -> what makes it small; ... stands for the checkpoint just made
    "python train_imagenet.py norm=sn setting=8x2": OF_IMAGES,
    "python train_imagenet.py data=imagenet data.name=birds data.root=/data/birds norm=gn": (
        OF_IMAGES + OF_FILES
    ),
    "python train_imagenet.py experiment=imagenet/table_4_1 norm=sn": OF_IMAGES + OF_FILES,
    "python train_detection.py parts=sn": OF_DIGITS,
    "python train_detection.py norm@parts.backbone=gn": OF_DIGITS,
    "python style_transfer.py vgg.weights=random experiment=style_transfer/smoke": (),
    "python -m enas.search": OF_SEARCH,
    "python -m enas.retrain": ("data.train_images=64", "epochs=1"),
    "python -m enas.draw": (),
    "python scripts/make_tables.py --runs outputs --print": (),
    "python scripts/plot_accuracy.py --runs outputs": (),
    "python scripts/plot_importance.py --runs outputs": (),
    "python scripts/plot_enas.py --runs outputs": (),
}
NOT_RUN = ("experiment=enas/paper", "sampler=random")  # hours; the same command once more
INSTALLED = {"tensorboard", "pip", "jupyter"}  # other people's programs


def blocks(page: Path):
    """(kind, line, text) of each fenced block."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
    text = page.read_text(encoding="utf-8")
    for match in fence.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield match.group(2), line, match.group(3)


def commands(kinds=("", "bash", "sh")) -> dict[str, list[str]]:
    """Words of every command, by `page:line of its block: command`."""
    found = {}
    for page in PAGES:
        for kind, line, text in blocks(page):
            if kind in kinds:
                for command in text.replace("\\\n", " ").splitlines():
                    words = shlex.split(command, comments=True)
                    if words:
                        found[f"{page.name}:{line}: {' '.join(words)}"] = words
    return found


COMMANDS = commands()
CODE = {f"{p.name}:{n}": text for p in PAGES for kind, n, text in blocks(p) if kind == "python"}


def test_blocks_are_of_a_known_kind():
    kinds = {kind for page in PAGES for kind, _, _ in blocks(page)}
    assert kinds <= {"", "bash", "sh", "python", "text"}
    assert len(COMMANDS) > 30 and len(CODE) >= 1
    assert all(page.read_text().count("```") == 2 * len([*blocks(page)]) for page in PAGES)


def check(words: list[str]) -> None:
    """Raise, or fail, if a command is not one that its program takes."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment
        words = words[1:]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets)
    elif program == "scripts/launch.sh" or program in ("torchrun", "sbatch"):
        script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        assert all(word.isdigit() or word.startswith("-") or (ROOT / word).is_file()
                   for word in rest[:script])  # fmt: skip
        compose(*rest[script:])
    elif program == "scripts/sweep_settings.sh":
        done = subprocess.run(
            ["bash", str(ROOT / program), "--dry-run", *rest], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = [shlex.split(line) for line in done.stdout.splitlines()]
        assert lines
        for line in (lines[0], lines[-1]):  # the script itself knows norms and settings
            compose(*line[1:])
    elif program in ("python", ".venv/bin/python"):
        module = rest[0] == "-m"
        name, *arguments = rest[module:]
        if name == "pytest":
            assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
        elif name in ENTRYPOINTS:
            compose(name, *arguments)
        else:
            parse(name, arguments, module)
    else:
        assert program in INSTALLED or (ROOT / program).is_file(), f"what is {program}?"


def compose(script: str, *overrides: str) -> None:
    """Every config that the overrides stand for fits its schema."""
    words = [word for word in overrides if word not in ("...", "-m")]
    words = [word for word in words if not word.startswith("hydra/launcher=")]  # a plugin's
    parsed = OverridesParser.create().parse_overrides(words)
    for batch in BasicSweeper.split_arguments(parsed, None):
        for job in batch:
            config(*job, root=ENTRYPOINTS[Path(script).name])


class Parsed(Exception):
    """The arguments were taken."""


def parse(name: str, arguments: list[str], module: bool) -> None:
    """Run a script up to the point where its parser has taken the arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            if module:
                runpy.run_module(name, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except Parsed:
            return
        except SystemExit as end:
            assert end.code in (0, None), f"{name} refuses {arguments}"
            return
    raise AssertionError(f"{name} parsed no arguments")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("command", COMMANDS, ids=[name[:70] for name in COMMANDS])
def test_command(command):
    check(COMMANDS[command])


@pytest.mark.parametrize("words, error", [
    ("python train_imagenet.py norm=xy", ValueError),
    ("python train_imagenet.py schedule.epoch=3", ValueError),
    ("python train_imagenet.py -m norm=bn,xy", ValueError),
    ("scripts/launch.sh 8 train_imagenet.py setting=8x32 seed=-1", ValueError),
    ("scripts/sweep_settings.sh --norms xy", AssertionError),
    ("python scripts/make_tables.py --run outputs --prin=3", AssertionError),
    ("python scripts/no_such.py", OSError),
    ("python -m enas.search sampler=xy", ValueError),
    ("make tests", AssertionError),
    ("train_imagenet norm=bn", AssertionError),
])  # fmt: skip
def test_wrong_commands_are_found(words, error):
    with pytest.raises(error):
        check(words.split())


@pytest.mark.parametrize("where", CODE)
def test_code(where):
    exec(compile(CODE[where], where, "exec"), {"__name__": where})


def small(command: list[str]) -> list[str] | None:
    """The words of a command of `RUN`, made small; None: it is only composed."""
    line = " ".join(command)
    extra = [words for start, words in RUN.items() if line.startswith(start)]
    if not extra or any(word in command for word in NOT_RUN):
        return None
    python = [sys.executable, "-m"] if command[1] == "-m" else [sys.executable]
    name, *rest = command[len(python) :]
    checkpoint = "outputs/imagenet/digits_resnet20/sn_8x2/seed0"
    rest = [word.replace("outputs/...", checkpoint) for word in rest]
    return [*python, name if "-m" in python else str(ROOT / name), *rest, *extra[0]]


@pytest.mark.slow
def test_commands_run_in_order(tmp_path):
    """As a reader would, at a small scale, in a folder of its own."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for index in range(8):
                color = tuple(torch.randint(255, (3,)).tolist())
                file = tmp_path / "images" / split / label / f"{index}.png"
                Image.new("RGB", (40, 36), color).save(file)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = []
    for name, words in COMMANDS.items():
        command = small(words)
        if command is None or command in done:
            continue
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{name}\n{result.stdout[-1000:]}{result.stderr[-2000:]}"
        done.append(command)
    starts = [start for start in RUN if not any(
        " ".join(words).startswith(start) for words in COMMANDS.values())]  # fmt: skip
    assert not starts, "no longer in the docs"
    assert list((tmp_path / "outputs").rglob("figures/*.png")) and len(done) > 10

"""Every command block of README, CONTRIBUTING and docs is one that the program takes.

A block of ``` or ```bash holds commands, ```python holds code, ```text neither. Commands are
composed with the typed configs, or parsed by the script's own parser; nothing is run here.
"""

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
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

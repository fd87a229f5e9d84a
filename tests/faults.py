"""What the tests under fault share: tiny runs of every entrypoint, and killing them."""

import atexit
import contextlib
import datetime
import functools
import gc
import itertools
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from workers import processes

from sn.training.run.checkpoint import load_checkpoint
from sn.training.run.record import Recorder, environment
from sn.training.run.stopping import Watchdog

ROOT = Path(__file__).resolve().parents[1]
DATA = tempfile.mkdtemp()  # what the runs draw for themselves
atexit.register(shutil.rmtree, DATA, ignore_errors=True)
# entrypoint -> module and overrides of a run of 8 to 30 steps with a checkpoint after each
RUNS = {
    "imagenet": (
        "train_imagenet",
        *("norm=sn", "setting.gpus=2", "setting.images_per_gpu=4", "schedule.epochs=4"),
        *("data.train_images=48", "evaluation.batch_average.batches=2", "checkpoint_steps=1"),
        *("model.name=resnet8", "model.width=8", "log_steps=2"),
    ),
    "detection": (
        "train_detection",
        *("parts=sn", "setting.gpus=2", "setting.images_per_gpu=1", "schedule.images=16"),
        *("schedule.warmup_images=4", "data.sizes=[32,48]", "data.test_size=48"),
        *("data.max_size=64", "model.fpn_channels=16", "model.box_features=16"),
        *("model.rois_per_image=8", "model.proposals_train=20", "model.proposals_test=10"),
        *("data.generate={train_images: 6, val_images: 3, size: 64, seed: 0}", "log_steps=2"),
        *("evaluation.pictures=0", "checkpoint_steps=1", f"data.root={DATA}/digits_coco"),
    ),
    "style_transfer": (
        "style_transfer",
        *("norm=sn", "vgg.weights=random", "model.width=4", "model.residual_blocks=1"),
        *("photos.image_size=16", "photos.workers=0", "style.size=24", "schedule.steps=24"),
        *("loss.style_layers=[relu1_2,relu2_2]", "schedule.batch_size=2", "evaluation.images=2"),
        *("importance_steps=5", "checkpoint_steps=1", "log_steps=3"),
    ),
    "enas": (
        "enas.search",
        *("data.train_images=24", "epochs=3", "controller.updates=4", "controller.batch_size=8"),
        *("controller.hidden_size=8", "controller.num_groups=2", "child.layers=1"),
        *("child.filters=4", "child.nodes=2", "optimizer.batch_size=8"),
        *("evaluation.batch_size=8", "evaluation.images=20", "evaluation.candidates=2"),
        *("checkpoint_steps=1", "log_steps=2"),
    ),
    "enas_retrain": (
        "enas.retrain",
        *("data.train_images=48", "epochs=4", "child.layers=1", "child.filters=4", "arch=random"),
        *("optimizer.batch_size=8", "arch_nodes=2", "checkpoint_steps=1", "log_steps=2"),
    ),
}
TIMES = {"wall_s", "images_per_s", "steps_per_s", "date", "commit", "device", "seconds"}


# entrypoint -> overrides that make its run long enough for 2,500 steps
LONG = {
    "imagenet": ("schedule.epochs=500",),
    "detection": ("schedule.images=5200", "evaluation.every_images=500"),
    "style_transfer": ("schedule.steps=2600",),
    "enas": ("epochs=400",),
    "enas_retrain": ("epochs=450",),
}


class Crash(Exception):
    """What a crash raises: nothing in the code catches it."""


@contextlib.contextmanager
def crash_at(event, calls):
    """Raise Crash at a moment just before or after one of `calls`, (owner, names of its functions).

    `event` is the moment's number, or (its name, which of these). Yields the names of the moments
    passed, so that a run with None counts them.
    """
    passed = []

    def moment(name):
        passed.append(name)
        if event in (len(passed) - 1, (name, passed.count(name))):
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

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (*calls, (Recorder, ("open", "metrics", "importance", "finish"))):
            for name in names:
                wrap(owner, name)
        yield passed


def start(module: str, *overrides: str, errors: Path | None = None) -> BaseProcess:
    """The entrypoint's command line in a fresh process, without the seconds that imports take.

    `errors` gets what it writes to stderr.
    """
    process = processes.Process(target=_main, args=(module, overrides, errors))
    process.start()
    return process


def _main(module: str, overrides: tuple[str, ...], errors: Path | None = None) -> None:
    torch.set_num_threads(1)
    sys.argv = [module, "device=cpu", *overrides]
    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def measure(module: str, overrides: tuple[str, ...], at: tuple[int, ...], path: Path) -> None:
    """Run the entrypoint up to its last count in `at`; write its memory and open files to `path`.

    A count is a beat of the watchdog: a step, or a batch of an evaluation.
    """
    beat, seen = Watchdog.beat, {}
    counts = itertools.count(1)

    def measured(self, where):
        beat(self, where)
        count = next(counts)
        if count in at:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            mib = pages * resource.getpagesize() / 2**20
            seen[count] = {"mib": round(mib, 1), "files": len(os.listdir("/proc/self/fd"))}
        if count == at[-1]:
            path.write_text(json.dumps(seen))
            os._exit(0)

    Watchdog.beat = measured
    _main(module, overrides)


def command(module: str, *overrides: str) -> list[str]:
    """The same as a user types it."""
    return [sys.executable, "-m", module, "device=cpu", *overrides]


def user_environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def run(module: str, *overrides: str) -> None:
    """A whole run, undisturbed."""
    process = start(module, *overrides)
    process.join(300)
    assert process.exitcode == 0


def outcome(folder: Path) -> dict:
    """Everything a run leaves that must not depend on interruptions."""
    found = {"checkpoint": load_checkpoint(folder / "checkpoint.pt")}
    if (folder / "checkpoint_best.pt").exists():
        found["best"] = load_checkpoint(folder / "checkpoint_best.pt")
    for name in ("metrics.jsonl", "importance.jsonl", "steps.jsonl"):
        if (folder / name).exists():
            found[name] = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    found["summary"] = json.loads((folder / "summary.json").read_text())
    return without_times(found)


def assert_same(ours, theirs, where="not equal"):
    """Equal bit for bit, tensors included."""
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}: {key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), f"{where}: {len(ours)} entries, not {len(theirs)}"
        for index, (a, b) in enumerate(zip(ours, theirs)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert ours == theirs, where


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def kill_again_and_again(
    run_of: tuple[str, ...], folder: Path, kills: int, rng: random.Random
) -> int:
    """Start the run and SIGKILL it at random moments, `kills` times at most, until it ends.

    After every kill each file must be readable. Returns the number of kills.
    """
    done, longest = 0, 1.0
    while not (folder / "summary.json").exists():
        before = newest(folder)
        process = start(*run_of, f"output_dir={folder}")
        process.join(rng.uniform(0, longest) if done < kills else 300)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            done += 1
        assert process.exitcode in (0, -signal.SIGKILL)
        readable(folder)
        if newest(folder) == before:
            longest = min(longest * 1.2, 60)  # a slow machine: let it get to its first step
    return done


def newest(folder: Path) -> float:
    path = folder / "checkpoint.pt"
    return path.stat().st_mtime if path.exists() else 0.0


def readable(folder: Path) -> None:
    load_checkpoint(folder / "checkpoint.pt")
    for path in folder.glob("*.jsonl"):
        *lines, last = path.read_text().split("\n")
        assert all(json.loads(line) for line in lines)
    if (folder / "summary.json").exists():
        json.loads((folder / "summary.json").read_text())


def children(pid: int) -> list[int]:
    """Processes that `pid` has started, and theirs."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *children(int(child))]
    return found


def ranks(launcher: subprocess.Popen, count: int) -> dict[int, int]:
    """Process id of each of the `count` ranks that a launcher has started."""
    deadline = time.monotonic() + 120
    found = {}
    while len(found) < count and time.monotonic() < deadline:
        found = {}
        for pid in children(launcher.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for variable in variables:
                if variable.startswith(b"RANK="):
                    found.setdefault(int(variable[5:]), pid)
        time.sleep(0.05)
    return found


def wait_for(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def report(**figures) -> None:
    """Append a line to the file that SN_FAULT_REPORT names, if it does."""
    if "SN_FAULT_REPORT" in os.environ:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = {**figures, "date": now, **environment(torch.device("cpu"))}
        with open(os.environ["SN_FAULT_REPORT"], "a") as file:
            file.write(json.dumps(line) + "\n")

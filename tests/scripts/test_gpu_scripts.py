"""What is carried to a GPU machine, and the script that works through the steps there."""

import os
import pickle
import re
import subprocess
import tarfile
from pathlib import Path

import gpu_pack
import numpy as np

from sn.training.classification.data import load_cifar10

ROOT = Path(__file__).parents[2]


def test_images_come_back_with_the_same_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "TRAIN", 7)
    generator = np.random.default_rng(0)
    (tmp_path / "whole" / "cifar-10-batches-py").mkdir(parents=True)
    for number in range(1, 6):
        pixels = generator.integers(0, 256, (1003, 3072), dtype=np.uint8)
        batch = {"data": pixels, "labels": generator.integers(0, 10, 1003).tolist()}
        path = tmp_path / "whole" / "cifar-10-batches-py" / f"data_batch_{number}"
        path.write_bytes(pickle.dumps(batch))
    gpu_pack.pack_images(str(tmp_path / "whole"), tmp_path / "images.npz")
    gpu_pack.unpack_images(tmp_path / "images.npz", tmp_path / "small")
    options = {"train_images": 7, "image_size": 16}
    whole, small = (load_cifar10(str(tmp_path / name), **options) for name in ("whole", "small"))
    assert whole.describe() == small.describe() and len(small.train) == 7
    assert (whole.val.images == small.val.images).all() and whole.val.labels == small.val.labels


def run(out, python, budget):
    """scripts/gpu_check.sh with `python` for the interpreter."""
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh")]
    environment = {**os.environ, "DRY": "1", "OUT": str(out), "PYTHON": str(python)}
    environment |= {"BUDGET": str(budget), "WORK": f"{out}.work", "GPU_DATA": f"{out}.data"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def interpreter(path, failing=""):
    """A program that notes how it was called, and fails where `failing` is among the arguments."""
    lines = ["#!/bin/bash", f'echo "$*" >>{path}.calls', "echo said"]
    lines += [f'[[ -n "{failing}" && "$*" == *"{failing}"* ]] && exit 3', "exit 0"]
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    return path


def test_steps_go_on_after_a_failure_and_are_not_repeated(tmp_path):
    out, python = tmp_path / "out", interpreter(tmp_path / "python", failing="gpu_sync_free")
    first = run(out, python, 100)
    assert first.returncode == 2 and "steps_without_sync exit code 3" in first.stdout
    steps = (out / "steps.txt").read_text()
    for name in ("tests_kernels", "first_use_check", "layers", "networks", "ddp"):
        assert f"{name} done" in steps
    assert len(list(out.iterdir())) <= 8 and "=== layers" in (out / "log.txt").read_text()
    calls = Path(f"{python}.calls")
    calls.unlink()
    second = run(out, interpreter(python), 100)
    assert second.returncode == 0 and "all is done" in second.stdout, second.stdout
    again = calls.read_text()
    assert "gpu_sync_free" in again and "bench_norm" not in again


def test_another_machine_goes_on_from_what_came_back(tmp_path):
    python = interpreter(tmp_path / "python")
    run(tmp_path / "out", python, 100)
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "out" / "rest.tar.gz").rename(other / "rest.tar.gz")
    assert "layers: done before" in run(other, python, 100).stdout


def test_what_comes_back_has_every_record_and_no_weights_of_finished_runs(tmp_path):
    runs = tmp_path / "out.work" / "runs"
    for name, files in (("done", ("summary.json", "checkpoint.pt")), ("half", ("checkpoint.pt",))):
        (runs / name).mkdir(parents=True)
        for file in files:
            (runs / name / file).write_text("{}")
    run(tmp_path / "out", interpreter(tmp_path / "python"), 100)
    with tarfile.open(tmp_path / "out" / "rest.tar.gz") as packed:
        names = {name for name in packed.getnames() if re.match(r"./runs/.*\.", name)}
    assert names == {"./runs/done/summary.json", "./runs/half/checkpoint.pt"}


def test_what_pending_experiments_write_comes_back():
    lines = (ROOT / "scripts" / "gpu_pending.txt").read_text().splitlines()
    for line in lines:
        assert line.startswith("#") or "$WORK/" in line, line


def test_nothing_begins_without_time_for_it(tmp_path):
    done = run(tmp_path / "out", interpreter(tmp_path / "python"), 14)
    assert done.returncode != 0 and "environment: no time left" in done.stdout

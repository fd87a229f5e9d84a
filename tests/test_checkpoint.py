"""Checkpoints survive an interrupted write, a broken file, and hold no code."""

import multiprocessing
import os
import pickle
import shutil
import signal
import time
import zipfile

import pytest
import torch

from sn.training import checkpoint
from sn.training.checkpoint import load_checkpoint, save_checkpoint


def state(number):
    return {
        "model": {"weight": torch.full((50, 50), float(number)), "half": torch.ones(2).bfloat16()},
        "progress": {"epoch": number, "loss": 0.5},
        "batch_average": None,
    }


def number_in(path):
    return load_checkpoint(path)["progress"]["epoch"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def test_round_trip(path):
    assert load_checkpoint(path) is None
    save_checkpoint(path, state(1))
    loaded = load_checkpoint(str(path))
    assert torch.equal(loaded["model"]["weight"], state(1)["model"]["weight"])
    assert loaded["model"]["half"].dtype == torch.bfloat16
    assert loaded["progress"] == {"epoch": 1, "loss": 0.5} and loaded["batch_average"] is None
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_the_one_before_is_kept(path):
    for number in (1, 2, 3):
        save_checkpoint(path, state(number))
    assert number_in(path) == 3
    assert number_in(path.with_name("checkpoint_previous.pt")) == 2
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("how", ["before", "half", "after"])
def test_exception_while_saving(how, path, monkeypatch):
    """The old file stays the newest; what was begun does not pass for a checkpoint."""
    for number in (1, 2):
        save_checkpoint(path, state(number))
    save = torch.save

    def broken(value, file):
        if how == "after":
            save(value, file)
        elif how == "half":
            file.write(b"PK\x03\x04 half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, state(3))
    monkeypatch.setattr(torch, "save", save)
    assert number_in(path) == 2
    assert number_in(path.with_name("checkpoint_previous.pt")) == 1
    save_checkpoint(path, state(4))  # what was left over is no obstacle
    assert number_in(path) == 4
    assert {file.name for file in path.parent.iterdir()} == {
        "checkpoint.pt", "checkpoint_previous.pt",
    }  # fmt: skip


def test_value_that_cannot_be_saved(path):
    save_checkpoint(path, state(1))
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint(path, state(2) | {"bad": lambda: 0})
    assert number_in(path) == 1


@pytest.mark.parametrize("call", [1, 2])
def test_interrupted_between_the_two_renames(call, path, monkeypatch, capsys):
    for number in (1, 2):
        save_checkpoint(path, state(number))
    replace, calls = os.replace, []

    def dying(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, state(3))
    monkeypatch.setattr(os, "replace", replace)
    assert number_in(path) == 2
    save_checkpoint(path, state(3))
    assert number_in(path) == 3


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "text": lambda content: b"not a checkpoint",
    "zeros": lambda content: bytes(len(content)),
    "wrong bytes within": lambda content: content[:3000] + b"\xff" * 200 + content[3200:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_broken_newest_file(damage, path, capsys):
    """The previous one is taken and the broken one named; two broken ones are an error."""
    for number in (1, 2):
        save_checkpoint(path, state(number))
    path.write_bytes(damage(path.read_bytes()))
    assert number_in(path) == 1
    warning = capsys.readouterr().err
    assert "warning" in warning and str(path) in warning
    assert warning.count("\n") == 1
    previous = path.with_name("checkpoint_previous.pt")
    previous.write_bytes(damage(previous.read_bytes()))
    with pytest.raises(ValueError, match="no readable checkpoint") as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and str(previous) in str(error.value)


def test_only_a_broken_file(path):
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no readable checkpoint.*delete to start anew"):
        load_checkpoint(path)


def test_the_good_one_survives_saving_over_a_broken_one(path, capsys):
    """1 good, 2 broken, then 3 is saved and broken too: 1 must still be there."""
    for number in (1, 2):
        save_checkpoint(path, state(number))
    path.write_bytes(b"broken")
    assert number_in(path) == 1
    save_checkpoint(path, state(3))
    path.write_bytes(b"broken too")
    assert number_in(path) == 1


class Foreign:
    pass


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_foreign_class_is_refused(path, tmp_path, capsys):
    marker = tmp_path / "code ran"
    for value in (Foreign(), Evil(str(marker))):
        torch.save({"progress": value}, path)
        with pytest.raises(ValueError, match="no readable checkpoint"):
            load_checkpoint(path)
        assert not marker.exists()
        assert "warning" in capsys.readouterr().err


def test_a_folder_in_its_place(path):
    path.mkdir()
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_checkpoint(path)


def test_is_an_ordinary_torch_file(path):
    save_checkpoint(path, state(1))
    assert zipfile.is_zipfile(path)
    assert torch.load(path, weights_only=True)["progress"]["epoch"] == 1


def _save_for_ever(path):
    torch.set_num_threads(1)
    for number in range(1, 10**6):
        save_checkpoint(path, state(number))


def test_sigkill_at_any_time(path):
    """A process that does nothing but save is killed at ten moments: always a whole file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sn.training.checkpoint"])
    for attempt in range(10):
        process = context.Process(target=_save_for_ever, args=(path,))
        process.start()
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.01 + 0.007 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert number_in(path) >= 1
        shutil.rmtree(path.parent)
        path.parent.mkdir()


def test_written_before_it_is_renamed(path, monkeypatch):
    """fsync of the file comes before the rename, fsync of the folder after it."""
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda a, b: (order.append("replace"), replace(a, b))
    )
    save_checkpoint(path, state(1))
    assert order == ["fsync", "replace", "fsync"]

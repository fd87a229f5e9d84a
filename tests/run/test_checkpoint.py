"""Checkpoints survive an interrupted write, a broken file, and hold no code."""

import argparse
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sn
from sn.training.run import checkpoint
from sn.training.run.checkpoint import (
    fitting,
    keep_best,
    load_checkpoint,
    load_network,
    load_weights,
    metadata,
    plain_names,
    restore,
    save_checkpoint,
)
from sn.training.run.guard import FiniteGuard, can_decide
from sn.training.run.session import Progress


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
        text = capsys.readouterr().err
        assert "it holds " in text and "; expected plain tensors" in text
        assert "weights_only" not in text  # torch's advice to load it all the same


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
    context.set_forkserver_preload(["train_imagenet"])  # one server for all tests
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


@pytest.mark.parametrize("keep", [2, 3, 5])
def test_keeps_the_last_k(keep, path):
    for number in range(1, 8):
        save_checkpoint(path, state(number), keep)
        found = {number_in(file) for file in path.parent.iterdir()}
        assert found == set(range(max(1, number - keep + 1), number + 1))
    save_checkpoint(path, state(8), keep=2)  # fewer from now on
    assert {number_in(file) for file in path.parent.iterdir()} == {7, 8}


def test_falls_back_through_all_that_are_kept(path, capsys):
    for number in (1, 2, 3, 4):
        save_checkpoint(path, state(number), keep=4)
    for name, expected in [("", 3), ("_previous", 2), ("_previous2", 1)]:
        path.with_name(f"checkpoint{name}.pt").write_bytes(b"broken")
        assert number_in(path) == expected
    assert capsys.readouterr().err.count("warning") == 1 + 2 + 3


def test_killed_anywhere_in_a_rotation(path, monkeypatch):
    """After each rename in turn: the newest that can be read is at most one save old."""
    replace = os.replace
    for call in range(1, 5):
        for number in range(1, 6):
            save_checkpoint(path, state(number), keep=4)
        calls = []

        def dying(*args, calls=calls, call=call):
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt
            replace(*args)

        monkeypatch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, state(6), keep=4)
        monkeypatch.setattr(os, "replace", replace)
        assert number_in(path) == 5, f"killed at rename {call}"
        for file in path.parent.iterdir():
            file.unlink()


@pytest.mark.parametrize("links", [True, False])
def test_best_is_kept(links, path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    for number in (1, 2):
        save_checkpoint(path, state(number))
        keep_best(path)
    for number in (3, 4, 5):
        save_checkpoint(path, state(number))
    assert number_in(path.with_name("checkpoint_best.pt")) == 2
    assert len(list(path.parent.iterdir())) == 3


def test_full_disk(path):
    """A file that cannot grow, as on a full disk: the old one whole, no rest of the new."""
    save_checkpoint(path, state(1))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match="cannot write checkpoint .* MiB free.*untouched"):
            save_checkpoint(path, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert number_in(path) == 1
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_folder_that_takes_no_files(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write checkpoint|Not a directory"):
        save_checkpoint(tmp_path / "file" / "checkpoint.pt", state(1))


def test_a_flipped_bit_is_seen_or_harmless(path, capsys):
    """200 single bits: the content read is never another one."""
    save_checkpoint(path, state(1))
    save_checkpoint(path, state(2))
    content, expected = path.read_bytes(), state(2)["model"]["weight"]
    rng, refused = random.Random(0), 0
    for _ in range(200):
        position, bit = rng.randrange(len(content)), rng.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        loaded = load_checkpoint(path)
        if loaded["progress"]["epoch"] == 1:
            refused += 1
        else:
            assert torch.equal(loaded["model"]["weight"], expected)
            assert loaded["progress"] == {"epoch": 2, "loss": 0.5}
    assert refused > 150


def test_checkpoint_of_another_kind(path, capsys):
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_checkpoint(path, needed=("model",))
    assert "no 'model'" in capsys.readouterr().err
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_checkpoint(path, needed=("model",))


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02}q\x00h\x05.",  # a memo entry that is not there
        b"\x80\x02s.",  # an empty stack
        b"\x80\x02X\x01\x00",  # a length cut short
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueq\x00\x85R.",  # a call
    ],
)
def test_nonsense_in_a_sound_archive(code, path, capsys):
    """The checksums are right, the pickle is not: the checkpoint before is taken."""
    save_checkpoint(path, state(1))
    save_checkpoint(path, state(2))
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, code if name.endswith("data.pkl") else content)
    assert number_in(path) == 1
    assert f"cannot read checkpoint {path}" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"other": 1}, {"weight": torch.ones(3, 3)}, {}, None])
def test_state_that_does_not_fit(change):
    model = torch.nn.Linear(2, 3, bias=False)
    values = change if not change else {"weight": torch.ones(3, 2), **change}
    with pytest.raises(
        ValueError, match="c.pt does not fit .*output_dir=, or delete run to"
    ) as error:
        with fitting("run/c.pt"):
            model.load_state_dict(values)
    assert "\n" not in str(error.value)


def test_weights_of_every_format(tmp_path):
    from safetensors.torch import save_file

    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(weights, tmp_path / "new.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("new.pth", "old.pth", "w.safetensors"):
        loaded = load_weights(tmp_path / name)
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights)


@pytest.mark.parametrize("new", [True, False])
def test_weights_run_no_code(new, tmp_path):
    marker, path = tmp_path / "code ran", tmp_path / "evil.pth"
    evil = {"a": Evil(str(marker))}
    torch.save(evil, path, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match="cannot read weights"):
        load_weights(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_weights_are_named(name, tmp_path):
    for content in (b"", b"no weights", bytes(100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read weights from .*{name}"):
            load_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_weights(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pth: \w+(Error)?"):
        load_weights(tmp_path / "text.pth")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="tensor.pth: it holds a Tensor, not a dictionary"):
        load_weights(tmp_path / "tensor.pth")


@pytest.mark.parametrize(
    "wrapped",
    [
        {"a.weight": 1, "b": 2},
        {"module.a.weight": 1, "module.b": 2},
        {"_orig_mod.a.weight": 1, "_orig_mod.b": 2},
        {"module._orig_mod.a.weight": 1, "module._orig_mod.b": 2},
        {"_orig_mod.module.a.weight": 1, "_orig_mod.module.b": 2},
        {"_orig_mod.module.module.a._orig_mod.weight": 1, "_orig_mod.module.module.b": 2},
        {"a._orig_mod.module.weight": 1, "b": 2},  # a part alone is wrapped
        {"a.module.weight": 1, "b": 2},
        {"n_averaged": 9, "module.module.a.weight": 1, "module.module.b": 2},  # AveragedModel
        {"_fsdp_wrapped_module.a._checkpoint_wrapped_module.weight": 1, "b": 2},
    ],
    ids=lambda state: list(state)[0],
)
def test_names_without_wrappers(wrapped):
    assert plain_names(wrapped) == {"a.weight": 1, "b": 2}


def test_names_are_those_of_the_wrapped_network():
    """What torch's own wrappers make of names is undone; a child that is called module stays."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    names = list(network.state_dict())
    network[0] = torch.compile(network[0])
    wrapped = torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(torch.compile(network)))
    assert list(plain_names(wrapped.state_dict())) == names
    for state in ({"module.w": 1, "other": 2}, {"module": 1}, {"x.module.w": 1, "x.w": 2}):
        assert plain_names(state) == state
    with pytest.raises(ValueError, match="_orig_mod.a is a without its wrappers"):
        plain_names({"a": 1, "_orig_mod.a": 2})


def test_what_layers_note_beside_their_tensors_is_kept(path):
    """As torch saves it, such as SN's statistics, under the names that the tensors get."""
    network = torch.nn.Sequential(sn.SwitchNorm2d(2, statistics=("in", "ln")), torch.nn.ReLU())
    own = metadata(network.state_dict())
    assert own["0"]["statistics"] == ("in", "ln")
    wrapped = torch.nn.Module()
    wrapped.model = torch.compile(torch.nn.DataParallel(network))
    torch.save({"state_dict": wrapped.state_dict(), "epoch": 3}, path)
    found = load_network(path)
    assert list(found) == list(network.state_dict()) and metadata(found) == own
    other = torch.nn.Sequential(sn.SwitchNorm2d(2, statistics=("in", "bn")))
    with pytest.raises(RuntimeError, match=r"of the statistics \('in', 'ln'\)"):
        other.load_state_dict(found)
    torch.save({"model": found}, path)  # as it came
    assert metadata(load_network(path)) == own
    torch.save(NETWORK, path)  # a plain dict has none
    assert metadata(load_network(path)) == {}


@pytest.mark.parametrize("text", ["a: 1\n", "norm:\n  name: sn\n", "x", ""])
def test_a_text_is_no_file_of_weights(text, path):
    path.write_text(text)
    with pytest.raises(ValueError, match="expected plain tensors"):
        load_network(path)


def test_options_of_training_scripts_are_read_over(path):
    """torchvision's references and timm save argparse's beside the weights; no other object."""
    content = {
        "model": NETWORK,
        "optimizer": OPTIMIZER,
        "args": argparse.Namespace(lr=0.1, amp=None),
    }
    torch.save(content, path)
    assert load_network(path).keys() == NETWORK.keys()
    torch.save(content | {"args": argparse.Namespace(device=Path("x"))}, path)
    with pytest.raises(ValueError, match="it holds pathlib.*expected plain tensors"):
        load_network(path)


@pytest.mark.parametrize("around", ["model", "state_dict", None])
def test_network_in_a_file(around, tmp_path):
    state = {"module._orig_mod.a": torch.ones(2), "epoch": 3}
    torch.save({around: state, "norm": "sn"} if around else state, tmp_path / "w.pth")
    found = load_network(tmp_path / "w.pth")
    assert list(found) == ["a"] and torch.equal(found["a"], torch.ones(2))
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth holds no state: .*, but "):
        load_network(tmp_path / "w.pth")


NETWORK = {"a.w": torch.ones(2), "b": torch.zeros(1)}
AVERAGE = {"a.w": torch.ones(2) / 2, "b": torch.zeros(1)}
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "content, key",
    [
        ({"model_state_dict": NETWORK, "optimizer_state_dict": OPTIMIZER, "loss": torch.ones(())},
         "model_state_dict"),  # PyTorch's tutorial
        ({"net": NETWORK, "acc": 93.0, "epoch": 3}, "net"),
        ({"state_dict_ema": NETWORK, "arch": "resnet18", "amp_scaler": {"scale": 1.0}},
         "state_dict_ema"),
        ({"model": NETWORK, "criterion": {"centres": torch.ones(3)}}, "model"),
        ({"whatever": NETWORK, "rng": torch.zeros(8)}, "whatever"),
        ({"state_dict": {f"model.{k}": v for k, v in NETWORK.items()}, "loops": {}}, "state_dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_networks_as_others_save_them(content, key, path):
    torch.save(content, path)
    told = []
    found = load_network(path, told=told.append)
    assert found.keys() == NETWORK.keys() and torch.equal(found["a.w"], NETWORK["a.w"])
    (line,) = told
    assert str(path) in line and f"key '{key}'" in line
    assert ("without model." in line) == (key == "state_dict")
    assert load_network(path, key).keys() == found.keys()
    with pytest.raises(ValueError, match="holds no state: no 'xyz', but "):
        load_network(path, "xyz")


def test_several_networks_in_a_file(path):
    torch.save({"state_dict": NETWORK, "state_dict_ema": AVERAGE, "optimizer": OPTIMIZER}, path)
    with pytest.raises(ValueError, match="networks: state_dict, state_dict_ema; choose .*init.key"):
        load_network(path)
    assert torch.equal(load_network(path, "state_dict_ema")["a.w"], AVERAGE["a.w"])
    torch.save({"student": NETWORK, "teacher": AVERAGE}, path)
    with pytest.raises(ValueError, match="networks: student, teacher; choose"):
        load_network(path)
    told = []
    torch.save(NETWORK, path)
    assert load_network(path, told=told.append).keys() == NETWORK.keys() and not told


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "it holds a list, not a dictionary"),
        (torch.ones(2), "it holds a Tensor, not a dictionary"),
        ({3: torch.ones(2), "model": {}}, "it has the key 3; expected names"),
        ({"model": {(1, 2): torch.ones(2)}}, "it has the key (1, 2); expected names"),
    ],
    ids=str,
)
def test_contents_of_another_shape(content, message, path, capsys):
    torch.save(content, path)
    if "(1, 2)" not in message:
        with pytest.raises(ValueError, match="no readable checkpoint"):
            load_checkpoint(path)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError) as error:
        load_network(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_pipe_in_its_place(path):
    """To open it would wait for ever, in reading as in saving."""
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_weights(path)
    save_checkpoint(path, state(1))
    assert number_in(path) == 1


def test_an_archive_that_would_unpack_is_refused_unread(path, monkeypatch):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**6))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)  # reads all of it
    with pytest.raises(ValueError, match="bytes would unpack to 1,000,000"):
        load_weights(path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "progress, message",
    [
        ({"step": -3}, "progress.step=-3; expected a whole number, 0 to 2147483647"),
        ({"epoch": 3, "step": 1}, "epoch 3, step 1 are beyond the run's 3 x 5"),
        ({"epoch": 4}, "epoch 4, step 0 are beyond"),
        ({"step": 10**9}, "step 1000000000 are beyond"),
        ({"step": 10**30}, "progress.step=1000000000000000000000000000000; expected"),
        ({"step": "abc"}, "progress.step=abc; expected a whole number"),
        ({"step": 1.5}, "progress.step=1.5; expected a whole number"),
        ({"step": None}, "progress.step=None; expected a whole number"),
        ({"wall_s": float("nan")}, "progress.wall_s=nan; expected a number"),
        ({"best": "abc"}, "progress.best=abc; expected a number"),
        ({"sums": 3}, "progress.sums=3; expected"),
        ({"sums": {"loss": "abc"}}, "progress.sums={'loss': 'abc'}; expected"),
        ({"steps": 3}, "unknown key progress.steps; did you mean step?"),
        ([1], r"progress=[1]; expected a group of keys"),
    ],
    ids=str,
)
def test_edited_progress_is_refused(progress, message):
    with pytest.raises(ValueError) as error:
        restore("c.pt", {"progress": progress}, {}, Progress, epochs=3, steps=5)
    assert str(error.value).startswith("checkpoint c.pt does not fit this run: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_progress_comes_back_as_it_was():
    values = {"epoch": 2, "step": 5, "sums": {"loss": 0.1}, "best": 1 / 3, "wall_s": 0.7}
    found = restore("c.pt", {"progress": values}, {}, Progress, epochs=3, steps=5)
    assert vars(found) == vars(Progress(**values)) and type(found) is Progress


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("before, after", [(None, True), (True, None)])
def test_an_optimizer_keeps_its_own_kind_of_step(kind, before, after, tmp_path):
    """A run goes on where its device is another: fused there, not fused here. The same numbers."""

    def made(fused):
        weight = torch.nn.Parameter(torch.ones(3))
        more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return weight, kind([weight], lr=0.1, fused=fused, **more)

    results = []
    for kinds in ((before, after), (before, before)):
        weight, optimizer = made(kinds[0])
        weight.grad = torch.tensor([1.0, 2.0, 3.0])
        optimizer.step()
        saved = {"optimizer": optimizer.state_dict(), "progress": asdict(Progress())}
        value = weight.detach().clone()
        weight, optimizer = made(kinds[1])
        weight.data.copy_(value)
        restore(tmp_path, saved, {"optimizer": optimizer}, Progress, 1, 1)
        assert optimizer.param_groups[0]["fused"] is kinds[1]
        weight.grad = torch.tensor([1.0, 2.0, 3.0])
        if kinds[1]:
            assert can_decide(optimizer)
            FiniteGuard(0).update(optimizer, torch.ones(2))
        else:
            optimizer.step()
        results.append(weight.detach().clone())
    torch.testing.assert_close(*results)

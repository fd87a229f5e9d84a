"""The command line's common part: codes, messages, checks of values and names."""

import pytest
import torch
from omegaconf import OmegaConf

from sn.training.run import entry
from sn.training.run.stopping import Preempted


def ends_with(error, capsys, monkeypatch, **environment):
    for key in ("RANK", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)

    def fail(cfg):
        raise error

    with pytest.raises(SystemExit) as end:
        entry.run(fail, OmegaConf.create({}))
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, wanted",
    [
        (ValueError("seed=-1; expected more"), 2, "seed=-1; expected more"),
        (FileNotFoundError(2, "No such file", "/x/y"), 2, "/x/y"),
        (TypeError("no option 'x'"), 2, "no option 'x'"),
        (FloatingPointError("loss is not finite"), 3, "loss is not finite"),
        (Preempted("stopped by a signal"), 75, "stopped by a signal"),
        (KeyboardInterrupt(), 130, "goes on from the last checkpoint"),
        (torch.OutOfMemoryError("CUDA out of memory.\nlong"), 2, "CUDA out of memory. Use setting"),
        (ValueError(), 2, "ValueError"),
    ],
)
def test_known_errors_are_one_line(error, code, wanted, capsys, monkeypatch):
    found, text = ends_with(error, capsys, monkeypatch)
    assert found == code and wanted in text and text.count("\n") == 1


def test_rank_and_worker_errors(capsys, monkeypatch):
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent)\n"
        '  File "x.py"\nValueError: cannot read image a.png: truncated'
    )
    _, text = ends_with(error, capsys, monkeypatch, RANK="5")
    assert text.endswith("(rank 5): cannot read image a.png: truncated\n")


def test_bugs_keep_their_traceback(capsys, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        entry.run(lambda cfg: 1 / 0, OmegaConf.create({}))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def fail(cfg):
        raise ValueError("all of it")

    with pytest.raises(ValueError, match="all of it"):
        entry.run(fail, OmegaConf.create({}))


@pytest.mark.parametrize(
    "predicate, good, bad",
    [
        (entry.whole(1, 5), [1, 5], [0, 6, 1.0, "1", None, True]),
        (entry.number(0, 1), [0, 1, 0.5], [-0.1, 1.1, "0", None, True, float("nan")]),
        (entry.number(), [0, 1e300], [float("inf"), -1e-9]),
        (entry.above(0), [1e-9, 3], [0, -1, float("inf"), float("nan"), True]),
        (entry.optional(entry.whole(1)), [None, 1], [0, "null"]),
        (entry.one_of(["a", "b"]), ["a"], ["c", None, 1]),
        (entry.switch, [True, False], [0, 1, "true", None]),
    ],
)
def test_predicates(predicate, good, bad):
    assert all(predicate(value) for value in good)
    assert not [value for value in bad if predicate(value)]


def test_check_values_names_key_value_and_expectation():
    cfg = OmegaConf.create({"a": {"b": 3}, "c": -1})
    entry.check_values(cfg, [(entry.whole(0), "0 or more", ["a.b", "a.missing", "no.group"])])
    with pytest.raises(ValueError, match="c=-1; expected 0 or more"):
        entry.check_values(cfg, [(entry.whole(0), "0 or more", ["a.b", "c"])])


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "/abs", "..", ".hidden", "", "a\nb", "a\x00b", "a\\b", None, 3]
)
def test_names_cannot_leave_their_folder(name):
    with pytest.raises(ValueError, match="run_name="):
        entry.check_names(OmegaConf.create({"run_name": name}), ["run_name"])


@pytest.mark.parametrize("name", ["sn_8x32", "a b", "$(reboot)", "it's;", "größe"])
def test_odd_names_are_names(name):
    entry.check_names(OmegaConf.create({"run_name": name}), ["run_name"])


def test_deterministic_is_applied():
    try:
        entry.prepare(OmegaConf.create({"deterministic": True}))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        entry.prepare(OmegaConf.create({}))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match="deterministic=1; expected true or false"):
        entry.prepare(OmegaConf.create({"deterministic": 1}))

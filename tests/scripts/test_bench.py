"""scripts/common/bench.py: who is timed when, how ratios are taken, what is said of the machine."""

import sys
from types import SimpleNamespace

import pytest
import torch
from common import bench


def test_rounds_are_interleaved_and_every_other_one_reversed():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = bench.interleaved(functions, 3, "cpu", "cpu", repeats=2, warm_up=1)
    rounds = ["aabbcc", "ccbbaa", "aabbcc"]
    assert "".join(calls) == "abc" + "".join(rounds)
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_short_functions_are_repeated(monkeypatch):
    """At a tick per call of the clock, 0.5 s of a function take 5 calls of 0.1 s; 200 at most."""
    now = iter(range(10**6))
    monkeypatch.setitem(bench.CLOCKS, "wall", lambda: next(now) / 10)
    calls = []
    bench.interleaved({"a": lambda: calls.append(1)}, 1, "wall", "cpu", least=0.5, warm_up=1)
    assert len(calls) == 1 + 1 + 5
    calls.clear()
    bench.interleaved({"a": lambda: calls.append(1)}, 1, "wall", "cpu", least=1e6, warm_up=1)
    assert len(calls) == 1 + 1 + 200


def test_ratio_is_the_median_within_rounds():
    assert bench.ratio([1.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == 2.0  # of 1, 3, 2


def test_what_is_said_of_the_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/anywhere/scripts/bench_norm.py", "--quick"])
    found = bench.circumstances("cpu")
    assert found["command"] == "python scripts/bench_norm.py --quick"
    assert set(found["malloc"]) == set(bench.MALLOC) and found["cores"] >= 1
    assert found["device"] and found["torch"] and len(found["load"]) == 3


def test_memory_setting_starts_the_script_anew_once(monkeypatch):
    started = []
    monkeypatch.setattr(bench.os, "execve", lambda *args: started.append(args[2]))
    for key in bench.MALLOC:
        monkeypatch.delenv(key, raising=False)
    bench.keep_memory("cuda")
    assert not started
    bench.keep_memory("cpu")
    assert started[0].items() >= bench.MALLOC.items()
    for key, value in bench.MALLOC.items():
        monkeypatch.setenv(key, value)
    bench.keep_memory("cpu")
    assert len(started) == 1


@pytest.mark.parametrize("name", ["wall", "cpu"])
def test_clocks_go_forward(name):
    assert bench.CLOCKS[name]() <= bench.CLOCKS[name]()


# two epochs of three steps, with 20 MB for a second, in the words of each script
COMMAND = """
import time
held = bytearray(20_000_000)
for epoch in (0, 1):
    for step in range(3):
        print({line!r}.format(epoch=epoch, step=step), flush=True)
time.sleep(1)
"""


@pytest.mark.parametrize(
    "who, line",
    [
        ("ours", "epoch {epoch}, step {step} of 3  loss 1.0  0:00:01 left"),
        ("timm", "Train: {epoch} [   {step}/3 ( 50%)]  Loss: 1.0"),
    ],
)
def test_figures_of_a_whole_command(who, line, load_script, monkeypatch):
    """By a clock that ticks once for the start, each line and the end."""
    script = load_script("bench_command")
    monkeypatch.setattr(script.time, "perf_counter", iter(range(100)).__next__)
    found = script.measure([sys.executable, "-c", COMMAND.format(line=line)], who, batch=8)
    assert (found["first_step_s"], found["command_s"]) == (1, 7)
    assert found["images_per_s"] == 8  # the last epoch's: 16 images, ticks 4 to 6
    assert 20 < found["memory_mib"] < 200
    with pytest.raises(RuntimeError, match="ended with 3:\nno such folder"):
        script.measure([sys.executable, "-c", "print('no such folder'); exit(3)"], who, batch=8)


def test_table_of_plans(load_script):
    """One plan for real; the other does not fit."""
    script = load_script("bench_settings")
    words = ["setting.gpus=2", "setting.images_per_gpu=4", "norm=bn", "device=cpu"]
    words += ["model.name=resnet8", "model.width=8", "data.train_images=16"]
    found = script.plan(words)
    rows = [
        script.row("(2,4)", "bn", found),
        script.row("(8,32)", "bn", {"estimated_step_bytes": 5e9}),
    ]
    text = script.table(rows).splitlines()
    assert text[-1] == "| (8,32) | bn | 5000 | " + " | ".join(["does not fit"] * 4) + " |"
    assert rows[0]["epoch_s"] == pytest.approx(2 * rows[0]["step_ms"] / 1000)  # 16 images by 8
    assert 100 < rows[0]["peak_mb"] < 10_000


def test_a_wrong_lstm_is_not_timed(load_script, monkeypatch, capsys):
    bench_lstm = load_script("bench_lstm")
    cells = bench_lstm.contestants("cell", 4) | {"nan": torch.nn.LSTMCell(4, 4)}
    torch.nn.init.constant_(cells["nan"].weight_hh, float("nan"))
    monkeypatch.setattr(bench_lstm, "contestants", lambda *_: cells)
    args = SimpleNamespace(device="cpu", size=4, rounds=1, clock="cpu", repeats=1, compile=False)
    rows = bench_lstm.time_all(args, "cell", 2)
    assert {row["name"] for row in rows} == cells.keys() - {"nan"}
    assert "nan is wrong by nan, not timed" in capsys.readouterr().out


def test_a_layer_that_cannot_run_does_not_keep_the_others_from_it(load_script, monkeypatch, capsys):
    """On CUDA group norm takes parameters of the input's dtype alone."""
    bench_norm = load_script("bench_norm")

    class SameDtype(torch.nn.GroupNorm):
        def forward(self, x):
            if self.weight.dtype != x.dtype:
                raise RuntimeError("expected scalar type BFloat16 but found Float")
            return super().forward(x)

    layers = bench_norm.contestants("cpu", torch.bfloat16, ["gn", "sn"])
    assert layers["gn"](8).weight.dtype == torch.bfloat16
    assert layers["sn"](8).weight.dtype == layers["bn"](8).weight.dtype == torch.float32
    layers["other"] = lambda channels: SameDtype(4, channels)
    layers["same"] = bench_norm.of_dtype(layers["other"], torch.bfloat16)
    monkeypatch.setattr(bench_norm, "contestants", lambda *_: layers)
    args = SimpleNamespace(device="cpu", dtype="bfloat16", rounds=1, clock="cpu", quick=True)
    args.only, args.layouts = None, ["contiguous_format"]
    (row,) = bench_norm.bench_layers(args, {"one": (2, {(8, 4, 4): 1})}, lambda rows: None)
    assert set(row["forward+backward"]) == {"bn", "gn", "sn", "same"}
    assert "other: expected scalar type BFloat16 but found" in capsys.readouterr().out

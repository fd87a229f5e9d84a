"""The check at the first use of a GPU: broken kernels, crashes, hangs; what is kept, who waits.

The kernels are broken on purpose, under Triton's interpreter (see test_triton.py).
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from interpreter import needs_interpreter
from workers import processes, run_in_group

import sn
from sn import kernels
from sn.kernels import check
from sn.training.run import distributed

pytest.importorskip("triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not INTERPRET, reason="in test_triton.py's test_under_the_interpreter")
outside = pytest.mark.skipif(INTERPRET, reason="no kernel is run")
CPU = torch.device("cpu")
GOOD = {"works": True, "why": None, "undecided": False}
BAD = {"works": False, "why": "output is wrong by 3, allowed 1e-05, at here", "undecided": False}
TINY = check.Case((2, 4, 2, 3), torch.float32, True)

# --- the comparison

BROKEN = {
    "variance of instances": ("square / L\n", "square / (L - 1)\n", "output|gradient"),
    "statistic of batches": ("tl.sum(within, 0) / members", "tl.sum(within, 0)", "output|gradient"),
    "gradient of x": ("    p = -p / length", "    p = p / length", "gradient of x"),
    "gradient of weight and bias": ("slope += tl", "slope -= tl", "gradient of weight"),
    "gradient of control parameters": ("-0.5 * var_grad", "-0.49 * var_grad", "of var_weight"),
    "running mean": ("new = run_level + run_mean / G", "new = run_level", "running mean"),
    "NaN": ("rstd = 1.0 / tl.sqrt(var)", "rstd = 1.0 / tl.sqrt(-var)", "wrong by nan"),
    "not written": ("tl.store(y + place, value.to(y.dtype.element_ty), mask=here)",
                    "tl.store(y + place, value.to(y.dtype.element_ty), mask=here & (place < 40))",
                    "output is wrong by nan"),
    "an error": ("tl.store(y + place", "tl.store(y + missing", "NameError"),
}  # fmt: skip


def edited(source: Path, old: str, new: str) -> str:
    text = source.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    return text.replace(old, new)


@runs
@pytest.mark.parametrize("what", BROKEN)
def test_broken_kernels_are_found(what, tmp_path, monkeypatch):
    from sn.kernels import cuda

    old, new, words = BROKEN[what]
    path = tmp_path / "broken_kernels.py"
    path.write_text(edited(Path(cuda.kernels.__file__), old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("broken_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(cuda, "kernels", module)
    verdict = check.examine(CPU, [TINY], [])
    assert not verdict["works"] and not verdict["undecided"]
    assert re.search(words, verdict["why"]), verdict["why"]
    assert str(TINY) in verdict["why"]


@runs
def test_right_kernels_pass_and_slow_ones_do_not(monkeypatch):
    verdict = check.examine(CPU, [TINY, TINY._replace(dtype=torch.bfloat16, act="residual")], [])
    assert verdict["works"] and len(verdict["errors"]) == 2
    monkeypatch.setattr(check, "TIMED_SHAPES", [(2, 3, 2, 2)])
    monkeypatch.setattr(check.time_both, "__defaults__", (1,))
    slow = check.examine(CPU, [], [(torch.float32, True)])  # interpreted: much slower
    assert not slow["works"] and "of the formula's time" in slow["why"]


@runs
def test_results_that_change_between_runs_are_found(monkeypatch):
    ours, count = kernels.switch_norm_act, iter(range(9))
    monkeypatch.setattr(kernels, "switch_norm_act", lambda *a: ours(*a) + 1e-7 * next(count))
    verdict = check.examine(CPU, [TINY], [])
    assert "another in a second run" in verdict["why"]


@runs
@pytest.mark.parametrize("stage", ["compare", "time_both"])
def test_memory_that_others_hold_is_no_verdict(stage, monkeypatch):
    """Triton's and CUDA's own errors are no OutOfMemoryError."""

    def full(*_):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(check, stage, full)
    verdict = check.examine(CPU, [TINY], [(torch.float32, True)])
    assert not verdict["works"] and verdict["undecided"], verdict


@outside
@needs_interpreter
def test_a_crash_in_a_kernel_ends_the_child_alone(tmp_path, monkeypatch):
    """The whole way from the command to the verdict, in a copy of the package."""
    package = Path(sn.__file__).parent
    shutil.copytree(package, tmp_path / "sn", ignore=shutil.ignore_patterns("training", "*.so"))
    path = tmp_path / "sn" / "kernels" / "triton_kernels.py"
    line = "        value = (value - mean"
    text = edited(
        path, line, f"        __import__('os').kill(__import__('os').getpid(), 11)\n{line}"
    )
    path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    verdict = check.in_child(check._command(CPU), limit=120)
    assert not verdict["works"] and not verdict["undecided"]
    assert f"crashed (SIGSEGV) at {check.CASES[0]}" in verdict["why"], verdict["why"]


# --- the child, from outside

AT = 'import json, os, signal, sys, time; print(json.dumps({"at": "here"}), flush=True); '


def child(code: str, limit: float = 60.0) -> dict:
    return check.in_child([sys.executable, "-S", "-c", code], limit)


@outside
def test_what_the_child_prints_is_the_verdict():
    print_it = f"print('noise'); print({json.dumps(GOOD)!r})"
    assert child(AT + print_it) == GOOD
    assert child(AT + print_it + "; os._exit(9)") == GOOD  # broken down after the verdict


@outside
@pytest.mark.parametrize("end", ["os._exit(3)", "raise SystemExit(3)", "sys.exit(0)", "1 / 0"])
def test_a_child_without_a_verdict_has_failed(end):
    verdict = child(AT + end)
    assert not verdict["works"] and not verdict["undecided"] and "crashed" in verdict["why"]
    assert "at here" in verdict["why"] and ("ZeroDivisionError" in verdict["why"]) == (
        end == "1 / 0"
    )


@outside
def test_a_child_that_hangs_is_ended_with_its_own_children():
    code = AT + "import subprocess; p = subprocess.Popen(['sleep', '600']); print(p.pid); "
    start = time.monotonic()
    verdict = child(code + "sys.stdout.flush(); time.sleep(600)", limit=1.0)
    assert time.monotonic() - start < 60  # the grandchild holds the pipe, too
    assert verdict == {**BAD, "why": "their check had not ended after 1 s at here"}
    verdict = child("import time; time.sleep(600)", limit=1.0)  # before it has tried a kernel
    assert verdict == {**BAD, "why": "their check had not ended after 1 s", "undecided": True}


@outside
def test_a_driver_is_told_from_another(monkeypatch):
    versions = iter(["NVRM version: 570.86\nGCC", "NVRM version: 580.95\nGCC"])
    monkeypatch.setattr(check.Path, "read_text", lambda path, **_: next(versions))
    assert [check._driver() for _ in "ab"] == ["NVRM version: 570.86", "NVRM version: 580.95"]
    monkeypatch.undo()
    assert torch.cuda.is_available() or re.fullmatch("[0-9]+|NVRM.*", check._driver())


@outside
def test_a_child_ends_with_who_started_it(tmp_path):
    """A run that is killed leaves no process behind that holds its GPU."""
    code = (
        "import os, threading, time; from sn.kernels.check import _end_with; "
        "threading.Thread(target=_end_with, args=(os.getppid(),)).start(); "
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}]); input()"
    parent = subprocess.Popen(
        [sys.executable, "-S", "-c", start],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    own = int(parent.stdout.readline())
    os.kill(own, 0)  # it is there
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == ""  # comes to an end when nobody writes there any more


@outside
def test_circumstances_are_no_verdict_on_the_kernels():
    """No interpreter, imports that fail, a child that was killed for its memory."""
    for verdict in (
        check.in_child(["/no/python", "-c", ""]),
        check.in_child([""]),
        child("import nothing_of_this_name"),
        child(AT + "os.kill(os.getpid(), signal.SIGKILL)"),
    ):
        assert not verdict["works"] and verdict["undecided"], verdict


# --- what is kept, and who says what


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Nothing known yet; `cache.verdict` for the asking, counted by `cache.calls`."""

    class Cache:
        verdict, calls, folder = GOOD, 0, tmp_path / "switchable_norm"

        def ask(self, command):
            self.calls += 1
            return self.verdict

        def forget(self):
            monkeypatch.setattr(check, "_verdicts", {})

    cache = Cache()
    cache.forget()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(check, "in_child", cache.ask)
    return cache


@outside
def test_asked_once_per_machine_and_version(cache, monkeypatch, capsys):
    facts = check._facts(CPU)
    assert facts["torch"] == torch.__version__ and len(facts["sources"]) == 64
    for _ in range(3):
        assert check.proven(CPU)
        cache.forget()
    assert cache.calls == 1 and capsys.readouterr().err.count("checking the Triton kernels") == 1
    (file,) = cache.folder.glob("*.json")
    for fact in ("torch", "triton", "machine", "device", "sources"):
        monkeypatch.setattr(check, "_facts", lambda device, fact=fact: {**facts, fact: "other"})
        assert check.proven(CPU)
        cache.forget()
    assert cache.calls == 6 and len(list(cache.folder.glob("*.json"))) == 6
    monkeypatch.setattr(check, "_facts", lambda device: facts)
    file.write_text("{half a rec", encoding="utf-8")
    assert check.proven(CPU) and cache.calls == 7  # a broken record is none
    assert not list(cache.folder.glob("*.tmp"))


@outside
def test_one_warning_with_the_figure(cache):
    cache.verdict = BAD
    with pytest.warns(UserWarning, match="output is wrong by 3") as caught:
        assert not check.proven(CPU) and not check.proven(CPU)
    assert len(caught) == 1
    cache.forget()
    with pytest.warns(UserWarning, match="output is wrong by 3"):  # of the next process, too
        assert not check.proven(CPU)
    assert cache.calls == 1


@outside
def test_only_the_first_process_of_a_machine_warns(cache, monkeypatch):
    cache.verdict = BAD
    monkeypatch.setenv("LOCAL_RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not check.proven(CPU)


@outside
def test_circumstances_are_not_kept(cache):
    cache.verdict = {**BAD, "undecided": True}
    for calls in (1, 2):
        with pytest.warns(UserWarning):
            assert not check.proven(CPU)
        cache.forget()
        assert cache.calls == calls


@outside
def test_without_write_access_the_verdict_holds_for_the_process(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert check.proven(CPU) and check.proven(CPU) and cache.calls == 1
    cache.forget()
    assert check.proven(CPU) and cache.calls == 2


@outside
def test_a_check_that_cannot_begin_is_a_warning(cache, monkeypatch):
    monkeypatch.setattr(check, "_facts", lambda device: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert not check.proven(CPU)


def first_use(folder: str) -> None:
    def ask(command):
        with open(f"{folder}/calls", "a") as file:
            file.write("1")
        time.sleep(0.5)
        return GOOD

    os.environ["XDG_CACHE_HOME"] = folder
    check.in_child = ask
    assert check.proven(CPU)


@outside
def test_processes_that_start_at_once_wait_for_one_check(tmp_path):
    group = [processes.Process(target=first_use, args=(str(tmp_path),)) for _ in range(3)]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "1"


def disagree(rank: int) -> None:
    check.proven = lambda device: rank == 0
    check._refusals.update({CPU: "no memory"} if rank else {})
    distributed.start("cpu")
    model = torch.nn.Sequential(sn.SwitchNorm2d(3))
    distributed.agree_on_kernels(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), CPU)
    assert not check._verdicts  # nobody was asked
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        distributed.agree_on_kernels(model, CPU)
    words = "not in every process" if rank == 0 else "no memory"
    assert len(said) == 1 and words in str(said[0].message)
    assert check._verdicts == {CPU: False}
    check.proven = lambda device: True
    check._verdicts.clear()
    distributed.agree_on_kernels(model, CPU)
    assert not check._verdicts  # nobody refused
    distributed.stop()


@outside
def test_all_processes_of_a_run_decide_alike():
    run_in_group(2, disagree)


@outside
def test_who_decides(monkeypatch):
    """auto asks for the verdict on a GPU; a forced backend does not."""
    gpu, asked = torch.device("cuda", 0), []
    monkeypatch.setattr(kernels, "_triton_works", lambda device: True)
    monkeypatch.setattr(check, "proven", lambda device: asked.append(device) or False)
    assert not kernels._takes_triton(gpu) and asked == [gpu]
    assert not kernels._takes_triton(CPU) and asked == [gpu]
    monkeypatch.setattr(check, "proven", lambda device: True)
    assert kernels._takes_triton(gpu)
    monkeypatch.delattr(check, "proven")
    for name, takes in (("triton", True), ("reference", False), ("native", False)):
        with sn.backend(name):
            assert kernels._takes_triton(gpu) is takes


@outside
def test_no_check_while_a_graph_is_captured(cache, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not check.proven(gpu) and cache.calls == 0
    check._verdicts[gpu] = True
    assert check.proven(gpu)


@outside
def test_the_command_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check"])
    assert check.main() == 2 and "no CUDA device" in capsys.readouterr().err

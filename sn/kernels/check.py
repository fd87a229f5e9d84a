"""Whether the Triton kernels are right and faster on a GPU: found out there, once.

    python -m sn.kernels.check              # check the visible GPUs (again), print the figures

`proven` decides for the layer. At the first use of a device a child process holds the kernels to
the formula in float64: both layouts, three dtypes, forward and backward, odd and large shapes; and
times them against the formula. A child, since an illegal access leaves no CUDA context to go on
with. The verdict is kept in the user's cache folder (XDG_CACHE_HOME) for this machine, kind of
device, driver and versions of torch, Triton and these sources; the processes of a machine wait for
the first one's. What speaks of the circumstances (no memory left, no compiler) is not kept.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional
from .common import Options

LIMIT = 300  # seconds a check may take; about 60 are usual, most of them for compilation
ALL = ("in", "ln", "gn", "bn")
NAMES = (
    "output", "gradient of x", "gradient of mean_weight", "gradient of var_weight",
    "gradient of weight", "gradient of bias", "gradient of the residual",
    "running mean", "running variance",
)  # fmt: skip
_verdicts: dict[torch.device, bool] = {}
_refusals: dict[torch.device, str] = {}  # what is to be said of them
_one_at_a_time = threading.Lock()


def proven(device: torch.device) -> bool:
    """Whether the kernels may be used on `device`; the first call on a machine takes a minute.

    Unless it is known already, False while a CUDA graph is captured: warm up before.
    """
    verdict = _verdicts.get(device)
    if verdict is not None:
        return verdict
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    with _one_at_a_time:
        if device not in _verdicts:
            _verdicts[device] = _judge(device)
        return _verdicts[device]


def refuse(device: torch.device) -> None:
    """Take the formula on `device`, whatever was found: another process must."""
    _verdicts[device] = False


def _judge(device: torch.device) -> bool:
    try:
        facts = _facts(device)
    except Exception as error:  # not installed, or not whole
        verdict = _no(f"Triton cannot be imported ({_one_line(error)})", undecided=True)
    else:
        verdict = _kept(facts) or _examined(device, facts)
    if not verdict["works"]:
        again = "" if verdict["undecided"] else "; `python -m sn.kernels.check` checks again"
        _refusals[device] = (
            f"sn: the Triton kernels are not used on {_name(device)}: {verdict['why']}. The layer "
            f"takes the plain formula, which is slower{again}"
        )
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say_why(device)
    return verdict["works"]


def say_why(device: torch.device) -> None:
    """Warn, once, of what was found against the kernels on `device`."""
    if device in _refusals:
        warnings.warn(_refusals.pop(device), stacklevel=3)


def _examined(device: torch.device, facts: dict) -> dict:
    """The verdict of a child, or of the process that was quicker."""
    path = _file(facts)
    with _alone(path.with_suffix(".lock")):
        verdict = _kept(facts)
        if verdict is None:
            print(
                f"sn: checking the Triton kernels on {_name(device)}: about a minute, once for "
                "this machine and version",
                file=sys.stderr,
                flush=True,
            )
            verdict = in_child(_command(device))
            if not verdict["undecided"]:
                _keep(facts, verdict)
    return verdict


def _no(why: str, undecided: bool = False) -> dict:
    return {"works": False, "why": why, "undecided": undecided}


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def _uuid(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


# --- what is kept


def _facts(device: torch.device) -> dict:
    """What a verdict holds for."""
    import triton

    here = Path(__file__).parent
    sources = [here / name for name in ("triton_kernels.py", "cuda.py", "common.py", "check.py")]
    digest = hashlib.sha256()
    for source in (*sources, here.parent / "functional.py"):
        digest.update(source.read_bytes())
    facts = {
        "machine": platform.node(),
        "device": _name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": digest.hexdigest(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["driver"] = _driver()
    return facts


def _driver() -> str:
    """The kernel module's version as Linux tells it, else that of CUDA that the driver knows."""
    with contextlib.suppress(OSError):
        told = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        return told.partition("\n")[0]
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
        ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version))
    return str(version.value)


def _file(facts: dict) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Path(home, "switchable_norm", f"kernels-{digest[:16]}.json")


def _kept(facts: dict) -> dict | None:
    try:
        record = json.loads(_file(facts).read_text(encoding="utf-8"))
        if record["facts"] == facts and isinstance(record["works"], bool):
            return {"undecided": False, "why": record["why"], "works": record["works"]}
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not there, or not whole: to be found out again
    return None


def _keep(facts: dict, verdict: dict) -> None:
    """Write the verdict, all of it or nothing; without it the next process checks again."""
    path = _file(facts)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({**verdict, "facts": facts}, file, indent=1)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock `path`, which ends with its owner; without one where none can be had."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a", encoding="utf-8"))
            deadline = time.monotonic() + LIMIT + 60
            while time.monotonic() < deadline:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except (BlockingIOError, PermissionError):
                    time.sleep(0.2)
        yield


# --- the child, from outside


def _command(device: torch.device) -> list[str]:
    module = ["-P", "-m", "sn.kernels.check", "--child", str(device), "--uuid", _uuid(device)]
    return [os.fsdecode(spawn.get_executable() or ""), *module]


def in_child(command: list[str], limit: float = LIMIT) -> dict:
    """The verdict that `command` prints; its crash or silence beyond `limit` seconds is one too."""
    if getattr(sys, "frozen", False) or not command[0]:
        return _no("there is no Python interpreter to check them with", undecided=True)
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # the same sn and torch
    try:
        child = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # its compilers can be ended with it
        )
    except OSError as error:
        return _no(f"no process can be started to check them ({error})", undecided=True)
    late = False
    try:
        output, errors = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
        _kill(child)
        output, errors = child.communicate()
    except BaseException:
        _kill(child)
        raise
    return _understood(output, errors, child.returncode, limit if late else None)


def _kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()


def _understood(output: str, errors: str, code: int, limit: float | None) -> dict:
    place = None
    for line in output.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and "works" in told:
            return told
        if isinstance(told, dict) and "at" in told:
            place = told["at"]
    at = f" at {place}" if place else ""
    if limit is not None:
        # one that hangs before the first case has not tried the kernels
        return _no(f"their check had not ended after {limit:g} s{at}", undecided=place is None)
    last = errors.strip().splitlines()[-1:]
    said = f": {last[0][:200]}" if last else ""
    how = f"exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-code).name
    # before the first case, or by someone who wants its memory: not the kernels' doing
    circumstances = place is None or code == -getattr(signal, "SIGKILL", 9)
    return _no(f"their check crashed ({how}){at}{said}", undecided=circumstances)


# --- the child, from inside


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    last: bool  # channels_last
    statistics: tuple[str, ...] = ("in", "ln", "bn")
    training: bool = True
    virtual_gpus: int = 1
    act: str = ""  # "relu", "residual": then ReLU after the sum
    offset: float = 0.0
    parameters: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [
            str(self.dtype).removeprefix("torch."),
            "channels_last" if self.last else "contiguous",
            str(self.shape),
            "-".join(self.statistics),
            "" if self.training else "in evaluation",
            f"in {self.virtual_gpus} groups" if self.virtual_gpus > 1 else "",
            f"with {self.act}" if self.act else "",
        ]
        return " ".join(word for word in words if word)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    Case((4, 6, 3, 5), F32, False, ALL, virtual_gpus=2),
    Case((4, 6, 3, 5), F32, True, ALL, training=False),
    Case((3, 10, 7, 5), F16, True, ALL),
    Case((3, 10, 7, 5), F16, False, ("in", "ln"), act="relu"),
    Case((4, 8, 5, 7), BF16, True, act="residual"),
    Case((4, 8, 5, 7), BF16, False, parameters=BF16, training=False),
    Case((5, 6, 3, 5), F32, False, ("in", "ln"), virtual_gpus=3),
    Case((6, 33), F32, False, ("ln", "bn"), virtual_gpus=3),
    Case((3, 33, 61, 67), F32, True, offset=1e3),
    Case((3, 33, 61, 67), F32, False, virtual_gpus=3),
    Case((3, 33, 61, 67), F16, True),
    Case((3, 33, 61, 67), F16, False),
    Case((8, 2048, 7, 7), BF16, True),
    Case((8, 2048, 7, 7), BF16, False),
    Case((32, 64, 56, 56), BF16, True),
    Case((32, 64, 56, 56), F32, False),
]
TIMED_SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7)]  # of ResNet-50
TIMED = [(BF16, True), (F32, False)]


def examine(device: torch.device, cases: list[Case], timed: list[tuple]) -> dict:
    """The verdict on `cases` and the times of `timed`; prints where it is."""
    from . import cuda

    try:  # no compiler, no driver, no memory: not the kernels' doing
        if device.type == "cuda":
            cuda.probe(device)
            torch.cuda.synchronize(device)
    except Exception as error:
        return _no(f"none could be compiled and run ({_one_line(error)})", undecided=True)
    worst, times = {}, {}
    for case in cases:
        print(json.dumps({"at": str(case)}), flush=True)
        try:
            name, error, allowed = compare(case, device)
        except Exception as failure:
            return _no(f"{_one_line(failure)} at {case}", undecided=_of_memory(failure))
        if not error <= allowed:  # NaN is none
            return _no(f"{name} is wrong by {error:.2g}, allowed {allowed:.2g}, at {case}")
        worst[str(case)] = f"{name}: {error:.2g} of {allowed:.2g} allowed"
    for dtype, last in timed:
        place = f"{str(dtype).removeprefix('torch.')} {'channels_last' if last else 'contiguous'}"
        print(json.dumps({"at": f"the timing, {place}"}), flush=True)
        try:
            ours, plain = (sum(t) for t in zip(*(time_both(s, dtype, last, device)
                                                 for s in TIMED_SHAPES)))  # fmt: skip
        except Exception as failure:
            why = f"{_one_line(failure)} when timed, {place}"
            return _no(why, undecided=_of_memory(failure))
        times[place] = f"{1e3 * ours:.3f} ms, the formula {1e3 * plain:.3f} ms"
        if not ours < plain:
            return _no(f"{ours / plain:.2f} of the formula's time, {place}: {times[place]}")
    return {"works": True, "why": None, "undecided": False, "errors": worst, "times": times}


def _of_memory(error: Exception) -> bool:
    """Whether the device had no memory left: Triton and CUDA say so in errors of other types."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def compare(case: Case, device: torch.device) -> tuple[str, float, float]:
    """Which result is worst, its largest error and what the formula's own error allows.

    Twice the error of the formula in the same dtype and a few roundings. Memory that no kernel
    writes is NaN, and a second run has to give the same bits.
    """
    from . import backend, choose_backend, switch_norm_act

    generator = torch.Generator().manual_seed(0)
    tensors = _values(case, generator, device)
    groups = 2 if "gn" in case.statistics else None
    options = Options(case.statistics, groups, case.training, 0.1, 1e-5, case.virtual_gpus)

    def fused(inputs: list[Tensor], residual: Tensor | None) -> Tensor:
        with backend("triton"):
            if choose_backend(*inputs) != "triton":
                raise RuntimeError("the kernels do not take this")
            return switch_norm_act(tuple(inputs), options, residual, bool(case.act))

    def formula(inputs: list[Tensor], residual: Tensor | None) -> Tensor:
        y = functional.switch_norm(*inputs, **options._asdict())
        y = y if residual is None else y + residual
        return y.relu() if case.act else y

    exact = _results(formula, case, [t.double() for t in tensors])
    plain = _results(formula, case, tensors)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not written is NaN
    try:
        ours, again = (_results(fused, case, tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    found = []
    for name, true, reference, own, second in zip(NAMES, exact, plain, ours, again):
        if true is None:
            continue
        same = torch.equal(own.nan_to_num(), second.nan_to_num())
        error, usual = ((t.double() - true).abs().max().item() for t in (own, reference))
        scale = max(true.abs().max().item(), 1e-3)
        allowed = 2 * usual + (torch.finfo(own.dtype).eps + 16 * torch.finfo(F32).eps) * scale
        if name.startswith("gradient") and true.numel() < tensors[0].numel():  # sums
            allowed += 8 * torch.finfo(F32).eps * math.sqrt(tensors[0].numel())
        if not same:
            return f"{name}, which is another in a second run,", error, -1.0
        found.append((name, error, allowed))
    return max(found, key=lambda row: math.inf if math.isnan(row[1]) else row[1] / row[2])


def _values(case: Case, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """x, four parameters, running mean and variance, residual, dy."""

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    channels, count = case.shape[1], len(case.statistics)
    spread = (1, channels) + (1,) * (len(case.shape) - 2)
    x = randn(*case.shape) * (randn(*spread).abs() + 0.5) + randn(*spread) + case.offset
    affine = [randn(count), randn(count), randn(channels), randn(channels)]
    running = [randn(channels) + case.offset, randn(channels).abs() + 0.5]
    parameters = [t.to(case.parameters) for t in affine]
    return [t.to(case.dtype) if i in (0, 7, 8) else t
            for i, t in enumerate([x, *parameters, *running, randn(*case.shape),
                                   randn(*case.shape)])]  # fmt: skip


def _results(call, case: Case, tensors: list[Tensor]) -> list[Tensor | None]:
    """Everything that a call computes, in the order of NAMES."""
    x, *parameters, mean, var, residual, dy = tensors
    running = [mean.clone(), var.clone()] if "bn" in case.statistics else [None, None]
    own = [_lay_out(x, case.last), *(t.clone() for t in parameters)]
    other = _lay_out(residual, case.last) if case.act == "residual" else None
    leaves = [t.requires_grad_() for t in (*own, *([other] if other is not None else []))]
    y = call([*own, *running], other)
    grads = list(torch.autograd.grad(y, leaves, _lay_out(dy, case.last)))
    grads += [None] * (6 - len(grads))
    return [y.detach(), *grads, *running]


def _lay_out(x: Tensor, last: bool) -> Tensor:
    if last and x.dim() > 2:
        return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    return x.clone(memory_format=torch.contiguous_format)


def time_both(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: torch.device, rounds: int = 9
) -> tuple[float, float]:
    """Seconds of forward + backward by the kernels and by the formula: medians, interleaved."""
    from . import backend, switch_norm

    case = Case(shape, dtype, last)
    tensors = _values(case, torch.Generator().manual_seed(0), device)
    x, dy = (_lay_out(t, last) for t in (tensors[0], tensors[8]))
    leaves = [t.requires_grad_() for t in (x, *tensors[1:5])]

    def seconds(name: str) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with backend(name):
            y = switch_norm(*leaves, *tensors[5:7])
        torch.autograd.grad(y, leaves, dy)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    names = ("triton", "reference")
    for name in 3 * names:
        seconds(name)
    found = [[seconds(name) for name in names] for _ in range(rounds)]
    return tuple(statistics.median(column) for column in zip(*found))


def _child(name: str, uuid: str) -> None:
    """Print the verdict on the device of that `uuid`, or of that name if none was given."""
    if hasattr(signal, "alarm"):
        signal.alarm(LIMIT + 30)  # should the parent be gone before it is known
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    device = torch.device(name)
    if device.type == "cpu":  # under the interpreter
        small = [case for case in CASES if math.prod(case.shape) < 2000]
        verdict = examine(device, small, [])
    else:
        visible = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        device = next((other for other in visible if _uuid(other) == uuid), None)
        if device is None:
            verdict = _no("the process that checks them sees another device", undecided=True)
        else:
            torch.cuda.set_device(device)
            verdict = examine(device, CASES, TIMED)
    print(json.dumps(verdict), flush=True)


def _end_with(parent: int) -> None:
    """End when the process that started this one is gone: a GPU is not held for nobody."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> int:
    import argparse

    parser = argparse.ArgumentParser(
        description="Hold the Triton kernels to the formula on every visible GPU; keep the verdict."
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--uuid", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(args.child, args.uuid)
        return 0
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        print("torch sees no CUDA device, or there is no Triton", file=sys.stderr)
        return 2
    failed, seen = False, []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        facts = _facts(device)
        if facts in seen:
            continue
        seen.append(facts)
        verdict = in_child(_command(device))
        if not verdict["undecided"]:
            _keep(facts, verdict)
        failed |= not verdict["works"]
        print(json.dumps({**verdict, "facts": facts}, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

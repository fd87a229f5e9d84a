"""Time functions against each other: a clock, interleaved rounds, ratios, the circumstances.

A round times every function once, a ratio is taken within its round and the median over the rounds
counts, so that what else the machine does hits all alike. Needs torch alone.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# glibc keeps its memory: else every large tensor is mapped and zeroed anew, which takes longer than
# the layers and hides their differences
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: the process's own time, where others use the machine (and its caches)",
    )


def keep_memory(device: str) -> None:
    """Start this script anew with `MALLOC`, on the CPU, unless it has that already."""
    if device == "cpu" and any(os.environ.get(key) != value for key, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})


def synchronize(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable, repeats: int, clock: str, device: str | torch.device) -> float:
    """Seconds of a call."""
    now = CLOCKS[clock]
    synchronize(device)
    start = now()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (now() - start) / repeats


def interleaved(
    functions: dict[str, Callable],
    rounds: int,
    clock: str,
    device: str | torch.device,
    repeats: int = 1,
    least: float = 0.0,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """name -> seconds per call, one figure per round; every other round in reverse order.

    repeats: calls per figure; more, up to 200, where they take less than `least` seconds.
    """
    calls = {}
    for name, function in functions.items():
        timed(function, warm_up, clock, device)
        calls[name] = repeats
        if least:
            once = timed(function, 1, clock, device)
            calls[name] = max(repeats, min(200, round(least / max(once, 1e-9))))
    seconds = {name: [] for name in functions}
    for number in range(rounds):
        order = list(functions) if number % 2 == 0 else list(reversed(functions))
        for name in order:
            seconds[name].append(timed(functions[name], calls[name], clock, device))
        if sys.stderr.isatty():
            print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(seconds, base))


def circumstances(device: str | torch.device) -> dict:
    """Command, commit, versions, machine and its load, for the record of a benchmark."""
    device = torch.device(device)
    command = ["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return {
        "command": " ".join(command),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "malloc": {key: os.environ.get(key) for key in MALLOC},
    }


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def cpu_name() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def output(path: Path | None, name: str) -> Path:
    """Where a benchmark writes, without the ending: `path`, or `name` in results/bench."""
    path = path or ROOT / "results" / "bench" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_json(path: Path, result: dict) -> None:
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

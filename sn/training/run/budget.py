"""What a run needs, before it starts: memory from one small forward pass, time from a few steps."""

import copy
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import distributed
from .display import counted, duration

LEAST_STEPS, MOST_STEPS, SECONDS = 2, 20, 10.0  # measured, after one that warms up
WORKER = 0.05e9  # bytes of a data worker beside its batches, generously; docs/imagenet.md
SLOTS = {torch.optim.SGD: 1, torch.optim.Adam: 2}  # tensors per parameter that an optimizer keeps


class Enough(Exception):
    """As many steps as were to be measured are done."""


class Pace:
    """Counts the steps of a loop in every process alike, and ends it by Enough."""

    def __init__(self, device: torch.device):
        self.device, self.steps, self.workers = device, 0, (0, 0.0)
        self.total: int | None = None  # steps of the whole loop
        self.began = self.last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of a step, the first one left out unless it is the only one."""
        return (self.last - self.began) / max(1, self.steps - 1)

    def step(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.last = time.perf_counter()
        self.steps += 1
        if self.steps == 1 and self.total != 1:  # it warms up
            self.began = self.last
        long = self.last - self.began > SECONDS and self.steps > LEAST_STEPS
        self._end_if(long or self.steps > MOST_STEPS or self.steps == self.total)

    def end(self) -> None:
        """The loop is over in this process, and with it in all."""
        self._end_if(True)

    def _end_if(self, enough: bool) -> None:
        if distributed.any_process(enough, self.device):
            self.workers = workers_memory()
            raise Enough


@dataclass
class Need:
    """Bytes that a run needs beyond those it has when it is built, as estimated."""

    activations: float  # what one forward pass keeps for its backward
    images: int  # in that pass
    weights: float  # gradients and the optimizer's state
    loading: float  # data workers and their batches
    workers: int
    workers_key: str  # the option that says how many
    free: float  # on the device
    free_host: float
    on_host: bool  # the device's memory is the machine's
    advice: list[str]

    @property
    def step(self) -> float:
        return self.activations + self.weights

    @property
    def fits(self) -> bool:
        if self.on_host:
            return self.step + self.loading <= self.free
        return self.step <= self.free and self.loading <= self.free_host

    def warnings(self) -> list[str]:
        """What to tell a user before it starts."""
        found, cores = [], cpu_cores()
        if self.workers * local_processes() > cores:
            found.append(
                f"{self.workers * local_processes()} data workers on {cores} cores; "
                f"{self.workers_key}={max(1, cores // local_processes())} spares memory"
            )
        if not self.fits:
            found.append(f"{self.describe()}; {self.change()} (plan=true says more)")
        return found

    def change(self) -> str:
        return f"to make it fit: {', or '.join(self.advice)}"

    def describe(self) -> str:
        where = "" if self.on_host else " of the GPU"
        workers = f", {counted(self.workers, 'data worker')} {size(self.loading)}"
        return (
            f"a step needs about {size(self.step)}{where} (activations of "
            f"{counted(self.images, 'image')} {size(self.activations)}, "
            f"gradients and optimizer {size(self.weights)}){workers if self.workers else ''}; "
            f"{size(self.free)}{where} {'is' if self.on_host else 'are'} free"
        )


def estimate(
    model: nn.Module,
    forward: Callable[[nn.Module], tuple[Any, int]],
    images: int,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader | None,
    batch_bytes: float,
    device: torch.device,
    groups: int = 1,
    workers_key: str = "data.workers",
) -> Need:
    """What training needs, from one forward pass of a copy of `model`.

    Args:
        forward: makes such a pass; returns (the loss, the images in it).
        images: in a pass of the run.
        batch_bytes: of the images of a step, on this process.
        groups: virtual GPUs that share a pass; accumulated, each would have its own.
    """
    with untouched(model) as trial, saved_bytes(trial) as saved:
        loss, tried = forward(trial)
    del loss
    activations = saved[0] * images / tried
    slots = next((n for kind, n in SLOTS.items() if isinstance(optimizer, kind)), 2)
    weights = (1 + slots) * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    workers = loader.num_workers if loader is not None else 0
    ahead = (loader.prefetch_factor or 0) * workers if loader is not None else 0
    local = local_processes()
    free_host = free_memory() / local
    on_host = device.type == "cpu"
    free = free_host if on_host else torch.cuda.mem_get_info(device)[0]
    advice = []
    if groups > 1:
        fewer = size(activations / groups + weights)
        advice.append(f"setting.emulation=accumulated ({groups} forward passes, about {fewer})")
    cores = cpu_cores()
    if workers * local > cores:
        advice.append(f"{workers_key}={max(1, cores // local)}")
    if not on_host and next(model.parameters()).dtype == torch.float32:
        advice.append("precision=bf16")
    advice.append("fewer images per GPU, or smaller ones")
    return Need(
        activations=activations,
        images=images,
        weights=weights,
        loading=workers * WORKER + ahead * batch_bytes,
        workers=workers,
        workers_key=workers_key,
        free=free,
        free_host=free_host,
        on_host=on_host,
        advice=advice,
    )


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model to try; torch's random numbers are as before."""
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices):
        yield copy.deepcopy(model)


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[list[int]]:
    """A list with the bytes that autograd keeps of what happens inside, beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, kept = [0], []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            own.add(storage.data_ptr())
            found[0] += storage.nbytes()
            kept.append(storage)  # so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    kept.clear()


def plan(
    run: Any,
    model: nn.Module,
    need: Need | None,
    loops: dict[str, tuple[Callable[[], Any], int]],
    left_out: str = "",
) -> dict[str, float]:
    """Say what a run takes, measured on a few steps of each of its `loops`; return the figures.

    Nothing is measured if the run would not fit.

    Args:
        run: the Session.
        need: its estimate; None: there is none.
        loops: name -> (makes one pass, passes in the whole run).
        left_out: what of the run is in no loop.
    """
    count = sum(p.numel() for p in model.parameters())
    nbytes = sum(p.nbytes for p in model.parameters())
    run.say("plan; nothing is written to the run's folder")
    run.say(f"  parameters: {count:,}, {size(nbytes)}")
    found: dict[str, float] = {"parameters": count}
    if need is not None:
        run.say(f"  estimate: {need.describe()}")
        found |= {"estimated_step_bytes": need.step, "estimated_loading_bytes": need.loading}
        if not need.fits:
            run.say(f"  does not fit, so nothing is measured; {need.change()}")
            return found
    free, peak, whole, workers = free_memory(), Peak(run.device), 0.0, (0, 0.0)
    for name, (make, passes) in loops.items():
        pace = run.pace = Pace(run.device)
        with suppress(Enough):
            make()
        workers = max(workers, pace.workers)
        steps = pace.steps if pace.total is None else pace.total
        seconds = pace.seconds * steps * passes
        whole += seconds
        times = f"{duration(pace.seconds * steps)} x {passes} = " if passes != 1 else ""
        run.say(
            f"  {name}: {counted(steps, 'step')} of {pace.seconds:.3g} s ({pace.steps} measured); "
            f"{times}{duration(seconds)}"
        )
        found |= {f"{name}_step_s": pace.seconds, f"{name}_pass_s": pace.seconds * steps}
    run.say(f"  the run{f' without {left_out}' * bool(left_out)}: {duration(whole)}")
    gpu = peak.gpu()
    told = f"  memory at most: {size(peak.host())}, {size(peak.before)} before the first step"
    if workers[0]:
        told += f", {counted(workers[0], 'data worker')} {size(workers[1])}"
    told += f"; {size(free)} more were free"
    told += f"; on the GPU {size(gpu)}" if gpu is not None else ""
    run.say(told)
    found |= {"run_s": whole, "peak_bytes": peak.host(), "before_bytes": peak.before}
    return found | {"workers_bytes": workers[1]} | ({} if gpu is None else {"gpu_bytes": gpu})


# --- the machine


def local_processes() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cpu_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that processes here can still take: of the machine, or of their cgroup.

    What either keeps of files that were read counts as free: it makes room.
    """
    free = float("inf")
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    for folder, limit, usage, total in (
        (cgroup, "memory.max", "memory.current", ""),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with suppress(OSError, ValueError):  # ValueError: "max"
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
            left += sum(int(stat.get(f"{total}{kind}_file", 0)) for kind in ("inactive", "active"))
            free = min(free, max(0.0, float(left)))
    return free


class Peak:
    """The most memory that this process has from here on, and what it has already, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def host(self) -> float:
        peak = _status("VmHWM")
        unit = 1 if sys.platform == "darwin" else 1024
        if peak:  # Linux counts each of the two roughly
            return max(peak, self.before)
        return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    def gpu(self) -> float | None:
        used = self.device.type == "cuda"
        return float(torch.cuda.max_memory_reserved(self.device)) if used else None


def _status(key: str) -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return 1024.0 * int(line.split()[1])
    return 0.0


def workers_memory() -> tuple[int, float]:
    """(number, bytes that are theirs alone) of the processes that this one has started."""
    count, total = 0, 0.0
    with suppress(OSError):
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with suppress(OSError):
                lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
                total += sum(1024.0 * int(x.split()[1]) for x in lines if x.startswith("Private_"))
                count += 1
    return count, total


def size(count: float) -> str:
    """`12.3 GB`: three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            decimals = sum(count < limit * factor for limit in (10, 100))
            return f"{count / factor:.{decimals}f} {unit}"
    return f"{count / 1e3:.0f} kB"

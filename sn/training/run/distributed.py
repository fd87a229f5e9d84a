"""Processes, and the (GPUs, images per GPU) setting on whatever devices there are."""

import datetime
import hashlib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ... import kernels
from ...batch_average import batch_statistics_layers, sum_over_processes
from ...kernels import check
from ...modules import SwitchNormBase, layers_without_groups, set_virtual_gpus
from .lock import Busy

TORCHRUN = "start it with torchrun (scripts/launch.sh), or unset that"


@dataclass(frozen=True)
class Processes:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str = "auto", timeout_minutes: float = 30) -> Processes:
    """Join the process group that torchrun announces, if any, and choose this rank's device.

    Raises ValueError for an unknown device or one that is not there, and for an environment that
    announces no group (`launched`); OSError if the processes cannot meet.
    """
    rank, world_size, local_rank = launched()
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device={device!r}; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=cpu or auto")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        if world_size > 1 and "LOCAL_RANK" not in os.environ:
            raise ValueError(f"WORLD_SIZE={world_size}, but LOCAL_RANK, whose GPU to use, is not "
                             f"set; {TORCHRUN}")  # fmt: skip
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={local_rank} has no GPU of its own: there are "
                f"{torch.cuda.device_count()}; start fewer processes, let each see all GPUs "
                "of its machine (Slurm: no --gpus-per-task), or use device=cpu"
            )
        torch.cuda.set_device(local_rank)
        chosen = torch.device("cuda", local_rank)
    else:
        chosen = torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if use_cuda else "gloo"
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))
        except dist.DistError as error:  # no such host, a port in use, a rank that did not come
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).splitlines()[0]
            raise OSError(f"the {world_size} processes cannot meet at {place}: {reason}") from None
    return Processes(rank, world_size, chosen)


def launched() -> tuple[int, int, int]:
    """(rank, world size, local rank) as the environment says; (0, 1, 0) if it says nothing.

    Raises ValueError, naming the variable, for values that no launcher sets: with them a run would
    fail later, or wait for processes that never come.
    """
    world_size = _number("WORLD_SIZE", 1, 1)
    rank, local_rank = _number("RANK", 0, 0), _number("LOCAL_RANK", 0, 0)
    if rank >= world_size:
        size = os.environ.get("WORLD_SIZE", "not set")
        raise ValueError(f"RANK={rank}, but WORLD_SIZE is {size}; {TORCHRUN}")
    if world_size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ValueError(f"WORLD_SIZE={world_size}, but {name} is not set; {TORCHRUN}")
        _number("MASTER_PORT", 0, 0, 65535)
    return rank, world_size, local_rank


def _number(name: str, default: int, low: int, high: int = 10**6) -> int:
    text = os.environ.get(name, str(default))
    if not (re.fullmatch("[0-9]{1,9}", text) and low <= int(text) <= high):
        raise ValueError(f"{name}={text!r}; expected a whole number, {low} to {high}; {TORCHRUN}")
    return int(text)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process; all of them must come here."""
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)).item())


def same_everywhere(value: object, processes: Processes) -> bool:
    """Whether `value`, by its representation, is the same in all processes."""
    digest = hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).digest()
    numbers = torch.zeros(processes.world_size, dtype=torch.float64, device=processes.device)
    numbers[processes.rank] = float(int.from_bytes(digest[:6]))  # exact below 2^53
    return len(set(sum_over_processes(numbers).tolist())) == 1


def agree_on_kernels(model: nn.Module, device: torch.device) -> None:
    """Let all processes use the Triton kernels or none: at the first use on a machine a check.

    Where the model has a layer that would.
    """
    has_layers = any(isinstance(layer, SwitchNormBase) for layer in model.modules())
    if not has_layers or not kernels.chosen_by_check():
        return
    own = check.proven(device)
    if not any_process(not own, device):
        return
    check.refuse(device)
    if any_process(own, device):  # else local rank 0 has said why
        check.say_why(device)
        if own and dist.get_rank() == 0:
            warnings.warn(
                "sn: the Triton kernels can be used here, but not in every process, as those say: "
                "all take the plain formula, which is slower",
                stacklevel=2,
            )


def in_main(write: Callable[[], None], processes: Processes) -> None:
    """Call `write` in the main process while the others wait; its error ends them all.

    The others raise Busy where it does, so that all end with its exit code, else OSError. The wait
    matters: a process that ends may take those with it that still write.
    """
    error, kinds = None, (None, OSError, Busy)
    if processes.is_main:
        try:
            write()
        except Exception as caught:
            error = caught
    kind = 0 if error is None else 2 if isinstance(error, Busy) else 1
    found = sum_over_processes(torch.tensor(float(kind), device=processes.device))
    if error is not None:
        raise error
    failure = kinds[int(found)]
    if failure is not None:
        raise failure("the main process has failed; its message says why")


def parallelise(model: nn.Module, processes: Processes) -> nn.Module:
    """Return `model`, in DistributedDataParallel if there are several processes.

    Running statistics stay each rank's own until `average_running_statistics`.
    """
    if processes.device.type == "cuda":
        agree_on_kernels(model, processes.device)
    if processes.world_size == 1:
        return model
    parameters = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in parameters  # the name of broadcast_buffers since torch 2.15
    return DistributedDataParallel(
        model,
        device_ids=[processes.device.index] if processes.device.type == "cuda" else None,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
    )


def in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def average_running_statistics(model: nn.Module, used_in_training: bool = False) -> None:
    """Give every process the mean over processes of the running means and variances.

    With `used_in_training` only of layers whose training forwards depend on them.

    With one linear update per step this is the running average of the mean over all GPUs.
    Differs: plain DDP evaluates and saves rank 0's statistics, one GPU's noisier estimate of the
    same numbers; the official code never synchronises them.
    """
    if not in_group():
        return
    buffers = _running_statistics(model, used_in_training)
    if not buffers:
        return
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    sum_over_processes(flat)
    _put(buffers, flat / dist.get_world_size())


@torch.no_grad()
def running_statistics_of_all(model: nn.Module, processes: Processes) -> Tensor:
    """(processes, n): what running means and variances each has, on the CPU."""
    own = [buffer.flatten().double() for buffer in _running_statistics(model)]
    flat = torch.cat(own) if own else torch.zeros(0, device=processes.device)
    every = torch.zeros(processes.world_size, len(flat), dtype=torch.double, device=flat.device)
    every[processes.rank] = flat
    return sum_over_processes(every).cpu()


@torch.no_grad()
def put_own_running_statistics(model: nn.Module, every: Tensor, processes: Processes) -> None:
    """Give this process its row of `running_statistics_of_all`; ValueError if it does not fit."""
    buffers = _running_statistics(model)
    expected = (processes.world_size, sum(buffer.numel() for buffer in buffers))
    if every.shape != expected:
        raise ValueError(f"running statistics of shape {tuple(every.shape)}, not {expected}")
    _put(buffers, every[processes.rank])


def _running_statistics(model: nn.Module, used_in_training: bool = False) -> list[Tensor]:
    return [
        buffer
        for layer in batch_statistics_layers(model).values()
        if not used_in_training or getattr(layer, "trains_on_running", False)
        for buffer in (layer.running_mean, layer.running_var)
    ]


def _put(buffers: list[Tensor], flat: Tensor) -> None:
    for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
        buffer.copy_(values.view_as(buffer))


def prepare_setting(
    model: nn.Module, gpus: int, images_per_gpu: int, emulation: str, world_size: int
) -> tuple[str, int]:
    """Make `model` behave as on `gpus` GPUs; return (emulation, micro-batches per step).

    Each of the `world_size` processes plays gpus / world_size virtual GPUs: "grouped" in one
    forward in which batch-dependent layers normalise each group by itself, "accumulated" in as many
    micro-batches. "auto" takes grouped where every batch-dependent layer knows groups.

    Raises ValueError for impossible settings: counts below 1, a world size that does not divide
    gpus, layers without groups in grouped, synchronised norms where their emulation is not exact
    (torch's in either, ours in accumulated).
    """
    if gpus < 1 or images_per_gpu < 1:
        raise ValueError(
            f"setting {gpus}x{images_per_gpu}: setting.gpus and setting.images_per_gpu "
            "must be 1 or more"
        )
    if gpus % world_size:
        divisors = [d for d in range(1, gpus + 1) if gpus % d == 0]
        raise ValueError(
            f"setting {gpus}x{images_per_gpu} has {gpus} GPUs; {world_size} processes do not "
            f"divide them, start one of {divisors}"
        )
    if emulation not in ("auto", "grouped", "accumulated"):
        raise ValueError(
            f"unknown setting.emulation={emulation!r}; choose auto, grouped or accumulated"
        )
    virtual_gpus = gpus // world_size
    if virtual_gpus == 1:
        return "none", 1
    ungrouped = layers_without_groups(model)
    synchronised = [n for n in ungrouped if isinstance(model.get_submodule(n), nn.SyncBatchNorm)]
    if synchronised:
        raise ValueError(
            f"{synchronised[0]} is a synchronised norm; it needs one process per GPU "
            f"({gpus} processes, not {world_size}), neither groups nor accumulation emulate it"
        )
    if emulation == "grouped" and ungrouped:
        raise ValueError(
            f"{ungrouped[0]} takes batch statistics but does not know virtual GPUs; "
            "use setting.emulation=accumulated"
        )
    if emulation == "accumulated" or ungrouped:
        for name, layer in model.named_modules():
            try:
                if hasattr(layer, "micro_batches"):
                    layer.micro_batches()
            except ValueError as error:
                raise ValueError(
                    f"{name} is {error}; "
                    "use setting.emulation=grouped (the whole batch is one group to it)"
                ) from None
        return "accumulated", virtual_gpus
    set_virtual_gpus(model, virtual_gpus)
    return "grouped", 1


@contextmanager
def one_running_update(model: nn.Module, micro_batches: int) -> Iterator[Callable[[int], None]]:
    """Let the `micro_batches` forwards inside make one update of the running statistics.

    The update takes the mean of the micro-batches' means and variances, as one forward with
    virtual GPUs does. Yields a function to be called with 0, 1, ... before each forward. Layers
    that train on their running statistics (`sn.hooks`) take those from before the step in all of
    them, and every process gets their mean over processes at once.
    """
    layers = list(batch_statistics_layers(model).values()) if micro_batches > 1 else []
    buffers = [(m.running_mean, m.running_var, m.num_batches_tracked) for m in layers]
    before = [[buffer.clone() for buffer in triple] for triple in buffers]
    momenta = [layer.momentum for layer in layers]

    def begin(index: int) -> None:
        for layer in layers:  # 1, 1/2, 1/3, ...: after the last forward, the mean of all
            layer.momentum = 1.0 / (index + 1)

    try:
        with ExitStack() as stack:
            for layer in layers:
                if hasattr(layer, "micro_batches"):
                    stack.enter_context(layer.micro_batches())
            yield begin
    finally:
        with torch.no_grad():
            for layer, momentum, new, old in zip(layers, momenta, buffers, before):
                layer.momentum = momentum
                share = 1.0 / (old[2].double() + 1.0) if momentum is None else momentum
                for running, start in zip(new[:2], old[:2]):
                    running.copy_(start + share * (running - start))
                new[2].copy_(old[2] + (new[2] > old[2]))  # unchanged if the layer did not run
    average_running_statistics(model, used_in_training=True)


def untrained_statistics(model: nn.Module) -> list[str]:
    """Names of layers that would be evaluated with running statistics nothing has updated."""
    return [
        name
        for name, layer in batch_statistics_layers(model).items()
        if layer.num_batches_tracked is not None
        and layer.num_batches_tracked.item() == 0
        and not layer.running_mean.any()  # a state dict may come without the count
        and (layer.running_var == 1).all()
    ]

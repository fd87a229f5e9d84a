"""Batch statistics averaged over many batches with the weights frozen ("batch average").

Source: section 3.1 of the paper names the method; the estimator is the population form of precise
batch norm (Wu and Johnson, 2021): counts weight the batches, the variance is that of all values.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .freezing import is_frozen, modes_kept
from .modules import SwitchNormBase
from .running import RunningNorm


def batch_statistics_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers, by name, whose running statistics stand for batches in evaluation."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (_BatchNorm, SwitchNormBase, RunningNorm))
        and getattr(layer, "running_mean", None) is not None
    }


_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class _Moments:
    """Count, mean and summed squared deviation per channel, merged batch by batch (Chan et al.)."""

    def __init__(self, layer: nn.Module):
        self.unbiased = isinstance(layer, _BatchNorm)  # how the layer stores its variance
        self.count = 0
        self.mean = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self.deviation = torch.zeros_like(self.mean)

    def add(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        """Forward hook: with momentum 1 the layer has just stored this batch's moments."""
        if not layer.training:  # a layer is tracing the network
            return
        x = args[0] if args else kwargs["input"]
        count = x.numel() // x.shape[1]
        freedom = count
        if isinstance(layer, nn.SyncBatchNorm):  # holds the moments of all processes' batches
            total = sum_over_processes(layer.running_mean.new_tensor(count, dtype=torch.float64))
            freedom = count * (1 - 1 / total.item())
        elif self.unbiased:
            freedom = count - 1
        if count == 0:
            return
        var = layer.running_var.double()
        squares = var * freedom
        delta = layer.running_mean.double() - self.mean
        total = self.count + count
        self.deviation += squares + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def merge_over_processes(self) -> None:
        sums = torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])])
        sum_over_processes(sums)
        total = int(sums[-1].item())
        mean = sums[:-1] / max(total, 1)
        self.deviation += self.count * (self.mean - mean).square()
        sum_over_processes(self.deviation)
        self.count, self.mean = total, mean

    def store(self, layer: nn.Module, batches: int) -> None:
        freedom = self.count - 1 if self.unbiased else self.count
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.deviation / max(freedom, 1))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)


def sum_over_processes(values: Tensor) -> Tensor:
    """Add `values` over all processes of the default group, if there is one, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


@torch.no_grad()
def batch_average(model: nn.Module, loader: Iterable, num_batches: int = 200) -> int:
    """Replace the running statistics of `model` by those of `num_batches` batches of `loader`.

    Every layer with batch statistics normalises each batch by itself meanwhile; all others are in
    evaluation mode. An item of `loader` is a batch of inputs, or a tuple that starts with one. In a
    process group every rank brings batches of its own and all end with the statistics of all; with
    synchronised layers the ranks must bring equal numbers of batches.
    Modes, momenta, groups of virtual GPUs and the choices of sparse layers are restored; layers
    that `sn.freeze` has frozen stay as they are. Returns the number of batches used by all ranks; a
    model without batch statistics is left alone (0).

    Raises ValueError if no batch came or `num_batches` is no whole number from 1 on, TypeError for
    other items. The model is unchanged after an error.
    """
    if not hasattr(num_batches, "__index__") or num_batches < 1:
        raise ValueError(f"num_batches={num_batches}; expected a whole number, 1 or more")
    layers = [m for m in batch_statistics_layers(model).values() if not is_frozen(m)]
    if not layers:
        return 0
    moments = {layer: _Moments(layer) for layer in layers}
    device = next(model.parameters(), layers[0].running_mean).device  # there may be no parameters
    batches = 0
    with _buffers_kept(layers):
        with ExitStack() as stack:
            stack.enter_context(_each_batch_alone(model, layers))
            for layer, collected in moments.items():
                hook = layer.register_forward_hook(collected.add, with_kwargs=True)
                stack.callback(hook.remove)
            for item in islice(loader, num_batches):
                model(_inputs(item).to(device))
                batches += 1
        batches = sum_over_processes(torch.tensor(float(batches), device=device))
        for layer, collected in moments.items():
            collected.merge_over_processes()
            if collected.count:
                collected.store(layer, batches)
        if not any(collected.count for collected in moments.values()):
            raise ValueError(
                f"batch_average got no batch (num_batches={num_batches}); give a loader with images"
            )
    return int(batches)


@contextmanager
def _buffers_kept(layers: list[nn.Module]) -> Iterator[None]:
    """Put the layers' buffers back: after an error all, otherwise those that are no statistics."""
    before = [
        (layer, name, buffer.clone())
        for layer in layers
        for name, buffer in layer.named_buffers(recurse=False)
    ]
    failed = True
    try:
        yield
        failed = False
    finally:
        for layer, name, value in before:
            if failed or name not in _RUNNING:
                layer.get_buffer(name).copy_(value)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled code as it was written: compiled, it does not know of hooks added since."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # whose import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _each_batch_alone(model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Let `layers` normalise by the batch and keep its statistics, and all else evaluate."""
    meanwhile = {"momentum": 1.0, "virtual_gpus": 1}
    with modes_kept(model), ExitStack() as stack:
        model.eval()
        for layer in layers:
            layer.train()
            for key, value in meanwhile.items():
                if hasattr(layer, key):
                    stack.callback(setattr, layer, key, getattr(layer, key))
                    setattr(layer, key, value)
            for old, value in ((layer.running_mean, 0), (layer.running_var, 1)):
                if not old.isfinite().all():  # momentum 1 would keep it
                    old.fill_(value)
            if hasattr(layer, "batch_alone"):
                stack.enter_context(layer.batch_alone())
        # compiled, the network would be compiled anew for every batch: the hooks count
        stack.enter_context(not_compiled())
        yield


def _inputs(item: Any) -> Tensor:
    """The batch of inputs in what a loader gives."""
    inputs = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"batch_average got {type(item).__name__} from the loader; expected a tensor of "
            "inputs, or a tuple or list that starts with one"
        )
    return inputs

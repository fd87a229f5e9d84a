"""The guard before every update: finite loss, finite gradients, or no update.

The host decides (`allows`), or the device does (`update`) and the host learns of it later, without
waiting: a fused optimizer leaves everything as it is where its `found_inf` is 1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...batch_average import batch_statistics_layers, not_compiled


class FiniteGuard:
    """Lets an update happen only if its numbers are finite; up to `max_skips` bad ones are skipped.

    `skipped` counts them and belongs into the checkpoint. Numbers that are summed over processes
    make all of them decide alike.
    """

    def __init__(self, max_skips: int = 0, skipped: int = 0):
        self.max_skips, self.skipped = max_skips, skipped
        self._before = None

    def begin(self, model: nn.Module) -> None:
        """Before the forward pass: remember the running statistics that a skip has to restore."""
        if self.max_skips:
            layers = batch_statistics_layers(model).values()
            buffers = [b for layer in layers for b in layer.buffers(recurse=False)]
            self._before = [(buffer, buffer.clone()) for buffer in buffers]

    def allows(
        self, values: Tensor, model: nn.Module, where: str, again: Callable | None = None
    ) -> bool:
        """Whether `values` (losses, a gradient norm) are finite; False: skip this update.

        Raises FloatingPointError, naming the first layer gone bad, when no skip is left. `again`
        repeats the forward pass to find that layer.
        """
        if all_finite(to_host(values)):
            return True
        if self.skipped < self.max_skips:
            for buffer, before in self._before or ():
                buffer.copy_(before)
        self.refuse(values, model, where, again)
        return False

    def update(self, optimizer: torch.optim.Optimizer, values: Tensor) -> Tensor:
        """The optimizer's step unless `values` are not finite; whether it was made, on the device.

        For fused optimizers that have made a step before. `refuse` is to follow for a step that
        was not made.
        """
        finite = torch.isfinite(values).all()
        fused: Any = optimizer  # what torch.amp.GradScaler tells it, it reads from attributes
        fused.grad_scale, fused.found_inf = None, (~finite).float()
        try:
            fused.step()
        finally:
            del fused.grad_scale, fused.found_inf
        for buffer, before in self._before or ():
            buffer.copy_(torch.where(finite, buffer, before))
        return finite

    def refuse(
        self,
        values: Tensor,
        model: nn.Module,
        where: str,
        again: Callable | None = None,
        norms: Tensor | None = None,
    ) -> None:
        """Count a skipped update; FloatingPointError if none is left.

        `norms`: those of the step's gradients, if there are others by now.
        """
        if self.skipped >= self.max_skips:
            raise FloatingPointError(describe(values, model, where, again, norms) + self._skips())
        self.skipped += 1

    def _skips(self) -> str:
        return f" ({self.skipped} steps were skipped before)" if self.skipped else ""


def can_decide(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `FiniteGuard.update` can leave the decision to the device: fused, not the first step.

    A first step that is not made would leave SGD's momentum uninitialised. The control parameters
    may have made theirs before the weights.
    """
    groups = optimizer.param_groups
    if not all(group.get("fused") for group in groups):  # a state that was loaded may say otherwise
        return False
    parameters = (p for group in groups for p in group["params"])
    return all(p in optimizer.state for p in parameters if p.grad is not None)


class ToHost:
    """A tensor on its way to the host, in float64; `read` waits for it."""

    def __init__(self, values: Tensor):
        values = values.detach().double()
        self._event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._values = values

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.numpy().tolist()  # not torch's, which counts as a synchronisation


def to_host(values: Tensor) -> list[float]:
    return ToHost(values.reshape(-1)).read()


def all_finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))


def gradient_norms(model: nn.Module) -> Tensor:
    """Norm of each parameter's gradient, of those that have one, in float32 or wider."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros(0)
    return torch.stack(
        torch._foreach_norm([g.float() if g.dtype.itemsize < 4 else g for g in grads])
    ).double()


def gradient_norm(model: nn.Module) -> Tensor:
    """Norm of all gradients together, in float32 or wider: not finite if one of them is not."""
    return gradient_norms(model).norm()


def check_finite(
    values: Tensor, model: nn.Module, where: str, again: Callable | None = None
) -> None:
    """Raise FloatingPointError, naming the first layer gone bad, unless `values` are finite.

    For what has no gradients: those that there are would be an earlier step's.
    """
    if not torch.isfinite(values).all():
        raise FloatingPointError(describe(values, model, where, again, gradients=False))


def describe(
    values: Tensor,
    model: nn.Module,
    where: str,
    again: Callable | None = None,
    norms: Tensor | None = None,
    gradients: bool = True,
) -> str:
    """What is not finite, and the first place that can be found.

    The last of several `values` is the gradients' norm, the others are losses.
    """
    values = values.flatten()
    losses = values[:-1] if len(values) > 1 else values
    what = "gradient" if torch.isfinite(losses).all() else "loss"
    bad = _first_bad_tensor(model.named_buffers()) or _first_bad_tensor(model.named_parameters())
    if bad is None and again is not None:
        layer = first_bad_layer(model, again)
        bad = layer and f"the output of {layer}"
    if bad is None and gradients:
        names = [n for n, p in model.named_parameters() if p.grad is not None]
        norms = gradient_norms(model) if norms is None else norms
        bad = _first_bad_tensor(zip(names, norms))
        bad = bad and f"the gradient of {bad}"
    if bad is None:
        return f"{what} is not finite at {where}, though all weights are"
    return f"{what} is not finite at {where}; first bad: {bad}"


@torch.no_grad()
def first_bad_layer(model: nn.Module, again: Callable) -> str | None:
    """Name of the first layer whose output is not finite when `again()` runs the model."""
    found = []

    def look(name: str) -> Callable:
        def hook(layer: nn.Module, inputs: tuple, output: object) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name or type(layer).__name__)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    handles = [layer.register_forward_hook(look(name)) for name, layer in leaves]
    try:
        with not_compiled():  # which does not know of the hooks
            again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _first_bad_tensor(named) -> str | None:
    for name, tensor in named:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None

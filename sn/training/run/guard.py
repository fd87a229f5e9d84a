"""The guard before every update: finite loss, finite gradients, or no update."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...batch_average import batch_statistics_layers


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
        if torch.isfinite(values).all():
            return True
        if self.skipped < self.max_skips:
            self.skipped += 1
            for buffer, before in self._before or ():
                buffer.copy_(before)
            return False
        raise FloatingPointError(describe(values, model, where, again) + self._skips())

    def _skips(self) -> str:
        return f" ({self.skipped} steps were skipped before)" if self.skipped else ""


def gradient_norm(model: nn.Module) -> Tensor:
    """Norm of all gradients together, in float32 or wider: not finite if one of them is not."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm([g.float() if g.dtype.itemsize < 4 else g for g in grads])
    return torch.stack(norms).double().norm()


def check_finite(
    values: Tensor, model: nn.Module, where: str, again: Callable | None = None
) -> None:
    """Raise FloatingPointError, naming the first layer gone bad, unless `values` are finite."""
    FiniteGuard().allows(values, model, where, again)


def describe(values: Tensor, model: nn.Module, where: str, again: Callable | None = None) -> str:
    """What is not finite, and the first place that can be found."""
    what = "loss" if not torch.isfinite(values.flatten()[0]) else "gradient"
    bad = _first_bad_tensor(model.named_buffers()) or _first_bad_tensor(model.named_parameters())
    if bad is None and again is not None:
        layer = first_bad_layer(model, again)
        bad = layer and f"the output of {layer}"
    if bad is None:
        grads = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
        bad = _first_bad_tensor(grads)
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

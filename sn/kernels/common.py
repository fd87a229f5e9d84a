"""What the CPU's and CUDA's implementations share: layouts, what is kept, second derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import switch_norm

MOST_SPLITS = 64  # most pieces that the Triton programs cut an instance into
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)  # no subclass that does otherwise


class Options(NamedTuple):
    """What the layer is, apart from its tensors; the meaning is that of `switch_norm`."""

    statistics: tuple[str, ...]
    num_groups: int | None
    training: bool
    momentum: float
    eps: float
    virtual_gpus: int


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_channels_last(x: Tensor) -> bool:
    memory_format = _CHANNELS_LAST.get(x.dim())
    if memory_format is None:
        return x.permute(0, *range(2, x.dim()), 1).is_contiguous()
    return x.is_contiguous(memory_format=memory_format)


def _to_channels_last(x: Tensor) -> Tensor:
    last = x.permute(0, *range(2, x.dim()), 1).contiguous()
    return last.permute(0, -1, *range(1, x.dim() - 1))


def dense_in_layout(x: Tensor) -> tuple[Tensor, bool]:
    """`x`, dense, and whether its channels come last."""
    if x.is_contiguous():
        return x, False
    if _is_channels_last(x):
        return x, True
    if x.stride(1) == 1 and x.shape[1] > 1:  # a slice of a channels_last tensor
        return _to_channels_last(x), True
    return x.contiguous(), False


def like_layout(dy: Tensor, last: bool) -> Tensor:
    """`dy` in the layout of x, materialised: neither lazily negated nor autograd's zero tensor."""
    dy = dy.clone() if dy._is_zerotensor() else dy.resolve_neg()
    if not last:
        return dy.contiguous()
    return dy if _is_channels_last(dy) else _to_channels_last(dy)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), without the call where nothing changes."""
    return x if x.dtype is dtype else x.to(dtype)


def is_transformed() -> bool:
    """Whether torch.func transforms, a vectorised backward or forward derivatives are under way."""
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def goes_by_formula(dy: Tensor) -> bool:
    """Whether the backward pass must be the plain formula's: a second derivative will be asked
    for, or `dy` is a batch of gradients (`is_grads_batched`, `jacobian(vectorize=True)`)."""
    batched = torch._C._functorch.is_legacy_batchedtensor(dy)
    return torch.is_grad_enabled() or batched or is_transformed()


def keep(ctx, inputs, options: Options, y, *kept, relu=False, residual=False) -> None:
    """Save for the backward pass: the first five `inputs`, in evaluation the running statistics,
    y if ReLU followed the sum with a residual, and what else was `kept`.

    x is saved as it came: a dense copy, where it needs one, is made again.
    """
    ctx.options, ctx.relu, ctx.residual = options, relu, residual
    # The running statistics change with the next call; in training y does not depend on them.
    running = [None if options.training or t is None else t.clone() for t in inputs[5:7]]
    ctx.save_for_backward(*inputs[:5], *running, y if relu and residual else None, *kept)


Reduce = Callable[[Tensor], object]  # sums a float64 vector over processes, in its place


def join_batches(sums: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (C,) and number of values of a channel in the batches of all processes.

    `sums` (2 C + 1,) float64: those of values and of squares of this one's, and its number. Sums of
    squares: in double cancellation costs nothing visible.
    """
    reduce(sums)
    mean, square = (sums[:-1] / sums[-1].clamp(min=1)).view(2, -1).unbind(0)
    return mean, (square - mean.square()).clamp(min=0), sums[-1]


def join_moments(
    mean: Tensor, var: Tensor, values: int, reduce: Reduce
) -> tuple[Tensor, Tensor, Tensor]:
    """`join_batches` from mean and variance (C,) in float64 of this process's `values`."""
    sums = torch.cat((mean, var + mean.square(), mean.new_ones(1))) * values
    return join_batches(sums, reduce)


def _formula(inputs, options: Options) -> Tensor:
    """`switch_norm`; weight and bias may be (virtual_gpus C,), those of each group of samples."""
    x, *control, weight, bias, mean, var = inputs
    if weight is None or weight.shape[0] == x.shape[1]:
        return switch_norm(*inputs, **options._asdict())
    y = switch_norm(x, *control, None, None, mean, var, **options._asdict())
    each = (options.virtual_gpus, 1, x.shape[1]) + (1,) * (x.dim() - 2)
    y = y.unflatten(0, (options.virtual_gpus, -1)) * weight.view(each) + bias.view(each)
    return y.flatten(0, 1)


def reference_backward(ctx, dy, inputs, y) -> tuple[Tensor | None, ...]:
    """The gradients of the seven inputs and of a residual as a differentiable function.

    Through the plain formula, with what `keep` saved.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: x itself may come from the same parameters, of a layer that is applied twice.
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        plain = _formula(inputs, ctx.options)
    if ctx.relu:
        dy = dy * ~((plain if y is None else y) <= 0)  # NaN passes, as in PyTorch
    needed = ctx.needs_input_grad[:5]
    wanted = [t for t, need in zip(inputs, needed) if need]
    grads = iter(())
    if wanted:
        grads = iter(torch.autograd.grad(plain, wanted, dy, create_graph=again, allow_unused=True))
    grads = [next(grads) if need else None for need in needed]
    return *grads, None, None, dy if ctx.residual else None

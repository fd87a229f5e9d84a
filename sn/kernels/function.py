"""The layer on the CPU as one autograd function: two passes forward, two backward, x kept."""

import torch
from torch import Tensor

from ..functional import switch_norm
from .aten import Columns, Rows
from .mixture import Mixed, Moments, Options, mix, mix_backward, update_running

FAR = 8.0  # means further from zero than this, in mixed deviations, cost digits in a x + b


def fused_switch_norm(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: Options,
) -> Tensor:
    """`switch_norm` for a CPU tensor of shape (N, C, *spatial) that is not empty."""
    inputs = (x, mean_weight, var_weight, weight, bias, running_mean, running_var)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:5]):
        return _SwitchNorm.apply(*inputs, options)
    return _forward(*inputs, options)[0]


def _layout(x: Tensor) -> tuple[Tensor, type]:
    """`x`, dense, and its layout."""
    if x.is_contiguous():
        return x, Rows
    last = x.permute(0, *range(2, x.dim()), 1)
    if last.is_contiguous():
        return x, Columns
    if x.stride(1) == 1 and x.shape[1] > 1:  # a slice of a channels_last tensor
        return last.contiguous().permute(0, -1, *range(1, x.dim() - 1)), Columns
    return x.contiguous(), Rows


def _forward(x, mean_weight, var_weight, weight, bias, running_mean, running_var, options):
    """Output, dense x, its layout, (centre, mean - centre) and the mixture."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, layout = _layout(x.detach())
    size = x.shape[:2]
    parameters = (mean_weight, var_weight, weight, bias)
    parameters = tuple(t if t is None else t.detach().to(dtype) for t in parameters)
    view = layout.view(x)
    pair, free = layout.moments(view, dtype)
    pair = pair.view(2, *size)
    mixed = mix(pair, *parameters, running_mean, running_var, options)
    centre, mean = None, pair[0]
    if not torch.linalg.vector_norm(mean * mixed.rstd, torch.inf).item() <= FAR:
        # Subtract the rounded means before scaling, so that a x + b loses no digits, and mix in
        # double, so that differences of means lose none.
        centre = mean.clone()
        view = view.to(dtype) - layout.per_instance(centre)
        pair, free = layout.moments(view, dtype)
        pair = pair.view(2, *size)
        mean, exact = pair[0], pair.to(torch.float64, copy=True)
        exact[0] += centre
        parameters = [t if t is None else t.double() for t in parameters]
        mixed = mix(exact, *parameters, running_mean, running_var, options).to(dtype)
    if mixed.batch is not None and running_mean is not None:
        update_running(running_mean, running_var, mixed.batch, options.momentum)

    shift = torch.addcmul(mixed.shift, mixed.scale, mean, value=-1)
    if free is not None and free.dtype == x.dtype:
        y = x.new_empty(0).set_(free.untyped_storage(), 0, x.shape, x.stride())  # not a view
    else:
        y = torch.empty_like(x)
    layout.affine(view, mixed.scale, shift, layout.view(y))
    return y, x, layout, (centre, mean), mixed


class _SwitchNorm(torch.autograd.Function):
    """Keeps x and some (N, C) numbers for the backward pass."""

    @staticmethod
    def forward(ctx, *inputs):
        y, x, ctx.layout, (centre, mean), mixed = _forward(*inputs)
        ctx.options, ctx.gates = inputs[-1], mixed.gates
        ctx.pools = [moments.pool for moments in mixed.moments]
        kept = [mixed.scale, mixed.rstd, mixed.offset, centre, mean]
        for moments in mixed.moments:
            kept += moments[1:]
        ctx.dense = x if x.data_ptr() != inputs[0].data_ptr() else None
        # The running statistics change with the next call; in training y does not depend on them.
        running = [None if ctx.options.training or t is None else t.clone() for t in inputs[5:7]]
        ctx.save_for_backward(*inputs[:5], *running, *kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks a single time
        inputs, kept = saved[:7], saved[7:]
        if torch.is_grad_enabled():  # a second derivative will be asked for
            return _reference_backward(ctx, dy, *inputs)
        x, mean_weight, var_weight, weight, bias = inputs[:5]
        scale, rstd, offset, centre, mean = kept[:5]
        moments = [Moments(*m) for m in zip(ctx.pools, kept[5::2], kept[6::2])]
        mixed = Mixed(scale, None, rstd, offset, moments, ctx.gates, None)

        layout = ctx.layout
        x = x if ctx.dense is None else ctx.dense
        if layout is Rows:
            dy = dy.contiguous()
        else:
            dy = (
                dy.permute(0, *range(2, dy.dim()), 1)
                .contiguous()
                .permute(0, -1, *range(1, dy.dim() - 1))
            )
        view, dy_view = layout.view(x), layout.view(dy)
        if centre is not None:
            view = view.to(scale.dtype) - layout.per_instance(centre)
        sums = layout.reduce(dy_view, view, mean)
        length = x.numel() // scale.numel()
        grads = mix_backward(sums, mixed, length)

        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            q = torch.addcmul(grads.q, grads.p, mean, value=-1)
            layout.affine2(dy_view, view, scale, grads.p, q, layout.view(dx))
        logits = [
            torch.tensor(values, dtype=like.dtype) if needed else None
            for values, like, needed in zip(
                (grads.mean_logits, grads.var_logits),
                (mean_weight, var_weight),
                ctx.needs_input_grad[1:3],
            )
        ]
        affine = [
            None if like is None else grad.to(like.dtype)
            for grad, like in zip((grads.weight, grads.bias), (weight, bias))
        ]
        return dx, *logits, *affine, None, None, None


def _reference_backward(ctx, dy, *inputs):
    """The gradients as a differentiable function, through the plain formula."""
    needed = ctx.needs_input_grad[:5]
    y = switch_norm(*inputs, **ctx.options._asdict())
    wanted = [t for t, need in zip(inputs, needed) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return *(next(grads) if need else None for need in needed), None, None, None

"""The layer on the CPU as one autograd function: two passes forward, two backward, x kept."""

import torch
from torch import Tensor

from ..functional import switch_norm
from .aten import Columns, Rows, as_dtype
from .mixture import Mixed, Options, mix, mix_backward, softmax, to_array, to_tensor

FAR = 8.0  # means further from zero than this, in mixed deviations, cost digits in a x + b


def fused_switch_norm(inputs: tuple[Tensor | None, ...], options: Options) -> Tensor:
    """`switch_norm` of its seven `inputs`; x is a CPU tensor (N, C, *spatial) that is not empty."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:5]):
        return _SwitchNorm.apply(*inputs, options)
    return _forward(*inputs, options)[0]


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


def like_layout(dy: Tensor, last: bool) -> Tensor:
    """`dy`, dense in the layout of x, with memory of its own values.

    A lazily negated tensor has that of others, a zero tensor of autograd's none.
    """
    dy = dy.clone() if dy._is_zerotensor() else dy.resolve_neg()
    if not last:
        return dy.contiguous()
    return dy if _is_channels_last(dy) else _to_channels_last(dy)


def _mix(pair: Tensor, centre: Tensor | None, parameters, running, options: Options) -> Mixed:
    """The mixture from moments (2, N, C), whose means are relative to `centre`.

    In double if there is one: differences of means that are far from zero lose no digits.
    """
    dtype = pair.dtype if centre is None else torch.float64
    arrays = [
        None if t is None else to_array(as_dtype(t, dtype)) for t in (*parameters[2:], *running)
    ]
    if centre is not None:
        pair = pair.to(dtype, copy=True)
        pair[0] += centre
    gates = softmax(parameters[0].tolist()), softmax(parameters[1].tolist())
    return mix(to_array(pair), gates, *arrays, options)


def _tensor(array, dtype: torch.dtype) -> Tensor:
    return as_dtype(to_tensor(array), dtype)


def _forward(x, mean_weight, var_weight, weight, bias, running_mean, running_var, options):
    """Output, x's layout, the mixture, the instances' means and their centre, if any."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, last = dense_in_layout(x.detach())
    layout = Columns if last else Rows
    size = x.shape[:2]
    parameters = [t if t is None else t.detach() for t in (mean_weight, var_weight, weight, bias)]
    running = running_mean, running_var
    view, centre = layout.view(x), None
    pair, free = layout.moments(view, dtype)
    pair = pair.view(2, *size)
    mixed = _mix(pair, centre, parameters, running, options)
    if not abs(to_array(pair[0]) * mixed.rstd).max() <= FAR:
        # Subtract the rounded means before scaling, so that a x + b loses no digits.
        centre = pair[0].clone()
        view = as_dtype(view, dtype) - layout.per_instance(centre)
        pair, free = layout.moments(view, dtype)
        pair = pair.view(2, *size)
        mixed = _mix(pair, centre, parameters, running, options)
    if options.training and running_mean is not None and "bn" in mixed.moments:
        _, _, mean, var = mixed.moments["bn"]
        for old, new in ((running_mean, mean), (running_var, var)):
            new = new.reshape(-1, size[1])  # one row for each virtual GPU
            new = new[0] if len(new) == 1 else new.sum(0) * (1.0 / len(new))
            old.lerp_(_tensor(new, old.dtype), options.momentum)

    scale = mixed.scale
    shift = mixed.shift - scale * to_array(pair[0])
    if free is not None and free.dtype == x.dtype:
        y = x.new_empty(0).set_(free.untyped_storage(), 0, x.shape, x.stride())  # not a view
    else:
        y = torch.empty_like(x)
    layout.affine(view, _tensor(scale, dtype), _tensor(shift, dtype), layout.view(y))
    mixed = mixed._replace(shift=None)
    return y, layout, mixed, pair[0], centre


class _SwitchNorm(torch.autograd.Function):
    """Keeps x and some (N, C) arrays for the backward pass."""

    @staticmethod
    def forward(ctx, *inputs):
        y, ctx.layout, ctx.mixed, mean, centre = _forward(*inputs)
        keep(ctx, inputs[:7], inputs[7], y, mean, centre)
        return y

    @staticmethod
    def backward(ctx, dy):
        *inputs, y, mean, centre = ctx.saved_tensors
        if goes_by_formula(dy):
            return reference_backward(ctx, dy, inputs, y)
        x, *parameters = inputs[:5]
        dtype, layout, mixed = mean.dtype, ctx.layout, ctx.mixed

        x, dy = (like_layout(t, layout is Columns) for t in (x.detach(), dy))
        view, dy_view = layout.view(x), layout.view(dy)
        if centre is not None:
            view = as_dtype(view, dtype) - layout.per_instance(centre)
        total, product = (to_array(s.view_as(mean)) for s in layout.reduce(dy_view, view, mean))
        length = x.numel() // mean.numel()
        grads = mix_backward(total, product, mixed, length)

        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            q = grads.q - grads.p * to_array(mean)
            coefficients = (_tensor(array, dtype) for array in (mixed.scale, grads.p, q))
            layout.affine2(dy_view, view, *coefficients, layout.view(dx))
        logits = [
            torch.tensor(values, dtype=t.dtype, device=t.device)
            for values, t in zip((grads.mean_logits, grads.var_logits), parameters)
        ]
        affine = [
            None if t is None else _tensor(array, t.dtype)
            for array, t in zip((grads.weight, grads.bias), parameters[2:])
        ]
        return dx, *logits, *affine, None, None, None


def keep(ctx, inputs, options: Options, y, *kept, relu=False, residual=False) -> None:
    """Save for the backward pass: the first five `inputs`, in evaluation the running statistics,
    y if ReLU followed the sum with a residual, and what else was `kept`.

    x is saved as it came: a dense copy, where it needs one, is made again.
    """
    ctx.options, ctx.relu, ctx.residual = options, relu, residual
    # The running statistics change with the next call; in training y does not depend on them.
    running = [None if options.training or t is None else t.clone() for t in inputs[5:7]]
    ctx.save_for_backward(*inputs[:5], *running, y if relu and residual else None, *kept)


def reference_backward(ctx, dy, inputs, y) -> tuple[Tensor | None, ...]:
    """The gradients of the seven inputs and of a residual as a differentiable function.

    Through the plain formula, with what `keep` saved.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        plain = switch_norm(*inputs, **ctx.options._asdict())
    if ctx.relu:
        dy = dy * ~((plain if y is None else y) <= 0)  # NaN passes, as in PyTorch
    needed = ctx.needs_input_grad[:5]
    wanted = [t for t, need in zip(inputs, needed) if need]
    grads = iter(())
    if wanted:
        grads = iter(torch.autograd.grad(plain, wanted, dy, create_graph=again, allow_unused=True))
    grads = [next(grads) if need else None for need in needed]
    return *grads, None, None, dy if ctx.residual else None

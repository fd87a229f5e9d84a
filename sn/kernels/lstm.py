"""A normalised LSTM step as one autograd function, and LN + GN of vectors as another.

Vectors are small, so what counts is the number of operations and of autograd's nodes, not memory
traffic: one node a step, hand-written derivatives, no pass that is not needed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import vectors
from .native import vectors_backward


class Norm(NamedTuple):
    """How a vector (B, D) is normalised: kind "none", "group" (1 group: LN) or "switch" (LN + GN).

    Its tensors are (), (weight, bias) or (mean_weight, var_weight, weight, bias); none is None.
    """

    kind: str
    num_groups: int = 1
    eps: float = 1e-5


class VectorNorm(torch.autograd.Function):
    """Norm `norm` of x (B, D)."""

    @staticmethod
    def forward(ctx, norm: Norm, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.norm = norm
        y, ctx.kept = norm_forward(norm, tensors, x)
        ctx.save_for_backward(x, *tensors)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be asked for
            return None, *_by_autograd(lambda *t: norm_plain(ctx.norm, t[1:], t[0]), ctx, dy)
        dx, grads = norm_backward(ctx.norm, tensors, x, ctx.kept, dy)
        return None, dx, *grads


class LSTMStep(torch.autograd.Function):
    """(h', c') from the input's part of the gates `driven` (B, 4 D), h, c (B, D) and weight_hh.

    `hidden` normalises h @ weight_hh.T, `cell` the new cell state before its tanh; their tensors
    follow one another in `tensors`.
    """

    @staticmethod
    def forward(ctx, hidden: Norm, cell: Norm, driven, h, c, weight_hh, *tensors):
        ctx.hidden, ctx.cell = hidden, cell
        split = _tensor_count(hidden)
        gates = h @ weight_hh.t()
        recurrent = gates
        gates, ctx.hidden_kept = norm_forward(hidden, tensors[:split], gates)
        gates = gates + driven
        size = h.shape[1]
        i_f = gates[:, : 2 * size].sigmoid()
        i, f = i_f[:, :size], i_f[:, size:]
        g = gates[:, 2 * size : 3 * size].tanh()
        o = gates[:, 3 * size :].sigmoid()
        new_c = torch.addcmul(f * c, i, g)
        normed, ctx.cell_kept = norm_forward(cell, tensors[split:], new_c)
        squashed = normed.tanh()
        ctx.values = (recurrent, i, f, g, o, squashed)
        ctx.save_for_backward(driven, h, c, weight_hh, new_c, *tensors)
        return o * squashed, new_c

    @staticmethod
    def backward(ctx, dh: Tensor, dc: Tensor):
        driven, h, c, weight_hh, new_c, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            saved = (driven, h, c, weight_hh, *tensors)

            def plain(*t):
                return step_plain(ctx.hidden, ctx.cell, *t)

            return None, None, *_by_autograd(plain, ctx, (dh, dc), saved)
        split = _tensor_count(ctx.hidden)
        recurrent, i, f, g, o, squashed = ctx.values
        d_normed = torch.ops.aten.tanh_backward(dh * o, squashed)
        d_cell, cell_grads = norm_backward(
            ctx.cell, tensors[split:], new_c, ctx.cell_kept, d_normed
        )
        d_cell = d_cell + dc
        d_gates = torch.cat(
            (
                torch.ops.aten.sigmoid_backward(d_cell * g, i),
                torch.ops.aten.sigmoid_backward(d_cell * c, f),
                torch.ops.aten.tanh_backward(d_cell * i, g),
                torch.ops.aten.sigmoid_backward(dh * squashed, o),
            ),
            1,
        )
        d_recurrent, hidden_grads = norm_backward(
            ctx.hidden, tensors[:split], recurrent, ctx.hidden_kept, d_gates
        )
        d_h = d_recurrent @ weight_hh if ctx.needs_input_grad[3] else None
        d_weight = d_recurrent.t() @ h if ctx.needs_input_grad[5] else None
        return None, None, d_gates, d_h, d_cell * f, d_weight, *hidden_grads, *cell_grads


def step_plain(hidden: Norm, cell: Norm, driven, h, c, weight_hh, *tensors):
    """`LSTMStep` in differentiable operations: the reference, and what compilers see."""
    split = _tensor_count(hidden)
    gates = driven + norm_plain(hidden, tensors[:split], h @ weight_hh.t())
    i, f, g, o = gates.chunk(4, -1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return o.sigmoid() * norm_plain(cell, tensors[split:], c).tanh(), c


def norm_plain(norm: Norm, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
    """The norm in differentiable operations, statistics in at least float32.

    Layer moments come from the groups' by the law of total variance, as in `switch_norm`.
    """
    if norm.kind == "none":
        return x
    *control, weight, bias = tensors
    if norm.kind == "group":
        return torch.nn.functional.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(dtype).unflatten(-1, (norm.num_groups, -1))  # (B, G, D / G)
    var_gn, mean_gn = torch.var_mean(grouped, -1, correction=0, keepdim=True)
    spread, mean_ln = torch.var_mean(mean_gn, -2, correction=0, keepdim=True)
    var_ln = var_gn.mean(-2, keepdim=True) + spread
    # the two importance weights sum to 1: mixing is interpolation from gn to ln
    mean_ratio, var_ratio = (z.to(dtype).softmax(0)[0] for z in control)
    mean = torch.lerp(mean_gn, mean_ln, mean_ratio)
    var = torch.lerp(var_gn, var_ln, var_ratio)
    y = ((grouped - mean) * torch.rsqrt(var + norm.eps)).flatten(-2)
    return torch.addcmul(bias.to(dtype), y, weight.to(dtype)).to(x.dtype)


def norm_forward(norm: Norm, tensors: Sequence[Tensor], x: Tensor) -> tuple[Tensor, tuple]:
    """The norm without autograd, and what its backward pass needs."""
    if norm.kind == "none":
        return x, ()
    *control, weight, bias = tensors
    groups = norm.num_groups
    x = x.contiguous()  # PyTorch 2.11's kernels ask for it
    if norm.kind == "group":
        batch, size = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, size, 1, groups, norm.eps)
        return y, (mean, rstd)
    found = vectors((x, *tensors), groups, norm.eps)
    if found is not None:
        return found
    grouped = x.view(len(x), groups, -1)
    var_gn, mean_gn = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    spread, mean_ln = torch.var_mean(mean_gn, 1, correction=0, keepdim=True)
    ratios = torch.stack(list(control)).softmax(1)[:, 0]  # of ln, in the mean and in the variance
    mean_gap = mean_ln - mean_gn
    var_gap = spread.add_(var_gn.mean(1, keepdim=True)) - var_gn
    mean_ratio, var_ratio = ratios.unbind()
    rstd = torch.addcmul(var_gn, var_gap, var_ratio).add_(norm.eps).rsqrt_()
    mean = torch.addcmul(mean_gn, mean_gap, mean_ratio)
    normed = (grouped - mean).mul_(rstd)
    y = torch.addcmul(bias, normed.view(x.shape), weight)
    return y, (normed, rstd, mean_gap, var_gap, ratios)


def norm_backward(
    norm: Norm, tensors: Sequence[Tensor], x: Tensor, kept: tuple, dy: Tensor
) -> tuple[Tensor, tuple]:
    """Gradients of x and of the norm's tensors."""
    if norm.kind == "none":
        return dy, ()
    *control, weight, bias = tensors
    groups, (batch, size) = norm.num_groups, x.shape
    if norm.kind == "group":
        dx, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
            dy.contiguous(),
            x.contiguous(),
            *kept,
            weight,
            batch,
            size,
            1,
            groups,
            [True, True, True],
        )
        return dx, (d_weight, d_bias)
    if len(kept) == 2:
        return vectors_backward(dy, (x, *tensors), kept)
    normed, rstd, mean_gap, var_gap, ratios = kept
    mean_ratio, var_ratio = ratios.unbind()
    length = size // groups
    product = dy * normed.view(batch, size)
    d_normed = (dy * weight).view(normed.shape)
    # y depends on each group's mixed mean and variance through these sums, (B, G, 1)
    d_mean = (d_normed.sum(2, keepdim=True)).mul_(rstd).neg_()
    d_var = ((product * weight).view(normed.shape).sum(2, keepdim=True)).mul_(rstd * rstd)
    d_var = d_var.mul_(-0.5)
    slope = torch.stack(((d_mean * mean_gap).sum(), (d_var * var_gap).sum()))
    slope = slope * ratios * (1 - ratios)  # softmax of two: the one rises as the other falls
    d_gates = torch.stack((slope, -slope), 1)
    # mixed = own + ratio * (layer's - own); the layer's moments are means over the groups
    layer_mean = d_mean.mean(1, keepdim=True) * mean_ratio
    layer_var = d_var.mean(1, keepdim=True) * var_ratio
    d_mean = d_mean * (1 - mean_ratio) + layer_mean - 2 * layer_var * mean_gap
    d_var = (d_var * (1 - var_ratio) + layer_var) * (2 / length)
    # x - its group's mean = normed / rstd + mean_ratio * mean_gap
    constant = torch.addcmul(d_mean / length, d_var * mean_gap, mean_ratio)
    dx = torch.addcmul(constant, d_normed, rstd).addcmul_(normed, d_var / rstd)
    return dx.view(batch, size), (*d_gates.unbind(), product.sum(0), dy.sum(0))


def _tensor_count(norm: Norm) -> int:
    return {"none": 0, "group": 2, "switch": 4}[norm.kind]


def _by_autograd(plain, ctx, upstream, inputs=None) -> tuple:
    """Gradients that can be differentiated again, through the plain form."""
    inputs = ctx.saved_tensors if inputs is None else inputs
    needed = ctx.needs_input_grad[-len(inputs) :]
    wanted = [t for t, need in zip(inputs, needed) if need]
    grads = iter(
        torch.autograd.grad(plain(*inputs), wanted, upstream, create_graph=True, allow_unused=True)
    )
    return tuple(next(grads) if need else None for need in needed)

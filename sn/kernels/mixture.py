"""All of Switchable Normalization that happens on (N, C) numbers, forward and backward.

Between the passes over x the layer is a small computation: from each instance's mean m and variance
v to y = a (x - m) + shift, and from S = sum dy and T = sum dy (x - m) to
dx = a dy + p (x - m) + q. It is written out here once, with derivatives by hand.

With M_k, V_k the moments of statistic k, w and u the softmaxed gates, d_k = m - M_k:

    M_k = pool(m),  V_k = pool(v) + pool(d_k^2)      pool: mean over channels, groups or samples
    r = (sum u_k V_k + eps)^-1/2,  a = weight r,  o = sum w_k (M_k - m) = -sum w_k d_k
    y = a (x - m - o) + bias

    P = a S  and  Q = a r^2 (T - o S)  are minus the gradient of the mixed mean and minus twice that
    of the mixed variance, hence
    dm = -(w_in P + sum w_k pool(P) + sum u_k pool(Q) d_k)
    dv = -(u_in Q + sum u_k pool(Q)) / 2
    q = dm / L,  p = 2 dv / L
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """What the layer is, apart from its tensors; the meaning is that of `switch_norm`."""

    statistics: tuple[str, ...]
    num_groups: int | None
    training: bool
    momentum: float
    eps: float
    virtual_gpus: int


class Pool(NamedTuple):
    """How a statistic gathers (N, C) numbers: the mean over `dim` of them seen as `shape`."""

    shape: tuple[int, ...]
    dim: int

    def mean(self, pair: Tensor) -> Tensor:
        """The pools of each half of (2, N, C), to be broadcast against `shape`."""
        return pair.view(2, *self.shape).mean(self.dim + 1, keepdim=True)


class Moments(NamedTuple):
    """What the backward pass needs of one statistic. `pool` None: the instances themselves, or
    constants (the running statistics of bn in evaluation)."""

    pool: Pool | None
    distance: Tensor | None  # d_k, None for `in`
    var: Tensor


class Mixed(NamedTuple):
    """The forward result, each (N, C): y = scale (x - m) + shift."""

    scale: Tensor
    shift: Tensor
    rstd: Tensor
    offset: Tensor | None
    moments: list[Moments]
    gates: tuple[list[float], list[float]]
    batch: tuple[Tensor, Tensor] | None  # bn's (G, C) means and variances in training

    def to(self, dtype: torch.dtype) -> "Mixed":
        tensors = (t if t is None else t.to(dtype) for t in self[:4])
        moments = [
            Moments(m.pool, *(t if t is None else t.to(dtype) for t in m[1:])) for m in self.moments
        ]
        return Mixed(*tensors, moments, self.gates, self.batch)


def softmax(logits: Tensor) -> list[float]:
    values = logits.tolist()
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def _pool_of(statistic: str, size: torch.Size, options: Options) -> Pool:
    batch, channels = size
    if statistic == "ln":
        return Pool((batch, channels), 1)
    if statistic == "gn":
        return Pool((batch, options.num_groups, channels // options.num_groups), 2)
    groups = options.virtual_gpus if options.training else 1
    if groups == 1:
        return Pool((batch, channels), 0)
    return Pool((groups, batch // groups, channels), 1)


def mix(
    pair: Tensor,
    mean_logits: Tensor,
    var_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: Options,
) -> Mixed:
    """Mix the instances' moments `pair` (2, N, C), in their dtype."""
    mean, var = pair.unbind(0)
    size = mean.shape
    gates = softmax(mean_logits), softmax(var_logits)
    offset = mixed = batch = None
    moments = []
    for statistic, w, u in zip(options.statistics, *gates):
        if statistic == "in":
            mixed = (var * u).add_(options.eps)
            moments.append(Moments(None, None, var))
            continue
        if mixed is None:
            mixed = torch.full_like(var, options.eps)
        if statistic == "bn" and not options.training and running_mean is not None:
            pool = None
            distance = mean - running_mean.to(mean.dtype)
            spread = running_var.to(mean.dtype)
            mixed.add_(spread, alpha=u)
        else:
            pool = _pool_of(statistic, size, options)
            pooled, spread = pool.mean(pair).unbind(0)
            distance = mean.view(pool.shape) - pooled
            spread.add_(distance.square().mean(pool.dim, keepdim=True))
            mixed.view(pool.shape).add_(spread, alpha=u)
            if statistic == "bn" and options.training:
                batch = pooled.view(-1, size[1]), spread.view(-1, size[1])
            distance = distance.view(size)
        moments.append(Moments(pool, distance, spread))
        offset = distance * -w if offset is None else offset.add_(distance, alpha=-w)
    rstd = mixed.rsqrt_()
    scale = rstd if weight is None else rstd * weight
    if offset is None:
        shift = torch.zeros_like(scale) if bias is None else bias.expand(size)
    elif bias is None:
        shift = (offset * scale).neg_()
    else:
        shift = torch.addcmul(bias, offset, scale, value=-1)
    return Mixed(scale, shift, rstd, offset, moments, gates, batch)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    batch: tuple[Tensor, Tensor],
    momentum: float,
) -> None:
    """One step of the running statistics towards the mean of the groups' moments, in place."""
    mean, var = (groups[0] if groups.shape[0] == 1 else groups.mean(0) for groups in batch)
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(var.to(running_var.dtype), momentum)


class Gradients(NamedTuple):
    p: Tensor  # dx = scale dy + p (x - m) + q, each (N, C)
    q: Tensor
    mean_logits: list[float]
    var_logits: list[float]
    weight: Tensor  # (C,)
    bias: Tensor


def mix_backward(sums: tuple[Tensor, Tensor], mixed: Mixed, length: int) -> Gradients:
    """From S and T (N, C) to all gradients; `length` is the number of positions L."""
    scale, _, rstd, offset, moments, gates, _ = mixed
    total, product = (s.view_as(scale) for s in sums)
    if offset is not None:
        product = torch.addcmul(product, offset, total, value=-1)
    grad_weight = (rstd * product).sum(0)
    grad_bias = total.sum(0)
    pair = torch.empty((2, *scale.shape), dtype=scale.dtype, device=scale.device)
    mean_part, var_part = pair.unbind(0)
    torch.mul(scale, total, out=mean_part)
    torch.mul(rstd, rstd, out=var_part).mul_(scale).mul_(product)

    pools = [None if m.pool is None else m.pool.mean(pair).unbind(0) for m in moments]
    mean_grads, var_grads = [], []
    for moment, pool in zip(moments, pools):
        near = moment.distance is None
        mean_grads.append(0.0 if near else _dot(mean_part, moment.distance))
        if pool is None:
            var_grads.append(-0.5 * _dot(var_part, moment.var.expand_as(var_part)))
        else:
            members = scale.numel() // pool[1].numel()
            var_grads.append(-0.5 * members * _dot(pool[1], moment.var))

    p = q = None
    for moment, pool, w, u in zip(moments, pools, *gates):
        if moment.distance is None:
            p, q = var_part.mul_(-u / length), mean_part.mul_(-w / length)
        elif pool is not None:
            if p is None:
                p, q = pair.zero_().unbind(0)
            view = moment.pool.shape
            p.view(view).add_(pool[1], alpha=-u / length)
            q.view(view).add_(pool[0], alpha=-w / length)
            q.view(view).addcmul_(pool[1], moment.distance.view(view), value=-u / length)
    if p is None:  # running statistics alone
        p, q = pair.zero_().unbind(0)
    return Gradients(
        p,
        q,
        _softmax_backward(gates[0], mean_grads),
        _softmax_backward(gates[1], var_grads),
        grad_weight,
        grad_bias,
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.reshape(-1), b.reshape(-1)).item()


def _softmax_backward(gates: list[float], grads: list[float]) -> list[float]:
    common = sum(gate * grad for gate, grad in zip(gates, grads))
    return [gate * (grad - common) for gate, grad in zip(gates, grads)]

"""All of Switchable Normalization that happens on (N, C) numbers, forward and backward.

Between the passes over x the layer is a small computation: from each instance's mean m and variance
v to y = scale (x - m) + shift, and from S = sum dy and T = sum dy (x - m) to
dx = scale dy + p (x - m) + q. It is written out here once, with derivatives by hand.

With M_k, V_k the moments of statistic k, w and u the softmaxed gates, d_k = m - M_k:

    M_k = pool(m),  V_k = pool(v) + pool(d_k^2)      pool: mean over channels, groups or samples
    r = (sum u_k V_k + eps)^-1/2,  scale = weight r,  o = sum w_k (M_k - m) = -sum w_k d_k
    y = scale (x - m - o) + bias

    P = scale S  and  Q = scale r^2 (T - o S)  are minus the gradient of the mixed mean and minus
    twice that of the mixed variance, hence
    dm = -(w_in P + sum w_k pool(P) + sum u_k pool(Q) d_k)
    dv = -(u_in Q + sum u_k pool(Q)) / 2
    q = dm / L,  p = 2 dv / L

The arrays are NumPy's where there is NumPy, tensors otherwise: these are some sixty operations on
few numbers, and NumPy starts one in a quarter of the time.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

try:
    import numpy as np
except ImportError:
    np = None

Array = Any  # np.ndarray or Tensor


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
    spread: tuple  # the index that puts the axis back: pooled[spread] broadcasts against `shape`

    def mean(self, array: Array) -> Array:
        return array.reshape(self.shape).sum(self.dim) * (1.0 / self.shape[self.dim])

    def means(self, pair: Array) -> Array:
        sums = pair.reshape((2, *self.shape)).sum(self.dim + 1)
        sums *= 1.0 / self.shape[self.dim]
        return sums


class Moments(NamedTuple):
    """One statistic. `pool` is None for the instances themselves and for constants (the running
    statistics of bn in evaluation)."""

    pool: Pool | None
    distance: Array | None  # d_k (N, C), None for `in`
    mean: Array
    var: Array


class Mixed(NamedTuple):
    """The forward result: y = scale (x - m) + shift."""

    scale: Array  # (N, C), like rstd and offset
    shift: Array
    rstd: Array
    offset: Array | None
    moments: dict[str, Moments]
    gates: tuple[list[float], list[float]]


def to_array(tensor: torch.Tensor | None) -> Array | None:
    return tensor if tensor is None or np is None else tensor.numpy()


def to_tensor(array: Array) -> torch.Tensor:
    return array if np is None else torch.from_numpy(array)


def _rsqrt(array: Array) -> Array:
    if np is None:
        return array.rsqrt_()
    np.sqrt(array, out=array)
    return np.reciprocal(array, out=array)


def _zeros_like(array: Array) -> Array:
    return torch.zeros_like(array) if np is None else np.zeros_like(array)


def _dot(a: Array, b: Array) -> float:
    if np is None:
        return torch.dot(a.reshape(-1), b.reshape(-1)).item()
    return float(np.vdot(a, b))


def quietly(function):
    """Like PyTorch, say nothing of infinities and NaN."""
    return function if np is None else np.errstate(all="ignore")(function)


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


@lru_cache(maxsize=1024)
def _pool_of(statistic: str, batch: int, channels: int, num_groups: int, groups: int) -> Pool:
    if statistic == "ln":
        return Pool((batch, channels), 1, (slice(None), None))
    if statistic == "gn":
        return Pool((batch, num_groups, channels // num_groups), 2, (..., None))
    if groups == 1:
        return Pool((batch, channels), 0, (None,))
    return Pool((groups, batch // groups, channels), 1, (slice(None), None))


@quietly
def mix(
    pair: Array,
    gates: tuple[list[float], list[float]],
    weight: Array | None,
    bias: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    options: Options,
) -> Mixed:
    """Mix the instances' moments `pair` (2, N, C), in their dtype."""
    mean, var = pair[0], pair[1]
    size = tuple(mean.shape)
    groups = options.virtual_gpus if options.training else 1
    offset = mixed = None
    moments = {}
    for statistic, w, u in zip(options.statistics, *gates):
        if statistic == "in":
            pool, distance, own = None, None, (mean, var)
            mixed = var * u
        elif statistic == "bn" and not options.training and running_mean is not None:
            pool, distance = None, mean - running_mean
            own = running_mean * 1.0, running_var * 1.0  # copies: the buffers may change
            part = running_var * u
            mixed = (_zeros_like(mean) if mixed is None else mixed) + part
        else:
            pool = _pool_of(statistic, *size, options.num_groups, groups)
            own = pool.means(pair)
            distance = mean.reshape(pool.shape) - own[0][pool.spread]
            own[1] += pool.mean(distance * distance)
            distance = distance.reshape(size)
            part = (own[1] * u)[pool.spread]
            if mixed is None:
                mixed = _zeros_like(mean)
            mixed = mixed.reshape(pool.shape)
            mixed += part
            mixed = mixed.reshape(size)
        moments[statistic] = Moments(pool, distance, own[0], own[1])
        if distance is not None:
            if offset is None:
                offset = distance * -w
            else:
                offset -= distance * w
    mixed += options.eps
    rstd = _rsqrt(mixed)
    scale = rstd if weight is None else rstd * weight
    if offset is None:
        shift = _zeros_like(scale)
    else:
        shift = offset * scale
        shift *= -1.0
    if bias is not None:
        shift += bias
    return Mixed(scale, shift, rstd, offset, moments, gates)


class Gradients(NamedTuple):
    p: Array  # dx = scale dy + p (x - m) + q, each (N, C)
    q: Array
    mean_logits: list[float]
    var_logits: list[float]
    weight: Array  # (C,)
    bias: Array


@quietly
def mix_backward(total: Array, product: Array, mixed: Mixed, length: int) -> Gradients:
    """From S and T (N, C) to all gradients; `length` is the number of positions L."""
    scale, rstd, offset = mixed.scale, mixed.rstd, mixed.offset
    if offset is not None:
        product = product - offset * total
    slope = rstd * product
    grad_weight = slope.sum(0)
    grad_bias = total.sum(0)
    mean_part = scale * total
    var_part = rstd * slope
    var_part *= scale

    mean_grads, var_grads = [], []
    p = q = None
    for (pool, distance, _, var), w, u in zip(mixed.moments.values(), *mixed.gates):
        w, u = -w / length, -u / length
        mean_grads.append(0.0 if distance is None else _dot(mean_part, distance))
        if pool is None:
            spread = var if distance is None else var + _zeros_like(scale)
            var_grads.append(-0.5 * _dot(var_part, spread))
            if distance is None:
                p, q = var_part * u, mean_part * w
            continue
        mean_pool, var_pool = pool.mean(mean_part), pool.mean(var_part)
        var_grads.append(-0.5 * pool.shape[pool.dim] * _dot(var_pool, var))
        if p is None:
            p, q = _zeros_like(scale), _zeros_like(scale)
        var_pool *= u
        mean_pool *= w
        shape = scale.shape
        p, q = p.reshape(pool.shape), q.reshape(pool.shape)
        p += var_pool[pool.spread]
        step = distance.reshape(pool.shape) * var_pool[pool.spread]
        step += mean_pool[pool.spread]
        q += step
        p, q = p.reshape(shape), q.reshape(shape)
    if p is None:  # running statistics alone
        p, q = _zeros_like(scale), _zeros_like(scale)
    return Gradients(
        p,
        q,
        _softmax_backward(mixed.gates[0], mean_grads),
        _softmax_backward(mixed.gates[1], var_grads),
        grad_weight,
        grad_bias,
    )


def _softmax_backward(gates: list[float], grads: list[float]) -> list[float]:
    common = sum(gate * grad for gate, grad in zip(gates, grads))
    return [gate * (grad - common) for gate, grad in zip(gates, grads)]

"""Switchable Normalization as one function: the paper's formula in plain PyTorch.

This is the reference that the kernels are compared with. It reads like the paper, saves what
autograd asks for, and works wherever PyTorch does (any device, double backward, export).

Source: Luo et al., Differentiable Learning-to-Normalize via Switchable Normalization,
arXiv 1806.10779.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

STATISTICS = ("in", "ln", "gn", "bn")  # the canonical order: parameters, configs, legends


def canonical_statistics(statistics: Sequence[str]) -> tuple[str, ...]:
    """Return `statistics` in the canonical order in, ln, gn, bn.

    Raises ValueError if it is empty, names an unknown statistic or names one twice.
    """
    chosen = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    valid = f"choose a non-empty subset of {STATISTICS}"
    if not chosen:
        raise ValueError(f"statistics is empty; {valid}")
    unknown = [s for s in chosen if s not in STATISTICS]
    if unknown:
        raise ValueError(f"unknown statistic {unknown[0]!r} in statistics={chosen}; {valid}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"statistics={chosen} names one twice; {valid}")
    return tuple(s for s in STATISTICS if s in chosen)


def check_num_groups(num_groups: int | None, num_features: int) -> None:
    """Raise ValueError unless `num_groups` divides `num_features`."""
    if num_groups is None:
        raise ValueError("the statistic 'gn' needs num_groups, a divisor of the channel count")
    whole = isinstance(num_groups, Integral) and not isinstance(num_groups, bool)
    if not whole or num_groups < 1 or num_features % num_groups:
        divisors = [d for d in range(1, num_features + 1) if num_features % d == 0]
        raise ValueError(
            f"num_groups={num_groups!r} does not divide {num_features} channels; "
            f"choose one of {divisors}"
        )


def check_channels(layer: str, x: Tensor, num_features: int) -> None:
    """Raise ValueError unless `x` (N, C, ...) has the channels of `layer`, the class's name."""
    if x.shape[1] != num_features:
        raise ValueError(
            f"{layer}(num_features={num_features}) got input of shape {tuple(x.shape)} with "
            f"{x.shape[1]} channels"
        )


def groups_of_vector(size: int) -> int:
    """The most groups, up to 8, that have a multiple of 4 entries each; 1 if there are none."""
    return max(g for g in range(1, 9) if size % (4 * g) == 0 or g == 1)


def check_virtual_gpus(virtual_gpus: int, batch: int = 0) -> None:
    """Raise ValueError unless a batch splits into `virtual_gpus` equal groups."""
    if not isinstance(virtual_gpus, Integral) or virtual_gpus < 1:
        raise ValueError(f"virtual_gpus={virtual_gpus!r}; expected a whole number, 1 or more")
    if batch % virtual_gpus:
        raise ValueError(
            f"a batch of {batch} does not split into virtual_gpus={virtual_gpus} equal groups; "
            f"use a multiple of {virtual_gpus}"
        )


def check_running(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    training: bool,
) -> None:
    """Raise ValueError for running statistics that are not two of (C,), or no momentum for them."""
    if (running_mean is None) != (running_var is None):
        alone = "running_var" if running_mean is None else "running_mean"
        raise ValueError(f"{alone} is given alone; expected both running statistics or neither")
    if running_mean is None or running_var is None:
        return
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if x.dim() > 1 and value.shape != x.shape[1:2]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected ({x.shape[1]},), x's channels"
            )
    if momentum is None and training:
        raise ValueError("momentum=None; expected a number, 0 to 1 (None is of the modules alone)")


def switch_norm(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    statistics: Sequence[str] = ("in", "ln", "bn"),
    num_groups: int | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    virtual_gpus: int = 1,
    unbiased: bool = False,
) -> Tensor:
    """Normalise `x` with learned mixtures of instance, layer, group and batch statistics.

    y = weight (x - sum_k w_k mu_k) / sqrt(sum_k v_k var_k + eps) + bias, with w and v the softmaxes
    of `mean_weight` and `var_weight`.

    Args:
        x: (N, C, *spatial), any number of spatial dimensions including none.
        mean_weight, var_weight: (K,) control parameters, one per statistic in the order
            in, ln, gn, bn of those present.
        weight, bias: (C,) gain and shift.
        running_mean, running_var: (C,), used for bn in evaluation and updated in place in
            training: running = (1 - momentum) running + momentum batch, once per call. Without
            them bn takes the batch's statistics in evaluation too.
        num_groups: channel groups of gn; must divide C.
        momentum: the share of the new batch (PyTorch's convention; the authors' is 1 - momentum).
        virtual_gpus: G; in training the batch is G consecutive groups of N / G samples, each with
            batch statistics of its own, as on G GPUs. The running update takes the mean of the
            groups' means and variances.
        unbiased: take the instances' variances times L / (L - 1), L values each, and the others
            from these, as the official code does. For its checkpoints.

    All variances are biased; an instance of one value has variance 0. Statistics, importance
    weights and the division are computed in at least float32; the output has the dtype of `x`.

    Raises ValueError for an unknown statistic, groups that do not divide, an x that is not of
    floating point or has less than two dimensions, a wrong number of channels or control
    parameters, one running statistic alone, no momentum for them, or a batch that does not split.

    Source: equations 2 to 4. Differs: layer, group and batch variances use the law of total
    variance instead of the paper's mean(var + mean^2) - mean^2: the same number, without
    cancellation.
    """
    statistics = canonical_statistics(statistics)
    check_running(x, running_mean, running_var, momentum, training)

    def batch_moments(mean_in: Tensor, var_in: Tensor) -> tuple[Tensor, Tensor]:
        if not training and running_mean is not None:
            dtype = mean_in.dtype
            return running_mean.to(dtype) - mean_in, running_var.to(dtype)
        batch, channels = mean_in.shape
        groups = virtual_gpus if training else 1
        check_virtual_gpus(groups, batch)
        offset_bn, var_bn = _pool(mean_in, var_in, (groups, batch // groups, channels), 1)
        if training and running_mean is not None and x.numel() > 0:
            with torch.no_grad():  # every sample of a group holds its group's moments
                _update(running_mean, (mean_in + offset_bn).mean(0), momentum)
                _update(running_var, var_bn.mean(0), momentum)
        return offset_bn, var_bn

    parameters = mean_weight, var_weight, weight, bias
    return normalize(x, parameters, statistics, num_groups, eps, unbiased, batch_moments)


def normalize(
    x: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    statistics: tuple[str, ...],
    num_groups: int | None,
    eps: float,
    unbiased: bool,
    batch_moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """The formula with bn's moments from a function.

    `batch_moments(mean_in, var_in)` takes the instances' moments (N, C) and returns
    (mean - mean_in, variance), each broadcastable to (N, C). `statistics` are in canonical order.
    """
    mean_weight, var_weight, weight, bias = parameters
    _check_shapes(x, mean_weight, var_weight, weight, bias, statistics)
    batch, channels = x.shape[:2]
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_in, var_in = _instance_moments(h, unbiased)
    moments = []  # (mean - mean_in, variance) of each statistic
    for statistic in statistics:
        if statistic == "in":
            moments.append((torch.zeros_like(mean_in), var_in))
        elif statistic == "ln":
            moments.append(_pool(mean_in, var_in, (batch, channels), 1))
        elif statistic == "gn":
            check_num_groups(num_groups, channels)
            moments.append(_pool(mean_in, var_in, (batch, num_groups, channels // num_groups), 2))
        else:
            moments.append(batch_moments(mean_in, var_in))

    mean_ratios = mean_weight.to(h.dtype).softmax(0).unbind(0)
    var_ratios = var_weight.to(h.dtype).softmax(0).unbind(0)
    # sum_k w_k mu_k - mu_in, from differences; the softmax sums to 1
    offset = sum(w * delta for w, (delta, _) in zip(mean_ratios, moments, strict=True))
    var = sum(v * var for v, (_, var) in zip(var_ratios, moments, strict=True))

    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -offset * scale
    if bias is not None:
        shift = shift + bias
    over_space = (...,) + (None,) * (h.dim() - 2)  # (N, C) -> (N, C, 1, 1)
    y = (h - mean_in[over_space]) * scale[over_space] + shift[over_space]
    return y.to(x.dtype)


def _instance_moments(h: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance of each instance: (N, C)."""
    spatial = tuple(range(2, h.dim()))
    if spatial and h.numel() > 0:
        var_in, mean_in = torch.var_mean(h, spatial, correction=0)
    else:  # an instance of one value, or none
        mean_in = h.sum(spatial) if spatial else h
        var_in = torch.zeros_like(mean_in)
    if unbiased:
        length = math.prod(h.shape[2:])
        var_in = var_in * (length / max(length - 1, 1))
    return mean_in, var_in


def _pool(
    mean_nc: Tensor, var_nc: Tensor, shape: tuple[int, ...], dim: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance over `dim` of (N, C) moments seen as `shape`, spread back to (N, C).

    The law of total variance: mean of the variances plus variance of the means.
    """
    mean, var = mean_nc.reshape(shape), var_nc.reshape(shape)
    level = mean.detach().mean(dim, keepdim=True)  # a nearby constant: differences keep all digits
    mean = mean - level
    pooled = mean.mean(dim, keepdim=True)
    delta = pooled - mean
    pooled_var = var.mean(dim, keepdim=True) + delta.square().mean(dim, keepdim=True)
    return delta.reshape(mean_nc.shape), pooled_var.expand(shape).reshape(mean_nc.shape)


def _update(running: Tensor, new: Tensor, momentum: float) -> None:
    running.lerp_(new.detach().to(running.dtype), momentum)  # no forward derivatives either


def _check_shapes(x, mean_weight, var_weight, weight, bias, statistics) -> None:
    if x.dim() < 2:
        raise ValueError(f"expected x of shape (N, C, *spatial), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"expected x of a floating-point dtype, got {x.dtype}")
    for name, control in (("mean_weight", mean_weight), ("var_weight", var_weight)):
        if control.shape != (len(statistics),):
            raise ValueError(
                f"{name} has shape {tuple(control.shape)}; expected ({len(statistics)},), "
                f"one control parameter for each of {statistics}"
            )
    for name, affine in (("weight", weight), ("bias", bias)):
        if affine is not None and affine.shape != (x.shape[1],):
            raise ValueError(
                f"x of shape {tuple(x.shape)} has {x.shape[1]} channels, "
                f"but {name} has shape {tuple(affine.shape)}"
            )

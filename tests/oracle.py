"""Switchable Normalization from its formulas alone: slow, plain, float64.

Nothing here imports ``sn``. ``switch_norm_by_loops`` visits every value one at a time and is the
forward that everything else is held to; ``switch_norm`` states the same formulas in differentiable
torch, so that autograd gives the gradients. All variances are biased and taken in two passes.
*Source:* the paper, Sec. 2, Eq. 2-5 (and its LSTM form: layer and group statistics of a vector).
"""

import itertools
import math

import numpy as np
import torch

STATISTICS = ("in", "ln", "gn", "bn")
SUBSETS = [
    subset
    for size in range(1, len(STATISTICS) + 1)
    for subset in itertools.combinations(STATISTICS, size)
]


def _mean_and_variance(values):
    """Mean and biased variance of a list of Python floats, in two passes."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / len(values)


def _softmax(logits):
    largest = max(logits)
    exponentials = [math.exp(logit - largest) for logit in logits]
    return [exponential / math.fsum(exponentials) for exponential in exponentials]


def statistics_by_loops(x, num_groups=1, virtual_gpus=1):
    """{statistic: (means, variances)} with means[n][c], for x as a numpy array (N, C, ...)."""
    samples, channels = x.shape[:2]
    maps = [
        [[float(v) for v in x[n, c].reshape(-1)] for c in range(channels)] for n in range(samples)
    ]
    images_per_gpu = samples // virtual_gpus
    channels_per_group = channels // num_groups
    found = {}
    for name in STATISTICS:
        means = np.empty((samples, channels))
        variances = np.empty((samples, channels))
        for n in range(samples):
            for c in range(channels):
                if name == "in":
                    over = [(n, c)]
                elif name == "ln":
                    over = [(n, k) for k in range(channels)]
                elif name == "gn":
                    first = c // channels_per_group * channels_per_group
                    over = [(n, k) for k in range(first, first + channels_per_group)]
                else:
                    first = n // images_per_gpu * images_per_gpu
                    over = [(m, c) for m in range(first, first + images_per_gpu)]
                values = [value for m, k in over for value in maps[m][k]]
                means[n, c], variances[n, c] = _mean_and_variance(values)
        found[name] = (means, variances)
    return found


def switch_norm_by_loops(
    x,
    mean_weight,
    var_weight,
    weight=None,
    bias=None,
    running=None,
    *,
    statistics,
    num_groups=1,
    eps=1e-5,
    virtual_gpus=1,
):
    """Forward pass, one value at a time. ``statistics`` must be in canonical order.

    ``running`` = (means, variances) per channel takes the place of the batch's statistics.
    """
    x = x.detach().double().numpy()
    w = _softmax([float(v) for v in mean_weight])
    v = _softmax([float(v) for v in var_weight])
    found = statistics_by_loops(x, num_groups, virtual_gpus)
    if running is not None:
        found["bn"] = tuple(np.tile(r.detach().double().numpy(), (x.shape[0], 1)) for r in running)
    y = np.empty_like(x)
    for n, c in np.ndindex(*x.shape[:2]):
        mean = math.fsum(w[k] * found[name][0][n, c] for k, name in enumerate(statistics))
        var = math.fsum(v[k] * found[name][1][n, c] for k, name in enumerate(statistics))
        gain = 1.0 if weight is None else float(weight[c])
        shift = 0.0 if bias is None else float(bias[c])
        for place in np.ndindex(*x.shape[2:]):
            at = (n, c, *place)
            y[at] = gain * (x[at] - mean) / math.sqrt(var + eps) + shift
    return torch.from_numpy(y)


def _moments(x, dims):
    mean = x.mean(dims, keepdim=True)
    return mean, ((x - mean) ** 2).mean(dims, keepdim=True)


def batch_moments(x, virtual_gpus=1):
    """Per virtual GPU: means (G, C) and biased variances (G, C)."""
    x = x.double()
    groups = x.reshape(virtual_gpus, x.shape[0] // virtual_gpus, x.shape[1], -1)
    mean, var = _moments(groups, (1, 3))
    return mean[:, 0, :, 0], var[:, 0, :, 0]


def switch_norm(
    x,
    mean_weight,
    var_weight,
    weight=None,
    bias=None,
    running=None,
    *,
    statistics,
    num_groups=1,
    eps=1e-5,
    virtual_gpus=1,
):
    """The same formulas in float64 torch operations, for autograd. Arguments as above."""
    shape = x.shape
    x = x.double().reshape(shape[0], shape[1], -1)
    samples, channels, length = x.shape
    means, variances = [], []
    for name in statistics:
        if name == "in":
            mean, var = _moments(x, 2)
        elif name == "ln":
            mean, var = _moments(x, (1, 2))
        elif name == "gn":
            mean, var = _moments(x.reshape(samples, num_groups, -1), 2)
            mean = mean.repeat_interleave(channels // num_groups, 1)
            var = var.repeat_interleave(channels // num_groups, 1)
        elif running is not None:
            mean, var = (r.double().reshape(1, channels, 1) for r in running)
        else:
            chunks = [_moments(chunk, (0, 2)) for chunk in x.chunk(virtual_gpus)]
            repeats = samples // virtual_gpus
            mean = torch.cat([m.expand(repeats, -1, -1) for m, _ in chunks])
            var = torch.cat([v.expand(repeats, -1, -1) for _, v in chunks])
        means.append(mean.expand(samples, channels, 1))
        variances.append(var.expand(samples, channels, 1))
    w = mean_weight.double().softmax(0)
    v = var_weight.double().softmax(0)
    mean = sum(w[k] * means[k] for k in range(len(statistics)))
    var = sum(v[k] * variances[k] for k in range(len(statistics)))
    y = (x - mean) / torch.sqrt(var + eps)
    if weight is not None:
        y = y * weight.double().reshape(1, channels, 1)
    if bias is not None:
        y = y + bias.double().reshape(1, channels, 1)
    return y.reshape(shape)


def gradients(function, inputs, upstream):
    """Output and the gradients of sum(output * upstream) for detached copies of ``inputs``."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    output = function(*leaves)
    grads = torch.autograd.grad((output.double() * upstream.double()).sum(), leaves)
    return output.detach(), grads


def parameters(channels, count, seed=0, dtype=torch.float64):
    """Random (mean_weight, var_weight, weight, bias) for ``count`` statistics."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size, centre=0.0):
        return (torch.randn(size, generator=generator, dtype=torch.float64) + centre).to(dtype)

    return draw(count), draw(count), draw(channels, 1.0), draw(channels)


def values(shape, seed=0, mean=0.0, dtype=torch.float64):
    """Random x whose mean and spread differ by sample and channel, so that no statistic agrees."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    spread_shape = tuple(shape[:2]) + (1,) * (len(shape) - 2)
    offset = torch.randn(spread_shape, generator=generator, dtype=torch.float64)
    spread = torch.rand(spread_shape, generator=generator, dtype=torch.float64) + 0.5
    return (x * spread + offset + mean).to(dtype)

"""The layer on CUDA: six Triton kernels, three launches forward and three backward.

    moments  ->  pool           ->  apply             x to y
    sums     ->  pool_backward  ->  apply_backward    dy, x to dx and the parameters' gradients

The outer ones pass over x seen as (N, C, L) by strides, so that one source serves contiguous and
channels_last tensors. The pool kernels gather (N, C) numbers: one program per sample for layer and
group statistics, one per block of channels for batch statistics. Importance weights and
coefficients are computed where they are used. No atomics, no host synchronisation: deterministic,
safe in CUDA graphs. See __init__.py for the formulas.

Means are kept as two float32, the rounded mean and what rounding left: differences of means, which
is all that is ever used, are then exact however far from zero the data is.

In the arguments x is (N, C, L) with strides (sn, sc, sl), `partial` (3, SPLITS, N, C), `own` the
instances' moments (3, N, C) as mean, rest and variance, `layer` (3, N), `group` (3, N, Q) and
`batch` (3, G, C) those of ln, gn and bn. With FOUR the given L is a quarter of it, by which the
compiler knows that rows begin at multiples of four.
"""

import triton
import triton.language as tl


@triton.jit
def _ratio(logits, K: tl.constexpr, k: tl.constexpr):
    """Softmax of K logits, entry k."""
    i = tl.arange(0, 4)
    value = tl.load(logits + i, mask=i < K, other=float("-inf")).to(tl.float32)
    power = tl.exp(value - tl.max(value, 0))
    return tl.sum(tl.where(i == k, power, 0.0), 0) / tl.sum(power, 0)


@triton.jit
def _join(partial, n, c, inside, N, C, L, CHUNK, SPLITS):
    """Mean, rest and variance of instances from those of their pieces of CHUNK positions."""
    plane = N * C
    at = n * C + c
    level = tl.load(partial + at, mask=inside, other=0.0)
    shifted = tl.zeros_like(level)
    for s in tl.range(SPLITS):
        count = tl.minimum(CHUNK, L - s * CHUNK).to(tl.float32)
        mean = tl.load(partial + s * plane + at, mask=inside, other=0.0)
        rest = tl.load(partial + (SPLITS + s) * plane + at, mask=inside, other=0.0)
        shifted += count * ((mean - level) + rest)
    shifted = shifted / L
    square = tl.zeros_like(level)
    for s in tl.range(SPLITS):
        count = tl.minimum(CHUNK, L - s * CHUNK).to(tl.float32)
        mean = tl.load(partial + s * plane + at, mask=inside, other=0.0)
        rest = tl.load(partial + (SPLITS + s) * plane + at, mask=inside, other=0.0)
        part = tl.load(partial + (2 * SPLITS + s) * plane + at, mask=inside, other=0.0)
        distance = ((mean - level) + rest) - shifted
        square += part + count * distance * distance
    mean = level + shifted
    return mean, (level - mean) + shifted, square / L


@triton.jit
def _mixture(
    own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight, n, c,
    inside, N, C, Q, G, eps,
    K: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, GN: tl.constexpr, BN: tl.constexpr,
    RUNNING: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Of instances (n, c): mean, rest, rstd, scale, offset, distances and variances of ln, gn, bn.

    IN, LN, GN, BN are the indices of the statistics among the K, -1 for those not used.
    """
    plane = N * C
    at = n * C + c
    mean = tl.load(own + at, mask=inside, other=0.0)
    rest = tl.load(own + plane + at, mask=inside, other=0.0)
    own_var = tl.load(own + 2 * plane + at, mask=inside, other=0.0)
    var = tl.zeros_like(mean) + eps
    offset = tl.zeros_like(mean)
    ln_distance, gn_distance, bn_distance = offset, offset, offset
    ln_var, gn_var, bn_var = offset, offset, offset
    if IN >= 0:
        var += _ratio(var_logits, K, IN) * own_var
    if LN >= 0:
        ln_distance = (mean - tl.load(layer + n)) + (rest - tl.load(layer + N + n))
        ln_var += tl.load(layer + 2 * N + n)
        var += _ratio(var_logits, K, LN) * ln_var
        offset -= _ratio(mean_logits, K, LN) * ln_distance
    if GN >= 0:
        g = n * Q + c // (C // Q)
        gn_mean = tl.load(group + g, mask=inside, other=0.0)
        gn_rest = tl.load(group + N * Q + g, mask=inside, other=0.0)
        gn_distance = (mean - gn_mean) + (rest - gn_rest)
        gn_var += tl.load(group + 2 * N * Q + g, mask=inside, other=0.0)
        var += _ratio(var_logits, K, GN) * gn_var
        offset -= _ratio(mean_logits, K, GN) * gn_distance
    if BN >= 0:
        if RUNNING:
            bn_mean = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float32)
            bn_distance = (mean - bn_mean) + rest
            bn_var += tl.load(running_var + c, mask=inside, other=0.0).to(tl.float32)
        else:
            b = (n // (N // G)) * C + c
            bn_mean = tl.load(batch + b, mask=inside, other=0.0)
            bn_rest = tl.load(batch + G * C + b, mask=inside, other=0.0)
            bn_distance = (mean - bn_mean) + (rest - bn_rest)
            bn_var += tl.load(batch + 2 * G * C + b, mask=inside, other=0.0)
        var += _ratio(var_logits, K, BN) * bn_var
        offset -= _ratio(mean_logits, K, BN) * bn_distance
    rstd = 1.0 / tl.sqrt(var)
    scale = rstd
    if AFFINE:
        scale = rstd * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    return (
        mean, rest, rstd, scale, offset, own_var,
        ln_distance, gn_distance, bn_distance, ln_var, gn_var, bn_var,
    )  # fmt: skip


@triton.jit
def moments_kernel(
    x, partial, N, L, CHUNK,
    C: tl.constexpr, FOUR: tl.constexpr, LAST: tl.constexpr, SPLITS,
    BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Mean, rest and sum of squared distances of a piece of BC instances. LAST: channels_last."""
    length = 4 * L if FOUR else L
    blocks: tl.constexpr = (C + BC - 1) // BC
    n = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    s = tl.program_id(1)
    start = s * CHUNK
    stop = tl.minimum(start + CHUNK, length)
    j = tl.arange(0, BL)
    base = x + n.to(tl.int64) * C * length
    base += c[:, None] if LAST else c[:, None] * length
    step: tl.constexpr = C if LAST else 1
    inside = c < C

    here = inside[:, None] & (start + j < stop)[None, :]
    value = tl.load(base + (start + j)[None, :] * step, mask=here, other=0.0).to(tl.float32)
    first = tl.minimum(BL, stop - start).to(tl.float32)
    level = tl.sum(value, 1) / first  # sums about the first tile's mean keep their digits
    total = tl.zeros((BC, BL), tl.float32)
    square = tl.zeros((BC, BL), tl.float32)
    for at in tl.range(start, stop, BL):
        here = inside[:, None] & (at + j < stop)[None, :]
        value = tl.load(base + (at + j)[None, :] * step, mask=here, other=0.0).to(tl.float32)
        value = tl.where(here, value - level[:, None], 0.0)
        total += value
        square += value * value
    count = (stop - start).to(tl.float32)
    shift = tl.sum(total, 1) / count
    spread = tl.maximum(tl.sum(square, 1) - shift * shift * count, 0.0)
    spread = tl.where(shift == shift, spread, shift)  # maximum would hide NaN
    mean = level + shift
    out = partial + s * N * C + n * C + c
    plane = SPLITS * N * C
    tl.store(out, mean, mask=inside)
    tl.store(out + plane, (level - mean) + shift, mask=inside)
    tl.store(out + 2 * plane, spread, mask=inside)


@triton.jit
def _pool_sample(
    partial, own, layer, group, n, N, L, CHUNK,
    C: tl.constexpr, Q: tl.constexpr, SPLITS, LN: tl.constexpr, GN: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = C // Q
    q = tl.arange(0, BQ)[:, None]
    d = tl.arange(0, BD)[None, :]
    c = q * size + d
    inside = (q < Q) & (d < size)
    mean, rest, var = _join(partial, n, c, inside, N, C, L, CHUNK, SPLITS)
    at = own + n * C + c
    tl.store(at, mean, mask=inside)
    tl.store(at + N * C, rest, mask=inside)
    tl.store(at + 2 * N * C, var, mask=inside)
    level = tl.sum(tl.where(c == 0, mean, 0.0))
    m = tl.where(inside, (mean - level) + rest, 0.0)
    var = tl.where(inside, var, 0.0)
    if LN >= 0:
        pooled = tl.sum(m) / C
        distance = tl.where(inside, m - pooled, 0.0)
        ln_mean = level + pooled
        tl.store(layer + n, ln_mean)
        tl.store(layer + N + n, (level - ln_mean) + pooled)
        tl.store(layer + 2 * N + n, (tl.sum(var) + tl.sum(distance * distance)) / C)
    if GN >= 0:
        pooled = tl.sum(m, 1) / size
        distance = tl.where(inside, m - pooled[:, None], 0.0)
        gn_mean = level + pooled
        gn_var = (tl.sum(var, 1) + tl.sum(distance * distance, 1)) / size
        g = tl.arange(0, BQ)
        at_g = group + n * Q + g
        tl.store(at_g, gn_mean, mask=g < Q)
        tl.store(at_g + N * Q, (level - gn_mean) + pooled, mask=g < Q)
        tl.store(at_g + 2 * N * Q, gn_var, mask=g < Q)


@triton.jit
def _pool_batch(
    partial, batch, running_mean, running_var, block, N, L, CHUNK, G, momentum,
    C: tl.constexpr, SPLITS, UPDATE: tl.constexpr,
    BN_N: tl.constexpr, BN_C: tl.constexpr,
):  # fmt: skip
    c = block * BN_C + tl.arange(0, BN_C)
    inside_c = c < C
    members = N // G
    run_mean = tl.zeros((BN_C,), tl.float32)
    run_var = tl.zeros((BN_C,), tl.float32)
    run_level = tl.load(partial + c, mask=inside_c, other=0.0)
    for g in tl.range(G):
        level = tl.load(partial + g * members * C + c, mask=inside_c, other=0.0)
        total = tl.zeros((BN_N, BN_C), tl.float32)
        square = tl.zeros((BN_N, BN_C), tl.float32)
        within = tl.zeros((BN_N, BN_C), tl.float32)
        for start in tl.range(0, members, BN_N):
            i = start + tl.arange(0, BN_N)
            inside = (i < members)[:, None] & inside_c[None, :]
            n = (g * members + i)[:, None]
            mean, rest, var = _join(partial, n, c[None, :], inside, N, C, L, CHUNK, SPLITS)
            m = tl.where(inside, (mean - level[None, :]) + rest, 0.0)
            total += m
            square += m * m
            within += tl.where(inside, var, 0.0)
        shift = tl.sum(total, 0) / members
        spread = tl.sum(square, 0) / members - shift * shift
        spread = tl.where(spread < 0.0, 0.0, spread)
        var = tl.sum(within, 0) / members + spread
        mean = level + shift
        out = batch + g * C + c
        tl.store(out, mean, mask=inside_c)
        tl.store(out + G * C, (level - mean) + shift, mask=inside_c)
        tl.store(out + 2 * G * C, var, mask=inside_c)
        run_mean += (level - run_level) + shift
        run_var += var
    if UPDATE:
        new = run_level + run_mean / G
        old = tl.load(running_mean + c, mask=inside_c, other=0.0).to(tl.float32)
        new = (old + momentum * (new - old)).to(running_mean.dtype.element_ty)
        tl.store(running_mean + c, new, mask=inside_c)
        old = tl.load(running_var + c, mask=inside_c, other=0.0).to(tl.float32)
        new = (old + momentum * (run_var / G - old)).to(running_var.dtype.element_ty)
        tl.store(running_var + c, new, mask=inside_c)


@triton.jit
def pool_kernel(
    partial, own, layer, group, batch, running_mean, running_var, N, L, CHUNK, G, momentum,
    C: tl.constexpr, Q: tl.constexpr, SPLITS,
    LN: tl.constexpr, GN: tl.constexpr, BN: tl.constexpr, UPDATE: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BN_N: tl.constexpr, BN_C: tl.constexpr,
):  # fmt: skip
    """Moments of whole instances, layers, groups and batches; the running statistics' step."""
    pid = tl.program_id(0)
    if pid < N:
        _pool_sample(
            partial, own, layer, group, pid, N, L, CHUNK, C, Q, SPLITS, LN, GN, BQ, BD
        )  # fmt: skip
    elif BN >= 0:
        _pool_batch(
            partial, batch, running_mean, running_var, pid - N, N, L, CHUNK, G, momentum,
            C, SPLITS, UPDATE, BN_N, BN_C,
        )  # fmt: skip


@triton.jit
def apply_kernel(
    x, y, residual, own, layer, group, batch, running_mean, running_var, mean_logits, var_logits,
    weight, bias, N, L, CHUNK, G, eps,
    C: tl.constexpr, Q: tl.constexpr, FOUR: tl.constexpr, LAST: tl.constexpr,
    K: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, GN: tl.constexpr, BN: tl.constexpr,
    RUNNING: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """y = scale (x - mean - offset) + bias, then the residual sum and ReLU if asked for.

    From the end to the beginning: what the moments read last is still in the cache.
    """
    length = 4 * L if FOUR else L
    blocks: tl.constexpr = (C + BC - 1) // BC
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n = pid // blocks
    c = (pid % blocks) * BC + tl.arange(0, BC)
    inside = c < C
    mean, rest, rstd, scale, offset, v0, d1, d2, d3, v1, v2, v3 = _mixture(
        own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
        n, c, inside, N, C, Q, G, eps, K, IN, LN, GN, BN, RUNNING, AFFINE,
    )  # fmt: skip
    shift = -(offset + rest) * scale
    if AFFINE:
        shift += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    j = tl.arange(0, BL)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * CHUNK
    stop = tl.minimum(start + CHUNK, length)
    base = n.to(tl.int64) * C * length
    plane = base + (c[:, None] if LAST else c[:, None] * length)
    step: tl.constexpr = C if LAST else 1
    for at in tl.range(start, stop, BL):
        here = inside[:, None] & (at + j < stop)[None, :]
        place = plane + (at + j)[None, :] * step
        value = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
        value = (value - mean[:, None]) * scale[:, None] + shift[:, None]
        if RESIDUAL:
            value += tl.load(residual + place, mask=here, other=0.0).to(tl.float32)
        if RELU:
            value = tl.where(value <= 0.0, 0.0, value)  # keeps NaN
        tl.store(y + place, value.to(y.dtype.element_ty), mask=here)


@triton.jit
def sums_kernel(
    dy, x, y, partial, own, layer, group, batch, running_mean, running_var, mean_logits,
    var_logits, weight, bias, N, L, CHUNK, G, eps,
    C: tl.constexpr, Q: tl.constexpr, FOUR: tl.constexpr, LAST: tl.constexpr,
    SPLITS,
    K: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, GN: tl.constexpr, BN: tl.constexpr,
    RUNNING: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """S = sum dy and T = sum dy (x - mean) of a piece of BC instances.

    With ReLU dy counts where the output was positive: recomputed from x, or with a residual read
    from y, which the next layer keeps anyway.
    """
    length = 4 * L if FOUR else L
    blocks: tl.constexpr = (C + BC - 1) // BC
    n = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    inside = c < C
    s = tl.program_id(1)
    start = s * CHUNK
    stop = tl.minimum(start + CHUNK, length)
    mean = tl.load(own + n * C + c, mask=inside, other=0.0)
    rest = tl.load(own + N * C + n * C + c, mask=inside, other=0.0)
    scale, shift = mean, mean
    if RELU and not RESIDUAL:
        mean, rest, rstd, scale, offset, v0, d1, d2, d3, v1, v2, v3 = _mixture(
            own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
            n, c, inside, N, C, Q, G, eps, K, IN, LN, GN, BN, RUNNING, AFFINE,
        )  # fmt: skip
        shift = -(offset + rest) * scale
        if AFFINE:
            shift += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    j = tl.arange(0, BL)
    base = n.to(tl.int64) * C * length
    plane = base + (c[:, None] if LAST else c[:, None] * length)
    step: tl.constexpr = C if LAST else 1
    total = tl.zeros((BC, BL), tl.float32)
    product = tl.zeros((BC, BL), tl.float32)
    for at in tl.range(start, stop, BL):
        here = inside[:, None] & (at + j < stop)[None, :]
        place = plane + (at + j)[None, :] * step
        value = tl.load(x + place, mask=here, other=0.0).to(tl.float32) - mean[:, None]
        grad = tl.load(dy + place, mask=here, other=0.0).to(tl.float32)
        if RELU:
            if RESIDUAL:
                positive = tl.load(y + place, mask=here, other=0.0).to(tl.float32)
            else:
                positive = value * scale[:, None] + shift[:, None]
            grad = tl.where(positive <= 0.0, 0.0, grad)
        total += grad
        product += tl.where(here, grad * (value - rest[:, None]), 0.0)
    out = partial + s * N * C + n * C + c
    tl.store(out, tl.sum(total, 1), mask=inside)
    tl.store(out + SPLITS * N * C, tl.sum(product, 1), mask=inside)


@triton.jit
def _sums(partial, n, c, inside, N, C, SPLITS):
    at = partial + n * C + c
    total = tl.load(at, mask=inside, other=0.0)
    product = tl.load(at + SPLITS * N * C, mask=inside, other=0.0)
    for s in tl.range(1, SPLITS):
        total += tl.load(at + s * N * C, mask=inside, other=0.0)
        product += tl.load(at + (SPLITS + s) * N * C, mask=inside, other=0.0)
    return total, product


@triton.jit
def _store_ratio_grads(ratio_grads, n, N, k: tl.constexpr, K: tl.constexpr, mean_grad, var_grad):
    tl.store(ratio_grads + k * N + n, mean_grad)
    tl.store(ratio_grads + (K + k) * N + n, -0.5 * var_grad)


@triton.jit
def _pool_backward_sample(
    partial, sums, ratio_grads, ln_pool, gn_pool,
    own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
    n, N, G, eps,
    C: tl.constexpr, Q: tl.constexpr, SPLITS,
    K: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, GN: tl.constexpr, BN: tl.constexpr,
    RUNNING: tl.constexpr, AFFINE: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = C // Q
    q = tl.arange(0, BQ)[:, None]
    d = tl.arange(0, BD)[None, :]
    c = q * size + d
    inside = (q < Q) & (d < size)
    total, product = _sums(partial, n, c, inside, N, C, SPLITS)
    tl.store(sums + n * C + c, total, mask=inside)
    tl.store(sums + N * C + n * C + c, product, mask=inside)
    mean, rest, rstd, scale, offset, v0, d1, d2, d3, v1, v2, v3 = _mixture(
        own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
        n, c, inside, N, C, Q, G, eps, K, IN, LN, GN, BN, RUNNING, AFFINE,
    )  # fmt: skip
    mean_part = tl.where(inside, scale * total, 0.0)
    var_part = scale * rstd * rstd * (product - offset * total)
    var_part = tl.where(inside, var_part, 0.0)
    if IN >= 0:
        _store_ratio_grads(ratio_grads, n, N, IN, K, 0.0, tl.sum(var_part * v0))
    if LN >= 0:
        _store_ratio_grads(ratio_grads, n, N, LN, K, tl.sum(mean_part * d1), tl.sum(var_part * v1))
        tl.store(ln_pool + n, tl.sum(mean_part) / C)
        tl.store(ln_pool + N + n, tl.sum(var_part) / C)
    if GN >= 0:
        _store_ratio_grads(ratio_grads, n, N, GN, K, tl.sum(mean_part * d2), tl.sum(var_part * v2))
        g = tl.arange(0, BQ)
        tl.store(gn_pool + n * Q + g, tl.sum(mean_part, 1) / size, mask=g < Q)
        tl.store(gn_pool + N * Q + n * Q + g, tl.sum(var_part, 1) / size, mask=g < Q)
    if BN >= 0:
        _store_ratio_grads(ratio_grads, n, N, BN, K, tl.sum(mean_part * d3), tl.sum(var_part * v3))


@triton.jit
def _pool_backward_batch(
    partial, bn_pool, grad_weight, grad_bias,
    own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
    block, N, G, eps,
    C: tl.constexpr, Q: tl.constexpr, SPLITS,
    K: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, GN: tl.constexpr, BN: tl.constexpr,
    RUNNING: tl.constexpr, AFFINE: tl.constexpr,
    BN_N: tl.constexpr, BN_C: tl.constexpr,
):  # fmt: skip
    c = block * BN_C + tl.arange(0, BN_C)
    inside_c = c < C
    members = N // G
    slope = tl.zeros((BN_N, BN_C), tl.float32)
    height = tl.zeros((BN_N, BN_C), tl.float32)
    for g in tl.range(G):
        mean_sum = tl.zeros((BN_N, BN_C), tl.float32)
        var_sum = tl.zeros((BN_N, BN_C), tl.float32)
        for start in tl.range(0, members, BN_N):
            i = start + tl.arange(0, BN_N)
            inside = (i < members)[:, None] & inside_c[None, :]
            n = tl.where(i < members, g * members + i, 0)[:, None]
            total, product = _sums(partial, n, c[None, :], inside, N, C, SPLITS)
            mean, rest, rstd, scale, offset, v0, d1, d2, d3, v1, v2, v3 = _mixture(
                own, layer, group, batch, running_mean, running_var, mean_logits, var_logits,
                weight, n, c[None, :], inside, N, C, Q, G, eps,
                K, IN, LN, GN, BN, RUNNING, AFFINE,
            )  # fmt: skip
            product = rstd * (product - offset * total)
            slope += tl.where(inside, product, 0.0)
            height += total
            mean_sum += tl.where(inside, scale * total, 0.0)
            var_sum += tl.where(inside, scale * rstd * product, 0.0)
        if BN >= 0:
            if not RUNNING:
                out = bn_pool + g * C + c
                tl.store(out, tl.sum(mean_sum, 0) / members, mask=inside_c)
                tl.store(out + G * C, tl.sum(var_sum, 0) / members, mask=inside_c)
    if AFFINE:
        tl.store(grad_weight + c, tl.sum(slope, 0), mask=inside_c)
        tl.store(grad_bias + c, tl.sum(height, 0), mask=inside_c)


@triton.jit
def pool_backward_kernel(
    partial, sums, ratio_grads, ln_pool, gn_pool, bn_pool, grad_weight, grad_bias,
    own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
    N, G, eps,
    C: tl.constexpr, Q: tl.constexpr, SPLITS,
    K: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, GN: tl.constexpr, BN: tl.constexpr,
    RUNNING: tl.constexpr, AFFINE: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BN_N: tl.constexpr, BN_C: tl.constexpr,
):  # fmt: skip
    """Whole S, T `sums` (2, N, C); means of P, Q over layers, groups, batches (2, ...); each
    sample's share of the importance weights' gradients (2 K, N); gradients of weight and bias."""
    pid = tl.program_id(0)
    if pid < N:
        _pool_backward_sample(
            partial, sums, ratio_grads, ln_pool, gn_pool,
            own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
            pid, N, G, eps, C, Q, SPLITS, K, IN, LN, GN, BN, RUNNING, AFFINE, BQ, BD,
        )  # fmt: skip
    else:
        _pool_backward_batch(
            partial, bn_pool, grad_weight, grad_bias,
            own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
            pid - N, N, G, eps, C, Q, SPLITS, K, IN, LN, GN, BN, RUNNING, AFFINE, BN_N, BN_C,
        )  # fmt: skip


@triton.jit
def _logit_grads(ratio_grads, logits, out, N, K: tl.constexpr, BN_N: tl.constexpr):
    """The softmax's derivative applied to the samples' shares `ratio_grads` (K, N)."""
    k = tl.arange(0, 4)
    total = tl.zeros((4, BN_N), tl.float32)
    for start in tl.range(0, N, BN_N):
        i = start + tl.arange(0, BN_N)
        inside = (k < K)[:, None] & (i < N)[None, :]
        total += tl.load(ratio_grads + k[:, None] * N + i[None, :], mask=inside, other=0.0)
    grad = tl.sum(total, 1)
    value = tl.load(logits + k, mask=k < K, other=float("-inf")).to(tl.float32)
    power = tl.exp(value - tl.max(value, 0))
    ratio = power / tl.sum(power, 0)
    tl.store(out + k, ratio * (grad - tl.sum(ratio * grad, 0)), mask=k < K)


@triton.jit
def _apply_backward(
    dy, x, y, dx, d_residual, sums, ln_pool, gn_pool, bn_pool,
    own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight, bias,
    pid, N, L, CHUNK, G, eps,
    C: tl.constexpr, Q: tl.constexpr, FOUR: tl.constexpr, LAST: tl.constexpr,
    K: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, GN: tl.constexpr, BN: tl.constexpr,
    RUNNING: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (C + BC - 1) // BC
    length = 4 * L if FOUR else L
    n = pid // blocks
    c = (pid % blocks) * BC + tl.arange(0, BC)
    inside = c < C
    mean, rest, rstd, scale, offset, v0, d1, d2, d3, v1, v2, v3 = _mixture(
        own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
        n, c, inside, N, C, Q, G, eps, K, IN, LN, GN, BN, RUNNING, AFFINE,
    )  # fmt: skip
    total = tl.load(sums + n * C + c, mask=inside, other=0.0)
    product = tl.load(sums + N * C + n * C + c, mask=inside, other=0.0)
    p = tl.zeros_like(mean)
    q = tl.zeros_like(mean)
    if IN >= 0:
        p += _ratio(var_logits, K, IN) * scale * rstd * rstd * (product - offset * total)
        q += _ratio(mean_logits, K, IN) * scale * total
    if LN >= 0:
        part = _ratio(var_logits, K, LN) * tl.load(ln_pool + N + n)
        p += part
        q += _ratio(mean_logits, K, LN) * tl.load(ln_pool + n) + part * d1
    if GN >= 0:
        g = gn_pool + n * Q + c // (C // Q)
        part = _ratio(var_logits, K, GN) * tl.load(g + N * Q, mask=inside, other=0.0)
        p += part
        q += _ratio(mean_logits, K, GN) * tl.load(g, mask=inside, other=0.0) + part * d2
    if BN >= 0:
        if not RUNNING:
            b = bn_pool + (n // (N // G)) * C + c
            part = _ratio(var_logits, K, BN) * tl.load(b + G * C, mask=inside, other=0.0)
            p += part
            q += _ratio(mean_logits, K, BN) * tl.load(b, mask=inside, other=0.0) + part * d3
    p = -p / length
    q = -q / length - p * rest
    shift = -(offset + rest) * scale
    if AFFINE:
        shift += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    j = tl.arange(0, BL)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * CHUNK
    stop = tl.minimum(start + CHUNK, length)
    base = n.to(tl.int64) * C * length
    plane = base + (c[:, None] if LAST else c[:, None] * length)
    step: tl.constexpr = C if LAST else 1
    for at in tl.range(start, stop, BL):
        here = inside[:, None] & (at + j < stop)[None, :]
        place = plane + (at + j)[None, :] * step
        value = tl.load(x + place, mask=here, other=0.0).to(tl.float32) - mean[:, None]
        grad = tl.load(dy + place, mask=here, other=0.0).to(tl.float32)
        if RELU:
            if RESIDUAL:
                positive = tl.load(y + place, mask=here, other=0.0).to(tl.float32)
            else:
                positive = value * scale[:, None] + shift[:, None]
            grad = tl.where(positive <= 0.0, 0.0, grad)
        if RESIDUAL:
            tl.store(d_residual + place, grad.to(dx.dtype.element_ty), mask=here)
        value = grad * scale[:, None] + (value * p[:, None] + q[:, None])
        tl.store(dx + place, value.to(dx.dtype.element_ty), mask=here)


@triton.jit
def apply_backward_kernel(
    dy, x, y, dx, d_residual, sums, ratio_grads, ln_pool, gn_pool, bn_pool, grad_mean, grad_var,
    own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight, bias,
    N, L, CHUNK, G, eps,
    C: tl.constexpr, Q: tl.constexpr, FOUR: tl.constexpr, LAST: tl.constexpr,
    K: tl.constexpr, IN: tl.constexpr, LN: tl.constexpr, GN: tl.constexpr, BN: tl.constexpr,
    RUNNING: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    BC: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """dx = scale dy + p (x - mean) + q; the last program column computes the control parameters'
    gradients."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    if pid == N * blocks:
        if tl.program_id(1) == 0:
            _logit_grads(ratio_grads, mean_logits, grad_mean, N, K, 64)
            _logit_grads(ratio_grads + K * N, var_logits, grad_var, N, K, 64)
    else:
        _apply_backward(
            dy, x, y, dx, d_residual, sums, ln_pool, gn_pool, bn_pool,
            own, layer, group, batch, running_mean, running_var, mean_logits, var_logits, weight,
            bias, pid, N, L, CHUNK, G, eps, C, Q, FOUR, LAST, K, IN, LN, GN, BN, RUNNING, AFFINE,
            RELU, RESIDUAL, BC, BL,
        )  # fmt: skip

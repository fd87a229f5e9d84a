"""The layer on CUDA: launches of the Triton kernels, as autograd function and as custom operators.

In eager mode the autograd function runs, with the running statistics' step inside a kernel. The
operators `sn::switch_norm` and `sn::switch_norm_backward` are the same without side effects, for
`torch.compile` when the backend is forced; by default compilation takes the plain formula.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .common import (
    MOST_SPLITS,
    Options,
    Reduce,
    dense_in_layout,
    goes_by_formula,
    join_moments,
    keep,
    like_layout,
    reference_backward,
)

# Fixed by reasoning for H100 and A100, not measured; no autotuning: the same bits in every process.
# To move 3.35 TB/s at a latency of about 0.7 us an H100 has 2.3 MB under way, 18 KB on each of its
# 132 multiprocessors (A100: 2 TB/s, 11 KB on each of 108). A program of 4 warps has one tile of
# every input under way, 4 KB in bf16. By their registers (ptxas for sm_90: 48 to 96 a thread, none
# spilled) 5 to 10 programs reside on a multiprocessor: 20 KB or more, in the backward pass twice.
TILE = 2048  # numbers that a program loads at a time: 16 a thread, two 128-bit accesses in bf16
RESIDENT = 8  # programs per multiprocessor that a launch should have
SAMPLES = 64  # that a program of the pool kernels gathers at a time; 183 registers, none spilled
LAUNCH = {"enable_fp_fusion": True}  # a product and a sum in one rounding; Triton's default changes
INTERPRETED = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False


def probe(device: torch.device) -> None:
    """Raise an error unless a kernel compiles and runs on `device`."""
    x = torch.ones(1, 1, 16, device=device)
    with torch.cuda.device(device):
        tile = {"FOUR": False, "LAST": False, "BC": 1, "BL": 16}
        kernels.moments_kernel[(1, 1)](
            x, torch.empty_like(x), 1, 16, 16, C=1, SPLITS=1, **tile, **LAUNCH
        )


class Moments(NamedTuple):
    """What the forward pass keeps beside x: `own` (3, N, C), `layer` (3, N), `group` (3, N, Q),
    `batch` (3, G, C), float32; see triton_kernels."""

    own: Tensor
    layer: Tensor
    group: Tensor
    batch: Tensor


def _moment_shapes(x: Tensor, options: Options, running: bool) -> list[tuple[int, ...]]:
    """Those of `Moments`; a statistic that is not used is empty."""
    batch, channels = x.shape[:2]
    groups = options.virtual_gpus if options.training else 1
    has = options.statistics
    return [
        (3, batch, channels),
        (3, batch) if "ln" in has else (0,),
        (3, batch, options.num_groups) if "gn" in has else (0,),
        (3, groups, channels) if "bn" in has and not running else (0,),
    ]


class _Plan:
    """Sizes, blocks and constants of the launches for inputs of one shape."""

    def __init__(
        self,
        shape: torch.Size,
        last: bool,
        affine: bool,
        options: Options,
        has_running: bool,
        device: torch.device,
    ):
        self.batch, self.channels = shape[:2]
        self.length = length = math.prod(shape[2:])
        has_gn = "gn" in options.statistics
        self.num_groups = options.num_groups if has_gn else 1
        has_bn = "bn" in options.statistics  # without, a batch need not split into groups
        self.groups = options.virtual_gpus if options.training and has_bn else 1
        place = {s: options.statistics.index(s) for s in options.statistics}
        self.places = {
            "K": len(options.statistics),
            "IN": place.get("in", -1),
            "LN": place.get("ln", -1),
            "GN": place.get("gn", -1),
            "BN": place.get("bn", -1),
        }
        self.running = not options.training and has_running and "bn" in place
        self.mixture = self.places | {"RUNNING": self.running, "AFFINE": affine}
        self.shape = {"C": self.channels, "Q": self.num_groups}
        # Triton sees by itself that a number is a multiple of 16. As a constant, L would be known
        # to be one of 4 too, but maps of many sizes would compile as many kernels.
        four = not last and length % 4 == 0 and length % 16 != 0
        self.given_length = length // 4 if four else length
        block_c, block_l = self._tile(last)
        self.tile = {"FOUR": four, "LAST": last, "BC": block_c, "BL": block_l} | LAUNCH
        size = _power_of_2(self.channels // self.num_groups)
        samples = _power_of_2(self.batch // self.groups)
        self.pool = {"BQ": _power_of_2(self.num_groups), "BD": size} | LAUNCH
        self.pool |= {"BN_N": max(16, min(samples, SAMPLES)), "BN_C": 16}
        self.columns = self.batch * _cdiv(self.channels, block_c)
        self.rows = self.batch + _cdiv(self.channels, 16)
        processors = 2
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        tiles = _cdiv(length, block_l)
        splits = min(tiles, max(1, _cdiv(RESIDENT * processors, self.columns)), MOST_SPLITS)
        self.chunk = _cdiv(tiles, splits) * block_l
        self.splits = _cdiv(length, self.chunk)

    def _tile(self, last: bool) -> tuple[int, int]:
        along = _power_of_2(self.channels if last else self.length)
        along = min(along, 64 if last else 1024)
        other = _power_of_2(self.length if last else self.channels)
        other = min(other, TILE // along)
        return (along, other) if last else (other, along)


_plan = lru_cache(maxsize=4096)(_Plan)  # host time that every layer would take twice a step


def _cdiv(a: int, b: int) -> int:  # Triton's own are slow to call from Python
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def forward(
    x: Tensor,
    last: bool,
    mean_logits: Tensor,
    var_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    options: Options,
    relu: bool,
    update: bool,
    between: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, Moments]:
    """The three launches of the forward pass; x and residual dense in the same layout.

    `between`, if any, is called with `Moments.batch` before the last one, to change it.
    """
    affine = weight is not None
    plan = _plan(x.shape, last, affine, options, running_mean is not None, x.device)
    n, c, length, chunk = plan.batch, plan.channels, plan.given_length, plan.chunk

    def new(*shape):
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    shapes = _moment_shapes(x, options, plan.running)
    moments = Moments(*(new(*shape) for shape in shapes))
    partial = new(3, plan.splits, n, c)
    y = torch.empty_like(x)
    kernels.moments_kernel[(plan.columns, plan.splits)](
        x, partial, n, length, chunk, C=c, SPLITS=plan.splits, **plan.tile
    )
    batch_of_bn = plan.places["BN"] >= 0 and not plan.running
    pools = {name: plan.places[name] for name in ("LN", "GN")}
    kernels.pool_kernel[(plan.rows if batch_of_bn else n,)](
        partial,
        *moments,
        running_mean if update else partial,
        running_var if update else partial,
        n,
        plan.length,
        chunk,
        plan.groups,
        options.momentum,
        SPLITS=plan.splits,
        BN=plan.places["BN"] if batch_of_bn else -1,
        UPDATE=update,
        **plan.shape,
        **pools,
        **plan.pool,
    )
    if between is not None:
        between(moments.batch)
    kernels.apply_kernel[(plan.columns, plan.splits)](
        x,
        y,
        x if residual is None else residual,
        *moments,
        running_mean if plan.running else x,
        running_var if plan.running else x,
        mean_logits,
        var_logits,
        x if weight is None else weight,
        x if bias is None else bias,
        n,
        length,
        chunk,
        plan.groups,
        options.eps,
        RELU=relu,
        RESIDUAL=residual is not None,
        **plan.shape,
        **plan.mixture,
        **plan.tile,
    )
    return y, moments


def backward(
    dy: Tensor,
    x: Tensor,
    last: bool,
    y: Tensor | None,
    mean_logits: Tensor,
    var_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    moments: Moments,
    options: Options,
    relu: bool,
    residual: bool,
    between: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, ...]:
    """The three launches of the backward pass.

    `between`, if any, is called before the last one with the means of P and Q (see __init__.py)
    over the samples of a batch, (2, G, C), to change them.

    Returns the gradients of x, mean_logits, var_logits, weight, bias and the residual, those of
    parameters in float32, empty tensors where the input is None.
    """
    affine = weight is not None
    plan = _plan(x.shape, last, affine, options, running_mean is not None, x.device)
    n, c, length, chunk = plan.batch, plan.channels, plan.given_length, plan.chunk
    k = plan.places["K"]

    def new(*shape):
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    partial, sums = new(2, plan.splits, n, c), new(2, n, c)
    ratio_grads, grad_mean, grad_var = new(2 * k, n), new(k), new(k)
    ln_pool, gn_pool, bn_pool = new(2, n), new(2, n, plan.num_groups), new(2, plan.groups, c)
    affine = c if weight is not None else 0
    grad_weight, grad_bias = new(affine), new(affine)
    dx = torch.empty_like(x)
    d_residual = torch.empty_like(x) if residual else x.new_empty(0)
    mixture = (
        *moments,
        running_mean if plan.running else x,
        running_var if plan.running else x,
        mean_logits,
        var_logits,
        x if weight is None else weight,
    )
    shift = x if bias is None else bias
    activation = {"RELU": relu, "RESIDUAL": residual}
    saved_y = x if y is None else y
    kernels.sums_kernel[(plan.columns, plan.splits)](
        dy,
        x,
        saved_y,
        partial,
        *mixture,
        shift,
        n,
        length,
        chunk,
        plan.groups,
        options.eps,
        SPLITS=plan.splits,
        **activation,
        **plan.shape,
        **plan.mixture,
        **plan.tile,
    )
    kernels.pool_backward_kernel[(plan.rows,)](
        partial,
        sums,
        ratio_grads,
        ln_pool,
        gn_pool,
        bn_pool,
        grad_weight if affine else x,
        grad_bias if affine else x,
        *mixture,
        n,
        plan.groups,
        options.eps,
        SPLITS=plan.splits,
        **plan.shape,
        **plan.mixture,
        **plan.pool,
    )
    if between is not None:
        between(bn_pool)
    kernels.apply_backward_kernel[(plan.columns + 1, plan.splits)](
        dy,
        x,
        saved_y,
        dx,
        d_residual if residual else dx,
        sums,
        ratio_grads,
        ln_pool,
        gn_pool,
        bn_pool,
        grad_mean,
        grad_var,
        *mixture,
        shift,
        n,
        length,
        chunk,
        plan.groups,
        options.eps,
        **activation,
        **plan.shape,
        **plan.mixture,
        **plan.tile,
    )
    return dx, grad_mean, grad_var, grad_weight, grad_bias, d_residual


def _cast(grads: tuple[Tensor, ...], inputs) -> list[Tensor | None]:
    """Gradients in the dtype of their inputs, None where the input is None."""
    return [None if t is None else g.to(t.dtype) for g, t in zip(grads, inputs)]


class _SwitchNorm(torch.autograd.Function):
    """Inputs x, four parameters, two running statistics, residual; options, relu."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, options, relu = arguments
        *inputs, residual = inputs
        running_mean, running_var = inputs[5:]
        x, last = dense_in_layout(inputs[0])
        residual = None if residual is None else like_layout(residual, last)
        update = options.training and running_mean is not None and "bn" in options.statistics
        y, moments = forward(x, last, *inputs[1:], residual, options, relu, update)
        ctx.last = last
        keep(ctx, inputs, options, y, *moments, relu=relu, residual=residual is not None)
        return y

    @staticmethod
    def backward(ctx, dy):
        *inputs, y, own, layer, group, batch = ctx.saved_tensors
        if goes_by_formula(dy):
            return *reference_backward(ctx, dy, inputs, y), None, None
        # Hooks may have changed the layout of what was saved.
        x, dy = (like_layout(t, ctx.last) for t in (inputs[0].detach(), dy))
        y = y if y is None else like_layout(y, ctx.last)
        *grads, d_residual = backward(
            dy,
            x,
            ctx.last,
            y,
            *inputs[1:],
            Moments(own, layer, group, batch),
            ctx.options,
            ctx.relu,
            ctx.residual,
        )
        grads = _cast(grads, inputs[:5])
        return *grads, None, None, d_residual if ctx.residual else None, None, None


def sync_forward(inputs, options: Options, relu: bool, reduce: Reduce):
    """Output, what the backward pass needs (tensors, more), and bn's moments: `join_moments`."""
    *inputs, residual = _with_both_or_none(inputs)
    options = _python_numbers(options)
    x, last = dense_in_layout(inputs[0])
    residual = None if residual is None else like_layout(residual, last)
    joined = []

    def between(batch: Tensor) -> None:
        wide = batch[:, 0].double()
        joined.extend(join_moments(wide[0] + wide[1], wide[2], x.numel() // x.shape[1], reduce))
        mean, var, _ = joined
        batch[0] = mean
        batch[1] = mean - batch[0].double()
        batch[2] = var

    with torch.cuda.device_of(x):
        y, moments = forward(x, last, *inputs[1:], residual, options, relu, False, between)
    return y, moments, last, joined


def sync_backward(
    dy: Tensor,
    inputs,
    y: Tensor | None,
    kept,
    last: bool,
    options: Options,
    relu: bool,
    needed,
    values: Tensor,
    reduce: Reduce,
):
    """Gradients of x, of the four parameters, and of a residual."""
    given = inputs
    inputs = _with_both_or_none(inputs)
    options = _python_numbers(options)
    x, dy = (like_layout(t, last) for t in (inputs[0].detach(), dy))
    y = y if y is None else like_layout(y, last)
    place = options.statistics.index("bn")
    ratios = torch.stack([t.double().softmax(0)[place] for t in inputs[1:3]])[:, None]

    def between(pool: Tensor) -> None:
        if not needed[0]:
            return
        scale = torch.stack((ratios[0], ratios[1] / 2)) * -x.shape[0]
        grads = pool[:, 0].double() * scale  # of bn's mean and variance
        reduce(grads.view(-1))
        scale = scale * (values * (x.shape[0] * x.shape[1] / x.numel()))
        pool[:, 0] = torch.where(ratios > 0, grads / scale, 0.0) * x.shape[0]

    with torch.cuda.device_of(x):
        *grads, d_residual = backward(
            dy, x, last, y, *inputs[1:], Moments(*kept), options, relu, needed[7], between
        )
    return grads[0], _cast(grads, given[:5])[1:], d_residual if needed[7] else None


def _with_both_or_none(tensors):
    """`tensors`, the first five as of `switch_norm`, with weight and bias or without both."""
    weight, bias = tensors[3:5]
    if (weight is None) == (bias is None):
        return tensors
    weight = torch.ones_like(bias) if weight is None else weight
    bias = torch.zeros_like(weight) if bias is None else bias
    return *tensors[:3], weight, bias, *tensors[5:]


def triton_switch_norm(
    tensors: tuple[Tensor | None, ...],
    options: Options,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`switch_norm` of its seven `tensors`, x not empty; then `+ residual` and ReLU."""
    inputs = (*_with_both_or_none(tensors), residual)  # the kernels know both or none
    if torch.compiler.is_compiling():
        return _compiled(*inputs, options, relu)
    with torch.cuda.device_of(inputs[0]):
        return _SwitchNorm.apply(*inputs, _python_numbers(options), relu)


def _python_numbers(options: Options) -> Options:
    """The options without NumPy's numbers, which the launcher refuses and the layer takes."""
    groups = None if options.num_groups is None else int(options.num_groups)
    return options._replace(
        num_groups=groups,
        momentum=float(options.momentum),
        eps=float(options.eps),
        virtual_gpus=int(options.virtual_gpus),
    )


def _dense(*parameters: Tensor | None) -> list[Tensor | None]:
    """What the kernels index from its first value on: under compilation nothing has looked."""
    return [None if t is None else t.contiguous() for t in parameters]


# The custom operators: functional, with the options spelled out, as the schema language wants it.


@torch.library.custom_op("sn::switch_norm", mutates_args=())
def _operator(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    statistics: str,
    num_groups: int,
    training: bool,
    eps: float,
    virtual_gpus: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(tuple(statistics.split()), num_groups, training, 0.0, eps, virtual_gpus)
    dense, last = dense_in_layout(x)
    residual = None if residual is None else like_layout(residual, last)
    parameters = _dense(mean_weight, var_weight, weight, bias, running_mean, running_var)
    with torch.cuda.device_of(x):
        y, moments = forward(dense, last, *parameters, residual, options, relu, False)
    return y, *moments


@_operator.register_fake
def _(x, mean_weight, var_weight, weight, bias, running_mean, running_var, residual, *options):
    statistics, num_groups, training, eps, virtual_gpus, _ = options
    options = Options(tuple(statistics.split()), num_groups, training, 0.0, eps, virtual_gpus)
    shapes = _moment_shapes(x, options, not training and running_mean is not None)
    moments = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
    dense, _ = dense_in_layout(x)
    return torch.empty_like(dense), *moments


@torch.library.custom_op("sn::switch_norm_backward", mutates_args=())
def _operator_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    own: Tensor,
    layer: Tensor,
    group: Tensor,
    batch: Tensor,
    statistics: str,
    num_groups: int,
    training: bool,
    eps: float,
    virtual_gpus: int,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(tuple(statistics.split()), num_groups, training, 0.0, eps, virtual_gpus)
    dense, last = dense_in_layout(x)
    parameters = _dense(mean_weight, var_weight, weight, bias, running_mean, running_var)
    moments = Moments(own, layer, group, batch)
    with torch.cuda.device_of(x):
        dy = like_layout(dy, last)
        return backward(dy, dense, last, y, *parameters, moments, options, relu, residual)


@_operator_backward.register_fake
def _(dy, x, y, mean_weight, var_weight, weight, *rest):
    dense, _ = dense_in_layout(x)
    affine = 0 if weight is None else x.shape[1]
    shapes = [mean_weight.shape, var_weight.shape, (affine,), (affine,)]
    grads = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
    d_residual = torch.empty_like(dense) if rest[-1] else x.new_empty(0)
    return torch.empty_like(dense), *grads, d_residual


def _setup_context(ctx, inputs, output):
    *tensors, residual = inputs[:8]
    relu = inputs[-1]
    ctx.options, ctx.residual = inputs[8:], residual is not None
    y = output[0] if relu and residual is not None else None
    ctx.save_for_backward(*tensors, y, *output[1:])


def _backward_of_operator(ctx, dy, *_):
    *tensors, y, own, layer, group, batch = ctx.saved_tensors
    moments = own, layer, group, batch
    x, *parameters = tensors
    *grads, d_residual = torch.ops.sn.switch_norm_backward(
        dy, x, y, *parameters, *moments, *ctx.options, ctx.residual
    )
    grads = _cast(grads, tensors[:5])
    return *grads, None, None, d_residual if ctx.residual else None, *[None] * 6


_operator.register_autograd(_backward_of_operator, setup_context=_setup_context)


def _compiled(*arguments):
    *inputs, options, relu = arguments
    running_mean, running_var = running = inputs[5:7]
    y, _, _, _, batch = torch.ops.sn.switch_norm(
        *inputs[:5],
        *((None, None) if options.training else running),  # in training their step follows
        inputs[7],
        " ".join(options.statistics),
        int(options.num_groups or 1),
        options.training,
        float(options.eps),
        int(options.virtual_gpus),
        relu,
    )
    if options.training and running_mean is not None and "bn" in options.statistics:
        with torch.no_grad():
            mean, var = (batch[0] + batch[1]).mean(0), batch[2].mean(0)
            running_mean.lerp_(mean.to(running_mean.dtype), options.momentum)
            running_var.lerp_(var.to(running_var.dtype), options.momentum)
    return y

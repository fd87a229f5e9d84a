"""The layer's implementations and the choice between them.

There are three of the formula: sn/functional.py, which is the reference; the CPU's; CUDA's.

    native.c           the CPU's passes and (N, C) numbers, compiled when the package is installed
    native.py          its calls as autograd function, by ctypes
    autograd.cpp       the same for the usual call in C++, compiled for the installed PyTorch
    triton_kernels.py  the same on CUDA, in three kernels forward and three backward
    cuda.py            their launches as autograd function and custom operators
    check.py           whether these are right and faster on a GPU, found out at its first use
    common.py          what both share

Both read x twice forward, dy and x twice backward, and keep x. Between the passes everything is
(N, C) numbers: from each instance's mean m and variance v to y = scale (x - m) + shift, and from
S = sum dy and T = sum dy (x - m) to dx = scale dy + p (x - m) + q. With M_k, V_k the moments of
statistic k, w and u the importance weights of means and variances, d_k = m - M_k and L positions:

    M_k = pool(m),  V_k = pool(v) + pool(d_k^2)      pool: mean over channels, groups or samples
    r = (sum u_k V_k + eps)^-1/2,  scale = weight r,  o = sum w_k (M_k - m) = -sum w_k d_k
    shift = bias - o scale

    P = scale S  and  Q = scale r^2 (T - o S)  are minus the gradient of the mixed mean and minus
    twice that of the mixed variance, hence
    dm = -(w_in P + sum w_k pool(P) + sum u_k pool(Q) d_k)
    dv = -(u_in Q + sum u_k pool(Q)) / 2
    q = dm / L,  p = 2 dv / L

`backend` or the environment variable SN_BACKEND forces one implementation, for debugging.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .. import functional
from ..functional import canonical_statistics, check_num_groups, check_virtual_gpus
from . import native
from .common import MOST_SPLITS, PLAIN, Options, Reduce, is_transformed
from .native import native_switch_norm, quick_switch_norm, takes

BACKENDS = ("auto", "reference", "native", "triton")
_KNOWN = frozenset(("in", "ln", "gn", "bn"))  # statistics that the kernels have; else the formula
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def _check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {BACKENDS}")
    if name == "triton" and importlib.util.find_spec("triton") is not None:
        from . import cuda  # noqa: F401  registers the operators
    return name


_backend = _check_backend(os.environ.get("SN_BACKEND", "auto"))


@contextmanager
def backend(name: str):
    """Compute switchable layers by `name` inside the context.

    `name` is one of auto, reference, native and triton. A backend that cannot take an input leaves
    it to the reference, the plain formula. The environment variable SN_BACKEND sets the outermost
    one. auto is native on the CPU, if it was compiled, triton on a GPU where the check at its first
    use has found the kernels right and faster (`sn.kernels.check`), and the reference elsewhere.
    Under `torch.compile` auto is the plain formula and triton the custom operators.
    """
    global _backend
    previous, _backend = _backend, _check_backend(name)
    try:
        yield
    finally:
        _backend = previous


def chosen_by_check() -> bool:
    """Whether no backend is forced: on a GPU the check of its kernels decides."""
    return _backend == "auto"


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
    """`sn.functional.switch_norm`, by the fastest implementation that can take the arguments.

    Arguments and errors are the same; see there.
    """
    statistics = canonical_statistics(statistics)
    options = Options(statistics, num_groups, training, momentum, eps, virtual_gpus)
    tensors = (x, mean_weight, var_weight, weight, bias, running_mean, running_var)
    if unbiased:  # for the official code's checkpoints; no kernel has it
        return formula(tensors, options, unbiased=True)
    functional.check_running(x, running_mean, running_var, momentum, training)
    return switch_norm_act(tensors, options)


def switch_norm_act(
    tensors: tuple[Tensor | None, ...],
    options: Options,
    residual: Tensor | None = None,
    relu: bool = False,
    counter: Tensor | None = None,
) -> Tensor:
    """relu(switch_norm(*tensors) + residual), fused where there are kernels for it.

    `tensors` are the seven of `switch_norm`, `options.statistics` in canonical order. Where there
    are no kernels for the residual and ReLU these follow as PyTorch's operations. `counter`, if
    any, is increased by 1.
    """
    known = _KNOWN.issuperset(options.statistics)
    if known:
        y = _quick(tensors, options, residual, relu, counter)
        if y is not None:
            return y
    chosen = choose_backend(*tensors) if known else "reference"
    if counter is not None and chosen != "native":
        counter.add_(1)
    if chosen == "reference":
        y = formula(tensors, options)
    else:
        x, channels = tensors[0], tensors[0].shape[1]
        functional._check_shapes(x, *tensors[1:5], options.statistics)
        if "gn" in options.statistics:
            check_num_groups(options.num_groups, channels)
        if "bn" in options.statistics and options.training:
            check_virtual_gpus(options.virtual_gpus, x.shape[0])
        matches = residual is None or fits(residual, x)
        fused = (residual, relu) if matches else (None, False)  # which of these the kernel does
        if chosen == "native":
            y = native_switch_norm(tensors, options, *fused, counter)
        else:
            from .cuda import triton_switch_norm  # brings Triton

            y = triton_switch_norm(tensors, options, *fused)
        if matches:
            return y
    if residual is not None:
        y = y + residual
    return y.relu_() if relu else y


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, virtual_gpus: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Batch norm of training by the CPU's kernels; None where they do not apply.

    Also the means over the groups of their means and unbiased variances, (C,) each.
    """
    if seen_through() or not x.is_cpu or x.dim() < 2 or x.numel() == 0:
        return None
    count = x.numel() // (x.shape[1] * virtual_gpus)  # values of a group's mean
    if count < 2:
        return None
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype).unbind()
    one = torch.ones(1, dtype=dtype)  # the importance of the only statistic
    tensors = (x, one, one, weight, bias, mean, var)
    options = Options(("bn",), None, True, 1.0, eps, virtual_gpus)
    y = _quick(tensors, options)
    if y is None and choose_backend(*tensors) == "native":
        y = native_switch_norm(tensors, options)
    return None if y is None else (y, mean, var.mul_(count / (count - 1)))


def batch_moments(x: Tensor, virtual_gpus: int) -> Tensor | None:
    """Means and biased variances of a batch's groups, (2, virtual_gpus, C); None without kernels.

    Not differentiable. With what `batch_norm_by_group` is given of them it is a function of both.
    """
    if seen_through() or not x.is_cpu or choose_backend(x) != "native":
        return None
    return native.batch_moments(x, virtual_gpus)


def batch_norm_by_group(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor | None:
    """Batch norm of training, each group by itself, with weight and bias (groups, C) of its own.

    None where the kernels do not apply.
    """
    one = torch.ones(1, dtype=weight.dtype)
    tensors = (x, one, one, weight.flatten(), bias.flatten(), None, None)
    options = Options(("bn",), None, True, 0.0, eps, len(weight))
    return _quick(tensors, options, None, False, None, True)


def quick_synchronised(
    tensors: tuple[Tensor | None, ...],
    options: Options,
    residual: Tensor | None,
    relu: bool,
    reduce: Reduce,
) -> Tensor | None:
    """The layer by the CPU's kernels with bn over all processes, whose vectors `reduce` sums.

    None where `synchronised` is to be asked.
    """
    return _quick(tensors, options, residual, relu, None, False, reduce)


def synchronised(tensors: tuple[Tensor | None, ...]) -> ModuleType | None:
    """Where to find `sync_forward` and `sync_backward` for a layer's tensors; None: nowhere."""
    chosen = choose_backend(*tensors)
    if chosen == "triton":
        from . import cuda

        return None if torch.compiler.is_compiling() else cuda
    return native if chosen == "native" else None


def _quick(tensors: tuple[Tensor | None, ...], options: Options, *others) -> Tensor | None:
    """`quick_switch_norm`, where a backend that is not the CPU's is neither forced nor needed."""
    if _backend not in ("auto", "native") or seen_through() or _is_autograd_compiled():
        return None
    return quick_switch_norm(tensors, options, *others)


def fits(residual: Tensor, x: Tensor) -> bool:
    """Whether a kernel can add `residual`."""
    same = residual.shape == x.shape and residual.dtype == x.dtype
    return same and residual.device == x.device and type(residual) in PLAIN


def choose_backend(
    x: Tensor,
    mean_weight: Tensor | None = None,
    var_weight: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> str:
    """The implementation for `x` and the layer's parameters and buffers.

    The plain formula wherever something has to see its operations (compilation, export, tracing,
    function transforms, forward derivatives, tensor subclasses) and for what no kernel takes.
    """
    if _backend == "reference" or x.numel() == 0 or x.dim() < 2:
        return "reference"
    if torch.compiler.is_compiling():
        # is_exporting() is true in torch.compile, too, with torch 2.11
        forced = _backend == "triton" and not torch.compiler._is_exporting_flag
        can = (x.is_cuda or _INTERPRET) and x.dtype in _FLOATS[1:]
        return "triton" if forced and can else "reference"
    if x.dtype not in _FLOATS or seen_through():
        return "reference"
    accepted = _FLOATS if x.dtype is torch.float64 else _FLOATS[1:]
    on_cpu = x.is_cpu
    parameters = (mean_weight, var_weight, weight, bias, running_mean, running_var)
    for tensor in (x, *parameters):
        if tensor is not None and not (
            type(tensor) in PLAIN
            and tensor.dtype in accepted
            and (tensor.is_cpu if on_cpu else tensor.device == x.device)
            and not tensor.is_neg()  # lazily negated: its memory holds other values
            and not tensor._is_zerotensor()
        ):
            return "reference"
    for tensor in (running_mean, running_var):
        if tensor is not None and tensor.requires_grad:
            return "reference"
    if on_cpu and _backend in ("auto", "native") and takes(x, running_mean, running_var):
        return "native"
    if x.dtype is torch.float64 or not _triton_takes(x, parameters):
        return "reference"
    return "triton" if _takes_triton(x.device) else "reference"


def _triton_takes(x: Tensor, parameters: tuple[Tensor | None, ...]) -> bool:
    """Whether the Triton kernels can index the tensors: within a sample by 32 bits.

    Up to the end of its last piece, which is less than 2^20 beyond it. One program holds all
    channels of a sample in registers, up to 4,096.
    """
    batch, channels = x.shape[:2]
    length = x.numel() // (batch * channels)
    short = channels * length < 2**31 - 2**20
    short = short and batch * channels * 3 * min(length, MOST_SPLITS) < 2**31
    dense = all(t is None or t.is_contiguous() for t in parameters)
    return channels <= 4096 and short and dense


def seen_through() -> bool:
    """Whether something wants to see the plain formula's operations."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0  # such as fake tensors, counters of operations
    )


def evaluated_with(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics for an evaluation: where it may get a backward pass, copies of them.

    The layer may train before that pass, which needs those of now.
    """
    if torch.is_grad_enabled() and not seen_through():
        return mean.clone(), var.clone()
    return mean, var


def formula(tensors: tuple[Tensor | None, ...], options: Options, unbiased: bool = False) -> Tensor:
    """`sn.functional.switch_norm` of a layer's seven tensors."""
    mean, var = tensors[5:]
    if mean is not None and var is not None and not options.training:
        tensors = *tensors[:5], *evaluated_with(mean, var)
    return functional.switch_norm(*tensors, **options._asdict(), unbiased=unbiased)


def _is_autograd_compiled() -> bool:
    """Whether compiled autograd is on: it cannot take what C++ functions keep beside tensors."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")  # its import takes seconds
    return getattr(module, "compiled_autograd_enabled", False)


def _takes_triton(device: torch.device) -> bool:
    """Whether the Triton kernels are forced, or by themselves right and faster on this GPU."""
    if chosen_by_check() and device.type == "cuda":
        from .check import proven

        return proven(device) and _triton_works(device)
    return _backend == "triton" and _triton_works(device)


@lru_cache(maxsize=64)
def _triton_works(device: torch.device) -> bool:
    """Whether Triton can run here: it may be missing, or the C compiler that it needs."""
    if importlib.util.find_spec("triton") is None:
        return False
    from . import cuda

    if device.type == "cpu":
        return cuda.INTERPRETED
    if device.type != "cuda":
        return False
    try:
        cuda.probe(device)
    except Exception as error:
        message = f"sn: the Triton kernels do not run ({error!r}); using the plain formula"
        warnings.warn(message, stacklevel=2)
        return False
    return True

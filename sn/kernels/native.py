"""The layer on the CPU by the compiled library of native.c, as one autograd function.

The library is built when the package is installed where there is a C compiler (setup.py). Without
it the layer is the plain formula. The usual call goes through autograd.cpp, if that was built too:
the same function without Python, whose calls take longer than a small map.
"""

import ctypes
import importlib
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from ..functional import STATISTICS
from .common import (
    Options,
    Reduce,
    as_dtype,
    dense_in_layout,
    goes_by_formula,
    join_moments,
    keep,
    like_layout,
    reference_backward,
)

# `Forward` and `Backward` of native.h: one packed argument costs less than fourteen.
_FORWARD, _BACKWARD = struct.Struct("=Qqqd11Qq"), struct.Struct("=Qqq12QqQd")
_WHOLE, _SUMS, _REST = range(3)  # parts of a backward pass
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".c", ".cpp", ".h"))


def checksum(folder: Path) -> int:
    """Of the sources in `folder`, as setup.py takes it."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sources(folder)))


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library; None if there is none, or one of other sources than lie beside it."""
    folder = Path(__file__).parent
    built = [folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in built if path.exists()), None)
    if path is None:
        return None
    advice = "install the package again (`make install`); until then normalization is slower"
    try:
        found = ctypes.CDLL(str(path))
        found.sn_source.restype = ctypes.c_uint
        source = found.sn_source()
    except (OSError, AttributeError) as error:
        warnings.warn(f"sn: {path} cannot be loaded ({error}); {advice}", stacklevel=2)
        return None
    if (folder / "native.c").exists() and source != checksum(folder):
        warnings.warn(f"sn: {path} was built from other sources; {advice}", stacklevel=2)
        return None
    found.source = source
    found.parallel = bool(found.sn_parallel())
    for size in (found.sn_saved, found.sn_state):
        size.argtypes, size.restype = [ctypes.c_void_p], ctypes.c_int64
    for suffix in _SUFFIXES.values():
        for name in ("forward", "backward"):
            getattr(found, f"sn_{name}_{suffix}").argtypes = [ctypes.c_char_p]
    return found


@lru_cache(maxsize=1)
def extension() -> ModuleType | None:
    """autograd.cpp, compiled for this PyTorch from the library's sources; None if there is none."""
    found = library()
    if found is None:
        return None
    name = "_autograd_" + re.sub(r"\W", "_", torch.__version__)
    try:
        module = importlib.import_module(f".{name}", __package__)
    except ImportError:
        return None
    if module.source != found.source:
        return None
    names = ["sn_saved", "sn_state"]
    names += [
        f"sn_{way}_{suffix}" for way in ("forward", "backward") for suffix in _SUFFIXES.values()
    ]
    addresses = [ctypes.cast(getattr(found, name), ctypes.c_void_p).value for name in names]
    module.setup(*addresses, found.parallel, _formula)
    return module


class _Layer(ctypes.Structure):
    """`Layer` of native.h."""

    _names = ("batch", "channels", "length", "num_groups", "groups", "affine", "last", "places")
    _names += ("in", "ln", "gn", "bn", "running", "update")
    _fields_ = [*((name, ctypes.c_int64) for name in _names), ("eps", ctypes.c_double)]


@lru_cache(maxsize=256)
def _description(
    statistics: tuple[str, ...],
    num_groups: int | None,
    training: bool,
    eps: float,
    virtual_gpus: int,
    running: bool,
    by_group: bool = False,
) -> bytes:
    """A `Layer` without the shape of its input; `by_group`: each group has a weight and bias."""
    has_bn = "bn" in statistics
    layer = _Layer(
        num_groups=num_groups if "gn" in statistics else 1,
        groups=virtual_gpus if training and has_bn else 1,
        affine=virtual_gpus if by_group else 1,
        places=len(statistics),
        running=running and has_bn and not training,
        update=running and has_bn and training,
        eps=eps,
    )
    for statistic in STATISTICS:
        place = statistics.index(statistic) if statistic in statistics else -1
        setattr(layer, statistic, place)
    return bytes(layer)


@lru_cache(maxsize=1024)
def _layer(shape: torch.Size, last: bool, *description) -> _Layer:
    """What the library is told of a call; `address` of it, `size` in doubles of what it keeps."""
    layer = _Layer.from_buffer_copy(_description(*description))
    layer.batch, layer.channels, layer.length = shape[0], shape[1], math.prod(shape[2:])
    layer.last = last or layer.length == 1  # then both are the same, and a row is one long loop
    layer.address = ctypes.addressof(layer)
    layer.size = library().sn_saved(layer.address)
    return layer


@lru_cache(maxsize=8)
def _functions(dtype: torch.dtype):
    suffix = _SUFFIXES[dtype]
    found = library()
    return getattr(found, f"sn_forward_{suffix}"), getattr(found, f"sn_backward_{suffix}")


def takes(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> bool:
    """Whether there is a library, with code for x's dtype and such running statistics.

    One that was compiled without OpenMP is left for the plain formula, whose operations are
    parallel, from three threads on.
    """
    if x.dtype not in _SUFFIXES or library() is None:
        return False
    if running_mean is None or running_var is None:
        fits = running_mean is running_var
    else:
        fits = running_mean.shape == running_var.shape == x.shape[1:2]
    return fits and (library().parallel or torch.get_num_threads() <= 2)


def quick_switch_norm(
    tensors: tuple[Tensor | None, ...],
    options: Options,
    residual: Tensor | None = None,
    relu: bool = False,
    counter: Tensor | None = None,
    by_group: bool = False,
    reduce: Reduce | None = None,
) -> Tensor | None:
    """`native_switch_norm` by the extension; None if it is not there or not for such arguments.

    `counter`, if any, is increased by 1. `by_group`: weight and bias are (virtual_gpus C,).
    `reduce`, if any: bn's batch is that of all processes; second derivatives are then an error.
    """
    module = extension()
    if module is None:
        return None
    statistics, num_groups, training, momentum, eps, virtual_gpus = options
    if type(virtual_gpus) is not int or "gn" in statistics and type(num_groups) is not int:
        return None  # for the checks to judge
    running = tensors[5] is not None
    layer = _description(statistics, num_groups, training, eps, virtual_gpus, running, by_group)
    return module.run(*tensors, residual, counter, layer, momentum, relu, reduce)


def _check_saved(x: Tensor, saved: Tensor, dy: Tensor, size: int) -> None:
    """Raise RuntimeError unless a call's x and `size` doubles came back as they were saved."""
    same = x.dtype == dy.dtype and x.shape == dy.shape and x.device == saved.device == dy.device
    if not (same and saved.dtype == torch.float64 and saved.shape == (size,)):
        raise RuntimeError(
            "what the layer saved came back with another dtype, shape or device: "
            f"{x.dtype} {tuple(x.shape)} and {saved.dtype} {tuple(saved.shape)}"
        )


def _formula(dy, layer: bytes, relu: int, residual: int, needed, inputs):
    """The extension's gradients where they are to be differentiable: see `reference_backward`."""
    layer = _Layer.from_buffer_copy(layer)
    statistics = tuple(s for s in STATISTICS if getattr(layer, s) >= 0)
    training = not layer.running
    options = Options(statistics, layer.num_groups, training, 0.0, layer.eps, layer.groups)
    ctx = SimpleNamespace(options=options, relu=relu, residual=residual, needs_input_grad=needed)
    *inputs, y = inputs
    return reference_backward(ctx, dy, inputs, y)


def native_switch_norm(
    tensors: tuple[Tensor | None, ...],
    options: Options,
    residual: Tensor | None = None,
    relu: bool = False,
    counter: Tensor | None = None,
) -> Tensor:
    """`switch_norm` of its seven `tensors`, x on the CPU and not empty; `+ residual`, ReLU.

    `counter`, if any, is increased by 1.
    """
    inputs = (*tensors, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _SwitchNorm.apply(*inputs, options, relu, counter)
    return _forward(inputs, options, relu, counter)[0]


def batch_moments(x: Tensor, virtual_gpus: int) -> Tensor:
    """Means and biased variances of a batch's groups, (2, virtual_gpus, C) in float64."""
    x, last = dense_in_layout(x.detach())
    layer = _layer(x.shape, last, ("bn",), None, True, 0.0, virtual_gpus, False)
    saved = torch.empty(layer.size, dtype=torch.float64, device=x.device)
    tensors = (x, None, None, saved, *[None] * 7)
    where = _addresses(tensors)
    call = _FORWARD.pack(layer.address, torch.get_num_threads(), False, 0.0, *where, False)
    if _functions(x.dtype)[0](call):
        raise torch.OutOfMemoryError(f"no memory for the statistics of shape {tuple(x.shape)}")
    return _bn_moments(saved, layer)


def _bn_moments(saved: Tensor, layer: _Layer) -> Tensor:
    """Means and variances of bn, (2, groups, C), among what the library keeps."""
    return saved[-2 * layer.groups * layer.channels :].view(2, layer.groups, layer.channels)


def _addresses(tensors) -> list[int]:
    """Those of the values; 0 where there is no tensor."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def _dense(tensors, x: Tensor) -> list[Tensor | None]:
    """Parameters and buffers as the library takes them, dense and in the arithmetic's dtype.

    They nearly always are.
    """
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return [
        t if t is None or t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous()
        for t in tensors
    ]


def _forward(
    inputs, options: Options, relu: bool, counter: Tensor | None, between: Callable | None = None
):
    """Output, its layer, what the library keeps.

    `between`, if any, is called once this has all moments, with bn's (2, groups, C) to be changed.
    """
    x, last = dense_in_layout(inputs[0])
    residual = inputs[7]
    if residual is not None:
        residual = like_layout(residual, last)
    statistics, num_groups, training, momentum, eps, virtual_gpus = options
    running = inputs[5] is not None
    layer = _layer(x.shape, last, statistics, num_groups, training, eps, virtual_gpus, running)
    y = torch.empty_like(x)
    saved = torch.empty(layer.size, dtype=torch.float64, device=x.device)
    parameters = _dense(inputs[1:7], x)
    if counter is not None and not (
        type(counter) is Tensor and counter.dtype is torch.int64 and counter.is_cpu
    ):
        counter.add_(1)
        counter = None

    def call(to: Tensor | None, given: bool) -> None:
        packed = _FORWARD.pack(
            layer.address,
            torch.get_num_threads(),
            relu,
            momentum if layer.update else 0.0,
            *_addresses((x, residual, to, saved, *parameters, counter)),
            given,
        )
        if _functions(x.dtype)[0](packed):
            raise torch.OutOfMemoryError(
                f"no memory for the statistics of an input of shape {tuple(x.shape)}"
            )

    if between is not None:
        call(None, False)
        between(_bn_moments(saved, layer))
    call(y, between is not None)
    if layer.update:
        for old, new in zip(inputs[5:7], parameters[4:]):
            if new is not old:
                old.copy_(new)
        torch.autograd.graph.increment_version(inputs[5:7])
    if counter is not None:
        torch.autograd.graph.increment_version(counter)
    return y, layer, saved


def _backward(
    layer: _Layer,
    dy: Tensor,
    inputs,
    y,
    saved: Tensor,
    relu: bool,
    needed,
    between: tuple[Callable, float] | None = None,
):
    """Gradients of x, of the control parameters, weight and bias, and of a residual.

    `between`, if any: a function that is called with the gradients (2, C) of bn's mean and variance
    to be changed, and the number of values of a channel that these are of.
    """
    # Hooks may have changed what was saved: its layout is mended, more is an error.
    x, dy = (like_layout(t, bool(layer.last)) for t in (inputs[0], dy))
    y = y if y is None else like_layout(y.to(x.dtype), bool(layer.last))
    _check_saved(x, saved, dy, layer.size)
    both = relu and needed[7]  # one pass writes both
    dx = torch.empty_like(x) if needed[0] or both else None
    d_residual = None
    if needed[7]:
        d_residual = torch.empty_like(x) if relu else dy
    parameters = _dense(inputs[1:5], x)
    grads = [None if t is None else torch.empty_like(t) for t in parameters]
    written = d_residual if relu else None
    tensors = (dy, x, y, dx, written, saved, *parameters[2:], *grads)

    def call(part: int, state: Tensor | None = None, values: float = 0.0) -> None:
        packed = _BACKWARD.pack(
            layer.address,
            torch.get_num_threads(),
            relu,
            *_addresses(tensors),
            part,
            *_addresses((state,)),
            values,
        )
        if _functions(x.dtype)[1](packed):
            raise torch.OutOfMemoryError(
                f"no memory for the gradients of an input of shape {tuple(x.shape)}"
            )

    if between is None:
        call(_WHOLE)
    else:
        state = torch.empty(library().sn_state(layer.address), dtype=torch.float64)
        call(_SUMS, state)
        if needed[0]:  # which is so in all processes or none
            between[0](state[: 2 * layer.channels].view(2, -1))
        if dx is not None:
            call(_REST, state, between[1])
    grads = [g if g is None else as_dtype(g, t.dtype) for g, t in zip(grads, inputs[1:5])]
    return dx, grads, d_residual


def sync_forward(inputs, options: Options, relu: bool, reduce: Reduce):
    """Output, what the backward pass needs (tensors, more), and bn's moments: `join_moments`."""
    x, joined = inputs[0], []

    def between(moments: Tensor) -> None:
        values = x.numel() // x.shape[1]
        joined.extend(join_moments(*moments[:, 0], values, reduce))
        moments[0], moments[1] = joined[:2]

    y, layer, saved = _forward(inputs, options, relu, None, between)
    return y, (saved,), layer, joined


def sync_backward(
    dy: Tensor,
    inputs,
    y: Tensor | None,
    kept,
    layer: _Layer,
    options: Options,
    relu: bool,
    needed,
    values: Tensor,
    reduce: Reduce,
):
    """Gradients of x, of the four parameters, and of a residual."""
    (saved,) = kept
    between = (lambda grads: reduce(grads.view(-1))), values.item()
    return _backward(layer, dy, inputs, y, saved, relu, needed, between)


class _SwitchNorm(torch.autograd.Function):
    """Keeps x and some doubles per instance for the backward pass."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, options, relu, counter = arguments
        y, ctx.layer, saved = _forward(inputs, options, relu, counter)
        keep(ctx, inputs, options, y, saved, relu=relu, residual=inputs[7] is not None)
        return y

    @staticmethod
    def backward(ctx, dy):
        *inputs, y, saved = ctx.saved_tensors
        if goes_by_formula(dy):
            return *reference_backward(ctx, dy, inputs, y), None, None, None
        dx, grads, d_residual = _backward(
            ctx.layer, dy, inputs, y, saved, ctx.relu, ctx.needs_input_grad
        )
        return dx, *grads, None, None, d_residual, None, None, None

"""The fused layer: `switch_norm` with the reference's arguments, at batch norm's cost.

    aten.py      passes over x on the CPU, from PyTorch's own kernels
    mixture.py   everything on (N, C) numbers, forward and backward
    function.py  the two as one autograd function

`backend` or the environment variable SN_BACKEND forces one implementation, for debugging.
"""

import os
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import functional
from ..functional import canonical_statistics, check_num_groups, check_virtual_gpus
from .function import fused_switch_norm
from .mixture import Options

BACKENDS = ("auto", "reference", "aten")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {BACKENDS}")
    return name


_backend = _check_backend(os.environ.get("SN_BACKEND", "auto"))


@contextmanager
def backend(name: str):
    """Compute switchable layers by `name` inside the context: auto, reference or aten.

    A backend that cannot take an input leaves it to the reference.
    """
    global _backend
    previous, _backend = _backend, _check_backend(name)
    try:
        yield
    finally:
        _backend = previous


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
) -> Tensor:
    """`sn.functional.switch_norm`, by the fastest implementation that can take the arguments."""
    tensors = (x, mean_weight, var_weight, weight, bias, running_mean, running_var)
    if choose_backend(*tensors) == "aten":
        statistics = canonical_statistics(statistics)
        functional._check_shapes(x, *tensors[1:5], statistics)
        if "gn" in statistics:
            check_num_groups(num_groups, x.shape[1])
        if "bn" in statistics and training:
            check_virtual_gpus(virtual_gpus, x.shape[0])
        options = Options(statistics, num_groups, training, momentum, eps, virtual_gpus)
        return fused_switch_norm(*tensors, options)
    return functional.switch_norm(
        *tensors,
        statistics=statistics,
        num_groups=num_groups,
        training=training,
        momentum=momentum,
        eps=eps,
        virtual_gpus=virtual_gpus,
    )


def choose_backend(x: Tensor, *others: Tensor | None) -> str:
    """The implementation for `x` and the layer's parameters and buffers.

    The plain formula wherever something has to see through it (compilation, export, tracing,
    function transforms, forward derivatives, tensor subclasses) and where there is little to gain.
    """
    if _backend == "reference" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "reference"
    if x.dim() < 3 or x.numel() == 0 or x.numel() == x.shape[0] * x.shape[1]:
        return "reference"
    if not x.is_cpu or x.dtype not in _FLOATS or _is_transformed():
        return "reference"
    accepted = _FLOATS if x.dtype is torch.float64 else _FLOATS[1:]
    for tensor in (x, *others):
        if tensor is not None and not (
            type(tensor) in _TENSORS and tensor.dtype in accepted and tensor.is_cpu
        ):
            return "reference"
    return "aten"


def _is_transformed() -> bool:
    """Whether torch.func transforms or forward-mode derivatives are under way."""
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )

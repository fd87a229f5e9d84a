"""Freeze a network or a part of it, running statistics included."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from .modules import SwitchNormBase


def freeze(model: nn.Module) -> nn.Module:
    """Stop all learning in `model`, in place; return it. For a part: `sn.freeze(model.layer1)`.

    No parameter requires a gradient, and every layer with running statistics or control parameters
    (ours and torch's) stays in evaluation mode, whatever `train()` is called afterwards: neither
    statistics nor the choices of sparse layers move, and `sn.batch_average` leaves them alone.
    Others, such as dropout, follow `train()`. `unfreeze` undoes it.
    """
    model.requires_grad_(False)
    for layer in _layers(model):
        layer.train = partial(_stay_in_evaluation, layer)  # survives copies and pickling
        layer.train()
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Let all of `model` learn again; return it. Layers are in evaluation until `train()`."""
    model.requires_grad_(True)
    for layer in _layers(model):
        layer.__dict__.pop("train", None)
    return model


def is_frozen(layer: nn.Module) -> bool:
    """Whether `freeze` has reached `layer`."""
    return getattr(vars(layer).get("train"), "func", None) is _stay_in_evaluation


def _layers(model: nn.Module) -> list[nn.Module]:
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, SwitchNormBase) or getattr(layer, "running_mean", None) is not None
    ]


def _stay_in_evaluation(layer: nn.Module, mode: bool = True) -> nn.Module:
    """`layer.train(mode)` of a frozen layer; children (an activation) stay in evaluation too."""
    return type(layer).train(layer, False)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` back into its mode at the end, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

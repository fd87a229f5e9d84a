"""Replace every batch norm of any network by another norm."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .hooks import connect
from .modules import SwitchNormBase
from .norms import FrozenBatchNorm, NoNorm, _options, make_norm
from .running import RunningNorm

_DIMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision's, timm's, Detectron2's
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_EXACT = (_BatchNorm, RunningNorm, FrozenBatchNorm)  # their evaluation is batch norm's


class NormAct(nn.Module):
    """A norm with the dropout and activation of the fused layer it stands for (timm's)."""

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module):
        super().__init__()
        self.norm, self.drop, self.act = norm, drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.norm(x)))


def convert(
    model: nn.Module,
    norm: str | Callable[[int], nn.Module] = "sn",
    *,
    keep_outputs: bool = False,
    gate_start: float = 8.0,
    dim: int = 2,
    **options,
) -> nn.Module:
    """Return `model` with `norm` in place of every batch norm, in place below the top.

    Batch norm is torch's BatchNorm1d, 2d, 3d and SyncBatchNorm, our own, timm's fused
    BatchNormAct2d (dropout and activation stay) and its synchronised form, and FrozenBatchNorm2d,
    whose replacement learns. `norm` and `options` are those of `make_norm`, or a callable; eps and
    momentum are the replaced layer's unless given. Gain and shift, a missing one included, device,
    dtype, mode, requires_grad and forward and backward hooks are kept wherever the new norm has
    them; an optimizer needs the new parameters.

    Args:
        keep_outputs: also keep the running statistics, and start switchable layers with bn's
            control parameters at `gate_start` and the others at 0, so that outputs in evaluation
            stay as they were. False starts as the paper: equal control parameters, fresh
            statistics.
        gate_start: 5, 8, 13 leave the others a share of 1.3e-2, 6.7e-4 and 4.5e-6; their control
            parameters' gradients shrink alike, so that from 13 they hardly move. Through
            ResNet-50's 53 layers (random weights) that is 17 %, 1.2 % and 8e-5 of the logits'
            deviation.
        dim: spatial dimensions of layers that do not tell theirs (SyncBatchNorm).

    Raises ValueError, with `model` unchanged, if keep_outputs cannot hold for the norm, or for a
    batch norm that is still lazy or of an unknown class. Warns if there is no batch norm.
    """
    new = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) or type(layer).__name__ in _FROZEN:
            new[layer] = _replacement(name, layer, norm, keep_outputs, gate_start, dim, options)
    if not new:
        warnings.warn(
            f"sn.convert: {type(model).__name__} has no batch norm, nothing was converted; it "
            "looks for BatchNorm1d, 2d, 3d, SyncBatchNorm, FrozenBatchNorm2d, timm's and our own",
            stacklevel=2,
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    model = new.get(model, model)
    if any(isinstance(layer, NoNorm) for layer in model.modules()):
        for layer in model.modules():  # without a norm before it, it would overwrite its input's
            if getattr(layer, "inplace", False) is True:
                layer.inplace = False
    return connect(model)


def _replacement(name, layer, norm, keep_outputs, gate_start, dim, options) -> nn.Module:
    where = f"{name or 'the model'} ({type(layer).__name__})"
    fused = hasattr(layer, "act") or hasattr(layer, "drop")
    known = ("torch.nn.", "torchvision.", "timm.layers.", "sn.")
    if isinstance(layer, _BatchNorm) and not type(layer).__module__.startswith(known):
        if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise ValueError(f"{where} has a forward of its own; replace it by hand first")
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{where} is lazy; run the model once before converting it")
    tensors = [t for t in (layer.running_mean, layer.weight) if t is not None]
    features = tensors[0].shape[0] if tensors else layer.num_features
    if isinstance(norm, str):
        dim = next((d for kind, d in _DIMS.items() if isinstance(layer, kind)), dim)
        build = make_norm(norm, dim=dim, **options)
        inherited = {"affine": layer.weight is not None, "eps": layer.eps}
        inherited["bias"] = layer.bias is not None
        if not issubclass(build.func, nn.modules.instancenorm._InstanceNorm):
            inherited["track_running_stats"] = layer.running_mean is not None
        if hasattr(layer, "momentum"):
            inherited["momentum"] = layer.momentum
        known = set(_options(build.func)) - set(options)
        twin = build(features, **{k: v for k, v in inherited.items() if k in known})
    else:
        if options:
            raise TypeError(f"options {sorted(options)} are those of a norm given by its name")
        twin = norm(features)
    without_bias = layer.weight is not None and layer.bias is None
    if without_bias and isinstance(getattr(twin, "bias", None), nn.Parameter):
        twin.bias = None  # torch's norms have the argument only since 2.12
    if tensors:
        twin.to(tensors[0].device, tensors[0].dtype)
    if keep_outputs:
        _check_keeps(where, layer, twin)
    with torch.no_grad():
        for key in ("weight", "bias"):
            old, value = getattr(layer, key), getattr(twin, key, None)
            if old is not None and value is not None:
                value.copy_(old)
                if isinstance(old, nn.Parameter) and isinstance(value, nn.Parameter):
                    value.requires_grad_(old.requires_grad)
        if keep_outputs and layer.running_mean is not None:
            twin.running_mean.copy_(layer.running_mean)
            twin.running_var.copy_(layer.running_var)
            if hasattr(twin, "num_batches_tracked"):  # frozen layers do not count
                twin.num_batches_tracked.copy_(getattr(layer, "num_batches_tracked", 1))
        if keep_outputs and isinstance(twin, SwitchNormBase):
            for control in (twin.mean_weight, twin.var_weight):
                control.zero_()
                control[twin.statistics.index("bn")] = gate_start
    act, drop = getattr(layer, "act", nn.Identity()), getattr(layer, "drop", nn.Identity())
    if fused and not (isinstance(act, nn.Identity) and isinstance(drop, nn.Identity)):
        twin = NormAct(twin, drop, copy.copy(act))
    for hooks in _HOOKS:  # the dictionaries themselves: handles stay valid
        setattr(twin, hooks, getattr(layer, hooks))
    return twin.train(layer.training)


def _check_keeps(where: str, layer: nn.Module, twin: nn.Module) -> None:
    switchable = isinstance(twin, SwitchNormBase) and "bn" in twin.statistics
    if not switchable and not isinstance(twin, _EXACT):
        raise ValueError(
            f"keep_outputs: {type(twin).__name__} has no batch statistics to keep from {where}; "
            "take sn with bn among its statistics, ssn, sync_sn, bn, brn, bkn, frozen_bn or sync_bn"
        )
    if (layer.running_mean is None) != (twin.running_mean is None) or twin.eps != layer.eps:
        raise ValueError(f"keep_outputs: eps or running statistics of {where} would change")
    if (layer.weight is None) != (twin.weight is None) and not isinstance(twin, FrozenBatchNorm):
        raise ValueError(f"keep_outputs: {where} and the new norm differ in affine")

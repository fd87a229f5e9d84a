"""Replace every batch norm of any network by another norm."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .freezing import freeze, is_frozen
from .hooks import connect
from .modules import SwitchNormBase
from .norms import NORMS, FrozenBatchNorm, NoNorm, _options, make_norm
from .running import RunningNorm
from .variants.sparse import SparseSwitchNormBase

_DIMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
# ours; torchvision's, Detectron2's; timm's
_FROZEN = ("FrozenBatchNorm", "FrozenBatchNorm2d", "FrozenBatchNormAct2d")
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
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_OWN = {"num_features", "eps", "momentum", "affine", "track_running_stats"}  # of batch norm
_OWN |= {"num_batches_tracked", "process_group", "virtual_gpus", *_TENSORS}
_KNOWN = ("torch.nn.", "torchvision.", "timm.layers.", "sn.")  # their forwards are batch norm's
_NORMS = {kind for kinds, _ in NORMS.values() for kind in kinds.values()}
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

    Batch norm is torch's BatchNorm1d, 2d, 3d and SyncBatchNorm, our GhostBatchNorm, timm's fused
    BatchNormAct2d (dropout and activation stay) and its synchronised form, and the frozen ones,
    FrozenBatchNorm2d and ours, whose replacement learns; not BRN and BKN. `norm` and `options` are
    those of `make_norm`, or a callable; eps, momentum, process group and virtual GPUs are the
    replaced layer's unless given (a callable that is none of our classes and not from `make_norm`
    gets the number of channels alone). Gain and shift stay the same parameters, ties and an
    optimizer's reference included; a missing one, device, dtype, mode, `freeze`, forward and
    backward hooks and what a user has set on the layer are kept wherever the new norm has their
    like. Control parameters are new to an optimizer; they do not learn if the layer's gain does
    not.

    Args:
        keep_outputs: also keep the running statistics, and start switchable layers with bn's
            control parameters at `gate_start` and the others at 0, so that outputs in evaluation
            stay as they were. False starts as the paper: equal control parameters, fresh
            statistics.
        gate_start: 5, 8, 13 leave the others a share of 1.3e-2, 6.7e-4 and 4.5e-6; their control
            parameters' gradients shrink alike, so that from 13 they hardly move. Sparse layers
            start at the same shares with gradients that do not shrink: from 8 many choose bn in
            the first tens of steps and keep it (take 2), from 14.6 on they are bn alone. Through
            ResNet-50's 53 layers (random weights) that is 17 %, 1.2 % and 8e-5 of the logits'
            deviation.
        dim: spatial dimensions of layers that do not tell theirs (SyncBatchNorm).

    Raises TypeError for a `model` that is no module or a `norm` that is one, ValueError, with
    `model` unchanged, if keep_outputs cannot hold for the norm, for a gate_start without it or out
    of 0 to 100, and for a batch norm that is lazy, of an unknown class, scripted, of a model in
    DistributedDataParallel or FSDP (convert before), or with what would be lost: a parametrised,
    normalised or pruned gain, further parameters, hooks of its state dict. Warns if there is no
    batch norm.
    """
    if not isinstance(model, nn.Module):
        got = getattr(model, "__name__", repr(model))
        raise TypeError(f"sn.convert got {got} ({type(model).__name__}); expected an nn.Module")
    if isinstance(norm, nn.Module):
        raise TypeError(
            f"norm is a layer, {type(norm).__name__}; give its class, a name or make_norm(...)"
        )
    if not 0 <= gate_start <= 100:
        raise ValueError(f"gate_start={gate_start}; expected a number, 0 to 100")
    if gate_start != 8.0 and not keep_outputs:
        raise ValueError(
            f"gate_start={gate_start} is for keep_outputs=True; add that, or leave gate_start out"
        )
    if isinstance(norm, str):
        make_norm(norm, dim=dim, **options)  # a wrong name ends here, batch norm or none
    new = {}
    for name, layer in model.named_modules():
        if _is_batch_norm(layer):
            new[layer] = _replacement(name, layer, norm, keep_outputs, gate_start, dim, options)
        _check_wrapper(layer)
    if not new:
        warnings.warn(
            f"sn.convert: {type(model).__name__} has no batch norm, nothing was converted; it "
            "looks for BatchNorm1d, 2d, 3d, SyncBatchNorm, FrozenBatchNorm2d, timm's and ours",
            stacklevel=2,
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
        _replace_in_lists(parent, new)
    model = new.get(model, model)
    if any(isinstance(layer, NoNorm) for layer in model.modules()):
        for layer in model.modules():  # without a norm before it, it would overwrite its input's
            if getattr(layer, "inplace", False) is True:
                layer.inplace = False
    return connect(model)


def _replace_in_lists(parent: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Replace what `parent` holds a second time, in lists, tuples and dictionaries of its own."""

    known: dict[int, tuple[Any, Any]] = {}  # by id: what is held, and what comes in its place

    def of(item: Any) -> Any:
        if isinstance(item, nn.Module):
            return new.get(item, item)
        if not isinstance(item, list | tuple | dict):
            return item
        if id(item) not in known:
            known[id(item)] = (item, item)  # for what holds itself
            known[id(item)] = (item, replaced(item))
        return known[id(item)][1]

    def replaced(item: Any) -> Any:
        inside = list(item.values() if isinstance(item, dict) else item)
        found = list(map(of, inside))
        if all(one is other for one, other in zip(found, inside)):
            return item
        if isinstance(item, dict):
            for key, value in zip(list(item), found):
                item[key] = value
        elif isinstance(item, list):
            item[:] = found
        else:
            own = tuple.__new__(type(item), found)  # a named tuple too
            if hasattr(item, "__dict__"):
                vars(own).update(vars(item))
            return own
        return item

    for key, value in vars(parent).items():
        if key not in ("_modules", "_parameters", "_buffers"):
            if (own := of(value)) is not value:
                vars(parent)[key] = own


def _is_batch_norm(layer: nn.Module) -> bool:
    frozen = any(kind.__name__ in _FROZEN for kind in type(layer).__mro__)
    return isinstance(layer, _BatchNorm) or frozen


def _check_wrapper(layer: nn.Module) -> None:
    """Raise ValueError for batch norm in a wrapper that would not know of the new parameters."""
    if isinstance(layer, torch.jit.ScriptModule):
        if str(getattr(layer, "original_name", "")).startswith("BatchNorm"):
            raise ValueError("the model is compiled by torch.jit; convert it before")
    wraps = isinstance(layer, DistributedDataParallel)
    if wraps or type(layer).__name__ == "FullyShardedDataParallel":
        if any(_is_batch_norm(inner) for inner in layer.modules()):
            raise ValueError(f"the model is in {type(layer).__name__}; convert it before")


def _check_layer(where: str, layer: nn.Module) -> None:
    """Raise ValueError for a batch norm that no other norm can stand for."""
    owner = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    known = owner.__module__.startswith(_KNOWN) or owner.__name__ in _FROZEN
    if "forward" in vars(layer) or not known:
        raise ValueError(f"{where} has a forward of its own; replace it by hand first")
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{where} is lazy; run the model once before converting it")
    tensors = layer._parameters | layer._buffers
    for key in _TENSORS:
        if getattr(layer, key, None) is not None and key not in tensors:
            raise ValueError(
                f"the {key} of {where} is computed from other tensors (a parametrization, weight "
                "norm, pruning), which would be lost; remove that before converting "
                "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
                "prune.remove) and add it to the new layer"
            )
    if any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        raise ValueError(f"{where} is sharded; convert the model before FSDP")
    further = sorted({k for k, p in layer._parameters.items() if p is not None} - {*_TENSORS})
    further += sorted(layer._modules.keys() - {"act", "drop"})
    if further:
        raise ValueError(
            f"{where} has {', '.join(further)}, which the new norm would lose; replace it by hand"
        )
    kinds = ("_state_dict_hooks", "_state_dict_pre_hooks")
    kinds += ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    if any(getattr(layer, kind) for kind in kinds):
        raise ValueError(
            f"{where} has hooks of its state dict; remove them before converting and register them "
            "with the new layer"
        )


def _replacement(name, layer, norm, keep_outputs, gate_start, dim, options) -> nn.Module:
    where = f"{name or 'the model'} ({type(layer).__name__})"
    _check_layer(where, layer)
    twin = _new_layer(layer, norm, dim, options)
    if keep_outputs:
        _check_keeps(where, layer, twin)
    if isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad:
        twin.requires_grad_(False)
    with torch.no_grad():
        _take_gain_and_shift(layer, twin)
        if keep_outputs:
            _take_statistics(layer, twin, gate_start)
    act, drop = getattr(layer, "act", nn.Identity()), getattr(layer, "drop", nn.Identity())
    if not (isinstance(act, nn.Identity) and isinstance(drop, nn.Identity)):
        twin = NormAct(twin, drop, copy.copy(act))
    for hooks in _HOOKS:  # the dictionaries themselves: handles stay valid
        setattr(twin, hooks, getattr(layer, hooks))
    _keep_what_users_set(layer, twin)
    if is_frozen(layer):
        freeze(twin)
    return twin.train(layer.training)


def _new_layer(layer: nn.Module, norm, dim: int, options: dict) -> nn.Module:
    """A fresh `norm` that fits in the place of `layer`, on its device."""
    tensors = [t for t in (layer.running_mean, layer.weight) if t is not None]
    features = tensors[0].shape[0] if tensors else layer.num_features
    dim = next((d for kind, d in _DIMS.items() if isinstance(layer, kind)), dim)
    build = make_norm(norm, dim=dim, **options) if isinstance(norm, str) else norm
    if not isinstance(norm, str) and options:
        raise TypeError(f"options {sorted(options)} are those of a norm given by its name")
    if isinstance(build, type):
        build = partial(build)
    if isinstance(build, partial) and build.func in _NORMS:
        given = options if isinstance(norm, str) else build.keywords
        known = set(_options(build.func)) - set(given)
        inherited = _inherited(layer, build.func)
        twin = build(features, **{k: v for k, v in inherited.items() if k in known})
        if "virtual_gpus" not in given and hasattr(twin, "virtual_gpus"):
            twin.virtual_gpus = getattr(layer, "virtual_gpus", twin.virtual_gpus)
    else:
        twin = build(features)
    without_bias = layer.weight is not None and layer.bias is None
    if without_bias and isinstance(getattr(twin, "bias", None), nn.Parameter):
        twin.bias = None  # torch's norms have the argument only since 2.12
    if tensors:
        twin.to(tensors[0].device, tensors[0].dtype)
    return twin


def _inherited(layer: nn.Module, kind: type[nn.Module]) -> dict:
    """The arguments that a norm of this kind takes over from `layer`, where it knows them."""
    affine, bias = layer.weight is not None, layer.bias is not None
    inherited = {"affine": affine, "bias": bias, "eps": layer.eps}
    for key in ("momentum", "process_group"):
        if hasattr(layer, key):
            inherited[key] = getattr(layer, key)
    if not issubclass(kind, nn.modules.instancenorm._InstanceNorm):
        inherited["track_running_stats"] = layer.running_mean is not None
    return inherited


def _take_gain_and_shift(layer: nn.Module, twin: nn.Module) -> None:
    """Give `twin` the gain and shift of `layer`: the parameters themselves where both have them."""
    for key in ("weight", "bias"):
        old, value = getattr(layer, key), getattr(twin, key, None)
        if old is None or value is None:
            continue
        both = isinstance(old, nn.Parameter) and isinstance(value, nn.Parameter)
        if both and old.shape == value.shape:
            setattr(twin, key, old)
        else:
            value.copy_(old)


def _take_statistics(layer: nn.Module, twin: nn.Module, gate_start: float) -> None:
    """Let `twin` evaluate as `layer`: its running statistics, switchable layers by bn's."""
    if layer.running_mean is not None:
        twin.running_mean.copy_(layer.running_mean)
        twin.running_var.copy_(layer.running_var)
        if hasattr(twin, "num_batches_tracked"):  # frozen layers do not count
            count = getattr(layer, "num_batches_tracked", None)
            twin.num_batches_tracked.copy_(torch.ones(()) if count is None else count)
    if isinstance(twin, SwitchNormBase):
        start = torch.zeros(len(twin.statistics), dtype=torch.double)
        start[twin.statistics.index("bn")] = gate_start
        if isinstance(twin, SparseSwitchNormBase):  # sparsestmax of a point of the simplex is it
            start = start.softmax(0)
        twin.mean_weight.copy_(start)
        twin.var_weight.copy_(start)


def _keep_what_users_set(layer: nn.Module, twin: nn.Module) -> None:
    """Give `twin` the buffers and attributes that `layer` has beyond those of batch norm."""
    for key, buffer in layer._buffers.items():
        if key not in _OWN and not hasattr(twin, key):
            persistent = key not in layer._non_persistent_buffers_set
            twin.register_buffer(key, buffer, persistent=persistent)
    for key, value in vars(layer).items():
        if not key.startswith("_") and key not in _OWN and not hasattr(twin, key):
            setattr(twin, key, value)


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

"""Switchable Normalization layers, in the convention of torch.nn.BatchNorm."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from .functional import (
    canonical_statistics,
    check_channels,
    check_num_groups,
    check_virtual_gpus,
    groups_of_vector,
)
from .kernels import Options, formula, switch_norm_act
from .running import CountsBatches, count_batch, warn_of_update_bn
from .tracing import Proxy, Traceable

# functions' names
_FUSES = re.compile(r"(^|_)fuse(_|$)|^reparam|(^|_)merge_(\w+_)?(bn|norm)(_|$)")


class SwitchNormBase(Traceable, CountsBatches):
    """What all switchable normalisation layers share; use SwitchNorm1d, 2d, 3d or Recurrent.

    Parameters `weight`, `bias` (C,) are the gain and shift; `mean_weight`, `var_weight` (K,) the
    control parameters, one per statistic in the order in, ln, gn, bn. All start at 1 (bias at 0),
    so that the importance weights start equal. Source: section 2.2; official code.

    Buffers `running_mean`, `running_var` (C,) and `num_batches_tracked` exist only with bn. The
    running variance is stored biased. Differs: torch's BatchNorm stores the unbiased one.
    `unbiased` reproduces the official code's variances, by the plain formula; see `switch_norm`.

    Tools that know batch norm by its class pass over these layers. Call `sn.batch_average` instead
    of `torch.optim.swa_utils.update_bn`, `sn.freeze` instead of timm's freeze, `sn.fold` to fuse
    layers into convolutions. Under activation checkpointing the running statistics are updated
    twice a step, as batch norm's.
    """

    input_dims: tuple[int, ...]
    input_shape: str
    default_statistics: tuple[str, ...] = ("in", "ln", "bn")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        statistics: Sequence[str] | None = None,
        num_groups: int | None = None,
        virtual_gpus: int = 1,
        unbiased: bool = False,
    ):
        super().__init__()
        self.unbiased = unbiased
        check_virtual_gpus(virtual_gpus)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.statistics = canonical_statistics(
            self.default_statistics if statistics is None else statistics
        )
        self.num_groups = num_groups
        self.virtual_gpus = int(virtual_gpus)
        self.track_running_stats = track_running_stats and "bn" in self.statistics
        if "gn" in self.statistics:
            check_num_groups(num_groups, num_features)
            self.num_groups = int(num_groups)  # type: ignore[arg-type]
        elif num_groups is not None:
            raise ValueError(
                f"num_groups={num_groups} needs 'gn' in statistics, got {self.statistics}"
            )

        factory = {"device": device, "dtype": dtype}
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            value = nn.Parameter(torch.empty(num_features, **factory)) if wanted else None
            self.register_parameter(name, value)
        self.mean_weight = nn.Parameter(torch.empty(len(self.statistics), **factory))
        self.var_weight = nn.Parameter(torch.empty(len(self.statistics), **factory))
        buffers = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
        if self.track_running_stats:
            buffers["running_mean"] = torch.zeros(num_features, **factory)
            buffers["running_var"] = torch.ones(num_features, **factory)
            buffers["num_batches_tracked"] = torch.tensor(0, dtype=torch.long, device=device)
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._register_own(factory)
        self.reset_parameters()

    def _register_own(self, factory: dict) -> None:
        """What a subclass has beside these parameters and buffers."""

    def reset_running_stats(self) -> None:
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def eps(self) -> float:
        """Raises ValueError in functions that fuse any layer into convolutions as if it were bn.

        Such as torch's `fuse_conv_bn_eval` and the `fuse` of timm's networks: by their names.
        """
        caller = sys._getframe(1)
        name, module = caller.f_code.co_name, caller.f_globals.get("__name__", "")
        if _FUSES.search(name) and not module.startswith(__package__ + "."):
            raise ValueError(
                f"{name} of {module} takes {type(self).__name__} for batch norm, "
                "which it is not in evaluation; sn.fold(model) fuses the layers that can"
            )
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = value

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # beside the version that nn.Module keeps there
            destination._metadata[prefix[:-1]]["statistics"] = self.statistics

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        saved = tuple(local_metadata.get("statistics", self.statistics))
        if saved != self.statistics:
            errors.append(
                f"the control parameters {prefix}mean_weight and var_weight are of the statistics "
                f"{saved}, those of this layer are of {self.statistics}; build it with "
                f"statistics={saved}"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.as_node(input) if isinstance(input, Proxy) else self._normalize(input)

    def _normalize(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        self._check_input(x)
        counter, momentum = None, 0.0
        if self.training and self.track_running_stats and x.numel() > 0:
            if not torch.is_grad_enabled():
                warn_of_update_bn(self)
            if self.unbiased or self.momentum is None:
                momentum = count_batch(self)
            else:
                counter, momentum = self.num_batches_tracked, self.momentum
        tensors = (
            x,
            *self._logits(),
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
        )
        options = Options(
            self.statistics,
            self.num_groups,
            self.training,
            momentum,
            self._eps,
            self.virtual_gpus,
        )
        if not self.unbiased:
            return switch_norm_act(tensors, options, residual, relu, counter)
        y = formula(tensors, options, unbiased=True)
        y = y if residual is None else y + residual
        return y.relu_() if relu else y

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Numbers whose softmax are the importance weights, of means and of variances."""
        return self.mean_weight, self.var_weight

    def importance(self) -> tuple[Tensor, Tensor]:
        """The importance weights of means and of variances, in the order of `statistics`."""
        return self.mean_weight.float().softmax(0), self.var_weight.float().softmax(0)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in self.input_dims:
            raise ValueError(
                f"{type(self).__name__} expects input of shape {self.input_shape}, "
                f"got {x.dim()}-D input of shape {tuple(x.shape)}"
            )
        check_channels(type(self).__name__, x, self.num_features)
        if self.training and "bn" in self.statistics:
            check_virtual_gpus(self.virtual_gpus, x.shape[0])

    def extra_repr(self) -> str:
        options = [f"{self.num_features}", f"eps={self.eps}", f"statistics={self.statistics}"]
        if self.num_groups is not None:
            options.append(f"num_groups={self.num_groups}")
        if "bn" in self.statistics:
            options.append(f"momentum={self.momentum}")
            if not self.track_running_stats:
                options.append("track_running_stats=False")
        if not self.affine:
            options.append("affine=False")
        elif self.bias is None:
            options.append("bias=False")
        if self.unbiased:
            options.append("unbiased=True")
        if self.virtual_gpus != 1:
            options.append(f"virtual_gpus={self.virtual_gpus}")
        return ", ".join(options)


class SwitchNorm1d(SwitchNormBase):
    """Switchable Normalization of (N, C) vectors or (N, C, L) sequences.

    The default statistics are ln and bn: on (N, C) an instance is one value, its own mean, with
    variance 0. For sequences pass `statistics=("in", "ln", "bn")`. See `switch_norm`.
    """

    input_dims = (2, 3)
    input_shape = "(N, C) or (N, C, L)"
    default_statistics = ("ln", "bn")


class SwitchNorm2d(SwitchNormBase):
    """Switchable Normalization of (N, C, H, W) maps; drop-in for nn.BatchNorm2d.

    `statistics` is any non-empty subset of in, ln, gn, bn; the paper's (8,1) setting is
    ("in", "ln"). `momentum` is the share of the new batch. See `switch_norm`.
    """

    input_dims = (4,)
    input_shape = "(N, C, H, W)"


class SwitchNormAct2d(SwitchNorm2d):
    """Switchable Normalization of (N, C, H, W) maps, an optional residual and the activation.

    y = act(sn(x) + residual), in the convention of timm's BatchNormAct2d; its `drop_layer` acts
    before the activation. Normalization, sum and ReLU are one pass where there are kernels (the
    CPU's compiled ones, Triton's); what ReLU needs in the backward pass is recomputed from x, or
    taken from y after a sum. Other activations follow the layer.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: str | Callable[..., nn.Module] | None = nn.ReLU,
        act_kwargs: dict | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        statistics: Sequence[str] | None = None,
        num_groups: int | None = None,
        virtual_gpus: int = 1,
        unbiased: bool = False,
    ):
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            statistics=statistics,
            num_groups=num_groups,
            virtual_gpus=virtual_gpus,
            unbiased=unbiased,
        )
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = nn.Identity()
        if apply_act and act_layer is not None:
            if isinstance(act_layer, str):
                act_layer = _activation(act_layer)
            options = dict(act_kwargs or {})
            if inplace and "inplace" in inspect.signature(act_layer).parameters:
                options.setdefault("inplace", True)
            self.act = act_layer(**options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(x, Proxy) or isinstance(residual, Proxy):
            return self.as_node(x) if residual is None else self.as_node(x, residual)
        if type(self.drop) is nn.Identity and not _has_hooks(self.drop):
            relu = type(self.act) is nn.ReLU and not _has_hooks(self.act)
            y = self._normalize(x, residual, relu)
            return y if relu else self.act(y)
        y = self.drop(self._normalize(x))
        return self.act(y if residual is None else y + residual)


def _activation(name: str) -> type[nn.Module]:
    """torch's activation by timm's name for it, such as relu, leaky_relu, swish."""
    module = nn.modules.activation
    known = {kind.lower(): getattr(module, kind) for kind in module.__all__}
    known |= {"swish": nn.SiLU, "hardswish": nn.Hardswish}
    plain = name.lower().replace("_", "")
    if plain not in known:
        raise ValueError(f"unknown act_layer={name!r}; give the class, or one of {sorted(known)}")
    return known[plain]


def _has_hooks(layer: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what passes through `layer`."""
    forward = layer._forward_hooks or layer._forward_pre_hooks
    return bool(forward or layer._backward_hooks or layer._backward_pre_hooks)


class SwitchNorm3d(SwitchNormBase):
    """Switchable Normalization of (N, C, D, H, W) volumes; see `switch_norm`."""

    input_dims = (5,)
    input_shape = "(N, C, D, H, W)"


class SwitchNormRecurrent(SwitchNormBase):
    """LN + GN for the vectors (B, D) of a recurrent network; B may be 1.

    No batch statistics, so training and evaluation are the same function. `num_groups`, for gn,
    must divide D; None is the most up to 8 that have a multiple of 4 entries each. Source: section
    4.4 (the ENAS controller).

    Raises ValueError for groups that do not divide or are not used, and for another statistic.
    """

    input_dims = (2,)
    input_shape = "(B, D)"

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        statistics: Sequence[str] = ("ln", "gn"),
    ):
        foreign = [s for s in canonical_statistics(statistics) if s not in ("ln", "gn")]
        if foreign:
            raise ValueError(
                f"SwitchNormRecurrent has no {foreign[0]!r} statistic; "
                f"choose a non-empty subset of ('ln', 'gn')"
            )
        if num_groups is None and "gn" in statistics:
            num_groups = groups_of_vector(num_features)
        super().__init__(
            num_features,
            eps,
            affine=affine,
            device=device,
            dtype=dtype,
            bias=bias,
            statistics=statistics,
            num_groups=num_groups,
        )


@torch.no_grad()
def importance_weights(model: nn.Module) -> dict[str, dict[str, dict[str, float]]]:
    """Return the importance weights of every switchable layer by its name.

    {"layer1.0.bn1": {"mean": {"in": 0.2, "ln": 0.5, "bn": 0.3}, "var": {...}}, ...} in network
    order; empty if `model` has no such layer. A layer that is itself the model has the name "".
    Names are those of the network without wrappers (`named_layers`). With sharded parameters
    (FSDP2) every rank must call.
    """
    weights = {}
    for name, layer in named_layers(model):
        if isinstance(layer, SwitchNormBase):
            weights[name] = {
                key: dict(zip(layer.statistics, whole(ratios).tolist()))
                for key, ratios in zip(("mean", "var"), layer.importance())
            }
    return weights


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` under the names that the network has by itself.

    Without what torch.compile, DataParallel, DistributedDataParallel, AveragedModel, FSDP and
    checkpoint_wrapper put in front.
    """
    names = {}  # with wrappers -> without
    for name, layer in model.named_modules():
        parent, _, child = name.rpartition(".")
        wrapped = name and isinstance(model.get_submodule(parent), _WRAPPERS)
        if child in _WRAPPED or wrapped and child == "module":
            names[name] = names[parent]
        else:
            names[name] = ".".join(part for part in (names.get(parent), child) if part)
        yield names[name], layer


def set_virtual_gpus(model: nn.Module, virtual_gpus: int) -> None:
    """Let every batch-dependent layer treat a training batch as `virtual_gpus` groups.

    It has no effect on synchronised switchable layers. Raises ValueError if a layer that is not
    frozen cannot, such as a plain nn.BatchNorm2d.
    """
    check_virtual_gpus(virtual_gpus)
    layers = [m for m in model.modules() if hasattr(m, "virtual_gpus")]
    foreign = layers_without_groups(model)
    if foreign and virtual_gpus > 1:
        raise ValueError(
            f"{foreign[0]!r} takes batch statistics but does not know virtual GPUs; "
            "build the model with norm_layer=sn.make_norm('bn'), or accumulate micro-batches"
        )
    for layer in layers:
        layer.virtual_gpus = int(virtual_gpus)


def layers_without_groups(model: nn.Module) -> list[str]:
    """Names of the layers that train on batch statistics, but do not know virtual GPUs."""
    from .freezing import is_frozen  # which needs this module

    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        and not (hasattr(layer, "virtual_gpus") or is_frozen(layer))
    ]


def gates(model: nn.Module) -> list[nn.Parameter]:
    """Return the control parameters of all switchable layers that are trained.

    Of parametrised or pruned ones the parameters behind them; a shared one once.
    """
    found = [
        parameter
        for layer in model.modules()
        if isinstance(layer, SwitchNormBase)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and ("mean_weight" in name or "var_weight" in name)
    ]
    return list(dict.fromkeys(found))


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    gate_lr_factor: float = 1.0,
    gate_weight_decay: float | None = None,
) -> list[dict]:
    """Return optimiser groups in which the control parameters may have their own lr and decay.

    The defaults give one group with decay on everything, as the paper trained. Otherwise the
    control parameters form a second group with `lr * gate_lr_factor` and `gate_weight_decay`
    (None: the same as the rest). Source: official code (one group); SSN uses lr / 10 and decay 0.

    Raises ValueError for numbers below 0.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if gate_weight_decay is None:
        gate_weight_decay = weight_decay
    numbers = {"lr": lr, "weight_decay": weight_decay}
    numbers |= {"gate_lr_factor": gate_lr_factor, "gate_weight_decay": gate_weight_decay}
    for name, value in numbers.items():
        if value is None or not value >= 0:
            raise ValueError(f"{name}={value}; expected 0 or more")
    common = {"params": trainable, "lr": lr, "weight_decay": weight_decay, "lr_factor": 1.0}
    if gate_lr_factor == 1.0 and gate_weight_decay == weight_decay:
        return [common]
    own = gates(model)
    if not own:
        return [common]
    ids = {id(parameter) for parameter in own}
    common["params"] = [p for p in trainable if id(p) not in ids]
    return [
        common,
        {
            "params": own,
            "lr": lr * gate_lr_factor,
            "weight_decay": gate_weight_decay,
            "lr_factor": gate_lr_factor,
        },
    ]

"""Every normaliser of the comparison as a callable(num_features) -> Module."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import (
    canonical_statistics,
    check_channels,
    check_num_groups,
    check_virtual_gpus,
)
from .kernels import batch_norm, evaluated_with
from .kernels.common import is_transformed
from .modules import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from .running import count_batch, like_in_memory
from .tracing import Proxy, Traceable
from .variants.batch_kalman import BatchKalmanNorm1d, BatchKalmanNorm2d, BatchKalmanNorm3d
from .variants.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .variants.sparse import SparseSwitchNorm1d, SparseSwitchNorm2d, SparseSwitchNorm3d
from .variants.sync import SyncSwitchNorm1d, SyncSwitchNorm2d, SyncSwitchNorm3d


class _VirtualGPUs(Traceable):
    """Batch normalisation that may treat a training batch as groups, one per virtual GPU.

    Also known as ghost batch normalisation (Hoffer et al. 2017).
    """

    virtual_gpus = 1

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, *spatial); with virtual_gpus > 1 each group of N / G samples by itself.

        The running statistics get one update per call, with the mean of the groups' means and
        (unbiased, as torch stores them) variances.
        """
        x = input
        if isinstance(x, Proxy):
            return self.as_node(x)
        groups = self.virtual_gpus
        if not self.training and self.running_mean is not None:
            self._check_input_dim(x)
            running = evaluated_with(self.running_mean, self.running_var)
            return F.batch_norm(
                x, *running, self.weight, self.bias, False, self.momentum or 0.0, self.eps
            )
        if groups == 1 or not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        check_virtual_gpus(groups, x.shape[0])
        check_channels(type(self).__name__, x, self.num_features)
        found = batch_norm(x, self.weight, self.bias, self.eps, groups)
        if found is not None:
            if self.track_running_stats:
                self._update_running_stats(*found[1:])
            return found[0]
        # (G n, C, ...) -> (n, G C, ...): to torch's batch norm a group's channels are channels
        merged = x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
        dtype = self._statistics_dtype(x)
        if is_transformed():  # under vmap torch's batch norm takes no fresh statistics
            dims = (0, *range(2, merged.dim()))
            var, mean = torch.var_mean(merged.detach().to(dtype), dims)
            running = (None, None)
        else:
            mean = torch.zeros(merged.shape[1], device=x.device, dtype=dtype)
            var = torch.ones_like(mean)
            running = (mean, var)
        weight, bias = self.weight, self.bias
        weight = None if weight is None else weight.repeat(groups)
        bias = None if bias is None else bias.repeat(groups)
        y = F.batch_norm(merged, *running, weight, bias, True, 1.0, self.eps).to(x.dtype)
        if self.track_running_stats:
            self._update_running_stats(mean.view(groups, -1).mean(0), var.view(groups, -1).mean(0))
        y = y.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
        return like_in_memory(y, x)

    def _statistics_dtype(self, x: Tensor) -> torch.dtype:
        reference = self.weight if self.running_mean is None else self.running_mean
        return x.dtype if reference is None else reference.dtype

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, var: Tensor) -> None:
        momentum, dtype = count_batch(self), self.running_mean.dtype
        self.running_mean.lerp_(mean.to(dtype), momentum)
        self.running_var.lerp_(var.to(dtype), momentum)

    def extra_repr(self) -> str:
        groups = f", virtual_gpus={self.virtual_gpus}" if self.virtual_gpus != 1 else ""
        return super().extra_repr() + groups


class GhostBatchNorm1d(_VirtualGPUs, nn.BatchNorm1d):
    """nn.BatchNorm1d that knows virtual GPUs (attribute `virtual_gpus`, 1 by default)."""


class GhostBatchNorm2d(_VirtualGPUs, nn.BatchNorm2d):
    """nn.BatchNorm2d that knows virtual GPUs (attribute `virtual_gpus`, 1 by default)."""


class GhostBatchNorm3d(_VirtualGPUs, nn.BatchNorm3d):
    """nn.BatchNorm3d that knows virtual GPUs (attribute `virtual_gpus`, 1 by default)."""


class AutoGroupNorm(nn.GroupNorm):
    """nn.GroupNorm with the channel count first, like every other norm here.

    `num_groups` None is the largest divisor of `num_features` up to 32; an explicit count that
    does not divide is a ValueError. 1 group is LN over (C, *spatial). A group of one value is 0
    before gain and shift, in a batch of one as well, which nn.GroupNorm refuses. Source: Wu and
    He, 2018.
    """

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
    ):
        if num_groups is None:
            num_groups = max(g for g in range(1, 33) if num_features % g == 0)
        check_num_groups(num_groups, num_features)
        super().__init__(num_groups, num_features, eps, affine, device, dtype)
        if not bias:  # an argument of torch's own only since 2.12
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            known = not isinstance(x, Proxy) and not torch.jit.is_tracing()
            if known and (x.ndim < 2 or x.shape[1] != self.num_channels):
                raise ValueError(
                    f"AutoGroupNorm of {self.num_channels} channels expects input of shape "
                    f"(N, {self.num_channels}, *spatial), got {tuple(x.shape)}"
                )
            if is_transformed():  # under vmap torch 2.11's takes no view of a batch of one
                x = x.clone(memory_format=torch.contiguous_format)
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class NoNorm(nn.Module):
    """The input as it is, where a network asks for a norm of `num_features` channels."""

    weight = bias = None  # what initialisers of gains look for

    def __init__(self, num_features: int, device=None, dtype=None):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return str(self.num_features)


class FrozenBatchNorm(nn.Module):
    """Batch norm with gain, shift and statistics fixed: an affine map of each channel.

    All four are buffers under batch norm's names, so that its checkpoints load. Any number of
    spatial dimensions; training and evaluation are the same function.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device=None,
        dtype=None,
        *,
        affine: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        missing = {"weight": not affine, "bias": not (affine and bias)}
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = torch.empty(num_features, device=device, dtype=dtype)
            self.register_buffer(name, None if missing.get(name) else value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity, up to eps."""
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            if getattr(self, name) is not None:
                getattr(self, name).fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        running = (self.running_mean, self.running_var)
        return F.batch_norm(x, *running, self.weight, self.bias, False, 0.0, self.eps)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # of the batch norm it comes from
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


# timm swaps classes it knows by name (batchnorm2d, groupnorm) for its fused norm+activation layers;
# the names above are not among them, so that timm says so instead.
# name -> (class by number of spatial dimensions, options it starts from)
_SWITCH_NORM = {1: SwitchNorm1d, 2: SwitchNorm2d, 3: SwitchNorm3d}
_GROUP_NORM = dict.fromkeys((1, 2, 3), AutoGroupNorm)
NORMS = {
    "sn": (_SWITCH_NORM, {}),
    "sn_in_ln": (_SWITCH_NORM, {"statistics": ("in", "ln")}),
    "bn": ({1: GhostBatchNorm1d, 2: GhostBatchNorm2d, 3: GhostBatchNorm3d}, {}),
    "gn": (_GROUP_NORM, {}),
    "in": (
        {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
        {"affine": True},
    ),
    "ln": (_GROUP_NORM, {"num_groups": 1}),
    "none": (dict.fromkeys((1, 2, 3), NoNorm), {}),
    "brn": ({1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}, {}),
    "bkn": ({1: BatchKalmanNorm1d, 2: BatchKalmanNorm2d, 3: BatchKalmanNorm3d}, {}),
    "frozen_bn": (dict.fromkeys((1, 2, 3), FrozenBatchNorm), {}),
    "ssn": ({1: SparseSwitchNorm1d, 2: SparseSwitchNorm2d, 3: SparseSwitchNorm3d}, {}),
    "sync_sn": ({1: SyncSwitchNorm1d, 2: SyncSwitchNorm2d, 3: SyncSwitchNorm3d}, {}),
    "sync_bn": (dict.fromkeys((1, 2, 3), nn.SyncBatchNorm), {}),
}


def make_norm(name: str, *, dim: int = 2, **options) -> Callable[[int], nn.Module]:
    """Return the normaliser `name` as a callable(num_features) -> Module.

    It fits `norm_layer=` of torchvision, and of timm where norm and activation are layers of their
    own; `sn.convert` replaces the fused ones (EfficientNet, RegNet...). `dim` is the number of
    spatial dimensions of the layer; `options` are keyword arguments of its constructor, such as
    `statistics` or `num_groups`.

    Raises ValueError for an unknown name, dim or statistic, TypeError for an unknown option.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; choose one of {sorted(NORMS)}")
    layers, defaults = NORMS[name]
    if dim not in layers:
        raise ValueError(f"dim={dim} for norm {name!r}; choose one of {sorted(layers)}")
    valid = [option for option in _options(layers[dim]) if (name, option) != ("ln", "num_groups")]
    for option in options:
        if option not in valid:
            raise TypeError(f"norm {name!r} has no option {option!r}; choose from {valid}")
    options = {**defaults, **options}
    for option in ("r_images", "d_images"):  # a config's list
        if option in options:
            options[option] = tuple(options[option])
    if "statistics" in options:
        options["statistics"] = canonical_statistics(options["statistics"])
    return partial(layers[dim], **options)


def _options(layer: type) -> list[str]:
    """Names of the constructor's options, those it passes on to its parents included."""
    names = []
    for kind in layer.__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(kind.__init__).parameters.values()
            names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return [name for name in dict.fromkeys(names) if name not in ("self", "num_features")]

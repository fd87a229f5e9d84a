"""Switchable Normalization with batch statistics over all processes of a group.

One all-reduce forward (2 C + 1 numbers), one backward (2 C), in double, none in evaluation. Where
there are kernels for the layer they do it, and stop for both; a process whose batch they do not
take does the same by the plain formula. Source: Luo et al., "SyncSN" in section 4.2; the official
code averages E[x] and E[x^2] of equal batches. Differs: every value counts once, whatever each
process brings, and the gradients are those of the whole batch in one process.
"""

import copy
import math
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import functional
from ..kernels import fits, quick_synchronised, synchronised
from ..kernels.common import Options, Reduce, join_batches, keep
from ..modules import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d, SwitchNormAct2d, SwitchNormBase
from ..running import count_batch


class _GroupMoments(torch.autograd.Function):
    """(N, C) instance moments of every process -> mean and biased variance (C,) of all values.

    The gradient of one process's instances counts every process's use of the result, so that it is
    that of the sum of their losses; DistributedDataParallel divides by their number.
    """

    @staticmethod
    def forward(ctx, mean_in: Tensor, var_in: Tensor, length: int, reduce: Reduce) -> tuple:
        wide = mean_in.double()
        ones = wide.new_full((1,), len(wide))
        sums = torch.cat((wide.sum(0), (var_in.double() + wide.square()).sum(0), ones)) * length
        mean, var, count = join_batches(sums, reduce)
        ctx.length, ctx.reduce = length, reduce
        ctx.save_for_backward(mean_in, mean, count)
        ctx.mark_non_differentiable(count)
        return mean.to(mean_in.dtype), var.to(mean_in.dtype), count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor, _) -> tuple:
        mean_in, mean, count = ctx.saved_tensors
        grads = torch.cat((grad_mean, grad_var)).double()
        ctx.reduce(grads)
        grad_mean, grad_var = (grads * (ctx.length / count)).view(2, -1).to(mean_in.dtype)
        delta = (mean_in - mean).to(mean_in.dtype)
        return grad_mean + 2 * delta * grad_var, grad_var.expand_as(mean_in), None, None


class _Together(torch.autograd.Function):
    """The tensors as they are; their gradients wait for one another, as those of `_Fused` do.

    The all-reduce backward is then before any gradient of a parameter in every process, whichever
    of its paths that takes, and takes place for such a gradient alone, too. Otherwise those of
    DistributedDataParallel, or none, would meet it.
    """

    @staticmethod
    def forward(ctx, *tensors):
        ctx.set_materialize_grads(False)
        needed = zip(tensors, ctx.needs_input_grad)
        ctx.mark_non_differentiable(*(t for t, need in needed if t is not None and not need))
        return tensors

    @staticmethod
    def backward(ctx, *grads):
        return grads


class _Fused(torch.autograd.Function):
    """The layer by `kernels`, which stop for the same two all-reduces.

    `step` is given bn's moments before anything is saved: repeating a forward pass, checkpointing
    stops once it has what was saved.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, options, relu, reduce, step, kernels = arguments
        y, kept, ctx.more, joined = kernels.sync_forward(inputs, options, relu, reduce)
        step(*joined)
        ctx.kernels, ctx.reduce = kernels, reduce
        keep(ctx, inputs, options, y, joined[2], *kept, relu=relu, residual=inputs[7] is not None)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        return _fused_backward(ctx, dy, *ctx.saved_tensors)


@once_differentiable  # by what was saved, too: `dy` alone need not depend on anything
def _fused_backward(ctx, dy: Tensor, *saved: Tensor) -> tuple:
    *inputs, y, values = saved[:9]
    kept, needed = saved[9:], ctx.needs_input_grad
    dx, grads, d_residual = ctx.kernels.sync_backward(
        dy, inputs, y, kept, ctx.more, ctx.options, ctx.relu, needed, values, ctx.reduce
    )
    return dx, *grads, None, None, d_residual, *[None] * 5


class SyncSwitchNormBase(SwitchNormBase):
    """A switchable layer whose bn takes the batches of all processes of `process_group`.

    None is the default group; without a group of several processes, and without bn, the layer is
    its parent. A process may bring any number of samples, none included, but all must run the
    layer equally often. Second derivatives are an error. `virtual_gpus` has no effect: virtual GPUs
    are synchronised as well. Parameters, buffers and state_dict are the parent's.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group=None,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        **options,
    ):
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            bias=bias,
            **options,
        )
        self.process_group = process_group

    def _group(self):
        """The group to synchronise over now; None if there is nothing to do."""
        if not self.training or "bn" not in self.statistics:
            return None
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def _normalize(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        group = self._group()
        if group is None:
            return super()._normalize(x, residual, relu)
        self._check_input(x)
        momentum = count_batch(self) if self.track_running_stats else 0.0

        def reduce(sums: Tensor) -> None:
            dist.all_reduce(sums, group=group)

        parameters = (self.mean_weight, self.var_weight, self.weight, self.bias)
        kernels = None
        if not self.unbiased:
            tensors = (x, *parameters, self.running_mean, self.running_var)
            options = Options(self.statistics, self.num_groups, True, momentum, self._eps, 1)
            y = quick_synchronised(tensors, options, residual, relu, reduce)
            if y is not None:
                return y
            kernels = synchronised((x, *parameters))
        if kernels is None:
            y = self._by_formula(x, parameters, momentum, reduce)
        else:
            functional._check_shapes(x, *parameters, self.statistics)
            if "gn" in self.statistics:
                functional.check_num_groups(self.num_groups, x.shape[1])
            matches = residual is None or fits(residual, x)
            fused = residual if matches else None
            inputs = (x, *parameters, None, None, fused)  # the running statistics are for `step`
            step = partial(self._step, momentum)
            y = _Fused.apply(*inputs, options, relu and matches, reduce, step, kernels)
            if matches:
                return y
        y = y if residual is None else y + residual
        return y.relu() if relu else y

    def _by_formula(self, x: Tensor, parameters: tuple, momentum: float, reduce: Reduce) -> Tensor:
        length = math.prod(x.shape[2:])
        x, *own = _Together.apply(x, *parameters)

        def batch_moments(mean_in: Tensor, var_in: Tensor) -> tuple[Tensor, Tensor]:
            mean, var, count = _GroupMoments.apply(mean_in, var_in, length, reduce)
            self._step(momentum, mean, var, count)
            return mean - mean_in, var

        return functional.normalize(
            x,
            tuple(own),
            self.statistics,
            self.num_groups,
            self._eps,
            self.unbiased,
            batch_moments,
        )

    @torch.no_grad()
    def _step(self, momentum: float, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """That of the running statistics, unless no process had a value."""
        if self.running_mean is None:
            return
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            share = (count > 0).to(running.dtype) * momentum
            running.lerp_(new.to(running.dtype), share)

    def micro_batches(self) -> NoReturn:
        """Refuse: one all-reduce needs the whole batch of every process."""
        raise ValueError("a synchronised norm, which micro-batches do not emulate")

    @property
    def virtual_gpus(self) -> int:
        return 1

    @virtual_gpus.setter
    def virtual_gpus(self, count: int) -> None:
        functional.check_virtual_gpus(count)

    def __deepcopy__(self, memo: dict) -> "SyncSwitchNormBase":
        """A copy in the same process group, which itself cannot be copied."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


class SyncSwitchNorm1d(SyncSwitchNormBase, SwitchNorm1d):
    """SwitchNorm1d with batch statistics over all processes; see SyncSwitchNormBase."""


class SyncSwitchNorm2d(SyncSwitchNormBase, SwitchNorm2d):
    """SwitchNorm2d with batch statistics over all processes; see SyncSwitchNormBase."""


class SyncSwitchNormAct2d(SyncSwitchNormBase, SwitchNormAct2d):
    """SwitchNormAct2d with batch statistics over all processes; see SyncSwitchNormBase."""


class SyncSwitchNorm3d(SyncSwitchNormBase, SwitchNorm3d):
    """SwitchNorm3d with batch statistics over all processes; see SyncSwitchNormBase."""


_SYNCHRONISED = {
    SwitchNorm1d: SyncSwitchNorm1d,
    SwitchNorm2d: SyncSwitchNorm2d,
    SwitchNormAct2d: SyncSwitchNormAct2d,
    SwitchNorm3d: SyncSwitchNorm3d,
}


def convert_sync_switchnorm(module: nn.Module, process_group=None) -> nn.Module:
    """Return `module` with every SwitchNorm1d, 2d, Act2d and 3d that has bn synchronised.

    In the manner of nn.SyncBatchNorm.convert_sync_batchnorm, but the layers are changed in place:
    parameters, hooks and an optimizer that holds them stay valid. Batch norm and sparse layers are
    left alone. Raises ValueError, with nothing changed, for a layer of a class that is not ours, as
    parametrised ones are.
    """
    for name, layer in module.named_modules():
        ours = type(layer).__module__.startswith(__name__.partition(".")[0] + ".")
        if isinstance(layer, SwitchNormBase) and "bn" in layer.statistics and not ours:
            raise ValueError(
                f"{name or 'the model'} is a {type(layer).__name__}, which has no synchronised "
                "form; remove its parametrization before, or take norm 'sync_sn' there"
            )
    for layer in module.modules():
        if type(layer) in _SYNCHRONISED and "bn" in layer.statistics:
            layer.__dict__.pop("virtual_gpus")
            layer.__class__ = _SYNCHRONISED[type(layer)]
            layer.process_group = process_group
        elif isinstance(layer, SyncSwitchNormBase):
            layer.process_group = process_group
    return module

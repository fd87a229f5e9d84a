"""What batch normalisations with running statistics share."""

import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import check_virtual_gpus
from .kernels import evaluated_with
from .kernels.common import is_transformed
from .tracing import Traceable

_SWA = "torch.optim.swa_utils"


def warn_of_update_bn(layer: nn.Module) -> None:
    """Warn if `torch.optim.swa_utils.update_bn` is running, which passes over `layer`.

    To be asked where gradients are disabled, as there.

    It can be noticed where the model also holds batch norm; without, it runs no batch at all.
    """
    if torch.compiler.is_compiling():
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "update_bn" and frame.f_globals.get("__name__") == _SWA:
            warnings.warn(
                f"update_bn passes over {type(layer).__name__}, whose running statistics are not "
                "those of the batches; call sn.batch_average(model, loader)",
                stacklevel=2,
            )
            return
        frame = frame.f_back


class CountsBatches(nn.Module):
    """State dicts without a count of batches, such as PyTorch's before 0.4.1, leave it as it is.

    As its BatchNorm does, whose version 2 has the count.
    """

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        if (local_metadata.get("version") or 1) < 2 and self.num_batches_tracked is not None:
            count = self.num_batches_tracked
            count = torch.tensor(0) if count.is_meta else count  # there is none to keep
            state_dict.setdefault(prefix + "num_batches_tracked", count)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def count_batch(layer: nn.Module) -> float:
    """Count a training batch in `layer`; return its share in the running statistics.

    momentum None is the cumulative average, as in torch's BatchNorm; without a count nothing, as
    there.
    """
    if layer.num_batches_tracked is None:
        return layer.momentum or 0.0
    layer.num_batches_tracked.add_(1)
    if layer.momentum is None:
        return 1.0 / float(layer.num_batches_tracked)
    return layer.momentum


def in_backward() -> bool:
    """Whether autograd is under way: a forward pass is then one that checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def like_in_memory(y: Tensor, x: Tensor) -> Tensor:
    """`y` with channels last in memory where `x` has them so."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if is_transformed():  # vmap cannot tell
        return y
    if layout is not None and x.is_contiguous(memory_format=layout):
        return y.contiguous(memory_format=layout)
    return y


class RunningNorm(Traceable, CountsBatches):
    """Gain, shift and running statistics under batch norm's names, and the checks of the input.

    The running variance is stored biased. Differs: torch's BatchNorm stores the unbiased one.
    """

    input_dims: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        device=None,
        dtype=None,
        virtual_gpus: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        check_virtual_gpus(virtual_gpus)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = True
        self.virtual_gpus = int(virtual_gpus)
        factory = {"device": device, "dtype": dtype}
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            value = nn.Parameter(torch.empty(num_features, **factory)) if wanted else None
            self.register_parameter(name, value)
        self.register_buffer("running_mean", torch.zeros(num_features, **factory))
        self.register_buffer("running_var", torch.ones(num_features, **factory))
        self.register_buffer(
            "num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device)
        )

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _evaluate(self, x: Tensor) -> Tensor:
        """Batch norm with the running statistics, whatever the dtypes of its tensors."""
        running = evaluated_with(self.running_mean, self.running_var)
        tensors = (*running, self.weight, self.bias)
        dtypes = {t.dtype for t in tensors if t is not None}
        if dtypes <= {x.dtype} or dtypes == {torch.float32} and x.dtype.itemsize < 4:
            return F.batch_norm(x, *tensors, False, 0.0, self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        tensors = (t if t is None else t.to(dtype) for t in tensors)
        return F.batch_norm(x.to(dtype), *tensors, False, 0.0, self.eps).to(x.dtype)

    def _update(self, mean: Tensor, var: Tensor) -> None:
        if not torch.is_grad_enabled():
            warn_of_update_bn(self)
        with torch.no_grad():
            momentum = count_batch(self)
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                running.lerp_(new.detach().to(running.dtype), momentum)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in self.input_dims or x.shape[1] != self.num_features:
            dims = " or ".join(f"{dim}-D" for dim in self.input_dims)
            raise ValueError(
                f"{type(self).__name__}({self.num_features}) expects {dims} input with "
                f"{self.num_features} channels, got shape {tuple(x.shape)}"
            )
        if self.training:
            check_virtual_gpus(self.virtual_gpus, x.shape[0])

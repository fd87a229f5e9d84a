"""What batch normalisations with running statistics share."""

import torch
from torch import Tensor, nn

from .functional import check_virtual_gpus


def count_batch(layer: nn.Module) -> float:
    """Count a training batch in `layer`; return its share in the running statistics.

    momentum None is the cumulative average, as in torch's BatchNorm.
    """
    layer.num_batches_tracked.add_(1)
    if layer.momentum is None:
        return 1.0 / float(layer.num_batches_tracked)
    return layer.momentum


class RunningNorm(nn.Module):
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
    ):
        super().__init__()
        check_virtual_gpus(virtual_gpus)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = True
        self.virtual_gpus = virtual_gpus
        factory = {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(num_features, **factory)) if affine else None
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
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor) -> None:
        momentum = count_batch(self)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in self.input_dims or x.shape[1] != self.num_features:
            dims = " or ".join(f"{dim}-D" for dim in self.input_dims)
            raise ValueError(
                f"{type(self).__name__}({self.num_features}) expects {dims} input with "
                f"{self.num_features} channels, got shape {tuple(x.shape)}"
            )
        if self.training:
            check_virtual_gpus(self.virtual_gpus, x.shape[0])

"""Batch Renormalization: batch norm corrected towards its moving statistics.

Source: Ioffe, Batch Renormalization, arXiv 1702.03275, algorithm 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels import batch_moments, batch_norm_by_group
from ..running import RunningNorm, in_backward, like_in_memory
from ..tracing import Proxy


class BatchRenormBase(RunningNorm):
    """y = weight ((x - mu_B) / sigma_B r + d) + bias; use BatchRenorm1d, 2d or 3d.

    r = clip(sigma_B / sigma, 1 / r_max, r_max) and d = clip((mu_B - mu) / sigma, -d_max, d_max)
    carry no gradient; mu and sigma are the moving statistics before this batch's update, and the
    evaluation takes them alone. Both sigmas are sqrt(biased variance + eps).

    `r_images` and `d_images` are the numbers of images seen between which r_max grows linearly from
    1 to `r_max` and d_max from 0 to `d_max`; before, the layer is batch norm. (0, 0) is the full
    correction from the first image on. Images seen (buffer `images_seen`, part of the checkpoint)
    are samples of all processes in training.

    With `virtual_gpus` G each of G groups is normalised and corrected by itself. The running
    statistics take the mean of the groups' means and variances, once per call.

    Activation checkpointing computes a step's forward pass twice: the second refers to the same
    moving statistics and leaves them alone, if the layer runs once a step.

    Source: the paper's schedule, 5k, 25k and 40k steps of 50 x 32 images; momentum 0.01. Differs:
    the moving sigma is the root of a moving variance, not a moving average of roots, so that the
    buffers mean the same as those of batch norm (ours biased, torch's unbiased).
    """

    trains_on_running = True
    # The moving mean, variance and images seen that batches are corrected towards; None: the
    # buffers, "batch": no correction, as plain batch norm.
    reference: tuple[Tensor, Tensor, Tensor] | str | None = None
    _before: tuple[Tensor, Tensor, Tensor] | None = None  # the buffers before the last update

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_images: tuple[float, float] = (8e6, 64e6),
        d_images: tuple[float, float] = (8e6, 40e6),
        virtual_gpus: int = 1,
    ):
        if not track_running_stats:
            raise ValueError("batch renormalization needs its running statistics; use norm 'bn'")
        if r_max < 1 or d_max < 0:
            raise ValueError(f"r_max={r_max}, d_max={d_max}; expected r_max >= 1 and d_max >= 0")
        for name, span in (("r_images", r_images), ("d_images", d_images)):
            if len(span) != 2 or not 0 <= span[0] <= span[1]:
                raise ValueError(
                    f"{name}={span}; expected (first, last) images, 0 <= first <= last"
                )
        super().__init__(num_features, eps, momentum, affine, device, dtype, virtual_gpus, bias)
        self.r_max, self.d_max = float(r_max), float(d_max)
        self.r_images, self.d_images = tuple(r_images), tuple(d_images)
        self.register_buffer("images_seen", torch.tensor(0, dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self.images_seen.zero_()

    def limits(self, images_seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """r_max and d_max at `images_seen` (default: the layer's), as float64 scalars."""
        images = (self.images_seen if images_seen is None else images_seen).double()

        def reached(first: float, last: float) -> Tensor:
            if first == last:
                return (images >= first).double()
            return ((images - first) / (last - first)).clamp(0, 1)

        return 1 + (self.r_max - 1) * reached(*self.r_images), self.d_max * reached(*self.d_images)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return self.as_node(x)
        self._check_input(x)
        if not self.training or x.numel() == 0:
            return self._evaluate(x)
        groups = self.virtual_gpus
        again = self._before is not None and in_backward()
        if not again:
            moving = (self.running_mean, self.running_var, self.images_seen)
            self._before = tuple(buffer.clone() for buffer in moving)
        y, mean, var = self._by_kernels(x)
        if y is None:
            # (G n, C, ...) -> (n, G C, ...): to torch's batch norm a group's channels are channels
            merged = x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2) if groups > 1 else x
            mean, var = self._moments(merged)
            gain, shift = self._affine(mean, var)
            # torch's batch norm takes no other mixture
            if gain.dtype != x.dtype and (gain.dtype != torch.float32 or x.dtype.itemsize > 4):
                gain, shift = gain.to(x.dtype), shift.to(x.dtype)
            gain, shift = gain.flatten(), shift.flatten()
            y = F.batch_norm(merged, None, None, gain, shift, True, 0.0, self.eps).to(x.dtype)
            if groups > 1:
                y = like_in_memory(y.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1), x)
        if not again:
            self._count_images(x.shape[0])
            self._update(mean.mean(0), var.mean(0))
        return y

    def _by_kernels(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Output and moments (G, C) by the CPU's kernels; None where they do not apply."""
        moments = None
        if x.numel() > self.virtual_gpus * self.num_features:  # else torch's error
            moments = batch_moments(x, self.virtual_gpus)
        if moments is None:
            return None, None, None
        mean, var = moments.to(torch.promote_types(x.dtype, self.running_mean.dtype))
        y = batch_norm_by_group(x, *self._affine(mean, var), self.eps)
        return y, mean, var

    def _affine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and shift of each group's normalized values, (G, C)."""
        r, d = self._correction(mean, var)
        if self.weight is not None:
            d = d * self.weight
            r = r * self.weight
        return r, d if self.bias is None else d + self.bias

    @torch.no_grad()
    def _moments(self, merged: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's mean and biased variance, (G, C) each."""
        dtype = torch.promote_types(merged.dtype, self.running_mean.dtype)
        dims = (0, *range(2, merged.dim()))
        merged = merged.detach().to(dtype)  # of forward derivatives too, which no_grad lets pass
        var, mean = torch.var_mean(merged, dims, correction=0)
        return mean.view(-1, self.num_features), var.view(-1, self.num_features)

    @torch.no_grad()
    def _correction(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """r and d, (G, C) each."""
        kept = self.running_mean.dtype
        if self.reference == "batch":
            return torch.ones_like(mean, dtype=kept), torch.zeros_like(mean, dtype=kept)
        moving = self._before if self.reference is None else self.reference
        moving_mean, moving_var, images = moving
        dtype = mean.dtype
        r_max, d_max = (limit.to(dtype) for limit in self.limits(images))
        rstd = (moving_var.to(dtype) + self.eps).rsqrt()
        r = ((var + self.eps).sqrt() * rstd).clamp(1 / r_max, r_max)
        d = ((mean - moving_mean) * rstd).clamp(-d_max, d_max)
        return r.to(kept), d.to(kept)

    @contextmanager
    def micro_batches(self) -> Iterator[None]:
        """Correct all batches inside towards the moving statistics at the start."""
        moving = (self.running_mean, self.running_var, self.images_seen)
        self.reference = tuple(buffer.clone() for buffer in moving)
        try:
            yield
        finally:
            self.reference = None

    @contextmanager
    def batch_alone(self) -> Iterator[None]:
        """Be plain batch norm and count no images."""
        self.reference = "batch"
        try:
            yield
        finally:
            self.reference = None

    @torch.no_grad()
    def _count_images(self, images: int) -> None:
        if self.reference == "batch":
            return
        processes = dist.is_available() and dist.is_initialized()
        self.images_seen.add_(images * (dist.get_world_size() if processes else 1))

    def extra_repr(self) -> str:
        options = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
        options += f", r_max={self.r_max:g}, d_max={self.d_max:g}"
        options += f", r_images={self.r_images}, d_images={self.d_images}"
        if not self.affine:
            options += ", affine=False"
        elif self.bias is None:
            options += ", bias=False"
        return options + (f", virtual_gpus={self.virtual_gpus}" if self.virtual_gpus != 1 else "")


class BatchRenorm1d(BatchRenormBase):
    """Batch Renormalization of (N, C) or (N, C, L); see BatchRenormBase."""

    input_dims = (2, 3)


class BatchRenorm2d(BatchRenormBase):
    """Batch Renormalization of (N, C, H, W); see BatchRenormBase."""

    input_dims = (4,)


class BatchRenorm3d(BatchRenormBase):
    """Batch Renormalization of (N, C, D, H, W); see BatchRenormBase."""

    input_dims = (5,)

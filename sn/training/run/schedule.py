"""The learning rate as a pure function of progress, and seeds mixed from where a run is."""

import hashlib
import math
from collections.abc import Sequence


def lr_factor(
    progress: float,
    decay: str = "step",
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    warmup: float = 0.0,
) -> float:
    """Return lr / base lr at `progress` in [0, 1), the fraction of all steps taken.

    `warmup` and `milestones` are fractions of the run too. "step" multiplies by `gamma` at every
    milestone reached, "cosine" falls from 1 at the end of the warm-up to 0 at the end.

    Raises ValueError for an unknown decay.
    """
    if decay not in ("step", "cosine"):
        raise ValueError(f"unknown schedule.decay={decay!r}; choose 'step' or 'cosine'")
    if progress < warmup:
        return progress / warmup
    if decay == "step":
        return gamma ** sum(progress >= milestone for milestone in milestones)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def cosine_restarts(epoch: int, first_period: int, period_factor: int) -> float:
    """Return the share, 1 to 0, of a cosine that begins anew: periods grow by `period_factor`.

    lr = min + share * (max - min). Source: Loshchilov and Hutter 2017; ENAS has 10 and 2.
    """
    period = first_period
    while epoch >= period:
        epoch -= period
        period *= period_factor
    return 0.5 * (1 + math.cos(math.pi * epoch / period))


def steps_per_epoch(num_images: int, gpus: int, images_per_gpu: int) -> int:
    """ceil(ceil(images / gpus) / images per gpu), as with a sampler that pads each GPU's share."""
    return math.ceil(math.ceil(num_images / gpus) / images_per_gpu)


def mix_seed(*parts: int) -> int:
    """Return 32 well-mixed bits of some integers; torch's CPU generator uses no more."""
    text = ",".join(str(int(part)) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def lr_factor_by_images(
    images_seen: float,
    images: int,
    milestones: Sequence[float],
    gamma: float = 0.1,
    warmup_images: int = 0,
    warmup_factor: float = 1 / 3,
) -> float:
    """Return lr / base lr after `images_seen` of a run's `images`, as detectors are trained.

    Linear from `warmup_factor` to 1 over the first `warmup_images`; times `gamma` at every
    milestone reached, a fraction of the run. Source: Detectron.
    """
    factor = gamma ** sum(images_seen >= milestone * images for milestone in milestones)
    if images_seen < warmup_images:
        factor *= warmup_factor + (1 - warmup_factor) * images_seen / warmup_images
    return factor

"""Sparse Switchable Normalization: gates that end one-hot.

Source: Shao et al., SSN, arXiv 1903.03793: SparsestMax in place of softmax, on a circle whose
radius grows from 0 to 1 over the training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..modules import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d, SwitchNormBase

ONE_HOT = 1 - 1e-6  # a gate from here on is the only one; what is missing is rounding


def sparsemax(z: Tensor) -> Tensor:
    """The point of the simplex nearest to `z` (K,). Source: Martins and Astudillo, 2016."""
    ordered = z.sort(descending=True).values
    sums = ordered.cumsum(0)
    counts = torch.arange(1, len(z) + 1, device=z.device, dtype=z.dtype)
    support = (1 + counts * ordered > sums).sum()
    threshold = (sums.gather(0, (support - 1).view(1)) - 1) / support
    return (z - threshold).clamp(min=0)


def sparsestmax(z: Tensor, radius: Tensor | float) -> Tensor:
    """Gates (K,) on the simplex, at least `radius` from the middle of the face they lie on.

    Radius 0 is sparsemax; from sqrt((K - 1) / K) on the result is one-hot. Where the gates are
    equal there is no direction to move in, and they stay. No branch depends on a value.

    Source: section 3.2. Differs: the official code divides by zero at equal gates, or takes the
    direction of a rounding error.
    """
    point, before = z, None
    tie = (16 * torch.finfo(z.dtype).eps) ** 2  # nearer to the middle is rounding
    square = torch.as_tensor(radius, dtype=z.dtype, device=z.device).square()
    for _ in range(len(z)):  # each round ends on the circle or on a smaller face
        point = sparsemax(point)
        face = (point.detach() > 0).to(z.dtype)
        centre = face / face.sum()
        if before is not None:
            square = (square - (centre - before).square().sum()).clamp(min=0)
        before = centre
        away = point - centre
        distance = away.square().sum()
        short = (distance < square) & (distance > tie)
        distance = torch.where(short, distance, torch.ones_like(distance))
        point = torch.where(short, centre + away * (square / distance).sqrt(), point)
    return sparsemax(point)


class SparseSwitchNormBase(SwitchNormBase):
    """A switchable layer with SparsestMax gates, one-hot at the end of training.

    Set the radius with `set_radius(model, progress)`. Means and variances choose apart. Gates found
    one-hot in a training step stay so, whatever their control parameters, until `unfreeze_gates`.
    The buffers `radius`, `mean_choice` and `var_choice` (position of the statistic, -1: not yet)
    are part of the checkpoint. Train gates with a tenth of the lr, no decay and gradients of norm
    1 at most (the paper's).
    """

    def __init__(self, num_features: int, *args, device=None, **options):
        super().__init__(num_features, *args, device=device, **options)
        self.register_buffer("radius", torch.zeros((), device=device))
        for name in ("mean_choice", "var_choice"):
            self.register_buffer(name, torch.tensor(-1, dtype=torch.long, device=device))

    def begin_step(self, progress: float) -> None:
        self.radius.fill_(progress)

    def importance(self) -> tuple[Tensor, Tensor]:
        return tuple(
            self._gates(logits, choice)
            for logits, choice in (
                (self.mean_weight, self.mean_choice),
                (self.var_weight, self.var_choice),
            )
        )

    def _gates(self, logits: Tensor, choice: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        gates = sparsestmax(logits, self.radius)
        only = torch.arange(len(logits), device=logits.device)
        chosen = torch.where(choice >= 0, choice, gates.detach().argmax())
        frozen = (choice >= 0) | (gates.detach().max() >= ONE_HOT)
        return torch.where(frozen, (only == chosen).to(gates.dtype), gates)

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Logarithms: their softmax, which the layer takes, is the gates again."""
        gates = self.importance()
        if self.training:
            with torch.no_grad():
                for choice, gate in zip((self.mean_choice, self.var_choice), gates):
                    choice.copy_(torch.where(gate.max() >= ONE_HOT, gate.argmax(), choice))
        none = [torch.full_like(gate, -torch.inf) for gate in gates]
        return tuple(
            torch.where(gate > 0, torch.where(gate > 0, gate, torch.ones_like(gate)).log(), zero)
            for gate, zero in zip(gates, none)
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ", gates=sparsestmax"


class SparseSwitchNorm1d(SparseSwitchNormBase, SwitchNorm1d):
    """SwitchNorm1d with SparsestMax gates; see SparseSwitchNormBase."""


class SparseSwitchNorm2d(SparseSwitchNormBase, SwitchNorm2d):
    """SwitchNorm2d with SparsestMax gates; see SparseSwitchNormBase."""


class SparseSwitchNorm3d(SparseSwitchNormBase, SwitchNorm3d):
    """SwitchNorm3d with SparsestMax gates; see SparseSwitchNormBase."""


def set_radius(model: nn.Module, radius: float) -> None:
    """Set the circle's radius in every sparse layer: the share of the training done, 0 to 1."""
    if not 0 <= radius <= 1:
        raise ValueError(f"radius={radius}; expected a share of the training, 0 to 1")
    for layer in model.modules():
        if isinstance(layer, SparseSwitchNormBase):
            layer.begin_step(radius)


def unfreeze_gates(model: nn.Module, share: float | None = None) -> list[str]:
    """Let frozen sparse gates learn again, from radius 0; return the names of their layers.

    A frozen gate restarts with `share` for its choice and the rest in equal parts; None: all equal.
    """
    if share is not None and not 0 < share < 1:
        raise ValueError(f"share={share}; expected a number between 0 and 1, or None")
    thawed = []
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseSwitchNormBase):
            continue
        layer.radius.zero_()
        pairs = ((layer.mean_weight, layer.mean_choice), (layer.var_weight, layer.var_choice))
        frozen = [(gate, choice) for gate, choice in pairs if choice.item() >= 0]
        for gate, choice in frozen:
            equal = 1 / len(gate)
            own = equal if share is None else share
            with torch.no_grad():  # sparsemax of a point of the simplex is that point
                gate.fill_((1 - own) / max(len(gate) - 1, 1))[choice] = own
            choice.fill_(-1)
        if frozen:
            thawed.append(name)
    return thawed


def choices(model: nn.Module) -> dict[str, dict[str, str | None]]:
    """The statistics every sparse layer has settled for: {name: {"mean": "bn", "var": None}}."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseSwitchNormBase):
            picked: Sequence[int] = (layer.mean_choice.item(), layer.var_choice.item())
            chosen = [layer.statistics[k] if k >= 0 else None for k in picked]
            found[name] = dict(zip(("mean", "var"), chosen))
    return found

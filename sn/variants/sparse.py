"""Sparse Switchable Normalization: importance weights that end one-hot.

Source: Shao et al., SSN, arXiv 1903.03793: SparsestMax in place of softmax, on a circle whose
radius grows from 0 to 1 over the training.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..freezing import is_frozen
from ..kernels import seen_through
from ..kernels.common import PLAIN, goes_by_formula
from ..modules import (
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
    SwitchNormBase,
    named_layers,
    whole,
)

ONE_HOT = 1 - 1e-6  # an importance weight from here on is 1 but for rounding


def sparsemax(z: Tensor) -> Tensor:
    """The point of the simplex nearest to `z` (K,). Source: Martins and Astudillo, 2016."""
    ordered = z.sort(descending=True).values
    sums = ordered.cumsum(0)
    counts = torch.arange(1, len(z) + 1, device=z.device, dtype=z.dtype)
    support = (1 + counts * ordered > sums).sum().clamp(min=1)  # none at NaN
    threshold = (sums.gather(0, (support - 1).view(1)) - 1) / support
    return (z - threshold).clamp(min=0)


def sparsestmax(z: Tensor, radius: Tensor | float) -> Tensor:
    """Importance weights (K,), at least `radius` from the centre of the simplex's face they lie on.

    Radius 0 is sparsemax; from sqrt((K - 1) / K) on the result is one-hot. Equal weights have no
    direction to move in and stay equal. No branch depends on a value.

    Raises ValueError if `z` is not a vector.

    Source: section 3.2. Differs: the official code divides by zero at equal weights, or takes the
    direction of a rounding error.
    """
    if z.dim() != 1:
        raise ValueError(f"expected z of shape (K,), got {tuple(z.shape)}")
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
        # both branches are differentiated: neither may divide by zero nor have sqrt(0)
        ratio = torch.where(short, square / torch.where(short, distance, 1.0), 1.0)
        point = torch.where(short, centre + away * ratio.sqrt(), point)
    return sparsemax(point)


Matrix = list[list[float]]


def _sparsemax_of_numbers(z: list[float], slopes: Matrix) -> tuple[list[float], Matrix]:
    """`sparsemax` of a few numbers whose derivatives are the rows of `slopes`, and its own."""
    total, count, threshold = 0.0, 0, 0.0
    for value in sorted(z, reverse=True):
        total += value
        if 1 + (count + 1) * value <= total:
            break
        count += 1
        threshold = (total - 1) / count
    point = [max(value - threshold, 0.0) for value in z]
    if slopes:
        inside = [row for row, value in zip(slopes, point) if value > 0]
        middle = [sum(column) / len(inside) for column in zip(*inside)]
        zero = [0.0] * len(z)
        slopes = [
            [a - b for a, b in zip(row, middle)] if value > 0 else zero
            for row, value in zip(slopes, point)
        ]
    return point, slopes


def sparsestmax_of_numbers(
    z: list[float], radius: float, tie: float, derivatives: bool = False
) -> tuple[list[float], Matrix]:
    """`sparsestmax` of a few numbers and, if asked for, its derivatives, a row for each weight.

    Forty operations on tensors of three numbers take longer than a norm of a small map. `tie` is
    the squared distance from the middle below which there is no direction.
    """
    each = range(len(z))
    slopes = [[float(i == j) for j in each] for i in each] if derivatives else []
    point, before, square = z, None, radius * radius
    for _ in each:
        point, slopes = _sparsemax_of_numbers(point, slopes)
        share = 1 / sum(value > 0 for value in point)
        centre = [share if value > 0 else 0.0 for value in point]
        if before is not None:
            square = max(square - sum((a - b) ** 2 for a, b in zip(centre, before)), 0.0)
        before = centre
        away = [a - b for a, b in zip(point, centre)]
        distance = sum(a * a for a in away)
        if not tie < distance < square:
            return point, slopes
        ratio = math.sqrt(square / distance)
        point = [a + b * ratio for a, b in zip(centre, away)]
        if derivatives:  # of the direction alone: the length is given
            along = [sum(a * row[j] for a, row in zip(away, slopes)) / distance for j in each]
            slopes = [
                [ratio * (row[j] - a * along[j]) for j in each] for a, row in zip(away, slopes)
            ]
    return _sparsemax_of_numbers(point, slopes)


@lru_cache(maxsize=1024)
def _logs_of_numbers(
    control: tuple[float, ...],
    choice: tuple[float, ...],
    radius: float,
    dtype: torch.dtype,
    derivatives: bool,
) -> tuple[tuple[float, ...] | None, Tensor, Matrix]:
    """What is settled, if anything, logarithms of the importance weights, their derivatives.

    Kept, the tensor too: in evaluation the numbers are those of the call before. `dtype` is that of
    the control parameters; half precision is computed in float32.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    settled, slopes, top = None, [], max(choice)
    if top > 0.5:
        weights, top = [0.0] * len(choice), 1.0
        weights[choice.index(max(choice))] = 1.0
    elif not all(value < math.inf for value in control):  # or NaN
        weights = [math.nan] * len(control)
    else:
        tie = (16 * torch.finfo(dtype).eps) ** 2
        weights, slopes = sparsestmax_of_numbers(list(control), radius, tie, derivatives)
        top = max(weights)
    if top >= ONE_HOT:
        settled, slopes = tuple(float(i == weights.index(top)) for i in range(len(weights))), []
        weights = settled
    logs = [-math.inf if weight == 0 else math.log(weight) for weight in weights]
    zero = [0.0] * len(weights)
    slopes = [
        [slope / weight for slope in row] if weight > 0 else zero
        for row, weight in zip(slopes or [zero] * len(weights), weights)
    ]
    with torch.inference_mode(False):  # it may be saved for a backward pass
        return settled, torch.tensor(logs, dtype=dtype, device="cpu"), slopes


class _Logits(torch.autograd.Function):
    """Logits that were computed as numbers, with their derivatives by the control parameters."""

    @staticmethod
    def forward(ctx, layer, slopes: tuple[Matrix, Matrix], logits, *control):
        ctx.layer, ctx.slopes = layer, slopes
        ctx.save_for_backward(*control)
        return logits

    @staticmethod
    def backward(ctx, *grads):
        control = ctx.saved_tensors
        if any(goes_by_formula(grad) for grad in grads):
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                plain = ctx.layer._logits_of(ctx.layer._importance_of(control))
            found = [
                torch.autograd.grad(logs, own, grad, create_graph=again)[0] if need else None
                for logs, own, grad, need in zip(plain, control, grads, ctx.needs_input_grad[3:])
            ]
            return None, None, None, *found
        found = []
        for grad, slopes, own in zip(grads, ctx.slopes, control):
            columns = zip(*slopes)
            numbers = [sum(a * b for a, b in zip(grad.tolist(), column)) for column in columns]
            found.append(torch.tensor(numbers, dtype=own.dtype, device=own.device))
        return None, None, None, *found


class SparseSwitchNormBase(SwitchNormBase):
    """A switchable layer with SparsestMax for softmax: one-hot weights at the end of training.

    Call `sn.begin_step(model, progress)` before every training step: it sets the radius. Means and
    variances choose apart. Importance weights found one-hot in a training step stay so, whatever
    their control parameters, until `unfreeze_gates`. The buffers `radius`, `mean_choice` and
    `var_choice` (K,), 1 for the statistic that was chosen and all 0 before, are part of the
    checkpoint. Averages of models (EMA, SWA) average them: a choice counts where it has more than
    half of the average. Train the control parameters with a tenth of the lr, no decay and gradients
    of norm 1 at most (the paper's).
    """

    def _register_own(self, factory: dict) -> None:
        self.register_buffer("radius", torch.zeros((), **factory))
        for name in ("mean_choice", "var_choice"):
            self.register_buffer(name, torch.zeros(len(self.statistics), **factory))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for buffer in (self.radius, self.mean_choice, self.var_choice):
            buffer.zero_()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in ("mean_choice", "var_choice"):  # once the index of the choice, -1 for none
            old = state_dict.get(prefix + name)
            if old is not None and old.dim() == 0:
                indices = torch.arange(len(self.statistics), device=old.device)
                state_dict[prefix + name] = (indices == old).to(getattr(self, name).dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def begin_step(self, progress: float) -> None:
        if not is_frozen(self):  # the radius changes the outputs
            self.radius.fill_(progress)

    def importance(self) -> tuple[Tensor, Tensor]:
        return self._importance_of((whole(self.mean_weight), whole(self.var_weight)))

    def _importance_of(self, control: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        choices = (self.mean_choice, self.var_choice)
        return tuple(self._weights(logits, choice) for logits, choice in zip(control, choices))

    def _weights(self, control: Tensor, choice: Tensor) -> Tensor:
        control = control.to(torch.promote_types(control.dtype, torch.float32))
        weights = sparsestmax(control, self.radius)
        indices = torch.arange(len(control), device=control.device)
        settled = choice.max() > 0.5
        chosen = torch.where(settled, choice.argmax(), weights.detach().argmax())
        one_hot = settled | (weights.detach().max() >= ONE_HOT)
        return torch.where(one_hot, (indices == chosen).to(weights.dtype), weights)

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the importance weights: their softmax, which the layer takes."""
        control = (self.mean_weight, self.var_weight)
        choices = (self.mean_choice, self.var_choice)
        tensors = (*control, self.radius, choices[0])
        if not seen_through() and all(type(t) in PLAIN and t.is_cpu for t in tensors):
            return self._logits_by_numbers(control, choices, tensors[2].item())
        pair = self.importance()
        if self.training:
            with torch.no_grad():
                for choice, weights in zip(choices, pair):
                    one_hot = weights.max() >= ONE_HOT
                    choice.copy_(torch.where(one_hot, (weights >= ONE_HOT).to(choice), choice))
        return self._logits_of(pair)

    @staticmethod
    def _logits_of(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A weight of 0 counts as the smallest number above, not as -inf.

        With torch.where in its place inductor (torch 2.15) writes over what the backward
        pass of a layer behind still needs: gradients are wrong by far, without a word.
        """
        return tuple(w.clamp(min=torch.finfo(w.dtype).tiny).log() for w in pair)

    def _logits_by_numbers(
        self, control: tuple[Tensor, Tensor], choices: tuple[Tensor, Tensor], radius: float
    ) -> tuple[Tensor, Tensor]:
        needed = torch.is_grad_enabled() and any(t.requires_grad for t in control)
        logits, derivatives = [], []
        for own, choice in zip(control, choices):
            before = tuple(choice.tolist())
            settled, logs, slopes = _logs_of_numbers(
                tuple(own.tolist()), before, radius, own.dtype, needed
            )
            if self.training and settled is not None and settled != before:
                with torch.no_grad():
                    choice.copy_(torch.tensor(settled, device=choice.device))
            logits.append(logs)
            derivatives.append(slopes)
        if not needed:
            return tuple(logits)
        own = tuple(logs.clone() for logs in logits)
        return _Logits.apply(self, tuple(derivatives), own, *control)

    def extra_repr(self) -> str:
        return super().extra_repr() + ", gates=sparsestmax"


class SparseSwitchNorm1d(SparseSwitchNormBase, SwitchNorm1d):
    """SwitchNorm1d with SparsestMax; see SparseSwitchNormBase."""


class SparseSwitchNorm2d(SparseSwitchNormBase, SwitchNorm2d):
    """SwitchNorm2d with SparsestMax; see SparseSwitchNormBase."""


class SparseSwitchNorm3d(SparseSwitchNormBase, SwitchNorm3d):
    """SwitchNorm3d with SparsestMax; see SparseSwitchNormBase."""


def set_radius(model: nn.Module, radius: float) -> None:
    """Set SparsestMax's radius in every sparse layer, 0 to 1; `begin_step` does it in training.

    Layers that `sn.freeze` has frozen keep theirs.
    """
    if not 0 <= radius <= 1:
        raise ValueError(f"radius={radius}; expected a share of the training, 0 to 1")
    for layer in model.modules():
        if isinstance(layer, SparseSwitchNormBase):
            layer.begin_step(radius)


def unfreeze_gates(model: nn.Module, share: float | None = None) -> list[str]:
    """Let settled sparse layers learn again, from radius 0; return their names.

    The importance weights restart with `share` for the choice and the rest in equal parts; None:
    all equal. Layers that `sn.freeze` has frozen stay as they are.
    """
    if share is not None and not 0 < share < 1:
        raise ValueError(f"share={share}; expected a number between 0 and 1, or None")
    thawed = []
    for name, layer in named_layers(model):
        if not isinstance(layer, SparseSwitchNormBase) or is_frozen(layer):
            continue
        layer.radius.zero_()
        pairs = ((layer.mean_weight, layer.mean_choice), (layer.var_weight, layer.var_choice))
        settled = [(control, choice) for control, choice in pairs if choice.max() > 0.5]
        for control, choice in settled:
            own = 1 / len(control) if share is None else share
            with torch.no_grad():  # sparsemax of a point of the simplex is that point
                control.fill_((1 - own) / max(len(control) - 1, 1))[choice.argmax()] = own
        for _, choice in pairs:
            choice.zero_()
        if settled:
            thawed.append(name)
    return thawed


def choices(model: nn.Module) -> dict[str, dict[str, str | None]]:
    """The statistics every sparse layer has settled for: {name: {"mean": "bn", "var": None}}."""
    found = {}
    for name, layer in named_layers(model):
        if isinstance(layer, SparseSwitchNormBase):
            found[name] = {
                key: layer.statistics[int(choice.argmax())] if choice.max() > 0.5 else None
                for key, choice in (("mean", layer.mean_choice), ("var", layer.var_choice))
            }
    return found

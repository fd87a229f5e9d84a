"""Control parameters trained on other images than the weights, as architectures are in DARTS.

min over gates of L_val(weights*(gates), gates), with weights* = argmin L_train(weights, gates);
`gates` are the control parameters.
Section 3.4 of the paper holds that SN needs no such thing; this is for testing that.
Source: Liu et al., DARTS, arXiv 1806.09055, section 2.3.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ...modules import gates as model_gates
from ..run.distributed import in_group, sum_over_processes
from ..run.schedule import mix_seed
from .data import ArrayImages

ORDERS = {"bilevel_first": 1, "bilevel": 2}  # the config's `gates`, beside "joint"


def split_images(images: Sequence, seed: int) -> tuple[Sequence, Sequence]:
    """Two random halves of a training set: for the weights, and for the control parameters.

    Raises ValueError for fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(
            f"bilevel training splits the images in two halves; there are {len(images)}"
        )
    generator = torch.Generator().manual_seed(mix_seed(seed, len(images), 2))
    order = torch.randperm(len(images), generator=generator).tolist()
    half = len(images) // 2
    halves = sorted(order[:half]), sorted(order[half : 2 * half])
    if isinstance(images, ArrayImages):
        return tuple(images.subset(indices) for indices in halves)
    return tuple(Subset(images, indices) for indices in halves)


def control_step(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    loss: Callable[..., Tensor],
    batch: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    order: int,
    clip: float | None = None,
    allows: Callable[[], bool] = lambda: True,
) -> None:
    """Update the model's control parameters alone, by the loss on held-out images.

    Args:
        optimizer: the one of all parameters; the others have no gradient afterwards.
        loss: called with the tensors of `batch`, by which weights learn, or of `held_out`.
        order: as for `gate_gradients`.
        clip: largest norm of all their gradients together.
        allows: asked before the update, when the control parameters alone have gradients.
    """
    gates = model_gates(model)
    known = {id(gate) for gate in gates}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    losses = (lambda: loss(*batch)), (lambda: loss(*held_out))
    grads = gate_gradients(*losses, gates, weights, optimizer, model, order)
    optimizer.zero_grad(set_to_none=True)  # SGD leaves parameters without gradient alone
    for gate, grad in zip(gates, grads):
        gate.grad = grad
    if not allows():
        return
    if clip is not None:
        nn.utils.clip_grad_norm_(gates, clip)
    optimizer.step()


def gate_gradients(
    train_loss: Callable[[], Tensor],
    val_loss: Callable[[], Tensor],
    gates: Sequence[nn.Parameter],
    weights: Sequence[nn.Parameter],
    optimizer: torch.optim.SGD,
    model: nn.Module,
    order: int = 2,
) -> list[Tensor]:
    """The gradient of the validation loss with respect to `gates`, one tensor for each.

    First order takes the weights as they are. Second order takes them after the step of `optimizer`
    (its lr, momentum and decay) that `train_loss` asks for, with the Hessian's product by central
    differences of 0.01 / |v|, all with the same dropout. The losses are called on `model` as it is;
    afterwards its weights and buffers are what they were and no `.grad` is touched. All processes
    of a group get their mean.

    Differs: DARTS' code keeps the running statistics of the probing passes, and updates its own
    parameters with Adam; in train_imagenet.py the gates have the SGD that the weights have.
    """
    with _kept(model):
        if order == 1:
            return _mean_over_processes(_gradients(val_loss(), gates))
        train_loss = _repeated(train_loss, weights)
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        start = [weight.detach().clone() for weight in weights]
        with _restored(weights, start):
            steps = _mean_over_processes(_gradients(train_loss(), weights))
            with torch.no_grad():
                for weight, step in zip(weights, steps):
                    group = groups[weight]
                    step = step + group["weight_decay"] * weight
                    momentum = optimizer.state.get(weight, {}).get("momentum_buffer")
                    if momentum is not None:
                        step = step + group["momentum"] * momentum
                    weight.sub_(group["lr"] * step)
            found = _gradients(val_loss(), [*gates, *weights])
            found = _mean_over_processes(found)
            direct, vector = found[: len(gates)], found[len(gates) :]
            # the lr of each weight is part of d weights' / d gates
            vector = [groups[w]["lr"] * v for w, v in zip(weights, vector)]
            length = torch.stack([v.double().square().sum() for v in vector]).sum().sqrt().item()
            if length == 0:
                return direct
            width = 0.01 / length
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    for weight, value, v in zip(weights, start, vector):
                        weight.copy_(value + sign * width * v)
                sides.append(_mean_over_processes(_gradients(train_loss(), gates)))
    return [d - (plus - minus) / (2 * width) for d, plus, minus in zip(direct, *sides)]


def _repeated(loss: Callable[[], Tensor], weights: Sequence[Tensor]) -> Callable[[], Tensor]:
    """`loss`, which draws the same random numbers in every call; what follows has the next ones.

    Otherwise a difference of two losses would be that of their dropout.
    """
    devices = sorted({weight.device.index for weight in weights if weight.is_cuda})
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    called = False

    def repeated() -> Tensor:
        nonlocal called
        if not called:
            called = True
            return loss()
        with torch.random.fork_rng(devices):
            torch.set_rng_state(states[0])
            for device, state in zip(devices, states[1]):
                torch.cuda.set_rng_state(state, device)
            return loss()

    return repeated


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]


def _mean_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    if not in_group():
        return tensors
    flat = sum_over_processes(torch.cat([t.flatten() for t in tensors]))
    flat /= torch.distributed.get_world_size()
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors)]


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Buffers, running statistics above all, are afterwards what they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextmanager
def _restored(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, values):
                weight.copy_(value)

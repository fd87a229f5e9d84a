"""Bilevel gates: DARTS' gradients on problems whose answer is known, and a run that trains so."""

import json
import math

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from workers import config, train_in_group

import sn
from sn.training.classification import bilevel
from sn.training.classification.bilevel import gate_gradients, split_images
from sn.training.classification.data import ArrayImages
from sn.training.run.config import recorded

A, C, T = 0.7, 2.0, 1.5


class Problem(nn.Module):
    """L_train = (w - A g)^2 / 2 + g^2 / 2 and L_val = (w - T)^2 / 2 + C g^2 / 2, both convex.

    The best weight for a gate is A g, so the bilevel optimum is g = A T / (A^2 + C).
    """

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0).double())
        self.g = nn.Parameter(torch.tensor(-1.0).double())
        self.register_buffer("seen", torch.tensor(0))

    def train_loss(self):
        self.seen.add_(1)
        return (self.w - A * self.g) ** 2 / 2 + self.g**2 / 2

    def val_loss(self):
        self.seen.add_(1)
        return (self.w - T) ** 2 / 2 + C * self.g**2 / 2


def gradient(problem, optimizer, order):
    (found,) = gate_gradients(
        problem.train_loss, problem.val_loss, [problem.g], [problem.w], optimizer, problem, order
    )
    return found.item()


def make(lr, momentum=0.0, decay=0.0):
    problem = Problem()
    groups = [{"params": [problem.w], "lr": lr}, {"params": [problem.g], "lr": 0.05}]
    return problem, torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=decay)


def test_first_order_is_the_partial_derivative():
    problem, optimizer = make(0.3)
    assert gradient(problem, optimizer, 1) == pytest.approx(C * -1.0)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1)])
def test_second_order_follows_the_optimizers_step(momentum, decay):
    """By hand: w' = w - lr (w - A g + decay w + momentum buffer); dw'/dg = lr A."""
    lr = 0.3
    problem, optimizer = make(lr, momentum, decay)
    for parameter in (problem.w, problem.g):  # a step, so that there is a momentum buffer
        parameter.grad = torch.tensor(0.4).double()
    optimizer.step()
    w, g = problem.w.item(), problem.g.item()
    buffer = optimizer.state[problem.w].get("momentum_buffer")
    buffer = 0.0 if buffer is None else buffer.item()
    problem.w.grad, problem.g.grad = None, torch.tensor(7.0).double()
    found = gradient(problem, optimizer, 2)
    ahead = w - lr * (w - A * g + decay * w + momentum * buffer)
    assert found == pytest.approx(C * g + (ahead - T) * lr * A, rel=1e-6)
    # nothing has moved
    assert (problem.w.item(), problem.g.item()) == (w, g) and problem.seen == 0
    assert problem.w.grad is None and problem.g.grad == 7


def test_the_convex_problem_is_solved():
    """Second order with whole inner steps finds the bilevel optimum, first order does not."""
    answers = {}
    for order in (1, 2):
        problem, optimizer = make(1.0)  # one step of the inner problem is its solution
        for _ in range(150):
            grad = gradient(problem, optimizer, order)
            optimizer.zero_grad()
            problem.g.grad = torch.tensor(grad).double()
            optimizer.step()
            optimizer.zero_grad()
            problem.train_loss().backward()
            problem.g.grad = None
            optimizer.step()
        answers[order] = problem.g.item()
    assert answers[2] == pytest.approx(A * T / (A**2 + C), abs=1e-6)
    assert answers[1] == pytest.approx(0.0, abs=1e-6)


def test_a_switchable_network_against_the_exact_hypergradient():
    """The derivative through one step of SGD, by autograd of the whole step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), sn.SwitchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 1))
    model.double()
    x, held = oracle.values((4, 2, 5, 5)), oracle.values((4, 2, 5, 5), 1)
    labels = torch.tensor([0, 1, 1, 0])
    gates = sn.gates(model)
    weights = [p for p in model.parameters() if not any(p is g for g in gates)]
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(sn.parameter_groups(model, 0.2, 0.01, 0.1), lr=0.2)

    def loss(values, x):
        logits = torch.func.functional_call(model, values, (x,)).mean((2, 3))
        return nn.functional.cross_entropy(logits, labels)

    with sn.backend("reference"):
        values = dict(model.named_parameters())
        inner = torch.autograd.grad(loss(values, x), weights, create_graph=True)
        ahead = dict(values)
        for weight, grad in zip(weights, inner):
            ahead[names[id(weight)]] = weight - 0.2 * (grad + 0.01 * weight)
        exact = torch.autograd.grad(loss(ahead, held), gates)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.zero_grad()

    def current(x):
        return lambda: nn.functional.cross_entropy(model(x).mean((2, 3)), labels)

    model.load_state_dict(before)
    found = gate_gradients(current(x), current(held), gates, weights, optimizer, model)
    torch.testing.assert_close(found, list(exact), rtol=1e-3, atol=1e-7)
    first = gate_gradients(current(x), current(held), gates, weights, optimizer, model, 1)
    assert (first[0] - exact[0]).abs().max() > 10 * (found[0] - exact[0]).abs().max()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)  # statistics too


def test_split():
    one, two = split_images(list(range(101)), 3)
    assert len(one) == len(two) == 50 and not set(one) & set(two)
    assert list(one) == list(split_images(list(range(101)), 3)[0])
    assert list(one) != list(split_images(list(range(101)), 4)[0])
    with pytest.raises(ValueError):
        split_images([1], 0)
    arrays = ArrayImages(np.arange(101 * 12).reshape(101, 3, 2, 2) % 251, np.arange(101))
    part = split_images(arrays, 3)[0]
    assert isinstance(part, ArrayImages) and part.labels == list(one)  # so batches are augmented
    assert all(torch.equal(part[i][0], arrays[index][0]) for i, index in enumerate(one))


def test_records_of_joint_runs_stay_as_they_were():
    """Keys that came later are left out of a record that does not use them."""
    plain = recorded(config())
    assert "gates" not in plain and "gate_clip" not in plain["optimizer"]
    used = recorded(config("gates=bilevel", "optimizer.gate_clip=1"))
    assert used["gates"] == "bilevel" and used["optimizer"]["gate_clip"] == 1.0


@pytest.mark.parametrize(
    "gates", ["bilevel", pytest.param("bilevel_first", marks=pytest.mark.slow)]
)
def test_a_run(gates, tmp_path):
    import train_imagenet

    options = ["device=cpu", "precision=fp64", "setting=8x2", "schedule.epochs=1",
               "data.train_images=32", "evaluation.batch_average.batches=1"]  # fmt: skip
    summary = train_imagenet.train(config(*options, f"gates={gates}", f"output_dir={tmp_path}"))
    assert summary["status"] == "finished" and summary["images_seen"] == 16
    lines = (tmp_path / "importance.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["layers"] != json.loads(lines[-1])["layers"]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert state["bn1.num_batches_tracked"] == 1  # probing passes do not count
    if gates == "bilevel":
        with pytest.raises(ValueError, match="gates=bilevel.*too small for precision=bf16"):
            train_imagenet.train(config(*options, f"gates={gates}", "precision=bf16"))
    for bad in (f"gates={gates} norm=bn", f"gates={gates} precision=fp16", "gates=other",
                f"gates={gates} setting.emulation=accumulated"):  # fmt: skip
        with pytest.raises(ValueError, match="gates="):
            train_imagenet.train(config(*options, f"output_dir={tmp_path}/bad", *bad.split()))


def test_control_parameters_are_not_updated_by_what_is_not_finite(tmp_path, monkeypatch):
    """They would be lost: no later step that is skipped brings them back."""
    import train_imagenet

    def poisoned(train_loss, val_loss, gates, *rest):
        return [torch.full_like(gate, math.nan) for gate in gates]

    options = ["device=cpu", "setting=8x2", "data.train_images=32", "gates=bilevel"]
    options += ["model.name=resnet8", "schedule.epochs=1", "evaluation.batch_average.batches=1"]
    monkeypatch.setattr(bilevel, "gate_gradients", poisoned)
    with pytest.raises(FloatingPointError, match="gradient is not finite at epoch 1, step 1"):
        train_imagenet.train(config(*options, f"output_dir={tmp_path}/stops"))
    more = ["max_skipped_steps=9", f"output_dir={tmp_path}/goes on"]
    summary = train_imagenet.train(config(*options, *more))
    assert summary["status"] == "finished" and summary["skipped_steps"] == 1
    state = torch.load(tmp_path / "goes on" / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.slow
def test_processes_equal_virtual_gpus(tmp_path):
    options = ["device=cpu", "precision=fp64", "setting=8x2", "schedule.epochs=2",
               "data.train_images=64", "gates=bilevel", "optimizer.gate_clip=0.01"]  # fmt: skip
    states = []
    for world_size in (1, 2):
        train_in_group(world_size, *options, f"output_dir={tmp_path}/{world_size}")
        path = tmp_path / str(world_size) / "checkpoint.pt"
        states.append(torch.load(path, weights_only=True)["model"])
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=0, atol=1e-7, msg=key)


def test_second_order_has_the_same_dropout_in_all_of_its_losses():
    """The gradient through the whole step, by autograd: differences of other masks are far off."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 6, 3), sn.SwitchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 2)).double()
    x, held = oracle.values((8, 2, 5, 5)), oracle.values((8, 2, 5, 5), 1)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    gates = sn.gates(model)
    values = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in values.items()}
    weights = [p for p in values.values() if id(p) not in set(map(id, gates))]

    def loss(values, x):
        logits = torch.func.functional_call(model, values, (x,))
        return nn.functional.cross_entropy(logits, labels)

    with sn.backend("reference"):
        torch.manual_seed(1)
        grads = torch.autograd.grad(loss(values, x), weights, create_graph=True)
        ahead = values | {names[id(w)]: w - 0.2 * grad for w, grad in zip(weights, grads)}
        exact = torch.autograd.grad(loss(ahead, held), gates)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(sn.parameter_groups(model, 0.2, 0.0), lr=0.2)
    losses = (lambda: loss(values, x)), (lambda: loss(values, held))
    found = gate_gradients(*losses, gates, weights, optimizer, model)
    torch.testing.assert_close(found, list(exact), rtol=1e-3, atol=1e-7)
    assert torch.equal(torch.get_rng_state(), after)  # the probes draw nothing more

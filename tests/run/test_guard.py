"""The guard stops before the update, names the first layer gone bad, and skips up to a limit."""

import math

import pytest
import torch
from torch import nn

import sn
from sn.training.run.guard import (
    FiniteGuard,
    can_decide,
    check_finite,
    first_bad_layer,
    gradient_norm,
)

NAN, INF = float("nan"), float("inf")


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), sn.SwitchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_numbers_are_refused(bad):
    guard, model = FiniteGuard(), network()
    assert guard.allows(torch.tensor([1.0, 2.0]), model, "step 1")
    for values in ([bad, 1.0], [1.0, bad]):
        with pytest.raises(FloatingPointError, match="not finite at step 7"):
            guard.allows(torch.tensor(values), model, "step 7")


def test_says_whether_loss_or_gradient():
    for values, what in (([NAN, 1.0], "loss is"), ([1.0, INF], "gradient is")):
        with pytest.raises(FloatingPointError, match=what):
            check_finite(torch.tensor(values), network(), "here")


def test_first_bad_statistic_is_named():
    model = nn.Sequential(network(), network())
    model[1][1].running_var[2] = NAN
    model[0][3].weight.data[0] = NAN  # a weight; statistics come first, they are updated first
    with pytest.raises(FloatingPointError, match="first bad: 1.1.running_var"):
        check_finite(torch.tensor(NAN), model, "here")


def test_bad_gradient_is_named():
    model = network()
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert torch.isfinite(gradient_norm(model))
    model[1].mean_weight.grad[1] = INF
    values = torch.stack([torch.tensor(1.0).double(), gradient_norm(model)])
    with pytest.raises(FloatingPointError, match="the gradient of 1.mean_weight"):
        FiniteGuard().allows(values, model, "here")


def test_the_layer_is_found_by_running_again():
    """All weights are finite, one layer overflows: GN and LN networks hold no bad statistic."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.data.fill_(1)
    model[2].weight.data.fill_(3e38)
    x = torch.ones(1, 2)
    assert first_bad_layer(model, lambda: model(x)) == "2"
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert first_bad_layer(model, lambda: compiled(x)) == "2"
    with pytest.raises(FloatingPointError, match="first bad: the output of 2$"):
        check_finite(torch.tensor(INF), model, "here", lambda: model(x))
    assert not any(m._forward_hooks for m in model.modules())


def test_gradients_of_an_earlier_step_are_not_named():
    """An evaluation has none of its own."""
    model = network()
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    model[0].weight.grad[0] = NAN
    with pytest.raises(FloatingPointError, match="loss is not finite at here, though all weights"):
        check_finite(torch.tensor(NAN), model, "here")


def test_gradient_norm_is_that_of_all_gradients():
    model = network().double()
    model(torch.randn(2, 3, 6, 6).double()).square().sum().backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient_norm(model), flat.norm())
    half = nn.Linear(300, 300).half()
    half.weight.grad = torch.full_like(half.weight, 60000.0)  # its norm is no float16
    assert gradient_norm(half).item() == pytest.approx(60000 * 300, rel=1e-3)
    assert gradient_norm(nn.ReLU()).item() == 0


def test_skips_up_to_the_limit_and_restores_the_statistics():
    model, guard = network(), FiniteGuard(max_skips=2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for skip in (1, 2):
        guard.begin(model)
        loss = model(torch.full((2, 3, 6, 6), NAN)).sum()
        assert math.isnan(model[1].running_mean[0])
        assert not guard.allows(loss.detach()[None], model, "here") and guard.skipped == skip
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]), name
    with pytest.raises(FloatingPointError, match="2 steps were skipped before"):
        guard.allows(torch.tensor(NAN), model, "here")


def test_the_first_step_of_a_parameter_is_not_left_to_the_device():
    """The control parameters' first step, before the weights', is none of theirs."""
    weight, control, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [weight, frozen]}, {"params": [control]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True)
    control.grad = torch.ones(2)
    optimizer.step()
    control.grad, weight.grad = None, torch.ones(2)
    assert not can_decide(optimizer)
    optimizer.step()
    assert can_decide(optimizer)
    assert not can_decide(torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True))


def test_what_counts_as_waiting(synchronisations):
    """The counter of tests that a step waits for nothing sees every way to ask for a number."""
    one = torch.ones(1)
    ways = [one.item, one.tolist, one.__bool__, one.__float__, one.__int__, one.cpu, one.nonzero]
    ways.append(lambda: [][one.long()] if one > 2 else torch.isfinite(one).all().item())
    for way in ways:
        with synchronisations() as found:
            way()
        assert found, way
    with synchronisations() as found:
        torch.where(one > 0, one, one + 1).sum()
    assert not found


@pytest.mark.parametrize("values, what", [
    ([0.5, float("inf"), 3.0], "loss"), ([0.5, 1.0, float("inf")], "gradient"),
    ([float("nan")], "loss"),
])  # fmt: skip
def test_any_of_several_losses_is_called_a_loss(values, what):
    with pytest.raises(FloatingPointError, match=f"^{what} is not finite"):
        FiniteGuard().allows(torch.tensor(values), nn.Linear(2, 2), "step 3")

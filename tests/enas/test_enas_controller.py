"""The controller against brute force on a tiny space: probabilities, entropies, policy gradient."""

import itertools
import json

import pytest
import torch

from enas.controller import Baseline, Controller, reinforce_loss
from enas.space import (
    OPERATIONS,
    Architecture,
    Node,
    from_json,
    loose_ends,
    random_decisions,
    read_architecture,
    to_json,
)

NORMS = ("none", "ln", "gn", "sn_ln_gn")


def tiny(norm="sn_ln_gn", nodes=1, operations=2, **options):
    """A controller in float64, far from uniform."""
    torch.manual_seed(0)
    options = {"hidden_size": 8, "num_groups": 2, "init": 1.0, "operation_bias": 0.3} | options
    return Controller(nodes, norm=norm, operations=operations, **options).double()


def everything(nodes=1, operations=2):
    """All decisions of the space (K, 2, nodes, 4)."""
    node = [
        itertools.product(range(k + 2), range(operations), range(k + 2), range(operations))
        for k in range(nodes)
    ]
    cells = list(itertools.product(*node))
    return torch.tensor(list(itertools.product(cells, cells)))


# --- the distribution


@pytest.mark.parametrize("norm", NORMS)
def test_probabilities_of_all_architectures_sum_to_one(norm):
    space = everything()
    assert len(space) == (2 * 2 * 2 * 2) ** 2
    controller = tiny(norm)
    log_prob = controller(decisions=space).log_prob
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_prob.exp().max() > 1.5 * log_prob.exp().min()  # nothing uniform


def one_at_a_time(controller, prefix, nodes, operations):
    """log-softmax of the next decision after `prefix`, through the probabilities of the rest.

    Brute force: p(choice | prefix) = sum of p over the architectures that begin so, over the sum of
    those that share the prefix.
    """
    space = everything(nodes, operations)
    flat = space.flatten(1)
    begins = (flat[:, : len(prefix)] == torch.tensor(prefix, dtype=torch.long)).all(1)
    probs = controller(decisions=space[begins]).log_prob.exp()
    following = flat[begins][:, len(prefix)]
    shares = torch.stack([probs[following == c].sum() for c in range(int(following.max()) + 1)])
    return shares / probs.sum()


def test_entropy_is_the_sum_of_the_decisions_entropies():
    """Each decision's distribution is rebuilt from the joint probabilities alone."""
    controller = tiny()
    chosen = everything()[[3, 100, 201]]
    entropies = controller(decisions=chosen).entropy
    for flat, entropy in zip(chosen.flatten(1).tolist(), entropies):
        expected = 0.0
        for length in range(len(flat)):
            p = one_at_a_time(controller, flat[:length], 1, 2)
            expected -= (p * p.log()).sum()
        assert entropy.item() == pytest.approx(expected.item(), abs=1e-12)


def test_mean_entropy_is_the_entropy_of_the_whole():
    """The chain rule: E[sum of conditional entropies] = -sum p log p over all architectures."""
    samples = tiny()(decisions=everything())
    p = samples.log_prob.exp()
    whole = -(p * samples.log_prob).sum()
    assert (p * samples.entropy).sum().item() == pytest.approx(whole.item(), abs=1e-12)


def test_samples_follow_the_probabilities():
    """5,000 draws: chi-squared of 256 cells with 255 degrees of freedom, 5 deviations at most."""
    controller, space = tiny(), everything()
    torch.manual_seed(1)
    with torch.no_grad():
        drawn = controller(5_000)
        p = controller(decisions=space).log_prob.exp()
    torch.testing.assert_close(controller(decisions=drawn.decisions).log_prob, drawn.log_prob)
    bits = 2 ** torch.arange(8)
    counts = torch.bincount((drawn.decisions.flatten(1) * bits).sum(1), minlength=256)
    expected = torch.zeros(256, dtype=torch.float64)
    expected[(space.flatten(1) * bits).sum(1)] = 5_000 * p
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5


def test_later_inputs_may_be_earlier_nodes():
    decisions = tiny(nodes=3, operations=5)(500).decisions
    for node in range(3):
        for place in range(4):
            seen = set(decisions[:, :, node, place].flatten().tolist())
            assert seen == set(range(5 if place % 2 else node + 2))


@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_is_its_members(norm):
    controller = tiny(norm, nodes=2)
    decisions = everything(2)[[5, 777, 4000]]
    batch = controller(decisions=decisions).log_prob
    for one, log_prob in zip(decisions, batch):
        torch.testing.assert_close(controller(decisions=one[None]).log_prob[0], log_prob)


def test_logits_are_squashed_as_the_recipe_says():
    """1.10 tanh for inputs, 1.10 / 2.5 tanh for operations; +/- 0.25 in the normal cell alone."""
    torch.manual_seed(0)
    controller = Controller(1, hidden_size=8, init=50.0, norm="none")  # tanh saturates
    with torch.no_grad():
        controller.score_operation.bias.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0, 9.0]) * 1e3)
        controller.score_operation.weight.zero_()
    seen = []
    choose = torch.Tensor.log_softmax

    def watched(logits, dim):
        seen.append(logits.detach())
        return choose(logits, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "log_softmax", watched)
        controller(1)
    inputs, operations = seen[0::2], seen[1::2]
    assert all(logits.abs().max() <= 1.1 + 1e-6 for logits in inputs)
    sign = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]]) * 1.10 / 2.5
    bias = torch.tensor([[0.25, 0.25, -0.25, -0.25, -0.25]])
    for logits in operations[:2]:
        torch.testing.assert_close(logits, sign + bias)
    for logits in operations[2:]:
        torch.testing.assert_close(logits, sign)


def test_probabilities_that_are_not_finite_end_the_search_in_words():
    controller = Controller(2, hidden_size=8, operation_temperature=1e-300)
    with pytest.raises(FloatingPointError, match="probabilities are not finite"):
        controller(1)


def test_weights_start_small_and_norms_as_norms():
    controller = Controller()
    assert controller.cell.weight_hh.abs().max() <= 0.1
    assert (controller.cell.norms["cell"].weight == 1).all()
    assert "operation_bias" not in controller.state_dict()
    assert "cell.bias_ih" not in controller.state_dict()


# --- REINFORCE


def rewards_of(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("baseline", [0.0, 0.4])
@pytest.mark.parametrize("norm", NORMS)
def test_policy_gradient_is_that_of_the_expected_reward(norm, baseline):
    """E[gradient of the loss] = -d E[reward], by finite differences along random directions."""
    controller, space = tiny(norm), everything()
    rewards = rewards_of(len(space))
    parameters = list(controller.parameters())

    samples = controller(decisions=space)
    p = samples.log_prob.exp().detach()
    # the mean over samples of their losses, each counted as often as it is drawn
    loss = reinforce_loss(samples, len(space) * p * (rewards - baseline), 0.0)
    policy = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    def expected_reward():
        with torch.no_grad():
            return (controller(decisions=space).log_prob.exp() * rewards).sum().item()

    generator = torch.Generator().manual_seed(1)
    step = 1e-5
    for _ in range(4):
        direction = [torch.randn(p.shape, generator=generator).double() for p in parameters]
        values = []
        for sign in (1, -2, 1):  # to +step, to -step, back
            with torch.no_grad():
                for parameter, d in zip(parameters, direction):
                    parameter += sign * step * d
            values.append(expected_reward())
        slope = (values[0] - values[1]) / (2 * step)
        along = sum((g * d).sum().item() for g, d in zip(policy, direction))
        assert -along == pytest.approx(slope, rel=1e-5, abs=1e-9)
        assert abs(slope) > 1e-4


def test_loss_of_one_sample_by_hand():
    samples = tiny()(decisions=everything()[[7]])
    loss = reinforce_loss(samples, 0.9, 0.25)
    assert loss.item() == pytest.approx(-(0.9 - 0.25) * samples.log_prob.item(), abs=1e-14)


def test_baseline_is_a_moving_average_from_zero():
    baseline, expected = Baseline(0.99), 0.0
    for reward in (0.5, 0.7, 0.1):
        expected = 0.99 * expected + 0.01 * reward
        assert baseline.update(reward) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_finds_the_best_of_eight_arms(norm):
    """Rewards depend on the first operation of the normal cell alone; no other term helps."""
    torch.manual_seed(0)
    arms, best = 8, 5
    controller = Controller(1, 16, norm, operations=arms, operation_bias=0.0, tanh_constant=None)
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.03, betas=(0.0, 0.999), eps=1e-3)
    baseline = Baseline(0.9)
    for _ in range(60):
        samples = controller(8)
        arm = samples.decisions[:, 0, 0, 1]
        rewards = 0.1 * arm / arms + (arm == best) * 0.5 + 0.1 * torch.rand(8)
        optimizer.zero_grad()
        reinforce_loss(samples, rewards, baseline.update(rewards.mean().item())).backward()
        optimizer.step()
    with torch.no_grad():
        chosen = controller(200).decisions[:, 0, 0, 1]
    assert (chosen == best).float().mean() > 0.8


# --- architectures


def test_json_keeps_an_architecture(tmp_path):
    decisions = random_decisions(1, 5, generator=torch.Generator().manual_seed(0))[0]
    architecture = Architecture.from_decisions(decisions)
    assert torch.equal(architecture.decisions(), decisions)
    assert from_json(to_json(architecture)) == architecture
    for name, text in (
        ("own", to_json(architecture)),
        ("in", {"architecture": to_json(architecture)}),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(text))
        assert read_architecture(path) == architecture


def test_loose_ends_by_hand():
    assert loose_ends((Node(0, 4, 1, 4), Node(2, 0, 0, 1))) == [3]
    assert loose_ends((Node(0, 4, 0, 4), Node(0, 0, 0, 1))) == [1, 2, 3]


def test_random_architectures_are_uniform():
    """Each decision's counts within 5 deviations of equal shares, over 2,000 architectures."""
    decisions = random_decisions(2000, 3, generator=torch.Generator().manual_seed(0))
    for node in range(3):
        for place in range(4):
            choices = len(OPERATIONS) if place % 2 else node + 2
            counts = torch.bincount(decisions[:, :, node, place].flatten(), minlength=choices)
            assert len(counts) == choices
            assert ((counts - 4000 / choices).abs() < 5 * (4000 / choices) ** 0.5).all()


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("[", ["arch.json"]),
        ("{}", ["normal and reduction"]),
        ('{"normal": [], "reduction": []}', ["0 and 0 nodes"]),
        ('{"normal": [[0, "identity", 2, "identity"]], "reduction": []}', ["input 2", "0 to 1"]),
        ('{"normal": [[0, "conv", 1, "identity"]], "reduction": []}', ["'conv'", "sep_conv_3x3"]),
        ('{"normal": [[0, "identity"]], "reduction": []}', ["normal node 0", "expected ["]),
    ],
)
def test_bad_architecture_file_is_named(text, wanted, tmp_path):
    path = tmp_path / "arch.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_architecture(path)
    for words in [*wanted, "arch.json"]:
        assert words in str(error.value)
    with pytest.raises(FileNotFoundError, match="no architecture file"):
        read_architecture(tmp_path / "none.json")

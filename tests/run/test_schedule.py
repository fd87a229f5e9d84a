"""The learning rate of Table 4.1's settings and of both schedules, against torch's schedulers."""

import math

import pytest
import torch

from sn.training.run.config import Setting
from sn.training.run.schedule import lr_factor, mix_seed, steps_per_epoch

IMAGES = 1_281_167
# (gpus, images per gpu): (lr, steps per epoch); * official README, the rest by the same rule
TABLE_4_1 = {
    (8, 32): (0.1, 5005),  # *
    (8, 16): (0.05, 10010),
    (8, 8): (0.025, 20019),
    (8, 4): (0.0125, 40037),  # *
    (8, 2): (0.00625, 80073),
    (8, 1): (0.003125, 160146),  # *
    (1, 32): (0.0125, 40037),
    (1, 16): (0.00625, 80073),
    (1, 8): (0.003125, 160146),
}
MILESTONES = (0.3, 0.6, 0.9)
WARMUP = 5 / 120


@pytest.mark.parametrize("setting", TABLE_4_1, ids=str)
def test_settings_of_table_4_1(setting):
    lr, steps = TABLE_4_1[setting]
    assert Setting(*setting, "auto").lr(0.1, 256) == pytest.approx(lr, rel=1e-12)
    assert steps_per_epoch(IMAGES, *setting) == steps


@pytest.mark.parametrize("images, setting, steps", [
    (1, (8, 32), 1), (256, (8, 32), 1), (257, (8, 32), 2), (41, (8, 3), 2), (48, (8, 3), 2),
    (49, (8, 3), 3), (7, (1, 1), 7), (9, (2, 2), 3),
])  # fmt: skip
def test_steps_of_small_sets(images, setting, steps):
    """As with torch's DistributedSampler in front of a loader that keeps the last batch."""
    assert steps_per_epoch(images, *setting) == steps
    share = len(torch.utils.data.DistributedSampler(range(images), setting[0], 0))
    loader = torch.utils.data.DataLoader(range(share), setting[1])
    assert len(loader) == steps


def torch_lrs(make, steps):
    """Learning rate of every step under a torch scheduler, base lr 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("epochs", [10, 20, 50, 90, 100, 120, 200])
@pytest.mark.parametrize("steps", [1, 7, 5005])
def test_step_decay_is_multistep(epochs, steps):
    """At the first and last step of every epoch; milestones fall on whole epochs of these runs."""
    milestones = [round(epochs * milestone) for milestone in MILESTONES]
    expected = torch_lrs(
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones, gamma=0.1), epochs
    )
    for epoch, rate in enumerate(expected):
        for step in {0, steps - 1}:
            progress = (epoch * steps + step) / (epochs * steps)
            ours = lr_factor(progress, "step", MILESTONES, 0.1)
            assert ours == pytest.approx(rate, rel=1e-9), (epoch, step)


def test_step_decay_between_epochs():
    """8 epochs of 10 steps: milestones at steps 24, 48 and 72."""
    factors = [lr_factor(step / 80, "step", MILESTONES, 0.5) for step in range(80)]
    assert factors == [1.0] * 24 + [0.5] * 24 + [0.25] * 24 + [0.125] * 8


def test_cosine_with_warmup():
    """120 epochs of 13 steps, 5 of them linear from 0: an independent formula, per step."""
    steps, warm = 120 * 13, 5 * 13
    for step in range(steps):
        if step < warm:
            expected = step / warm
        else:
            expected = (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        assert lr_factor(step / steps, "cosine", warmup=WARMUP) == pytest.approx(expected, abs=1e-9)


def test_cosine_is_torchs():
    expected = torch_lrs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50), 50)
    ours = [lr_factor(step / 50, "cosine") for step in range(50)]
    assert ours == pytest.approx(expected, abs=1e-9)
    warm = torch_lrs(
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LambdaLR(o, lambda step: step / 10),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
            ],
            milestones=[10],
        ),
        50,
    )
    ours = [lr_factor(step / 50, "cosine", warmup=0.2) for step in range(50)]
    assert ours == pytest.approx(warm, abs=1e-9)


def test_shape_of_the_schedules():
    grid = [i / 997 for i in range(997)]
    step = [lr_factor(p, "step", MILESTONES) for p in grid]
    cosine = [lr_factor(p, "cosine", warmup=WARMUP) for p in grid]
    assert step == sorted(step, reverse=True) and set(map("{:.3f}".format, step)) == {
        "1.000", "0.100", "0.010", "0.001",
    }  # fmt: skip
    top = cosine.index(max(cosine))
    assert cosine[0] == 0 and cosine[:top] == sorted(cosine[:top])
    assert cosine[top:] == sorted(cosine[top:], reverse=True)
    assert 0.999 < max(cosine) <= 1 and 0 < cosine[-1] < 1e-5


def test_step_with_warmup():
    assert lr_factor(0.1, "step", (0.5,), warmup=0.2) == pytest.approx(0.5)
    assert lr_factor(0.2, "step", (0.5,), warmup=0.2) == 1
    assert lr_factor(0.5, "step", (0.5,), warmup=0.2) == pytest.approx(0.1)
    assert lr_factor(0.9, "step", ()) == 1


@pytest.mark.parametrize("progress, warmup", [(0.5, 0.0), (0.0, 0.2)])
def test_unknown_decay(progress, warmup):
    """At once, in the warm-up too: not after five epochs of it."""
    with pytest.raises(ValueError, match=r"schedule.decay='linear'.*step.*cosine"):
        lr_factor(progress, "linear", warmup=warmup)


def test_mix_seed():
    """32 bits, the same on every machine, and neighbours share nothing."""
    assert mix_seed(0, 1, 2) == mix_seed(0, 1, 2)
    assert mix_seed(0, 1) != mix_seed(1, 0) and mix_seed(1, 11) != mix_seed(11, 1)
    assert mix_seed(0) != mix_seed(0, 0) and mix_seed(12, 3) != mix_seed(1, 23)
    seeds = [mix_seed(s, e, i) for s in range(3) for e in range(20) for i in range(500)]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert len(set(seeds)) > len(seeds) - 5  # 0.1 collisions expected among 30,000
    ones = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(32)]
    assert all(0.48 < share < 0.52 for share in ones)
    flips = [(a ^ b).bit_count() for a, b in zip(seeds, seeds[1:])]
    assert 15.8 < sum(flips) / len(flips) < 16.2

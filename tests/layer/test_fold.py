"""sn.fold: the folded network's outputs are the network's, and only what may fold does."""

import copy

import oracle
import pytest
import torch
from torch import nn

import sn
from sn.training.classification.models import build_model


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(model, choice=2):
    """Random weights and statistics; every sparse gate settled on statistic `choice`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if getattr(layer, "running_mean", None) is not None:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    value = getattr(layer, name)
                    if value is not None:
                        drawn = torch.rand(value.shape, generator=generator) + 0.5
                        value.copy_(drawn if name != "bias" else drawn - 1)
            if hasattr(layer, "mean_choice"):
                layer.mean_choice[choice] = layer.var_choice[choice] = 1
    return model.double().eval()


def count(model, kind):
    return sum(isinstance(m, kind) for m in model.modules())


NETWORKS = [("resnet20", "cifar", n) for n in ("ssn", "bn", "frozen_bn", "sync_bn", "brn", "bkn")]


@pytest.mark.parametrize(
    ("name", "source", "norm"), [*NETWORKS, ("resnet50", "torchvision", "ssn")]
)
def test_networks(norm, source, name):
    torch.manual_seed(0)
    model = randomised(build_model(name, source, 5, sn.make_norm(norm)))
    state = copy.deepcopy(model.state_dict())
    folded = sn.fold(model.train())
    layers = {"resnet20": 19, "resnet50": 53}[name]
    assert count(folded, sn.NoNorm) == layers and count(model, sn.NoNorm) == 0
    assert not [k for k in folded.state_dict() if "running" in k]
    x = oracle.values((2, 3, 32, 32))
    torch.testing.assert_close(folded(x), model.eval()(x))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_kinds_of_convolution(dim, bias, affine):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dim - 1](4, 6, 3, padding=1, groups=2, bias=bias)
    norm = sn.make_norm("ssn", dim=dim, affine=affine)(6)
    model = randomised(nn.Sequential(conv, norm, nn.ReLU(inplace=True)), len(norm.statistics) - 1)
    x = oracle.values((2, 4, *[5] * dim))
    folded = sn.fold(model)
    assert type(folded[1]) is sn.NoNorm
    torch.testing.assert_close(folded(x), model(x))


class Odd(nn.Module):
    """Convolutions whose outputs are used twice, called twice, or of tied weights."""

    def __init__(self):
        super().__init__()
        self.twice, self.called, self.a, self.b = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.b.weight = self.a.weight
        self.norms = nn.ModuleList(sn.GhostBatchNorm2d(4) for _ in range(6))
        self.standardised = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))

    def forward(self, x):
        n = self.norms
        y = self.twice(x)
        y = y + n[0](y)
        y = n[1](self.called(y)) + n[2](self.called(y))
        y = n[3](self.a(y)) + n[4](self.b(y))
        return n[5](self.standardised(y))


def test_what_does_not_fold():
    model = randomised(Odd())
    folded = sn.fold(model)
    assert count(folded, sn.NoNorm) == 0
    x = oracle.values((2, 4, 3, 3))
    torch.testing.assert_close(folded(x), model(x))
    for norm in (sn.SwitchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4),
                 nn.BatchNorm2d(4, track_running_stats=False),
                 sn.SparseSwitchNorm2d(4)):  # fmt: skip
        assert count(sn.fold(nn.Sequential(nn.Conv2d(4, 4, 1), norm)), sn.NoNorm) == 0
    mixed = randomised(nn.Sequential(nn.Conv2d(4, 4, 1), sn.SparseSwitchNorm2d(4)))
    mixed[1].mean_choice.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert count(sn.fold(mixed), sn.NoNorm) == 0
    split = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    assert count(sn.fold(split), sn.NoNorm) == 0

    class Dynamic(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="cannot trace"):
        sn.fold(Dynamic())


def test_converted_layers_with_an_activation_fold():
    timm = pytest.importorskip("timm")
    model = timm.create_model("regnetx_002", num_classes=5)
    before = sum("BatchNorm" in type(m).__name__ for m in model.modules())
    model = sn.convert(model, "ssn", keep_outputs=True)
    model = randomised(model)
    folded = sn.fold(model)
    assert count(folded, sn.NoNorm) == before and count(folded, sn.SwitchNorm2d) == 0
    x = oracle.values((1, 3, 64, 64))
    torch.testing.assert_close(folded(x), model(x))


class Clipped(sn.SwitchNorm2d):
    def forward(self, input):
        return super().forward(input).clamp(max=0.5)


class Standardised(nn.Conv2d):
    """Weight standardisation, in the place that torch leaves for such things."""

    def _conv_forward(self, input, weight, bias):
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), bias)


class Reads(nn.Module):
    """Takes a layer's parameter for something else as well."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.norm, self.layer = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), layer

    def forward(self, x):
        return self.norm(self.conv(x)) * getattr(self, self.layer).weight.norm()


def with_hook(place, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if kind == "after":
        model[place].register_forward_hook(lambda layer, args, output: 2 * output)
    else:
        model[place].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), sn.SwitchNormAct2d(4, statistics=("bn",))),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Clipped(4, statistics=("bn",))),
        lambda: nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4)),
        lambda: Reads("conv"),
        lambda: Reads("norm"),
        *[lambda p=place, k=kind: with_hook(p, k) for place in (0, 1) for kind in ("after", "pre")],
    ],
)
def test_what_a_layer_does_beside_is_not_lost(make):
    model = randomised(make())
    folded = sn.fold(model)
    assert count(folded, sn.NoNorm) == 0
    x = oracle.values((2, 3, 6, 6))
    torch.testing.assert_close(folded(x), model(x))


class Aliased(nn.Module):
    """Holds its norm twice: by name, and in a Sequential or a plain list."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.steps = kind([self.conv, self.bn])

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize("kind", [list, nn.ModuleList])
def test_norms_that_the_network_holds_twice_are_applied_once(kind):
    model = randomised(Aliased(kind))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    folded = sn.fold(model)
    assert type(folded.bn) is sn.norms.NoNorm and folded.steps[1] is folded.bn
    torch.testing.assert_close(copy.deepcopy(folded)(x), model(x))
    assert type(model.bn) is nn.BatchNorm2d


def test_a_network_that_refuses_symbols_without_a_word_is_named():
    class Refuses(nn.Module):
        def forward(self, x):
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"cannot trace the model \(NotImplementedError\)"):
        sn.fold(Refuses())

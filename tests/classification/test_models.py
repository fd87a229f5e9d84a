"""Models built with a norm callable: sizes, names, initial values, refusals."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import sn
from sn.modules import SwitchNormBase
from sn.training.classification.models import CIFAR_RESNETS, DropoutLinear, PadShortcut, build_model


def build(name, source="torchvision", norm="bn", classes=1000, device="meta", **options):
    with torch.device(device):
        return build_model(name, source, classes, sn.make_norm(norm), **options)


def count(model):
    return sum(p.numel() for p in model.parameters())


def norms_of(model):
    kinds = (SwitchNormBase, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    return [module for module in model.modules() if isinstance(module, kinds)]


def test_parameter_counts():
    """Resnet20: He et al.'s 0.27M with a bias in fc; ResNet-50: torchvision's own."""
    assert count(build("resnet20", "cifar", classes=10)) == 269_722
    assert count(build("resnet50")) == 25_557_032 == count(torchvision.models.resnet50())
    assert len(norms_of(build("resnet50"))) == 53
    assert len(norms_of(build("resnet20", "cifar"))) == 19


@pytest.mark.parametrize("source, name", [("torchvision", "resnet50"), ("cifar", "resnet20")])
def test_sn_adds_six_numbers_a_layer(source, name):
    plain, switched = build(name, source), build(name, source, "sn")
    layers = [module for module in switched.modules() if isinstance(module, SwitchNormBase)]
    assert len(layers) == len(norms_of(plain))
    assert count(switched) - count(plain) == 6 * len(layers)
    assert count(build(name, source, "sn_in_ln")) - count(plain) == 4 * len(layers)
    for norm in ("gn", "ln", "in"):
        assert count(build(name, source, norm)) == count(plain)


@pytest.mark.parametrize("norm", ["bn", "gn", "in", "ln", "sn", "sn_in_ln"])
@pytest.mark.parametrize("name", CIFAR_RESNETS)
def test_cifar_resnets_train_a_step(name, norm):
    model = build(name, "cifar", norm, 10, "cpu")
    for size in (16, 32, 31):
        assert model(torch.randn(2, 3, size, size)).shape == (2, 10)
    loss = F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_resnet20_is_the_papers():
    """Widths 16, 32, 64; three blocks a stage; parameter-free shortcuts; global average."""
    model = build("resnet20", "cifar", "bn", 10, "cpu")
    shapes = [tuple(m.weight.shape[:2]) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == (
        [(16, 3)] + 6 * [(16, 16)] + [(32, 16)] + 5 * [(32, 32)] + [(64, 32)] + 5 * [(64, 64)]
    )
    strides = [m.stride[0] for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert strides.count(2) == 2
    x = torch.randn(2, 16, 7, 8)
    y = PadShortcut(16, 32)(x)
    assert y.shape == (2, 32, 4, 4) and torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().sum() == y[:, 24:].abs().sum() == 0
    assert not list(PadShortcut(16, 32).parameters())


@pytest.mark.parametrize("name, blocks", [("resnet8", 1), ("resnet14", 2), ("resnet20", 3)])
@pytest.mark.parametrize("width", [None, 16, 8, 24])
def test_small_cifar_resnets(name, blocks, width):
    """Depth 6 blocks + 2; stages of one, two and four widths; parameter-free shortcuts."""
    model = build(name, "cifar", "bn", 10, "cpu", width=width)
    w = width or 16
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == int(name.removeprefix("resnet")) == 6 * blocks + 2
    assert {m.kernel_size for m in convolutions} == {(3, 3)}
    widths = [m.weight.shape[0] for m in convolutions]
    assert widths == [w] * (2 * blocks + 1) + [2 * w] * 2 * blocks + [4 * w] * 2 * blocks
    assert sum(isinstance(m, PadShortcut) for m in model.modules()) == 2
    weights = 9 * 3 * w + sum(9 * a * b for a, b in zip(widths, widths[1:]))
    assert count(model) == weights + 2 * sum(widths) + (4 * w + 1) * 10
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_thin_resnets(norm):
    """Of width 64 torchvision's ResNet-18; of width 16 the same with a quarter of the channels."""
    ours = build("resnet18", "thin", norm, 10, "cpu", width=64).eval()
    theirs = build("resnet18", "torchvision", norm, 10, "cpu").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 33, 40)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    thin = build("resnet18", "thin", norm, 10, "cpu", width=16).state_dict()
    for name, tensor in theirs.state_dict().items():
        quarter = [max(1, n // 4) if n >= 64 else n for n in tensor.shape]
        assert list(thin[name].shape) == quarter, name
    ten = build("resnet10", "thin", norm, 10, "cpu", width=8)
    assert sum(isinstance(m, nn.Conv2d) for m in ten.modules()) == 9 + 3  # and projections
    assert ten(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("name, width", [("resnet34", 16), ("resnet10", None), ("resnet10", 12)])
def test_impossible_thin_resnet(name, width):
    with pytest.raises(ValueError, match=f"{name}"):
        build(name, "thin", width=width)


def test_width_of_a_foreign_model():
    with pytest.raises(ValueError, match="model.width=8.*use null"):
        build("resnet50", width=8)


def test_he_initialisation():
    """Normal with deviation sqrt(2 / (k k out)): the official code's, as torchvision's ResNet."""
    torch.manual_seed(0)
    for name, source in (("resnet20", "cifar"), ("resnet50", "torchvision")):
        model = build(name, source, "sn", 10, "cpu")
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 9000:
                k, out = module.kernel_size[0], module.out_channels
                assert module.weight.std().item() == pytest.approx((2 / (k * k * out)) ** 0.5, 0.05)
        for layer in norms_of(model):
            assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("norm", ["bn", "gn", "sn"])
@pytest.mark.parametrize(
    "name, source, last, blocks",
    [("resnet50", "torchvision", "bn3", 16), ("resnet20", "cifar", "bn2", 9),
     ("resnet10t", "timm", "bn2", 4)],
)  # fmt: skip
def test_zero_last_gain(name, source, last, blocks, norm):
    """The last gain of every residual block is 0, every other 1; without the option all are 1."""
    for zero in (True, False):
        model = build(name, source, norm, 10, "cpu", zero_init_residual=zero)
        gains = {
            name: module.weight
            for name, module in model.named_modules()
            if any(module is layer for layer in norms_of(model))
        }
        zeros = [name for name, gain in gains.items() if (gain == 0).all()]
        assert all((gains[name] == 1).all() for name in gains.keys() - set(zeros))
        if zero:
            assert len(zeros) == blocks
            assert all(name.startswith("layer") and name.endswith(last) for name in zeros)
        else:
            assert not zeros


def test_resnet50_strides_are_on_the_3x3():
    model = build("resnet50")
    assert model.layer2[0].conv1.stride == (1, 1) and model.layer2[0].conv2.stride == (2, 2)


@pytest.mark.parametrize("norm", ["sn", "gn"])
@pytest.mark.parametrize("name, source", [("resnet50", "torchvision"), ("resnet20", "cifar")])
def test_dropout_keeps_the_names(name, source, norm):
    plain = build(name, source, norm, 10)
    dropped = build(name, source, norm, 10, dropout=0.5)
    assert isinstance(dropped.fc, DropoutLinear) and not isinstance(plain.fc, DropoutLinear)
    assert list(plain.state_dict()) == list(dropped.state_dict())
    assert count(plain) == count(dropped)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    linear = nn.Linear(400, 3)
    layer = DropoutLinear(linear, 0.5)
    x = torch.ones(200, 400)
    layer.eval()
    assert torch.equal(layer(x), linear(x))
    layer.train()
    y = layer(x)
    assert not torch.equal(y[0], y[1])
    torch.testing.assert_close(y.mean(0), linear(x)[0], atol=0.1, rtol=0)
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    assert torch.equal(ours, linear(F.dropout(x, 0.5, True)))
    assert "dropout" in repr(layer) or "Dropout" in repr(layer)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2])
def test_impossible_dropout(dropout):
    with pytest.raises(ValueError, match=f"model.dropout={dropout}"):
        build("resnet20", "cifar", dropout=dropout)


def test_dropout_without_fc():
    with pytest.raises(ValueError, match="mobilenet_v2.*no fc"):
        build("mobilenet_v2", dropout=0.5)


@pytest.mark.parametrize(
    "name, source, words",
    [
        ("resnet5000", "torchvision", ["resnet5000", "resnet50"]),
        ("resnet5000", "timm", ["resnet5000", "timm.list_models", "resnet50"]),
        ("resnet50", "cifar", ["resnet50", "resnet20"]),
        ("resnet20", "keras", ["keras", "torchvision", "timm", "cifar"]),
        ("vgg11_bn", "torchvision", ["vgg11_bn", "norm_layer"]),
        ("densenet121", "torchvision", ["densenet121", "norm_layer"]),
        ("googlenet", "torchvision", ["googlenet", "norm_layer"]),
        ("inception_v3", "torchvision", ["inception_v3", "norm_layer"]),
        ("fasterrcnn_resnet50_fpn", "torchvision", ["fasterrcnn_resnet50_fpn"]),
        ("densenet121", "timm", ["densenet121", "norm+activation"]),
        ("efficientnet_b0", "timm", ["efficientnet_b0", "norm+activation", "sn.convert"]),
        ("regnety_002", "timm", ["regnety_002", "norm+activation"]),
        ("vgg11_bn", "timm", ["vgg11_bn"]),
        ("hrnet_w18_small", "timm", ["hrnet_w18_small", "norm_layer"]),
        ("convnext_tiny", "timm", ["convnext_tiny"]),
    ],
)
def test_refused(name, source, words):
    with pytest.raises(ValueError) as error:
        build(name, source)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("norm", ["bn", "gn", "sn", "in"])
@pytest.mark.parametrize(
    "name, source",
    [("resnet18", "timm"), ("resnet18", "torchvision"), ("mobilenet_v2", "torchvision")],
)
def test_library_models_carry_the_norm(name, source, norm):
    model = build(name, source, norm, 7, "cpu")
    wanted = type(sn.make_norm(norm)(4))
    assert {type(layer) for layer in norms_of(model)} == {wanted}
    model.eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_timm_resnet_is_torchvisions():
    assert count(build("resnet18", "timm")) == count(build("resnet18", "torchvision"))


def test_timm_dropout():
    model = build("resnet18", "timm", dropout=0.25)
    assert model.drop_rate == 0.25


@pytest.mark.slow
def test_every_torchvision_classifier_builds_or_says_why():
    """With SN in every norm layer, or a ValueError that names the model."""
    built = 0
    for name in torchvision.models.list_models(module=torchvision.models):
        try:
            model = build(name, norm="sn")
        except ValueError as error:
            assert name in str(error)
            continue
        except NotImplementedError:  # RegNets draw initial values that the meta device has not
            assert name.startswith("regnet")
            continue
        built += 1
        foreign = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert not foreign, name
    assert built > 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["resnet", "resnext", "res2net", "resnest", "sknet", "vgg", "mobilenet", "regnet",
               "densenet", "dla", "hrnet", "inception", "xception", "convnext", "efficientnet"]
)  # fmt: skip
def test_timm_families_keep_their_activations(family):
    """A model that builds with SN has as many activations as timm's own, or is refused."""
    import timm

    def activations(model):
        kinds = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU)
        return sum(isinstance(module, kinds) for module in model.modules())

    for name in timm.list_models(f"{family}*")[:6]:
        with torch.device("meta"):
            own = timm.create_model(name)
        try:
            model = build(name, "timm", "sn")
        except ValueError as error:
            assert name in str(error)
            continue
        assert activations(model) == activations(own), name

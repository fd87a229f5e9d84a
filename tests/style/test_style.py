"""The transformation network, VGG16's features and the losses, against torchvision and by hand."""

import re
import urllib.error

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

import sn
from sn.training.style import networks as style
from sn.training.style.networks import (
    RELUS,
    build_style_net,
    content_loss,
    gram,
    input_convention,
    layer_blocks,
    load_features,
    load_loss_network,
    style_loss,
    total_variation,
    vgg16_features,
)

NORMS = ("bn", "in", "sn", "ln", "gn", "none", "sn_in_ln", "ssn", "brn", "bkn")


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def torchvision_vgg16():
    """torchvision's VGG16 without memory for its classifier."""
    with torch.device("meta"):
        model = torchvision.models.vgg16(weights=None)
    model.features.to_empty(device="cpu")
    model.classifier = nn.Linear(4, 2)  # so that a state dict has keys that are not features'
    return model.eval()


@pytest.fixture(scope="module")
def vgg16():
    """torchvision's VGG16 with random weights and biases."""
    model, generator = torchvision_vgg16(), torch.Generator().manual_seed(3)
    for parameter in model.features.parameters():
        fan_in = 9 * parameter.shape[1] if parameter.dim() == 4 else 1
        parameter.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return model


# --- the network


def test_shapes_and_parameter_count():
    """The sizes of Johnson et al. by hand: k k in out + out per convolution, 2 C per norm."""
    net = build_style_net(sn.make_norm("in"))
    convolutions = [(9, 3, 32), (3, 32, 64), (3, 64, 128), *[(3, 128, 128)] * 10]
    convolutions += [(3, 128, 64), (3, 64, 32), (9, 32, 3)]
    weights = sum(k * k * i * o + o for k, i, o in convolutions)
    norms = 2 * (32 + 64 + 128 + 10 * 128 + 64 + 32)
    assert sum(p.numel() for p in net.parameters()) == weights + norms == 1_679_235
    shapes = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(o, i, k, k) for k, i, o in convolutions]
    assert sum(isinstance(m, nn.InstanceNorm2d) for m in net.modules()) == 15
    for height, width in ((8, 8), (12, 40), (64, 32)):
        assert net(images(2, 3, height, width)).shape == (2, 3, height, width)


def test_function_is_that_of_the_paper():
    """The same network written out with torch's functions, from the parameters alone."""
    net = build_style_net(sn.make_norm("in"))
    p = iter([p.detach() for p in net.parameters()])

    def conv_in(x, stride=1, zoom=1, relu=True):
        weight, bias, gain, shift = next(p), next(p), next(p), next(p)
        x = x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        pad = weight.shape[-1] // 2
        x = F.conv2d(F.pad(x, (pad,) * 4, mode="reflect"), weight, bias, stride)
        x = F.instance_norm(x, weight=gain, bias=shift)
        return x.clamp(min=0) if relu else x

    image = images(2, 3, 20, 28)
    x = conv_in(2 * image - 1)
    x = conv_in(conv_in(x, 2), 2)
    for _ in range(5):
        x = x + conv_in(conv_in(x), relu=False)
    x = conv_in(conv_in(x, zoom=2), zoom=2)
    x = F.conv2d(F.pad(x, (4,) * 4, mode="reflect"), next(p), next(p))
    expected = (127.5 + 150 * torch.tanh(x)) / 255
    torch.testing.assert_close(net(image), expected, atol=1e-5, rtol=1e-5)


def test_initial_weights_do_not_depend_on_the_norm():
    """Equal terms: every convolution starts from the same numbers."""
    states = {}
    for name in NORMS:
        torch.manual_seed(7)
        net = build_style_net(sn.make_norm(name))
        states[name] = {k: v for k, v in net.state_dict().items() if re.search("conv|last", k)}
    assert len(states["bn"]) == 32
    for name in NORMS[1:]:
        for key, value in states["bn"].items():
            assert torch.equal(states[name][key], value), f"{name}: {key}"


@pytest.mark.parametrize("norm", ["sn", "sn_in_ln"])
def test_fused_activations_are_the_same_function(norm):
    torch.manual_seed(1)
    plain = build_style_net(sn.make_norm(norm))
    fused = build_style_net(sn.make_norm(norm), fused_activation=True)
    fused.load_state_dict(plain.state_dict())
    assert sum(isinstance(m, sn.SwitchNormAct2d) for m in fused.modules()) == 15
    x = images(2, 3, 16, 16)
    outputs = []
    for net in (plain, fused):
        y = net(x)
        y.square().sum().backward()
        outputs.append(y)
    torch.testing.assert_close(*outputs)
    for ours, theirs in zip(fused.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)
    for net in (plain, fused):
        net.eval()
    torch.testing.assert_close(fused(x), plain(x))


def test_fused_activation_needs_a_switchable_norm():
    with pytest.raises(ValueError, match="needs norm=sn or sn_in_ln; GhostBatchNorm2d"):
        build_style_net(sn.make_norm("bn"), fused_activation=True)


def test_blocks_of_layers():
    blocks = layer_blocks(build_style_net(sn.make_norm("sn")))
    weights = sn.importance_weights(build_style_net(sn.make_norm("sn")))
    assert len(weights) == 15
    found = [blocks[name] for name in weights]
    residual = [f"residual.{i}" for i in range(5) for _ in range(2)]
    assert found == ["down"] * 3 + residual + ["up"] * 2


# --- VGG16


def file_of(vgg16, folder, kind):
    """A file of the given kind with `vgg16`'s weights, and the convention it should be read by."""
    if kind == "pth":
        path = folder / "vgg16-397923af.pth"
        torch.save(vgg16.state_dict(), path)
        return path, "torchvision"
    state = {key: value.half() for key, value in vgg16.features.state_dict().items()}
    path = folder / "features.safetensors"
    text = "RGB order, values 0..255, minus mean R,G,B = 123.68,116.779,103.939; no division by std"
    save_file(state, path, {"input": text})
    return path, "caffe"


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_features_equal_torchvisions(vgg16, tmp_path, kind):
    """Every ReLU, against hooks on torchvision's own module with its own preprocessing."""
    path, convention = file_of(vgg16, tmp_path, kind)
    network = load_loss_network(str(path))
    assert network.input == convention and network.weights == path.name
    x = images(2, 3, 40, 36)
    if convention == "caffe":
        mean = torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1)
        prepared = x * 255 - mean
    else:
        prepared = v2.functional.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected, relus = {}, {}
    stage = conv = 1
    for place, module in enumerate(vgg16.features):  # names counted off, not looked up
        if isinstance(module, nn.ReLU):
            relus[f"relu{stage}_{conv}"] = place
            conv += 1
        elif isinstance(module, nn.MaxPool2d):
            stage, conv = stage + 1, 1
    assert relus == RELUS
    if kind == "safetensors":
        half = {key: value.half().float() for key, value in vgg16.features.state_dict().items()}
        vgg16 = torchvision_vgg16()
        vgg16.features.load_state_dict(half)
    hooks = [
        vgg16.features[place].register_forward_hook(
            lambda module, args, output, name=name: expected.__setitem__(name, output.clone())
        )
        for name, place in relus.items()
    ]
    vgg16.features(prepared.clone())
    for hook in hooks:
        hook.remove()
    found = network(x, list(RELUS))
    assert list(found) == list(RELUS)
    for name, features in found.items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(features / scale, expected[name] / scale, msg=name)


def test_features_stop_at_the_last_layer_asked_for():
    network = load_loss_network("random")
    seen = []
    for place, module in enumerate(network.features):
        module.register_forward_hook(lambda *_, place=place: seen.append(place))
    assert list(network(images(1, 3, 16, 16), ["relu2_2"])) == ["relu2_2"]
    assert seen == list(range(9))


def test_loss_network_is_fixed():
    network = load_loss_network("random")
    x = images(1, 3, 16, 16).requires_grad_()
    network(x, ["relu4_3"])["relu4_3"].sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in network.features.parameters())


def test_random_is_marked_and_always_the_same():
    torch.manual_seed(5)
    first, state = load_loss_network("random"), torch.get_rng_state()
    second = load_loss_network("random", "caffe")
    assert first.describe() == {
        "weights": "random", "input": "torchvision", "sha256": second.sha256
    }  # fmt: skip
    assert second.input == "caffe"
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are left alone"


def test_without_weights_an_error_says_where_to_get_them(monkeypatch, tmp_path):
    """Never silently random; the message has the address, the cache and both ways out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError) as caught:
        load_loss_network("IMAGENET1K_V1")
    message = str(caught.value)
    for part in (
        *("download.pytorch.org/models/vgg16-397923af.pth", "no route to host", str(tmp_path)),
        *("vgg.weights=FILE", "vgg.weights=random"),
    ):
        assert part in message, part


def test_torchvision_weights_come_from_its_cache(vgg16, monkeypatch, tmp_path):
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save(vgg16.state_dict(), cache / "vgg16-397923af.pth")
    network = load_loss_network("IMAGENET1K_V1")
    assert (network.weights, network.input) == ("IMAGENET1K_V1", "torchvision")
    assert torch.equal(network.features[0].weight, vgg16.features[0].weight)


def test_state_dicts_that_are_no_vgg16(vgg16):
    """Each names the file and the first tensor that is wrong."""
    state = dict(vgg16.features.state_dict())
    features = vgg16_features()
    wrong = {
        "10.weight is missing": {k: v for k, v in state.items() if k != "10.weight"},
        "0.weight has shape": state | {"0.weight": torch.zeros(64, 1, 3, 3)},
        "7.bias is not finite": state | {"7.bias": torch.full((128,), torch.nan)},
        "7.bias is no tensor": state | {"7.bias": 0.0},
    }
    for message, content in wrong.items():
        with pytest.raises(ValueError, match=f"vgg.weights=a.pth.*{message}"):
            load_features(features, content, "a.pth")


def test_conversions_of_the_original_file_get_bgr(vgg16, tmp_path):
    """A BGR network is the RGB one with the first filters' channels in the other order."""
    state = {key: value.clone() for key, value in vgg16.features.state_dict().items()}
    save_file(state, rgb := tmp_path / "rgb.safetensors", {"input": "caffe"})
    state["0.weight"] = state["0.weight"].flip(1).contiguous()
    torch.save(state, bgr := tmp_path / "vgg16-00b39a1b.pth")
    x, layers = images(2, 3, 20, 16).double(), ["relu1_1", "relu3_3"]
    found, wanted = (load_loss_network(str(path)) for path in (bgr, rgb))
    for network in (found, wanted):
        network.features.double()
    assert (found.input, wanted.input) == ("caffe_bgr", "caffe")
    for layer in layers:
        torch.testing.assert_close(found(x, layers)[layer], wanted(x, layers)[layer])
    with pytest.raises(ValueError, match="vgg.input=caffe, but .* is made for caffe_bgr input"):
        load_loss_network(str(bgr), "caffe")


def test_files_that_are_no_weights(vgg16, tmp_path):
    broken, silent = tmp_path / "broken.pth", tmp_path / "silent.pth"
    broken.write_bytes(b"not a checkpoint")
    torch.save(vgg16.features.state_dict(), silent)
    with pytest.raises(FileNotFoundError, match="vgg.weights=nowhere.pth: no such file"):
        load_loss_network("nowhere.pth")
    with pytest.raises(ValueError, match=f"cannot read weights from {broken}"):
        load_loss_network(str(broken))
    with pytest.raises(ValueError, match="does not say what input it is made for; add vgg.input="):
        load_loss_network(str(silent))
    assert load_loss_network(str(silent), "caffe").input == "caffe"
    with pytest.raises(ValueError, match=r"unknown vgg.input='bgr'; choose one of"):
        load_loss_network("random", "bgr")


def test_safetensors_damaged_and_contradicted(vgg16, tmp_path):
    path, _ = file_of(vgg16, tmp_path, "safetensors")
    with pytest.raises(ValueError, match="vgg.input=torchvision, but .* is made for caffe input"):
        load_loss_network(str(path), "torchvision")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"cannot read weights from {path}"):
        load_loss_network(str(path))


def test_input_conventions():
    assert input_convention("caffe") == "caffe" and input_convention("Torchvision") == "torchvision"
    text = "RGB in [0, 1], mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225"
    assert input_convention(text) == "torchvision"
    text = "BGR, 0..255, minus 103.939, 116.779, 123.68"
    assert input_convention(text) == input_convention("caffe_bgr") == "caffe_bgr"
    assert input_convention("") is None and input_convention(None) is None
    assert style.INPUTS.keys() == style.LOSS_WEIGHTS.keys()


# --- losses


def test_gram_by_hand():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    for n in range(2):
        for a in range(3):
            for b in range(3):
                for i in range(4):
                    for j in range(5):
                        expected[n, a, b] += x[n, a, i, j] * x[n, b, i, j] / (3 * 4 * 5)
    torch.testing.assert_close(gram(x), expected)


def test_style_and_content_losses():
    """Means over all entries, as in the authors' code; a target Gram serves the whole batch."""
    features = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((3, 6), (5, 4))]
    targets = [gram(torch.randn(1, c, 3, 8, dtype=torch.float64)) for c in (3, 5)]
    expected = 0.0
    for layer, target in zip(features, targets):
        difference = torch.einsum("nahw,nbhw->nab", layer, layer) / layer[0].numel() - target
        expected += difference.square().sum() / difference.numel()
    torch.testing.assert_close(style_loss(features, targets), expected)
    assert style_loss([layer[:1] for layer in features], [gram(f[:1]) for f in features]) == 0
    a, b = features[0], features[0] + 2
    assert content_loss(a, b) == pytest.approx(4)


def test_total_variation_by_hand():
    x = torch.zeros(2, 3, 4, 5)
    x[0, 1, 2, 3] = 1 / 255  # one grey level above its four neighbours
    assert total_variation(x) == pytest.approx(4 / 2)
    x[0, 1, 0, 0] = 2 / 255  # a corner: two neighbours
    assert total_variation(x) == pytest.approx((4 + 8) / 2)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_total_variation_beside_the_authors(count):
    """2 / N of half the gradient of the squared differences, summed over the batch.

    Of an inner pixel that half is 4 x - (its four neighbours), by hand.
    """
    x = 255 * torch.rand(count, 3, 6, 7, generator=torch.Generator().manual_seed(0)).double()
    ours = torch.autograd.functional.jacobian(lambda x: total_variation(x / 255), x)
    neighbours = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    theirs = 4 * x[..., 1:-1, 1:-1] - neighbours
    torch.testing.assert_close(ours[..., 1:-1, 1:-1], 2 / count * theirs)


def test_losses_pull_an_image_to_its_style():
    """Gradient descent on the pixels lowers the style loss: signs and shapes are right."""
    network = load_loss_network("random")
    layers = ["relu1_2", "relu2_2"]
    red = torch.tensor([0.9, 0.1, 0.2]).view(3, 1, 1).expand(1, 3, 24, 32)
    with torch.no_grad():
        target = [gram(f) for f in network(red, layers).values()]
    x = torch.full((1, 3, 16, 16), 0.5).requires_grad_()
    optimizer, losses = torch.optim.Adam([x], 0.05), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = style_loss(list(network(x, layers).values()), target)
        (1e6 * loss).backward()  # far above Adam's eps
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

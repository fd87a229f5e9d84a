"""Batch Kalman Normalization against float64 formulas that integrate instead of using closed forms.

The oracle knows the networks by hand; nothing of the tracing enters it.
"""

import copy
import io
import pickle

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from workers import train_in_group

import sn
from sn.training.classification.models import build_model
from sn.training.detection import detectors
from sn.training.run.distributed import one_running_update
from sn.training.style.networks import build_style_net
from sn.variants.batch_kalman import _clip, _linear, _relu


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the oracle -----------------------------------------------------------------------------------

NODES, WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(200))


def expected(function, mean, var, low, high):
    """Integral of function(z) N(z; mean, var) over low..high, which may be tensors."""
    half = (high - low) / 2
    z = (low + high)[..., None] / 2 + half[..., None] * NODES
    density = torch.exp(-((z - mean[..., None]) ** 2) / (2 * var[..., None]))
    density = density / (2 * np.pi * var[..., None]).sqrt()
    return (function(z) * density * WEIGHTS).sum(-1) * half


def clipped(mean, var, top=None):
    """Moments of min(max(z, 0), top), by quadrature between 0 and where the density ends."""
    ends = [(mean + sign * 12 * var.sqrt()).clamp(min=0) for sign in (-1, 1)]
    if top is not None:
        ends = [end.clamp(max=top) for end in ends]
    first = expected(lambda z: z, mean, var, *ends)
    second = expected(lambda z: z**2, mean, var, *ends)
    if top is not None:
        last = (mean + 12 * var.sqrt()).clamp(min=top)
        over = expected(torch.ones_like, mean, var, torch.full_like(mean, top), last)
        first, second = first + top * over, second + top**2 * over
    return first, second - first**2


def convolved(moments, weight, bias=None, groups=1):
    """Moments of every output channel, one input channel and tap at a time."""
    mean, var = moments
    per_group = weight.shape[1]
    means, variances = [], []
    for o in range(weight.shape[0]):
        first = o // (weight.shape[0] // groups) * per_group
        m, v = 0, 0
        for i in range(per_group):
            for tap in weight[o, i].reshape(-1):
                m = m + tap * mean[:, first + i]
                v = v + tap**2 * var[:, first + i]
        means.append(m if bias is None else m + bias[o])
        variances.append(v)
    return torch.stack(means, 1), torch.stack(variances, 1)


def filtered(x, layer, groups, predicted=None):
    """(y, (mu, S)) of a batch in `groups` groups; mu and S (groups, C)."""
    q, outputs, kept = layer.gain, [], []
    for g, part in enumerate(x.chunk(groups)):
        flat = part.transpose(0, 1).flatten(1)
        m = flat.mean(1)
        s = ((flat - m[:, None]) ** 2).mean(1)
        if predicted is not None and (predicted[1][g] / s).mean() < 100:
            mu_p, s_p = predicted[0][g], predicted[1][g]
            s = q * s_p + (1 - q) * s + q * (1 - q) * (m - mu_p) ** 2
            m = q * mu_p + (1 - q) * m
        shape = (1, -1) + (1,) * (part.dim() - 2)
        y = (part - m.view(shape)) / (s.view(shape) + layer.eps).sqrt()
        outputs.append(y * layer.weight.view(shape) + layer.bias.view(shape))
        kept.append((m, s))
    return torch.cat(outputs), tuple(torch.stack(values) for values in zip(*kept))


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return model.double()


def agree(ours, theirs, x, leaves):
    torch.testing.assert_close(ours, theirs)
    upstream, leaves = oracle.values(ours.shape, 9), [x, *leaves]
    torch.testing.assert_close(
        torch.autograd.grad((ours * upstream).sum(), leaves),
        torch.autograd.grad((theirs * upstream).sum(), leaves),
    )


# --- moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [None, 6.0])
def test_moments_of_a_rectified_gaussian(top):
    mean, deviation = (v.flatten() for v in torch.meshgrid(
        torch.tensor([-3, -0.5, 0, 0.4, 5, 8]).double(), torch.tensor([0.05, 1, 4]).double(),
        indexing="ij"))  # fmt: skip
    ours = _relu((mean, deviation**2)) if top is None else _clip(top, (mean, deviation**2))
    torch.testing.assert_close(ours, clipped(mean, deviation**2, top), rtol=1e-6, atol=1e-9)
    # far from zero the ReLU does nothing, also in float32
    far = _relu((torch.tensor([1000.0]), torch.tensor([1.0])))
    torch.testing.assert_close(far, (torch.tensor([1000.0]), torch.tensor([1.0])))


@pytest.mark.parametrize("function", [_relu, lambda moments: _clip(6.0, moments)])
def test_moments_without_variance_have_finite_gradients(function):
    mean = torch.tensor([0.0, 0.3, -5, 7, 1e3], requires_grad=True)
    var = torch.zeros(5, requires_grad=True)
    result = function((mean, var))
    grads = torch.autograd.grad(sum(value.sum() for value in result), [mean, var])
    assert all(value.isfinite().all() for value in (*result, *grads))


@pytest.mark.parametrize("groups", [1, 2])
def test_moments_are_the_limit_of_the_authors_samples(groups):
    """Gaussian maps through ReLU and the convolution, as their code draws them."""
    torch.manual_seed(0)
    mean, var = torch.randn(2, 4).double(), torch.rand(2, 4).double() * 2 + 0.1
    conv = nn.Conv2d(4, 6, 3, groups=groups).double()
    ours = _linear(conv, _relu((mean, var)))
    noise = torch.randn(2, 4, 700, 700).double() * var.sqrt()[..., None, None]
    with torch.no_grad():
        maps = conv((noise + mean[..., None, None]).relu()).flatten(2)
    torch.testing.assert_close(ours[0], maps.mean(2), rtol=0.01, atol=0.01)
    torch.testing.assert_close(ours[1], maps.var(2), rtol=0.02, atol=0)


# --- two layers -----------------------------------------------------------------------------------

DIMS = {1: (nn.Conv1d, (8, 3, 7)), 2: (nn.Conv2d, (8, 3, 5, 6)), 3: (nn.Conv3d, (8, 3, 3, 4, 4))}


def chain(dim=2, **options):
    """conv, bkn, relu, grouped conv, bkn."""
    conv, norm = DIMS[dim][0], sn.make_norm("bkn", dim=dim, **options)
    layers = (conv(3, 4, 2), norm(4), nn.ReLU(), conv(4, 6, 2, groups=2, bias=dim != 2), norm(6))
    return sn.connect_bkn(randomise(nn.Sequential(*layers)))


def by_hand(model, x, groups):
    y, moments = filtered(model[0](x), model[1], groups)
    predicted = convolved(clipped(*moments), model[3].weight, model[3].bias, groups=2)
    y, last = filtered(model[3](y.relu()), model[4], groups, predicted)
    return y, moments, last


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("gain", [0.0, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_two_layers_equal_the_formulas(dim, gain, groups):
    model = chain(dim, gain=gain, momentum=0.3)
    sn.set_virtual_gpus(model, groups)
    wanted = {1: [torch.zeros(4), torch.ones(4)], 4: [torch.zeros(6), torch.ones(6)]}
    for step in range(2):
        x = oracle.values(DIMS[dim][1], step).requires_grad_()
        y, *moments = by_hand(model, x, groups)
        for k, pair in zip((1, 4), moments):
            wanted[k] = [0.7 * old + 0.3 * new.mean(0) for old, new in zip(wanted[k], pair)]
        agree(model(x), y, x, model.parameters())
    for k in (1, 4):
        torch.testing.assert_close(model[k].running_mean, wanted[k][0])
        torch.testing.assert_close(model[k].running_var, wanted[k][1])
        assert model[k].num_batches_tracked == 2
    model.eval()
    fixed = model[0](x)
    for k in (1, 4):
        running = (model[k].running_mean, model[k].running_var)
        fixed = F.batch_norm(fixed, *running, model[k].weight, model[k].bias)
        fixed = model[3](fixed.relu()) if k == 1 else fixed
    torch.testing.assert_close(model(x), fixed)


@pytest.mark.parametrize("momentum", [0.2, None])
def test_without_gain_it_is_batch_norm(momentum):
    model = chain(gain=0.0, momentum=momentum)
    twin = copy.deepcopy(model)
    for k, channels in ((1, 4), (4, 6)):
        twin[k] = nn.BatchNorm2d(channels, momentum=momentum).double()
        twin[k].load_state_dict(model[k].state_dict())
    for step in range(3):
        x = oracle.values((8, 3, 5, 6), step).requires_grad_()
        ours, theirs = model(x), twin(x)
        agree(ours, theirs, x, [])
        biased = {1: 8 * 4 * 5, 4: 8 * 3 * 4}  # ours; torch stores the unbiased variance
    for k, count in biased.items():
        torch.testing.assert_close(model[k].running_mean, twin[k].running_mean)
        start = {0.2: 0.8**3, None: 0.0}[momentum]
        theirs = (twin[k].running_var - start) * (count - 1) / count + start
        torch.testing.assert_close(model[k].running_var, theirs)


def test_a_prediction_that_is_far_too_wide_is_left_out():
    model = chain(gain=0.9)
    with torch.no_grad():
        model[1].weight.mul_(0.01)  # real inputs of the second convolution; the prediction stays
        model[1].bias.zero_()
    x = oracle.values((8, 3, 5, 6))
    y, moments, _ = by_hand(model, x, 1)
    predicted = convolved(clipped(*moments), model[3].weight, groups=2)
    measured = model[3](filtered(model[0](x), model[1], 1)[0].relu()).transpose(0, 1).flatten(1)
    ratio = (predicted[1][0] / measured.var(1, correction=0)).mean()
    assert ratio > 100
    torch.testing.assert_close(model(x), y)
    model[4].gain = 0.0
    torch.testing.assert_close(model(x), y)
    constant = sn.connect_bkn(chain(gain=0.9))
    with torch.no_grad():
        constant[3].weight.zero_()  # nothing varies: 0 / 0
    constant(x.requires_grad_()).sum().backward()
    assert all(p.grad.isfinite().all() for p in constant.parameters())


# --- what stands between layers -------------------------------------------------------------------


class Block(nn.Module):
    """A residual block, padding of channels, and a branch with ReLU6 and no bkn."""

    def __init__(self):
        super().__init__()
        norm = sn.make_norm("bkn", gain=0.6)
        self.conv0, self.bn0 = nn.Conv2d(3, 4, 1), norm(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.conv2 = nn.Conv2d(6, 2, 1)
        self.conv3, self.bn3 = nn.Conv2d(8, 3, 2), norm(3)

    def forward(self, x):
        x = F.relu(self.bn0(self.conv0(x)))
        y = self.bn1(self.conv1(x))
        y += x
        y = F.avg_pool2d(F.relu(y, inplace=True), 2)
        y = F.pad(y[:, :, :2, :], (0, 0, 0, 0, 1, 1))
        z = F.max_pool2d(F.interpolate(F.relu6(self.conv2(y)), scale_factor=2), 2)
        return self.bn3(self.conv3(torch.cat((y, z), dim=1)))


def test_sums_padding_concatenation_and_clipping():
    model = sn.connect_bkn(randomise(Block()))
    sn.set_virtual_gpus(model, 2)
    x = oracle.values((4, 3, 6, 6)).requires_grad_()
    y, first = filtered(model.conv0(x), model.bn0, 2)
    y0, rectified = y.relu(), clipped(*first)
    weight = model.conv1.weight
    y, second = filtered(
        model.conv1(y0), model.bn1, 2, convolved(rectified, weight, model.conv1.bias)
    )
    total = tuple(a + b for a, b in zip(second, rectified))
    y = F.avg_pool2d((y + y0).relu(), 2)
    y = F.pad(y[:, :, :2], (0, 0, 0, 0, 1, 1))
    zeros = torch.zeros(2, 1).double()
    padded = tuple(torch.cat((zeros, value, zeros), 1) for value in clipped(*total))
    z = F.max_pool2d(F.interpolate(F.relu6(model.conv2(y)), scale_factor=2), 2)
    branch = clipped(*convolved(padded, model.conv2.weight, model.conv2.bias), top=6.0)
    both = tuple(torch.cat(pair, 1) for pair in zip(padded, branch))
    predicted = convolved(both, model.conv3.weight, model.conv3.bias)
    y, _ = filtered(model.conv3(torch.cat((y, z), 1)), model.bn3, 2, predicted)
    agree(model(x), y, x, model.parameters())


def test_linear_layers():
    norm = sn.make_norm("bkn", dim=1, gain=0.7)
    model = nn.Sequential(nn.Linear(3, 4), norm(4), nn.ReLU(), nn.Linear(4, 2), norm(2))
    sn.connect_bkn(randomise(model))
    x = oracle.values((6, 3)).requires_grad_()
    y, moments = filtered(model[0](x), model[1], 1)
    predicted = convolved(clipped(*moments), model[3].weight[..., None], model[3].bias)
    y, _ = filtered(model[3](y.relu()), model[4], 1, predicted)
    agree(model(x), y, x, model.parameters())


def test_layers_in_evaluation_predict_with_their_running_statistics():
    model = chain(gain=0.5)
    with torch.no_grad():
        model[1].running_mean.copy_(torch.randn(4))
        model[1].running_var.copy_(torch.rand(4) + 0.5)
    model[1].eval()
    x = oracle.values((8, 3, 5, 6))
    running = (model[1].running_mean, model[1].running_var)
    y = F.batch_norm(model[0](x), *running, model[1].weight, model[1].bias)
    moments = tuple(value[None] for value in running)
    predicted = convolved(clipped(*moments), model[3].weight, groups=2)
    torch.testing.assert_close(model(x), filtered(model[3](y.relu()), model[4], 1, predicted)[0])


@pytest.mark.parametrize(
    ("source", "name", "layers"),
    [
        ("cifar", "resnet20", 19),
        ("cifar", "cifar_resnet18", 20),
        ("torchvision", "resnet50", 53),
        ("torchvision", "mobilenet_v2", 52),
        ("timm", "resnet18", 20),
    ],
)
def test_networks_are_connected_and_train_a_step(source, name, layers):
    torch.manual_seed(0)
    model = build_model(name, source, 5, sn.make_norm("bkn"))
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    sn.connect_bkn(model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    found = [m for m in model.modules() if isinstance(m, sn.BatchKalmanNorm2d)]
    assert len(found) == layers and all(layer.training for layer in found)
    assert [layer.place[0] is None for layer in found] == [True] + [False] * (layers - 1)
    loss = F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_style_and_detection_networks():
    norm = sn.make_norm("bkn", gain=0.5)
    style = build_style_net(norm, width=4, residual_blocks=1)
    style(torch.rand(2, 3, 16, 16)).mean().backward()
    parts = {part: norm if part in ("backbone", "fpn") else None for part in detectors.PARTS}
    detector = detectors.build_detector(
        "faster_rcnn_fpn", 3, parts, "resnet18", fpn_channels=8, box_features=16
    )
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    losses = sn.connect_bkn(detector).train()([torch.rand(3, 64, 64)] * 2, [target] * 2)
    sum(losses.values()).backward()
    for network, layers in ((style, 7), (detector, 28)):
        found = [m for m in network.modules() if isinstance(m, sn.BatchKalmanNorm2d)]
        assert len(found) == layers and sum(layer.place[0] is None for layer in found) == 1
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_convert_connects():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.densenet121(num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    kept = sn.convert(copy.deepcopy(model), "bkn", keep_outputs=True)
    torch.testing.assert_close(kept.eval()(x), model.eval()(x))
    kept.train()(x).sum().backward()
    found = [m for m in kept.modules() if isinstance(m, sn.BatchKalmanNorm2d)]
    assert len(found) == 121 and sum(layer.place[0] is None for layer in found) == 1


# --- what is refused ------------------------------------------------------------------------------


def net(*between):
    norm = sn.make_norm("bkn")
    layers = (nn.Conv2d(3, 4, 1), norm(4), *between, nn.Conv2d(4, 4, 1), norm(4))
    return sn.connect_bkn(nn.Sequential(*layers))


class Shuffle(nn.Module):
    def forward(self, x):
        return x[:, [1, 0, 3, 2]]


class Halve(nn.Module):
    def forward(self, x):
        return x * 0.5


@pytest.mark.parametrize(
    ("between", "name"),
    [(nn.SiLU(), "silu"), (nn.BatchNorm2d(4), "batch_norm"), (nn.Dropout(0.5), "dropout"),
     (Halve(), "__mul__|mul"), (Shuffle(), "__getitem__"), (nn.LeakyReLU(), "leaky_relu"),
     (nn.ConvTranspose2d(4, 4, 1), "conv_transpose2d"), (nn.Hardtanh(), "hardtanh")],
)  # fmt: skip
def test_what_has_no_known_moments_is_named(between, name):
    model = net(between)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"1 of 2 layers: the input of 4 comes through ({name})"):
        model(torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model.eval()(torch.randn(2, 3, 4, 4))  # evaluation needs no predictions


def test_the_networks_mode_counts():
    model = net(nn.Dropout(0.5), nn.ReLU())
    norms = [m for m in model.modules() if isinstance(m, sn.BatchKalmanNorm2d)]
    model.eval()
    for layer in norms:  # as batch_average does
        layer.train()
    x = torch.randn(4, 3, 4, 4)
    model(x)
    assert norms[1].place[0] is not None
    with pytest.raises(ValueError, match="comes through dropout"):
        model.train()(x)


def test_a_layer_alone_is_batch_norm():
    layer = sn.convert(nn.BatchNorm2d(4), "bkn")
    x = torch.randn(6, 4, 3, 3)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(4)(x))


def test_layers_out_of_place():
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match="connect_bkn"):
        sn.BatchKalmanNorm2d(4)(x)
    model = net(nn.ReLU())
    model(x[:, :3])
    with pytest.raises(RuntimeError, match="ran without the one before"):
        model[2:](x)
    layer = sn.BatchKalmanNorm2d(4)
    with pytest.raises(ValueError, match="0 is used twice"):
        sn.connect_bkn(nn.Sequential(layer, nn.ReLU(), layer))(x)
    for options in ({"gain": 1.5}, {"gain": -0.1}, {"track_running_stats": False}):
        with pytest.raises(ValueError):
            sn.BatchKalmanNorm2d(4, **options)
    with pytest.raises(ValueError, match="4-D input with 4 channels"):
        sn.BatchKalmanNorm2d(4)(torch.randn(2, 4, 3))
    plain = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert sn.connect_bkn(plain) is plain and not plain._forward_hooks


# --- life of a layer ------------------------------------------------------------------------------


def test_copies_are_connected_by_themselves():
    model = chain(gain=0.5)
    x = oracle.values((8, 3, 5, 6))
    model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = chain(gain=0.5)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    wanted = copy.deepcopy(model)(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert twin[4].flow is not model[4].flow
        with torch.no_grad():
            twin[1].weight.mul_(1)
        assert torch.equal(twin(x), wanted) and repr(twin) == repr(model)
        assert not any(value is not None for value in twin[4].flow.values)  # nothing is held
    again = sn.connect_bkn(model)
    assert torch.equal(again(x), wanted)


def test_micro_batches_equal_virtual_gpus():
    grouped = chain(gain=0.5, momentum=0.3)
    accumulated = copy.deepcopy(grouped)
    sn.set_virtual_gpus(grouped, 4)
    x = oracle.values((8, 3, 5, 6))
    with one_running_update(accumulated, 4) as begin:
        parts = []
        for index, part in enumerate(x.chunk(4)):
            begin(index)
            parts.append(accumulated(part))
    torch.testing.assert_close(torch.cat(parts), grouped(x))
    torch.testing.assert_close(accumulated.state_dict(), grouped.state_dict())


def test_batch_average_takes_what_training_normalises_with():
    model = chain(gain=0.5)
    batches = [oracle.values((n, 3, 5, 6), n) for n in (2, 5, 3)]
    wanted = [by_hand(model, x, 1)[1:] for x in batches]
    assert sn.batch_average(model, batches, 3) == 3
    counts = torch.tensor([2, 5, 3]).double()[:, None] / 10
    for k, layer in enumerate((model[1], model[4])):
        means, variances = (torch.cat([w[k][i] for w in wanted]) for i in (0, 1))
        mean = (counts * means).sum(0)
        var = (counts * (variances + (means - mean) ** 2)).sum(0)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, var)
        assert layer.training and layer.momentum == 0.1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled(fullgraph):
    torch._dynamo.reset()
    model = chain(gain=0.5)
    x = oracle.values((8, 3, 5, 6)).requires_grad_()
    if fullgraph:
        sn.connect_bkn(model, x)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        agree(compiled(x), plain(x), x, [])
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_bfloat16_and_channels_last():
    model = build_model("resnet20", "cifar", 5, sn.make_norm("bkn", gain=0.3))
    exact = copy.deepcopy(model)
    model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y.float(), exact(x), rtol=0.1, atol=0.1)
    layer = sn.connect_bkn(nn.Sequential(sn.BatchKalmanNorm2d(4)))
    maps = torch.randn(4, 4, 5, 5).bfloat16().to(memory_format=torch.channels_last)
    sn.set_virtual_gpus(layer, 2)
    y = layer(maps)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    empty = layer(torch.zeros(0, 4, 5, 5))
    assert empty.shape == (0, 4, 5, 5) and layer[0].num_batches_tracked == 1


def test_processes_equal_virtual_gpus(tmp_path):
    options = ["device=cpu", "precision=fp64", "norm=bkn", "norm.gain=0.5", "setting=8x2",
               "setting.gpus=2", "data.train_images=12", "evaluation.batch_size=100",
               "evaluation.batch_average.batches=1"]  # fmt: skip
    states = []
    for world_size in (1, 2):
        out = f"output_dir={tmp_path}/{world_size}"
        train_in_group(world_size, *options, "schedule.epochs=2", out)
        states.append(torch.load(tmp_path / f"{world_size}/checkpoint.pt", weights_only=True))
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(value, states[1]["model"][key], rtol=0, atol=1e-9, msg=key)


def test_a_graph_of_the_network_takes_each_batch_s_moments():
    """It shares the layers but not the network's hooks: the second pass once took the first's."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        sn.BatchKalmanNorm2d(4, gain=0.5),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        sn.BatchKalmanNorm2d(4, gain=0.5),
    ]
    model = nn.Sequential(*layers).train()
    batches = [torch.randn(4, 3, 8, 8), 3 * torch.randn(4, 3, 8, 8) + 1]
    sn.connect_bkn(model, batches[0])
    twin = copy.deepcopy(model)
    graph = torch.fx.symbolic_trace(model)
    for x in batches:
        y = graph(x)
        torch.testing.assert_close(y, twin(x), rtol=0, atol=0)
        y.sum().backward()

"""The child network against one written out by hand, and what sharing weights means."""

import math

import pytest
import torch
import torch.nn.functional as F

from enas.child import BatchNorm, Child, drop_paths, reduction_layers
from enas.data import DeviceImages
from enas.space import Architecture, Node, random_decisions
from sn.training.classification.data import build_data

SEP3, SEP5, AVG, MAX, SAME = range(5)
ARCHITECTURE = Architecture(
    normal=(Node(0, SEP3, 1, MAX), Node(2, AVG, 0, SAME)),  # loose: 3
    reduction=(Node(1, SEP5, 1, SAME), Node(0, MAX, 1, SEP3)),  # loose: 2 and 3
)
SMALL = {"num_classes": 7, "layers": 1, "filters": 4, "nodes": 2, "image_size": 8}


def randomised(child, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in child.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.3 * noise.to(parameter)
    return child


def images(count=5, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


class ByHand:
    """The fixed child of ARCHITECTURE, 1 layer and 2 nodes, from its weights: R, R, N."""

    def __init__(self, weights):
        self.weights = weights

    def norm(self, x, name):
        w = self.weights
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        gain, shift = (w[f"{name}.inner.{k}"].view(1, -1, 1, 1) for k in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * gain + shift

    def conv_norm(self, x, name, relu=True):
        weight = self.weights[f"{name}.weight"]
        x = F.relu(x) if relu else x
        return self.norm(F.conv2d(x, weight, padding=weight.shape[-1] // 2), f"{name}.norm")

    def halved(self, x, name, relu):
        x = F.relu(x) if relu else x
        shifted = torch.zeros_like(x)
        shifted[:, :, :-1, :-1] = x[:, :, 1:, 1:]
        even = torch.einsum("nchw,ochw->nohw", x[:, :, ::2, ::2], self.spread(f"{name}.even", x))
        odd = torch.einsum(
            "nchw,ochw->nohw", shifted[:, :, ::2, ::2], self.spread(f"{name}.odd", x)
        )
        return self.norm(torch.cat([even, odd], 1), f"{name}.norm")

    def spread(self, name, x):
        return self.weights[name].expand(
            -1, -1, math.ceil(x.shape[2] / 2), math.ceil(x.shape[3] / 2)
        )

    def separable(self, x, name):
        for k in range(2):
            deep, point = (
                self.weights[f"{name}.{part}.{k}"][0] for part in ("depthwise", "pointwise")
            )
            x = F.relu(x)
            planes = [
                F.conv2d(x[:, c : c + 1], deep[c : c + 1], padding=deep.shape[-1] // 2)
                for c in range(x.shape[1])
            ]
            x = self.norm(F.conv2d(torch.cat(planes, 1), point), f"{name}.norms.{k}")
        return x

    def joined(self, entries, name, ends):
        total = sum(F.conv2d(F.relu(entries[k]), self.weights[f"{name}.output.{k}"]) for k in ends)
        return self.norm(total, f"{name}.norm")

    def average(self, x):
        ones = torch.ones_like(x)
        window = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)
        sums = [F.conv2d(t, window, padding=1, groups=x.shape[1]) for t in (x, ones)]
        return sums[0] / sums[1]

    def largest(self, x):
        padded = F.pad(x, (1, 1, 1, 1), value=-math.inf)
        return padded.unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2))

    def reduction_cell(self, first, second, name):
        entries = [first, second]
        convolutions = f"{name}.convolutions"
        entries.append(self.separable(second, f"{convolutions}.0_left_sep_conv_5x5") + second)
        right = self.separable(second, f"{convolutions}.1_right_sep_conv_3x3")
        entries.append(self.largest(first) + right)
        return self.joined(entries, name, (2, 3))

    def normal_cell(self, first, second, name):
        left = self.separable(first, f"{name}.convolutions.0_left_sep_conv_3x3")
        third = left + self.largest(second)
        return self.joined([first, second, third, self.average(third) + first], name, (3,))

    def __call__(self, x):
        stem = self.conv_norm(x, "stem", relu=False)
        # cell 0: a reduction of the stem, beside the stem itself, halved on its way in
        half = self.halved(stem, "reductions.0", relu=False)
        zero = self.reduction_cell(
            self.halved(stem, "cells.0.inputs.0", relu=True), half, "cells.0"
        )
        quarter = self.halved(zero, "reductions.1", relu=False)
        one = self.reduction_cell(
            self.halved(zero, "cells.1.inputs.0", relu=True), quarter, "cells.1"
        )
        # cell 2 reads the map before the last cell, which is the reduction's input of that cell
        two = self.normal_cell(quarter, one, "cells.2")
        w = self.weights
        pooled = F.relu(two).mean((2, 3))
        return pooled @ w["classifier.weight"].T + w["classifier.bias"]


def test_fixed_child_is_the_network_by_hand():
    child = randomised(Child(**SMALL, architecture=ARCHITECTURE).double()).train()
    x = images()
    torch.testing.assert_close(child(x), ByHand(child.state_dict())(x), rtol=0, atol=1e-10)
    assert not list(Child(**SMALL, architecture=ARCHITECTURE).cells[2].inputs[0].parameters())


def from_shared(shared, architecture):
    """A fixed child with the weights that the shared one uses for `architecture`."""
    fixed = Child(**SMALL, architecture=architecture).double()
    weights = shared.state_dict()
    state = fixed.state_dict()
    for name in state:
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        source = name.replace(".inner", "")
        value = weights[source]
        if ".convolutions." in name:  # this entry's set of weights
            cell, key = int(name.split(".")[1]), name.split(".")[3]
            node, side, _ = key.split("_", 2)
            nodes = architecture.reduction if cell in shared.reduced else architecture.normal
            value = value[getattr(nodes[int(node)], f"{side}_input")]
            value = value[None] if "wise" in name else value
        state[name] = value
    fixed.load_state_dict(state)
    return fixed


@pytest.mark.parametrize("seed", range(4))
def test_shared_child_is_the_fixed_one_of_its_architecture(seed):
    shared = randomised(Child(**SMALL).double())
    decisions = random_decisions(1, 2, generator=torch.Generator().manual_seed(seed))[0]
    architecture = Architecture.from_decisions(decisions)
    expected = from_shared(shared, architecture).train()(images())
    torch.testing.assert_close(shared(images(), architecture), expected, rtol=0, atol=1e-10)


def test_shared_batch_norm_takes_the_batch_always():
    """In evaluation too; the fixed child's uses running statistics there."""
    shared = randomised(Child(**SMALL).double())
    training = shared.train()(images(), ARCHITECTURE)
    torch.testing.assert_close(shared.eval()(images(), ARCHITECTURE), training)
    assert not list(shared.buffers())
    fixed = from_shared(shared, ARCHITECTURE)
    fixed.train()(images())
    assert (fixed.eval()(images()) - training).abs().max() > 0.1
    alone = fixed(images()[:1])
    torch.testing.assert_close(alone, fixed(images())[:1])


def test_one_value_a_channel_is_the_shift():
    """As one image left over has on 1x1 maps: torch's function refuses it."""
    norm = BatchNorm(3, 2)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    x = torch.randn(1, 3, 1, 1)
    assert norm(x, 1).flatten().tolist() == pytest.approx([4.0, 5.0, 6.0], abs=1e-3)
    expected = F.batch_norm(x.expand(2, 3, 1, 1), None, None, training=True) + 4
    assert torch.equal(norm(x.expand(2, 3, 1, 1), 1)[:, 0], expected[:, 0])


def test_only_the_architecture_learns():
    """Weights that it leaves out get a gradient of exactly zero, its own get one."""
    shared = Child(**SMALL).double()
    for parameter in shared.parameters():
        parameter.grad = torch.zeros_like(parameter)
    shared.loss(shared(images(), ARCHITECTURE), torch.arange(5)).backward()
    used = from_shared(shared, ARCHITECTURE)
    touched = sum(bool(p.grad.abs().sum()) for p in shared.parameters())
    assert touched == len(list(used.parameters()))
    depthwise = shared.cells[2].convolutions["0_left_sep_conv_3x3"].depthwise[0]
    assert depthwise.grad[0].abs().sum() > 0 and not depthwise.grad[1].any()


def test_places_of_the_reductions():
    assert reduction_layers(6) == [2, 5]  # official: 6 // 3 and 2 * (6 // 3) + 1 of 8
    assert reduction_layers(3) == [1, 3]


def test_full_child():
    """The official size: 8 cells, maps of 32, 16 and 8, 20 to 80 channels, an auxiliary head."""
    with torch.device("meta"):
        child = Child(aux_weight=0.4, drop_path=0.4, dropout=0.1)
        assert len(child.cells) == 8 and child.classifier.in_features == 80
    child = Child(aux_weight=0.4, drop_path=0.4, dropout=0.1)
    seen = []
    for cell in child.cells:
        cell.register_forward_hook(lambda _, inputs, y: seen.append(tuple(y.shape[1:])))
    architecture = Architecture.from_decisions(random_decisions(1, 5)[0])
    logits, aux = child(torch.randn(2, 3, 32, 32), architecture, progress=0.5)
    assert logits.shape == aux.shape == (2, 10)
    sizes = [(20, 32, 32)] * 2 + [(40, 16, 16)] * 3 + [(80, 8, 8)] * 3
    assert seen == sizes
    loss = child.loss((logits, aux), torch.tensor([1, 2]))
    expected = F.cross_entropy(logits, torch.tensor([1, 2])) + 0.4 * F.cross_entropy(
        aux, torch.tensor([1, 2])
    )
    torch.testing.assert_close(loss, expected)
    assert isinstance(child.eval()(torch.randn(2, 3, 32, 32), architecture), torch.Tensor)


def test_dropped_paths():
    torch.manual_seed(0)
    y = drop_paths(torch.ones(4000, 2, 3, 3), 0.25)
    values = y[:, 0, 0, 0]
    assert set(values.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (y == values.view(-1, 1, 1, 1)).all()  # a path is dropped whole
    assert abs((values == 0).double().mean() - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    child = Child(**SMALL, drop_path=0.5).double()
    torch.testing.assert_close(child(images(), ARCHITECTURE), child.eval()(images(), ARCHITECTURE))
    child.train()
    torch.manual_seed(1)
    dropped = child(images(), ARCHITECTURE, progress=1.0)
    assert (dropped - child(images(), ARCHITECTURE)).abs().max() > 1e-3


def test_errors():
    with pytest.raises(ValueError, match="2 nodes, child.nodes=3"):
        Child(nodes=3, architecture=ARCHITECTURE)
    with pytest.raises(ValueError, match="needs an architecture"):
        Child(**SMALL)(images().float())
    with pytest.raises(ValueError, match="aux_weight.*2x2"):
        Child(**SMALL, aux_weight=0.4)


# --- data


def test_crops_and_mirrors():
    """Each augmented image is one of its image's 2 x 3 x 3 mirrors and shifts, and all occur."""
    data = build_data("digits", train_images=4)
    data.augmentation.usual.flip = True
    held = DeviceImages(data, data.train, torch.device("cpu"), torch.float64)
    assert held.padding == 1 and held.flip
    plain, labels = held.batch(torch.tensor([2]))
    assert labels.tolist() == [data.train.labels[2]]
    zero = held.normalise(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).double()
    options = []
    for mirrored in (False, True):
        image = plain.flip(-1) if mirrored else plain
        padded = zero[:, :, :1, :1].expand(1, 3, 10, 10).clone()
        padded[:, :, 1:-1, 1:-1] = image
        options += [padded[0, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    options = torch.stack(options)
    batch, _ = held.batch(torch.full((400,), 2), augment=(0, 1))
    matches = (batch[:, None] == options[None]).flatten(2).all(2)
    assert (matches.sum(1) >= 1).all() and matches.any(0).all()
    again, _ = held.batch(torch.full((400,), 2), augment=(0, 1))
    other, _ = held.batch(torch.full((400,), 2), augment=(0, 2))
    assert torch.equal(batch, again) and not torch.equal(batch, other)


def test_batches_hold_every_image_once():
    data = build_data("digits", train_images=50)
    held = DeviceImages(data, data.train, torch.device("cpu"))
    sizes = [len(labels) for _, labels in held.batches(16)]
    assert sizes == [16, 16, 16, 2]
    assert sum(len(labels) for _, labels in held.batches(16, limit=20)) == 20
    labels = torch.cat([labels for _, labels in held.batches(16)])
    assert labels.tolist() == data.train.labels
    assert held.order(3).sort().values.tolist() == list(range(50))
    assert held.order(3).tolist() == held.order(3).tolist() != held.order(4).tolist()

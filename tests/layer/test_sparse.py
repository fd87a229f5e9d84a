"""SSN: SparsestMax against its definition, freezing, and the layer against the float64 oracle."""

import copy
import io
import itertools
import math
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from torch import nn

import sn
from sn.variants.sparse import choices, sparsemax, sparsestmax_of_numbers


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def project(z):
    """The simplex's nearest point by trying every face; no sorting."""
    best = None
    for size in range(1, len(z) + 1):
        for face in map(list, itertools.combinations(range(len(z)), size)):
            p = np.zeros(len(z))
            p[face] = z[face] - (z[face].sum() - 1) / size
            if (p >= -1e-15).all() and (best is None or ((p - z) ** 2).sum() < best[0]):
                best = ((p - z) ** 2).sum(), p
    return best[1]


def definition(z, radius):
    """The recursion as the paper states it."""
    p = project(z)
    support = p > 1e-12
    centre = support / support.sum()
    distance = np.linalg.norm(p - centre)
    if distance >= radius or distance < 1e-12:
        return p
    p = centre + radius * (p - centre) / distance
    if (p >= 0).all():
        return p
    smaller = project(p) > 1e-12
    inner = smaller / smaller.sum()
    return definition(p, math.sqrt(max(radius**2 - ((centre - inner) ** 2).sum(), 0)))


RADII = [0, 0.05, 0.3, 0.4, 0.41, 0.5, 0.6, 0.7, 0.71, 0.8, 0.82, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sparsestmax_is_the_recursion(count):
    rng = np.random.default_rng(count)
    kinds = set()
    for radius in RADII:
        for scale in (0.05, 0.3, 1.0):
            for _ in range(20):
                z = rng.normal(size=count) * scale + 1
                ours = sn.sparsestmax(torch.from_numpy(z), radius)
                np.testing.assert_allclose(ours.numpy(), definition(z, radius), atol=1e-9)
                assert ours.sum() == pytest.approx(1) and (ours >= 0).all()
                centre = np.linalg.norm(ours.numpy() - 1 / count)
                assert centre > min(radius, math.sqrt((count - 1) / count)) - 1e-9
                kinds.add(int((ours > 0).sum()))
    assert kinds == set(range(1, count + 1))


def test_sparsemax_is_the_projection():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5):
        for _ in range(50):
            z = rng.normal(size=count)
            np.testing.assert_allclose(
                sparsemax(torch.from_numpy(z)).numpy(), project(z), atol=1e-12
            )
    tied = torch.tensor([0.5, 0.5, -3.0])
    torch.testing.assert_close(sparsemax(tied), torch.tensor([0.5, 0.5, 0.0]))


def test_sparsestmax_is_of_vectors():
    with pytest.raises(ValueError, match=r"\(K,\), got \(2, 3\)"):
        sn.sparsestmax(torch.ones(2, 3), 0.5)


@pytest.mark.parametrize("radius", [0.0, 0.3, 0.5, 0.65])
def test_gradients_of_sparsestmax(radius):
    rng = np.random.default_rng(3)
    for _ in range(10):
        z = torch.from_numpy(rng.normal(size=3) * 0.2).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: sn.sparsestmax(z, radius), z, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("radius", [0.0, 0.5, 1.0])
def test_equal_gates_stay_and_have_finite_gradients(radius):
    z = torch.ones(3, requires_grad=True)
    gates = sn.sparsestmax(z, radius)
    torch.testing.assert_close(gates, torch.full((3,), 1 / 3))
    (gates * torch.arange(3.0)).sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sparsestmax_of_numbers_is_that_of_tensors(count):
    rng = np.random.default_rng(count + 10)
    tie = (16 * np.finfo(float).eps) ** 2
    for radius in RADII:
        for scale in (0.0, 0.05, 0.3, 1.0):
            z = rng.normal(size=count) * scale + 1
            tensor = torch.from_numpy(z)
            weights, slopes = sparsestmax_of_numbers(z.tolist(), radius, tie, True)
            expected = sn.sparsestmax(tensor, radius)
            np.testing.assert_allclose(weights, expected.numpy(), atol=1e-12)
            function = partial(sn.sparsestmax, radius=radius)
            exact = torch.autograd.functional.jacobian(function, tensor)
            np.testing.assert_allclose(slopes, exact.numpy(), atol=1e-9)
            assert sparsestmax_of_numbers(z.tolist(), radius, tie) == (weights, [])


# --- the layer ------------------------------------------------------------------------------------


def make(dim=2, **options):
    layer = sn.make_norm("ssn", dim=dim, momentum=0.3, **options)(4).double()
    values = oracle.parameters(4, len(layer.statistics), seed=2)
    with torch.no_grad():
        for name, value in zip(("mean_weight", "var_weight", "weight", "bias"), values):
            getattr(layer, name).copy_(value * (0.3 if "_" in name else 1))
    return layer


def expected_of(layer, x, running=None):
    """The oracle takes softmax: of logarithms it is the gates themselves."""
    gates = [sn.sparsestmax(z, layer.radius) for z in (layer.mean_weight, layer.var_weight)]
    logs = [torch.where(g > 0, g.clamp(min=1e-300).log(), g.new_tensor(-700.0)) for g in gates]
    return oracle.switch_norm(
        x, *logs, layer.weight, layer.bias, running, statistics=layer.statistics, num_groups=2
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("dim", "shape"), [(1, (3, 4)), (1, (3, 4, 5)), (2, (3, 4, 5, 2)),
                                            (3, (2, 4, 3, 1, 2))])  # fmt: skip
@pytest.mark.parametrize("radius", [0.0, 0.45, 0.65])
def test_layer_equals_the_oracle(backend, dim, shape, radius):
    sets = [("ln", "bn"), ("in", "ln", "bn"), ("in", "ln", "gn", "bn")]
    for statistics in sets:
        layer = make(dim, statistics=statistics, num_groups=2 if "gn" in statistics else None)
        sn.set_radius(layer, radius)
        for mode in (True, False):
            layer.train(mode)
            running = None if mode else (layer.running_mean.clone(), layer.running_var.clone())
            x = oracle.values(shape).requires_grad_()
            upstream = oracle.values(shape, 3)
            leaves = [x, *layer.parameters()]
            with sn.backend(backend):
                y = layer(x)
                ours = torch.autograd.grad((y * upstream).sum(), leaves)
            wanted = expected_of(layer, x, running)
            torch.testing.assert_close(y, wanted)
            theirs = torch.autograd.grad((wanted * upstream).sum(), leaves)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("frozen", [None, "mean_weight", "var_weight"])
def test_derivatives_of_the_layer(frozen):
    """First ones by numbers, second ones by the formula."""
    layer = make()
    layer.begin_step(0.3)
    x = oracle.values((3, 4, 2, 3), 5)
    names = [n for n in ("mean_weight", "var_weight") if n != frozen]
    values = [getattr(layer, n).detach().clone().requires_grad_() for n in names]
    if frozen:
        getattr(layer, frozen).requires_grad_(False)

    def call(*values):
        return torch.func.functional_call(layer, dict(zip(names, values)), x).sin()

    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)
    wanted = torch.autograd.functional.jacobian(call, tuple(values), vectorize=False)
    batched = torch.autograd.functional.jacobian(call, tuple(values), vectorize=True)
    torch.testing.assert_close(batched, wanted)


def test_the_end_of_training_is_one_statistic_each():
    layer = make()
    sn.set_radius(layer, 1.0)
    x = oracle.values((3, 4, 5, 2)).requires_grad_()
    y = layer(x)
    top = [gate.argmax().item() for gate in (layer.mean_weight, layer.var_weight)]
    assert choices(layer)[""] == dict(zip(("mean", "var"), [layer.statistics[k] for k in top]))
    weights = sn.importance_weights(layer)[""]
    assert sorted(weights["mean"].values()) == sorted(weights["var"].values()) == [0, 0, 1]
    gates = [torch.full((3,), -700.0).double() for _ in top]
    for gate, k in zip(gates, top):
        gate[k] = 0.0
    expected = oracle.switch_norm(x, *gates, layer.weight, layer.bias, statistics=layer.statistics)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert (layer.mean_weight.grad == 0).all() and (layer.var_weight.grad == 0).all()


def test_frozen_gates_stay_until_unfrozen():
    model = nn.Sequential(make(), make())
    sn.set_radius(model, 1.0)
    x = oracle.values((3, 4, 5, 2))
    model.eval()(x)
    assert model[0].mean_choice.max() == 0  # evaluation decides nothing
    model.train()(x)
    before = choices(model)
    with torch.no_grad():
        for gate in sn.gates(model):
            gate.copy_(-gate)  # as momentum or decay might
    model(x)
    assert (
        choices(model) == before
        and sn.importance_weights(model)["0"]["mean"][before["0"]["mean"]] == 1
    )

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = nn.Sequential(make(), make())
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert choices(twin) == before and twin[0].radius == 1
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=0, atol=0)
    model.train(), twin.train()

    for share in (None, 0.8):
        thawed = copy.deepcopy(twin)
        assert sn.unfreeze_gates(thawed, share) == ["0", "1"]
        weights = sn.importance_weights(thawed)["0"]["mean"]
        assert weights[before["0"]["mean"]] == pytest.approx(share or 1 / 3)
        thawed(x).square().mul(oracle.values(x.shape, 5)).sum().backward()
        assert all(gate.grad.abs().max() > 0 for gate in sn.gates(thawed))
        assert choices(thawed)["0"] == {"mean": None, "var": None}
    assert sn.unfreeze_gates(thawed) == []
    for bad in (0, 1, -0.1):
        with pytest.raises(ValueError):
            sn.unfreeze_gates(model, bad)
    with pytest.raises(ValueError):
        sn.set_radius(model, 1.5)


def test_what_inference_kept_can_be_trained_with():
    """Importance weights met first in inference mode serve a backward pass after it."""
    layer = sn.SparseSwitchNorm2d(4).eval()
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.731, 0.112, 0.254]))  # met nowhere else
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with torch.inference_mode():
        first = layer(x)
    for needed in (True, False):
        layer.mean_weight.requires_grad_(needed)
        layer.var_weight.requires_grad_(needed)
        y = layer(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, first)
        plain, *_ = torch.autograd.grad(
            sn.switch_norm(
                x,
                *[w.detach().log() for w in layer.importance()],
                layer.weight,
                layer.bias,
                running_mean=layer.running_mean,
                running_var=layer.running_var,
                training=False,
            )
            .square()
            .sum(),
            x,
        )
        torch.testing.assert_close(x.grad, plain)
        x.grad = None


def test_training_ends_sparse():
    """Gates that learn under a growing radius settle, the batch's own scale being the target."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), sn.make_norm("ssn")(4), nn.ReLU(),
                          nn.Conv2d(4, 5, 1), sn.make_norm("ssn")(5))  # fmt: skip
    optimizer = torch.optim.SGD(sn.parameter_groups(model, 0.1, 1e-4, 0.1, 0.0), momentum=0.9)
    for step in range(40):
        sn.set_radius(model, step / 40)
        x = torch.randn(4, 3, 6, 6) * torch.rand(4, 3, 1, 1)
        loss = nn.functional.cross_entropy(model(x).mean((2, 3)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(sn.gates(model), 1.0)
        optimizer.step()
    assert None not in [c for layer in choices(model).values() for c in layer.values()]
    assert loss.isfinite()


def test_conversion_to_sparse_keeps_outputs_exactly():
    theirs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double()
    theirs(oracle.values((4, 3, 3, 3)))
    x = oracle.values((2, 3, 3, 3), 1)
    ours = sn.convert(copy.deepcopy(theirs), "ssn", keep_outputs=True, gate_start=15).eval()
    torch.testing.assert_close(ours(x), theirs.eval()(x))


@pytest.mark.parametrize("gate_start", [0.0, 2.0, 8.0])
def test_converted_layers_start_at_the_shares_of_softmax_and_learn(gate_start):
    """As control parameters, (0, 0, 2) would be bn alone, settled by the first step."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double()
    x = oracle.values((4, 3, 3, 3))
    theirs(x)
    options = {"keep_outputs": True, "gate_start": gate_start}
    ours, plain = (sn.convert(copy.deepcopy(theirs), norm, **options) for norm in ("ssn", "sn"))
    shares = plain[1].importance()[0]
    for own in ours[1].importance():
        torch.testing.assert_close(own, shares, check_dtype=False, rtol=1e-5, atol=1e-7)
    weights = oracle.values((4, 4, 3, 3), 1)
    y = ours(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-6)
    (y * weights).sum().backward()
    assert choices(ours)["1"] == {"mean": None, "var": None}
    for control in (ours[1].mean_weight, ours[1].var_weight):
        assert control.grad.abs().max() > 1e-6


def test_converted_layers_still_choose_after_twenty_steps_near_bn():
    """At gate_start=2, which the documentation recommends; from 8 some have chosen bn by then."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    theirs = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = oracle.values((32, 1, 8, 8)).float()
    theirs(images)
    ours = sn.convert(theirs, "ssn", keep_outputs=True, gate_start=2)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.02, momentum=0.9)
    labels = torch.arange(32) % 8
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(ours(images), labels).backward()
        nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
    for layer in ("1", "4"):
        assert choices(ours)[layer] == {"mean": None, "var": None}


def test_a_gate_of_minus_infinity_leaves_its_statistic_out():
    """As softmax does in the switchable layer."""
    layer, x = sn.SparseSwitchNorm2d(3), torch.randn(4, 3, 4, 4)
    with torch.no_grad():
        layer.mean_weight[2] = layer.var_weight[2] = -math.inf
    expected = oracle.switch_norm(x, torch.ones(2), torch.ones(2), statistics=("in", "ln"))
    for backend in ("auto", "reference"):
        with sn.backend(backend):
            torch.testing.assert_close(layer(x), expected.to(x.dtype), rtol=1e-4, atol=1e-5)
    assert list(sn.importance_weights(layer)[""]["mean"].values()) == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gates_that_are_not_finite_give_what_is_not_finite(value):
    """So that a guard of the loss finds the layer: no crash, no numbers that look right."""
    layer = sn.SparseSwitchNorm2d(3)
    with torch.no_grad():
        layer.mean_weight[0] = value
    x = torch.randn(2, 3, 4, 4)
    for backend in ("auto", "reference"):
        with sn.backend(backend):
            assert not layer(x).isfinite().any()
    weights = sn.importance_weights(layer)[""]
    assert all(math.isnan(weight) for weight in weights["mean"].values())
    assert sum(weights["var"].values()) == pytest.approx(1)
    assert layer.mean_choice.sum() == 0


def test_frozen_layers_stay_settled():
    model = nn.Sequential(sn.SparseSwitchNorm2d(4), sn.SparseSwitchNorm2d(4))
    with torch.no_grad():
        for layer in model:
            layer.mean_weight.copy_(torch.tensor([0.1, 0.7, 0.2]))
    sn.begin_step(model, 1.0)
    model(torch.randn(2, 4, 3, 3))
    sn.freeze(model[0])
    x = torch.randn(2, 4, 3, 3)
    before = model[0](x)
    assert sn.unfreeze_gates(model) == ["1"]
    assert torch.equal(model[0](x), before)

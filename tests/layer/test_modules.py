"""The layers of sn against the float64 oracle, torch's layers and what users do with a layer."""

import copy
import inspect
import io
import pickle
import re
import subprocess
import sys

import oracle
import pytest
import torch
from torch import nn

import sn

LAYERS = {1: sn.SwitchNorm1d, 2: sn.SwitchNorm2d, 3: sn.SwitchNorm3d}
SHAPES = {1: (3, 4, 5), 2: (3, 4, 5, 2), 3: (2, 4, 3, 1, 2)}
DEFAULTS = {1: ("ln", "bn"), 2: ("in", "ln", "bn"), 3: ("in", "ln", "bn")}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: threads that wait for one another cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(layer, seed=0):
    """Random affine and control parameters, so that no gate and no channel is special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter))
    return layer


def make(dim, num_features=4, **options):
    options.setdefault("dtype", torch.float64)
    if "gn" in options.get("statistics", ()):
        options.setdefault("num_groups", 2)
    return randomise(LAYERS[dim](num_features, **options))


def oracle_of(layer, x, running=None, num_groups=2):
    return oracle.switch_norm(
        x,
        layer.mean_weight,
        layer.var_weight,
        layer.weight,
        layer.bias,
        running,
        statistics=layer.statistics,
        num_groups=num_groups,
        eps=layer.eps,
    )


def all_layers():
    """One layer of every kind and set, with an input for it."""
    for dim, shape in SHAPES.items():
        for statistics in [None, ("bn",), ("in", "ln"), ("ln",), oracle.STATISTICS]:
            options = {} if statistics is None else {"statistics": statistics}
            yield make(dim, **options), oracle.values(shape)
        yield make(dim, affine=False), oracle.values(shape)
        yield make(dim, track_running_stats=False), oracle.values(shape)
        yield make(dim, momentum=None, virtual_gpus=2), oracle.values((2, *shape[1:]))
    yield make(1), oracle.values((3, 4))
    for statistics in [("ln", "gn"), ("ln",), ("gn",)]:
        groups = 3 if "gn" in statistics else None
        layer = sn.SwitchNormRecurrent(6, groups, statistics=statistics).double()
        yield randomise(layer), oracle.values((2, 6))
    yield sn.GhostBatchNorm2d(4).double(), oracle.values(SHAPES[2])


# --- construction -----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", LAYERS)
def test_constructor_follows_torchs_batch_norm(dim):
    ours = inspect.signature(LAYERS[dim]).parameters
    theirs = inspect.signature(nn.BatchNorm2d).parameters
    shared = [
        "num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype",
    ]  # fmt: skip
    assert list(ours)[: len(shared)] == shared
    for name in shared:
        assert ours[name].default == theirs[name].default
        assert ours[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
    for name in ("statistics", "num_groups", "virtual_gpus"):
        assert ours[name].kind == inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("dim", LAYERS)
def test_a_fresh_layer(dim):
    layer = LAYERS[dim](5)
    count = len(DEFAULTS[dim])
    assert layer.statistics == DEFAULTS[dim]
    assert layer.num_features == 5 and layer.eps == 1e-5 and layer.momentum == 0.1
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"weight", "bias", "mean_weight", "var_weight"}
    torch.testing.assert_close(layer.weight.data, torch.ones(5))
    torch.testing.assert_close(layer.bias.data, torch.zeros(5))
    torch.testing.assert_close(layer.mean_weight.data, torch.ones(count))
    torch.testing.assert_close(layer.var_weight.data, torch.ones(count))
    buffers = dict(layer.named_buffers())
    assert set(buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    torch.testing.assert_close(layer.running_mean, torch.zeros(5))
    torch.testing.assert_close(layer.running_var, torch.ones(5))
    assert layer.num_batches_tracked == 0 and layer.num_batches_tracked.dtype == torch.long


@pytest.mark.parametrize("statistics", oracle.SUBSETS, ids="+".join)
def test_buffers_only_with_batch_statistics(statistics):
    groups = 2 if "gn" in statistics else None
    layer = sn.SwitchNorm2d(4, statistics=reversed(statistics), num_groups=groups)
    assert layer.statistics == statistics
    names = {"running_mean", "running_var", "num_batches_tracked"} if "bn" in statistics else set()
    assert set(dict(layer.named_buffers())) == names == set(layer.state_dict()) - {
        "weight", "bias", "mean_weight", "var_weight",
    }  # fmt: skip
    assert layer.mean_weight.shape == layer.var_weight.shape == (len(statistics),)


def test_options_of_the_constructor():
    assert not list(sn.SwitchNorm2d(4, track_running_stats=False).buffers())
    plain = sn.SwitchNorm2d(4, affine=False)
    assert plain.weight is None and plain.bias is None
    assert set(dict(plain.named_parameters())) == {"mean_weight", "var_weight"}
    double = sn.SwitchNorm2d(4, dtype=torch.float64, device="meta")
    floating = [t for t in double.state_dict().values() if t.dtype.is_floating_point]
    assert len(floating) == 6
    assert all(t.dtype == torch.float64 and t.is_meta for t in floating)
    assert (
        sn.SwitchNorm2d(4, 1e-3, 0.2).eps == 1e-3 and sn.SwitchNorm2d(4, 1e-3, 0.2).momentum == 0.2
    )


@pytest.mark.parametrize("dim", LAYERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": ("in", "xn")}, r"(?s)(?=.*xn)(?=.*\bin\b)(?=.*\bln\b)(?=.*gn)(?=.*bn)"),
        ({"statistics": ()}, r"(?s)(?=.*\bin\b)(?=.*\bln\b)(?=.*gn)(?=.*bn)"),
        ({"statistics": ("in", "bn", "in")}, r"(?s)(?=.*\bin\b)"),
        ({"statistics": ("ln", "gn"), "num_groups": 4}, r"(?s)(?=.*\b4\b)(?=.*1, 2, 3,? .*6)"),
        ({"statistics": ("ln", "gn"), "num_groups": 0}, r"(?s)(?=.*\b0\b)(?=.*1, 2, 3,? .*6)"),
        ({"statistics": ("ln", "gn")}, r"num_groups"),
        ({"virtual_gpus": 0}, r"\b0\b"),
    ],
)  # fmt: skip
def test_bad_options_are_an_error_at_construction(dim, options, message):
    with pytest.raises(ValueError, match=message):
        LAYERS[dim](6, **options)


@pytest.mark.parametrize("dim", LAYERS)
def test_a_statistic_given_as_a_plain_string(dim):
    with pytest.raises(ValueError, match="bnx"):
        LAYERS[dim](6, statistics="bnx")
    with pytest.raises(TypeError):
        LAYERS[dim](6, statistic=("bn",))


@pytest.mark.parametrize(
    ("dim", "shape"),
    [
        (1, (4,)), (1, (2, 4, 3, 3)), (2, (2, 4)), (2, (4, 3, 3)), (2, (2, 4, 3, 3, 3)),
        (3, (2, 4, 3, 3)), (3, (2, 4, 3)),
    ],
)  # fmt: skip
def test_wrong_dimension_is_an_error_naming_what_came_and_what_is_valid(dim, shape):
    valid = {1: r"\(N, C, L\)", 2: r"\(N, C, H, W\)", 3: r"\(N, C, D, H, W\)"}[dim]
    for layer in (LAYERS[dim](4), LAYERS[dim](4).eval()):
        with pytest.raises(ValueError, match=rf"(?s)(?=.*{re.escape(str(shape))})(?=.*{valid})"):
            layer(torch.randn(shape))


@pytest.mark.parametrize("dim", LAYERS)
@pytest.mark.parametrize("statistics", [("bn",), ("in",), ("ln",)])
@pytest.mark.parametrize("affine", [True, False])
def test_wrong_channel_count_is_an_error_naming_both(dim, statistics, affine):
    layer = LAYERS[dim](4, statistics=statistics, affine=affine)
    for channels in (7, 1):
        for mode in (True, False):
            with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{channels}\b)(?=.*\b4\b)"):
                layer.train(mode)(torch.randn(2, channels, *[3] * dim))


# --- output and gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("dim", LAYERS)
@pytest.mark.parametrize("statistics", oracle.SUBSETS, ids="+".join)
def test_layers_equal_the_oracle(dim, statistics):
    layer = make(dim, statistics=statistics)
    shapes = [SHAPES[dim], (2, 4, *[1] * dim), (1, 4, *[3] * dim)] + [(3, 4)] * (dim == 1)
    for shape in shapes:
        for mode in (True, False):
            layer.train(mode)
            running = None
            if "bn" in statistics and not mode:
                running = layer.running_mean.clone(), layer.running_var.clone()
            x = oracle.values(shape).requires_grad_()
            upstream = oracle.values(shape, 3)
            leaves = [x, *layer.parameters()]
            y, expected = layer(x), oracle_of(layer, x, running)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(
                torch.autograd.grad((y * upstream).sum(), leaves),
                torch.autograd.grad((expected * upstream).sum(), leaves),
                rtol=1e-7,
                atol=1e-7,
            )


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_layers_pass_on_their_eps(eps):
    x = oracle.values((3, 6))
    layers = [make(dim, 6, eps=eps) for dim in LAYERS]
    layers.append(randomise(sn.SwitchNormRecurrent(6, 2, eps=eps, dtype=torch.float64)))
    for layer, shape in zip(layers, [(3, 6), (3, 6, 1, 1), (3, 6, 1, 1, 1), (3, 6)], strict=True):
        assert layer.eps == eps
        given = x.view(shape)
        torch.testing.assert_close(layer(given), oracle_of(layer, given))


@pytest.mark.parametrize("dim", LAYERS)
def test_gradcheck(dim):
    layer = make(dim, 3, track_running_stats=False)
    shape = {1: (2, 3, 3), 2: (2, 3, 3, 3), 3: (2, 3, 2, 2, 2)}[dim]
    names, leaves = zip(*layer.named_parameters(), strict=True)

    def run(x, *leaves):
        return torch.func.functional_call(layer, dict(zip(names, leaves, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (oracle.values(shape).requires_grad_(), *leaves))


@pytest.mark.parametrize("dim", LAYERS)
def test_a_dominant_bn_gate_trains_and_evaluates_like_batch_norm(dim):
    ours = make(dim, statistics=("in", "ln", "bn"), momentum=0.2)
    theirs = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dim - 1](4, momentum=0.2).double()
    with torch.no_grad():
        for gate in (ours.mean_weight, ours.var_weight):
            gate.copy_(torch.tensor([-60.0, -60.0, 60.0]))
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)
    shape = SHAPES[dim]
    count = oracle.values(shape)[:, 0].numel()
    for step in range(3):
        x = oracle.values(shape, step)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    decayed = (1 - 0.2) ** 3  # what is left of the initial 1, which has no n/(n-1) factor
    torch.testing.assert_close(
        ours.running_var - decayed, (theirs.running_var - decayed) * (count - 1) / count
    )
    theirs.running_var.copy_(ours.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_dominant_gate_equals_instance_group_and_layer_norm():
    x = oracle.values((3, 4, 5, 2))
    norms = [
        nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(1, 4), nn.GroupNorm(2, 4),
    ]  # fmt: skip
    for position, norm in enumerate(norms):
        layer = make(2, statistics=oracle.STATISTICS)
        norm.double().load_state_dict({"weight": layer.weight, "bias": layer.bias})
        with torch.no_grad():
            for gate in (layer.mean_weight, layer.var_weight):
                gate.fill_(-60.0)[position] = 60.0
        for mode in (True, False):
            torch.testing.assert_close(layer.train(mode)(x), norm(x))


# --- running statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("dim", LAYERS)
@pytest.mark.parametrize("momentum", [0.1, 0.003, 1.0])
def test_running_statistics(dim, momentum):
    layer = make(dim, momentum=momentum)
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    for step in range(3):
        x = oracle.values(SHAPES[dim], step)
        layer(x)
        batch_mean, batch_var = (moment[0] for moment in oracle.batch_moments(x))
        mean = (1 - momentum) * mean + momentum * batch_mean
        var = (1 - momentum) * var + momentum * batch_var
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked == 3
    layer.eval()(x)
    torch.testing.assert_close(layer.running_mean, mean)
    assert layer.num_batches_tracked == 3


def test_momentum_none_is_the_cumulative_average():
    layer = make(2, momentum=None)
    moments = []
    for step in range(4):
        x = oracle.values(SHAPES[2], step)
        layer(x)
        moments.append(torch.stack(oracle.batch_moments(x))[:, 0])
        mean, var = torch.stack(moments).mean(0)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, var)


@pytest.mark.parametrize("dim", LAYERS)
@pytest.mark.parametrize("virtual_gpus", [2, 3])
def test_virtual_gpus_equal_separate_copies(dim, virtual_gpus):
    layer = make(dim, statistics=("in", "ln", "bn"))
    shape = (6, *SHAPES[dim][1:])
    x, upstream = oracle.values(shape).requires_grad_(), oracle.values(shape, 5)
    copies = [copy.deepcopy(layer) for _ in range(virtual_gpus)]
    layer.virtual_gpus = virtual_gpus
    y = layer(x)
    chunks = x.split(6 // virtual_gpus)
    expected = torch.cat([twin(chunk) for twin, chunk in zip(copies, chunks, strict=True)])
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad((y * upstream).sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, wanted)
    (y * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for name, parameter in layer.named_parameters():
        summed = sum(twin.get_parameter(name).grad for twin in copies)
        torch.testing.assert_close(parameter.grad, summed)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([twin.get_buffer(name) for twin in copies]).mean(0)
        torch.testing.assert_close(layer.get_buffer(name), mean)
    assert layer.num_batches_tracked == 1
    layer.eval()(x[:5])  # virtual GPUs are a fact of training alone


def test_a_batch_that_does_not_split_is_an_error():
    layer = sn.SwitchNorm2d(4, virtual_gpus=4)
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b6\b)(?=.*\b4\b)"):
        layer(torch.randn(6, 4, 3, 3))
    assert layer.num_batches_tracked == 0  # a refused batch leaves no trace
    torch.testing.assert_close(layer.running_var, torch.ones(4))


@pytest.mark.parametrize("dim", LAYERS)
def test_eval_before_training_uses_mean_0_and_variance_1(dim):
    layer = make(dim).eval()
    x = oracle.values(SHAPES[dim])
    running = torch.zeros(4), torch.ones(4)
    torch.testing.assert_close(layer(x), oracle_of(layer, x, running))


def test_without_tracking_eval_equals_training():
    layer = make(2, track_running_stats=False)
    x = oracle.values(SHAPES[2])
    torch.testing.assert_close(layer(x), layer.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("dim", LAYERS)
@pytest.mark.parametrize("mode", [True, False])
def test_empty_batch(dim, mode):
    layer = LAYERS[dim](4).train(mode)
    before = copy.deepcopy(layer.state_dict())
    y = layer(torch.empty(0, 4, *[3] * dim))
    assert y.shape == (0, 4, *[3] * dim)
    y.sum().backward()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(layer.state_dict()[name], before[name], rtol=0, atol=0)


def test_an_empty_batch_does_not_disturb_the_cumulative_average():
    layer = make(2, momentum=None)
    x = oracle.values(SHAPES[2])
    layer(x[:0])
    layer(x)
    torch.testing.assert_close(layer.running_mean, oracle.batch_moments(x)[0][0])


def test_one_vector_and_one_pixel_are_finite_in_training():
    for layer, shape in [
        (sn.SwitchNorm1d(4), (1, 4)),
        (sn.SwitchNorm2d(4), (1, 4, 1, 1)),
        (sn.SwitchNorm3d(4), (1, 4, 1, 1, 1)),
        (sn.SwitchNormRecurrent(4, 4), (1, 4)),
    ]:
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


# --- the recurrent form -----------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [("ln", "gn"), ("ln",), ("gn",)])
@pytest.mark.parametrize("batch", [1, 3])
def test_recurrent_form_equals_the_oracle_in_both_modes(statistics, batch):
    groups = 3 if "gn" in statistics else None
    layer = randomise(sn.SwitchNormRecurrent(6, groups, statistics=statistics).double())
    x, upstream = oracle.values((batch, 6)).requires_grad_(), oracle.values((batch, 6), 2)
    leaves = [x, *layer.parameters()]
    expected = oracle_of(layer, x, num_groups=3)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for mode in (True, False):
        y = layer.train(mode)(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad((y * upstream).sum(), leaves), wanted)


def test_recurrent_limits_are_torchs_group_and_layer_norm():
    x = oracle.values((3, 8))
    for position, groups in enumerate((1, 4)):
        layer = sn.SwitchNormRecurrent(8, 4).double()
        with torch.no_grad():
            for gate in (layer.mean_weight, layer.var_weight):
                gate.fill_(-60.0)[position] = 60.0
        torch.testing.assert_close(layer(x), nn.functional.group_norm(x, groups))


def test_recurrent_construction():
    layer = sn.SwitchNormRecurrent(8, 4)
    assert layer.statistics == ("ln", "gn")
    assert set(layer.state_dict()) == {"weight", "bias", "mean_weight", "var_weight"}
    assert set(sn.SwitchNormRecurrent(8, 4, affine=False).state_dict()) == {
        "mean_weight",
        "var_weight",
    }
    assert sn.SwitchNormRecurrent(8, 4, eps=1e-3).eps == 1e-3
    for size, groups in ((64, 8), (40, 5), (24, 6), (12, 3), (8, 2), (4, 1), (6, 1)):  # of 4 k each
        assert sn.SwitchNormRecurrent(size).num_groups == groups
    with pytest.raises(ValueError, match="num_groups=4 needs 'gn'"):
        sn.SwitchNormRecurrent(8, 4, statistics="ln")
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b3\b)(?=.*1, 2, 4,? (or |and )?8)"):
        sn.SwitchNormRecurrent(8, 3)
    for name in ("in", "bn", "xn"):
        with pytest.raises(ValueError, match=rf"(?s)(?=.*{name})(?=.*ln)(?=.*gn)"):
            sn.SwitchNormRecurrent(8, 4, statistics=("ln", name))
    for shape in [(8,), (2, 8, 3), (2, 7)]:
        with pytest.raises(ValueError, match=str(shape[-1]) + r"|\b" + str(len(shape)) + r"\b"):
            layer(torch.randn(shape))


def test_recurrent_use_over_time_from_a_zero_state():
    layer = randomise(sn.SwitchNormRecurrent(6, 2))
    cell = torch.zeros(2, 6, requires_grad=True)
    state = cell
    for step in range(4):
        state = torch.tanh(layer(state)) + oracle.values((2, 6), step, dtype=torch.float32)
    state.sum().backward()
    assert cell.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# --- what users do with a layer ---------------------------------------------------------------


def test_print_every_layer():
    for layer, _ in all_layers():
        text = repr(layer)
        assert type(layer).__name__ in text and str(layer.num_features) in text
        for name in getattr(layer, "statistics", ()):
            assert name in text
        assert str(layer) == text
        assert repr(nn.Sequential(layer))


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_copies_of_every_layer_behave_alike(duplicate):
    for layer, x in all_layers():
        layer(x)  # so that the buffers say something
        if duplicate == "deepcopy":
            twin = copy.deepcopy(layer)
        elif duplicate == "pickle":
            twin = pickle.loads(pickle.dumps(layer))
        elif duplicate == "torch.save":
            file = io.BytesIO()
            torch.save(layer.state_dict(), file)
            file.seek(0)
            twin = copy.deepcopy(layer)
            for tensor in twin.state_dict().values():
                tensor.zero_()
            twin.load_state_dict(torch.load(file, weights_only=True))
        else:
            twin = copy.deepcopy(layer)
            for tensor in twin.state_dict().values():
                tensor.zero_()
            assert twin.load_state_dict(layer.state_dict(), strict=True)
        assert repr(twin) == repr(layer)
        for mode in (True, False):
            torch.testing.assert_close(
                twin.train(mode)(x), layer.train(mode)(x), rtol=0, atol=0, msg=repr(layer)
            )
        for ours, theirs in zip(
            layer.state_dict().values(), twin.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_state_dict_of_another_set_of_statistics_is_refused():
    with pytest.raises(RuntimeError):
        sn.SwitchNorm2d(4).load_state_dict(sn.SwitchNorm2d(4, statistics=("in", "ln")).state_dict())


@pytest.mark.parametrize("make", [sn.SwitchNorm2d, sn.SparseSwitchNorm2d, sn.SyncSwitchNorm2d])
def test_a_state_dict_of_as_many_other_statistics_is_refused(make):
    """("gn", "bn") and ("in", "bn") have tensors of the same names and shapes."""
    saved = nn.Sequential(make(4, statistics=("gn", "bn"), num_groups=2)).state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    for state in (saved, torch.load(file, weights_only=True)):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"0\.mean_weight.*'gn', 'bn'.*'in', 'bn'"):
                nn.Sequential(make(4, statistics=("in", "bn"))).load_state_dict(state, strict)
    nn.Sequential(make(4, statistics=("bn", "gn"), num_groups=2)).load_state_dict(saved)
    told_nothing = dict(saved)  # such as a safetensors file
    nn.Sequential(make(4, statistics=("in", "bn"))).load_state_dict(told_nothing)


def test_to_moves_parameters_and_buffers():
    layer = sn.SwitchNorm2d(4).double()
    assert layer.running_mean.dtype == layer.mean_weight.dtype == torch.float64
    assert layer(torch.randn(2, 4, 3, 3).double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_and_autocast(dtype):
    layer = randomise(sn.SwitchNorm2d(8))
    x = oracle.values((4, 8, 6, 5), dtype=dtype)
    expected = copy.deepcopy(layer)(x.float())
    y = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = layer(x)
    assert y.dtype == under_autocast.dtype == dtype
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=ulp, atol=ulp / 8)
    torch.testing.assert_close(under_autocast, y, rtol=0, atol=0)
    batch_mean = oracle.batch_moments(x)[0][0].float()
    torch.testing.assert_close(layer.running_mean, 0.1 * batch_mean, rtol=1e-5, atol=1e-6)


def test_a_convolution_and_a_layer_train_under_autocast():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), sn.SwitchNorm2d(8), nn.ReLU())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


def test_channels_last_passes_through():
    for dim, memory_format in [(2, torch.channels_last), (3, torch.channels_last_3d)]:
        layer = make(dim)
        x = oracle.values((2, 4, *[3] * dim))
        expected = copy.deepcopy(layer)(x)
        y = layer(x.to(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, expected)


def test_one_layer_used_twice_before_backward():
    layer = make(2)
    reference = copy.deepcopy(layer)
    first, second = oracle.values((2, 4, 3, 3), 0), oracle.values((2, 4, 5, 2), 1)
    (layer(first).square().sum() + layer(second).cos().sum()).backward()
    loss = oracle_of(reference, first).square().sum() + oracle_of(reference, second).cos().sum()
    loss.backward()
    for parameter, wanted in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad)
    assert layer.num_batches_tracked == 2


def test_frozen_control_parameters_do_not_stop_the_others():
    layer = make(2)
    layer.mean_weight.requires_grad_(False)
    layer.var_weight.requires_grad_(False)
    layer(oracle.values(SHAPES[2])).square().sum().backward()
    assert layer.mean_weight.grad is None and layer.weight.grad.isfinite().all()


def test_no_grad_and_inference_mode():
    layer = make(2)
    x = oracle.values(SHAPES[2])
    expected = copy.deepcopy(layer)(x).detach()
    with torch.no_grad():
        y = copy.deepcopy(layer)(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(layer.eval()(x), make(2).eval()(x))


def test_activation_checkpointing_gives_the_same_gradients():
    plain, checkpointed = make(2), make(2)
    x = oracle.values(SHAPES[2])
    plain(x).square().sum().backward()
    torch.utils.checkpoint.checkpoint(
        checkpointed, x, use_reentrant=False
    ).square().sum().backward()
    for ours, wanted in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad)


@pytest.mark.parametrize("virtual_gpus", [1, 2])
def test_compiles_without_a_graph_break(virtual_gpus):
    torch.compiler.reset()
    model = nn.Sequential(
        sn.SwitchNorm2d(4, virtual_gpus=virtual_gpus), nn.ReLU(), sn.GhostBatchNorm2d(4)
    ).double()  # the second norm nearly cancels some gradients
    model[2].virtual_gpus = virtual_gpus
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step, batch in enumerate((4, 2)):  # a smaller last batch must not break it
        x = oracle.values((batch, 4, 5, 3), step, dtype=torch.float64).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        y, expected = compiled(x), eager(twin)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)
    for ours, wanted in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    for ours, wanted in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, wanted)
    model.eval()
    torch.testing.assert_close(compiled(x), eager.eval()(x))


@pytest.mark.parametrize("statistics", [("in", "ln", "bn"), ("in", "ln"), ("gn", "bn")])
def test_exports_in_eval_with_a_free_batch_size(statistics):
    layer = make(2, statistics=statistics, dtype=torch.float32).eval()
    x = oracle.values((3, 4, 5, 3), dtype=torch.float32)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    for size in (3, 5):
        x = oracle.values((size, 4, 5, 3), dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), layer(x))


# --- helpers over a whole model ---------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        sn.SwitchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 6, 1), sn.SwitchNorm2d(6, statistics=("bn", "in"))),
        nn.Identity(),
        sn.GhostBatchNorm2d(6),
    )


def test_importance_weights():
    model = small_model()
    with torch.no_grad():
        model[1].mean_weight.copy_(torch.tensor([0.0, 1.0, 3.0]))
        model[3][1].var_weight.copy_(torch.tensor([2.0, 0.0]))
    weights = sn.importance_weights(model)
    assert list(weights) == ["1", "3.1"]
    assert list(weights["1"]["mean"]) == ["in", "ln", "bn"]
    assert list(weights["3.1"]["var"]) == ["in", "bn"]
    expected = torch.tensor([0.0, 1.0, 3.0]).double().softmax(0).tolist()
    assert list(weights["1"]["mean"].values()) == pytest.approx(expected)
    assert list(weights["1"]["var"].values()) == pytest.approx([1 / 3] * 3)
    assert weights["3.1"]["var"]["in"] == pytest.approx(0.8807970779)
    assert all(type(v) is float for v in weights["1"]["mean"].values())
    for layer in weights.values():
        for gate in layer.values():
            assert sum(gate.values()) == pytest.approx(1.0)
    assert sn.importance_weights(nn.Linear(2, 2)) == {}


def test_set_virtual_gpus():
    model = small_model()
    sn.set_virtual_gpus(model, 3)
    assert [m.virtual_gpus for m in model.modules() if hasattr(m, "virtual_gpus")] == [3, 3, 3]
    with pytest.raises(ValueError):
        model(torch.randn(4, 3, 5, 5))
    with pytest.raises(ValueError, match="0"):
        sn.set_virtual_gpus(model, 0)
    with pytest.raises(ValueError, match="'0'.*virtual GPUs"):
        sn.set_virtual_gpus(nn.Sequential(nn.BatchNorm2d(4)), 2)


def test_one_parameter_group_by_default():
    model = small_model()
    model[0].bias.requires_grad_(False)
    groups = sn.parameter_groups(model, 0.1, 1e-4)
    assert len(groups) == 1
    assert groups[0]["lr"] == 0.1 and groups[0]["weight_decay"] == 1e-4
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in groups[0]["params"]} == wanted
    assert len(groups[0]["params"]) == len(wanted)
    torch.optim.SGD(groups, momentum=0.9)


@pytest.mark.parametrize(
    ("options", "lr", "decay"),
    [
        ({"gate_lr_factor": 0.1}, 0.01, 1e-4),
        ({"gate_weight_decay": 0.0}, 0.1, 0.0),
        ({"gate_lr_factor": 2.0, "gate_weight_decay": 0.5}, 0.2, 0.5),
    ],
)
def test_control_parameters_in_a_group_of_their_own(options, lr, decay):
    model = small_model()
    model[1].var_weight.requires_grad_(False)
    rest, gates = sn.parameter_groups(model, 0.1, 1e-4, **options)
    assert rest["lr"] == 0.1 and rest["weight_decay"] == 1e-4
    assert gates["lr"] == pytest.approx(lr) and gates["weight_decay"] == decay
    wanted = [model[1].mean_weight, model[3][1].mean_weight, model[3][1].var_weight]
    assert {id(p) for p in gates["params"]} == {id(p) for p in wanted}
    everything = [id(p) for group in (rest, gates) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.SGD([rest, gates], momentum=0.9)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "gate_lr_factor", "gate_weight_decay"])
def test_parameter_groups_refuse_what_optimizers_do(name, value):
    arguments = {"lr": 0.1, "weight_decay": 1e-4, name: value}
    with pytest.raises(ValueError, match=f"{name}={value}; expected 0 or more"):
        sn.parameter_groups(sn.SwitchNorm2d(2), **arguments)
    with pytest.raises(ValueError, match="weight_decay=None; expected 0 or more"):
        sn.parameter_groups(sn.SwitchNorm2d(2), 0.1, None)


def test_parameter_groups_of_a_shared_layer_hold_it_once():
    layer = sn.SwitchNorm2d(4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    groups = sn.parameter_groups(model, 0.1, 1e-4, gate_lr_factor=0.5)
    assert sorted(len(group["params"]) for group in groups) == [2, 2]
    torch.optim.SGD(groups)


def test_parameter_groups_of_a_model_without_control_parameters():
    groups = sn.parameter_groups(nn.Linear(2, 2), 0.1, 1e-4, gate_lr_factor=0.5)
    torch.optim.SGD(groups).step()
    assert sum(len(group["params"]) for group in groups) == 2


def test_batch_average_of_one_layer_is_the_populations_mean_and_variance():
    model = nn.Sequential(sn.SwitchNorm2d(4), nn.Dropout(0.5)).double()
    batches = [oracle.values((n, 4, 3, 3), n) for n in (5, 2, 4)]
    everything = torch.cat(batches)
    model[1].eval()
    sn.batch_average(model, [(x, None) for x in batches], 3)
    mean, var = oracle.batch_moments(everything)
    torch.testing.assert_close(model[0].running_mean, mean[0])
    torch.testing.assert_close(model[0].running_var, var[0])
    assert model[0].training and not model[1].training


# --- importing --------------------------------------------------------------------------------


def test_importing_the_layers_needs_torch_alone():
    heavy = ["torchvision", "hydra", "omegaconf", "tensorboard", "timm", "matplotlib", "sklearn"]
    code = f"""
import sys
for name in {heavy!r}:
    sys.modules[name] = None  # importing it now raises ImportError
import sn
sn.make_norm("sn")(4), sn.make_norm("bn")(4)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)

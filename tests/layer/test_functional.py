"""sn.switch_norm against the float64 oracle, finite differences and torch's own normalisers.

As the plain formula, and by what the machine has.
"""

import inspect
import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F

import sn

SHAPES = [(3, 4), (3, 4, 5), (3, 6, 5, 3), (2, 4, 3, 1, 3), (1, 4, 3, 5), (2, 4, 1, 1)]
DEGENERATE = [(1, 4), (1, 4, 1, 1)]
NAMES = ("x", "mean_weight", "var_weight", "weight", "bias")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: threads that wait for one another cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, params=["reference", "auto"])
def implementation(request):
    with sn.backend(request.param):
        yield


def test_which_function_is_which():
    """sn.switch_norm is the fast one, sn.functional.switch_norm the formula; same arguments."""
    inputs, _, options = case((3, 4, 5, 6), ("in", "ln", "bn"), torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    formula = sn.functional.switch_norm(*inputs, **options)
    assert "SwitchNorm" not in formula.grad_fn.name()
    with sn.backend("auto"):
        fast = sn.switch_norm(*inputs, **options)
    if sn.kernels.native.library() is not None:
        assert "SwitchNorm" in fast.grad_fn.name()
    torch.testing.assert_close(fast, formula)
    signatures = [inspect.signature(f) for f in (sn.switch_norm, sn.functional.switch_norm)]
    assert signatures[0] == signatures[1]
    unbiased = [f(*inputs, unbiased=True) for f in (sn.switch_norm, sn.functional.switch_norm)]
    assert torch.equal(*unbiased) and not torch.equal(unbiased[0], formula)


def groups_for(channels):
    return channels // 2


def case(shape, statistics, dtype=torch.float64, seed=0, mean=0.0):
    """(x, mean_weight, var_weight, weight, bias), upstream gradient, options."""
    x = oracle.values(shape, seed, mean=mean, dtype=dtype)
    inputs = (x, *oracle.parameters(shape[1], len(statistics), seed + 1, dtype))
    upstream = oracle.values(shape, seed + 2, dtype=dtype)
    options = {
        "statistics": statistics,
        "num_groups": groups_for(shape[1]) if "gn" in statistics else None,
    }
    return inputs, upstream, options


def for_oracle(options):
    return {**options, "num_groups": options["num_groups"] or 1}


def check_against_oracle(inputs, upstream, options, rtol, atol, **both):
    y, grads = oracle.gradients(lambda *a: sn.switch_norm(*a, **options, **both), inputs, upstream)
    expected, expected_grads = oracle.gradients(
        lambda *a: oracle.switch_norm(*a, **for_oracle(options), **both),
        [value.double() for value in inputs],
        upstream,
    )
    assert y.dtype == inputs[0].dtype and y.shape == inputs[0].shape
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol, msg=lambda m: "y: " + m)
    for name, grad, wanted in zip(NAMES, grads, expected_grads, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(
            grad.double(),
            wanted,
            rtol=rtol,
            atol=atol * scale,
            msg=lambda m, name=name: f"gradient of {name}: {m}",
        )


# --- the oracle itself ------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", oracle.SUBSETS, ids="+".join)
def test_the_two_oracles_agree(statistics):
    for shape in [(4, 4), (4, 6, 3, 2), (4, 4, 1, 1)]:
        inputs, _, options = case(shape, statistics)
        for virtual_gpus in (1, 2):
            given = {**for_oracle(options), "virtual_gpus": virtual_gpus}
            by_loops = oracle.switch_norm_by_loops(*inputs, **given)
            torch.testing.assert_close(oracle.switch_norm(*inputs, **given), by_loops)


# --- forward and gradients --------------------------------------------------------------------


def test_statistics_are_named_in_canonical_order():
    assert sn.STATISTICS == ("in", "ln", "gn", "bn")


@pytest.mark.parametrize("statistics", oracle.SUBSETS, ids="+".join)
def test_forward_equals_hand_loops(statistics):
    for shape in SHAPES + DEGENERATE:
        inputs, _, options = case(shape, statistics)
        y = sn.switch_norm(*inputs, **options)
        expected = oracle.switch_norm_by_loops(*inputs, **for_oracle(options))
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("statistics", oracle.SUBSETS, ids="+".join)
def test_output_and_gradients_in_float64(statistics):
    for shape in SHAPES + DEGENERATE:
        inputs, upstream, options = case(shape, statistics)
        check_against_oracle(inputs, upstream, options, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("statistics", oracle.SUBSETS, ids="+".join)
def test_output_and_gradients_in_float32(statistics):
    for shape in [(5, 4), (3, 6, 5, 7), (2, 4, 3, 2, 3)]:
        inputs, upstream, options = case(shape, statistics, torch.float32)
        if {"in"} == set(statistics) and len(shape) == 2:
            continue  # every variance is zero: nothing but rounding, times 1/sqrt(eps)
        check_against_oracle(inputs, upstream, options, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("statistics", [("in", "ln", "bn"), ("bn",), ("ln", "gn", "bn")])
@pytest.mark.parametrize("virtual_gpus", [2, 3])
def test_output_and_gradients_with_virtual_gpus(statistics, virtual_gpus):
    for shape in [(6, 4), (6, 4, 3, 5)]:
        inputs, upstream, options = case(shape, statistics)
        check_against_oracle(
            inputs, upstream, options, rtol=1e-9, atol=1e-9, virtual_gpus=virtual_gpus
        )
        y = sn.switch_norm(*inputs, **options, virtual_gpus=virtual_gpus)
        by_loops = oracle.switch_norm_by_loops(
            *inputs, **for_oracle(options), virtual_gpus=virtual_gpus
        )
        torch.testing.assert_close(y, by_loops)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_eps_is_inside_the_root(eps):
    inputs, upstream, options = case((3, 4, 3, 3), ("in", "ln", "bn"))
    check_against_oracle(inputs, upstream, options, rtol=1e-9, atol=1e-9, eps=eps)


@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
def test_without_weight_or_bias(present):
    (x, mean_weight, var_weight, weight, bias), upstream, options = case(
        (3, 4, 3, 3), ("in", "ln", "bn")
    )
    affine = dict(weight=weight if present[0] else None, bias=bias if present[1] else None)

    def run(function, x, mean_weight, var_weight, **given):
        return function(x, mean_weight, var_weight, **affine, **given)

    inputs = (x, mean_weight, var_weight)
    y, grads = oracle.gradients(lambda *a: run(sn.switch_norm, *a, **options), inputs, upstream)
    wanted, wanted_grads = oracle.gradients(
        lambda *a: run(oracle.switch_norm, *a, **for_oracle(options)), inputs, upstream
    )
    torch.testing.assert_close((y, *grads), (wanted, *wanted_grads))


def test_eval_output_and_gradients_use_the_running_statistics():
    for statistics in [("bn",), ("in", "bn"), ("in", "ln", "gn", "bn")]:
        inputs, upstream, options = case((3, 4, 3, 5), statistics)
        running = oracle.values((4, 1), 7).view(4), torch.tensor([0.3, 1.0, 2.5, 4.0]).double()
        kept = [r.clone() for r in running]
        y, grads = oracle.gradients(
            lambda x, mw, vw, w, b, r=running, o=options: sn.switch_norm(
                x, mw, vw, w, b, *r, training=False, **o
            ),
            inputs,
            upstream,
        )
        wanted, wanted_grads = oracle.gradients(
            lambda *a, r=running, o=options: oracle.switch_norm(*a, r, **for_oracle(o)),
            inputs,
            upstream,
        )
        torch.testing.assert_close((y, *grads), (wanted, *wanted_grads))
        by_loops = oracle.switch_norm_by_loops(*inputs, running, **for_oracle(options))
        torch.testing.assert_close(y, by_loops)
        torch.testing.assert_close(running, tuple(kept), rtol=0, atol=0)  # eval never moves them


def test_eval_ignores_virtual_gpus():
    inputs, _, options = case((3, 4, 2, 2), ("in", "ln", "bn"))
    running = torch.zeros(4).double(), torch.ones(4).double()
    one, two = (
        sn.switch_norm(*inputs, *running, training=False, virtual_gpus=g, **options) for g in (1, 2)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_eval_without_running_statistics_uses_the_batch():
    inputs, _, options = case((3, 4, 2, 2), ("in", "ln", "bn"))
    training = sn.switch_norm(*inputs, **options)
    for virtual_gpus in (1, 2, 3):  # the batch is not split in evaluation
        evaluating = sn.switch_norm(*inputs, training=False, virtual_gpus=virtual_gpus, **options)
        torch.testing.assert_close(training, evaluating, rtol=0, atol=0)


@pytest.mark.parametrize("statistics", oracle.SUBSETS, ids="+".join)
def test_gradcheck(statistics):
    inputs, _, options = case((2, 4, 3, 3), statistics)
    leaves = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(lambda *a: sn.switch_norm(*a, **options), leaves)


@pytest.mark.parametrize("statistics", [("in", "ln", "bn"), ("in", "ln", "gn", "bn"), ("ln", "gn")])
def test_gradgradcheck(statistics):
    inputs, _, options = case((2, 4, 2, 2), statistics)
    leaves = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradgradcheck(lambda *a: sn.switch_norm(*a, **options), leaves)


def test_gradcheck_in_eval_and_with_virtual_gpus():
    inputs, _, options = case((4, 3, 3, 3), ("in", "ln", "bn"))
    leaves = [value.requires_grad_() for value in inputs]
    running = torch.tensor([0.1, -0.5, 1.0]).double(), torch.tensor([0.4, 1.0, 2.0]).double()
    assert torch.autograd.gradcheck(
        lambda *a: sn.switch_norm(*a, *running, training=False, **options), leaves
    )
    assert torch.autograd.gradcheck(
        lambda *a: sn.switch_norm(*a, virtual_gpus=2, **options), leaves
    )
    assert torch.autograd.gradgradcheck(
        lambda *a: sn.switch_norm(*a, virtual_gpus=2, **options),
        leaves,
        gen_non_contig_grad_outputs=True,
    )


@pytest.mark.parametrize("wanted", NAMES)
def test_any_single_input_may_be_the_only_one_with_a_gradient(wanted):
    inputs, upstream, options = case((3, 4, 3, 3), ("in", "ln", "bn"))
    _, all_grads = oracle.gradients(lambda *a: sn.switch_norm(*a, **options), inputs, upstream)
    position = NAMES.index(wanted)
    only = inputs[position].clone().requires_grad_()
    given = [*inputs[:position], only, *inputs[position + 1 :]]
    (sn.switch_norm(*given, **options) * upstream).sum().backward()
    torch.testing.assert_close(only.grad, all_grads[position])


# --- limits: one dominant gate is torch's own normaliser --------------------------------------


def dominant(name, statistics, dtype=torch.float64):
    return torch.tensor([60.0 if name == s else -60.0 for s in statistics], dtype=dtype)


def torch_norm(name, x, weight, bias, groups):
    if name == "in":
        return F.instance_norm(x, weight=weight, bias=bias)
    if name == "bn":
        return F.batch_norm(x, None, None, weight, bias, training=True)
    return F.group_norm(x, 1 if name == "ln" else groups, weight, bias)


@pytest.mark.parametrize("name", oracle.STATISTICS)
@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 6, 5, 7), (2, 4, 3, 2, 3)])
def test_a_dominant_gate_equals_torchs_own_norm(name, shape):
    statistics = oracle.STATISTICS
    (x, _, _, weight, bias), upstream, options = case(shape, statistics)
    gate = dominant(name, statistics)
    inputs = (x, weight, bias)
    ours = oracle.gradients(
        lambda x, w, b: sn.switch_norm(x, gate, gate, w, b, **options), inputs, upstream
    )
    theirs = oracle.gradients(
        lambda x, w, b: torch_norm(name, x, w, b, options["num_groups"]), inputs, upstream
    )
    torch.testing.assert_close(ours, theirs)


def test_a_dominant_bn_gate_equals_batch_norm_in_eval():
    (x, _, _, weight, bias), _, options = case((3, 4, 3, 5), oracle.STATISTICS)
    gate = dominant("bn", oracle.STATISTICS)
    running = torch.tensor([0.5, -1.0, 0.0, 2.0]).double(), torch.tensor([0.1, 1, 3, 9]).double()
    ours = sn.switch_norm(x, gate, gate, weight, bias, *running, training=False, **options)
    torch.testing.assert_close(ours, F.batch_norm(x, *running, weight, bias, training=False))


def test_mean_and_variance_gates_are_separate():
    (x, *_), _, options = case((3, 4, 3, 5), ("in", "ln", "bn"))
    y = sn.switch_norm(
        x, dominant("ln", options["statistics"]), dominant("bn", options["statistics"]), **options
    )
    centred = x - x.mean((1, 2, 3), keepdim=True)
    expected = centred / torch.sqrt(x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5)
    torch.testing.assert_close(y, expected)


def test_a_common_offset_of_the_gates_changes_nothing():
    (x, mean_weight, var_weight, *_), _, options = case((3, 4, 3, 3), ("in", "ln", "bn"))
    y = sn.switch_norm(x, mean_weight, var_weight, **options)
    shifted = sn.switch_norm(x, mean_weight + 500.0, var_weight - 500.0, **options)
    torch.testing.assert_close(y, shifted)


@pytest.mark.parametrize("statistics", [("in", "ln", "bn"), ("in", "ln", "gn", "bn")])
def test_callers_order_of_statistics_does_not_matter(statistics):
    inputs, _, options = case((3, 4, 3, 3), statistics)
    expected = sn.switch_norm(*inputs, **options)
    for order in itertools.permutations(statistics):
        y = sn.switch_norm(*inputs, **{**options, "statistics": order})
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_a_single_statistic_has_no_gate_gradient():
    inputs, upstream, options = case((3, 4, 3, 3), ("bn",))
    _, grads = oracle.gradients(lambda *a: sn.switch_norm(*a, **options), inputs, upstream)
    torch.testing.assert_close(grads[1:3], (torch.zeros(1).double(),) * 2)


# --- running statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 2), (2, 4, 2, 2, 3)])
@pytest.mark.parametrize("momentum", [0.1, 0.997, 1.0, 0.0])
def test_running_statistics_by_hand(shape, momentum):
    inputs, _, options = case(shape, ("ln", "bn"))
    mean, var = torch.arange(4).double(), torch.arange(4).double() + 1
    expected = []
    flat = inputs[0].transpose(0, 1).reshape(4, -1)
    for c in range(4):
        m = sum(flat[c].tolist()) / flat.shape[1]
        v = sum((value - m) ** 2 for value in flat[c].tolist()) / flat.shape[1]
        expected.append(
            (
                (1 - momentum) * mean[c].item() + momentum * m,
                (1 - momentum) * var[c].item() + momentum * v,
            )
        )
    expected = torch.tensor(expected).double()
    sn.switch_norm(*inputs, mean, var, momentum=momentum, **options)
    torch.testing.assert_close(torch.stack([mean, var], 1), expected, check_dtype=False)


def test_running_statistics_equal_batch_norms_up_to_the_unbiased_factor():
    inputs, _, options = case((3, 4, 5, 2), ("in", "ln", "bn"))
    ours = [torch.zeros(4).double(), torch.zeros(4).double()]
    theirs = [torch.zeros(4).double(), torch.zeros(4).double()]
    for step in range(3):
        sn.switch_norm(inputs[0] * (step + 1), *inputs[1:], *ours, momentum=0.3, **options)
        F.batch_norm(inputs[0] * (step + 1), *theirs, training=True, momentum=0.3)
    count = 3 * 5 * 2
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1] * (count - 1) / count)


@pytest.mark.parametrize("virtual_gpus", [2, 3])
def test_virtual_gpus_equal_separate_calls(virtual_gpus):
    inputs, upstream, options = case((6, 4, 3, 5), ("in", "ln", "bn"))
    start = [torch.full((4,), 0.5).double(), torch.full((4,), 2.0).double()]
    grouped_running = [r.clone() for r in start]
    separate_running = []

    def grouped(x, *rest):
        return sn.switch_norm(x, *rest, *grouped_running, virtual_gpus=virtual_gpus, **options)

    def separate(x, *rest):
        outputs = []
        for chunk in x.split(6 // virtual_gpus):
            running = [r.clone() for r in start]
            outputs.append(sn.switch_norm(chunk, *rest, *running, **options))
            separate_running.append(torch.stack(running))
        return torch.cat(outputs)

    torch.testing.assert_close(
        oracle.gradients(grouped, inputs, upstream), oracle.gradients(separate, inputs, upstream)
    )
    mean_of_updates = torch.stack(separate_running).mean(0)
    torch.testing.assert_close(torch.stack(grouped_running), mean_of_updates)


def test_virtual_gpus_average_the_variances_and_do_not_pool_them():
    x = torch.tensor([[0.0], [2.0], [100.0], [102.0]]).double()
    gate = torch.ones(1).double()
    running = torch.zeros(1).double(), torch.zeros(1).double()
    sn.switch_norm(
        x, gate, gate, None, None, *running, statistics=("bn",), momentum=1.0, virtual_gpus=2
    )
    torch.testing.assert_close(torch.cat(running), torch.tensor([51.0, 1.0]).double())


def test_running_statistics_stay_out_of_the_graph():
    inputs, _, options = case((3, 4, 3, 3), ("in", "bn"))
    running = torch.zeros(4).double(), torch.ones(4).double()
    y = sn.switch_norm(inputs[0].requires_grad_(), *inputs[1:], *running, **options)
    assert y.requires_grad and not any(r.requires_grad for r in running)


def test_running_statistics_of_a_float32_call_move_in_no_grad_too():
    inputs, _, options = case((3, 4, 3, 3), ("in", "bn"), torch.float32)
    running = torch.zeros(4), torch.ones(4)
    with torch.no_grad():
        sn.switch_norm(*inputs, *running, **options)
    torch.testing.assert_close(running[0], 0.1 * inputs[0].mean((0, 2, 3)))


# --- accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statistics",
    [s for s in oracle.SUBSETS if len(s) in (1, 4) or s == ("in", "ln", "bn")],
    ids="+".join,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mean_1000_deviation_1_in_float32(statistics, memory_format):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 8, 16, 15, generator=generator) + 1000.0).to(memory_format=memory_format)
    gates = oracle.parameters(8, len(statistics), 1, torch.float32)[:2]
    groups = 4 if "gn" in statistics else None
    y = sn.switch_norm(x, *gates, statistics=statistics, num_groups=groups)
    exact = oracle.switch_norm(x, *gates, statistics=statistics, num_groups=groups or 1)
    assert (y.double() - exact).abs().max() <= 5e-5


@pytest.mark.parametrize("statistics", [("bn",), ("in", "bn")], ids="+".join)
def test_channels_of_very_different_means_lose_no_more_than_in_batch_norm(statistics):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 16, 15, generator=generator)
    x += 1000.0 * torch.arange(8).view(1, 8, 1, 1)
    gates = oracle.parameters(8, len(statistics), 1, torch.float32)[:2]

    def error(y, *gates, statistics):
        return (y.double() - oracle.switch_norm(x, *gates, statistics=statistics)).abs().max()

    ours = error(sn.switch_norm(x, *gates, statistics=statistics), *gates, statistics=statistics)
    one = torch.ones(1)
    torchs = error(F.batch_norm(x, None, None, training=True), one, one, statistics=("bn",))
    assert ours <= 1.5 * torchs


@pytest.mark.parametrize("statistics", [("in",), ("in", "ln"), ("ln", "gn"), ("in", "ln", "bn")])
@pytest.mark.parametrize("neighbour", [1e6, float("inf"), float("nan")])
def test_a_sample_does_not_depend_on_its_neighbours(statistics, neighbour):
    """In evaluation, or without bn, an outlier leaves every other sample's output as it was."""
    inputs, _, options = case((3, 4, 5, 5), statistics, torch.float32)
    running = torch.zeros(4), torch.ones(4)
    x = inputs[0].clone()
    x[1] = neighbour
    for training in {False, "bn" not in statistics}:
        y, alone = (
            sn.switch_norm(given, *inputs[1:], *running, training=training, **options)
            for given in (x, inputs[0])
        )
        torch.testing.assert_close(y[::2], alone[::2], rtol=1e-6, atol=1e-6)


def test_mean_1000_gradients_in_float32():
    statistics = ("in", "ln", "bn")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 16, 15, generator=generator) + 1000.0
    upstream = torch.randn(4, 8, 16, 15, generator=generator)
    inputs = (x, *oracle.parameters(8, 3, 1, torch.float32))
    _, grads = oracle.gradients(
        lambda *a: sn.switch_norm(*a, statistics=statistics), inputs, upstream
    )
    _, exact = oracle.gradients(
        lambda *a: oracle.switch_norm(*a, statistics=statistics),
        [value.double() for value in inputs],
        upstream,
    )
    for name, grad, wanted in zip(NAMES, grads, exact, strict=True):
        error = (grad.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= 1e-3, f"{name}: {error:.1e}"


@pytest.mark.parametrize("offset", [1e4, -3e4])
def test_large_offset_stays_finite_and_variances_never_negative(offset):
    generator = torch.Generator().manual_seed(0)
    for spread in (1.0, 1e-3, 0.0):
        x = torch.randn(4, 8, 9, 9, generator=generator) * spread + offset
        gates = (torch.ones(4), torch.ones(4))
        running = torch.zeros(8), torch.zeros(8)
        x.requires_grad_()
        y = sn.switch_norm(
            x,
            *gates,
            None,
            None,
            *running,
            statistics=oracle.STATISTICS,
            num_groups=2,
            momentum=1.0,
        )
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert (running[1] >= 0).all()
        torch.testing.assert_close(running[0], x.detach().mean((0, 2, 3)), rtol=1e-6, atol=0)
        exact = x.detach().double().var((0, 2, 3), correction=0).float()
        torch.testing.assert_close(running[1], exact, rtol=1e-2, atol=1e-4)


def test_zero_input_gives_the_bias_and_finite_gradients():
    for shape in [(2, 4), (2, 4, 3, 3), (1, 4, 1, 1)]:
        inputs, upstream, options = case(shape, oracle.STATISTICS, torch.float32)
        inputs = (torch.zeros(shape), *inputs[1:])
        y, grads = oracle.gradients(lambda *a, o=options: sn.switch_norm(*a, **o), inputs, upstream)
        torch.testing.assert_close(y, inputs[4].view(1, 4, *[1] * (len(shape) - 2)).expand(shape))
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(6, 8), (4, 8, 7, 5)])
def test_half_precision_input_with_float32_parameters(dtype, autocast, shape):
    statistics = ("ln", "bn") if len(shape) == 2 else ("in", "ln", "bn")
    (x, *parameters), upstream, options = case(shape, statistics, torch.float32, mean=3.0)
    half = x.to(dtype)
    running = torch.zeros(8), torch.ones(8)
    exact_running = torch.zeros(8), torch.ones(8)

    def ours(*a):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            return sn.switch_norm(*a, *running, **options)

    upstream = upstream.to(dtype)
    y, grads = oracle.gradients(ours, (half, *parameters), upstream)
    exact, exact_grads = oracle.gradients(
        lambda *a: sn.switch_norm(*a, *exact_running, **options),
        (half.float(), *parameters),
        upstream.float(),
    )
    assert y.dtype == dtype and grads[0].dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in grads[1:])
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), exact, rtol=ulp, atol=ulp / 8)
    torch.testing.assert_close(grads[0].float(), exact_grads[0], rtol=ulp, atol=ulp / 8)
    torch.testing.assert_close(grads[1:], exact_grads[1:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(running, exact_running, rtol=1e-5, atol=1e-6)


def test_float32_input_stays_float32_under_autocast():
    inputs, _, options = case((4, 8, 3, 3), ("in", "ln", "bn"), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sn.switch_norm(*inputs, **options)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, sn.switch_norm(*inputs, **options), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_in_half_precision(dtype):
    inputs, upstream, options = case((4, 8, 5, 5), ("in", "ln", "bn"), dtype, mean=3.0)
    y, grads = oracle.gradients(lambda *a: sn.switch_norm(*a, **options), inputs, upstream)
    exact = oracle.switch_norm(*inputs, **for_oracle(options))
    assert y.dtype == dtype and all(grad.dtype == dtype for grad in grads)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=2 * ulp, atol=ulp)


def test_float16_values_whose_squares_overflow():
    x = (oracle.values((2, 4, 4, 4), 0) * 10000).clamp(-60000, 60000).half()
    gates = torch.ones(3), torch.ones(3)
    y = sn.switch_norm(x, *gates)
    exact = oracle.switch_norm(x, *gates, statistics=("in", "ln", "bn"))
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=1e-3)


# --- memory layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((3, 6, 5, 4), torch.channels_last), ((2, 4, 3, 2, 3), torch.channels_last_3d)],
)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_in_channels_last_out(shape, memory_format, training):
    inputs, upstream, options = case(shape, ("in", "ln", "bn"))
    running = torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()

    def run(*a):
        buffers = [r.clone() for r in running]
        return sn.switch_norm(*a, *buffers, training=training, **options)

    expected = oracle.gradients(run, inputs, upstream)
    x = inputs[0].to(memory_format=memory_format).requires_grad_()
    y = run(x, *inputs[1:])
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.detach(), expected[0])
    (grad,) = torch.autograd.grad(y, x, upstream.to(memory_format=memory_format))
    torch.testing.assert_close(grad, expected[1][0])
    (grad,) = torch.autograd.grad(run(x, *inputs[1:]), x, upstream)  # layouts that disagree
    torch.testing.assert_close(grad, expected[1][0])


STRIDED = {
    "sliced channels": lambda x: x[:, 1:7:2],
    "sliced positions": lambda x: x[..., ::2, 1:],
    "sliced samples": lambda x: x[::2],
    "transposed positions": lambda x: x.transpose(2, 3),
    "transposed samples and channels": lambda x: x.transpose(0, 1),
    "expanded over samples": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded over positions": lambda x: x[..., :1].expand(-1, -1, -1, 4),
    "expanded over channels": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "flipped and offset": lambda x: x.flip(3)[:, 2:, 1:],
    "sliced channels_last": lambda x: x.to(memory_format=torch.channels_last)[:, :4, 1:],
}


@pytest.mark.parametrize("how", STRIDED)
def test_strided_input(how):
    base = oracle.values((4, 8, 5, 6), 0)
    view = STRIDED[how](base)
    inputs, upstream, options = case(tuple(view.shape), ("in", "ln", "bn"))

    def through(function, **given):
        return lambda base, *rest: function(STRIDED[how](base), *rest, **given)

    inputs = (base, *inputs[1:])
    before = base.clone()
    ours = oracle.gradients(through(sn.switch_norm, **options), inputs, upstream)
    wanted = oracle.gradients(through(oracle.switch_norm, **for_oracle(options)), inputs, upstream)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(base, before, rtol=0, atol=0)


def test_expanded_upstream_gradient():
    inputs, _, options = case((3, 4, 3, 3), ("in", "ln", "bn"))
    x = inputs[0].clone().requires_grad_()
    sn.switch_norm(x, *inputs[1:], **options).sum().backward()  # sum() expands a scalar
    wanted = oracle.gradients(
        lambda *a: oracle.switch_norm(*a, **for_oracle(options)), inputs, torch.ones(3, 4, 3, 3)
    )
    torch.testing.assert_close(x.grad, wanted[1][0], rtol=1e-7, atol=1e-9)


# --- degenerate batches and bad input ---------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (0, 4, 3, 3), (0, 4, 2, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("virtual_gpus", [1, 2])
def test_empty_batch(shape, training, virtual_gpus):
    inputs, _, options = case((2, *shape[1:]), ("ln", "bn"), torch.float32)
    x = torch.empty(shape, requires_grad=True)
    running = torch.full((4,), 3.0), torch.full((4,), 5.0)
    y = sn.switch_norm(
        x, *inputs[1:], *running, training=training, virtual_gpus=virtual_gpus, **options
    )
    assert y.shape == shape and y.dtype == x.dtype
    torch.testing.assert_close(running, (torch.full((4,), 3.0), torch.full((4,), 5.0)))
    y.sum().backward()  # a rank without proposals still has to take part
    assert x.grad.shape == shape


@pytest.mark.parametrize("virtual_gpus", [2, 4, 8])
def test_a_batch_that_does_not_split_into_virtual_gpus_is_an_error(virtual_gpus):
    inputs, _, options = case((5, 4, 2, 2), ("in", "ln", "bn"))
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b5\b)(?=.*\b{virtual_gpus}\b)"):
        sn.switch_norm(*inputs, virtual_gpus=virtual_gpus, **options)


@pytest.mark.parametrize("virtual_gpus", [0, -1])
def test_fewer_than_one_virtual_gpu_is_an_error(virtual_gpus):
    inputs, _, options = case((4, 4, 2, 2), ("in", "ln", "bn"))
    with pytest.raises(ValueError, match=str(virtual_gpus)):
        sn.switch_norm(*inputs, virtual_gpus=virtual_gpus, **options)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (("in", "xn"), r"(?s)(?=.*xn)(?=.*in)(?=.*ln)(?=.*gn)(?=.*bn)"),
        ((), r"(?s)(?=.*in)(?=.*ln)(?=.*gn)(?=.*bn)"),
        (("in", "in"), r"(?s)(?=.*in)"),
    ],
)
def test_bad_statistics_are_an_error(statistics, message):
    x = torch.randn(2, 4, 3, 3)
    gates = torch.ones(len(statistics)), torch.ones(len(statistics))
    with pytest.raises(ValueError, match=message):
        sn.switch_norm(x, *gates, statistics=statistics)


def test_group_counts_that_do_not_divide_are_an_error():
    x, gate = torch.randn(2, 6, 3, 3), torch.ones(2)
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b4\b)(?=.*1, 2, 3,? (and |or )?6)"):
        sn.switch_norm(x, gate, gate, statistics=("ln", "gn"), num_groups=4)
    for num_groups in (None, 0, -2):
        with pytest.raises(ValueError, match="num_groups"):
            sn.switch_norm(x, gate, gate, statistics=("ln", "gn"), num_groups=num_groups)


def test_a_wrong_number_of_control_parameters_is_an_error():
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"(?s)(?=.*2)(?=.*3)"):
        sn.switch_norm(x, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"(?s)(?=.*2)(?=.*3)"):
        sn.switch_norm(x, torch.ones(3), torch.ones(2))


@pytest.mark.parametrize("shape", [(), (4,)])
def test_input_without_channels_is_an_error(shape):
    with pytest.raises(ValueError, match=r"\(N, C|dimension|shape"):
        sn.switch_norm(torch.randn(shape), torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("function", [sn.switch_norm, sn.functional.switch_norm])
@pytest.mark.parametrize(
    "running, message",
    [
        ({"running_mean": torch.zeros(4)}, "running_mean is given alone"),
        ({"running_var": torch.ones(4)}, "running_var is given alone"),
        (
            {"running_mean": torch.zeros(5), "running_var": torch.ones(4)},
            r"running_mean has shape \(5,\); expected \(4,\)",
        ),
        (
            {"running_mean": torch.zeros(4), "running_var": torch.ones(4, 1)},
            r"running_var has shape \(4, 1\); expected \(4,\)",
        ),
        (
            {"running_mean": torch.zeros(4), "running_var": torch.ones(4), "momentum": None},
            "momentum=None; expected a number",
        ),
    ],
)
def test_running_statistics_that_do_not_fit(function, running, message, training):
    x, logits = torch.randn(2, 4, 3, 3), torch.ones(3)
    if "momentum" in running and not training:  # it has no part in evaluation
        assert torch.equal(
            function(x, logits, logits, **running, training=False),
            function(x, logits, logits, **running | {"momentum": 0.1}, training=False),
        )
        return
    with pytest.raises(ValueError, match=message):
        function(x, logits, logits, **running, training=training)

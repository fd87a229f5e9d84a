"""The fused layer against float64 autograd of the reference: output, gradients, running statistics.

The calls from C++ and by ctypes go through the same cases. The error may be twice that of the plain
formula in the same dtype (and a few roundings).
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sn
from sn import functional, kernels

ALL = ("in", "ln", "gn", "bn")
ROOT = Path(__file__).parents[2]
NAMES = ("y", "x", "mean_weight", "var_weight", "weight", "bias", "running_mean", "running_var")
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compiled():
    if kernels.native.library() is None:
        pytest.skip("the package was installed without a C compiler")


def use_native(by: str, monkeypatch):
    """Its usual call by the extension in C++, or all of it by Python."""
    compiled()
    if by == "Python":
        monkeypatch.setattr(kernels.native, "extension", lambda: None)
    elif kernels.native.extension() is None:
        pytest.skip("the package was installed without a C++ compiler")


@pytest.fixture(params=["C++", "Python"])
def backend(request, monkeypatch):
    """The CPU's implementation, forced; called from C++ and by ctypes."""
    use_native(request.param, monkeypatch)
    with sn.backend("native"):
        yield "native"


@pytest.fixture(params=["C++", "Python"])
def native(request, monkeypatch):
    use_native(request.param, monkeypatch)


def values(shape, statistics, offset=0.0, gates=1.0, dtype=torch.float32, seed=0):
    """x, mean_weight, var_weight, weight, bias, running mean and variance, dy; exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    spread = (1, channels) + (1,) * (len(shape) - 2)
    x = randn(*shape) * randn(*spread).abs().add(0.5) + randn(*spread) + offset
    logits = gates * randn(2, len(statistics))
    tensors = (x, *logits, randn(channels), randn(channels))
    tensors += (randn(channels) + offset, randn(channels).abs() + 0.5, randn(*shape))
    return [t.to(dtype) for t in tensors]


def lay_out(x, layout):
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.cat((x, x), 1)[:, : x.shape[1]]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.contiguous()


def run(function, tensors, dtype, layout="contiguous", affine=True, **options):
    """Everything a call computes, in the order of NAMES."""
    x, *parameters, running_mean, running_var, dy = (t.to(dtype, copy=True) for t in tensors)
    if not affine:
        parameters[2:] = None, None
    x = lay_out(x, layout).requires_grad_()
    leaves = [x] + [t if t is None else t.requires_grad_() for t in parameters]
    y = function(*leaves, running_mean, running_var, **options)
    y.backward(dy)
    grads = [t if t is None else t.grad for t in leaves]
    return [y.detach(), *grads, running_mean, running_var]


def compare(tensors, dtype, layout="contiguous", *, backend, device="cpu", **options):
    """Hold the fused layer to twice the error of the plain formula."""
    exact = run(functional.switch_norm, tensors, torch.float64, layout, **options)
    tensors = [t.to(device) for t in tensors]
    with sn.backend(backend):
        assert kernels.choose_backend(*(t.to(dtype) for t in tensors[:7])) == backend
        fused = run(kernels.switch_norm, tensors, dtype, layout, **options)
    plain = run(functional.switch_norm, tensors, dtype, layout, **options)
    fused, plain = ([t if t is None else t.cpu() for t in got] for got in (fused, plain))
    # a GPU divides, and takes roots and powers, to two units in the last place
    eps = torch.finfo(dtype).eps * (4 if device == "cuda" and dtype == torch.float32 else 1)
    terms = tensors[0].numel()
    for name, true, reference, ours in zip(NAMES, exact, plain, fused):
        if true is None:
            assert ours is None
            continue
        assert ours.dtype == reference.dtype and ours.shape == reference.shape, name
        error, allowed = ((t.double() - true).abs().max().item() for t in (ours, reference))
        if dtype == torch.float64:
            floor = 1e-9 * max(1.0, true.abs().max().item())
        elif name in ("mean_weight", "var_weight", "weight", "bias"):
            floor = 2 * torch.finfo(torch.float32).eps * math.sqrt(terms)
            floor += 2 * eps * true.abs().max().item()
        else:
            floor = 4 * eps * max(true.abs().max().item(), 1e-3)
        assert error <= 2 * allowed + floor, f"{name}: {error:.2e}, plain {allowed:.2e}"


SUBSETS = [("in",), ("ln",), ("gn",), ("bn",), ("in", "ln"), ("ln", "bn"), ("in", "ln", "bn"), ALL]
MODES = [(True, 1), (True, 2), (False, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("statistics", SUBSETS, ids="-".join)
@pytest.mark.parametrize("training, virtual_gpus", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_statistic_mode_and_layout(
    backend, dtype, training, virtual_gpus, statistics, layout
):
    for shape in ((4, 6, 5, 7), (2, 4, 3), (2, 4, 3, 2, 5)):
        tensors = values(shape, statistics)
        options = {"statistics": statistics, "training": training, "virtual_gpus": virtual_gpus}
        compare(tensors, dtype, layout, num_groups=2, backend=backend, **options)


# Each takes another way through the primitives: pieces of rows and columns, blocks, odd sizes.
SHAPES = [(1, 3, 3, 1), (2, 5, 113, 101), (2, 64, 56, 48), (8, 64, 28, 28), (64, 16, 17, 15)]
SHAPES += [(2, 512, 9, 9), (33, 40, 16, 16), (2, 128, 1024), (3, 8, 4, 20, 20), (1, 6, 7, 11)]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_way_through_the_primitives(backend, dtype, shape, layout):
    options = {"statistics": ("in", "ln", "bn"), "training": True}
    compare(values(shape, options["statistics"]), dtype, layout, backend=backend, **options)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training, virtual_gpus", MODES)
def test_offsets_and_half_precision(backend, training, virtual_gpus, dtype, offset, layout):
    options = {"statistics": ("in", "ln", "bn"), "training": training, "virtual_gpus": virtual_gpus}
    for shape in ((4, 8, 9, 11), (2, 32, 40, 40)):
        tensors = values(shape, options["statistics"], offset, dtype=dtype)
        compare(tensors, dtype, layout, backend=backend, **options)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_mean_1000_deviation_1(backend, layout):
    x = lay_out(
        torch.randn(4, 16, 56, 56, generator=torch.Generator().manual_seed(0)) + 1e3, layout
    )
    layer = sn.SwitchNorm2d(16)
    with sn.backend("reference"):
        exact = sn.SwitchNorm2d(16).double()(x.double())
    assert (layer(x) - exact).abs().max() < 5e-5


@pytest.mark.parametrize("dominant", range(4))
def test_dominant_gates(backend, dominant):
    tensors = values((4, 6, 8, 8), ALL)
    for logits in tensors[1:3]:
        logits[dominant] += 30
    for dtype in (torch.float64, torch.float32):
        compare(tensors, dtype, statistics=ALL, num_groups=3, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_without_affine_or_running_statistics(backend, layout):
    tensors = values((4, 6, 5, 7), ALL)
    for training in (True, False):
        options = {"statistics": ALL, "num_groups": 2, "training": training}
        compare(tensors, torch.float64, layout, affine=False, backend=backend, **options)
        plain, fused = (
            function(*tensors[:5], **options)
            for function in (functional.switch_norm, kernels.switch_norm)
        )
        torch.testing.assert_close(fused, plain)


def test_parameters_in_another_dtype(backend):
    x, *parameters, dy = values((4, 6, 5, 7), ("in", "ln", "bn"), dtype=torch.bfloat16)
    for x_dtype, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        results = []
        for function in (functional.switch_norm, kernels.switch_norm):
            inputs = [t.to(dtype, copy=True) for t in parameters]
            leaves = [t.requires_grad_() for t in (x.to(x_dtype, copy=True), *inputs[:4])]
            y = function(*leaves, *inputs[4:])
            y.backward(dy.to(x_dtype))
            results.append([y, *(t.grad for t in leaves), *inputs[4:]])
        for plain, fused in zip(*results):
            torch.testing.assert_close(fused, plain, atol=2e-2, rtol=2e-2)


def test_second_derivatives(backend):
    tensors = values((2, 4, 3, 3), ALL, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors[:5]]

    def layer(*leaves):
        return kernels.switch_norm(*leaves, statistics=ALL, num_groups=2)

    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize("batched", [False, True])
def test_differentiable_gradients_of_a_layer_applied_twice(backend, batched):
    """Its second input depends on the parameters, whose gradients must not count that again."""
    found = []
    for function in (functional.switch_norm, kernels.switch_norm):
        tensors = values((2, 4, 3, 3), ALL, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in tensors[:5]]
        x, *rest = leaves
        options = {"statistics": ALL, "num_groups": 2}
        y = function(function(x, *rest, **options), *rest, **options).pow(3).sum()
        if batched:
            ones = torch.ones(2, dtype=y.dtype)
            found.append(torch.autograd.grad(y, leaves, ones, is_grads_batched=True))
            continue
        first = torch.autograd.grad(y, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append((*first, *second))
    torch.testing.assert_close(*reversed(found))


@pytest.mark.parametrize("frozen", range(5))
def test_gradients_only_where_asked(backend, frozen):
    tensors = values((2, 4, 5, 6), ("in", "ln", "bn"))
    grads = []
    for function in (functional.switch_norm, kernels.switch_norm):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(tensors[:5])]
        function(*leaves).backward(tensors[-1])
        grads.append([t.grad for t in leaves])
    assert grads[1][frozen] is None
    for i, (plain, fused) in enumerate(zip(*grads)):
        if i != frozen:
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def output_and_bytes_kept(layer, x):
    """layer(x), and the size of what is saved for the backward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    return y, sum(kept.values())


def test_memory_kept_is_the_input_and_little_else(backend):
    x = torch.randn(8, 64, 28, 28, requires_grad=True)
    _, kept = output_and_bytes_kept(sn.SwitchNorm2d(64), x)
    assert kept <= 1.02 * x.nbytes


def test_an_activation_in_place_may_follow(backend):
    layer, x = sn.SwitchNorm2d(4), torch.randn(2, 4, 20, 20, requires_grad=True)
    grads = []
    for activation in (nn.ReLU(), nn.ReLU(inplace=True)):
        x.grad = None
        activation(layer(x)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("neighbour", [1e6, math.inf, math.nan])
def test_a_sample_does_not_depend_on_its_neighbours(backend, neighbour):
    tensors = values((3, 4, 20, 20), ("in", "ln"))
    for layout in LAYOUTS[:2]:
        x = lay_out(tensors[0].clone(), layout)
        alone = kernels.switch_norm(x, *tensors[1:5], statistics=("in", "ln"))
        x[1] = neighbour
        y = kernels.switch_norm(x, *tensors[1:5], statistics=("in", "ln"))
        torch.testing.assert_close(y[::2], alone[::2], rtol=1e-5, atol=1e-5)


def test_backend_can_be_forced():
    x, *rest = values((2, 4, 5, 6), ("in", "ln", "bn"))[:5]
    auto = "reference" if kernels.native.library() is None else "native"
    assert kernels.choose_backend(x, *rest) == auto
    for name, chosen in (("reference", "reference"), ("native", auto)):
        with sn.backend(name):
            assert kernels.choose_backend(x, *rest) == chosen
    assert kernels.choose_backend(x, *rest) == auto
    half = [t.to(torch.float16) for t in (x, *rest)]
    assert kernels.choose_backend(*half) == "reference"
    with pytest.raises(ValueError, match="fastest.*reference"):
        with sn.backend("fastest"):
            pass
    code = "import sn.kernels as k, torch; print(k.choose_backend(torch.ones(2, 3, 4)))"
    environment = {"PYTHONPATH": str(ROOT), "SN_BACKEND": "reference"}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.stdout.strip() == "reference", shown.stderr


def test_the_plain_formula_where_something_looks_through():
    x, *rest = values((2, 4, 5, 6), ("in", "ln", "bn"))[:5]
    seen = []

    def probe(x):
        seen.append(kernels.choose_backend(x, *rest))
        return kernels.switch_norm(x, *rest)

    with torch.no_grad():
        torch.func.jvp(probe, (x,), (x,))
        torch.func.vmap(probe)(torch.stack((x, x)))
        torch.jit.trace(probe, x)
    assert set(seen[:3]) == {"reference"}
    for other in (x.to("meta"), x[:0], x.to(torch.complex64)):
        assert kernels.choose_backend(other) == "reference"


def test_errors_are_those_of_the_reference():
    x, *rest = values((4, 6, 5, 7), ("in", "ln", "bn"))[:7]
    for options, message in (
        ({"statistics": ("in", "xn", "bn")}, "xn"),
        ({"statistics": ("in", "ln")}, "mean_weight"),
        ({"virtual_gpus": 3}, "batch of 4"),
        ({"statistics": ("in", "gn", "bn"), "num_groups": 4}, "num_groups=4"),
    ):
        for function in (functional.switch_norm, kernels.switch_norm):
            with pytest.raises(ValueError, match=message):
                function(x, *rest, **options)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (3, 8, 1, 1), (5, 4, 1)], ids=str)
def test_instances_of_one_value(native, shape, dtype, layout):
    options = {"statistics": ALL, "num_groups": 2, "backend": "native"}
    for training in (True, False):
        compare(values(shape, ALL), dtype, layout, training=training, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_activation_and_residual(native, with_residual, relu, dtype, layout):
    """Against autograd through the plain formula, sum and ReLU, also with some inputs frozen."""
    tensors = values((4, 6, 9, 14), ALL, dtype=dtype)
    extra = values((4, 6, 9, 14), ALL, dtype=dtype, seed=1)[0] if with_residual else None
    options = kernels.Options(ALL, 2, True, 0.1, 1e-5, 2)
    for frozen in ("nothing", "x", "parameters", "residual"):
        results = []
        for name in ("reference", "native"):
            leaves = [t.clone() for t in tensors[:5]]
            leaves[0] = lay_out(leaves[0], layout)
            residual = None if extra is None else lay_out(extra.clone(), layout)
            wanted = leaves[frozen == "x" :] if frozen != "parameters" else leaves[:1]
            wanted += [residual] if with_residual and frozen != "residual" else []
            running = [t.clone() for t in tensors[5:7]]
            for leaf in wanted:
                leaf.requires_grad_()
            with sn.backend(name):
                y = kernels.switch_norm_act((*leaves, *running), options, residual, relu)
                y.backward(tensors[-1])
            results.append([y.detach(), *running, *(leaf.grad for leaf in wanted)])
        rounding = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {}
        rounding = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else rounding
        for plain, fused in zip(*results):
            torch.testing.assert_close(fused, plain, **rounding)


def test_second_derivatives_through_activation_and_residual(native):
    *leaves, residual = values((2, 4, 3, 3), ALL, dtype=torch.float64)[:6]
    residual = values((2, 4, 3, 3), ALL, dtype=torch.float64, seed=1)[0]
    leaves = [t.requires_grad_() for t in (*leaves[:5], residual)]
    options = kernels.Options(ALL, 2, True, 0.1, 1e-5, 1)

    def layer(*leaves):
        return kernels.switch_norm_act((*leaves[:5], None, None), options, leaves[5], True)

    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_number_of_threads_changes_no_bit(layout):
    compiled()
    tensors = values((3, 40, 64, 61), ALL)
    options = {"statistics": ALL, "num_groups": 4}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(kernels.switch_norm, tensors, torch.float32, layout, **options))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_changed_buffer_is_noticed_by_autograd(native):
    """The compiled step counts as an operation in place."""
    layer, x = sn.SwitchNorm2d(4), torch.randn(2, 4, 5, 6)
    buffers = layer.running_mean, layer.running_var, layer.num_batches_tracked
    before = [buffer._version for buffer in buffers]
    layer(x)
    assert all(buffer._version > old for buffer, old in zip(buffers, before))
    assert layer.num_batches_tracked == 1


def test_batches_are_counted_in_any_dtype(native):
    layer, x = sn.SwitchNorm2d(4), torch.randn(2, 4, 5, 6)
    layer.num_batches_tracked = layer.num_batches_tracked.int()
    layer(x), layer.eval()(x), layer.train()(x)
    assert layer.num_batches_tracked == 2 and layer.num_batches_tracked.dtype == torch.int32


def test_an_input_changed_after_the_call_is_an_error(native):
    layer, x = sn.SwitchNorm2d(4), torch.randn(2, 4, 5, 6, requires_grad=True)
    h = x * 1
    y = layer(h)
    h += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def save_elsewhere(t):
    """A hook that loses the layout, as torch's save_on_cpu does."""
    return torch.empty(t.shape, dtype=t.dtype).copy_(t)


def save_rounded(t):
    return t.bfloat16()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_hooks_on_what_is_saved(backend, with_residual, layout):
    tensors = values((4, 6, 9, 14), ALL)
    other = lay_out(values((4, 6, 9, 14), ALL, seed=1)[0], layout) if with_residual else None
    options = kernels.Options(ALL, 2, True, 0.1, 1e-5, 1)
    found = []
    for pack, unpack in (
        (lambda t: t, lambda t: t),
        (save_elsewhere, lambda t: t),
        (lambda t: (t.dtype, save_rounded(t)), lambda p: p[1].to(p[0])),
        (save_rounded, lambda t: t),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors[:5]]
        own = lay_out(leaves[0], layout)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = kernels.switch_norm_act((own, *leaves[1:], None, None), options, other, True)
        if len(found) == 3 and backend == "native":
            with pytest.raises(RuntimeError, match="another dtype"):
                y.backward(tensors[-1])
        elif len(found) < 3:
            y.backward(tensors[-1])
            found.append([leaf.grad for leaf in leaves])
    for plain, moved, rounded in zip(*found):
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)
        assert (rounded - plain).norm() < 0.3 * plain.norm()


def test_an_input_detached_after_the_call(native):
    """As after PyTorch's operations: the graph is that of the call."""
    layer, leaf = sn.SwitchNorm2d(4), torch.randn(2, 4, 5, 6, requires_grad=True)
    dy = torch.randn(2, 4, 5, 6)
    grads = []
    for detached in (False, True):
        h = leaf * 2
        y = layer(h)
        if detached:
            h.detach_()
        grads += torch.autograd.grad(y, leaf, dy)
    torch.testing.assert_close(*grads)


def test_buffers_of_inference_mode(native):
    with torch.inference_mode():
        layer = sn.SwitchNorm2d(4)
        layer(torch.randn(2, 4, 5, 6))
    with torch.no_grad():
        layer(torch.randn(2, 4, 5, 6))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("broken", ["missing", "of other sources"])
def test_without_the_extension(broken, extension, monkeypatch):
    native = kernels.native
    monkeypatch.setattr(native, "extension", native.extension.__wrapped__)
    assert native.extension() is extension
    if broken == "missing":  # built for another PyTorch
        monkeypatch.setattr(torch, "__version__", "0.0")
    else:
        monkeypatch.setattr(extension, "source", 0)
    assert native.extension() is None
    assert "Cpp" not in sn.SwitchNorm2d(4)(torch.randn(2, 4, 5, 6)).grad_fn.name()


@pytest.fixture
def extension(monkeypatch):
    use_native("C++", monkeypatch)
    return kernels.native.extension()


def quick(x, statistics=ALL, num_groups=2, training=True, virtual_gpus=1, change=None, **others):
    """Whether the extension takes a call; `change` maps places of `tensors` to other tensors."""
    tensors = [x, *values(tuple(x.shape), statistics)[1:7]]
    for place, other in (change or {}).items():
        tensors[place] = other
    options = kernels.Options(statistics, num_groups, training, 0.1, 1e-5, virtual_gpus)
    return kernels.native.quick_switch_norm(tuple(tensors), options, **others) is not None


def test_what_the_extension_takes(extension):
    """Otherwise the tests of C++ and ctypes would silently be tests of one."""
    for shape in ((4, 6), (4, 6, 5), (4, 6, 5, 7), (4, 6, 2, 3, 4), (1, 6, 1, 1)):
        x = torch.randn(shape)
        assert quick(x) and quick(x, training=False) and quick(x.bfloat16())
        assert quick(x, residual=torch.randn(shape), relu=True, counter=torch.tensor(0))
        assert quick(x, ("in", "ln"), change={5: None, 6: None}) and not quick(x, ("in", "ln"))
    for layout, shape in (("channels_last", (4, 6, 5, 7)), ("channels_last", (4, 6, 2, 3, 4))):
        assert quick(lay_out(torch.randn(shape), layout))
    layer, x = sn.SwitchNorm2d(4), torch.randn(2, 4, 5, 6)
    assert "SwitchNorm" in layer(x).grad_fn.name() and "Cpp" in layer(x).grad_fn.name()


def test_what_the_extension_leaves_to_others(extension):
    x = torch.randn(4, 6, 5, 7)
    for other in (
        x[..., ::2],
        lay_out(x, "transposed"),
        x.half(),
        x.to("meta"),
        x.to_sparse(),
        x[:0],
        x[0, 0, 0],
        torch._neg_view(x),
        torch._efficientzerotensor(x.shape),
        x.as_subclass(type("Own", (torch.Tensor,), {})),
        None,
    ):
        assert not quick(x, change={0: other})
    for options in (
        {"num_groups": 4},
        {"num_groups": 2.0},
        {"num_groups": 0},
        {"num_groups": None},
    ):
        assert not quick(x, **options)
    for virtual_gpus in (3, 0, -1, 2.0):
        assert not quick(x, virtual_gpus=virtual_gpus)
    assert not quick(x, residual=x[:, :1])
    ones, six = torch.ones(4), torch.ones(6)
    for change in (
        {1: ones[:3]},
        {2: torch.ones(4, 1)},
        {3: torch.ones(5)},
        {4: six.double()},
        {5: six.clone().requires_grad_()},
        {5: None},
        {6: None},
        {6: torch.ones(12)[::2]},
    ):
        assert not quick(x, change=change), change


@pytest.mark.parametrize("training", [True, False])
def test_virtual_gpus_without_bn_need_no_whole_groups(training, backend):
    """Without batch statistics there are no groups, however many GPUs a batch stands for."""
    x = torch.randn(3, 4, 5, 6)
    layer = sn.SwitchNorm2d(4, statistics=("in", "ln"), virtual_gpus=8).train(training)
    with sn.backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("mean, var", [((1,), (1,)), ((4, 1), (4, 1)), ((4,), None), ((3,), (3,))])
def test_running_statistics_of_another_shape_reach_no_kernel(mean, var):
    compiled()
    x, *rest = values((4, 4, 5, 6), ("in", "ln", "bn"))[:5]
    running = torch.zeros(mean), None if var is None else torch.ones(var)
    assert kernels.choose_backend(x, *rest, *running) != "native"
    with sn.backend("native"):
        assert kernels.choose_backend(x, *rest, *running) == "reference"


def test_tensors_without_values_of_their_own(backend):
    """Lazily negated, without storage, on another default device: as by the plain formula."""
    x, *rest = values((4, 4, 5, 6), ("in", "ln", "bn"))[:5]
    dy = torch.randn_like(x)
    results = []
    for name in ("reference", backend):
        with sn.backend(name), torch.device("meta"):
            leaves = [t.clone().requires_grad_() for t in (x, *rest)]
            y = kernels.switch_norm(*leaves)
        found = [y.detach()]
        with sn.backend(name):
            for grad in (torch._neg_view(dy), torch._efficientzerotensor(dy.shape)):
                found += torch.autograd.grad(y, leaves, grad, retain_graph=True)
            found.append(kernels.switch_norm(torch._neg_view(x), *rest))
            found.append(kernels.switch_norm(x, *rest[:2], torch._neg_view(rest[2]), rest[3]))
        results.append(found)
    for plain, fused in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_inside_a_dispatch_mode_the_plain_formula_is_seen():
    from torch.utils.flop_counter import FlopCounterMode

    x, *rest = values((2, 4, 5, 6), ("in", "ln", "bn"))[:5]
    with FlopCounterMode(display=False):
        assert kernels.choose_backend(x, *rest) == "reference"


def test_gradients_of_running_statistics_are_not_lost(backend):
    x, *rest = values((2, 4, 5, 6), ("in", "ln", "bn"))[:7]
    running_mean = rest[4].requires_grad_()
    kernels.switch_norm(x, *rest, training=False).sum().backward()
    assert running_mean.grad is not None


def test_vectorised_backward(backend):
    """jacobian(vectorize=True) sends batches of dy through the backward pass."""
    x, *rest = values((2, 4, 3, 3), ALL, dtype=torch.float64)[:5]

    def layer(x):
        return kernels.switch_norm(x, *rest, statistics=ALL, num_groups=2)

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(layer, x, vectorize=True), jacobian(layer, x))


def test_momentum_counts_in_training_alone(backend):
    x, *rest = values((2, 4, 5, 6), ("in", "ln", "bn"))[:7]
    y = kernels.switch_norm(x, *rest, training=False, momentum=None)
    torch.testing.assert_close(y, functional.switch_norm(x, *rest, training=False))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_relu_lets_the_gradient_of_nan_pass(native, layout):
    """As PyTorch's own: a bad value shows in the gradients, too."""
    x, *rest = values((2, 3, 4, 4), ("in", "ln"))[:5]
    x[1, 0, 0, 0] = math.nan
    options = kernels.Options(("in", "ln"), None, True, 0.1, 1e-5, 1)
    for residual in (None, x.flip(0)):
        grads = []
        for name in ("reference", "native"):
            leaves = [t.clone().requires_grad_() for t in rest]
            own = lay_out(x.clone(), layout).requires_grad_()
            with sn.backend(name):
                y = kernels.switch_norm_act((own, *leaves, None, None), options, residual, True)
            y.sum().backward()
            grads.append([own.grad, *(leaf.grad for leaf in leaves)])
        for plain, fused in zip(*grads):
            torch.testing.assert_close(fused, plain, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_a_border_far_from_the_rest_costs_no_digits(backend):
    """Sums are taken about a centre; the first positions need not be near the others."""
    x = torch.randn(2, 8, 16384, generator=torch.Generator().manual_seed(0)) * 0.01 + 1000
    x[:, :, :64] = 0
    for layout in LAYOUTS[:2]:
        tensors = [x, *values((2, 8, 4), ("in",))[1:7], torch.randn_like(x)]
        compare(tensors, torch.float32, layout, statistics=("in",), backend=backend)


def test_a_copy_of_an_input_that_is_not_dense_is_not_kept(backend):
    x = torch.randn(8, 28, 64, 28).transpose(1, 2).requires_grad_()
    y, kept = output_and_bytes_kept(sn.SwitchNorm2d(64), x)
    assert kept <= 1.02 * x.nbytes
    assert not any(isinstance(value, torch.Tensor) for value in vars(y.grad_fn).values())


@pytest.mark.parametrize("broken", ["missing", "no library", "of other sources"])
def test_without_the_compiled_library(broken, tmp_path, monkeypatch):
    compiled()
    native = kernels.native
    name = "_native" + native.EXTENSION_SUFFIXES[0]
    for source in native.sources(Path(native.__file__).parent):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    if broken == "no library":
        (tmp_path / name).write_bytes(b"not a library")
    if broken == "of other sources":
        built = native.library()._name
        (tmp_path / name).write_bytes(Path(built).read_bytes())
        (tmp_path / "native.c").write_text("/* newer */")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    monkeypatch.setattr(native, "extension", native.extension.__wrapped__)
    x, *rest = values((2, 4, 5, 6), ("in", "ln", "bn"))[:5]
    if broken == "missing":
        assert kernels.choose_backend(x, *rest) == "reference"
    else:
        with pytest.warns(UserWarning, match="make install"):
            assert kernels.choose_backend(x, *rest) == "reference"
    assert torch.equal(kernels.switch_norm(x, *rest), functional.switch_norm(x, *rest))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residual_blocks_with_fused_activations_are_the_same_function(name):
    torchvision = pytest.importorskip("torchvision")
    from sn.training.classification.models import fuse_activations

    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, norm_layer=sn.SwitchNorm2d, num_classes=5)
    fused = torchvision.models.get_model(name, norm_layer=sn.SwitchNorm2d, num_classes=5)
    fuse_activations(fused)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for model in (plain, fused):
        model(x).square().sum().backward()
    for ours, wanted in zip(fused.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="residual"):
        fuse_activations(nn.Sequential(sn.SwitchNorm2d(4)))


def test_norm_with_activation_in_timms_convention():
    timm = pytest.importorskip("timm")
    arguments = {
        "act_layer": nn.SiLU,
        "apply_act": True,
        "inplace": True,
        "drop_layer": nn.Identity,
    }
    x = torch.randn(2, 8, 5, 5)
    theirs, ours = timm.layers.BatchNormAct2d(8, **arguments), sn.SwitchNormAct2d(8, **arguments)
    assert type(ours.act) is type(theirs.act) and ours(x).shape == theirs(x).shape
    assert (sn.SwitchNormAct2d(8)(x) >= 0).all()
    assert (sn.SwitchNormAct2d(8, apply_act=False)(x) < 0).any()

    def norm(channels, act_layer=nn.ReLU, **options):
        return sn.SwitchNormAct2d(channels, act_layer=act_layer, **options)

    model = timm.create_model("regnetx_002", norm_layer=norm, num_classes=5)
    default = timm.create_model("regnetx_002", num_classes=5)
    counts = [sum(type(m) is nn.ReLU for m in net.modules()) for net in (model, default)]
    assert counts[0] == counts[1] > 0
    assert any(isinstance(m, sn.SwitchNormAct2d) for m in model.modules())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_an_exported_layer_holds_no_custom_operator():
    layer, x = sn.SwitchNorm2d(4).eval(), torch.randn(2, 4, 5, 6)
    program = torch.export.export(layer, (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not any(target.startswith("sn") for target in targets)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_import_needs_neither_triton_nor_numpy_nor_a_compiler():
    code = """
import sys
from pathlib import Path
sys.modules["numpy"] = None  # import numpy is an ImportError
import torch, sn
assert "triton" not in sys.modules and "torch._inductor" not in sys.modules
layer = sn.SwitchNorm2d(4)
layer(torch.randn(2, 4, 5, 6, requires_grad=True)).sum().backward()
assert layer.mean_weight.grad is not None
"""
    environment = {"PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

"""The Triton kernels: under the interpreter on the CPU, compiled for an H100 without one, on CUDA.

Triton decides at import whether to interpret, so the tests of this file run in a child with
TRITON_INTERPRET=1 (`test_under_the_interpreter`), or here where there is a GPU.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import needs_interpreter
from test_kernels import ALL, LAYOUTS, MODES, SUBSETS, compare, lay_out, values
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import sn
from sn import functional, kernels
from sn.variants import sync

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA and not INTERPRET else "cpu"
runs = pytest.mark.skipif(not CUDA and not INTERPRET, reason="in test_under_the_interpreter")
on_cuda = pytest.mark.skipif(not CUDA or INTERPRET, reason="needs a GPU")


@needs_interpreter
@pytest.mark.skipif(CUDA or INTERPRET, reason="the tests run here")
def test_under_the_interpreter():
    files = [__file__, str(Path(__file__).with_name("test_check.py"))]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def check(shape, statistics, dtype=torch.float32, layout="contiguous", offset=0.0, **options):
    if "gn" in statistics:
        options["num_groups"] = 2
    tensors = values(shape, statistics, offset, dtype=dtype)
    compare(
        tensors, dtype, layout, backend="triton", device=DEVICE, statistics=statistics, **options
    )


@runs
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("fused", [False, True])
def test_synchronised(layout, fused, monkeypatch):
    """As of three processes with the same batch: the whole batch in one, by the plain formula."""
    monkeypatch.setattr(sync.SyncSwitchNormBase, "_group", lambda layer: layer.training or None)
    monkeypatch.setattr(sync.dist, "all_reduce", lambda sums, group: sums.mul_(3))
    whole = sn.SwitchNormAct2d(6, act_layer=nn.ReLU if fused else None).to(DEVICE)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter))
    own = sn.convert_sync_switchnorm(copy.deepcopy(whole))
    x, residual, dy = (lay_out(torch.randn(2, 6, 5, 7), layout).to(DEVICE) for _ in range(3))
    found = []
    for layer, times, backend in ((own, 1, "triton"), (whole, 3, "reference")):
        inputs = [torch.cat([t] * times).requires_grad_() for t in (x, residual)]
        with sn.backend(backend):
            y = layer(*inputs[: 1 + fused])
            y.backward(torch.cat([dy] * times))
        grads = [p.grad * 3 / times for p in layer.parameters()]
        grads += [t.grad[:2] for t in inputs if t.grad is not None]
        found.append([y.detach()[:2], *grads, *layer.buffers()])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@runs
@pytest.mark.parametrize("training, virtual_gpus", MODES)
@pytest.mark.parametrize("statistics", SUBSETS, ids="-".join)
def test_every_statistic_and_mode(statistics, training, virtual_gpus):
    layout = "channels_last" if training else "contiguous"
    check((4, 6, 3, 5), statistics, layout=layout, training=training, virtual_gpus=virtual_gpus)


@runs
@pytest.mark.parametrize("virtual_gpus", [3, 8])
def test_batches_that_do_not_split_without_bn(virtual_gpus):
    """Only bn has groups: every image of a last batch of four counts in every gradient."""
    check((4, 6, 3, 5), ("in", "ln"), virtual_gpus=virtual_gpus)


@runs
@pytest.mark.parametrize("kind", ["plain", "synchronised", "compiled"])
def test_numbers_are_pythons(kind, monkeypatch):
    """The layer takes NumPy's; a launcher, unlike the interpreter, none but float64."""
    from sn.kernels import cuda

    given = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                given.extend([*args, *constants.values()])
                return self.kernel[grid](*args, **constants)

            return launch

    names = [name for name in vars(cuda.kernels) if name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(cuda.kernels, name, Recorded(getattr(cuda.kernels, name)))
    options = {"momentum": np.float32(0.1), "eps": np.float32(1e-5)}
    if kind == "synchronised":
        monkeypatch.setattr(sync.SyncSwitchNormBase, "_group", lambda layer: layer.training or None)
        monkeypatch.setattr(sync.dist, "all_reduce", lambda sums, group: sums)
        layer = sn.convert_sync_switchnorm(sn.SwitchNorm2d(6, **options))
    else:
        groups = {"num_groups": np.int64(2), "virtual_gpus": np.int64(2)}
        layer = sn.SwitchNorm2d(6, statistics=ALL, **groups, **options)
    layer.to(DEVICE)
    network = torch.compile(layer, backend="aot_eager") if kind == "compiled" else layer
    with sn.backend("triton"):
        network(torch.randn(4, 6, 3, 5, device=DEVICE, requires_grad=True)).sum().backward()
    kinds = {type(value) for value in given if not isinstance(value, torch.Tensor)}
    assert len(names) == 6 and given and kinds <= {int, float, bool}, kinds


@runs
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize(
    "shape",
    [(1, 3, 3, 1), (4, 6), (2, 4, 1, 1), (3, 5, 7), (2, 4, 3, 2, 5), (2, 70, 7, 11), (18, 2, 3)],
    ids=str,
)
def test_every_shape_and_layout(shape, layout, monkeypatch):
    from sn.kernels import cuda

    monkeypatch.setattr(cuda, "SAMPLES", 16)  # 18 of them in two parts
    if layout == "sliced" and shape not in ((2, 4, 3, 2, 5), (2, 70, 7, 11)):
        return
    check(shape, ("in", "ln", "bn"), layout=layout)
    if layout == "contiguous" and len(shape) > 2 and shape[0] < 18:  # pooled alike in both
        check(shape, ("in", "ln", "bn"), layout="channels_last")


@runs
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offsets_and_half_precision(dtype, layout):
    for offset in (1e3, 1e4) if DEVICE == "cuda" else (1e4,):
        check((2, 6, 20, 13), ("in", "ln", "bn"), dtype, layout, offset, virtual_gpus=2)


@runs
@pytest.mark.parametrize("dominant", range(4))
def test_dominant_gates(dominant):
    tensors = values((2, 6, 4, 4), ALL)
    for logits in tensors[1:3]:
        logits[dominant] += 30
    compare(tensors, torch.float32, backend="triton", device=DEVICE, statistics=ALL, num_groups=3)


@runs
def test_without_affine_or_running_statistics():
    tensors = values((4, 6, 5, 3), ALL)
    options = {"statistics": ALL, "num_groups": 2}
    compare(tensors, torch.float32, backend="triton", device=DEVICE, affine=False, **options)
    tensors = [t.to(DEVICE) for t in tensors]
    for training in (True, False):
        with sn.backend("triton"):
            fused = kernels.switch_norm(*tensors[:5], training=training, **options)
        plain = functional.switch_norm(*tensors[:5], training=training, **options)
        torch.testing.assert_close(fused, plain)


@runs
@pytest.mark.parametrize("missing", [3, 4])
def test_weight_or_bias_alone(missing):
    tensors = [t.to(DEVICE) for t in values((2, 6, 3, 5), ("in", "ln", "bn"))]
    results = []
    for name in ("reference", "triton"):
        leaves = [None if i == missing else t.clone().requires_grad_()
                  for i, t in enumerate(tensors[:5])]  # fmt: skip
        with sn.backend(name):
            y = kernels.switch_norm(*leaves)
        y.backward(tensors[-1])
        results.append([y.detach(), *(t.grad for t in leaves if t is not None)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@runs
@pytest.mark.parametrize("neighbour", [1e6, float("inf"), float("nan")])
def test_a_sample_does_not_depend_on_its_neighbours(neighbour):
    x, *parameters = (t.to(DEVICE) for t in values((3, 4, 5, 5), ("in", "ln"))[:5])
    with sn.backend("triton"):
        alone = kernels.switch_norm(x, *parameters, statistics=("in", "ln"))
        x[1] = neighbour
        y = kernels.switch_norm(x, *parameters, statistics=("in", "ln"))
    torch.testing.assert_close(y[::2], alone[::2], rtol=1e-5, atol=1e-5)


def act_case(layout="contiguous"):
    torch.manual_seed(0)
    layer = sn.SwitchNormAct2d(6).to(DEVICE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    x, residual, dy = (torch.randn(4, 6, 5, 7, device=DEVICE) for _ in range(3))
    return layer, *(lay_out(t, layout) for t in (x, residual)), dy


def results(layer, x, residual, dy, call=None):
    """Output, gradients and buffers of a step."""
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual) if t is not None]
    layer.zero_grad()
    y = (layer if call is None else call)(*leaves)
    y.backward(dy)
    got = [y.detach(), *(t.grad for t in leaves), *(p.grad.clone() for p in layer.parameters())]
    got += [t.clone() for t in layer.buffers()]
    layer.load_state_dict(before)
    return got


@runs
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_activation_and_residual(with_residual, layout):
    layer, x, residual, dy = act_case(layout)
    residual = residual if with_residual else None
    with sn.backend("reference"):
        plain = results(layer, x, residual, dy)
    with sn.backend("triton"):
        fused = results(layer, x, residual, dy)
        again = results(layer, x, residual, dy)
    for ours, wanted, second in zip(fused, plain, again):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours, second)  # deterministic


@runs
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break_to_the_operators(training):
    layer, *arguments = act_case()
    layer.train(training)
    calls = []

    def recorded(module, inputs):
        calls.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return aot_eager(module, inputs)

    with sn.backend("triton"):
        eager = results(layer, *arguments)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=recorded)
        got = results(layer, *arguments, call=compiled)
    assert torch.ops.sn.switch_norm in calls
    for ours, wanted in zip(got, eager):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@runs
def test_operators_obey_the_rules_of_torch_library():
    layer, x, residual, _ = act_case()
    tensors = (layer.mean_weight, layer.var_weight, layer.weight, layer.bias)
    for running in ((None, None), (layer.running_mean, layer.running_var)):
        options = ("in ln bn", 1, running[0] is None, 1e-5, 2 if running[0] is None else 1, True)
        arguments = (x.clone().requires_grad_(), *tensors, *running, residual, *options)
        torch.library.opcheck(torch.ops.sn.switch_norm.default, arguments)


@runs
def test_second_derivatives():
    x, *rest = (t.to(DEVICE) for t in values((2, 4, 3, 3), ("in", "ln", "bn"))[:5])
    seconds = []
    for name in ("reference", "triton"):
        leaf = x.clone().requires_grad_()
        with sn.backend(name):
            y = kernels.switch_norm(leaf, *rest)
            (first,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*seconds, rtol=1e-3, atol=1e-3)


@on_cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(8, 64, 56, 56), (32, 2048, 7, 7), (2, 256, 100, 137), (3, 33, 61, 67)], ids=str
)
def test_large_shapes(shape, dtype, layout):
    for training, virtual_gpus in ((True, 1), (False, 1)):
        options = {"training": training, "virtual_gpus": virtual_gpus}
        check(shape, ("in", "ln", "bn"), dtype, layout, **options)


@on_cuda
def test_more_elements_than_32_bits_count():
    """20 GB of them; each sample by itself, so the last one can be held to the formula alone."""
    x = torch.randn(2 * 1343, 64, 112, 112, dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > 2**31
    parameters = [t.to(DEVICE) for t in values((1, 64, 1), ("in", "ln"))[1:5]]
    results = []
    for name, part in (("triton", x), ("reference", x[-1:].clone())):
        leaf = part.requires_grad_()
        with sn.backend(name):
            y = kernels.switch_norm(leaf, *parameters, statistics=("in", "ln"))
        y.backward(y.detach())
        results.append([y.detach()[-1:], leaf.grad[-1:]])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@on_cuda
def test_in_a_cuda_graph():
    layer, x, residual, dy = act_case()
    x.requires_grad_()

    def step():
        layer.zero_grad(set_to_none=False)
        layer(x, residual).backward(dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with sn.backend("triton"):
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            step()
    wanted = layer.weight.grad.clone()
    layer.weight.grad.zero_()
    graph.replay()
    torch.testing.assert_close(layer.weight.grad, wanted)


def constants(last, relu, residual, running, statistics):
    place = {s: statistics.index(s) if s in statistics else -1 for s in ALL}
    return {
        "C": 64, "Q": 4 if "gn" in statistics else 1, "FOUR": not last, "LAST": last,
        "K": len(statistics), "IN": place["in"], "LN": place["ln"],
        "GN": place["gn"], "BN": place["bn"], "RUNNING": running, "AFFINE": True, "RELU": relu,
        "RESIDUAL": residual, "BC": 64 if last else 8, "BL": 32 if last else 256,
        "BQ": 4 if "gn" in statistics else 1, "BD": 64, "BN_N": 16, "BN_C": 16,
        "UPDATE": not running,
    }  # fmt: skip


KERNELS = ("moments", "pool", "apply", "sums", "pool_backward", "apply_backward")


@pytest.mark.skipif(INTERPRET, reason="nothing to compile")
@pytest.mark.parametrize("variant", range(4))
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_sm_90(kernel, variant):
    """Without a GPU; the interpreter accepts more than the compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sn.kernels import triton_kernels

    variants = [
        constants(True, False, False, False, ("in", "ln", "bn")),
        constants(False, True, True, False, ALL),
        constants(True, True, False, True, ("in", "ln", "bn")),
        constants(False, False, False, True, ("bn",)),
    ]
    function = getattr(triton_kernels, f"{kernel}_kernel")
    signature, values, aligned = {}, {}, {}
    for i, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], values[(i,)] = "constexpr", variants[variant][name]
        elif name in ("N", "L", "CHUNK", "G", "SPLITS"):
            signature[name] = "i32"
            if name == "CHUNK":  # as of all but the shortest maps
                aligned[(i,)] = [["tt.divisibility", 16]]
        elif name in ("eps", "momentum"):
            signature[name] = "fp32"
        else:
            maps = ("x", "y", "dy", "dx", "residual", "d_residual")
            signature[name] = "*bf16" if name in maps else "*fp32"
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32))
    ptx = compiled.asm["ptx"]
    assert ".target sm_90" in ptx
    assert ".local" not in ptx  # no array in memory; whether registers are spilled is seen later
    if kernel not in ("pool", "pool_backward"):  # accesses of 128 bits, and of four bf16
        assert f"ld.global.v{4 if variants[variant]['LAST'] else 2}.b32" in ptx


@runs
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strided", range(1, 7))
def test_parameters_that_are_not_dense(strided, training):
    """A column of a matrix, one value for all channels: read as they are, their neighbours kept."""
    tensors = [t.to(DEVICE) for t in values((3, 6, 4, 5), ("in", "ln", "bn"))[:7]]
    options = {"training": training, "momentum": 0.5}
    wanted = [t.clone() for t in tensors]
    with sn.backend("reference"):
        y = kernels.switch_norm(*wanted, **options)
    for columns in (torch.full((len(tensors[strided]), 3), 7.0), None):
        own = [t.clone() for t in tensors]
        if columns is not None:
            columns = columns.to(DEVICE)
            columns[:, 1] = own[strided]
            own[strided] = columns[:, 1]
        elif strided < 5:
            own[strided] = tensors[strided][:1].expand(len(tensors[strided]))
            with sn.backend("reference"):
                y = kernels.switch_norm(*(t.clone() for t in own), **options)
        with sn.backend("triton"):
            torch.testing.assert_close(kernels.switch_norm(*own, **options), y)
        if columns is not None:
            assert (columns[:, [0, 2]] == 7).all()
            torch.testing.assert_close(own[strided], wanted[strided])


@runs
def test_operator_with_parameters_that_are_not_dense():
    """What compiled code calls, where nothing has looked at the strides."""
    x, *dense, mean, var = (t.to(DEVICE) for t in values((3, 6, 4, 5), ("in", "ln", "bn"))[:7])
    results = []
    for strided in (False, True):
        own = [t.clone().requires_grad_() for t in (x, *dense)]
        given = [torch.stack((t, t + 1), 1)[:, 0] for t in own[1:]] if strided else own[1:]
        options = ("in ln bn", 1, False, 1e-5, 1, False)
        y, *_ = torch.ops.sn.switch_norm(own[0], *given, mean, var, None, *options)
        results.append([y, *torch.autograd.grad(y.pow(3).sum(), own)])
    for plain, strided in zip(*results):
        torch.testing.assert_close(strided, plain)


def test_what_32_bits_cannot_index(monkeypatch):
    """One sample of 2^31 values, too many instances, too many channels: by the formula."""
    monkeypatch.setattr(kernels, "_triton_works", lambda device: True)
    for shape, wanted in (
        ((2, 64, 2**10, 2**14), "triton"),
        ((1, 64, 2**10, 2**15), "reference"),
        ((2**13, 2**10), "triton"),
        ((2**20, 2**10), "reference"),
        ((2**14, 2**10, 64), "reference"),
        ((1, 1, 2**31 - 2**21), "triton"),
        ((1, 1, 2**31 - 2**20), "reference"),  # the end of a piece is beyond the last position
        ((2, 4096, 3), "triton"),
        ((2, 4097, 3), "reference"),
    ):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        with sn.backend("triton"):
            assert kernels.choose_backend(x) == wanted, shape


@runs
def test_lazily_negated_and_batched_gradients():
    """As by the plain formula: what the backward pass is given need not have values of its own."""
    x, *rest = (t.to(DEVICE) for t in values((2, 4, 3, 3), ALL)[:5])
    dy, results = torch.randn_like(x), []
    for name in ("reference", "triton"):
        with sn.backend(name):
            own = x.clone().requires_grad_()
            y = kernels.switch_norm(own, *rest, statistics=ALL, num_groups=2)
        batch = torch.stack((dy, 2 * dy))
        found = [torch.autograd.grad(y, own, torch._neg_view(dy), retain_graph=True)[0]]
        found.append(torch.autograd.grad(y, own, batch, is_grads_batched=True)[0])
        results.append(found)
    for plain, fused in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@runs
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_hooks_that_lose_the_layout(layout):
    """As torch's save_on_cpu does."""
    x, *rest = (t.to(DEVICE) for t in values((2, 4, 3, 5), ALL)[:5])
    other, dy = lay_out(torch.randn_like(x), layout), torch.randn_like(x)
    options, results = kernels.Options(ALL, 2, True, 0.1, 1e-5, 1), []
    for pack in (lambda t: t, lambda t: torch.empty(t.shape, dtype=t.dtype).to(t.device).copy_(t)):
        own = x.clone().requires_grad_()
        with sn.backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            tensors = (lay_out(own, layout), *rest, None, None)
            y = kernels.switch_norm_act(tensors, options, other, True)
        results.append(torch.autograd.grad(y, own, dy)[0])
    torch.testing.assert_close(*results)

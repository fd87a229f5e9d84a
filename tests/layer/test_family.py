"""none, frozen_bn, sync_bn and batch renormalization against formulas in float64."""

import copy
import io
import shutil

import oracle
import pytest
import torch
from torch import nn

import sn
from sn.training.classification.models import build_model
from sn.training.run.distributed import one_running_update

FULL = {"r_images": (0, 0), "d_images": (0, 0)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_renorm(x, weight, bias, mean, var, r_max, d_max, eps=1e-5):
    """Algorithm 1 of the paper on (N, C, ...), gradient through the batch's moments alone."""
    over = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mu = x.mean(over)
    sigma_batch = ((x - mu.view(shape)) ** 2).mean(over).add(eps).sqrt()
    sigma = (var + eps).sqrt()
    r = torch.minimum(
        torch.maximum(sigma_batch / sigma, x.new_tensor(1 / r_max)), x.new_tensor(r_max)
    )
    d = torch.minimum(torch.maximum((mu - mean) / sigma, -x.new_tensor(d_max)), x.new_tensor(d_max))
    r, d = r.detach(), d.detach()
    normalised = (x - mu.view(shape)) / sigma_batch.view(shape)
    return weight.view(shape) * (normalised * r.view(shape) + d.view(shape)) + bias.view(shape)


def randomise(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
                tensor.copy_(drawn.abs() + 0.3 if name == "running_var" else drawn)
    return layer


def shaped(shape, seed=0):
    return oracle.values(shape, seed).requires_grad_()


# --- batch renormalization ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "shape"), [(1, (6, 4)), (1, (6, 4, 5)), (2, (6, 4, 3, 2)), (3, (6, 4, 2, 1, 3))]
)
@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.2, 0.3), (3.0, 5.0), (1e9, 1e9)])
@pytest.mark.parametrize("virtual_gpus", [1, 2, 3])
def test_batch_renorm_equals_the_paper(dim, shape, r_max, d_max, virtual_gpus):
    layer = sn.make_norm("brn", dim=dim, r_max=r_max, d_max=d_max, momentum=0.2, **FULL)(4)
    randomise(layer.double())
    sn.set_virtual_gpus(layer, virtual_gpus)
    for step in range(2):
        x, upstream = shaped(shape, step), oracle.values(shape, 9)
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
        y = layer(x)
        expected = torch.cat(
            [
                batch_renorm(part, layer.weight, layer.bias, mean, var, r_max, d_max)
                for part in x.chunk(virtual_gpus)
            ]
        )
        torch.testing.assert_close(y, expected)
        leaves = (x, layer.weight, layer.bias)
        torch.testing.assert_close(
            torch.autograd.grad((y * upstream).sum(), leaves),
            torch.autograd.grad((expected * upstream).sum(), leaves),
        )
        batch_mean, batch_var = (m.mean(0) for m in oracle.batch_moments(x.detach(), virtual_gpus))
        torch.testing.assert_close(layer.running_mean, 0.8 * mean + 0.2 * batch_mean)
        torch.testing.assert_close(layer.running_var, 0.8 * var + 0.2 * batch_var)
    assert layer.num_batches_tracked == 2 and layer.images_seen == 12
    fixed = nn.BatchNorm3d(4).double().eval()
    fixed.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "images_seen"})
    wide = x.reshape(6, 4, -1, 1, 1)
    torch.testing.assert_close(layer.eval()(x), fixed(wide).view(shape))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("virtual_gpus", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batch_renorm_by_kernels_is_that_by_torchs_batch_norm(options, virtual_gpus, layout, dtype):
    layer = randomise(sn.BatchRenorm2d(4, virtual_gpus=virtual_gpus, **options, **FULL))
    layer = layer.to(torch.float64 if dtype == torch.float64 else torch.float32)
    found = []
    for backend in ("reference", "auto"):
        own = copy.deepcopy(layer)
        x = oracle.values((6, 4, 5, 3)).to(dtype, memory_format=layout).requires_grad_()
        with sn.backend(backend):
            y = own(x)
        if backend == "auto" and sn.kernels.native.extension() is not None:
            assert "SwitchNorm" in y.grad_fn.name()
        assert y.is_contiguous(memory_format=layout) and y.dtype == dtype
        y.backward(oracle.values((6, 4, 5, 3), 1).to(dtype))
        found.append((y, x.grad, *(p.grad for p in own.parameters()), *own.buffers()))
    close = {} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(found[1], found[0], **close)


def test_second_derivatives_of_batch_renorm():
    layer = randomise(sn.BatchRenorm2d(2, virtual_gpus=2, momentum=0.0, **FULL).double())
    x, values = oracle.values((4, 2, 2, 2)).requires_grad_(), tuple(layer.parameters())

    def call(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x).sin()

    wanted = []
    for backend in ("reference", "auto"):
        with sn.backend(backend):
            inputs = (x, *values)
            first = torch.autograd.grad(call(*inputs).sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum((g**2).sum() for g in first), inputs)
        wanted.append([*first, *second])
    torch.testing.assert_close(wanted[1], wanted[0])


def test_batch_renorm_without_limits_is_its_own_evaluation():
    """r_max = 1, d_max = 0 is batch norm; without limits training is the evaluation function."""
    x = oracle.values((5, 4, 3, 3))
    options = {"eps": 1e-3, "momentum": 0.1}
    plain = randomise(sn.BatchRenorm2d(4, r_max=1, d_max=0, **options, **FULL).double())
    torch_norm = nn.BatchNorm2d(4, **options).double()
    torch_norm.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "images_seen"})
    torch.testing.assert_close(plain(x), torch_norm(x))
    free = randomise(sn.BatchRenorm2d(4, r_max=1e9, d_max=1e9, **options, **FULL).double())
    evaluated = copy.deepcopy(free).eval()(x)
    torch.testing.assert_close(free(x), evaluated)


def test_schedule_of_the_limits():
    layer = sn.BatchRenorm2d(4)
    expected = {0: (1, 0), 8e6: (1, 0), 24e6: (1 + 2 * 16 / 56, 2.5), 40e6: (1 + 2 * 32 / 56, 5),
                64e6: (3, 5), 9e9: (3, 5)}  # fmt: skip
    for images, limits in expected.items():
        layer.images_seen.fill_(int(images))
        assert [limit.item() for limit in layer.limits()] == pytest.approx(limits)


def test_the_schedule_is_part_of_the_checkpoint():
    options = {"r_images": (10, 30), "d_images": (10, 20), "momentum": 0.5}
    layer = randomise(sn.BatchRenorm2d(4, **options))
    for step in range(4):
        layer(oracle.values((5, 4, 3, 3), step, dtype=torch.float32))
    assert layer.images_seen == 20
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = sn.BatchRenorm2d(4, **options)
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = oracle.values((5, 4, 3, 3), 9, dtype=torch.float32)
    assert torch.equal(twin(x), layer(x)) and twin.images_seen == 25
    layer.eval()(x)
    assert layer.images_seen == 25


def test_micro_batches_equal_virtual_gpus():
    options = {"r_images": (5, 40), "d_images": (5, 40), "momentum": 0.3}
    grouped = randomise(sn.BatchRenorm2d(4, **options).double())
    accumulated = copy.deepcopy(grouped)
    sn.set_virtual_gpus(grouped, 4)
    for step in range(4):
        x = oracle.values((12, 4, 3, 3), step)
        with one_running_update(nn.Sequential(accumulated), 4) as begin:
            parts = []
            for index, part in enumerate(x.chunk(4)):
                begin(index)
                parts.append(accumulated(part))
            y = torch.cat(parts)
        torch.testing.assert_close(y, grouped(x))
    torch.testing.assert_close(grouped.state_dict(), accumulated.state_dict())
    assert accumulated.images_seen == 48 and accumulated.reference is None


def test_batch_average_of_batch_renorm():
    layer = sn.BatchRenorm2d(4, **FULL).double()
    net = nn.Sequential(nn.Conv2d(4, 4, 1).double(), layer, nn.Conv2d(4, 4, 1).double())
    net.append(copy.deepcopy(layer))
    twin = copy.deepcopy(net)
    twin[1], twin[3] = nn.BatchNorm2d(4).double(), nn.BatchNorm2d(4).double()
    net(oracle.values((6, 4, 3, 3), 8))  # anything
    batches = [oracle.values((n, 4, 3, 3), n) for n in (2, 5, 3)]
    assert sn.batch_average(net, batches, 3) == sn.batch_average(twin, batches, 3) == 3
    for k in (1, 3):
        torch.testing.assert_close(net[k].running_mean, twin[k].running_mean)
        torch.testing.assert_close(net[k].running_var, twin[k].running_var * 89 / 90)
        assert net[k].images_seen == 6 and net[k].reference is None and net[k].training


@pytest.mark.parametrize(
    "options",
    [{"r_max": 0.5}, {"d_max": -1}, {"r_images": (5, 2)}, {"track_running_stats": False}],
)
def test_impossible_batch_renorm(options):
    with pytest.raises(ValueError):
        sn.BatchRenorm2d(4, **options)
    with pytest.raises(ValueError, match="4-D"):
        sn.BatchRenorm2d(4)(torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match="3 channels|4 channels"):
        sn.BatchRenorm2d(4)(torch.randn(2, 3, 3, 3))


def test_batch_renorm_of_an_empty_batch_and_in_bfloat16():
    layer = randomise(sn.BatchRenorm2d(4, **FULL))
    layer(torch.zeros(0, 4, 3, 3)).sum().backward()
    assert layer.num_batches_tracked == 0 and (layer.bias.grad == 0).all()
    x = oracle.values((8, 4, 6, 6), mean=3.0, dtype=torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        exact, rough = copy.deepcopy(layer), copy.deepcopy(layer)
        sn.set_virtual_gpus(exact, 2)
        sn.set_virtual_gpus(rough, 2)
        y = rough(x.bfloat16().to(memory_format=memory_format))
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y.float(), exact(x.bfloat16().float()), rtol=2e-2, atol=3e-2)
        torch.testing.assert_close(rough.running_var, exact.running_var)


# --- none, frozen, torch's synchronised -----------------------------------------------------------


def test_no_norm():
    layer = sn.make_norm("none")(4)
    x = torch.randn(2, 4, 3, 3)
    assert layer(x) is x and not list(layer.parameters()) and not layer.state_dict()
    assert repr(layer) == "NoNorm(4)"


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_frozen_batch_norm(dim):
    theirs = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dim - 1](4, eps=1e-3).double()
    randomise(theirs)
    ours = sn.make_norm("frozen_bn", dim=dim, eps=1e-3)(4).double()
    ours.load_state_dict(theirs.state_dict())  # num_batches_tracked and all
    state = copy.deepcopy(ours.state_dict())
    assert not list(ours.parameters())
    for shape in [(3, 4, *[5, 2, 3][:dim]), (1, 4, *[1] * dim)]:
        x = oracle.values(shape)
        over = (1, 4, *[1] * dim)
        scale = theirs.weight / (theirs.running_var + 1e-3).sqrt()
        expected = x * scale.view(over) + (theirs.bias - theirs.running_mean * scale).view(over)
        torch.testing.assert_close(ours.train()(x), expected.detach())
        torch.testing.assert_close(ours.eval()(x), expected.detach())
    torch.testing.assert_close(ours.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="running_mean"):
        ours.load_state_dict({"weight": state["weight"], "bias": state["bias"]})


def test_sync_bn_is_torchs():
    layer = sn.make_norm("sync_bn", momentum=0.3, process_group=None)(4)
    assert type(layer) is nn.SyncBatchNorm and layer.momentum == 0.3
    x = oracle.values((3, 4, 2, 2), dtype=torch.float32)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(4)(x))  # no group: batch norm


@pytest.mark.parametrize("name", ["none", "frozen_bn", "brn", "sync_bn"])
@pytest.mark.parametrize(("source", "model"), [("cifar", "resnet20"), ("torchvision", "resnet18")])
def test_networks_train_a_step(name, source, model):
    """A gain that cannot learn does not start at zero: the residual branches stay alive."""
    torch.manual_seed(0)
    net = build_model(model, source, 5, sn.make_norm(name))
    loss = nn.functional.cross_entropy(net(torch.randn(2, 3, 32, 32)), torch.tensor([0, 3]))
    loss.backward()
    dead = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert loss.isfinite() and not dead
    if name in ("none", "frozen_bn"):
        assert net.layer1[0].conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["sn", "ssn", "bn", "brn", "sync_sn"])
def test_another_default_device(name):
    """A network on the CPU in a program whose new tensors go elsewhere."""
    layer = randomise(sn.make_norm(name)(4).double())
    found = []
    for device in ("cpu", "meta"):
        own, x = copy.deepcopy(layer), shaped((4, 4, 3, 2))
        with torch.device(device):
            y = own(x)
            y.square().sum().backward()
        found.append((y, x.grad, *(p.grad for p in own.parameters()), *own.buffers()))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("virtual_gpus", [1, 2])
@pytest.mark.parametrize("name", ["bn", "brn", "bkn", "sn", "unbiased", "ssn", "sync_sn"])
def test_training_between_an_evaluation_and_its_backward_pass(name, virtual_gpus, backend):
    """As of a teacher that is the network itself: what the backward pass needs must stay."""
    unbiased = name == "unbiased"
    layer = (sn.make_norm("sn", unbiased=True) if unbiased else sn.make_norm(name))(3).double()
    layer.virtual_gpus = virtual_gpus
    randomise(layer).eval()
    if name == "bkn":
        sn.connect_bkn(layer, shaped((4, 3, 5, 2)))
    twin = copy.deepcopy(layer)
    x, z = shaped((4, 3, 5, 2)), shaped((4, 3, 5, 2))
    with sn.backend(backend):
        y = layer(x)
        layer.train()
        layer(x.detach() + 1)
        y.square().sum().backward()
        twin(z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


@pytest.mark.parametrize("virtual_gpus", [1, 2])
@pytest.mark.parametrize("name", ["bn", "brn", "sn", "gn"])
def test_models_stacked_by_vmap_train_as_each_alone(name, virtual_gpus):
    models = [randomise(sn.make_norm(name)(4).double(), seed) for seed in range(3)]
    for model in models:
        if hasattr(model, "virtual_gpus"):
            model.virtual_gpus = virtual_gpus
        if name == "brn":
            model.images_seen.fill_(0)
    parameters, buffers = torch.func.stack_module_state(models)
    x = shaped((4, 4, 5, 2)).detach()

    def loss(parameters, buffers):
        y = torch.func.functional_call(models[0], (parameters, buffers), (x,))
        return y.square().sum(), (y, buffers)

    gradients, (y, changed) = torch.func.vmap(torch.func.grad(loss, has_aux=True))(
        parameters, buffers
    )
    for place, model in enumerate(models):
        alone = model(x)
        alone.square().sum().backward()
        torch.testing.assert_close(y[place], alone)
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[key][place], parameter.grad)
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(changed[key][place], buffer)


@pytest.mark.parametrize("name", ["bn", "brn", "sn"])
def test_half_precision_stays_under_vmap(name):
    layer = sn.make_norm(name)(4)
    layer.virtual_gpus = 2
    models = torch.func.stack_module_state([layer])
    x = torch.randn(4, 4, 5, 2).bfloat16()
    call = torch.func.vmap(lambda *state: torch.func.functional_call(layer, state, (x,)))
    stacked = call(*models)[0]
    assert stacked.dtype is torch.bfloat16
    torch.testing.assert_close(stacked, layer(x), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("virtual_gpus", [1, 2])
@pytest.mark.parametrize("name", ["bn", "brn", "sn", "ssn"])
def test_forward_derivatives_are_those_of_the_backward_pass(name, virtual_gpus):
    options = {"momentum": 0.0} | (FULL if name == "brn" else {})
    layer = randomise(sn.make_norm(name, **options)(3).double())
    layer.virtual_gpus = virtual_gpus
    if name == "brn":
        layer.images_seen.fill_(0)
    x, tangent, v = shaped((4, 3, 5, 2)), shaped((4, 3, 5, 2), 1), shaped((4, 3, 5, 2), 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent.detach())
        forward = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        for buffer in layer.buffers():
            assert torch.autograd.forward_ad.unpack_dual(buffer).tangent is None
    (gradient,) = torch.autograd.grad(layer(x), x, v.detach())
    torch.testing.assert_close((gradient * tangent).sum(), (v * forward).sum())


# --- torch.compile as it is by default ------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_the_default_compiler_gives_the_gradients_of_several_layers():
    """Those of the first layers were wrong by 100 times. Other norms: test_capabilities."""
    torch.compiler.reset()
    torch.manual_seed(0)
    build, relu = sn.SparseSwitchNorm2d, nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), build(32), relu, nn.Conv2d(32, 32, 3), build(32))
    twin = copy.deepcopy(model).double()
    compiled = torch.compile(model)
    x, weight = oracle.values((4, 3, 8, 8), 1), oracle.values((4, 32, 4, 4), 2)
    ours, theirs = (
        x.to(dtype, copy=True).requires_grad_() for dtype in (torch.float, torch.double)
    )
    (compiled(ours) * weight.float()).sum().backward()
    (twin(theirs) * weight).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)
    for (name, own), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), wanted.grad, rtol=1e-3, atol=1e-3, msg=name)

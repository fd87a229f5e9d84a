"""make_norm's callables: what they build, what they refuse, and other people's networks on them."""

import copy
import pickle

import oracle
import pytest
import torch
from torch import nn

import sn

NAMES = ["sn", "sn_in_ln", "bn", "gn", "in", "ln"]
SPATIAL = {1: (5,), 2: (5, 3), 3: (2, 3, 2)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: threads that wait for one another cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_one_step(model, x):
    """A step of SGD on random targets; every parameter must get a finite gradient and move."""
    model.train()
    torch.manual_seed(1)
    output = model(x)
    loss = nn.functional.cross_entropy(output, torch.randint(output.shape[1], (len(x),)))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert model.eval()(x).isfinite().all()


# --- what each name builds --------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_kinds_of_layer(dim):
    def build(name, **options):
        return sn.make_norm(name, dim=dim, **options)(8)

    switch_norm = [sn.SwitchNorm1d, sn.SwitchNorm2d, sn.SwitchNorm3d][dim - 1]
    batch_norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dim - 1]
    instance_norm = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dim - 1]
    assert type(build("sn")) is switch_norm
    assert build("sn").statistics == switch_norm(8).statistics
    assert type(build("sn_in_ln")) is switch_norm
    assert build("sn_in_ln").statistics == ("in", "ln")
    assert isinstance(build("bn"), batch_norm)
    assert isinstance(build("gn"), nn.GroupNorm) and isinstance(build("ln"), nn.GroupNorm)
    assert isinstance(build("in"), instance_norm)
    assert build("sn", statistics=("bn", "ln"), momentum=0.3, eps=1e-3).momentum == 0.3


def test_two_dimensions_are_the_default():
    assert type(sn.make_norm("sn")(4)) is sn.SwitchNorm2d
    assert type(sn.make_norm("bn")(4)) is sn.GhostBatchNorm2d
    assert issubclass(sn.GhostBatchNorm2d, nn.BatchNorm2d)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_every_layer_has_a_per_channel_gain_and_shift(name, dim):
    layer = sn.make_norm(name, dim=dim)(6)
    assert layer.weight.shape == layer.bias.shape == (6,)
    x = oracle.values((4, 6, *SPATIAL[dim]), dtype=torch.float32)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.arange(6.0))
    expected = torch.arange(6.0).view(1, 6, *[1] * dim).expand_as(x)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "options", "statistics", "groups"),
    [
        ("bn", {}, ("bn",), 1),
        ("gn", {"num_groups": 3}, ("gn",), 3),
        ("gn", {}, ("gn",), 6),
        ("in", {}, ("in",), 1),
        ("ln", {}, ("ln",), 1),
        ("sn_in_ln", {}, ("in", "ln"), 1),
        ("sn", {"statistics": ("bn", "in", "ln")}, ("in", "ln", "bn"), 1),
        ("sn", {"statistics": ("gn", "ln"), "num_groups": 2}, ("ln", "gn"), 2),
    ],
)
def test_what_each_norm_computes(dim, name, options, statistics, groups):
    layer = sn.make_norm(name, dim=dim, **options)(6).double()
    x = oracle.values((4, 6, *SPATIAL[dim]))
    gates = torch.ones(len(statistics))
    expected = oracle.switch_norm(x, gates, gates, statistics=statistics, num_groups=groups)
    torch.testing.assert_close(layer(x), expected)
    if "bn" not in statistics:
        torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("name", ["in", "gn", "ln", "sn_in_ln"])
def test_norms_without_batch_statistics_keep_no_buffers(name):
    assert not list(sn.make_norm(name)(6).buffers())


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (2, 2), (7, 7), (16, 16), (24, 24), (32, 32), (33, 11), (37, 1), (48, 24), (64, 32),
     (96, 32), (100, 25), (104, 26), (2048, 32)],
)  # fmt: skip
def test_default_group_count_is_the_largest_divisor_up_to_32(channels, groups):
    assert sn.make_norm("gn")(channels).num_groups == groups
    assert sn.make_norm("ln")(channels).num_groups == 1


@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1), (1, 6, 1, 1)])
def test_a_group_of_one_value_is_the_shift(shape):
    """In a batch of one too, which torch's layer refuses."""
    layer = sn.AutoGroupNorm(6, 6)
    torch.nn.init.constant_(layer.weight, 2.0)
    torch.nn.init.constant_(layer.bias, 3.0)
    expected = torch.full(shape, 3.0)
    torch.testing.assert_close(layer(torch.randn(shape)), expected, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="more than 1 value"):
        torch.nn.GroupNorm(6, 6)(torch.randn(shape))
    cell = sn.SwitchNormLSTMCell(4, 4, norm="gn", num_groups=4)
    h, c = cell(torch.randn(1, 4))
    assert h.isfinite().all() and c.isfinite().all()


def test_callables_build_on_a_device_and_in_a_dtype():
    for name in NAMES:  # timm passes both by keyword
        layer = sn.make_norm(name)(8, device="meta", dtype=torch.float64)
        assert layer.weight.is_meta and layer.weight.dtype == torch.float64


def test_callables_are_fresh_every_time_and_survive_copying():
    for name in NAMES:
        norm = sn.make_norm(name)
        assert norm(4) is not norm(4)
        assert repr(pickle.loads(pickle.dumps(norm))(8)) == repr(norm(8))
        assert repr(copy.deepcopy(norm)(8)) == repr(norm(8))
        assert repr(pickle.loads(pickle.dumps(norm(8)))) == repr(norm(8))


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SN", "batchnorm", "", "nothing", None])
def test_an_unknown_norm_names_the_valid_ones(name):
    with pytest.raises(ValueError) as error:
        sn.make_norm(name)
    assert repr(name) in str(error.value)
    assert all(repr(valid) in str(error.value) for valid in NAMES)


@pytest.mark.parametrize("dim", [0, 4, "2"])
def test_an_unknown_dimension_names_the_valid_ones(dim):
    with pytest.raises(ValueError, match=r"(?s)(?=.*1)(?=.*2)(?=.*3)"):
        sn.make_norm("sn", dim=dim)


@pytest.mark.parametrize(
    ("name", "option"),
    [("sn", "statistic"), ("sn_in_ln", "groups"), ("bn", "statistics"), ("bn", "num_groups"),
     ("gn", "groups"), ("gn", "momentum"), ("in", "num_groups"), ("ln", "epsilon"),
     ("ln", "num_groups")],
)  # fmt: skip
def test_a_misspelt_option_is_a_type_error_at_once(name, option):
    with pytest.raises(TypeError, match=option):
        sn.make_norm(name, **{option: ("bn",) if option == "statistics" else 1})


def test_bad_statistics_are_an_error_before_any_layer_is_built():
    for statistics in [("in", "xn"), (), ("in", "in")]:
        with pytest.raises(ValueError):
            sn.make_norm("sn", statistics=statistics)(8)


@pytest.mark.parametrize("num_groups", [4, 5, 12, 0, -1])
def test_an_explicit_group_count_that_does_not_divide_is_an_error(num_groups):
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{num_groups}\b)(?=.*1, 2, 3,? .*6)"):
        sn.make_norm("gn", num_groups=num_groups)(6)
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{num_groups}\b)(?=.*1, 2, 3,? .*6)"):
        sn.make_norm("sn", statistics=("ln", "gn"), num_groups=num_groups)(6)


# --- batch normalisation over virtual GPUs ----------------------------------------------------


def random_batch_norm(**options):
    layer = sn.GhostBatchNorm2d(4, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def torchs(layer, **options):
    twin = nn.BatchNorm2d(4, **options).double()
    twin.load_state_dict(layer.state_dict())
    return twin


OPTIONS = [
    {}, {"momentum": 0.3}, {"momentum": None}, {"affine": False}, {"track_running_stats": False},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batch_norm_of_one_gpu_is_torchs(options):
    layer = random_batch_norm(**options)
    twin = torchs(layer, **options)
    assert layer.virtual_gpus == 1
    for step in range(3):
        x = oracle.values((4, 4, 3, 5), step)
        torch.testing.assert_close(layer(x), twin(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(layer.eval()(x), twin.eval()(x), rtol=0, atol=0)
    for bad in [(2, 4, 3), (2, 5, 3, 3)]:
        with pytest.raises((ValueError, RuntimeError)):
            layer.train()(torch.randn(bad).double())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("virtual_gpus", [2, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_batch_norm_of_virtual_gpus_equals_separate_layers(
    options, virtual_gpus, memory_format, backend
):
    """By the CPU's kernels, where they were compiled, and by torch's batch norm."""
    with sn.backend(backend):
        of_virtual_gpus_equals_separate_layers(options, virtual_gpus, memory_format)


def of_virtual_gpus_equals_separate_layers(options, virtual_gpus, memory_format):
    layer = random_batch_norm(**options)
    twins = [torchs(layer, **options) for _ in range(virtual_gpus)]
    layer.virtual_gpus = virtual_gpus
    for step in range(2):
        x = oracle.values((6, 4, 3, 5), step).to(memory_format=memory_format).requires_grad_()
        upstream = oracle.values((6, 4, 3, 5), step + 9)
        y = layer(x)
        chunks = zip(twins, x.split(6 // virtual_gpus), strict=True)
        expected = torch.cat([twin(chunk) for twin, chunk in chunks])
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, expected)
        grads = torch.autograd.grad((y * upstream).sum(), [x, *layer.parameters()])
        leaves = [x, *[p for twin in twins for p in twin.parameters()]]
        wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
        torch.testing.assert_close(grads[0], wanted[0])
        count = len(grads) - 1
        for k in range(count):
            torch.testing.assert_close(grads[1 + k], sum(wanted[1 + k :: count]))
    for name, buffer in layer.named_buffers():
        mean = torch.stack([twin.get_buffer(name) for twin in twins]).double().mean(0)
        torch.testing.assert_close(buffer.double(), mean)  # torch's rule: unbiased variances
    layer.eval()
    if layer.track_running_stats:
        one_gpu = copy.deepcopy(layer)
        one_gpu.virtual_gpus = 1
        torch.testing.assert_close(layer(x[:5]), one_gpu(x[:5]), rtol=0, atol=0)


def test_batch_norm_of_virtual_gpus_refuses_what_it_cannot_do():
    layer = sn.GhostBatchNorm2d(4)
    layer.virtual_gpus = 4
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b6\b)(?=.*\b4\b)"):
        layer(torch.randn(6, 4, 3, 3))
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError):
        layer(torch.randn(8, 4))  # nn.BatchNorm2d takes 4-D only
    with pytest.raises(ValueError, match="with 5 channels"):
        layer(torch.randn(8, 5, 3, 3))
    with pytest.raises(ValueError, match="with 2 channels"):
        layer(torch.randn(8, 2, 3, 3))  # 4 virtual GPUs x 2 channels is not 4 channels


def test_batch_norm_of_virtual_gpus_goes_by_the_kernels_and_has_second_derivatives():
    layer = random_batch_norm(momentum=None)
    layer.virtual_gpus = 2
    x = oracle.values((4, 4, 2, 3), 0).requires_grad_()
    if sn.kernels.native.library() is not None:
        assert "SwitchNorm" in layer(x).grad_fn.name()
    assert torch.autograd.gradgradcheck(lambda x: layer(x).sin(), x)
    assert torch.autograd.gradcheck(lambda x: layer(x).sin(), x)


@pytest.mark.parametrize("track_running_stats", [True, False])
def test_batch_norm_of_virtual_gpus_in_half_precision(track_running_stats):
    layer = sn.GhostBatchNorm2d(4, track_running_stats=track_running_stats)
    x = oracle.values((4, 4, 6, 6), mean=2.0, dtype=torch.bfloat16)
    twin = copy.deepcopy(layer)
    expected = torch.cat([twin(chunk) for chunk in x.split(2)])
    layer.virtual_gpus = 2
    y = layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


# --- torchvision ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_resnet18_trains_a_step(name):
    torchvision = pytest.importorskip("torchvision")
    norm = sn.make_norm(name)
    model = torchvision.models.resnet18(norm_layer=norm, num_classes=5, zero_init_residual=True)
    kind = type(norm(64))
    assert sum(isinstance(m, kind) for m in model.modules()) == 20
    assert (model.layer1[0].bn2.weight == 0).all()
    train_one_step(model, torch.randn(2, 3, 64, 64))


def test_torchvision_resnet50_builds_with_53_layers():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.resnet50(norm_layer=sn.make_norm("sn"))
    assert len([m for m in model.modules() if isinstance(m, sn.SwitchNorm2d)]) == 53


def test_torchvision_mobilenet_and_detection_parts_train_a_step():
    torchvision = pytest.importorskip("torchvision")
    norm = sn.make_norm("sn")
    model = torchvision.models.mobilenet_v2(norm_layer=norm, num_classes=5, width_mult=0.25)
    train_one_step(model, torch.randn(2, 3, 32, 32))
    pyramid = torchvision.ops.FeaturePyramidNetwork([4, 8], 8, norm_layer=norm)
    features = {"0": torch.randn(1, 4, 8, 8), "1": torch.randn(1, 8, 4, 4)}
    sum(level.square().mean() for level in pyramid(features).values()).backward()
    assert all(p.grad.isfinite().all() for p in pyramid.parameters())
    head = torchvision.models.detection.faster_rcnn.FastRCNNConvFCHead(
        (8, 7, 7), [8, 8], [16], norm_layer=norm
    )
    assert head(torch.randn(3, 8, 7, 7)).isfinite().all()
    assert head(torch.randn(0, 8, 7, 7)).shape == (0, 16)  # an image without proposals


# --- timm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_timm_resnet18_trains_a_step(name):
    timm = pytest.importorskip("timm")
    norm = sn.make_norm(name)
    narrow = (64, 16, 32, 64)  # the same 20 norm layers in a lighter network
    model = timm.create_model("resnet18", norm_layer=norm, num_classes=5, channels=narrow)
    kind = type(norm(64))
    assert sum(isinstance(m, kind) for m in model.modules()) == 20
    train_one_step(model, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["densenet121", "mobilenetv3_small_050", "regnetx_002"])
def test_timm_families_with_fused_activations_keep_them_or_refuse(name, family):
    """Their norm layers carry the activation: a plain norm would silently drop it.

    timm also looks a class up by its bare name and builds its own in its place; for "bn" that one
    knows no virtual GPUs, for "gn" it has another default group count. So: ours, or an error.
    """
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        default = timm.create_model(family, num_classes=5)
        try:
            model = timm.create_model(family, num_classes=5, norm_layer=sn.make_norm(name))
        except (AssertionError, TypeError, ValueError, KeyError):
            return
    activations = [
        sum(type(m) in (nn.ReLU, nn.Hardswish, nn.SiLU) for m in net.modules())
        for net in (default, model)
    ]
    assert activations[0] == activations[1]
    assert any(isinstance(m, type(sn.make_norm(name)(8))) for m in model.modules())


def test_timm_resnet18_trains_in_channels_last_under_autocast():
    timm = pytest.importorskip("timm")
    narrow = (64, 16, 32, 64)
    model = timm.create_model("resnet18", norm_layer=sn.make_norm("sn"), channels=narrow)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())

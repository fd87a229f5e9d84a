"""What people do with batch norm: arguments, tracing, freezing, averaging, wrappers, dtypes."""

import copy
import inspect
import pickle
import re
import warnings

import numpy as np
import oracle
import pytest
import torch
import torchvision
from torch import fx, nn
from torch.nn.utils import fusion, parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import sn
from sn.modules import named_layers
from sn.norms import NORMS
from sn.variants.sparse import choices

SWITCHABLE = ("SwitchNorm1d", "SwitchNorm2d", "SwitchNorm3d", "SwitchNormAct2d")
SWITCHABLE += ("SparseSwitchNorm1d", "SparseSwitchNorm2d", "SparseSwitchNorm3d")
SYNC = ("SyncSwitchNorm1d", "SyncSwitchNorm2d", "SyncSwitchNorm3d")
OTHERS = ("BatchRenorm1d", "BatchRenorm2d", "BatchKalmanNorm2d", "GhostBatchNorm2d")
LEARNING = [name for name in NORMS if name not in ("none", "frozen_bn")]


def small(norm, **options):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), sn.make_norm(norm, **options)(4), nn.ReLU()]
    return sn.connect(nn.Sequential(*layers, nn.Conv2d(4, 4, 1), sn.make_norm(norm)(4)))


# --- arguments of torch's batch norm


def bias_is_known():
    return "bias" in inspect.signature(nn.BatchNorm2d).parameters


@pytest.mark.parametrize("name", SWITCHABLE + SYNC + OTHERS)
def test_arguments_are_torch_s_in_torch_s_order(name):
    """Of nn.BatchNorm2d; synchronised layers have nn.SyncBatchNorm's, Act2d timm's."""
    kind = getattr(sn, name)
    torchs = nn.SyncBatchNorm if name in SYNC else nn.BatchNorm2d
    ours = inspect.signature(kind).parameters
    names = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [
        n
        for n, p in inspect.signature(torchs).parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if name == "SwitchNormAct2d":
        timm = pytest.importorskip("timm")
        wanted = list(inspect.signature(timm.layers.BatchNormAct2d).parameters)
    assert names == wanted
    if bias_is_known() or "Ghost" not in name:  # torch's own layer, which has it since 2.12
        assert ours["bias"].kind is inspect.Parameter.KEYWORD_ONLY
    if torchs is nn.BatchNorm2d and "Act" not in name:
        layer = kind(4, 1e-3, 0.2, True, True, "cpu", torch.float64)
        assert (layer.eps, layer.momentum, layer.weight.dtype) == (1e-3, 0.2, torch.float64)
        floats = [b for b in layer.buffers() if b.is_floating_point()]
        assert {b.dtype for b in floats} == {torch.float64}


@pytest.mark.parametrize("name", [n for n in SWITCHABLE + SYNC + OTHERS if "Kalman" not in n])
def test_without_bias(name):
    if name == "GhostBatchNorm2d" and not bias_is_known():
        pytest.skip("an argument of torch's batch norm since 2.12")
    kind = getattr(sn, name)
    torch.manual_seed(0)
    layer, twin = kind(4, bias=False), kind(4)
    assert layer.bias is None and layer.weight is not None and "bias" not in layer.state_dict()
    if hasattr(twin, "mean_weight"):
        assert "bias=False" in repr(layer) and "bias=False" not in repr(twin)
    with torch.no_grad():
        for one in (layer, twin):
            one.weight.copy_(torch.arange(1.0, 5))
    x = torch.randn(3, 4, *{"1": (5,), "2": (5, 6), "3": (2, 3, 4)}[name[-2]])
    x.requires_grad_()
    for mode in (True, False):
        layer.train(mode), twin.train(mode)
        outputs = [one(x) for one in (layer, twin)]
        torch.testing.assert_close(*outputs)
        grads = [torch.autograd.grad(y.square().sum(), (x, o.weight)) for y, o in
                 zip(outputs, (layer, twin))]  # fmt: skip
        torch.testing.assert_close(*grads)
    layer.reset_parameters()
    assert (layer.weight == 1).all()
    assert kind(4, affine=False, bias=True).bias is None


@pytest.mark.parametrize("name", SWITCHABLE + SYNC + OTHERS)
def test_state_dicts_without_a_count_load_as_batch_norm_s(name):
    """PyTorch's before 0.4.1, and those whose version was lost, have none; later ones must."""
    layer, batch_norm = getattr(sn, name)(4), nn.BatchNorm2d(4)
    with torch.no_grad():
        layer.running_mean.fill_(3.0)
    for module in (layer, batch_norm):
        state = module.state_dict()
        module.num_batches_tracked.fill_(7)
        plain = {key: value for key, value in state.items() if key != "num_batches_tracked"}
        module.load_state_dict(plain)
        assert module.num_batches_tracked == 7
        del state["num_batches_tracked"]  # its version says that there is one
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            module.load_state_dict(state)
        module.load_state_dict(module.state_dict())
    assert (layer.running_mean == 3).all()


def test_without_bias_in_groups_and_recurrent():
    gn = sn.AutoGroupNorm(8, 2, bias=False)
    gn.reset_parameters()
    theirs = nn.GroupNorm(2, 8)
    x = torch.randn(3, 8)
    assert gn.bias is None and torch.equal(gn(x), theirs(x))
    layer, twin = sn.SwitchNormRecurrent(8, 2, bias=False), sn.SwitchNormRecurrent(8, 2)
    assert layer.bias is None
    torch.testing.assert_close(layer(x), twin(x))
    frozen = sn.FrozenBatchNorm(4, bias=False)
    assert set(frozen.state_dict()) == {"weight", "running_mean", "running_var"}


def test_group_norm_names_a_shape_that_does_not_fit_and_stays_scriptable():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), sn.AutoGroupNorm(8))
    x = torch.randn(2, 3, 4, 5)
    wanted = nn.functional.group_norm(model[0](x), 8)
    for tokens in (torch.randn(2, 197, 8), torch.randn(8)):  # a vision transformer's: (N, T, C)
        with pytest.raises(ValueError, match=re.escape(str(tuple(tokens.shape)))):
            model[1](tokens)
    ways = {"script": torch.jit.script(model), "fx": fx.symbolic_trace(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        ways["trace"] = torch.jit.trace(model, x)
    for way, other in ways.items():
        torch.testing.assert_close(other(x), wanted, msg=way)


def test_unbiased_is_known_to_every_switchable_layer():
    for name in SWITCHABLE + SYNC:
        layer = getattr(sn, name)(4, unbiased=True)
        assert layer.unbiased and "unbiased=True" in repr(layer)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    layer = sn.SwitchNorm1d(4, statistics=("in",), unbiased=True, eps=0).double()
    wanted = (x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("name", [*NORMS])
def test_built_on_meta_and_reset(name):
    """As torch.nn.utils.skip_init and FSDP do."""
    build = sn.make_norm(name)
    meta = build(4, device="meta") if name != "in" else build(4, device="meta")
    layer, wanted = meta.to_empty(device="cpu"), build(4)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(3)
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), wanted.state_dict(), rtol=0, atol=0)


def test_skip_init():
    for kind in (sn.SwitchNorm2d, sn.SyncSwitchNorm2d, sn.SparseSwitchNorm2d, sn.BatchRenorm2d):
        assert nn.utils.skip_init(kind, 4).weight.device.type == "cpu"


# --- conversion


@pytest.mark.skipif(not bias_is_known(), reason="an argument of torch's batch norm since 2.12")
@pytest.mark.parametrize("name", [n for n in NORMS if n != "none"])
@pytest.mark.parametrize("affine", [True, False])
def test_convert_keeps_a_missing_bias_missing(name, affine):
    def network():
        norm = nn.BatchNorm2d(4, affine=affine, bias=False)
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())

    model = network()
    state = copy.deepcopy(model.state_dict())
    converted = sn.convert(model, name)
    assert converted[1].bias is None and (converted[1].weight is None) != affine
    report = converted.load_state_dict(state, strict=False)  # statistics it may not have
    assert not [key for key in report.missing_keys if "bias" in key or key.endswith("1.weight")]
    assert converted(torch.randn(4, 3, 8, 8)).isfinite().all()


def test_convert_keeps_hooks_and_their_handles():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    seen = []
    handles = [
        model[1].register_forward_pre_hook(lambda m, args: seen.append("before")),
        model[1].register_forward_hook(lambda m, args, kwargs, y: seen.append("after"),
                                       with_kwargs=True),
        model[1].register_full_backward_hook(lambda m, gx, gy: seen.append("backward")),
    ]  # fmt: skip
    sn.convert(model, "sn")
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert type(model[1]) is sn.SwitchNorm2d and seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert len(seen) == 3


def in_sequence(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm)


def parametrised(key):
    norm = nn.BatchNorm2d(4)
    parametrize.register_parametrization(norm, key, nn.Softplus(), unsafe=True)
    return norm


def with_legacy_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.BatchNorm2d(4), dim=None)


class WithParameter(nn.BatchNorm2d):
    def __init__(self, features):
        super().__init__(features)
        self.slope = nn.Parameter(torch.ones(1))


class OwnForwardFrozen(torchvision.ops.FrozenBatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def with_forward_of_the_instance():
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda x: x  # as accelerate hooks modules
    return norm


def with_state_dict_hook():
    norm = nn.BatchNorm2d(4)
    norm.register_state_dict_post_hook(lambda *args: None)
    return norm


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: parametrised("weight"), "the weight of 1 .*remove_parametrizations"),
        (lambda: parametrised("bias"), "the bias of 1 "),
        (lambda: parametrised("running_var"), "the running_var of 1 "),
        (with_legacy_weight_norm, "the weight of 1 .*remove_weight_norm"),
        (lambda: prune.l1_unstructured(nn.BatchNorm2d(4), "weight", 2), r"weight of 1 .*prune\."),
        (lambda: WithParameter(4), r"1 \(WithParameter\) has slope"),
        (lambda: OwnForwardFrozen(4), "1 .*forward of its own"),
        (with_forward_of_the_instance, "1 .*forward of its own"),
        (with_state_dict_hook, "1 .*hooks of its state dict"),
    ],
)
def test_convert_refuses_what_it_would_lose(make, message):
    model = in_sequence(make())
    norm, state = model[1], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sn.convert(model, "sn")
    assert model[1] is norm
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_convert_refuses_wrappers_that_would_not_know_of_new_parameters():
    model = in_sequence(nn.BatchNorm2d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
    with pytest.raises(ValueError, match=r"torch\.jit; convert it before"):
        sn.convert(scripted)
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(ValueError, match="in DistributedDataParallel; convert it before"):
        sn.convert(wrapped)
    wrapped.module = nn.Conv2d(3, 4, 1)
    with pytest.warns(UserWarning, match="has no batch norm"):
        assert sn.convert(wrapped) is wrapped


@pytest.mark.parametrize("name", ["sn", "ssn", "bn", "gn", "in", "brn"])
def test_convert_keeps_the_parameters_themselves(name):
    """Ties, hooks, gradients, flags and an optimizer's references, as convert_sync_batchnorm."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    model[3].weight = model[1].weight
    model[0].bias = model[1].bias
    model[3].bias.requires_grad_(False)
    model[1].weight.no_decay = True
    seen = []
    model[1].weight.register_hook(lambda grad: seen.append(grad))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    sn.convert(model, name)
    assert model[1].weight is model[3].weight and model[0].bias is model[1].bias
    assert id(model[1].weight) in known and id(model[3].bias) in known
    assert model[1].weight.no_decay and not model[3].bias.requires_grad
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert seen
    new = {n for n, p in model.named_parameters() if id(p) not in known}
    assert {n.rpartition(".")[2] for n in new} <= {"mean_weight", "var_weight"}


def test_convert_keeps_what_users_set():
    model = in_sequence(nn.BatchNorm2d(4))
    norm = model[1]
    norm.register_buffer("mask", torch.tensor([1.0, 0, 1, 0]))
    norm.register_buffer("seen", torch.zeros(1), persistent=False)
    norm.label = "stem"
    norm.register_forward_hook(lambda m, args, y: y * m.mask.view(-1, 1, 1))
    for name in ("sn", "gn"):
        twin = sn.convert(copy.deepcopy(model), name)
        assert twin[1].label == "stem" and "1.mask" in twin.state_dict()
        assert "1.seen" not in twin.state_dict() and (twin[1].seen == 0).all()
        y = twin(torch.randn(2, 3, 5, 5))
        assert (y[:, 1::2] == 0).all() and (y[:, ::2] != 0).any()
        assert not hasattr(twin[1], "virtual_gpus") or name == "sn"
    frozen = sn.convert(sn.freeze(copy.deepcopy(model)), "sn").train()
    assert not frozen[1].training and not any(p.requires_grad for p in frozen.parameters())
    assert sn.unfreeze(frozen).train()[1].training


def test_convert_keeps_groups_of_processes_and_virtual_gpus():
    group = object()
    sync = sn.convert(nn.SyncBatchNorm(4, process_group=group), "sync_sn")
    assert sync.process_group is group
    ghost = sn.GhostBatchNorm2d(4)
    ghost.virtual_gpus = 2
    for name in ("sn", "bn", "brn"):
        assert sn.convert(ghost, name).virtual_gpus == 2
    assert sn.convert(ghost, "brn", virtual_gpus=4).virtual_gpus == 4
    assert not hasattr(sn.convert(ghost, "gn"), "virtual_gpus")


def test_synchronising_refuses_layers_of_other_classes():
    model = nn.Sequential(sn.SwitchNorm2d(4), sn.SwitchNorm2d(4))
    parametrize.register_parametrization(model[1], "weight", nn.Softplus(), unsafe=True)
    with pytest.raises(ValueError, match="1 is a ParametrizedSwitchNorm2d"):
        sn.convert_sync_switchnorm(model)
    assert type(model[0]) is sn.SwitchNorm2d


# --- torch.fx, torch.jit, fusion


@pytest.mark.parametrize("name", [*NORMS])
def test_fx_traces_without_naming_leaf_modules(name):
    model = small(name)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    model.eval()
    graph = fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), model(x))
    if name != "none":
        extractor = create_feature_extractor(model, {"1": "normed"})
        torch.testing.assert_close(extractor(x)["normed"], model[1](model[0](x)))
    if name != "bkn":  # trains within the network that it was connected in
        model.train()
        twin = copy.deepcopy(model)
        graph = fx.symbolic_trace(model)
        torch.testing.assert_close(graph(x), twin(x))
        torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", ["sn", "ssn", "bkn", "brn"])
def test_features_of_a_converted_resnet(name):
    torch.manual_seed(0)
    model = sn.convert(torchvision.models.resnet18(num_classes=5).eval(), name)
    x, wanted = torch.randn(2, 3, 32, 32), []
    model.layer2.register_forward_hook(lambda m, args, y: wanted.append(y))
    model(x)
    found = create_feature_extractor(model, {"layer2": "f"})(x)
    torch.testing.assert_close(found["f"], wanted[0])


def test_fx_and_what_it_cannot_trace():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), sn.SwitchNormAct2d(3)
            self.lstm = sn.SwitchNormLSTM(5, 4)

        def forward(self, x):
            y = self.norm(self.conv(x), x)
            out, (h, _) = self.lstm(y.flatten(1, 2))
            return y, out, h

    model, x = Residual(), torch.randn(2, 3, 4, 5)
    graph = fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), model(x))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert targets == ["conv", "norm", "lstm"]
    with pytest.raises(ValueError, match="SwitchNorm2d by itself"):
        fx.symbolic_trace(sn.SwitchNorm2d(4))
    model = small("sn")
    handle = model[1].register_forward_hook(lambda m, args, y: 2 * y)
    with pytest.raises(ValueError, match="hooks of 1"):
        fx.symbolic_trace(model)
    handle.remove()
    fx.symbolic_trace(model)


@pytest.mark.parametrize("name", ["sn", "ssn", "sync_sn", "bn", "brn", "bkn"])
def test_jit_script_says_what_to_use_instead(name):
    model = small(name).eval()
    with pytest.raises(TypeError, match=r"torch\.jit\.script does not compile .*torch\.export"):
        torch.jit.script(model)
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_fusion_of_torch_refuses_what_is_not_batch_norm():
    x = torch.randn(2, 3, 8, 8)
    for name in ("sn", "ssn", "sync_sn"):
        model = small(name).eval()
        with pytest.raises(ValueError, match=r"sn\.fold"):
            fusion.fuse_conv_bn_eval(model[0], model[1])
        assert model[1].eps == 1e-5
    for name in ("brn", "bkn", "frozen_bn", "bn"):  # in evaluation they are
        model = small(name)
        model(x)
        model.eval()
        fused = fusion.fuse_conv_bn_eval(model[0], model[1])
        torch.testing.assert_close(fused(x), model[1](model[0](x)), rtol=1e-4, atol=1e-5)
    layer = sn.SwitchNorm2d(4)
    layer.eps = 0.5
    assert layer(torch.zeros(2, 4, 3, 3)).isfinite().all() and "eps=0.5" in repr(layer)

    def merge_pre_bn(layer):  # timm's Next-ViT's
        return layer.eps

    def merge_adapters(layer):
        return layer.eps

    with pytest.raises(ValueError, match="merge_pre_bn of .* takes SwitchNorm2d for batch norm"):
        merge_pre_bn(layer)
    assert merge_adapters(layer) == 0.5

    def refused(layer):  # no function that fuses
        return layer.eps

    assert refused(layer) == 0.5


@pytest.mark.parametrize("name", ["repvit_m0_9", "levit_128s"])
def test_networks_that_fuse_themselves_refuse_too(name):
    """timm's would leave the layers out without a word."""
    timm = pytest.importorskip("timm")
    model = sn.convert(timm.create_model(name, num_classes=3), "sn").eval()
    with pytest.raises(ValueError, match="fuse of timm.* takes SwitchNorm.* for batch norm"):
        timm.utils.reparameterize_model(model)


def test_calls_by_the_name_of_batch_norms_argument():
    """`layer(input=x)`, as torch's; batch_average counts such batches too."""
    x = torch.randn(4, 3, 5, 5)

    class Named(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(input=x)

    for layer in (sn.SwitchNorm2d(3), sn.make_norm("bn")(3), nn.BatchNorm2d(3)):
        sn.batch_average(Named(layer), [x], 1)
        torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(layer.eval()(input=x), layer(x))


def test_hooks_of_the_activation_are_called():
    """Those of Grad-CAM and of feature extraction; the fused kernel passes it over else."""
    layer, seen = sn.SwitchNormAct2d(4), []
    x = torch.randn(2, 4, 5, 5)
    expected = layer.eval()(x)
    handle = layer.act.register_forward_hook(lambda act, args, y: seen.append(y) or 2 * y)
    torch.testing.assert_close(layer(x), 2 * expected)
    assert len(seen) == 1
    handle.remove()
    torch.testing.assert_close(layer(x), expected)


def test_activations_by_name():
    """As timm's BatchNormAct2d takes them."""
    kinds = {
        "relu": nn.ReLU,
        "leaky_relu": nn.LeakyReLU,
        "swish": nn.SiLU,
        "hard_swish": nn.Hardswish,
    }
    for name, kind in kinds.items():
        assert type(sn.SwitchNormAct2d(4, act_layer=name).act) is kind
    with pytest.raises(ValueError, match="unknown act_layer='reluu'.*relu"):
        sn.SwitchNormAct2d(4, act_layer="reluu")


def test_groups_counted_by_numpy():
    assert sn.SwitchNorm2d(8, statistics=("gn",), num_groups=np.gcd(4, 8)).num_groups == 4


def test_a_state_dict_without_a_count_onto_meta():
    state = dict(sn.SwitchNorm2d(3).state_dict())
    del state["num_batches_tracked"]
    with torch.device("meta"):
        layer = sn.SwitchNorm2d(3)
    layer.load_state_dict(state, assign=True)
    assert layer.num_batches_tracked.device.type == "cpu"
    layer(torch.randn(2, 3, 4, 4))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["bn", "brn"])
def test_volumes_keep_their_layout_by_the_formula(name):
    x = torch.randn(4, 3, 2, 4, 4).to(memory_format=torch.channels_last_3d)
    layer = sn.make_norm(name, dim=3)(3)
    layer.virtual_gpus = 2
    with sn.backend("reference"):
        assert layer(x).is_contiguous(memory_format=torch.channels_last_3d)


# --- freezing and averaging


@pytest.mark.parametrize("name", LEARNING)
def test_freeze_stops_statistics_and_parameters(name):
    model = small(name)
    model(torch.randn(4, 3, 8, 8))
    sn.begin_step(model, 1.0)  # sparse layers would choose in the next training step
    sn.freeze(model)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    wanted = copy.deepcopy(model).eval()(x)
    for twin in (model.train(), copy.deepcopy(model).train(), pickle.loads(pickle.dumps(model))):
        twin.train()
        sn.begin_step(twin, 0.5)
        if name not in ("in", "gn", "ln"):  # without statistics: the same in either mode
            assert not twin[1].training
        torch.testing.assert_close(twin(x), wanted)
        torch.testing.assert_close(twin.state_dict(), state, rtol=0, atol=0)
        assert not any(p.requires_grad for p in twin.parameters())
    assert sn.batch_average(model, [x]) == 0
    sn.unfreeze(model).train()
    assert model[1].training and all(p.requires_grad for p in model.parameters())
    model(x)
    if name in ("sn", "bn", "brn"):
        assert not torch.equal(model[1].running_mean, state["1.running_mean"])


def test_a_part_may_be_frozen():
    model = nn.Sequential(small("sn"), small("sn", eps=1e-4)[1:2], nn.BatchNorm2d(4))
    sn.freeze(model[0])
    model.train()
    before = copy.deepcopy(model.state_dict())
    sn.batch_average(model, [torch.randn(4, 3, 8, 8)])
    assert model[2].training and not model[0][1].training
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and not [key for key in changed if key.startswith("0.")]


def test_batch_average_of_a_model_without_parameters():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False))
    x = torch.randn(6, 3, 4, 4) + 2
    assert sn.batch_average(model, [x]) == 1
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("name", ["sn", "ssn", "sync_sn", "brn", "bkn"])
def test_update_bn_speaks_where_it_can(name):
    """It runs batches only for a model with batch norm of torch's somewhere."""
    model = small(name)
    mixed = sn.connect(nn.Sequential(model, nn.BatchNorm2d(4)))
    batches = [torch.randn(4, 3, 8, 8)]
    with pytest.warns(UserWarning, match=r"update_bn passes over .*sn\.batch_average"):
        update_bn(batches, mixed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sn.batch_average(mixed, batches)
        with torch.no_grad():
            mixed.train()(batches[0])
        mixed(batches[0])


# --- sparse layers


def test_an_average_of_sparse_models_has_the_choice_of_most():
    model = nn.Sequential(sn.SparseSwitchNorm2d(4))
    averaged = AveragedModel(model, use_buffers=True, avg_fn=lambda a, m, n: a + (m - a) / (n + 1))
    x = torch.randn(4, 4, 5, 5)
    with torch.no_grad():
        model[0].mean_weight.copy_(torch.tensor([0.2, 0.3, 0.9]))
        model[0].var_weight.copy_(torch.tensor([0.2, 0.9, 0.3]))
    for _ in range(5):
        averaged.update_parameters(model)
        sn.begin_step(model, 1.0)
        model(x)
        settled = [averaged.module[0].importance()[k].argmax().item() for k in (0, 1)]
    assert choices(model) == {"0": {"mean": "bn", "var": "ln"}}
    assert choices(averaged) == choices(model) and settled == [2, 1]
    for weights in averaged.module[0].importance():
        assert weights.max() == 1


def test_checkpoints_with_the_index_of_the_choice_load():
    layer = sn.SparseSwitchNorm2d(4, dtype=torch.float64)
    state = layer.state_dict()
    state |= {"mean_choice": torch.tensor(2), "var_choice": torch.tensor(-1)}
    layer.load_state_dict(state)
    assert layer.mean_choice.tolist() == [0, 0, 1] and layer.var_choice.tolist() == [0, 0, 0]
    assert layer.radius.dtype == layer.mean_choice.dtype == torch.float64
    layer.reset_parameters()
    assert layer.radius == 0 and layer.mean_choice.max() == 0


@pytest.mark.parametrize("radius", [0.0, 0.3, 0.9])
def test_second_derivatives_of_sparsestmax(radius):
    z = torch.tensor([0.31, 0.2, 0.27], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: sn.sparsestmax(z, radius), z)
    layer = sn.SparseSwitchNorm2d(4)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), layer.mean_weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), layer.mean_weight, allow_unused=True)
    assert second is None or second.isfinite().all()


# --- activation checkpointing, dtypes


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("virtual_gpus", [1, 2])
def test_batch_renorm_under_activation_checkpointing(virtual_gpus, reentrant):
    options = {"r_images": (0, 0), "d_images": (0, 0), "momentum": 0.5}
    layer = sn.BatchRenorm2d(4, **options, virtual_gpus=virtual_gpus).double()
    net = nn.Sequential(nn.Conv2d(4, 4, 1).double(), layer, nn.Tanh())
    twin = copy.deepcopy(net)
    for step in range(3):
        x = (oracle.values((4, 4, 3, 3), step) * (step + 1) + step).requires_grad_()
        found = []
        for model, run in ((net, lambda x: checkpoint(net, x, use_reentrant=reentrant)),
                           (twin, twin)):  # fmt: skip
            leaves = (x, *model.parameters())
            for leaf in leaves:
                leaf.grad = None
            run(x).pow(3).sum().backward()
            found.append([leaf.grad.clone() for leaf in leaves])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(net.state_dict(), twin.state_dict())
    assert layer.num_batches_tracked == 3 and layer.images_seen == 12


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sn", "ssn", "brn", "bkn"])
def test_mixed_dtypes(name, inputs, statistics, parameters):
    options = {"r_images": (0, 0), "d_images": (0, 0)} if name == "brn" else {}
    exact = sn.connect(nn.Sequential(sn.make_norm(name, **options)(4)))
    rough = copy.deepcopy(exact)
    for parameter in rough.parameters():
        parameter.data = parameter.data.to(parameters)
    rough[0].running_mean = rough[0].running_mean.to(statistics)
    rough[0].running_var = rough[0].running_var.to(statistics)
    x = torch.randn(6, 4, 5, 5).to(inputs)
    for mode in (True, False):
        exact.train(mode), rough.train(mode)
        leaf = x.clone().requires_grad_()
        y = rough(leaf)
        y.float().square().sum().backward()
        assert y.dtype == inputs and leaf.grad.dtype == inputs
        torch.testing.assert_close(y.float(), exact(x.float()), rtol=2e-2, atol=3e-2)
    assert all(p.grad.dtype == parameters for p in rough.parameters())


# --- wrappers


def test_names_are_those_of_the_network_inside_its_wrappers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ModuleDict({"module": sn.SparseSwitchNorm2d(4)}))
    names = [name for name, _ in model.named_modules()]
    assert [name for name, _ in named_layers(model)] == names
    for wrap in (torch.compile, AveragedModel, nn.DataParallel,
                 lambda m: AveragedModel(torch.compile(m))):  # fmt: skip
        wrapped = wrap(model)
        assert list(sn.importance_weights(wrapped)) == ["1.module"] == list(choices(wrapped))
    assert list(sn.importance_weights(torch.compile(sn.SwitchNorm2d(4)))) == [""]
    inner = nn.Sequential(torch.compile(nn.Sequential(sn.SwitchNorm2d(4))))
    assert list(sn.importance_weights(inner)) == ["0.0"]


def test_control_parameters_behind_a_parametrisation_or_a_mask():
    class Double(nn.Module):
        def forward(self, z):
            return 2 * z

    model = nn.Sequential(sn.SwitchNorm2d(4), sn.SwitchNorm2d(4), sn.SwitchNorm2d(4))
    parametrize.register_parametrization(model[0], "mean_weight", Double())
    prune.identity(model[1], "var_weight")
    model[2].mean_weight = model[1].mean_weight  # shared
    found = sn.gates(model)
    assert len(found) == 5 and all(isinstance(p, nn.Parameter) for p in found)
    assert {id(p) for p in found} <= {id(p) for p in model.parameters()}
    groups = sn.parameter_groups(model, 0.1, 1e-4, gate_lr_factor=0.1)
    optimizer = torch.optim.SGD(groups)
    model(torch.randn(2, 4, 5, 5)).pow(3).sum().backward()
    optimizer.step()
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_importance_weights_of_sharded_parameters(tmp_path):
    """FSDP2's DTensors, in a group of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if dist.is_initialized():
        pytest.skip("a process group is there")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = sn.SwitchNorm2d(4)
        wanted = sn.importance_weights(layer)
        for name in ("mean_weight", "var_weight"):
            sharded = distribute_tensor(getattr(layer, name).detach(), mesh, [Shard(0)])
            setattr(layer, name, nn.Parameter(sharded))
        assert sn.importance_weights(layer) == wanted
    finally:
        dist.destroy_process_group()

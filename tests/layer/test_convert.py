"""sn.convert: other people's networks on our norms, with their outputs kept or not."""

import collections
import copy
import warnings

import oracle
import pytest
import torch
from torch import nn

import sn

KEEPING = ["sn", "sync_sn", "bn", "brn", "bkn", "frozen_bn", "sync_bn"]
NORMS = [*KEEPING, "sn_in_ln", "gn", "in", "ln", "none"]
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = {1: (3, 4, 5), 2: (3, 4, 5, 2), 3: (2, 4, 3, 1, 2)}
SHARE = {5: 1.33e-2, 8: 6.71e-4, 13: 4.53e-6}  # of in and ln together: 2 / (2 + e^start)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(model, seed=0):
    """Random affine parameters and running statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if getattr(layer, "running_mean", None) is not None:
                for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                    if tensor.is_floating_point() and "." not in name:
                        drawn = torch.randn(tensor.shape, generator=generator).to(tensor) / 4
                        tensor.copy_(drawn + 1 if name in ("weight", "running_var") else drawn)
                        if name == "running_var":
                            tensor.abs_().add_(0.1)
    return model.eval()


def left_over(model):
    return [k for k, m in model.named_modules() if "BatchNorm" in type(m).__name__]


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_nothing_to_convert_is_said():
    model = nn.Sequential(nn.Linear(3, 4), sn.SwitchNorm1d(4))
    with pytest.warns(UserWarning, match="Sequential has no batch norm, nothing was converted"):
        assert sn.convert(model) is model
    with pytest.raises(ValueError, match="unknown norm 'snn'"):
        sn.convert(model, "snn")
    with pytest.raises(TypeError, match="has no option 'groups'"):
        sn.convert(model, "gn", groups=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sn.convert(nn.BatchNorm1d(4))


Pair = collections.namedtuple("Pair", "norm name")


class Own(tuple):
    word = ""


class HoldsTwice(nn.Module):
    """Its layers are registered, and run from lists of its own."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))
        self.listed, self.named = [self.norms[0], None], {"second": self.norms[1], 3: [4]}
        self.pair = Pair(self.norms[2], "third")
        self.nested = [{"a": (self.norms[0], [self.norms[1]])}]
        self.nested.append(self.nested)
        self.again = self.pair
        self.own = Own([self.norms[0]])
        self.own.word = "kept"
        object.__setattr__(self, "tail", self.norms[2])  # as a module that is not to be registered
        vars(self)["read_only"] = [(self.norms[1],)]
        vars(self)["read_only_pair"] = (self.norms[1],)

    read_only = property(lambda self: vars(self)["read_only"])
    read_only_pair = property(lambda self: vars(self)["read_only_pair"])

    def forward(self, x):
        return self.pair.norm(self.named["second"](self.listed[0](x)))


def test_layers_held_in_plain_lists_are_replaced_there_too():
    model = sn.convert(HoldsTwice())
    assert model.listed == [model.norms[0], None] and model.pair == (model.norms[2], "third")
    assert model.again == model.pair
    assert model.nested[0] == {"a": (model.norms[0], [model.norms[1]])}
    assert model.named == {"second": model.norms[1], 3: [4]}
    assert type(model.own) is Own and model.own == (model.norms[0],) and model.own.word == "kept"
    assert model.tail is model.norms[2]
    assert model.read_only == [(model.norms[1],)] and model.read_only_pair == (model.norms[1],)
    model(torch.randn(5, 4))
    assert all(type(norm) is sn.SwitchNorm1d for norm in model.norms)
    assert [norm.num_batches_tracked.item() for norm in model.norms] == [1, 1, 1]


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("gate_start", SHARE)
def test_kept_outputs_are_the_mixture_with_bn_dominant(dim, affine, gate_start):
    theirs = trained(BATCH_NORMS[dim](4, eps=1e-3, momentum=0.3, affine=affine).double())
    ours = sn.convert(theirs, keep_outputs=True, gate_start=gate_start)
    assert type(ours) is type(sn.make_norm("sn", dim=dim)(4))
    assert ours.eps == 1e-3 and ours.momentum == 0.3 and not ours.training
    x = oracle.values(SHAPES[dim])
    gates = torch.zeros(len(ours.statistics)).double()
    gates[-1] = gate_start
    expected = oracle.switch_norm(
        x, gates, gates, theirs.weight, theirs.bias, (theirs.running_mean, theirs.running_var),
        statistics=ours.statistics, eps=1e-3,
    )  # fmt: skip
    torch.testing.assert_close(ours(x), expected.detach())
    error = relative_error(ours(x), theirs(x))
    assert error < 3 * SHARE[gate_start]
    if dim > 1:
        weights = sn.importance_weights(ours)[""]["mean"]
        assert 1 - weights["bn"] == pytest.approx(SHARE[gate_start], rel=0.01)


@pytest.mark.parametrize("norm", KEEPING)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}])
def test_every_norm_with_batch_statistics_keeps_outputs(norm, options):
    theirs = trained(nn.BatchNorm2d(4, **options).double())
    ours = sn.convert(theirs, norm, keep_outputs=True, gate_start=60.0)
    x = oracle.values(SHAPES[2])
    torch.testing.assert_close(ours(x), theirs(x))
    if norm not in ("frozen_bn",):
        assert ours.momentum == theirs.momentum


@pytest.mark.parametrize("norm", ["gn", "in", "ln", "none", "sn_in_ln"])
def test_other_norms_cannot_keep_outputs(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = model[1]
    with pytest.raises(ValueError, match=r"keep_outputs.*\b1\b"):
        sn.convert(model, norm, keep_outputs=True)
    with pytest.raises(ValueError, match="keep_outputs"):
        sn.convert(model, "sn", keep_outputs=True, eps=1e-2)
    assert model[1] is before


@pytest.mark.parametrize("norm", NORMS)
def test_without_keeping_it_starts_the_papers_way(norm):
    theirs = trained(nn.BatchNorm2d(4)).train()
    theirs.weight.requires_grad_(False)
    model = sn.convert(nn.Sequential(theirs), norm)
    ours = model[0]
    assert type(ours) is type(sn.make_norm(norm)(4)) and ours.training
    if norm != "none":
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
        assert not ours.weight.requires_grad
    if norm in KEEPING:
        assert (ours.running_mean == 0).all() and (ours.running_var == 1).all()
    if isinstance(ours, sn.SwitchNorm2d):
        assert (ours.mean_weight == 1).all() and (ours.var_weight == 1).all()
    model(torch.randn(2, 4, 3, 3))


def test_options_and_callables():
    model = nn.Sequential(nn.BatchNorm2d(6, momentum=0.2), nn.BatchNorm1d(6))
    twin = sn.convert(
        copy.deepcopy(model), statistics=("ln", "gn", "bn"), num_groups=3, momentum=0.5
    )
    assert [layer.statistics for layer in twin] == [("ln", "gn", "bn")] * 2
    assert all(layer.momentum == 0.5 and layer.num_groups == 3 for layer in twin)
    grouped = sn.convert(copy.deepcopy(model)[:1], lambda channels: nn.GroupNorm(2, channels))
    assert type(grouped[0]) is nn.GroupNorm
    with pytest.raises(TypeError, match="statistic"):
        sn.convert(model, statistic=("bn",))
    with pytest.raises(TypeError, match="eps"):
        sn.convert(model, sn.make_norm("sn"), eps=1e-3)


def test_structure_is_kept():
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(shared, nn.ReLU(inplace=True)),
            "b": shared,
            "sync": nn.SyncBatchNorm(4, momentum=None),
            "volume": nn.SyncBatchNorm(4),
            "ghost": sn.GhostBatchNorm2d(4, track_running_stats=False),
            "instance": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        }
    ).to(torch.float64)
    model["b"].eval()
    assert sn.convert(model) is model
    assert model["a"][0] is model["b"] and not model["b"].training
    assert model["sync"].momentum is None and type(model["sync"]) is sn.SwitchNorm2d
    assert not model["ghost"].track_running_stats
    assert type(model["instance"]) is nn.InstanceNorm2d
    assert all(p.dtype == torch.float64 for p in model.parameters())
    with torch.device("meta"):
        net = nn.Sequential(nn.BatchNorm2d(4))
    assert sn.convert(net, keep_outputs=True)[0].weight.is_meta
    assert type(sn.convert(nn.SyncBatchNorm(4), dim=3)) is sn.SwitchNorm3d


def test_none_does_not_let_an_activation_overwrite_its_input():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x):
            return x + self.relu(self.bn(x))

    model = sn.convert(PreActivation(), "none")
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(model(x.clone()), x + x.relu())


class Odd(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Even(nn.BatchNorm2d):
    pass


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"1 \(Odd\)"):
        sn.convert(nn.Sequential(nn.BatchNorm2d(4), Odd(4)))
    assert type(sn.convert(Even(4))) is sn.SwitchNorm2d
    with pytest.raises(ValueError, match="lazy"):
        sn.convert(nn.Sequential(nn.LazyBatchNorm2d()))


# --- networks ---------------------------------------------------------------------------------


def train_one_step(model, x):
    model.train()
    out = model(x)
    out = out["out"] if isinstance(out, dict) else out
    out.square().mean().backward()
    bad = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvision_networks(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = trained(torchvision.models.get_model(name, num_classes=5)).double()
    x = torch.randn(2, 3, 64, 64).double()
    expected = model(x)
    errors = []
    for gate_start in SHARE:
        ours = sn.convert(copy.deepcopy(model), keep_outputs=True, gate_start=gate_start)
        assert not left_over(ours)
        errors.append(relative_error(ours(x), expected))
    assert errors[0] < 0.2 and errors[1] < 0.02 and errors[2] < 1e-4
    assert errors[0] > errors[1] > errors[2]
    train_one_step(sn.convert(model), x)


def test_torchvision_detection_with_frozen_batch_norm():
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d
    )
    model = trained(FasterRCNN(backbone, 3, min_size=64, max_size=64))
    kept = sn.convert(copy.deepcopy(model), keep_outputs=True, gate_start=30.0)
    assert not left_over(kept)
    image = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(kept.backbone(image).values(), model.backbone(image).values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert len(kept([image[0]])[0]["boxes"]) == len(model([image[0]])[0]["boxes"])
    trainee = sn.convert(model).train()
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    losses = trainee([image[0]], [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert trainee.backbone.body.bn1.mean_weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnetx_002", "levit_128s"])
def test_timm_networks_keep_activation_and_dropout(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = trained(timm.create_model(name, num_classes=5))
    size = 224 if name.startswith("levit") else 64
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)

    def count(net):
        kinds = (nn.ReLU, nn.Hardswish, nn.SiLU, nn.Hardsigmoid, nn.Dropout)
        return sum(isinstance(m, kinds) for m in net.modules())

    kept = sn.convert(copy.deepcopy(model), keep_outputs=True, gate_start=20.0)
    assert count(kept) == count(model) and not left_over(kept)
    with torch.no_grad():  # levit keeps what it computes with gradients, and cannot be copied
        assert relative_error(kept(x), expected) < 1e-4
    train_one_step(sn.convert(model), x)


def test_timm_fused_layers():
    timm = pytest.importorskip("timm")
    from timm.layers import BatchNormAct2d, SyncBatchNormAct
    from timm.layers.norm_act import FrozenBatchNormAct2d

    fused = trained(
        BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout2d(0.5))
    ).double()
    sync = SyncBatchNormAct(4).double()
    sync.drop, sync.act = fused.drop, fused.act
    sync.load_state_dict(fused.state_dict())
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(fused))
    assert type(frozen) is FrozenBatchNormAct2d
    x = oracle.values((3, 4, 5, 5))
    expected = fused(x)
    for layer in (fused, sync.eval(), frozen.eval()):
        ours = sn.convert(layer, keep_outputs=True, gate_start=60.0)
        torch.testing.assert_close(ours(x), expected)
        assert type(ours.act) is nn.SiLU and type(ours.drop) is nn.Dropout2d
        assert type(ours.norm) is sn.SwitchNorm2d
        y = ours.train()(x)  # some channels are dropped, and SiLU(0) is 0
        assert (y.flatten(2) == 0).all(2).any()
    bare = sn.convert(BatchNormAct2d(4, apply_act=False))
    assert type(bare) is sn.SwitchNorm2d


def test_gate_start_without_outputs_to_keep():
    with pytest.raises(ValueError, match="gate_start=2 is for keep_outputs=True"):
        sn.convert(nn.BatchNorm2d(2), gate_start=2)


@pytest.mark.parametrize("value", [-1, 101, float("nan"), float("inf")])
def test_gate_start_out_of_range(value):
    with pytest.raises(ValueError, match=f"gate_start={value}; expected a number, 0 to 100"):
        sn.convert(nn.BatchNorm2d(2), keep_outputs=True, gate_start=value)


def test_what_is_no_network():
    with pytest.raises(TypeError, match=r"got BatchNorm2d \(type\); expected an nn.Module"):
        sn.convert(nn.BatchNorm2d)


@pytest.mark.parametrize("norm", [sn.make_norm("sn"), sn.SwitchNorm2d, "sn"])
def test_callables_of_ours_take_the_old_layers_settings_too(norm):
    old = nn.BatchNorm2d(4, eps=1e-3, momentum=0.01, affine=False)
    layer = sn.convert(nn.Sequential(old), norm)[0]
    assert (layer.eps, layer.momentum, layer.affine) == (1e-3, 0.01, False)
    layer = sn.convert(nn.Sequential(nn.BatchNorm2d(4)), sn.make_norm("sn", eps=0.5))[0]
    assert layer.eps == 0.5 and layer.affine


def test_what_does_not_learn_gets_control_parameters_that_do_not():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[0].requires_grad_(False)
    converted = sn.convert(model, "sn")
    assert not any(p.requires_grad for p in converted[0].parameters())
    assert all(p.requires_grad for p in converted[1].parameters())


def test_another_train_method_is_no_freeze():
    """Such as `disabled_train`, by which some keep batch norm in evaluation."""
    layer = nn.BatchNorm2d(4)
    layer.train = lambda mode=True: layer
    converted = sn.convert(nn.Sequential(layer), "sn")[0]
    assert all(p.requires_grad for p in converted.parameters())


def test_our_frozen_batch_norm_is_converted_with_its_outputs():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), sn.FrozenBatchNorm(4)).double()
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(model[1], name).copy_(torch.rand(4) + 0.5)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    wanted = model(x)
    twin = sn.convert(model, "sn", keep_outputs=True, gate_start=50).eval()
    assert type(twin[1]) is sn.SwitchNorm2d
    torch.testing.assert_close(twin(x), wanted)


def test_a_layer_instead_of_its_class_is_refused():
    with pytest.raises(TypeError, match="SwitchNorm2d"):
        sn.convert(nn.Sequential(nn.BatchNorm2d(4)), sn.SwitchNorm2d(4))

"""Fine-tuning: weights from files and libraries, conversion to another norm, a new head."""

import json
import os

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from workers import config

import sn
import train_imagenet
from sn.training.classification import pretrained
from sn.training.classification.models import build_model
from sn.training.classification.pretrained import (
    misfits,
    network_facts,
    pretrained_model,
    pretrained_weights,
)
from sn.training.run import record
from sn.training.run.checkpoint import load_network

SMALL = {"name": "resnet8", "source": "cifar", "width": 8}
NORMS = ("sn", "bn", "frozen_bn", "brn", "ssn", "sync_bn")  # those that keep running statistics


def network(norm="bn", classes=10, **options):
    """A network none of whose parameters and statistics is at its initial value."""
    torch.manual_seed(3)
    model = build_model(**SMALL | options, num_classes=classes, norm=sn.make_norm(norm))
    for name, tensor in model.state_dict().items():
        if name.endswith(("bn1.weight", "bn2.weight", "bias", "running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("mean_weight", "var_weight")):
            tensor.uniform_(-1, 1)
    return model.eval()


IMAGES = torch.randn(4, 3, 16, 16)


@pytest.mark.parametrize("norm", NORMS)
def test_conversion_keeps_the_function(norm):
    """With bn's control parameters far above the others: every output as before."""
    theirs = network()
    model, how = pretrained_model(theirs.state_dict(), {"name": norm}, 10, 20.0, **SMALL)
    torch.testing.assert_close(model.eval()(IMAGES), theirs(IMAGES), rtol=1e-4, atol=1e-4)
    assert f"7 batch norms became {norm}, running statistics kept" in how
    assert how.endswith("head fc kept: 10 classes")


def test_start_of_the_control_parameters():
    state = network().state_dict()
    for start, bn in ((0.0, 1 / 3), (2.0, 0.78699), (5.0, 0.98670)):  # e^g / (e^g + 2)
        model, how = pretrained_model(state, {"name": "sn"}, 10, start, **SMALL)
        for layer in sn.importance_weights(model).values():
            assert layer["mean"]["bn"] == pytest.approx(bn, abs=1e-5)
            assert layer["var"]["in"] == pytest.approx((1 - bn) / 2, abs=1e-5)
        assert f"bn {bn:.3g}" in how
        assert torch.equal(model.bn1.running_var, state["bn1.running_var"])


@pytest.mark.parametrize("norm", ["gn", "sn_in_ln", "in"])
def test_norms_without_running_statistics_keep_gain_and_shift(norm):
    state = network().state_dict()
    model, how = pretrained_model(state, {"name": norm}, 10, 5.0, **SMALL)
    assert torch.equal(model.layer3[0].bn2.weight, state["layer3.0.bn2.weight"])
    assert torch.equal(model.layer3[0].bn2.bias, state["layer3.0.bn2.bias"])
    assert "no running statistics" in how


@pytest.mark.parametrize("norm", ["sn", "gn", "ssn", "brn", "frozen_bn"])
def test_the_same_norm_loads_as_it_is(norm):
    theirs = network(norm)
    model, how = pretrained_model(theirs.state_dict(), {"name": norm}, 10, **SMALL)
    torch.testing.assert_close(model.eval()(IMAGES), theirs(IMAGES))
    assert "layers as they were" in how or norm == "frozen_bn"


def test_another_head_starts_anew():
    state = network().state_dict()
    torch.manual_seed(0)
    model, how = pretrained_model(state, {"name": "sn"}, 4, **SMALL, dropout=0.5)
    assert model.fc.weight.shape == (4, 32) and model.fc.dropout == 0.5
    assert how.endswith("head fc starts anew: 4 classes instead of 10")
    assert torch.equal(model.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


def test_fused_activations():
    state = network().state_dict()
    plain, _ = pretrained_model(state, {"name": "sn"}, 10, 2.0, **SMALL)
    fused, _ = pretrained_model(state, {"name": "sn"}, 10, 2.0, **SMALL, fused_activation=True)
    assert type(fused.layer1[0].bn1) is sn.SwitchNormAct2d
    torch.testing.assert_close(fused.eval()(IMAGES), plain.eval()(IMAGES))


@pytest.mark.parametrize(
    "theirs, norm, options, words",
    [
        ({"norm": "gn"}, "sn", {}, "with norm=sn: .*missing: .*bn1.mean_weight"),
        ({"norm": "sn"}, "sn_in_ln", {}, r"bn1.mean_weight \(3,\) instead of \(2,\)"),
        ({"name": "resnet14"}, "sn", {}, "with batch norm: .*unexpected: layer1.1.bn1.bias"),
        ({}, "sn", {"width": 10}, r"with batch norm: .*bn1.weight \(8,\) instead of \(10,\)"),
    ],
)
def test_what_does_not_fit_is_one_error(theirs, norm, options, words):
    state = network(**theirs).state_dict()
    with pytest.raises(ValueError, match=words) as error:
        pretrained_model(state, {"name": norm}, 10, **SMALL | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("theirs, norm", [("bn", "gn"), ("bn", "sn_in_ln"), ("sn", "sn")])
def test_a_start_without_effect_is_said(theirs, norm):
    state = network(norm=theirs).state_dict()
    plain, _ = pretrained_model(state, {"name": norm}, 10, **SMALL)
    model, how = pretrained_model(state, {"name": norm}, 10, 2, **SMALL)
    assert "init.gate_start=2 has no effect" in how
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key])
    assert (
        "no effect"
        not in pretrained_model(network().state_dict(), {"name": "sn"}, 10, 2, **SMALL)[1]
    )


def test_library_networks():
    """Their eps stays; those that take no norm callable are converted all the same."""
    theirs = torchvision.models.mobilenet_v3_small(num_classes=7).eval()
    named = {"name": "mobilenet_v3_small", "source": "torchvision"}
    model, how = pretrained_model(theirs.state_dict(), {"name": "sn"}, 7, 20.0, **named)
    assert model.features[0][1].eps == 0.001
    torch.testing.assert_close(model.eval()(x := torch.randn(2, 3, 64, 64)), theirs(x))
    with pytest.raises(ValueError, match="norm.eps=1e-05.*have 0.001"):
        pretrained_model(theirs.state_dict(), {"name": "frozen_bn", "eps": 1e-5}, 7, **named)
    named = {"name": "shufflenet_v2_x0_5", "source": "torchvision"}  # takes no norm_layer
    state = torchvision.models.shufflenet_v2_x0_5().state_dict()
    _, how = pretrained_model(state, {"name": "sn"}, 3, **named)
    assert "56 batch norms became sn" in how and "head fc starts anew: 3 classes" in how
    vit = {"name": "vit_b_16", "source": "torchvision"}
    with torch.device("meta"):
        state = torchvision.models.vit_b_16().state_dict()
        with pytest.raises(ValueError, match="no batch norm"):
            pretrained_model(state, {"name": "sn"}, 1000, **vit)


def test_timms_fused_layers():
    import timm

    theirs = timm.create_model("regnetx_002", num_classes=5).eval()  # BatchNormAct2d
    named = {"name": "regnetx_002", "source": "timm"}
    model, _ = pretrained_model(theirs.state_dict(), {"name": "sn"}, 5, 20.0, **named)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), theirs(x), rtol=1e-4, atol=1e-4)


def saved(model, path, classes):
    """As train_imagenet.py saves a network."""
    torch.save({"model": model.state_dict(), "network": network_facts(model, classes)}, path)
    return pretrained_weights("checkpoint", "any", str(path))


def test_what_a_network_computes_beside_its_tensors_is_kept(tmp_path):
    """The eps of its layers, here that of MobileNet's batch norms, and unbiased variances."""
    named = {"name": "mobilenet_v3_small", "source": "torchvision"}
    x = torch.randn(2, 3, 64, 64)
    theirs = torchvision.models.mobilenet_v3_small(num_classes=7)
    ours, _ = pretrained_model(theirs.state_dict(), {"name": "sn"}, 7, 2.0, **named)
    weights = saved(ours, tmp_path / "c.pt", 7)
    again, how = pretrained_model(weights, {"name": "sn"}, 7, **named)
    assert "sn layers as they were" in how and again.features[0][1].eps == 0.001
    torch.testing.assert_close(again.eval()(x), ours.eval()(x))
    again, _ = pretrained_model(weights, {"name": "sn", "eps": 0.001}, 7, **named)
    torch.testing.assert_close(again.eval()(x), ours(x))
    with pytest.raises(ValueError, match="norm.eps=1e-05: the pretrained network has 0.001 in fea"):
        pretrained_model(weights, {"name": "sn", "eps": 1e-5}, 7, **named)

    own = build_model(**SMALL, num_classes=10, norm=sn.make_norm("bn", eps=0.5)).eval()
    for norm in ("bn", "frozen_bn"):
        model, _ = pretrained_model(saved(own, tmp_path / "d.pt", 10), {"name": norm}, 10, **SMALL)
        torch.testing.assert_close(model.eval()(IMAGES), own(IMAGES))
    pretrained_model(saved(own, tmp_path / "d.pt", 10), {"name": "gn", "eps": 1e-5}, 10, **SMALL)

    own = build_model(**SMALL, num_classes=10, norm=sn.make_norm("sn", unbiased=True)).eval()
    weights = saved(own, tmp_path / "e.pt", 10)
    model, _ = pretrained_model(weights, {"name": "sn"}, 10, **SMALL)
    torch.testing.assert_close(model.eval()(IMAGES), own(IMAGES))
    with pytest.raises(ValueError, match="norm.unbiased=False: the pretrained network has True"):
        pretrained_model(weights, {"name": "sn", "unbiased": False}, 10, **SMALL)


def test_groups_and_statistics_of_a_checkpoint(tmp_path):
    """Control parameters are those of the file's statistics; groups are as many as there."""
    own = build_model(**SMALL, num_classes=10, norm=sn.make_norm("gn", num_groups=2)).eval()
    weights = saved(own, tmp_path / "a.pt", 10)
    for groups in (None, 2):
        model, _ = pretrained_model(weights, {"name": "gn", "num_groups": groups}, 10, **SMALL)
        torch.testing.assert_close(model.eval()(IMAGES), own(IMAGES))
    wanted = "norm.num_groups=4: the pretrained network has 2 in bn1; norm.num_groups=2 keeps that"
    with pytest.raises(ValueError, match=wanted):
        pretrained_model(weights, {"name": "gn", "num_groups": 4}, 10, **SMALL)

    norm = {"name": "sn", "statistics": ["in", "gn", "bn"], "num_groups": 2}
    own = build_model(**SMALL, num_classes=10, norm=sn.make_norm(**norm)).eval()
    weights = saved(own, tmp_path / "b.pt", 10)
    model, _ = pretrained_model(weights, norm, 10, **SMALL)
    torch.testing.assert_close(model.eval()(IMAGES), own(IMAGES))
    with pytest.raises(ValueError, match=r"bn1.mean_weight .* of the statistics \('in', 'gn', 'bn"):
        pretrained_model(weights, {"name": "sn"}, 10, **SMALL)
    with pytest.raises(ValueError, match=wanted):
        pretrained_model(weights, norm | {"num_groups": 4}, 10, **SMALL)
    with pytest.raises(ValueError, match="with norm=sn: the statistic 'gn' needs num_groups"):
        pretrained_model(weights, norm | {"num_groups": None}, 10, **SMALL)


def test_networks_that_know_their_version_or_read_their_weights():
    """torchvision's MNASNet asks a state dict for its version, RegNet cannot be built on meta."""
    for name in ("mnasnet0_5", "regnet_y_400mf"):
        named = {"name": name, "source": "torchvision"}
        theirs = torchvision.models.get_model(name, num_classes=5).eval()
        for state in (theirs.state_dict(), dict(theirs.state_dict())):  # with and without notes
            model, how = pretrained_model(state, {"name": "bn"}, 5, **named)
            assert "kept: 5 classes" in how
            x = torch.randn(1, 3, 64, 64)
            torch.testing.assert_close(model.eval()(x), theirs(x), rtol=1e-4, atol=1e-4)
        _, how = pretrained_model(state, {"name": "sn"}, 7, **named)
        assert "starts anew: 7 classes" in how


def test_networks_whose_norm_layer_is_another(tmp_path):
    """timm's visformer_tiny takes it for some layers alone; what init= made loads again."""
    import timm

    named = {"name": "visformer_tiny", "source": "timm"}
    theirs = timm.create_model("visformer_tiny", num_classes=5)
    ours, _ = pretrained_model(theirs.state_dict(), {"name": "sn"}, 5, 2.0, **named)
    weights = saved(ours, tmp_path / "c.pt", 5)
    again, how = pretrained_model(weights, {"name": "sn"}, 5, **named)
    assert "sn layers as they were" in how
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(again.eval()(x), ours.eval()(x))


@pytest.mark.parametrize(
    "bad", [{"eps": 1}, {"groups": {"bn1": 0}}, {"eps": {"bn1": "x"}}, {"classes": "7"}]
)
def test_damaged_facts_are_refused(bad, tmp_path):
    torch.save({"model": network().state_dict(), "network": bad}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: its 'network' is not what train_imagenet.py wri"):
        pretrained_weights("checkpoint", "resnet8", str(tmp_path / "c.pt"))


@pytest.mark.parametrize("name, size", [("googlenet", 64), ("inception_v3", 96)])
def test_networks_that_shift_their_input(name, size, tmp_path, monkeypatch):
    """torchvision's weights of GoogLeNet and Inception are for an input that it shifts itself."""
    theirs = getattr(torchvision.models, name)(
        weights=None, num_classes=5, aux_logits=True, transform_input=True, init_weights=False
    ).eval()
    x, named = torch.randn(2, 3, size, size), {"name": name, "source": "torchvision"}
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: theirs)
    found = {"library": pretrained_weights("torchvision", name, None)}
    monkeypatch.undo()
    found["file"] = pretrained_weights("checkpoint", name, str(tmp_path / "published.pth"))
    for weights in found.values():
        model, _ = pretrained_model(weights, {"name": "frozen_bn"}, 5, **named)
        torch.testing.assert_close(model.eval()(x), theirs(x), rtol=1e-4, atol=1e-4)
    again, _ = pretrained_model(
        saved(model, tmp_path / "c.pt", 5), {"name": "frozen_bn"}, 5, **named
    )
    torch.testing.assert_close(again.eval()(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_networks_with_two_heads():
    import timm

    named = {"name": "repvit_m0_9", "source": "timm"}
    state = timm.create_model("repvit_m0_9", num_classes=6).state_dict()
    model, how = pretrained_model(state, {"name": "sn"}, 4, **named)
    heads = "heads head.head.l and head.head_dist.l start anew: 4 classes instead of 6"
    assert heads in how
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes(prefix, tmp_path):
    state = network().state_dict()
    wrapped = {prefix + key: value for key, value in state.items()}
    for content in (wrapped, {"model": wrapped, "progress": {"epoch": 2}}):
        torch.save(content, tmp_path / "c.pt")
        assert not misfits(state, load_network(tmp_path / "c.pt"))


def test_weights_in_torchs_cache(tmp_path, monkeypatch):
    """What torchvision's API finds there is used; it looks at no network then."""
    names = {"IMAGENET1K_V1": 0.25, "IMAGENET1K_V2": 0.5}
    state = torchvision.models.resnet50().state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name, value in names.items():
        state["conv1.weight"].fill_(value)
        url = torchvision.models.get_model_weights("resnet50")[name].url
        torch.save(state, folder / os.path.basename(url))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name, value in {**names, "DEFAULT": 0.5, None: 0.5}.items():
        found = pretrained_weights("torchvision", "resnet50", None, weights=name)
        assert found["conv1.weight"].eq(value).all()


def test_weights_that_torchvision_does_not_have():
    with pytest.raises(
        ValueError, match="init.weights=V3: torchvision has IMAGENET1K_V1, .*of resn"
    ):
        pretrained_weights("torchvision", "resnet50", None, weights="V3")
    with pytest.raises(ValueError, match="init.weights=V1 needs init=torchvision, not timm"):
        pretrained_weights("timm", "resnet50", None, weights="V1")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_no_network_is_one_line(library, monkeypatch):
    def offline(*_):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(pretrained, f"_of_{library}", offline)
    with pytest.raises(ValueError, match=f"init={library} has no weights of resnet18: no route"):
        pretrained_weights(library, "resnet18", None)


def test_timms_pretrained_weights(monkeypatch):
    """A stand-in for the download: what create_model(pretrained=True) makes is taken."""
    import timm

    def create_model(name, pretrained):
        assert pretrained
        model = nn.Linear(2, 3)
        nn.init.constant_(model.weight, 0.5)
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    found = pretrained_weights("timm", "resnet18", None)
    assert found["weight"].eq(0.5).all() and found.keys() == {"weight", "bias"}


def test_images_that_timms_weights_expect():
    """Of 683 of its 1,826 they are not of ImageNet's mean: said, since the loss would not tell."""
    state, mean = network().state_dict(), (0.5, 0.5, 0.5)
    weights = pretrained.Weights(state, {"mean": mean, "std": mean})
    _, how = pretrained_model(weights, {"name": "sn"}, 10, **SMALL)
    assert "note: they expect images of mean (0.5, 0.5, 0.5) and deviation (0.5" in how
    for facts in ({}, {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}):
        _, how = pretrained_model(pretrained.Weights(state, facts), {"name": "sn"}, 10, **SMALL)
        assert "note" not in how


# --- train_imagenet.py

TINY = (
    *("model=resnet8", "model.width=8", "device=cpu", "setting=8x2", "schedule.epochs=1"),
    *("data.train_images=32", "evaluation.batch_average.batch_size=8"),
)


def test_fine_tuning_a_finished_run(tmp_path, no_git, capsys, monkeypatch):
    """BN's own checkpoint to SN: record, line at the start, resumption with other weights."""
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *_: None)
    monkeypatch.setattr(record, "importance_figure", lambda averages: None)
    train_imagenet.train(config(*TINY, "norm=bn", f"output_dir={tmp_path}/bn"))
    path = tmp_path / "bn" / "checkpoint.pt"
    options = (*TINY, "norm=sn", "init=checkpoint", "init.gate_start=2", f"output_dir={tmp_path}/s")
    capsys.readouterr()
    summary = train_imagenet.train(config(*options, f"init.path={path}"))
    said = capsys.readouterr().out
    assert f"starts from {path}: 7 batch norms became sn" in said and "head fc kept" in said
    assert summary["init"]["name"] == "checkpoint" and len(summary["init"]["sha256"]) == 64
    recorded = (tmp_path / "s" / "config.yaml").read_text()
    assert "gate_start: 2.0" in recorded and "path" not in recorded
    first = json.loads((tmp_path / "s" / "importance.jsonl").read_text().splitlines()[0])
    assert first["layers"]["bn1"]["mean"]["bn"] == pytest.approx(0.787, abs=1e-3)
    assert "init:" not in (tmp_path / "bn" / "config.yaml").read_text()  # as before there was one

    torch.save(network("bn").state_dict(), tmp_path / "other.pt")
    (tmp_path / "s" / "summary.json").unlink()
    with pytest.raises(ValueError, match="trained with other init: .*sha256"):
        train_imagenet.train(config(*options, f"init.path={tmp_path}/other.pt"))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["init=checkpoint"], "init.path is not set"),
        (["init=checkpoint", "init.path=/no/such.pt"], "no file /no/such.pt"),
        (["init.path=x.pt"], "init.path=x.pt needs init=checkpoint, not scratch"),
        (["init.name=imagenet"], "init.name=imagenet; expected one of scratch, checkpoint"),
        (["init.gate_start=5"], "it is of a converted network"),
        (["norm=frozen_bn"], "norm=frozen_bn would stay the identity"),
        (["init=torchvision"], "init=torchvision has no weights of resnet8: "),
        (["data.classes=[1,2]"], "data.classes"),
    ],
)
def test_refused_before_anything_is_written(overrides, words, tmp_path, no_git):
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=words):
        train_imagenet.train(config(*TINY, *overrides, f"output_dir={out}"))
    assert not (out / "config.yaml").exists()

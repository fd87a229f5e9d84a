"""Detectors equal torchvision's own with the same weights; parts, freezing, pretraining, groups."""

import re

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.roi_heads import paste_masks_in_image
from workers import slow_but

import sn
from sn.training.classification.models import build_model
from sn.training.classification.pretrained import network_facts, pretrained_weights
from sn.training.detection import detectors
from sn.training.detection.detectors import build_detector

SMALL = {  # a detector that a core can run
    "backbone": "resnet18",
    "fpn_channels": 16,
    "box_features": 32,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "rois_per_image": 8,
    "proposals_train": 20,
    "proposals_test": 10,
    "min_size": 64,
    "max_size": 96,
    "zero_init_residual": False,
}


MLP = {"box_head": "mlp"}


def norms(backbone="bn", fpn=None, box_head=None, mask_head=None):
    names = {"backbone": backbone, "fpn": fpn, "box_head": box_head, "mask_head": mask_head}
    return {part: None if name is None else sn.make_norm(name) for part, name in names.items()}


def images_and_targets(sizes=((64, 80), (72, 64)), masks=True):
    generator = torch.Generator().manual_seed(1)
    images, targets = [], []
    for height, width in sizes:
        images.append(torch.rand(3, height, width, generator=generator))
        boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 30.0]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
        if masks:
            grid = torch.zeros(2, height, width, dtype=torch.uint8)
            grid[0, 6:50, 4:40] = 1
            grid[1, 10:30, 20:60] = 1
            target["masks"] = grid
        targets.append(target)
    return images, targets


PEERS = {  # torchvision's builder -> our arguments for the same model
    fasterrcnn_resnet50_fpn: ("faster_rcnn_fpn", norms("bn"), {"box_head": "mlp"}),
    fasterrcnn_resnet50_fpn_v2: ("faster_rcnn_fpn", norms("bn", "bn", "bn"), {"rpn_convs": 2}),
    maskrcnn_resnet50_fpn: ("mask_rcnn_fpn", norms("bn"), {"box_head": "mlp"}),
    maskrcnn_resnet50_fpn_v2: ("mask_rcnn_fpn", norms("bn", "bn", "bn", "bn"), {"rpn_convs": 2}),
}


@pytest.mark.parametrize("builder", slow_but({0, 3}, PEERS), ids=lambda builder: builder.__name__)
def test_equals_torchvisions_builder(builder):
    """The same names, shapes and counts; with the same weights, the same losses and detections."""
    architecture, parts, options = PEERS[builder]
    torch.manual_seed(0)
    theirs = builder(
        weights=None,
        weights_backbone=None,
        num_classes=6,
        trainable_backbone_layers=5,
        min_size=64,
        max_size=96,
        rpn_pre_nms_top_n_train=30,
        rpn_pre_nms_top_n_test=6,
        rpn_post_nms_top_n_train=30,
        rpn_post_nms_top_n_test=6,
        box_batch_size_per_image=4,
        _skip_resize=True,
    )
    ours = build_detector(
        architecture,
        5,
        parts,
        proposals_train=30,
        proposals_test=6,
        rois_per_image=4,
        min_size=64,
        max_size=96,
        **options,
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    ours.load_state_dict(theirs.state_dict())
    images, targets = images_and_targets(masks="mask" in architecture)
    for model in (ours, theirs):
        torch.manual_seed(5)
        model.losses = model.train()(images, targets)
        with torch.no_grad():
            model.detections = model.eval()(images)
    assert ours.losses.keys() == theirs.losses.keys()
    for key, loss in theirs.losses.items():
        torch.testing.assert_close(ours.losses[key], loss, rtol=1e-5, atol=1e-5, msg=key)
    for image, mine, other in zip(images, ours.detections, theirs.detections):
        if "masks" in mine:
            mine["masks"] = paste_masks_in_image(mine["masks"], mine["boxes"], image.shape[-2:])
        assert mine.keys() == other.keys() and len(other["boxes"]) > 0
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_frozen_bn_equals_torchvisions():
    """The backbone of torchvision's pretrained detectors, with random statistics in it."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    for buffer in theirs.buffers():
        buffer.uniform_(0.5, 1.5)
    weights = {k: v.clone() for k, v in theirs.state_dict().items()}
    ours = build_detector(
        "faster_rcnn_fpn", 5, norms("frozen_bn"), weights=weights, **SMALL | {"box_head": "mlp"}
    )
    x = torch.randn(2, 3, 64, 64)
    stages = nn.Sequential(theirs.conv1, theirs.bn1, theirs.relu, theirs.maxpool, theirs.layer1)
    torch.testing.assert_close(detectors.body(ours)(x)["0"], stages(x))


def test_c4_is_the_resnet_cut_before_its_last_stage():
    """conv1 to conv4 give the features, conv5 (with the head's norm) the RoIs' 2048 numbers."""
    torch.manual_seed(0)
    classifier = torchvision.models.resnet50(norm_layer=sn.make_norm("sn")).eval()
    model = build_detector(
        "faster_rcnn_c4",
        80,
        norms("sn", box_head="sn"),
        weights=classifier.state_dict(),
        anchor_sizes=(16, 32),
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    features = model.backbone(x)["0"]
    assert features.shape == (1, 1024, 4, 4)
    whole = classifier.avgpool(classifier.layer4(features)).flatten(1)
    torch.testing.assert_close(model.roi_heads.box_head(features), whole)
    assert model.roi_heads.box_predictor.cls_score.in_features == 2048
    assert model.roi_heads.box_roi_pool.output_size == (14, 14)
    counts = {name: p.numel() for name, p in classifier.named_parameters() if "fc" not in name}
    ours = sum(
        p.numel() for p in [*model.backbone.parameters(), *model.roi_heads.box_head.parameters()]
    )
    assert ours == sum(counts.values())


@pytest.mark.parametrize(
    "architecture, options",
    [
        ("faster_rcnn_c4", {"anchor_sizes": (16, 32)}),
        ("faster_rcnn_fpn", {}),
        ("mask_rcnn_fpn", {}),
    ],
)
def test_one_step_trains_every_parameter(architecture, options):
    parts = {
        part: sn.make_norm("sn") if part in detectors.ARCHITECTURES[architecture] else None
        for part in detectors.PARTS
    }
    torch.manual_seed(0)
    model = build_detector(architecture, 5, parts, **SMALL | options)
    losses = model(*images_and_targets())
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert not idle
    assert ("loss_mask" in losses) == (architecture == "mask_rcnn_fpn")


@pytest.mark.parametrize("name", ["in", "bn", "gn", "sn", "sn_in_ln", "none"])
def test_heads_take_no_rois(name):
    """As in evaluation when nothing is found, and in training on images without objects."""
    model = build_detector("mask_rcnn_fpn", 5, norms(name), **SMALL)
    head = model.roi_heads.mask_head
    for mode in (True, False):
        y = head.train(mode)(torch.zeros(0, SMALL["fpn_channels"], 14, 14))
        assert y.shape == (0, SMALL["fpn_channels"], 14, 14)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_instance_norm_of_rois_is_torchs():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5)
    ours, torchs = detectors.RoIInstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4, affine=True)
    assert torch.equal(ours(x), torchs(x))


def norm_classes(module):
    return {type(layer) for layer in module.modules() if detectors.is_norm(layer)}


def test_each_part_has_its_own_norm():
    model = build_detector("mask_rcnn_fpn", 5, norms("gn", "sn", "in", "ln"), **SMALL)
    assert norm_classes(model.backbone.body) == {sn.AutoGroupNorm}
    assert norm_classes(model.backbone.fpn) == {sn.SwitchNorm2d}
    assert norm_classes(model.roi_heads.box_head) == {detectors.RoIInstanceNorm2d}
    assert norm_classes(model.roi_heads.mask_head) == {sn.AutoGroupNorm}
    assert all(
        m.num_groups == 1 for m in model.roi_heads.mask_head.modules() if detectors.is_norm(m)
    )
    assert not norm_classes(model.rpn) and not norm_classes(model.roi_heads.mask_predictor)
    for module, count in ((model.backbone.fpn, 8), (model.roi_heads.box_head, 4)):
        assert sum(detectors.is_norm(layer) for layer in module.modules()) == count
    without = build_detector("mask_rcnn_fpn", 5, norms("gn"), **SMALL)
    assert not norm_classes(without.backbone.fpn) | norm_classes(without.roi_heads)
    assert without.backbone.fpn.inner_blocks[0][0].bias is not None  # as torchvision without norm


@pytest.mark.parametrize("name", [name for name in sn.norms.NORMS if name != "none"])
def test_every_norm_is_known_as_one(name):
    """Its gain has no weight decay, and the table names it."""
    assert detectors.is_norm(sn.make_norm(name)(8))
    assert not detectors.is_norm(sn.make_norm("none")(8)) and not detectors.is_norm(
        nn.Conv2d(1, 1, 1)
    )


def test_frozen_stages_stay_frozen_recursively():
    """Training mode never reaches the norms inside, and their statistics do not move."""
    torch.manual_seed(0)
    model = build_detector("faster_rcnn_fpn", 5, norms("sn", "sn", "sn"), freeze_at=2, **SMALL)
    model.eval()
    model.train()
    body = model.backbone.body
    for stage in (body.conv1, body.bn1, body.layer1):
        assert not any(layer.training for layer in stage.modules())
        assert not any(p.requires_grad for p in stage.parameters())
    for stage in (body.layer2, body.layer3, body.layer4, model.backbone.fpn):
        assert all(layer.training for layer in stage.modules())
        assert all(p.requires_grad for p in stage.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sum(model(*images_and_targets(masks=False)).values()).backward()
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert moved and not [
        k for k in moved if k.startswith(("backbone.body.bn1", "backbone.body.layer1"))
    ]
    assert any(k.startswith("backbone.body.layer2") for k in moved)


def test_frozen_stages_do_not_choose():
    """The radius of sparse layers changes their outputs: it stays in frozen stages."""
    model = build_detector("faster_rcnn_fpn", 5, norms("ssn"), freeze_at=2, **SMALL | MLP)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sn.begin_step(model.train(), 0.9)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    stages = {key.split(".")[2] for key in moved}
    assert stages == {"layer2", "layer3", "layer4"} and all("radius" in key for key in moved)


def test_parts_table_says_what_is_frozen():
    with torch.device("meta"):
        model = build_detector("mask_rcnn_fpn", 80, norms("sn", "gn", "gn", "gn"), freeze_at=2)
    lines = {line.split()[0]: line for line in detectors.parts_table(model).splitlines()}
    assert list(lines) == [
        *("part", "backbone.stem", "backbone.layer1", "backbone.layer2", "backbone.layer3"),
        *("backbone.layer4", "fpn", "rpn", "box_head", "box_predictor", "mask_head"),
        "mask_predictor",
    ]
    assert "0 of 215,868" in lines["backbone.layer1"] and lines["backbone.layer1"].endswith("eval")
    assert "10 SwitchNorm2d" in lines["backbone.layer1"]
    assert lines["backbone.layer2"].endswith("train") and "all" in lines["backbone.layer2"]
    assert "8 AutoGroupNorm" in lines["fpn"] and "none" in lines["rpn"]
    assert model.training


def test_blocks_of_layers():
    with torch.device("meta"):
        model = build_detector("mask_rcnn_fpn", 80, norms("sn", "sn", "sn", "sn"))
    blocks = detectors.layer_blocks(model)
    layers = list(sn.importance_weights(model.to_empty(device="cpu")))
    assert len(layers) == 53 + 8 + 4 + 4
    assert {blocks[layer] for layer in layers} == {
        *(f"backbone.{stage}" for stage in detectors.STAGES),
        *("fpn", "box_head", "mask_head"),
    }


# --- pretraining


@pytest.mark.parametrize(
    "norm, name, width", [("bn", "resnet18", None), ("gn", "resnet10", 16), ("sn", "resnet10", 16)]
)
def test_weights_of_a_classifier(norm, name, width, tmp_path):
    """A train_imagenet.py checkpoint: everything but fc arrives."""
    source = "thin" if width else "torchvision"
    classifier = build_model(name, source, 10, sn.make_norm(norm), width=width)
    for tensor in classifier.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    torch.save({"model": classifier.state_dict(), "progress": {"epoch": 3}}, tmp_path / "c.pt")
    weights = pretrained_weights("checkpoint", name, str(tmp_path / "c.pt"))
    options = SMALL | {"box_head": "mlp", "backbone": name, "backbone_width": width}
    model = build_detector("faster_rcnn_fpn", 5, norms(norm), weights=weights, **options)
    body = model.backbone.body.state_dict()
    expected = {k: v for k, v in classifier.state_dict().items() if not k.startswith("fc")}
    assert body.keys() == expected.keys()
    assert all(torch.equal(body[key], value) for key, value in expected.items())


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sn"])
def test_counts_of_batches_may_be_missing(norm):
    """As in files from before torch 0.4.1, or of frozen layers."""
    kind = "sn" if norm == "sn" else "bn"
    weights = torchvision.models.resnet18(norm_layer=sn.make_norm(kind)).state_dict()
    weights = {k: torch.rand_like(v) for k, v in weights.items() if not k.endswith("tracked")}
    model = build_detector(
        "faster_rcnn_fpn", 5, norms(norm), weights=weights, **SMALL | {"box_head": "mlp"}
    )
    for key, value in model.backbone.body.state_dict().items():
        assert key.endswith("tracked") or torch.equal(value, weights[key]), key


@pytest.mark.parametrize(
    "norm, options",
    [
        ("bn", {"eps": 0.01}),
        ("sn", {"unbiased": True}),
        ("gn", {"num_groups": 2}),
        ("sn_gn", {"num_groups": 2}),
    ],
)
@pytest.mark.parametrize("architecture", ["faster_rcnn_fpn", "faster_rcnn_c4"])
def test_what_a_checkpoint_says_of_the_norms(norm, options, architecture, tmp_path):
    """A backbone computes as the classifier does, or is refused."""
    torch.manual_seed(0)
    kind = {"name": norm}
    if norm == "sn_gn":
        kind = {"name": "sn", "statistics": ("in", "gn", "bn"), "num_groups": 4}
    classifier = build_model("resnet10", "thin", 10, sn.make_norm(**kind | options), width=16)
    for name, tensor in classifier.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.001, 0.1)
    torch.save(
        {"model": classifier.state_dict(), "network": network_facts(classifier, 10)},
        tmp_path / "c.pt",
    )
    weights = pretrained_weights("checkpoint", "resnet10", str(tmp_path / "c.pt"))

    def body(**options):
        own = sn.make_norm(**kind | options)
        parts = dict.fromkeys(("backbone", "fpn", "box_head", "mask_head"))
        parts |= {"backbone": own} | ({"box_head": own} if "c4" in architecture else {})
        small = SMALL | {"box_head": "mlp", "backbone": "resnet10", "backbone_width": 16}
        model = build_detector(architecture, 5, parts, weights=weights, **small).eval()
        return model.backbone.body if "fpn" in architecture else model.backbone

    ((name, value),) = options.items()
    wanted = re.escape(f"++parts.backbone.{name}={str(value).lower()}")
    with pytest.raises(ValueError, match=wanted):
        body()
    x = torch.randn(2, 3, 64, 64)
    expected = classifier.eval().relu(classifier.bn1(classifier.conv1(x)))
    expected = classifier.layer3(classifier.layer2(classifier.layer1(classifier.maxpool(expected))))
    found = body(**options)(x)["2" if "fpn" in architecture else "0"]
    torch.testing.assert_close(found, expected)


def test_eps_of_a_librarys_weights(monkeypatch):
    """Those of init=torchvision are of batch norms with an eps, too."""
    theirs = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: theirs)
    weights = pretrained_weights("torchvision", "resnet18", None)
    monkeypatch.undo()
    build_detector("faster_rcnn_fpn", 5, norms("bn"), weights=weights, **SMALL | MLP)
    parts = norms() | {"backbone": sn.make_norm("bn", eps=0.01)}
    with pytest.raises(ValueError, match=re.escape("++parts.backbone.eps=1.0e-05")):
        build_detector("faster_rcnn_fpn", 5, parts, weights=weights, **SMALL | MLP)


def test_control_parameters_of_other_statistics(tmp_path):
    """Of as many and of the same shape: the file says which they are."""
    theirs = sn.make_norm("sn", statistics=("in", "ln"))
    ours = sn.make_norm("sn", statistics=("ln", "gn"), num_groups=4)
    torch.save(torchvision.models.resnet18(norm_layer=theirs).state_dict(), tmp_path / "w.pth")
    weights = pretrained_weights("checkpoint", "resnet18", str(tmp_path / "w.pth"))
    parts = norms() | {"backbone": ours}
    with pytest.raises(ValueError, match=r"bn1.mean_weight .* \('in', 'ln'\), .* 19 more"):
        build_detector("faster_rcnn_fpn", 5, parts, weights=weights, **SMALL | {"box_head": "mlp"})


def test_timms_resnet_has_the_same_names():
    import timm

    weights = timm.create_model("resnet18", pretrained=False).state_dict()
    model = build_detector(
        "faster_rcnn_c4", 5, norms("frozen_bn", box_head="frozen_bn"), weights=weights, **SMALL
    )
    assert torch.equal(model.backbone.conv1.weight, weights["conv1.weight"])
    conv5 = model.roi_heads.box_head.layer4[1].conv2.weight
    assert torch.equal(conv5, weights["layer4.1.conv2.weight"])


@pytest.mark.parametrize(
    "theirs, ours, words",
    [
        ("bn", "gn", ["unexpected", "bn1.running_mean"]),
        ("gn", "bn", ["missing", "bn1.running_mean"]),
        ("bn", "sn", ["missing", "bn1.mean_weight"]),
        ("sn", "sn_in_ln", ["another shape", "bn1.mean_weight (3,) instead of (2,)"]),
        ("gn", "frozen_bn", ["missing", "bn1.running_mean"]),
    ],
)
def test_mismatch_lists_the_keys(theirs, ours, words):
    weights = torchvision.models.resnet18(norm_layer=sn.make_norm(theirs)).state_dict()
    with pytest.raises(ValueError, match="do not fit") as error:
        build_detector(
            "faster_rcnn_fpn", 5, norms(ours), weights=weights, **SMALL | {"box_head": "mlp"}
        )
    for word in words:
        assert word in str(error.value)


def test_weights_of_another_network():
    weights = torchvision.models.resnet34().state_dict()
    with pytest.raises(ValueError, match="unexpected: layer1.2.bn1.bias"):
        build_detector(
            "faster_rcnn_fpn", 5, norms(), weights=weights, **SMALL | {"box_head": "mlp"}
        )


def test_unreadable_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        pretrained_weights("checkpoint", "resnet18", str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="needs init.path"):
        pretrained_weights("checkpoint", "resnet18", None)
    with pytest.raises(ValueError, match="needs init=checkpoint"):
        pretrained_weights("scratch", "resnet18", "x.pt")
    with pytest.raises(ValueError, match="imagenet1k"):
        pretrained_weights("imagenet1k", "resnet18", None)
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="text.pt"):
        pretrained_weights("checkpoint", "resnet18", str(tmp_path / "text.pt"))
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="init.path: .*other.pt holds no state"):
        pretrained_weights("checkpoint", "resnet18", str(tmp_path / "other.pt"))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."]
)
def test_weights_of_a_wrapped_network(prefix, tmp_path):
    weights = {"conv1.weight": torch.ones(2), "layer1.0.bn1.bias": torch.zeros(3)}
    torch.save({"model": {prefix + k: v for k, v in weights.items()}}, tmp_path / "w.pt")
    found = pretrained_weights("checkpoint", "resnet18", str(tmp_path / "w.pt"))
    assert found.keys() == weights.keys()


NAMES = {"backbone": "sn", "fpn": "sn", "box_head": "sn", "mask_head": "none"}


def test_random_layers_are_never_frozen():
    detectors.check_frozen("faster_rcnn_fpn", NAMES, "checkpoint", 2)
    detectors.check_frozen("faster_rcnn_fpn", NAMES, "scratch", 0)
    with pytest.raises(ValueError, match="random layers frozen"):
        detectors.check_frozen("faster_rcnn_fpn", NAMES, "scratch", 2)
    frozen = NAMES | {"backbone": "frozen_bn"}
    detectors.check_frozen("faster_rcnn_fpn", frozen, "torchvision", 2)
    with pytest.raises(ValueError, match="parts.backbone=frozen_bn"):
        detectors.check_frozen("faster_rcnn_fpn", frozen, "scratch", 0)
    head = NAMES | {"box_head": "frozen_bn"}
    with pytest.raises(ValueError, match="parts.box_head=frozen_bn"):
        detectors.check_frozen("faster_rcnn_fpn", head, "checkpoint", 0)
    detectors.check_frozen("faster_rcnn_c4", head, "checkpoint", 0)  # conv5 is pretrained


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architecture": "yolo"}, "architecture='yolo'.*mask_rcnn_fpn"),
        ({"architecture": "faster_rcnn_c4"}, "no fpn; use norm@parts.fpn=none"),
        ({"box_head": "mlp"}, "mlp has no norm"),
        ({"box_head": "fc"}, "'fc'; choose mlp or conv"),
        ({"freeze_at": 6}, "freeze_at=6; expected 0 to 5"),
        ({"backbone": "vgg16"}, "vgg16"),
        ({"backbone": "resnet5000"}, "resnet5000"),
        ({"backbone": "mobilenet_v2"}, "not a torchvision ResNet"),
        ({"anchor_sizes": (8, 16)}, r"anchor_sizes=\[8, 16\]"),
    ],
    ids=str,
)
def test_impossible_choices(change, words):
    options = SMALL | {"architecture": "faster_rcnn_fpn", "norms": norms("sn", "sn", "sn")}
    with pytest.raises(ValueError, match=words):
        build_detector(num_classes=5, **options | change)


# --- the optimizer's groups


def test_optimizer_groups():
    """Every trained parameter once; the official detection code's rules."""
    model = build_detector("faster_rcnn_fpn", 5, norms("sn", "gn", "sn"), freeze_at=1, **SMALL)
    groups = detectors.optimizer_groups(model, 0.02, 1e-4)
    names = {id(p): name for name, p in model.named_parameters()}
    members = [{names[id(p)] for p in group["params"]} for group in groups]
    assert sum(map(len, members)) == len(set().union(*members))
    assert set().union(*members) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert [group["weight_decay"] for group in groups] == [1e-4, 0, 0, 0]
    assert [group["lr"] for group in groups] == [0.02, 0.02, 0.04, 0.02]
    weights, gains, biases, gates = members
    assert (
        "backbone.body.layer1.0.conv1.weight" in weights and "rpn.head.cls_logits.weight" in weights
    )
    assert (
        "backbone.body.layer1.0.bn1.weight" in gains
        and "backbone.fpn.inner_blocks.0.1.weight" in gains
    )
    assert "backbone.body.layer1.0.bn1.bias" in biases and "rpn.head.cls_logits.bias" in biases
    assert gates == {
        n
        for n in names.values()
        if n.endswith(("mean_weight", "var_weight")) and "body.bn1" not in n
    }
    plain = detectors.optimizer_groups(model, 0.01, 1e-4, 1e-4, 1e-4, 1.0, 1e-4)
    assert {(g["lr"], g["weight_decay"]) for g in plain} == {(0.01, 1e-4)}


# --- masks


def test_masks_of_an_image_are_torchvisions():
    """Pasted one at a time, of boxes within the image and at its borders: equal bit for bit."""
    torch.manual_seed(0)
    corners = torch.rand(40, 2) * torch.tensor([90.0, 60.0]) - 10
    boxes = torch.cat([corners, corners + 1 + 50 * torch.rand(40, 2)], 1)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([83, 57, 83, 57]))
    found = {"boxes": boxes, "masks": torch.rand(40, 1, 28, 28)}
    expected = paste_masks_in_image(found["masks"], boxes, (57, 83))[:, 0] > 0.5
    masks = list(detectors.image_masks(found, 57, 83))
    assert torch.equal(torch.from_numpy(np.stack(masks)), expected.to(torch.uint8))
    assert list(detectors.image_masks({"boxes": boxes}, 57, 83)) == []


def test_detections_do_not_hold_masks_of_the_image():
    """Their size does not depend on the image's, whether the model resizes it or not."""
    model = tiny("mask_rcnn_fpn").eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 300, 400)])
    assert found["boxes"].max() > 100 and len(found["boxes"]) > 0  # in the image's pixels
    assert found["masks"].shape == (len(found["boxes"]), 1, 28, 28)


# --- half precision


HALF = {"backbone": "resnet10", "backbone_width": 8, "fpn_channels": 8, "box_features": 8}


def tiny(architecture, num_classes=5, **options):
    parts = {part: "gn" if part in detectors.ARCHITECTURES[architecture] else None
             for part in detectors.PARTS}  # fmt: skip
    torch.manual_seed(0)
    return build_detector(architecture, num_classes, norms(**parts), **SMALL | HALF | options)


def decoded(deltas, boxes, weights):
    """Boxes (N, 4) that `deltas` make of `boxes`, in float64. Source: Faster R-CNN, equation 2."""
    deltas, boxes = deltas.double() / torch.tensor(weights, dtype=torch.float64), boxes.double()
    size, middle = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    middle, size = middle + deltas[:, :2] * size, size * deltas[:, 2:].exp()
    return torch.cat([middle - size / 2, middle + size / 2], 1)


@pytest.mark.parametrize("architecture", detectors.ARCHITECTURES)
def test_boxes_and_targets_are_not_in_half_precision(architecture, monkeypatch):
    """On a wide image, where bfloat16 has steps of 8 pixels; the networks run in it nonetheless."""
    model = tiny(architecture, anchor_sizes=(32, 64, 96, 128, 160))
    corners = torch.rand(12, 2) * torch.tensor([1800.0, 20.0])
    boxes = torch.cat([corners, corners + 11 + 30 * torch.rand(12, 2)], 1)
    target = {"boxes": boxes, "labels": torch.arange(12) % 5 + 1}
    target["masks"] = torch.ones(12, 64, 1856, dtype=torch.uint8)
    seen, encoded = {}, []
    model.rpn.anchor_generator.register_forward_hook(lambda _, i, out: seen.update(anchors=out[0]))
    model.rpn.head.register_forward_hook(lambda _, i, out: seen.update(rpn=out))
    model.rpn.register_forward_hook(lambda _, i, out: seen.update(proposals=out[0][0]))
    model.backbone.register_forward_hook(lambda _, i, out: seen.update(features=out))
    for coder in (model.rpn.box_coder, model.roi_heads.box_coder):

        def encode(references, proposals, coder=coder, encode=coder.encode):
            found = encode(references, proposals)
            encoded.append((references[0], proposals[0], found[0], coder.weights))
            return found

        monkeypatch.setattr(coder, "encode", encode)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, 64, 1856)], [target])
        assert model.rpn.head.cls_logits(seen["features"]["0"]).dtype == torch.bfloat16
    assert {loss.dtype for loss in losses.values()} == {torch.float32}

    anchors = seen["anchors"]
    centres = (anchors[:, 0].double() + anchors[:, 2].double()) / 2
    assert anchors.dtype == torch.float32 and centres.max() > 1800
    assert (centres % 4 == 0).all()  # all strides are multiples of 4
    deltas = [  # (1, 4 A, H, W) to (H W A, 4), the order of anchors
        level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4)
        for level in seen["rpn"][1]
    ]
    expected = decoded(torch.cat(deltas), anchors, (1, 1, 1, 1))
    limits = torch.tensor([1856, 64, 1856, 64])
    expected = expected.clamp(min=0).minimum(limits)
    nearest = torch.cdist(seen["proposals"].double(), expected, p=float("inf")).min(1).values
    assert seen["proposals"].dtype == torch.float32 and nearest.max() < 1e-3

    assert len(encoded) == 2
    for references, proposals, codes, weights in encoded:
        distance = torch.cdist(references.double(), boxes.double(), p=float("inf"))
        assert distance.min(1).values.max() == 0  # the objects' own boxes
        wide = proposals[:, 2:].sub(proposals[:, :2]).min(1).values > 8  # no rounding of tiny sizes
        again = decoded(codes[wide], proposals[wide], weights)
        torch.testing.assert_close(again, references[wide].double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", [5, 60, 80])
def test_nms_is_not_in_half_precision(label, dtype):
    """torchvision moves class k by k times the largest coordinate, out of what halves can tell."""
    model = tiny("faster_rcnn_fpn", 80).eval()
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.zero_()
        predictor.cls_score.bias[label] = 9
    lefts = torch.tensor([800.0, 805, 1000, 1105])  # the first two overlap by 0.9
    boxes = torch.stack([lefts, torch.full((4,), 300), lefts + 100, torch.full((4,), 400)], 1)
    features = {str(i): torch.rand(1, 8, 200 >> i, 336 >> i) for i in range(4)}
    with torch.no_grad(), torch.autocast("cpu", dtype):
        (found,), _ = model.roi_heads(features, [boxes], [(800, 1333)])
    found = {key: value[found["scores"] > 0.5] for key, value in found.items()}
    assert found["boxes"].dtype == torch.float32 and found["labels"].tolist() == [label] * 3
    kept = found["boxes"][found["boxes"][:, 0].argsort()]
    assert kept[0, 0] in (800, 805)
    torch.testing.assert_close(kept[1:], boxes[2:], rtol=0, atol=1e-3)

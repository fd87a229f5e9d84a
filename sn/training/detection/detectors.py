"""Faster and Mask R-CNN of torchvision's parts, with a norm callable for each part.

Source: section 4.2 and Tables 4.2-4.4; layout of Detectron's R50-C4 and R50-FPN models.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

import sn
from sn import NoNorm, connect_bkn, gates

from ..classification.models import build_model
from ..classification.pretrained import (
    Weights,
    differences,
    load_state,
    misfits,
    without_counts,
)
from ..run.checkpoint import metadata
from ..run.config import as_yaml

Norm = Callable[[int], nn.Module]

PARTS = ("backbone", "fpn", "box_head", "mask_head")
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
ARCHITECTURES = {  # name -> the parts it has
    "faster_rcnn_c4": ("backbone", "box_head"),
    "faster_rcnn_fpn": ("backbone", "fpn", "box_head"),
    "mask_rcnn_fpn": PARTS,
}
WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class _FrozenStages:
    """A detector whose frozen stages never leave evaluation mode, all of their layers alike.

    Differs: the official code sets the mode of direct children only, so that the norms inside
    frozen blocks stay in training mode.
    """

    freeze_at = 0

    def train(self, mode: bool = True):
        super().train(mode)
        for module in frozen_modules(self):
            module.eval()
        return self


class _SingleOutputs:
    """A head whose outputs are float32 where autocast makes them half precision.

    Differs: torchvision computes boxes, targets and NMS in the dtype of these outputs, and in
    bfloat16 a box at 1000 pixels lies on a grid of 4.
    """

    def forward(self, x):
        found = super().forward(x)
        if isinstance(found, Tensor):
            return _single(found)
        return tuple(
            _single(part) if isinstance(part, Tensor) else [_single(level) for level in part]
            for part in found
        )


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class SingleRPNHead(_SingleOutputs, RPNHead):
    """torchvision's RPNHead: objectness and box regression of each level in float32."""


class SingleBoxPredictor(_SingleOutputs, FastRCNNPredictor):
    """torchvision's FastRCNNPredictor: class logits and box regression in float32."""


class SingleMaskPredictor(_SingleOutputs, MaskRCNNPredictor):
    """torchvision's MaskRCNNPredictor: mask logits in float32."""


class SingleAnchors(AnchorGenerator):
    """torchvision's AnchorGenerator: anchors in float32 of feature maps in half precision too."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        # only shapes of (H, W), dtype and device of the maps matter
        return super().forward(image_list, [_single(x[:0]) for x in feature_maps])


class StridedRoIAlign(MultiScaleRoIAlign):
    """torchvision's, with the stride of each level given.

    Differs: torchvision's infers the strides from the first images it meets, wrongly where these
    are small and no multiple of 32 pixels; a resumed run would infer them from others.
    """

    def __init__(self, strides: dict[str, int], output_size: int, sampling_ratio: int):
        super().__init__(list(strides), output_size, sampling_ratio)
        self.scales = [1 / stride for stride in strides.values()]
        levels = [stride.bit_length() - 1 for stride in strides.values()]
        self.map_levels = initLevelMapper(
            levels[0], levels[-1], self.canonical_scale, self.canonical_level
        )


class PartsFasterRCNN(_FrozenStages, FasterRCNN):
    """torchvision's FasterRCNN, with `freeze_at` stages fixed."""


class PartsMaskRCNN(_FrozenStages, MaskRCNN):
    """torchvision's MaskRCNN, with `freeze_at` stages fixed."""


class RoIMasksTransform(GeneralizedRCNNTransform):
    """torchvision's, but detections keep the masks (N, 1, 28, 28) of their boxes: `image_masks`.

    Differs: torchvision's pastes all of an image into one float32 (N, 1, H, W), twice in memory:
    100 detections on 12 megapixels take 9 GB.
    """

    def postprocess(self, result, image_shapes, original_image_sizes):
        masks = [found.pop("masks", None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, mask in zip(result, masks):
            if mask is not None:
                found["masks"] = mask
        return result


def image_masks(found: Mapping[str, Tensor], height: int, width: int) -> Iterator[np.ndarray]:
    """The mask of each detection of Mask R-CNN on its image, uint8 (H, W), pasted one at a time.

    found: "boxes" (N, 4) in pixels of that image and "masks" (N, 1, 28, 28); none without masks.
    """
    if "masks" in found:
        for mask, box in zip(found["masks"].cpu().split(1), found["boxes"].cpu().split(1)):
            pasted = paste_masks_in_image(mask, box, (height, width))
            yield (pasted[0, 0] > 0.5).numpy().astype(np.uint8)


class RoIInstanceNorm2d(nn.InstanceNorm2d):
    """Instance norm of any number of RoIs; torch's raises IndexError where there is none."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x):
            return super().forward(x)
        if self.weight is None:
            return x
        return x * self.weight[:, None, None] + self.bias[:, None, None]  # gradients of 0, not none


class Conv5Head(nn.Module):
    """The last stage of a ResNet on 14 x 14 features of each RoI, then the mean over space."""

    def __init__(self, layer4: nn.Module):
        super().__init__()
        self.layer4 = layer4

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(x).mean((2, 3))


def build_detector(
    architecture: str,
    num_classes: int,
    norms: Mapping[str, Norm | None],
    backbone: str = "resnet50",
    backbone_width: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
    freeze_at: int = 0,
    zero_init_residual: bool = True,
    fpn_channels: int = 256,
    box_head: str = "conv",
    box_features: int = 1024,
    rpn_convs: int = 1,
    anchor_sizes: Sequence[int] | None = None,
    rois_per_image: int = 512,
    proposals_train: int = 2000,
    proposals_test: int = 1000,
    min_size: int = 800,
    max_size: int = 1333,
) -> FasterRCNN:
    """Build a detector whose parts take their norm layers from `norms`.

    Args:
        architecture: "faster_rcnn_c4" (conv1 to conv4 as backbone, conv5 as head),
            "faster_rcnn_fpn" or "mask_rcnn_fpn".
        num_classes: without the background.
        norms: callable(num_features) -> Module for each of `PARTS`, None for no norm. In C4 the
            box head is conv5.
        backbone: a torchvision ResNet.
        backbone_width: channels of its first stage; None: torchvision's own.
        weights: what its state dict starts from, `fc` ignored; None: random weights. Of `Weights`
            (a classifier's checkpoint) the norms must compute as the classifier's.
        freeze_at: how many of stem, layer1, ..., layer4 are fixed, as in Detectron.
        fpn_channels: width of FPN, box head and mask head.
        box_head: "mlp" (two linear layers, no norm) or "conv" (four 3x3 convolutions and a linear
            layer, as in the Group Normalization paper); of FPN models.
        box_features: width of the linear layers.
        anchor_sizes: in pixels; 32 to 512 by default; C4: all on one map, FPN: one per level.
        min_size, max_size: to which the model itself resizes images in evaluation; in training
            they are expected at their final size.

    Differs: Detectron's box loss is linear from 1 on, torchvision's from 1/9.

    Raises ValueError for an unknown name, a norm for a part the model does not have, or weights
    that do not fit.
    """
    _check_choices(architecture, norms, box_head, freeze_at)
    norm = norms["backbone"] or NoNorm
    conv5_norm = norms["box_head"] if architecture == "faster_rcnn_c4" else None
    resnet = _resnet(backbone, backbone_width, norm, zero_init_residual)
    if architecture == "faster_rcnn_c4":
        conv5_norm = conv5_norm or NoNorm
        conv5 = _resnet(backbone, backbone_width, conv5_norm, zero_init_residual).layer4
        resnet.layer4 = conv5
    if weights is not None:
        load_backbone(resnet, weights)
    width = resnet.inplanes // 8  # channels of layer1's output
    options = {
        "min_size": min_size,
        "max_size": max_size,
        "rpn_pre_nms_top_n_train": proposals_train,  # of each level
        "rpn_pre_nms_top_n_test": proposals_test,
        "rpn_post_nms_top_n_train": proposals_train,
        "rpn_post_nms_top_n_test": proposals_test,
        "box_batch_size_per_image": rois_per_image,
        "_skip_resize": True,
    }
    sizes = tuple(anchor_sizes or (32, 64, 128, 256, 512))
    if architecture == "faster_rcnn_c4":
        body = IntermediateLayerGetter(resnet, {"layer3": "0"})
        body.out_channels = 4 * width
        anchors = SingleAnchors((sizes,), ((0.5, 1.0, 2.0),))
        for mode in ("train", "test"):  # 12,000 and 6,000 of the one map, as in Detectron
            options[f"rpn_pre_nms_top_n_{mode}"] *= 6
        model = PartsFasterRCNN(
            body,
            rpn_anchor_generator=anchors,
            rpn_head=SingleRPNHead(4 * width, anchors.num_anchors_per_location()[0], rpn_convs),
            box_roi_pool=StridedRoIAlign({"0": 16}, output_size=14, sampling_ratio=0),
            box_head=Conv5Head(conv5),
            box_predictor=SingleBoxPredictor(8 * width, num_classes + 1),
            **options,
        )
    else:
        levels = {f"layer{i + 1}": str(i) for i in range(4)}
        channels = [width * 2**i for i in range(4)]
        body = BackboneWithFPN(resnet, levels, channels, fpn_channels, norm_layer=norms["fpn"])
        if len(sizes) != 5:
            raise ValueError(f"anchor_sizes={list(sizes)}: FPN has 5 levels, with a size for each")
        anchors = SingleAnchors(tuple((s,) for s in sizes), ((0.5, 1.0, 2.0),) * 5)
        box = (
            TwoMLPHead(fpn_channels * 7**2, box_features)
            if box_head == "mlp"
            else FastRCNNConvFCHead(
                (fpn_channels, 7, 7), [fpn_channels] * 4, [box_features], norms["box_head"]
            )
        )
        strides = {str(i): 4 * 2**i for i in range(4)}
        options |= {
            "rpn_anchor_generator": anchors,
            "box_roi_pool": StridedRoIAlign(strides, output_size=7, sampling_ratio=2),
            "rpn_head": SingleRPNHead(fpn_channels, 3, rpn_convs),
            "box_head": box,
            "box_predictor": SingleBoxPredictor(box_features, num_classes + 1),
        }
        if architecture == "mask_rcnn_fpn":
            model = PartsMaskRCNN(
                body,
                mask_roi_pool=StridedRoIAlign(strides, output_size=14, sampling_ratio=2),
                mask_head=MaskRCNNHeads(fpn_channels, [fpn_channels] * 4, 1, norms["mask_head"]),
                mask_predictor=SingleMaskPredictor(fpn_channels, fpn_channels, num_classes + 1),
                **options,
            )
            model.transform.__class__ = RoIMasksTransform
        else:
            model = PartsFasterRCNN(body, **options)
    for layer in model.roi_heads.modules():
        if type(layer) is nn.InstanceNorm2d:
            layer.__class__ = RoIInstanceNorm2d
    freeze(model, freeze_at)
    return connect_bkn(model)


def _check_choices(architecture, norms, box_head, freeze_at) -> None:
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"unknown model.architecture={architecture!r}; choose one of {list(ARCHITECTURES)}"
        )
    if set(norms) != set(PARTS):
        raise ValueError(f"norms must name the parts {PARTS}, not {tuple(norms)}")
    if box_head not in ("mlp", "conv"):
        raise ValueError(f"unknown model.box_head={box_head!r}; choose mlp or conv")
    for part in PARTS:
        if part not in ARCHITECTURES[architecture] and norms[part] is not None:
            raise ValueError(f"{architecture} has no {part}; use norm@parts.{part}=none")
    if architecture != "faster_rcnn_c4" and box_head == "mlp" and norms["box_head"] is not None:
        raise ValueError(
            "model.box_head=mlp has no norm; use norm@parts.box_head=none or model.box_head=conv"
        )
    stages = 4 if architecture == "faster_rcnn_c4" else 5
    if not 0 <= freeze_at <= stages:
        raise ValueError(f"model.freeze_at={freeze_at}; expected 0 to {stages} for {architecture}")


def _resnet(name: str, width: int | None, norm: Norm, zero_init_residual: bool) -> nn.Module:
    source = "torchvision" if width is None else "thin"
    model = build_model(
        name, source, 1000, norm, zero_init_residual=zero_init_residual, width=width
    )
    if not isinstance(model, torchvision.models.ResNet):
        raise ValueError(f"model.backbone={name}: not a torchvision ResNet")
    return model


def load_backbone(resnet: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a classifier's state dict but for `fc`.

    Raises ValueError that lists the keys that do not fit, or says what the classifier's norms
    compute with and these do not (`Weights.facts`): an evaluation later knows only the options.
    """

    def compared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in without_counts(state).items() if not k.startswith("fc.")}

    ours = resnet.state_dict()
    if wrong := misfits(compared(ours), compared(weights)):
        raise ValueError(
            f"the pretrained weights do not fit this backbone and its norm: {'; '.join(wrong)}"
        )
    facts = weights.facts if isinstance(weights, Weights) else {}
    for name, _, option, theirs, own in differences(resnet, facts):
        raise ValueError(
            f"the pretrained network has {option}={theirs} in {name}, this backbone {own}; give "
            f"its norm that: ++parts.backbone.{option}={as_yaml(theirs)} (C4's conv5: box_head)"
        )
    theirs = {key: v for key, v in weights.items() if key in ours and not key.startswith("fc.")}
    load_state(resnet, ours | theirs, metadata(weights))


def check_frozen(architecture: str, norms: Mapping[str, str], init: str, freeze_at: int) -> None:
    """Raise ValueError for layers that would stay as random as they start.

    norms: the name of each part's norm.
    """
    if init == "scratch" and freeze_at > 0:
        raise ValueError(
            f"init=scratch with model.freeze_at={freeze_at} would leave random layers frozen; "
            "use model.freeze_at=0, or init=checkpoint init.path=..."
        )
    loaded = ("backbone", "box_head") if architecture == "faster_rcnn_c4" else ("backbone",)
    for part, norm in norms.items():
        if norm == "frozen_bn" and (init == "scratch" or part not in loaded):
            raise ValueError(
                f"norm@parts.{part}=frozen_bn would stay the identity: nothing pretrained is "
                f"loaded into {part} with init={init}; choose another norm"
            )


def body(model: FasterRCNN) -> nn.Module:
    """The ResNet stages of a detector's backbone, without FPN."""
    backbone = model.backbone
    return backbone.body if isinstance(backbone, BackboneWithFPN) else backbone


def stage_modules(model: FasterRCNN) -> dict[str, list[nn.Module]]:
    """Modules of each stage of the backbone: stem, layer1, ..."""
    children = dict(body(model).named_children())
    stages = {"stem": [children["conv1"], children["bn1"]]}
    return stages | {name: [children[name]] for name in STAGES[1:] if name in children}


def frozen_modules(model: FasterRCNN) -> list[nn.Module]:
    stages = list(stage_modules(model).values())[: model.freeze_at]
    return [module for modules in stages for module in modules]


def freeze(model: FasterRCNN, freeze_at: int) -> None:
    """Fix the first `freeze_at` of stem, layer1, ... for good: no gradients, evaluation mode.

    Nor do the choices of sparse layers move with the progress of training.
    """
    model.freeze_at = freeze_at
    for module in frozen_modules(model):
        sn.freeze(module)
    model.train(model.training)


def block_modules(model: FasterRCNN) -> dict[str, list[nn.Module]]:
    """Modules of each block, in the order of a forward pass: stages, FPN, RPN, heads."""
    blocks = {f"backbone.{name}": modules for name, modules in stage_modules(model).items()}
    if isinstance(model.backbone, BackboneWithFPN):
        blocks["fpn"] = [model.backbone.fpn]
    blocks["rpn"] = [model.rpn.head]
    for name in ("box_head", "box_predictor", "mask_head", "mask_predictor"):
        module = getattr(model.roi_heads, name)
        if module is not None:
            blocks[name] = [module]
    return blocks


def layer_blocks(model: FasterRCNN) -> dict[str, str]:
    """Block (as in `block_modules`) of every layer by its name."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks = {}
    for block, modules in block_modules(model).items():
        for module in modules:
            prefix = names[id(module)]
            for name, _ in module.named_modules():
                blocks[f"{prefix}.{name}" if name else prefix] = block
    return blocks


def parts_table(model: FasterRCNN) -> str:
    """What each block consists of, whether it trains, and its mode in training."""
    training = model.training
    model.train()
    rows = [("part", "layers", "norm", "trainable", "in training")]
    for block, modules in block_modules(model).items():
        layers = [layer for module in modules for layer in module.modules()]
        weighted = [layer for layer in layers if isinstance(layer, WEIGHTED)]
        norms = [layer for layer in layers if is_norm(layer)]
        parameters = [p for module in modules for p in module.parameters()]
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        every = sum(p.numel() for p in parameters)
        modes = {"train" if layer.training else "eval" for layer in [*weighted, *norms]}
        share = "all" if trainable == every else f"{trainable:,} of"
        rows.append(
            (block, _count(weighted), _count(norms), f"{share} {every:,}", "/".join(sorted(modes)))
        )
    model.train(training)
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer normalises: its class says norm, and it is no block with a norm inside."""
    named = "norm" in type(layer).__name__.lower()
    return named and not isinstance(layer, (NoNorm, nn.Sequential))


def _count(layers: list[nn.Module]) -> str:
    kinds = Counter(type(layer).__name__ for layer in layers)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"


def optimizer_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    norm_weight_decay: float = 0.0,
    bias_weight_decay: float = 0.0,
    bias_lr_factor: float = 2.0,
    gate_weight_decay: float = 0.0,
    gate_lr_factor: float = 1.0,
) -> list[dict]:
    """Optimizer groups of weights, gains of norms, biases (shifts included) and gates.

    The defaults are the official detection code's for SN and GN: no decay but on weights, biases at
    twice the lr. It decays BN's gains as it does weights.
    """
    gate_ids, seen = {id(gate) for gate in gates(model)}, set()
    members = {"weights": [], "norms": [], "biases": [], "gates": []}
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if id(parameter) in gate_ids:
                kind = "gates"
            elif "bias" in name:
                kind = "biases"
            else:
                kind = "norms" if is_norm(layer) else "weights"
            members[kind].append(parameter)
    rules = {
        "weights": (weight_decay, 1.0),
        "norms": (norm_weight_decay, 1.0),
        "biases": (bias_weight_decay, bias_lr_factor),
        "gates": (gate_weight_decay, gate_lr_factor),
    }
    return [
        {"params": members[kind], "lr": lr * factor, "weight_decay": decay, "lr_factor": factor}
        for kind, (decay, factor) in rules.items()
        if members[kind]
    ]

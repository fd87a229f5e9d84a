"""The config of train_detection.py: configs/detection.yaml and its groups."""

from dataclasses import dataclass
from typing import Any

import sn

from ..classification.pretrained import INITS, torchvision_weights
from ..run.config import (
    CLIP,
    LR,
    SIZE,
    RunConfig,
    Setting,
    check_norm,
    number,
    option,
    register,
    short,
    whole,
)
from .detectors import ARCHITECTURES, check_frozen

MODES = ("train", "evaluate", "predict")
FIRST_WEIGHTS = "IMAGENET1K_V1"
LENGTHS = "a list of lengths in pixels, such as [800]"


@dataclass
class Parts:
    """The norm of each part of a detector: arguments of sn.make_norm."""

    backbone: dict[str, Any] = option()
    fpn: dict[str, Any] = option()
    box_head: dict[str, Any] = option()
    mask_head: dict[str, Any] = option()


@dataclass
class Model:
    """Arguments of `build_detector`, and names."""

    name: str = option(name=True)
    architecture: str = option(choices=tuple(ARCHITECTURES))
    parts_name: str = option(name=True)
    backbone: str = option()
    backbone_width: int | None = whole(8, 4096, default=None, before=None)
    freeze_at: int = whole(0, 5)
    zero_init_residual: bool = option()
    fpn_channels: int = whole(1, SIZE)
    box_head: str = option(choices=("mlp", "conv"))
    box_features: int = whole(1, SIZE)
    rpn_convs: int = whole(1, 100)
    anchor_sizes: list[int] = whole(1, SIZE, expected=LENGTHS)
    rois_per_image: int = whole(1, SIZE)
    proposals_train: int = whole(1, SIZE)
    proposals_test: int = whole(1, SIZE)


@dataclass
class Digits:
    """Arguments of `write_digits_coco`."""

    train_images: int = whole(1)
    val_images: int = whole(1)
    size: int = whole(48, 16384)
    seed: int = whole(0, 2**32)


@dataclass
class CocoData:
    """Any COCO-format files."""

    name: str = option(name=True)
    root: str | None = option(machine=True)
    train_json: str = option()
    train_folder: str = option()
    val_json: str = option()
    val_folder: str = option()
    categories: list[str] | None = option()
    train_images: int | None = whole(1)
    val_images: int | None = whole(1)
    sizes: list[int] = whole(1, SIZE, expected=LENGTHS)
    test_size: int = whole(1, SIZE)
    max_size: int = whole(1, SIZE)
    flip: bool = option()
    aspect_grouping: bool = option()
    generate: Digits | None = option(None, before=None)
    max_bad_images: int = whole(machine=True, before=0)
    workers: int = whole(0, 1024, machine=True)

    def files(self) -> dict[str, Any]:
        """What `load_coco` takes beside masks."""
        keys = ("name", "root", "train_json", "train_folder", "val_json", "val_folder")
        keys += ("categories", "train_images", "val_images", "max_size")
        return {key: getattr(self, key) for key in keys}


@dataclass
class Schedule:
    name: str = option(name=True)
    images: int = whole(1)
    lr_per_16: float = number(0, LR)
    milestones: list[float] = number(
        0, 1, expected="a list of fractions of the run, such as [0.67,0.89]"
    )
    gamma: float = number(0, 10)
    warmup_images: int = whole()
    warmup_factor: float = number(0, 1)


@dataclass
class Init:
    """What the backbone starts from; the weights' hash stands in the summary.

    weights: which of torchvision's; null: IMAGENET1K_V1, as in torchvision's detectors and the
    recipes of the paper's time, if there are such of the backbone.
    """

    name: str = option(choices=INITS)
    path: str | None = option(machine=True)
    key: str | None = option(None, machine=True)
    weights: str | None = option(None, before=(None, "DEFAULT"))


@dataclass
class Optimizer:
    momentum: float = number(0, 1)
    weight_decay: float = number(0, LR)
    norm_weight_decay: float = number(0, LR)
    bias_weight_decay: float = number(0, LR)
    bias_lr_factor: float = number(0, LR)
    gate_weight_decay: float = number(0, LR)
    gate_lr_factor: float = number(0, LR)
    clip: float | None = number(None, CLIP, above=0)

    def groups(self) -> dict[str, float]:
        """What `optimizer_groups` takes beside the model and the lr."""
        return {k: v for k, v in vars(self).items() if k not in ("momentum", "clip")}


@dataclass
class Evaluation:
    every_images: int | None = whole(1)
    batch_size: int = whole(1, SIZE)
    pictures: int = whole(0, 10_000)
    threshold: float = number(0, 1)


@dataclass
class Checkpoint:
    path: str | None = option(machine=True)


@dataclass
class Predict:
    images: str | None = option(machine=True)
    out: str | None = option(machine=True)


@dataclass
class DetectionConfig(RunConfig):
    mode: str = option(choices=MODES, machine=True)
    parts: Parts = option(Parts)
    model: Model = option(Model)
    setting: Setting = option(Setting)
    schedule: Schedule = option(Schedule)
    init: Init = option(Init)
    data: CocoData = option(CocoData)
    optimizer: Optimizer = option(Optimizer)
    evaluation: Evaluation = option(Evaluation)
    checkpoint: Checkpoint = option(Checkpoint)
    predict: Predict = option(Predict)

    @property
    def own_parts(self) -> dict[str, dict]:
        """The norms' arguments of those parts that the detector has."""
        return {part: vars(self.parts)[part] for part in ARCHITECTURES[self.model.architecture]}

    @property
    def masks(self) -> bool:
        return "mask_head" in self.own_parts

    def detector(self) -> dict[str, Any]:
        """What `build_detector` takes, but for classes and weights; ValueError for no norm."""
        norms = {}
        for part, options in vars(self.parts).items():
            try:
                norms[part] = sn.make_norm(**options)
            except (TypeError, ValueError) as error:
                raise ValueError(f"parts.{part}: {error}") from None
            if part not in self.own_parts or options["name"] == "none":
                norms[part] = None
        model = {k: v for k, v in vars(self.model).items() if k not in ("name", "parts_name")}
        sizes = {"min_size": self.data.test_size, "max_size": self.data.max_size}
        return {"norms": norms} | model | sizes

    def check(self) -> None:
        self._choose_weights()
        for part, options in vars(self.parts).items():
            check_norm(options, f"parts.{part}")
        self.setting.check()
        self.detector()  # whether there are such norms
        for key, lengths in (
            ("data.sizes", self.data.sizes),
            ("model.anchor_sizes", self.model.anchor_sizes),
        ):
            if not lengths:
                raise ValueError(f"{key}=[]; expected {LENGTHS}")
        if "fpn" in self.own_parts and len(self.model.anchor_sizes) != 5:
            raise ValueError(
                f"model.anchor_sizes={short(self.model.anchor_sizes)}; expected five lengths, one "
                "for each level of the FPN"
            )
        if self.setting.emulation == "grouped":
            raise ValueError(
                "setting.emulation=grouped: images and RoIs of a step differ in number and size, "
                "so each virtual GPU has a forward pass of its own; use accumulated or auto"
            )
        if self.mode != "predict" and self.data.root is None:
            raise ValueError("data.root is not set; add data.root=... to the command")
        if self.mode == "train":
            norms = {part: options["name"] for part, options in self.own_parts.items()}
            architecture = self.model.architecture
            check_frozen(architecture, norms, self.init.name, self.model.freeze_at)
            for part in ("box_head", "mask_head"):
                options = self.own_parts.get(part, {})
                spans = [*options.get("r_images", [1]), *options.get("d_images", [1])]
                if options.get("name") == "brn" and any(spans):
                    raise ValueError(
                        f"parts.{part}: brn counts the RoIs of a head as images, so that its "
                        f"r_images and d_images would be reached hundreds of times too soon; use "
                        f"++parts.{part}.r_images=[0,0] ++parts.{part}.d_images=[0,0], or "
                        "another norm"
                    )
            if self.init.name == "checkpoint" and self.init.path is None:
                raise ValueError("init.path is not set; add init.path=... to the command")

    def _choose_weights(self) -> None:
        """Say which of torchvision's weights are taken, so that the record has it."""
        if self.init.name == "torchvision" and self.init.weights is None:
            if FIRST_WEIGHTS in torchvision_weights(self.model.backbone):
                self.init.weights = FIRST_WEIGHTS


register("detection", DetectionConfig)

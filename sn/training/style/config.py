"""The config of style_transfer.py: configs/style_transfer.yaml and its groups."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..run.config import (
    LOSS,
    LR,
    SIZE,
    RunConfig,
    check_norm,
    number,
    option,
    register,
    short,
    whole,
)
from .networks import INPUTS, LOSS_WEIGHTS, PARTS, RELUS, TORCHVISION_WEIGHTS
from .photos import LEAST

MODES = ("train", "stylize", "export")


@dataclass
class PhotoOptions:
    name: str = option(name=True)
    root: str | None = option(machine=True)
    image_size: int = whole(16, 4096)
    resize: int = whole(16, 16384)
    workers: int = whole(0, 1024, machine=True)
    max_bad_images: int = whole(machine=True)


@dataclass
class StyleImage:
    name: str = option(name=True)
    image: str | None = option(machine=True)
    size: int = whole(LEAST, 8192)


@dataclass
class Network:
    width: int = whole(1, 1024)
    residual_blocks: int = whole(0, 100)
    fused_activation: bool = option()


@dataclass
class Vgg:
    weights: str = option(
        machine=True, expected=f"one of {', '.join(TORCHVISION_WEIGHTS)}, random, or a file"
    )
    input: str | None = option(choices=tuple(INPUTS))


@dataclass
class Loss:
    content_layer: str = option(choices=tuple(RELUS))
    style_layers: list[str] = option(choices=tuple(RELUS))
    content_weight: float | None = number(0, LOSS)
    style_weight: float | None = number(0, LOSS)
    tv_weight: float | None = number(0, LOSS)

    def weights(self, vgg_input: str) -> dict[str, float]:
        """The weight of each part; where it is null, that of VGG's input convention."""
        given = {part: getattr(self, f"{part}_weight") for part in PARTS}
        usual = dict(zip(PARTS, LOSS_WEIGHTS[vgg_input]))
        return {part: usual[part] if given[part] is None else given[part] for part in PARTS}


@dataclass
class Schedule:
    steps: int = whole(1, machine=True)  # lr is constant: a longer run continues a shorter one
    batch_size: int = whole(1, SIZE)
    lr: float = number(None, LR, above=0)


@dataclass
class Optimizer:
    gate_lr_factor: float = number(0, LR, before=1.0)


@dataclass
class Evaluation:
    images: int = whole()


@dataclass
class Stylize:
    checkpoint: str | None = option()
    images: Any = option(expected="a file, a folder, or a list of them, or null")
    output: str | None = option()
    size: int | None = whole(1, SIZE)
    strip_pixels: float = number(1, 1e12)
    max_megapixels: float = number(0.001, 1e6)

    def paths(self) -> list[str]:
        """The images and folders as a list; a ValueError if there are none."""
        given = self.images if isinstance(self.images, list) else [self.images]
        if given in ([], [None]):
            raise ValueError("mode=stylize needs images; add stylize.images=... to the command")
        for path in given:
            if type(path) not in (str, int):  # a folder 2024 is read as a number
                raise ValueError(
                    f"stylize.images={short(path)}; expected a file, a folder, or a list of them"
                )
        return [str(path) for path in given]

    def folder(self) -> Path:
        return Path(self.output or Path(self.checkpoint).parent / "stylized")


@dataclass
class Export:
    checkpoint: str | None = option()
    output: str | None = option()

    def path(self) -> Path:
        return Path(self.output or Path(self.checkpoint).parent / "style.onnx")


@dataclass
class StyleConfig(RunConfig):
    mode: str = option(choices=MODES, machine=True)
    norm: dict[str, Any] = option()  # arguments of sn.make_norm
    model: Network = option(Network)
    photos: PhotoOptions = option(PhotoOptions)
    style: StyleImage = option(StyleImage)
    vgg: Vgg = option(Vgg)
    loss: Loss = option(Loss)
    schedule: Schedule = option(Schedule)
    optimizer: Optimizer = option(Optimizer)
    evaluation: Evaluation = option(Evaluation)
    importance_steps: int = whole(1)
    compile: bool = option(machine=True)
    stylize: Stylize = option(Stylize, machine=True)
    export: Export = option(Export, machine=True)

    def check(self) -> None:
        check_norm(self.norm)
        if self.norm["name"] == "frozen_bn":
            raise ValueError(
                "norm=frozen_bn would stay the identity: a style network starts from random "
                "weights; choose another norm"
            )
        if not self.loss.style_layers:
            raise ValueError(f"loss.style_layers=[]; expected at least one of {', '.join(RELUS)}")
        if len(set(self.loss.style_layers)) < len(self.loss.style_layers):
            raise ValueError(f"loss.style_layers={self.loss.style_layers} names one twice")
        size, resize = self.photos.image_size, self.photos.resize
        if size % 4:
            raise ValueError(f"photos.image_size={size}; expected a multiple of 4")
        if resize < size:
            raise ValueError(f"photos.resize={resize}; expected photos.image_size={size} or more")
        if self.mode != "train":
            self._needs_a_checkpoint()

    def _needs_a_checkpoint(self) -> None:
        mode, options = self.mode, self.stylize if self.mode == "stylize" else self.export
        if options.checkpoint is None:
            raise ValueError(
                f"mode={mode} needs a run's checkpoint; add {mode}.checkpoint=... to the command"
            )
        if mode == "stylize":
            self.stylize.paths()

    def style_net(self) -> dict[str, dict]:
        """What a checkpoint says of the network, for `load_style_net`."""
        return {"norm": self.norm, "model": asdict(self.model)}


register("style_transfer", StyleConfig)

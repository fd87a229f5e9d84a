"""The config of train_imagenet.py: configs/imagenet.yaml and its groups."""

from dataclasses import dataclass
from typing import Any

from ..run.config import (
    CLIP,
    LR,
    RunConfig,
    Setting,
    check_norm,
    number,
    option,
    register,
    whole,
)
from .bilevel import ORDERS
from .pretrained import INITS


@dataclass
class ImageData:
    """Options of the data sets; null where a data set does not have the option."""

    name: str = option(name=True)
    root: str | None = option(None, machine=True)
    download: bool | None = option(None, machine=True)
    train_images: int | None = whole(1)
    image_size: int | None = whole(
        1, 16384, default=None, before=lambda own: (None, 32) if own.name == "cifar10" else None
    )
    classes: list[int] | None = whole(0, 9, default=None, before=None)
    resize: int | None = whole(1, 16384, default=None, before=None)
    lighting: float | None = number(0, 100, default=None, before=None)
    color_jitter: float | None = number(0, 100, default=None, before=None)
    last_crop: str | None = option(None, choices=("center", "random"), before=None)
    max_bad_images: int | None = whole(default=None, machine=True)
    workers: int = whole(0, 1024, machine=True)

    def options(self) -> dict[str, Any]:
        """What `build_data` takes: the options that are set."""
        own = {k: v for k, v in vars(self).items() if k not in ("workers", "max_bad_images")}
        return {k: v for k, v in own.items() if v is not None}


@dataclass
class Model:
    """Arguments of `build_model`; null where they do not apply."""

    name: str = option(name=True)
    source: str = option(choices=("cifar", "thin", "torchvision", "timm"))
    dropout: float = number(0, None, below=1)
    zero_init_residual: bool = option()
    width: int | None = whole(1, 4096, default=None, before=None)
    fused_activation: bool = option(False, before=False)


@dataclass
class Init:
    """What the network starts from; the weights' hash stands in the summary."""

    name: str = option(choices=INITS, before="scratch")
    path: str | None = option(machine=True)
    key: str | None = option(None, machine=True)
    weights: str | None = option(None, before=(None, "DEFAULT"))
    gate_start: float = number(0, 100, before=0.0)


@dataclass
class Schedule:
    name: str = option(name=True)
    epochs: int = whole(1)
    lr_per_256: float = number(0, LR)
    decay: str = option(choices=("step", "cosine"))
    milestones: list[float] = number(
        0, 1, expected="a list of fractions of the run, such as [0.3,0.6,0.9]"
    )
    gamma: float = number(0, 10)
    warmup: float = number(0, 1)
    last_fraction: float = number(0, 1)


@dataclass
class Optimizer:
    momentum: float = number(0, 1)
    weight_decay: float = number(0, LR)
    gate_lr_factor: float = number(0, LR)
    gate_weight_decay: float | None = number(0, LR)
    gate_clip: float | None = number(None, CLIP, above=0, before=None)


@dataclass
class BatchAverage:
    batch_size: int = whole(1)
    batches: int = whole(1)


@dataclass
class Evaluation:
    batch_size: int = whole(1)
    batch_average: BatchAverage = option(BatchAverage)


@dataclass
class ImagenetConfig(RunConfig):
    norm: dict[str, Any] = option()  # arguments of sn.make_norm
    model: Model = option(Model)
    init: Init = option(Init)
    data: ImageData = option(ImageData)
    setting: Setting = option(Setting)
    schedule: Schedule = option(Schedule)
    optimizer: Optimizer = option(Optimizer)
    gates: str = option(choices=("joint", *ORDERS), before="joint")
    evaluation: Evaluation = option(Evaluation)
    compile: bool = option(machine=True)

    def check(self) -> None:
        check_norm(self.norm)
        self.setting.check()
        if self.init.name == "checkpoint" and self.init.path is None:
            raise ValueError("init.path is not set; add init.path=... to the command")
        if self.init.name == "scratch" and self.init.gate_start:
            raise ValueError(
                f"init.gate_start={self.init.gate_start}: it is of a converted network; use 0, "
                "or init=checkpoint init.path=..."
            )
        if self.gates != "joint" and self.precision == "fp16":
            raise ValueError(f"gates={self.gates} does not scale its losses; use precision=fp32")
        if self.gates == "bilevel" and self.precision == "bf16":
            raise ValueError(
                "gates=bilevel takes differences of nearby losses, too small for precision=bf16; "
                "use fp32, or gates=bilevel_first"
            )


register("imagenet", ImagenetConfig)

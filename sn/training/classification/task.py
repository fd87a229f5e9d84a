"""What a classification run trains, and what it says and records of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sn
from sn.batch_average import batch_statistics_layers
from sn.training.run import budget
from sn.training.run.display import counted
from sn.training.run.session import Session

from .config import ImagenetConfig
from .data import ArrayImages, BadImages, ImageData, SettingSampler
from .models import build_model
from .pretrained import pretrained_model, pretrained_weights, sha256

IMAGENET_SIZE = (1_281_167, 50_000)


@dataclass
class Task:
    """What is trained, on what: built once from the config."""

    config: ImagenetConfig
    data: ImageData
    model: nn.Module  # the plain network: saved, averaged, evaluated
    parallel: nn.Module  # the same, in DistributedDataParallel if there are several processes
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    sampler: SettingSampler
    held_out: tuple[DataLoader, SettingSampler] | None  # gates=bilevel: what these learn from
    emulation: str
    micro_batches: int
    bad_images: BadImages
    init: dict  # name and hash of the pretrained weights; empty without
    start: str  # what became of these weights

    @property
    def lr(self) -> float:
        """The schedule's largest, of all images of the setting."""
        return self.config.setting.lr(self.config.schedule.lr_per_256, 256)

    def identity(self) -> dict:
        """What the run learns from, beyond its config."""
        return {"data": self.data.describe()} | ({"init": self.init} if self.init else {})

    def needs(self, run: Session) -> budget.Need:
        """What a step needs, from a forward pass with two images per virtual GPU or fewer."""
        setting, world_size = self.config.setting, run.processes.world_size
        images = setting.total // world_size // self.micro_batches
        groups = setting.gpus // world_size if self.emulation == "grouped" else 1
        train, pixels = self.data.train, self.config.data.image_size or 224
        if isinstance(train, ArrayImages):
            pixels = train.batch([0])[0].shape[-1]
        tried = groups * min(2, images // groups)

        def forward(model: nn.Module) -> tuple[Tensor, int]:
            model.train()
            with run.autocast():
                x = run.to_device(torch.rand(tried, 3, pixels, pixels))
                labels = torch.zeros(tried, dtype=torch.long, device=x.device)
                return F.cross_entropy(model(x), labels), tried

        batch_bytes = 4 * 3 * pixels**2 * setting.total / world_size
        optimizer, loader = self.optimizer, self.loader
        return budget.estimate(
            self.model, forward, images, optimizer, loader, batch_bytes, run.device, groups
        )

    def facts(self, run: Session) -> dict:
        """The run's part of summary.json: what was trained, on what."""
        config, setting, data = self.config, self.config.setting, self.data.describe()
        complete = (data["train_images"], data["val_images"]) == IMAGENET_SIZE
        layers = sn.importance_weights(self.model).values()
        name = f"{config.data.name}_{config.model.name}"
        init = {"init": self.init} if self.init else {}
        return init | {
            "task": "imagenet",
            "run": f"imagenet/{name}/{config.run_name}/seed{config.seed}",
            "norm": config.norm["name"],
            "statistics": list(next(iter(layers))["mean"]) if layers else None,
            "setting": setting.describe(self.emulation, run.processes.world_size),
            "data": data,
            "model": config.model.name,
            "lr": self.lr,
            "scale": "full" if complete and config.schedule.epochs >= 100 else "proxy",
        }

    def announce(self, run: Session) -> None:
        """Say what is trained, and what a user might not expect of it."""
        config, setting, data = self.config, self.config.setting, self.data.describe()
        norm, parameters = config.norm["name"], sum(p.numel() for p in self.model.parameters())
        run.say(
            f"{config.run_name}: {config.model.name} with {norm}, {parameters:,} parameters; "
            f"{data['name']}, {data['train_images']:,} training and {data['val_images']:,} "
            f"validation images\n"
            f"setting ({setting.gpus},{setting.images_per_gpu}) on {run.processes.world_size} x "
            f"{run.device.type}, emulation {self.emulation}; lr {config.schedule.lr_per_256} per "
            f"256 images -> {self.lr:g}; {counted(config.schedule.epochs, 'epoch')} of "
            f"{counted(self.sampler.steps, 'step')}"
        )
        layers = sn.importance_weights(self.model).values()
        if setting.images_per_gpu == 1 and any("bn" in layer["mean"] for layer in layers):
            run.say("note: with one image per GPU bn equals in during training; the paper drops "
                    "it there (norm=sn_in_ln)")  # fmt: skip
        if self.init and not run.resumed:
            source = config.init.path or f"{config.init.name}'s {config.model.name}"
            run.say(f"starts from {source}: {self.start}")
        foreign = [
            name
            for name, layer in batch_statistics_layers(self.model).items()
            if type(layer).__module__.startswith(("torch.", "timm."))
        ]
        if foreign and norm not in ("bn", "sync_bn"):
            run.say(
                f"note: {len(foreign)} batch norm layers of the model are its own, not {norm}, "
                f"first {foreign[0]}"
            )
        others = {
            name: type(layer).__name__
            for name, layer in self.model.named_modules()
            if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) or type(layer) is nn.GroupNorm
        }
        if others:
            name, kind = next(iter(others.items()))
            run.say(
                f"note: {len(others)} layers of the model are norms of its own, which norm={norm} "
                f"does not replace, first {name}, a {kind}"
            )
        run.say_resumed(len(self.bad_images.lines()))


def starting_weights(
    config: ImagenetConfig, told: Callable[[str], object]
) -> dict[str, Tensor] | None:
    """The pretrained weights that the config asks for; None without.

    Raises ValueError or OSError, in one line, if they are not there.
    """
    init = config.init
    weights = pretrained_weights(
        init.name, config.model.name, init.path, init.key, told, init.weights
    )
    if weights is None and config.norm["name"] == "frozen_bn":
        raise ValueError(
            "norm=frozen_bn would stay the identity: with init=scratch nothing pretrained is "
            "loaded; choose another norm, or init=checkpoint init.path=..."
        )
    return weights


def starting_model(
    config: ImagenetConfig, num_classes: int, weights: dict[str, Tensor] | None
) -> tuple[nn.Module, dict, str]:
    """The classifier of a run's config; name and hash of its pretrained weights; what to say.

    The latter two are empty without such weights. The initial values depend on `config.seed`.

    Raises ValueError, in one line, for weights that do not fit.
    """
    torch.manual_seed(config.seed)
    init, options = config.init, vars(config.model) | {"num_classes": num_classes}
    if weights is None:
        return build_model(**options, norm=sn.make_norm(**config.norm)), {}, ""
    model, start = pretrained_model(weights, config.norm, gate_start=init.gate_start, **options)
    return model, {"name": init.name, "sha256": sha256(weights)}, start

"""What a style-transfer run trains, and what it says and records of it."""

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

import sn
from sn.training.run.display import counted
from sn.training.run.images import BadImages
from sn.training.run.session import Session

from .config import StyleConfig
from .networks import TORCHVISION_WEIGHTS, LossNetwork, StyleNet, load_loss_network
from .photos import Crops, Photos, load_style

PAPER_STEPS = 40_000  # Fig 5(a)


def facts_now(config: StyleConfig) -> dict[str, dict]:
    """What a summary would say of the style image and the loss network, of files that are there."""
    facts: dict[str, dict] = {}
    with suppress(OSError, ValueError):
        facts["style"] = {"sha256": load_style(config.style.image, config.style.size)[1]}
    weights = config.vgg.weights
    if weights in TORCHVISION_WEIGHTS:  # they may have to be fetched
        facts["vgg"] = {"weights": weights}
    else:
        with suppress(OSError, ValueError):
            vgg = load_loss_network(weights, config.vgg.input)
            facts["vgg"] = {"input": vgg.input, "sha256": vgg.sha256}
    return facts


@dataclass
class Task:
    """What is trained, on what: built once from the config."""

    config: StyleConfig
    photos: Photos
    crops: Crops
    bad_images: BadImages
    vgg: LossNetwork
    style_sha256: str
    style_grams: list[Tensor]  # (1, C, C) of each style layer
    weights: dict[str, float]  # of the parts of the loss
    model: StyleNet
    optimizer: torch.optim.Optimizer

    def identity(self) -> dict[str, dict]:
        """What the run learns from, beyond its config."""
        return {
            "photos": self.photos.describe(),
            "style": {"name": self.config.style.name, "sha256": self.style_sha256},
            "vgg": self.vgg.describe(),
        }

    def length(self) -> dict:
        """The steps, where a layer depends on the share of the training done (`sn.begin_step`)."""
        depends = any(hasattr(layer, "begin_step") for layer in self.model.modules())
        return {"schedule.steps": self.config.schedule.steps} if depends else {}

    def facts(self) -> dict:
        """The run's part of summary.json: what was trained, on what."""
        config, photos, style, vgg = self.config, *self.identity().values()
        full = config.photos.name == "coco" and photos["train_images"] > 80_000
        full = full and config.schedule.steps >= PAPER_STEPS and config.photos.image_size >= 256
        layers = sn.importance_weights(self.model).values()
        folder = f"{config.photos.name}_{config.style.name}_{config.photos.image_size}px"
        return {
            "task": "style_transfer",
            "run": f"style_transfer/{folder}/{config.run_name}/seed{config.seed}",
            "norm": config.norm["name"],
            "statistics": list(next(iter(layers))["mean"]) if layers else None,
            "data": photos,
            "style": style | {"size": config.style.size},
            "vgg": vgg,
            "loss_weights": self.weights,
            "image_size": config.photos.image_size,
            "batch_size": config.schedule.batch_size,
            "bad_images": len(self.bad_images.lines()),
            "lr": config.schedule.lr,
            "scale": "full" if full and vgg["weights"] != "random" else "proxy",
        }

    def announce(self, run: Session) -> None:
        """Say what is trained, and what a user might not expect of it."""
        config, schedule = self.config, self.config.schedule
        parameters = sum(p.numel() for p in self.model.parameters())
        weights = ", ".join(f"{part} {weight:g}" for part, weight in self.weights.items())
        run.say(
            f"{config.run_name}: {config.norm['name']}, {parameters:,} parameters; style "
            f"{config.style.name}, {len(self.photos.images):,} photos ({config.photos.name}), "
            f"{counted(schedule.steps, 'step')} of {counted(schedule.batch_size, 'crop')} of "
            f"{config.photos.image_size} px on {run.device.type}\n"
            f"VGG16 {self.vgg.weights} ({self.vgg.input} input); weights of the loss: {weights}"
        )
        if self.vgg.weights == "random":
            run.say(
                "note: the loss network is random, so this is no style transfer; the record says so"
            )
        if config.norm["name"] in ("bn", "sn") and schedule.batch_size == 1:
            run.say("note: with one image a step bn is in during training, but not when stylizing")
        run.say_resumed(len(self.bad_images.lines()))

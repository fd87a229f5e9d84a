"""What a detection run trains, and what it says and records of it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sn
from sn.training.run import budget
from sn.training.run.display import counted
from sn.training.run.session import Session

from . import detectors
from .config import DetectionConfig
from .data import DetectionData, GroupedSampler

COCO_IMAGES = (117_266, 5_000)  # of train2017 with objects, of val2017
SHORTEST = 700_000  # images that a full run sees at least: six epochs in Table 4.2


@dataclass
class Task:
    """What is trained, on what: built once from the config."""

    config: DetectionConfig
    data: DetectionData
    model: nn.Module  # the plain network: saved, evaluated
    parallel: nn.Module  # the same, in DistributedDataParallel if there are several processes
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    sampler: GroupedSampler
    init: dict  # name and hash of the pretrained weights
    micro_batches: int  # virtual GPUs of this process, a forward pass each

    @property
    def lr(self) -> float:
        return self.config.setting.lr(self.config.schedule.lr_per_16, 16)

    def evaluates_after(self, step: int) -> bool:
        """Whether AP is measured after `step` steps."""
        every = self.config.evaluation.every_images
        period = every and max(1, round(every / self.config.setting.total))
        return step == self.sampler.steps or bool(period and step % period == 0)

    def identity(self) -> dict:
        """What the run learns from, beyond its config."""
        return {"data": self.data.describe(), "init": self.init}

    def needs(self, run: Session) -> budget.Need:
        """What a step needs, from a forward pass of one virtual GPU with the largest images."""
        data, setting = self.config.data, self.config.setting
        short = min(max(data.sizes), data.max_size)
        shape = (3, short, min(data.max_size, short * 4 // 3))
        target = {
            "boxes": torch.tensor([[0.0, 0.0, short / 2, short / 2]]),
            "labels": torch.ones(1, dtype=torch.long),
            "masks": torch.ones((1, *shape[1:]), dtype=torch.uint8),
        }

        def forward(model: nn.Module) -> tuple[dict[str, Tensor], int]:
            images = [run.to_device(torch.rand(shape)) for _ in range(setting.images_per_gpu)]
            targets = [{key: run.to_device(value) for key, value in target.items()} for _ in images]
            with run.autocast():
                return model.train()(images, targets), len(images)

        return budget.estimate(
            self.model,
            forward,
            setting.images_per_gpu,
            self.optimizer,
            self.loader,
            batch_bytes=4 * math.prod(shape) * setting.images_per_gpu * self.micro_batches,
            device=run.device,
        )

    def facts(self, run: Session) -> dict:
        """The run's part of summary.json: what was trained, on what."""
        config, setting, data = self.config, self.config.setting, self.data.describe()
        complete = (data["train_images"], data["val_images"]) == COCO_IMAGES
        full = complete and self.sampler.steps * setting.total >= SHORTEST
        name = f"{config.data.name}_{config.model.name}"
        emulation = "accumulated" if self.micro_batches > 1 else "none"
        return {
            "task": "detection",
            "run": f"detection/{name}/{config.run_name}/seed{config.seed}",
            "parts": {part: options["name"] for part, options in config.own_parts.items()},
            "init": self.init,
            "setting": setting.describe(emulation, run.processes.world_size),
            "data": data,
            "model": config.model.name,
            "lr": self.lr,
            "schedule": config.schedule.name,
            "scale": "full" if full else "proxy",
        }

    def announce(self, run: Session) -> None:
        """Say what is trained, and what a user might not expect of it."""
        config, setting, data = self.config, self.config.setting, self.data.describe()
        parameters = sum(p.numel() for p in self.model.parameters())
        steps, per_epoch = self.sampler.steps, self.sampler.steps_per_epoch
        run.say(
            f"{config.run_name}: {config.model.name}, {parameters:,} parameters; {data['name']}, "
            f"{data['train_images']:,} training and {data['val_images']:,} validation images, "
            f"{data['classes']} classes; {'; '.join(self.data.remarks())}\n"
            f"{detectors.parts_table(self.model)}\n"
            f"setting ({setting.gpus},{setting.images_per_gpu}) on {run.processes.world_size} x "
            f"{run.device.type}, {self.micro_batches} forward passes a step; lr "
            f"{config.schedule.lr_per_16} per 16 images -> {self.lr:g}; "
            f"{counted(steps, 'step')} of {counted(setting.total, 'image')}, "
            f"{steps / per_epoch:.2f} epochs"
        )
        layers = sn.importance_weights(self.model).values()
        if setting.images_per_gpu == 1 and any("bn" in layer["mean"] for layer in layers):
            run.say("note: with one image per GPU bn equals in during training of the backbone; "
                    "the paper drops it there (sn_in_ln)")  # fmt: skip
        run.say_resumed(len(self.data.train.bad.lines()))

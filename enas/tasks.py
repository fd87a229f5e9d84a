"""What the searches and the retraining train, and what they say and record of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import sn
from sn.training.classification.data import ImageData
from sn.training.classification.evaluation import training_metrics
from sn.training.run.config import number, whole
from sn.training.run.display import counted
from sn.training.run.session import Progress, Session

from .benchmark import Table, write_cell
from .child import Child
from .config import DartsConfig, RetrainConfig, SearchConfig
from .controller import Controller, Samples
from .darts_network import CONVOLUTIONS, Supernet, derive
from .data import DeviceImages
from .space import Architecture, to_json

CIFAR10_SIZE = (45_000, 5_000)


@dataclass
class SearchProgress(Progress):
    """`step` counts the child's steps."""

    update: int = whole(default=0)  # controller updates done of the next epoch
    last: dict[str, float] = field(default_factory=dict)  # results of the last epoch done
    baseline: float = number(None, None, default=0.0)
    images_scored: int = whole(0, 2**62, default=0)  # for rewards, in all

    @property
    def done(self) -> int:
        return self.step + self.update

    def begin_epoch(self) -> None:
        super().begin_epoch()
        self.update = 0


@dataclass
class SearchTask:
    """What is searched, on what: built once from the config."""

    config: SearchConfig
    data: ImageData
    train: DeviceImages
    held_out: DeviceImages
    child: Child
    child_optimizer: torch.optim.Optimizer
    sampler: Callable[[int], Samples]  # draws architectures
    controller: Controller | None  # the sampler, if it learns
    controller_optimizer: torch.optim.Optimizer | None
    steps: int  # child steps per epoch

    def parts(self) -> dict:
        """What a checkpoint holds."""
        parts = {"child": self.child, "child_optimizer": self.child_optimizer}
        if self.controller is not None:
            parts["controller"] = self.controller
            parts["controller_optimizer"] = self.controller_optimizer
        return parts

    def facts(self, run: Session) -> dict:
        """The run's part of summary.json: what was searched, how far, on what."""
        config, data, progress = self.config, self.data.describe(), run.progress
        sizes = (data["train_images"], data["val_images"])
        child = (config.child.layers, config.child.filters, config.child.nodes)
        full = sizes == CIFAR10_SIZE and config.epochs >= 150 and child == (6, 20, 5)
        full = full and (config.controller.updates >= 300 or config.sampler == "random")
        model = f"{config.child.layers}x{config.child.filters}_{config.child.nodes}nodes"
        return {
            "task": "enas",
            "run": f"enas/{data['name']}_{model}/{config.run_name}/seed{config.seed}",
            "sampler": config.sampler,
            "norm": config.controller.norm if self.controller is not None else None,
            "data": data,
            "model": model,
            "child_steps": progress.epoch * self.steps,
            "controller_updates": progress.epoch * config.controller.updates,
            "images_scored": progress.images_scored,
            "scale": "full" if full else "proxy",
        }

    def epoch_metrics(self, run: Session) -> dict:
        """The epoch's means over its child steps and controller updates."""
        progress, updates = run.progress, self.config.controller.updates
        sums, means = progress.sums, ("accuracy", "reward", "entropy", "log_prob")
        made = sums.get("updates_made", updates)  # older checkpoints do not say
        return {
            **training_metrics(run, self.steps, self.child_optimizer.param_groups[0]["lr"]),
            "controller/baseline": progress.baseline,
            **{f"controller/{name}": sums[name] / updates for name in means},
            "controller/gradient_norm": sums.get("gradient_norm", 0.0) / max(made, 1),
        }

    def announce(self, run: Session) -> None:
        """Say what is trained."""
        config, data = self.config, self.data.describe()
        random, updates = self.controller is None, config.controller.updates
        modules: list = [self.child] if random else [self.child, self.controller]
        sizes = [f"{sum(p.numel() for p in module.parameters()):,}" for module in modules]
        run.say(
            f"{config.run_name}: child of {sizes[0]} shared parameters, "
            f"{'no controller' if random else f'controller of {sizes[1]}'}; {data['name']}, "
            f"{data['train_images']:,} training and {data['val_images']:,} held-out images\n"
            f"{counted(config.epochs, 'epoch')} of {counted(self.steps, 'child step')} and "
            f"{counted(updates, 'scored architecture' if random else 'controller update')}"
        )
        if run.resumed:
            progress = run.progress
            run.say(
                f"resuming after {counted(progress.epoch, 'epoch')}, "
                f"{counted(progress.step, 'child step')} and {counted(progress.update, 'update')}"
            )


@dataclass
class RetrainTask:
    """What is trained, on what: built once from the config."""

    config: RetrainConfig
    data: ImageData
    train: DeviceImages
    val: DeviceImages
    test: DeviceImages | None
    architecture: Architecture
    model: Child
    optimizer: torch.optim.Optimizer
    steps: int

    def facts(self) -> dict:
        """The run's part of summary.json: what was trained, on what."""
        config, data = self.config, self.data.describe()
        model = f"{config.child.layers}x{config.child.filters}"
        full = data["name"] == "cifar10" and config.data.train_images is None
        full = full and config.epochs >= 630 and config.child.layers >= 15
        return {
            "task": "enas_retrain",
            "run": f"enas_retrain/{data['name']}_{model}/{config.run_name}/seed{config.seed}",
            "name": config.run_name,
            "data": data,
            "model": model,
            "architecture": to_json(self.architecture),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "scale": "full" if full else "proxy",
        }

    def announce(self, run: Session) -> None:
        """Say what is trained."""
        config, data = self.config, self.data.describe()
        parameters = sum(p.numel() for p in self.model.parameters())
        drawn = f" (arch_seed={config.arch_seed})" if config.arch == "random" else ""
        run.say(
            f"{config.run_name}: architecture {config.arch}{drawn}, {parameters:,} parameters; "
            f"{data['name']}, "
            f"{data['train_images']:,} training and {data['val_images']:,} held-out images\n"
            f"{counted(config.epochs, 'epoch')} of {counted(self.steps, 'step')}"
        )
        run.say_resumed()


@dataclass
class DartsTask:
    """What is trained, on what: built once from the config."""

    config: DartsConfig
    data: ImageData
    train: DeviceImages  # what the weights learn from
    other: DeviceImages | None  # the other half, if something is trained bilevel
    val: DeviceImages  # held out from all training
    model: Supernet
    optimizer: torch.optim.SGD
    operations_optimizer: torch.optim.Adam  # of the operations' control parameters alone
    bilevel: dict[int, list[nn.Parameter]]  # control parameters trained on the other half, by order
    table: Table | None
    steps: int

    def parts(self) -> dict:
        """What a checkpoint holds."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        return parts | {"operations_optimizer": self.operations_optimizer}

    def weights(self) -> list[nn.Parameter]:
        """What SGD trains by the loss on the images of the weights."""
        elsewhere = {id(p) for parameters in self.bilevel.values() for p in parameters}
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if id(p) not in elsewhere]

    def derived(self) -> dict:
        """The derived cell, what it is made of, and its accuracies in the table (None without one).

        Raises ValueError if the table lacks one of its operations.
        """
        cell = derive(self.model.operation_weights())
        test = val = None
        if self.table is not None:
            missing = [name for name in cell if name not in self.table.operations]
            if missing:
                known = ", ".join(self.table.operations)
                raise ValueError(
                    f"{self.config.table} has no cells with {missing[0]}, only {known}; the "
                    f"derived cell is {write_cell(list(cell))}"
                )
            places = [self.table.operations.index(name) for name in cell]
            number = sum(place * factor for place, factor in zip(places, self.table.factors))
            test, val = float(self.table.test[number]), float(self.table.val[number])
        return {
            "cell": write_cell(list(cell)),
            "cell_accuracy": test,
            "cell_val_accuracy": val,
            "convolutions": sum(operation in CONVOLUTIONS for operation in cell),
            "skip_connections": cell.count("skip_connect"),
            "operation_weights": self.model.operation_weights().tolist(),
        }

    def facts(self) -> dict:
        """The run's part of summary.json: what was trained, on what."""
        config, data, network = self.config, self.data.describe(), self.config.network
        layers = sn.importance_weights(self.model).values()
        model = f"{network.cells}x{network.channels}"
        full = data["name"] == "cifar10" and config.data.train_images is None
        full = full and config.data.image_size == 32 and config.epochs >= 50
        return {
            "task": "darts",
            "run": f"darts/{data['name']}_{model}/{config.run_name}/seed{config.seed}",
            "operations": config.operations,
            "gates": config.gates,
            "norm": config.norm["name"],
            "statistics": list(next(iter(layers))["mean"]) if layers else None,
            "data": data,
            "model": model,
            "table": None if self.table is None else self.table.describe(config.dataset),
            "scale": "full" if full and (network.cells, network.channels) == (5, 16) else "proxy",
        }

    def announce(self, run: Session) -> None:
        """Say what is trained."""
        config, data = self.config, self.data.describe()
        parameters = sum(p.numel() for p in self.model.parameters())
        other = "" if self.other is None else f", {len(self.other):,} others for what is bilevel"
        run.say(
            f"{config.run_name}: supernet of {counted(config.network.cells, 'cell')} per "
            f"stage, {parameters:,} parameters; {data['name']}, {len(self.train):,} images for the "
            f"weights{other}, {len(self.val):,} held out\n"
            f"{counted(config.epochs, 'epoch')} of {counted(self.steps, 'step')}"
        )
        if self.table is None:
            run.say("note: without table= the derived cell's accuracy stays unknown")
        run.say_resumed()

"""The configs of enas.search, enas.retrain, enas.nasbench201 and enas.darts."""

import inspect
from dataclasses import dataclass
from typing import Any

from sn.recurrent import LSTM_NORMS, LSTM_PLACES
from sn.training.classification.bilevel import ORDERS
from sn.training.classification.config import ImageData
from sn.training.run.config import (
    CLIP,
    LOSS,
    LR,
    SIZE,
    RunConfig,
    check_norm,
    number,
    option,
    register,
    whole,
)

from .benchmark import DATASETS
from .controller import Controller

LAYERS, NODES, WIDTH = 200, 20, 8192  # the most of a child, of a cell, of the LSTM's vectors


@dataclass
class ControllerKeys:
    """The LSTM and its training."""

    norm: str = option(choices=LSTM_NORMS)
    num_groups: int | None = whole(1, WIDTH)
    places: list[str] = option(choices=LSTM_PLACES)
    per_gate: bool = option()
    hidden_size: int = whole(1, WIDTH)
    init: float = number(None, 100, above=0)
    tanh_constant: float | None = number(None, 1e4, above=0)
    operation_temperature: float = number(None, 1e4, above=0)
    lr: float = number(0, LR)
    gate_lr_factor: float = number(0, LR, before=1.0)
    beta1: float = number(0, None, below=1)
    eps: float = number(None, 1, above=0)
    entropy_weight: float = number(0, LOSS)
    baseline_decay: float = number(0, None, below=1)

    def network(self, controller: type = Controller) -> dict[str, Any]:
        """The arguments of `controller` among them."""
        own = inspect.signature(controller).parameters
        return {key: value for key, value in vars(self).items() if key in own}


@dataclass
class SearchController(ControllerKeys):
    operation_bias: float = number(0, 1e4)
    updates: int = whole(1)
    batch_size: int = whole(1, SIZE)
    grad_clip: float | None = number(None, CLIP, above=0)


@dataclass
class ChildOptimizer:
    """SGD with Nesterov's momentum, the lr a cosine with restarts."""

    batch_size: int = whole(1, SIZE)
    momentum: float = number(0, 1)
    weight_decay: float = number(0, LR)
    max_lr: float = number(0, LR)
    min_lr: float = number(0, LR)
    first_period: int = whole(1)
    period_factor: int = whole(1)
    grad_clip: float | None = number(None, CLIP, above=0)


@dataclass
class FixedChild:
    """Arguments of `enas.child.Child`, but for what the architecture says."""

    layers: int = whole(1, LAYERS)
    filters: int = whole(1, SIZE)
    stem_stride: int = whole(1, SIZE)
    dropout: float = number(0, None, below=1)
    drop_path: float = number(0, None, below=1)
    aux_weight: float = number(0, LOSS)


@dataclass
class SharedChild(FixedChild):
    nodes: int = whole(1, NODES)


@dataclass
class Names:
    """The run's name for each sampler."""

    controller: str = option(name=True)
    random: str = option(name=True)


@dataclass
class CellSearchNames(Names):
    evolution: str = option(name=True)


@dataclass
class SearchEvaluation:
    batch_size: int = whole(1)
    images: int | None = whole(1)
    candidates: int = whole(1, SIZE)


@dataclass
class SearchConfig(RunConfig):
    precision: str = option(choices=("fp32", "bf16", "fp64"))
    data: ImageData = option(ImageData)
    sampler: str = option(choices=("controller", "random"))
    epochs: int = whole(1)
    controller: SearchController = option(SearchController)
    child: SharedChild = option(SharedChild)
    optimizer: ChildOptimizer = option(ChildOptimizer)
    evaluation: SearchEvaluation = option(SearchEvaluation)
    names: Names = option(Names)

    def check(self) -> None:
        _check_places(self.controller)
        _check_lrs(self.optimizer)


@dataclass
class RetrainEvaluation:
    batch_size: int = whole(1)


@dataclass
class RetrainConfig(RunConfig):
    precision: str = option(choices=("fp32", "bf16", "fp64"))
    arch: str = option()
    arch_seed: int = whole(0, 2**32)
    arch_nodes: int = whole(1, NODES)
    compile: bool = option(machine=True)
    data: ImageData = option(ImageData)
    epochs: int = whole(1)
    child: FixedChild = option(FixedChild)
    optimizer: ChildOptimizer = option(ChildOptimizer)
    evaluation: RetrainEvaluation = option(RetrainEvaluation)

    def check(self) -> None:
        _check_lrs(self.optimizer)


@dataclass
class Evolution:
    population: int = whole(1, SIZE)
    sample: int = whole(1, SIZE)


@dataclass
class CellSearchConfig(RunConfig):
    precision: str = option(choices=("fp32", "fp64"))
    device: str = option(choices=("cpu",), machine=True)
    plan: bool = option(choices=(False,), machine=True, expected="false: it takes under a minute")
    table: str = option(machine=True)  # its hash stands in the summary
    dataset: str = option(choices=tuple(DATASETS))
    sampler: str = option(choices=("controller", "random", "evolution"))
    cells: int = whole(1, 10**6)
    points: list[int] = whole(1)
    controller: ControllerKeys = option(ControllerKeys)
    evolution: Evolution = option(Evolution)
    names: CellSearchNames = option(CellSearchNames)

    def check(self) -> None:
        _check_places(self.controller)
        rising = all(a < b for a, b in zip(self.points, self.points[1:]))
        if not rising or self.points[-1:] != [self.cells]:
            raise ValueError(
                f"points={self.points}; expected rising numbers, the last one cells={self.cells}"
            )


@dataclass
class DartsNetwork:
    """Arguments of `enas.darts_network.Supernet`."""

    cells: int = whole(1, LAYERS)
    channels: int = whole(1, WIDTH)


@dataclass
class DartsOptimizer:
    """Of the weights: SGD with momentum, the lr a cosine over the epochs."""

    batch_size: int = whole(1, SIZE)
    momentum: float = number(0, 1)
    weight_decay: float = number(0, LR)
    max_lr: float = number(0, LR)
    min_lr: float = number(0, LR)
    gate_lr_factor: float = number(0, LR)
    grad_clip: float | None = number(None, CLIP, above=0)


@dataclass
class OperationsOptimizer:
    """Of the operations' control parameters: Adam."""

    lr: float = number(0, LR)
    beta1: float = number(0, None, below=1)
    beta2: float = number(0, None, below=1)
    weight_decay: float = number(0, LR)


@dataclass
class DartsConfig(RunConfig):
    precision: str = option(choices=("fp32", "bf16", "fp64"))
    norm: dict[str, Any] = option()  # arguments of sn.make_norm
    data: ImageData = option(ImageData)
    operations: str = option(choices=("joint", *ORDERS))
    gates: str = option(choices=("joint", *ORDERS))
    epochs: int = whole(1)
    network: DartsNetwork = option(DartsNetwork)
    optimizer: DartsOptimizer = option(DartsOptimizer)
    operations_optimizer: OperationsOptimizer = option(OperationsOptimizer)
    evaluation: RetrainEvaluation = option(RetrainEvaluation)
    table: str | None = option(machine=True)  # its hash stands in the summary
    dataset: str = option(choices=tuple(DATASETS))

    def check(self) -> None:
        check_norm(self.norm)
        _check_lrs(self.optimizer)
        refused = {
            "bkn": "it cannot follow the sums of operations",
            "frozen_bn": "it would stay the identity",
        }
        if why := refused.get(self.norm["name"]):
            raise ValueError(f"norm={self.norm['name']}: {why}; choose another norm")
        if "affine" in self.norm:
            raise ValueError("norm.affine: norms of the supernet have no gain and shift (affine)")
        for key in ("operations", "gates"):
            if getattr(self, key) == "bilevel" and self.precision == "bf16":
                raise ValueError(
                    f"{key}=bilevel takes differences of nearby losses, too small for "
                    f"precision=bf16; use fp32, or {key}=bilevel_first"
                )


def _check_places(controller: ControllerKeys) -> None:
    if not controller.places and controller.norm != "none":
        raise ValueError(
            f"controller.places=[] with controller.norm={controller.norm}: it would be nowhere; "
            "use controller.norm=none"
        )


def _check_lrs(optimizer: ChildOptimizer | DartsOptimizer) -> None:
    if optimizer.min_lr > optimizer.max_lr:
        raise ValueError(
            f"optimizer.min_lr={optimizer.min_lr}; expected at most "
            f"optimizer.max_lr={optimizer.max_lr}"
        )


register("enas", SearchConfig)
register("enas_retrain", RetrainConfig)
register("nasbench201", CellSearchConfig)
register("darts", DartsConfig)

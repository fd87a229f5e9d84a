"""Search among NAS-Bench-201's cells, whose accuracies are known: a controller, or its rivals.

    python -m enas.nasbench201 table=nasbench201-accuracies.csv.xz controller.norm=sn_ln_gn
    python -m enas.nasbench201 table=nasbench201-accuracies.csv.xz sampler=random

Section 4.4, where the reward is a table's validation accuracy and not that of shared weights. The
result is the test accuracy of the cell with the best validation accuracy, after so many cells. A
search takes seconds; one that was interrupted begins anew. `enas.nasbench201_seeds` makes many
searches at once. See configs/nasbench201.yaml.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; entry.start collects again

import functools

import hydra
import numpy as np
import torch
from omegaconf import DictConfig

from sn.training.run import entry
from sn.training.run.session import Session

from .benchmark import Table, curves, read_table
from .config import CellSearchConfig
from .samplers import (
    CellController,
    make_controller,
    search_at_random,
    search_by_evolution,
    search_with_controllers,
)


@hydra.main(version_base="1.3", config_path="../configs", config_name="nasbench201")
def main(cfg: DictConfig) -> None:
    entry.run(search, cfg)


def search(config: CellSearchConfig) -> dict:
    """Run the config's search; return the summary."""
    with Session(config, unit="step", one_process="a search takes seconds") as run:
        if run.summary is not None:
            return run.has_ended("test accuracy", "best_test")
        table = read_table(config.table, config.dataset)
        controllers = build_controllers(config, table, [config.seed])
        controller = controllers[0] if controllers else None
        run.begin(
            parts={},  # a search that goes on begins anew
            identity={"data": table.describe(config.dataset)},
            facts=facts(config, table),
            headline=("best_test", "best_val"),
            importance=controller,
            blocks=controller and controller.places_of_norms(),
            records_after_saving=True,
        )
        run.say(
            f"{config.run_name}: {config.cells} of {len(table):,} cells of {config.dataset}"
            f"{', begun anew' if run.resumed else ''}"
        )
        run.progress.step = 0
        for _ in run.steps([None], 1):
            asked = ask(config, table, controllers, [config.seed])
            run.step_done()
        found = curves(table, asked, config.points)
        for place, point in enumerate(config.points):
            values = {name: float(value[0, place]) for name, value in found.items()}
            run.recorder.metrics(point, values)
        run.record_importance(config.cells)
        if controller is not None:
            run.save(controller=controller.state_dict())
        best = int(asked[0, table.val[asked[0]].argmax()])
        summary = run.finish(
            {
                "best_test": float(table.test[best]),
                "best_val": float(table.val[best]),
                "cell": table.cell(best),
                "distinct_cells": len(np.unique(asked)),
                "points": config.points,
                **{f"curve_{name}": value[0].tolist() for name, value in found.items()},
            }
        )
        run.say(
            f"best of {config.cells} cells: test {summary['best_test']:.2f}, "
            f"validation {summary['best_val']:.2f}, {summary['cell']}; "
            f"records in {config.output_dir}"
        )
        return summary


def build_controllers(
    config: CellSearchConfig, table: Table, seeds: list[int]
) -> list[CellController]:
    """A controller for each seed; none for the other samplers."""
    if config.sampler != "controller":
        return []
    arguments = config.controller.network(CellController)
    make = functools.partial(CellController, len(table.operations), **arguments)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return [make_controller(make, seed).to(dtype) for seed in seeds]


def ask(
    config: CellSearchConfig, table: Table, controllers: list[CellController], seeds: list[int]
) -> np.ndarray:
    """The numbers of the cells that each seed's search asks for, (seeds, cells)."""
    if config.sampler == "random":
        return search_at_random(table, seeds, config.cells)
    if config.sampler == "evolution":
        return search_by_evolution(table, seeds, config.cells, **vars(config.evolution))
    options = config.controller
    return search_with_controllers(
        table,
        controllers,
        seeds,
        config.cells,
        {"lr": options.lr, "betas": (options.beta1, 0.999), "eps": options.eps},
        options.gate_lr_factor,
        options.entropy_weight,
        options.baseline_decay,
    )


def facts(config: CellSearchConfig, table: Table) -> dict:
    """The run's part of summary.json: what was searched, where the best cell stands."""
    chosen = int(table.val.argmax())
    return {
        "task": "enas_nasbench201",
        "run": f"enas_nasbench201/{config.dataset}/{config.run_name}/seed{config.seed}",
        "sampler": config.sampler,
        "norm": config.controller.norm if config.sampler == "controller" else None,
        "data": table.describe(config.dataset),
        "cells": config.cells,
        "of_all_cells": {"val": float(table.val[chosen]), "test": float(table.test[chosen])},
        "scale": "full" if len(table) == 15_625 else "proxy",
    }


if __name__ == "__main__":
    entry.start(main, "nasbench201")

"""Many searches among NAS-Bench-201's cells at once: every arm with the same seeds, one record.

    python -m enas.nasbench201_seeds nasbench201-accuracies.csv.xz --out cifar10.jsonl
    python -m enas.nasbench201_seeds nasbench201-accuracies.csv.xz --out hidden.jsonl \\
        --arms ln sn --set 'controller.places=[hidden]'

What `enas.nasbench201` does seed by seed, here batched over seeds: 200 of an arm in a few minutes.
The record has a line for each arm: its config, and arrays of seeds x points. An arm that is in the
file already, with the same config and seeds, is left out, so that the same command goes on.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

import sn
from sn.training.run import entry
from sn.training.run.config import recorded, typed
from sn.training.run.display import say
from sn.training.run.record import environment, read_jsonl

from .benchmark import DATASETS, Table, curves, read_table
from .config import CellSearchConfig
from .nasbench201 import ask, build_controllers
from .samplers import CellController

ARMS = {  # name -> overrides of configs/nasbench201.yaml
    "random": ["sampler=random"],
    "evolution": ["sampler=evolution"],
    "none": ["controller.norm=none"],
    "ln": ["controller.norm=ln"],
    "gn": ["controller.norm=gn"],
    "sn": ["controller.norm=sn_ln_gn"],
    "sn_x10": ["controller.norm=sn_ln_gn", "controller.gate_lr_factor=10"],
    "ln_per_gate": ["controller.norm=ln", "controller.per_gate=true"],
    "gn_per_gate": ["controller.norm=gn", "controller.per_gate=true"],
    "sn_per_gate": ["controller.norm=sn_ln_gn", "controller.per_gate=true"],
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        seeds = list(range(args.first_seed, args.first_seed + args.seeds))
        table = read_table(args.table, args.dataset)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for arm in args.arms:
            config = compose_config(args.table, args.dataset, [*ARMS[arm], *args.set])
            line = {"arm": arm, "config": arm_config(config)}
            line |= {"seeds": seeds, "data": table.describe(args.dataset)}
            if is_recorded(args.out, line):
                say(f"{arm}: recorded already")
                continue
            line |= search_all(config, table, seeds)
            drop_torn_line(args.out)
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
                file.flush()
                os.fsync(file.fileno())
            tests = np.array(line["best_test"])[:, -1]
            say(
                f"{arm}: best cell's test accuracy {tests.mean():.3f} +- {tests.std(ddof=1):.3f} "
                f"over {len(seeds)} seeds, {line['seconds']:.0f} s"
            )
    except (OSError, ValueError, FloatingPointError) as error:
        say(f"nasbench201_seeds.py: {error}", error=True)
        raise SystemExit(3 if isinstance(error, FloatingPointError) else 2) from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m enas.nasbench201_seeds", description=__doc__.splitlines()[0]
    )
    parser.add_argument("table", help="the benchmark's CSV file (.xz)")
    parser.add_argument("--out", type=Path, required=True, metavar="JSONL", help="the record")
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM",
                        help=f"of {', '.join(ARMS)} (default: all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--first-seed", type=int, default=1, help="(default: 1)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help="overrides of configs/nasbench201.yaml for every arm")  # fmt: skip
    args = parser.parse_args(argv)
    if args.seeds < 2 or args.first_seed < 0:
        parser.error(f"--seeds {args.seeds} --first-seed {args.first_seed}; expected 2 or more, "
                     "from 0 or more on")  # fmt: skip
    own = {"sampler"} | {text.partition("=")[0] for arm in args.arms for text in ARMS[arm]}
    for text in args.set:
        if text.lstrip("+~").partition("=")[0] in own:
            parser.error(f"--set {text}: that is what the arms {', '.join(args.arms)} differ in")
    return args


def compose_config(table: str, dataset: str, overrides: list[str]) -> CellSearchConfig:
    """The typed config of an arm. Raises ValueError as the command line of a search says it."""
    try:
        with initialize_config_dir(str(entry.CONFIGS), version_base="1.3"):
            return typed(
                compose("nasbench201", [f"table='{table}'", f"dataset={dataset}", *overrides])
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(entry.explain(error, "nasbench201")) from None


def arm_config(config: CellSearchConfig) -> dict:
    """What a record holds of it: not the seed, nor names made of the rest."""
    own = recorded(config)
    return {key: value for key, value in own.items() if key not in ("seed", "names", "run_name")}


def is_recorded(path: Path, line: dict) -> bool:
    """Whether `path` has the arm. Raises ValueError if it has it with other values."""
    for old in read_jsonl(path) if path.exists() else []:
        if old.get("arm") == line["arm"]:
            other = [key for key in line if old.get(key) != line[key]]
            if other:
                raise ValueError(
                    f"{path} has {line['arm']} with other {' and '.join(other)}; choose another "
                    "--out"
                )
            return True
    return False


def drop_torn_line(path: Path) -> None:
    """Cut off what a kill has left of a last line: what is appended must begin one of its own."""
    if path.exists():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)


def search_all(config: CellSearchConfig, table: Table, seeds: list[int]) -> dict:
    """One search for each seed: what the record says of the arm's results."""
    began, began_cpu = time.perf_counter(), time.process_time()
    controllers = build_controllers(config, table, seeds)
    asked = ask(config, table, controllers, seeds)
    found = curves(table, asked, config.points)
    best = asked[np.arange(len(seeds)), table.val[asked].argmax(1)]
    return {
        "points": config.points,
        **{name: values.round(3).tolist() for name, values in found.items()},
        "best_cell": best.tolist(),
        "distinct_cells": [len(np.unique(row)) for row in asked],
        "ln_weight": ln_weights(controllers),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        **environment(torch.device("cpu")),
    }


def ln_weights(controllers: list[CellController]) -> dict[str, dict[str, list[float]]]:
    """LN's importance weights at the end, by place, over seeds; of GN it is the rest."""
    result: dict[str, dict[str, list[float]]] = {}
    for controller in controllers:
        for name, weights in sn.importance_weights(controller).items():
            place = name.removeprefix("cell.norms.")
            for moment in ("mean", "var"):
                values = result.setdefault(place, {}).setdefault(moment, [])
                values.append(round(weights[moment]["ln"], 4))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])

"""Typed configs of every entrypoint, and fresh processes, alone or in a gloo group."""

import contextlib
import functools
import importlib
import multiprocessing
import os
import pickle
import socket
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sn.training.run import entry
from sn.training.run.config import typed
from sn.training.run.options import SCHEMAS

CONFIGS = str(Path(__file__).parents[1] / "configs")
# fresh processes without the seconds that imports take: forked from a server that has done them
PRELOAD = [
    *("pytest", "train_imagenet", "torchvision.models.detection", "pycocotools.cocoeval"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
]
processes = multiprocessing.get_context("forkserver")


def composed(root: str, *overrides: str):
    """What Hydra makes of a root config and overrides."""
    importlib.import_module(SCHEMAS[root])
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose(root, list(overrides))


def config(*overrides: str, root: str = "imagenet"):
    """The typed config of an entrypoint; a ValueError with what a user reads if it has none."""
    try:
        return typed(composed(root, *overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explained(root, error)) from error


def explained(root: str, error: Exception) -> str:
    """What the user reads when Hydra or OmegaConf refuses something."""
    if isinstance(error, MissingMandatoryValue):
        return entry.message(error)
    return entry.explain(error, root)


@functools.cache
def schema(root: str) -> type:
    importlib.import_module(SCHEMAS[root])
    return OmegaConf.get_type(ConfigStore.instance().load(f"{root}_schema.yaml").node)


def with_value(root: str, cfg, key: str, value, add: bool = False):
    """The typed config when `key=value` (`add`: +key=value) is on the command line, as Hydra does.

    Raises as `config`, but without composing `cfg` again: milliseconds. `cfg` stays as it was.
    """
    changed = pickle.loads(pickle.dumps(cfg))  # half the time of a deep copy
    OmegaConf.set_struct(changed, True)
    try:
        with open_dict(changed) if add else contextlib.nullcontext():
            OmegaConf.update(changed, key, value, merge=True, force_add=add)
        return typed(changed)
    except OmegaConfBaseException as error:
        raise ValueError(explained(root, error)) from error


def slow_but(quick, cases):
    """Test cases of which only those whose index is in `quick` are in the short suite."""
    return [
        pytest.param(case, marks=[] if index in quick else pytest.mark.slow)
        for index, case in enumerate(cases)
    ]


def train_in_group(world_size: int, *overrides: str, timeout: float = 240) -> None:
    """Train with `world_size` processes; raise RuntimeError if one fails."""
    run_in_group(world_size, _train, overrides, timeout=timeout)


def run_in_group(world_size: int, target, *args, timeout: float = 240) -> None:
    """Call `target(rank, *args)` in `world_size` processes that know of one another as torchrun's.

    Raises RuntimeError if one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [
        processes.Process(target=_start, args=(rank, world_size, port, target, args))
        for rank in range(world_size)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(timeout)
    codes = [process.exitcode for process in group]
    for process in group:
        if process.is_alive():
            process.kill()
    if any(codes):
        raise RuntimeError(f"exit codes {codes} for {args}")


def _start(rank: int, world_size: int, port: int, target, args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    target(rank, *args)


def _train(rank: int, overrides: tuple[str, ...]) -> None:
    import train_imagenet

    try:
        train_imagenet.train(config(*overrides))
    finally:
        train_imagenet.distributed.stop()

"""What every entrypoint does around its run: known errors, checks of the config's values."""

import math
import os
import sys
from collections.abc import Callable

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import distributed


def run(function: Callable[[DictConfig], object], cfg: DictConfig) -> None:
    """Call function(cfg); a known error is one line on stderr and exit code 2 (3: diverged)."""
    script = os.path.basename(sys.argv[0])
    try:
        function(cfg)
    except (ValueError, TypeError, OSError, FloatingPointError, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"{script}: {error}", file=sys.stderr, flush=True)
        sys.exit(3 if isinstance(error, FloatingPointError) else 2)
    finally:
        distributed.stop()


def prepare(cfg: DictConfig) -> None:
    torch.use_deterministic_algorithms(cfg.deterministic)


def check_values(cfg: DictConfig, checks: list) -> None:
    for valid, expected, keys in checks:
        for key in keys:
            value = OmegaConf.select(cfg, key)
            if not valid(value):
                raise ValueError(f"{key}={value}; expected {expected}")


def check_names(cfg: DictConfig, keys: list[str]) -> None:
    for key in keys:
        value = str(OmegaConf.select(cfg, key))
        if "/" in value or value in ("", ".", "..") or not value.isprintable():
            raise ValueError(f"{key}={value}; expected a plain name")


def whole(low: int, high: float = math.inf):
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def number(low: float, high: float = sys.float_info.max):
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high


def above(low: float):
    return lambda v: number(low)(v) and v > low


def optional(valid):
    return lambda v: v is None or valid(v)


def one_of(*choices):
    return lambda v: v in choices


def switch(v) -> bool:
    return isinstance(v, bool)

"""What the command line of every entrypoint does alike: exit codes, messages, checks of values."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from . import distributed
from .stopping import Preempted

# exit codes: 2 wrong input, 3 diverged, 75 (EX_TEMPFAIL) preempted: run the same command again
KNOWN = (ValueError, TypeError, OSError, torch.OutOfMemoryError, OmegaConfBaseException)
LARGEST = sys.float_info.max
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def run(function: Callable[[DictConfig], Any], cfg: DictConfig) -> None:
    """Call `function(cfg)`; what a user can mend ends in one line on stderr and an exit code.

    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    try:
        prepare(cfg)
        function(cfg)
    except (*KNOWN, FloatingPointError, Preempted, KeyboardInterrupt) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{Path(sys.argv[0]).name}{rank}: {message(error)}", file=sys.stderr, flush=True)
        codes = {FloatingPointError: 3, Preempted: 75, KeyboardInterrupt: 130}
        sys.exit(codes.get(type(error), 2))
    finally:
        distributed.stop()


def start(main: Callable[[], None]) -> None:
    """Call an entrypoint's Hydra main, unless the command picks an option by a number.

    Hydra ends there in a traceback: `setting=8_32` reads as 832, no name.
    """
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        group = CONFIGS / key.lstrip("+").partition("@")[0]
        if re.fullmatch(r"[+-]?[\d._]+(e[+-]?\d+)?|true|false", value, re.I) and group.is_dir():
            options = sorted(path.stem for path in group.glob("*.yaml"))
            print(
                f"{Path(sys.argv[0]).name}: {word}: expected one of {options}, not a number",
                file=sys.stderr,
            )
            sys.exit(2)
    main()


def message(error: BaseException) -> str:
    """What to tell the user."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set; add {error.full_key}=... to the command"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from the last checkpoint"
    if isinstance(error, torch.OutOfMemoryError):
        first = str(error).splitlines()[0]
        return f"{first} Use setting.emulation=accumulated, smaller images or precision=bf16"
    text = str(error) or type(error).__name__
    if "Original Traceback" in text:  # from a data worker: its last line says it all
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text


def prepare(cfg: DictConfig) -> None:
    """Apply what must be set before any tensor exists: `deterministic`."""
    deterministic = cfg.get("deterministic", False)
    if not isinstance(deterministic, bool):
        raise ValueError(f"deterministic={deterministic}; expected true or false")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic


Check = tuple[Callable[[Any], bool], str, Sequence[str]]


def check_values(cfg: DictConfig, checks: Sequence[Check]) -> None:
    """Raise ValueError `key=value; expected ...` for the first value its predicate refuses.

    `checks` holds (predicate, what is expected, dotted keys). A key that `cfg` lacks is no error.
    """
    for valid, expected, keys in checks:
        for key in keys:
            parent, _, name = key.rpartition(".")
            group = OmegaConf.select(cfg, parent) if parent else cfg
            if group is not None and name in group and not valid(group[name]):
                raise ValueError(f"{key}={group[name]}; expected {expected}")


def check_names(cfg: DictConfig, keys: Sequence[str]) -> None:
    """Raise ValueError unless the values of `keys` are plain names, fit to be part of a path."""
    expected = "a name without / and control characters, not starting with a dot"
    check_values(cfg, [(_is_name, expected, keys)])


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value[:1] not in ("", ".") and (
        "/" not in value and "\\" not in value
    )  # fmt: skip


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(low: int, high: float = float("inf")) -> Callable[[Any], bool]:
    """Predicate: a whole number from `low` to `high`."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def number(low: float = 0, high: float = LARGEST) -> Callable[[Any], bool]:
    """Predicate: a finite number from `low` to `high`."""
    return lambda v: is_number(v) and low <= v <= high


def above(low: float = 0) -> Callable[[Any], bool]:
    """Predicate: a finite number above `low`."""
    return lambda v: is_number(v) and low < v <= LARGEST


def optional(predicate: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Predicate: null, or what `predicate` takes."""
    return lambda v: v is None or predicate(v)


def one_of(choices: Sequence) -> Callable[[Any], bool]:
    """Predicate: one of `choices`."""
    return lambda v: v in choices


def switch(value: Any) -> bool:
    """Predicate: true or false."""
    return isinstance(value, bool)

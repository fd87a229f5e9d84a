"""What the command line of every entrypoint does alike: one line for what is wrong, exit codes."""

import atexit
import dataclasses
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from . import distributed
from .config import describe, field_of, short, typed, unknown_key
from .display import say
from .lock import BUSY_EXIT_CODE, Busy
from .options import COMMANDS, choices, fits, groups, having, help_text, schema_of
from .stopping import Preempted

# exit codes: 2 wrong input, 3 diverged, 73 another run has the folder, 75 (EX_TEMPFAIL) preempted:
# run the same command again
KNOWN = (
    *(ValueError, TypeError, OSError, OverflowError, MemoryError),
    *(torch.OutOfMemoryError, OmegaConfBaseException),
)
# what torch says, as a RuntimeError or TypeError, of more than memory or an address can hold
TOO_LARGE = (
    *("DefaultCPUAllocator", "can't allocate memory", "Storage size calculation overflowed"),
    *("integer multiplication overflow", "Overflow when unpacking long"),
)
CODES = {FloatingPointError: 3, Busy: BUSY_EXIT_CODE, Preempted: 75, KeyboardInterrupt: 130}
SHARED = tuple(CODES)  # ends that all processes come to together
ONE_RUN = (FloatingPointError, Busy)  # of a sweep (-m): the other runs do not depend on it
WORD, LINE = 300, 2000  # characters of a message that are shown: a path may be long
NO_OPTION = r"[+-]?[\d._]+(e[+-]?\d+)?|true|false|null|~"  # what YAML does not read as a text
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
# HYDRA_FULL_ERROR=1 shows tracebacks; `start` sets it, too, to see Hydra's errors as exceptions
_begun = False  # the config has been composed
_started = False  # `start` has been called: not so where a launcher runs a sweep's jobs
_ended: list[int] = []  # exit codes of a sweep's runs that ended in an error of `ONE_RUN`
TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1" and "SN_ONE_LINE" not in os.environ


def run(function: Callable[[Any], Any], cfg: DictConfig) -> None:
    """Call `function` with the typed config; what a user can mend ends in one line on stderr.

    The process then ends with an exit code of `CODES`, else 2; a sweep in this process (-m) goes on
    after an error of `ONE_RUN`. HYDRA_FULL_ERROR=1 shows the traceback, and leaves errors that have
    no code of their own to Python.
    """
    global _begun
    _begun = True
    sweep = in_sweep()
    leave = not sweep  # its runs share a group: in a second one processes may find old addresses
    try:
        config = typed(cfg)
        prepare(config.deterministic)
        function(config)
    except (Exception, KeyboardInterrupt) as error:
        goes_on = sweep and isinstance(error, ONE_RUN)
        leave = isinstance(error, SHARED) and not goes_on
        if not is_known(error) or (TRACEBACKS and not isinstance(error, SHARED)):
            raise
        if TRACEBACKS:  # schedulers go by the exit code all the same
            traceback.print_exc()
        code = CODES.get(type(error), 2)
        if not goes_on:
            end(message(error), code)
        say_wrong(message(error))
        _ended.append(code)
    finally:
        if leave:  # not one that fails alone: NCCL would wait for the others, and these for it
            distributed.stop()


def in_sweep() -> bool:
    """Whether this is one of the runs that Hydra makes in this process, one after another."""
    known = _started and HydraConfig.initialized()
    return known and HydraConfig.get().mode == RunMode.MULTIRUN


def is_known(error: BaseException) -> bool:
    """Whether an error is one that a user can mend, and no bug."""
    return isinstance(error, (*KNOWN, *CODES)) or is_too_large(error)


def is_too_large(error: BaseException) -> bool:
    """Whether something was asked for that the CPU's memory, or a number, cannot hold."""
    if isinstance(error, MemoryError | OverflowError):
        return True
    torchs = isinstance(error, RuntimeError | TypeError)
    return torchs and any(words in str(error) for words in TOO_LARGE)


def start(main: Callable[[], None], root: str) -> None:
    """Call the Hydra main of a root config; what Hydra refuses ends in one line, exit code 2.

    Collects garbage from here on, without what entrypoints have imported, which would take as long
    as they save by not collecting meanwhile. At the end of the process it counts again: libraries
    look then for what was not freed.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.enable()
    os.environ |= {"HYDRA_FULL_ERROR": "1", "SN_ONE_LINE": "1"}
    if {"--help", "-h"} & set(sys.argv[1:]):
        say(help_text(root))
        return
    flags = [word for word in sys.argv[1:] if word in ("-m", "--multirun")]
    sys.argv[1:] = flags + [word for word in sys.argv[1:] if word not in flags]  # for argparse
    keys_with_dashes(root)
    numbers_as_options()
    options_of_others(root)
    global _started
    _started = True
    try:
        main()
        distributed.stop()  # after a sweep
    except (HydraException, OmegaConfBaseException) as error:
        if TRACEBACKS:
            raise
        end(explain(error, root), 2)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        if TRACEBACKS or _begun:
            raise
        reason = " ".join(str(error).split())
        if isinstance(error, RecursionError):
            reason = "a value in it refers to itself"
        path = _config_file(error)
        if path is None and isinstance(error, OSError) and error.filename is not None:
            end(reason, 2)  # what Hydra writes: multirun.yaml of a sweep
        end(f"{path or 'a YAML file of the config'} cannot be read: {reason}", 2)
    if _ended:
        sys.exit(max(_ended))


def _config_file(error: BaseException) -> str | None:
    """The file that Hydra was reading, if it was; not all of these errors name it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    loaders = [frame for frame in frames if frame.f_code.co_name == "load_config"]
    paths = [frame.f_locals["full_path"] for frame in loaders if "full_path" in frame.f_locals]
    return paths[0] if paths else None


def end(text: str, code: int) -> NoReturn:
    """Say what is wrong, and leave."""
    say_wrong(text)
    sys.exit(code)


def say_wrong(text: str) -> None:
    """Say what is wrong, long values cut."""
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    text = re.sub(rf"\S{{{WORD + 1},}}", lambda word: short(word.group()), text)
    lines = [short(line, LINE) for line in text.splitlines()]
    say(f"{Path(sys.argv[0]).name}{rank}: " + "\n".join(lines), error=True)


def keys_with_dashes(root: str) -> None:
    """Refuse `--norm sn`, of which Hydra would say nothing but its own options."""
    for word in (word for word in sys.argv[1:] if word.startswith("--")):
        keys = {*choices(root), *(field.name for field in dataclasses.fields(schema_of(root)))}
        key, _, value = word.removeprefix("--").partition("=")
        if key.partition(".")[0] in keys:
            end(f"{word}: keys have no dashes; write {key}={value or '...'}", 2)


def numbers_as_options() -> None:
    """Refuse an option picked by a number or null: `setting=8_32` reads as 832, and Hydra ends."""
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        group = CONFIGS / key.lstrip("+").partition("@")[0]
        several = [part for part in value.split(",") if part not in ("null", "~")]  # of a sweep
        parts = several if "," in value else [value]
        numbers = [part for part in parts if re.fullmatch(NO_OPTION, part, re.I)]
        if numbers and os.path.isdir(group):
            options = sorted(path.stem for path in group.glob("*.yaml"))
            end(f"{word}: expected one of {', '.join(options)}, no number, true, false or null", 2)


def options_of_others(root: str) -> None:
    """Refuse an option or a group of another task; Hydra would name a key that does not fit."""
    own = choices(root)
    for word in sys.argv[1:]:
        group, _, choice = word.lstrip("+").partition("=")
        if not choice or not os.path.isdir(CONFIGS / group):  # of no name too long for a path
            continue
        if group not in own and (others := having(group)):
            end(
                f"{word}: the group {group} belongs to {', '.join(others)}; "
                f"{COMMANDS[root]} has {', '.join(own) or 'no groups'}",
                2,
            )
        if not os.path.isfile(CONFIGS / group / f"{choice}.yaml"):
            continue
        task = choice.partition("/")[0] if group == "experiment" else root
        foreign = task != root and (CONFIGS / f"{task}.yaml").is_file()
        if foreign or not fits(root, group, choice):
            fitting = ", ".join(groups(root)[group])
            end(f"{word} is not for {COMMANDS[root]}; choose one of {fitting}", 2)


def explain(error: BaseException, root: str) -> str:
    """What Hydra refused of a root config, in one line: key, value, what is expected."""
    if isinstance(error, OverrideParseException):
        reason = str(error.message).splitlines()[0]
        given, _, path = str(error.override).partition("=")
        if path[:1] == "~":  # a shell expands it in few places, this one not among them
            home = f"{given}=$HOME{path[1:]}" if path[1:2] in ("", "/") else "the path in full"
            return f"{short(error.override)}: ~ is not expanded here; write {home}"
        return (
            f"{short(error.override)}: not an override ({reason}); a value with = ( ) , or spaces "
            "needs quotes inside quotes: 'note=\"a=b\"'"
        )
    if isinstance(error, MissingConfigException) and error.options is not None:
        wanted = str(error.missing_cfg_file)
        if wanted.startswith("hydra/"):  # Hydra's own, such as hydra/launcher
            return no_such_plugin(wanted, error.options)
        return no_such_option(wanted, root)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(cause)
    file = re.match(r"In '([^']+)'", str(error))
    where = f"configs/{file.group(1)}.yaml: " if file else ""
    key = re.search(r"full_key: (\S+)", text)
    if key is None:
        return " ".join(str(error).split())
    if isinstance(cause, InterpolationKeyError | InterpolationResolutionError):
        return f"{where}{key.group(1)}: {text.splitlines()[0]}"
    hint, metadata, known = field_of(schema_of(root), key.group(1))
    kinds = (ConfigKeyError, ConfigAttributeError)
    if isinstance(cause, kinds) or "ConfigKeyError" in text or "ConfigAttributeError" in text:
        if known:
            return where + unknown_key(key.group(1), known)
        group = key.group(1).rpartition(".")[0]
        return f"{where}unknown key {key.group(1)}; +{key.group(1)}=... adds it to {group}"
    value = getattr(cause, "value", None) if isinstance(cause, ValidationError) else None
    if value is None:
        found = re.search(r"Value '(.*)' of type|value: (.*)", text)
        value = (found.group(1) or found.group(2)) if found else "null"
    expected = describe(hint, metadata, full=True) if hint is not None else "another type of value"
    return f"{where}{key.group(1)}={short(value)}; expected {expected}"


def no_such_option(wanted: str, root: str) -> str:
    """What to say of `group/choice` that has no file."""
    group, _, choice = wanted.partition("/")
    fitting = (
        ", ".join(sorted(groups(root).get(group, ())))
        or f"none, {COMMANDS[root]} has no such group"
    )
    other = re.fullmatch(r"(\d+)x(\d+)", choice) if group == "setting" else None
    keys = " or setting.gpus={} setting.images_per_gpu={}".format(*other.groups()) if other else ""
    return f"{group}={choice}: no such option; choose one of {fitting}{keys}"


def no_such_plugin(wanted: str, options: Sequence[str]) -> str:
    """What to say of an option of Hydra's that is not there; a package may bring it."""
    group, _, choice = wanted.rpartition("/")
    how = " by pip install -e '.[slurm]'" if choice.startswith("submitit") else ""
    fitting = ", ".join(sorted(options))
    return (
        f"{group}={choice}: no such option; install Hydra's plugin for it{how}, or choose {fitting}"
    )


def message(error: BaseException) -> str:
    """What to tell the user."""
    if isinstance(error, OmegaConfBaseException):
        text = " ".join(str(error).split())
        missing = re.search(r"Missing mandatory value: (\S+)", text)
        key = missing.group(1) if missing else getattr(error, "full_key", None)
        if missing or isinstance(error, MissingMandatoryValue):
            return f"{key} is not set; add {key}=... to the command"
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from the last checkpoint"
    if isinstance(error, torch.OutOfMemoryError):
        first = str(error).splitlines()[0]
        return f"{first} Use setting.emulation=accumulated, smaller images or precision=bf16"
    text = str(error) or type(error).__name__
    if "Original Traceback" in text:  # from a data worker: its last line says it all
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if is_too_large(error):
        text = f"too large for this machine: {text.splitlines()[0]}; choose smaller sizes or counts"
    return text


def prepare(deterministic: bool) -> None:
    """Apply what must be set before any tensor exists."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic

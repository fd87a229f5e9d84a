"""Checkpoints: written atomically, plain tensors and numbers, loaded with weights_only=True."""

import argparse
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .config import checked, short

# the keys under which files of others hold a network; then its moving average
NETWORKS = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module")
NETWORKS += ("weights", "params", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
# what torch.compile, FSDP and checkpoint_wrapper put into the names of what they wrap
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def save_checkpoint(path: str | Path, state: dict, keep: int = 2, best: bool = False) -> None:
    """Write `state` so that `path` is at every moment a whole file; keep the `keep` newest.

    The earlier ones, unless broken, stay beside it as <stem>_previous<suffix>, <stem>_previous2...
    The `best` one is <stem>_best<suffix>, too: before it is `path`, so that a crash loses neither.
    Raises OSError if it cannot be written; what was there before is then left as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()  # it may be what fills the disk
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"cannot write checkpoint {path} ({free:.0f} MiB free): {error}; "
            "the one before is untouched"
        ) from error
    if best:
        keep_best(path, temporary)
    with suppress(Exception):  # a damaged file can raise anything
        _check_archive(path)
        for number in range(keep - 1, 1, -1):
            with suppress(FileNotFoundError):
                os.replace(_previous(path, number - 1), _previous(path, number))
        os.replace(path, _previous(path))
    os.replace(temporary, path)
    sync_folder(path.parent)
    for surplus in path.parent.glob(f"{path.stem}_previous*{path.suffix}"):
        ending = surplus.name[len(f"{path.stem}_previous") : -len(path.suffix)]
        if ending.isdigit() and int(ending) >= keep:
            with suppress(OSError):
                surplus.unlink()


def keep_best(path: str | Path, file: Path | None = None) -> None:
    """Let <stem>_best<suffix> be the checkpoint that `path` is now, or the one in `file`."""
    path = Path(path)
    put(file or path, path.with_name(f"{path.stem}_best{path.suffix}"))


def put(file: Path, target: Path) -> None:
    """Let `target` be the same as `file`; at every moment it is a whole file, if it is one."""
    if target.exists() and file.samefile(target):
        return
    temporary = target.with_name(target.name + ".tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(file, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, temporary)
    os.replace(temporary, target)
    sync_folder(target.parent)


def load_checkpoint(path: str | Path, needed: Sequence[str] = ()) -> dict | None:
    """Load the newest readable checkpoint at `path` onto the CPU; None if there is none.

    Errors as `newest_checkpoint`.
    """
    found = newest_checkpoint(path, needed)
    return None if found is None else found[1]


def newest_checkpoint(
    path: str | Path, needed: Sequence[str] = ()
) -> tuple[Path, dict[str, Any]] | None:
    """(file, its content on the CPU) of the newest readable checkpoint at `path`, if there is one.

    A broken file, or one without the keys `needed`, is reported on stderr and the one before
    taken. Raises ValueError if there are only broken ones.
    """
    path = Path(path)
    number = 1
    candidates = [path, _previous(path)]
    while _previous(path, number + 1).exists():
        number += 1
        candidates.append(_previous(path, number))
    broken = []
    for candidate in candidates:
        if not candidate.exists():
            continue
        try:
            _check_archive(candidate)
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            _check_names(state)
            missing = [key for key in needed if key not in state]
            if missing:
                raise ValueError(f"it has no {missing[0]!r}; not a checkpoint of this kind")
            return candidate, state
        except Exception as error:  # a damaged or hostile file can raise anything
            broken.append(candidate)
            print(f"warning: cannot read checkpoint {candidate}: {_reason(error)}", file=sys.stderr)
    if broken:
        names = " and ".join(map(str, broken))
        raise ValueError(f"no readable checkpoint: {names}; delete to start anew")
    return None


@contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """Make one ValueError of what a state that does not fit raises when it is put in place."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"checkpoint {path} does not fit this run: {reason[:300]}; "
            f"choose another output_dir=, or delete {Path(path).parent} to start anew"
        ) from None


def restore(
    path: str | Path,
    state: dict,
    parts: dict[str, Any],
    progress: type,
    epochs: int,
    steps: int,
) -> Any:
    """Put `state`, read from `path`, into `parts` by their keys; return `progress` of its own.

    Raises ValueError if something does not fit, such as progress beyond `epochs` of `steps` steps.
    """
    with fitting(path):
        found = checked(progress, state["progress"], "progress")
        if found.done > steps or found.epoch * steps + found.done > epochs * steps:
            raise ValueError(
                f"epoch {found.epoch}, step {found.done} are beyond the run's {epochs} x {steps}"
            )
        for name, part in parts.items():
            own = _as_built(part, state[name]) if isinstance(part, Optimizer) else state[name]
            part.load_state_dict(own)
        return found


def _as_built(optimizer: Optimizer, state: dict) -> dict:
    """The state with the optimizer's own kind of step, not that of the device it was saved on."""
    groups = [dict(group) for group in state["param_groups"]]
    for group, own in zip(groups, optimizer.param_groups):
        group |= {key: own[key] for key in ("fused", "foreach", "capturable") if key in own}
    return {**state, "param_groups": groups}


def load_weights(path: str | Path) -> dict[str, Any]:
    """What a file of weights holds, on the CPU: safetensors, or plain tensors saved by torch.

    The options of argparse that many training scripts save beside them are allowed, too. Raises
    FileNotFoundError, or ValueError for a damaged file, one that would unpack to more than
    it is, and one with other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_names(content)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ValueError(f"cannot read weights from {path}: {_reason(error)}") from None
    return content


def load_network(
    path: str | Path, key: str | None = None, told: Callable[[str], object] | None = None
) -> dict[str, Tensor]:
    """`find_network` in the file at `path`; raises as `load_weights`, too."""
    return find_network(load_weights(path), path, key, told)


def find_network(
    content: Mapping[str, Any],
    path: str | Path,
    key: str | None = None,
    told: Callable[[str], object] | None = None,
) -> dict[str, Tensor]:
    """A network's tensors in the content of the file at `path`, under their plain names.

    The file holds them by themselves, or under `key`; None: under the one of `NETWORKS` that it
    has, or the only group of tensors. A name that a training module has put before all of them
    (Lightning's `model.`) is left out. `told` gets a line that says where they were found. Raises
    ValueError, naming the file, if there are none, or several to choose from.
    """
    groups = {name: group for name, value in content.items() if (group := _tensors(value))}
    if key is None and groups:
        known = [name for name in groups if name in NETWORKS] or list(groups)
        if len(known) > 1:
            raise ValueError(
                f"{path} holds several networks: {short(', '.join(known))}; choose one with "
                "init.key=... (--key of a script)"
            )
        key = known[0]
    tensors = _tensors(content) if key is None else groups.get(key)
    if not tensors:
        what = "neither tensors by name nor a 'state_dict'" if key is None else f"no {short(key)!r}"
        raise ValueError(
            f"{path} holds no state: {what}, but {short(', '.join(content)) or 'nothing'}"
        )
    try:
        tensors = plain_names(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    firsts = {name.partition(".")[0] for name in tensors if "." in name}
    around = firsts.pop() if len(firsts) == 1 and all("." in name for name in tensors) else ""
    if around in ("model", "net", "network"):
        tensors = renamed(tensors, lambda path: path[1:] if path[0] == around else path)
    else:
        around = ""
    if told is not None and (key is not None or around):
        where = f", key {key!r}" if key is not None else ""
        told(f"read {path}{where}" + (f", names without {around}." if around else ""))
    return tensors


def _tensors(value: Any) -> dict[str, Tensor]:
    """The tensors by name in a part of a file; none in what is no mapping."""
    if not isinstance(value, Mapping):
        return {}
    found = {name: tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    return with_metadata(found, metadata(value))


def with_metadata(tensors: Mapping[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
    """A state dict with what layers have noted beside their tensors, as torch's own; `metadata`."""
    state = OrderedDict(tensors)
    state._metadata = notes  # type: ignore[attr-defined]
    return state


def metadata(state: Any) -> dict[str, Any]:
    """By the path of a module what it has noted in a state dict, such as its version; {}: none."""
    found = getattr(state, "_metadata", None)
    if not isinstance(found, Mapping):
        return {}
    return {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Mapping)}


def renamed(state: Mapping[str, Any], plain: Callable[[list[str]], list[str]]) -> dict[str, Any]:
    """A state dict, and its metadata, with `plain` of each path in place of the path.

    Raises ValueError for two keys of one name.
    """
    named: dict[str, Any] = {}
    for key, value in state.items():
        name = ".".join(plain(key.split(".")))
        if name in named:
            raise ValueError(f"{key} is {name} without its wrappers, which is there already")
        named[name] = value
    notes = {}  # of a wrapper and what it wraps the latter's, which come later
    for path, noted in metadata(state).items():
        notes[".".join(plain(path.split(".")))] = noted
    return with_metadata(named, notes)


def plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the names that the network has by itself.

    What wrappers put before or into its keys is left out, in any order and number: `WRAPPERS`, and
    the `module` of DataParallel, DistributedDataParallel and AveragedModel (with its counter), if
    it is all that there is at its place. Raises ValueError for a key that is no text, and for two
    keys of one name.
    """
    _check_names(state)

    def unwrapped(path: list[str]) -> list[str]:
        return [part for part in path if part not in WRAPPERS]

    inside = defaultdict(set)  # the names beside one another
    for key in state:
        path = unwrapped(key.split("."))
        for depth, part in enumerate(path):
            leaf = depth == len(path) - 1
            if not (leaf and part == "n_averaged"):
                inside[tuple(path[:depth])].add((part, leaf))
    wrapped = {place for place, names in inside.items() if names == {("module", False)}}

    def plain(path: list[str]) -> list[str]:
        path = unwrapped(path)
        return [part for depth, part in enumerate(path) if tuple(path[:depth]) not in wrapped]

    def is_counter(key: str) -> bool:
        path = unwrapped(key.split("."))
        return path[-1:] == ["n_averaged"] and tuple(path[:-1]) in wrapped

    own = {key: value for key, value in state.items() if not is_counter(key)}
    return renamed(with_metadata(own, metadata(state)), plain)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, pickle.UnpicklingError | IndexError | EOFError):
        # the first one's text advises to run what is in the file, the others' says nothing
        found = re.search(r"GLOBAL (\S+)", text)
        what = f"it holds {found.group(1)}" if found else "it is damaged, or holds other objects"
        return f"{what}; expected plain tensors"
    if " " not in text:  # a number or a key alone
        return f"{type(error).__name__} {text}".strip()
    return text.splitlines()[0]


def _check_archive(path: Path) -> None:
    """Raise unless `path` is a sound archive that holds no more than its size, as torch writes."""
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError("it is no regular file")
    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"its {path.stat().st_size:,} bytes would unpack to {size:,}")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"checksum of {damaged} is wrong")


def _check_names(content: Any) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dictionary of tensors")
    for key in content:
        if not isinstance(key, str):
            raise ValueError(f"it has the key {short(repr(key))}; expected names")


def _previous(path: Path, number: int = 1) -> Path:
    return path.with_name(f"{path.stem}_previous{'' if number == 1 else number}{path.suffix}")

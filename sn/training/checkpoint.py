"""Checkpoints: written atomically, plain tensors and numbers, loaded with weights_only=True."""

import os
import pickle
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch

BROKEN = (
    RuntimeError,
    EOFError,
    OSError,
    KeyError,
    ValueError,
    NotImplementedError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state` so that `path` is at every moment a whole file; keep the one before it.

    The earlier checkpoint, unless it is broken, stays beside it as <stem>_previous<suffix>.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    with suppress(*BROKEN):
        _check_sums(path)
        os.replace(path, _previous(path))
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: str | Path) -> dict | None:
    """Load the newest readable checkpoint at `path` onto the CPU; None if there is none.

    A broken file is reported on stderr and the previous one taken. Raises ValueError if there are
    only broken ones.
    """
    path = Path(path)
    broken = []
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            continue
        try:
            _check_sums(candidate)
            return torch.load(candidate, map_location="cpu", weights_only=True)
        except BROKEN as error:
            broken.append(candidate)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"warning: cannot read checkpoint {candidate}: {reason}", file=sys.stderr)
    if broken:
        names = " and ".join(map(str, broken))
        raise ValueError(f"no readable checkpoint: {names}; delete to start anew")
    return None


def _check_sums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"checksum of {damaged} is wrong")


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}_previous{path.suffix}")

"""Checkpoints: written atomically, plain tensors and numbers, loaded with weights_only=True."""

import os
import pickle
import sys
from pathlib import Path

import torch


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state` so that `path` is at every moment a whole file; keep the one before it.

    The earlier checkpoint stays beside it as <stem>_previous<suffix>.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
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
            return torch.load(candidate, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
            broken.append(str(candidate))
            reason = str(error).splitlines()[0]
            print(f"warning: cannot read checkpoint {candidate}: {reason}", file=sys.stderr)
    if broken:
        raise ValueError(f"no readable checkpoint: {' and '.join(broken)}; delete to start anew")
    return None


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}_previous{path.suffix}")

"""Reading a run's files, whatever stands in their place."""

from pathlib import Path


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a regular file. Raises ValueError, naming it, for anything else."""
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError(f"{path} is no regular file")
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from None

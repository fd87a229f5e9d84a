"""What a run says: lines on stdout, times, a progress bar."""

import os
import sys
from typing import TextIO

from tqdm import tqdm


def say(text: str, error: bool = False) -> None:
    """Print a line now. An output that is gone (a closed pipe, a full disk) does not end a run.

    Nor does one that has no such characters.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed from the start
        return
    try:
        print(printable(text, stream.encoding or "utf-8"), file=stream, flush=True)
    except OSError:
        try:  # the rest of its buffer would make a good run's exit code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except OSError:  # no file behind it
            pass


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` with what `encoding` lacks, such as file names that are not UTF-8, as \\udcff."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def clock(seconds: float) -> str:
    """`1:02:03`."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def duration(seconds: float) -> str:
    """`0.43 s`, `7 min 9 s`, `2 h 5 min`, `3 d 4 h`: what somebody who waits wants to know."""
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for unit, part, size, fine in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // fine} {part}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def counted(count: int, noun: str) -> str:
    """`1 epoch`, `2,000 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def progress_bar(total: int, done: int, label: str | None, visible: bool) -> tqdm:
    """A bar on stderr, if that is a terminal."""
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit="step",
        leave=False,
        disable=not (visible and is_terminal(sys.stderr)),
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody watches; None: the stream was closed from the start."""
    return stream is not None and stream.isatty()


def line(values: dict[str, object]) -> str:
    """`loss 0.1234  top-1 56.70`: a line of figures, two spaces between."""
    parts = []
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name} {text}")
    return "  ".join(parts)

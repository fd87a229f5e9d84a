"""Image files: the unreadable ones, counted."""

import sys
from pathlib import Path


class BadImages:
    """Counts unreadable images over all processes, data workers and resumptions of a run.

    They share the text file `path`, one bad image a line, each once. Past `limit` of them `add`
    raises its error, naming the limit by `key`. Without a path nothing is counted and every bad
    image is past the limit.
    """

    def __init__(
        self, path: str | Path | None = None, limit: int = 0, key: str = "data.max_bad_images"
    ):
        self.path, self.limit, self.key = path and Path(path), limit, key

    def lines(self) -> list[str]:
        """What the file holds."""
        if self.path is None or not self.path.exists():
            return []
        return self.path.read_text(encoding="utf-8").splitlines()

    def add(self, error: ValueError) -> None:
        """Note a bad image, described by `error`; raise ValueError if that is one too many."""
        if not self.limit or self.path is None:
            raise error
        line = str(error).replace("\n", " ")
        known = self.lines()
        if line not in known:
            print(f"warning: {line}; skipped", file=sys.stderr, flush=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")  # one short write: whole, whoever else appends
            known = list(dict.fromkeys(self.lines()))
        if len(known) > self.limit:
            raise ValueError(
                f"{len(known)} unreadable images, more than {self.key}={self.limit}; "
                f"the last: {line}; all of them in {self.path}"
            )

"""One writer per run folder."""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from .display import say

BUSY_EXIT_CODE = 73


class Busy(OSError):
    """Another process works in the run folder; wait for it, or choose another folder."""


class FolderLock:
    """A lock on a run folder that the kernel drops when its owner dies, however that happens.

    POSIX record locks: they hold over NFS, a suspended owner keeps them, data workers do not
    inherit them. `.lock` in the folder names the owner; it stays when the lock is gone.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / ".lock"
        self._file: IO[str] | None = None

    def acquire(self, patience: float = 3.0) -> None:
        """Take the lock within `patience` seconds (a killed owner may take that long to end).

        Raises Busy, naming the owner, if another process has it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self._file = open(self.path, "a+", encoding="utf-8")
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    owner = self._owner()
                    file.close()
                    raise Busy(
                        f"{self.path.parent} is in use by {owner}; wait until it ends, or choose "
                        "another output_dir="
                    ) from None
                time.sleep(0.1)
            except OSError as error:  # a file system without locks
                say(
                    f"warning: {self.path.parent} cannot be locked ({error}); see to it that no "
                    "other run writes there",
                    error=True,
                )
                return
        since = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        try:
            file.truncate(0)
            file.write(json.dumps(owner))
            file.flush()
        except OSError as error:  # of a full disk, which does not name the file
            raise OSError(f"cannot write {self.path}: {error}") from None

    def release(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written
                self._file.close()
            self._file = None

    def _owner(self) -> str:
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except (OSError, ValueError, LookupError, TypeError):
            return "another process"

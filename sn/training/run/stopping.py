"""Ending in time: preemption signals, and a watchdog for runs that hang."""

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .display import say

HANG_EXIT_CODE = 4


class Preempted(RuntimeError):
    """The run was told to stop and has saved; the same command goes on."""


class StopSignal:
    """Notices SIGTERM (a scheduler takes the machine back), SIGUSR1 (it will, soon) and SIGHUP.

    A context manager. A signal that is ignored already (`nohup`) stays so. Of several processes
    each sees its own signals: add `requested` to numbers that are summed over all of them anyway,
    so that they agree on the step to stop at.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self):
        self.requested = False
        self._handlers = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            heeded = [s for s in self.signals if signal.getsignal(s) is not signal.SIG_IGN]
            self._handlers = {s: signal.signal(s, self._note) for s in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True


def spare_worker(_: int) -> None:
    """For a DataLoader's `worker_init_fn`: a signal is for the main process to heed.

    Launchers and schedulers send it to all processes of a group; a worker that ended would take the
    run with it before that can save. SIGTERM from the main process itself ends a worker.
    """
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    owner = multiprocessing.parent_process()
    assert owner is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # to be waited for
    threading.Thread(target=_end_for, args=(owner.pid,), daemon=True).start()


def _end_for(owner: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != owner:
        pass
    os._exit(0)


class Watchdog:
    """Ends the process, naming rank and place, when it makes no progress for `minutes`.

    A context manager. Collectives whose peers are gone, dead file systems and stuck data workers
    all end here; stderr gets every thread's stack. Exit code 4. Give the process group a longer
    timeout than this, so that this message comes first.
    """

    def __init__(self, minutes: float, rank: int = 0):
        self.seconds, self.rank = 60 * minutes, rank
        self.beat("the start")
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.beat(self._where)
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def beat(self, where: str) -> None:
        """The run is alive, at `where`."""
        self._where, self._time = where, time.monotonic()

    def over(self, items: Iterable, where: str) -> Iterator:
        """The items, each of them a sign of life."""
        for item in items:
            self.beat(where)
            yield item
        self.beat(where)

    def _watch(self) -> None:
        interval, last = min(1.0, self.seconds / 10), time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            if now - last > 10 * interval:  # the whole process was suspended: that does not count
                self._time += now - last
            last = now
            if now - self._time > self.seconds:
                say(
                    f"rank {self.rank}: no progress for {self.seconds / 60:g} minutes "
                    f"(timeout_minutes) at {self._where}; stacks follow",
                    error=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(HANG_EXIT_CODE)

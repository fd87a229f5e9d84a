"""Provisional."""

import signal


class Preempted(Exception):
    """Asked to stop; the run has been saved."""


class StopSignal:
    requested = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "requested", True))
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.before)

"""Signals are noticed and handlers put back; a run that hangs ends and says where."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from sn.training.run.stopping import HANG_EXIT_CODE, Preempted, StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_noticed(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.check("here")
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(Preempted, match="at the third image"):
            stop.check("the third image")
    assert signal.getsignal(number) == before
    assert not StopSignal().requested


def test_in_another_thread_it_is_harmless():
    found = []

    def enter():
        with StopSignal() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def run_python(code, timeout=60):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
    )


def test_hang_names_rank_and_place():
    done = run_python(
        "import time\n"
        "from sn.training.run.stopping import Watchdog\n"
        "def stuck_here(): time.sleep(50)\n"
        "with Watchdog(0.5 / 60, rank=3) as dog:\n"
        "    dog.beat('epoch 2, step 5 of 9')\n"
        "    stuck_here()\n"
    )
    assert done.returncode == HANG_EXIT_CODE
    assert "rank 3: no progress" in done.stderr and "epoch 2, step 5 of 9" in done.stderr
    assert "stuck_here" in done.stderr  # the stack


def test_progress_keeps_it_quiet():
    """Signs of life, 3 s of them with 2 s allowed; after the end none are needed."""
    done = run_python(
        "import time\n"
        "from sn.training.run.stopping import Watchdog\n"
        "with Watchdog(2 / 60) as dog:\n"
        "    for item in dog.over(range(30), 'work'): time.sleep(0.1)\n"
        "time.sleep(2.5)\n"
        "print('ended with', item)\n"
    )
    assert (done.returncode, done.stdout) == (0, "ended with 29\n"), done.stderr

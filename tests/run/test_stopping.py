"""Signals are noticed and handlers put back; a run that hangs ends and says where."""

import os
import signal
import sys
import threading
import time

import pytest
from workers import processes

from sn.training.run.stopping import HANG_EXIT_CODE, StopSignal, Watchdog


@pytest.mark.parametrize("number", StopSignal.signals)
def test_signal_is_noticed(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
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


def stuck_here(errors):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    with Watchdog(0.5 / 60, rank=3) as dog:
        dog.beat("epoch 2, step 5 of 9")
        time.sleep(50)


def lives(errors):
    """Signs of life, 2 s of them with 1.5 s allowed; after the end none are needed."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    with Watchdog(1.5 / 60) as dog:
        for _ in dog.over(range(20), "work"):
            time.sleep(0.1)
    time.sleep(1.8)
    sys.exit(29)


def test_hang_names_rank_and_place_and_progress_keeps_it_quiet(tmp_path):
    pair = [
        processes.Process(target=target, args=(tmp_path / target.__name__,))
        for target in (stuck_here, lives)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [HANG_EXIT_CODE, 29]
    errors = (tmp_path / "stuck_here").read_text()
    assert "rank 3: no progress" in errors and "epoch 2, step 5 of 9" in errors
    assert ", line " in errors and "in stuck_here" in errors  # the stack
    assert (tmp_path / "lives").read_text() == ""

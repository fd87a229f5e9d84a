"""What all tests share: one thread each, one server that forks fresh processes."""

import os

import pytest
import torch
from workers import PRELOAD, processes

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
processes.set_forkserver_preload(PRELOAD)


@pytest.fixture
def no_git(monkeypatch):
    """Records without the commit, which costs two processes each."""
    monkeypatch.setattr("sn.training.run.record.commit", lambda: None)

"""What all tests share: one thread each, one server that forks fresh processes."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from workers import PRELOAD, processes

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
processes.set_forkserver_preload(PRELOAD)


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def load_script(monkeypatch):
    """A script as a module, by its name; what it says begins with that name."""

    def load(name):
        path = SCRIPTS / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(sys, "argv", [str(path)])
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def script(load_script):
    """`main` of a script, called with its arguments."""
    return lambda name, *args: load_script(name).main([str(arg) for arg in args])


@pytest.fixture
def no_git(monkeypatch):
    """Records without the commit, which costs two processes each."""
    monkeypatch.setattr("sn.training.run.record.commit", lambda: None)

"""What all tests share: one thread each, one server that forks fresh processes."""

import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from workers import PRELOAD, processes

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
gc.set_threshold(100_000, 50, 100)  # a twentieth of the time went into looking at what stays
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would what tests start
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


@pytest.fixture
def late(monkeypatch):
    """The device decides on updates and the host learns of it a step later, as on CUDA."""
    from sn.training.run.guard import can_decide
    from sn.training.run.session import Session

    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, lr, fused: adam(groups, lr, fused=True))
    monkeypatch.setattr(Session, "is_late", lambda run, optimizer: can_decide(optimizer))


@pytest.fixture
def synchronisations():
    """`with synchronisations() as found:` collects the calls for which a host waits on CUDA."""
    return Synchronisations


class Synchronisations(TorchFunctionMode):
    WAITING = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        made = name in ("new_tensor", "tensor", "as_tensor") and not isinstance(args[-1], Tensor)
        if name in self.WAITING or made:  # from the host's memory, as it lies there
            self.found.append(name)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.found = []
        self.below = _Dispatched(self.found)
        self.below.__enter__()
        super().__enter__()
        return self.found

    def __exit__(self, *error):
        super().__exit__(*error)
        self.below.__exit__(*error)


class _Dispatched(TorchDispatchMode):
    """Those from within C++, too."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))

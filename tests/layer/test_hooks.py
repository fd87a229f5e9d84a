"""What layers define beyond forward, for models of any class."""

import pytest
import torch
from torch import nn

import sn
from sn import kernels
from sn.training.run.distributed import one_running_update, prepare_setting


class Own(nn.Module):
    """A layer of somebody else's with hooks of its own."""

    seen = ()

    def begin_step(self, progress):
        self.seen = (*self.seen, progress)


def test_begin_step_reaches_every_layer_that_wants_it():
    model = nn.Sequential(sn.SparseSwitchNorm2d(4), nn.Sequential(Own(), nn.BatchNorm2d(4)))
    for progress in (0.0, 0.25, 1):
        sn.begin_step(model, progress)
    assert model[1][0].seen == (0.0, 0.25, 1) and model[0].radius == 1
    for progress in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="progress="):
            sn.begin_step(model, progress)
    sn.set_radius(model, 0.5)  # sparse layers alone
    assert len(model[1][0].seen) == 3 and model[0].radius == 0.5


def test_connect_once_for_layers_of_several_classes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), sn.BatchKalmanNorm2d(4)
            self.head, self.last = nn.Linear(4, 5), sn.BatchKalmanNorm1d(5)

        def forward(self, x):
            return self.last(self.head(self.norm(self.conv(x)).mean((2, 3))))

    model = Twice()
    assert sn.connect(model) is model and len(model._forward_hooks) == 1
    assert model.norm.flow is model.last.flow is not None
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert sn.connect(plain) is plain and not plain._forward_hooks


def test_micro_batches_share_one_reference_and_synchronised_norms_refuse():
    layer = sn.BatchRenorm2d(4, r_images=(0, 0), d_images=(0, 0))
    with one_running_update(nn.Sequential(layer), 2) as begin:
        for index in range(2):
            begin(index)
            layer(torch.randn(3, 4, 5, 5))
            mean, var, images = layer.reference
            assert (mean == 0).all() and (var == 1).all() and images == 0
    assert layer.reference is None and layer.images_seen == 6
    model = nn.Sequential(nn.BatchNorm2d(4), sn.SyncSwitchNorm2d(4))
    with pytest.raises(ValueError, match="1 is a synchronised norm.*emulation=grouped"):
        prepare_setting(model, 4, 2, "accumulated", 2)


def test_a_statistic_that_no_kernel_knows_is_left_to_the_formula(monkeypatch):
    """Another name among the statistics must not be taken for one of those in the C code."""
    calls = []

    def formula(x, *_, statistics, **__):
        calls.append(statistics)
        return torch.full_like(x, 7)

    monkeypatch.setattr(kernels.functional, "switch_norm", formula)
    weights = torch.ones(2)
    options = kernels.Options(("in", "pixel"), None, True, 0.1, 1e-5, 1)
    tensors = (torch.randn(2, 3, 4, 4), weights, weights, None, None, None, None)
    assert (kernels.switch_norm_act(tensors, options) == 7).all()
    assert calls == [("in", "pixel")]


def test_a_method_of_the_networks_own_called_connect_is_left_alone():
    class Client(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def connect(self, host):
            raise AssertionError(host)

    assert isinstance(sn.convert(Client()).bn, sn.SwitchNorm2d)

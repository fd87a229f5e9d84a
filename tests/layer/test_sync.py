"""sync_sn: several gloo processes with unequal batches equal one process on the whole batch."""

import copy
import pickle

import oracle
import pytest
import sync_workers
import torch
from sync_workers import COUNTS
from torch import nn
from torch.utils.checkpoint import checkpoint
from workers import run_in_group

import sn
from sn.training.run.distributed import prepare_setting
from sn.variants import sync


@pytest.fixture(scope="module", params=COUNTS, ids="{} processes".format)
def ranks(request, tmp_path_factory):
    """The counts, and what every rank saved."""
    folder = tmp_path_factory.mktemp("ranks")
    counts = COUNTS[request.param]
    run_in_group(request.param, sync_workers.run, str(folder), counts)
    return counts, [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_outputs_gradients_and_statistics_are_the_whole_batchs(ranks):
    counts, saved = ranks
    for index, (statistics, dim, space) in enumerate(sync_workers.cases()):
        results = [rank["layers"][index] for rank in saved]
        shape = (sum(counts), 4, *space)
        x, upstream = oracle.values(shape, mean=3.0), oracle.values(shape, 7)
        layer = sync_workers.layer_of(statistics, dim)
        names = ("mean_weight", "var_weight", "weight", "bias")

        def whole(x, *parameters, statistics=statistics):
            return oracle.switch_norm(x, *parameters, statistics=statistics, num_groups=2)

        y, grads = oracle.gradients(whole, [x, *(getattr(layer, n) for n in names)], upstream)
        close(torch.cat([r["y"] for r in results]), y)
        close(torch.cat([r["x"] for r in results]), grads[0])
        for name, grad in zip(names, grads[1:], strict=True):
            # each rank holds its share: the sum is the gradient, once, whatever the world size
            close(sum(r["grads"][name] for r in results), grad)
        mean, var = (moment[0] for moment in oracle.batch_moments(x))
        for rank, result in enumerate(results):
            close(result["state"]["running_mean"], 0.3 * mean)
            has_kernels = sn.kernels.native.library() is not None and counts[rank] > 0
            assert result["by kernels"] == (has_kernels and (len(counts) == 2 or rank % 2 == 0))
            close(result["state"]["running_var"], 0.7 + 0.3 * var)
            assert result["state"]["num_batches_tracked"] == 1
            assert result["reduced"] == ([9], [8], [])  # 2 C + 1, 2 C, and none in evaluation
        running = (0.3 * mean, 0.7 + 0.3 * var)
        expected = oracle.switch_norm(
            x, *(getattr(layer, n) for n in names), running, statistics=statistics, num_groups=2
        )
        close(torch.cat([r["eval"] for r in results]), expected.detach())


def test_kernels_against_the_formula():
    if sn.kernels.native.library() is None:
        pytest.skip("the package was installed without a C compiler")
    run_in_group(2, sync_workers.run_forms)


def test_maps_of_unequal_size(ranks):
    _, saved = ranks
    parts = [oracle.values((2, 4, rank + 1, 3), rank) for rank in range(len(saved))]
    layer = sync_workers.layer_of(("bn",), 2)
    flat = torch.cat([p.transpose(0, 1).reshape(4, -1) for p in parts], 1).t()  # (values, C)
    mean = flat.mean(0).view(1, 4, 1, 1)
    std = (flat.var(0, correction=0) + layer.eps).sqrt().view(1, 4, 1, 1)
    for rank, x in enumerate(parts):
        expected = (x - mean) / std * layer.weight.view(1, 4, 1, 1) + layer.bias.view(1, 4, 1, 1)
        close(saved[rank]["ragged"], expected.detach())


def test_a_group_of_some_processes(ranks):
    _, saved = ranks
    x = torch.cat([oracle.values((2, 4, 3, 3), 50 + rank) for rank in range(2)])
    layer = sync_workers.layer_of(("in", "bn"), 2)
    names = ("mean_weight", "var_weight", "weight", "bias")
    expected = oracle.switch_norm(x, *(getattr(layer, n) for n in names), statistics=("in", "bn"))
    close(torch.cat([saved[0]["inner"], saved[1]["inner"]]), expected.detach())


def test_training_in_distributed_data_parallel(ranks):
    counts, saved = ranks
    model = sync_workers.network(sn.make_norm("sn", momentum=0.3))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with sn.backend("reference"):
        for step in range(3):
            x, labels = sync_workers.images(sum(counts), step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        for result in saved:
            close(result["network"], model.state_dict())
        world = len(saved)
        batches = []  # in each round all ranks' images are one batch
        for n in range(3):
            parts = sync_workers.images(n + 2, n)[0].split(1 + n)
            batches.append(torch.cat([parts[rank % 2] for rank in range(world)]))
        sn.batch_average(model, batches, 3)
    for result in saved:
        averaged = result["averaged"]
        for name, value in model.state_dict().items():
            if "tracked" not in name:
                close(averaged[name], value)


# --- in one process -----------------------------------------------------------------------------


def test_alone_it_is_switch_norm():
    for statistics, dim, space in sync_workers.cases():
        ours = sync_workers.layer_of(statistics, dim)
        plain = sync_workers.layer_of(statistics, dim, "sn")
        x = oracle.values((3, 4, *space))
        assert torch.equal(ours(x), plain(x)) and torch.equal(ours.eval()(x), plain.eval()(x))
        torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)
        assert repr(ours) == repr(plain).replace("SwitchNorm", "SyncSwitchNorm")


@pytest.fixture(params=["extension", "native", "reference"])
def reduced(request, monkeypatch):
    """Two processes with the same batch, by each implementation: what was summed, a log."""
    native = sn.kernels.native
    found = {"extension": native.extension, "native": native.library}.get(request.param)
    if found is not None and found() is None:
        pytest.skip("the package was installed without a C or C++ compiler")
    if request.param == "native":
        monkeypatch.setattr(native, "extension", lambda: None)
    log = []
    monkeypatch.setattr(sync.SyncSwitchNormBase, "_group", lambda layer: layer.training or None)
    monkeypatch.setattr(sync.dist, "all_reduce", lambda t, group: log.append(len(t)) or t.mul_(2))
    with sn.backend("reference" if request.param == "reference" else "native"):
        yield log


def test_gradients_of_parameters_follow_the_all_reduce(reduced):
    """As DistributedDataParallel sums them: otherwise processes that mix paths would not meet."""
    layer = sync_workers.layer_of(("in", "bn"), 2)
    for name, parameter in layer.named_parameters():
        parameter.register_hook(lambda grad, name=name: reduced.append(name))
    x = oracle.values((2, 4, 3, 2)).requires_grad_()
    layer(x).square().sum().backward()
    assert reduced[:2] == [9, 8] and len(reduced) == 6
    reduced.clear()
    torch.autograd.grad(layer(x).square().sum(), layer.bias)  # that of x is not asked for
    assert reduced == [9, 8, "bias"]
    reduced.clear()
    layer(x.detach()).square().sum().backward()
    assert 8 not in reduced and layer.weight.grad is not None


def test_frozen_parameters_get_no_gradient(reduced):
    layer = sync_workers.layer_of(("in", "bn"), 2)
    layer.weight.requires_grad_(False)
    layer.bias = None
    layer(oracle.values((2, 4, 3, 2))).square().sum().backward()
    assert layer.weight.grad is None and layer.mean_weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reduced, reentrant):
    """The gradients without it; running statistics are updated twice, as batch norm's."""
    layers = [sync_workers.layer_of(("in", "bn"), 2) for _ in range(2)]
    inputs = [oracle.values((2, 4, 3, 2), mean=1.0).requires_grad_() for _ in range(2)]
    y = checkpoint(layers[0], inputs[0], use_reentrant=reentrant)
    y.square().sum().backward()
    layers[1](inputs[1].detach())
    layers[1](inputs[1]).square().sum().backward()
    close(inputs[0].grad, inputs[1].grad)
    close(layers[0].state_dict(), layers[1].state_dict())
    for ours, plain in zip(*(layer.parameters() for layer in layers)):
        close(ours.grad, plain.grad)


@pytest.mark.parametrize("reduced", ["extension"], indirect=True)
@pytest.mark.parametrize("norm", ["sync_sn", "sn"])
def test_compiled_autograd(reduced, norm):
    """Around both passes, or around the backward pass alone, by when C++ has kept its things."""
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    layers = [sync_workers.layer_of(("in", "bn"), 2, norm) for _ in range(2)]
    inputs = [oracle.values((2, 4, 3, 2)).requires_grad_() for _ in range(2)]
    layers[1](inputs[1]).square().sum().backward()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        layers[0](inputs[0]).square().sum().backward()
    close(inputs[0].grad, inputs[1].grad)
    close(layers[0].weight.grad, layers[1].weight.grad)
    if norm == "sn":
        inputs[0].grad = None
        loss = layers[0](inputs[0]).square().sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("numbers", [9, 8])  # of the all-reduce forward, backward
def test_an_error_of_the_all_reduce(reduced, numbers, monkeypatch):
    def fail(sums, group):
        if len(sums) == numbers:
            raise ConnectionError("a process is gone")

    monkeypatch.setattr(sync.dist, "all_reduce", fail)
    layer = sync_workers.layer_of(("in", "bn"), 2)
    with pytest.raises(ConnectionError, match="gone"):
        layer(oracle.values((2, 4, 3, 2)).requires_grad_()).sum().backward()


def test_second_derivatives_are_an_error(reduced):
    x = oracle.values((2, 4, 3, 2)).requires_grad_()
    y = sync_workers.layer_of(("in", "bn"), 2)(x)
    (grad,) = torch.autograd.grad(y, x, oracle.values(y.shape, 1), create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (grad.square().sum() + y.sum()).backward()


@pytest.mark.parametrize("name", ["weight", "bias", "mean_weight", "var_weight"])
def test_parameters_of_another_size(reduced, name):
    layer = sync_workers.layer_of(("in", "gn", "bn"), 2)
    setattr(layer, name, nn.Parameter(torch.ones(2).double()))
    with pytest.raises(ValueError, match=name):
        layer(oracle.values((2, 4, 3, 2)))
    assert reduced == []


def test_groups_that_do_not_divide(reduced):
    layer = sync_workers.layer_of(("in", "gn", "bn"), 2)
    layer.num_groups = 3
    with pytest.raises(ValueError, match="num_groups=3"):
        layer(oracle.values((2, 4, 3, 2)))


def test_conversion_keeps_parameters_names_and_modes():
    bare = sn.make_norm("sn_in_ln")(4)
    model = nn.Sequential(sn.SwitchNorm2d(4), nn.BatchNorm2d(4), bare, sn.SwitchNorm1d(3).eval())
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    assert sn.convert_sync_switchnorm(model) is model
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["SyncSwitchNorm2d", "BatchNorm2d", "SwitchNorm2d", "SyncSwitchNorm1d"]
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert state.keys() == model.state_dict().keys()
    assert model[0].training and not model[3].training
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(twin) == repr(model)


def test_fused_activation_is_synchronised_too():
    layer = sn.SwitchNormAct2d(4, act_layer=nn.ReLU)
    plain = copy.deepcopy(layer)
    assert type(sn.convert_sync_switchnorm(layer)).__name__ == "SyncSwitchNormAct2d"
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert torch.equal(layer(x, residual), plain(x, residual))


def test_in_the_settings():
    """The whole batch of one process is exact; micro-batches are refused."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), sn.make_norm("sync_sn")(4))
    assert prepare_setting(model, 8, 2, "auto", 1) == ("grouped", 1)
    assert prepare_setting(model, 8, 2, "auto", 8) == ("none", 1)
    x = torch.randn(8, 3, 2, 2)
    y = sn.switch_norm(model[0](x), *(torch.ones(3),) * 2)
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ValueError, match="emulation=grouped"):
        prepare_setting(model, 8, 2, "accumulated", 1)


def test_the_check_for_nccl_works_over_gloo():
    run_in_group(2, sync_workers.run_gpu_check)

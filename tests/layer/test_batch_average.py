"""Batch average against population moments in float64, alone and in a group of processes."""

import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sn
from sn.batch_average import batch_average, batch_statistics_layers

SIZES = (4, 7, 1, 12)


def batches(sizes=SIZES, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 3, 5, 4, generator=generator) * (i + 1) + 5 * i).to(dtype)
        for i, n in enumerate(sizes)
    ]


def network(norm, dtype=torch.float64):
    torch.manual_seed(1)
    model = nn.Sequential(
        sn.make_norm(norm)(3), nn.Conv2d(3, 4, 3), nn.Dropout(0.5), sn.make_norm(norm)(4), nn.ReLU()
    )
    for layer in (model[0], model[3]):
        nn.init.normal_(layer.weight)
        if norm == "sn":
            nn.init.normal_(layer.mean_weight)
            nn.init.normal_(layer.var_weight)
    return model.to(dtype)


def population(parts, norm):
    """Mean and variance of all values per channel; BN stores the unbiased one, SN the biased."""
    values = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
    return values.mean(1), values.var(1, correction=1 if norm == "bn" else 0)


@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_first_layer_is_the_population(norm):
    """Unequal batches weigh by their values; the spread between batches counts."""
    model = network(norm)
    assert batch_average(model, batches()) == 4
    mean, var = population(batches(), norm)
    torch.testing.assert_close(model[0].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].running_var, var, rtol=1e-12, atol=1e-12)
    assert model[0].num_batches_tracked == 4


@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_deeper_layer(norm):
    """Its inputs come from batches that were normalised by themselves, without dropout."""
    model = network(norm)
    inputs = []
    for x in batches():
        layer = network(norm)[0].train()  # fresh: the batch's own statistics
        inputs.append(model[1](layer(x)).detach())
    batch_average(model, batches())
    mean, var = population(inputs, norm)
    torch.testing.assert_close(model[3].running_mean, mean, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model[3].running_var, var, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_one_batch_of_all_is_the_batch(norm):
    x = torch.cat(batches())
    model = network(norm)
    batch_average(model, [x])
    mean, var = population([x], norm)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    model.eval()
    fresh = network(norm).train()
    fresh[2].eval()
    if norm == "sn":  # evaluation then equals the training forward, biased as it is
        torch.testing.assert_close(model(x), fresh(x))


def test_large_mean_keeps_its_digits():
    """Float32 inputs of mean 1000 and deviation 1: no cancellation."""
    parts = [torch.randn(8, 3, 5, 4) + 1000 for _ in range(20)]
    for norm in ("bn", "sn"):
        model = nn.Sequential(sn.make_norm(norm)(3))
        batch_average(model, parts)
        mean, var = population([part.double() for part in parts], norm)
        torch.testing.assert_close(model[0].running_var.double(), var, rtol=1e-3, atol=0)
        torch.testing.assert_close(model[0].running_mean.double(), mean, rtol=1e-6, atol=0)


def state(model):
    return (
        [module.training for module in model.modules()],
        [
            (layer.momentum, getattr(layer, "virtual_gpus", None))
            for layer in batch_statistics_layers(model).values()
        ],
        {name: value.clone() for name, value in model.state_dict().items()},
        [len(module._forward_hooks) for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )  # fmt: skip


def odd_network(norm):
    """Modes, momenta and groups that differ from layer to layer."""
    model = network(norm)
    model.train()
    model[3].eval()
    model[3].momentum = None
    model[0].momentum = 0.3
    sn.set_virtual_gpus(model, 2)
    return model


@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_everything_else_is_restored(norm):
    model = odd_network(norm)
    before = state(model)
    batch_average(model, batches())  # sizes that 2 groups do not divide: each batch is one
    after = state(model)
    assert before[:2] == after[:2] and before[3:] == after[3:]
    for name, value in after[2].items():
        same = torch.equal(value, before[2][name])
        assert same != ("running" in name or "num_batches" in name), name
    mean, var = population(batches(), norm)
    torch.testing.assert_close(model[0].running_var, var)
    assert model[0].running_mean.grad_fn is None


@pytest.mark.parametrize("norm", ["bn", "sn"])
@pytest.mark.parametrize("broken", ["loader", "input", "interrupt"])
def test_unchanged_after_an_exception(broken, norm):
    model = odd_network(norm)
    model(torch.randn(4, 3, 5, 4, dtype=torch.float64))
    before = state(model)

    def loader():
        yield from batches()[:2]
        if broken == "interrupt":
            raise KeyboardInterrupt
        if broken == "loader":
            raise OSError("disk gone")
        yield torch.randn(2, 8, 5, 4, dtype=torch.float64)

    kinds = {"loader": OSError, "input": (RuntimeError, ValueError), "interrupt": KeyboardInterrupt}
    with pytest.raises(kinds[broken]):
        batch_average(model, loader())
    after = state(model)
    assert before[:2] == after[:2] and before[3:] == after[3:]
    for name, value in before[2].items():
        assert torch.equal(value, after[2][name]), name


@pytest.mark.parametrize("loader", [[], iter(()), [torch.empty(0, 3, 5, 4, dtype=torch.float64)]])
@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_no_batch(norm, loader):
    model = network(norm)
    before = state(model)
    with pytest.raises(ValueError, match="no batch"):
        batch_average(model, loader)
    for name, value in before[2].items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("item, number", [({"images": 1}, 1), ((), 1), (torch.ones(2, 3, 5, 4), 0)])
def test_what_is_no_batch_is_named(item, number):
    model = network("sn")
    before = state(model)
    kind = "num_batches=0; expected" if number == 0 else f"got {type(item).__name__} from the"
    with pytest.raises((TypeError, ValueError), match=kind):
        batch_average(model, [item], number)
    for name, value in before[2].items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_num_batches_caps():
    taken = []

    def loader():
        for x in batches():
            taken.append(len(x))
            yield x

    model = network("sn")
    assert batch_average(model, loader(), num_batches=2) == 2
    assert taken == [4, 7]
    mean, _ = population(batches()[:2], "sn")
    torch.testing.assert_close(model[0].running_mean, mean)
    with pytest.raises(ValueError, match="num_batches=0"):
        batch_average(model, loader(), num_batches=0)


@pytest.mark.parametrize("norm", ["gn", "ln", "in", "sn_in_ln"])
def test_nothing_to_average(norm):
    """The loader is not even asked."""

    def loader():
        raise AssertionError("asked for a batch")
        yield

    model = network(norm) if norm != "sn_in_ln" else nn.Sequential(sn.make_norm(norm)(3))
    before = state(model)
    assert batch_average(model, loader()) == 0
    assert state(model)[0] == before[0]


def test_items_may_be_pairs():
    pairs, plain = network("bn"), network("bn")
    batch_average(pairs, [(x, torch.zeros(len(x))) for x in batches()])
    batch_average(plain, batches())
    for a, b in zip(pairs.buffers(), plain.buffers()):
        assert torch.equal(a, b)


def test_is_exported_and_needs_no_gradient():
    model = network("sn")
    assert sn.batch_average is batch_average
    batch_average(model, batches())
    assert all(p.grad is None for p in model.parameters())


def test_layer_shared_by_two_places():
    """A layer that is called twice collects both calls."""
    layer = sn.SwitchNorm2d(3).double()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def forward(self, x):
            return self.norm(x), self.norm(10 * x)

    model = Twice()
    batch_average(model, batches())
    mean, var = population([*batches(), *(10 * x for x in batches())], "sn")
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)


SHARES = {
    "both": (((4, 7), 0), ((1, 12), 2)),
    "one has none": ((SIZES, 0), ((), 0)),
}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_processes_equal_one(norm, shares, tmp_path):
    """Two gloo processes with different shares end alike, and as one process with all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_imagenet"])  # one server for all tests
    processes = [
        context.Process(target=_average_share, args=(rank, port, norm, shares[rank], tmp_path))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    model = network(norm)
    batch_average(model, batches())
    for rank in range(2):
        used, buffers = torch.load(tmp_path / f"{rank}.pt")
        assert used == 4
        for name, value in model.named_buffers():
            torch.testing.assert_close(buffers[name], value, rtol=1e-11, atol=1e-11, msg=name)


def _average_share(rank, port, norm, share, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    sizes, first = share
    model = network(norm)
    used = batch_average(model, batches()[first : first + len(sizes)])
    torch.save((used, dict(model.named_buffers())), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_network_is_not_compiled_again_for_every_batch():
    model, plain = network("sn", torch.float32), network("sn", torch.float32)
    plain.load_state_dict(model.state_dict())
    parts = batches(dtype=torch.float32, sizes=[4] * 6)
    model.compile(backend="eager")
    model(parts[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert batch_average(model, parts) == batch_average(plain, parts) == 6
    for name, value in plain.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("norm", ["sn", "bn", "brn"])
def test_statistics_that_are_not_finite_are_replaced(norm):
    """As torch's update_bn replaces them."""
    layer = sn.make_norm(norm)(3)
    layer.running_mean[0], layer.running_var[1] = float("nan"), float("inf")
    x = torch.randn(8, 3, 5, 5)
    batch_average(nn.Sequential(layer), [x], 1)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3), correction=int(norm == "bn")))


def test_sparse_layers_do_not_choose():
    layer = sn.SparseSwitchNorm2d(3).eval()
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([3.0, 0.0, 0.0]))
    batch_average(layer, [torch.randn(4, 3, 5, 5)], 1)
    assert layer.mean_choice.sum() == 0 and layer.running_mean.abs().sum() > 0


@pytest.mark.parametrize("count", [2.5, None])
def test_the_number_of_batches_is_whole(count):
    with pytest.raises(ValueError, match=f"num_batches={count}"):
        sn.batch_average(nn.BatchNorm2d(3), [torch.randn(2, 3, 4, 4)], count)


def test_without_a_count_of_batches():
    """torch's layers train without one, old or hand-made; so does what we make of them."""
    x = torch.randn(8, 4, 3, 3)
    model = nn.Sequential(nn.BatchNorm2d(4), sn.GhostBatchNorm2d(4))
    for layer in model:
        layer.num_batches_tracked = None
    model(x)
    sn.set_virtual_gpus(model[1:], 2)
    for momentum, share in ((0.1, 0.1), (None, 0.0)):  # as torch's own
        model[1].momentum, before = momentum, model[1].running_mean.clone()
        model[1](x)
        expected = before.lerp(x.mean((0, 2, 3)), share)
        torch.testing.assert_close(model[1].running_mean, expected)
    sn.batch_average(model[:1], [x], 1)
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)))
    converted = sn.convert(model[:1], "sn", keep_outputs=True)
    torch.testing.assert_close(converted[0].running_mean, model[0].running_mean)
    assert converted[0].num_batches_tracked == 1

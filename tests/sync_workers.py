"""What test_sync.py runs in the processes of a gloo group."""

import copy
import importlib.util
import itertools
from pathlib import Path

import oracle
import torch
import torch.distributed as dist
from torch import nn

import sn

COUNTS = {2: (1, 4), 4: (3, 0, 1, 4)}  # samples of each rank; another rank's may be none
SETS = [("bn",), ("in", "ln", "bn"), ("in", "ln", "gn", "bn")]
SHAPES = {1: (5,), 2: (4, 3), 3: (2, 3, 2)}


def cases():
    for statistics, (dim, space) in itertools.product(SETS, SHAPES.items()):
        yield statistics, dim, space


def layer_of(statistics, dim, norm="sync_sn"):
    groups = {"num_groups": 2} if "gn" in statistics else {}
    layer = sn.make_norm(norm, dim=dim, statistics=statistics, momentum=0.3, **groups)(4).double()
    values = oracle.parameters(4, len(statistics), seed=1)
    with torch.no_grad():
        for name, value in zip(("mean_weight", "var_weight", "weight", "bias"), values):
            getattr(layer, name).copy_(value)
    return layer


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        norm(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        norm(6),
        nn.Flatten(),
        nn.Linear(6 * 4 * 3, 5),
    ).double()


def images(total, step):
    x = oracle.values((total, 3, 4, 3), 20 + step)
    return x, torch.arange(total) * 7 % 5


def part(value, counts, rank):
    return value.split(list(counts))[rank].clone()


def is_fused(y):
    """Whether a kernel is the last function of y: that of C++ has its class in the name."""
    return any(name in y.grad_fn.name() for name in ("_Fused", "SwitchNorm"))


def run(rank, folder, counts):
    """Save outputs and gradients of this rank's share for every case.

    Of four ranks those of odd number have no kernels: each takes what it has.
    """
    with sn.backend("reference" if len(counts) == 4 and rank % 2 else "auto"):
        _run(rank, folder, counts)


def _run(rank, folder, counts):
    dist.init_process_group("gloo")
    reduced = []
    all_reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        reduced.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    layers = []
    for statistics, dim, space in cases():
        layer = layer_of(statistics, dim)
        shape = (sum(counts), 4, *space)
        x = part(oracle.values(shape, mean=3.0), counts, rank).requires_grad_()
        y = layer(x)
        forward, reduced[:] = list(reduced), []
        (y * part(oracle.values(shape, 7), counts, rank)).sum().backward()
        backward, reduced[:] = list(reduced), []
        grads = {name: p.grad for name, p in layer.named_parameters()}
        evaluated = layer.eval()(x.detach())
        result = {"y": y.detach(), "x": x.grad, "grads": grads, "state": layer.state_dict()}
        result |= {"reduced": (forward, backward, list(reduced)), "eval": evaluated.detach()}
        result["by kernels"] = is_fused(y)
        layers.append(result)

    # unequal spatial sizes, as of detection; bn weights every value alike
    layer = layer_of(("bn",), 2)
    y = layer(oracle.values((2, 4, rank + 1, 3), rank))
    ragged = y.detach()

    # a group within the group: ranks 0 and 1
    pair = dist.new_group([0, 1])
    inner = sn.convert_sync_switchnorm(layer_of(("in", "bn"), 2, "sn"), pair)
    inner = copy.deepcopy(inner)
    inner_y = inner(oracle.values((2, 4, 3, 3), 50 + rank)).detach() if rank < 2 else None

    # sum and ReLU in the layer
    fused = sn.convert_sync_switchnorm(sn.SwitchNormAct2d(4).double())
    bare = sn.make_norm("sync_sn")(4).double()
    x, residual = oracle.values((2, 4, 3, 3), rank), oracle.values((2, 4, 3, 3), 80 + rank)
    torch.testing.assert_close(fused(x, residual), (bare(x) + residual).relu())

    # a network in DistributedDataParallel, converted, over three steps of unequal batches
    model = sn.convert_sync_switchnorm(network(sn.make_norm("sn", momentum=0.3)))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(3):
        x, labels = (part(value, counts, rank) for value in images(sum(counts), step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(parallel(x), labels, reduction="sum")
        (loss * dist.get_world_size() / sum(counts)).backward()
        optimizer.step()
    network_state = copy.deepcopy(model.state_dict())
    mine = [images(n + 2, n)[0].split(1 + n)[rank % 2] for n in range(3)]
    sn.batch_average(model, mine, 3)
    torch.save(
        {
            "layers": layers,
            "ragged": ragged,
            "inner": inner_y,
            "network": network_state,
            "averaged": model.state_dict(),
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def run_forms(rank):
    """The kernels against the plain formula: dtypes, layouts, ReLU, residuals, no gain, no shift.

    In some rounds the last rank alone has the formula; in every other one nothing is C++.
    """
    dist.init_process_group("gloo")
    native = sn.kernels.native
    extension = native.extension()
    tolerances = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}
    rounds = itertools.product(
        tolerances.items(), (False, True), (False, True), (True, False), ("weight", "bias", "")
    )
    for index, ((dtype, limit), last, fused, same, missing) in enumerate(rounds):
        if fused and dtype is torch.bfloat16:
            continue  # ReLU decides otherwise where rounding has changed a sign
        layer = sn.convert_sync_switchnorm(
            sn.SwitchNormAct2d(6, statistics=SETS[index % 3], act_layer=nn.ReLU if fused else None,
                               num_groups=2 if index % 3 == 2 else None)
        )  # fmt: skip
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(oracle.values(parameter.shape, index).float() / 2)
        if missing:
            setattr(layer, missing, None)
        layer = layer.double() if dtype is torch.float64 else layer
        shape = (2 + rank, 6, 3 + rank, 5)
        layout = torch.channels_last if last else torch.contiguous_format
        x, residual, upstream = (
            oracle.values(shape, 10 * rank + i, mean=i).to(dtype).contiguous(memory_format=layout)
            for i in (2, 0, 1)
        )
        native.extension = lambda: extension if index % 2 else None  # noqa: B023
        found = []
        for name in ("native" if same or rank == 0 else "reference", "reference"):
            twin = copy.deepcopy(layer)
            inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
            with sn.backend(name):
                y = twin(*inputs) if fused else twin(inputs[0])
                assert fused or is_fused(y) == (name == "native")
                y.backward(upstream)
            grads = [t.grad for t in (*inputs, *twin.parameters()) if t.grad is not None]
            found.append([y.detach(), *grads, *twin.buffers()])
        for ours, expected in zip(*found, strict=True):
            scale = expected.abs().max().item() if expected.is_floating_point() else 0
            torch.testing.assert_close(ours, expected, rtol=0, atol=limit * max(1.0, scale))
    dist.destroy_process_group()


def run_gpu_check(rank):
    """The check that waits for NCCL, over gloo."""
    path = Path(__file__).parents[1] / "scripts/gpu_ddp_smoke.py"
    spec = importlib.util.spec_from_file_location("gpu_ddp_smoke", path)
    smoke = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smoke)
    dist.init_process_group("gloo")
    device, plain = torch.device("cpu"), sn.make_norm("sn")
    smoke.check_synchronised(sn.make_norm("sync_sn"), plain, device)
    smoke.check_synchronised(smoke.Synchronised, plain, device, torch.float32, 1e-4)
    try:
        batch_norm = sn.make_norm("bn")
        smoke.check_synchronised(batch_norm, batch_norm, device)  # must not pass
    except AssertionError:
        dist.destroy_process_group()
    else:
        raise RuntimeError("batch norm of each process passed as synchronised")

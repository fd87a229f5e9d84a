"""Over NCCL: three DDP steps, fused layers against the plain formula; synchronised norms.

torchrun --standalone --nproc_per_node=<GPUs> scripts/gpu_ddp_smoke.py

Synchronised norms on unequal batches are held to one process with the whole batch, which proves
something from two GPUs on.
"""

import os
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sn


def build(device) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 2), sn.SwitchNormAct2d(32)]
    layers += [nn.Conv2d(32, 64, 3, 2), sn.SwitchNorm2d(64, virtual_gpus=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).to(
        device
    )


def train(backend: str, device, rank: int) -> list[torch.Tensor]:
    model = DistributedDataParallel(
        build(device), device_ids=[device.index] if device.type == "cuda" else None
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    with sn.backend(backend):
        for _ in range(3):
            x = torch.randn(16, 3, 64, 64, generator=generator).to(device)
            labels = torch.randint(10, (16,), generator=generator).to(device)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def check_synchronised(make, make_plain, device, dtype=torch.float64, tolerance=None) -> None:
    """Outputs, gradients of the first layer on unequal batches are the other's on the whole.

    In float64 sync_sn is the plain formula on a GPU, in float32 the kernels.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = [2 + other for other in range(world)]
    torch.manual_seed(0)
    layers = [norm(8).to(device, dtype) for norm in (make, make_plain)]
    with torch.no_grad():
        for parameters in zip(*(layer.parameters() for layer in layers)):
            value = torch.randn(parameters[0].shape, dtype=dtype)
            for parameter in parameters:
                parameter.copy_(value)
    whole, upstream = torch.randn(2, sum(counts), 8, 6, 5, dtype=dtype).to(device)
    outputs, grads = [], []
    for layer, part in zip(layers, (lambda value: value.split(counts)[rank], lambda value: value)):
        x = part(whole).clone().requires_grad_()
        y = layer(x)
        (y * part(upstream)).sum().backward()
        outputs.append([y.detach(), x.grad])
        grads.append([p.grad for p in layer.parameters()])
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(*outputs):
        close(ours, theirs.split(counts)[rank])
    for ours, theirs in zip(*grads):
        dist.all_reduce(ours)
        close(ours, theirs)
    for name, buffer in layers[0].named_buffers():
        close(buffer, layers[1].get_buffer(name), msg=name)


class Synchronised(sn.SyncSwitchNorm2d):
    """Stops for the all-reduces in a group of one process too."""

    def _group(self):
        return dist.group.WORLD if self.training else None


def main() -> None:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
        print("no GPU: gloo and the CPU's kernels, which proves this script alone")
    kernels = "triton" if device.type == "cuda" else "native"
    rank = dist.get_rank()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    fused, plain = (train(name, device, rank) for name in (kernels, "reference"))
    for ours, wanted in zip(fused, plain):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
        first = ours.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, ours), "the processes' weights differ"
    check_synchronised(sn.make_norm("sync_sn"), sn.make_norm("sn"), device)
    with sn.backend(kernels):
        check_synchronised(Synchronised, sn.make_norm("sn"), device, torch.float32, 1e-4)
    if device.type == "cuda":  # torch's has no other
        check_synchronised(sn.make_norm("sync_bn"), sn.make_norm("bn"), device)
    if rank == 0:
        world = dist.get_world_size()
        print(f"{world} processes: fused equals plain, weights agree")
        if world > 1:
            print("sync_sn and sync_bn equal one process on the whole batch")
        else:
            print("one process: sync_sn's kernels are right; over NCCL it remains unproven")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

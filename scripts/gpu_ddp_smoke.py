"""Three DDP steps over NCCL: each process's fused layers equal the plain formula, weights agree.

torchrun --standalone --nproc_per_node=<GPUs> scripts/gpu_ddp_smoke.py
"""

import os

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
    model = DistributedDataParallel(build(device), device_ids=[device.index])
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


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank = dist.get_rank()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    fused, plain = (train(name, device, rank) for name in ("triton", "reference"))
    for ours, wanted in zip(fused, plain):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
        first = ours.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, ours), "the processes' weights differ"
    if rank == 0:
        print(f"{dist.get_world_size()} processes: fused equals plain, weights agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

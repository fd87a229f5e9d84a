"""Time a detector's training step and its memory with each norm, side by side in one run.

    python scripts/bench_detection.py                                 # small, on the CPU
    python scripts/bench_detection.py --architecture mask_rcnn_fpn --backbone resnet50 \\
        --size 800 1333 --device cuda --precision bf16 --out results/bench/detection_gpu.json

Every part has the norm; the images are random and the same for all. The norms take turns, step by
step, so that what else the machine does hits them alike: compare ratios. Memory: on CUDA what is
allocated at the peak of a step; on the CPU what a step adds at its peak, in a process of its own.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from common import bench
from common.bench import ratio

import sn
from sn.training.detection.detectors import ARCHITECTURES, PARTS, build_detector
from sn.training.run.record import environment

NORMS = ("frozen_bn", "bn", "gn", "sn")
SMALL = {  # the proxies' model
    "fpn_channels": 64,
    "box_features": 128,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "rois_per_image": 32,
    "proposals_train": 100,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time detectors with SN, GN, BN and frozen BN.")
    bench.add_arguments(parser, rounds=10)
    parser.add_argument("--norms", nargs="+", default=NORMS, help=f"default: {' '.join(NORMS)}")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="faster_rcnn_fpn")
    parser.add_argument("--backbone", default="resnet18", metavar="RESNET")
    parser.add_argument("--size", nargs=2, type=int, default=(96, 128), metavar=("H", "W"))
    parser.add_argument("--images", type=int, default=2, help="per step (default: 2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what peak_memory starts
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.images < 1 or min(args.size) < 32:
        parser.error("--rounds and --images must be 1 or more, --size 32 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    unknown = [norm for norm in args.norms if norm not in sn.norms.NORMS]
    if unknown:
        parser.error(f"unknown norm {unknown[0]}; choose from {sorted(sn.norms.NORMS)}")
    if args.measure is not None:
        print(measure(args))
        return
    steps = {norm: step_of(args, norm) for norm in args.norms}
    seconds = bench.interleaved(steps, args.rounds, args.clock, args.device)
    del steps  # their weights would count in every norm's peak
    arguments = sys.argv[1:] if argv is None else argv
    memory = {norm: peak_memory(args, norm, arguments) for norm in args.norms}
    result = summarise(args, seconds, memory)
    print(table(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(args.out)


def options(args: argparse.Namespace) -> dict:
    """The detector's size: the proxies' below ResNet-50, the paper's from there on."""
    small = args.backbone in ("resnet18", "resnet34")
    if args.architecture == "faster_rcnn_c4":
        return {"rois_per_image": 32, "anchor_sizes": (16, 32, 64)} if small else {}
    return SMALL if small else {}


def step_of(args: argparse.Namespace, norm: str):
    """A function that does one training step of a detector with `norm` in every part."""
    torch.manual_seed(0)
    norms = {part: sn.make_norm(norm) for part in PARTS}
    norms |= {part: None for part in PARTS if part not in ARCHITECTURES[args.architecture]}
    model = build_detector(args.architecture, 80, norms, args.backbone, **options(args))
    model.to(args.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    height, width = args.size
    images = [torch.rand(3, height, width, device=args.device) for _ in range(args.images)]
    masks = torch.zeros(2, height, width, dtype=torch.uint8, device=args.device)
    masks[0, height // 8 : height // 2, width // 8 : width // 2] = 1
    masks[1, height // 4 : height - 4, width // 4 : width - 4] = 1
    boxes = [
        [width // 8, height // 8, width // 2, height // 2],
        [width // 4, height // 4, width - 4, height - 4],
    ]
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32, device=args.device),
        "labels": torch.tensor([1, 2], device=args.device),
        "masks": masks,
    }

    def step() -> None:
        torch.manual_seed(0)
        optimizer.zero_grad(set_to_none=True)
        bf16 = args.precision == "bf16"
        with torch.autocast(args.device, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = sum(model(images, [target] * args.images).values())
        loss.backward()
        optimizer.step()

    return step


def peak_memory(args: argparse.Namespace, norm: str, arguments: list[str]) -> float:
    """MiB at the peak of a step: all that is allocated on the GPU, what is added on the CPU."""
    if args.device == "cuda":
        step = step_of(args, norm)
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    # glibc gives freed tensors back at once only if it maps each of them
    others = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment = others | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *arguments, "--measure", norm]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    if found.returncode:
        raise SystemExit(f"the process that measures {norm} failed: {found.stderr[-500:]}")
    return float(found.stdout)


def measure(args: argparse.Namespace) -> float:
    """MiB that a step adds to this process at its peak, weights and momentum being there. Linux."""
    step = step_of(args, args.measure)
    step()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    step()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """MiB of this process's memory by the kernel's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) / 1024


def summarise(args, seconds: dict[str, list[float]], memory: dict[str, float]) -> dict:
    """Medians, and medians of the ratio to the first norm of the same round."""
    first = args.norms[0]
    rows = {}
    for norm in args.norms:
        rows[norm] = {
            "steps_per_s": round(1 / statistics.median(seconds[norm]), 4),
            f"time_over_{first}": round(ratio(seconds[norm], seconds[first]), 3),
            "peak_mib": round(memory[norm], 1),
        }
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "measure")}
    settings |= {"size": list(args.size), "norms": list(args.norms)}
    device = torch.device(args.device)
    facts = bench.circumstances(device) | environment(device)
    return {"settings": settings, "norms": rows, **facts}


def table(result: dict) -> str:
    """Plain text: a line per norm."""
    (ratio,) = [key for key in next(iter(result["norms"].values())) if key.startswith("time_over")]
    lines = [f"{'norm':12}{'steps/s':>10}{ratio.replace('_', ' '):>22}{'peak MiB':>12}"]
    for norm, row in result["norms"].items():
        lines.append(
            f"{norm:12}{row['steps_per_s']:>10.3f}{row[ratio]:>22.2f}{row['peak_mib']:>12.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

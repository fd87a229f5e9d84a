"""Time switchable normalisation against its peers, in one run, interleaved.

    python scripts/bench_norm.py                            # the layer, 3 sets of shapes, 2 layouts
    python scripts/bench_norm.py --networks                 # whole training steps
    python scripts/bench_norm.py --networks --compile
    python scripts/bench_norm.py --device cuda --dtype bfloat16 --batch 256

Every layer is first held to float64; one that is wrong is not timed. A round times every layer
once, a ratio is taken within its round, and the median over the rounds counts. `floor` is the share
of the time that eight passes over the tensor take at the speed of a copy: forward + backward of a
layer that reads x twice and writes y, then reads dy and x twice and writes dx.

On the CPU it runs with one thread in a child whose malloc keeps its memory: otherwise every large
tensor is mapped and zeroed anew, which takes longer than the layers and hides their differences.
Writes <output>.json (with the environment) and <output>.png.
"""

import argparse
import copy
import math
import os
import statistics as stats
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import bench
from torch import nn

import sn

# channels, height, width: how often the network has it
RESNET50 = {
    (64, 112, 112): 1,
    (64, 56, 56): 6,
    (256, 56, 56): 4,
    (128, 56, 56): 1,
    (128, 28, 28): 7,
    (512, 28, 28): 5,
    (256, 28, 28): 1,
    (256, 14, 14): 11,
    (1024, 14, 14): 7,
    (512, 14, 14): 1,
    (512, 7, 7): 5,
    (2048, 7, 7): 4,
}
CIFAR = {(16, 32, 32): 7, (32, 16, 16): 6, (64, 8, 8): 6}  # ResNet-20
DETECTION = {  # Faster R-CNN's backbone and FPN, an image of 400 x 544
    (64, 200, 272): 1,
    (256, 100, 136): 4,
    (512, 50, 68): 5,
    (1024, 25, 34): 7,
    (2048, 13, 17): 4,
    (256, 13, 17): 1,
}
PASSES = {"forward": 3, "forward+backward": 8, "eval": 2}


class OfficialStyle(nn.Module):
    """The arithmetic of the authors' layer as PyTorch runs it: unbiased variance, E[x^2] form."""

    def __init__(self, num_features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(1, num_features, 1))
        self.register_buffer("running_var", torch.zeros(1, num_features, 1))

    def forward(self, x):
        size = x.shape
        x = x.reshape(size[0], size[1], -1)
        mean_in, var_in = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        square = var_in + mean_in**2
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = square.mean(1, keepdim=True) - mean_ln**2
        if self.training:
            mean_bn = mean_in.mean(0, keepdim=True)
            var_bn = square.mean(0, keepdim=True) - mean_bn**2
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(0.1 * mean_bn)
                self.running_var.mul_(0.9).add_(0.1 * var_bn)
        else:
            mean_bn, var_bn = self.running_mean, self.running_var
        w, v = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = w[0] * mean_in + w[1] * mean_ln + w[2] * mean_bn
        var = v[0] * var_in + v[1] * var_ln + v[2] * var_bn
        x = (x - mean) / (var + 1e-5).sqrt()
        return x.view(size) * self.weight + self.bias


class Forced(sn.SwitchNorm2d):
    def __init__(self, num_features, backend):
        super().__init__(num_features)
        self.backend = backend

    def forward(self, x):
        with sn.backend(self.backend):
            return super().forward(x)


class Alone(sn.SyncSwitchNorm2d):
    """The synchronised layer with its all-reduces in a group of this process alone."""

    def _group(self):
        if not dist.is_initialized():
            backend = "nccl" if self.weight.is_cuda else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return dist.group.WORLD if self.training else None


def virtual(make, num_features: int) -> nn.Module:
    """A layer of two virtual GPUs, the most that every set of shapes has samples for."""
    layer = make(num_features)
    layer.virtual_gpus = 2
    return layer


def of_dtype(make, dtype: torch.dtype):
    """With parameters of the dtype of its inputs: on CUDA group norm takes no others."""
    return lambda num_features: make(num_features).to(dtype)


def contestants(device: str, dtype: torch.dtype, only: list[str] | None = None) -> dict:
    """name -> callable(channels); bn is the measure of the others."""
    layers = {"bn": nn.BatchNorm2d, "sn": sn.SwitchNorm2d}
    for name in ("reference", "triton") if device == "cuda" else ("reference",):
        layers[f"sn_{name}"] = partial(Forced, backend=name)
    layers["official_style"] = OfficialStyle
    for name in ("gn", "ln"):
        layers[name] = of_dtype(sn.make_norm(name), dtype)
    layers["bn_2gpus"] = partial(virtual, sn.make_norm("bn"))
    layers["brn_2gpus"] = partial(virtual, sn.make_norm("brn", r_images=(0, 0), d_images=(0, 0)))
    layers["ssn"] = sn.make_norm("ssn")
    layers["sync_sn"] = Alone
    layers["bn+relu"] = lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True))
    if hasattr(sn, "SwitchNormAct2d"):
        layers["sn+relu"] = sn.SwitchNormAct2d
    return {name: make for name, make in layers.items() if only is None or name in ["bn", *only]}


def is_right(make, channels: int, dtype: torch.dtype, device: str, layout) -> float:
    """The layer's largest error against itself in float64 by the plain formula, over the scale."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, channels, 14, 13)
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    dy = torch.randn(shape, generator=generator)
    layer = make(channels).to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(device) / 2)
    results = []
    exact = torch.float64
    for kind in (exact, dtype):
        inputs = x.to(dtype).to(device, kind).contiguous(memory_format=layout).requires_grad_()
        own = copy.deepcopy(layer)
        if kind == exact:
            own.to(exact)
        with sn.backend("reference") if kind == exact else nullcontext():
            y = own(inputs)
        grads = torch.autograd.grad(y, (inputs, *own.parameters()), dy.to(device, y.dtype))
        results.append([y.detach().double(), *(g.double() for g in grads)])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results))


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    base = times["bn"]
    return {
        name: {
            "ms": round(1e3 * stats.median(own), 4),
            "over_bn": round(bench.ratio(own, base), 4),
            "best_over_bn": round(min(own) / min(base), 4),
        }
        for name, own in times.items()
    }


@contextmanager
def quiet_stderr():
    """The profiler logs its start and stop, and the lack of a GPU."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def kept_and_peak(layer, x, dy, device: str) -> tuple[int, int]:
    """Bytes kept for the backward pass, and the peak of memory above x and dy in a step."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x).backward(dy)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with quiet_stderr(), torch.profiler.profile(profile_memory=True) as profile:
            layer(x).backward(dy)
        now = peak = 0
        events = profile.profiler.kineto_results.events()
        for event in sorted(events, key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
    x.grad = None
    return sum(kept.values()), peak


def bench_layers(args, sets: dict, save) -> list[dict]:
    dtype, device = getattr(torch, args.dtype), args.device
    how = args.rounds, args.clock, device
    layers = contestants(device, dtype, args.only)
    rows = []
    for layout_name in args.layouts:
        layout = getattr(torch, layout_name)
        wrong = {}
        for name, make in layers.items():
            try:
                error = is_right(make, 32, dtype, device, layout)
            except RuntimeError as failure:  # one that cannot run here does not keep the others
                if name == "bn":
                    raise
                wrong[name] = math.nan
                print(f"{name}: {str(failure).splitlines()[0]}, not timed")
                continue
            if not error < (1e-4 if dtype == torch.float32 else 4e-2):
                wrong[name] = error
                print(f"{name}: wrong by {error:.1e}, not timed")
        for set_name, (batch, shapes) in sets.items():
            for shape, count in shapes.items():
                size = (batch, *shape)
                x = torch.randn(size, device=device, dtype=dtype)
                x = x.contiguous(memory_format=layout).requires_grad_()
                dy = torch.randn_like(x)
                row = {"set": set_name, "layout": layout_name, "shape": size, "count": count}
                row["megabytes"] = round(x.nbytes / 1e6, 2)
                built = {n: make(shape[0]).to(device) for n, make in layers.items()}
                built = {n: layer for n, layer in built.items() if n not in wrong}
                clone = partial(torch.Tensor.clone, x.detach())
                least = 0.005 if device == "cpu" else 0.01
                copies = bench.interleaved({"bn": clone}, *how, least=least)["bn"]
                one_pass = stats.median(copies) / 2

                def train(layer, x=x, dy=dy):
                    x.grad = None
                    layer(x).backward(dy)

                def infer(layer, x=x):
                    with torch.no_grad():
                        layer(x)

                for mode, call in (
                    ("forward+backward", train),
                    ("forward", infer),
                    ("eval", infer),
                ):
                    if args.quick and mode != "forward+backward":
                        continue
                    for layer in built.values():
                        layer.train(mode != "eval")
                    calls = {n: partial(call, layer) for n, layer in built.items()}
                    row[mode] = summary(bench.interleaved(calls, *how, least=least))
                    for result in row[mode].values():
                        result["floor"] = round(1e3 * one_pass * PASSES[mode] / result["ms"], 3)
                for name, layer in built.items():
                    kept, peak = kept_and_peak(layer.train(), x, dy, device)
                    row["forward+backward"][name]["kept_over_x"] = round(kept / x.nbytes, 4)
                    row["forward+backward"][name]["peak_over_x"] = round(peak / x.nbytes, 4)
                rows.append(row)
                save(rows)
                shown = row["forward+backward"]
                print(
                    f"{set_name:9} {layout_name:17} {str(size):22}"
                    + "".join(f" {n} {shown[n]['over_bn']:.2f}" for n in shown if n != "bn")
                    + f" | bn {shown['bn']['ms']:.2f} ms",
                    flush=True,
                )
    return rows


def geometric_mean(values: list[float]) -> float:
    return stats.geometric_mean(values) if values else float("nan")


def aggregate(rows: list[dict]) -> list[dict]:
    """Per set and layout: geometric mean, worst, and the sum over a network's layers."""
    table = []
    for key in dict.fromkeys((row["set"], row["layout"]) for row in rows):
        group = [row for row in rows if (row["set"], row["layout"]) == key]
        for mode in PASSES:
            if mode not in group[0]:
                continue
            for name in group[0][mode]:
                ratios = [row[mode][name]["over_bn"] for row in group]
                total = sum(row["count"] * row[mode][name]["ms"] for row in group)
                base = sum(row["count"] * row[mode]["bn"]["ms"] for row in group)
                entry = {"set": key[0], "layout": key[1], "mode": mode, "layer": name}
                entry["geometric_mean"] = round(geometric_mean(ratios), 3)
                entry["worst"] = round(max(ratios), 3)
                entry["sum"] = round(total / base, 3)
                table.append(entry)
    return table


class Block(nn.Module):
    def __init__(self, fan_in, width, stride, norm, fused):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.stride, self.pad, self.fused = stride, width - fan_in, fused

    def forward(self, x):
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.pad))
        if self.fused:
            return self.bn2(self.conv2(self.bn1(self.conv1(x))), shortcut)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def resnet20(norm, fused: bool = False) -> nn.Module:
    if fused:
        norm = sn.SwitchNormAct2d
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm(16)]
    if not fused:
        layers.append(nn.ReLU())
    width = 16
    for stage in (16, 32, 64):
        for block in range(3):
            stride = 2 if stage > 16 and block == 0 else 1
            layers.append(Block(width, stage, stride, norm, fused))
            width = stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet50(norm, fused: bool = False) -> nn.Module:
    from torchvision.models import resnet50 as build

    model = build(norm_layer=norm)
    if fused:
        from sn.training.classification.models import fuse_activations

        fuse_activations(model)
    return model


def bench_networks(args, save) -> list[dict]:
    device, rows = args.device, []
    networks = {
        "ResNet-20": (resnet20, (128, 3, 32, 32), 10),
        "ResNet-50": (resnet50, (args.batch, 3, 224, 224), 1000),
    }
    norms = {"bn": nn.BatchNorm2d, "sn": sn.SwitchNorm2d}
    if not args.compile:
        norms |= {"sn+relu": sn.SwitchNorm2d, "gn": sn.make_norm("gn")}
        norms["sn_reference"] = partial(Forced, backend="reference")
        norms["official_style"] = OfficialStyle
    norms = {n: norm for n, norm in norms.items() if not args.only or n in ["bn", *args.only]}
    if args.only_networks:
        networks = {name: networks[name] for name in args.only_networks}
    for layout_name in args.layouts:
        layout = getattr(torch, layout_name)
        for network, (build, size, classes) in networks.items():
            torch.manual_seed(0)
            x = torch.randn(size, device=device).contiguous(memory_format=layout)
            labels = torch.randint(classes, (size[0],), device=device)
            calls = {}
            for name, norm in norms.items():
                model = (
                    build(norm, fused=name == "sn+relu").to(device).to(memory_format=layout).train()
                )
                if args.compile:
                    torch._dynamo.reset()
                    model = torch.compile(model, fullgraph=True)

                def step(model=model, x=x, labels=labels):
                    half = args.dtype != "float32"
                    with torch.autocast(device, getattr(torch, args.dtype), enabled=half):
                        loss = F.cross_entropy(model(x).float(), labels)
                    for parameter in model.parameters():
                        parameter.grad = None
                    loss.backward()

                calls[name] = step
            result = summary(bench.interleaved(calls, args.rounds, args.clock, device))
            row = {"network": network, "layout": layout_name, "input": size}
            row |= {"compiled": args.compile, "step": result}
            rows.append(row)
            save(rows)
            print(network, layout_name, {n: r["over_bn"] for n, r in result.items()}, flush=True)
    return rows


def chart(result: dict, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib, no chart")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["layers"] or [
        {"set": row["network"], "layout": row["layout"], "forward+backward": row["step"]}
        for row in result["networks"]
    ]
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    figure, axes = plt.subplots(len(layouts), 1, figsize=(11, 3.4 * len(layouts)), squeeze=False)
    markers = dict(zip(contestants(result["environment"]["kind"], torch.float32), "_os^DvPX*<>hp"))
    for axis, layout in zip(axes[:, 0], layouts):
        group = [row for row in rows if row["layout"] == layout]
        for name in group[0]["forward+backward"]:
            if name == "bn":
                continue
            ratios = [row["forward+backward"].get(name, {}).get("over_bn") for row in group]
            strong = name.startswith("sn") and name != "sn_reference"
            axis.plot(
                ratios,
                markers.get(name, "o"),
                label=name,
                ms=8 if strong else 5,
                alpha=1 if strong else 0.6,
            )
        axis.axhline(1, color="black", lw=0.8)
        labels = [
            row["set"] + ("\n" + "x".join(map(str, row["shape"])) if "shape" in row else "")
            for row in group
        ]
        axis.set_xticks(range(len(group)), labels, rotation=60, fontsize=6, ha="right")
        axis.set_yscale("log")
        axis.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
        axis.minorticks_off()
        axis.set_ylabel("forward + backward\nover nn.BatchNorm2d")
        axis.set_title(f"{layout}, {result['environment']['dtype']}", fontsize=9)
        axis.grid(axis="y", lw=0.3)
    axes[0, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.suptitle(f"{result['environment']['device']}, torch {result['environment']['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_arguments(parser, rounds=9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, help="of the ResNet-50 shapes (8 on cpu, 256 on cuda)")
    parser.add_argument("--sets", nargs="+", default=["resnet50", "cifar", "batch2", "detection"])
    parser.add_argument(
        "--layouts", nargs="+", default=["contiguous_format", "channels_last"], metavar="LAYOUT"
    )
    parser.add_argument("--only", nargs="+", metavar="LAYER", help="these and bn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", action="store_true", help="whole steps instead of layers")
    parser.add_argument("--only-networks", nargs="+", metavar="NETWORK", help="of these two")
    parser.add_argument("--compile", action="store_true", help="with --networks: torch.compile")
    parser.add_argument("--quick", action="store_true", help="forward + backward alone")
    parser.add_argument("--output", type=Path, help="default: results/bench/<device>_<what>")
    args = parser.parse_args()
    bench.keep_memory(args.device)
    torch.set_num_threads(args.threads)
    args.batch = args.batch or (8 if args.device == "cpu" else 256)
    sets = {
        "resnet50": (args.batch, RESNET50),
        "cifar": (128, CIFAR),
        "batch2": (2, RESNET50),
        "detection": (2, DETECTION),
    }
    result = {
        "environment": bench.circumstances(args.device)
        | {"dtype": args.dtype, "rounds": args.rounds, "clock": args.clock, "kind": args.device},
        "layers": [],
        "networks": [],
    }
    what = ("networks_compiled" if args.compile else "networks") if args.networks else "layers"
    path = bench.output(args.output, f"{args.device}_{what}")

    def save(rows: list[dict]) -> None:
        result["networks" if args.networks else "layers"] = rows
        if not args.networks:
            result["summary"] = aggregate(rows)
        bench.write_json(path, result)

    if args.networks:
        bench_networks(args, save)
    else:
        bench_layers(args, {name: sets[name] for name in args.sets}, save)
        for entry in result["summary"]:
            print(*entry.values())
    chart(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Time style transfer with BN, IN and SN against the PyTorch examples' network, in one run.

    python scripts/bench_style.py                                 # 128 px, 2 images, CPU
    python scripts/bench_style.py --device cuda --size 256 --batch 4 --rounds 30
    python scripts/bench_style.py --clock cpu                     # on a machine that is busy

The peer has the architecture of pytorch/examples' fast_neural_style (instance norm, the same
sizes), written anew: separate padding modules, no scaled tanh. A round times every network once,
in turn; a ratio is taken within its round and the median over the rounds counts. A training step
is forward, VGG16's losses, backward and Adam; weights of VGG16 are random, which costs the same.
Writes <output>.json with the environment and <output>.md.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import bench
from torch import Tensor, nn

import sn
from sn.training.run.record import environment
from sn.training.style.networks import (
    LossNetwork,
    build_style_net,
    content_loss,
    gram,
    load_loss_network,
    style_loss,
)

CONTENT = "relu2_2"
STYLE = ["relu1_2", "relu2_2", "relu3_3", "relu4_3"]
NETWORKS = ("bn", "in", "sn", "peer")


class PeerBlock(nn.Module):
    """Padding, convolution, instance norm as modules of their own."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, zoom: int = 1):
        super().__init__()
        self.zoom = zoom
        self.pad = nn.ReflectionPad2d(kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride)
        self.norm = nn.InstanceNorm2d(outputs, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.zoom > 1:
            x = F.interpolate(x, mode="nearest", scale_factor=self.zoom)
        return self.norm(self.conv(self.pad(x)))


class PeerNet(nn.Module):
    """The architecture of the PyTorch examples' transformation network."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(
            [PeerBlock(3, 32, 9), PeerBlock(32, 64, 3, 2), PeerBlock(64, 128, 3, 2)]
        )
        self.residual = nn.ModuleList(
            nn.ModuleList([PeerBlock(128, 128, 3), PeerBlock(128, 128, 3)]) for _ in range(5)
        )
        self.up = nn.ModuleList([PeerBlock(128, 64, 3, zoom=2), PeerBlock(64, 32, 3, zoom=2)])
        self.last = nn.Sequential(nn.ReflectionPad2d(4), nn.Conv2d(32, 3, 9))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.down:
            x = torch.relu(block(x))
        for first, second in self.residual:
            x = x + second(torch.relu(first(x)))
        for block in self.up:
            x = torch.relu(block(x))
        return self.last(x)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time style transfer against its peer.")
    bench.add_arguments(parser, rounds=7)
    parser.add_argument("--size", type=int, default=128, help="side of training crops")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--megapixels", type=float, default=0.25, help="of the picture stylized")
    parser.add_argument("--output", type=Path, help="default: results/bench/style")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    side = 4 * round((args.megapixels * 1e6) ** 0.5 / 4)
    nets = {name: build(name).to(device) for name in NETWORKS}
    check_sizes(nets)
    vgg = load_loss_network("random")
    vgg.features.to(device)
    crops = torch.rand(args.batch, 3, args.size, args.size, device=device)
    picture = torch.rand(1, 3, side, side, device=device)
    tasks = {}
    for name, net in nets.items():
        tasks[name] = {
            "training step": training_step(net, vgg, crops),
            "network alone, forward + backward": network_step(net, crops),
            "stylizing": stylizing(net, picture),
        }
    seconds = {name: {} for name in tasks}
    for task in tasks["peer"]:
        steps = {name: own[task] for name, own in tasks.items()}
        for name, found in bench.interleaved(
            steps, args.rounds, args.clock, device, warm_up=1
        ).items():
            seconds[name][task] = [round(second, 6) for second in found]
    report = {
        **bench.circumstances(device),
        **environment(device),
        "size": args.size,
        "batch": args.batch,
        "picture": [side, side],
        "rounds": args.rounds,
        "clock": args.clock,
        "seconds": seconds,
        "over_peer": {
            task: {name: round(bench.ratio(own[task], base), 3) for name, own in seconds.items()}
            for task, base in seconds["peer"].items()
        },
    }
    path = bench.output(args.output, "style")
    bench.write_json(path, report)
    text = table(report)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return PeerNet() if name == "peer" else build_style_net(sn.make_norm(name))


def check_sizes(nets: dict[str, nn.Module]) -> None:
    """The networks are comparable: convolutions of the same shapes in the same order."""
    shapes = [
        [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Conv2d)]
        for net in nets.values()
    ]
    if any(other != shapes[0] for other in shapes):
        raise SystemExit(f"bench_style.py: convolutions differ: {shapes}")


def training_step(net: nn.Module, vgg: LossNetwork, crops: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    with torch.no_grad():
        targets = [gram(f) for f in vgg(crops[:1], STYLE).values()]

    def step() -> None:
        net.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            content = vgg(crops, [CONTENT])[CONTENT]
        features = vgg(net(crops), STYLE)
        loss = content_loss(features[CONTENT], content)
        loss = loss + style_loss(list(features.values()), targets)
        loss.backward()
        optimizer.step()

    return step


def network_step(net: nn.Module, crops: Tensor) -> Callable[[], None]:
    def step() -> None:
        net.train()
        net(crops).mean().backward()

    return step


def stylizing(net: nn.Module, picture: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def step() -> None:
        net.eval()
        net(picture)

    return step


def table(report: dict) -> str:
    """The report as Markdown: speeds (medians) and, in brackets, time over the peer's."""
    seconds, over = report["seconds"], report["over_peer"]
    megapixels = report["picture"][0] * report["picture"][1] / 1e6
    lines = [
        f"<!-- {report['command']} -->",
        f"{report['device']}, torch {report['versions']['torch']}, float32, {report['clock']} "
        f"clock, {report['rounds']} rounds, commit {str(report['commit'])[:10]}; training on "
        f"{report['batch']} crops of {report['size']} px, stylizing {megapixels:.2f} megapixels. "
        "In brackets the time over the peer's (median of ratios within a round).",
        "",
        "| network | training steps/s | network alone, forward + backward, steps/s | "
        "stylizing, ms/megapixel |",
        "| --- | --- | --- | --- |",
    ]
    for name in seconds:
        median = {task: statistics.median(values) for task, values in seconds[name].items()}
        step, alone, stylize = median
        figures = (
            f"{1 / median[step]:.2f} ({over[step][name]:.2f})",
            f"{1 / median[alone]:.2f} ({over[alone][name]:.2f})",
            f"{1000 * median[stylize] / megapixels:.0f} ({over[stylize][name]:.2f})",
        )
        title = "PyTorch examples' network (IN)" if name == "peer" else f"ours, {name.upper()}"
        lines.append(f"| {title} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

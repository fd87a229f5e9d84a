"""The supernet of NAS-Bench-201's cell: every edge is the weighted sum of all its operations.

Source: Dong and Yang, NAS-Bench-201, ICLR 2020, section 2.1 (the network around the cells), 5 (the
search with DARTS); Liu et al., DARTS, arXiv 1806.09055, section 2.2 (the weighted sum).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .benchmark import EDGES, OPERATIONS

NONE, SKIP, CONV_1X1, CONV_3X3, POOL = range(len(OPERATIONS))
CONVOLUTIONS = ("nor_conv_1x1", "nor_conv_3x3")
STAGES = 3
SPREAD = 1e-3  # standard deviation of the operations' control parameters at the start

Norm = Callable[..., nn.Module]  # of the channels, and affine=


class Supernet(nn.Module):
    """Images (N, 3, H, W) to logits: three stages of `cells` cells, a residual block before two.

    The blocks halve the size and double the `channels`. `norm` makes every normalisation layer.

    `operations` (edges, operations) are the control parameters of the operations, shared by all
    cells; their softmax over each edge are the operation weights. The norms inside cells have no
    gain and shift, which could take the place of an operation's weight.
    """

    def __init__(self, num_classes: int, cells: int, channels: int, norm: Norm):
        super().__init__()
        self.operations = nn.Parameter(SPREAD * torch.randn(len(EDGES), len(OPERATIONS)))
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), norm(channels, affine=True)
        )
        self.stages = nn.ModuleList()
        for stage in range(STAGES):
            width = channels * 2**stage
            layers = [Reduction(width // 2, width, norm)] if stage else []
            layers += [Cell(width, norm) for _ in range(cells)]
            self.stages.append(nn.ModuleList(layers))
        self.last_norm = norm(width, affine=True)
        self.classifier = nn.Linear(width, num_classes)

    def operation_weights(self) -> Tensor:
        """(edges, operations), each row adds to 1."""
        return self.operations.softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.operation_weights()
        x = self.stem(x)
        for stage in self.stages:
            for layer in stage.children():
                x = layer(x, weights) if isinstance(layer, Cell) else layer(x)
        return self.classifier(self.last_norm(x).relu().mean((2, 3)))


class Cell(nn.Module):
    """Node 0 is the input, node 3 the output; a node is the sum of its edges from earlier ones."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.edges = nn.ModuleList(
            nn.ModuleDict(
                {
                    OPERATIONS[CONV_1X1]: ConvNorm(channels, channels, 1, norm, affine=False),
                    OPERATIONS[CONV_3X3]: ConvNorm(channels, channels, 3, norm, affine=False),
                }
            )
            for _ in EDGES
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x: (N, C, H, W), also the result's shape; weights: (edges, operations)."""
        nodes, inputs = {0: x}, {}
        for (start, end), convolutions, weight in zip(EDGES, self.edges, weights):
            if start not in inputs:  # complete: all edges into a node stand before those out of it
                value = nodes[start]
                pooled = F.avg_pool2d(value, 3, 1, 1, count_include_pad=False)
                inputs[start] = value, pooled, value.relu()
            value, pooled, active = inputs[start]
            y = weight[SKIP] * value + weight[POOL] * pooled
            for operation in (CONV_1X1, CONV_3X3):
                y = y + weight[operation] * convolutions[OPERATIONS[operation]](active)
            nodes[end] = nodes[end] + y if end in nodes else y
        return nodes[len(nodes) - 1]


class ConvNorm(nn.Module):
    """Convolution that keeps the size at stride 1, and norm; the input has had its ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        norm: Norm,
        affine: bool,
        stride: int = 1,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm = norm(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Reduction(nn.Module):
    """Residual block of stride 2; the shortcut is pooled and gets its channels by a convolution."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm):
        super().__init__()
        self.first = ConvNorm(in_channels, out_channels, 3, norm, affine=True, stride=2)
        self.second = ConvNorm(out_channels, out_channels, 3, norm, affine=True)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x.relu()).relu())
        return y + self.shortcut(F.avg_pool2d(x, 2))


def derive(weights: Tensor) -> tuple[str, ...]:
    """The operation of the largest weight (or control parameter) of each edge, `none` among them.

    weights: (edges, operations). Source: NAS-Bench-201's own search with DARTS, which takes the
    largest of all five. Differs from DARTS, which leaves out `none`.
    """
    return tuple(OPERATIONS[place] for place in weights.argmax(1).tolist())


def operation_metrics(model: Supernet) -> dict[str, float]:
    """The operation weights, of every edge and averaged over edges, and what a cell would hold."""
    weights = model.operation_weights().detach().double()
    rows = dict(zip((f"{start}-{end}" for start, end in EDGES), weights)) | {
        "mean": weights.mean(0)
    }
    cell = derive(weights)
    return {
        **{
            f"operations/{name}/{operation}": weight.item()
            for name, row in rows.items()
            for operation, weight in zip(OPERATIONS, row)
        },
        "cell/convolutions": sum(operation in CONVOLUTIONS for operation in cell),
        "cell/skip_connections": cell.count("skip_connect"),
    }

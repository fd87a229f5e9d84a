"""The network that is searched: cells of the micro space, with shared weights or one architecture.

layers normal cells, with a reduction before two of them; every cell reads the two before it. With
shared weights each node has both separable convolutions for each entry it may read, and a forward
pass uses those that its architecture asks for. Source: official code, micro_child.

Differs: dropout is off when an architecture is scored. Drop path acts on shared weights as well; in
the official code it does so in the fixed network alone. That network's cells have a convolution of
their own for the last input, strides in the reduction cells and no 1x1 convolution at the end; here
a fixed architecture has the cells of the search. The auxiliary head's last convolution covers the
whole map once; there it is padded and averaged over places.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .space import OPERATIONS, Architecture, Node, loose_ends

KERNELS = (3, 5)  # of the separable convolutions, OPERATIONS 0 and 1
AUX_CHANNELS = (128, 768)


class Child(nn.Module):
    """Images (N, 3, H, W) to logits; with `aux_weight` and in training, auxiliary ones as well.

    With `architecture` the network is that one alone, and batch norm keeps running statistics for
    evaluation. Without it the weights are shared, an architecture comes with every call, and batch
    norm always takes the batch's statistics, also to score: running ones would mix architectures.

    `filters` are the channels of the first cells, doubled by each of the two reductions.
    `drop_path` (share of paths dropped at the last layer at the end of the run) and `dropout`
    (before the classifier) act in training; `progress` in [0, 1] is the fraction of the run done.
    """

    def __init__(
        self,
        num_classes: int = 10,
        layers: int = 6,
        filters: int = 20,
        nodes: int = 5,
        image_size: int = 32,
        stem_stride: int = 1,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        aux_weight: float = 0.0,
        architecture: Architecture | None = None,
    ):
        super().__init__()
        if architecture is not None and len(architecture.normal) != nodes:
            raise ValueError(
                f"the architecture has {len(architecture.normal)} nodes, child.nodes={nodes}"
            )
        self.nodes, self.architecture, self.aux_weight = nodes, architecture, aux_weight
        self.drop_path = drop_path
        fixed = architecture is not None
        size = -(-image_size // stem_stride)
        channels = filters
        self.stem = ConvNorm(3, 3 * filters, 3, fixed, stride=stem_stride, relu=False)
        self.cells, self.reductions = nn.ModuleList(), nn.ModuleDict()
        shapes = [(3 * filters, size), (3 * filters, size)]  # channels and size of the last two
        self.reduced = reduction_layers(layers)
        self.aux = None
        for layer in range(layers + 2):
            cell = None
            if layer in self.reduced:
                channels, size = 2 * channels, -(-size // 2)
                self.reductions[str(layer)] = Reduction(shapes[1][0], channels, fixed)
                shapes = [shapes[1], (channels, size)]
            if fixed:
                cell = architecture.reduction if layer in self.reduced else architecture.normal
            self.cells.append(Cell(shapes, channels, nodes, cell))
            shapes = [shapes[1], (channels, size)]
            if aux_weight and layer == self.reduced[-1] + 1:
                self.aux = AuxiliaryHead(channels, size, num_classes, fixed)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor, architecture: Architecture | None = None, progress: float = 0.0):
        architecture = architecture or self.architecture
        if architecture is None:
            raise ValueError("a child with shared weights needs an architecture for every call")
        aux = None
        last = [self.stem(x)] * 2
        for layer, cell in enumerate(self.cells):
            nodes = architecture.normal
            if layer in self.reduced:
                nodes = architecture.reduction
                last = [last[1], self.reductions[str(layer)](last[1])]
            drop = self.drop_path * progress * (layer + 1) / len(self.cells)
            last = [last[1], cell(last, nodes, drop if self.training else 0.0)]
            if self.aux is not None and self.training and layer == self.reduced[-1] + 1:
                aux = self.aux(last[1])
        logits = self.classifier(self.dropout(last[1].relu().mean((2, 3))))
        return logits if aux is None else (logits, aux)

    def loss(self, outputs, labels: Tensor) -> Tensor:
        """Cross-entropy, with `aux_weight` times the auxiliary head's where there is one."""
        if not isinstance(outputs, tuple):
            return F.cross_entropy(outputs, labels)
        logits, aux = outputs
        return F.cross_entropy(logits, labels) + self.aux_weight * F.cross_entropy(aux, labels)


def reduction_layers(layers: int) -> list[int]:
    """Which of the layers + 2 cells are reduction cells: 2 and 5 of 8."""
    distance = layers // 3
    return [distance, 2 * distance + 1]


class Cell(nn.Module):
    """`nodes` nodes over the two inputs; the loose ends, joined by a 1x1 convolution, go out.

    `fixed`: the nodes that it will be called with, if these are always the same.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        channels: int,
        nodes: int,
        fixed: tuple[Node, ...] | None = None,
    ):
        super().__init__()
        self.shared = fixed is None
        self.inputs = nn.ModuleList()
        for in_channels, size in shapes:
            if size != shapes[1][1]:
                self.inputs.append(Reduction(in_channels, channels, not self.shared, relu=True))
            elif in_channels != channels:
                self.inputs.append(ConvNorm(in_channels, channels, 1, not self.shared))
            else:
                self.inputs.append(nn.Identity())
        self.convolutions = nn.ModuleDict()
        for node in range(nodes):
            for side in ("left", "right"):
                wanted = range(len(KERNELS)) if self.shared else [getattr(fixed[node], side)]
                for operation in wanted:
                    if operation < len(KERNELS):
                        self.convolutions[f"{node}_{side}_{OPERATIONS[operation]}"] = SeparableConv(
                            channels, KERNELS[operation], node + 2 if self.shared else None
                        )
        ends = range(nodes + 2) if self.shared else loose_ends(fixed)
        self.output = nn.ParameterDict(
            {str(entry): _he_normal((channels, channels, 1, 1)) for entry in ends}
        )
        self.norm = BatchNorm(channels, None if self.shared else True)

    def forward(self, inputs: Sequence[Tensor], nodes: tuple[Node, ...], drop: float) -> Tensor:
        entries = [module(x) for module, x in zip(self.inputs, inputs)]
        for index, node in enumerate(nodes):
            left = self._operate(entries, index, "left", node.left_input, node.left, drop)
            right = self._operate(entries, index, "right", node.right_input, node.right, drop)
            entries.append(left + right)
        ends = loose_ends(nodes)
        joined = torch.cat([entries[entry] for entry in ends], 1).relu()
        weight = torch.cat([self.output[str(entry)] for entry in ends], 1)
        return self.norm(F.conv2d(joined, weight))

    def _operate(self, entries, node: int, side: str, entry: int, operation: int, drop: float):
        x, name = entries[entry], OPERATIONS[operation]
        if name == "identity":
            return x
        if name == "avg_pool_3x3":
            y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        elif name == "max_pool_3x3":
            y = F.max_pool2d(x, 3, 1, 1)
        else:
            convolution = self.convolutions[f"{node}_{side}_{name}"]
            y = convolution(x, entry if self.shared else None)
        return drop_paths(y, drop)


def drop_paths(x: Tensor, drop: float) -> Tensor:
    """Set a share `drop` of the samples to 0, the others times 1 / (1 - drop)."""
    if drop == 0.0:
        return x
    keep = torch.rand(len(x), 1, 1, 1, device=x.device, dtype=x.dtype) >= drop
    return x * (keep / (1 - drop))


class SeparableConv(nn.Module):
    """Twice: ReLU, depthwise, pointwise, batch norm. `entries` sets of weights, or (None) one."""

    def __init__(self, channels: int, kernel: int, entries: int | None):
        super().__init__()
        sets = 1 if entries is None else entries
        self.depthwise = nn.ParameterList(
            _he_normal((sets, channels, 1, kernel, kernel)) for _ in range(2)
        )
        self.pointwise = nn.ParameterList(
            _he_normal((sets, channels, channels, 1, 1)) for _ in range(2)
        )
        self.norms = nn.ModuleList(BatchNorm(channels, True if entries is None else entries)
                                   for _ in range(2))  # fmt: skip

    def forward(self, x: Tensor, entry: int | None = None) -> Tensor:
        for depthwise, pointwise, norm in zip(self.depthwise, self.pointwise, self.norms):
            weight = depthwise[entry or 0]
            x = F.conv2d(x.relu(), weight, padding=weight.shape[-1] // 2, groups=len(weight))
            x = norm(F.conv2d(x, pointwise[entry or 0]), entry)
        return x


class BatchNorm(nn.Module):
    """Batch norm with the batch's statistics always, or (`kind` True) torch's with running ones.

    `kind` a number: that many sets of gain and shift, chosen by `entry`; None: one.
    """

    def __init__(self, channels: int, kind: int | bool | None):
        super().__init__()
        self.inner = nn.BatchNorm2d(channels) if kind is True else None
        if kind is not True:
            shape = (channels,) if kind is None else (kind, channels)
            self.weight = nn.Parameter(torch.ones(shape))
            self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, entry: int | None = None) -> Tensor:
        if self.inner is not None:
            return self.inner(x)
        weight, bias = self.weight, self.bias
        if entry is not None:
            weight, bias = weight[entry], bias[entry]
        # F.batch_norm refuses one value a channel, which one image left for scoring has on 1x1 maps
        return torch.batch_norm(
            x, weight, bias, None, None, True, 0.1, 1e-5, torch.backends.cudnn.enabled
        )


class ConvNorm(nn.Module):
    """(ReLU,) convolution without bias, batch norm."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, fixed: bool, stride=1, relu=True
    ):
        super().__init__()
        self.weight = _he_normal((channels, in_channels, kernel, kernel))
        self.norm = BatchNorm(channels, fixed or None)
        self.stride, self.relu = stride, relu

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu() if self.relu else x
        padding = self.weight.shape[-1] // 2
        return self.norm(F.conv2d(x, self.weight, stride=self.stride, padding=padding))


class Reduction(nn.Module):
    """Half the size: two 1x1 convolutions of every second pixel, one shifted by a pixel."""

    def __init__(self, in_channels: int, channels: int, fixed: bool, relu: bool = False):
        super().__init__()
        half = channels // 2
        self.even = _he_normal((half, in_channels, 1, 1))
        self.odd = _he_normal((channels - half, in_channels, 1, 1))
        self.norm = BatchNorm(channels, fixed or None)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu() if self.relu else x
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        halves = F.conv2d(x, self.even, stride=2), F.conv2d(shifted, self.odd, stride=2)
        return self.norm(torch.cat(halves, 1))


class AuxiliaryHead(nn.Module):
    """A second classifier two thirds of the way up."""

    def __init__(self, channels: int, size: int, num_classes: int, fixed: bool):
        super().__init__()
        if size < 5:
            raise ValueError(
                f"child.aux_weight needs 5x5 maps or larger after the reductions, not {size}x{size}"
            )
        narrow, wide = AUX_CHANNELS
        self.narrow = ConvNorm(channels, narrow, 1, fixed, relu=False)
        pooled = (size - 5) // 3 + 1
        self.wide = _he_normal((wide, narrow, pooled, pooled))
        self.norm = BatchNorm(wide, fixed or None)
        self.classifier = nn.Linear(wide, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(F.avg_pool2d(x.relu(), 5, 3)).relu()
        return self.classifier(self.norm(F.conv2d(x, self.wide)).relu().flatten(1))


def _he_normal(shape: Sequence[int]) -> nn.Parameter:
    """Normal with standard deviation sqrt(2 / fan in); the last three sizes are the fan in."""
    return nn.Parameter(torch.randn(tuple(shape)) * math.sqrt(2 / math.prod(shape[-3:])))

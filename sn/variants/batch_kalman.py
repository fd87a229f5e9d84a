"""Batch Kalman Normalization: batch statistics corrected by those of the layers before.

Source: Wang et al., Batch Kalman Normalization, arXiv 1802.03133 (NIPS 2018: Kalman Normalization),
in the diagonal form of the authors' code for CIFAR.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..running import RunningNorm
from ..tracing import Proxy

Moments = tuple[Tensor, Tensor]  # mean and variance, each (virtual GPUs, C)


class BatchKalmanNormBase(RunningNorm):
    """Batch norm with filtered moments: use BatchKalmanNorm1d, 2d or 3d, then `connect_bkn`.

    With the batch's mean m and variance s and the predicted mu_p and S_p, a training batch is
    normalised by

        mu = q mu_p + (1 - q) m,    S = q S_p + (1 - q) s + q (1 - q) (m - mu_p)^2,

    per channel, q being `gain`; the running statistics average mu and S, and evaluation takes them.
    The prediction: every value of the layer before is N(mu, S) of that layer, independent of all
    others, and goes as it is through the ReLU and the convolution between them. The prediction is
    left out where the mean of S_p / s over the channels is 100 or more; a layer without another
    before it is batch norm (as all are with q = 0). Gradients flow through everything.

    With `virtual_gpus` G each of G groups is filtered by itself, with the groups of the layers
    before; the running statistics take the mean of the groups' mu and S, once per call.

    Source: the authors' code; q is 0.05 there with large batches and 0.9 with 2 images. The values
    are those before normalisation, gain and shift, as there. Differs: the code draws Gaussian
    maps and measures their moments after the convolution, which makes training random; here these
    moments are computed, what a large map without borders would show. The covariance and the noise
    R of the paper's equations have no part in the code, nor here.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        gain: float = 0.05,
        virtual_gpus: int = 1,
    ):
        if not track_running_stats:
            raise ValueError("bkn needs its running statistics; use norm 'bn'")
        if not isinstance(gain, (int, float)) or not 0 <= gain <= 1:
            raise ValueError(f"gain={gain}; expected the share of the prediction, 0 to 1")
        super().__init__(num_features, eps, momentum, affine, device, dtype, virtual_gpus, bias)
        self.gain = gain
        self.flow: _Flow | None = None  # of the network it is connected in
        self.place: tuple[int | None, int] | None = None  # the steps before it and of itself there
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, *spatial).

        Raises RuntimeError in training if `connect_bkn` has not seen the network.
        """
        if isinstance(x, Proxy):
            return self.as_node(x)
        self._check_input(x)
        if not self.training or x.numel() == 0:
            if self.flow is not None and self.flow.values and self.place is not None:
                self.flow.put(self.place[1], None)
            return self._evaluate(x)
        if self.flow is None or not self.flow.values or self.place is None:
            raise RuntimeError(
                "a bkn layer trains within the network that sn.connect_bkn(model) has seen; run it "
                "whole, and connect it with inputs that reach every layer"
            )
        groups = x.unflatten(0, (self.virtual_gpus, -1))  # (G, n, C, ...)
        groups = groups.to(torch.promote_types(x.dtype, torch.float32))
        over = (1, *range(3, groups.dim()))
        var, mean = torch.var_mean(groups, over, correction=0)
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            before, own = self.place
            if before is not None:
                mean, var = kalman_update((mean, var), self.flow.moments(before), self.gain)
        self.flow.put(own, (mean, var))
        self._update(mean.mean(0), var.mean(0))
        shape = (self.virtual_gpus, 1, self.num_features, *(1,) * (groups.dim() - 3))
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        y = (groups - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape[1:])
        return y.flatten(0, 1).to(x.dtype)

    def extra_repr(self) -> str:
        options = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, gain={self.gain}"
        if not self.affine:
            options += ", affine=False"
        elif self.bias is None:
            options += ", bias=False"
        return options + (f", virtual_gpus={self.virtual_gpus}" if self.virtual_gpus != 1 else "")


class BatchKalmanNorm1d(BatchKalmanNormBase):
    """Batch Kalman Normalization of (N, C) or (N, C, L); see BatchKalmanNormBase."""

    input_dims = (2, 3)


class BatchKalmanNorm2d(BatchKalmanNormBase):
    """Batch Kalman Normalization of (N, C, H, W); see BatchKalmanNormBase."""

    input_dims = (4,)


class BatchKalmanNorm3d(BatchKalmanNormBase):
    """Batch Kalman Normalization of (N, C, D, H, W); see BatchKalmanNormBase."""

    input_dims = (5,)


def kalman_update(batch: Moments, predicted: Moments, gain: float) -> Moments:
    """The filtered mean and variance; those of the batch where the prediction is far too wide."""
    (mean, var), (mean_p, var_p) = batch, predicted
    wide = ~((var_p / var).mean(1, keepdim=True) < 100)  # 0 / 0 counts as wide
    mean_p, var_p = torch.where(wide, mean, mean_p), torch.where(wide, var, var_p)
    spread = gain * (1 - gain) * (mean - mean_p).square()
    return gain * mean_p + (1 - gain) * mean, gain * var_p + (1 - gain) * var + spread


# --- moments of what stands between two layers ----------------------------------------------------


def _relu(moments: Moments) -> Moments:
    """Mean and variance of max(z, 0) for Gaussian z, without cancellation in the variance."""
    mean, var = moments
    deviation = var.clamp(min=1e-12).sqrt()  # t^2 stays finite, and so do gradients
    t = mean / deviation
    density = (-t.square() / 2).exp() / math.sqrt(2 * math.pi)
    above, below = torch.erfc(-t / math.sqrt(2)) / 2, torch.erfc(t / math.sqrt(2)) / 2
    share = above + t.square() * above * below + t * density * (below - above) - density.square()
    return mean * above + deviation * density, var * share.clamp(min=0)


def _clip(top: float, moments: Moments) -> Moments:
    """Mean and variance of min(max(z, 0), top) = max(z, 0) - max(z - top, 0), ReLU6 say."""
    mean, var = _relu(moments)
    mean_over, var_over = _relu((moments[0] - top, moments[1]))
    square = var + mean.square() - (var_over + mean_over.square()) - 2 * top * mean_over
    mean = mean - mean_over
    return mean, (square - mean.square()).clamp(min=0)


def _linear(layer: nn.Module, moments: Moments) -> Moments:
    """Mean and variance after a convolution or linear layer of independent values."""
    mean, var = moments
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.to(mean.dtype)
    weight = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())  # (g, o, i, taps)
    mean, var = (
        torch.einsum("bgi,goi->bgo", value.unflatten(1, (groups, -1)), taps.sum(3)).flatten(1)
        for value, taps in ((mean, weight), (var, weight.square()))
    )
    return mean if layer.bias is None else mean + layer.bias, var


def _add(first: Moments, second: Moments) -> Moments:
    return first[0] + second[0], first[1] + second[1]


def _concatenate(*parts: Moments) -> Moments:
    rows = max(len(mean) for mean, _ in parts)
    means, variances = ([value.expand(rows, -1) for value in values] for values in zip(*parts))
    return torch.cat(means, 1), torch.cat(variances, 1)


def _pad(before: int, after: int, moments: Moments) -> Moments:
    return tuple(F.pad(value, (before, after)) for value in moments)


def _kept(layer: BatchKalmanNormBase) -> Moments:
    """A layer's moments where it has not told them: in evaluation, its running statistics."""
    if layer.training:
        raise RuntimeError(
            "a bkn layer ran without the one before it; run the network that connect_bkn has seen"
        )
    return layer.running_mean[None], layer.running_var[None]


class _Flow:
    """How moments get from layer to layer: steps in the order of a forward pass, and their values.

    A step is a function and the steps whose moments it takes. Values live for one forward pass.
    """

    def __init__(self, layers: dict[str, BatchKalmanNormBase]):
        _keep_trace_from_compiling()
        self.layers = layers
        self.mode: bool | None = None  # of the network (training or not) when it was traced
        self.steps: list[tuple[Callable, tuple[int, ...]]] = []
        self.values: list[Moments | None] = []

    def __setstate__(self, state: dict) -> None:
        _keep_trace_from_compiling()
        self.__dict__.update(state)

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the network."""
        if any(layer.training for layer in self.layers.values()):
            if self.mode != model.training:  # dropout and auxiliary heads depend on it
                self.trace(model, args, kwargs)
            self.values = [None] * len(self.steps)

    def end(self, model: nn.Module, args: tuple, output) -> None:
        """Forward hook of the network."""
        self.values = [None] * len(self.steps)

    def put(self, step: int, moments: Moments | None) -> None:
        """A layer's moments; those of later steps are of another pass, where hooks did not run.

        As in a torch.fx graph of the network, which holds the same layers.
        """
        self.values[step] = moments
        for later in range(step + 1, len(self.values)):
            self.values[later] = None

    def moments(self, step: int) -> Moments:
        if self.values[step] is None:
            function, inputs = self.steps[step]
            self.values[step] = function(*[self.moments(before) for before in inputs])
        return self.values[step]

    @torch.no_grad()
    def trace(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Find the steps by running the network once; nothing in it changes.

        Raises ValueError for a layer whose input comes through something without known moments.
        """
        tracer = _Tracer(model)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
        modes = {layer: layer.training for layer in norms}
        hooks = []
        for layer in norms:  # no statistics change, nothing is synchronised
            layer.training = False
        for name, layer in self.layers.items():
            hooks.append(layer.register_forward_pre_hook(partial(tracer.enter, name)))
            hooks.append(layer.register_forward_hook(tracer.leave))
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        try:
            with torch.random.fork_rng(list(devices)), tracer:
                if "" in self.layers:  # the model is a layer, with nothing before it
                    tracer.enter("", model, args)
                else:
                    model.forward(*args, **kwargs)  # without hooks of the model itself
        finally:
            for hook in hooks:
                hook.remove()
            for layer, mode in modes.items():
                layer.training = mode
            for buffer, value in buffers:
                buffer.copy_(value)
        if tracer.problems:
            raise ValueError(
                f"bkn knows no moments for {len(tracer.problems)} of {len(self.layers)} layers: "
                f"{tracer.problems[0]}. It follows convolutions, linear layers, ReLU, ReLU6, sums, "
                "concatenation, padding, pooling and resizing; take another norm there"
            )
        for name, layer in self.layers.items():
            layer.place = tracer.places.get(name)
        self.steps, self.mode = tracer.steps, model.training
        self.values = [None] * len(self.steps)


@cache
def _keep_trace_from_compiling() -> None:
    """Decorate `_Flow.trace`; not at import, for the decorator brings all of torch's compiler."""
    _Flow.trace = torch.compiler.disable(
        _Flow.trace,
        reason="bkn traces its network at the first training batch; before compiling with "
        "fullgraph=True, call sn.connect_bkn(model, inputs)",
    )


class _Tracer(TorchFunctionMode):
    """Follows every tensor of a forward pass back to the bkn layers that it comes from.

    `known[tensor]` is the step that gives its moments, or the name of the function that lost them.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.known = WeakTensorKeyDictionary()
        self.steps: list[tuple[Callable, tuple[int, ...]]] = []
        self.places: dict[str, tuple[int | None, int]] = {}
        self.problems: list[str] = []
        self.owners = {
            id(layer.weight): layer
            for layer in model.modules()
            if torch.is_tensor(getattr(layer, "weight", None))
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        if any(tensor in self.known for tensor in inputs):
            name = getattr(func, "__name__", str(func))
            found = self._follow(name, output, args, kwargs) if torch.is_tensor(output) else name
            for tensor in tree_leaves(output):
                if torch.is_tensor(tensor):
                    self.known[tensor] = found
        return output

    def enter(self, name: str, layer: BatchKalmanNormBase, args: tuple[Tensor]) -> None:
        before = self.known.get(args[0])
        if name in self.places:
            self.problems.append(f"{name} is used twice")
        elif isinstance(before, str):
            self.problems.append(f"the input of {name} comes through {before}")
            before = None
        self.places[name] = (before, self._step(partial(_kept, layer)))

    def leave(self, layer: BatchKalmanNormBase, args: tuple[Tensor], output: Tensor) -> None:
        self.known[output] = len(self.steps) - 1

    def _step(self, function: Callable, *inputs: int) -> int:
        self.steps.append((function, inputs))
        return len(self.steps) - 1

    def _follow(self, name: str, output: Tensor, args: tuple, kwargs: dict) -> int | str:
        """The step of `output` = name(*args, **kwargs), else a name."""
        x, *rest = (*args, *kwargs.values())
        if name in ("cat", "concat", "concatenate"):
            steps = [self.known.get(part, "an input without bkn") for part in x]
            if rest[:1] != [1]:
                return name
            lost = [step for step in steps if isinstance(step, str)]
            return lost[0] if lost else self._step(_concatenate, *steps)
        if name in _SUMS:
            other = rest[0]
            if not torch.is_tensor(other) or other.shape != x.shape or kwargs.get("alpha", 1) != 1:
                return name
            steps = [self.known.get(term, "a sum with an input without bkn") for term in (x, other)]
            lost = [step for step in steps if isinstance(step, str)]
            return lost[0] if lost else self._step(_add, *steps)
        step = self.known.get(x, name) if torch.is_tensor(x) else name
        if isinstance(step, str):
            return step
        if name in _LINEAR and (name != "linear" or x.dim() == 2):
            owner = self.owners.get(id(rest[0]))
            return name if owner is None else self._step(partial(_linear, owner), step)
        if name in ("relu", "relu_"):
            return self._step(_relu, step)
        if name in ("hardtanh", "hardtanh_", "relu6"):
            low, high = kwargs.get("min_val", 0), kwargs.get("max_val", 6)
            return self._step(partial(_clip, high), step) if low == 0 else name
        if name == "pad":
            sizes = rest[0]
            channels = sizes[2 * (x.dim() - 2) :] or (0, 0)
            if len(channels) > 2 or kwargs.get("value") or min(sizes) < 0:
                return name
            return self._step(partial(_pad, *channels), step) if any(channels) else step
        same = output.dim() == x.dim() and output.shape[:2] == x.shape[:2]
        whole = (slice(None), slice(None))
        idle = name == "dropout" and (kwargs.get("p") == 0 or not kwargs.get("training", True))
        idle |= name == "__getitem__" and isinstance(rest[0], tuple) and rest[0][:2] == whole
        return step if same and (name in _UNCHANGED or idle) else name


_LINEAR = ("conv1d", "conv2d", "conv3d", "linear")
_SUMS = ("add", "add_", "__add__", "__iadd__", "__radd__")
_UNCHANGED = {"contiguous", "clone", "to", "float", "double", "interpolate"} | {
    f"{kind}_pool{dim}d" for kind in ("max", "avg") for dim in (1, 2, 3)
}


def connect_bkn(model: nn.Module, *inputs) -> nn.Module:
    """Let every bkn layer of `model` find what comes before it; return `model`.

    That takes one more forward pass, whose effects are undone: now if there are `inputs`, else at
    the first training batch. What is between two layers may be convolutions and linear layers,
    ReLU and ReLU6; sums, where means and variances add (independence) and the result counts as
    Gaussian; concatenation; zero padding of channels; and pooling and resizing, which leave the
    moments as they were (the authors' code, for average pooling). So torchvision's and timm's
    ResNets, VGG, DenseNet, Inception and MobileNetV2, but not gates (squeeze and excitation) nor
    other activations. A tensor filled in place (RoIAlign over several levels) counts as an input.
    The structure must not depend on the batch. Run `model` as a whole, in
    DistributedDataParallel if you like, not in DataParallel nor with gradient checkpointing.

    Raises ValueError for a layer whose input comes through anything else, or that is used twice.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BatchKalmanNormBase)}
    if not layers:
        return model
    for layer in layers.values():
        if layer.flow is not None:
            layer.flow.layers = {}  # its hooks have nothing to do any more
    flow = _Flow(layers)
    for layer in layers.values():
        layer.flow, layer.place = flow, None
    if inputs:
        flow.trace(model, inputs, {})
    model.register_forward_pre_hook(flow.begin, with_kwargs=True)
    model.register_forward_hook(flow.end)
    return model


BatchKalmanNormBase.connect = staticmethod(connect_bkn)

"""Fast style transfer: the image transformation network, VGG16 features, perceptual losses.

Source: Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and
Super-Resolution", arXiv 1603.08155; the paper's section 4.3 only changes the norm.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sn import SwitchNorm2d, SwitchNormAct2d, connect

from ..run.checkpoint import load_weights, plain_names

Norm = Callable[[int], nn.Module]

# place of each ReLU in torchvision's vgg16().features
RELUS = {
    f"relu{stage}_{conv}": place
    for stage, places in enumerate(((1, 3), (6, 8), (11, 13, 15), (18, 20, 22), (25, 27, 29)), 1)
    for conv, place in enumerate(places, 1)
}
# convention of VGG's input -> (scale, mean, std) of RGB in [0, 1]: (scale * x - mean) / std,
# whose channels go in as BGR in the last
INPUTS = {
    "caffe": (255.0, (123.68, 116.779, 103.939), (1.0, 1.0, 1.0)),
    "torchvision": (1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "caffe_bgr": (255.0, (123.68, 116.779, 103.939), (1.0, 1.0, 1.0)),
}
PARTS = ("content", "style", "tv")  # of the loss; tv: total variation
# of these parts; features of the two conventions differ in scale.
# Source: caffe as the authors' code, where 1e-6 of TV is another gradient (`total_variation`);
# torchvision as the PyTorch examples.
LOSS_WEIGHTS = {"caffe": (1.0, 5.0, 1e-6), "torchvision": (1e5, 1e10, 0.0)}
LOSS_WEIGHTS["caffe_bgr"] = LOSS_WEIGHTS["caffe"]
TORCHVISION_WEIGHTS = {"IMAGENET1K_V1": "torchvision", "IMAGENET1K_FEATURES": "caffe"}
# files known by how their names begin: torchvision's; Johnson's conversion of Simonyan's Caffe file
FILES = {"vgg16-397923af": "torchvision", "vgg16-00b39a1b": "caffe_bgr"}


class ConvNorm(nn.Module):
    """Optional 2x nearest up-sampling, reflection padding, convolution, norm, optional ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: Norm,
        stride: int = 1,
        upsample: bool = False,
        relu: bool = True,
    ):
        super().__init__()
        self.upsample, self.relu = upsample, relu
        self.conv = nn.Conv2d(
            *(in_channels, out_channels, kernel_size, stride),
            padding=kernel_size // 2,
            padding_mode="reflect",
        )
        self.norm = norm(out_channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.normalise(self.conv(x), residual)

    def normalise(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What follows the convolution."""
        if isinstance(self.norm, SwitchNormAct2d):
            return self.norm(x, residual)
        x = self.norm(x)
        x = x if residual is None else x + residual
        return F.relu(x) if self.relu else x


class Residual(nn.Module):
    """x + two 3x3 convolutions with norms; no ReLU after the sum. Source: Johnson et al."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.first = ConvNorm(channels, channels, 3, norm)
        self.second = ConvNorm(channels, channels, 3, norm, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), x)


class StyleNet(nn.Module):
    """The image transformation network: RGB in [0, 1], (N, 3, H, W) to the same shape.

    H and W must be multiples of 4 and at least 8 (`stylize` takes any). 15 norm layers: after every
    convolution but the last. Convolutions keep their bias, so that no norm, or one over channels,
    has the same network. Source: Johnson et al.; up-sampling by nearest neighbours and convolution
    in place of transposed convolution (fewer checkerboards), reflection padding at every layer.
    """

    def __init__(self, norm: Norm, width: int = 32, residual_blocks: int = 5):
        super().__init__()
        channels = 4 * width
        self.down = nn.Sequential(
            ConvNorm(3, width, 9, norm),
            ConvNorm(width, 2 * width, 3, norm, stride=2),
            ConvNorm(2 * width, channels, 3, norm, stride=2),
        )
        self.residual = nn.Sequential(*(Residual(channels, norm) for _ in range(residual_blocks)))
        self.up = nn.Sequential(
            ConvNorm(channels, 2 * width, 3, norm, upsample=True),
            ConvNorm(2 * width, width, 3, norm, upsample=True),
        )
        self.last = nn.Conv2d(width, 3, 9, padding=4, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.residual(self.down(2 * x - 1)))
        return to_image(self.last(x))


def to_image(x: Tensor) -> Tensor:
    """Values around mid-grey, up to 9 % beyond [0, 1]. Source: the authors' scaled tanh (150)."""
    return 0.5 + (150 / 255) * torch.tanh(x)


def build_style_net(
    norm: Norm, width: int = 32, residual_blocks: int = 5, fused_activation: bool = False
) -> StyleNet:
    """Build the network with random weights, which do not depend on the norm.

    fused_activation: switchable layers do the residual sum and the ReLU too, in one pass.
    Raises ValueError if that is asked for with another norm.
    """
    model = connect(StyleNet(norm, width, residual_blocks))
    if fused_activation:
        for block in model.modules():
            if isinstance(block, ConvNorm):
                _fuse(block)
    return connect(model)


def _fuse(block: ConvNorm) -> None:
    if type(block.norm) is not SwitchNorm2d:
        raise ValueError(
            f"model.fused_activation=true needs norm=sn or sn_in_ln; {type(block.norm).__name__} "
            "has no fused form"
        )
    block.norm.__class__ = SwitchNormAct2d
    block.norm.drop = nn.Identity()
    block.norm.act = nn.ReLU(inplace=True) if block.relu else nn.Identity()


def layer_blocks(model: StyleNet) -> dict[str, str]:
    """Block of every module, for records of importance weights: down, residual.0 ..., up."""
    names = [name for name, _ in model.named_modules()]
    return {name: re.match(r"(residual\.\d+|[a-z]*)", name).group() for name in names}


# --- the loss network


@dataclass(frozen=True)
class LossNetwork:
    """VGG16's convolutions, fixed, with what is to be said about their origin."""

    features: nn.Sequential
    input: str  # of `INPUTS`
    weights: str  # a torchvision name, "random" or a file's name
    sha256: str

    def describe(self) -> dict:
        return {"weights": self.weights, "input": self.input, "sha256": self.sha256}

    def __call__(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Activations at `layers` (relu1_2, ...) of RGB images in [0, 1], (N, 3, H, W)."""
        scale, mean, std = INPUTS[self.input]
        # filled there, not copied from the host, which would wait for the device
        mean, std = (torch.cat([images.new_full((1, 1, 1), c) for c in v]) for v in (mean, std))
        x, found = (scale * images - mean) / std, {}
        x = x.flip(1) if self.input == "caffe_bgr" else x
        wanted = {RELUS[layer]: layer for layer in layers}
        for place, module in enumerate(self.features[: max(wanted) + 1]):
            x = module(x)
            if place in wanted:
                found[wanted[place]] = x
        return found


def load_loss_network(weights: str, input: str | None = None) -> LossNetwork:
    """VGG16's convolutions with ImageNet weights.

    Args:
        weights: IMAGENET1K_V1 or IMAGENET1K_FEATURES (torchvision's, from its cache or the net),
            "random", or a file: torchvision's state dict (.pth), or safetensors.
        input: "caffe" (0..255 minus the mean, RGB), "caffe_bgr" (the same as BGR, what exact
            conversions of the original file expect) or "torchvision"; None takes what the weights
            say.

    Raises FileNotFoundError or ValueError, saying what to do, if the weights are not to be had or
    do not say their input convention.
    """
    if input not in (None, *INPUTS):
        raise ValueError(f"unknown vgg.input={input!r}; choose one of {list(INPUTS)}, or null")
    features = vgg16_features()
    if weights == "random":
        name, known = "random", input or "torchvision"
    elif weights in TORCHVISION_WEIGHTS:
        name, known = weights, TORCHVISION_WEIGHTS[weights]
        load_features(features, _from_torchvision(weights), weights)
    else:
        name = Path(weights).name
        state, known = _from_file(Path(weights))
        load_features(features, state, weights)
    if input and known and input != known:
        raise ValueError(f"vgg.input={input}, but vgg.weights={weights} is made for {known} input")
    if not (input or known):
        raise ValueError(
            f"{weights} does not say what input it is made for; add vgg.input=torchvision (RGB in "
            "[0, 1], ImageNet mean and std), vgg.input=caffe (RGB, 0..255 minus the mean) or "
            "vgg.input=caffe_bgr (the same in BGR order, as the original Caffe file)"
        )
    features.requires_grad_(False).eval()
    sha256 = hashlib.sha256()
    for tensor in features.state_dict().values():
        sha256.update(tensor.contiguous().numpy().tobytes())
    return LossNetwork(features, input or known, name, sha256.hexdigest())


def _from_torchvision(name: str) -> dict[str, Tensor]:
    """torchvision's state dict: from torch hub's cache, else downloaded."""
    entry = torchvision.models.VGG16_Weights[name]
    try:
        return entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a broken download
        cache = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(entry.url))
        reason = str(getattr(error, "reason", error)).strip() or type(error).__name__
        raise FileNotFoundError(
            f"no VGG16 weights: {entry.url} could not be fetched ({reason}). Put that file at "
            f"{cache}, or give vgg.weights=FILE (torchvision's vgg16 .pth, or safetensors), or "
            "vgg.weights=random just to see that everything runs"
        ) from None


def _from_file(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """State dict and input convention (None if the file does not say) of a local file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"vgg.weights={path}: no such file; expected a file, one of "
            f"{list(TORCHVISION_WEIGHTS)}, or random"
        )
    state = load_weights(path)
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return state, input_convention((file.metadata() or {}).get("input"))
    known = (kind for start, kind in FILES.items() if path.name.startswith(start))
    return state, next(known, None)


def input_convention(text: str | None) -> str | None:
    """The convention that a file's metadata names or describes; None if neither."""
    text = (text or "").lower()
    if text in INPUTS:
        return text
    if "255" in text and "123.68" in text:
        return "caffe_bgr" if "bgr" in text else "caffe"
    if "0.485" in text and "0.229" in text:
        return "torchvision"
    return None


def vgg16_features() -> nn.Sequential:
    """torchvision's vgg16().features with random weights, the same every time."""
    with torch.device("meta"):
        layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    layers.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for place, module in enumerate(layers):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.ReLU):
            layers[place] = nn.ReLU()  # in place it would change what a loss still needs
    return layers


def load_features(features: nn.Sequential, state: dict, weights: str) -> None:
    """Load a whole VGG16's state dict, or that of its features, in any floating dtype.

    Raises ValueError, naming the first tensor that is not there or of another shape.
    """
    named = plain_names(state)
    found = {key.removeprefix("features."): value for key, value in named.items()}
    for key, own in features.state_dict().items():
        value = found.get(key)
        if not isinstance(value, Tensor) or value.shape != own.shape:
            there = "is no tensor" if key in found else "is missing"
            if isinstance(value, Tensor):
                there = f"has shape {tuple(value.shape)}"
            raise ValueError(
                f"vgg.weights={weights} is not VGG16: {key} {there}, expected {tuple(own.shape)} "
                "(keys of torchvision's vgg16() or vgg16().features)"
            )
        own.copy_(value)
    for key, own in features.state_dict().items():
        if not torch.isfinite(own).all():
            raise ValueError(f"vgg.weights={weights}: {key} is not finite")


# --- losses


def gram(features: Tensor) -> Tensor:
    """Products of channels averaged over positions and channels: (N, C, H, W) to (N, C, C)."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])


def content_loss(features: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(features, target)


def style_loss(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean squared difference of Gram matrices; targets: (1, C, C)."""
    grams = [gram(layer) for layer in features]
    return sum(F.mse_loss(ours, target.expand_as(ours)) for ours, target in zip(grams, targets))


def total_variation(images: Tensor) -> Tensor:
    """Squared differences of neighbours, in grey levels of 0..255, summed; mean over images.

    Differs: the gradient of the authors' code is half that of the sum over the batch, undivided.
    Ours is 2 / N of it for a batch of N: the same for 2 images, half for the recipe's 4.
    """
    rows, columns = images.diff(dim=2), images.diff(dim=3)
    return 255**2 * (rows.square().sum() + columns.square().sum()) / len(images)

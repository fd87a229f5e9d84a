"""Classifiers built with a norm callable: torchvision's, timm's, and CIFAR-size ResNets."""

import difflib
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sn import SwitchNorm2d, SwitchNormAct2d, connect

Norm = Callable[[int], nn.Module]
SOURCES = ("cifar", "thin", "torchvision", "timm")

CIFAR_RESNETS = {  # name -> (blocks per stage, width of the first stage, projection shortcuts)
    "resnet8": ((1, 1, 1), 16, False),
    "resnet14": ((2, 2, 2), 16, False),
    "resnet20": ((3, 3, 3), 16, False),
    "cifar_resnet18": ((2, 2, 2, 2), 64, True),
}


THIN_RESNETS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}  # basic blocks per stage


class PadShortcut(nn.Module):
    """Parameter-free shortcut: every second pixel, new channels zero (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.missing = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.missing // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.missing - before))


class CifarResNet(nn.Module):
    """ResNet for small images: 3x3 stem, no pooling. Source: He et al. 2016, section 4.2."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        projection: bool,
        num_classes: int,
        norm: Norm,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = norm(width)
        self.stages = len(blocks)
        in_channels = width
        for stage, count in enumerate(blocks):
            out_channels = width * 2**stage
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut = None
                if stride == 2 and projection:
                    conv = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
                    shortcut = nn.Sequential(conv, norm(out_channels))
                elif stride == 2:
                    shortcut = PadShortcut(in_channels, out_channels)
                layers.append(
                    BasicBlock(in_channels, out_channels, stride, shortcut, norm_layer=norm)
                )
                in_channels = out_channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


class ThinResNet(torchvision.models.ResNet):
    """torchvision's ResNet of basic blocks with `width` channels in the first stage, not 64."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        num_classes: int,
        norm: Norm,
        zero_init_residual: bool,
    ):
        self.width = width
        super().__init__(BasicBlock, list(blocks), num_classes, zero_init_residual, norm_layer=norm)
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = norm(width)
        self.fc = nn.Linear(8 * width, num_classes)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:  # the first stage: what the stem gives it
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, blocks, stride, dilate)


class DropoutLinear(nn.Linear):
    """nn.Linear with dropout on its input and the parameter names of nn.Linear."""

    def __init__(self, linear: nn.Linear, dropout: float):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.dropout, self.training))


def build_model(
    name: str,
    source: str,
    num_classes: int,
    norm: Norm,
    dropout: float = 0.0,
    zero_init_residual: bool = True,
    fused_activation: bool = False,
    width: int | None = None,
) -> nn.Module:
    """Build a classifier whose norm layers come from `norm`, with random weights.

    Args:
        source: "cifar", "thin" (torchvision's ResNets of another width), "torchvision" or "timm".
        dropout: before the classifier.
        zero_init_residual: the last gain of each residual block starts at 0, where the model can
            and the norm has a gain that learns.
        fused_activation: SN layers of residual blocks do the sum and ReLU too (`fuse_activations`).
        width: channels of the first stage of a CIFAR ResNet (None: its own) or a thin one.

    Raises ValueError for an unknown name, or a model that cannot take the norm.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"model.dropout={dropout}; expected 0 <= dropout < 1")
    builders = {"cifar": _cifar, "thin": _thin, "torchvision": _torchvision, "timm": _timm}
    _check_source(source, width)
    options = {"width": width} if source in ("cifar", "thin") else {}
    zero_init_residual = zero_init_residual and _gain_learns(norm)
    model = builders[source](name, num_classes, norm, dropout, zero_init_residual, **options)
    model = connect(model)
    return fuse_activations(model) if fused_activation else model


def _check_source(source: str, width: int | None) -> None:
    if source not in SOURCES:
        raise ValueError(f"unknown model.source={source!r}; choose one of {list(SOURCES)}")
    if width is not None and source not in ("cifar", "thin"):
        raise ValueError(f"model.width={width}: only CIFAR and thin ResNets have one; use null")


def batch_norm_model(
    name: str, source: str, num_classes: int, dropout: float = 0.0, width: int | None = None
) -> nn.Module:
    """Build a classifier with its library's own norm layers, for pretrained weights of batch norm.

    Also those that `build_model` refuses since they take no norm. Arguments and errors as there.
    """
    _check_source(source, width)
    if source in ("cifar", "thin"):
        build = {"cifar": _cifar, "thin": _thin}[source]
        return build(name, num_classes, nn.BatchNorm2d, dropout, False, width)
    if source == "torchvision":
        return _torchvision(name, num_classes, None, dropout, False)
    return _timm(name, num_classes, None, dropout, False)


def _gain_learns(norm: Norm) -> bool:
    try:
        return isinstance(getattr(norm(8), "weight", None), nn.Parameter)
    except ValueError:  # groups that do not divide 8: a norm that learns
        return True


class _FusedBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), shortcut)


class _FusedBottleneck(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(y), shortcut)


def fuse_activations(model: nn.Module) -> nn.Module:
    """Let the SN layers of torchvision's residual blocks do the sum and the ReLU as well, in place.

    The same function with the same parameters under the same names, in fewer passes.
    Raises ValueError if `model` has no such block with switchable layers.
    """
    fused = {BasicBlock: _FusedBasicBlock, Bottleneck: _FusedBottleneck}
    blocks = [m for m in model.modules() if type(m) in fused and type(m.bn1) is SwitchNorm2d]
    if not blocks:
        raise ValueError(
            "fused_activation needs torchvision's residual blocks with SwitchNorm2d layers"
        )
    for block in blocks:
        for name in ("bn1", "bn2", "bn3"):
            layer = getattr(block, name, None)
            if layer is not None:
                layer.__class__ = SwitchNormAct2d
                layer.drop, layer.act = nn.Identity(), nn.ReLU(inplace=True)
        block.__class__ = fused[type(block)]
    return model


def _cifar(name, num_classes, norm, dropout, zero_init_residual, width) -> nn.Module:
    if name not in CIFAR_RESNETS:
        raise ValueError(f"unknown CIFAR model {name!r}; choose one of {list(CIFAR_RESNETS)}")
    blocks, own_width, projection = CIFAR_RESNETS[name]
    model = CifarResNet(blocks, width or own_width, projection, num_classes, norm)
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
    if dropout:
        model.fc = DropoutLinear(model.fc, dropout)
    return model


def _thin(name, num_classes, norm, dropout, zero_init_residual, width) -> nn.Module:
    if name not in THIN_RESNETS:
        raise ValueError(f"unknown thin model {name!r}; choose one of {list(THIN_RESNETS)}")
    if width is None or width % 8:
        raise ValueError(f"width={width} of {name}; expected a multiple of 8, such as 16")
    model = ThinResNet(THIN_RESNETS[name], width, num_classes, norm, zero_init_residual)
    if dropout:
        model.fc = DropoutLinear(model.fc, dropout)
    return model


def _torchvision(name, num_classes, norm, dropout, zero_init_residual) -> nn.Module:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ValueError(f"unknown torchvision model {name!r}; choose one of {names}")
    builder = inspect.unwrap(torchvision.models.get_model_builder(name))
    options = {} if norm is None else {"norm_layer": norm}
    if _accepts(torchvision.models.ResNet, builder):
        options["zero_init_residual"] = zero_init_residual
    if name in ("googlenet", "inception_v3"):
        options["aux_logits"] = False
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    except TypeError as error:
        if "norm_layer" not in str(error):
            raise
        raise ValueError(
            f"torchvision's {name} takes no norm_layer; choose a ResNet, MobileNet, EfficientNet..."
        ) from None
    if dropout:
        if not isinstance(getattr(model, "fc", None), nn.Linear):
            raise ValueError(f"model.dropout={dropout}: torchvision's {name} has no fc; use 0.0")
        model.fc = DropoutLinear(model.fc, dropout)
    return model


def _accepts(family: type, builder: Callable) -> bool:
    return inspect.signature(builder).return_annotation is family


def _timm(name, num_classes, norm, dropout, zero_init_residual) -> nn.Module:
    import timm  # only here: it is slow to import

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 5)
        like = f", such as {', '.join(close)}" if close else ""
        raise ValueError(f"unknown timm model {name!r}; timm.list_models() has all{like}")
    options = {"num_classes": num_classes, "drop_rate": dropout}
    if norm is None:
        return timm.create_model(name, **options)
    check_timm_norm(name)
    options["norm_layer"] = norm
    try:
        try:
            return timm.create_model(name, **options, zero_init_last=zero_init_residual)
        except TypeError as error:
            if "zero_init_last" not in str(error):
                raise
            return timm.create_model(name, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"timm's {name} cannot take norm_layer ({error}); take another model"
        ) from None


def check_timm_norm(name: str) -> None:
    """Raise ValueError if timm builds `name` with fused norm + activation layers.

    There a plain norm as `norm_layer=` would be an error or lose the activations.
    """
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    for layer_name, layer in model.named_modules():
        if hasattr(layer, "act") and type(layer).__module__.startswith("timm.layers"):
            if "norm" in type(layer).__module__ or "Norm" in type(layer).__name__:
                raise ValueError(
                    f"timm's {name} has fused norm+activation layers ({layer_name} is a "
                    f"{type(layer).__name__}); norm_layer= cannot replace them. sn.convert can: "
                    "init=timm, or init=checkpoint, starts from its batch-norm weights"
                )

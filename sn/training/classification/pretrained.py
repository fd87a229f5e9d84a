"""Pretrained classifiers: where their weights come from, and how they get another norm."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import sn

from ..run.checkpoint import load_network
from ..run.config import short
from .models import batch_norm_model, build_model, fuse_activations

INITS = ("scratch", "checkpoint", "torchvision", "timm")


def pretrained_weights(
    name: str,
    model: str,
    path: str | None,
    key: str | None = None,
    told: Callable[[str], object] | None = None,
    weights: str | None = None,
) -> dict[str, Tensor] | None:
    """The classifier weights that a run starts from; None for "scratch".

    "checkpoint": a file, of train_imagenet.py or any state dict of a network that we build; `key`
    and `told` as in `load_network`.
    "torchvision", "timm": the library's own ImageNet weights of `model` (batch norm), which it
    downloads unless they are in its cache; of torchvision's those named `weights`, None: DEFAULT,
    the newest.

    Raises ValueError or OSError, in one line, if there are none.
    """
    if name not in INITS:
        raise ValueError(f"unknown init.name={name!r}; choose one of {', '.join(INITS)}")
    if name != "checkpoint" and path is not None:
        raise ValueError(f"init.path={path} needs init=checkpoint, not {name}")
    if name != "checkpoint" and key is not None:
        raise ValueError(f"init.key={short(key)} needs init=checkpoint, not {name}")
    if name != "torchvision" and weights is not None:
        raise ValueError(f"init.weights={short(weights)} needs init=torchvision, not {name}")
    if name == "scratch":
        return None
    if name == "checkpoint":
        if path is None:
            raise ValueError("init=checkpoint needs init.path=..., a classifier's checkpoint")
        try:
            return load_network(path, key, told)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"init.path: {error}") from None
    weights = weights or "DEFAULT"
    known = torchvision_weights(model) if name == "torchvision" else []
    if known and weights not in known:
        raise ValueError(
            f"init.weights={short(weights)}: torchvision has {', '.join(known)} of {model}"
        )
    try:
        return _of_torchvision(model, weights) if name == "torchvision" else _of_timm(model)
    except (OSError, RuntimeError, ValueError) as error:  # not known, no network, a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"init={name} has no weights of {model}: {reason}; where there is no network, put the "
            f"file into {name}'s cache, or use init=checkpoint init.path=..."
        ) from None


def torchvision_weights(model: str) -> list[str]:
    """The names of torchvision's weights of `model`, DEFAULT for the newest; [] if it is unknown.

    Of ResNet-50, IMAGENET1K_V1 (76.1 % top-1) are of the recipe of the paper's time, IMAGENET1K_V2
    (80.9 %) of longer training with more augmentation. Source: torchvision's documentation.
    """
    try:
        return list(torchvision.models.get_model_weights(model).__members__)
    except ValueError:
        return []


def _of_torchvision(model: str, weights: str) -> dict[str, Tensor]:
    return torchvision.models.get_model(model, weights=weights).state_dict()


def _of_timm(model: str) -> dict[str, Tensor]:
    import timm  # only here: it is slow to import

    return timm.create_model(model, pretrained=True).state_dict()


def sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash of names and values."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def misfits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """What keeps `theirs` from taking the place of `ours`: a list of keys by what is wrong."""
    shapes = [
        f"{key} {tuple(theirs[key].shape)} instead of {tuple(ours[key].shape)}"
        for key in ours.keys() & theirs.keys()
        if theirs[key].shape != ours[key].shape
    ]
    problems = {
        "missing": sorted(ours.keys() - theirs.keys()),
        "unexpected": sorted(theirs.keys() - ours.keys()),
        "of another shape": sorted(shapes),
    }
    return [
        f"{len(keys)} {what}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}"
        for what, keys in problems.items()
        if keys
    ]


def pretrained_model(
    weights: Mapping[str, Tensor],
    norm: Mapping[str, Any],
    num_classes: int,
    gate_start: float = 0.0,
    **options: Any,
) -> tuple[nn.Module, str]:
    """Build a classifier that starts from `weights`, with `norm`; and what there is to say of it.

    Weights of a network with batch norm are converted: gain, shift and running statistics are
    kept wherever the new norm has them, as is the layers' eps. Weights of the same network with
    `norm` itself are loaded as they are, control parameters included. A head of another number of
    classes starts anew.

    Args:
        norm: arguments of `sn.make_norm`.
        gate_start: bn's control parameters of switchable layers at the start; the others are 0.
        options: those of `build_model`.

    Raises ValueError, naming the keys, if the weights fit neither.
    """
    fused = options.pop("fused_activation", False)
    source = {key: options[key] for key in ("name", "source", "dropout", "width") if key in options}
    plain = batch_norm_model(num_classes=num_classes, **source)
    head, wrong = _load(plain, weights)
    if not wrong:
        model, how = _converted(plain, norm, gate_start)
    else:
        try:
            model = build_model(**options, num_classes=num_classes, norm=sn.make_norm(**norm))
        except ValueError:  # this network takes no norm: only batch norm can be converted
            model, wrong_too = plain, wrong
        else:
            head, wrong_too = _load(model, weights)
        if wrong_too:
            nearest, lists = ("batch norm", wrong) if _of_batch_norm(weights) else (
                f"norm={norm['name']}", wrong_too)  # fmt: skip
            raise ValueError(
                f"the pretrained weights do not fit {options['name']} with batch norm, nor with "
                f"norm={norm['name']}; with {nearest}: {'; '.join(lists)}"
            )
        how = f"{norm['name']} layers as they were"
        if gate_start:
            how += f", their control parameters too: init.gate_start={gate_start} has no effect"
    return (fuse_activations(model) if fused else model), f"{how}; {head}"


def _of_batch_norm(weights: Mapping[str, Tensor]) -> bool:
    endings = {key.rpartition(".")[2] for key in weights}
    return "running_mean" in endings and "mean_weight" not in endings


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[str, list[str]]:
    """Load all but a head of another size; return what became of the head, and what is wrong."""
    ours = model.state_dict()
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    head = layers[-1]
    classes, old = ours[f"{head}.weight"], weights.get(f"{head}.weight")
    anew = old is not None and len(old) != len(classes) and old.shape[1:] == classes.shape[1:]
    own = {key for key in ours if anew and key.startswith(f"{head}.")}

    def compared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without what counts batches: frozen layers do not."""
        return {
            key: value
            for key, value in state.items()
            if key not in own and not key.endswith("num_batches_tracked")
        }

    wrong = misfits(compared(ours), compared(weights))
    if not wrong:
        known = {key: value for key, value in weights.items() if key in ours and key not in own}
        model.load_state_dict(ours | known)
    if anew:
        return f"head {head} starts anew: {len(classes)} classes instead of {len(old)}", wrong
    return f"head {head} kept: {len(classes)} classes", wrong


def _converted(
    model: nn.Module, norm: Mapping[str, Any], gate_start: float
) -> tuple[nn.Module, str]:
    """The network with `norm` in place of batch norm, running statistics kept; and what was done.

    Raises ValueError if it has no batch norm, or `norm` another eps where that would matter.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no batch norm: norm= would change nothing")
    options = {key: value for key, value in norm.items() if key != "name"}
    probe = sn.make_norm(**norm)(layers[0].num_features)
    keeps = getattr(probe, "running_mean", None) is not None
    eps = sorted({layer.eps for layer in layers})
    if keeps and "eps" in options and eps != [options["eps"]]:
        raise ValueError(
            f"norm.eps={options['eps']}: the pretrained batch norms have "
            f"{', '.join(map(str, eps))}; ~norm.eps on the command line keeps theirs"
        )
    if keeps:
        options |= {"keep_outputs": True, "gate_start": gate_start}
    model = sn.convert(model, norm["name"], **options)
    how = f"{len(layers)} batch norms became {norm['name']}"
    how += ", running statistics kept" if keeps else ", which has no running statistics"
    weights = sn.importance_weights(model)
    if weights:
        first = next(iter(weights.values()))["mean"]
        start = ", ".join(f"{name} {value:.3g}" for name, value in first.items())
        how += f", importance weights {start}"
    if gate_start and "bn" not in getattr(probe, "statistics", ()):
        how += f"; init.gate_start={gate_start} has no effect: no control parameter of batch norm"
    return model, how

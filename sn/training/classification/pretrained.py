"""Pretrained classifiers: where their weights come from, and how they get another norm."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import sn
from sn.modules import SwitchNormBase

from ..run.checkpoint import find_network, load_weights, metadata, with_metadata
from ..run.config import as_yaml, short
from .data import IMAGENET_MEAN, IMAGENET_STD
from .models import batch_norm_model, build_model, fuse_activations

PUBLISHED = ("aux1.", "aux2.", "AuxLogits.")  # second classifiers in torchvision's files
INITS = ("scratch", "checkpoint", "torchvision", "timm")


class Weights(OrderedDict):
    """A network's tensors by name, and what else it computes with.

    facts: "classes", how many; "eps" and "groups", those of its layers by name; "unbiased", whether
    its variances are; "transform_input", whether it shifts the input (GoogLeNet, Inception); "mean"
    and "std", of the images that timm's weights expect. Each may be missing.
    """

    facts: dict[str, Any]

    def __init__(self, tensors: Mapping[str, Tensor] = {}, facts: dict[str, Any] | None = None):
        super().__init__(tensors)
        self._metadata = metadata(tensors)
        self.facts = facts or {}


def network_facts(model: nn.Module, classes: int) -> dict[str, Any]:
    """What a checkpoint says of a network beyond its tensors: the `facts` of `Weights`."""
    layers = dict(model.named_modules())
    groups = {name: groups_of(layer) for name, layer in layers.items()}
    unbiased = [layer.unbiased for layer in layers.values() if isinstance(layer, SwitchNormBase)]
    return {
        "classes": classes,
        "eps": eps_of(model),
        "groups": {name: count for name, count in groups.items() if count is not None},
        "unbiased": any(unbiased),
        "transform_input": getattr(model, "transform_input", False) is True,
    }


def eps_of(model: nn.Module) -> dict[str, float]:
    """The eps of its layers, by name."""
    found = {name: getattr(layer, "eps", None) for name, layer in model.named_modules()}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def groups_of(layer: nn.Module) -> int | None:
    """Of a layer that normalises groups of channels, their number."""
    has = isinstance(layer, nn.GroupNorm)
    has = has or isinstance(layer, SwitchNormBase) and "gn" in layer.statistics
    return int(layer.num_groups) if has else None


def find_facts(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The facts in a checkpoint of train_imagenet.py or convert_checkpoint.py; {} of others.

    Raises ValueError, naming the file, if they are not as `network_facts` has them.
    """
    found, norm = content.get("network"), content.get("norm")
    if isinstance(norm, dict):  # converted
        return {"unbiased": norm.get("unbiased") is True}
    if not isinstance(found, dict):
        return {}

    def by_name(key: str, kind: type, fits: Callable[[Any], bool]) -> bool:
        values = found.get(key, {})
        return isinstance(values, dict) and all(
            isinstance(name, str) and type(value) is kind and fits(value)
            for name, value in values.items()
        )

    good = by_name("eps", float, lambda value: 0 < value < 1)
    good = good and by_name("groups", int, lambda value: value > 0)
    kinds = {"classes": int, "unbiased": bool, "transform_input": bool}
    if not good or any(type(found.get(key, kind())) is not kind for key, kind in kinds.items()):
        raise ValueError(f"{path}: its 'network' is not what train_imagenet.py writes")
    return {key: found[key] for key in ("eps", "groups", *kinds) if key in found}


def pretrained_weights(
    name: str,
    model: str,
    path: str | None,
    key: str | None = None,
    told: Callable[[str], object] | None = None,
    weights: str | None = None,
) -> Weights | None:
    """The classifier weights that a run starts from; None for "scratch".

    "checkpoint": a file, of train_imagenet.py or any state dict of a network that we build; `key`
    and `told` as in `find_network`.
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
            return weights_in(load_weights(path), path, key, told)
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


def weights_in(
    content: Mapping[str, Any],
    path: str | Path,
    key: str | None = None,
    told: Callable[[str], object] | None = None,
) -> Weights:
    """A classifier's weights in the content of the file at `path`, as `find_network`.

    Raises ValueError, naming the file.
    """
    tensors = find_network(content, path, key, told)
    facts = find_facts(content, path)
    alone = any(isinstance(value, Tensor) for value in content.values())
    if alone and any(name.startswith(PUBLISHED) for name in tensors):
        # as torchvision publishes them; its own training script saves under "model", unshifted
        facts["transform_input"] = True
    return Weights(without_second_heads(tensors), facts)


def torchvision_weights(model: str) -> list[str]:
    """The names of torchvision's weights of `model`, DEFAULT for the newest; [] if it is unknown.

    Of ResNet-50, IMAGENET1K_V1 (76.1 % top-1) are of the recipe of the paper's time, IMAGENET1K_V2
    (80.9 %) of longer training with more augmentation. Source: torchvision's documentation.
    """
    try:
        return list(torchvision.models.get_model_weights(model).__members__)
    except ValueError:
        return []


def _of_torchvision(model: str, weights: str) -> Weights:
    network = torchvision.models.get_model(model, weights=weights)
    facts = {"transform_input": getattr(network, "transform_input", False), "eps": eps_of(network)}
    return Weights(without_second_heads(network.state_dict()), facts)


def without_second_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {name: value for name, value in tensors.items() if not name.startswith(PUBLISHED)}
    return with_metadata(own, metadata(tensors))


def _of_timm(model: str) -> Weights:
    import timm  # only here: it is slow to import

    network = timm.create_model(model, pretrained=True)
    known = getattr(network, "pretrained_cfg", None) or {}
    facts = {key: known[key] for key in ("mean", "std") if key in known}
    return Weights(network.state_dict(), facts | {"eps": eps_of(network)})


def sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash of names and values."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def without_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what counts batches: older files and frozen layers do not."""
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


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
    facts = weights.facts if isinstance(weights, Weights) else {}

    def with_batch_norm(classes: int) -> nn.Module:
        return batch_norm_model(num_classes=classes, **source)

    def with_norm(classes: int) -> nn.Module:
        return network_of(norm, num_classes=classes, **options)

    def as_converted(classes: int) -> nn.Module:
        return converted_network(norm, num_classes=classes, **source)

    plain = with_batch_norm(num_classes)
    head, wrong = _load(plain, weights, head_keys(with_batch_norm, num_classes))
    if not wrong:
        restore_facts(plain, facts, {})
        model, how = _converted(plain, norm, gate_start)
    else:
        failed = []  # why not with `norm`
        for build in (with_norm, as_converted):
            try:
                model = build(num_classes)
            except ValueError as error:  # it takes no norm, or not this one, or has no batch norm
                failed.append(str(error))
                continue
            head, lists = _load(model, weights, head_keys(build, num_classes))
            if not lists:
                restore_facts(model, facts, norm)
                break
            failed.append("; ".join(lists))
        else:
            nearest, why = ("batch norm", "; ".join(wrong)) if _of_batch_norm(weights) else (
                f"norm={norm['name']}", failed[0])  # fmt: skip
            raise ValueError(
                f"the pretrained weights do not fit {options['name']} with batch norm, nor with "
                f"norm={norm['name']}; with {nearest}: {why}"
            )
        how = f"{norm['name']} layers as they were"
        if gate_start:
            how += f", their control parameters too: init.gate_start={gate_start} has no effect"
    if "mean" in facts and any(
        tuple(facts[key]) != own for key, own in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
    ):
        how += (
            f"; note: they expect images of mean {tuple(facts['mean'])} and deviation "
            f"{tuple(facts.get('std', ()))}, here they get ImageNet's"
        )
    return (fuse_activations(model) if fused else model), f"{how}; {head}"


def network_of(norm: Mapping[str, Any], **options: Any) -> nn.Module:
    """`build_model`; of a network that takes no norm the one that conversion makes of it."""
    try:
        return build_model(**options, norm=sn.make_norm(**norm))
    except ValueError as error:
        try:
            return converted_network(norm, **options)
        except ValueError:
            raise error from None


def converted_network(norm: Mapping[str, Any], **options: Any) -> nn.Module:
    """The network as `init=` makes it of batch-norm weights: converted, whatever it takes itself.

    Some networks of timm's take a norm for other layers than those that have batch norm. Raises
    ValueError if none has, or for options that `build_model` refuses.
    """
    others = ("zero_init_residual", "fused_activation")  # of `build_model` alone
    plain = batch_norm_model(**{k: v for k, v in options.items() if k not in others})
    if not any(isinstance(layer, _BatchNorm) for layer in plain.modules()):
        raise ValueError(f"{options['name']} has no batch norm")
    return sn.convert(plain, norm["name"], **{k: v for k, v in norm.items() if k != "name"})


def sketched(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory for its tensors; with it if that fails (torchvision's RegNets)."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # it reads its weights
        return build()


def head_keys(build: Callable[[int], nn.Module], classes: int) -> list[str]:
    """The parameters whose shape is that of the classes, of all heads if there are several."""
    ours, others = (
        sketched(partial(build, count)).state_dict() for count in (classes, classes + 1)
    )
    return [key for key in ours if ours[key].shape != others[key].shape]


def restore_facts(model: nn.Module, facts: Mapping[str, Any], norm: Mapping[str, Any]) -> None:
    """Let `model` compute as the network that the weights are of; see `Weights`.

    Raises ValueError if `norm` asks for another eps or number of groups, or other variances.
    """
    for name, layer, option, theirs, _ in differences(model, facts):
        if norm.get(option) not in (None, theirs):
            raise ValueError(
                f"norm.{option}={norm[option]}: the pretrained network has {theirs} in {name}; "
                f"norm.{option}={as_yaml(theirs)} keeps that"
            )
        setattr(layer, option, theirs)
    if hasattr(model, "transform_input") and "transform_input" in facts:
        model.transform_input = facts["transform_input"]


def differences(
    model: nn.Module, facts: Mapping[str, Any]
) -> Iterator[tuple[str, nn.Module, str, Any, Any]]:
    """(name, layer, option, theirs, ours) wherever a layer of `model` is not as `facts` have it."""
    for name, layer in model.named_modules():
        switchable = isinstance(layer, SwitchNormBase)
        known = [
            ("eps", facts.get("eps", {}).get(name), getattr(layer, "eps", None)),
            ("num_groups", facts.get("groups", {}).get(name), groups_of(layer)),
            ("unbiased", facts.get("unbiased"), layer.unbiased if switchable else None),
        ]
        for option, theirs, ours in known:
            if None not in (theirs, ours) and theirs != ours:
                yield name, layer, option, theirs, ours


def load_state(model: nn.Module, state: Mapping[str, Tensor], noted: Mapping[str, Any]) -> None:
    """Load `state` with what `noted`, metadata of weights, says of the layers.

    Counts of batches may be missing: older files and frozen layers have none. Raises ValueError if
    it does not fit, such as control parameters of other statistics.
    """
    own = model.state_dict()
    counts = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
    notes = metadata(own) | dict(noted)  # some layers want their version
    try:
        model.load_state_dict(with_metadata(counts | dict(state), notes))
    except (RuntimeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        first, *more = lines[1:] or lines  # under torch's "Error(s) in loading"
        raise ValueError(first + (f", and so {len(more)} more" if more else "")) from None


def _of_batch_norm(weights: Mapping[str, Tensor]) -> bool:
    endings = {key.rpartition(".")[2] for key in weights}
    return "running_mean" in endings and "mean_weight" not in endings


def _load(
    model: nn.Module, weights: Mapping[str, Tensor], heads: list[str]
) -> tuple[str, list[str]]:
    """Load all but heads of another size; return what became of them, and what is wrong."""
    ours = model.state_dict()
    sizes = [(len(ours[key]), len(weights[key])) for key in heads if key in weights]
    like = all(weights[key].shape[1:] == ours[key].shape[1:] for key in heads if key in weights)
    anew = bool(sizes) and like and all(new != old for new, old in sizes)
    own = set(heads) if anew else set()
    head = " and ".join(dict.fromkeys(key.rpartition(".")[0] for key in heads))
    word = "heads" if " and " in head else "head"

    def compared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in without_counts(state).items() if key not in own}

    wrong = misfits(compared(ours), compared(weights))
    if not wrong:
        known = {key: value for key, value in weights.items() if key in ours and key not in own}
        load_state(model, ours | known, metadata(weights))
    if anew:
        new, old = sizes[0]
        start = "start" if word == "heads" else "starts"
        return f"{word} {head} {start} anew: {new} classes instead of {old}", wrong
    return f"{word} {head} kept: {len(ours[heads[0]])} classes", wrong


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

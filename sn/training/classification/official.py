"""Checkpoints that the authors released, as ours.

Source: github.com/switchablenorms/Switchable-Normalization, the names and shapes in its ResNet (v1)
and layer: `sn1`..`sn3`, gates in the order in, ln, bn, gain (1, C, 1, 1), statistics (1, C, 1),
instance variances unbiased, momentum the share that is kept.
"""

import re

import torch
from torch import Tensor

from ...norms import make_norm
from ..run.checkpoint import plain_names
from .models import build_model

_DEPTHS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


def convert_official(official: dict[str, Tensor], keep_factor: float = 0.9) -> dict:
    """Return {"build": ..., "norm": ..., "model": state} of an official ResNet's state.

    The options are those of `build_model` and `make_norm`; with them the outputs are the official
    network's, its unbiased variances included. `keep_factor` is the official layer's momentum.

    Raises ValueError, listing the keys, if any is missing, unexpected or of the wrong shape.
    """
    if not 0 <= keep_factor < 1:
        raise ValueError(f"keep_factor={keep_factor}; expected 0 <= keep_factor < 1")
    state = {}
    for key, value in plain_names(official).items():
        if re.search(r"(^|\.)bn\d\.", key):
            raise ValueError(f"{key} is a batch norm or a layer of ours, not one of the authors'")
        state[re.sub(r"(^|\.)sn(\d)\.", r"\1bn\2.", key)] = value
    build = {
        "name": _depth(state),
        "source": "torchvision",
        "num_classes": state["fc.weight"].shape[0] if "fc.weight" in state else 1000,
    }
    gates = state.get("bn1.mean_weight", torch.ones(3)).numel()
    if gates not in (2, 3):
        raise ValueError(f"sn1.mean_weight has {gates} gates; official layers have 2 or 3")
    norm = {
        "name": "sn",
        "statistics": ["in", "ln", "bn"][:gates],
        "unbiased": True,
        "momentum": round(1 - keep_factor, 12),
    }
    with torch.device("meta"):
        ours = build_model(**build, norm=make_norm(**norm)).state_dict()
    wanted = {key for key in ours if not key.endswith("num_batches_tracked")}
    missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    unexpected = [key for key in unexpected if not key.endswith("num_batches_tracked")]
    wrong = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(ours[key].shape)}"
        for key in sorted(wanted & state.keys())
        if state[key].numel() != ours[key].numel() or not _same(state[key], ours[key])
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    if any(problems.values()):
        lines = [f"  {what}: {', '.join(keys)}" for what, keys in problems.items() if keys]
        if any(re.search(r"radius|fixed", key.rpartition(".")[2]) for key in unexpected):
            lines.append("  (it looks like the authors' SSN, whose checkpoints are not read)")
        raise ValueError(f"not an official {build['name']}; keys (ours)\n" + "\n".join(lines))
    model = {}
    for key, like in ours.items():
        if key.endswith("num_batches_tracked"):  # not counted there
            model[key] = torch.tensor(1)
        else:
            model[key] = state[key].reshape(like.shape).clone()
    return {"build": build, "norm": norm, "model": model}


def _same(value: Tensor, like: Tensor) -> bool:
    """Whether the shapes agree but for the ones around a vector."""
    return [n for n in value.shape if n != 1] == [n for n in like.shape if n != 1]


def _depth(state: dict[str, Tensor]) -> str:
    blocks = [
        len({match[1] for key in state if (match := re.match(rf"layer{stage}\.(\d+)\.", key))})
        for stage in range(1, 5)
    ]
    kind = "bottleneck" if any(key.endswith(".conv3.weight") for key in state) else "basic"
    if (kind, tuple(blocks)) not in _DEPTHS:
        raise ValueError(
            f"{kind} blocks {blocks} in layer1 to layer4 are no ResNet-18, 34, 50, 101 or 152; "
            f"first keys: {', '.join(sorted(state)[:5])}"
        )
    return _DEPTHS[kind, tuple(blocks)]


def unfilled_statistics(model: dict[str, Tensor]) -> list[str]:
    """Keys of running variances that are all zero: the official layer trained without them."""
    return [k for k, v in model.items() if k.endswith("running_var") and not v.any()]

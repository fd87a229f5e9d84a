"""Evaluate any checkpoint with its running statistics and with the batch average.

    python scripts/evaluate_checkpoint.py outputs/imagenet/.../seed0/checkpoint.pt \\
        --root /data/imagenet
    python scripts/evaluate_checkpoint.py converted.pt --data imagenet --root /data/imagenet
    python scripts/evaluate_checkpoint.py resnet50.pth --model resnet50 --norm bn \\
        --data imagenet --root /data/imagenet
    torchrun --nproc_per_node=8 scripts/evaluate_checkpoint.py ...

A run's network, norm and data come from the config.yaml beside it, but for the folder of the data
(--root; digits need none); a converted checkpoint's network and norm from itself. A bare state with
--norm bn is of the library's own batch norms. Prints one line of JSON. The file is left as it is.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.records import read_config
from torch import nn

import sn
from sn.batch_average import batch_statistics_layers
from sn.training.classification.config import Model
from sn.training.classification.data import (
    ImageData,
    TransformedImages,
    batch_average_batches,
    build_data,
    data_options,
    evaluation_batches,
    is_image_folder,
    make_loader,
)
from sn.training.classification.evaluation import evaluate, is_synchronised
from sn.training.classification.models import batch_norm_model
from sn.training.classification.pretrained import (
    Weights,
    converted_network,
    head_keys,
    load_state,
    misfits,
    network_of,
    restore_facts,
    sketched,
    weights_in,
    without_counts,
)
from sn.training.run import distributed, entry
from sn.training.run.checkpoint import load_weights, metadata
from sn.training.run.config import COUNT, SIZE, check_norm, check_open, short
from sn.training.run.display import say
from sn.training.run.images import BadImages

NUMBERS = (
    ("max_bad_images", 0, COUNT),
    ("workers", 0, 1024),
    ("batch_size", 1, SIZE),
    ("batches", 1, COUNT),
    ("seed", 0, COUNT),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", help="of a bare state: the network's name, such as resnet50")
    parser.add_argument("--source", default="torchvision", help="torchvision, timm or cifar")
    parser.add_argument("--norm", default="bn", help="of a bare state: the norm's name")
    parser.add_argument("--key", help="the file's key that holds the network, if it has several")
    parser.add_argument("--data", help="digits, cifar10 or imagenet (a run's own is the default)")
    parser.add_argument("--root", help="folder of the data")
    bad = "unreadable images skipped; one more is an error (default: 10)"
    parser.add_argument("--max-bad-images", type=int, default=10, help=bad)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=200, help="of the batch average")
    parser.add_argument("--seed", type=int, default=0, help="of the batch average's images")
    crops = "take the batch average's images with the training's random crops and flips"
    parser.add_argument("--augment", action="store_true", help=crops)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


def load(args: argparse.Namespace, told: Callable[[str], object] | None) -> tuple[nn.Module, dict]:
    """The network with its weights, and the options of its data; `told` as in `find_network`.

    Raises ValueError if the options are not known or the keys do not fit.
    """
    content = load_weights(args.checkpoint)
    config = args.checkpoint.with_name("config.yaml")
    data, alone = {"name": args.data}, False
    if {"build", "norm", "model"} <= content.keys():
        build, norm = content["build"], content["norm"]
    elif args.model is None and config.exists() and "model" in content:
        recorded = read_config(config)
        build, norm = recorded.get("model"), recorded.get("norm")
        own = recorded.get("data")
        if isinstance(own, dict) and args.data in (None, own.get("name")):
            data = own
    elif args.model is not None:
        build, norm = {"name": args.model, "source": args.source}, {"name": args.norm}
        alone = args.norm == "bn"
    else:
        raise ValueError(f"{args.checkpoint} has no config.yaml beside it; give --model and --norm")
    if data.get("name") is None:
        raise ValueError("which data? give --data")
    state = weights_in(content, args.checkpoint, args.key, told)
    try:
        return build_and_load(build, norm, state, alone), data
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{args.checkpoint} does not fit: {error}") from None


def build_and_load(build: Any, norm: Any, state: Weights, alone: bool = False) -> nn.Module:
    """The network of these options with this state; it is held to the state before it is made.

    alone: nothing says how it was built; with its library's own batch norms, if these fit.

    Raises ValueError, TypeError or RuntimeError if it does not fit.
    """
    for key, values in (("model", build), ("norm", norm)):
        if not isinstance(values, dict):
            raise ValueError(f"{key}={short(values)}; expected options by name")
    check_open(build, "model", Model)
    check_norm(norm)
    kinds = [partial(network_of, norm), partial(converted_network, norm)]
    errors = []
    for kind in [batch_norm_model] * alone + kinds:
        try:
            return _loaded(kind, build, norm, state)
        except (RuntimeError, TypeError, ValueError) as error:
            errors.append(error)
    raise errors[0]


def _loaded(kind: Callable[..., nn.Module], build: dict, norm: dict, state: Weights) -> nn.Module:
    if "num_classes" not in build:
        heads = head_keys(lambda n: kind(**build | {"num_classes": n}), 2)
        counts = {len(state[key]) for key in heads if key in state}
        if len(counts) != 1:
            raise ValueError(f"the state has no {' and '.join(heads)} to tell the classes from")
        build = build | {"num_classes": counts.pop()}
    # takes no memory, whatever the file asks for
    sketch = sketched(lambda: kind(**build))
    like = {key: value.to("meta") for key, value in state.items()}
    try:
        load_state(sketch.to("meta"), like, metadata(state))
    except ValueError:
        if wrong := misfits(without_counts(sketch.state_dict()), without_counts(like)):
            raise ValueError("; ".join(wrong)) from None
        raise
    model = kind(**build)
    load_state(model, state, metadata(state))
    restore_facts(model, state.facts, norm)
    return model


def evaluate_both(model: nn.Module, data: ImageData, args, processes) -> dict[str, float | int]:
    """Top-1, top-5 and loss with the running statistics, and with the batch average."""
    where = (processes.rank, processes.world_size)

    def images(split, batches, augmentation=data.evaluation):
        transformed = TransformedImages(split, augmentation, 1, args.seed)
        return make_loader(transformed, batches, args.workers, processes.device)

    def to_device(tensor):
        return tensor.to(processes.device, non_blocking=True)

    def figures(suffix: str) -> dict[str, float]:
        loader = images(data.val, evaluation_batches(len(data.val), args.batch_size, *where))
        found = evaluate(model, loader, to_device)
        return {key + suffix: round(value, 4) for key, value in found.items()}

    results = figures("_moving_average")
    if batch_statistics_layers(model):
        together = is_synchronised(model)
        batches = batch_average_batches(
            len(data.train), args.batch_size, args.batches, args.seed, *where, together
        )
        augmentation = data.augmentation if args.augment else data.evaluation
        loader = (to_device(x) for x, _ in images(data.train, batches, augmentation))
        found = sn.batch_average(model, loader, max(len(batches), 1))
        results["batches"] = len(batches) if together else found
        results |= figures("_batch_average")
    return results


def main() -> None:
    args = parse_arguments()
    try:
        for key, low, high in NUMBERS:
            if not low <= getattr(args, key) <= high:
                option = key.replace("_", "-")
                raise ValueError(f"--{option} {getattr(args, key)}; expected {low} to {high}")
        processes = distributed.start(args.device)
        model, options = load(args, partial(say, error=True) if processes.is_main else None)
        if args.root is not None:
            options["root"] = args.root
        elif "root" in data_options(options["name"]).keys() - options.keys():
            raise ValueError(f"--root is not set; expected the folder of {options['name']}")
        options = {k: v for k, v in options.items() if k not in ("workers", "max_bad_images")}
        with tempfile.TemporaryDirectory() as folder:  # each process reads a share of its own
            if is_image_folder(options["name"]):
                note = f"{folder}/bad_images.txt"
                options["bad"] = BadImages(note, args.max_bad_images, "--max-bad-images")
            data = build_data(**options)
            check_classes(model, data)
            model.to(processes.device)
            if processes.device.type == "cuda":
                distributed.agree_on_kernels(model, processes.device)
            results = evaluate_both(model, data, args, processes)
    except Exception as error:
        if not entry.is_known(error):
            raise
        entry.end(entry.message(error), 2)
    finally:
        distributed.stop()
    if processes.is_main:
        print(json.dumps({"checkpoint": str(args.checkpoint), "data": options["name"], **results}))


@torch.no_grad()
def check_classes(model: nn.Module, data: ImageData) -> None:
    """Raise ValueError unless the network tells as many classes apart as the data have."""
    image, _ = TransformedImages(data.val, data.evaluation, 1)[0, 0]
    classes = model.eval()(image[None]).shape[1]
    if classes != data.num_classes:
        raise ValueError(
            f"the network tells {classes} classes apart, {data.name} has {data.num_classes}; give "
            "the data that it was trained for, all their classes among them"
        )


if __name__ == "__main__":
    main()

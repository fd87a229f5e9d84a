"""Made-up run records as the ledger of claims asks for them, for tests only."""

import json
import math
import random
from pathlib import Path

import yaml

EPOCHS = 20
BLOCKS = {
    "bn1": "stem",
    "layer1.0.bn1": "layer1",
    "layer2.0.bn1": "layer2",
    "layer3.0.bn1": "layer3",
}
STATISTICS = {"sn": ["in", "ln", "bn"], "sn_in_ln": ["in", "ln"]}


def write(
    root, design, arm, setting, seed, /, *, lr=0.4, top1=60.0, run_name=None, config=(), **summary
):
    """The record of one run of an arm (an `Arm` of the ledger); returns its folder.

    config: dotted keys to change; summary: keys of summary.json to change.
    """
    gpus, images = map(int, setting.split("x"))
    run_name = run_name or f"{arm.name}_{setting}"
    run = f"imagenet/cifar10_resnet8/{run_name}/seed{seed}"
    folder = Path(root) / run
    folder.mkdir(parents=True)
    facts = {k: v for k, v in design.facts.items() if k not in ("model", "gates")} | dict(arm.set)
    facts |= {"model.name": "resnet8", "norm.name": arm.norm, "schedule.lr_per_256": lr}
    facts |= {"seed": seed, "run_name": run_name, "setting.gpus": gpus}
    facts |= {"setting.images_per_gpu": images} | dict(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(nested(facts)))
    record = {
        "task": "imagenet",
        "run": run,
        "norm": arm.norm,
        "statistics": STATISTICS.get(arm.norm),
        "setting": {"gpus": gpus, "images_per_gpu": images, "name": setting},
        "data": {
            "name": "cifar10",
            "train_images": facts["data.train_images"],
            "val_images": 5000,
            "classes": 10,
            "sha256": "ab" * 32,
        },
        "model": "resnet8",
        "status": "finished",
        "top1": top1,
        "top1_batch_average": top1 + 0.5,
        "epochs": EPOCHS,
        "seed": seed,
        "images_seen": 200000,
        "wall_s": 150.0,
        "lr": lr * gpus * images / 256,
        "precision": "fp32",
        "scale": "proxy",
        "versions": {"torch": "2.15.0"},
        "device": "CPU, 1 threads of 2 cores",
        "commit": "0123456789abcdef",
        "date": "2026-11-27T12:00:00+00:00",
    }
    if summary.get("status") == "diverged":
        record |= {"top1": None, "top1_batch_average": None, "epochs": 3}
    record |= summary
    (folder / "summary.json").write_text(json.dumps(record))
    return folder


def write_lines(folder, name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_curves(folder, top1, speed=1500.0, shift=0.0):
    """metrics.jsonl: a training loss that falls from 2 to 0.8, validation `shift` above it."""
    lines = []
    for epoch in range(1, EPOCHS + 1):
        loss = 2 - 1.2 * epoch / EPOCHS
        lines.append(
            {
                "epoch": epoch,
                "train/loss": loss,
                "val/loss": loss + 0.2 + shift,
                "train/top1": top1 + 3,
                "val/top1": top1,
                "images_per_s": speed,
            }
        )
    write_lines(folder, "metrics.jsonl", lines)


def write_importance(folder, mean, var):
    """importance.jsonl: the same weights in every layer."""
    layers = {name: {"block": block, "mean": mean, "var": var} for name, block in BLOCKS.items()}
    write_lines(folder, "importance.jsonl", [{"epoch": EPOCHS, "layers": layers}])


def nested(flat):
    result = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result


def write_campaign(root, ledger, seeds=None, spread=0.5):
    """Every run that the made-up campaign of the ledger's designs has, in the paper's spirit."""
    chance = random.Random(0)
    for design in ledger.designs.values():
        if design.search is None or design.task != "imagenet":
            continue
        cells = {cell for claim in ledger.claims if claim.design == design.name
                 for cell in claim.cells}  # fmt: skip
        for name, setting in sorted(cells):
            for seed in seeds or design.seeds:
                write_like(root, design, design.arms[name], setting, seed, chance, spread)
        for arm in design.arms.values():
            if arm.lr_of != arm.name:
                continue
            for value in design.search.values:
                for setting in design.search.settings:
                    top1 = 60 - 5 * abs(math.log2(value / 0.4))
                    run_name = f"{arm.name}_{setting}_lr{value:g}"
                    write(root, design, arm, setting, 0, lr=value, top1=top1, run_name=run_name)


def write_like(root, design, arm, setting, seed, chance, spread):
    """One run: BN falls with few images, SN hardly, GN not at all."""
    images = int(setting.split("x")[1])
    base = {"bn": 64, "gn": 58, "in": 54, "ln": 47, "brn": 63}.get(arm.norm, 63.5)
    fall = {"bn": 2.0, "brn": 0.5, "sn": 0.5}.get(arm.norm, 0.0) * (5 - math.log2(images))
    top1 = base - fall + chance.gauss(0, spread)
    top1 = 11.0 if (arm.norm, images) == ("bn", 1) else top1
    folder = write(root, design, arm, setting, seed, top1=top1)
    speed = 500.0 if arm.norm == "bkn" else 1500.0
    write_curves(folder, top1, speed, {"bn": 0.0, "sn": 0.05}.get(arm.norm, 0.2))
    if arm.norm in STATISTICS:
        bn = 0.05 + 0.1 * math.log2(images) + chance.gauss(0, 0.01) if arm.norm == "sn" else 0.0
        variance = max(0.0, bn - 0.05 * (images == 2))
        rest = [(1 - share) / 2 for share in (bn, variance)]
        keys = STATISTICS[arm.norm]
        mean = {k: v for k, v in zip(("in", "ln", "bn"), (rest[0], rest[0], bn)) if k in keys}
        var = {k: v for k, v in zip(("in", "ln", "bn"), (rest[1], rest[1], variance)) if k in keys}
        write_importance(folder, mean, var)

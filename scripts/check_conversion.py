"""sn.convert on every timm model with batch norm and torchvision's families: does it hold?

    python scripts/check_conversion.py --list        # the models, their sizes and batch norms
    python scripts/check_conversion.py --most 30     # check those of up to 30 M parameters
    python scripts/check_conversion.py --summary     # write results/conversion.md

Smallest first, each in a process of its own with limits on time and memory. Every outcome is a line
of results/conversion.jsonl: models that have one are not repeated (--retry repeats failures).

For each model, with random weights (batch norm's too), one batch's running statistics and two small
images: the largest error of its evaluation outputs after `convert(model, keep_outputs=True)`
relative to the largest output, with control parameters that leave BN alone (gate_start=25; equal if
below 1e-3, in float32 or, where that fails at every size, in float64) and at the default start;
then, after `convert(model)`, whether a step of SGD is finite: its loss, gradients and weights.
"""

import argparse
import copy
import json
import multiprocessing
import resource
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sn
from sn.batch_average import batch_statistics_layers
from sn.modules import SwitchNormBase
from sn.training.run.record import environment, read_jsonl

RESULTS = Path(__file__).resolve().parents[1] / "results"
EQUAL = 1e-3
BN_ALONE = 25.0  # the other statistics keep a share of 3e-11
CLASSES = 5
TORCHVISION = ("models", "segmentation", "detection", "video")


# --- the models -----------------------------------------------------------------------------------


def every_name() -> list[str]:
    names = [f"timm/{name}" for name in timm.list_models()]
    for family in TORCHVISION:
        names += [f"{family}/{name}" for name in torchvision.models.list_models(module=_of(family))]
    return names


def _of(family: str):
    return torchvision.models if family == "models" else getattr(torchvision.models, family)


def build(name: str) -> nn.Module:
    """The network with random weights and `CLASSES` classes."""
    family, _, name = name.partition("/")
    if family == "timm":
        return timm.create_model(name, num_classes=CLASSES)
    options = {"weights": None, "num_classes": CLASSES}
    if family in ("segmentation", "detection"):
        options["weights_backbone"] = None
    return torchvision.models.get_model(name, **options)


def batch_norms(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if "BatchNorm" in type(layer).__name__]


def describe(name: str) -> dict:
    """Parameters and batch norms, without memory for the weights where the model allows."""
    try:
        try:
            with torch.device("meta"):
                model = build(name)
        except Exception:  # some compute with values while they are built
            model = build(name)
    except Exception as error:
        return {"model": name, "error": f"cannot be built: {_short(error)}"}
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": name, "parameters": parameters, "batch_norms": len(batch_norms(model))}


# --- one model ------------------------------------------------------------------------------------


def image_sizes(name: str, model: nn.Module) -> list[tuple[int, ...]]:
    """(C, [T,] H, W) to try, small ones first."""
    family = name.partition("/")[0]
    if family == "video":
        return [(3, 8, 64, 64), (3, 16, 112, 112), (3, 16, 224, 224)]
    if family != "timm":
        return [(3, size, size) for size in (64, 128, 224, 299)]
    channels, *full = model.default_cfg.get("input_size", (3, 224, 224))
    sizes = [] if model.default_cfg.get("fixed_input_size") else [(64, 64), (96, 96), (128, 128)]
    return [(channels, *size) for size in (*sizes, full)]


def outputs(name: str, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Every tensor the network gives; of a detector, before boxes are sorted and suppressed."""
    if not name.startswith("detection/"):
        return [leaf for leaf in tree_leaves(model(x)) if torch.is_tensor(leaf)]
    features = model.backbone(x)
    found = list(features.values())
    if hasattr(model, "rpn"):
        found += tree_leaves(model.rpn.head(found))
        generator = torch.Generator().manual_seed(0)
        for part, size in (("box", 7), ("mask", 14), ("keypoint", 14)):
            head = getattr(model.roi_heads, f"{part}_head", None)
            if head is not None:
                channels = model.backbone.out_channels
                maps = torch.randn(4, channels, size, size, generator=generator)
                found.append(head(maps.to(x.dtype)))
    else:
        found += tree_leaves(model.head(found))
    return [leaf for leaf in found if torch.is_tensor(leaf) and leaf.is_floating_point()]


def loss_of(name: str, model: nn.Module, x: Tensor) -> Tensor:
    if not name.startswith("detection/"):
        return sum(leaf.float().square().mean() for leaf in outputs(name, model, x))
    size = x.shape[-1]
    target = {
        "boxes": torch.tensor([[0.1, 0.1, 0.7, 0.8]]) * size,
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, size, size, dtype=torch.uint8),
        "keypoints": torch.tensor([[[size / 3, size / 3, 1.0]] * 17]),
    }
    return sum(model(list(x), [target] * len(x)).values())


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest over the outputs of max |ours - theirs| / max |theirs|; nan if one is not finite."""
    assert [y.shape for y in ours] == [y.shape for y in theirs], "other shapes"
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs)]
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in pairs if b.numel()]
    return torch.stack(errors).max().item()


def check(name: str) -> dict:
    """What becomes of the model, at the first size that it takes and that tells; see the head."""
    result = {"error": "the model itself takes none of the sizes tried"}
    sizes = image_sizes(name, random_model(name))
    for size, dtype in [*((size, torch.float32) for size in sizes), (sizes[-1], torch.float64)]:
        found = check_at(name, size, dtype)
        if found is not None:
            result = found
            if result.get("equal", True):  # else maps of one pixel or depth may magnify rounding
                break
    return result


def check_at(name: str, size: tuple[int, ...], dtype: torch.dtype) -> dict | None:
    """The outcome with images of `size`; None if the model does not take them."""
    model = random_model(name).eval().to(dtype)
    trainee = copy.deepcopy(model)
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    try:
        with torch.no_grad():
            sn.batch_average(_Outputs(name, model), [x], 1)
            for layer in batch_statistics_layers(model).values():  # channels that hardly vary
                layer.running_var.clamp_(min=0.01 * layer.running_var.mean())  # magnify rounding
            expected = outputs(name, model, x)
    except Exception:
        return None
    result = {"size": list(size[1:]), "dtype": str(dtype)[6:], "converted": False}
    try:
        kept = sn.convert(model, keep_outputs=True, gate_start=BN_ALONE)
        left = batch_norms(kept)
        if left:
            return result | {"error": f"{len(left)} batch norms left, first {left[0]}"}
        result["converted"] = True
        with torch.no_grad():
            error = relative_error(outputs(name, kept, x), expected)
            result |= {"relative_error": error, "equal": error < EQUAL}
            for layer in kept.modules():
                if isinstance(layer, SwitchNormBase):
                    for gate in (layer.mean_weight, layer.var_weight):
                        gate.mul_(8.0 / BN_ALONE)
            result["relative_error_start_8"] = relative_error(outputs(name, kept, x), expected)
        result["step"] = step(name, sn.convert(copy.deepcopy(trainee)), x)
        if result["step"] != "finite":
            result["step_before_conversion"] = step(name, trainee, x)
    except Exception as error:
        result["error"] = _short(error)
    return result


def random_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build(name)
    for layer in model.modules():
        if "BatchNorm" in type(layer).__name__ and layer.weight is not None:
            nn.init.normal_(layer.weight, 1, 0.1)  # some start at zero, which hides their branch
            nn.init.normal_(layer.bias, 0, 0.1)
    if name.startswith("detection/") and hasattr(model, "rpn"):
        model.transform.min_size, model.transform.max_size = (128,), 128
    return model


class _Outputs(nn.Module):
    """The network with `outputs` as its forward, for batch_average."""

    def __init__(self, name: str, model: nn.Module):
        super().__init__()
        self.name, self.model = name, model

    def forward(self, x: Tensor) -> list[Tensor]:
        return outputs(self.name, self.model, x)


def step(name: str, model: nn.Module, x: Tensor) -> str:
    """Whether a step of SGD is "finite", or else what is not."""
    model.train()
    loss = loss_of(name, model, x)
    if not loss.isfinite():
        return "loss not finite"
    loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    bad = [key for key, grad in grads.items() if not grad.isfinite().all()]
    if bad:
        return f"{len(bad)} gradients not finite, first {bad[0]}"
    gates = sn.gates(model)
    if gates and not any(gate.grad is not None and gate.grad.any() for gate in gates):
        return "no gate has a gradient"
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return "finite" if all(p.isfinite().all() for p in model.parameters()) else "weights not finite"


def _short(error: BaseException) -> str:
    """Kind, first line and the last place of ours or the model's in an error."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:160]}{where}"


# --- all of them ----------------------------------------------------------------------------------


def in_process(name: str, seconds: float, memory_gb: float) -> dict:
    """`check(name)` in a process of its own; an error if it takes more than the limits."""

    def body(end) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * 2**30),) * 2)
        try:
            end.send(check(name))
        except Exception as error:
            end.send({"error": _short(error)})

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=body, args=(theirs,))
    begin = time.perf_counter()
    process.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(seconds) else {"error": f"more than {seconds:g} s"}
    except EOFError:
        process.join()
        result = {"error": f"the process ended with {process.exitcode}"}
    if process.is_alive() and "error" in result:
        process.kill()
    process.join()
    return {"model": name, **result, "seconds": round(time.perf_counter() - begin, 1)}


def records(path: Path) -> dict[str, dict]:
    """What is known of each model: the lines of the file, later ones over earlier ones."""
    known: dict[str, dict] = {}
    for line in read_jsonl(path) if path.exists() else []:
        if "model" in line:
            size = {k: v for k, v in known.get(line["model"], {}).items() if k in SIZE}
            known[line["model"]] = size | line
    return known


SIZE = ("model", "parameters", "batch_norms")


def passed(record: dict) -> bool:
    return bool(record.get("equal")) and record.get("step") == "finite"


def summary(path: Path) -> str:
    known = records(path).values()
    runs = [line["environment"] for line in read_jsonl(path) if "environment" in line]
    lines = ["# sn.convert over timm and torchvision", ""]
    commits = list(dict.fromkeys(run["commit"] for run in runs))
    versions = runs[-1]["versions"]
    wanted = ("python", "torch", "torchvision", "timm")
    lines += [
        "Made by `scripts/check_conversion.py --summary` from `conversion.jsonl`. Random weights, "
        "two images a model; the script's head says what equal and finite mean. Not checked: too "
        "large, too slow, or not reached yet.",
        f"{', '.join(f'{key} {versions[key]}' for key in wanted)}; {runs[-1]['device']}; "
        f"commits {', '.join(commits)}; started {runs[0]['date']}, last {runs[-1]['date']}.",
        "",
        "| | with batch norm | checked | converted | equal outputs | finite step | not checked |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family in ("timm", *TORCHVISION):
        rows = [r for r in known if r["model"].startswith(f"{family}/") and r.get("batch_norms")]
        done = [r for r in rows if "seconds" in r]
        able = [r for r in done if "size" in r]

        def share(count: int, of=able) -> str:
            return f"{count} of {len(of)} ({100 * count / len(of):.1f} %)" if of else ""

        name = family if family == "timm" else f"torchvision {family.replace('models', 'classes')}"
        cells = [len(rows), len(able), share(sum(r.get("converted", False) for r in able))]
        cells += [share(sum(r.get("equal", False) for r in able))]
        cells += [share(sum(r.get("step") == "finite" for r in able)), len(rows) - len(able)]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    able = [r for r in known if "relative_error_start_8" in r]
    for key, what in (("relative_error", "bn alone"), ("relative_error_start_8", "gate_start 8")):
        errors = torch.tensor(sorted(r[key] for r in able))
        quantiles = [errors[int(q * (len(errors) - 1))].item() for q in (0.5, 0.9, 0.99, 1)]
        text = ", ".join(f"{q:.1e}" for q in quantiles)
        lines += ["", f"Relative error of evaluation outputs, {what}: median, 90 %, 99 %, largest: "
                  f"{text}."]  # fmt: skip
    failures = [r for r in known if "seconds" in r and not passed(r)]
    lines += ["", f"## The {len(failures)} that failed or took too long", "", "| model | why |"]
    lines += ["| --- | --- |"]
    lines += [f"| {r['model']} | {reason(r)} |" for r in sorted(failures, key=reason)]
    unlisted = [r for r in known if "error" in r and "seconds" not in r]
    if unlisted:
        kinds = Counter(r["error"].split(" (")[0] for r in unlisted)
        lines += ["", "Not built: " + "; ".join(f"{n} x {kind}" for kind, n in kinds.items())]
    return "\n".join(lines) + "\n"


def reason(record: dict) -> str:
    if "error" in record:
        return record["error"].replace("|", "/")
    if not record["equal"]:
        return f"relative error {record['relative_error']:.1e}"
    return f"step: {record['step']}; before conversion: {record['step_before_conversion']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the models and end")
    parser.add_argument("--summary", action="store_true", help="write conversion.md and end")
    parser.add_argument("--retry", action="store_true", help="repeat the models that failed")
    parser.add_argument("--most", type=float, default=30, help="million parameters (default 30)")
    parser.add_argument("--seconds", type=float, default=120, help="a model's limit (default 120)")
    parser.add_argument(
        "--memory", type=float, default=8, help="a model's limit in GiB (default 8)"
    )
    parser.add_argument("--only", nargs="*", help="these models alone, such as timm/resnet18")
    parser.add_argument("--output", type=Path, default=RESULTS / "conversion.jsonl")
    args = parser.parse_args()
    if args.summary:
        args.output.with_suffix(".md").write_text(summary(args.output))
        return
    torch.set_num_threads(1)
    known = records(args.output)
    with open(args.output, "a", buffering=1) as file:

        def write(record: dict) -> None:
            file.write(json.dumps(record) + "\n")

        write({"environment": environment(torch.device("cpu"))})
        for name in args.only or every_name():
            if name not in known:
                known[name] = describe(name)
                write(known[name])
        rows = [known[name] for name in args.only or every_name()]
        rows = [r for r in rows if r.get("batch_norms")]
        rows.sort(key=lambda r: r["parameters"])
        for row in rows:
            if args.list:
                print(f"{row['parameters'] / 1e6:8.1f} M {row['batch_norms']:4d} {row['model']}")
                continue
            done = "seconds" in row and (passed(row) or not args.retry)
            if done or row["parameters"] > args.most * 1e6:
                continue
            result = in_process(row["model"], args.seconds, args.memory)
            write(result)
            print(result, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

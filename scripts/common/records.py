"""Read run records: what a run folder keeps in git, as the scripts' tables and figures need it.

A leaf that imports neither torch nor `sn`, so that the scripts can read records without them.
"""

import json
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]  # the clone
PAPER = ROOT / "results" / "paper.yaml"
RUNS_HELP = "folder that holds the run records (default: results/ of the clone)"
STATISTICS = ("in", "ln", "gn", "bn")
# Fig 2's order, so that a figure of ours reads like the paper's.
FIGURE_SETTINGS = ("8x32", "8x16", "8x8", "8x4", "8x2", "8x1", "1x8", "1x16", "1x32")
# One colour per norm and statistic in every figure (Okabe and Ito, safe for colour-blind readers).
COLORS = {"bn": "#0072B2", "gn": "#E69F00", "sn": "#000000", "in": "#009E73", "ln": "#D55E00"}
COLORS |= {"sn_in_ln": "#CC79A7", "sn_with_bn": "#56B4E9", "none": "#999999"}

# Keys of config.yaml that do not change what a run computes, or that a table's cell fixes.
NOT_RECIPE = {"seed", "output_dir", "run_name", "hydra", "root", "workers", "num_workers"}
NOT_RECIPE |= {"device", "progress", "resume", "download", "tensorboard", "log_every", "backend"}
NOT_RECIPE |= {"experiment", "scale", "emulation", "world_size", "parts_name"}

# What a task's tables need of a summary, beside model, scale, setting and data.
NEEDED = {"imagenet": {"norm": str}, "detection": {"parts": dict, "init": dict}}


def fail(message: str) -> NoReturn:
    """End a script with one line on stderr and exit code 2, as argparse does."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_paper() -> dict[str, Any]:
    """The published figures, `results/paper.yaml`."""
    return yaml.safe_load(PAPER.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Run:
    """The records of one run; `importance` and `metrics` hold a dictionary per epoch or step."""

    path: Path  # the run folder
    summary: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    importance: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's path below its root, `imagenet/<data>_<model>/<norm>_<setting>/seed<k>`."""
        return self.summary["run"]

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def setting(self) -> str:
        """`<gpus>x<images per GPU>` as run, whatever name the config had for it."""
        setting = self.summary["setting"]
        return f"{setting['gpus']}x{setting['images_per_gpu']}"

    @property
    def diverged(self) -> bool:
        return self.summary["status"] == "diverged"

    @property
    def group(self) -> tuple[str, str, str]:
        """What may share a table: data, model, and scale (`proxy` or `full`)."""
        return self.summary["data"]["name"], self.summary["model"], self.summary["scale"]

    @property
    def norm(self) -> str:
        """The row of Table 4.1 this run belongs to.

        SN over IN and LN at one image per GPU is the paper's SN there (Table 4.1's footnote); SN
        that keeps BN at one image is not, and gets a row of its own.
        """
        norm, statistics = self.summary["norm"], self.summary.get("statistics")
        if self.summary["setting"]["images_per_gpu"] == 1 and norm in ("sn", "sn_in_ln"):
            return "sn_with_bn" if "bn" in (statistics or ()) else "sn"
        return norm

    @property
    def without_bn(self) -> bool:
        """Whether this is SN with the BN term left out by hand."""
        statistics = self.summary.get("statistics")
        return bool(statistics) and "bn" not in statistics

    @property
    def parts(self) -> str:
        """The norms of a detector's parts: `<backbone>-<fpn>-<box head>-<mask head>`."""
        return "-".join(self.summary["parts"].values())

    def metric(self, name: str) -> float | None:
        """A finite number of the summary, or None (diverged, missing)."""
        value = self.summary.get(name)
        ok = isinstance(value, int | float) and not self.diverged and math.isfinite(value)
        return float(value) if ok else None


def load_runs(root: Path | str, task: str | None = "imagenet") -> list[Run]:
    """Every run of `task` (None: of any) whose `summary.json` lies below `root`, sorted by path.

    A broken record is left out with a warning that names the file. Raises FileNotFoundError for a
    root that is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    runs = []
    for path in sorted(root.rglob("summary.json")):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            _check_summary(summary)
        except (OSError, ValueError) as error:
            log.warning("warning: %s left out: %s", path, error)
            continue
        if task is not None and summary["task"] != task:
            continue
        folder = path.parent
        importance = _read_lines(folder / "importance.jsonl", ("layers",))
        metrics = _read_lines(folder / "metrics.jsonl")
        runs.append(Run(folder, summary, _read_config(folder), importance, metrics))
    return runs


def _check_summary(summary: Any) -> None:
    """Raise ValueError if a summary lacks what every table needs."""
    if not isinstance(summary, dict):
        raise ValueError("not a JSON object")
    needed = {"task": str, "run": str, "status": str, "seed": int}
    if summary.get("task") in NEEDED:
        needed |= {"model": str, "scale": str, "setting": dict, "data": dict}
        needed |= NEEDED[summary["task"]]
    for key, kind in needed.items():
        if not isinstance(summary.get(key), kind):
            raise ValueError(f"no {key!r}, or not of type {kind.__name__}")
    if summary["task"] in NEEDED:
        if not isinstance(summary["data"].get("name"), str):
            raise ValueError("no 'data.name'")
        for key in ("gpus", "images_per_gpu"):
            if not isinstance(summary["setting"].get(key), int):
                raise ValueError(f"no 'setting.{key}', or not a whole number")


def _read_lines(path: Path, keys: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The lines of a .jsonl file by epoch or step; of a resumed run the later line counts."""
    if not path.is_file():
        return []
    lines = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or any(key not in record for key in keys):
                raise ValueError(f"needs {', '.join(keys) or 'an object'}")
            unit = next((key for key in ("epoch", "step") if key in record), None)
            if unit is None or not isinstance(record[unit], int):
                raise ValueError("needs epoch or step, a whole number")
            lines[record[unit]] = record
        except ValueError as error:
            log.warning("warning: %s line %d left out: %s", path, number, error)
    return [lines[count] for count in sorted(lines)]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        log.warning("warning: %s is missing; the run's recipe cannot be compared", path)
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
        return config
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        log.warning("warning: %s not read: %s", path, reason)
        return {}


def by_group(runs: Iterable[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """Runs by (data, model, scale), sorted."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    return dict(sorted(groups.items()))


def group_name(group: tuple[str, str, str]) -> str:
    """`<data>_<model>`, with `_full` unless it is a proxy: a file name."""
    data, model, scale = group
    return f"{data}_{model}" + ("" if scale == "proxy" else f"_{scale}")


def by_cell(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Runs by (norm, setting), in each cell by seed."""
    cells = defaultdict(list)
    for run in runs:
        cells[run.norm, run.setting].append(run)
    return {cell: sorted(found, key=lambda run: run.seed) for cell, found in cells.items()}


def sort_settings(settings: Iterable[str], first: Sequence[str]) -> list[str]:
    """Settings in the order of `first`, then others by GPUs and images per GPU, largest first."""

    def key(setting: str):
        if setting in first:
            return 0, first.index(setting)
        gpus, images = map(int, setting.split("x"))
        return 1, -gpus, -images

    return sorted(set(settings), key=key)


def setting_label(setting: str) -> str:
    """`8x32` as the paper writes it, `(8,32)`."""
    return f"({setting.replace('x', ',')})"


def sort_norms(norms: Iterable[str]) -> list[str]:
    """Norms in Table 4.1's order, then others by name."""
    first = ("bn", "gn", "sn")
    return sorted(set(norms), key=lambda norm: (first.index(norm) if norm in first else 3, norm))


def differences(runs: Sequence[Run], one_cell: bool = True) -> dict[str, list[str]]:
    """What the recipes of runs that are to be averaged (or compared) differ in, with the values.

    one_cell: the runs share norm and setting and should differ in the seed alone; otherwise norm,
    setting and what follows from them (the lr, the images a rounded-up epoch sees) may differ too.
    """
    recipes = [_recipe(run, one_cell) for run in runs]
    found = {}
    for key in sorted({key for recipe in recipes for key in recipe}):
        values = sorted({str(recipe[key]) for recipe in recipes if key in recipe})
        missing = any(key not in recipe for recipe in recipes)
        if len(values) > 1 or (missing and one_cell and all(run.config for run in runs)):
            found[key] = values + ["(not set)"] * missing
    short = {key for key in found if "." not in key}
    return {key: found[key] for key in found if key in short or key.split(".")[-1] not in short}


def _recipe(run: Run, one_cell: bool) -> dict[str, Any]:
    """What a run computes, as flat keys: the summary's facts and the config."""
    summary, data = run.summary, run.summary["data"]
    recipe = {key: summary.get(key) for key in ("epochs", "steps", "precision", "model", "scale")}
    recipe |= {f"data.{key}": data.get(key) for key in ("train_images", "val_images", "sha256")}
    if one_cell:
        recipe |= {key: summary.get(key) for key in ("norm", "statistics", "lr")}

    def flatten(values: dict, prefix: str = "") -> None:
        for key, value in values.items():
            if key in NOT_RECIPE or (not prefix and key == "setting"):
                continue
            if not one_cell and not prefix and key in ("norm", "parts", "init"):
                continue
            if isinstance(value, dict):
                flatten(value, f"{prefix}{key}.")
            else:
                recipe[f"{prefix}{key}"] = value

    flatten(run.config)
    return recipe


def describe_differences(found: dict[str, list[str]]) -> str:
    """`epochs: 8 / 10; data.sha256: ab.. / cd..`, long values cut."""

    def cut(text: str) -> str:
        return text if len(text) <= 16 else text[:12] + "..."

    return "; ".join(f"{key}: {' / '.join(map(cut, values))}" for key, values in found.items())


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def block_importance(record: dict[str, Any], weights: str = "both") -> dict[str, dict[str, float]]:
    """Importance weights per block, each the average over the block's layers, in network order.

    record: one line of importance.jsonl. weights: `mean`, `var`, or `both` (their average).
    """
    layers = defaultdict(list)
    for layer in record["layers"].values():
        layers[layer["block"]].append(_layer_importance(layer, weights))
    return {block: _average(found) for block, found in layers.items()}


def average_importance(
    record: dict[str, Any], weights: str = "both", average: str = "layers"
) -> dict[str, float]:
    """Importance weights of a network: the average over its `layers`, or over its `blocks`."""
    if average == "blocks":
        return _average(list(block_importance(record, weights).values()))
    return _average([_layer_importance(layer, weights) for layer in record["layers"].values()])


def _layer_importance(layer: dict[str, Any], weights: str) -> dict[str, float]:
    if weights == "both":
        return _average([layer["mean"], layer["var"]])
    return layer[weights]


def _average(weights: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average of importance weights; a statistic that one of them lacks has weight 0 there."""
    present = [s for s in STATISTICS if any(s in w for w in weights)]
    return {s: math.fsum(w.get(s, 0.0) for w in weights) / len(weights) for s in present}

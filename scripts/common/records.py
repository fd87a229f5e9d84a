"""Read run records: what a run folder keeps in git, as the scripts' tables and figures need it.

A leaf that imports neither torch nor `sn`, so that the scripts can read records without them. What
is read is held to one schema (`SUMMARY`, `OF_TASK`, `FINISHED`, `LAYER`): a record that breaks it
is left out with a warning, so that one broken file never ends a table or a figure of all runs.
"""

import json
import logging
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from scipy.special import stdtrit

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]  # the clone
PAPER = ROOT / "results" / "paper.yaml"
SEARCHES = "lr_search"  # the folder of runs that chose an lr
RUNS_HELP = "folder that holds the run records (default: results/ of the clone)"
STATISTICS = ("in", "ln", "gn", "bn")
# Fig 2's order, so that a figure of ours reads like the paper's.
FIGURE_SETTINGS = ("8x32", "8x16", "8x8", "8x4", "8x2", "8x1", "1x8", "1x16", "1x32")
# Keys of config.yaml that do not change what a run computes, or that a table's cell fixes.
NOT_RECIPE = {"seed", "output_dir", "run_name", "hydra", "root", "workers", "num_workers"}
NOT_RECIPE |= {"device", "progress", "resume", "download", "tensorboard", "log_every", "log_steps"}
NOT_RECIPE |= {"backend", "experiment", "scale", "emulation", "world_size", "parts_name"}

# What a summary holds, key by key: a type (float: any finite number, [x]: a list of x, a
# dictionary: the same within). A key that ends in ? may be null or missing.
NAME, COUNT = "name", "count"  # part of a file name; 1 or more
SUMMARY = {
    **{"task": str, "run": str, "status": str, "seed": int, "error?": str, "note?": str},
    **{"epochs?": int, "steps?": int, "images_seen?": int, "wall_s?": float, "lr?": float},
    **{"precision?": str, "device?": str, "commit?": str, "date?": str},
    "versions?": {"torch?": str},
}
DATA = {"name": NAME, "train_images?": int, "val_images?": int, "sha256?": str}
CELL = {
    **{"model": NAME, "scale": NAME, "data": DATA},
    "setting": {"gpus": COUNT, "images_per_gpu": COUNT},
}
AP = {f"{kind}_{ap}?": float for kind in ("box", "mask")
      for ap in ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")}  # fmt: skip
OF_TASK = {
    "imagenet": CELL
    | {"norm": NAME, "statistics?": [str], "top1?": float, "top1_batch_average?": float},
    "detection": CELL | {"parts": dict, "init": {"name": str}} | AP,
    "style_transfer": {
        **{"norm": NAME, "scale": str, "image_size": COUNT, "batch_size": COUNT, "steps": int},
        **{"data": DATA | {"train_images": int}, "style": {"name": NAME, "sha256?": str}},
        **{"vgg": {"weights": str, "sha256?": str, "input?": str}, "statistics?": [str]},
        **{"loss_weights?": dict, "loss?": float},
    },
    "enas": {
        **{"sampler": str, "norm?": str, "data": DATA, "model": NAME, "scale": NAME},
        **{"shared_top1?": float, "best_shared_top1?": float, "epochs": int},
    },
    "enas_retrain": {
        **{"name": str, "data": DATA, "model": NAME, "scale": NAME, "parameters": int},
        **{"epochs": int, "retrained_val_top1?": float, "retrained_test_top1?": float},
        "test_images?": int,
    },
    "darts": {
        **{"operations": NAME, "gates": NAME, "norm": NAME, "statistics?": [str], "data": DATA},
        **{"model": NAME, "scale": NAME, "top1?": float, "cell?": str, "cell_accuracy?": float},
        **{"convolutions?": int, "skip_connections?": int},
    },
}
SPENT = ("child_steps", "controller_updates", "images_seen", "images_scored")
FINISHED = {  # what the records of finished runs hold beside that
    "enas": dict.fromkeys(("shared_top1", "best_shared_top1", "entropy", "reward"), float)
    | dict.fromkeys(SPENT, int),
    "enas_retrain": {"retrained_val_top1": float},
}
LAYER = {"block": str, "mean": dict, "var": dict}  # of a line of importance.jsonl
KINDS = {str: "text", int: "a whole number", float: "a finite number", dict: "a mapping"}
KINDS |= {NAME: "a name without slashes", COUNT: "a whole number of 1 or more"}
MOST_VALUES = 100_000  # of a config; what refers to itself has no end


def fail(message: str) -> NoReturn:
    """End a script with one line on stderr and exit code 2, as argparse does."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """End a script with one line, as `fail`, if what is written inside cannot be."""
    try:
        yield
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}; choose another place with --out")


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
    def setting(self) -> str | None:
        """`<gpus>x<images per GPU>` as run, whatever name the config had; None: a task without."""
        setting = self.summary.get("setting")
        return setting and f"{setting['gpus']}x{setting['images_per_gpu']}"

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
        one = bool(self.setting) and self.summary["setting"]["images_per_gpu"] == 1
        if one and norm in ("sn", "sn_in_ln"):
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

    def follows(self, recipe: dict[str, Any]) -> bool:
        """Whether the config has these values, by keys with dots."""
        return all(_at(self.config, key) == value for key, value in recipe.items())

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
    runs = []
    for folder in run_folders(root):
        try:
            run = read_run(folder, task)
        except ValueError as error:
            log.warning("warning: run left out: %s", error)
            continue
        if run is not None:
            runs.append(run)
    return runs


def load_roots(roots: Iterable[Path | str], task: str | None = None) -> list[Run]:
    """The runs below several roots; one whose name an earlier root has counts once, there.

    Raises FileNotFoundError for a root that is no folder.
    """
    found: list[Run] = []
    for root in roots:
        known = {run.name for run in found}
        found += [run for run in load_runs(root, task) if run.name not in known]
    return found


def without_searches(runs: Iterable[Run]) -> list[Run]:
    """The runs outside of a folder `lr_search`, whose runs choose a recipe and show no result."""
    return [run for run in runs if SEARCHES not in run.path.parts]


def none_of(what: str, root: Path | str) -> str:
    """That there are no `what` runs below `root`, and what is there instead."""
    runs = load_runs(root, task=None)
    tasks = sorted({run.summary["task"] for run in without_searches(runs)})
    if tasks:
        return f"no {what} runs below {root}; there are runs of {', '.join(tasks)}"
    return f"no runs below {root}" + (f" but in {SEARCHES}, which show no result" if runs else "")


def run_folders(root: Path | str) -> list[Path]:
    """The folders below `root` that hold a `summary.json`, sorted.

    Raises FileNotFoundError for a root that is no folder.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {root}")
    return [path.parent for path in sorted(Path(root).rglob("summary.json"))]


def read_run(folder: Path, task: str | None = None) -> Run | None:
    """The records of one run folder; None if it is of another task.

    Raises ValueError, with the file's path first, for anything that breaks the schema.
    """
    path = folder / "summary.json"
    try:
        summary = _parse(_text(path), json.loads)
        _check_summary(summary)
        if task is not None and summary["task"] != task:
            return None
        path = folder / "config.yaml"
        config = _config(path)
        path = folder / "importance.jsonl"
        importance = _read_lines(path)
        finite = summary["status"] != "diverged"
        _check_importance(importance, finite)
        path = folder / "metrics.jsonl"
        metrics = _read_lines(path)
        for line in metrics if finite else ():
            _check_finite(line)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Run(folder, summary, config, importance, metrics)


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.yaml. Raises ValueError, with its path first, if it is no tree of mappings."""
    try:
        return _config(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config(path: Path) -> dict[str, Any]:
    config = _parse(_text(path), _load_yaml)
    _check_config(config)
    return config


def _load_yaml(text: str) -> Any:
    """By libyaml, in a tenth of the time; not a text so long that its nesting could end Python."""
    fast = len(text) < 10_000 and hasattr(yaml, "CSafeLoader")
    return yaml.load(text, yaml.CSafeLoader if fast else yaml.SafeLoader)


def _text(path: Path) -> str:
    """The text of a file. Raises ValueError for what is none, a folder or a pipe too."""
    if not path.exists():
        raise ValueError("missing")
    if not path.is_file():
        raise ValueError("no regular file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(_one_line(error)) from None


def _parse(text: str, parser) -> Any:
    try:
        return parser(text)
    except Exception as error:  # PyYAML raises whatever a broken value runs into
        raise ValueError(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_summary(summary: Any) -> None:
    """Raise ValueError if a summary is not as `SUMMARY`, `OF_TASK` and `FINISHED` say."""
    if not isinstance(summary, dict):
        raise ValueError("not a JSON object")
    _check_keys(summary, SUMMARY)
    parts = summary["run"].split("/")
    if len(parts) < 2 or not all(map(_is_name, parts)):
        raise ValueError(f"run: expected a relative path, got {summary['run']!r}")
    task = summary["task"]
    _check_keys(summary, OF_TASK.get(task, {}))
    if summary["status"] != "diverged":
        _check_finite(summary)
    if summary["status"] == "finished":
        _check_keys(summary, FINISHED.get(task, {}))
    if task == "detection":
        _check_keys(summary["parts"], dict.fromkeys(summary["parts"], NAME), "parts.")
        if not summary["parts"]:
            raise ValueError("parts: empty")
    if task == "enas" and summary["sampler"] == "controller" and not summary.get("norm"):
        raise ValueError("norm: missing, though there is a controller")


def _check_keys(values: dict, schema: dict, where: str = "") -> None:
    for key, kind in schema.items():
        optional = key.endswith("?")
        key = key.removesuffix("?")
        value = values.get(key)
        if value is None and optional:
            continue
        if key not in values:
            raise ValueError(f"no {where + key!r}")
        _check_value(value, kind, where + key)


def _check_value(value: Any, kind: Any, where: str) -> None:
    """Raise ValueError if a value is not of a kind of the schema."""
    if isinstance(kind, dict) and isinstance(value, dict):
        return _check_keys(value, kind, f"{where}.")
    if isinstance(kind, list) and isinstance(value, list):
        for item in value:
            _check_value(item, kind[0], where)
        return None
    if isinstance(kind, dict | list):
        kind = type(kind)
    if kind == NAME:
        right = isinstance(value, str) and _is_name(value)
    elif kind in (int, COUNT):
        right = type(value) is int and abs(value) < 2**63 and (kind is int or value > 0)
    elif kind is float:
        right = type(value) in (int, float)  # that it is finite, `_check_finite` says
    else:
        right = isinstance(value, kind)
    if not right:
        expected = KINDS.get(kind, "a list")
        raise ValueError(f"{where}: expected {expected}, got {str(value)[:60]!r}")


def _is_name(text: str) -> bool:
    """Whether a text may be one part of a path."""
    return text.isprintable() and text.strip(". ") != "" and not set(text) & set("/\\")


def _check_finite(value: Any, where: str = "") -> None:
    """Raise ValueError for a number inside that is none, or that no float can hold."""
    if isinstance(value, float | int) and not abs(value) < 1e300:
        raise ValueError(f"{where}: expected a finite number, got {str(value)[:60]}")
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    for key, item in inside:
        _check_finite(item, f"{where}.{key}" if where else str(key))


def _check_config(config: Any) -> None:
    """Raise ValueError if a config is no tree of mappings."""
    if not isinstance(config, dict):
        raise ValueError("not a mapping")
    rest, count = [config], 0
    while rest:
        value = rest.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values, or one that refers to itself")
        if isinstance(value, dict):
            if bad := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"expected text as a key, got {bad[0]!r}")
            rest += value.values()
        elif isinstance(value, list | tuple | set):
            rest += value


def _check_importance(lines: list[dict[str, Any]], finite: bool) -> None:
    """Raise ValueError unless every line has the same layers, with weights from 0 to 1.

    finite: the weights are numbers; those of a run that diverged need not be.
    """
    first = None
    for number, line in enumerate(lines, 1):
        where = f"record {number}: "
        layers = line.get("layers")
        if not isinstance(layers, dict) or not layers:
            raise ValueError(f"{where}no layers")
        shape = []
        for name, layer in layers.items():
            _check_value(layer, LAYER, f"{where}{name}")
            for part in ("mean", "var"):
                if not layer[part]:
                    raise ValueError(f"{where}{name}.{part}: empty")
                for statistic, weight in layer[part].items():
                    _check_value(weight, float, f"{where}{name}.{part}.{statistic}")
                    inside = -1e-6 <= weight <= 1 + 1e-6 or not finite
                    if statistic not in STATISTICS or not inside:
                        raise ValueError(
                            f"{where}{name}.{part}: expected weights from 0 to 1 of "
                            f"{', '.join(STATISTICS)}, got {statistic}: {weight}"
                        )
            if layer["mean"].keys() != layer["var"].keys():
                raise ValueError(f"{where}{name}: mean and var have other statistics")
            shape.append((name, layer["block"], sorted(layer["mean"])))
        first = first or shape
        if shape != first:
            raise ValueError(f"{where}other layers, blocks or statistics than before")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file by epoch or step; of a resumed run the later line counts.

    Raises ValueError for a line that is no object with epoch or step.
    """
    if not path.exists():
        return []
    lines = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = _parse(line, json.loads)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            unit = next((key for key in ("epoch", "step") if key in record), None)
            if unit is None:
                raise ValueError("neither epoch nor step")
            _check_value(record[unit], int, unit)
            lines[record[unit]] = record
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return [lines[count] for count in sorted(lines)]


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


def differences(
    runs: Sequence[Run], one_cell: bool = True, free: Collection[str] = ()
) -> dict[str, list[str]]:
    """What the recipes of runs that are to be averaged (or compared) differ in, with the values.

    one_cell: the runs share norm and setting and should differ in the seed alone; otherwise norm,
    setting and what follows from them (the lr, the images a rounded-up epoch sees) may differ too,
    a norm's options only from one norm to another.
    A key that a config lacks has the value of before it existed: another than any that is there.
    free: more keys that may differ.
    """
    if len(runs) < 2:
        return {}
    found = _differing(runs, [_recipe(run, one_cell) for run in runs])
    if not one_cell:
        groups = defaultdict(list)
        for run in runs:
            if _norm_options(run):
                groups[_norms_of(run)].append(run)
        for alike in groups.values():
            for key, values in _differing(alike, list(map(_norm_options, alike))).items():
                found[key] = sorted({*found.get(key, []), *values})
    found = {key: found[key] for key in sorted(found) if key not in free}
    if any(key.startswith("schedule.lr_per_") for key in found):
        found.pop("lr", None)  # which follows from it
    short = {key for key in found if "." not in key}
    return {key: found[key] for key in found if key in short or key.split(".")[-1] not in short}


def _differing(runs: Sequence[Run], recipes: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The keys in which the runs' recipes differ, with the values."""
    found = {}
    for key in {key for recipe in recipes for key in recipe}:
        values = sorted({str(recipe[key]) for recipe in recipes if key in recipe})
        missing = any(key not in recipe for recipe in recipes)
        if len(values) > 1 or (missing and all(run.config for run in runs)):
            found[key] = values + ["(not set)"] * missing
    return found


def _norms_of(run: Run) -> tuple:
    """What two runs share whose norms' options have to be the same.

    SN at one image per GPU is without BN, whatever its name: its statistics are others.
    """
    summary = run.summary
    one = bool(run.setting) and summary["setting"]["images_per_gpu"] == 1
    parts = summary.get("parts")
    parts = tuple(parts.items()) if isinstance(parts, dict) else ()
    return summary.get("norm"), parts, one and run.without_bn


def _norm_options(run: Run) -> dict[str, Any]:
    """The options of a run's norms as flat keys, such as `norm.momentum`; and bn's start."""
    options: dict[str, Any] = {}
    rest = [(key, run.config[key]) for key in ("norm", "parts") if key in run.config]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += [(f"{key}.{name}", item) for name, item in value.items()]
        elif key.rpartition(".")[2] not in NOT_RECIPE:
            options[key] = value
    if start := (run.config.get("init") or {}).get("gate_start"):
        options["init.gate_start"] = start
    return options


def _recipe(run: Run, one_cell: bool) -> dict[str, Any]:
    """What a run computes, as flat keys: the summary's facts and the config."""
    summary, data = run.summary, run.summary.get("data") or {}
    recipe = {key: summary.get(key) for key in ("epochs", "steps", "precision", "model", "scale")}
    recipe |= {f"data.{key}": data.get(key) for key in ("train_images", "val_images", "sha256")}
    if summary["task"] == "style_transfer":  # keys of the machine say which file, not what is in it
        style, vgg = (summary.get(key) or {} for key in ("style", "vgg"))
        recipe["style.sha256"] = style.get("sha256")
        recipe["vgg.sha256"] = vgg.get("sha256") or vgg.get("weights")
        recipe["vgg.input"] = vgg.get("input")
        weights = summary.get("loss_weights") or {}
        recipe |= {f"loss_weights.{part}": weight for part, weight in weights.items()}
    if one_cell:
        recipe |= {key: summary.get(key) for key in ("norm", "statistics", "lr")}
    if one_cell or summary["task"] == "imagenet":  # elsewhere a cell's name says it
        # not which weights: those of a checkpoint may be of the same seed
        recipe["init.name"] = (summary.get("init") or {}).get("name", "scratch")

    def flatten(values: dict, prefix: str = "") -> None:
        for key, value in values.items():
            if key in NOT_RECIPE or (not prefix and key == "setting"):
                continue
            if not one_cell and not prefix and key in ("norm", "parts", "init"):
                continue
            if isinstance(value, dict):
                flatten(value, f"{prefix}{key}.")
            else:
                recipe.setdefault(f"{prefix}{key}", value)  # what ran counts over what was asked

    flatten(run.config)
    if not one_cell and recipe.get("schedule.images") is not None:
        recipe.pop("steps")  # as many as the setting's batches make of these images
    return recipe


def recipes(
    runs: Iterable[Run], cell, free: Collection[str] = (), of_norm: Collection[str] = ()
) -> list[list[Run]]:
    """Runs by recipe, the recipe of most runs first: only runs of one list may share a figure.

    Two runs of one list differ in norm and setting at most; where `cell(run)` is the same, too, in
    the seed alone. free: keys that may differ nevertheless; of_norm: those that may between norms.
    """
    lists: list[list[Run]] = []
    for run in runs:
        for found in lists:
            cells = {cell(other): other for other in found}  # alike within: one of each is enough
            own = cells.get(cell(run))
            others = [other for other in cells.values() if other is not own]
            if any(
                differences(
                    [run, other],
                    one_cell=False,
                    free={*free, *of_norm} if of_norm and other.norm != run.norm else free,
                )
                for other in others
            ):
                continue
            if own is None or not differences([run, own], free=free):
                found.append(run)
                break
        else:
            lists.append([run])
    return sorted(lists, key=len, reverse=True)


def _at(config: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def variants(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of one norm by what they are called: the norm alone, for the recipe of most of them.

    Others add what they differ in, `sn, optimizer.gate_lr_factor 10`; two that read alike are one.
    """
    lists = recipes(runs, lambda run: run.setting)
    first, found = lists[0][0], {lists[0][0].norm: lists[0]}
    for others in lists[1:]:
        pairs = [(run, other) for run in lists[0] for other in others]
        same = [pair for pair in pairs if pair[0].setting == pair[1].setting]
        run, other = (same or pairs)[0]
        keys = differences([run, other], one_cell=bool(same))
        values = [f"{key} {value}" for key, value in own_values(other, keys).items()]
        found.setdefault(", ".join([first.norm, *values]), []).extend(others)
    return found


def own_values(run: Run, keys: Collection[str]) -> dict[str, str]:
    """A run's values of what it differs in from others, as one writes them."""
    recipe = _recipe(run, one_cell=True)
    follows = {"data.sha256"} if "data.train_images" in keys else set()
    return {key: _plain(recipe.get(key, "(not set)")) for key in keys if key not in follows}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


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


class Spread(NamedTuple):
    """A mean over seeds; `sd` (sample deviation) and `half` of the 95 % t interval need two."""

    mean: float
    sd: float | None
    half: float | None
    seeds: int
    runs: int


def over_seeds(values: Iterable[tuple[int, float]]) -> Spread:
    """The mean over seeds of (seed, value), one of each run.

    Two runs of one seed are no two seeds: their average counts as that seed's value.
    """
    by_seed = defaultdict(list)
    for seed, value in values:
        by_seed[seed].append(value)
    mean, sd = mean_and_sd([mean_and_sd(found)[0] for found in by_seed.values()])
    seeds, half = len(by_seed), None
    if sd is not None:
        half = float(stdtrit(seeds - 1, 0.975)) * sd / math.sqrt(seeds)
    return Spread(mean, sd, half, seeds, sum(map(len, by_seed.values())))


def repeated_seeds(runs: Iterable[Run]) -> dict[int, int]:
    """The seeds of which there is more than one run, and how many."""
    seeds = Counter(run.seed for run in runs)
    return {seed: count for seed, count in sorted(seeds.items()) if count > 1}


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

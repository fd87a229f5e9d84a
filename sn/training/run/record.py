"""What a run leaves behind: config, metrics, importance weights, summary, TensorBoard events."""

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ...functional import STATISTICS
from ...modules import importance_weights
from .config import as_yaml
from .files import read_text

# TensorBoard sorts its groups by name: these have numbers, in this order
TAGS = ("train", "val", "steps", "run", "controller", "importance", "importance_layers")
# the figures' colours of the statistics (as in scripts/common/figures.py)
COLORS = {"in": "#009E73", "ln": "#D55E00", "gn": "#E69F00", "bn": "#0072B2"}
PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "numpy")
CANNOT_WRITE = "cannot write {}: {}; the last checkpoint is whole"


class Recorder:
    """Writes a run's folder; on other processes than the main one it does nothing.

    config.yaml: the config as `recorded` gives it. metrics.jsonl,
    importance.jsonl: lines numbered by `unit`, "epoch" or "step". steps.jsonl: lines inside an
    epoch, numbered by the step of the whole run. summary.json: written once, at
    the end. tensorboard/: the same for reading by eye; its x-axis is the step, or epoch * 1000, so
    that settings lie over one another.

    `unrecorded`: keys that may stand in an old config.yaml and mean nothing.

    Raises ValueError if the folder holds a run of another config, or something else under its name.
    """

    def __init__(
        self,
        folder: str | Path,
        config: dict,
        is_main: bool = True,
        unit: str = "epoch",
        unrecorded: Collection[str] = (),
    ):
        self.folder = Path(folder)
        self.unrecorded = unrecorded
        self.is_main = is_main
        self.unit = unit
        self.scale = 1000 if unit == "epoch" else 1
        self.config = config
        self.lines: dict[str, int] = {}  # of each file of lines, how many it has
        self._unsynced: set[str] = set()  # files with lines since `sync`
        self.writer: Any = None  # a SummaryWriter after `open`, in the main process
        self.has_layout = False  # TensorBoard knows its page of importance weights
        self.check_config()

    def check_config(self) -> None:
        """Raise ValueError if the folder holds anything but a run of this config."""
        path = self.folder / "config.yaml"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output_dir={self.folder} is a file; choose another output_dir=")
        if not path.exists():
            own = ("checkpoint.pt", "metrics.jsonl", "importance.jsonl", "summary.json")
            for name in own:
                if (self.folder / name).exists():
                    raise ValueError(
                        f"{self.folder} holds {name} but no config.yaml, so it is no run that "
                        "could go on; choose another output_dir="
                    )
            return
        try:
            old = _flat(yaml.safe_load(read_text(path)) or {})
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a run's config ({str(error).splitlines()[0][:200]}); "
                "choose another output_dir=, or delete that folder"
            ) from None
        new = _flat(self.config)
        keys = sorted((old.keys() | new.keys()) - set(self.unrecorded))
        changed = [key for key in keys if old.get(key) != new.get(key)]
        if changed:
            rows = [f"  {key}: {_of(old, key)} there, {_of(new, key)} asked for" for key in changed]
            raise ValueError(
                f"{self.folder} holds a run of another config:\n"
                + "\n".join(rows)
                + "\nchoose another run_name= (or output_dir=), or delete that folder"
            )

    def summary(self) -> dict | None:
        """The summary of a run that has ended, else None.

        Raises FloatingPointError if it diverged, as it did then: the same exit code.
        """
        path = self.folder / "summary.json"
        if not path.exists():
            return None
        try:
            summary = json.loads(read_text(path))
            if not isinstance(summary, dict) or "status" not in summary:
                raise ValueError("no record of a run")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete it to end the run anew"
            ) from None
        if summary["status"] == "diverged":
            raise FloatingPointError(
                f"{self.folder} has ended already: it diverged ({summary.get('error')}); "
                "choose another output_dir=, or delete that folder"
            )
        return summary

    def count_lines(self, count: int, expected: dict[str, int], step: int = 0) -> None:
        """Count the lines up to epoch or step `count`; ValueError if some of the `expected` lack.

        `step`: steps of the whole run done. Call it before `open`.
        """
        ends = {"metrics.jsonl": (self.unit, count), "importance.jsonl": (self.unit, count)}
        ends["steps.jsonl"] = ("step", step)
        for name, (unit, most) in ends.items():
            path = self.folder / name
            lines = [line.get(unit) for line in read_jsonl(path)] if path.exists() else []
            self.lines[name] = sum(isinstance(line, int) and line <= most for line in lines)
            if self.lines[name] < expected.get(name, 0):
                raise ValueError(
                    f"{path} has only {self.lines[name]} of the {expected[name]} lines that were "
                    "there when the checkpoint was saved; put it back, or choose another "
                    "output_dir= to start anew"
                )

    def open(self, count: int, step: int | None = None, per_epoch: int = 1) -> None:
        """Begin to write, with `count` epochs or steps done (-1: nothing, not even the start).

        `step` steps of the whole run are done, of `per_epoch` in an epoch; None: no epoch has
        begun. What a broken run had written beyond that is dropped, and so is the summary of a run
        that is now made longer.
        """
        if not self.is_main:
            return
        per_epoch = per_epoch if self.unit == "epoch" else 1
        step = max(0, count) * per_epoch if step is None else step
        self.per_epoch = per_epoch
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "summary.json").unlink(missing_ok=True)
        write_text(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        for name in ("metrics.jsonl", "importance.jsonl"):
            path = self.folder / name
            if path.exists():
                lines = [line for line in read_jsonl(path) if isinstance(line.get(self.unit), int)]
                kept = [line for line in lines if line[self.unit] <= count]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        # events from here on are dropped; the next epoch's metrics, at its end, always
        purge = min(self.scale * step // per_epoch, self.scale * (count + 1) - 1) + 1
        if self.unit == "step" or count < 0:
            purge = max(0, count * self.scale + 1)
        with self._events():
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)
        path = self.folder / "steps.jsonl"
        if path.exists():
            lines = [line for line in read_jsonl(path) if isinstance(line.get("step"), int)]
            kept = [line for line in lines if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            for line in kept:
                if self._place(line["step"]) >= purge:
                    self._add_step(line)

    def close(self) -> None:
        if self.writer is not None:
            with suppress(OSError):  # a full disk takes the events' end, not the run
                self.writer.close()

    def metrics(self, count: int, values: dict) -> None:
        """Record the metrics of epoch or step `count` (1 is the first)."""
        if not self.is_main:
            return
        self._append("metrics.jsonl", {self.unit: count, **values})
        with self._events():
            for key, value in values.items():
                if value is not None and key != "step":  # the axis says it
                    self.writer.add_scalar(tag(key), value, count * self.scale)
            self.writer.flush()

    @contextmanager
    def _events(self) -> Iterator[None]:
        """Name TensorBoard's folder in the error of a file that cannot be written."""
        try:
            yield
        except OSError as error:
            raise OSError(CANNOT_WRITE.format(self.folder / "tensorboard", error)) from None

    def step(self, step: int, values: dict) -> None:
        """Record what is known after `step` steps of the whole run, inside an epoch."""
        if self.is_main:
            line = {"step": step, **values}
            self._append("steps.jsonl", line)
            self._add_step(line)
            with self._events():
                self.writer.flush()

    def _add_step(self, line: dict) -> None:
        with self._events():
            for key, value in line.items():
                if key not in ("step", "epoch"):
                    self.writer.add_scalar(tag(f"steps/{key}"), value, self._place(line["step"]))

    def _place(self, step: int) -> int:
        """Where a step lies on TensorBoard's x-axis, never before where it would be dropped."""
        return -(-self.scale * step // self.per_epoch)

    def importance(
        self, count: int, model: nn.Module, figure: bool = False, blocks: dict | None = None
    ) -> None:
        """Record the importance weights after `count` epochs or steps (0: before training).

        `blocks` is the block of each layer; by default `block_names(model)`.
        """
        weights = importance_weights(model)
        if not self.is_main or not weights:
            return
        blocks = blocks or block_names(model)
        layers = {name: {"block": blocks[name], **weight} for name, weight in weights.items()}
        self._append("importance.jsonl", {self.unit: count, "layers": layers})
        averages = block_averages(layers)
        with self._events():
            self._add_importance(count, averages, layers, figure)

    def _add_importance(self, count: int, averages: dict, layers: dict, figure: bool) -> None:
        if not self.has_layout:
            self.has_layout = True
            self.writer.add_custom_scalars(layout(averages))
        for group, rows in (("importance", averages), ("importance_layers", layers)):
            for name, row in rows.items():
                for moment in ("mean", "var"):
                    for statistic, value in row[moment].items():
                        key = tag(f"{group}/{moment}/{name}/{statistic}")
                        self.writer.add_scalar(key, value, count * self.scale)
        if figure:
            self.writer.add_figure("importance", importance_figure(averages), count * self.scale)

    def picture(self, name: str, picture: Tensor, count: int) -> None:
        """Show a picture, (3, H, W), in TensorBoard, in the main process."""
        with self._events():
            self.writer.add_image(name, picture, count)

    def sync(self) -> None:
        """Have the disk keep all lines: a checkpoint that counts them must not be there first."""
        while self._unsynced:
            path = self.folder / self._unsynced.pop()
            try:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(CANNOT_WRITE.format(path, error)) from None

    def finish(self, summary: dict) -> None:
        """Write summary.json: the run has ended."""
        if self.is_main:
            self.sync()
            write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            self.close()

    def _append(self, name: str, line: dict) -> None:
        path = self.folder / name
        try:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
            self.lines[name] = self.lines.get(name, 0) + 1
            self._unsynced.add(name)
        except OSError as error:  # of a full disk, which does not name the file
            raise OSError(CANNOT_WRITE.format(path, error)) from None


def tag(key: str) -> str:
    """A metric's name in TensorBoard, its group numbered: `train/loss` is `1_train/loss`."""
    group, slash, name = key.partition("/")
    if not slash:
        group, name = "run", key
    return f"{TAGS.index(group) + 1}_{group}/{name}" if group in TAGS else key


def layout(averages: dict[str, dict]) -> dict[str, dict]:
    """TensorBoard's page of custom scalars: a chart per block and moment, a curve per statistic."""
    return {
        f"importance weights of the {title}": {
            block: ["Multiline", [re.escape(tag(f"importance/{moment}/{block}/")) + "[a-z]+$"]]
            for block in averages
        }
        for moment, title in (("mean", "mean"), ("var", "variance"))
    }


def block_names(model: nn.Module) -> dict[str, str]:
    """Block of every module: its numbered stage (layer1, features.3), or "stem" before the first.

    An unnumbered module after the stages is a block of its own.
    """
    blocks, seen_stage = {}, False
    for name, _ in model.named_modules():
        stage = re.match(r"[A-Za-z_]+\d+(?=\.)|[A-Za-z_]+\.\d+", name)
        if stage and not name.startswith(("conv", "bn", "norm", "stem")):
            seen_stage = True
            blocks[name] = stage.group()
        else:
            blocks[name] = name.split(".")[0] if seen_stage else "stem"
    return blocks


def block_averages(layers: dict[str, dict]) -> dict[str, dict]:
    """Mean importance weights per block, every layer counting the same, an absent one as 0."""
    averages = {}
    for block in dict.fromkeys(layer["block"] for layer in layers.values()):
        members = [layer for layer in layers.values() if layer["block"] == block]
        present = [s for s in STATISTICS if any(s in member["mean"] for member in members)]
        averages[block] = {
            moment: {
                s: sum(member[moment].get(s, 0.0) for member in members) / len(members)
                for s in present
            }
            for moment in ("mean", "var")
        }
    return averages


def importance_figure(averages: dict[str, dict]):
    """Stacked bars of the importance weights per block: means left, variances right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, moment, title in zip(
        figure.subplots(1, 2, sharey=True), ("mean", "var"), ("mean", "variance")
    ):
        bottom = [0.0] * len(averages)
        present = [s for s in STATISTICS if any(s in row[moment] for row in averages.values())]
        for statistic in present:
            heights = [row[moment].get(statistic, 0.0) for row in averages.values()]
            axes.bar(
                list(averages), heights, bottom=bottom, label=statistic, color=COLORS.get(statistic)
            )
            bottom = [a + b for a, b in zip(bottom, heights)]
        axes.set_title(f"importance weights of the {title}")
        axes.set_ylim(0, 1)
        axes.tick_params(axis="x", rotation=45)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def environment(device: torch.device) -> dict:
    """Versions, device, commit and date for a run's record."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions["cuda"] = torch.version.cuda
    else:
        name = f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": versions, "device": name, "commit": commit(), "date": now}


def commit() -> str | None:
    """Commit of the code that runs, with -dirty if tracked files differ; None outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[3])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` is at every moment a whole file; OSError, naming it, if not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk, which does not name the file
        with suppress(OSError):
            temporary.unlink()
        raise OSError(f"cannot write {path}: {error}") from None


def read_jsonl(path: Path) -> list[dict]:
    """Lines of a jsonl file; damaged ones, as a last one that a kill cut short, are left out."""
    lines = []
    for line in read_text(path, errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [line for line in lines if isinstance(line, dict)]


def differences(there: Any, now: Any) -> str:
    """What differs between a value and another, of two dictionaries their entries that do."""
    if not (isinstance(there, dict) and isinstance(now, dict)):
        return f"{there} there, {now} now"
    there, now = _flat(there), _flat(now)
    changed = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    return "; ".join(f"{key} {there.get(key)} there, {now.get(key)} now" for key in changed)


def _of(values: dict[str, Any], key: str) -> str:
    """A value for a message; records leave out what runs did before a key existed."""
    return as_yaml(values[key]) if key in values else "the default"


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat

"""What an entrypoint's config offers: help and docs, from its schema and configs/."""

import dataclasses
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from .config import as_yaml, describe

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
COMMANDS = {  # root config -> what reads it
    "imagenet": "train_imagenet.py",
    "detection": "train_detection.py",
    "style_transfer": "style_transfer.py",
    "enas": "python -m enas.search",
    "enas_retrain": "python -m enas.retrain",
    "nasbench201": "python -m enas.nasbench201",
    "darts": "python -m enas.darts",
}
SCHEMAS = {  # root config -> module of its schema
    "imagenet": "sn.training.classification.config",
    "detection": "sn.training.detection.config",
    "style_transfer": "sn.training.style.config",
    "enas": "enas.config",
    "enas_retrain": "enas.config",
    "nasbench201": "enas.config",
    "darts": "enas.config",
}


@dataclass(frozen=True)
class Row:
    key: str
    default: str
    expected: str
    machine: bool
    comment: str


def schema_of(root: str) -> type:
    """The dataclass of a root config, registered when its module is imported."""
    return OmegaConf.get_type(ConfigStore.instance().load(f"{root}_schema.yaml").node)


def groups(root: str) -> dict[str, list[str]]:
    """The options of every group of a root config that fit its schema, its own choice first."""
    found = {}
    for group, choice in choices(root).items():
        folder = CONFIGS / group / (root if group == "experiment" else "")
        if group == "experiment" and not folder.is_dir():
            continue
        prefix = f"{root}/" if group == "experiment" else ""
        names = [f"{prefix}{path.stem}" for path in sorted(folder.glob("*.yaml"))]
        names = [name for name in names if group == "experiment" or fits(root, group, name)]
        found[group] = [choice, *(n for n in names if n != choice)] if choice else names
    return found


def choices(root: str) -> dict[str, str | None]:
    """The groups of a root config with its own choice of each."""
    entries = yaml.safe_load((CONFIGS / f"{root}.yaml").read_text())["defaults"]
    mappings = [entry for entry in entries if isinstance(entry, dict)]
    pairs = [pair for mapping in mappings for pair in mapping.items()]
    return {group: choice for group, choice in pairs if not group.startswith("override")}


def having(group: str) -> list[str]:
    """The commands whose root config has a group."""
    return [command for root, command in COMMANDS.items() if group in choices(root)]


def fits(root: str, group: str, name: str) -> bool:
    """Whether an option can be chosen: the root has the groups that it overrides, and the
    schema its keys, every one of them given that it needs.
    """
    hint = typing.get_type_hints(schema_of(root)).get(group)
    if not dataclasses.is_dataclass(hint):
        return True
    fields, given = dataclasses.fields(hint), yaml.safe_load((CONFIGS / f"{root}.yaml").read_text())
    try:
        keys, overridden = _keys(group, name), _overridden(group, name)
    except FileNotFoundError:  # it builds on something from elsewhere: Hydra is to judge
        return True
    needed = {field.name for field in fields if field.default == MISSING}
    return (
        overridden <= choices(root).keys()
        and keys <= {field.name for field in fields}
        and needed <= keys | (given.get(group) or {}).keys()
    )


def _keys(group: str, name: str) -> set[str]:
    """The keys of an option, those of the options it builds on among them."""
    path = CONFIGS / name[1:] if name.startswith("/") else CONFIGS / group / name
    content = yaml.safe_load(path.with_suffix(".yaml").read_text()) or {}
    keys: set[str] = set()
    for entry in content.pop("defaults", []):
        if isinstance(entry, dict):  # such as /norm@backbone: gn
            keys |= {key.partition("@")[2] for key in entry if not key.startswith("override")}
        elif entry != "_self_":
            keys |= _keys(group, entry)
    return content.keys() | keys


def _overridden(group: str, name: str) -> set[str]:
    """The groups of which an option makes another choice, as /model@_global_.model: resnet50."""
    content = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text()) or {}
    entries = [entry for entry in content.get("defaults", []) if isinstance(entry, dict)]
    keys = [key for entry in entries for key in entry if key.startswith("override /")]
    return {key.removeprefix("override /").partition("@")[0] for key in keys}


def rows(root: str) -> list[Row]:
    """Every key of a root config: default, what it may hold, its comment in configs/."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(root)
    comments = dict(_comments(CONFIGS / f"{root}.yaml"))
    for group, names in groups(root).items():
        if group != "experiment":
            found = _group_comments(group, names)
            comments = {f"{group}.{key}": text for key, text in found.items()} | comments
    return list(_rows(schema_of(root), cfg, comments))


def _group_comments(group: str, names: list[str]) -> dict[str, str]:
    """Key -> what the options of a group say of it, with their names where not all say it."""
    said: dict[str, dict[str, list[str]]] = {}  # key -> comment or "" -> the options that have it
    for name in names:
        for key, text in _option_comments(group, name).items():
            said.setdefault(key, {}).setdefault(text, []).append(name)
    found = {}
    for key, texts in said.items():
        parts = [f"{text} ({', '.join(of)})" for text, of in texts.items() if text]
        found[key] = next((text for text, of in texts.items() if of == names), "; ".join(parts))
    return found


def _option_comments(group: str, name: str) -> dict[str, str]:
    """Key -> comment or "" of an option; one that it builds on speaks for the keys it shares."""
    path = CONFIGS / group / f"{name}.yaml"
    found: dict[str, str] = {}
    for entry in (yaml.safe_load(path.read_text()) or {}).get("defaults", []):
        if isinstance(entry, str) and not entry.startswith(("_", "/")):
            found |= _option_comments(group, entry)
    own = dict(_comments(path, bare=True))
    return found | {key: text or found.get(key, "") for key, text in own.items()}


def _rows(schema: type, cfg: Any, comments: dict[str, str], prefix: str = "") -> Iterator[Row]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        node = cfg._get_node(field.name) if isinstance(cfg, DictConfig) else None
        if dataclasses.is_dataclass(hint):
            yield from _rows(hint, node, comments, f"{key}.")
        else:
            value = "" if node is None else _shown(node)
            expected = describe(hint, field.metadata)
            machine = bool(field.metadata.get("machine"))
            yield Row(key, value, expected, machine, comments.get(key, ""))


def _shown(node: Any) -> str:
    """A default as one writes it: interpolations as they are, null, lists on a line."""
    raw = node._value()
    if isinstance(raw, str) and "${" in raw:
        return raw
    value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else raw
    if value == "???":
        return "to be given"
    return as_yaml(value)


def _comments(path: Path, bare: bool = False) -> Iterator[tuple[str, str]]:
    """(dotted key, comment at its line's end) of a YAML file; bare: also keys without one."""
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"(\s*)([\w]+):(?:\s.*?)?(?:\s#\s+(.*))?$", line)
        if match is None:
            continue
        indent = len(match.group(1))
        while parents and parents[-1][0] >= indent:
            parents.pop()
        parents.append((indent, match.group(2)))
        if match.group(3) or bare:
            yield ".".join(name for _, name in parents), match.group(3) or ""


def help_text(root: str) -> str:
    """What `--help` prints."""
    module = sys.modules["__main__"].__spec__  # of python -m
    command = f"-m {module.name}" if module else Path(sys.argv[0]).name
    lines = [f"usage: python {command} [group=option] [key=value] ...", ""]
    lines += _heading(root)
    if found := groups(root):
        lines += ["", "groups (the first is the default):"]
        lines += [f"  {group}: {', '.join(names)}" for group, names in found.items()]
    lines += ["", "keys = default (what they may hold; * may change when a run is resumed):"]
    for row in rows(root):
        star = "*" if row.machine else ""
        comment = f"  # {row.comment}" if row.comment else ""
        lines.append(f"  {row.key}{star} = {row.default} ({row.expected}){comment}")
    return "\n".join(lines)


def _heading(root: str) -> list[str]:
    lines = []
    for line in (CONFIGS / f"{root}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def markdown(root: str, title: str) -> str:
    """The section of docs/options.md on a root config."""
    lines = [f"## {title}", "", "| group | options, the default first |", "| --- | --- |"]
    for group, names in groups(root).items():
        lines.append(f"| `{group}=` | {', '.join(f'`{name}`' for name in names)} |")
    lines += ["", "| key | default | may hold | |", "| --- | --- | --- | --- |"]
    for row in rows(root):
        star = " *" if row.machine else ""
        cells = [f"`{row.key}`{star}", f"`{row.default}`", row.expected, row.comment]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"

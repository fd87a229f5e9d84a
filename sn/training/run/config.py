"""Configs as types: what Hydra composes must fit these dataclasses, and every value its range.

A field says by `option` what it may hold, whether it belongs to the machine (and may change between
a run and its resumption), and what runs did before it was there. The values stand in `configs/`.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, BooleanNode, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

NOTHING = object()
COUNT = 2**31 - 1  # largest number of steps, images, ...
SIZE = 65536  # largest size of a tensor's axis: channels, pixels, images per GPU
STEP = 2**20  # most images per step
LR = 1e4  # largest learning rate, factor of one, weight decay
LOSS = 1e15  # largest weight of a loss
CLIP = 1e9  # largest norm of gradients to clip at
NAME, TEXT, ITEMS = 200, 4096, 10_000  # most characters of a name, a text; most items of a list


def option(
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple | None = None,
    name: bool = False,
    filled: bool = False,
    machine: bool = False,
    before: Any = NOTHING,
    expected: str | None = None,
) -> Any:
    """A dataclass field for a config value; MISSING: configs/ must give it.

    Args:
        low, high: least and largest number, both allowed; above, below: both not allowed.
            Of a list they bound each element.
        choices: all values allowed.
        name: a name fit to be a part of a path; filled: a text that is not empty.
        machine: says where or how fast, not what: not recorded, may change at a resumption.
        before: what runs did before this field existed, a tuple of such values, or a function of
            the config that gives it; a record
            leaves it out then.
        expected: what is expected, in words, if it cannot be said from the rest.
    """
    metadata = dict(low=low, high=high, above=above, below=below, choices=choices, name=name)
    metadata |= dict(filled=filled)
    metadata |= dict(machine=machine, before=before, expected=expected)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def whole(low: int = 0, high: int = COUNT, **options: Any) -> Any:
    """A field that holds a whole number, or a list of them."""
    return option(low=low, high=high, **options)


def number(low: float | None, high: float | None, **options: Any) -> Any:
    """A field that holds a finite number, or a list; None where `above` or `below` is the end."""
    return option(low=low, high=high, **options)


@dataclass
class Setting:
    """(GPUs, images per GPU), the paper's coordinate. Source: section 4.1."""

    gpus: int = whole(1, SIZE)
    images_per_gpu: int = whole(1, SIZE)
    emulation: str = option(choices=("auto", "grouped", "accumulated"), machine=True)

    @property
    def name(self) -> str:
        return f"{self.gpus}x{self.images_per_gpu}"

    @property
    def total(self) -> int:
        """Images per step over all GPUs."""
        return self.gpus * self.images_per_gpu

    def check(self) -> None:
        """Raise ValueError for more images per step than anybody's machine has."""
        if self.total > STEP:
            raise ValueError(
                f"setting {self.name} has {self.total:,} images per step; expected at most {STEP:,}"
            )

    def lr(self, base: float, images: int) -> float:
        """Linear rule: `base` is the lr at `images` per step. Source: official README."""
        return base * self.total / images

    def describe(self, emulation: str, world_size: int) -> dict:
        """The setting as it stands in summary.json."""
        counts = {"gpus": self.gpus, "images_per_gpu": self.images_per_gpu, "name": self.name}
        return counts | {"emulation": emulation, "world_size": world_size}


@dataclass
class RunConfig:
    """What every entrypoint's config has."""

    seed: int = whole(0, 2**32)
    precision: str = option(choices=("fp32", "bf16", "fp16", "fp64"))
    channels_last: bool = option()
    device: str = option(choices=("auto", "cpu", "cuda"), machine=True)
    deterministic: bool = option(machine=True)
    plan: bool = option(machine=True)
    log_steps: int = whole(machine=True)
    checkpoint_steps: int = whole(machine=True)
    keep_checkpoints: int = whole(2, 1000, machine=True)
    max_skipped_steps: int = whole(machine=True)
    timeout_minutes: float = number(0.001, 1e6, machine=True)
    note: str | None = option(machine=True)
    run_name: str = option(name=True)
    output_root: str = option(machine=True, filled=True)
    output_dir: str = option(machine=True, filled=True)

    def check(self) -> None:
        """Raise ValueError where values do not go together."""


@dataclass
class NormKeys:
    """What is checked here of `norm`; `sn.make_norm` checks its arguments itself."""

    name: str = option(name=True)
    momentum: float | None = number(0, 1)
    eps: float = number(0, 1)
    affine: bool = option()
    bias: bool = option()
    track_running_stats: bool = option()
    unbiased: bool = option()
    num_groups: int | None = whole(1, SIZE)
    gain: float = number(0, 1)
    r_max: float = number(1, 1e6)
    d_max: float = number(0, 1e6)
    r_images: list[float] = number(0, 1e15)
    d_images: list[float] = number(0, 1e15)


def check_norm(values: dict[str, Any], prefix: str = "norm") -> None:
    """Check the arguments of a `make_norm` as far as `NormKeys` knows them; ValueError as `typed`.

    Device, dtype and virtual GPUs are the run's, for the whole network.
    """
    if "name" not in values:
        raise ValueError(f"{prefix}.name is not set; choose an option {prefix}=...")
    for key in ("device", "dtype", "process_group", "virtual_gpus"):
        if key in values:
            raise ValueError(
                f"{prefix}.{key}={short(values[key])}: the run chooses it for all layers "
                "(device=, precision=, setting=)"
            )
    check_open(values, prefix, NormKeys)


def check_open(values: dict[str, Any], prefix: str, schema: type) -> None:
    """Check those keys of an open mapping that `schema` has. Raises ValueError as `typed`."""
    for field in dataclasses.fields(schema):
        key = field.name
        if key not in values:
            continue
        node = OmegaConf.structured(schema)
        _strict(node)
        try:
            node[key] = values[key]
            value = OmegaConf.to_container(node)[key]
            as_it_is = value == values[key]  # nobody converts the '3' of a file
            fits = as_it_is and _holds(field.metadata, value)
        except OmegaConfBaseException:
            fits = False
        if not fits:
            wanted = describe(typing.get_type_hints(schema)[key], field.metadata, full=True)
            raise ValueError(f"{prefix}.{key}={short(values[key])}; expected {wanted}")


def checked(schema: type, values: Any, where: str) -> Any:
    """What a file holds, as an object of `schema`, every value checked; fields may have defaults.

    Raises ValueError `where.key=value; expected ...`, and for keys that the schema does not have.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}={short(values)}; expected a group of keys")
    fields = dataclasses.fields(schema)
    for key in values:
        if key not in [field.name for field in fields]:
            raise ValueError(unknown_key(f"{where}.{key}", [field.name for field in fields]))
    for field in fields:
        default = field.default_factory is dataclasses.MISSING and field.default == MISSING
        if default and field.name not in values:
            raise ValueError(f"no {where}.{field.name}")
    check_open(values, where, schema)
    return OmegaConf.to_object(OmegaConf.structured(schema(**values)))


class TrueOrFalse(BooleanNode):
    """A bool of a config. OmegaConf's own takes 3, "yes" and "on" for true."""

    def _validate_and_convert_impl(self, value: Any) -> bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):  # of an environment
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ValidationError("Value '$VALUE' of type '$VALUE_TYPE' is neither true nor false")
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrueOrFalse":
        copy = TrueOrFalse()
        self._deepcopy_impl(copy, memo)
        return copy


def register(name: str, schema: type[RunConfig]) -> None:
    """Let configs/<name>.yaml begin its defaults with `<name>_schema`."""
    node = OmegaConf.structured(schema)
    _strict(node)
    ConfigStore.instance().store(name=f"{name}_schema", node=node)


def _strict(cfg: DictConfig) -> None:
    """Let every bool of a structured config hold true or false alone."""
    if cfg._is_none() or cfg._is_missing():
        return
    for key in list(cfg._content):
        node = cfg._get_node(key)
        if isinstance(node, DictConfig):
            _strict(node)
        elif isinstance(node, BooleanNode):
            optional = node._is_optional()
            cfg._content[key] = TrueOrFalse(node._value(), key, cfg, optional)


def typed(cfg: DictConfig) -> Any:
    """The config as an object of its schema, every value checked.

    Raises ValueError `key=value; expected ...`, and for keys that the schema does not have.
    """
    refuse_unknown(cfg)
    config = OmegaConf.to_object(cfg)
    check_ranges(config, skip=("run_name", "output_dir"))  # made of others, which are to be named
    config.check()
    check_ranges(config)
    return config


def refuse_unknown(cfg: DictConfig, prefix: str = "") -> None:
    """Raise ValueError for a key that was added with + and that the schema does not have."""
    schema = OmegaConf.get_type(cfg)
    if not dataclasses.is_dataclass(schema):
        return
    known = [field.name for field in dataclasses.fields(schema)]
    for key in cfg:
        if key not in known:
            raise ValueError(unknown_key(f"{prefix}{key!s}", known))
        child = cfg._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing()):
            refuse_unknown(child, f"{prefix}{key}.")


def unknown_key(full_key: str, known: list[str]) -> str:
    """What to say of a key that is not among the `known` keys of its group."""
    group, _, key = str(full_key).rpartition(".")
    close = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key {full_key}; {hint}{group or 'the config'} has {', '.join(known)}"


def check_ranges(config: Any, prefix: str = "", skip: tuple[str, ...] = ()) -> None:
    """Raise ValueError for the first value, but for `skip`, outside of what its field may hold."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif key not in skip and not _holds(field.metadata, value):
            wanted = describe(hints[field.name], field.metadata, full=True)
            raise ValueError(f"{key}={short(value)}; expected {wanted}")


def _holds(metadata: typing.Mapping, value: Any) -> bool:
    if isinstance(value, list):  # OmegaConf lets groups and lists into a list of numbers
        plain = all(not isinstance(v, dict | list) and _holds(metadata, v) for v in value)
        return plain and len(value) <= ITEMS
    if value is None:
        return True  # OmegaConf has refused it where the type does
    if metadata.get("choices") is not None and value not in metadata["choices"]:
        return False
    if isinstance(value, str):
        is_text = len(value) <= TEXT and "\0" not in value
        is_text = is_text and (value.strip() != "" or not metadata.get("filled"))
        return is_name(value) if metadata.get("name") else is_text
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    if not math.isfinite(value):
        return False
    low, high = metadata.get("low"), metadata.get("high")
    above, below = metadata.get("above"), metadata.get("below")
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def is_name(value: Any) -> bool:
    """Whether a value is a plain name, fit to be a part of a path."""
    plain = isinstance(value, str) and value.isprintable() and len(value) < NAME
    return plain and value[:1] not in ("", ".") and not {"/", "\\"} & set(value)


def describe(hint: Any, metadata: typing.Mapping, full: bool = False) -> str:
    """What a field may hold, in words; `full`: with the ends that hardly anybody meets."""
    arguments = typing.get_args(hint)
    many = f", at most {ITEMS:,} of them" if full and typing.get_origin(hint) is list else ""
    if metadata.get("expected"):
        return metadata["expected"] + many
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (inner,) = [a for a in arguments if a is not type(None)]
        return f"{describe(inner, metadata, full)}, or null"
    if metadata.get("choices") is not None:
        text = "one of " + ", ".join(map(str, metadata["choices"]))
        return f"a list, each {text}{many}" if typing.get_origin(hint) is list else text
    if typing.get_origin(hint) is list:
        return f"a list, each {describe(arguments[0], metadata, full)}{many}"
    if hint is bool:
        return "true or false"
    if hint is str and metadata.get("name"):
        length = f", shorter than {NAME} characters" if full else ""
        return f"a name without / and control characters, not starting with a dot{length}"
    if hint is str:
        length = "1" if metadata.get("filled") else "0"
        return f"a text of {length} to {TEXT} characters, none of them null" if full else "a text"
    if hint in (int, float):
        return ("a whole number" if hint is int else "a number") + _bounds(metadata, full)
    return "a group of keys"


def _bounds(metadata: typing.Mapping, full: bool) -> str:
    low, high = metadata.get("low"), metadata.get("high")
    above, below = metadata.get("above"), metadata.get("below")
    if isinstance(high, int) and high >= COUNT and not full:
        high = None
    parts = []
    if above is not None:
        parts.append(f"above {above:g}")
    if low is not None and high is not None:
        parts.append(f"{_plain(low)} to {_plain(high)}")
    elif low is not None:
        parts.append(f"{_plain(low)} or more")
    elif high is not None:
        parts.append(f"at most {_plain(high)}")
    if below is not None:
        parts.append(f"less than {below:g}")
    return f", {' and '.join(parts)}" if parts else ""


def as_yaml(value: Any) -> str:
    """A value as the command line takes it: `null`, `true`, `[in, ln]`."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n...")[0].strip()


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def short(value: Any, length: int = 80) -> str:
    """A value for a message, cut if it is long."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def field_of(schema: type, full_key: str) -> tuple[Any, typing.Mapping, list[str]]:
    """(type, metadata, keys of its group) of a dotted key; the type is None if there is none."""
    hint: Any = schema
    metadata: typing.Mapping = {}
    known: list[str] = []
    for part in str(full_key).partition("[")[0].split("."):
        if not dataclasses.is_dataclass(hint):  # an open mapping: its keys are not known here
            return None, {}, []
        fields = {field.name: field for field in dataclasses.fields(hint)}
        known = list(fields)
        if part not in fields:
            return None, {}, known
        hint, metadata = typing.get_type_hints(hint)[part], fields[part].metadata
    return hint, metadata, known


def machine_keys(schema: type, prefix: str = "") -> set[str]:
    """The dotted keys that no record holds; one of an earlier version may, which says nothing."""
    found = set()
    for field in dataclasses.fields(schema):
        hint, key = typing.get_type_hints(schema)[field.name], f"{prefix}{field.name}"
        if field.metadata.get("machine"):
            found.add(key)
        elif dataclasses.is_dataclass(hint):
            found |= machine_keys(hint, f"{key}.")
    return found


def recorded(config: Any) -> dict:
    """The config as a run's record holds it: what makes it this experiment and no other."""
    result = {}
    for field in dataclasses.fields(config):
        value, before = getattr(config, field.name), field.metadata.get("before", NOTHING)
        before = before(config) if callable(before) else before
        if field.metadata.get("machine") or value in (
            before if isinstance(before, tuple) else (before,)
        ):
            continue
        if dataclasses.is_dataclass(value):
            value = recorded(value)
            if not value:  # nothing in this group is recorded
                continue
        result[field.name] = value
    return result

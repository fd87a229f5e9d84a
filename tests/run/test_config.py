"""Configs as types: every wrong value of every key is one line; every right one is taken.

The keys, and what they may hold, are those of each entrypoint's schema. Values go through what
Hydra does with `key=value`, without composing anew for each.
"""

import dataclasses
import functools
import math
import re
import time
import types
import typing

import pytest
import yaml
from faults import RUNS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from workers import CONFIGS, SCHEMAS, composed, config, schema, with_value

from sn.training.run.config import (
    NormKeys,
    Setting,
    check_norm,
    check_ranges,
    option,
    recorded,
    whole,
)


def has_schema(root):
    return yaml.safe_load(open(f"{CONFIGS}/{root}.yaml"))["defaults"][0] == f"{root}_schema"


def in_defaults(root, group):
    defaults = yaml.safe_load(open(f"{CONFIGS}/{root}.yaml"))["defaults"]
    return any(group in entry for entry in defaults if isinstance(entry, dict))


roots = pytest.mark.parametrize(
    "root",
    [
        pytest.param(root, marks=pytest.mark.skipif(not has_schema(root), reason="no schema yet"))
        for root in SCHEMAS
    ],
)
SMALL = {root: ("device=cpu", *words[1:]) for root, words in RUNS.items()}
SMALL["nasbench201"] = ("table=none.csv",)
INF, NAN = math.inf, math.nan


@functools.cache
def base(root):
    cfg = composed(root, *SMALL.get(root, ()))
    if root != "imagenet":  # which shows that interpolations change nothing
        OmegaConf.resolve(cfg)  # half the time
    return cfg


def fields(kind, prefix=""):
    """(key, type, metadata, whether it may be null) of every value of a schema, groups left out."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        null = isinstance(hint, types.UnionType)
        if null:
            (hint,) = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{key}.")
        elif hint is not typing.Any:
            yield key, hint, field.metadata, null


def groups(kind, prefix=""):
    """(prefix of its keys, class) of a schema and of each group in it."""
    yield prefix, kind
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from groups(hints[field.name], f"{prefix}{field.name}.")


def wrong_type(hint):
    """Values of the command line that are none of `hint`."""
    if hint is bool:
        return ["abc", "", 0.5, 0, 1, 3, 1.0, "yes", "on", "1", "t", [1], {"a": 1}]
    if hint is int:
        return ["abc", "", 0.5, 3.0, True, NAN, INF, [1], {"a": 1}, "1e3"]
    if hint is float:
        return ["abc", "", True, [1.0], {"a": 1}, "1,5"]
    if hint is str:
        return [["a"], {"a": 1}]
    if typing.get_origin(hint) is list:
        inside = [value for value in wrong_type(typing.get_args(hint)[0])]
        return ["abc", 3, {"a": 1}, *([value] for value in inside if not isinstance(value, list))]
    return ["abc", 3, [1]] if typing.get_origin(hint) is dict else []


def wrong_range(hint, metadata):
    if typing.get_origin(hint) is list:
        return [[value] for value in wrong_range(typing.get_args(hint)[0], metadata)]
    if hint is str:
        values = ["../up", "/abs", "a/b", "..", ".hidden", "", "a\nb", "a\\b", "x" * 300]
        long = ["a\x00b", "x" * 5000]
        return ["abc", ""] if metadata["choices"] else [*long, *values * metadata["name"]]
    if hint not in (int, float):
        return []
    values = [NAN, INF, -INF, "nan", "inf"] if hint is float else []
    step = 1 if hint is int else None
    for bound, sign, open_end in (
        ("low", -1, False),
        ("high", 1, False),
        ("above", -1, True),
        ("below", 1, True),
    ):
        limit = metadata[bound]
        if limit is None:
            continue
        limit = hint(limit)
        values.append(limit if open_end else limit + sign * (step or max(abs(limit), 1) * 1e-6))
        values.append(limit + sign * 7)
    return values


def right(hint, metadata, null):
    """Both ends of what is allowed, and all choices."""
    found = [None] if null else []
    if typing.get_origin(hint) is list:
        inner = right(typing.get_args(hint)[0], metadata, False)
        return [*found, [], *([value] for value in inner), inner]
    if metadata["choices"]:
        return [*found, *metadata["choices"]]
    if hint is bool:
        return [*found, True, False]
    if hint is str:
        return [*found, "sn_8x32", "a b", "$(reboot)", "it's;", "größe"]
    if hint in (int, float):
        low, high = metadata["low"], metadata["high"]
        found += [hint(low)] if low is not None else []
        found += [hint(high)] if high is not None and metadata["below"] is None else []
        least = metadata["above"] if metadata["above"] is not None else low or 0
        return [*found, least + 0.5] if hint is float else found
    return found


def refused(root, key, value, **options):
    """What the user reads, one line that names the key."""
    with pytest.raises(ValueError) as error:
        with_value(root, base(root), key, value, **options)
    text = str(error.value)
    assert "\n" not in text.replace(str(value), "") and len(text) < 800, text
    return text


@roots
def test_every_value_of_a_wrong_type_is_named(root):
    """By type and by range: key, value, what is expected."""
    count = 0
    for key, hint, metadata, null in fields(schema(root)):
        values = wrong_type(hint) + wrong_range(hint, metadata)
        for value in values if null else [*values, None]:
            text = refused(root, key, value)
            named = re.match(rf"{re.escape(key)}(\[\d\])?=(.*); expected (.+)", text, re.DOTALL)
            assert named, (key, value, text)
            shown = named.group(2)
            if not isinstance(value, dict | list | None | bool):
                assert shown[:80] == str(value)[:80], (key, value, text)
            count += 1
    assert count > 150


@roots
def test_every_number_has_ends(root):
    """1e30 is no learning rate, 2**40 no number of steps: each field says what it can be."""
    count = 0
    for key, hint, metadata, _ in fields(schema(root)):
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
        if kind in (int, float):
            least = [metadata[end] for end in ("low", "above") if metadata[end] is not None]
            most = [metadata[end] for end in ("high", "below") if metadata[end] is not None]
            assert least and min(least) >= 0, key
            assert most and min(most) <= (2**32 if kind is int else 1e15), key
            count += 1
    assert count > 20


def test_the_numbers_of_a_norm_have_ends():
    for _, hint, metadata, _ in fields(NormKeys):
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
        assert kind in (bool, str) or None not in (metadata["low"], metadata["high"])


def test_lists_and_texts_have_a_length():
    @dataclasses.dataclass
    class Config:
        points: list[int] = whole(1)
        words: list[str] = option(expected="a list of words")
        note: str = option()

    right = Config([1] * 10_000, ["a"] * 10_000, "x" * 4096)
    check_ranges(right)
    for changed, message in (
        ({"points": [1] * 10_001}, r"points=.*; expected a list, each .*, at most 10,000 of them"),
        ({"words": ["a"] * 10_001}, r"words=.*; expected a list of words, at most 10,000 of them"),
        ({"words": ["a", "b" * 4097]}, "words="),
        ({"note": "x" * 4097}, r"note=x{80}\.\.\. .*; expected a text of 0 to 4096 characters"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            check_ranges(dataclasses.replace(right, **changed))
        assert len(str(error.value)) < 300


@roots
def test_every_right_value_is_taken(root):
    """The ends of a range belong to it; what goes together with what is another question."""
    for key, hint, metadata, null in fields(schema(root)):
        for value in right(hint, metadata, null):
            cfg = base(root).copy()
            OmegaConf.update(cfg, key, value, merge=True)
            object_ = OmegaConf.to_object(cfg)
            check_ranges(object_)
            found = functools.reduce(getattr, key.split("."), object_)
            assert found == value or hint is bool, (key, value, found)


@roots
def test_unknown_keys_are_named(root):
    """Misspelt, added with +, in each group; with the nearest key there is."""
    for prefix, kind in groups(schema(root)):
        known = [field.name for field in dataclasses.fields(kind)]
        for key in ("xyzzy", f"{known[0]}s"):
            for add in (False, True):
                text = refused(root, f"{prefix}{key}", 1, add=add)
                assert text.startswith(f"unknown key {prefix}{key}; "), text
                assert all(name in text for name in known)
                assert key == "xyzzy" or f"did you mean {known[0]}?" in text


@roots
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(data=st.data())
def test_any_text_is_refused_or_taken(root, data):
    """Whatever is typed: a typed config or one line, never another exception."""
    table = {key: hint for key, hint, *_ in fields(schema(root))}
    key = data.draw(st.sampled_from(sorted(table)))
    value = data.draw(
        st.one_of(
            st.text(max_size=12), st.integers(), st.floats(), st.booleans(), st.none(),
            st.lists(st.one_of(st.text(max_size=5), st.floats()), max_size=3),
            st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(), max_size=2),
        )
    )  # fmt: skip
    assume(not isinstance(value, str) or "$" not in value)  # OmegaConf's interpolations
    try:
        with_value(root, base(root), key, value)
    except (ValueError, OverflowError) as error:
        assert not isinstance(error, UnicodeError | OverflowError), (key, value)
        assert str(error), (key, value)


@roots
def test_a_wrong_value_takes_milliseconds(root):
    """In CPU time, so that a suite can afford thousands: no composing, no building."""
    began = time.process_time()
    for _ in range(20):
        refused(root, "seed", -1)
    assert time.process_time() - began < 20 * 0.2


@pytest.mark.parametrize(
    "root, key",
    [
        ("detection", "model.parts_name"),
        ("enas", "names.random"),
        ("imagenet", "norm.name"),
        ("nasbench201", "run_name"),
    ],
)
def test_a_bad_part_of_a_name_is_named_itself(root, key):
    """run_name is made of it."""
    overrides = ["sampler=random"] if key == "names.random" else []
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=\.\./up; expected a name"):
        config(*SMALL.get(root, ()), *overrides, f"{key}=../up", root=root)


@pytest.mark.parametrize("value", ["3", "0", "yes", "1.0", "on"])
def test_only_true_and_false_are_bools(value, tmp_path):
    """On the command line, and as a number in a file; OmegaConf takes them for true."""
    with pytest.raises(ValueError, match=f"^deterministic={value}; expected true or false"):
        config(f"deterministic={value}")
    assert config("deterministic=true").deterministic is True
    (tmp_path / "experiment").mkdir()
    for text, right in ((value, value in ("yes", "on")), ("false", True)):  # YAML's own true
        file = tmp_path / "experiment" / "mine.yaml"
        file.write_text(f"# @package _global_\ndeterministic: {text}\n")
        words = (f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
        if right:
            assert config(*words).deterministic is (text != "false")
        else:
            with pytest.raises(ValueError, match=f"deterministic={text}; expected true or false"):
                config(*words)


YAML = [  # what stands in the experiment's file, what the user reads
    ({"sed": 1}, "unknown key sed; did you mean seed?"),
    ({"setting": {"gpu": 1}}, "unknown key setting.gpu; did you mean gpus?"),
    ({"seed": "abc"}, "seed=abc; expected a whole number"),
    ({"seed": -1}, "seed=-1; expected a whole number, 0 to 4294967296"),
    ({"precision": "fp8"}, "precision=fp8; expected one of fp32, "),
]


@pytest.mark.parametrize("content, message", YAML, ids=lambda value: str(value)[:12])
@roots
def test_experiment_files_are_checked(root, content, message, tmp_path):
    if not in_defaults(root, "experiment"):
        return
    if "setting" in content and "setting" not in base(root):
        content, message = {"child": {"filter": 1}}, "unknown key child.filter; did you mean filt"
        if "network" in base(root):
            content, message = (
                {"network": {"cell": 1}},
                "unknown key network.cell; did you mean cel",
            )
        elif "child" not in base(root):
            content, message = {"schedule": {"step": 1}}, "unknown key schedule.step; did you mean"
    (tmp_path / "experiment").mkdir()
    text = f"# @package _global_\n{yaml.safe_dump(content)}"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        path = f"hydra.searchpath=[file://{tmp_path}]"
        config(
            path, "experiment=mine", *(["arch=random"] if "arch" in base(root) else []), root=root
        )
    line = str(error.value)
    assert message in line and "\n" not in line
    if "unknown" in message or "abc" in message:
        assert line.startswith("configs/experiment/mine.yaml: ")


@pytest.mark.parametrize(
    "override, words",
    [
        ("experiment=none", ["experiment=none:", "choose one of"]),
        ("experiment=enas/none", ["experiment=enas/none:", "choose one of"]),
        ("++sed=1", ["unknown key sed; did you mean seed?"]),
        ("==", ["=="]),
        ("note=a=b", ["note=a=b: not an override", "quotes"]),
        ("note=(", ["note=(: not an override", "quotes"]),
        (
            "output_root=~/runs",
            ["output_root=~/runs: ~ is not expanded", "write output_root=$HOME/runs"],
        ),
        ("output_root=~you", ["~ is not expanded", "the path in full"]),
        ("~seed", ["seed"]),
    ],
)
@roots
def test_what_hydra_refuses_is_one_line(root, override, words):
    if "experiment=" in override and not in_defaults(root, "experiment"):
        return
    with pytest.raises(ValueError) as error:
        config(*SMALL.get(root, ()), override, root=root)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    if "experiment=" in override:  # those of this command, and of no other
        offered = str(error.value).partition("choose one of ")[2].split(", ")
        assert offered and {name.partition("/")[0] for name in offered} == {root}


def test_open_mappings():
    """`norm` holds what `make_norm` takes; what is checked here is."""
    for values, message in (
        ({"name": "../up"}, "norm.name=../up; expected a name"),
        ({"momentum": 5}, "norm.momentum=5; expected a number, 0 to 1, or null"),
        ({"momentum": "abc"}, "norm.momentum=abc; expected a number"),
        ({"momentum": True}, "norm.momentum=True; expected a number"),
        ({"eps": 1e30}, "norm.eps=1e[+]30; expected a number, 0 to 1"),
        ({"num_groups": True}, "norm.num_groups=True; expected a whole number, 1 to 65536, or nu"),
        ({"r_images": [0, 1e30]}, "norm.r_images=.*; expected a list, each a number, 0 to 1e[+]15"),
        ({"affine": 3}, "norm.affine=3; expected true or false"),
        ({"affine": "true"}, "norm.affine=true; expected true or false"),
        ({"momentum": "0.1"}, "norm.momentum=0.1; expected a number"),
        ({"name": 3}, "norm.name=3; expected a name"),
        ({"unbiased": "on"}, "norm.unbiased=on; expected true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            check_norm({"name": "sn"} | values)
    check_norm({"name": "sn", "momentum": None, "whatever": 3})
    for key in ("device", "dtype", "process_group", "virtual_gpus"):
        with pytest.raises(ValueError, match=f"parts.fpn.{key}=x: the run chooses it"):
            check_norm({"name": "sn", key: "x"}, "parts.fpn")
    with pytest.raises(ValueError, match="norm.name is not set"):
        check_norm({})


def test_recorded_leaves_out_the_machine_and_what_was_always_so():
    @dataclasses.dataclass
    class Inner:
        gpus: int = 2
        emulation: str = option("auto", machine=True)

    @dataclasses.dataclass
    class Outer:
        seed: int = 0
        device: str = option("cpu", machine=True)
        gates: str = option("joint", before="joint")
        clip: float | None = option(None, before=None)
        inner: Inner = option(Inner)
        norm: dict[str, typing.Any] = dataclasses.field(default_factory=lambda: {"name": "sn"})

    assert recorded(Outer()) == {"seed": 0, "inner": {"gpus": 2}, "norm": {"name": "sn"}}
    changed = recorded(Outer(gates="bilevel", clip=1.0))
    assert changed["gates"] == "bilevel" and changed["clip"] == 1.0


def test_a_folder_of_outputs_has_a_name():
    """Else it would be the folder one is in, and with an empty output_root the machine's root."""
    for override in ("output_dir=", "output_root=", "output_dir=' '"):
        key = override.partition("=")[0]
        with pytest.raises(ValueError, match=rf"^{key}=\s*; expected a text of 1 to 4096"):
            config(override)


def test_anchors_of_the_pyramid_are_counted_before_any_data_are_drawn():
    with pytest.raises(ValueError, match=r"model.anchor_sizes=\[8, 16\]; expected five lengths"):
        config(*SMALL["detection"], "model.anchor_sizes=[8,16]", root="detection")


def test_images_per_step_have_an_end():
    for root in ("imagenet", "detection"):
        words = [w for w in SMALL[root] if not w.startswith("setting.")]
        with pytest.raises(ValueError, match="setting 65536x65536 has 4,294,967,296 images per st"):
            config(*words, "setting.gpus=65536", "setting.images_per_gpu=65536", root=root)


def test_setting():
    """(GPUs, images per GPU): (8,32) is the paper's; the linear rule of its lr."""
    setting = Setting(gpus=8, images_per_gpu=4, emulation="auto")
    assert (setting.name, setting.total) == ("8x4", 32)
    assert setting.lr(0.1, 256) == pytest.approx(0.0125)
    assert setting.describe("grouped", 2) == {
        "gpus": 8, "images_per_gpu": 4, "name": "8x4", "emulation": "grouped", "world_size": 2,
    }  # fmt: skip

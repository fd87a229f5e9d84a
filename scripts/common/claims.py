"""The ledger of the paper's claims, `results/claims.yaml`, and what recorded runs say about each.

A leaf like `records.py`: neither torch nor `sn`. How a claim is judged stands in the ledger itself.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from common.records import (
    ROOT,
    Run,
    average_importance,
    block_importance,
    describe_differences,
    differences,
    mean_and_sd,
)
from scipy.special import stdtr, stdtrit  # scipy.stats takes a second to import

LEDGER = ROOT / "results" / "claims.yaml"
RULES = ("difference", "difference of differences", "ordering", "not worse", "equivalence")
HELD, NOT_HELD, UNDECIDED = "held", "not held", "undecided"
MOST_LOOKS = 6  # of one claim: see `more_seeds` in the ledger
MOST_SEEDS = 1000  # beyond which "how many seeds would decide" is not computed
UNRECORDED = {"gates": "joint", "optimizer.gate_lr_factor": 1}  # left out of a config at this value

SLOPE = r"slope\(\s*(?P<slope>[a-z]\w*)(?P<settings>(?:\s+\d+x\d+){2,})\s*\)"
PLAIN = r"(?P<arm>[a-z]\w*)(?:\s+(?P<setting>\d+x\d+)(?:\s+(?P<figure>[a-z][\w.]*))?)?"
TERM = re.compile(rf"\s*(?P<sign>[+-]?)\s*(?:{SLOPE}|{PLAIN})\s*")


# --- the ledger


@dataclass(frozen=True)
class Term:
    """`weight` times a figure of an arm's run at a setting (None: the task has no settings)."""

    weight: float
    arm: str
    setting: str | None
    figure: str


@dataclass(frozen=True)
class Test:
    """One effect and the rule it has to meet."""

    effect: str
    terms: tuple[Term, ...]
    rule: str
    margin: float
    says: str
    paper: float | None
    where: str

    __test__ = False  # pytest: no test class

    @property
    def wanted(self) -> tuple[float, float]:
        """The open interval in which the rule wants the effect."""
        if self.rule == "equivalence":
            return -self.margin, self.margin
        return (-self.margin if self.rule == "not worse" else self.margin), math.inf

    @property
    def wants(self) -> str:
        low, high = self.wanted
        text = f"above {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        return text.replace("-", "−")


@dataclass(frozen=True)
class Claim:
    id: str
    claim: str
    source: str
    worth: int
    design: str
    marks: tuple[str, ...]
    tests: tuple[Test, ...]
    looks: tuple[int, ...] = ()  # up to which seed it was judged, where more were made after one

    @property
    def looked_at(self) -> range:
        """The seeds up to the last look; none without looks."""
        return range(1, self.looks[-1] + 1 if self.looks else 1)

    def counts(self, seed: int, first: Sequence[int]) -> bool:
        """Whether a seed counts: those of the last look do, without looks the design's `first`."""
        return seed in self.looked_at if self.looks else seed in first

    @property
    def factor(self) -> int:
        """What a p-value counts: once for each time that the claim was judged."""
        return max(1, len(self.looks))

    @property
    def is_spent(self) -> bool:
        """Whether it was judged as often as it may be."""
        return self.factor == MOST_LOOKS

    @property
    def cells(self) -> list[tuple[str, str | None]]:
        """The (arm, setting) pairs whose runs the claim needs, each once, in order."""
        return list(dict.fromkeys((t.arm, t.setting) for test in self.tests for t in test.terms))


@dataclass(frozen=True)
class Arm:
    """What is trained: a norm with options (`set`: config keys and values)."""

    name: str
    norm: str
    lr_of: str  # the arm whose lr search counts
    set: Mapping[str, Any]
    cost: float
    options: tuple[str, ...] = ()  # overrides in place of norm=
    facts: Mapping[str, Any] = field(default_factory=dict)  # what these are recorded as
    settings: Mapping[str, str] = field(default_factory=dict)  # setting -> as it is run
    pretrained: str | None = None  # arm of the design's `pretraining`


@dataclass(frozen=True)
class Search:
    """The lr search that precedes the confirmatory runs."""

    seed: int
    key: str
    values: tuple[float, ...]
    settings: tuple[str | None, ...]
    chosen: str
    of: str = "top1"  # the figure that chooses


@dataclass(frozen=True)
class Design:
    """How the runs of some claims are made: by an `experiment`, run by run, or by one command.

    Neither `experiment` nor `record`: not designed yet.
    """

    name: str
    task: str
    what: str
    experiment: str | None
    seeds: tuple[int, ...]
    script: str = ""
    origin: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    search: Search | None = None
    arms: Mapping[str, Arm] = field(default_factory=dict)
    minutes: Mapping[str | None, float] = field(default_factory=dict)
    record: str = ""  # JSONL below the clone: a line for each arm, arrays of seeds x points
    command: str = ""  # that makes the record
    figures: Mapping[str, str] = field(default_factory=dict)  # name -> array of the record
    at: int | None = None  # the point whose column counts
    prefix: str = ""  # of its runs' names, which must differ from other designs'
    prepare: str = ""  # module and arguments, run before the first of its runs
    takes: tuple[str, ...] = ()  # keys of the command line that it needs, and not every design has
    accepts: tuple[str, ...] = ()  # likewise, but may do without
    pretraining: "Design | None" = None  # whose runs its own start from
    pretrained_at: str | None = None  # the setting of those

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the keys that not every design has, those that it has."""
        return self.takes + self.accepts

    @property
    def made(self) -> bool:
        return self.experiment is not None or bool(self.record)


@dataclass(frozen=True)
class Ledger:
    path: Path
    judging: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, str]]
    designs: Mapping[str, Design]
    claims: tuple[Claim, ...]
    marks: Mapping[str, Mapping[str, str]]
    not_judged: tuple[Mapping[str, str], ...]
    changes: tuple[Mapping[str, Any], ...]

    @property
    def level(self) -> float:
        return self.judging["level"]

    def design_of(self, claim: Claim) -> Design:
        return self.designs[claim.design]

    def unit(self, test: Test) -> str:
        return self.figures[test.terms[0].figure.split(".")[0]]["unit"]


class LedgerError(ValueError):
    """The ledger is not as it should be; the message is one line."""


def load_ledger(path: Path | str = LEDGER) -> Ledger:
    """Read and check the ledger. Raises LedgerError, whose one line says what is wrong where."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LedgerError(f"{path}: {' '.join(str(error).split())}") from None
    try:
        return _ledger(path, data)
    except LedgerError as error:
        raise LedgerError(f"{path.name}: {error}") from None


def _ledger(path: Path, data: Any) -> Ledger:
    top = _fields(
        "the file",
        data,
        {"judging": dict, "figures": dict, "designs": dict, "claims": list, "marks": dict},
        {"not_judged": list, "changes": list},
    )
    level = top["judging"].get("level")
    _need(isinstance(level, float) and 0 < level < 1, f"judging: level {level!r} is not 0 to 1")
    for kind, keys in (("figures", ("unit", "what")), ("marks", ("kind", "what"))):
        for name, entry in top[kind].items():
            _fields(f"{kind}: {name}", entry, dict.fromkeys(keys, str))
    designs: dict[str, Design] = {}
    for name, entry in top["designs"].items():
        designs[name] = _design(name, entry, designs)
    claims = [_claim(entry, number, top, designs) for number, entry in enumerate(top["claims"], 1)]
    ids = [claim.id for claim in claims]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    _need(twice is None, f"claim {twice} stands there twice")
    rest = [tuple(top.get(key) or ()) for key in ("not_judged", "changes")]
    return Ledger(path, top["judging"], top["figures"], designs, tuple(claims), top["marks"], *rest)


def _design(name: str, entry: Any, others: Mapping[str, Design]) -> Design:
    where = f"design {name}"
    needed = {"task": str, "what": str, "experiment": str | None, "seeds": list | str}
    made = isinstance(entry, dict) and entry.get("experiment") is not None
    recorded = isinstance(entry, dict) and "record" in entry
    more = {"script": str, "facts": dict, "arms": dict, "minutes": dict | int | float}
    if recorded:
        more = {"record": str, "command": str, "figures": dict, "at": int} | {
            key: more[key] for key in ("facts", "arms")
        }
    entry = _fields(
        where,
        entry,
        needed | (more if made or recorded else {}),
        {"origin": str, "search": dict, "prefix": str, "pretraining": dict}
        | {"prepare": str, "takes": list, "accepts": list}
        | ({} if made or recorded else more),
    )
    seeds = _seeds(where, entry["seeds"])
    if not (made or recorded):
        return Design(name, entry["task"], entry["what"], None, tuple(seeds))
    _need(len(seeds) >= 2, f"{where}: an interval needs two seeds or more, not {seeds}")
    pretraining, pretrained_at = None, None
    if "pretraining" in entry:
        found = _fields(
            f"{where}, pretraining", entry["pretraining"], {"design": str, "setting": str}
        )
        pretraining, pretrained_at = others.get(found["design"]), found["setting"]
        known = pretraining and pretrained_at in pretraining.minutes
        _need(known, f"{where}: pretraining {found} is of no design above it")
    arms = {}
    for arm, options in entry["arms"].items():
        place = f"{where}, arm {arm}"
        optional = {"lr_of": str, "set": dict, "cost": int | float, "options": list}
        optional |= {"facts": dict, "settings": dict, "pretrained": str}
        options = _fields(place, options, {"norm": str}, optional)
        _need(
            ("options" in options) == ("facts" in options),
            f"{place}: `options` and `facts`, what they are recorded as, go together",
        )
        start = options.get("pretrained")
        _need(
            start is None or (pretraining and start in pretraining.arms),
            f"{place}: pretrained {start!r} is no arm of the design's pretraining",
        )
        for key in options.get("set", {}):  # or its runs would count as those of other arms, too
            known = key in entry["facts"] or key.startswith("norm.")
            _need(known, f"{place}: {key!r} is not among the design's facts; add its usual value")
        lr_of = options.get("lr_of", arm)
        _need(lr_of in entry["arms"], f"{place}: lr_of {lr_of!r} is no arm of the design")
        arms[arm] = Arm(
            arm,
            options["norm"],
            lr_of,
            options.get("set", {}),
            options.get("cost", 1),
            tuple(options.get("options", ())),
            options.get("facts", {}),
            options.get("settings", {}),
            start,
        )
    search = None
    if "search" in entry:
        kinds = {"seed": int, "key": str, "values": list, "settings": list, "chosen": str}
        found = _fields(f"{where}, search", entry["search"], kinds, {"of": str})
        _need(
            found["seed"] not in seeds,
            f"{where}: the search's seed {found['seed']} is a confirmatory one, too",
        )
        values, settings = tuple(found["values"]), tuple(found["settings"])
        search = Search(
            found["seed"], found["key"], values, settings, found["chosen"], found.get("of", "top1")
        )
    minutes = entry.get("minutes", 0)
    if not isinstance(minutes, dict):  # a task without settings
        minutes = {None: float(minutes)}
    return Design(
        name,
        entry["task"],
        entry["what"],
        entry["experiment"],
        tuple(seeds),
        entry.get("script", ""),
        entry.get("origin", ""),
        entry["facts"],
        search,
        arms,
        minutes,
        entry.get("record", ""),
        entry.get("command", ""),
        entry.get("figures", {}),
        entry.get("at"),
        entry.get("prefix", ""),
        entry.get("prepare", ""),
        tuple(entry.get("takes", ())),
        tuple(entry.get("accepts", ())),
        pretraining,
        pretrained_at,
    )


def _seeds(where: str, seeds: list | str) -> list[int]:
    """A list of seeds, or a range such as 201-400."""
    if isinstance(seeds, str):
        first, _, last = seeds.partition("-")
        _need(
            first.isdigit() and last.isdigit() and int(first) < int(last),
            f"{where}: seeds {seeds!r} are no range such as 1-5",
        )
        return list(range(int(first), int(last) + 1))
    _need(all(type(s) is int for s in seeds), f"{where}: seeds {seeds} are not whole numbers")
    return seeds


def _claim(entry: Any, number: int, top: dict, designs: dict[str, Design]) -> Claim:
    name = entry.get("id") if isinstance(entry, dict) else None
    where = f"claim {name or f'number {number}'}"
    shared = {"of": str, "rule": str, "margin": int | float, "where": str}
    kinds = {"id": str, "claim": str, "source": str, "worth": int, "design": str, "tests": list}
    entry = _fields(where, entry, kinds, shared | {"marks": list, "looks": list})
    design = designs.get(entry["design"])
    _need(design, f"{where}: unknown design {entry['design']!r}; there are {_names(designs)}")
    marks = tuple(entry.get("marks", ()))
    for mark in marks:
        _need(mark in top["marks"], f"{where}: unknown mark {mark!r}; there are those of `marks`")
    looks = entry.get("looks", [])
    rising = all(isinstance(n, int) and n >= 2 for n in looks) and looks == sorted(looks)
    _need(
        rising, f"{where}: looks {looks} are not numbers of seeds, 2 or more, none below the last"
    )
    _need(
        len(looks) <= MOST_LOOKS, f"{where}: judged {len(looks)} times; {MOST_LOOKS} are the most"
    )
    _need(entry["tests"], f"{where}: no tests")
    tests = []
    for index, test in enumerate(entry["tests"], 1):
        place = f"{where}, test {index}"
        defaults = {key: entry[key] for key in shared if key in entry}
        tests += _tests(place, test, defaults, shared, top["figures"], design)
    facts = {key: entry[key] for key in ("id", "claim", "source", "worth", "design")}
    return Claim(**facts, marks=marks, tests=tuple(tests), looks=tuple(looks))


def _tests(
    where: str, entry: Any, defaults: dict, shared: dict, figures: dict, design: Design
) -> list[Test]:
    """The tests of one entry: one, or those of an `order`."""
    ordered = isinstance(entry, dict) and "order" in entry
    kinds = {"order": list, "paper": list} if ordered else {"effect": str}
    entry = _fields(where, entry, kinds, shared | {"says": str, "paper": int | float | None})
    _need("paper" in entry, f"{where}: no `paper`; null where the paper gives no figure")
    entry = defaults | entry
    for key in ("rule", "where"):
        _need(key in entry, f"{where}: no `{key}`, here or in the claim")
    rule, margin = entry["rule"], entry.get("margin", 0)
    _need(rule in RULES, f"{where}: unknown rule {rule!r}; choose one of {_names(RULES)}")
    needs_margin = rule in ("not worse", "equivalence")
    _need(margin > 0 or not needs_margin, f"{where}: rule {rule!r} needs a margin above 0")
    _need(margin >= 0, f"{where}: margin {margin} is below 0")
    _need(ordered == (rule == "ordering"), f"{where}: `order` and rule `ordering` go together")
    effects, published = [entry.get("effect")], [entry["paper"]]
    if ordered:
        order = entry["order"]
        effects = [f"{a} - {b}" for a, b in zip(order, order[1:])]
        published = entry["paper"]
        _need(
            effects and len(published) == len(effects),
            f"{where}: {len(order)} figures in order have {len(order) - 1} differences",
        )
    tests = []
    for effect, paper in zip(effects, published):
        try:
            terms = parse_effect(effect, entry.get("of"))
        except ValueError as error:
            raise LedgerError(f"{where}: {error}") from None
        for term in terms:
            name = term.figure.split(".")[0]
            _need(name in figures, f"{where}: unknown figure {name!r}; there are {_names(figures)}")
            if design.made:
                _need(
                    term.arm in design.arms,
                    f"{where}: unknown arm {term.arm!r}; {design.name} has {_names(design.arms)}",
                )
                _need(
                    term.setting in design.minutes,
                    f"{where}: setting {term.setting!r} of {term.arm} has no minutes in "
                    f"{design.name}; it has {_names(map(str, design.minutes))}",
                )
        rest = math.fsum(term.weight for term in terms)
        single = len(terms) == 1 and rule == "equivalence"
        _need(
            abs(rest) < 1e-9 or single,
            f"{where}: {effect!r} is no difference: weights add to {rest:g}",
        )
        if rule == "difference of differences":
            _need(len(terms) >= 4, f"{where}: {effect!r} compares no two differences")
        says = entry.get("says", "")
        tests.append(Test(effect, terms, rule, float(margin), says, paper, entry["where"]))
    return tests


def parse_effect(text: str, figure: str | None = None) -> tuple[Term, ...]:
    """The terms of `bn 8x32 - bn 8x2`, of `slope(bn 8x32 8x16 8x8)`, or of a sum of such.

    figure: that of terms which name none. Raises ValueError for what is no such sum.
    """
    terms, position = [], 0
    while position < len(text):
        match = TERM.match(text, position)
        if not match or (terms and not match["sign"]):
            raise ValueError(f"effect {text!r} not understood at {text[position:]!r}")
        position = match.end()
        sign = -1.0 if match["sign"] == "-" else 1.0
        name = match["figure"] or figure
        if name is None:
            raise ValueError(f"effect {text!r} names no figure; give `of`")
        if match["arm"]:
            terms.append(Term(sign, match["arm"], match["setting"], name))
            continue
        settings = match["settings"].split()
        doublings = [math.log2(int(setting.split("x")[1])) for setting in settings]
        if len(set(doublings)) < 2:
            raise ValueError(f"effect {text!r}: a slope needs different images per GPU")
        center = math.fsum(doublings) / len(doublings)
        square = math.fsum((x - center) ** 2 for x in doublings)
        for setting, x in zip(settings, doublings):
            terms.append(Term(sign * (x - center) / square, match["slope"], setting, name))
    if not terms:
        raise ValueError("an effect is empty")
    return tuple(terms)


def _need(condition: Any, message: str) -> None:
    if not condition:
        raise LedgerError(message)


def _fields(where: str, entry: Any, needed: dict, optional: dict | None = None) -> dict:
    """`entry` if it is a mapping of these keys and types."""
    _need(isinstance(entry, dict), f"{where}: expected a mapping, found {entry!r}")
    optional = optional or {}
    for key in needed:
        _need(key in entry, f"{where}: `{key}` is missing")
    for key, value in entry.items():
        kind = needed.get(key, optional.get(key))
        _need(kind, f"{where}: unknown key {key!r}; expected {_names([*needed, *optional])}")
        ok = isinstance(value, kind) and not isinstance(value, bool)
        _need(ok, f"{where}: `{key}` is {value!r}, not {getattr(kind, '__name__', kind)}")
    return entry


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


# --- runs of an arm


@dataclass(frozen=True)
class Wanted:
    """A run that the ledger asks for. lr None: the search that decides it is not complete."""

    design: Design
    arm: Arm
    setting: str | None
    seed: int
    lr: float | None
    search: bool = False

    @property
    def run_name(self) -> str:
        name = f"{self.design.prefix}{self.arm.name}"
        name += f"_{self.setting}" if self.setting else ""
        return name + (f"_lr{self.lr:g}" if self.search else "")

    @property
    def name(self) -> str:
        return f"{self.run_name}/seed{self.seed}"

    @property
    def minutes(self) -> float:
        """The ledger's estimate."""
        return self.design.minutes[self.setting] * self.arm.cost

    @property
    def arguments(self) -> list[str]:
        """The entrypoint and its overrides, without `output_root` and `init.path`."""
        options = {"experiment": self.design.experiment}
        options |= dict(option.split("=", 1) for option in self.arm.options)
        if not self.arm.options:
            options["norm"] = self.arm.norm
        if self.setting:
            options["setting"] = self.arm.settings.get(self.setting, self.setting)
        options |= {"seed": self.seed, "run_name": self.run_name}
        if self.design.search and self.lr is not None:
            options[self.design.search.key] = self.lr
        options |= self.arm.set
        written = (f"{key}={_override(value)}" for key, value in options.items())
        return [self.design.script, *written]


def _override(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if isinstance(value, list):
        return "[" + ",".join(map(_override, value)) + "]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def fact(run: Run, key: str) -> Any:
    """A recorded fact, `data.train_images`: of the summary, else of the config, else None."""
    for record in (run.summary, run.config, UNRECORDED):
        value = record.get(key)
        if value is None:
            value = record
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            return value
    return None


def is_arm(run: Run, design: Design, arm: Arm) -> bool:
    """Whether a run is of this design and arm, at any setting, seed and lr."""
    if run.summary["task"] != design.task:
        return False
    own = arm.facts or {"norm": arm.norm}
    return all(fact(run, key) == value for key, value in (design.facts | own | arm.set).items())


def has_name(run: Run, design: Design, arm: Arm) -> bool:
    """Whether a run of an arm is named as `run_claims.py` names it: others are a user's own."""
    search = design.search if design.search and run.seed == design.search.seed else None
    lr = fact(run, search.key) if search else None
    if search and not isinstance(lr, int | float):
        return False
    wanted = (
        Wanted(design, arm, setting, run.seed, lr, search=search is not None)
        for setting in design.minutes
        if run.setting == _as_run(arm, setting)
    )
    return "/".join(run.name.split("/")[-2:]) in {one.name for one in wanted}


def _free(design: Design, arms: Iterable[Arm], runs: Iterable[Run]) -> set[str]:
    """The recorded options in which runs of these arms may differ."""
    free = {key for arm in arms for key in arm.set}
    if "data.train_images" in free:
        free.add("data.sha256")
    if "style.name" in free:
        free.add("style.sha256")
    if design.search:
        free.add(design.search.key)
    if any(run.diverged for run in runs):
        free |= {"epochs", "steps"}  # a diverged run has fewer
    return free


@dataclass(frozen=True)
class Choice:
    """An arm's lr search: mean top-1 per lr, the one chosen (None: runs are missing, a fault)."""

    lr: float | None
    scores: Mapping[float, float]
    runs: tuple[Run, ...]
    missing: tuple[Wanted, ...]
    fault: str = ""  # why its runs choose nothing: two records of one, or unlike ones


@dataclass
class Evidence:
    """The recorded runs, as the ledger asks for them."""

    ledger: Ledger
    runs: Sequence[Run]

    def __post_init__(self) -> None:
        self._choices: dict[tuple[str, str], Choice] = {}
        self._of_arm: dict[tuple[str, str], list[Run]] = {}

    def of_arm(self, design: Design, arm: Arm) -> list[Run]:
        key = design.name, arm.name
        if key not in self._of_arm:
            runs = read_record(design) if design.record else self.runs
            found = [run for run in runs if is_arm(run, design, arm)]
            if not design.record:
                found = [run for run in found if has_name(run, design, arm)]
                kept = [run for run in found if _is_kept(run)]
                found = [run for run in found if not _is_foreign(run, kept, design, arm)]
            self._of_arm[key] = found
        return self._of_arm[key]

    def of_designs(self) -> list[Run]:
        """The runs that are of a claim's design, whether its claims count their seeds or not."""
        designs = [design for design in self.ledger.designs.values() if design.experiment]
        paths = {
            run.path
            for design in designs
            for arm in design.arms.values()
            for run in self.of_arm(design, arm)
        }
        return [run for run in self.runs if run.path in paths]

    def ignored(self) -> list[Run]:
        """The runs that have an arm's facts, but another name than its own or another recipe."""
        counted = {run.path for run in self.of_designs()}
        arms = [(d, a) for d in self.ledger.designs.values() if d.experiment
                for a in d.arms.values()]  # fmt: skip
        rest = [run for run in self.runs if run.path not in counted]
        return [run for run in rest if any(is_arm(run, design, arm) for design, arm in arms)]

    def says_ignored(self) -> str:
        """How many runs are ignored, in a line that names the first; "" if there are none."""
        runs = self.ignored()
        if not runs:
            return ""
        some = _names(run.name for run in runs[:3]) + (", ..." if len(runs) > 3 else "")
        count = "1 run is" if len(runs) == 1 else f"{len(runs)} runs are"
        return f"{count} like a claim's but of another name or recipe, and not counted: {some}"

    def choice(self, design: Design, arm: Arm) -> Choice | None:
        """The lr search that counts for an arm; None if the design has none."""
        search = design.search
        if search is None:
            return None
        arm = design.arms[arm.lr_of]
        if (design.name, arm.name) in self._choices:
            return self._choices[design.name, arm.name]
        used, missing, twice, scores = [], [], [], {}
        for value in search.values:
            tops = []
            for setting in search.settings:
                found = [
                    run
                    for run in self.of_arm(design, arm)
                    if run.seed == search.seed
                    and run.setting == _as_run(arm, setting)
                    and _equal(fact(run, search.key), value)
                ]
                twice += [run.name for run in found[1:]]
                top1 = figure(found[0], search.of) if found else None
                if found and found[0].diverged and top1 is None:
                    top1 = 0.0
                if top1 is None:
                    missing.append(Wanted(design, arm, setting, search.seed, value, search=True))
                else:
                    used.append(found[0])
                    tops.append(top1)
            if len(tops) == len(search.settings):
                scores[value] = math.fsum(tops) / len(tops)
        unlike = differences(used, one_cell=False, free=_free(design, [], used))
        fault = ""
        if twice:
            fault = f"more than one record of {_names(twice)}; keep one of each"
        elif unlike:
            fault = f"unlike runs in the lr search of {arm.name}, {describe_differences(unlike)}"
        best = None
        if not (missing or fault):
            best = max(scores, key=lambda value: (scores[value], -value))
        choice = Choice(best, scores, tuple(used), tuple(missing), fault)
        self._choices[design.name, arm.name] = choice
        return choice

    def cell(self, design: Design, name: str, setting: str | None) -> dict[int, list[Run]]:
        """The confirmatory runs of an arm at a setting, by seed; more than one is a fault."""
        arm = design.arms[name]
        choice = self.choice(design, arm)
        seeds = {}
        for run in self.of_arm(design, arm):
            if run.setting != _as_run(arm, setting):
                continue
            if design.search and run.seed == design.search.seed:
                continue
            if choice is not None and not _equal(fact(run, design.search.key), choice.lr):
                continue
            seeds.setdefault(run.seed, []).append(run)
        return dict(sorted(seeds.items()))

    def counted(self, claim: Claim) -> dict[tuple[str, str | None], dict[int, list[Run]]]:
        """Of each of a claim's arms and settings the runs that count, by seed."""
        design = self.ledger.design_of(claim)
        return {
            cell: {
                seed: runs
                for seed, runs in self.cell(design, *cell).items()
                if claim.counts(seed, design.seeds)
            }
            for cell in claim.cells
        }

    def wanted(self, claim: Claim, seeds: Sequence[int] | None = None) -> list[Wanted]:
        """What a claim still needs: searches first, then its runs, seed by seed."""
        design = self.ledger.design_of(claim)
        if design.experiment is None:  # none yet, or one command makes all of them
            return []
        searches, runs = [], []
        for name, _ in claim.cells:
            choice = self.choice(design, design.arms[name])
            searches += choice.missing if choice else ()
        for seed in seeds or design.seeds:
            for name, setting in claim.cells:
                arm = design.arms[name]
                choice = self.choice(design, arm)
                if choice and choice.fault:
                    continue
                lr = choice.lr if choice else None
                if seed not in self.cell(design, name, setting):
                    runs.append(Wanted(design, arm, setting, seed, lr))
        every: dict[str, Wanted] = {}
        for wanted in [*searches, *runs]:
            first = self.pretraining(wanted)
            if first and first.seed not in self.cell(first.design, first.arm.name, first.setting):
                every.setdefault(first.name, first)
            every.setdefault(wanted.name, wanted)
        return list(every.values())

    def faults(self, claim: Claim) -> list[str]:
        """What is wrong with the lr searches of a claim's arms."""
        design = self.ledger.design_of(claim)
        if design.experiment is None:
            return []
        choices = (self.choice(design, design.arms[name]) for name, _ in claim.cells)
        return list(dict.fromkeys(choice.fault for choice in choices if choice and choice.fault))

    def pretraining(self, wanted: Wanted) -> Wanted | None:
        """The run whose checkpoint a run starts from, made or not."""
        before, name = wanted.design.pretraining, wanted.arm.pretrained
        if before is None or name is None:
            return None
        return Wanted(before, before.arms[name], wanted.design.pretrained_at, wanted.seed, None)

    def minutes(self, wanted: Wanted) -> float:
        """What a run will take: the mean of its like, or else the estimate at the design's pace.

        The pace is what the design's recorded runs took, over what the ledger estimates for them.
        """
        design, took, estimated = wanted.design, 0.0, 0.0
        alike = []
        for arm in design.arms.values():
            for run in self.of_arm(design, arm):
                wall = run.summary.get("wall_s")
                if run.diverged or not isinstance(wall, int | float):
                    continue
                if run.setting not in design.minutes:
                    continue
                took += wall / 60
                estimated += design.minutes[run.setting] * arm.cost
                same = run.setting == _as_run(arm, wanted.setting)
                if arm.name == wanted.arm.name and same:
                    alike.append(wall / 60)
        if alike:
            return math.fsum(alike) / len(alike)
        return wanted.minutes * (took / estimated if estimated else 1.0)


def read_record(design: Design) -> list[Run]:
    """The runs of a design that one command makes: one for each arm and seed of its record.

    A record that is not there has none. Raises LedgerError for a broken one.
    """
    path = ROOT / design.record
    runs = []
    try:
        for line in record_lines(design):
            column = line["points"].index(design.at)
            shared = {
                key: line.get(key) for key in ("data", "device", "versions", "commit", "date")
            }
            for index, seed in enumerate(line["seeds"]):
                summary = shared | {"task": design.task, "norm": line["arm"], "seed": seed}
                summary |= {"run": f"{design.task}/{line['arm']}/seed{seed}", "status": "finished"}
                summary["wall_s"] = line["seconds"] / len(line["seeds"])
                for name, array in design.figures.items():
                    summary[name] = line[array][index][column]
                config = line["config"] | {"norm": line["config"].get("controller")}
                config.pop("controller", None)  # what the arms differ in
                runs.append(Run(path, summary, config))
    except (OSError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise LedgerError(f"{path}: {type(error).__name__}: {error}") from None
    return runs


def record_lines(design: Design) -> list[dict[str, Any]]:
    """The lines of a design's record, one for each arm; none if it is not there."""
    path = ROOT / design.record
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def _as_run(arm: Arm, setting: str | None) -> str | None:
    """The setting that an arm's runs at `setting` have."""
    return setting if setting is None else arm.settings.get(setting, setting)


def _is_kept(run: Run) -> bool:
    """Whether a run's record is one of those in results/."""
    return ROOT / "results" in run.path.absolute().parents


def _is_foreign(run: Run, kept: Sequence[Run], design: Design, arm: Arm) -> bool:
    """Whether a run from elsewhere has another recipe than the kept ones of its arm."""
    if not kept or _is_kept(run):
        return False
    like = next((other for other in kept if other.setting == run.setting), None)
    other = like or kept[0]
    free = {*_free(design, [], [run, other]), "lr"}
    return bool(differences([run, other], one_cell=like is not None, free=free))


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and math.isclose(a, b)


# --- figures of a run


def figure(run: Run, name: str) -> float | None:
    """A recorded figure of one run (see `figures` in the ledger); None if it is not there."""
    name, _, block = name.partition(".")
    if name in ("top1", "top1_batch_average"):
        if run.diverged:  # as good as a guess
            classes = run.summary["data"].get("classes")
            return 100 / classes if classes else None
        return run.metric(name)
    if run.diverged:
        return 0.0 if name in ("box_ap", "mask_ap") else None
    if name in ("in_weight", "ln_weight", "bn_weight"):
        if not run.importance:
            return None
        return average_importance(run.importance[-1]).get(name[:2], 0.0)
    if name in ("bn_mean_weight", "bn_var_weight"):
        if not run.importance:
            return None
        blocks = block_importance(run.importance[-1], name.split("_")[1])
        weights = [found.get("bn", 0.0) for key, found in blocks.items() if block in ("", key)]
        return math.fsum(weights) / len(weights) if weights else None
    if name == "gap":
        last = run.metrics[-1] if run.metrics else {}
        values = [last.get(key) for key in ("train/top1", "val/top1")]
        return values[0] - values[1] if None not in values else None
    if name == "style_loss":
        return style_loss(run)
    return run.metric(name)


def style_loss(run: Run) -> float | None:
    """Mean of content + style loss over ten points, one at each tenth of the run.

    A point is the mean over the twentieth of the run that ends there; None if one is missing.
    """
    points = list(style_curve(run).values())[1::2]
    return math.fsum(points) / 10 if len(points) == 10 and None not in points else None


def style_curve(run: Run) -> dict[int, float | None]:
    """Last step -> mean content + style loss of each twentieth of the run; None: not recorded."""
    steps = run.summary["steps"]
    losses = [(line.get("step"), line.get("train/content"), line.get("train/style"))
              for line in run.metrics]  # fmt: skip
    known = {step: a + b for step, a, b in losses if None not in (step, a, b)}
    points, start = {}, 0
    for twentieth in range(1, 21):
        end = steps * twentieth // 20
        window = [known[step] for step in range(start + 1, end + 1) if step in known]
        points[end] = math.fsum(window) / len(window) if window else None
        start = end
    return points


def val_loss_at(run: Run, level: float) -> float | None:
    """Validation loss where the training loss first comes to `level`, linear between epochs.

    None if it never does, or does so in the first epoch, which has none before it.
    """
    curve = _losses(run)
    for (before, val_before), (after, val_after) in zip(curve, curve[1:]):
        if before > level >= after:
            share = (before - level) / (before - after)
            return val_before + share * (val_after - val_before)
    return None


def _losses(run: Run) -> list[tuple[float, float]]:
    """(train loss, validation loss) of each epoch."""
    pairs = [(line.get("train/loss"), line.get("val/loss")) for line in run.metrics]
    return [pair for pair in pairs if None not in pair and all(map(math.isfinite, pair))]


def effect_of(test: Test, runs: Mapping[tuple[str, str | None], Run]) -> float | None:
    """The test's effect in one seed's runs, by (arm, setting); None where a figure is missing."""
    level = None
    if any(term.figure == "val_loss_at_equal_train_loss" for term in test.terms):
        curves = [_losses(runs[term.arm, term.setting]) for term in test.terms]
        if not all(curves):
            return None
        level = max(min(train for train, _ in curve) for curve in curves)
    total, unit = [], 1.0
    if any(term.figure == "style_loss" for term in test.terms):  # in units of instance norm's
        reference = [run for run in runs.values() if run.summary.get("norm") == "in"]
        unit = style_loss(reference[0]) if len(reference) == 1 else None
        if not unit:
            return None
    for term in test.terms:
        run = runs[term.arm, term.setting]
        if term.figure == "val_loss_at_equal_train_loss":
            value = None if run.diverged else val_loss_at(run, level)
        else:
            value = figure(run, term.figure)
        if value is None:
            return None
        total.append(term.weight * value / unit)
    return math.fsum(total)


# --- verdicts


def t_interval(values: Sequence[float], level: float = 0.05) -> tuple[float, float]:
    """The t-interval of the mean at confidence 1 - level; needs two values or more."""
    mean, sd = mean_and_sd(values)
    half = float(stdtrit(len(values) - 1, 1 - level / 2)) * sd / math.sqrt(len(values))
    return mean - half, mean + half


def p_value(values: Sequence[float], wanted: tuple[float, float]) -> tuple[float, bool]:
    """(p, whether the mean lies in the open interval `wanted`).

    p is 1 minus the confidence at which the t-interval first touches a border of `wanted`.
    """
    mean, sd = mean_and_sd(values)
    distance = _distance(mean, wanted)
    inside = wanted[0] < mean < wanted[1]
    if distance == 0:
        return 1.0, inside
    if sd == 0:
        return 0.0, inside
    t = distance * math.sqrt(len(values)) / sd
    return float(2 * stdtr(len(values) - 1, -t)), inside


def _distance(mean: float, wanted: tuple[float, float]) -> float:
    """From the mean to the nearest border of `wanted`."""
    return min(abs(mean - border) for border in wanted if math.isfinite(border))


def seeds_needed(values: Sequence[float], wanted: tuple[float, float], level: float) -> int | None:
    """How many seeds would decide at the mean and spread seen; None: more than MOST_SEEDS."""
    mean, sd = mean_and_sd(values)
    distance = _distance(mean, wanted)
    for count in range(2, MOST_SEEDS + 1):
        half = stdtrit(count - 1, 1 - level / 2) * sd / math.sqrt(count)
        if half < distance:
            return count
    return None


def holm(p_values: Mapping[str, float], level: float) -> dict[str, tuple[float, bool, float]]:
    """Holm's procedure: of each claim the level it is judged at, whether it passes, adjusted p.

    After the first that fails the others are judged at that one's level.
    """
    order = sorted(p_values, key=lambda name: p_values[name])
    result, failed_at, adjusted = {}, None, 0.0
    for rank, name in enumerate(order):
        own = level / (len(order) - rank)
        adjusted = max(adjusted, min(1.0, p_values[name] * (len(order) - rank)))
        if failed_at is None and p_values[name] > own:
            failed_at = own
        result[name] = (failed_at or own, failed_at is None, adjusted)
    return result


@dataclass
class Outcome:
    """What the runs say of one test."""

    test: Test
    values: dict[int, float]  # the effect by seed
    left_out: dict[int, str] = field(default_factory=dict)  # seeds without an effect, and why
    mean: float | None = None
    interval: tuple[float, float] | None = None  # 95 %
    corrected: tuple[float, float] | None = None
    p: float = 1.0
    inside: bool = False  # the mean lies where the rule wants it
    decided: str = UNDECIDED  # by the corrected interval
    needed: int | None = None

    @property
    def says_left_out(self) -> str:
        """`seed 2: a run diverged, seeds 6 to 8: no run of bn 8x2`; "" where there are none."""
        spans: list[list[Any]] = []  # first, last, why
        for seed, why in sorted(self.left_out.items()):
            if spans and spans[-1][1:] == [seed - 1, why]:
                spans[-1][1] = seed
            else:
                spans.append([seed, seed, why])
        return _names(
            f"seed {first}: {why}" if first == last else f"seeds {first} to {last}: {why}"
            for first, last, why in spans
        )


@dataclass
class Verdict:
    """What the runs say of one claim."""

    claim: Claim
    verdict: str
    reason: str  # why undecided; "" otherwise
    outcomes: list[Outcome]
    runs: list[Run]
    missing: list[Wanted]
    p: float = 1.0
    adjusted_p: float = 1.0
    level: float = 0.05
    needed: int | None = None  # seeds that would decide
    diverged: int = 0

    @property
    def toward(self) -> bool:
        """Whether every mean lies where the rule wants it."""
        return all(outcome.inside for outcome in self.outcomes)

    @property
    def minutes(self) -> float:
        walls = (run.summary.get("wall_s") for run in self.runs)
        return math.fsum(wall for wall in walls if isinstance(wall, int | float)) / 60


def judge(ledger: Ledger, runs: Sequence[Run]) -> list[Verdict]:
    """The verdict on each claim of the ledger, in its order."""
    evidence = Evidence(ledger, runs)
    verdicts = [_weigh(claim, evidence) for claim in ledger.claims]
    corrected = holm({v.claim.id: v.p for v in verdicts}, ledger.level)
    for verdict in verdicts:
        level, passed, verdict.adjusted_p = corrected[verdict.claim.id]
        verdict.level = level if verdict.toward else level / len(verdict.outcomes)
        one_more = verdict.level / (verdict.claim.factor + 1)
        verdict.level /= verdict.claim.factor
        for outcome in verdict.outcomes:
            _correct(outcome, verdict.level, one_more)
        if verdict.reason:
            continue
        if passed:
            verdict.verdict = HELD if verdict.toward else NOT_HELD
            continue
        verdict.reason = "the interval holds a border of the rule"
        if verdict.claim.is_spent:
            verdict.reason += f", and it was judged {MOST_LOOKS} times, the most"
            continue
        if not verdict.toward:  # one test that is decided decides
            against = [o.needed for o in verdict.outcomes if not o.inside]
            verdict.needed = min((n for n in against if n), default=None)
        elif all(outcome.needed for outcome in verdict.outcomes):
            verdict.needed = max(outcome.needed or 0 for outcome in verdict.outcomes)
    return verdicts


def _weigh(claim: Claim, evidence: Evidence) -> Verdict:
    """Effects and p-value of one claim, without the correction."""
    design = evidence.ledger.design_of(claim)
    if not design.made:
        outcomes = [Outcome(test, {}) for test in claim.tests]
        return Verdict(claim, UNDECIDED, "no design yet", outcomes, [], [])
    cells = evidence.counted(claim)
    runs = [run for seeds in cells.values() for found in seeds.values() for run in found]
    missing = evidence.wanted(claim)
    outcomes = [_outcome(test, cells, claim.looked_at) for test in claim.tests]
    verdict = Verdict(claim, UNDECIDED, "", outcomes, runs, missing)
    verdict.diverged = sum(run.diverged for run in runs)
    total = len(claim.cells) * len(design.seeds)
    confirmatory = sum(not wanted.search and wanted.design is design for wanted in missing)
    twice = [f"{name} {setting} seed {seed}"
             for (name, setting), seeds in cells.items()
             for seed, found in seeds.items() if len(found) > 1]  # fmt: skip
    unlike = _unlike(claim, design, cells)
    if faults := evidence.faults(claim):
        verdict.reason = f"refused: {'; '.join(faults)}"
    elif twice:
        verdict.reason = f"refused: more than one record of {_names(twice)}"
    elif unlike:
        verdict.reason = f"refused: unlike runs, {unlike}"
    elif not any(
        design.search is None or run.seed != design.search.seed  # a search shows nothing yet
        for name, _ in claim.cells
        for run in evidence.of_arm(design, design.arms[name])
    ):
        verdict.reason = "no runs yet"
    elif design.record and any(set(found) != set(design.seeds) for found in cells.values()):
        verdict.reason = f"missing: seeds of {design.record}"
    elif missing:
        searches = sum(wanted.search for wanted in missing)
        parts = [f"{confirmatory} of {total} runs"] if confirmatory else []
        parts += [f"{searches} of its lr searches"] if searches else []
        verdict.reason = f"missing: {' and '.join(parts)}"
    elif short := [o for o in outcomes if len(o.values) < 2]:
        reasons = dict.fromkeys(short[0].left_out.values())
        verdict.reason = f"{short[0].test.effect}: fewer than two seeds ({_names(reasons)})"
    if verdict.reason:
        return verdict
    if verdict.toward:
        verdict.p = max(outcome.p for outcome in outcomes)
    else:
        verdict.p = len(outcomes) * min(o.p for o in outcomes if not o.inside)
    verdict.p = min(1.0, verdict.p * claim.factor)
    return verdict


def _outcome(
    test: Test, cells: Mapping[tuple, Mapping[int, list[Run]]], looked_at: Iterable[int] = ()
) -> Outcome:
    """A test's effect in every seed with a run of each term; looked_at: seeds it should have."""
    needed = list(dict.fromkeys((term.arm, term.setting) for term in test.terms))
    outcome = Outcome(test, {})
    for seed in sorted(set(looked_at).union(*(cells[cell] for cell in needed))):
        lacking = [cell for cell in needed if seed not in cells[cell]]
        if lacking:
            names = (" ".join(filter(None, cell)) for cell in lacking)
            outcome.left_out[seed] = f"no run of {_names(names)}"
            continue
        if any(len(cells[cell][seed]) > 1 for cell in needed):
            continue
        runs = {cell: cells[cell][seed][0] for cell in needed}
        value = effect_of(test, runs)
        if value is not None:
            outcome.values[seed] = value
        elif any(run.diverged for run in runs.values()):
            outcome.left_out[seed] = "a run diverged"
        else:
            outcome.left_out[seed] = "a figure is not recorded"
    values = list(outcome.values.values())
    if values:
        outcome.mean = mean_and_sd(values)[0]
    if len(values) >= 2:
        outcome.interval = t_interval(values)
        outcome.p, outcome.inside = p_value(values, test.wanted)
    return outcome


def _correct(outcome: Outcome, level: float, next_level: float) -> None:
    """The interval at the claim's corrected level, what it decides; what the next look needs."""
    values = list(outcome.values.values())
    if len(values) < 2:
        return
    outcome.corrected = t_interval(values, level)
    if outcome.p <= level:
        outcome.decided = HELD if outcome.inside else NOT_HELD
    outcome.needed = seeds_needed(values, outcome.test.wanted, next_level)


def _unlike(claim: Claim, design: Design, cells: Mapping[tuple, Mapping[int, list[Run]]]) -> str:
    """What the recipes of a claim's runs differ in that its arms do not name; "" if nothing."""
    arms = [design.arms[name] for name, _ in claim.cells]
    in_cells = [[run for found in seeds.values() for run in found] for seeds in cells.values()]
    every = [run for runs in in_cells for run in runs]
    found = {}
    for runs, one_cell in [*((runs, True) for runs in in_cells), (every, False)]:
        allowed = _free(design, arms, runs)
        if one_cell:
            allowed &= {"epochs", "steps"}
        if runs:
            unlike = differences(runs, one_cell)
            found |= {key: values for key, values in unlike.items() if key not in allowed}
    return describe_differences(found)

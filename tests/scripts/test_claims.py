"""results/claims.yaml, scripts/common/claims.py and scripts/run_claims.py."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import claim_records
import pytest
import yaml
from common import claims
from common.records import Run, load_paper, load_roots, load_runs
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
LEDGER = claims.load_ledger()
DESIGN = LEDGER.designs["cifar10_16px"]
EIGHT = ("8x32", "8x16", "8x8", "8x4", "8x2")


def small(*tests, **fields):
    """A ledger of one claim per test, on the real design but without its lr search."""
    design = dataclasses.replace(DESIGN, search=None)
    made = tuple(
        claims.Claim(f"T{number}", "", "", number, design.name, (), (test,))
        for number, test in enumerate(tests, 1)
    )
    changed = {"claims": made, "designs": {design.name: design}} | fields
    return dataclasses.replace(LEDGER, **changed)


def the_test(effect="bn 8x32 - bn 8x2", rule="difference", margin=0.0, of="top1"):
    return claims.Test(effect, claims.parse_effect(effect, of), rule, margin, "", None, "")


def write(root, arm, setting, seed, **options):
    return claim_records.write(root, DESIGN, DESIGN.arms[arm], setting, seed, **options)


def write_pairs(root, differences, start=1):
    """bn at (8,32) and (8,2) for each seed, with these differences in top-1."""
    for seed, difference in enumerate(differences, start):
        write(root, "bn", "8x32", seed, top1=60.0 + difference)
        write(root, "bn", "8x2", seed, top1=60.0)


# --- the ledger


def test_every_claim_of_the_list_stands_in_the_ledger():
    ids = {claim.id.split("-")[0] for claim in LEDGER.claims}
    assert ids >= {f"C{number}" for number in range(1, 18)}
    assert DESIGN.seeds == (1, 2, 3, 4, 5) and DESIGN.search.seed == 0


def test_paper_differences_are_those_of_the_papers_figures():
    """Every classification effect is worked out anew from paper.yaml."""
    paper, checked = load_paper(), 0
    table = paper["table_4_1"]
    top1 = {norm: dict(zip(table["settings"], row)) for norm, row in table["top1"].items()}
    for setting, row in paper["text_imagenet"]["top1"].items():
        for norm, value in row.items():
            top1.setdefault(norm, {})[setting] = value
    blocks = paper["fig_3"]["weights"]
    ours = dict(zip(("stem", "layer1", "layer2", "layer3"), ("1", "2", "3", "5")))

    def published(term):
        arm = {"sn_in_ln": "sn", "sn_x10": "sn"}.get(term.arm, term.arm)
        name, _, block = term.figure.partition(".")
        if name == "top1":
            return top1[arm][term.setting]
        statistic, kind = name.split("_")[:2]
        if kind == "weight":
            return paper["fig_2"]["weights"][term.setting][statistic]
        chosen = [f"block_{ours[block]}"] if block else list(blocks[term.setting])
        weights = [blocks[term.setting][b][kind][statistic] for b in chosen]
        return sum(weights) / len(weights)

    for claim in LEDGER.claims:
        for test in claim.tests:
            if claim.design != DESIGN.name or test.paper is None:
                continue
            value = sum(term.weight * published(term) for term in test.terms)
            assert value == pytest.approx(test.paper, abs=0.0006 if abs(value) < 1 else 0.005), test
            checked += 1
    assert checked > 40


def test_marks_are_those_of_the_papers_inconsistencies():
    kinds = {"borrowed", "suspect", "conflict", "unstated", "wording"}
    assert {mark["kind"] for mark in LEDGER.marks.values()} <= kinds
    used = {mark for claim in LEDGER.claims for mark in claim.marks}
    assert used == set(LEDGER.marks)
    borrowed = load_paper()["table_4_1"]["borrowed"]
    for claim in LEDGER.claims:
        terms = [t for test in claim.tests for t in test.terms if t.figure == "top1"]
        if claim.design == DESIGN.name and any(
            t.arm in borrowed["norms"] and t.setting in borrowed["settings"] and test.paper
            for test in claim.tests
            for t in terms
        ):
            assert "baselines-borrowed" in claim.marks, claim.id


def test_slope_is_the_least_squares_slope_per_doubling():
    terms = claims.parse_effect(f"slope(bn {' '.join(EIGHT)}) - slope(sn 8x8 8x2)", "top1")
    values = [76.4, 76.3, 75.2, 72.7, 65.3]
    figures = {("bn", s): v for s, v in zip(EIGHT, values)} | {("sn", "8x8"): 7, ("sn", "8x2"): 4}
    effect = sum(t.weight * figures[t.arm, t.setting] for t in terms)
    expected = stats.linregress([5, 4, 3, 2, 1], values).slope - (7 - 4) / 2
    assert effect == pytest.approx(expected)


def test_terms_of_an_effect():
    terms = claims.parse_effect("-sn 8x2 bn_var_weight.stem + sn 8x2", "top1")
    expected = [(-1, "sn", "8x2", "bn_var_weight.stem"), (1, "sn", "8x2", "top1")]
    assert [dataclasses.astuple(term) for term in terms] == expected
    assert claims.parse_effect("sn - ln", "top1")[1] == claims.Term(-1, "ln", None, "top1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["claims"][0].pop("source"), "claim C1: `source` is missing"),
        (lambda d: d["claims"][0].update(worht=1), "claim C1: unknown key 'worht'"),
        (lambda d: d["claims"][1].update(id="C1"), "claim C1 stands there twice"),
        (lambda d: d["claims"][0].update(design="x"), "claim C1: unknown design 'x'; there are"),
        (lambda d: d["claims"][0].update(marks=["x"]), "claim C1: unknown mark 'x'"),
        (
            lambda d: d["claims"][0]["tests"][1].update(effect="bm 8x32 - bn 8x2"),
            "claim C1, test 2: unknown arm 'bm'; cifar10_16px has bn, gn",
        ),
        (
            lambda d: d["claims"][0]["tests"][0].update(effect="bn 8x32 bn 8x2"),
            "claim C1, test 1: effect 'bn 8x32 bn 8x2' not understood at '8x2'",
        ),
        (
            lambda d: d["claims"][0]["tests"][0].update(effect="bn 8x32 + bn 8x2"),
            "claim C1, test 1: 'bn 8x32 + bn 8x2' is no difference: weights add to 2",
        ),
        (
            lambda d: d["claims"][0]["tests"][0].update(of="top2"),
            "claim C1, test 1: unknown figure 'top2'",
        ),
        (
            lambda d: d["claims"][0]["tests"][0].update(rule="equivalence"),
            "claim C1, test 1: rule 'equivalence' needs a margin above 0",
        ),
        (
            lambda d: d["claims"][0]["tests"][0].update(effect="bn 4x4 - bn 8x2"),
            "claim C1, test 1: setting '4x4' of bn has no minutes",
        ),
        (lambda d: d["claims"][0]["tests"][0].pop("paper"), "claim C1, test 1: no `paper`"),
        (
            lambda d: d["designs"]["cifar10_16px"].update(seeds=[0, 1]),
            "design cifar10_16px: the search's seed 0 is a confirmatory one",
        ),
        (
            lambda d: d["designs"]["cifar10_16px"]["facts"].pop("gates"),
            "design cifar10_16px, arm bilevel: 'gates' is not among the design's facts",
        ),
        (lambda d: d["judging"].update(level=5), "judging: level 5 is not 0 to 1"),
        (lambda d: d["claims"][0].update(looks=[7, 5]), "claim C1: looks [7, 5] are not numbers"),
        (lambda d: d["claims"][0].update(looks=[1, 5]), "claim C1: looks [1, 5] are not numbers"),
        (lambda d: d["claims"][0].update(looks=["5"]), "claim C1: looks ['5'] are not numbers"),
        (
            lambda d: d["claims"][0].update(looks=[5] * 7),
            "claim C1: judged 7 times; 6 are the most",
        ),
        (lambda d: d.pop("figures"), "the file: `figures` is missing"),
    ],
)
def test_a_wrong_ledger_is_one_line(tmp_path, change, message):
    data = yaml.safe_load(claims.LEDGER.read_text())
    change(data)
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(claims.LedgerError) as error:
        claims.load_ledger(path)
    assert str(error.value).startswith(f"claims.yaml: {message}")
    assert "\n" not in str(error.value)


def test_a_ledger_that_is_no_yaml_is_one_line(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text("a: [1,\nb: 2")
    with pytest.raises(claims.LedgerError) as error:
        claims.load_ledger(path)
    assert "\n" not in str(error.value)


# --- statistics


def test_interval_by_hand():
    """Mean 3, deviation sqrt(2.5), t(0.975, 4) = 2.7764 from the tables."""
    low, high = claims.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=1e-4)


def test_interval_and_p_value_are_those_of_scipys_t_tests():
    chance = random.Random(1)
    first = [chance.gauss(1, 1) for _ in range(7)]
    second = [chance.gauss(0, 1) for _ in range(7)]
    values = [a - b for a, b in zip(first, second)]
    peer = stats.ttest_rel(first, second)
    p, inside = claims.p_value(values, (0, math.inf))
    assert p == pytest.approx(peer.pvalue) and inside == (sum(values) > 0)
    for level in (0.05, 0.002):
        interval = peer.confidence_interval(1 - level)
        assert claims.t_interval(values, level) == pytest.approx(tuple(interval))


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.9, 1.7, -2.5])
def test_p_value_is_the_level_at_which_the_interval_touches_the_border(shift):
    values = [shift + x for x in (-0.3, 0.1, 0.4, -0.2, 0.05)]
    wanted = (-1.0, 1.0)
    p, inside = claims.p_value(values, wanted)
    low, high = claims.t_interval(values, p)
    borders = [low - wanted[0], high - wanted[1], high - wanted[0], low - wanted[1]]
    assert min(abs(gap) for gap in borders) == pytest.approx(0, abs=1e-9)
    assert inside == (abs(shift + 0.01) < 1)
    if inside:  # two one-sided tests, each at half the level
        sides = [
            stats.ttest_1samp(values, -1, alternative="greater").pvalue,
            stats.ttest_1samp(values, 1, alternative="less").pvalue,
        ]
        assert p == pytest.approx(2 * max(sides))


def test_holm_by_hand():
    """0.01 passes 0.05/4, 0.015 passes 0.05/3, 0.03 fails 0.05/2, so does 0.04 then."""
    found = claims.holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.015}, 0.05)
    assert {name: passed for name, (_, passed, _) in found.items()} == {
        "a": False, "b": True, "c": False, "d": True}  # fmt: skip
    assert [found[name][0] for name in "bdca"] == pytest.approx([0.0125, 0.05 / 3, 0.025, 0.025])
    assert [found[name][2] for name in "bdca"] == pytest.approx([0.04, 0.045, 0.06, 0.06])


def test_seeds_needed_decides_and_one_less_does_not():
    values = [0.2, -0.3, 1.1, 0.4, 0.6]
    needed = claims.seeds_needed(values, (0, math.inf), 0.05)
    mean, sd = stats.tmean(values), stats.tstd(values)

    def half(n):
        return stats.t.ppf(0.975, n - 1) * sd / math.sqrt(n)

    assert half(needed) < mean <= half(needed - 1)
    assert claims.seeds_needed([1.0, -1.0, 0.001], (0, math.inf), 0.05) is None


# --- verdicts


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([4.0, 5.0, 4.5, 5.5, 5.0], "held"),
        ([-4.0, -5.0, -4.5, -5.5, -5.0], "not held"),
        ([4.0, -3.0, 2.0, -1.0, 0.5], "undecided"),
    ],
)
def test_a_difference(tmp_path, differences, verdict):
    write_pairs(tmp_path, differences)
    [found] = claims.judge(small(the_test()), load_runs(tmp_path))
    assert found.verdict == verdict
    outcome = found.outcomes[0]
    assert outcome.values == pytest.approx(dict(enumerate(differences, 1)))
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert outcome.interval == pytest.approx(tuple(interval))
    assert (found.needed is not None and found.needed > 5) == (verdict == "undecided")


@pytest.mark.parametrize(
    ("rule", "margin", "mean", "verdict"),
    [
        ("equivalence", 1.0, 0.1, "held"),
        ("equivalence", 1.0, 3.0, "not held"),
        ("equivalence", 1.0, 0.9, "undecided"),
        ("not worse", 1.0, -0.2, "held"),
        ("not worse", 1.0, -2.0, "not held"),
        ("difference", 1.0, 0.5, "not held"),
        ("difference", 1.0, 2.0, "held"),
    ],
)
def test_rules_and_margins(tmp_path, rule, margin, mean, verdict):
    write_pairs(tmp_path, [mean + x for x in (-0.2, 0.1, 0.2, -0.1, 0.0)])
    [found] = claims.judge(small(the_test(rule=rule, margin=margin)), load_runs(tmp_path))
    assert found.verdict == verdict


def test_every_look_counts(tmp_path):
    """p is about 0.02: enough at the first look, too much at the third."""
    differences = [0.4, 1.6, 0.3, 1.0, 1.2]
    write_pairs(tmp_path, differences)
    runs, p = load_runs(tmp_path), stats.ttest_1samp(differences, 0).pvalue
    assert 0.05 / 3 < p < 0.05 / 2
    for looks, verdict in (((), "held"), ((3, 5), "held"), ((3, 4, 5), "undecided")):
        ledger = small(the_test())
        claim = dataclasses.replace(ledger.claims[0], looks=looks)
        [found] = claims.judge(dataclasses.replace(ledger, claims=(claim,)), runs)
        assert found.verdict == verdict and found.p == pytest.approx(max(1, len(looks)) * p)
        level = 0.05 / max(1, len(looks))
        interval = stats.ttest_1samp(differences, 0).confidence_interval(1 - level)
        assert found.outcomes[0].corrected == pytest.approx(tuple(interval))
        assert (interval[0] > 0) == (verdict == "held")
    assert found.needed == claims.seeds_needed(differences, (0, math.inf), 0.05 / 4) > 5


def test_seeds_count_from_the_next_look_on(tmp_path):
    """Seeds 6 to 8, made for another claim, count when the ledger says that it is judged again."""
    differences = [0.4, 1.6, 0.3, 1.0, 1.2, 5.0, 6.0, 7.0]
    write_pairs(tmp_path, differences)
    ledger, runs = small(the_test()), load_runs(tmp_path)
    for looks, count in (((), 5), ((5, 7), 7), ((5, 7, 7), 7), ((5, 9), 8)):
        claim = dataclasses.replace(ledger.claims[0], looks=looks)
        [found] = claims.judge(dataclasses.replace(ledger, claims=(claim,)), runs)
        values = list(found.outcomes[0].values.values())
        assert values == pytest.approx(differences[:count]) and len(found.runs) == 2 * count
        p = stats.ttest_1samp(differences[:count], 0).pvalue
        assert found.p == pytest.approx(min(1, max(1, len(looks)) * p))


def test_seeds_below_the_first_count_for_no_look(tmp_path):
    write_pairs(tmp_path, [9.0, 4.0, 5.0, 4.5, 5.5], start=0)
    claim = dataclasses.replace(small(the_test()).claims[0], looks=(3, 4))
    [found] = claims.judge(small(the_test(), claims=(claim,)), load_runs(tmp_path))
    assert sorted(found.outcomes[0].values) == [1, 2, 3, 4]


def test_what_decides_is_what_every_test_needs_at_the_next_look(tmp_path):
    """The first test is decided by five seeds at this look, but needs more of them at the next."""
    first, second = [0.4, 1.6, 0.3, 1.0, 1.2], [0.5, -0.2, 0.4, 0.6, 0.1]
    for seed, (a, b) in enumerate(zip(first, second), 1):
        write(tmp_path, "bn", "8x32", seed, top1=60.0 + a)
        write(tmp_path, "bn", "8x8", seed, top1=60.0 + b)
        write(tmp_path, "bn", "8x2", seed, top1=60.0)
    tests = (the_test(), the_test("bn 8x8 - bn 8x2"))
    ledger = small(*tests)
    claim = dataclasses.replace(ledger.claims[0], tests=tests)
    [found] = claims.judge(dataclasses.replace(ledger, claims=(claim,)), load_runs(tmp_path))
    assert [o.decided for o in found.outcomes] == ["held", "undecided"]
    each = [claims.seeds_needed(v, (0, math.inf), 0.05 / 2) for v in (first, second)]
    assert found.needed == max(each) and [o.needed for o in found.outcomes] == each


def test_seeds_of_the_last_look_that_lack_a_run_are_named(tmp_path):
    write_pairs(tmp_path, [4.0, 5.0, 4.5, 5.5, 5.0, 4.8, 5.2])
    for seed in (6, 7):
        shutil.rmtree(tmp_path / f"imagenet/cifar10_resnet8/bn_8x2/seed{seed}")
    ledger, runs = small(the_test()), load_runs(tmp_path)
    claim = dataclasses.replace(ledger.claims[0], looks=(5, 8))
    [found] = claims.judge(dataclasses.replace(ledger, claims=(claim,)), runs)
    assert sorted(found.outcomes[0].values) == [1, 2, 3, 4, 5]
    said = "seeds 6 to 7: no run of bn 8x2, seed 8: no run of bn 8x32, bn 8x2"
    assert found.outcomes[0].says_left_out == said
    [found] = claims.judge(ledger, runs)  # judged once: seeds 6 to 8 are none of its
    assert found.outcomes[0].says_left_out == ""


def test_the_sixth_look_is_the_last(tmp_path):
    write_pairs(tmp_path, [0.4, 1.6, 0.3, 1.0, -1.2])
    ledger, runs = small(the_test()), load_runs(tmp_path)
    for looks in ((3, 4, 5, 5, 5), (2, 3, 4, 5, 5, 5)):
        claim = dataclasses.replace(ledger.claims[0], looks=looks)
        [found] = claims.judge(dataclasses.replace(ledger, claims=(claim,)), runs)
        assert found.verdict == "undecided" and (found.needed is None) == (len(looks) == 6)
    assert found.reason.endswith("it was judged 6 times, the most")


def test_the_number_of_claims_corrects(tmp_path):
    """p is about 0.02: enough for one claim, too much for the first of ten."""
    write_pairs(tmp_path, [0.4, 1.6, 0.3, 1.0, 1.2])
    runs, test = load_runs(tmp_path), the_test()
    [alone] = claims.judge(small(test), runs)
    others = [the_test("gn 8x32 - gn 8x2")] * 9
    among = claims.judge(small(test, *others), runs)[0]
    assert 0.005 < alone.p < 0.05 and alone.verdict == "held"
    assert among.verdict == "undecided" and among.level == pytest.approx(0.005)
    assert among.outcomes[0].interval == alone.outcomes[0].interval
    assert among.outcomes[0].corrected[0] < 0 < alone.outcomes[0].corrected[0]


def test_a_claim_holds_only_with_all_its_tests(tmp_path):
    write_pairs(tmp_path, [4.0, 5.0, 4.5, 5.5, 5.0])
    tests = (the_test(), the_test("bn 8x2 - bn 8x32"))
    claim = claims.Claim("T", "", "", 1, DESIGN.name, (), tests)
    [found] = claims.judge(small(claims=(claim,)), load_runs(tmp_path))
    assert found.verdict == "not held" and found.level == pytest.approx(0.05 / 2)
    assert [outcome.decided for outcome in found.outcomes] == ["held", "not held"]
    one = claims.p_value(list(found.outcomes[1].values.values()), (0, math.inf))[0]
    assert found.p == pytest.approx(2 * one)


def test_missing_runs_leave_a_claim_undecided(tmp_path):
    write_pairs(tmp_path, [4.0, 5.0, 4.5, 5.5, 5.0])
    for path in (tmp_path / "imagenet/cifar10_resnet8/bn_8x2/seed3").iterdir():
        path.unlink()
    [found] = claims.judge(small(the_test()), load_runs(tmp_path))
    assert (found.verdict, found.reason, found.p) == ("undecided", "missing: 1 of 10 runs", 1.0)
    assert [wanted.name for wanted in found.missing] == ["bn_8x2/seed3"]
    assert sorted(found.outcomes[0].values) == [1, 2, 4, 5]
    [found] = claims.judge(small(the_test()), [])
    assert found.reason == "no runs yet" and len(found.missing) == 10


def test_a_diverged_run_is_as_good_as_a_guess(tmp_path):
    for seed in DESIGN.seeds:
        write(tmp_path, "bn", "8x32", seed, top1=60.0 + seed / 10, steps=250)
        end = {"status": "diverged", "steps": 36} if seed == 2 else {"steps": 250}
        write(tmp_path, "bn", "8x2", seed, **end)
    [found] = claims.judge(small(the_test()), load_runs(tmp_path))
    assert found.outcomes[0].values[2] == pytest.approx(60.2 - 10)
    assert found.diverged == 1 and not found.missing and "refused" not in found.reason
    gap = the_test(of="gap")
    [found] = claims.judge(small(gap), load_runs(tmp_path))
    assert found.outcomes[0].left_out[2] == "a run diverged"
    diverged = next(run for run in load_runs(tmp_path) if run.diverged)
    found = [claims.figure(diverged, name) for name in ("box_ap", "mask_ap", "bn_weight")]
    assert found == [0.0, 0.0, None]


def test_two_records_of_one_run_are_refused(tmp_path):
    write_pairs(tmp_path / "a", [4.0, 5.0, 4.5, 5.5, 5.0])
    write(tmp_path / "b", "bn", "8x2", 4, top1=50.0)
    [found] = claims.judge(small(the_test()), load_runs(tmp_path))
    assert found.verdict == "undecided"
    assert found.reason == "refused: more than one record of bn 8x2 seed 4"


@pytest.mark.parametrize(
    "change", [{"config": {"norm.momentum": 0.5}}, {"config": {"optimizer.momentum": 0.5}}]
)
def test_unlike_runs_are_refused(tmp_path, change):
    for seed in DESIGN.seeds:
        write(tmp_path, "bn", "8x32", seed, **(change if seed == 2 else {}))
        write(tmp_path, "bn", "8x2", seed, top1=50.0 + seed)
    [found] = claims.judge(small(the_test()), load_runs(tmp_path))
    key = next(iter(change["config"])).split(".")[1]
    assert found.verdict == "undecided" and found.reason.startswith("refused: unlike runs")
    assert key in found.reason


def test_a_norms_options_may_not_differ_from_setting_to_setting(tmp_path):
    """Every run at (8,2) has another moving average than every run at (8,32)."""
    for seed in DESIGN.seeds:
        write(tmp_path, "sn", "8x32", seed, top1=60.0 + seed / 10, config={"norm.momentum": 0.1})
        write(tmp_path, "sn", "8x2", seed, top1=50.0, config={"norm.momentum": 0.003})
    [found] = claims.judge(small(the_test("sn 8x32 - sn 8x2")), load_runs(tmp_path))
    assert found.verdict == "undecided"
    assert found.reason == "refused: unlike runs, norm.momentum: 0.003 / 0.1"


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"data.image_size": 32}},
        {"config": {"schedule.epochs": 5}},
        {"config": {"optimizer.gate_lr_factor": 10}},
        {"config": {"gates": "bilevel"}},
        {"model": "resnet20"},
        {"norm": "sync_bn"},
    ],
)
def test_runs_of_another_design_do_not_count(tmp_path, change):
    write_pairs(tmp_path, [4.0, 5.0, 4.5, 5.5])
    write(tmp_path, "bn", "8x32", 5)
    write(tmp_path, "bn", "8x2", 5, **change)
    [found] = claims.judge(small(the_test()), load_runs(tmp_path))
    assert [wanted.name for wanted in found.missing] == ["bn_8x2/seed5"]


def test_a_users_own_study_does_not_count(tmp_path, monkeypatch):
    """Own names, and own recipes under a name of the campaign's: not counted, but said."""
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    write_pairs(tmp_path / "results", [4.0, 5.0, 4.5, 5.5, 5.0])
    other = {"optimizer.weight_decay": 5e-4}
    write(tmp_path / "outputs", "bn", "8x2", 1, run_name="bn_8x2_wd", config=other)
    write(tmp_path / "outputs", "bn", "8x2", 7, run_name="bn_8x2_again")
    write(tmp_path / "outputs", "bn", "8x2", 6, config=other)
    write(tmp_path / "outputs", "bn", "8x32", 6)
    runs = load_roots([tmp_path / "results", tmp_path / "outputs"])
    ledger = small(the_test())
    evidence = claims.Evidence(ledger, runs)
    assert list(evidence.cell(ledger.designs[DESIGN.name], "bn", "8x2")) == [1, 2, 3, 4, 5]
    wanted = evidence.wanted(ledger.claims[0], [1, 6, 7])
    assert [one.name for one in wanted] == ["bn_8x2/seed6", "bn_8x32/seed7", "bn_8x2/seed7"]
    assert evidence.says_ignored().startswith("3 runs are like a claim's but of another name")
    [found] = claims.judge(ledger, runs)
    assert found.verdict == "held" and not found.missing


def test_every_record_that_is_kept_counts():
    evidence = claims.Evidence(LEDGER, load_runs(ROOT / "results", task=None))
    assert evidence.ignored() == [] and len(evidence.of_designs()) > 900


def test_every_arms_run_is_found_by_its_recorded_facts(tmp_path):
    for number, arm in enumerate(DESIGN.arms):
        write(tmp_path, arm, "8x8", 1, lr=0.1 + number)
    runs = load_runs(tmp_path)
    alike = {"sn_with_bn": "sn"}  # the same but for the setting it is used at
    for name, arm in DESIGN.arms.items():
        found = {run.path.parent.name for run in runs if claims.is_arm(run, DESIGN, arm)}
        same = {name, alike.get(name, name)} | {k for k, v in alike.items() if v == name}
        assert found == {f"{other}_8x8" for other in same}


@pytest.mark.skipif(
    not (CONFIGS / "experiment" / f"{DESIGN.experiment}.yaml").is_file(),
    reason="the design's experiment is not there",
)
def test_every_arms_command_makes_the_run_the_ledger_looks_for():
    from workers import config as typed_config

    from sn.training.run.config import recorded

    cells = {claim_cell for claim in LEDGER.claims if claim.design == DESIGN.name
             for claim_cell in claim.cells}  # fmt: skip
    for name, arm in DESIGN.arms.items():
        setting = next(setting for other, setting in sorted(cells) if other == name)
        wanted = claims.Wanted(DESIGN, arm, setting, 3, 0.2)
        typed = typed_config(*wanted.arguments[1:])
        config = recorded(typed)
        assert typed.output_dir == f"outputs/imagenet/cifar10_resnet8/{name}_{setting}/seed3"
        summary = {"task": "imagenet", "norm": config["norm"]["name"], "model": "resnet8"}
        summary["data"] = {key: config["data"][key] for key in ("name", "train_images")}
        summary["data"]["classes"] = 10
        run = Run(Path(), summary, config)
        assert claims.is_arm(run, DESIGN, arm), name
        assert claims.fact(run, DESIGN.search.key) == 0.2


@pytest.mark.parametrize("name", [n for n, d in LEDGER.designs.items() if d.experiment])
def test_every_design_takes_the_overrides_of_the_readme(name):
    """`-- data.root=data data.download=true` for all claims: no design's entrypoint refuses it."""
    from run_claims import Campaign
    from workers import config as typed_config

    design = LEDGER.designs[name]
    arm = next(iter(design.arms.values()))
    wanted = claims.Wanted(design, arm, next(iter(design.minutes)), 1, None)
    given = ["data.root=data", "data.download=true"]
    given += [f"{key}=there" for key in design.takes if key != "data.root"]
    campaign = Campaign(LEDGER, [], None, Path("outputs"), 1, given)
    campaign.checkpoint = lambda first: Path("checkpoint.pt")
    options = [option for option in campaign.command(wanted)[2:] if "=" in option]
    typed = typed_config(*options, root=design.task)
    assert getattr(getattr(typed, "data", None), "download", None) == (
        True if "data.download" in design.keys else None
    )


# --- the search of the lr


def write_search(root, arm, scores):
    """scores: lr -> top-1 at each setting of the search."""
    for lr, tops in scores.items():
        for setting, top1 in zip(DESIGN.search.settings, tops):
            name = f"{arm}_{setting}_lr{lr:g}"
            status = {"status": "diverged"} if top1 is None else {"top1": top1}
            write(root, arm, setting, 0, lr=lr, run_name=name, **status)


def test_the_search_takes_the_best_mean_and_of_equals_the_smaller_lr(tmp_path):
    write_search(tmp_path, "bn", {0.2: (60, 50), 0.4: (58, 53), 0.8: (61, 50)})
    write_search(tmp_path, "gn", {0.2: (60, 50), 0.4: (61, 49), 0.8: (90, None)})
    evidence = claims.Evidence(LEDGER, load_runs(tmp_path))
    bn, gn = (evidence.choice(DESIGN, DESIGN.arms[name]) for name in ("bn", "gn"))
    assert (bn.lr, bn.scores) == (0.4, {0.2: 55, 0.4: 55.5, 0.8: 55.5})
    assert (gn.lr, gn.scores) == (0.2, {0.2: 55, 0.4: 55, 0.8: 50})  # diverged: 10 % at (8,2)


def test_without_its_whole_search_no_run_counts(tmp_path):
    write_search(tmp_path, "sn", {0.2: (60, 50), 0.4: (61, 50)})
    write(tmp_path, "sn", "8x32", 1)
    evidence = claims.Evidence(LEDGER, load_runs(tmp_path))
    choice = evidence.choice(DESIGN, DESIGN.arms["bilevel"])  # SN's
    assert choice.lr is None
    assert [w.run_name for w in choice.missing] == ["sn_8x32_lr0.8", "sn_8x2_lr0.8"]
    assert evidence.cell(DESIGN, "sn", "8x32") == {}


def test_a_search_of_other_or_repeated_runs_is_refused(tmp_path):
    scores = {0.2: (60, 50), 0.4: (61, 51), 0.8: (62, 52)}
    write_search(tmp_path / "a", "bn", scores)
    own = {"run_name": "bn_8x2_wd", "config": {"optimizer.weight_decay": 5e-4}}
    write(tmp_path / "a", "bn", "8x2", 0, lr=0.4, top1=90.0, **own)
    claim = dataclasses.replace(small(the_test()).claims[0], design=DESIGN.name)
    ledger = dataclasses.replace(LEDGER, claims=(claim,))

    def judged():
        runs = load_runs(tmp_path)
        evidence = claims.Evidence(ledger, runs)
        return evidence.choice(DESIGN, DESIGN.arms["bn"]), claims.judge(ledger, runs)[0]

    choice, _ = judged()
    assert (choice.lr, choice.fault) == (0.8, "")  # the run of another name is none of the search
    folder = write(tmp_path / "b", "bn", "8x2", 0, lr=0.4, run_name="bn_8x2_lr0.4")
    choice, verdict = judged()
    assert choice.lr is None and not verdict.missing
    assert verdict.reason.startswith("refused: more than one record of imagenet/cifar10_resnet8/bn")
    shutil.rmtree(folder)
    folder = tmp_path / "a/imagenet/cifar10_resnet8/bn_8x2_lr0.4/seed0"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["optimizer"]["weight_decay"] = 5e-4
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    choice, verdict = judged()
    assert choice.lr is None and "weight_decay" in verdict.reason
    assert verdict.reason.startswith("refused: unlike runs in the lr search of bn")


def test_runs_at_another_lr_do_not_count(tmp_path):
    write_search(tmp_path, "bn", {0.2: (60, 50), 0.4: (61, 51), 0.8: (62, 52)})
    write(tmp_path, "bn", "8x32", 1, lr=0.4)
    write(tmp_path, "bn", "8x32", 2, lr=0.8)
    evidence = claims.Evidence(LEDGER, load_runs(tmp_path))
    assert list(evidence.cell(DESIGN, "bn", "8x32")) == [2]


# --- figures


def test_weights_and_gap_of_a_run(tmp_path):
    folder = write(tmp_path, "sn", "8x2", 1)
    layers = {
        "bn1": {"block": "stem", "mean": {"in": 0.2, "ln": 0.2, "bn": 0.6},
                "var": {"in": 0.5, "ln": 0.3, "bn": 0.2}},
        "layer1.0.bn1": {"block": "layer1", "mean": {"in": 0.1, "ln": 0.8, "bn": 0.1},
                         "var": {"in": 0.1, "ln": 0.6, "bn": 0.3}},
        "layer1.0.bn2": {"block": "layer1", "mean": {"in": 0.3, "ln": 0.4, "bn": 0.3},
                         "var": {"in": 0.1, "ln": 0.8, "bn": 0.1}},
    }  # fmt: skip
    claim_records.write_lines(folder, "importance.jsonl", [{"epoch": 20, "layers": layers}])
    lines = [{"epoch": n, "train/top1": 70.0 + n, "val/top1": 60.0} for n in (1, 2, 3)]
    claim_records.write_lines(folder, "metrics.jsonl", lines)
    [run] = load_runs(tmp_path)
    expected = {
        "bn_weight": (0.4 + 0.2 + 0.2) / 3,
        "ln_weight": (0.25 + 0.7 + 0.6) / 3,
        "bn_mean_weight": (0.6 + 0.2) / 2,
        "bn_var_weight": (0.2 + 0.2) / 2,
        "bn_var_weight.layer1": 0.2,
        "bn_mean_weight.stem": 0.6,
        "gap": 13.0,
    }
    assert {name: claims.figure(run, name) for name in expected} == pytest.approx(expected)


def test_validation_loss_at_equal_training_loss(tmp_path):
    """bn reaches 1.0, gn only 1.2: bn is read between its epochs 2 and 3, gn at its last."""
    curves = {"bn": [(2.0, 2.2), (1.4, 1.8), (1.0, 1.6)], "gn": [(2.0, 2.5), (1.2, 2.0)]}
    for arm, curve in curves.items():
        folder = write(tmp_path, arm, "8x32", 1)
        lines = [{"epoch": n, "train/loss": a, "val/loss": b} for n, (a, b) in enumerate(curve, 1)]
        claim_records.write_lines(folder, "metrics.jsonl", lines)
    runs = {(run.norm, run.setting): run for run in load_runs(tmp_path)}
    test = the_test("gn 8x32 - bn 8x32", of="val_loss_at_equal_train_loss")
    assert claims.effect_of(test, runs) == pytest.approx(2.0 - 1.7)


def test_style_loss_along_the_curve():
    """Ten points of the curve in units of instance norm's, whatever happens between them."""
    curves = {"in": lambda step: 400.0 / step, "sn": lambda step: 300.0 / step, "bn": lambda _: 8.0}
    runs = {}
    for norm, curve in curves.items():
        lines = [
            {"step": step, "train/content": 0.25 * curve(step), "train/style": 0.75 * curve(step)}
            for step in range(1, 201)
        ]
        lines[44] |= {"train/content": 1e9}  # step 45, between the points
        lines[99] |= {"train/content": None, "train/style": None}  # a skipped step
        runs[norm, None] = Run(
            Path(), {"norm": norm, "status": "finished", "steps": 200}, metrics=lines
        )
    windows = [set(range(end - 9, end + 1)) - {100} for end in range(20, 201, 20)]
    means = {
        norm: sum(sum(map(curve, window)) / len(window) for window in windows) / 10
        for norm, curve in curves.items()
    }
    test = the_test("bn - in", of="style_loss")
    assert claims.effect_of(test, runs) == pytest.approx(means["bn"] / means["in"] - 1)
    test = the_test("in - sn", of="style_loss")
    assert claims.effect_of(test, runs) == pytest.approx(0.25)
    del runs["in", None]
    assert claims.effect_of(the_test("bn - sn", of="style_loss"), runs) is None


def style_run(campaign, wanted, steps):
    """A run of C11's design as its command makes it, its loss halving along the curve."""
    from workers import config as typed_config

    from sn.training.run.config import recorded

    _, _, *options = campaign.command(wanted)
    typed = typed_config(*options, root="style_transfer")
    config = recorded(typed)
    summary = {
        **{"task": "style_transfer", "status": "finished", "norm": config["norm"]["name"]},
        **{"run": f"style_transfer/x/{typed.run_name}/seed{typed.seed}", "seed": typed.seed},
        **{"data": {"name": typed.photos.name, "train_images": 294}, "vgg": {"input": "caffe"}},
        **{"image_size": typed.photos.image_size, "batch_size": typed.schedule.batch_size},
        **{"steps": typed.schedule.steps, "lr": typed.schedule.lr, "style": config["style"]},
    }
    assert summary["steps"] == LEDGER.designs["style"].facts["steps"]
    summary["steps"] = steps  # fewer lines
    metrics = [
        {"step": step, "train/content": 1.0, "train/style": 2 - step / steps}
        for step in range(1, steps + 1)
    ]
    return typed, Run(Path(), summary, config, metrics=metrics)


def of_seed(run, seed, scale):
    """The run with another seed, its losses `scale` times as large."""
    summary = run.summary | {"seed": seed, "run": run.name.replace("seed3", f"seed{seed}")}
    metrics = [
        {key: value * (scale if key != "step" else 1) for key, value in line.items()}
        for line in run.metrics
    ]
    return dataclasses.replace(
        run, summary=summary, config=run.config | {"seed": seed}, metrics=metrics
    )


def test_style_runs_of_both_styles_are_made_and_judged_from_one_command():
    """Each arm's command makes the run the ledger looks for, with the painting of its style."""
    from run_claims import Campaign

    design = dataclasses.replace(
        LEDGER.designs["style"], facts=LEDGER.designs["style"].facts | {"steps": 40}
    )
    given = ["photos.root=/photos", "style.image=/styles/${style.name}.jpg", "data.root=/no"]
    ratios = {"bn": 1.2, "in": 1.0, "sn": 0.9, "sn_x10": 1.1}
    campaign = Campaign(LEDGER, [], None, Path("outputs"), 1, given)
    runs, of_arm = [], {}
    for name, arm in design.arms.items():
        wanted = claims.Wanted(design, arm, None, 3, None)
        typed, run = style_run(campaign, wanted, 40)
        style = "wave" if name.endswith("_wave") else "starry_night"
        assert (typed.style.name, typed.style.image) == (style, f"/styles/{style}.jpg")
        assert (typed.photos.root, typed.run_name) == ("/photos", f"style_{name}")
        assert typed.seed == run.config["seed"] == 3
        of_arm[name] = run
    for seed in design.seeds:
        for name, run in of_arm.items():
            scale = seed * ratios[name.removesuffix("_wave")] + 0.001 * seed * (name == "in")
            runs.append(of_seed(run, seed, scale))
    for name, run in of_arm.items():
        found = [arm.name for arm in design.arms.values() if claims.is_arm(run, design, arm)]
        assert found == [name]
    chosen = tuple(claim for claim in LEDGER.claims if claim.design == "style")
    assert [claim.id for claim in chosen] == ["C11", "C11-x10"]
    ledger = dataclasses.replace(LEDGER, designs={"style": design}, claims=chosen)
    plain, scaled = claims.judge(ledger, runs)
    assert (plain.verdict, scaled.verdict) == ("held", "not held")
    means = [outcome.mean for outcome in scaled.outcomes]
    expected = [1.2 / 1.001 - 1, 1 - 1.1 / 1.001, 0.2, -0.1]
    assert means == pytest.approx(expected)
    missing = claims.judge(ledger, runs[:-1])
    assert [verdict.reason for verdict in missing] == ["", "missing: 1 of 30 runs"]


# --- a whole campaign, and run_claims.py


def write_record(path, values, point=1000):
    """A record of many seeds, `values` by arm: what the column of `point` holds."""
    lines = [
        {
            **{"arm": arm, "config": {"controller": {"norm": arm}}, "points": [10, point]},
            **{"seeds": list(range(201, 201 + len(column))), "seconds": 8.0},
            "best_test": [[0.0, value] for value in column],
        }
        for arm, column in values.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_record_of_many_seeds_is_judged_seed_by_seed(tmp_path, monkeypatch):
    design = dataclasses.replace(LEDGER.designs["enas_nasbench201"], seeds=(201, 202, 203, 204))
    claim = next(claim for claim in LEDGER.claims if claim.id == "C12")
    ledger = small(designs={design.name: design}, claims=(claim,))
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    path = tmp_path / design.record
    path.parent.mkdir(parents=True)

    assert claims.judge(ledger, [])[0].reason == "no runs yet"
    sn, ln, gn = [85.0, 86.0, 85.5, 86.5], [82.1, 83.0, 82.4, 83.6], [80.0, 81.1, 80.7, 81.5]
    write_record(path, {"ln": ln, "gn": gn, "sn": sn})
    verdict = claims.judge(ledger, [])[0]
    assert verdict.verdict == "held" and verdict.minutes == pytest.approx(3 * 8 / 60)
    for outcome, other in zip(verdict.outcomes, (ln, gn)):
        test = stats.ttest_rel(sn, other)
        assert outcome.interval == pytest.approx(test.confidence_interval())
        assert outcome.p == pytest.approx(test.pvalue)

    write_record(path, {"ln": ln, "gn": gn[:2], "sn": sn})
    assert claims.judge(ledger, [])[0].reason.startswith("missing: seeds of results/")
    path.write_text(json.dumps({"arm": "ln", "points": [10]}) + "\n")
    with pytest.raises(claims.LedgerError, match=path.name):
        claims.judge(ledger, [])


def test_a_campaign_is_judged_claim_by_claim(tmp_path):
    claim_records.write_campaign(tmp_path, LEDGER)
    verdicts = {v.claim.id: v for v in claims.judge(LEDGER, load_runs(tmp_path))}
    assert not any(v.missing for v in verdicts.values() if v.claim.design == DESIGN.name)
    assert not any(v.reason.startswith("refused") for v in verdicts.values())
    for name in ("C1", "C3", "C3-x10", "C6", "C18", "C5"):
        assert verdicts[name].verdict == "held", name
    assert verdicts["C2-table"].verdict == "not held"  # GN is below SN at (8,2) in these
    assert all(LEDGER.designs[claim.design].made for claim in LEDGER.claims)


FAKE = """
import json, os, pathlib, signal, sys, time
options = dict(argument.split("=", 1) for argument in sys.argv[1:])
root = pathlib.Path(os.environ["OUT"])
with open(root / "calls.jsonl", "a") as file:
    file.write(json.dumps(options | {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}) + "\\n")
folder = root / "imagenet/fake" / options["run_name"] / f"seed{options['seed']}"
if options.get("mode") == "wait":
    def stop(*_):
        (root / f"saved_{options['seed']}").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (root / "ready").touch()
    time.sleep(60)
if options.get("mode") == "fail":
    sys.exit("no data here")
if options.get("mode") == "busy":
    print("out is in use by process 7")
    sys.exit(73)
folder.mkdir(parents=True)
lr = float(options.get("schedule.lr_per_256", 0))
start = options.get("init.path")
if start and not pathlib.Path(start[1:-1].replace("\\\\'", "'")).is_file():
    sys.exit(f"no {start}")
(folder / "checkpoint.pt").touch()
gpus, images = map(int, options["setting"].split("x"))
(folder / "config.yaml").write_text(json.dumps({"schedule": {"lr_per_256": lr}}))
(folder / "summary.json").write_text(json.dumps({
    "task": "imagenet", "norm": options.get("norm", "none"), "model": "fake", "scale": "proxy",
    "backbone": options.get("norm@parts.backbone"),
    "run": str(folder.relative_to(root)), "status": "finished", "seed": int(options["seed"]),
    "setting": {"gpus": gpus, "images_per_gpu": images}, "data": {"name": "fake"},
    "top1": 50 + images + lr, "wall_s": 6.0}))
"""


@pytest.fixture
def campaign(tmp_path):
    """Call run_claims.py on a ledger of one claim, whose runs a quick stand-in makes."""
    (tmp_path / "fake.py").write_text(FAKE)
    data = yaml.safe_load(claims.LEDGER.read_text())
    design = data["designs"]["cifar10_16px"]
    design |= {"script": str(tmp_path / "fake.py"), "facts": {"model": "fake"}, "seeds": [1, 2]}
    design["arms"] = {"bn": {"norm": "bn"}}
    design["search"]["values"] = [0.2, 0.4]
    test = {"effect": "bn 8x32 - bn 8x2", "of": "top1", "rule": "difference", "paper": None}
    claim = {"id": "T1", "claim": "BN falls", "source": "", "worth": 1, "design": "cifar10_16px"}
    data["claims"] = [claim | {"where": "", "tests": [test]}]
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(data, sort_keys=False))

    def call(*arguments, start=False, **environment):
        command = [sys.executable, str(ROOT / "scripts/run_claims.py"), "--ledger"]
        command += [str(tmp_path / "claims.yaml"), "--runs", str(tmp_path / "it's out"), *arguments]
        options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options["env"] = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
        options["env"]["OUT"] = str(call.out)
        process = subprocess.Popen(command, **options)
        if start:
            return process
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    call.out = tmp_path / "it's out"
    call.calls = lambda: [
        json.loads(line) for line in (call.out / "calls.jsonl").read_text().splitlines()
    ]
    return call


def test_run_claims_searches_the_lr_then_makes_every_run_once(campaign):
    code, out, err = campaign("--list")
    assert code == 0 and not campaign.out.exists(), err
    assert re.search(r"T1 +8 +\d:\d\d +\d:\d\d +no runs yet", out) and "8 runs" in out
    code, out, err = campaign("--jobs", "2", "--", "device=cpu", CUDA_VISIBLE_DEVICES="3,5")
    assert code == 0, out + err
    calls = campaign.calls()
    names = [(c["run_name"], c["seed"], c["schedule.lr_per_256"]) for c in calls]
    searched = [(f"bn_{s}_lr{lr}", "0", f"{lr}") for lr in (0.2, 0.4) for s in ("8x32", "8x2")]
    made = [(f"bn_{s}", seed, "0.4") for seed in "12" for s in ("8x32", "8x2")]
    assert sorted(names[:4]) == sorted(searched) and sorted(names[4:]) == sorted(made)
    assert {call["gpu"] for call in calls} == {"3", "5"}
    roots = [call["output_root"].replace("\\'", "'").strip("'") for call in calls]
    assert roots == [str(campaign.out / "lr_search")] * 4 + [str(campaign.out)] * 4
    assert all(call["device"] == "cpu" for call in calls)
    assert "8 made, 0 to go, about 0:00 h left" in out
    code, out, err = campaign("T1")
    assert code == 0 and "0 runs to make" in out and len(campaign.calls()) == 8 and not err
    made = campaign.out / "imagenet/fake/bn_8x2/seed1"
    own = shutil.copytree(made, campaign.out / "imagenet/fake/bn_8x2_mine/seed1") / "summary.json"
    own.write_text(made.joinpath("summary.json").read_text().replace("bn_8x2/", "bn_8x2_mine/"))
    code, out, err = campaign("--list")
    assert err.startswith("1 run is like a claim's but of another name") and "0 runs" in out
    for name in ("bn_8x2_lr0.2", "bn_8x2"):  # a second record of a run
        folder = campaign.out / f"imagenet/fake/{name}"
        shutil.copytree(folder, campaign.out / f"copies/{name}")
    code, out, err = campaign()
    assert code == 1 and "refused: more than one record of imagenet/fake/bn_8x2_lr0.2/seed0" in err
    assert len(campaign.calls()) == 8


def test_pretraining_comes_first_and_again_where_its_checkpoint_is_gone(campaign):
    ledger = campaign.out.parent / "claims.yaml"
    data = yaml.safe_load(ledger.read_text())
    pretraining = data["designs"]["cifar10_16px"] | {"prefix": "pre_", "prepare": "this.shows it"}
    pretraining |= {"takes": ["data.root"], "accepts": ["data.download"]}
    del pretraining["search"]
    tuned = pretraining | {
        "prefix": "tuned_",
        "takes": [],
        "accepts": [],
        "pretraining": {"design": "pre", "setting": "8x32"},
    }
    tuned |= {"facts": {}}
    tuned["arms"] = {
        "frozen": {
            "norm": "frozen_bn",
            "options": ["norm@parts.backbone=frozen_bn"],
            "facts": {"backbone": "frozen_bn"},
            "pretrained": "bn",
        },
        "sync": {
            "norm": "bn",
            "options": ["norm@parts.backbone=bn"],
            "facts": {"backbone": "bn"},
            "settings": {"8x2": "1x16"},
        },
    }
    data["designs"] = {"pre": pretraining, "tuned": tuned}
    data["claims"][0] |= {"design": "tuned"}
    data["claims"][0]["tests"][0]["effect"] = "frozen 8x2 - sync 8x2"
    ledger.write_text(yaml.safe_dump(data, sort_keys=False))

    code, out, err = campaign("--", "data.root=there", "data.download=true", "device=cpu")
    assert code == 0, out + err
    calls = campaign.calls()
    names = [(c["run_name"], c["seed"], c["setting"]) for c in calls]
    order = [("pre_bn_8x32", "8x32"), ("tuned_frozen_8x2", "8x2"), ("tuned_sync_8x2", "1x16")]
    assert names == [(name, seed, setting) for seed in "12" for name, setting in order]
    assert [c.get("data.root") for c in calls] == ["there", None, None] * 2
    assert [c.get("data.download") for c in calls] == ["true", None, None] * 2
    assert ["init.path" in c for c in calls] == [False, True, False] * 2
    assert ["norm" in c for c in calls] == [True, False, False] * 2
    log = campaign.out / "logs" / "pre_bn_8x32_seed1.log"
    assert "this" in log.read_text()  # the command to prepare was run, once
    assert "No module" not in (campaign.out / "logs" / "pre_bn_8x32_seed2.log").read_text()
    code, out, _ = campaign("--list")
    assert "0 runs" in out

    for name in ("pre_bn_8x32", "tuned_frozen_8x2"):
        shutil.rmtree(campaign.out / "imagenet/fake" / name / "seed2")
    code, out, err = campaign()
    assert code == 0, out + err
    assert [c["run_name"] for c in campaign.calls()[6:]] == ["pre_bn_8x32", "tuned_frozen_8x2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_the_script_ends(campaign, number):
    process = campaign("--", "mode=wait", start=True)
    limit = time.monotonic() + 30
    while not (campaign.out / "ready").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    code, _, err = campaign()
    assert code == 2 and "another run_claims.py works in" in err
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75 and "a signal has come" in out, out + err
    assert (campaign.out / "saved_0").exists()


def test_a_used_budget_stops_the_runs_too(campaign):
    began = time.monotonic()
    code, out, err = campaign("--budget", "0.01", "--", "mode=wait")
    assert code == 0 and "the budget is used" in out, out + err
    assert time.monotonic() - began < 50  # the run would go on for a minute


def test_runs_in_other_hands_are_skipped(campaign):
    code, out, err = campaign("--", "mode=busy")
    assert code == 73 and len(campaign.calls()) == 4  # the lr search; what follows waits for it
    assert out.count("skipped: another process has it in hand") == 4
    assert err.count("skipped: ") == err.count("in use by process 7") == 4


def test_when_the_first_runs_all_fail_the_script_gives_up(campaign):
    code, _, err = campaign("--", "mode=fail")
    assert code == 1 and len(campaign.calls()) == 3
    assert err.count("no data here") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["C99"], "unknown claim 'C99'; there are T1"),
        (["--seeds", "0-3"], "seeds begin at 1"),
        (["--seeds", "x"], "no range such as 1-10"),
        (["--jobs", "0"], "a number above 0"),
    ],
)
def test_bad_usage_is_one_message(campaign, arguments, message):
    code, _, err = campaign(*arguments)
    assert code == 2 and message in err and not campaign.out.exists()


@pytest.mark.parametrize("path", ["out", "a b/c", "it's", "back\\", "x\\'y", "${x}", "a,b=[c]"])
def test_hydra_reads_the_output_root_as_it_was_meant(path):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from run_claims import quoted

    value = OverridesParser.create().parse_override(f"output_root={quoted(path)}").value()
    assert value == path.replace("${", "\\${")  # OmegaConf takes the escape away


def test_ids_with_a_suffix_are_chosen_by_their_number():
    from run_claims import chosen

    assert [claim.id for claim in chosen(LEDGER, ["C2", "C1"])] == ["C1", "C2-text", "C2-table"]
    assert [claim.id for claim in chosen(LEDGER, ["C4"])] == ["C4"]  # not C4-x10
    worths = [claim.worth for claim in chosen(LEDGER, [])]
    assert worths == sorted(worths) and len(worths) == len(LEDGER.claims)

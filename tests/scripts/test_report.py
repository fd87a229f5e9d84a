"""scripts/report.py: the page and the table, of made-up records in a temporary folder."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean
from urllib.parse import unquote

import claim_records
import pytest
from common import claims, page, pages
from common.records import FIGURE_SETTINGS, Run, load_paper, load_runs
from report import Report, main
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
LEDGER = claims.load_ledger()
DESIGN = LEDGER.designs["cifar10_16px"]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "br", "circle", "line", "polygon", "polyline", "rect"}


class Tree(HTMLParser):
    """A page as nested (tag, attributes, children); fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.root = ("page", {}, [])
        self.open = [self.root]
        self.feed(text)
        assert len(self.open) == 1, self.open[-1][0]

    def handle_starttag(self, tag, attributes):
        node = (tag, dict(attributes), [])
        self.open[-1][2].append(node)
        if (
            tag not in VOID
            or tag in ("circle", "polygon")
            and not self.get_starttag_text().endswith("/>")
        ):
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.open[-1][2].append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.open[-1][2].append(data)


def find(node, tag=None, css=None):
    """Every node below of this tag and class."""
    for child in node[2]:
        if isinstance(child, str):
            continue
        classes = (child[1].get("class") or "").split()
        if tag in (None, child[0]) and css in (None, *classes):
            yield child
        yield from find(child, tag, css)


def words(node):
    parts = (child if isinstance(child, str) else words(child) for child in node[2])
    return " ".join(" ".join(parts).split())


def number(text):
    return float(text.replace("−", "-").replace("+", ""))


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A folder of records of a whole made-up campaign, with page and table."""
    root = tmp_path_factory.mktemp("campaign")
    claim_records.write_campaign(root, LEDGER)
    main(["--runs", str(root)])
    return root


@pytest.fixture(scope="module")
def tree(campaign):
    return Tree((campaign / "report.html").read_text()).root


@pytest.fixture(scope="module")
def verdicts(campaign):
    return {v.claim.id: v for v in claims.judge(LEDGER, load_runs(campaign))}


def test_the_top_lists_every_claim_where_it_stands(tree, verdicts):
    [cards] = find(tree, css="cards")
    listed = {}
    for section in find(cards, "section"):
        names = [words(a) for a in find(section, "a")]
        heading = words(next(find(section, "h2"))).replace(" : ", ": ")
        assert heading.split(" ", 1)[0] == str(len(names))
        listed |= dict.fromkeys(names, heading.split(" ", 1)[1])
        for name, item in zip(names, find(section, "li")):
            assert words(item).startswith(f"{name} {verdicts[name].claim.claim}")
    for name, verdict in verdicts.items():
        waits = verdict.reason in ("no runs yet", "no design yet")
        lacks = "interval too wide" if verdict.reason.startswith("the interval") else "runs missing"
        wanted = {"undecided": "not run yet" if waits else f"undecided: {lacks}"}
        assert listed.pop(name) == wanted.get(verdict.verdict, verdict.verdict)
    assert not listed


@pytest.mark.parametrize("effects", [(3.0, 3.2, -1.0), (-3.0, -3.2, 1.0)])
def test_an_undecided_claim_says_which_way_it_leans(effects, tmp_path):
    """C6's accuracies by hand: SN's less IN's, and less LN's, are to be above 0."""
    ledger = without_search("cifar10_16px")
    ledger = dataclasses.replace(ledger, claims=[c for c in ledger.claims if c.id == "C6"])
    design = ledger.designs["cifar10_16px"]
    runs = [made_up(design, "sn", seed, "8x32", top1=50.0) for seed in design.seeds]
    runs += [made_up(design, arm, seed, "8x32", top1=50.0 - effects[seed % 3])
             for arm in ("in", "ln") for seed in design.seeds]  # fmt: skip
    [verdict] = claims.judge(ledger, runs)
    assert verdict.verdict == "undecided" and verdict.needed
    way = "for" if mean(effects) > 0 else "against"
    said = f"{verdict.needed} seeds would decide, {way} it"
    report = Report(ledger, runs, load_paper(), tmp_path)
    assert said in report.markdown() and report.claim(verdict).count(said) == 1


def test_runs_that_do_not_count_are_not_among_a_claims(tmp_path):
    """Seeds 6 and 7 of SN and IN, made for another claim: said how many, not what they are."""
    ledger = without_search("cifar10_16px")
    ledger = dataclasses.replace(ledger, claims=[c for c in ledger.claims if c.id == "C6"])
    design = ledger.designs["cifar10_16px"]
    last = {"sn": 7, "in": 7, "ln": 5}
    runs = [made_up(design, arm, seed, "8x32", top1=50.0 + seed + 9 * (arm == "sn"))
            for arm in last for seed in range(1, last[arm] + 1)]  # fmt: skip
    [verdict] = claims.judge(ledger, runs)
    text = Report(ledger, runs, load_paper(), tmp_path).claim(verdict)
    assert "4 runs of other seeds" in text and "seed 5" in text and "seed 6" not in text
    looked = dataclasses.replace(verdict.claim, looks=(5, 7))
    ledger = dataclasses.replace(ledger, claims=[looked])
    [verdict] = claims.judge(ledger, runs)
    report = Report(ledger, runs, load_paper(), tmp_path)
    text = report.claim(verdict)
    assert "of other seeds" not in text and "seed 7" in text
    assert "| 5 (seeds 6 to 7: no run of ln 8x32) |" in report.markdown()


def test_commands_name_what_they_need(tree):
    commands = {words(code) for code in find(tree, "code")}
    assert "python scripts/run_claims.py C1 -- data.root=..." in commands
    assert any(re.match("python style_transfer.py .* photos.root=", c) for c in commands)
    assert "python scripts/run_claims.py C9" in commands  # draws its own digits


def test_what_all_effects_of_a_claim_share_is_said_once(tree, verdicts):
    """C2-text: the same figure, border and words of the paper ten times."""
    [claim] = (node for node in find(tree, "section", "claim") if node[1]["id"] == "C2-text")
    for once in ("held if above −1", "Section 4.1, text: at least 0", "top1;"):
        assert words(claim).count(once) == 1
    [claim] = (node for node in find(tree, "section", "claim") if node[1]["id"] == "C1")
    wheres = {outcome.test.where for outcome in verdicts["C1"].outcomes}
    assert len(wheres) == 5 and all(where in words(claim) for where in wheres)


def test_every_link_leads_somewhere_and_the_page_needs_nothing_else(campaign, tree):
    ids = {node[1]["id"] for node in find(tree) if "id" in node[1]}
    targets = [a[1]["href"] for a in find(tree, "a")]
    records = [t for t in targets if not t.startswith("#")]
    assert {t[1:] for t in targets if t.startswith("#")} <= ids
    assert len(records) > 500 and all((campaign / t).is_file() for t in set(records))
    text = (campaign / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(|\bsrc=", text)


def test_a_linked_figure_is_that_of_the_record(campaign, tree):
    [claim] = (node for node in find(tree, "section", "claim") if node[1]["id"] == "C6")
    shown = list(find(next(find(claim, "table")), "a"))
    assert len(shown) == 3 * 5
    for a in shown:
        summary = json.loads((campaign / a[1]["href"]).read_text())
        assert float(words(a)) == pytest.approx(summary["top1"], abs=0.005)


def test_effects_intervals_and_the_papers_figures_stand_in_columns_of_their_own(campaign, tree):
    """C6, anew from the summaries: SN less IN, and SN less LN, at (8,32)."""
    top1 = {}
    for path in campaign.glob("imagenet/*/*_8x32/seed*/summary.json"):
        summary = json.loads(path.read_text())
        top1[path.parts[-3].removesuffix("_8x32"), summary["seed"]] = summary["top1"]
    [claim] = (node for node in find(tree, "section", "claim") if node[1]["id"] == "C6")
    rows = [row for row in find(claim, "div", "test") if "titles" not in row[1]["class"]]
    for row, other, paper in zip(rows, ("in", "ln"), (5.3, 2.2), strict=True):
        values = [top1["sn", seed] - top1[other, seed] for seed in range(1, 6)]
        effect, ours, plot, published = (cell for cell in row[2])
        assert number(words(next(find(ours, "strong")))) == pytest.approx(sum(values) / 5, rel=0.01)
        interval = re.search(r"\[(.*?), (.*?)\]", words(ours)).groups()
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert [number(x) for x in interval] == pytest.approx(list(expected), rel=0.01)
        assert published[1]["class"] == "paper"
        assert number(words(next(find(published, "strong")))) == paper
        assert not list(find(published, "a")) and f"{paper}" not in words(effect) + words(ours)
        seeds = [words(t) for t in find(plot, "title") if words(t).startswith("seed")]
        assert [number(seed.split(": ")[1]) for seed in seeds] == pytest.approx(values, rel=0.01)


def test_figures_of_ours_and_of_the_paper_share_no_drawing(tree):
    figures = list(find(tree, "figure"))
    published = [f for f in figures if "published" in f[1].get("class", "")]
    classifiers, others = figures[: 2 + 3 + 12], figures[2 + 3 + 12 :]
    assert [len([f for f in some if f in published]) for some in (classifiers, others)] == [6, 5]
    assert len(others) == 3 * 2 + 5 + 3  # Tables 4.2 to 4.4, Fig 5(a) of two styles, Fig 5(b)
    for node in figures:
        caption = words(next(find(node, "figcaption")))
        assert caption.startswith("Paper" if node in published else "Ours (proxy)")
        if node in classifiers or node in published:
            assert bool(list(find(node, "a"))) == (node not in published)
    shown = tips(published[0])
    assert len(shown) == 26 and "BN, (8,2): 65.3" in shown  # BN at (8,1) does not converge
    shown = tips(figures[0])
    assert len(shown) == 9 * 3 + 8 and all("[" in tip for tip in shown)


def made_up(design, arm, seed, setting=None, metrics=(), **summary):
    """A run that has the facts of an arm and nothing else."""
    arm = design.arms[arm]
    facts = design.facts | (arm.facts or {"norm": arm.norm}) | arm.set
    summary |= {"task": design.task, "seed": seed, "norm": arm.norm}
    summary.setdefault("status", "finished")
    wanted = claims.Wanted(design, arm, setting, seed, None)
    summary["run"] = f"{design.task}/x/{wanted.name}"
    if setting:
        gpus, images = map(int, setting.split("x"))
        summary["setting"] = {"gpus": gpus, "images_per_gpu": images}
    return Run(Path(design.prefix + arm.name), summary, facts, metrics=list(metrics))


def without_search(*names):
    """The ledger, its named designs without a search of the lr."""
    changed = {name: dataclasses.replace(LEDGER.designs[name], search=None) for name in names}
    return dataclasses.replace(LEDGER, designs=LEDGER.designs | changed)


def tips(figure):
    return [words(node) for node in find(figure, "title")]


def test_a_row_of_the_detection_tables_is_the_mean_of_its_seeds(tmp_path):
    ledger = without_search("detection_scratch", "detection_finetune")
    scratch, tuned = (ledger.designs[f"detection_{name}"] for name in ("scratch", "finetune"))
    found = {1: 50.25, 2: 51.5, 4: 49.0}
    runs = [made_up(scratch, "sn", seed, "8x2", box_ap=ap) for seed, ap in found.items()]
    runs += [made_up(scratch, "sn", 1, "1x2", box_ap=10.0)]  # another setting
    runs += [made_up(scratch, "sn", 5, "8x2", status="diverged", box_ap=0.0)]
    runs += [made_up(tuned, "head_sn", 1, "8x2", box_ap=60.0, mask_ap=58.75)]
    tree = Tree(Report(ledger, runs, load_paper(), tmp_path).html()).root
    rows = [[words(c) for c in row[2]] for f in find(tree, "figure") for row in find(f, "tr")]
    [row] = [row for row in rows if row[0] == "from scratch: SN"]
    low, high = stats.t.interval(0.95, 2, *(f(list(found.values())) for f in (mean, stats.sem)))
    assert row[1] == f"{mean(found.values()):.1f} ± {(high - low) / 2:.1f}"
    assert row[2:] == ["", "", "", "", "", "1 2 4 5, diverged"]
    [published] = [row for row in rows if row[0] == "from scratch: SN, SN"]
    assert published[1:] == ["29.5", "47.8", "31.6", "44.2", "32.6", "13.0"]
    boxes, masks = [row for row in rows if row[0] == "frozen BN, heads SN"]
    assert boxes[1] == "60.0" and [masks[1], masks[4]] == ["60.0", "58.8"]


def test_style_curves_show_every_seed_and_are_compared_seed_by_seed(tmp_path):
    design = LEDGER.designs["style"]
    steps = design.facts["steps"]
    runs = []
    for arm, ratio in (("in", 1.0), ("sn", 0.5), ("bn", 2.0)):
        for seed in (1, 2, 3)[: 2 if arm == "bn" else 3]:
            loss = 1e5 * seed * ratio * (1 + 0.1 * (arm == "sn") * (seed - 2))
            metrics = [
                {"step": step, "train/content": loss, "train/style": 3 * loss}
                for step in range(1, steps + 1)
            ]
            runs.append(made_up(design, arm, seed, metrics=metrics, steps=steps))
    tree = Tree(Report(LEDGER, runs, load_paper(), tmp_path).fig_5()).root
    curve, ratio, *_ = find(tree, "figure")
    ends = {tip.split(",")[0]: tip for tip in tips(curve) if f", {steps} steps: " in tip}
    assert ends["IN"].startswith(f"IN, {steps} steps: 8 [")  # (4 + 8 + 12) / 3, in 1e5
    assert len(list(find(curve, "polyline"))) == 3 + 3 + 2 + 3  # every seed, and three means
    ends = {tip.split(",")[0]: tip for tip in tips(ratio) if f", {steps} steps: " in tip}
    values = [0.45, 0.5, 0.55]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert ends["SN"] == f"SN, {steps} steps: 0.5 [{low:.4g}, {high:.4g}]"
    assert ends["BN"] == f"BN, {steps} steps: 2 [2, 2]" and "IN" not in ends
    [row] = (r for r in find(curve, "tr") if words(r).startswith("SN"))
    assert [words(a) for a in find(row, "a")] == ["1.800", "4.000", "6.600"]


def test_search_curves_are_the_means_of_the_record(tmp_path):
    design = LEDGER.designs["enas_nasbench201"]
    lines = map(json.loads, (ROOT / design.record).read_text().splitlines())
    best = {line["arm"]: [row[-1] for row in line["best_test"]] for line in lines}
    tree = Tree(Report(LEDGER, [], load_paper(), tmp_path).fig_5b(design)).root
    curve, less, published = find(tree, "figure")
    shown = {tip.split(",")[0]: tip for tip in tips(curve) if ", 1000 cells asked for: " in tip}
    assert len(shown) == 6
    for name, arm in (("SN", "sn"), ("GN", "gn"), ("random", "random")):
        assert f": {mean(best[arm]):.4g} [" in shown[name]
    pairs = [a - b for a, b in zip(best["sn"], best["ln"])]
    [tip] = (tip for tip in tips(less) if tip.startswith("LN, 1000 "))
    assert f": {mean(pairs):.4g} [" in tip
    assert published[1]["class"] == "published" and "SN, 150 search epochs: 73" in tips(published)


def test_rank_correlation_with_fig_2(campaign, tree):
    """IN's and LN's at ten times the lr, eight settings, anew from importance.jsonl."""
    paper, ours = load_paper()["fig_2"]["weights"], {}
    for path in campaign.glob("imagenet/*/sn_x10_*/seed*/importance.jsonl"):
        layers = json.loads(path.read_text().splitlines()[-1])["layers"].values()
        setting = path.parts[-3].removeprefix("sn_x10_")
        weights = [layer[m]["bn"] for layer in layers for m in ("mean", "var")]
        ours.setdefault(path.parts[-2], {})[setting] = sum(weights) / len(weights)
    assert len(ours) == 5 and all(len(row) == 8 for row in ours.values())
    expected = [
        stats.spearmanr(list(row.values()), [paper[s]["bn"] for s in row]).statistic
        for row in ours.values()
    ]
    [table] = (t for t in find(tree, "table") if "rank correlation" in words(t))
    [row] = (r for r in find(table, "tr") if "10 × lr" in words(r))
    assert number(words(next(find(row, "td"))).split()[0]) == pytest.approx(
        sum(expected) / 5, abs=6e-4
    )


def test_the_table_for_markdown_has_every_claim_and_every_effect(campaign, verdicts):
    short, long = (campaign / "claims.md").read_text().split("## Every effect")
    rows = [line.split(" | ") for line in short.splitlines() if line.startswith("| C")]
    assert [row[0].strip("| ") for row in rows] == [claim.id for claim in LEDGER.claims]
    for row, verdict in zip(rows, verdicts.values()):
        waits = verdict.reason in ("no runs yet", "no design yet")
        assert f"**{'not run yet' if waits else verdict.verdict}**" in row[2]
    rows = [line.split(" | ") for line in long.splitlines() if line.startswith("| C")]
    assert len(rows) == sum(len(claim.tests) for claim in LEDGER.claims)
    assert {len(row) for row in rows} == {8}


def test_without_records_nothing_is_claimed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claims, "ROOT", tmp_path)  # where records of many seeds lie
    main(["--runs", str(tmp_path)])
    assert f"{len(LEDGER.claims)} not run yet" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    tree = Tree(text).root
    assert not any("[" in words(ours) for ours in find(tree, css="cell"))
    assert [words(n) for n in find(tree, css="count")] == ["0", "0", str(len(LEDGER.claims))]
    assert "no runs yet" in text and "NaN" not in text


def test_runs_of_no_claim_are_said_to_be_none(tmp_path, capsys):
    arm = dataclasses.replace(DESIGN.arms["sn"], norm="sn", set={"model.width": 99})
    claim_records.write(tmp_path, DESIGN, arm, "8x32", 1)
    main(["--runs", str(tmp_path)])
    assert f"no run below {tmp_path} is of a claim's design" in capsys.readouterr().out


def test_runs_of_a_claim_that_no_look_counts_are_of_its_design(tmp_path, capsys):
    """A seed beyond the last look, and a run of the lr search."""
    for number, (name, seed) in enumerate((("bn_8x2", 99), ("bn_8x2_lr0.4", 0))):
        root = tmp_path / str(number)
        claim_records.write(root, DESIGN, DESIGN.arms["bn"], "8x2", seed, run_name=name)
        main(["--runs", str(root)])
        assert "is of a claim's design" not in capsys.readouterr().out


def test_new_runs_in_outputs_are_shown_and_linked(tmp_path, monkeypatch, capsys):
    """As run_claims.py leaves them; a run of results/ is not counted twice."""
    import report

    kept, outputs = tmp_path / "results", tmp_path / "out & #puts/outputs"
    for root, seeds in ((kept, (1, 2)), (outputs, (2, 3))):
        for seed in seeds:
            options = {"top1": 60.0 + seed, "lr": 0.8}
            claim_records.write(root, DESIGN, DESIGN.arms["sn"], "8x32", seed, **options)
    for lr, top1 in ((0.2, 50.0), (0.4, 51.0), (0.8, 52.0)):
        for setting in DESIGN.search.settings:
            own = {"run_name": f"sn_{setting}_lr{lr}", "lr": lr, "top1": top1}
            claim_records.write(kept, DESIGN, DESIGN.arms["sn"], setting, 0, **own)
    own = {"run_name": "sn_mine", "lr": 0.8}
    claim_records.write(outputs, DESIGN, DESIGN.arms["sn"], "8x32", 4, **own)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.chdir(outputs.parent)
    main([])
    out, err = capsys.readouterr()
    assert f"runs of {kept}, outputs" in out and "1 run is like a claim's" in err
    tree = Tree((kept / "report.html").read_text()).root
    [claim] = (node for node in find(tree, "section", "claim") if node[1]["id"] == "C6")
    [row] = (r for r in find(claim, "tr") if words(r).startswith("sn (8,32)"))
    links = [(words(a), unquote(a[1]["href"])) for a in find(row, "a")]
    assert [text for text, _ in links] == ["61", "62", "63"]
    assert all((kept / target).is_file() for _, target in links)
    assert [target.startswith("..") for _, target in links] == [False, False, True]
    main(["--runs", str(kept)])  # as it is committed
    assert "63</a>" not in (kept / "report.html").read_text()


def test_diverged_runs_are_said_wherever_a_claim_stands(tmp_path):
    ledger = without_search("cifar10_16px")
    ledger = dataclasses.replace(ledger, claims=[c for c in ledger.claims if c.id == "C6"])
    design = ledger.designs["cifar10_16px"]
    for top1, verdict in ((50.0, "held"), (10.0, "undecided")):
        runs = [
            made_up(design, arm, seed, "8x32", data={"classes": 10}, **(
                {"status": "diverged"} if arm == "in" else {"top1": top1 + (arm == "sn") + seed / 9}
            ))
            for arm in ("sn", "in", "ln")
            for seed in design.seeds
        ]  # fmt: skip
        runs = runs if verdict == "held" else runs[:-1]  # runs missing
        report = Report(ledger, runs, load_paper(), tmp_path)
        [found] = report.verdicts
        assert found.verdict == verdict
        said = f"5 of {len(runs)} runs diverged"
        assert said in report.claim(found) and said in report.markdown()


def test_both_rows_of_the_correlation_are_of_the_same_seeds(tmp_path):
    """Seed 3 lacks (8,1): it counts in neither row, and n says so."""
    ledger = without_search("cifar10_16px")
    design = ledger.designs["cifar10_16px"]
    runs = []
    for seed in (1, 2, 3):
        for place, setting in enumerate(FIGURE_SETTINGS, 1):
            if (seed, setting) == (3, "8x1"):
                continue
            arm = "sn_in_ln" if setting == "8x1" else "sn"
            run = made_up(design, arm, seed, setting)
            weights = {"in": 0.5, "ln": 0.5 - place / 100, "bn": place / 100}
            layers = {"bn1": {"block": "stem", "mean": weights, "var": weights}}
            runs.append(dataclasses.replace(run, importance=[{"epoch": 1, "layers": layers}]))
    tree = Tree(Report(ledger, runs, load_paper(), tmp_path).html()).root
    names = [words(n) for n in find(tree, "th") if "settings" in words(n)]
    assert [name.split(", ")[-1] for name in names[:2]] == ["n = 2 seeds"] * 2
    assert "not defined: weights all alike" in words(tree)  # IN's, here
    captions = [words(node) for node in find(tree, "figcaption")]
    assert any("averaged over layers; n = 2 to 3 seeds" in caption for caption in captions)


@pytest.mark.parametrize("x", [0.0, 8.0, 180.0, 352.0, 360.0])
def test_a_label_lies_within_its_drawing(x):
    [node] = find(Tree(page.inside(x, 10, "100")).root, "text")
    place = float(node[1]["x"])
    assert node[1]["text-anchor"] == "middle" and 10 <= place <= page.WIDTH - 10
    assert x not in (180.0,) or place == x


def test_links_of_any_path_are_whole():
    assert page.link("a & b", "o8#1/x y&z/summary.json") == (
        '<a href="o8%231/x%20y%26z/summary.json">a &amp; b</a>'
    )
    run = Run(Path("/o8#1/x y/seed1"), {})
    assert pages.link(run, Path("/"), "seed1") == "[seed1](o8%231/x%20y/seed1)"


def test_part_of_a_campaign_with_a_diverged_run(tmp_path):
    for arm, setting, status in [("sn", "8x32", "finished"), ("in", "8x32", "diverged")]:
        write = {"status": status} if status == "diverged" else {}
        claim_records.write(tmp_path, DESIGN, DESIGN.arms[arm], setting, 1, **write)
    main(["--runs", str(tmp_path)])
    tree = Tree((tmp_path / "report.html").read_text()).root
    [claim] = (node for node in find(tree, "section", "claim") if node[1]["id"] == "C6")
    assert "lr searches" in words(claim) and "undecided" in words(claim)


def test_statements_are_escaped(tmp_path):
    claim = dataclasses.replace(LEDGER.claims[0], claim="<b>a & b</b>")
    ledger = dataclasses.replace(LEDGER, claims=(claim,))
    text = Report(ledger, [], load_paper(), tmp_path).html()
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in text and "<b>a" not in text


def test_no_folder_is_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--runs", str(tmp_path / "none")])
    assert error.value.code == 2 and "no folder" in capsys.readouterr().err


def test_the_page_in_results_is_of_this_ledger():
    text = (ROOT / "results/report.html").read_text()
    missing = [c.id for c in LEDGER.claims if f'id="{c.id}"' not in text]
    assert not missing, "run scripts/report.py"


# --- in a browser

PROBE = """
<script>
const found = {};
addEventListener("error", event => found.error = event.message);
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const inner = frame.contentDocument, root = inner.documentElement, width = frame.clientWidth;
    const box = node => node.getBoundingClientRect();
    const wide = [...inner.querySelectorAll("body *")].filter(
      node => !node.closest(".scroll, svg") && box(node).right > width + 1);
    const texts = [...inner.querySelectorAll(".test:not(.titles) .number")];
    found[width] = {
      overflow: root.scrollWidth - width, wide: wide.map(node => node.outerHTML.slice(0, 80)),
      screen: box(inner.querySelector(".cards")).bottom,
      background: frame.contentWindow.getComputedStyle(inner.body).backgroundColor,
      columns: new Set(
        [...inner.querySelectorAll(".cards > *")].map(node => box(node).left)).size,
      plots: [...inner.querySelectorAll("svg")].filter(n => box(n).width > 200).length,
      covered: texts.filter(node => box(node).width > box(node.parentNode).width + 1).length };
  }
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_nothing_overflows_narrow_or_wide(campaign, tmp_path, dark):
    page = (campaign / "report.html").read_text().replace("<details>", "<details open>")
    frames = "".join(
        f'<iframe srcdoc="{html.escape(page)}" style="width:{w}px;height:900px;border:0"></iframe>'
        for w in (400, 1400)
    )
    (tmp_path / "probe.html").write_text(f"<!doctype html><body>{frames}{PROBE}")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command += ["--window-size=1900,1000", (tmp_path / "probe.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r'id="found">(.*?)</pre>', result.stdout, re.S)[1]))
    assert "error" not in found
    narrow, wide = found["400"], found["1400"]
    for size in (narrow, wide):
        assert size["overflow"] <= 0 and not size["wide"] and not size["covered"]
        assert size["plots"] > 60
        red = int(re.search(r"\d+", size["background"])[0])
        assert red < 64 if dark else red > 192
    assert narrow["columns"] == 1 < wide["columns"]
    assert wide["screen"] <= 900

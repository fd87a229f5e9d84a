"""NAS-Bench-201's table and the searches in it, on a table of 64 cells of this file's own."""

import collections
import copy
import functools
import itertools
import json
import lzma
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import workers
from faults import user_environment
from torch.utils.tensorboard import SummaryWriter

from enas import benchmark, nasbench201, nasbench201_seeds, samplers
from enas.benchmark import curves, read_cell, read_table
from enas.controller import Baseline, reinforce_loss
from sn.training.run.stopping import Preempted

HEADER = "index,cell,cifar10_val,cifar10_test,imagenet16_120_val,imagenet16_120_test"
PAIR = ("skip_connect", "nor_conv_3x3")  # 2^6 = 64 cells
FORM = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"


def accuracies(cell):
    """Validation and test in percent: more convolutions are better, the last one most of all."""
    score = sum(10 * (name == "nor_conv_3x3") for name in cell) + 20 * (cell[5] == "nor_conv_3x3")
    return score + 2.25, score + 1.5


def rows():
    cells = list(itertools.product(PAIR, repeat=6))
    order = np.random.RandomState(0).permutation(len(cells))
    for index, place in enumerate(order):
        val, test = accuracies(cells[place])
        yield f"{index},{FORM.format(*cells[place])},{val:.2f},{test:.2f},{val / 2},{test / 2}"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("table") / "small table.csv.xz"
    file.write_bytes(lzma.compress("\n".join([HEADER, *rows(), ""]).encode()))
    return file


@pytest.fixture(scope="module")
def table(path):
    return read_table(path, "cifar10")


@functools.cache
def composed(*overrides):
    return workers.config("table=none.csv", *overrides, root="nasbench201")


SHORT = ("cells=40", "points=[1,7,40]", "controller.hidden_size=8", "controller.num_groups=2")


def run(path, out, *overrides, lr=None):
    """`lr`: one that no config may have."""
    config = copy.deepcopy(composed(*SHORT, *overrides))
    config.controller.lr = lr or config.controller.lr
    config.table, config.output_dir = str(path), str(out)
    return nasbench201.search(config)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *_: None)


# --- the table


def test_table_is_read_whatever_its_order(path, table):
    assert len(table) == 64 and table.operations == PAIR
    seen = set()
    for number in range(64):
        cell = read_cell(table.cell(number))
        seen.add(cell)
        assert (table.val[number], table.test[number]) == accuracies(cell)
        digits = [PAIR.index(name) for name in cell]
        assert table.decisions(number) == digits
        assert np.dot(digits, table.factors) == number
    assert len(seen) == 64
    other = read_table(path, "imagenet16")
    assert np.array_equal(other.val, table.val / 2) and other.sha256 == table.sha256


def test_plain_files_are_read_too(tmp_path, table):
    (tmp_path / "table.csv").write_text("\r\n".join([HEADER, *rows()]))
    assert np.array_equal(read_table(tmp_path / "table.csv", "cifar10").test, table.test)


@pytest.mark.parametrize(
    "line, text, wanted",
    [
        (1, "index,cell,cifar10_val", "line 1: 0 columns 'cifar10_test'"),
        (1, HEADER + ",cell", "line 1: 2 columns 'cell'"),
        (3, "1,|none~0|,1,1,1,1", "line 3: cell '|none~0|'; expected |op~0|+|op~0|op~1|+"),
        (4, f"2,{FORM.format(*['conv'] * 6)},1,1,1,1", "line 4: unknown operation 'conv'"),
        (5, f"3,{FORM.format(*['none'] * 6)},1,1", "line 5: 4 fields; the first line has 6"),
        (6, f"4,{FORM.format(*PAIR * 3)},x,1,1,1", "line 6: accuracy 'x'; expected percent"),
        (6, f"4,{FORM.format(*PAIR * 3)},nan,1,1,1", "line 6: accuracy 'nan'; expected percent"),
        (6, f"4,{FORM.format(*PAIR * 3)},1,100.5,1,1", "line 6: accuracy '100.5'"),
        (7, f"5,{FORM.format(*['none'] * 6)},1,1,1,1", "with 64 cells, not all 729"),
        (9, None, "ends at line 64 with 63 cells, not all 64 of its operations; without |"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_broken_table_is_one_message_with_its_line(line, text, wanted, tmp_path):
    content = [HEADER, *rows()]
    content[line - 1 : line] = [] if text is None else [text]
    file = tmp_path / "table.csv"
    file.write_text("\n".join(content))
    with pytest.raises(ValueError) as error:
        read_table(file, "cifar10")
    assert str(error.value).startswith(str(file)) and wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_cell_that_stands_twice(tmp_path):
    content = [HEADER, *rows()]
    content[10] = content[4]
    (tmp_path / "table.csv").write_text("\n".join(content))
    with pytest.raises(ValueError, match="line 11: this cell is in line 5 already"):
        read_table(tmp_path / "table.csv", "cifar10")


@pytest.mark.parametrize("content", [b"", b"no", lzma.compress(b"a,b\n" * 999)[:60], b"\xff\xfe"])
@pytest.mark.parametrize("name", ["table.csv", "table.csv.xz"])
def test_file_that_is_no_table(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_table(tmp_path / name, "cifar10")
    with pytest.raises(FileNotFoundError, match="no table .*none.csv"):
        read_table(tmp_path / "none.csv", "cifar10")


def test_curves_by_hand(table):
    """The first of several best cells by validation, its test accuracy, means between points."""
    by_val = np.argsort(table.val, kind="stable")
    low, mid, high = by_val[0], by_val[20], by_val[63]
    asked = np.array([[low, high, mid, low], [mid, low, low, high]])
    found = curves(table, asked, [1, 3, 4])
    best = table.val[[[low, high, high], [mid, mid, high]]]
    assert np.array_equal(found["best_val"], best)
    assert np.array_equal(found["best_test"], best - 0.75)
    v = table.val
    expected = [[v[low], (v[high] + v[mid]) / 2, v[low]], [v[mid], v[low], v[high]]]
    assert found["drawn_val"] == pytest.approx(np.array(expected))


# --- the searches


@pytest.mark.parametrize("norm", ["none", "ln", "gn", "sn_ln_gn"])
@pytest.mark.parametrize("per_gate", [False, True])
def test_batched_controllers_equal_one_trained_alone(norm, per_gate, table):
    """Plain autograd, a loop, one Adam: the same cells and weights in float64, for every seed."""
    cells, adam = 12, {"lr": 0.05, "betas": (0.0, 0.999), "eps": 1e-3}

    def make():
        options = {"norm": norm, "per_gate": per_gate, "num_groups": 2, "tanh_constant": 2.0}
        return samplers.CellController(2, 8, **options).double()

    seeds = [3, 4, 5]
    together = [samplers.make_controller(make, seed) for seed in seeds]
    asked = samplers.search_with_controllers(table, together, seeds, cells, adam, 10.0)
    for row, (seed, trained) in enumerate(zip(seeds, together)):
        controller = samplers.make_controller(make, seed)
        named = dict(controller.named_parameters())
        own = [named.pop(n) for n in list(named) if n.endswith(("mean_weight", "var_weight"))]
        rest = list(named.values())
        groups = [{"params": rest}, {"params": own, "lr": 0.5}] if own else rest
        optimizer, baseline = torch.optim.Adam(groups, **adam), Baseline(0.99)
        assert len(own) == (0 if norm != "sn_ln_gn" else 18 if per_gate else 6)
        for count, uniform in enumerate(samplers.uniform_numbers(seed, cells)):
            samples = controller(uniform[None])
            number = int(np.dot(samples.decisions[0].numpy(), table.factors))
            assert number == asked[row, count]
            reward = table.val[number] / 100 + 1e-4 * samples.entropy.item()
            optimizer.zero_grad()
            reinforce_loss(samples, reward, baseline.update(reward)).backward()
            optimizer.step()
        for (name, ours), theirs in zip(trained.named_parameters(), controller.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=name)


def test_draws_follow_the_probabilities():
    """The share of each cell among 20,000 draws against exp(log p), which sums to 1."""
    torch.manual_seed(0)
    controller = samplers.CellController(2, 8, num_groups=2, init=1.5).double()
    with torch.no_grad():
        samples = controller(torch.rand(20_000, 6, dtype=torch.float64))
    cells = [tuple(row) for row in samples.decisions.tolist()]
    shares = collections.Counter(cells)
    probs = dict(zip(cells, samples.log_prob.exp().tolist()))
    assert sum(probs.values()) == pytest.approx(1, abs=1e-3) and len(probs) > 40
    assert max(probs.values()) > 3 * min(probs.values())
    for cell, p in probs.items():
        deviation = (p * (1 - p) / 20_000) ** 0.5
        assert abs(shares[cell] / 20_000 - p) < 5 * deviation, cell
    entropy = -sum(p * np.log(p) for p in probs.values())  # its estimate: each path's own sum
    assert samples.entropy.mean().item() == pytest.approx(entropy, rel=0.02)


def test_controllers_learn(table):
    """After 150 cells the drawn ones are nearly all convolutions; at first they are half."""
    config = composed(*SHORT[2:], "controller.lr=0.05", "cells=150", "points=[30,120,150]")
    seeds = list(range(4))
    controllers = nasbench201.build_controllers(config, table, seeds)
    drawn = curves(table, nasbench201.ask(config, table, controllers, seeds), config.points)
    means = drawn["drawn_val"].mean(0)
    assert means[0] < 60 < 70 < means[2]


def test_random_search_is_uniform(table):
    asked = samplers.search_at_random(table, list(range(20)), 640)
    counts = np.bincount(asked.flatten(), minlength=64)
    assert len(counts) == 64
    assert ((counts - 200) ** 2 / 200).sum() < 103.4  # chi^2 of 63 degrees: 0.1 % above


def test_evolution_changes_one_edge_of_a_living_cell(table):
    asked = samplers.search_by_evolution(table, [0, 1], 200, population=8, sample=3)
    for row in asked:
        cells = [table.decisions(number) for number in row]
        for count in range(8, 200):
            living = cells[count - 8 : count]
            assert any(sum(a != b for a, b in zip(cells[count], old)) == 1 for old in living)
        assert table.val[row[-50:]].mean() > table.val[row[:8]].mean() + 10


def test_evolution_takes_the_best_of_its_sample(table):
    """With every living cell in the sample, more or less, the parent is the best of them."""
    (row,) = samplers.search_by_evolution(table, [0], 60, population=5, sample=200)
    cells = [table.decisions(number) for number in row]
    for count in range(5, 60):
        best = max(row[count - 5 : count], key=lambda number: table.val[number])
        tied = [n for n in row[count - 5 : count] if table.val[n] == table.val[best]]
        distances = [sum(a != b for a, b in zip(cells[count], table.decisions(n))) for n in tied]
        assert 1 in distances


@pytest.mark.parametrize("sampler", ["controller", "random", "evolution"])
def test_seeds_do_not_depend_on_one_another(sampler, table):
    config = composed(*SHORT, f"sampler={sampler}", "precision=fp64")

    def asked(seeds):
        controllers = nasbench201.build_controllers(config, table, seeds)
        return nasbench201.ask(config, table, controllers, seeds)

    both = asked([7, 8])
    assert np.array_equal(both[1:], asked([8])) and not np.array_equal(*both)


# --- the entrypoint and the record of many seeds


def test_search_writes_every_record(path, tmp_path, table):
    out = tmp_path / "out"
    summary = run(path, out)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["run"] == "enas_nasbench201/cifar10/sn_ln_gn/seed0"
    assert summary["status"] == "finished" and summary["scale"] == "proxy"
    assert summary["of_all_cells"] == {"val": 82.25, "test": 81.5}
    assert accuracies(read_cell(summary["cell"])) == (summary["best_val"], summary["best_test"])
    assert summary["points"] == [1, 7, 40] and summary["curve_best_test"][2] == summary["best_test"]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 7, 40]
    assert [line["best_test"] for line in metrics] == summary["curve_best_test"]
    importance = [json.loads(line) for line in (out / "importance.jsonl").read_text().splitlines()]
    assert [line["step"] for line in importance] == [0, 40]
    start, end = (line["layers"]["cell.norms.cell"]["mean"]["ln"] for line in importance)
    assert start == 0.5 != end
    assert str(tmp_path) not in (out / "config.yaml").read_text()
    before = (out / "summary.json").read_bytes()
    assert run(path, out) == summary and (out / "summary.json").read_bytes() == before


def test_interrupted_search_ends_the_same(path, tmp_path, monkeypatch):
    """Stopped by a signal after the search and before its records, then begun anew."""
    whole = run(path, tmp_path / "whole")
    ask = nasbench201.ask

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return ask(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(nasbench201, "ask", signalled)
        with pytest.raises(Preempted):
            run(path, tmp_path / "broken")
    again = run(path, tmp_path / "broken")
    for name in ("metrics.jsonl", "importance.jsonl"):
        texts = [(tmp_path / folder / name).read_text() for folder in ("whole", "broken")]
        assert texts[0] == texts[1]
    for key in ("wall_s", "date"):
        again.pop(key)
        whole.pop(key)
    assert again == whole


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (["points=[1,40,7]"], ["points=[1, 40, 7]", "cells=40"]),
        (["points=[1,7]"], ["points=[1, 7]"]),
        (["dataset=svhn"], ["dataset=svhn", "imagenet16"]),
        (["sampler=bayes"], ["sampler=bayes", "evolution"]),
        (["evolution.population=0"], ["evolution.population=0"]),
        (["controller.updates=3"], ["unknown key controller.updates"]),
        (["dataset=cifar100"], ["line 1: 0 columns 'cifar100_val'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_value_is_named(overrides, wanted, path, tmp_path):
    with pytest.raises(ValueError) as error:
        run(path, tmp_path / "out", *overrides)
    for words in wanted:
        assert words in str(error.value)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_diverged_search_says_so(path, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at cell .* of 40"):
        run(path, tmp_path, "controller.norm=none", lr=1e38)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged" and summary["best_test"] is None


@pytest.mark.slow  # as of enas.search, from another folder
def test_command_line(path, tmp_path):
    """From another folder: the run's lines, no folder of Hydra's."""
    command = [sys.executable, "-m", "enas.nasbench201", f"table='{path}'", *SHORT]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": user_environment()}
    done = subprocess.run([*command, "output_dir=out", "sampler=evolution"], **options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("evolution: 40 of 64 cells of cifar10\nbest of 40 cells: test ")
    assert {file.name for file in tmp_path.iterdir()} == {"out"}


def test_record_of_many_seeds(path, tmp_path, table, capsys):
    """Each arm's arrays are those of the searches one by one; a second call adds nothing."""
    out = tmp_path / "cifar10.jsonl"
    arguments = [str(path), "--out", str(out), "--seeds", "2", "--arms", "sn", "evolution", "--set"]
    nasbench201_seeds.main([*arguments, *SHORT, "precision=fp64"])
    sn, evolution = (json.loads(line) for line in out.read_text().splitlines())
    assert (sn["arm"], sn["seeds"], sn["points"]) == ("sn", [1, 2], [1, 7, 40])
    assert sn["config"]["controller"]["norm"] == "sn_ln_gn" and "seed" not in sn["config"]
    assert sn["data"]["cells"] == 64 and sn["commit"] and sn["versions"]["torch"]
    assert set(sn["ln_weight"]) == {"input", "hidden", "cell"}
    assert len(sn["ln_weight"]["cell"]["var"]) == 2 and evolution["ln_weight"] == {}
    for place, seed in enumerate([1, 2]):
        alone = run(path, tmp_path / f"sn{seed}", f"seed={seed}", "precision=fp64")
        for name in ("best_test", "best_val", "drawn_val"):
            assert sn[name][place] == pytest.approx(alone[f"curve_{name}"], abs=1e-3)
        assert table.cell(sn["best_cell"][place]) == alone["cell"]
        assert sn["distinct_cells"][place] == alone["distinct_cells"]
    before = out.read_bytes()
    nasbench201_seeds.main([*arguments, *SHORT, "precision=fp64"])
    assert out.read_bytes() == before and "recorded already" in capsys.readouterr().out
    out.write_bytes(before[:-300])  # a kill cuts a line short: it is made anew, the first is kept
    nasbench201_seeds.main([*arguments, *SHORT, "precision=fp64"])
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert again[0] == sn and again[1]["best_test"] == evolution["best_test"] and len(again) == 2
    with pytest.raises(SystemExit) as error:
        nasbench201_seeds.main([*arguments, *SHORT, "precision=fp64", "controller.lr=1"])
    assert error.value.code == 2 and "sn with other config" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["controller.norm=ln", "sampler=evolution"])
def test_what_arms_differ_in_is_theirs(override, path, tmp_path, capsys):
    """A line of the record would name one thing and be of another."""
    out = tmp_path / "cifar10.jsonl"
    arguments = [str(path), "--out", str(out), "--seeds", "2", "--arms", "sn", "random", "--set"]
    with pytest.raises(SystemExit) as error:
        nasbench201_seeds.main([*arguments, override])
    assert error.value.code == 2 and f"--set {override}" in capsys.readouterr().err
    assert not out.exists()


def test_a_norm_is_somewhere():
    with pytest.raises(ValueError, match=r"controller.places=\[\].*use controller.norm=none"):
        nasbench201_seeds.compose_config("t.csv", "cifar10", ["controller.places=[]"])


@pytest.mark.parametrize("arm", nasbench201_seeds.ARMS)
def test_arms_compose(arm):
    config = nasbench201_seeds.compose_config("t.csv", "cifar10", nasbench201_seeds.ARMS[arm])
    assert config.cells == 1000 and config.points[-1] == 1000


def test_a_table_that_unpacks_without_end(tmp_path, monkeypatch):
    path = tmp_path / "t.csv.xz"
    path.write_bytes(lzma.compress(bytes(10**6)))
    monkeypatch.setattr(benchmark, "LARGEST", 10**5)
    with pytest.raises(ValueError, match="t.csv.xz, line 1: more than 100000 bytes"):
        benchmark.read_table(path, "cifar10")

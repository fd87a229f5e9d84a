"""enas.darts: the supernet, its three ways of training control parameters, records, resumption."""

import contextlib
import copy
import functools
import itertools
import json
import types

import pytest
import torch
import torch.nn.functional as F
import workers
from common import claims
from common.records import Run
from faults import ROOT, assert_same
from test_enas_search import Crash, lines, record
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import sn
from enas import darts
from enas.benchmark import EDGES, OPERATIONS
from enas.darts_network import Cell, Supernet, derive
from enas.tasks import DartsTask
from sn.training.classification.data import build_data
from sn.training.run.config import recorded
from sn.training.run.session import Session

TINY = [  # 2 epochs of 2 steps (joint: 4) on 32 images
    *("device=cpu", "data.train_images=32", "epochs=2", "optimizer.batch_size=8"),
    *("network.channels=4", "evaluation.batch_size=180"),
]
WAYS = ("joint", "bilevel", "bilevel_first")
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment/darts").glob("*.yaml"))
MIXED = ("nor_conv_3x3", "none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")


@functools.cache
def composed(*overrides):
    return workers.config(*overrides, root="darts")


def run(out, *overrides):
    config = copy.deepcopy(composed(*TINY, *overrides))
    config.output_dir = str(out)
    return darts.search(config)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *_: None)


@pytest.fixture
def build(tmp_path):
    """Call darts.build in a session of its own; (task, session)."""
    with contextlib.ExitStack() as stack:

        def call(*overrides):
            config = copy.deepcopy(composed(*TINY, *overrides))
            config.output_dir = str(tmp_path / "built")
            session = stack.enter_context(Session(config))
            session.where = "here"
            return darts.build(config, session), session

        yield call


def one_hot(cell, size=60.0):
    """Control parameters (edges, operations) whose softmax is 1 at the cell's operations."""
    values = torch.zeros(len(EDGES), len(OPERATIONS))
    for edge, name in enumerate(cell):
        values[edge, OPERATIONS.index(name)] = size
    return values


# --- the supernet


def by_hand(model, cell, x):
    """The fixed cell's network: plain convolutions, pooling and batch norm, edge by edge."""

    def norm(layer, x):
        return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)

    def edge(convolutions, name, x):
        if name == "none":
            return torch.zeros_like(x)
        if name == "skip_connect":
            return x
        if name == "avg_pool_3x3":
            ones = torch.ones_like(x)  # sums over how many pixels there are
            return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)
        layer, size = convolutions[name], int(name[-1])
        y = F.conv2d(F.relu(x), layer.conv.weight, padding=size // 2)
        return norm(layer.norm, y)

    x = norm(model.stem[1], F.conv2d(x, model.stem[0].weight, padding=1))
    for number, (block, *cells) in enumerate(
        [None, *stage] if not stage_index else list(stage)
        for stage_index, stage in enumerate(model.stages)
    ):
        if number:
            y = norm(block.first.norm, F.conv2d(F.relu(x), block.first.conv.weight, None, 2, 1))
            y = F.conv2d(F.relu(y), block.second.conv.weight, padding=1)
            shortcut = F.conv2d(F.avg_pool2d(x, 2), block.shortcut.weight)
            x = norm(block.second.norm, y) + shortcut
        for layer in cells:
            ops = dict(zip(EDGES, zip(layer.edges, cell)))
            one = edge(*ops[0, 1], x)
            two = edge(*ops[0, 2], x) + edge(*ops[1, 2], one)
            x = edge(*ops[0, 3], x) + edge(*ops[1, 3], one) + edge(*ops[2, 3], two)
    return model.classifier(F.relu(norm(model.last_norm, x)).mean((2, 3)))


@pytest.mark.parametrize("cell", [MIXED, ("skip_connect",) * 6, MIXED[::-1]], ids=" ".join)
def test_dominant_operations_are_the_fixed_cells_network(cell):
    torch.manual_seed(0)
    model = Supernet(10, cells=2, channels=4, norm=sn.make_norm("bn")).double()
    with torch.no_grad():
        model.operations.copy_(one_hot(cell))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert model(x).shape == (3, 10)
    torch.testing.assert_close(model(x), by_hand(model, cell, x), rtol=1e-9, atol=1e-12)


def test_an_edge_is_the_weighted_sum_of_its_operations():
    """A cell's output is linear in the weights of an edge that ends at the output."""
    torch.manual_seed(0)
    cell = Cell(4, sn.make_norm("sn")).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    weights = torch.rand(6, 5, dtype=torch.float64)
    edge, share = EDGES.index((1, 3)), torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]).double()

    def with_edge(row):
        changed = weights.clone()
        changed[edge] = row
        return cell(x, changed)

    parts = [with_edge(row) for row in torch.eye(5, dtype=torch.float64)]
    expected = sum(s * part for s, part in zip(share, parts))
    torch.testing.assert_close(with_edge(share), expected)
    torch.testing.assert_close(with_edge(torch.zeros(5).double()), parts[0])  # none is zero
    assert len({round(part.sum().item(), 6) for part in parts}) == 5


def test_norms_of_cells_have_no_gain_and_size_halves_twice():
    model = Supernet(10, cells=1, channels=4, norm=sn.make_norm("sn"))
    gains = {name.split(".")[0] for name, p in model.named_parameters()
             if name.endswith("norm.weight") and ".edges." in name}  # fmt: skip
    assert not gains and model.last_norm.weight.shape == (16,)
    shapes = []
    for stage in model.stages:
        stage[-1].register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    model(torch.randn(2, 3, 16, 16))
    assert shapes == [(4, 16, 16), (8, 8, 8), (16, 4, 4)]
    assert model.operations.abs().max() < 0.01  # nearly equal weights at the start


def test_derived_cell_of_known_control_parameters():
    """The largest of all five, `none` among them."""
    parameters = torch.tensor([
        [0.0, 0.0, 0.0, 0.1, 0.0],
        [2.0, 1.0, 1.9, 0.0, -9.0],
        [-3.0, -1.0, -2.0, -4.0, -1.5],
        [0.0, 0.0, 0.0, 0.0, 0.5],
        [0.1, 0.2, 0.3, 0.2, 0.1],
        [0.0, 0.0, 0.0, 7.0, 6.9],
    ])  # fmt: skip
    assert derive(parameters) == derive(parameters.softmax(1)) == MIXED


# --- how control parameters are trained


def finite_difference(function, parameter, place, width=1e-5):
    """Derivative of function() by one entry of a parameter."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[place] += sign * width
        values.append(function())
        with torch.no_grad():
            parameter[place] -= sign * width
    return (values[0] - values[1]) / (2 * width)


@pytest.mark.parametrize("operations, gates", [
    ("bilevel", "joint"), ("bilevel_first", "bilevel"), ("bilevel", "bilevel"),
    ("joint", "bilevel_first"),
])  # fmt: skip
def test_gradients_are_those_of_the_other_halfs_loss(operations, gates, build, monkeypatch):
    """Against finite differences: of second order, of the loss after one step of plain SGD."""
    monkeypatch.setattr(torch.Tensor, "relu", torch.Tensor.tanh)  # no kinks between two differences
    task, session = build(
        f"operations={operations}", f"gates={gates}", "precision=fp64", "network.channels=2",
        "optimizer.weight_decay=0.01", "optimizer.max_lr=0.1", "operations_optimizer.lr=0.0",
        "optimizer.gate_lr_factor=0.0",
    )  # fmt: skip
    model = task.model
    chosen = [(model.operations, (2, 3)), (model.operations, (5, 1))]
    if gates != "joint":
        chosen += [(model.stages[0][0].edges[0]["nor_conv_3x3"].norm.mean_weight, (0,))]
        chosen += [(model.stages[2][0].first.norm.var_weight, (2,))]
    with torch.no_grad():
        model.operations.copy_(torch.randn(6, 5, dtype=torch.float64))
    batch, other = (images.batch(torch.arange(8)) for images in (task.train, task.other))
    trained = {id(p): order for order, found in task.bilevel.items() for p in found}
    weights = task.weights()

    def loss(images, labels):
        return F.cross_entropy(model(images), labels)

    def ahead(order):
        """The other half's loss, of second order after a step of SGD."""
        before = [w.detach().clone() for w in weights]
        if order == 2:
            gradients = torch.autograd.grad(loss(*batch), weights)
            with torch.no_grad():
                for w, gradient, group in zip(weights, gradients, lrs):
                    w -= group * (gradient + 0.01 * w)
        value = loss(*other).item()
        with torch.no_grad():
            for w, old in zip(weights, before):
                w.copy_(old)
        return value

    lr_of = {id(p): g["lr"] for g in task.optimizer.param_groups for p in g["params"]}
    lrs = [lr_of[id(w)] for w in weights]
    expected = {
        order: [finite_difference(functools.partial(ahead, order), *entry) for entry in chosen]
        for order in (1, 2)
    }
    before = copy.deepcopy(model.state_dict())
    darts.control_step(task, session, batch, other)
    for (parameter, place), first, second in zip(chosen, expected[1], expected[2]):
        if id(parameter) not in trained:
            assert parameter.grad is None
        elif trained[id(parameter)] == 1:
            assert parameter.grad[place].item() == pytest.approx(first, rel=1e-5)
        else:  # the Hessian's product is by differences of the gradients, too
            error = abs(second - first) / 30
            assert parameter.grad[place].item() == pytest.approx(second, abs=error)
    assert_same(model.state_dict(), before, "lr 0: nothing has moved")


@pytest.mark.parametrize("operations, gates", list(itertools.product(WAYS, WAYS)))
def test_what_learns_from_which_half(operations, gates, build):
    """One step of each kind moves what it should, and nothing else."""
    task, session = build(f"operations={operations}", f"gates={gates}")
    model, moved = task.model, {}
    batch = task.train.batch(torch.arange(8))
    kinds = {"operations": [model.operations], "gates": sn.gates(model)}
    known = {id(p) for found in kinds.values() for p in found}
    kinds["weights"] = [p for p in model.parameters() if id(p) not in known]

    def step(name, function):
        before = {kind: [p.detach().clone() for p in found] for kind, found in kinds.items()}
        function()
        for kind, found in kinds.items():
            changed = any(not torch.equal(p, old) for p, old in zip(found, before[kind]))
            moved.setdefault(name, set()).update([kind] * changed)

    ways = {"operations": operations, "gates": gates}
    joint = {kind for kind, way in ways.items() if way == "joint"}
    assert (task.other is None) == (joint == set(ways))
    if task.other is not None:
        other = task.other.batch(torch.arange(8))
        step("control", lambda: darts.control_step(task, session, batch, other))
        assert moved["control"] == set(ways) - joint
        images = build_data("digits", train_images=32).train.images
        halves = [{image.numpy().tobytes() for image in part.images}
                  for part in (task.train, task.other)]  # fmt: skip
        assert len(task.train) == len(task.other) == 16
        assert set.union(*halves) <= {image.numpy().tobytes() for image in images}
    else:
        assert len(task.train) == 32
    step("train", lambda: darts.train_step(task, session, *batch))
    assert moved["train"] == {"weights"} | joint


def test_optimizers_are_those_of_darts():
    config = composed()
    assert vars(config.optimizer) | {"batch_size": 0} == {
        "batch_size": 0, "momentum": 0.9, "weight_decay": 3e-4, "max_lr": 0.025, "min_lr": 0.001,
        "gate_lr_factor": 1.0, "grad_clip": 5.0,
    }  # fmt: skip
    assert vars(config.operations_optimizer) == {
        "lr": 3e-4, "beta1": 0.5, "beta2": 0.999, "weight_decay": 1e-3,
    }  # fmt: skip


def test_the_weights_lr_is_a_cosine_to_its_least(build):
    task, _ = build("optimizer.max_lr=0.5", "optimizer.min_lr=0.1", "optimizer.gate_lr_factor=10")
    for done, lr in ((0.0, 0.5), (0.5, 0.3), (1.0, 0.1)):
        darts.set_lr(task, done)
        rest, gates = (group["lr"] for group in task.optimizer.param_groups)
        assert (rest, gates) == pytest.approx((lr, 10 * lr))


# --- records and resumption


HEADER = "cell,cifar10_val,cifar10_test\n"
FORM = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"


def write_table(path, operations):
    """Accuracies that tell every cell apart: its number in base 5, over 1,000."""
    rows = []
    for cell in itertools.product(operations, repeat=6):
        number = functools.reduce(lambda n, name: 5 * n + OPERATIONS.index(name), cell, 0)
        rows.append(f"{FORM.format(*cell)},{number / 1000 + 1},{number / 1000}")
    path.write_text(HEADER + "\n".join(rows))
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table") / "table.csv", OPERATIONS)


def test_search_writes_every_record(table, tmp_path):
    summary = run(tmp_path / "out", f"table={table}", "gates=bilevel_first")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary["run"] == "darts/digits_1x4/sn_bilevel_gates_bilevel_first/seed0"
    assert (summary["task"], summary["status"], summary["scale"]) == ("darts", "finished", "proxy")
    weights = torch.tensor(summary["operation_weights"])
    cell = [OPERATIONS[row.index(max(row))] for row in weights.tolist()]
    assert summary["cell"] == FORM.format(*cell)
    number = functools.reduce(lambda n, name: 5 * n + OPERATIONS.index(name), cell, 0)
    assert summary["cell_accuracy"] == number / 1000
    assert summary["cell_val_accuracy"] == number / 1000 + 1
    assert summary["convolutions"] == sum("conv" in name for name in cell)
    assert summary["skip_connections"] == cell.count("skip_connect")
    assert summary["table"]["cells"] == 15_625

    metrics = lines(tmp_path / "out" / "metrics.jsonl")
    last = metrics[-1]
    assert [line["epoch"] for line in metrics] == [1, 2] and summary["top1"] == last["val/top1"]
    assert last["gap/top1"] == pytest.approx(last["train/top1"] - last["val/top1"])
    assert last["gap/loss"] == pytest.approx(last["val/loss"] - last["train/loss"])
    for (start, end), row in zip(EDGES, weights.tolist()):
        recorded = [last[f"operations/{start}-{end}/{name}"] for name in OPERATIONS]
        assert recorded == pytest.approx(row) and sum(recorded) == pytest.approx(1)
    assert [last[f"operations/mean/{name}"] for name in OPERATIONS] == pytest.approx(
        weights.mean(0).tolist()
    )
    importance = lines(tmp_path / "out" / "importance.jsonl")
    assert [line["epoch"] for line in importance] == [0, 1, 2]
    assert {layer["block"] for layer in importance[0]["layers"].values()} == {
        "stem", "stages.0", "stages.1", "stages.2", "last_norm",
    }  # fmt: skip
    assert importance[2]["layers"]["last_norm"] != importance[0]["layers"]["last_norm"]
    assert str(table) not in (tmp_path / "out" / "config.yaml").read_text()
    assert run(tmp_path / "out", f"table={table}", "gates=bilevel_first") == summary


def test_learns_the_digits(tmp_path):
    """44 steps of a joint run, far from guessing's 10 %."""
    options = [f"output_dir={tmp_path}", "device=cpu", "epochs=1", "operations=joint"]
    options += ["network.channels=4", "optimizer.max_lr=0.1", "optimizer.batch_size=32"]
    summary = darts.search(composed(*options))
    assert summary["top1"] > 20 and summary["images_seen"] == 44 * 32


def test_accuracy_of_a_run_without_a_table_is_read_later(table, tmp_path):
    first = run(tmp_path, "operations=joint")
    assert first["cell_accuracy"] is None and first["cell"]
    (tmp_path / "summary.json").unlink()
    second = run(tmp_path, "operations=joint", f"table={table}")
    assert second["cell_accuracy"] is not None
    assert second | {"cell_accuracy": None} == second | {
        key: first[key] for key in ("cell", "top1", "images_seen", "cell_accuracy")
    }


@pytest.mark.parametrize(
    "name, call, operations, gates",
    [
        ("train_step", 4, "bilevel_first", "joint"),
        ("control_step", 2, "bilevel", "bilevel_first"),
        ("validate", 2, "joint", "joint"),
    ],
)
def test_resumed_run_equals_unbroken_one(name, call, operations, gates, tmp_path, monkeypatch):
    """Killed between two steps, before one, or in an evaluation."""
    options = ["checkpoint_steps=1", f"operations={operations}", f"gates={gates}"]
    run(tmp_path / "whole", *options)
    function, calls = getattr(darts, name), []

    def crashing(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Crash
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(darts, name, crashing)
        with pytest.raises(Crash):
            run(tmp_path / "broken", *options)
    run(tmp_path / "broken", *options)
    assert_same(record(tmp_path / "broken"), record(tmp_path / "whole"), "not equal")


# --- what is refused


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (["operations=both"], ["operations=both", "bilevel_first"]),
        (["gates=bilevel", "norm=bn"], ["gates=bilevel", "control parameters", "bn"]),
        (["norm=none"], ["none", "affine"]),
        (["norm=bkn"], ["norm=bkn", "choose another norm"]),
        (["norm=frozen_bn"], ["norm=frozen_bn", "identity"]),
        (["+norm.affine=true"], ["norm.affine", "no gain and shift"]),
        (["operations=bilevel", "precision=bf16"], ["operations=bilevel", "precision=bf16"]),
        (
            ["operations=joint", "gates=bilevel", "precision=bf16"],
            ["gates=bilevel", "bf16", "fp32"],
        ),
        (["optimizer.min_lr=0.5"], ["optimizer.min_lr=0.5", "optimizer.max_lr=0.025"]),
        (["data.train_images=1"], ["two halves", "there are 1"]),
        (["table=none.csv"], ["no table none.csv"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_value_is_named(overrides, wanted, tmp_path):
    with pytest.raises((ValueError, TypeError, OSError)) as error:
        run(tmp_path / "out", *overrides)
    assert "\n" not in str(error.value)
    for words in wanted:
        assert words in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_table_without_the_derived_cells_operation(tmp_path):
    small = darts.read_table(write_table(tmp_path / "t.csv", OPERATIONS[1:3]), "cifar10")
    model = types.SimpleNamespace(operation_weights=lambda: one_hot(MIXED).softmax(1))
    config = types.SimpleNamespace(table="t.csv")
    task = types.SimpleNamespace(model=model, table=small, config=config)
    with pytest.raises(ValueError, match="t.csv has no cells with nor_conv_3x3, only skip_con"):
        DartsTask.derived(task)
    model.operation_weights = lambda: one_hot(("nor_conv_1x1",) * 6).softmax(1)
    found = DartsTask.derived(task)
    number = int("222222", 5)
    assert small.operations == OPERATIONS[1:3]
    assert (found["cell_accuracy"], found["convolutions"]) == (number / 1000, 6)


def test_poisoned_gradient_is_named(tmp_path, monkeypatch):
    """A loss of the other half that is not finite moves nothing."""
    gradients = darts.gate_gradients

    def poisoned(*arguments):
        return [torch.full_like(g, float("nan")) for g in gradients(*arguments)]

    monkeypatch.setattr(darts, "gate_gradients", poisoned)
    with pytest.raises(FloatingPointError, match="epoch 1, step 1 of 2; first bad: the gradient"):
        run(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "diverged" and summary["cell_accuracy"] is None


# --- configs


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds(name):
    config = composed(f"experiment=darts/{name}", "table=none.csv")
    with torch.device("meta"):
        model = Supernet(10, norm=sn.make_norm(**config.norm), **vars(config.network))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert convolutions == 1 + 3 * config.network.cells * 12 + 2 * 3
    text = (ROOT / f"configs/experiment/darts/{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n#"), "what it is for"


def test_the_claims_design():
    config = composed("experiment=darts/cifar10_16px")
    assert (config.data.image_size, config.data.train_images, config.epochs) == (16, 10_000, 20)
    assert config.output_dir == "outputs/darts/cifar10_1x8/sn_bilevel_gates_joint/seed0"


def test_every_arm_of_the_claim_is_found_by_its_record():
    """The ledger's command makes the run that it counts, and no other arm's."""
    ledger = claims.load_ledger()
    design = ledger.designs["darts"]
    used = {term.arm for c in ledger.claims if c.id == "C16" for t in c.tests for term in t.terms}
    assert used == set(design.arms)
    for name, arm in design.arms.items():
        script, *overrides = claims.Wanted(design, arm, None, 3, None).arguments
        config = composed(*overrides)
        assert script == "-m enas.darts"
        assert config.output_dir == f"outputs/darts/cifar10_1x8/darts_{name}/seed3"
        halves = 1 if {config.operations, config.gates} == {"joint"} else 2
        assert config.data.train_images == 5000 * halves
        written = recorded(config)
        summary = {key: written[key] for key in ("operations", "gates")}
        summary |= {"task": "darts", "model": "1x8", "norm": config.norm["name"], "data": {}}
        run = Run(None, summary, written)
        assert [n for n, a in design.arms.items() if claims.is_arm(run, design, a)] == [name]


def test_run_folder_is_the_runs_own():
    runs = [(), ("operations=joint",), ("gates=bilevel", "seed=1"), ("norm=bn",)]
    assert [composed(*overrides).output_dir for overrides in runs] == [
        f"outputs/darts/digits_1x8/{name}"
        for name in (
            "sn_bilevel_gates_joint/seed0",
            "sn_joint_gates_joint/seed0",
            "sn_bilevel_gates_bilevel/seed1",
            "bn_bilevel_gates_joint/seed0",
        )
    ]

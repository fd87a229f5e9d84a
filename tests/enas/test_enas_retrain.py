"""enas.retrain and enas.draw: one architecture from scratch, exact resumption, pictures."""

import copy
import functools
import json

import numpy as np
import pytest
import torch
import workers
from faults import assert_same
from test_enas_search import Crash, lines, record

from enas import draw, retrain
from enas.child import Child
from enas.space import (
    Architecture,
    Node,
    from_json,
    random_decisions,
    read_architecture,
    to_json,
)
from sn.training.classification.data import load_cifar10_test

TINY = [  # 2 epochs of 3 steps on 24 images
    *("device=cpu", "data.train_images=24", "epochs=2", "child.layers=1", "child.filters=4"),
    *("optimizer.batch_size=8", "arch_nodes=2", "arch=random"),
]


@functools.cache
def composed(*overrides):
    return workers.config(*overrides, root="enas_retrain")


def run(out, *overrides):
    config = copy.deepcopy(composed(*TINY, *overrides))
    config.output_dir = str(out)
    return retrain.retrain(config)


def architecture_file(folder, seed=0, nodes=2):
    generator = torch.Generator().manual_seed(seed)
    decisions = random_decisions(1, nodes, generator=generator)[0]
    path = folder / f"arch{seed}.json"
    values = {"architecture": to_json(Architecture.from_decisions(decisions)), "task": "enas"}
    path.write_text(json.dumps(values))
    return path


def test_records_and_names(tmp_path):
    """Its figure has a name of its own; no test set of the digits, so none is claimed."""
    path = architecture_file(tmp_path)
    summary = run(tmp_path / "out", f"arch={path}")
    assert summary["status"] == "finished" and summary["task"] == "enas_retrain"
    assert summary["retrained_val_top1"] >= 0 and summary["retrained_test_top1"] is None
    assert "shared_top1" not in summary
    assert summary["architecture"] == json.loads(path.read_text())["architecture"]
    assert summary["run"] == "enas_retrain/digits_1x4/searched/seed0"
    metrics = lines(tmp_path / "out" / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert metrics[-1]["val/top1"] == summary["retrained_val_top1"]
    best = torch.load(tmp_path / "out" / "checkpoint_best.pt", weights_only=True)["progress"]
    assert best["best"] == max(line["val/top1"] for line in metrics)
    assert summary["best_retrained_val_top1"] == best["best"]
    assert run(tmp_path / "out", f"arch={path}") == summary  # a second call is a no-op
    other = architecture_file(tmp_path, seed=1).replace(path)  # of another search
    with pytest.raises(ValueError, match="has ended already, with other architecture: .* there"):
        run(tmp_path / "out", f"arch={other}")
    other.unlink()
    assert run(tmp_path / "out", f"arch={other}") == summary


def test_learns_the_digits(tmp_path):
    """A good architecture in 44 steps: far from guessing, in evaluation mode too."""
    node = Node(0, 0, 1, 4)  # sep_conv_3x3 and identity
    architecture = Architecture((node, node), (node, node))
    (tmp_path / "arch.json").write_text(json.dumps(to_json(architecture)))
    options = [f"arch={tmp_path / 'arch.json'}", "device=cpu", "epochs=2", "child.layers=1"]
    options += [f"output_dir={tmp_path / 'out'}", "optimizer.first_period=2"]
    assert retrain.retrain(composed(*options))["retrained_val_top1"] > 50


def test_random_architectures(tmp_path):
    """`arch_seed` picks the architecture, `seed` the training."""
    names = {"a": [], "b": ["arch_seed=1"], "c": ["seed=1"]}
    a, b, c = (run(tmp_path / name, *options) for name, options in names.items())
    assert a["architecture"] == c["architecture"] != b["architecture"]
    assert len(from_json(a["architecture"]).normal) == 2
    losses = [lines(tmp_path / name / "metrics.jsonl")[0]["train/loss"] for name in "abc"]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("name, call", [("train_step", 3), ("evaluated", 2)])
def test_resumed_run_equals_unbroken_one(name, call, tmp_path, monkeypatch):
    """Killed between two steps of an epoch, or in the evaluation of the second."""
    options = ["checkpoint_steps=2", "child.dropout=0.3", "child.drop_path=0.3"]
    run(tmp_path / "whole", *options)
    function, calls = getattr(retrain, name), []

    def crashing(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Crash
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(retrain, name, crashing)
        with pytest.raises(Crash):
            run(tmp_path / "broken", *options)
    run(tmp_path / "broken", *options)
    assert_same(record(tmp_path / "broken"), record(tmp_path / "whole"), "not equal")


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (["arch=none.json"], ["no architecture file none.json"]),
        (["epochs=0"], ["epochs=0"]),
        (["arch_nodes=0"], ["arch_nodes=0"]),
        (["compile=maybe"], ["compile=maybe", "true or false"]),
        (["child.aux_weight=0.4"], ["aux_weight", "2x2"]),
        (["run_name=../x"], ["run_name"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_value_is_named(overrides, wanted, tmp_path):
    with pytest.raises((ValueError, OSError)) as error:
        run(tmp_path / "out", *overrides)
    for words in wanted:
        assert words in str(error.value)


def test_skipped_steps_count_on_after_an_epoch(tmp_path, monkeypatch):
    """Skipped in epoch 1, interrupted in epoch 2: the limit is the whole run's."""
    forward, calls = Child.forward, []

    def poisoned(child, x, *arguments, **options):
        if child.training:
            calls.append(1)
        bad = child.training and len(calls) == 2
        return forward(child, x * (float("nan") if bad else 1), *arguments, **options)

    def crashing(metrics):
        raise Crash

    monkeypatch.setattr(Child, "forward", poisoned)
    with monkeypatch.context() as patch:
        patch.setattr(retrain, "line_of", crashing)
        with pytest.raises(Crash):
            run(tmp_path, "max_skipped_steps=1")
    assert run(tmp_path, "max_skipped_steps=1")["skipped_steps"] == 1


def test_checkpoint_of_another_network_is_one_message(tmp_path, monkeypatch):
    def crashing(metrics):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(retrain, "line_of", crashing)
        with pytest.raises(Crash):
            run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["classifier.weight"] = torch.zeros(3, 3)
    torch.save(state, path)
    with pytest.raises(ValueError, match="does not fit this run: .*classifier.weight"):
        run(tmp_path)


def test_architecture_file_of_another_kind(tmp_path):
    (tmp_path / "x.md").write_text("# no JSON")
    with pytest.raises(ValueError, match="x.md is no JSON; expected a search's summary.json"):
        read_architecture(tmp_path / "x.md")


def test_architecture_file_that_never_ends(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="deep.json: .*recursion"):
        read_architecture(path)


def test_another_architecture_is_refused(tmp_path):
    """The file has changed under the same name: no resumption with half the weights."""
    path = architecture_file(tmp_path)
    run(tmp_path / "out", f"arch={path}")
    (tmp_path / "out" / "summary.json").unlink()
    path.write_text(architecture_file(tmp_path, seed=1).read_text())
    with pytest.raises(ValueError, match="other architecture: .* now"):
        run(tmp_path / "out", f"arch={path}")


def test_cifar10_test_images(tmp_path):
    import pickle

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.arange(3 * 3072, dtype=np.int64).reshape(3, 3072).astype(np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": images, "labels": [7, 0, 9]}))
    test = load_cifar10_test(str(tmp_path))
    assert len(test) == 3 and test.labels == [7, 0, 9]
    assert torch.equal(test.images.flatten(1), torch.from_numpy(images))
    with pytest.raises(FileNotFoundError, match="test_batch is missing"):
        load_cifar10_test(str(tmp_path / "no"))


def test_configs_compose_and_build():
    """Both experiments; ENAS's final size on the meta device; without arch there is no run."""
    for name in ("paper_size", "cifar10_proxy"):
        config = composed(f"experiment=enas_retrain/{name}", "arch=random")
        architecture = retrain.choose_architecture(config)
        with torch.device("meta"):
            child = Child(
                10, image_size=32, nodes=3, architecture=architecture, **vars(config.child)
            )
        assert len(child.cells) == config.child.layers + 2
    with pytest.raises(ValueError, match="arch"):
        composed()


# --- pictures


def test_draws_cells(tmp_path, capsys):
    import matplotlib.image

    path = architecture_file(tmp_path, nodes=5)
    draw.main([str(path)])
    picture = matplotlib.image.imread(tmp_path / "cells.png")
    assert picture.shape[0] > 400 and picture[..., :3].std() > 0.02
    draw.main([str(path), "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "cells.png").read_bytes()
    with pytest.raises(SystemExit) as error:
        draw.main([str(tmp_path / "no.json")])
    assert error.value.code == 2 and "no architecture file" in capsys.readouterr().err


@pytest.mark.parametrize("deeper", ["normal", "reduction"])
def test_a_deeper_cell_is_not_cut_off(tmp_path, monkeypatch, deeper):
    """Two cells share an axis that reaches to the output of the deeper one."""
    chain, flat = (Node(0, 0, 1, 4), Node(2, 1, 0, 2)), (Node(0, 0, 1, 4), Node(1, 1, 0, 2))
    cells = {"normal": flat, "reduction": flat} | {deeper: chain}
    figures = []
    monkeypatch.setattr(draw.plt, "close", figures.append)
    draw.draw_architecture(Architecture(**cells), tmp_path / "cells.png")
    low, high = figures[0].axes[0].get_xlim()
    xs = [text.get_position()[0] for panel in figures[0].axes for text in panel.texts]
    assert max(xs) == 3 and low < min(xs) and max(xs) < high


def test_layout_of_a_cell_by_hand():
    cell = (Node(0, 0, 1, 4), Node(2, 1, 0, 2), Node(1, 3, 1, 3))
    assert draw.depths(cell) == {0: 0, 1: 0, 2: 1, 3: 2, 4: 1, "output": 3}
    at = draw.places(cell)
    assert len(set(at.values())) == len(at)
    assert all(at[entry][0] == depth for entry, depth in draw.depths(cell).items())

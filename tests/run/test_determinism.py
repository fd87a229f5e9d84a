"""The same run gives the same numbers: twice, with data workers, on another day."""

import json
from pathlib import Path

import pytest
import torch
from faults import assert_same, outcome
from workers import config, train_in_group

import train_imagenet
from sn.training.run.schedule import mix_seed

RECORDED = Path(__file__).parent / "recorded_losses.json"
TINY = [
    *("device=cpu", "setting.gpus=2", "setting.images_per_gpu=4", "schedule.epochs=3"),
    *("data.train_images=32", "evaluation.batch_average.batches=2"),
]


def losses(out, *options):
    train_imagenet.train(config(*TINY, *options, f"output_dir={out}"))
    return [json.loads(line)["train/loss"] for line in (out / "metrics.jsonl").open()]


@pytest.mark.parametrize("norm", ["sn", "bn", "ssn"])
def test_losses_are_those_recorded(norm, tmp_path):
    """In float64, so that only a change of what is computed can change six digits.

    A change that is meant: delete the entry and run this test to record it anew.
    """
    found = losses(tmp_path, "precision=fp64", f"norm={norm}")
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if norm not in recorded:
        recorded[norm] = [round(loss, 8) for loss in found]
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
        pytest.fail(f"recorded {norm}: {found}; look at it, run again")
    assert found == pytest.approx(recorded[norm], rel=1e-6)


@pytest.mark.parametrize("norm", ["sn", pytest.param("bn", marks=pytest.mark.slow)])
def test_deterministic_runs_are_equal_bit_by_bit(norm, tmp_path):
    try:
        for name in "ab":
            cfg = config(
                *TINY, f"norm={norm}", "deterministic=true", f"output_dir={tmp_path / name}"
            )
            train_imagenet.entry.prepare(cfg.deterministic)
            assert torch.are_deterministic_algorithms_enabled()
            train_imagenet.train(cfg)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(outcome(tmp_path / "a"), outcome(tmp_path / "b"), norm)


def test_number_of_workers_changes_nothing(tmp_path):
    for workers in (0, 3):
        options = [f"data.workers={workers}", f"output_dir={tmp_path / str(workers)}"]
        train_imagenet.train(config(*TINY, *options))
    assert_same(outcome(tmp_path / "3"), outcome(tmp_path / "0"), "3 workers")


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_accuracy_is_the_same_for_any_number_of_processes(processes, tmp_path):
    """Each of the 360 images counts once; 360 is no multiple of the batches, so shares differ."""
    options = [*TINY, "precision=fp64", "setting.gpus=6", "setting.images_per_gpu=2"]
    options += ["evaluation.batch_size=7", "norm=bn", "schedule.epochs=2"]
    train_imagenet.train(config(*options, f"output_dir={tmp_path / 'one'}"))
    train_in_group(processes, *options, f"output_dir={tmp_path / 'more'}")
    one, more = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "more"))
    for key in ("top1", "top5", "top1_batch_average"):
        assert one[key] == pytest.approx(more[key], abs=1e-9), key
    assert one["val_loss"] == pytest.approx(more["val_loss"], rel=1e-9)


def test_seeds_are_mixed():
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) > 7990  # 8,000 draws of 2^32: a collision is unlikely, ten are not chance

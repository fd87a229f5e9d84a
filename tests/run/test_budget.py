"""What a run needs, before it starts: estimates, warnings, and plan=true of every entrypoint."""

import importlib
import re

import pytest
import torch
from faults import RUNS
from torch import nn
from torch.utils.data import DataLoader
from workers import config, run_in_group

import sn
from sn.training.run import budget
from sn.training.run.budget import Enough, Pace, estimate, saved_bytes, size, untouched
from sn.training.run.display import counted, duration

MAIN = {"imagenet": "train", "detection": "train", "style_transfer": "train"}
MAIN |= {"enas": "search", "enas_retrain": "retrain"}
MB = 1e6


@pytest.mark.parametrize("images", [1, 3])
def test_saved_bytes(images):
    """Two inputs of layers and nothing twice: tanh keeps its output, which the next layer takes."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with saved_bytes(model) as saved:
        loss = model(torch.rand(images, 4)).sum()
    assert saved == [4 * images * (4 + 8)]
    loss.backward()


def test_an_estimate_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), sn.SwitchNorm2d(4), nn.Dropout())
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with untouched(model) as trial:
        trial(torch.rand(2, 3, 5, 5)).sum().backward()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def need(monkeypatch, free, workers=0, groups=1, optimizer=torch.optim.SGD):
    """Of 40 images through a layer of 100 x 1,000 weights: 0.4 kB kept for each."""
    monkeypatch.setattr(budget, "free_memory", lambda: free)
    monkeypatch.setattr(budget, "cpu_cores", lambda: 2)
    model = nn.Linear(100, 1000, bias=False)
    loader = DataLoader([1], num_workers=workers)
    return estimate(
        model,
        lambda trial: (trial(torch.rand(2, 100)).sum(), 2),
        images=40,
        optimizer=optimizer(model.parameters(), 0.1),
        loader=loader,
        batch_bytes=3 * MB,
        device=torch.device("cpu"),
        groups=groups,
    )


def test_estimate(monkeypatch):
    """Activations grow with the images; gradients and momenta are as large as the weights."""
    found = need(monkeypatch, 10 * MB)
    assert found.activations == 40 * 100 * 4
    assert found.weights == 2 * 100_000 * 4 and found.loading == 0
    assert found.fits and found.warnings() == []
    assert need(monkeypatch, 10 * MB, optimizer=torch.optim.Adam).weights == 3 * 100_000 * 4
    loaded = need(monkeypatch, 10 * MB, workers=2)
    assert loaded.loading == 2 * budget.WORKER + 2 * 2 * 3 * MB
    assert not loaded.fits


def test_a_run_that_does_not_fit_says_what_to_change(monkeypatch):
    (text,) = need(monkeypatch, 0.5 * MB, groups=8).warnings()
    assert "a step needs about 816 kB (activations of 40 images 16 kB" in text
    assert "500 kB is free; to make it fit: setting.emulation=accumulated (8 forward" in text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the machine's memory is shared
    assert not need(monkeypatch, 1.2 * MB).fits


def test_more_workers_than_cores(monkeypatch):
    (text,) = need(monkeypatch, 1e12, workers=8).warnings()
    assert text == "8 data workers on 2 cores; data.workers=2 spares memory"
    assert need(monkeypatch, 1e12, workers=2).warnings() == []


def test_pace(monkeypatch):
    """The first step warms up; a slow loop ends after two more, a quick one after twenty."""
    for seconds, count in ((30.0, 3), (0.1, 21)):
        clock = iter(range(1000))
        monkeypatch.setattr(budget.time, "perf_counter", lambda c=clock, s=seconds: s * next(c))
        pace = Pace(torch.device("cpu"))
        with pytest.raises(Enough):
            while True:
                pace.step()
        assert pace.steps == count and pace.seconds == pytest.approx(seconds)
    pace = Pace(torch.device("cpu"))
    pace.total = 1
    with pytest.raises(Enough):
        pace.step()
    assert pace.seconds > 0


@pytest.mark.parametrize(
    "folder, limit, usage, total",
    [
        (".", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
)
def test_files_that_a_container_has_read_leave_its_memory_free(
    folder, limit, usage, total, tmp_path
):
    """As MemAvailable has it: 10 MB of a limit of 16 MB are in use, 7 of them cached files."""
    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    (place / limit).write_text("16000000\n")
    (place / usage).write_text("10000000\n")
    stat = f"anon 3000000\n{total}inactive_file 5000000\n{total}active_file 2000000\n"
    (place / "memory.stat").write_text(stat)
    assert budget.free_memory(tmp_path) == 13e6
    (place / limit).write_text("max\n")
    assert budget.free_memory(tmp_path) > 16e6  # the machine's


def test_sizes():
    sizes = [size(x) for x in (2e3, 1.234e6, 250e6, 12.34e9)]
    assert sizes == ["2 kB", "1.23 MB", "250 MB", "12.3 GB"]


def test_durations():
    told = [duration(x) for x in (0.043, 4.26, 59.6, 430, 7501, 277200)]
    assert told == ["0.043 s", "4.3 s", "1 min 0 s", "7 min 10 s", "2 h 5 min", "3 d 5 h"]
    assert counted(1, "epoch") == "1 epoch" and counted(2000, "step") == "2,000 steps"


@pytest.mark.parametrize("root", RUNS)
def test_plan(root, tmp_path, capsys):
    """Every loop measured, the whole run added up, and nothing written."""
    module, *overrides = RUNS[root]
    out = tmp_path / "run"
    cfg = config(*overrides, "device=cpu", "plan=true", f"output_dir={out}", root=root)
    found = getattr(importlib.import_module(module), MAIN[root])(cfg)
    printed = capsys.readouterr()
    assert not out.exists() and printed.err == ""
    rows = re.findall(
        r"  (.+): (\S+) steps? of (\S+) s \((\d+) measured\); (?:.+ x (\d+) = )?", printed.out
    )
    names = [name for name, *_ in rows]
    assert names == [key.removesuffix("_step_s") for key in found if key.endswith("_step_s")]
    assert len(names) == (1 if root == "enas_retrain" else 2)
    whole = sum(int(n) * int(times or 1) * found[f"{name}_step_s"] for name, n, _, _, times in rows)
    assert found["run_s"] == pytest.approx(whole)
    assert f"parameters: {found['parameters']:,}" in printed.out
    assert found["peak_bytes"] >= found["before_bytes"] > 10 * MB


def test_counts_of_a_plan(tmp_path, capsys):
    """48 images in steps of 8, four epochs, a validation more for the batch average."""
    _, *overrides = RUNS["imagenet"]
    cfg = config(*overrides, "device=cpu", "plan=true", f"output_dir={tmp_path}/run")
    importlib.import_module("train_imagenet").train(cfg)
    printed = capsys.readouterr().out
    assert re.search(r"  training: 6 steps of .* \(6 measured\); \S+ s x 4 = ", printed)
    assert re.search(r"  validation: 2 steps of .* x 5 = ", printed)


def test_plan_of_a_process_without_images_to_evaluate(tmp_path):
    """As with fewer validation images than processes: the others do not take it for a signal."""
    _, *overrides = RUNS["imagenet"]
    run_in_group(2, _plan_without_images, (*overrides, f"output_dir={tmp_path}/run"), timeout=60)


def _plan_without_images(rank, overrides):
    train_imagenet = importlib.import_module("train_imagenet")
    if rank:
        train_imagenet.evaluation_batches = lambda *_: []
    try:
        found = train_imagenet.train(config(*overrides, "device=cpu", "plan=true"))
    finally:
        train_imagenet.distributed.stop()
    assert "validation_step_s" in found and "run_s" in found


def test_what_does_not_fit_is_not_measured(tmp_path, monkeypatch, capsys):
    """A plan says so and ends; a run warns, and starts."""
    monkeypatch.setattr(budget, "free_memory", lambda: 1e5)
    _, *overrides = RUNS["imagenet"]
    train = importlib.import_module("train_imagenet").train
    overrides += ["device=cpu", "schedule.epochs=1", f"output_dir={tmp_path}/run"]
    found = train(config(*overrides, "plan=true"))
    printed = capsys.readouterr().out
    assert "does not fit, so nothing is measured; to make it fit: setting.emulation=" in printed
    assert found["estimated_step_bytes"] > 1e5 and "run_s" not in found
    assert train(config(*overrides))["status"] == "finished"
    assert "warning: a step needs about" in capsys.readouterr().err

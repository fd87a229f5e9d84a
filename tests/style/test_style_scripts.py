"""scripts/plot_style.py on small records, and the peer of scripts/bench_style.py."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from common import records as results
from PIL import Image

import sn
from sn.training.style.networks import build_style_net, to_image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch):
    """A script as a module."""

    def load(name):
        path = ROOT / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(sys, "argv", [str(path)])
        spec.loader.exec_module(module)
        return module

    return load


def write_run(root, norm, seed, losses, status="finished"):
    """A record as style_transfer.py writes it, with these total losses."""
    run = f"style_transfer/folder_wave_96px/{norm}_b2/seed{seed}"
    folder = root / run
    folder.mkdir(parents=True)
    summary = {
        "task": "style_transfer", "run": run, "norm": norm, "status": status, "seed": seed,
        "data": {"name": "folder", "train_images": 482}, "style": {"name": "wave"},
        "vgg": {"weights": "vgg16.pth"}, "image_size": 96, "batch_size": 2, "loss": losses[-1],
        "steps": len(losses), "scale": "proxy", "wall_s": 60.0, "commit": "0123456789abc",
        "date": "2026-01-01T00:00:00", "note": None,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed}))
    lines = [
        {"step": step, "train/loss": loss, "train/content": loss / 4, "train/style": loss / 2}
        for step, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if norm == "sn":
        weights = {"in": 0.5, "ln": 0.3, "bn": 0.2}
        layers = {"down.0.norm": {"block": "down", "mean": weights, "var": weights}}
        lines = [{"step": step, "layers": layers} for step in (0, len(losses))]
        (folder / "importance.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    """SN < IN < BN for seed 0; for seed 1 IN is above BN in the end, and SN stopped early."""
    root = tmp_path / "runs"
    for norm, level in (("bn", 4.0), ("in", 2.0), ("sn", 1.0)):
        write_run(root, norm, 0, [8 * level] * 4 + [level] * 4)
    write_run(root, "bn", 1, [4.0] * 8)
    write_run(root, "in", 1, [3.0] * 4 + [5.0] * 4)
    write_run(root, "sn", 1, [2.0] * 4)
    return root


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_figures_and_table(load, runs, capsys):
    load("plot_style").main(["--runs", str(runs), "--window", "4"])
    figures = runs / "figures"
    names = {path.name for path in figures.iterdir()}
    stems = ("style_loss_folder_wave_96px_b2", "style_importance_folder_wave_96px_b2")
    assert names == {f"{stem}{end}" for stem in stems for end in (".png", ".csv")}
    rows = read_csv(figures / f"{stems[0]}.csv")
    ours = [row for row in rows if row["source"] == "ours" and row["loss"] == "total"]
    points = {(row["norm"], row["seed"], row["step"]): float(row["value"]) for row in ours}
    assert points["bn", "0", "4"] == 32 and points["in", "1", "8"] == 5
    assert ("sn", "1", "8") not in points
    paper = [row for row in rows if row["source"] != "ours"]
    assert len(paper) == 36 and float(paper[0]["value"]) == pytest.approx(5.78e5)
    weights = read_csv(figures / f"{stems[1]}.csv")
    assert {row["value"] for row in weights if row["statistic"] == "in"} == {"0.5"}
    text = (runs / "style_transfer" / "README.md").read_text()
    assert "| 4 | 2 | 0.50, 0.67 | 0.50, 0.75 | 2 of 2 | 2 of 2 | 2 of 2 |" in text
    assert "| 8 | 1 | 0.50 | 0.50 | 1 of 1 | 1 of 1 | 1 of 1 |" in text, "seeds of all norms only"
    assert "(folder_wave_96px/sn_b2/seed1) | 1 | 2 |  | 4 |" in text, "a run that is short is blank"


def test_notes_are_kept(load, runs):
    readme = runs / "style_transfer" / "README.md"
    readme.write_text("stale\n<!-- notes -->\nWhat we saw.\n<!-- /notes -->\nstale table\n")
    load("plot_style").main(["--runs", str(runs)])
    text = readme.read_text()
    assert "<!-- notes -->\nWhat we saw.\n<!-- /notes -->" in text and "stale" not in text


def test_grid(load, runs, tmp_path):
    """A row per photograph, the checkpoints found by the runs' names."""
    for norm in ("bn", "in", "sn"):
        options = {"width": 4, "residual_blocks": 1}
        net = build_style_net(sn.make_norm(norm), **options)
        state = {"model": net.state_dict(), "style_net": {"norm": {"name": norm}, "model": options}}
        for seed in (0, 1):
            torch.save(
                state, runs / f"style_transfer/folder_wave_96px/{norm}_b2/seed{seed}/checkpoint.pt"
            )
    photos = [tmp_path / f"{name}.png" for name in "ab"]
    for photo in [*photos, tmp_path / "wave.jpg"]:
        Image.new("RGB", (24, 16), "teal").save(photo)
    load("plot_style").main(
        ["--runs", str(runs), "--checkpoints", str(runs), "--size", "24"]
        + ["--photos", *map(str, photos), "--styles", str(tmp_path)]
    )
    assert Image.open(runs / "figures" / "style_grid.jpg").width > 1000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--runs", "{root}/absent"], "no folder"),
        (["--runs", "{root}/empty"], "no finished style transfer runs below"),
        (["--runs", "{root}/runs", "--window", "0"], "--window 0"),
        (["--runs", "{root}/runs", "--checkpoints", "x"], "needs --photos"),
    ],
)
def test_errors_are_one_line(load, runs, tmp_path, capsys, args, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        load("plot_style").main([arg.format(root=tmp_path) for arg in args])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_records_by_step_and_by_epoch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "a": 1}\n{"step": 1}\n{"step": 2, "a": 3}\n')
    assert results._read_lines(path) == [{"step": 1}, {"step": 2, "a": 3}]
    path.write_text('{"epoch": 1, "step": 40}\n{"epoch": 2, "step": 40}\n{"other": 1}\n7\n')
    assert [line["epoch"] for line in results._read_lines(path)] == [1, 2]


def test_peer_is_the_same_network(load):
    """With our parameters in their order the examples' architecture gives the same picture."""
    peer, ours = load("bench_style").PeerNet(), build_style_net(sn.make_norm("in"))
    theirs, own = list(peer.parameters()), list(ours.parameters())
    assert [p.shape for p in theirs] == [p.shape for p in own]
    with torch.no_grad():
        for target, source in zip(theirs, own):
            target.copy_(source + 0.05 * torch.randn_like(source))
            source.copy_(target)
        x = torch.rand(2, 3, 20, 28)
        torch.testing.assert_close(ours(x), to_image(peer(2 * x - 1)), atol=1e-5, rtol=1e-5)

"""The notebooks of examples/ run, cell after cell, and are small."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path, monkeypatch, capsys):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and path.stat().st_size < 100_000
    figures = []
    matplotlib.use("Agg")
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    names = {"__name__": "__main__"}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert all(output["output_type"] != "error" for output in cell["outputs"])
            exec(compile("".join(cell["source"]), f"{path.name} {cell['id']}", "exec"), names)
    plt.close("all")
    said = capsys.readouterr().out
    assert said.count("top-1") >= 4 and len(figures) == 1
    assert names["top1"](names["network"]) > 90
    layers = names["sn"].importance_weights(names["tuned"][0]).values()
    moved = [abs(layer["mean"]["bn"] - 1 / 3) for layer in layers]
    assert len(moved) == 5 and max(moved) > 0.005  # they learned

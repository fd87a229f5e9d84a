"""The table norm x capability is the outcome of scripts/check_capabilities.py."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sn.norms import NORMS

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location(
    "capabilities", ROOT / "scripts/check_capabilities.py"
)
capabilities = importlib.util.module_from_spec(spec)
spec.loader.exec_module(capabilities)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written():
    _, _, text = capabilities.README.read_text().partition(capabilities.BEGIN)
    text, marker, _ = text.partition(capabilities.END)
    assert marker, "the README has lost its markers"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(rows[0][1:], row[1:])) for row in rows[2:]}


def test_the_table_has_every_norm_and_capability():
    table = written()
    assert list(table) == list(NORMS)
    assert all(list(row) == list(capabilities.CHECKS) for row in table.values())


def test_the_readme_around_the_table_stays():
    before = f"one\n\n{capabilities.BEGIN}\nold\n{capabilities.END}\n\ntwo\n"
    after = capabilities.replace_table(before, "| new |\n")
    head, tail = (after.partition(m) for m in (capabilities.BEGIN, capabilities.END))
    assert head[0] == "one\n\n" and tail[2] == "\n\ntwo\n"
    assert "| new |" in after and "old" not in after and "on the CPU with torch 2" in after
    assert capabilities.replace_table(after, "| new |\n") == after


FEW = [
    ("ssn", "export, any batch"), ("ssn", "fold"), ("brn", "autocast bf16"),
    ("sync_sn", "jit.trace"), ("ssn", "func, vmap"), ("brn", "channels_last"),
    ("frozen_bn", "copy, pickle, print"), ("bkn", "copy, pickle, print"), ("bkn", "fold"),
    ("sn", "ONNX, any batch"), ("bkn", "ONNX, any batch"),
]  # fmt: skip


@pytest.mark.parametrize(("norm", "capability"), FEW)
def test_cells(norm, capability):
    found = capabilities.cell(norm, capability)
    if found == "-":
        pytest.skip("needs pip install -c constraints.txt -e '.[onnx]'")
    assert found == written()[norm][capability]


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_rows(norm):
    for capability, expected in written()[norm].items():
        found = capabilities.cell(norm, capability)
        assert found in (expected, "-"), (capability, found)

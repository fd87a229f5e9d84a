"""scripts/check_conversion.py: what it finds and would notice, that it resumes, its records."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

import sn

pytest.importorskip("timm")
ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("conversion", ROOT / "scripts/check_conversion.py")
conversion = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conversion)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name",
    ["timm/mobilenetv3_small_050", "models/mnasnet0_5", "segmentation/lraspp_mobilenet_v3_large",
     "detection/ssdlite320_mobilenet_v3_large"],
)  # fmt: skip
def test_a_model_passes(name):
    result = conversion.check(name)
    assert conversion.passed(result), result
    assert result["relative_error"] < result["relative_error_start_8"] < 1


def test_wrong_conversions_are_noticed(monkeypatch):
    convert = sn.convert

    def forgets_the_shift(model, **options):
        model = convert(model, **options)
        for name, p in model.named_parameters():
            if name.endswith("norm.bias"):
                p.data.zero_()
        return model

    def not_finite(model, **options):
        model = convert(model, **options)
        if not options:
            next(model.parameters()).data.fill_(torch.nan)
        return model

    name = "timm/mobilenetv3_small_050"
    monkeypatch.setattr(sn, "convert", forgets_the_shift)
    result = conversion.check(name)
    assert result["converted"] and not result["equal"]
    monkeypatch.setattr(sn, "convert", lambda model, **_: model)
    result = conversion.check(name)
    assert not result["converted"] and "34 batch norms left" in result["error"]
    monkeypatch.setattr(sn, "convert", not_finite)
    result = conversion.check(name)
    assert result["step"] == "loss not finite" and result["step_before_conversion"] == "finite"
    assert not conversion.passed(result)


def test_limits_and_resumption(tmp_path, monkeypatch):
    names = ["timm/test_vgg", "timm/test_resnet", "models/alexnet"]
    sizes = {names[0]: (2, 3), names[1]: (1, 4), names[2]: (5, 0)}

    def describe(name):
        parameters, norms = sizes[name]
        return {"model": name, "parameters": parameters, "batch_norms": norms}

    def check(name):
        if name == names[0]:
            time.sleep(60)
        return {"size": [8, 8], "converted": True, "relative_error": 0.0, "equal": True,
                "relative_error_start_8": 0.1, "step": "finite"}  # fmt: skip

    def run(*options):
        arguments = ["", "--output", f"{tmp_path}/c.jsonl", "--only", *names, *options]
        monkeypatch.setattr("sys.argv", arguments)
        conversion.main()
        lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
        return [line for line in lines if "seconds" in line]

    monkeypatch.setattr(conversion, "describe", describe)
    monkeypatch.setattr(conversion, "check", check)
    first = run("--seconds", "0.5")
    assert [line["model"] for line in first] == [names[1], names[0]]  # smallest first
    assert conversion.passed(first[0]) and first[1]["error"] == "more than 0.5 s"
    assert run() == first
    again = run("--seconds", "0.5", "--retry")
    assert [line["model"] for line in again[2:]] == [names[0]]
    text = conversion.summary(tmp_path / "c.jsonl")
    assert "| timm | 2 | 1 | 1 of 1 (100.0 %) | 1 of 1 (100.0 %) | 1 of 1 (100.0 %) | 1 |" in text
    assert f"| {names[0]} | more than 0.5 s |" in text


def test_the_committed_summary_is_that_of_the_records():
    text = (ROOT / "results/conversion.md").read_text()
    assert text == conversion.summary(ROOT / "results/conversion.jsonl")


@pytest.mark.slow
def test_every_timm_module():
    """The smallest of a few models of every timm module that has batch norm."""
    import timm

    failures, tried = {}, 0
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        rows = [conversion.describe(f"timm/{n}") for n in names[:: max(1, len(names) // 6)]]
        rows = [row for row in rows if 0 < row.get("parameters", 0) < 40e6 and row["batch_norms"]]
        if rows:
            name = min(rows, key=lambda row: row["parameters"])["model"]
            tried += 1
            result = conversion.check(name)
            if not conversion.passed(result):
                failures[name] = result
    assert tried > 40 and not failures

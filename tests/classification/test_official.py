"""The authors' checkpoints: a network of their layer, written from its description, and ours."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn
from workers import run_in_group

import sn
from sn.training.classification.data import LOADERS, build_data
from sn.training.classification.models import batch_norm_model, build_model
from sn.training.classification.official import convert_official, unfilled_statistics
from sn.training.classification.pretrained import network_facts
from sn.training.run.checkpoint import load_network
from sn.training.run.images import read_image

torchvision = pytest.importorskip("torchvision")
ROOT = Path(__file__).parents[2]


class OfficialNorm(nn.Module):
    """What the released layer computes: unbiased instance variances, E[x^2] - mean^2 above them."""

    def __init__(self, channels, using_bn=True, keep=0.9):
        super().__init__()
        self.keep, self.using_bn = keep, using_bn
        generator = torch.Generator().manual_seed(channels)

        def draw(*shape):
            return torch.randn(shape, generator=generator)

        self.weight = nn.Parameter(1 + 0.2 * draw(1, channels, 1, 1))
        self.bias = nn.Parameter(0.2 * draw(1, channels, 1, 1))
        self.mean_weight = nn.Parameter(draw(3 if using_bn else 2))
        self.var_weight = nn.Parameter(draw(3 if using_bn else 2))
        if using_bn:
            self.register_buffer("running_mean", 0.3 * draw(1, channels, 1))
            self.register_buffer("running_var", 0.5 + draw(1, channels, 1).abs())

    def forward(self, x):
        flat = x.flatten(2)
        first, second = flat.mean(2, keepdim=True), flat.var(2, correction=1, keepdim=True)
        square = second + first**2
        means, variances = [first], [second]
        for dim in (1, 0)[: 1 + self.using_bn]:
            mean = first.mean(dim, keepdim=True)
            means.append(mean)
            variances.append(square.mean(dim, keepdim=True) - mean**2)
        if self.using_bn and self.training:
            with torch.no_grad():
                self.running_mean.lerp_(means[2], 1 - self.keep)
                self.running_var.lerp_(variances[2], 1 - self.keep)
        elif self.using_bn:
            means[2], variances[2] = self.running_mean, self.running_var
        mean = sum(w * m for w, m in zip(self.mean_weight.softmax(0), means))
        var = sum(w * v for w, v in zip(self.var_weight.softmax(0), variances))
        y = (flat - mean) / (var + 1e-5).sqrt()
        return y.view_as(x) * self.weight + self.bias


def official_network(name, using_bn=True):
    torch.manual_seed(0)
    build = torchvision.models.get_model_builder(name)
    return build(norm_layer=lambda c: OfficialNorm(c, using_bn), num_classes=7).double()


def official_state(network, prefix="module."):
    """Under the names of the authors' ResNet: sn1, sn2, sn3, and those of nn.DataParallel."""
    names = {key: key for key in network.state_dict()}
    for k in "123":
        names = {key: name.replace(f"bn{k}.", f"sn{k}.") for key, name in names.items()}
    return {prefix + names[key]: value.clone() for key, value in network.state_dict().items()}


def ours(converted):
    model = build_model(**converted["build"], norm=sn.make_norm(**converted["norm"])).double()
    model.load_state_dict(converted["model"])
    return model


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "using_bn"), [("resnet50", True), ("resnet18", False)])
def test_outputs_are_the_official_networks(name, using_bn, tmp_path):
    theirs = official_network(name, using_bn)
    state = official_state(theirs)
    path = tmp_path / "model.pth"
    torch.save({"epoch": 3, "state_dict": state, "best_prec1": 76.9, "optimizer": {}}, path)
    converted = convert_official(load_network(path))
    assert converted["build"] == {"name": name, "source": "torchvision", "num_classes": 7}
    assert converted["norm"]["statistics"] == ["in", "ln", "bn"][: 2 + using_bn]
    model = ours(converted)
    x = oracle.values((2, 3, 64, 64))
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.train()(x), theirs.train()(x), rtol=1e-7, atol=1e-7)
    if using_bn:
        ours_after, theirs_after = model.layer4[0].bn1, theirs.layer4[0].bn1
        torch.testing.assert_close(ours_after.running_mean, theirs_after.running_mean.view(-1))
        torch.testing.assert_close(ours_after.running_var, theirs_after.running_var.view(-1))
    for key in ("layer1.0.bn2.mean_weight", "layer1.0.bn2.weight"):
        expected = theirs.get_parameter(key)
        torch.testing.assert_close(model.get_parameter(key), expected.view(-1))
    assert ours(convert_official(load_network(path), 0.997)).bn1.momentum == pytest.approx(0.003)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_prefixes_and_unfilled_statistics(prefix, tmp_path):
    state = official_state(official_network("resnet18"), prefix)
    state[f"{prefix}layer2.0.sn1.running_var"].zero_()
    torch.save(state, tmp_path / "bare.pth")
    converted = convert_official(load_network(tmp_path / "bare.pth"))
    assert unfilled_statistics(converted["model"]) == ["layer2.0.bn1.running_var"]


def test_errors_list_the_keys():
    state = official_state(official_network("resnet18"))
    del state["module.layer3.1.sn2.var_weight"], state["module.layer1.0.conv1.weight"]
    state["module.aux.weight"] = torch.zeros(2)
    state["module.sn1.weight"] = torch.zeros(1, 63, 1, 1)
    with pytest.raises(ValueError) as error:
        convert_official(state)
    text = str(error.value)
    assert "missing: layer1.0.conv1.weight, layer3.1.bn2.var_weight" in text
    assert "unexpected: aux.weight" in text
    assert "SSN" not in text
    state["module.layer1.0.sn1.radius"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"authors' SSN, whose checkpoints are not read"):
        convert_official(state)
    assert "bn1.weight (1, 63, 1, 1), expected (64,)" in text
    with pytest.raises(ValueError, match="no ResNet"):
        convert_official({"conv.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="keep_factor"):
        convert_official(state, 1.0)


class Surprise:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_the_file_is_executed(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Surprise()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="cannot read weights from .*bad.pth"):
        load_network(tmp_path / "bad.pth")
    assert "executed" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth: it holds a list, not a dictionary"):
        load_network(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "none.pth")


# --- the layer's option ---------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [("in",), ("ln",), ("bn",), ("in", "ln", "bn")])
def test_unbiased_layer(statistics):
    layer = sn.SwitchNorm2d(4, statistics=statistics, unbiased=True, momentum=1.0).double()
    x = oracle.values((3, 4, 3, 2))
    flat = x.flatten(2)
    instance, mean = flat.var(2, correction=1), flat.mean(2)
    means = {"in": mean, "ln": mean.mean(1).view(3, 1).expand(3, 4)}
    means["bn"] = mean.mean(0).expand(3, 4)
    variances = {
        "in": instance,
        "ln": (instance.mean(1) + mean.var(1, correction=0)).view(3, 1).expand(3, 4),
        "bn": (instance.mean(0) + mean.var(0, correction=0)).expand(3, 4),
    }
    means = {
        "in": mean,
        "ln": mean.mean(1).view(3, 1).expand(3, 4),
        "bn": mean.mean(0).expand(3, 4),
    }
    mean = sum(means[s] for s in statistics) / len(statistics)
    var = sum(variances[s] for s in statistics) / len(statistics)
    expected = (flat - mean[..., None]) / (var[..., None] + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), expected.view_as(x))
    if "bn" in statistics:
        torch.testing.assert_close(layer.running_var, variances["bn"][0])
    assert "unbiased=True" in repr(layer) and not sn.SwitchNorm2d(4).unbiased
    assert layer(x[:, :, :1, :1]).isfinite().all()  # NaN in the official code


# --- the scripts ----------------------------------------------------------------------------------


def run_script(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def call(load_script, monkeypatch):
    """A script's `main`, called as from its command line."""

    def called(name, *arguments):
        main = load_script(name).main
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        main()

    return called


def test_scripts(tmp_path, call, capsys):
    state = official_state(official_network("resnet18"))
    torch.save({k: v.float() for k, v in state.items()}, tmp_path / "theirs.pth")
    call("convert_checkpoint", tmp_path / "theirs.pth", tmp_path / "ours.pt")
    assert "resnet18 with in+ln+bn" in capsys.readouterr().out
    content = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert content["norm"]["unbiased"] is True
    with pytest.raises(SystemExit) as bad:
        call("convert_checkpoint", tmp_path / "ours.pt", tmp_path / "again.pt")
    assert bad.value.code == 2 and "a layer of ours" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["sn", "gn"])
def test_evaluating_checkpoints(norm, tmp_path):
    run = tmp_path / "run"
    options = [f"norm={norm}", "setting=8x4", "schedule.epochs=2", "data.train_images=96"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_imagenet.py"), "device=cpu", f"output_dir={run}"]
    subprocess.run([*command, *options], check=True, cwd=ROOT, env=env, capture_output=True)
    summary = json.loads((run / "summary.json").read_text())
    out = run_script("evaluate_checkpoint.py", run / "checkpoint.pt", "--device", "cpu")
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert found["top1_moving_average"] == pytest.approx(summary["top1"], abs=1e-3)
    if norm == "gn":
        assert "top1_batch_average" not in found
    else:
        assert found["top1_batch_average"] == pytest.approx(summary["top1_batch_average"], abs=1e-3)
    bare = ("--model", "resnet20", "--source", "cifar", "--norm", norm, "--data", "digits")
    bare = run_script("evaluate_checkpoint.py", run / "checkpoint.pt", *bare)
    assert bare.returncode == 0, bare.stderr
    assert json.loads(bare.stdout)["top1_moving_average"] == found["top1_moving_average"]
    lost = run_script("evaluate_checkpoint.py", run / "checkpoint.pt", "--model", "resnet18")
    assert lost.returncode == 2 and "--data" in lost.stderr


def evaluated_share(rank, checkpoint, norm, *options):
    """scripts/evaluate_checkpoint.py as one process of several."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import evaluate_checkpoint

    sys.argv = ["evaluate_checkpoint.py", checkpoint, "--device", "cpu", "--norm", norm, *options]
    sys.argv += ["--model", "resnet8", "--source", "cifar", "--data", "digits"]
    with open(f"{checkpoint}.{rank}", "w") as file, contextlib.redirect_stdout(file):
        evaluate_checkpoint.main()


@pytest.mark.parametrize(
    "norm, batches, size", [("sn", 1, 256), ("sync_sn", 3, 75), ("sync_sn", 3, 1)]
)
def test_evaluating_with_uneven_shares_of_batches(norm, batches, size, tmp_path):
    """As one process does; synchronised layers wait for one another in every batch."""
    torch.manual_seed(0)
    model = build_model(num_classes=10, norm=sn.make_norm(norm), name="resnet8", source="cifar")
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pt")
    options = (str(tmp_path / "checkpoint.pt"), norm, "--batches", str(batches))
    results = []
    for processes in (2, 1):
        run_in_group(processes, evaluated_share, *options, "--batch-size", str(size))
        results.append(json.loads((tmp_path / "checkpoint.pt.0").read_text()))
    assert results[0] == results[1] and results[0]["batches"] == batches


def image_folder(root, classes=3):
    for part in ("train", "val"):
        for label in range(classes):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = np.random.default_rng(label).integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("name, source", [("mobilenet_v2", "torchvision"), ("regnetx_002", "timm")])
def test_evaluating_networks_of_every_kind(name, source, tmp_path, call, capsys):
    """No head by a known name; fused layers, for which the network has to be converted again."""
    torch.manual_seed(0)
    plain = batch_norm_model(name, source, 3)
    for layer in plain.modules():
        if hasattr(layer, "running_var"):
            layer.eps = 0.5
    model = sn.convert(plain, "sn", keep_outputs=True, gate_start=2.0)
    content = {"model": model.state_dict(), "network": network_facts(model, 3)}
    torch.save(content, tmp_path / "checkpoint.pt")
    data = {
        "name": "birds",
        "root": str(image_folder(tmp_path / "birds")),
        "image_size": 32,
        "resize": 36,
    }
    config = {"model": {"name": name, "source": source}, "norm": {"name": "sn"}, "data": data}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "birds" / "val" / "1" / "1.png").write_bytes(b"no image")
    call("evaluate_checkpoint", tmp_path / "checkpoint.pt", "--device", "cpu")
    found = json.loads(capsys.readouterr().out)
    images = build_data(**data)
    losses = []
    for label in range(3):
        for number in range(2 - (label == 1)):
            image = read_image(tmp_path / f"birds/val/{label}/{number}.png")
            x = images.evaluation.normalise(images.evaluation.usual(image))[None]
            losses.append(F.cross_entropy(model.eval()(x), torch.tensor([label])).item())
    assert found["loss_moving_average"] == pytest.approx(sum(losses) / 5, abs=1e-3)
    with pytest.raises(SystemExit) as error:
        call("evaluate_checkpoint", tmp_path / "checkpoint.pt", "--max-bad-images", "0")
    assert error.value.code == 2 and "1.png" in capsys.readouterr().err


def test_data_of_other_classes_are_refused(tmp_path, call, capsys):
    model = build_model(num_classes=7, norm=sn.make_norm("sn"), name="resnet8", source="cifar")
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pt")
    bare = ("--model", "resnet8", "--source", "cifar", "--norm", "sn", "--data", "digits")
    with pytest.raises(SystemExit) as error:
        call("evaluate_checkpoint", tmp_path / "checkpoint.pt", *bare, "--device", "cpu")
    assert error.value.code == 2
    assert "tells 7 classes apart, digits has 10" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["convert_checkpoint", "evaluate_checkpoint"])
def test_empty_file_is_one_message(name, tmp_path, call, capsys):
    """torch's own error for it has no text."""
    path = tmp_path / "empty.pth"
    path.touch()
    with pytest.raises(SystemExit) as error:
        call(name, path, *([tmp_path / "out.pt"] if name.startswith("convert") else []))
    errors = capsys.readouterr().err
    assert error.value.code == 2 and errors.count("\n") == 1
    assert str(path) in errors and not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    "option, value",
    [("batch-size", 0), ("batches", -1), ("workers", -1), ("seed", -1), ("batch-size", 10**9)],
)
def test_numbers_of_the_evaluation_are_checked(option, value, call, capsys):
    with pytest.raises(SystemExit) as error:
        call("evaluate_checkpoint", "none.pt", f"--{option}", value, "--device", "cpu")
    assert error.value.code == 2
    assert f"--{option} {value}; expected " in capsys.readouterr().err


@pytest.fixture
def load(load_script):
    """What scripts/evaluate_checkpoint.py makes of a file: the network."""
    script = load_script("evaluate_checkpoint")

    def load(path, **options):
        given = {"model": None, "source": "cifar", "norm": "sn", "data": "digits", "key": None}
        return script.load(argparse.Namespace(checkpoint=path, **given | options), None)[0]

    return load


def a_checkpoint(prefix="", **changed):
    build = {"name": "resnet8", "source": "cifar", "num_classes": 10, "width": 8}
    model = build_model(**build, norm=sn.make_norm("sn"))
    state = {prefix + key: value for key, value in model.state_dict().items()}
    return {"build": build | changed, "norm": {"name": "sn"}, "model": state}, model


def test_the_batch_average_may_be_of_augmented_images(load_script):
    """The running statistics then come from shifted images, those of the moving average stay."""
    script = load_script("evaluate_checkpoint")
    data = build_data("digits", train_images=64)
    processes = argparse.Namespace(rank=0, world_size=1, device=torch.device("cpu"))
    made = {}
    for name in ("own", "none"):
        images = data if name == "own" else replace(data, augmentation=data.evaluation)
        for augment in (False, True):
            layer = sn.SwitchNorm2d(3)
            model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(10)).eval()
            args = argparse.Namespace(workers=0, batch_size=32, batches=2, seed=0, augment=augment)
            found = script.evaluate_both(model, images, args, processes)
            assert found["batches"] == 2 and "top1_moving_average" in found
            made[name, augment] = layer.running_var
    assert torch.equal(made["own", False], made["none", True])
    assert not torch.allclose(made["own", False], made["own", True], rtol=1e-3)


@pytest.mark.parametrize(
    "source, name, size",
    [("torchvision", "mobilenet_v3_small", 64), ("torchvision", "googlenet", 64),
     ("torchvision", "regnet_y_400mf", 64), ("timm", "efficientnet_b0", 64)],
)  # fmt: skip
def test_a_librarys_own_state_is_of_its_own_batch_norms(source, name, size, load, tmp_path):
    """Their eps, GoogLeNet's second heads and shifted input, timm's fused layers."""
    if source == "timm":
        import timm

        theirs = timm.create_model(name, num_classes=10).eval()
    else:
        more = {"transform_input": True, "init_weights": False} if name == "googlenet" else {}
        theirs = torchvision.models.get_model(name, num_classes=10, **more).eval()
    for key, tensor in theirs.state_dict().items():
        if "running_var" in key:
            tensor.uniform_(0.01, 0.1)  # beside which eps counts
    torch.save(theirs.state_dict(), tmp_path / "c.pth")
    ours = load(tmp_path / "c.pth", model=name, source=source, norm="bn").eval()
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_a_googlenet_that_torchvisions_script_trained(load, tmp_path):
    """With second heads, too, but without the shift of the input."""
    theirs = torchvision.models.get_model("googlenet", num_classes=10, init_weights=False).eval()
    assert not theirs.transform_input
    content = {"model": theirs.state_dict(), "epoch": 1, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "c.pth")
    ours = load(tmp_path / "c.pth", model="googlenet", source="torchvision", norm="bn").eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_states_without_counts_of_batches(norm, load, tmp_path):
    model = build_model("resnet8", "cifar", 10, sn.make_norm(norm))
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("batches_tracked")}
    torch.save(state, tmp_path / "c.pth")
    ours = load(tmp_path / "c.pth", model="resnet8", norm=norm).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in state.items())


def test_a_fine_tuned_network_whose_norm_layer_is_another(load, tmp_path):
    plain = batch_norm_model("visformer_tiny", "timm", 10)
    model = sn.convert(plain, "sn", keep_outputs=True)
    torch.save(
        {"model": model.state_dict(), "network": network_facts(model, 10)}, tmp_path / "c.pt"
    )
    config = {"model": {"name": "visformer_tiny", "source": "timm"}, "norm": {"name": "sn"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"data": {"name": "digits"}}))
    assert load(tmp_path / "c.pt").state_dict().keys() == model.state_dict().keys()


def test_statistics_of_another_layer_are_refused(load, tmp_path):
    norm = sn.make_norm("sn", statistics=("in", "gn", "bn"), num_groups=8)
    model = build_model("resnet8", "cifar", 10, norm)
    torch.save(
        {"model": model.state_dict(), "network": network_facts(model, 10)}, tmp_path / "c.pt"
    )
    with pytest.raises(ValueError, match=r"c.pt does not fit: .*\('in', 'gn', 'bn'\)"):
        load(tmp_path / "c.pt", model="resnet8")


def test_the_folder_of_a_runs_data_is_asked_for(tmp_path, call, capsys):
    torch.save(a_checkpoint()[0], tmp_path / "c.pt")
    with pytest.raises(SystemExit) as error:
        call("evaluate_checkpoint", tmp_path / "c.pt", "--data", "birds", "--device", "cpu")
    assert error.value.code == 2 and "--root is not set" in capsys.readouterr().err


def test_data_that_need_no_folder_are_not_asked_for_one(tmp_path, call, monkeypatch):
    torch.save(a_checkpoint()[0], tmp_path / "c.pt")
    monkeypatch.setitem(LOADERS, "memory", lambda train_images=None: build_data("digits"))
    call("evaluate_checkpoint", tmp_path / "c.pt", "--data", "memory", "--device", "cpu")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.module."])
def test_wrapped_networks_are_evaluated(prefix, load, tmp_path):
    content, model = a_checkpoint(prefix)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(x)
    torch.save(content, tmp_path / "c.pt")
    assert torch.equal(load(tmp_path / "c.pt").eval()(x), expected)
    content["build"].pop("width")  # as a run's checkpoint has it: beside its config
    config = {"model": {"name": "resnet8", "source": "cifar", "width": 8}, "norm": {"name": "sn"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"data": {"name": "digits"}}))
    torch.save({"model": content["model"]}, tmp_path / "c.pt")
    assert torch.equal(load(tmp_path / "c.pt").eval()(x), expected)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"width": 10**7}, "model.width=10000000; expected a whole number, 1 to 4096"),
        ({"num_classes": 10**12}, "(10, 32) instead of (1000000000000, 32)"),  # takes no memory
        ({"name": 3}, "model.name=3; expected a name"),
        ({"width": True}, "model.width=True; expected a whole number"),
        ({"width": "8"}, "model.width=8; expected a whole number"),
        ({"dropout": "0.5"}, "model.dropout=0.5; expected a number"),
        ({"dropout": True}, "model.dropout=True; expected a number"),
        ({"whidth": 8}, "whidth"),
    ],
    ids=str,
)
def test_options_in_a_file_are_checked(changed, message, load, tmp_path):
    torch.save(a_checkpoint(**changed)[0], tmp_path / "c.pt")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "c.pt")
    assert message in str(error.value) and str(tmp_path / "c.pt") in str(error.value)


@pytest.mark.parametrize("text", ["model: &x {name: *x}", "- 1", "model: [1]", "a: ["])
def test_config_beside_it_that_is_none(text, load, tmp_path):
    torch.save({"model": a_checkpoint()[0]["model"]}, tmp_path / "c.pt")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load(tmp_path / "c.pt")

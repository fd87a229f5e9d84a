"""A trained network on images of any size: strips against the whole, odd sizes, ONNX."""

import importlib.util
from pathlib import Path

import pytest
import torch
import workers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sn
import sn.training.style.stylize as stylize_module
from sn.training.style.networks import build_style_net
from sn.training.style.stylize import (
    Moments,
    channel_affine,
    export_onnx,
    load_style_net,
    onnx_difference,
    stylize,
    stylize_in_strips,
)

NORMS = ("bn", "in", "sn", "ln", "gn", "none", "sn_in_ln", "ssn", "brn", "bkn", "frozen_bn")
CPU = torch.device("cpu")


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def trained(norm, **options):
    """A small network whose gains, gates and running statistics are not the initial ones."""
    torch.manual_seed(2)
    net = build_style_net(sn.make_norm(norm), width=4, residual_blocks=1, **options)
    for name, parameter in net.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    for seed in range(3):
        net(images(2, 3, 16, 16, seed=seed))
    return net.eval()


@pytest.mark.parametrize("norm", NORMS)
def test_strips_equal_the_whole(norm):
    """In float64 to rounding, whatever the height of a strip; the last strip may be short."""
    net, x = trained(norm).double(), images(1, 3, 36, 20).double()
    x[:, :, :12] *= 0.1  # a dark top: strips that took their own statistics would show it
    with torch.no_grad():
        whole = net(x)
    for rows in (1, 5, 8, 100):
        torch.testing.assert_close(
            stylize_in_strips(net, x, rows, CPU), whole, atol=1e-11, rtol=1e-11
        )


def test_strips_do_not_take_their_own_statistics():
    """What naive tiles would give differs by far more than the tolerance above."""
    net, x = trained("in").double(), images(1, 3, 36, 20).double()
    x[:, :, :12] *= 0.1
    with torch.no_grad():
        naive = torch.cat([net(part) for part in x.split(12, dim=2)], 2)
        assert (naive - net(x)).abs().max() > 0.05


def test_strips_in_float32():
    """The tolerance that is stated: a tenth of a grey level."""
    net, x = trained("sn"), images(1, 3, 64, 48)
    y = stylize(net, x[0], strip_pixels=500)
    assert (y - stylize(net, x[0])).abs().max() < 0.1 / 255


def test_moments_in_parts(monkeypatch):
    """numpy's, whatever the parts: rows of less than one part, and of more."""
    maps = 1000 + images(3, 50, 40).double()
    flat = maps.numpy().reshape(3, -1)
    for part in (10, 100, 10_000):
        monkeypatch.setattr(stylize_module, "PART", part)
        moments = Moments()
        for strip in maps.split(17, dim=1):
            moments.add(strip)
        assert moments.count == 2000
        torch.testing.assert_close(moments.mean.numpy(), flat.mean(1), rtol=1e-13, atol=0)
        variance = (moments.deviation / moments.count).numpy()
        torch.testing.assert_close(variance, flat.var(1), rtol=1e-9, atol=0)


def test_strips_have_no_copy_of_a_map_in_float64(monkeypatch):
    """Of a float32 network; what of a strip there is in float64 does not grow with the strip."""
    monkeypatch.setattr(stylize_module, "PART", 64)
    net, x = trained("in"), images(1, 3, 64, 48)

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                self.found = max(self.found, result.numel())
            return result

    with Largest() as largest:
        stylize_in_strips(net, x, 64, CPU)
    assert 0 < largest.found <= 64 * 16  # 16: channels of the widest layer


@pytest.mark.parametrize("norm", NORMS)
def test_channel_affine(norm):
    """Scale and shift from the channel moments against the norm itself, on a map with a spread."""
    layer = trained(norm).down[1].norm.double()
    x = torch.randn(1, 8, 7, 9, dtype=torch.float64) * torch.arange(8).view(8, 1, 1) + 3
    x[:, 5] = 2.0  # a flat channel
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    scale, shift = channel_affine(layer, mean, var)
    expected = layer(x)
    torch.testing.assert_close(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (5, 7), (8, 8), (33, 18)])
def test_any_size_comes_back_as_it_was(size):
    net, x = trained("sn"), images(3, *size)
    y = stylize(net, x)
    assert y.shape == x.shape and torch.isfinite(y).all()
    torch.testing.assert_close(stylize(net, x, strip_pixels=40), y, atol=1e-4, rtol=0)


def test_sizes_that_fit_are_not_padded():
    net, x = trained("in"), images(3, 16, 24)
    with torch.no_grad():
        assert torch.equal(stylize(net, x), net(x[None])[0])


def test_batch_norm_uses_its_running_statistics():
    """One image does not depend on its own contrast as it does with IN: evaluation mode."""
    net = trained("bn")
    layer = net.down[0].norm
    assert not torch.equal(layer.running_var, torch.ones(4))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    stylize(net, images(3, 16, 16, seed=9))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name


# --- checkpoints


def checkpoint(path, norm="sn", **model):
    options = {"width": 4, "residual_blocks": 1, "fused_activation": False} | model
    net = build_style_net(sn.make_norm(norm), **options)
    state = {"model": net.state_dict(), "style_net": {"norm": {"name": norm}, "model": options}}
    torch.save(state, path)
    return net


@pytest.mark.parametrize("fused", [False, True])
def test_network_of_a_checkpoint(tmp_path, fused):
    net = checkpoint(tmp_path / "checkpoint.pt", fused_activation=fused).eval()
    loaded = load_style_net(tmp_path / "checkpoint.pt")
    x = images(1, 3, 12, 12)
    assert not loaded.training
    torch.testing.assert_close(loaded(x), net(x))
    rows = stylize_in_strips(loaded, x, 4, CPU)
    torch.testing.assert_close(rows, loaded(x), atol=1e-5, rtol=0)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint .*nowhere.pt"):
        load_style_net(tmp_path / "nowhere.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is not a checkpoint of style_transfer.py"):
        load_style_net(tmp_path / "other.pt")
    checkpoint(tmp_path / "changed.pt")
    state = torch.load(tmp_path / "changed.pt", weights_only=True)
    state["style_net"]["model"]["width"] = 8
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(ValueError, match="changed.pt does not fit its own network"):
        load_style_net(tmp_path / "changed.pt")


# --- ONNX

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="needs onnx, onnxscript and onnxruntime: pip install '.[onnx]'",
)


@needs_onnx
@pytest.mark.parametrize(
    "norm", ["sn", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("bn", "in"))]
)
def test_onnx_at_sizes_it_was_not_exported_at(norm, tmp_path):
    net = trained(norm)
    export_onnx(net, tmp_path / "deep" / "style.onnx")
    difference = onnx_difference(net, tmp_path / "deep" / "style.onnx", [(16, 24), (44, 20)])
    assert difference < 1e-4


def test_export_without_the_packages_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"pip install '.\[onnx\]'"):
        export_onnx(nn.Identity(), tmp_path / "style.onnx")


def test_networks_write_beside_their_checkpoints():
    given = ["mode=stylize", "stylize.checkpoint=a/checkpoint.pt", "stylize.images=x"]
    given.append("export.checkpoint=b/checkpoint.pt")
    config = workers.config(*given, root="style_transfer")
    assert config.stylize.folder() == Path("a/stylized")
    assert config.export.path() == Path("b/style.onnx")
    given = [*given, "stylize.output=c", "export.output=d.onnx"]
    config = workers.config(*given, root="style_transfer")
    assert (config.stylize.folder(), config.export.path()) == (Path("c"), Path("d.onnx"))


def test_a_graph_that_differs_leaves_the_older_file(tmp_path, monkeypatch):
    output = tmp_path / "style.onnx"
    output.write_text("older")
    monkeypatch.setattr(stylize_module, "load_style_net", lambda _: None)
    monkeypatch.setattr(stylize_module, "export_onnx", lambda _, path: path.write_text("newer"))
    monkeypatch.setattr(stylize_module, "onnx_difference", lambda *_: 0.5)
    given = ["mode=export", "export.checkpoint=x", f"export.output={output}"]
    config = workers.config(*given, root="style_transfer")
    with pytest.raises(ValueError, match=r"differs from torch by up to 0\.5"):
        stylize_module.export(config)
    assert output.read_text() == "older" and list(tmp_path.iterdir()) == [output]
    monkeypatch.setattr(stylize_module, "onnx_difference", lambda *_: 1e-6)
    stylize_module.export(config)
    assert output.read_text() == "newer" and list(tmp_path.iterdir()) == [output]


def style_net(model):
    """A checkpoint that says this of its network."""
    return {"model": {}, "style_net": {"norm": {"name": "in"}, "model": model}}


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "no readable checkpoint"),
        ({"model": {}, "style_net": 3}, "is not a checkpoint of style_transfer.py"),
        (style_net(3), "expected norm and model"),
        (style_net({"width": 10**7, "residual_blocks": 1}), "model.width=10000000; expected a wh"),
        (style_net({"width": 4}), "no model.residual_blocks"),
    ],
    ids=str,
)
def test_checkpoints_of_another_shape(content, message, tmp_path):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message):
        load_style_net(tmp_path / "c.pt")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_weights_of_a_wrapped_network(prefix, tmp_path):
    options = {"width": 4, "residual_blocks": 1}
    state = build_style_net(sn.make_norm("in"), **options).state_dict()
    content = {"model": {prefix + key: value for key, value in state.items()}}
    content["style_net"] = {"norm": {"name": "in"}, "model": options}
    torch.save(content, tmp_path / "c.pt")
    assert load_style_net(tmp_path / "c.pt").state_dict().keys() == state.keys()

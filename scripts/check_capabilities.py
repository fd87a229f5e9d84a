"""Run every norm through what a deployed layer meets, and write the table norm x capability.

    python scripts/check_capabilities.py              # prints the table
    python scripts/check_capabilities.py --readme     # also puts it into docs/layers.md

A cell is "yes" if the outputs agree with plain evaluation or training, else what is wrong; a
column whose package is missing says "-". ONNX needs `pip install -c constraints.txt -e '.[onnx]'`.
"""

import argparse
import copy
import importlib.util
import io
import pickle
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import sn
from sn.norms import NORMS

README = Path(__file__).resolve().parents[1] / "docs" / "layers.md"
BEGIN, END = "<!-- capabilities: begin -->", "<!-- capabilities: end -->"
ONNX = ("onnx", "onnxscript", "onnxruntime")


def network(norm: str) -> nn.Module:
    """Two convolutions and norms with statistics of their own, in evaluation mode."""
    torch.manual_seed(0)
    build = sn.make_norm(norm)
    layers = (nn.Conv2d(3, 8, 3), build(8), nn.ReLU(), nn.Conv2d(8, 4, 3), build(4))
    model = sn.connect_bkn(nn.Sequential(*layers))
    for _ in range(2):
        model(images(4))
    return model.eval()


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 10, 10, generator=generator)


def same(ours, theirs, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def check_compile(model: nn.Module) -> None:
    for mode in (False, True):
        plain, compiled = copy.deepcopy(model).train(mode), copy.deepcopy(model).train(mode)
        torch._dynamo.reset()
        function = torch.compile(compiled, fullgraph=True)  # inductor, which needs a compiler
        x = images(4).requires_grad_()
        y, expected = function(x), plain(x)
        same(y, expected)
        # of other weights than y itself, whose gradient a norm takes out
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        for own, wanted in zip(
            torch.autograd.grad((y * weights).sum(), learnt(compiled, x)),
            torch.autograd.grad((expected * weights).sum(), learnt(plain, x)),
            strict=True,
        ):
            same(own, wanted, 1e-3)
        same(compiled.state_dict(), plain.state_dict())


def learnt(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [x, *(p for p in model.parameters() if p.requires_grad)]


def check_export(model: nn.Module) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (images(4),), dynamic_shapes=(batch,))
    for count in (1, 4, 7):
        same(program.module()(images(count)), model(images(count)))


def check_onnx(model: nn.Module) -> None:
    import onnxruntime

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    file = io.BytesIO()
    program = torch.onnx.export(
        model, (images(4),), dynamic_shapes=(batch,), dynamo=True, verbose=False
    )
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for count in (1, 4, 7):
        (y,) = session.run(None, {name: images(count).numpy()})
        same(torch.from_numpy(y), model(images(count)).detach())


def check_amp(model: nn.Module) -> None:
    for mode in (False, True):
        plain, mixed = copy.deepcopy(model).train(mode), copy.deepcopy(model).train(mode)
        with torch.autocast("cpu", torch.bfloat16):
            y = mixed(images(8))
        same(y.float(), plain(images(8)), 0.1)
        y.float().square().mean().backward()
        for p in mixed.parameters():
            assert p.grad.isfinite().all() and p.dtype == p.grad.dtype == torch.float32


def check_channels_last(model: nn.Module) -> None:
    layout = torch.channels_last
    for mode in (False, True):
        plain, last = copy.deepcopy(model).train(mode), copy.deepcopy(model).train(mode)
        y = last.to(memory_format=layout)(images(4).to(memory_format=layout))
        assert y.is_contiguous(memory_format=layout), "output in another layout"
        same(y, plain(images(4)))


def check_func(model: nn.Module) -> None:
    """Gradients of each sample by vmap, in evaluation."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    x = images(3)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for k in range(3):
        leaves = list(model.parameters())
        wanted = torch.autograd.grad(model(x[k : k + 1]).square().sum(), leaves)
        for (name, _), grad in zip(model.named_parameters(), wanted):
            same(found[name][k], grad, 1e-3)


def check_copies(model: nn.Module) -> None:
    """deepcopy, pickle and a checkpoint read with weights_only."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        same(twin(images(4)), model(images(4)), 0)
        assert repr(twin) == repr(model)
        for tensor in twin.parameters():
            assert all(tensor is not other for other in model.parameters())


def check_jit_trace(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images(4))
    same(traced(images(7)), model(images(7)))


def check_batch_average(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    assert sn.batch_average(twin, [images(4), images(7)], 2) == 2
    assert not twin.training and twin(images(4)).isfinite().all()
    assert (twin(images(4)) != model(images(4))).any()


def check_fold(model: nn.Module) -> None:
    for layer in model:
        if hasattr(layer, "mean_choice"):  # as at the end of its training
            layer.mean_choice[2] = layer.var_choice[2] = 1
    folded = sn.fold(model)
    assert sum(isinstance(m, sn.NoNorm) for m in folded) == 2, "nothing to fold"
    same(folded(images(4)), model(images(4)))


CHECKS: dict[str, Callable[[nn.Module], None]] = {
    "compile, fullgraph": check_compile,
    "export, any batch": check_export,
    "ONNX, any batch": check_onnx,
    "jit.trace": check_jit_trace,
    "autocast bf16": check_amp,
    "channels_last": check_channels_last,
    "func, vmap": check_func,
    "copy, pickle, print": check_copies,
    "batch average": check_batch_average,
    "fold": check_fold,
}
NOT_MEANT = {  # what a norm has no use for
    "batch average": ("none", "gn", "in", "ln", "sn_in_ln", "frozen_bn"),
    "fold": ("none", "gn", "in", "ln", "sn_in_ln", "sn", "sync_sn"),
}


def cell(norm: str, capability: str) -> str:
    """yes, "no: <error>", "" where it is not meant, "-" where a package is missing."""
    if norm in NOT_MEANT.get(capability, ()):
        return ""
    if capability.startswith("ONNX") and not all(map(found, ONNX)):
        return "-"
    try:
        CHECKS[capability](network(norm))
    except AssertionError as error:
        return f"no: {(str(error) or 'AssertionError').splitlines()[0]}"
    except Exception as error:
        return f"no: {type(error).__name__}"
    return "yes"


def table() -> str:
    lines = ["| norm | " + " | ".join(CHECKS) + " |", "| --- |" + " --- |" * len(CHECKS)]
    for norm in NORMS:
        lines.append("| " + " | ".join([norm, *(cell(norm, check) for check in CHECKS)]) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="put the table into docs/layers.md")
    args = parser.parse_args()
    text = table()
    print(text)
    if args.readme:
        README.write_text(replace_table(README.read_text(), text))


def replace_table(readme: str, text: str) -> str:
    """The page with `text` and what it was made with between the markers."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", *ONNX) if found(name)
    )
    source = f"Made by `scripts/check_capabilities.py --readme` on the CPU with {versions}."
    return f"{head}{BEGIN}\n{source}\n\n{text}{END}{tail}"


def found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    main()

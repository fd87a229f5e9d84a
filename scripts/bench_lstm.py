"""Time the normalised LSTM against torch's own, in one run, interleaved.

    python scripts/bench_lstm.py                    # eager
    python scripts/bench_lstm.py --compile          # everything through torch.compile
    python scripts/bench_lstm.py --device cuda

Every contestant is first held to float64 in outputs and gradients; one that is wrong is not timed.
A round times every contestant once, a ratio is taken within its round, and the median over the
rounds counts. cell: one step, forward + backward, over nn.LSTMCell. layer: a sequence, over nn.LSTM
(which torch runs as one fused operation) and over nn.LSTMCell in a loop. Writes <output>.json and
a table, <output>.md.
"""

import argparse
import copy
import statistics as stats
from pathlib import Path

import torch
from common import bench
from torch import Tensor, nn

import sn

NORMS = ("none", "ln", "gn", "sn_ln_gn")
LOOP = "torch's cell in a loop"
LIMITS = {"cell": 1e-3, "layer": 1e-2}  # of the relative error; float32 through 32 steps


class Loop(nn.Module):
    """A cell over a sequence (L, B, D)."""

    def __init__(self, cell: nn.LSTMCell):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        outputs = []
        for step in x:
            h, c = self.cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs), c


class Layer(nn.Module):
    """A sequence layer, with states (B, D) as the cell has them."""

    def __init__(self, layer: nn.LSTM):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, (_, c) = self.layer(x, tuple(s[None] for s in state))
        return y, c[0]


def contestants(kind: str, size: int) -> dict[str, nn.Module]:
    """name -> module(x, (h, c)); the first is the measure of the others."""
    if kind == "cell":
        found = {"torch": nn.LSTMCell(size, size)}
        return found | {norm: sn.SwitchNormLSTMCell(size, size, norm=norm) for norm in NORMS}
    found = {"torch": Layer(nn.LSTM(size, size)), LOOP: Loop(nn.LSTMCell(size, size))}
    return found | {norm: Layer(sn.SwitchNormLSTM(size, size, norm=norm)) for norm in NORMS}


def error(module: nn.Module, x: Tensor, state: tuple[Tensor, Tensor]) -> float:
    """Largest relative error of outputs and gradients against float64 in plain operations."""
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "auto")):
        own = copy.deepcopy(module).to(dtype)
        with sn.backend(backend):
            y, c = own(x.to(dtype), tuple(s.to(dtype) for s in state))
            (y.sum() + c.square().sum()).backward()
        results.append([y.detach(), c.detach(), *(p.grad for p in own.parameters())])
    errors = [(a - b).abs().max() / a.abs().max().clamp(min=1e-30) for a, b in zip(*results)]
    return torch.stack(errors).max().item()  # NaN if one is


def step(module: nn.Module, x: Tensor, state: tuple[Tensor, Tensor]):
    """One forward and backward pass, as a call without arguments."""

    def call() -> None:
        y, c = module(x, state)
        torch.autograd.backward([y, c], [torch.ones_like(y), torch.ones_like(c)])

    return call


def time_all(args, kind: str, batch: int) -> list[dict]:
    """Rows of one kind and batch size."""
    torch.manual_seed(0)
    shape = (batch, args.size) if kind == "cell" else (args.length, batch, args.size)
    x = torch.randn(shape, device=args.device)
    state = tuple(torch.randn(batch, args.size, device=args.device) for _ in range(2))
    functions = {}
    for name, module in contestants(kind, args.size).items():
        module = module.to(args.device)
        wrong = error(module, x, state)
        if not wrong <= LIMITS[kind]:
            print(f"{kind}, batch {batch}: {name} is wrong by {wrong:.1e}, not timed")
            continue
        if args.compile:
            module.compile()
        functions[name] = step(module, x, state)
    repeats = args.repeats if kind == "cell" else max(1, args.repeats // args.length)
    times = bench.interleaved(functions, args.rounds, args.clock, args.device, repeats, warm_up=5)
    rows = []
    for name, own in times.items():
        row = {"kind": kind, "batch": batch, "name": name, "us": 1e6 * stats.median(own)}
        for measure in ("torch", LOOP):
            if measure in times:
                row[f"over {measure}"] = bench.ratio(own, times[measure])
        rows.append(row)
    return rows


def table(result: dict) -> str:
    """The ratios as a Markdown table."""
    where = result["environment"]
    lines = [
        f"# The LSTM's cost ({'torch.compile' if result['compile'] else 'eager'})",
        "",
        f"Forward + backward, float32, size {result['size']}, sequences of {result['length']}; "
        f"{where['device']}, {where['threads']} thread, torch {where['torch']}, commit "
        f"{where['commit']}, load {where['load'][0]} on {where['cores']} cores, {where['clock']} "
        "clock. Medians of ratios within a round.",
        "",
        "| | batch | microseconds | over torch's | over torch's cell in a loop |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        loop = row.get(f"over {LOOP}")
        lines.append(
            f"| {row['kind']}, {row['name']} | {row['batch']} | {row['us']:.0f} | "
            f"{row['over torch']:.2f} | {'' if loop is None else f'{loop:.2f}'} |"
        )
    return "\n".join(lines) + f"\n\n`{where['command']}`\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bench.add_arguments(parser, rounds=9)
    parser.add_argument("--compile", action="store_true", help="everything through torch.compile")
    parser.add_argument("--size", type=int, default=64, help="of input and state (default: 64)")
    parser.add_argument("--length", type=int, default=32, help="of a sequence (default: 32)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--kinds", nargs="+", default=["cell", "layer"], metavar="KIND")
    parser.add_argument("--repeats", type=int, default=100, help="steps per timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/bench/<device>_lstm")
    args = parser.parse_args()
    bench.keep_memory(args.device)
    torch.set_num_threads(args.threads)
    path = bench.output(args.output, f"{args.device}_lstm{'_compiled' if args.compile else ''}")
    where = bench.circumstances(args.device)
    where |= {"dtype": "float32", "rounds": args.rounds, "clock": args.clock}
    rows = [
        row for kind in args.kinds for batch in args.batch for row in time_all(args, kind, batch)
    ]
    result = {"environment": where, "compile": args.compile, "size": args.size,
              "length": args.length, "rows": rows}  # fmt: skip
    bench.write_json(path, result)
    path.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()

"""Time and memory of train_imagenet.py by setting and norm: what plan=true measures, as a table.

    python scripts/bench_settings.py -- experiment=imagenet/cifar10_16px data.root=data device=cpu
    python scripts/bench_settings.py --settings 8x4 --norms bn sn -- data=imagenet data.root=...

Overrides of train_imagenet.py follow `--`. Each row is a process of its own, of one thread, which
measures some ten seconds of training and of validation. Writes <output>.json, with the environment,
and <output>.md.
"""

import argparse
import contextlib
import io
import multiprocessing
import runpy
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common.bench import circumstances, output, write_json
from hydra import compose, initialize_config_dir

from sn.training.classification.config import ImagenetConfig  # registers the schema
from sn.training.run.config import typed

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("8x32", "8x16", "8x8", "8x4", "8x2", "8x1", "1x32", "1x16", "1x8")


def plan(overrides: list[str]) -> dict[str, float]:
    """The figures of `train_imagenet.py <overrides> plan=true`."""
    torch.set_num_threads(1)
    train = runpy.run_path(str(ROOT / "train_imagenet.py"))["train"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config: ImagenetConfig = typed(compose("imagenet", overrides=[*overrides, "plan=true"]))
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config)


def row(setting: str, norm: str, found: dict[str, float]) -> dict:
    """What one plan found, in the units of the table; None where it would not fit."""
    memory = found.get("gpu_bytes", found.get("peak_bytes"))
    training, validation = found.get("training_pass_s"), found.get("validation_pass_s")
    return {
        "setting": setting,
        "norm": norm,
        "step_mb": found["estimated_step_bytes"] / 1e6,
        "peak_mb": None if memory is None else memory / 1e6,
        "step_ms": None if training is None else 1000 * found["training_step_s"],
        "epoch_s": training,
        "validation_s": validation,
    }


HEADER = {
    "setting": "setting",
    "norm": "norm",
    "step_mb": "a step, estimated, MB",
    "peak_mb": "process or GPU at most, MB",
    "step_ms": "a step, ms",
    "epoch_s": "an epoch, s",
    "validation_s": "a validation, s",
}


def table(rows: list[dict]) -> str:
    """Markdown."""

    def text(value) -> str:
        if isinstance(value, str):
            return value
        return "does not fit" if value is None else f"{value:.{0 if value >= 100 else 1}f}"

    lines = ["| " + " | ".join(HEADER.values()) + " |", "| --- " * len(HEADER) + "|"]
    lines += ["| " + " | ".join(text(r[key]) for key in HEADER) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--norms", nargs="+", default=["bn", "gn", "sn"])
    parser.add_argument("--output", type=Path, default=None, help="<output>.json and .md")
    parser.add_argument("overrides", nargs="*", help="of train_imagenet.py, after --")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in each process; for the record
    rows, fresh = [], multiprocessing.get_context("spawn")
    for setting in args.settings:
        for norm in args.norms:
            words = [*args.overrides, f"setting={setting}", f"norm={norm}"]
            with ProcessPoolExecutor(1, mp_context=fresh) as pool:
                found = pool.submit(plan, words).result()
            rows.append(row(f"({setting.replace('x', ',')})", norm, found))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    if args.output is not None:
        about = {"rows": rows, "overrides": args.overrides}
        write_json(output(args.output, "settings"), about | circumstances("cpu"))
        args.output.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()

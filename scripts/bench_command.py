"""Whole commands: train_imagenet.py with BN and with SN beside timm's own training script.

    python scripts/bench_command.py --timm-train pytorch-image-models/train.py --root imagenet-mini

All train the same network on the same ImageFolder (<root>/train, <root>/val), batch size, workers,
crops and flips, with SGD, on the CPU. A round runs each command once, in turn; medians over rounds
count. Reported are

    images/s    from the first step's line to the last one's, of the last epoch
    first step  seconds from the command to the end of its first step: imports, config, data listing
    command     seconds of the whole command, with its validations and checkpoints
    memory      largest sum of proportional set sizes of the command's processes, MiB (Linux)
    CPU         seconds of processor time of the whole command

Ours also evaluates by batch average at its end, on one batch here, and validates once more for it.
Writes <output>.json with the environment and timm's version, <output>.md as a table.
"""

import argparse
import importlib.metadata
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common.bench import circumstances, output, write_json

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "images_per_s": "images/s",
    "first_step_s": "first step, s",
    "command_s": "command, s",
    "memory_mib": "memory, MiB",
    "cpu_s": "CPU, s",
}


def ours(args: argparse.Namespace, norm: str, folder: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train_imagenet.py"),
        *("data=imagenet", f"data.root={args.root}", f"data.image_size={args.size}"),
        *(f"data.resize={args.size}", "data.lighting=0", f"data.workers={args.workers}"),
        *("model=torchvision", f"model.name={args.model}", f"norm={norm}"),
        *("setting.gpus=1", f"setting.images_per_gpu={args.batch}"),
        *(f"schedule.epochs={args.epochs}", "schedule.last_fraction=0"),
        *(f"evaluation.batch_size={args.batch}", "evaluation.batch_average.batches=1"),
        *("device=cpu", "log_steps=1", f"output_dir={folder}"),
    ]


def timm(args: argparse.Namespace, folder: str) -> list[str]:
    classes = sum(path.is_dir() for path in (args.root / "train").iterdir())
    size = ("--input-size", "3", str(args.size), str(args.size), "--crop-pct", "1.0")
    return [
        sys.executable,
        str(args.timm_train),
        *("--data-dir", str(args.root), "--val-split", "val", "--num-classes", str(classes)),
        *("--model", args.model, *size, "--color-jitter", "0"),
        *("--batch-size", str(args.batch), "--workers", str(args.workers)),
        *("--epochs", str(args.epochs), "--warmup-epochs", "0", "--cooldown-epochs", "0"),
        *("--opt", "momentum", "--lr", "0.025", "--weight-decay", "1e-4", "--smoothing", "0"),
        *("--device", "cpu", "--log-interval", "1", "--output", folder),
    ]


# the line that each prints after a step: its step within the epoch, from 0
STEP = {
    "ours": re.compile(r"^epoch \d+, step (\d+) of"),
    "timm": re.compile(r"^Train: \d+ \[ *(\d+)/"),
}


def proportional(pids: list[int]) -> int:
    """Bytes of the processes, shared pages divided among those that share them."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        total += 1024 * int(found[1]) if found else 0
    return total


def group(leader: int) -> list[int]:
    """Processes of the session that `leader` leads."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == leader:
                found.append(int(path.name))
        except ProcessLookupError:
            continue
    return found


def measure(command: list[str], who: str, batch: int) -> dict[str, float]:
    """Run the command to its end; its figures. Raises RuntimeError with its output if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    over, peak = threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.2):
            peak[0] = max(peak[0], proportional(group(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    lines, steps = [], []  # (step, seconds) of the last epoch; the first of all stays
    first = None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            now = time.perf_counter() - began
            lines.append(line)
            if found := STEP[who].match(line):
                step = int(found[1])
                if steps and step <= steps[-1][0]:
                    steps = []
                steps.append((step, now))
                first = first or now
        process.wait()
    finally:
        over.set()
        watcher.join()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode or len(steps) < 2 or first is None:
        raise RuntimeError(
            f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines)}"
        )
    (start, early), (end, late) = steps[0], steps[-1]
    return {
        "images_per_s": (end - start) * batch / (late - early),
        "first_step_s": first,
        "command_s": seconds,
        "memory_mib": peak[0] / 2**20,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timm-train", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--root", type=Path, required=True, help="an ImageFolder with train, val")
    parser.add_argument("--model", default="resnet18", help="of the same name in both libraries")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None, help="<output>.json and .md")
    args = parser.parse_args()
    args.root, args.timm_train = args.root.resolve(), args.timm_train.resolve()
    rounds: dict[str, list[dict]] = {"train_imagenet.py, BN": [], "train_imagenet.py, SN": []}
    rounds[f"timm {importlib.metadata.version('timm')}, BN"] = []
    for _ in range(args.rounds):
        for name, results in rounds.items():
            with tempfile.TemporaryDirectory() as folder:
                if name.startswith("timm"):
                    command, who = timm(args, folder), "timm"
                else:
                    command, who = ours(args, name[-2:].lower(), folder), "ours"
                results.append(measure(command, who, args.batch))
            shown = ", ".join(f"{FIGURES[k]} {v:.1f}" for k, v in results[-1].items())
            print(f"{name}: {shown}", file=sys.stderr, flush=True)
    rows = [
        {"command": name}
        | {key: round(statistics.median(r[key] for r in results), 1) for key in FIGURES}
        | {"rounds": [{key: round(value, 1) for key, value in r.items()} for r in results]}
        for name, results in rounds.items()
    ]
    table = [
        f"| command | {' | '.join(FIGURES.values())} |",
        "|---" * (len(FIGURES) + 1) + "|",
        *(f"| {r['command']} | {' | '.join(f'{r[key]:.1f}' for key in FIGURES)} |" for r in rows),
    ]
    print("\n".join(table))
    if args.output is not None:
        about = {
            "what": f"{args.model} at {args.size} px, batch {args.batch}, {args.workers} workers, "
            f"{args.epochs} epochs of {args.root.name}",
            "rows": rows,
        }
        write_json(output(args.output, "commands"), about | circumstances("cpu"))
        args.output.with_suffix(".md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()

"""Copy the records of finished runs from a tree of outputs to results/, under the same run path.

    python scripts/keep_records.py outputs

Kept are config.yaml, metrics.jsonl, importance.jsonl and summary.json; no checkpoint and no event
file. A run is refused if it is broken, holds a path of the machine it ran on, or would take the
place of another one: two runs of one name and other recipes are different runs, whatever --force
says; --force replaces a record by a repetition of the same recipe alone. Runs below a folder
lr_search, which chose an lr and show no result, are kept in one.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from common.records import (
    ROOT,
    SEARCHES,
    Run,
    describe_differences,
    differences,
    fail,
    read_run,
    run_folders,
)

RECORDS = ("config.yaml", "metrics.jsonl", "importance.jsonl", "summary.json")
# /home/x, ~/x, C:\x, file://x, at the start of a value or after what may come before a path
LOCAL_PATH = re.compile(
    r"""(?:^|[\s'"=(\[,;:])((?:/[\w.+-]+|~[\w-]*/|[A-Za-z]:[\\/]\w|file://)\S*)"""
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Copy records of finished runs into results/.")
    parser.add_argument("source", type=Path, metavar="SRC", help="a tree of outputs")
    parser.add_argument(
        "--to", type=Path, default=ROOT / "results", metavar="DIR", help="(default: results)"
    )
    parser.add_argument("--force", action="store_true", help="replace records of the same recipe")
    args = parser.parse_args(argv)
    try:
        folders = run_folders(args.source)
    except FileNotFoundError as error:
        fail(str(error))
    if not folders:
        fail(f"no runs below {args.source}")
    if args.source.resolve() == args.to.resolve():
        fail(f"{args.source} is where the records would go")

    named, copied, refused = defaultdict(list), 0, 0
    for folder in folders:
        try:
            run = read_run(folder)
        except ValueError as error:
            refused += refuse(folder, str(error))
            continue
        if run.summary["status"] in ("finished", "diverged"):
            named[place(run, args.to)].append(run)
        else:
            print(f"left out {folder}: {run.summary['status']}")
    for target, runs in named.items():
        run = runs[0]
        reason = unfit(run) or several(runs) or occupied(run, target, args.force)
        if reason:
            refused += sum(refuse(run.path, reason) for run in runs)
        elif same(run.path, target):
            print(f"unchanged {target}")
        else:
            try:
                copy(run.path, target)
            except OSError as error:
                refused += refuse(run.path, str(error))
                continue
            print(f"copied {target}")
            copied += 1
            if found := unlike_seeds(run, target):
                print(f"warning: {target}: {found}", file=sys.stderr)
    print(f"{copied} of {len(folders)} runs copied to {args.to}")
    if refused:
        fail(f"{refused} of {len(folders)} runs refused")


def place(run: Run, root: Path) -> Path:
    """Where a run's records go below `root`."""
    searched = SEARCHES in run.path.parts and SEARCHES not in root.parts
    return (root / SEARCHES if searched else root) / run.name


def refuse(folder: Path, reason: str) -> int:
    print(f"refused {folder}: {reason}", file=sys.stderr)
    return 1


def unfit(run: Run) -> str | None:
    """Why a run's records cannot be kept: none of its progress, or a path of the machine it ran on.

    One that diverged may have done so before its first evaluation.
    """
    if not (run.diverged or (run.path / "metrics.jsonl").is_file()):
        return "metrics.jsonl missing"
    for file in RECORDS:
        if (run.path / file).is_file():
            for key, value in strings(read(run.path / file)):
                if found := LOCAL_PATH.search(value):
                    return f"{file}: {key} holds the local path {found[1]}"
    return None


def several(runs: list[Run]) -> str | None:
    """Why runs of one name cannot all be kept: they are not copies of one run."""
    first = runs[0]
    for run in runs[1:]:
        if found := differences([first, run]):
            return (
                f"another run has its name, {first.name}, and another recipe "
                f"({describe_differences(found)}); give one of them a run_name= of its own"
            )
    for run in runs[1:]:
        if not same(first.path, run.path):
            return (
                f"a second run of the name {first.name} and the same recipe: two runs of one seed "
                f"({first.path}, {run.path}); keep one of them"
            )
    return None


def occupied(run: Run, target: Path, force: bool) -> str | None:
    """Why the record at `target` is not to be replaced by `run`, or None."""
    if not target.exists() or same(run.path, target):
        return None
    if not (target / "summary.json").exists() and target.is_dir() and not any(target.iterdir()):
        return None
    try:
        old = read_run(target)
        found = differences([old, run])
    except ValueError as error:
        return None if force else f"{error} (--force overwrites it)"
    if found:
        return (
            f"{target} holds another run of that name ({describe_differences(found)}); give one of "
            "them a run_name= of its own, or keep it elsewhere (--to)"
        )
    if not force:
        return f"{target} holds a record that differs (--force overwrites it)"
    return None


def unlike_seeds(run: Run, target: Path) -> str | None:
    """What the recipe differs in from that of a seed beside it; tables draw such runs apart."""
    if run.diverged:  # after fewer steps
        return None
    for folder in (path.parent for path in sorted(target.parent.glob("*/summary.json"))):
        if folder == target:
            continue
        try:
            other = read_run(folder)
        except ValueError:
            continue
        if other.diverged:
            continue
        if not (found := differences([other, run])):
            return None
        return (
            f"another recipe than {folder.name} beside it ({describe_differences(found)}); "
            "if that was meant, a run_name= of its own keeps them apart"
        )
    return None


def read(path: Path) -> Any:
    """The content of a record file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return yaml.safe_load(text)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string inside a record, with the key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, key)


def same(source: Path, target: Path) -> bool:
    """Whether two run folders hold the same records."""

    def contents(folder: Path) -> dict[str, bytes]:
        files = (folder / name for name in RECORDS)
        return {path.name: path.read_bytes() for path in files if path.is_file()}

    return contents(source) == contents(target)


def copy(source: Path, target: Path) -> None:
    """Copy the records; one that the source lacks is removed, summary.json comes last."""
    target.mkdir(parents=True, exist_ok=True)
    parts = []
    try:
        for name in RECORDS:  # all of them, before anything there is replaced
            if (source / name).is_file():
                parts.append(target / f"{name}.part")
                shutil.copyfile(source / name, parts[-1])
    except OSError:  # a full disk
        for part in parts:
            part.unlink(missing_ok=True)
        raise
    for name in RECORDS:
        if target / f"{name}.part" in parts:
            os.replace(target / f"{name}.part", target / name)
        else:
            (target / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()

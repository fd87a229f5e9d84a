"""Copy the records of finished runs from a tree of outputs to results/, under the same run path.

    python scripts/keep_records.py outputs

Kept are config.yaml, metrics.jsonl, importance.jsonl and summary.json; no checkpoint and no event
file. A run is refused if its record there differs (--force overwrites it) or if it holds a path of
the machine it ran on.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from common.records import ROOT, fail, load_runs

RECORDS = ("config.yaml", "metrics.jsonl", "importance.jsonl", "summary.json")
REQUIRED = ("config.yaml", "metrics.jsonl", "summary.json")
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
    parser.add_argument("--force", action="store_true", help="overwrite records that differ")
    args = parser.parse_args(argv)
    try:
        runs = load_runs(args.source, task=None)
    except FileNotFoundError as error:
        fail(str(error))
    if not runs:
        fail(f"no runs below {args.source}")
    if args.source.resolve() == args.to.resolve():
        fail(f"{args.source} is where the records would go")

    copied, refused, seen = 0, 0, set()
    for run in runs:
        if run.summary["status"] not in ("finished", "diverged"):
            print(f"left out {run.path}: {run.summary['status']}")
            continue
        target = args.to / run.name
        reason = problem(run.path, run.name)
        if run.name in seen:
            reason = f"a second run {run.name} below {args.source}"
        elif not reason and not same(run.path, target) and target.exists() and not args.force:
            reason = f"{target} holds a record that differs (--force overwrites it)"
        if reason:
            print(f"refused {run.path}: {reason}", file=sys.stderr)
            refused += 1
            continue
        seen.add(run.name)
        if same(run.path, target):
            print(f"unchanged {target}")
            continue
        copy(run.path, target)
        print(f"copied {target}")
        copied += 1
    print(f"{copied} of {len(runs)} runs copied to {args.to}")
    if refused:
        fail(f"{refused} of {len(runs)} runs refused")


def problem(folder: Path, name: str) -> str | None:
    """Why a run's records are not fit to be kept, or None."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in name:
        return f"summary.json: run {name!r} is no relative path"
    missing = [file for file in REQUIRED if not (folder / file).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    for file in RECORDS:
        if not (folder / file).is_file():
            continue
        try:
            for key, value in strings(read(folder / file)):
                if found := LOCAL_PATH.search(value):
                    return f"{file}: {key} holds the local path {found[1]}"
        except (ValueError, yaml.YAMLError) as error:
            return f"{file} cannot be read: {' '.join(str(error).split())}"
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
    for name in RECORDS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()

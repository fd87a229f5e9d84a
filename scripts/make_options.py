"""Write docs/options.md: every config key of every entrypoint, from the typed configs.

python scripts/make_options.py            # --check: exit 1 if the page is not up to date
"""

import argparse
import importlib
import sys
from pathlib import Path

from sn.training.run.options import COMMANDS, SCHEMAS, markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

Made by `scripts/make_options.py` from the typed configs and the comments in `configs/`.
A command takes `group=option` and `key=value`; keys with * belong to the machine and may change
between a run and its resumption. Of `norm` and a detector's `parts` the files in `configs/norm`
have the keys: the arguments of `sn.make_norm`.
"""


def page() -> str:
    sections = []
    sys.path.insert(0, str(ROOT))  # enas is not installed
    for root, module in SCHEMAS.items():
        importlib.import_module(module)
        sections.append(markdown(root, COMMANDS[root]))
    return "\n".join([HEAD, *sections])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(arguments).check
    text = page()
    if not check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/options.md is not up to date: run scripts/make_options.py", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

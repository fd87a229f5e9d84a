"""Collect what scripts/gpu_check.sh needs on a GPU machine without network, in few megabytes.

    python scripts/gpu_pack.py --root data          # here: fills gpu_files/
    python scripts/gpu_pack.py --unpack DATA        # there: DATA/cifar-10-batches-py

gpu_files/wheels holds hydra-core, omegaconf and antlr4's runtime at the versions of constraints.txt
(the last one is built: there is no wheel of it), and pycocotools for x86-64 Linux and the machine's
Python (--python, 3.12 by default). gpu_files/cifar10_16px.npz holds the 15,000 images
of experiment=imagenet/cifar10_16px averaged down to 16 px: runs on them have the records' data
fingerprint. --root - leaves the images out.
"""

import argparse
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT / "gpu_files"
WHEELS = ("hydra-core", "omegaconf", "antlr4-python3-runtime")
COMPILED = ("pycocotools",)
TRAIN = 10_000  # data.train_images of the experiment; 5,000 more are held out


def collect_wheels(folder: Path, python: str) -> list[Path]:
    """Build or fetch a wheel of each of `WHEELS`, for any machine, and of `COMPILED`, for that."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")

    def pip(command: str, names: tuple[str, ...], *options: str) -> None:
        wanted = [re.search(rf"^{name}==\S+", pins, re.MULTILINE)[0] for name in names]
        call = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *options, *wanted]
        subprocess.run(call, check=True)

    pip("wheel", WHEELS, "-w", str(folder))
    found = sorted(folder.glob("*-none-any.whl"))
    if len(found) != len(WHEELS):
        raise SystemExit(f"expected one wheel of each of {WHEELS} in {folder}, found {found}")
    there = ["--only-binary", ":all:", "--python-version", python, "-d", str(folder)]
    platforms = [f"manylinux{tag}_x86_64" for tag in ("2014", "_2_17", "_2_28")]
    pip("download", COMPILED, *there, *(f"--platform={platform}" for platform in platforms))
    return sorted(folder.glob("*.whl"))


def pack_images(root: str, path: Path) -> None:
    from sn.training.classification.data import load_cifar10

    data = load_cifar10(root, train_images=TRAIN, image_size=16)
    parts = [data.train, data.val]
    images = np.concatenate([np.asarray(part.images) for part in parts])
    labels = np.concatenate([np.asarray(part.labels) for part in parts]).astype(np.uint8)
    np.savez_compressed(path, images=images, labels=labels, sha256=data.sha256)


def unpack_images(path: Path, root: Path) -> None:
    """Write CIFAR-10's five batches, every pixel four times: averaged, the images are back."""
    with np.load(path) as packed:
        images, labels = packed["images"], packed["labels"]
    images = images.repeat(2, 2).repeat(2, 3).reshape(len(images), -1)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    parts = zip(np.array_split(images, 5), np.array_split(labels, 5))
    for number, (pixels, classes) in enumerate(parts, 1):
        batch = {"data": pixels, "labels": classes.tolist()}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(batch))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="data.root of CIFAR-10; - for none")
    parser.add_argument("--python", default="3.12", help="version there (default: 3.12)")
    parser.add_argument("--unpack", type=Path, metavar="DATA", help="write the images there")
    parser.add_argument("--folder", type=Path, default=PACK, help=argparse.SUPPRESS)
    args = parser.parse_args()
    images = args.folder / "cifar10_16px.npz"
    if args.unpack is not None:
        unpack_images(images, args.unpack)
        return
    args.folder.mkdir(exist_ok=True)
    collect_wheels(args.folder / "wheels", args.python)
    if args.root != "-":
        pack_images(args.root, images)
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(f"{args.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

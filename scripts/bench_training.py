"""Images/s of train_imagenet.py against a bare loop of the same network and augmentation.

    OMP_NUM_THREADS=1 python scripts/bench_training.py --root data
    OMP_NUM_THREADS=1 python scripts/bench_training.py --root data --norms bn sn --rounds 9

Both train experiment=imagenet/cifar10_16px for an epoch of `--images` images. The bare loop has
plain torch SGD and nothing else: no checks, no seeds, no records, no loader. A round times each
once, in turn; the ratio is taken within the round and the median over the rounds counts, so that a
busy machine disturbs it little. Writes <output>.json with the environment.
"""

import argparse
import contextlib
import io
import json
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

import sn
from sn.training.classification.config import ImagenetConfig
from sn.training.classification.data import SettingSampler, TransformedImages, build_data
from sn.training.classification.models import build_model
from sn.training.run.config import typed
from sn.training.run.distributed import prepare_setting
from sn.training.run.record import environment

ROOT = Path(__file__).resolve().parent.parent
TRAIN = runpy.run_path(str(ROOT / "train_imagenet.py"))["train"]


def config(args: argparse.Namespace, norm: str, setting: str, folder: str) -> ImagenetConfig:
    overrides = ["experiment=imagenet/cifar10_16px", f"norm={norm}", f"setting={setting}"]
    overrides += ["device=cpu", "schedule.epochs=1", f"data.train_images={args.images}"]
    overrides += [f"data.root={args.root}", f"output_dir={folder}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return typed(compose("imagenet", overrides=overrides))


def ours(cfg: ImagenetConfig) -> float:
    """Images/s of the epoch, as the run records them."""
    with contextlib.redirect_stdout(io.StringIO()):
        TRAIN(cfg)
    metrics = json.loads((Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(cfg.output_dir)
    return metrics["images_per_s"]


class BareLoop:
    """The shortest program that trains the config's network on its augmented images."""

    def __init__(self, cfg: ImagenetConfig):
        torch.manual_seed(cfg.seed)
        gpus, images_per_gpu = cfg.setting.gpus, cfg.setting.images_per_gpu
        data = build_data(**cfg.data.options())
        self.model = build_model(
            **vars(cfg.model), num_classes=data.num_classes, norm=sn.make_norm(**cfg.norm)
        )
        prepare_setting(self.model, gpus, images_per_gpu, cfg.setting.emulation, 1)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=cfg.schedule.lr_per_256 * gpus * images_per_gpu / 256,
            momentum=cfg.optimizer.momentum,
            weight_decay=cfg.optimizer.weight_decay,
        )
        self.images = TransformedImages(data.train, data.augmentation, 1, cfg.seed)
        self.batches = list(SettingSampler(len(data.train), gpus, images_per_gpu, cfg.seed))

    def epoch(self) -> float:
        """Images/s."""
        self.model.train()
        start, count = time.perf_counter(), 0
        for keys in self.batches:
            images, labels = self.images.__getitems__(keys)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()
            count += len(labels)
        return count / (time.perf_counter() - start)


def measure(args: argparse.Namespace, norm: str, setting: str) -> dict:
    """Medians over the rounds; the first round, which allocates, does not count."""
    folder = tempfile.mkdtemp()
    cfg = config(args, norm, setting, f"{folder}/run")
    bare, rounds = BareLoop(cfg), []
    for _ in range(args.rounds + 1):
        rounds.append((ours(cfg), bare.epoch()))
    shutil.rmtree(folder)
    rounds = rounds[1:]
    ratios = [mine / other for mine, other in rounds]
    return {
        "norm": norm,
        "setting": setting,
        "images_per_s": round(statistics.median(mine for mine, _ in rounds), 1),
        "bare_images_per_s": round(statistics.median(other for _, other in rounds), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="data.root of CIFAR-10")
    parser.add_argument("--norms", nargs="+", default=["bn", "sn"])
    parser.add_argument("--settings", nargs="+", default=["8x32", "8x2"])
    parser.add_argument("--images", type=int, default=4096, help="an epoch's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=None, help="<output>.json")
    args = parser.parse_args()
    rows = []
    for setting in args.settings:
        for norm in args.norms:
            rows.append(row := measure(args, norm, setting))
            print(
                f"{norm:4} {setting:5} {row['images_per_s']:7.0f} images/s, bare loop "
                f"{row['bare_images_per_s']:7.0f}: ratio {row['ratio']:.3f} "
                f"({row['ratio_min']:.3f} to {row['ratio_max']:.3f})",
                file=sys.stderr,
                flush=True,
            )
    if args.output is not None:
        record = {"rows": rows, "rounds": args.rounds, "images": args.images}
        record["environment"] = environment(torch.device("cpu"))
        args.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Steps of train_imagenet.py and style_transfer.py in which no call may wait for the GPU.

    python scripts/gpu_sync_free.py cuda      # an error names the call that waits
    python scripts/gpu_sync_free.py cpu       # the same steps alone; the tests count calls there

The first two steps may wait (the first decision is the host's, kernels are compiled), as may the
last, which is followed by a checkpoint; twenty between them may not. Needs Hydra; runs on bundled
data, twice: the norm's fused kernels in bf16 and batch norm in float32.
"""

import contextlib
import runpy
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

import sn.training.classification.config
import sn.training.style.config  # noqa: F401  registers the schema
from sn.training.run.config import typed
from sn.training.run.session import Session

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
RUNS = {
    "train_imagenet.py": (
        "imagenet",
        ["setting.gpus=4", "setting.images_per_gpu=8", "model=resnet20", "schedule.epochs=1",
         f"data.train_images={32 * 23}"],
    ),
    "style_transfer.py": (
        "style_transfer",
        ["experiment=style_transfer/smoke", "vgg.weights=random", f"schedule.steps={STEPS + 3}",
         "importance_steps=1000"],
    ),
}  # fmt: skip
KINDS = (["norm=sn", "precision=bf16", "channels_last=true"], ["norm=bn", "precision=fp32"])


@contextlib.contextmanager
def no_waiting(device: str):
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def guarded(function, device: str, seconds: list[float]):
    """`function`, whose calls 3 to 22 must not wait."""

    def call(*args, **kwargs):
        seconds.append(time.perf_counter())
        watched = 3 <= len(seconds) <= STEPS + 2
        with no_waiting(device) if watched else contextlib.nullcontext():
            return function(*args, **kwargs)

    return call


def main(device: str) -> None:
    for script, (root, options) in RUNS.items():
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                overrides = [*options, *kind, f"device={device}", f"output_dir={folder}/run"]
                overrides += ["checkpoint_steps=0", "max_skipped_steps=1"]
                with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
                    config = typed(compose(root, overrides=overrides))
                module = runpy.run_path(str(ROOT / script))
                train, starts, ends = module["train"], [], []
                own = train.__globals__
                own["train_step"] = guarded(own["train_step"], device, starts)
                step_done, Session.step_done = (
                    Session.step_done,
                    guarded(Session.step_done, device, ends),
                )
                try:
                    train(config)
                finally:
                    Session.step_done = step_done
            assert len(starts) == len(ends) >= STEPS + 3, (script, len(starts), len(ends))
            own = (starts[STEPS + 1] - starts[2]) / (STEPS - 1)
            checked = "nothing waited" if device == "cuda" else "not checked on the CPU"
            print(f"{script} {' '.join(kind)}: {STEPS} steps, {checked}; {1e3 * own:.1f} ms each")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")

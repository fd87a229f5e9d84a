"""Top-1 and top-5 over a validation set, each image once whatever the number of processes."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...batch_average import batch_average, batch_statistics_layers
from ...freezing import modes_kept
from ...variants.sync import SyncSwitchNormBase
from ..run.distributed import sum_over_processes, untrained_statistics
from ..run.session import Session
from .data import TransformedImages, batch_average_batches, make_loader
from .task import Task


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable, to_device: Callable) -> dict[str, float]:
    """Return {"loss", "top1", "top5"}, the last two in percent; all modes are restored.

    `batches` holds this process's share of the images, `to_device` moves images or labels; an image
    with a negative label does not count. Raises ValueError if none counts. Warns about layers whose
    running statistics no training step has updated (mean 0, variance 1).
    """
    untrained = untrained_statistics(model)
    if untrained:
        warnings.warn(
            f"{len(untrained)} layers are evaluated with untrained running statistics (mean 0, "
            f"variance 1), first {untrained[0]!r}; train a step or call sn.batch_average",
            stacklevel=2,
        )
    totals = None
    with modes_kept(model):
        model.eval()
        for images, labels in batches:
            labels = to_device(labels)
            logits = model(to_device(images)).double()
            logits, labels = logits[labels >= 0], labels[labels >= 0]
            ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            batch = torch.stack(
                [
                    F.cross_entropy(logits, labels, reduction="sum"),
                    ranks[:, 0].sum().double(),
                    ranks.any(1).sum().double(),
                    torch.tensor(float(len(labels)), device=logits.device, dtype=torch.float64),
                ]
            )
            totals = batch if totals is None else totals + batch
    if totals is None:  # more processes than images
        totals = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
    loss, top1, top5, count = sum_over_processes(totals).tolist()
    if count == 0:
        raise ValueError("there is no image to evaluate on")
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def training_metrics(run: Session, steps: int, lr: float) -> dict[str, Any]:
    """What the epoch of `steps` steps that ends here came to, from the sums of its progress.

    Raises FloatingPointError if every step was skipped.
    """
    progress, sums = run.progress, run.progress.totals()
    if not sums["images"]:
        raise FloatingPointError(f"every step of epoch {progress.epoch + 1} was skipped")
    return {
        "step": (progress.epoch + 1) * steps,
        "images_seen": progress.images_seen,
        "lr": lr,
        "train/loss": sums["loss"] / sums["images"],
        "train/top1": 100 * sums["correct"] / sums["images"],
        "images_per_s": run.images_per_s(),
    }


def line_of(metrics: dict[str, Any]) -> str:
    """An epoch's metrics, as printed."""
    speed = metrics["images_per_s"]  # None: the run went on after the epoch's last step
    return (
        f"loss {metrics['train/loss']:.4f}  top-1 {metrics['train/top1']:.2f}  "
        f"val loss {metrics['val/loss']:.4f}  val top-1 {metrics['val/top1']:.2f}"
        + (f"  {speed:.0f} images/s" if speed is not None else "")
    )


def is_synchronised(model: nn.Module) -> bool:
    """Whether layers of `model` take the statistics of all processes' images together."""
    kinds = (nn.SyncBatchNorm, SyncSwitchNormBase)
    return any(isinstance(layer, kinds) for layer in model.modules())


@contextmanager
def batch_averaged(model: nn.Module, images: Iterable) -> Iterator[dict]:
    """Inside, the model has the batch average of `images` for its running statistics.

    Yields the model's buffers by name. Source: section 3.1, "batch average".
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch_average(model, images, sys.maxsize)  # to the end, with which a loader's workers end
    yield {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])


def evaluate_both_ways(
    task: Task, run: Session, validate: Callable[[], dict], moving: dict | None
) -> dict:
    """Evaluate with the moving average, then with the batch average of training images.

    `moving` is what the last epoch's `validate()` gave, None if this process did not run it.
    The checkpoint keeps the moving average, and the averaged buffers beside it.
    """
    model, data, options = task.model, task.data, task.config.evaluation.batch_average
    moving = moving or validate()
    results = {"top1": moving["top1"], "top5": moving["top5"], "val_loss": moving["loss"]}
    results["bad_images"] = len(task.bad_images.lines())
    if not batch_statistics_layers(model):  # nothing to average: the same model
        return results | {"top1_batch_average": moving["top1"], "batch_average_images": 0}
    where = (run.processes.rank, run.processes.world_size, is_synchronised(model))
    batches = batch_average_batches(
        len(data.train), options.batch_size, options.batches, task.config.seed, *where
    )
    transformed = TransformedImages(data.train, data.evaluation, epochs=1)
    loader = make_loader(transformed, batches, task.config.data.workers, run.device)
    # no early end: synchronised norms need as many batches in every process
    images = (run.to_device(x) for x, _ in run.watchdog.over(loader, "batch average"))
    with run.autocast(), batch_averaged(model, images) as averaged:
        results["top1_batch_average"] = validate()["top1"]
    size = min(options.batch_size, len(data.train))
    results["batch_average_images"] = size * min(options.batches, len(data.train) // size)
    run.save(batch_average=averaged)
    return results

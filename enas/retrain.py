"""Train one architecture from scratch and evaluate it: another figure than its shared accuracy.

    python -m enas.retrain arch=outputs/enas/digits_2x8_3nodes/sn_ln_gn/seed0/summary.json
    python -m enas.retrain arch=random arch_seed=1 run_name=random1

`retrained_val_top1` is on the images that the search was rewarded on, `retrained_test_top1` on
CIFAR-10's test images, which the search never saw (null without such a set). Batch norm has running
statistics here. The same command resumes a run. See configs/enas_retrain.yaml.
"""

import contextlib
import sys
import time
from dataclasses import dataclass

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from sn.training.classification.data import ImageData, build_data, load_cifar10_test
from sn.training.classification.evaluation import evaluate
from sn.training.run import distributed, entry
from sn.training.run.checkpoint import load_checkpoint, restore, save_checkpoint
from sn.training.run.entry import above, number, one_of, optional, switch, whole
from sn.training.run.guard import FiniteGuard, gradient_norm
from sn.training.run.record import Recorder, environment
from sn.training.run.schedule import cosine_restarts, mix_seed
from sn.training.run.stopping import Preempted, StopSignal, Watchdog

from .child import Child
from .data import DeviceImages
from .space import Architecture, random_decisions, read_architecture, to_json

AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16}
ORDER, AUGMENTATION, DROPOUT = range(3)  # what a random number is for

CHECKS = [
    (
        whole(1, 2**31),
        "a whole number, 1 or more",
        [
            "arch_nodes",
            "epochs",
            "child.layers",
            "child.filters",
            "child.stem_stride",
            "optimizer.batch_size",
            "optimizer.first_period",
            "optimizer.period_factor",
            "evaluation.batch_size",
        ],
    ),
    (optional(whole(1, 2**31)), "a whole number, 1 or more, or null", ["data.train_images"]),
    (
        whole(0, 2**32),
        "a whole number, 0 to 2^32",
        ["seed", "arch_seed", "checkpoint_steps", "max_skipped_steps", "data.workers"],
    ),
    (whole(2, 1000), "a whole number, 2 to 1000", ["keep_checkpoints"]),
    (
        number(),
        "a number, 0 or more",
        [
            "child.aux_weight",
            "optimizer.momentum",
            "optimizer.weight_decay",
            "optimizer.max_lr",
            "optimizer.min_lr",
        ],
    ),
    (above(), "a number above 0", ["timeout_minutes"]),
    (optional(above()), "null or a number above 0", ["optimizer.grad_clip"]),
    (
        lambda v: number(0, 1)(v) and v < 1,
        "a number, 0 or more and less than 1",
        ["child.dropout", "child.drop_path"],
    ),
    (switch, "true or false", ["channels_last", "compile", "data.download"]),
    (one_of(list(AUTOCAST)), f"one of {list(AUTOCAST)}", ["precision"]),
]


@dataclass
class Progress:
    """Where the run is; what a checkpoint holds beside weights and optimizer."""

    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the next
    loss: float = 0.0  # sums over the steps done of the next
    correct: float = 0.0
    images: int = 0
    images_seen: int = 0  # in all
    skipped_steps: int = 0
    wall_s: float = 0.0


@dataclass
class Run:
    """Everything that is built once from the config."""

    cfg: DictConfig
    device: torch.device
    data: ImageData
    train: DeviceImages
    val: DeviceImages
    test: DeviceImages | None
    architecture: Architecture
    model: Child
    optimizer: torch.optim.Optimizer
    steps: int
    guard: FiniteGuard
    stop: StopSignal
    watchdog: Watchdog

    def autocast(self):
        dtype = AUTOCAST[self.cfg.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    def layout(self, tensor: Tensor) -> Tensor:
        if self.cfg.channels_last and tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor


@hydra.main(version_base="1.3", config_path="../configs", config_name="enas_retrain")
def main(cfg: DictConfig) -> None:
    entry.run(retrain, cfg)


def retrain(cfg: DictConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    entry.check_values(cfg, CHECKS)
    entry.check_names(cfg, ["data.name", "run_name"])
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    processes = distributed.start(cfg.device, cfg.timeout_minutes + 5)
    if processes.world_size > 1:
        raise ValueError("one architecture is trained in one process; start it without torchrun")
    recorder = Recorder(cfg.output_dir, config)
    summary = recorder.summary()
    if summary is not None:
        print(f"{cfg.output_dir} has ended already: val top-1 {summary['retrained_val_top1']}")
        return summary

    with StopSignal() as stop, Watchdog(cfg.timeout_minutes) as watchdog:
        run = build(cfg, processes.device, stop, watchdog)
        progress = resume(run)
        recorder.open(progress.epoch if progress.images_seen else -1)
        announce(run, progress)
        start = time.perf_counter() - progress.wall_s
        try:
            while progress.epoch < cfg.epochs:
                metrics = train_one_epoch(run, progress, start)
                validation = evaluated(run, run.val)
                metrics |= {"val/loss": validation["loss"], "val/top1": validation["top1"]}
                progress = Progress(
                    epoch=progress.epoch + 1,
                    images_seen=progress.images_seen,
                    skipped_steps=progress.skipped_steps,
                    wall_s=time.perf_counter() - start,
                )
                recorder.metrics(progress.epoch, metrics)
                save(run, progress)
                print_epoch(run, progress, metrics)
        except FloatingPointError as error:
            results = {"status": "diverged", "retrained_val_top1": None, "error": str(error)}
            recorder.finish(summarise(run, progress, results))
            raise
        validation = evaluated(run, run.val)
        results = {"status": "finished", "retrained_val_top1": validation["top1"]}
        test = None if run.test is None else evaluated(run, run.test)["top1"]
        results |= {"retrained_test_top1": test, "test_images": run.test and len(run.test)}
    progress.wall_s = time.perf_counter() - start
    summary = summarise(run, progress, results)
    recorder.finish(summary)
    tested = "" if test is None else f", {test:.2f} on {len(run.test):,} test images"
    print(
        f"retrained: top-1 {validation['top1']:.2f} on the held-out images{tested}; "
        f"records in {cfg.output_dir}"
    )
    return summary


def build(cfg: DictConfig, device: torch.device, stop: StopSignal, watchdog: Watchdog) -> Run:
    """Architecture, data, network and optimizer, on `device`."""
    architecture = choose_architecture(cfg)
    data = build_data(**{k: v for k, v in cfg.data.items() if k != "workers"})
    test = None
    if data.name == "cifar10":
        test = load_cifar10_test(cfg.data.root, cfg.data.image_size)
    dtype = torch.float64 if cfg.precision == "fp64" else torch.float32
    parts = [
        part and DeviceImages(data, part, device, dtype) for part in (data.train, data.val, test)
    ]
    torch.manual_seed(cfg.seed)
    size = parts[0].images.shape[-1]
    nodes = len(architecture.normal)
    model = Child(
        data.num_classes, image_size=size, nodes=nodes, architecture=architecture, **cfg.child
    ).to(device, dtype)
    if cfg.compile:
        model.compile()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=cfg.optimizer.max_lr,
        momentum=cfg.optimizer.momentum,
        weight_decay=cfg.optimizer.weight_decay,
        nesterov=cfg.optimizer.momentum > 0,
    )
    steps = max(1, len(parts[0]) // cfg.optimizer.batch_size)
    guard = FiniteGuard(cfg.max_skipped_steps)
    return Run(
        cfg, device, data, *parts, architecture, model, optimizer, steps, guard, stop, watchdog
    )


def choose_architecture(cfg: DictConfig) -> Architecture:
    """The one in the file `arch`, or one drawn uniformly from `arch_seed`."""
    if cfg.arch != "random":
        return read_architecture(cfg.arch)
    generator = torch.Generator().manual_seed(mix_seed(cfg.arch_seed))
    return Architecture.from_decisions(random_decisions(1, cfg.arch_nodes, generator=generator)[0])


def announce(run: Run, progress: Progress) -> None:
    data = run.data.describe()
    parameters = sum(p.numel() for p in run.model.parameters())
    print(
        f"{run.cfg.run_name}: {parameters:,} parameters; {data['name']}, "
        f"{data['train_images']:,} training and {data['val_images']:,} held-out images\n"
        f"{run.cfg.epochs} epochs of {run.steps} steps",
        flush=True,
    )
    if progress.images_seen:
        print(f"resuming after {progress.epoch} epochs and {progress.step} steps", flush=True)


def train_one_epoch(run: Run, progress: Progress, start: float) -> dict:
    """Train from `progress.step` to the end of the epoch; return its metrics."""
    cfg, epoch, size = run.cfg, progress.epoch, run.cfg.optimizer.batch_size
    order = run.train.order(cfg.seed, ORDER, epoch)
    schedule = cosine_restarts(epoch, cfg.optimizer.first_period, cfg.optimizer.period_factor)
    lr = cfg.optimizer.min_lr + schedule * (cfg.optimizer.max_lr - cfg.optimizer.min_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.model.train()
    began, first = time.perf_counter(), progress.images_seen
    bar = tqdm(
        total=run.steps,
        initial=progress.step,
        desc=f"epoch {epoch + 1}/{cfg.epochs}",
        unit="step",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    while progress.step < run.steps:
        step = progress.step
        where = f"epoch {epoch + 1}, step {step + 1} of {run.steps}"
        run.watchdog.beat(where)
        indices = order[step * size : (step + 1) * size]
        images, labels = run.train.batch(indices, (cfg.seed, AUGMENTATION, epoch, step))
        torch.manual_seed(mix_seed(cfg.seed, DROPOUT, epoch, step))
        loss, correct, count = train_step(run, images, labels, progress, where)
        progress.loss += loss * count
        progress.correct += correct
        progress.images += count
        progress.images_seen += len(labels)
        progress.skipped_steps = run.guard.skipped
        progress.step += 1
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        due = cfg.checkpoint_steps and progress.step % cfg.checkpoint_steps == 0
        if run.stop.requested or due or progress.step == run.steps:
            progress.wall_s = time.perf_counter() - start
            save(run, progress)
        if run.stop.requested:
            raise Preempted(
                f"stopped by a signal and saved after {where}; the same command goes on"
            )
    bar.close()
    if not progress.images:
        raise FloatingPointError(f"every step of epoch {epoch + 1} was skipped")
    return {
        "step": (epoch + 1) * run.steps,
        "images_seen": progress.images_seen,
        "lr": lr,
        "train/loss": progress.loss / progress.images,
        "train/top1": 100 * progress.correct / progress.images,
        "images_per_s": (progress.images_seen - first) / (time.perf_counter() - began),
    }


def train_step(
    run: Run, images: Tensor, labels: Tensor, progress: Progress, where: str
) -> tuple[float, float, int]:
    """One update; return (loss, number correct, images), 0 if skipped."""
    model, images = run.model, run.layout(images)
    done = (progress.epoch + progress.step / run.steps) / run.cfg.epochs

    def forward():
        with run.autocast():
            return model(images, progress=done)

    run.guard.begin(model)
    run.optimizer.zero_grad(set_to_none=True)
    outputs = forward()
    with run.autocast():
        loss = model.loss(outputs, labels)
    loss.backward()
    values = torch.stack([loss.detach().double(), gradient_norm(model).to(loss.device)])
    if not run.guard.allows(values, model, where, forward):
        print(f"warning: not finite at {where}, step skipped", file=sys.stderr, flush=True)
        return 0.0, 0.0, 0
    if run.cfg.optimizer.grad_clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), run.cfg.optimizer.grad_clip)
    run.optimizer.step()
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss.item(), (logits.argmax(1) == labels).sum().item(), len(labels)


def evaluated(run: Run, images: DeviceImages) -> dict[str, float]:
    """Loss and top-1 with running statistics."""

    def batches():
        for batch in run.watchdog.over(images.batches(run.cfg.evaluation.batch_size), "evaluation"):
            run.stop.check("evaluation")
            yield batch

    with run.autocast():
        return evaluate(run.model, batches(), run.layout)


def save(run: Run, progress: Progress) -> None:
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "progress": vars(progress).copy(),
        "data": run.data.describe(),
        "architecture": to_json(run.architecture),
    }
    save_checkpoint(f"{run.cfg.output_dir}/checkpoint.pt", state, run.cfg.keep_checkpoints)


def resume(run: Run) -> Progress:
    """Load the run's checkpoint, if there is one, and return where it was."""
    needed = ("model", "optimizer", "progress", "data", "architecture")
    path = f"{run.cfg.output_dir}/checkpoint.pt"
    state = load_checkpoint(path, needed)
    if state is None:
        return Progress()
    now = {"data": run.data.describe(), "architecture": to_json(run.architecture)}
    for key, value in now.items():
        if state[key] != value:
            raise ValueError(
                f"{run.cfg.output_dir} holds a run with another {key}; choose another output_dir="
            )
    parts = {"model": run.model, "optimizer": run.optimizer}
    progress = restore(path, state, parts, Progress)
    run.guard.skipped = progress.skipped_steps
    return progress


def summarise(run: Run, progress: Progress, results: dict) -> dict:
    """The contents of summary.json."""
    cfg, data = run.cfg, run.data.describe()
    model = f"{cfg.child.layers}x{cfg.child.filters}"
    full = data["name"] == "cifar10" and cfg.data.train_images is None
    full = full and cfg.epochs >= 630 and cfg.child.layers >= 15
    return {
        "task": "enas_retrain",
        "run": f"enas_retrain/{data['name']}_{model}/{cfg.run_name}/seed{cfg.seed}",
        "name": cfg.run_name,
        "data": data,
        "model": model,
        **results,
        "architecture": to_json(run.architecture),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "epochs": progress.epoch,
        "seed": cfg.seed,
        "images_seen": progress.images_seen,
        "skipped_steps": run.guard.skipped,
        "wall_s": round(progress.wall_s, 1),
        "precision": cfg.precision,
        "scale": "full" if full else "proxy",
        "note": cfg.note,
        **environment(run.device),
    }


def print_epoch(run: Run, progress: Progress, metrics: dict) -> None:
    left = int(progress.wall_s / progress.epoch * (run.cfg.epochs - progress.epoch))
    print(
        f"epoch {progress.epoch}/{run.cfg.epochs}  loss {metrics['train/loss']:.4f}  "
        f"top-1 {metrics['train/top1']:.2f}  val loss {metrics['val/loss']:.4f}  "
        f"val top-1 {metrics['val/top1']:.2f}  "
        f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
        flush=True,
    )


if __name__ == "__main__":
    entry.start(main)

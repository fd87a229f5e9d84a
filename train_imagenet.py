"""Train an image classifier at a (GPUs, images per GPU) setting and evaluate it both ways.

    python train_imagenet.py norm=sn setting=8x32                      # bundled digits
    torchrun --nproc_per_node=8 train_imagenet.py experiment=imagenet/table_4_1 \\
        norm=sn setting=8x32 data.root=/data/imagenet

Section 4.1; Table 4.1 expects 76.9 for SN, 76.4 for BN, 75.9 for GN at (8,32). The same command
resumes a run that was interrupted. See configs/imagenet.yaml for every option.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import sn
from sn.batch_average import batch_statistics_layers
from sn.training.classification import bilevel
from sn.training.classification.data import (
    BadImages,
    ImageData,
    SettingSampler,
    TransformedImages,
    batch_average_batches,
    build_data,
    evaluation_batches,
    make_loader,
)
from sn.training.classification.evaluation import evaluate
from sn.training.classification.models import build_model
from sn.training.run import distributed, entry
from sn.training.run.checkpoint import keep_best, load_checkpoint, restore, save_checkpoint
from sn.training.run.entry import above, is_number, number, one_of, optional, switch, whole
from sn.training.run.guard import FiniteGuard, check_finite, gradient_norm
from sn.training.run.record import Recorder, environment
from sn.training.run.schedule import base_lr, lr_factor, mix_seed
from sn.training.run.stopping import Preempted, StopSignal, Watchdog

AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}
IMAGENET_SIZE = (1_281_167, 50_000)

CHECKS = [
    (
        whole(1),
        "a whole number, 1 or more",
        [
            "setting.gpus",
            "setting.images_per_gpu",
            "schedule.epochs",
            "evaluation.batch_size",
            "evaluation.batch_average.batch_size",
            "evaluation.batch_average.batches",
            "data.image_size",
            "data.resize",
        ],
    ),
    (optional(whole(1)), "a whole number, 1 or more, or null", ["data.train_images"]),
    (
        whole(0, 2**32),
        "a whole number, 0 to 2^32",
        ["seed", "data.workers", "checkpoint_steps", "max_skipped_steps", "data.max_bad_images"],
    ),
    (whole(2, 1000), "a whole number, 2 to 1000", ["keep_checkpoints"]),
    (
        number(),
        "a number, 0 or more",
        [
            "schedule.lr_per_256",
            "schedule.gamma",
            "optimizer.momentum",
            "optimizer.weight_decay",
            "optimizer.gate_lr_factor",
            "data.lighting",
            "data.color_jitter",
        ],
    ),
    (above(0), "a number above 0", ["timeout_minutes"]),
    (optional(above(0)), "null or a number above 0", ["optimizer.gate_clip"]),
    (optional(number()), "a number, 0 or more, or null", ["optimizer.gate_weight_decay"]),
    (
        number(0, 1),
        "a number, 0 to 1",
        ["schedule.warmup", "schedule.last_fraction", "model.dropout"],
    ),
    (optional(number(0, 1)), "a number, 0 to 1, or null", ["norm.momentum"]),
    (
        switch,
        "true or false",
        ["channels_last", "compile", "model.zero_init_residual", "data.download"],
    ),
    (
        lambda v: OmegaConf.is_list(v) and all(is_number(m) and 0 <= m <= 1 for m in v),
        "a list of fractions of the run, such as [0.3,0.6,0.9]",
        ["schedule.milestones"],
    ),
    (one_of(list(AUTOCAST)), f"one of {list(AUTOCAST)}", ["precision"]),
    (one_of(["step", "cosine"]), "step or cosine", ["schedule.decay"]),
]


@dataclass
class Run:
    """Everything that is built once from the config."""

    cfg: DictConfig
    processes: distributed.Processes
    data: ImageData
    model: nn.Module  # the plain network: saved, averaged, evaluated
    parallel: nn.Module  # the same, in DistributedDataParallel if there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: DataLoader
    sampler: SettingSampler
    lr: float
    emulation: str
    micro_batches: int
    gate_loader: DataLoader | None  # bilevel gates: the images they learn from
    gate_sampler: SettingSampler | None
    bad_images: BadImages
    guard: FiniteGuard
    stop: StopSignal
    watchdog: Watchdog

    def evaluating(self, loader: Iterable) -> Iterator:
        """The batches of a loader outside training; a signal ends them early, after one or more."""
        for batch in self.watchdog.over(loader, "evaluation"):
            yield batch
            if self.stop.requested:
                return

    def stop_together(self) -> None:
        """Raise Preempted if any process has got a signal; all of them must come here.

        One that left its evaluation alone would leave the others waiting in a sum.
        """
        if distributed.any_process(self.stop.requested, self.processes.device):
            raise Preempted("stopped by a signal at evaluation; the same command goes on")

    def to_device(self, tensor: Tensor) -> Tensor:
        """Images in the run's precision and layout, labels as they are."""
        if tensor.is_floating_point():
            dtype = torch.float64 if self.cfg.precision == "fp64" else None
            layout = torch.channels_last if self.cfg.channels_last else torch.preserve_format
            return tensor.to(self.processes.device, dtype, non_blocking=True, memory_format=layout)
        return tensor.to(self.processes.device, non_blocking=True)

    def autocast(self):
        dtype = AUTOCAST[self.cfg.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, dtype)


@dataclass
class Progress:
    """Where the run is; what a checkpoint holds beside weights and optimizer."""

    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the next
    loss: float = 0.0  # sums over the steps done of the next
    correct: float = 0.0
    images: int = 0
    images_seen: int = 0  # in all
    skipped_steps: int = 0  # in all, their loss was not finite
    best_top1: float = -1.0
    wall_s: float = 0.0


@hydra.main(version_base="1.3", config_path="configs", config_name="imagenet")
def main(cfg: DictConfig) -> None:
    entry.run(train, cfg)


def train(cfg: DictConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_config(cfg)
    processes = distributed.start(cfg.device, cfg.timeout_minutes + 5)
    with StopSignal() as stop, Watchdog(cfg.timeout_minutes, processes.rank) as watchdog:
        return train_until_end(cfg, config, processes, stop, watchdog)


def train_until_end(
    cfg: DictConfig,
    config: dict,
    processes: distributed.Processes,
    stop: StopSignal,
    watchdog: Watchdog,
) -> dict:
    """The run itself, under the eyes of `stop` and `watchdog`."""
    recorder = Recorder(cfg.output_dir, config, processes.is_main)
    summary = recorder.summary()
    if summary is not None:
        if processes.is_main:
            print(f"{cfg.output_dir} has ended already: top-1 {summary['top1']}")
        return summary

    run = build(cfg, processes, stop, watchdog)
    progress = resume(run)
    recorder.open(progress.epoch if progress.images_seen else -1)
    if processes.is_main:
        announce(run, progress)
    if progress.images_seen == 0:
        recorder.importance(0, run.model)
    start = time.perf_counter() - progress.wall_s
    validation = None
    try:
        while progress.epoch < cfg.schedule.epochs:
            metrics = train_one_epoch(run, progress, start)
            save(run, progress)  # validation may be cut short
            validation = validate(run)
            where = f"the end of epoch {progress.epoch + 1}"
            check_finite(torch.tensor(validation["loss"]), run.model, where)
            metrics |= {"val/loss": validation["loss"], "val/top1": validation["top1"]}
            progress = Progress(
                epoch=progress.epoch + 1,
                images_seen=progress.images_seen,
                skipped_steps=progress.skipped_steps,
                best_top1=max(progress.best_top1, validation["top1"]),
                wall_s=time.perf_counter() - start,
            )
            recorder.metrics(progress.epoch, metrics)
            figure = progress.epoch % max(1, cfg.schedule.epochs // 10) == 0
            recorder.importance(progress.epoch, run.model, figure)
            save(run, progress, best=validation["top1"] == progress.best_top1)
            if processes.is_main:
                print_epoch(run, progress, metrics)
    except FloatingPointError as error:
        progress.wall_s = time.perf_counter() - start
        results = {"status": "diverged", "top1": None, "top5": None, "top1_batch_average": None}
        recorder.finish(summarise(run, progress, results | {"error": str(error)}))
        raise
    results = {"status": "finished"} | final_evaluation(run, progress, validation)
    progress.wall_s = time.perf_counter() - start
    summary = summarise(run, progress, results)
    recorder.finish(summary)
    if processes.is_main:
        print(
            f"top-1 {summary['top1']:.2f} (moving average), "
            f"{summary['top1_batch_average']:.2f} (batch average); records in {cfg.output_dir}"
        )
    return summary


def check_config(cfg: DictConfig) -> None:
    """Raise ValueError for values that no run can have."""
    entry.check_values(cfg, CHECKS)
    entry.check_names(cfg, ["data.name", "model.name", "norm.name", "schedule.name", "run_name"])
    if cfg.gates not in ("joint", *bilevel.ORDERS):
        raise ValueError(f"unknown gates={cfg.gates!r}; choose joint or one of {[*bilevel.ORDERS]}")
    if cfg.gates != "joint" and cfg.precision == "fp16":
        raise ValueError(f"gates={cfg.gates} does not scale its losses; use precision=bf16 or fp32")


def build(
    cfg: DictConfig, processes: distributed.Processes, stop: StopSignal, watchdog: Watchdog
) -> Run:
    """Norm, model, data and optimizer of the config, on this process's device."""
    setting, device = cfg.setting, processes.device
    torch.manual_seed(cfg.seed)
    data_options = {k: v for k, v in cfg.data.items() if k not in ("workers", "max_bad_images")}
    bad_images = BadImages(f"{cfg.output_dir}/bad_images.txt", cfg.data.get("max_bad_images", 0))
    if "last_crop" in cfg.data:
        data_options |= {"last_fraction": cfg.schedule.last_fraction, "bad": bad_images}
    norm = sn.make_norm(**cfg.norm)
    data = build_data(**data_options)
    model = build_model(**cfg.model, num_classes=data.num_classes, norm=norm).to(device)
    emulation, micro_batches = distributed.prepare_setting(
        model, setting.gpus, setting.images_per_gpu, setting.emulation, processes.world_size
    )
    if cfg.precision == "fp64":
        model.double()
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    parallel = distributed.parallelise(model, processes)

    lr = base_lr(cfg.schedule.lr_per_256, setting.gpus, setting.images_per_gpu)
    groups = sn.parameter_groups(
        model,
        lr,
        cfg.optimizer.weight_decay,
        cfg.optimizer.gate_lr_factor,
        cfg.optimizer.gate_weight_decay,
    )
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=cfg.optimizer.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")

    def training_loader(train, seed: int) -> tuple[DataLoader, SettingSampler]:
        sampler = SettingSampler(
            len(train),
            setting.gpus,
            setting.images_per_gpu,
            seed,
            processes.rank,
            processes.world_size,
        )
        images = TransformedImages(train, data.augmentation, cfg.schedule.epochs, seed)
        return make_loader(images, sampler, cfg.data.workers, device), sampler

    train, gate_loader, gate_sampler = data.train, None, None
    if cfg.gates != "joint":
        if micro_batches > 1 or not sn.gates(model):
            raise ValueError(
                f"gates={cfg.gates} needs a norm with gates and setting.emulation=grouped, not "
                f"{cfg.norm.name} and {emulation}"
            )
        train, held_out = bilevel.split_images(data.train, cfg.seed)
        gate_loader, gate_sampler = training_loader(held_out, mix_seed(cfg.seed, 1))
    loader, sampler = training_loader(train, cfg.seed)
    return Run(
        cfg,
        processes,
        data,
        model,
        parallel,
        optimizer,
        scaler,
        loader,
        sampler,
        lr,
        emulation,
        micro_batches,
        gate_loader,
        gate_sampler,
        bad_images,
        FiniteGuard(cfg.max_skipped_steps),
        stop,
        watchdog,
    )


def announce(run: Run, progress: Progress) -> None:
    cfg, data = run.cfg, run.data.describe()
    parameters = sum(p.numel() for p in run.model.parameters())
    print(
        f"{cfg.run_name}: {cfg.model.name} with {cfg.norm.name}, {parameters:,} parameters; "
        f"{data['name']}, {data['train_images']:,} training and {data['val_images']:,} "
        f"validation images\n"
        f"setting ({cfg.setting.gpus},{cfg.setting.images_per_gpu}) on "
        f"{run.processes.world_size} x {run.processes.device.type}, emulation {run.emulation}; "
        f"lr {cfg.schedule.lr_per_256} per 256 images -> {run.lr:g}; "
        f"{cfg.schedule.epochs} epochs of {run.sampler.steps} steps",
        flush=True,
    )
    layers = sn.importance_weights(run.model).values()
    if cfg.setting.images_per_gpu == 1 and any("bn" in layer["mean"] for layer in layers):
        print("note: with one image per GPU bn equals in during training; the paper drops it "
              "there (norm=sn_in_ln)")  # fmt: skip
    foreign = [
        name
        for name, layer in batch_statistics_layers(run.model).items()
        if type(layer).__module__.startswith(("torch.", "timm."))
    ]
    if foreign and cfg.norm.name not in ("bn", "sync_bn"):
        print(
            f"note: {len(foreign)} batch norm layers of the model are its own, not "
            f"{cfg.norm.name}, first {foreign[0]}"
        )
    if progress.images_seen:
        print(f"resuming after {progress.epoch} epochs and {progress.step} steps", flush=True)
        if run.guard.skipped or run.bad_images.lines():
            bad = len(run.bad_images.lines())
            print(f"so far {run.guard.skipped} steps and {bad} images were skipped")


def train_one_epoch(run: Run, progress: Progress, start: float) -> dict:
    """Train from `progress.step` to the end of the epoch; return its metrics."""
    cfg, rank = run.cfg, run.processes.rank
    epochs, steps = cfg.schedule.epochs, run.sampler.steps
    for sampler in (run.sampler, run.gate_sampler):
        if sampler is not None:
            sampler.epoch, sampler.first_step = progress.epoch, progress.step
    run.parallel.train()
    began, first_image = time.perf_counter(), progress.images_seen
    bar = tqdm(
        total=steps,
        initial=progress.step,
        desc=f"epoch {progress.epoch + 1}/{epochs}",
        unit="step",
        leave=False,
        disable=not (run.processes.is_main and sys.stderr.isatty()),
    )
    gate_batches = iter(run.gate_loader or ())
    speed = progress.images_seen / max(progress.wall_s, 1e-9)  # if every step was done before
    for images, labels in run.loader:
        done = (progress.epoch * steps + progress.step) / (epochs * steps)
        set_lr(run, done)
        sn.begin_step(run.model, done)
        torch.manual_seed(mix_seed(cfg.seed, rank, progress.epoch, progress.step))  # dropout
        where = f"epoch {progress.epoch + 1}, step {progress.step + 1} of {steps}"
        run.watchdog.beat(where)
        images, labels = run.to_device(images), run.to_device(labels)
        if run.gate_loader is not None:
            gate_step(run, images, labels, *map(run.to_device, next(gate_batches)))
        loss, correct, count, stopping = train_step(run, images, labels, where)
        progress.loss += loss * count
        progress.correct += correct
        progress.images += count
        progress.images_seen += len(labels) * run.processes.world_size
        progress.skipped_steps = run.guard.skipped
        progress.step += 1
        speed = (progress.images_seen - first_image) / (time.perf_counter() - began)
        bar.set_postfix_str(
            f"loss {progress.loss / max(1, progress.images):.3f}, "
            f"top-1 {100 * progress.correct / max(1, progress.images):.1f}, {speed:.0f} images/s, "
            f"run {time_left(run, progress, speed)} left",
            refresh=False,
        )
        bar.update()
        due = cfg.checkpoint_steps and progress.step % cfg.checkpoint_steps == 0
        if stopping or due and progress.step < steps:  # the epoch's end saves by itself
            progress.wall_s = time.perf_counter() - start
            save(run, progress)
        if stopping:
            raise Preempted(
                f"stopped by a signal and saved after {where}; the same command goes on"
            )
    bar.close()
    if not progress.images:
        raise FloatingPointError(f"every step of epoch {progress.epoch + 1} was skipped")
    distributed.average_running_statistics(run.model)
    return {
        "step": (progress.epoch + 1) * steps,
        "images_seen": progress.images_seen,
        "lr": run.optimizer.param_groups[0]["lr"],
        "train/loss": progress.loss / progress.images,
        "train/top1": 100 * progress.correct / progress.images,
        "images_per_s": speed,
    }


def gate_step(run: Run, images: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor) -> None:
    """Update the gates alone, by the gradient of the loss on held-out images (gates=bilevel)."""

    def loss(x: Tensor, target: Tensor) -> Tensor:
        with run.autocast():
            return F.cross_entropy(run.model(x), target)

    gates = sn.gates(run.model)
    known = {id(gate) for gate in gates}
    weights = [p for p in run.model.parameters() if p.requires_grad and id(p) not in known]
    grads = bilevel.gate_gradients(
        lambda: loss(images, labels),
        lambda: loss(held, held_labels),
        gates,
        weights,
        run.optimizer,
        run.model,
        bilevel.ORDERS[run.cfg.gates],
    )
    run.optimizer.zero_grad(set_to_none=True)  # SGD leaves parameters without gradient alone
    for gate, grad in zip(gates, grads):
        gate.grad = grad
    if run.cfg.optimizer.gate_clip is not None:
        nn.utils.clip_grad_norm_(gates, run.cfg.optimizer.gate_clip)
    run.optimizer.step()


def train_step(
    run: Run, images: Tensor, labels: Tensor, where: str
) -> tuple[float, float, int, bool]:
    """One update; return (mean loss, number correct, images, stop?) over all processes.

    A skipped update has no images.
    """
    run.optimizer.zero_grad(set_to_none=True)
    micro_batches = run.micro_batches
    totals = torch.zeros(3, dtype=torch.float64, device=images.device)
    run.guard.begin(run.model)
    with distributed.one_running_update(run.model, micro_batches) as begin_micro_batch:
        for index, (x, target) in enumerate(
            zip(images.chunk(micro_batches), labels.chunk(micro_batches))
        ):
            begin_micro_batch(index)
            last = index == micro_batches - 1
            wait = run.parallel is run.model or last
            with contextlib.nullcontext() if wait else run.parallel.no_sync():
                with run.autocast():
                    logits = run.parallel(x)
                    loss = F.cross_entropy(logits, target)
                run.scaler.scale(loss / micro_batches).backward()
            totals[0] += loss.detach() / micro_batches
            totals[1] += (logits.argmax(1) == target).sum()
    totals[0] /= run.processes.world_size
    totals[2] = run.stop.requested
    distributed.sum_over_processes(totals)
    finite = totals[:1]
    if not run.scaler.is_enabled():  # which sees to infinite gradients itself
        finite = torch.stack([totals[0], gradient_norm(run.model).to(totals)])
    allowed = run.guard.allows(finite, run.model, where, lambda: forward_again(run, images))
    loss, correct, stop = totals.tolist()
    if not allowed:
        if run.processes.is_main:
            print(f"warning: not finite at {where}, step skipped", file=sys.stderr, flush=True)
        return 0.0, 0.0, 0, stop > 0
    if run.gate_loader is not None:
        for gate in sn.gates(run.model):  # they have had their step
            gate.grad = None
    elif run.cfg.optimizer.gate_clip is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(sn.gates(run.model), run.cfg.optimizer.gate_clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss, correct, len(labels) * run.processes.world_size, stop > 0


def forward_again(run: Run, images: Tensor) -> None:
    """The step's forward pass without gradients, to find what went bad in it."""
    with run.autocast():
        for x in images.chunk(run.micro_batches):
            run.model(x)


def set_lr(run: Run, progress: float) -> None:
    schedule = run.cfg.schedule
    factor = lr_factor(
        progress, schedule.decay, schedule.milestones, schedule.gamma, schedule.warmup
    )
    for group in run.optimizer.param_groups:
        group["lr"] = run.lr * factor * group["lr_factor"]


def validate(run: Run) -> dict[str, float]:
    """Loss, top-1 and top-5 on the validation images with the statistics the model holds."""
    processes, data = run.processes, run.data
    batches = evaluation_batches(
        len(data.val), run.cfg.evaluation.batch_size, processes.rank, processes.world_size
    )
    images = TransformedImages(data.val, data.evaluation, epochs=1)
    loader = make_loader(images, batches, run.cfg.data.workers, processes.device)
    with run.autocast():
        results = evaluate(run.model, run.evaluating(loader), run.to_device)
    run.stop_together()
    return results


def final_evaluation(run: Run, progress: Progress, moving: dict | None) -> dict:
    """Evaluate with the moving average, then with the batch average of training images.

    `moving` is what the last epoch's validation gave, None if this process did not run it.
    The checkpoint keeps the moving average, and the averaged buffers beside it.
    """
    moving = moving or validate(run)
    results = {"top1": moving["top1"], "top5": moving["top5"], "val_loss": moving["loss"]}
    if not batch_statistics_layers(run.model):  # nothing to average: the same model
        return results | {"top1_batch_average": moving["top1"], "batch_average_images": 0}
    before = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    processes, data, options = run.processes, run.data, run.cfg.evaluation.batch_average
    where = (processes.rank, processes.world_size)
    batches = batch_average_batches(
        len(data.train), options.batch_size, options.batches, run.cfg.seed, *where
    )
    images = TransformedImages(data.train, data.evaluation, epochs=1)
    loader = make_loader(images, batches, run.cfg.data.workers, processes.device)
    with run.autocast():
        # no early end: synchronised norms need as many batches in every process
        images = (run.to_device(x) for x, _ in run.watchdog.over(loader, "batch average"))
        sn.batch_average(run.model, images, len(batches))
    run.stop_together()
    averaged = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    results["top1_batch_average"] = validate(run)["top1"]
    size = min(options.batch_size, len(data.train))
    results["batch_average_images"] = size * min(options.batches, len(data.train) // size)
    for name, buffer in run.model.named_buffers():
        buffer.copy_(before[name])
    save(run, progress, averaged)
    return results


def save(
    run: Run, progress: Progress, batch_average: dict | None = None, best: bool = False
) -> None:
    """Write the checkpoint; all processes take part, the main one writes."""
    distributed.average_running_statistics(run.model)
    path = f"{run.cfg.output_dir}/checkpoint.pt"
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": vars(progress).copy(),
        "data": run.data.describe(),
        "batch_average": batch_average,
    }

    def write() -> None:
        save_checkpoint(path, state, run.cfg.keep_checkpoints)
        if best:
            keep_best(path)

    distributed.in_main(write, run.processes)


def resume(run: Run) -> Progress:
    """Load the run's checkpoint, if there is one, and return where it was."""
    needed = ("model", "optimizer", "scaler", "progress", "data")
    path = f"{run.cfg.output_dir}/checkpoint.pt"
    state = load_checkpoint(path, needed)
    if state is None:
        return Progress()
    if state["data"] != run.data.describe():
        raise ValueError(
            f"{run.cfg.output_dir} was trained on other data: {state['data']} there, "
            f"{run.data.describe()} now; choose another output_dir="
        )
    parts = {"model": run.model, "optimizer": run.optimizer, "scaler": run.scaler}
    progress = restore(path, state, parts, Progress)
    run.guard.skipped = progress.skipped_steps
    return progress


def summarise(run: Run, progress: Progress, results: dict) -> dict:
    """The contents of summary.json."""
    cfg, data = run.cfg, run.data.describe()
    setting = cfg.setting
    full = (
        data["train_images"],
        data["val_images"],
    ) == IMAGENET_SIZE and cfg.schedule.epochs >= 100
    layers = sn.importance_weights(run.model).values()
    return {
        "task": "imagenet",
        "run": f"imagenet/{cfg.data.name}_{cfg.model.name}/{cfg.run_name}/seed{cfg.seed}",
        "norm": cfg.norm.name,
        "statistics": list(next(iter(layers))["mean"]) if layers else None,
        "setting": {
            "gpus": setting.gpus,
            "images_per_gpu": setting.images_per_gpu,
            "name": f"{setting.gpus}x{setting.images_per_gpu}",
            "emulation": run.emulation,
            "world_size": run.processes.world_size,
        },
        "data": data,
        "model": cfg.model.name,
        **results,
        "epochs": progress.epoch,
        "seed": cfg.seed,
        "images_seen": progress.images_seen,
        "best_top1": progress.best_top1 if progress.epoch else None,
        "skipped_steps": run.guard.skipped,
        "bad_images": len(run.bad_images.lines()),
        "wall_s": round(progress.wall_s, 1),
        "lr": run.lr,
        "precision": cfg.precision,
        "scale": "full" if full else "proxy",
        "note": cfg.note,
        **environment(run.processes.device),
    }


def print_epoch(run: Run, progress: Progress, metrics: dict) -> None:
    print(
        f"epoch {progress.epoch}/{run.cfg.schedule.epochs}  loss {metrics['train/loss']:.4f}  "
        f"top-1 {metrics['train/top1']:.2f}  val loss {metrics['val/loss']:.4f}  "
        f"val top-1 {metrics['val/top1']:.2f}  {metrics['images_per_s']:.0f} images/s  "
        f"{time_left(run, progress, metrics['images_per_s'])} left",
        flush=True,
    )


def time_left(run: Run, progress: Progress, images_per_s: float) -> str:
    per_step = run.cfg.setting.gpus * run.cfg.setting.images_per_gpu
    in_all = run.cfg.schedule.epochs * run.sampler.steps * per_step
    seconds = int((in_all - progress.images_seen) / images_per_s)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


if __name__ == "__main__":
    entry.start(main)

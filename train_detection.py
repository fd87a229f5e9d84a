"""Train Faster or Mask R-CNN with a norm for each part, evaluate it by COCO's AP, or predict.

    python train_detection.py parts=sn                                 # digits, drawn by itself
    torchrun --nproc_per_node=8 train_detection.py experiment=detection/mask_fpn_sn_sn \\
        init.path=sn_8x2.pt data.root=/data/coco
    python train_detection.py ... mode=predict predict.images=photos   # with that run's checkpoint

Section 4.2; Tables 4.2-4.4 expect 41.0 box AP of Mask R-CNN with SN everywhere. The same command
resumes a run that was interrupted. See configs/detection.yaml for every option.
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

import sn
from sn.training.classification.data import read_image
from sn.training.detection import detectors
from sn.training.detection.data import (
    DetectionData,
    GroupedSampler,
    TrainingImages,
    augmentation,
    load_detection_data,
    training_loader,
)
from sn.training.detection.evaluation import (
    coco_results,
    detect,
    evaluate_detections,
    evaluation_batches,
    gather,
)
from sn.training.detection.pictures import draw_detections, grid, save_picture
from sn.training.run import distributed, entry
from sn.training.run.checkpoint import load_checkpoint, load_weights, restore, save_checkpoint
from sn.training.run.entry import above, is_number, number, one_of, optional, switch, whole
from sn.training.run.guard import FiniteGuard, gradient_norm
from sn.training.run.record import Recorder, environment, write_text
from sn.training.run.schedule import lr_factor_by_images, mix_seed
from sn.training.run.stopping import Preempted, StopSignal, Watchdog

AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COCO_IMAGES = (117_266, 5_000)  # of train2017 with objects, of val2017
COCO_1X = 1_440_000  # images of Detectron's shortest schedule
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

CHECKS = [
    (one_of(("train", "evaluate", "predict")), "train, evaluate or predict", ["mode"]),
    (
        whole(1),
        "a whole number, 1 or more",
        [
            *("setting.gpus", "setting.images_per_gpu", "schedule.images", "log_steps"),
            *("evaluation.batch_size", "data.test_size", "data.max_size", "model.fpn_channels"),
            *("model.box_features", "model.rpn_convs", "model.rois_per_image"),
            *("model.proposals_train", "model.proposals_test", "data.generate.size"),
            *("data.generate.train_images", "data.generate.val_images"),
        ],
    ),
    (
        optional(whole(1)),
        "a whole number, 1 or more, or null",
        ["data.train_images", "data.val_images", "evaluation.every_images"],
    ),
    (
        whole(0, 2**32),
        "a whole number, 0 to 2^32",
        [
            *("seed", "data.workers", "checkpoint_steps", "max_skipped_steps", "model.freeze_at"),
            *("schedule.warmup_images", "evaluation.pictures", "data.generate.seed"),
        ],
    ),
    (whole(2, 1000), "a whole number, 2 to 1000", ["keep_checkpoints"]),
    (
        number(),
        "a number, 0 or more",
        [
            *("schedule.lr_per_16", "schedule.gamma", "optimizer.momentum"),
            *("optimizer.weight_decay", "optimizer.norm_weight_decay"),
            *("optimizer.bias_weight_decay", "optimizer.bias_lr_factor"),
            *("optimizer.gate_weight_decay", "optimizer.gate_lr_factor"),
        ],
    ),
    (number(0, 1), "a number, 0 to 1", ["schedule.warmup_factor", "evaluation.threshold"]),
    (
        optional(number(0, 1)),
        "a number, 0 to 1, or null",
        [f"parts.{part}.momentum" for part in detectors.PARTS],
    ),
    (above(0), "a number above 0", ["timeout_minutes"]),
    (optional(above(0)), "null or a number above 0", ["optimizer.clip"]),
    (
        switch,
        "true or false",
        ["channels_last", "data.flip", "data.aspect_grouping", "model.zero_init_residual"],
    ),
    (
        lambda v: OmegaConf.is_list(v) and all(is_number(m) and 0 <= m <= 1 for m in v),
        "a list of fractions of the run, such as [0.67,0.89]",
        ["schedule.milestones"],
    ),
    (
        lambda v: OmegaConf.is_list(v) and len(v) > 0 and all(whole(1)(size) for size in v),
        "a list of lengths in pixels, such as [800]",
        ["data.sizes", "model.anchor_sizes"],
    ),
    (one_of(list(AUTOCAST)), f"one of {list(AUTOCAST)}", ["precision"]),
]


@dataclass
class Run:
    """Everything that is built once from the config."""

    cfg: DictConfig
    processes: distributed.Processes
    data: DetectionData
    model: nn.Module  # the plain network: saved, evaluated
    parallel: nn.Module  # the same, in DistributedDataParallel if there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: DataLoader
    sampler: GroupedSampler
    lr: float
    init_sha256: str | None  # of the pretrained weights
    guard: FiniteGuard
    stop: StopSignal
    watchdog: Watchdog

    @property
    def images_per_step(self) -> int:
        return self.cfg.setting.gpus * self.cfg.setting.images_per_gpu

    @property
    def micro_batches(self) -> int:
        """Virtual GPUs of this process, a forward pass each."""
        return self.cfg.setting.gpus // self.processes.world_size

    def evaluates_after(self, step: int) -> bool:
        """Whether AP is measured after `step` steps."""
        every = self.cfg.evaluation.every_images
        due = every is not None and step % max(1, round(every / self.images_per_step)) == 0
        return due or step == self.sampler.steps

    def logs_after(self, step: int) -> bool:
        return step % self.cfg.log_steps == 0 or self.evaluates_after(step)

    def evaluating(self, batches: Iterable) -> Iterator:
        """Batches outside training; a signal ends them early."""
        for batch in self.watchdog.over(batches, "evaluation"):
            if self.stop.requested:
                return
            yield batch


@dataclass
class Progress:
    """Where the run is; what a checkpoint holds beside weights and optimizer."""

    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)  # sums since the last line of metrics
    steps: int = 0  # that count in them
    images_seen: int = 0
    skipped_steps: int = 0
    wall_s: float = 0.0


@hydra.main(version_base="1.3", config_path="configs", config_name="detection")
def main(cfg: DictConfig) -> None:
    modes = {"train": train, "evaluate": evaluate_checkpoint, "predict": predict}
    entry.run(lambda cfg: modes.get(cfg.mode, check_config)(cfg), cfg)


def train(cfg: DictConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_config(cfg)
    parts = {part: cfg.parts[part].name for part in detectors.ARCHITECTURES[cfg.model.architecture]}
    detectors.check_frozen(cfg.model.architecture, parts, cfg.init.name, cfg.model.freeze_at)
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
    recorder = Recorder(cfg.output_dir, config, processes.is_main, unit="step")
    summary = recorder.summary()
    if summary is not None:
        if processes.is_main:
            print(f"{cfg.output_dir} has ended already: box AP {summary['box_ap']}")
        return summary

    run = build(cfg, processes, stop, watchdog)
    progress = resume(run)
    # a line of the checkpoint's own step is written again: it was saved before that
    recorder.open(progress.step - 1)
    if processes.is_main:
        announce(run, progress)
    if progress.step == 0:
        recorder.importance(0, run.model, blocks=detectors.layer_blocks(run.model))
    start = time.perf_counter() - progress.wall_s
    try:
        results = train_steps(run, progress, recorder, start)
    except FloatingPointError as error:
        progress.wall_s = time.perf_counter() - start
        results = {"status": "diverged", "box_ap": None, "mask_ap": None, "error": str(error)}
        recorder.finish(summarise(run, progress, results))
        raise
    progress.wall_s = time.perf_counter() - start
    summary = summarise(run, progress, {"status": "finished"} | results)
    recorder.finish(summary)
    if processes.is_main:
        print(f"{describe_ap(summary)}; records in {cfg.output_dir}")
    return summary


def check_config(cfg: DictConfig) -> None:
    """Raise ValueError for values that no run can have."""
    entry.check_values(cfg, CHECKS)
    names = [f"parts.{part}.name" for part in detectors.PARTS]
    entry.check_names(
        cfg, ["data.name", "model.name", "model.parts_name", "init.name", "run_name", *names]
    )
    if cfg.model.architecture not in detectors.ARCHITECTURES:
        raise ValueError(
            f"unknown model.architecture={cfg.model.architecture!r}; choose one of "
            f"{list(detectors.ARCHITECTURES)}"
        )
    part_norms(cfg)
    if cfg.setting.emulation == "grouped":
        raise ValueError(
            "setting.emulation=grouped: images and RoIs of a step differ in number and size, so "
            "each virtual GPU has a forward pass of its own; use accumulated or auto"
        )


def part_norms(cfg: DictConfig) -> dict:
    """The norm callable of each part, None where the detector has none. Raises as `make_norm`."""
    norms = {part: sn.make_norm(**cfg.parts[part]) for part in detectors.PARTS}
    for part in detectors.PARTS:
        own = part in detectors.ARCHITECTURES[cfg.model.architecture]
        if not own or cfg.parts[part].name == "none":
            norms[part] = None
    return norms


def build_model(cfg: DictConfig, num_classes: int, weights: dict | None = None) -> nn.Module:
    """The detector of the config, with the norm of each part that it has."""
    options = {k: v for k, v in cfg.model.items() if k not in ("name", "parts_name")}
    options |= {"min_size": cfg.data.test_size, "max_size": cfg.data.max_size}
    model = detectors.build_detector(
        num_classes=num_classes, norms=part_norms(cfg), weights=weights, **options
    )
    return sn.connect(model)


def build_data(cfg: DictConfig) -> DetectionData:
    keys = ("sizes", "test_size", "max_size", "flip", "aspect_grouping", "workers")
    options = {k: v for k, v in cfg.data.items() if k not in keys}
    return load_detection_data(masks=has_masks(cfg), **options)


def has_masks(cfg: DictConfig) -> bool:
    return "mask_head" in detectors.ARCHITECTURES[cfg.model.architecture]


def build(
    cfg: DictConfig, processes: distributed.Processes, stop: StopSignal, watchdog: Watchdog
) -> Run:
    """Model, data and optimizer of the config, on this process's device."""
    setting, device = cfg.setting, processes.device
    data = build_data(cfg)
    weights = detectors.pretrained_weights(cfg.init.name, cfg.model.backbone, cfg.init.path)
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, len(data.names), weights).to(device)
    distributed.prepare_setting(
        model, setting.gpus, setting.images_per_gpu, "accumulated", processes.world_size
    )
    if cfg.precision == "fp64":
        model.double()
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
    parallel = distributed.parallelise(model, processes)

    per_step = setting.gpus * setting.images_per_gpu
    lr = cfg.schedule.lr_per_16 * per_step / 16
    options = {k: v for k, v in cfg.optimizer.items() if k not in ("momentum", "clip")}
    groups = detectors.optimizer_groups(model, lr, **options)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=cfg.optimizer.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")

    landscape = data.train.landscape()
    sampler = GroupedSampler(
        landscape if cfg.data.aspect_grouping else [0] * len(landscape),
        setting.gpus,
        setting.images_per_gpu,
        max(1, round(cfg.schedule.images / per_step)),
        cfg.seed,
        processes.rank,
        processes.world_size,
    )
    transform = augmentation(cfg.data.sizes, cfg.data.max_size, cfg.data.flip)
    images = TrainingImages(data.train, transform, cfg.seed)
    return Run(
        cfg,
        processes,
        data,
        model,
        parallel,
        optimizer,
        scaler,
        training_loader(images, sampler, cfg.data.workers, device),
        sampler,
        lr,
        weights and sha256(weights),
        FiniteGuard(cfg.max_skipped_steps),
        stop,
        watchdog,
    )


def sha256(weights: dict[str, Tensor]) -> str:
    """Hash of names and values."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_device(cfg: DictConfig, device: torch.device, tensor: Tensor) -> Tensor:
    """Floating-point tensors in the run's precision, others as they are."""
    dtype = torch.float64 if cfg.precision == "fp64" and tensor.is_floating_point() else None
    return tensor.to(device, dtype, non_blocking=True)


def autocast(cfg: DictConfig, device: torch.device):
    dtype = AUTOCAST[cfg.precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def announce(run: Run, progress: Progress) -> None:
    cfg, data = run.cfg, run.data.describe()
    parameters = sum(p.numel() for p in run.model.parameters())
    print(
        f"{cfg.run_name}: {cfg.model.name}, {parameters:,} parameters; {data['name']}, "
        f"{data['train_images']:,} training and {data['val_images']:,} validation images, "
        f"{data['classes']} classes; left out of training: {run.data.left_out()}\n"
        f"{detectors.parts_table(run.model)}\n"
        f"setting ({cfg.setting.gpus},{cfg.setting.images_per_gpu}) on "
        f"{run.processes.world_size} x {run.processes.device.type}, {run.micro_batches} forward "
        f"passes a step; lr {cfg.schedule.lr_per_16} per 16 images -> {run.lr:g}; "
        f"{run.sampler.steps:,} steps of {run.images_per_step} images, "
        f"{run.sampler.steps / run.sampler.steps_per_epoch:.2f} epochs",
        flush=True,
    )
    layers = sn.importance_weights(run.model)
    if cfg.setting.images_per_gpu == 1 and any("bn" in layer["mean"] for layer in layers.values()):
        print("note: with one image per GPU bn equals in during training of the backbone; the "
              "paper drops it there (sn_in_ln)")  # fmt: skip
    if progress.step:
        print(f"resuming after {progress.step} steps", flush=True)


def train_steps(run: Run, progress: Progress, recorder: Recorder, start: float) -> dict:
    """Train from `progress.step` to the end; return the metrics of the last evaluation."""
    cfg, steps = run.cfg, run.sampler.steps
    run.sampler.first_step = progress.step
    metrics = {}
    began, first = time.perf_counter(), progress.step
    if progress.steps and run.logs_after(progress.step):  # stopped before it was recorded
        metrics = record(run, progress, recorder, None)
    run.parallel.train()
    bar = tqdm(
        total=steps,
        initial=progress.step,
        unit="step",
        leave=False,
        disable=not (run.processes.is_main and sys.stderr.isatty()),
    )
    for images, targets in run.loader:
        set_lr(run, progress.step * run.images_per_step)
        sn.begin_step(run.model, progress.step / steps)
        where = f"step {progress.step + 1} of {steps}"
        run.watchdog.beat(where)
        losses, stopping = train_step(run, images, targets, progress.step, where)
        for name, loss in losses.items():
            progress.losses[name] = progress.losses.get(name, 0.0) + loss
        progress.steps += bool(losses)
        progress.images_seen += run.images_per_step
        progress.skipped_steps = run.guard.skipped
        progress.step += 1
        bar.set_postfix_str(f"loss {losses.get('loss', float('nan')):.3f}", refresh=False)
        bar.update()
        due = cfg.checkpoint_steps and progress.step % cfg.checkpoint_steps == 0
        if stopping or due or run.evaluates_after(progress.step):
            progress.wall_s = time.perf_counter() - start
            save(run, progress)
        if stopping:
            raise Preempted(
                f"stopped by a signal and saved after {where}; the same command goes on"
            )
        if run.logs_after(progress.step):
            speed = (progress.step - first) / (time.perf_counter() - began)
            metrics = record(run, progress, recorder, speed)
    bar.close()
    return {key: value for key, value in metrics.items() if key.startswith(("box_", "mask_"))}


def train_step(
    run: Run, images: list[Tensor], targets: list[dict], step: int, where: str
) -> tuple[dict[str, float], bool]:
    """One update; return (losses by name and their sum "loss", stop?), means over all GPUs.

    Losses are normalised within each GPU's images, as in plain data-parallel training. A skipped
    update has no losses.
    """
    cfg, processes = run.cfg, run.processes
    per_gpu, micro_batches = cfg.setting.images_per_gpu, run.micro_batches
    images = [to_device(cfg, processes.device, image) for image in images]
    targets = [
        {key: to_device(cfg, processes.device, value) for key, value in target.items()}
        for target in targets
    ]

    def forward(model: nn.Module, index: int) -> dict[str, Tensor]:
        gpu = processes.rank * micro_batches + index
        torch.manual_seed(mix_seed(cfg.seed, 1, step, gpu))  # anchors and RoIs are sampled
        part = slice(index * per_gpu, (index + 1) * per_gpu)
        with autocast(cfg, processes.device):
            return model(images[part], targets[part])

    run.optimizer.zero_grad(set_to_none=True)
    run.guard.begin(run.model)
    totals = 0
    with distributed.one_running_update(run.model, micro_batches) as begin_micro_batch:
        for index in range(micro_batches):
            begin_micro_batch(index)
            wait = run.parallel is run.model or index == micro_batches - 1
            with contextlib.nullcontext() if wait else run.parallel.no_sync():
                losses = forward(run.parallel, index)
                loss = sum(losses.values())
                run.scaler.scale(loss / micro_batches).backward()
            totals = totals + torch.stack([loss, *losses.values()]).detach().double()
    totals /= cfg.setting.gpus
    totals = torch.cat([totals, totals.new_tensor([float(run.stop.requested)])])
    distributed.sum_over_processes(totals)
    *values, stop = totals.tolist()
    finite = totals[:1]
    if not run.scaler.is_enabled():  # which sees to infinite gradients itself
        finite = torch.stack([totals[0], gradient_norm(run.model).to(totals)])
    allowed = run.guard.allows(finite, run.model, where, lambda: forward(run.model, 0))
    if not allowed:
        if processes.is_main:
            print(f"warning: not finite at {where}, step skipped", file=sys.stderr, flush=True)
        return {}, stop > 0
    if cfg.optimizer.clip is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), cfg.optimizer.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return dict(zip(["loss", *losses], values)), stop > 0


def set_lr(run: Run, images_seen: int) -> None:
    schedule = run.cfg.schedule
    factor = lr_factor_by_images(
        images_seen,
        run.sampler.steps * run.images_per_step,
        schedule.milestones,
        schedule.gamma,
        schedule.warmup_images,
        schedule.warmup_factor,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = run.lr * factor * group["lr_factor"]


def record(run: Run, progress: Progress, recorder: Recorder, speed: float | None) -> dict:
    """Write the metrics since the last line, with AP where it is due; return them."""
    step, steps = progress.step, run.sampler.steps
    if not progress.steps:
        raise FloatingPointError(f"every step up to {step} of {steps} was skipped")
    metrics = {f"train/{k}": v / progress.steps for k, v in progress.losses.items()}
    metrics |= {"lr": run.optimizer.param_groups[0]["lr"], "images_seen": progress.images_seen}
    metrics["steps_per_s"] = speed
    ap = {}
    if run.evaluates_after(step):
        ap, results = evaluate(run)
        if run.processes.is_main:
            write_predictions(Path(run.cfg.output_dir), results)
            sheet = draw_validation(run.cfg, run.processes, run.data, run.model)
            if sheet is not None:
                recorder.writer.add_image("predictions", sheet, step)
    tenth = step % max(1, steps // 10) == 0
    if tenth or run.evaluates_after(step):
        blocks = detectors.layer_blocks(run.model)
        recorder.importance(step, run.model, figure=True, blocks=blocks)
    recorder.metrics(step, metrics | {f"val/{key}": value for key, value in ap.items()})
    progress.losses, progress.steps = {}, 0
    if run.processes.is_main:
        left = "" if speed is None else f"  {clock((steps - step) / speed)} left"
        losses = "  ".join(
            f"{key.removeprefix('train/').removeprefix('loss_')} {value:.3f}"
            for key, value in metrics.items()
            if key.startswith("train/")
        )
        print(f"step {step}/{steps}  {losses}{left}", flush=True)
        if ap:
            print(describe_ap(ap), flush=True)
    return metrics | ap


def evaluate(run: Run) -> tuple[dict, list[dict]]:
    """COCO metrics and results on the validation images, each image once over all processes."""
    distributed.average_running_statistics(run.model)
    found = evaluate_model(run.cfg, run.processes, run.data, run.model, run.evaluating)
    if distributed.any_process(run.stop.requested, run.processes.device):
        raise Preempted("stopped by a signal at evaluation; the same command goes on")
    return found


def evaluate_model(cfg, processes, data, model, watched=iter) -> tuple[dict, list[dict]]:
    """As `evaluate`; `watched` wraps the batches."""
    batches = evaluation_batches(
        len(data.val), cfg.evaluation.batch_size, processes.rank, processes.world_size
    )
    with autocast(cfg, processes.device):
        results = detect(
            model, data.val, watched(batches), lambda x: to_device(cfg, processes.device, x)
        )
    return evaluate_detections(data.val, results, has_masks(cfg))


def draw_validation(cfg, processes, data: DetectionData, model: nn.Module) -> Tensor | None:
    """predictions.png: the first validation images with their detections; returned as well."""
    count = min(cfg.evaluation.pictures, len(data.val))
    if count == 0:
        return None
    drawn = []
    for index in range(count):
        picture = data.val.picture(index)
        found = find(cfg, processes, model, picture)
        drawn.append(draw_detections(picture, found, data.names, cfg.evaluation.threshold))
    sheet = grid(drawn)
    save_picture(sheet, Path(cfg.output_dir) / "predictions.png")
    return sheet


@torch.no_grad()
def find(cfg, processes, model, picture: Tensor) -> dict[str, Tensor]:
    """Detections on one uint8 picture (3, H, W), on the CPU; the model's mode is restored."""
    training = model.training
    model.eval()
    with autocast(cfg, processes.device):
        (found,) = model([to_device(cfg, processes.device, picture.float() / 255)])
    model.train(training)
    return {key: value.cpu() for key, value in found.items()}


def write_predictions(folder: Path, results: list[dict]) -> None:
    """predictions.json: COCO's results format."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.json", json.dumps(results))


def save(run: Run, progress: Progress) -> None:
    """Write the checkpoint; all processes take part, the main one writes."""
    distributed.average_running_statistics(run.model)
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": vars(progress).copy(),
        "data": run.data.describe(),
        "classes": list(run.data.names),
        "category_ids": list(run.data.train.file.category_ids),
        "init_sha256": run.init_sha256,
        "detector": detector_options(run.cfg),
    }
    path = f"{run.cfg.output_dir}/checkpoint.pt"
    distributed.in_main(
        lambda: save_checkpoint(path, state, run.cfg.keep_checkpoints), run.processes
    )


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
    if state.get("init_sha256", run.init_sha256) != run.init_sha256:
        raise ValueError(
            f"{run.cfg.output_dir} was started from other weights than those of "
            f"init.path={run.cfg.init.path}; choose another output_dir="
        )
    parts = {"model": run.model, "optimizer": run.optimizer, "scaler": run.scaler}
    progress = restore(path, state, parts, Progress)
    run.guard.skipped = progress.skipped_steps
    return progress


def detector_options(cfg: DictConfig) -> dict:
    """What a checkpoint's weights stand for beyond their shapes: norms and anchors."""
    parts = {
        part: OmegaConf.to_container(cfg.parts[part], resolve=True)
        for part in detectors.ARCHITECTURES[cfg.model.architecture]
    }
    for options in parts.values():
        options.pop("momentum", None)
    return {"anchor_sizes": list(cfg.model.anchor_sizes)} | parts


def summarise(run: Run, progress: Progress, results: dict) -> dict:
    """The contents of summary.json."""
    cfg, data, setting = run.cfg, run.data.describe(), run.cfg.setting
    sizes = (data["train_images"], data["val_images"])
    full = sizes == COCO_IMAGES and run.sampler.steps * run.images_per_step >= COCO_1X // 2
    return {
        "task": "detection",
        "run": f"detection/{cfg.data.name}_{cfg.model.name}/{cfg.run_name}/seed{cfg.seed}",
        "parts": {
            part: cfg.parts[part].name for part in detectors.ARCHITECTURES[cfg.model.architecture]
        },
        "init": {"name": cfg.init.name, "sha256": run.init_sha256},
        "setting": {
            "gpus": setting.gpus,
            "images_per_gpu": setting.images_per_gpu,
            "name": f"{setting.gpus}x{setting.images_per_gpu}",
            "emulation": "accumulated" if run.micro_batches > 1 else "none",
            "world_size": run.processes.world_size,
        },
        "data": data,
        "model": cfg.model.name,
        **results,
        "steps": progress.step,
        "seed": cfg.seed,
        "images_seen": progress.images_seen,
        "skipped_steps": run.guard.skipped,
        "wall_s": round(progress.wall_s, 1),
        "lr": run.lr,
        "schedule": cfg.schedule.name,
        "precision": cfg.precision,
        "scale": "full" if full else "proxy",
        "note": cfg.note,
        **environment(run.processes.device),
    }


def describe_ap(metrics: dict) -> str:
    """`box AP 12.3 (AP50 30.1, AP75 8.0)`, and the masks'."""

    def text(value: float | None) -> str:
        return "none" if value is None else f"{value:.1f}"

    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap50" in metrics]
    return "; ".join(
        f"{kind} AP {text(metrics[f'{kind}_ap'])} (AP50 {text(metrics[f'{kind}_ap50'])}, "
        f"AP75 {text(metrics[f'{kind}_ap75'])})"
        for kind in kinds
    )


def clock(seconds: float) -> str:
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


# --- with a trained model


def trained_model(cfg: DictConfig, processes: distributed.Processes) -> tuple[nn.Module, dict]:
    """(model in evaluation mode, checkpoint) of checkpoint.path or the run's own checkpoint."""
    path = cfg.checkpoint.path or f"{cfg.output_dir}/checkpoint.pt"
    state = load_weights(path)
    for key in ("model", "classes", "category_ids"):
        if key not in state:
            raise ValueError(f"{path} is no checkpoint of train_detection.py: it has no {key!r}")
    options = detector_options(cfg)
    for key, value in state.get("detector", options).items():
        if options.get(key, value) != value:  # of another architecture: the shapes tell
            raise ValueError(
                f"{path} is not of this model and these parts ({cfg.run_name}): {key} is {value} "
                f"there, {options[key]} asked for"
            )
    model = build_model(cfg, len(state["classes"]))
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not of this model and these parts ({cfg.run_name}): "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    if cfg.precision == "fp64":
        model.double()
    return model.to(processes.device).eval(), state


def evaluate_checkpoint(cfg: DictConfig) -> dict:
    """mode=evaluate: AP of a checkpoint on the validation images, with results and pictures."""
    check_config(cfg)
    processes = distributed.start(cfg.device, cfg.timeout_minutes + 5)
    model, state = trained_model(cfg, processes)
    data = build_data(cfg)
    if data.names != state["classes"]:
        raise ValueError(
            f"the checkpoint's classes {state['classes'][:5]}... are not those of "
            f"{data.val.file.path}: {data.names[:5]}..."
        )
    metrics, results = evaluate_model(cfg, processes, data, model)
    if processes.is_main:
        folder = Path(cfg.output_dir)
        write_predictions(folder, results)
        draw_validation(cfg, processes, data, model)
        content = metrics | {"data": data.describe(), **environment(processes.device)}
        write_text(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
        print(f"{describe_ap(metrics)}; evaluation.json and predictions.json in {folder}")
    return metrics


def predict(cfg: DictConfig) -> list[dict]:
    """mode=predict: pictures with detections, and predictions.json, for an image or a folder.

    An image that cannot be read is named, left out, and ends in an error after all others.
    """
    check_config(cfg)
    if cfg.predict.images is None:
        raise ValueError("mode=predict needs predict.images=..., an image or a folder of images")
    source = Path(cfg.predict.images)
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
    else:
        files = [source]
    if not files:
        raise ValueError(f"predict.images={source}: no image ({', '.join(SUFFIXES)}) in it")
    processes = distributed.start(cfg.device, cfg.timeout_minutes + 5)
    model, state = trained_model(cfg, processes)
    out = Path(cfg.predict.out or f"{cfg.output_dir}/predictions")
    out.mkdir(parents=True, exist_ok=True)
    results, errors = [], []
    for index in range(processes.rank, len(files), processes.world_size):
        try:
            picture = read_picture(files[index], cfg.data.max_size)
        except ValueError as error:
            print(f"warning: {error}; left out", file=sys.stderr, flush=True)
            errors.append(str(error))
            continue
        found = find(cfg, processes, model, picture)
        drawn = draw_detections(picture, found, state["classes"], cfg.evaluation.threshold)
        save_picture(drawn, out / f"{files[index].name}.png")
        rows = coco_results(found, index, state["category_ids"])
        labels = found["labels"].tolist()
        results += [
            row | {"file_name": files[index].name, "category": state["classes"][label - 1]}
            for row, label in zip(rows, labels)
        ]
    results = gather(results)
    if processes.is_main:
        write_predictions(out, results)
        print(f"{len(files)} images, {len(results)} detections; pictures in {out}")
    if errors:
        raise ValueError(f"{len(errors)} of {len(files)} images were left out: {errors[0]}")
    return results


def read_picture(path: Path, max_size: int) -> Tensor:
    """The uint8 picture (3, H, W), if there is any of it left at a long side of `max_size`."""
    picture = F.pil_to_tensor(read_image(path))
    height, width = picture.shape[1:]
    if min(height, width) * max_size < max(height, width):
        raise ValueError(
            f"{path} has {width} x {height} pixels: nothing is left of its short side at "
            f"data.max_size={max_size}"
        )
    return picture


if __name__ == "__main__":
    entry.start(main)

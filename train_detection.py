"""Train Faster or Mask R-CNN with a norm for each part, evaluate it by COCO's AP, or predict.

    python train_detection.py parts=sn                                 # digits, drawn by itself
    torchrun --nproc_per_node=8 train_detection.py experiment=detection/mask_sn_sn \\
        init.path=sn_8x1.pt data.root=/data/coco
    python train_detection.py ... mode=predict predict.images=photos   # with that run's checkpoint

Section 4.2; Tables 4.2-4.4 expect 41.0 box AP of Mask R-CNN with SN everywhere. The same command
resumes a run that was interrupted. See configs/detection.yaml for every option.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; entry.start collects again

import contextlib
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import sn
from sn.training.classification.pretrained import pretrained_weights, sha256
from sn.training.detection import detectors
from sn.training.detection.config import DetectionConfig
from sn.training.detection.data import (
    GroupedSampler,
    TrainingImages,
    augmentation,
    training_loader,
)
from sn.training.detection.evaluation import (
    describe_ap,
    detect,
    evaluate_detections,
    evaluation_batches,
)
from sn.training.detection.predict import (
    detector_options,
    draw_validation,
    evaluate_checkpoint,
    load_data,
    predict,
    write_predictions,
)
from sn.training.detection.task import Task
from sn.training.run import budget, distributed, entry
from sn.training.run.schedule import lr_factor_by_images
from sn.training.run.session import Session


@hydra.main(version_base="1.3", config_path="configs", config_name="detection")
def main(cfg: DictConfig) -> None:
    modes = {"train": train, "evaluate": evaluate_checkpoint, "predict": predict}
    entry.run(lambda config: modes[config.mode](config), cfg)


def train(config: DetectionConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    with Session(config, unit="step") as run:
        if run.summary is not None:
            return run.has_ended("box AP", "box_ap")
        task = build(config, run)
        need = run.warn_of(lambda: task.needs(run))
        run.begin(
            parts={"model": task.model, "optimizer": task.optimizer, "scaler": run.scaler},
            identity=task.identity(),
            facts=task.facts(run),
            headline=("box_ap", "mask_ap"),
            steps=task.sampler.steps,
            saved={
                "classes": task.data.names,
                "category_ids": task.data.train.file.category_ids,
                "detector": detector_options(config),
            },
            importance=task.model,
            blocks=detectors.layer_blocks(task.model),
            score="box_ap",
            records_after_saving=True,
        )
        task.announce(run)
        if config.plan:
            evaluations = sum(map(task.evaluates_after, range(1, task.sampler.steps + 1)))
            evaluation = (lambda: evaluate(task, run), evaluations)
            loops = {"training": (lambda: train_steps(task, run), 1), "evaluation": evaluation}
            return budget.plan(run, task.model, need, loops)
        ap = train_steps(task, run)
        bad_images = {"bad_images": len(task.data.train.bad.lines())}
        summary = run.finish(ap | bad_images)
        run.say(f"{describe_ap(summary)}; records in {config.output_dir}")
        return summary


def build(config: DetectionConfig, run: Session) -> Task:
    """Model, data and optimizer of the config, on this process's device."""
    setting, processes = config.setting, run.processes
    data = load_data(config)
    init, backbone = config.init, config.model.backbone
    weights = pretrained_weights(init.name, backbone, init.path, init.key, run.say, init.weights)
    if weights is not None and Path(config.output_dir, "checkpoint.pt").is_file():
        weights.facts = {}  # its own are loaded over them; it goes on as it began
    torch.manual_seed(config.seed)
    model = detectors.build_detector(
        num_classes=len(data.names), weights=weights, **config.detector()
    )
    distributed.prepare_setting(
        model.to(run.device),
        setting.gpus,
        setting.images_per_gpu,
        "accumulated",
        processes.world_size,
    )
    run.precision.model(model)

    lr = setting.lr(config.schedule.lr_per_16, 16)
    groups = detectors.optimizer_groups(model, lr, **config.optimizer.groups())
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.optimizer.momentum)
    landscape = data.train.landscape()
    sampler = GroupedSampler(
        landscape if config.data.aspect_grouping else [0] * len(landscape),
        setting.gpus,
        setting.images_per_gpu,
        max(1, round(config.schedule.images / setting.total)),
        config.seed,
        processes.rank,
        processes.world_size,
    )
    transform = augmentation(config.data.sizes, config.data.max_size, config.data.flip)
    images = TrainingImages(data.train, transform, config.seed)
    return Task(
        config=config,
        data=data,
        model=model,
        parallel=distributed.parallelise(model, processes),
        optimizer=optimizer,
        loader=training_loader(images, sampler, config.data.workers, run.device),
        sampler=sampler,
        init={"name": init.name, "sha256": weights and sha256(weights)},
        micro_batches=setting.gpus // processes.world_size,
    )


def train_steps(task: Task, run: Session) -> dict[str, float | None]:
    """Train from the first step that is left to the end; return the last evaluation's AP."""
    config, progress, steps = task.config, run.progress, task.sampler.steps
    ap = record(task, run) if progress.step else {}  # saved, but perhaps not recorded
    task.sampler.first_step = progress.step
    task.parallel.train()
    for _, (images, targets) in run.steps(task.loader, steps):
        set_lr(task, progress.step * config.setting.total)
        sn.begin_step(task.model, progress.step / steps)
        losses = train_step(task, run, images, targets)
        progress.add(**losses, steps=bool(losses))
        evaluates = task.evaluates_after(progress.step + 1)
        lr = task.optimizer.param_groups[0]["lr"]
        run.step_done(config.setting.total, evaluates, lr=lr, **losses)
        ap = record(task, run)
    return ap


def set_lr(task: Task, images_seen: int) -> None:
    """The schedule's lr after `images_seen` images."""
    schedule = task.config.schedule
    factor = lr_factor_by_images(
        images_seen,
        task.sampler.steps * task.config.setting.total,
        schedule.milestones,
        schedule.gamma,
        schedule.warmup_images,
        schedule.warmup_factor,
    )
    for group in task.optimizer.param_groups:
        group["lr"] = task.lr * factor * group["lr_factor"]


def train_step(
    task: Task, run: Session, images: list[Tensor], targets: list[dict]
) -> dict[str, float]:
    """One update; return the losses by name and their sum "loss", means over all GPUs.

    Losses are normalised within each GPU's images, as in plain data-parallel training. A skipped
    update has no losses.
    """
    config, model, micro_batches = task.config, task.model, task.micro_batches
    per_gpu, step = config.setting.images_per_gpu, run.progress.step
    images = [run.to_device(image) for image in images]
    targets = [{key: run.to_device(value) for key, value in t.items()} for t in targets]

    def forward(network: nn.Module, index: int) -> dict[str, Tensor]:
        gpu = run.processes.rank * micro_batches + index
        run.draw_from(config.seed, 1, step, gpu)  # anchors and RoIs are sampled
        part = slice(index * per_gpu, (index + 1) * per_gpu)
        with run.autocast():
            return network(images[part], targets[part])

    task.optimizer.zero_grad(set_to_none=True)
    run.guard.begin(model)
    totals: Any = 0
    with distributed.one_running_update(model, micro_batches) as begin_micro_batch:
        for index in range(micro_batches):
            begin_micro_batch(index)
            wait = task.parallel is model or index == micro_batches - 1
            with contextlib.nullcontext() if wait else task.parallel.no_sync():
                losses = forward(task.parallel, index)
                loss = sum(losses.values())
                run.scaler.scale(loss / micro_batches).backward()
            totals = totals + torch.stack([loss, *losses.values()]).detach().double()
    totals = run.together(totals / config.setting.gpus)
    if not run.allows(totals[:1], model, lambda: forward(model, 0)):
        return {}
    if config.optimizer.clip is not None:
        run.scaler.unscale_(task.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
    run.scaled_step(task.optimizer)
    return dict(zip(["loss", *losses], totals.tolist()))


def record(task: Task, run: Session) -> dict[str, float | None]:
    """Where they are due: importance weights, and AP with the means since the last one."""
    progress, step, steps = run.progress, run.progress.step, task.sampler.steps
    evaluates = task.evaluates_after(step)
    if evaluates or step % max(1, steps // 10) == 0:
        run.record_importance(step, figure=True)
    if not evaluates:
        return {}
    sums = dict(progress.sums)
    count = sums.pop("steps")
    if not count:
        raise FloatingPointError(f"every step up to {step} of {steps} was skipped")
    progress.sums = {}
    losses = {name: total / count for name, total in sums.items()}
    metrics = {f"train/{name}": loss for name, loss in losses.items()}
    metrics |= {"lr": task.optimizer.param_groups[0]["lr"], "images_seen": progress.images_seen}
    ap = evaluate(task, run)
    run.recorder.metrics(step, metrics | {f"val/{key}": value for key, value in ap.items()})
    run.say(f"step {step}/{steps}  {describe_ap(ap)}")
    return ap


def evaluate(task: Task, run: Session) -> dict[str, float | None]:
    """COCO's metrics on the validation images, each once over all processes; pictures of some."""
    config, val = task.config, task.data.val
    where = (run.processes.rank, run.processes.world_size)
    batches = evaluation_batches(len(val), config.evaluation.batch_size, *where)
    with run.autocast():
        results = detect(task.model, val, run.evaluating(batches), run.to_device)
    ap, results = evaluate_detections(val, results, config.masks)
    if run.is_main:
        write_predictions(Path(config.output_dir), results)
        sheet = draw_validation(config, task.model, val, run.precision)
        if sheet is not None:
            run.recorder.picture("predictions", sheet, run.progress.step)
    run.scored(ap["box_ap"])
    return ap


if __name__ == "__main__":
    entry.start(main, "detection")

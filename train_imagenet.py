"""Train an image classifier at a (GPUs, images per GPU) setting and evaluate it both ways.

    python train_imagenet.py norm=sn setting=8x32                      # bundled digits
    torchrun --nproc_per_node=8 train_imagenet.py experiment=imagenet/table_4_1 \\
        norm=sn setting=8x32 data.root=/data/imagenet

Section 4.1; Table 4.1 expects 76.9 for SN, 76.4 for BN, 75.9 for GN at (8,32). The same command
resumes a run that was interrupted. See configs/imagenet.yaml for every option.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; entry.start collects again

import contextlib
from functools import partial

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

import sn
from sn.training.classification import bilevel
from sn.training.classification.config import ImagenetConfig
from sn.training.classification.data import (
    BadImages,
    SettingSampler,
    TransformedImages,
    build_data,
    evaluation_batches,
    is_image_folder,
    make_loader,
)
from sn.training.classification.evaluation import (
    evaluate,
    evaluate_both_ways,
    line_of,
    training_metrics,
)
from sn.training.classification.pretrained import network_facts
from sn.training.classification.task import Task, starting_model, starting_weights
from sn.training.run import budget, distributed, entry
from sn.training.run.guard import check_finite
from sn.training.run.schedule import lr_factor, mix_seed
from sn.training.run.session import Session


@hydra.main(version_base="1.3", config_path="configs", config_name="imagenet")
def main(cfg: DictConfig) -> None:
    entry.run(train, cfg)


def train(config: ImagenetConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    with Session(config) as run:
        if run.summary is not None:
            return run.has_ended("top-1", "top1")
        task = build(config, run)
        need = run.warn_of(lambda: task.needs(run))
        run.begin(
            parts={"model": task.model, "optimizer": task.optimizer, "scaler": run.scaler},
            identity=task.identity(),
            saved={"network": network_facts(task.model, task.data.num_classes)},
            facts=task.facts(run),
            headline=("top1", "top5", "top1_batch_average"),
            epochs=config.schedule.epochs,
            steps=task.sampler.steps,
            importance=task.model,
            score="top1",
        )
        task.announce(run)
        if config.plan:
            passes = config.schedule.epochs
            training = (lambda: train_one_epoch(task, run, 0), passes)
            evaluations = (lambda: validate(task, run), passes + 1)
            loops = {"training": training, "validation": evaluations}
            return budget.plan(run, task.model, need, loops)
        validation = None
        for epoch in run.epochs():
            metrics = train_one_epoch(task, run, epoch)
            validation = validate(task, run)
            loss = torch.tensor(validation["loss"])
            where = f"the end of epoch {epoch + 1}"
            check_finite(loss, task.model, where, lambda: validate(task, run))
            metrics |= {"val/loss": validation["loss"], "val/top1": validation["top1"]}
            run.end_epoch(metrics, score=validation["top1"])
            run.say_epoch(line_of(metrics))
        summary = run.finish(evaluate_both_ways(task, run, lambda: validate(task, run), validation))
        run.say(
            f"top-1 {summary['top1']:.2f} (moving average), "
            f"{summary['top1_batch_average']:.2f} (batch average); records in {config.output_dir}"
        )
        return summary


def build(config: ImagenetConfig, run: Session) -> Task:
    """Norm, model, data and optimizer of the config, on this process's device."""
    setting, processes = config.setting, run.processes
    weights = starting_weights(config, run.say)  # before the images are listed, which takes longer
    note, limit = f"{config.output_dir}/bad_images.txt", config.data.max_bad_images or 0
    bad_images = BadImages(note, limit, root=config.data.root)
    options = config.data.options()
    if is_image_folder(config.data.name):
        options |= {"last_fraction": config.schedule.last_fraction, "bad": bad_images}
    data = build_data(**options)
    model, init, start = starting_model(config, data.num_classes, weights)
    emulation, micro_batches = distributed.prepare_setting(
        model.to(run.device),
        setting.gpus,
        setting.images_per_gpu,
        setting.emulation,
        processes.world_size,
    )
    run.precision.model(model)
    if config.compile and micro_batches > 1:
        raise ValueError(
            "compile=true would compile anew for every micro-batch of emulation accumulated; use "
            "setting.emulation=grouped (which this norm may not know), or leave compile out"
        )
    if config.compile:
        model.compile()
    # every batch has one size; what is tried may be chosen differently by another run
    torch.backends.cudnn.benchmark = not config.deterministic
    parallel = distributed.parallelise(model, processes)

    lr, sgd = setting.lr(config.schedule.lr_per_256, 256), config.optimizer
    rules = (sgd.weight_decay, sgd.gate_lr_factor, sgd.gate_weight_decay)
    # Fused: one call for all parameters, which can skip itself. Its first step must not be skipped,
    # which leaves the momentum uninitialised, as the scaled gradients of fp16 often ask for.
    fused = config.precision != "fp16"
    groups = sn.parameter_groups(model, lr, *rules)
    optimizer = torch.optim.SGD(groups, lr, sgd.momentum, fused=fused)

    def training_loader(images, seed: int) -> tuple[DataLoader, SettingSampler]:
        where = (processes.rank, processes.world_size)
        sampler = SettingSampler(len(images), setting.gpus, setting.images_per_gpu, seed, *where)
        epochs, workers = config.schedule.epochs, config.data.workers
        transformed = TransformedImages(images, data.augmentation, epochs, seed)
        return make_loader(transformed, sampler, workers, run.device, epochs), sampler

    train, held_out = data.train, None
    if config.gates != "joint":
        if micro_batches > 1 or not sn.gates(model):
            raise ValueError(
                f"gates={config.gates} needs a norm with control parameters and "
                f"setting.emulation=grouped, not {config.norm['name']} and {emulation}"
            )
        train, rest = bilevel.split_images(data.train, config.seed)
        held_out = training_loader(rest, mix_seed(config.seed, 1))
    loader, sampler = training_loader(train, config.seed)
    return Task(
        config=config,
        data=data,
        model=model,
        parallel=parallel,
        optimizer=optimizer,
        loader=loader,
        sampler=sampler,
        held_out=held_out,
        emulation=emulation,
        micro_batches=micro_batches,
        bad_images=bad_images,
        init=init,
        start=start,
    )


def train_one_epoch(task: Task, run: Session, epoch: int) -> dict:
    """Train to the end of the epoch, from its first step that is left; return its metrics."""
    config, progress, steps = task.config, run.progress, task.sampler.steps
    loader, sampler = task.held_out or ((), task.sampler)
    for each in (task.sampler, sampler):
        each.epoch, each.first_step = epoch, progress.step
    held_out = iter(loader)
    task.parallel.train()
    for _, (images, labels) in run.steps(task.loader, steps):
        done = (epoch * steps + progress.step) / (config.schedule.epochs * steps)
        set_lr(task, done)
        sn.begin_step(task.model, done)
        run.draw_from(config.seed, run.processes.rank, epoch, progress.step)  # dropout
        images, labels = run.to_device(images), run.to_device(labels)
        if task.held_out is not None:
            other = tuple(map(run.to_device, next(held_out)))
            control_step(task, run, (images, labels), other)
        loss, correct, count = train_step(task, run, images, labels)
        progress.add(loss=loss, correct=correct, images=count)
        lr = task.optimizer.param_groups[0]["lr"]
        run.step_done(config.setting.total, lr=lr, loss=run.latest[0] if run.latest else None)
    run.settle()
    return training_metrics(run, steps, task.optimizer.param_groups[0]["lr"])


def set_lr(task: Task, done: float) -> None:
    """The schedule's lr at the fraction `done` of all steps."""
    schedule = task.config.schedule
    factor = lr_factor(done, schedule.decay, schedule.milestones, schedule.gamma, schedule.warmup)
    for group in task.optimizer.param_groups:
        group["lr"] = task.lr * factor * group["lr_factor"]


def train_step(task: Task, run: Session, images: Tensor, labels: Tensor) -> Tensor:
    """One update; return (sum of the losses, number correct, images) over all processes.

    On the device; zeros if the update was skipped.
    """
    config, model, optimizer = task.config, task.model, task.optimizer
    micro_batches = task.micro_batches
    optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(2, dtype=torch.float64, device=images.device)
    run.guard.begin(model)
    with distributed.one_running_update(model, micro_batches) as begin_micro_batch:
        for index, (x, target) in enumerate(
            zip(images.chunk(micro_batches), labels.chunk(micro_batches))
        ):
            begin_micro_batch(index)
            last = index == micro_batches - 1
            wait = task.parallel is model or last
            with contextlib.nullcontext() if wait else task.parallel.no_sync():
                with run.autocast():
                    logits = task.parallel(x)
                    loss = F.cross_entropy(logits, target)
                run.scaler.scale(loss / micro_batches).backward()
            totals[0] += loss.detach() / micro_batches
            totals[1] += (logits.argmax(1) == target).sum()
    totals[0] /= run.processes.world_size
    totals = run.together(totals, run.is_late(optimizer))

    def forward_again() -> None:
        with run.autocast():
            for x in images.chunk(micro_batches):
                model(x)

    clip = None
    if task.held_out is not None:
        for gate in sn.gates(model):  # they have had their step
            gate.grad = None
    elif config.optimizer.gate_clip is not None:
        clip = sn.gates(model), config.optimizer.gate_clip
    made = run.update(optimizer, totals[:1], model, forward_again, clip)
    count = totals.new_full((), len(labels) * run.processes.world_size)
    return torch.stack([totals[0] * count, totals[1], count]).masked_fill(~made, 0.0)


def control_step(task: Task, run: Session, batch: tuple, held_out: tuple) -> None:
    """Update the control parameters alone, by the loss on held-out images (gates=bilevel)."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with run.autocast():
            return F.cross_entropy(task.model(images), labels)

    model, clip = task.model, task.config.optimizer.gate_clip
    order = bilevel.ORDERS[task.config.gates]
    run.guard.begin(model)
    allows = partial(run.allows, torch.zeros(1), model)
    bilevel.control_step(model, task.optimizer, loss, batch, held_out, order, clip, allows)


def validate(task: Task, run: Session) -> dict[str, float]:
    """Loss, top-1 and top-5 on the validation images with the statistics the model holds."""
    where = (run.processes.rank, run.processes.world_size)
    batches = evaluation_batches(len(task.data.val), task.config.evaluation.batch_size, *where)
    images = TransformedImages(task.data.val, task.data.evaluation, epochs=1)
    loader = make_loader(images, batches, task.config.data.workers, run.device)
    with run.autocast():
        return evaluate(task.model, run.evaluating(loader), run.to_device)


if __name__ == "__main__":
    entry.start(main, "imagenet")

"""Train one architecture from scratch and evaluate it: another figure than its shared accuracy.

    python -m enas.retrain arch=outputs/enas/digits_1x8_2nodes/sn_ln_gn/seed0/summary.json
    python -m enas.retrain arch=random arch_seed=1 run_name=random1

`retrained_val_top1` is on the images that the search was rewarded on, `retrained_test_top1` on
CIFAR-10's test images, which the search never saw (null without such a set). Batch norm has running
statistics here. The same command resumes a run. See configs/enas_retrain.yaml.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; entry.start collects again

from contextlib import suppress

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from sn.training.classification.data import build_data, load_cifar10_test
from sn.training.classification.evaluation import evaluate, line_of, training_metrics
from sn.training.run import budget, entry
from sn.training.run.guard import check_finite
from sn.training.run.schedule import cosine_restarts, mix_seed
from sn.training.run.session import Session

from .child import Child
from .config import RetrainConfig
from .data import DeviceImages
from .space import Architecture, random_decisions, read_architecture, to_json
from .tasks import RetrainTask

ORDER, AUGMENTATION, DROPOUT = range(3)  # what a random number is for


@hydra.main(version_base="1.3", config_path="../configs", config_name="enas_retrain")
def main(cfg: DictConfig) -> None:
    entry.run(retrain, cfg)


def retrain(config: RetrainConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    with Session(config, one_process="it trains one small network") as run:
        if run.summary is not None:
            now = {}
            with suppress(OSError, ValueError):  # a search's folder may be gone
                now["architecture"] = to_json(choose_architecture(config))
            return run.has_ended("val top-1", "retrained_val_top1", now)
        task = build(config, run)
        architecture = to_json(task.architecture)
        run.begin(
            parts={"model": task.model, "optimizer": task.optimizer},
            identity={"data": task.data.describe(), "architecture": architecture},
            facts=task.facts(),
            headline=("retrained_val_top1",),
            epochs=config.epochs,
            steps=task.steps,
            score="retrained_val_top1",
        )
        task.announce(run)
        if config.plan:
            loops = {"training": (lambda: train_one_epoch(task, run, 0), config.epochs)}
            return budget.plan(run, task.model, None, loops, "its validations")
        validation = None
        for epoch in run.epochs():
            metrics = train_one_epoch(task, run, epoch)
            validation = evaluated(task, run, task.val)
            loss = torch.tensor(validation["loss"])
            where = f"the end of epoch {epoch + 1}"
            check_finite(loss, task.model, where, lambda: evaluated(task, run, task.val))
            metrics |= {"val/loss": validation["loss"], "val/top1": validation["top1"]}
            run.end_epoch(metrics, score=validation["top1"])
            run.say_epoch(line_of(metrics))
        validation = validation or evaluated(task, run, task.val)
        test = None if task.test is None else evaluated(task, run, task.test)["top1"]
        results = {"retrained_val_top1": validation["top1"], "retrained_test_top1": test}
        run.finish(results | {"test_images": task.test and len(task.test)})
        tested = "" if test is None else f", {test:.2f} on {len(task.test):,} test images"
        run.say(
            f"retrained: top-1 {validation['top1']:.2f} on the held-out images{tested}; "
            f"records in {config.output_dir}"
        )
        return run.summary


def build(config: RetrainConfig, run: Session) -> RetrainTask:
    """Architecture, data, network and optimizer, on the run's device."""
    architecture = choose_architecture(config)
    data = build_data(**config.data.options())
    test = None
    if data.name == "cifar10":
        test = load_cifar10_test(config.data.root, config.data.image_size)
    device, dtype = run.device, run.precision.dtype
    train, val, test = (
        part and DeviceImages(data, part, device, dtype) for part in (data.train, data.val, test)
    )
    torch.manual_seed(config.seed)
    model = Child(
        data.num_classes,
        image_size=train.images.shape[-1],
        nodes=len(architecture.normal),
        architecture=architecture,
        **vars(config.child),
    ).to(device, dtype)
    if config.compile:
        model.compile()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.optimizer.max_lr,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        nesterov=config.optimizer.momentum > 0,
    )
    return RetrainTask(
        config=config,
        data=data,
        train=train,
        val=val,
        test=test,
        architecture=architecture,
        model=model,
        optimizer=optimizer,
        steps=max(1, len(train) // config.optimizer.batch_size),
    )


def choose_architecture(config: RetrainConfig) -> Architecture:
    """The one in the file `arch`, or one drawn uniformly from `arch_seed`."""
    if config.arch != "random":
        return read_architecture(config.arch)
    generator = torch.Generator().manual_seed(mix_seed(config.arch_seed))
    decisions = random_decisions(1, config.arch_nodes, generator=generator)
    return Architecture.from_decisions(decisions[0])


def train_one_epoch(task: RetrainTask, run: Session, epoch: int) -> dict:
    """Train to the end of the epoch, from its first step that is left; return its metrics."""
    config, progress, size = task.config, run.progress, task.config.optimizer.batch_size
    order = task.train.order(config.seed, ORDER, epoch)
    schedule = cosine_restarts(epoch, config.optimizer.first_period, config.optimizer.period_factor)
    lr = config.optimizer.min_lr + schedule * (config.optimizer.max_lr - config.optimizer.min_lr)
    for group in task.optimizer.param_groups:
        group["lr"] = lr
    task.model.train()
    for _, step in run.steps(range(progress.step, task.steps), task.steps):
        indices = order[step * size : (step + 1) * size]
        images, labels = task.train.batch(indices, (config.seed, AUGMENTATION, epoch, step))
        run.draw_from(config.seed, DROPOUT, epoch, step)
        done = (epoch + step / task.steps) / config.epochs
        loss, correct, count = train_step(task, run, images, labels, done)
        progress.add(loss=loss * count, correct=correct, images=count)
        run.step_done(len(labels), lr=lr, loss=loss if count else None)
    return training_metrics(run, task.steps, lr)


def train_step(
    task: RetrainTask, run: Session, images: Tensor, labels: Tensor, done: float
) -> tuple[float, float, int]:
    """One update; return (loss, number correct, images), 0 if skipped."""
    model, images = task.model, run.to_device(images)

    def forward():
        with run.autocast():
            return model(images, progress=done)

    run.guard.begin(model)
    task.optimizer.zero_grad(set_to_none=True)
    outputs = forward()
    with run.autocast():
        loss = model.loss(outputs, labels)
    loss.backward()
    if not run.allows(loss, model, forward):
        return 0.0, 0.0, 0
    if task.config.optimizer.grad_clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), task.config.optimizer.grad_clip)
    task.optimizer.step()
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss.item(), (logits.argmax(1) == labels).sum().item(), len(labels)


def evaluated(task: RetrainTask, run: Session, images: DeviceImages) -> dict[str, float]:
    """Loss and top-1 with running statistics."""
    batches = run.evaluating(images.batches(task.config.evaluation.batch_size))
    with run.autocast():
        return evaluate(task.model, batches, run.to_device)


if __name__ == "__main__":
    entry.start(main, "enas_retrain")

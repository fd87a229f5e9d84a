"""DARTS: train a supernet of NAS-Bench-201's cell, and read the derived cell's true accuracy.

    python -m enas.darts operations=bilevel                     # bundled digits
    python -m enas.darts experiment=darts/cifar10_16px operations=joint table=... data.root=data

Section 3.4 holds that operations trained jointly with the weights overfit, as DARTS's would, and
that SN's control parameters do not. Both are trained here in the same three ways, `operations=` and
`gates=`: joint, by the loss that trains the weights; bilevel and bilevel_first (DARTS of second and
first order), by the loss on the other half of the images. The cell of the largest operation weights
is not trained: its accuracy stands in NAS-Bench-201's table. The same command resumes a run. See
configs/darts.yaml.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; entry.start collects again

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import sn
from sn.training.classification.bilevel import ORDERS, gate_gradients, split_images
from sn.training.classification.data import build_data
from sn.training.classification.evaluation import evaluate, line_of, training_metrics
from sn.training.run import budget, entry
from sn.training.run.guard import check_finite
from sn.training.run.schedule import lr_factor
from sn.training.run.session import Session

from .benchmark import read_table
from .config import DartsConfig
from .darts_network import Supernet, operation_metrics
from .data import DeviceImages
from .tasks import DartsTask

ORDER, AUGMENTATION, OTHER_ORDER, OTHER_AUGMENTATION = range(4)  # what a random number is for


@hydra.main(version_base="1.3", config_path="../configs", config_name="darts")
def main(cfg: DictConfig) -> None:
    entry.run(search, cfg)


def search(config: DartsConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    with Session(config, one_process="it trains one small network") as run:
        if run.summary is not None:
            return run.has_ended("accuracy of the derived cell", "cell_accuracy")
        task = build(config, run)
        run.begin(
            parts=task.parts(),
            identity={"data": task.data.describe()},
            facts=task.facts(),
            headline=("top1", "cell", "cell_accuracy"),
            epochs=config.epochs,
            steps=task.steps,
            importance=task.model,
            score="top1",
        )
        task.announce(run)
        if config.plan:
            loops = {"training": (lambda: train_one_epoch(task, run, 0), config.epochs)}
            return budget.plan(run, task.model, None, loops, "its validations")
        validation = None
        for epoch in run.epochs():
            metrics = train_one_epoch(task, run, epoch)
            validation = validate(task, run)
            loss, where = torch.tensor(validation["loss"]), f"the end of epoch {epoch + 1}"
            check_finite(loss, task.model, where, lambda: validate(task, run))
            metrics |= {
                "val/loss": validation["loss"],
                "val/top1": validation["top1"],
                "gap/loss": validation["loss"] - metrics["train/loss"],
                "gap/top1": metrics["train/top1"] - validation["top1"],
                **operation_metrics(task.model),
            }
            run.end_epoch(metrics, score=validation["top1"])
            convolutions = metrics["cell/convolutions"]
            run.say_epoch(f"{line_of(metrics)}  convolutions {convolutions} of 6")
        validation = validation or validate(task, run)
        results = {"top1": validation["top1"], "val_loss": validation["loss"]}
        summary = run.finish(results | task.derived())
        accuracy = summary["cell_accuracy"]
        shown = "unknown without table=" if accuracy is None else f"{accuracy:.2f}"
        run.say(
            f"supernet: top-1 {summary['top1']:.2f}; derived {summary['cell']}, test accuracy "
            f"{shown}; records in {config.output_dir}"
        )
        return summary


def build(config: DartsConfig, run: Session) -> DartsTask:
    """Data, supernet, optimizers and table, on the run's device."""
    table = None if config.table is None else read_table(config.table, config.dataset)
    data = build_data(**config.data.options())
    ways = {config.operations, config.gates}
    train, other = data.train, None
    if ways != {"joint"}:
        train, other = split_images(data.train, config.seed)
    device, dtype = run.device, run.precision.dtype
    train, other, val = (
        part if part is None else DeviceImages(data, part, device, dtype)
        for part in (train, other, data.val)
    )
    torch.manual_seed(config.seed)
    norm = sn.make_norm(**config.norm, affine=False)  # refuses norms that are never without gain
    model = run.precision.model(Supernet(data.num_classes, norm=norm, **vars(config.network)))
    gates = sn.gates(model)
    if config.gates != "joint" and not gates:
        raise ValueError(
            f"gates={config.gates} needs a norm with control parameters, not {config.norm['name']}"
        )
    bilevel: dict[int, list[nn.Parameter]] = {}
    for way, parameters in ((config.operations, [model.operations]), (config.gates, gates)):
        if way != "joint":
            bilevel.setdefault(ORDERS[way], []).extend(parameters)
    options = config.optimizer
    groups = sn.parameter_groups(
        model, options.max_lr, options.weight_decay, options.gate_lr_factor
    )
    for group in groups:
        group["params"] = [p for p in group["params"] if p is not model.operations]
    adam = config.operations_optimizer
    return DartsTask(
        config=config,
        data=data,
        train=train,
        other=other,
        val=val,
        model=model,
        optimizer=torch.optim.SGD(groups, options.max_lr, options.momentum),
        operations_optimizer=torch.optim.Adam(
            [model.operations], adam.lr, (adam.beta1, adam.beta2), weight_decay=adam.weight_decay
        ),
        bilevel=bilevel,
        table=table,
        steps=max(1, len(train) // options.batch_size),
    )


def train_one_epoch(task: DartsTask, run: Session, epoch: int) -> dict:
    """Train to the end of the epoch, from its first step that is left; return its metrics."""
    config, progress, size = task.config, run.progress, task.config.optimizer.batch_size
    orders = [task.train.order(config.seed, ORDER, epoch)]
    if task.other is not None:
        orders.append(task.other.order(config.seed, OTHER_ORDER, epoch))
    lr = set_lr(task, epoch / config.epochs)
    task.model.train()
    for _, step in run.steps(range(progress.step, task.steps), task.steps):
        sn.begin_step(task.model, (epoch + step / task.steps) / config.epochs)
        places = [order[step * size : (step + 1) * size] for order in orders]
        batch = task.train.batch(places[0], (config.seed, AUGMENTATION, epoch, step))
        if task.other is not None:
            augment = (config.seed, OTHER_AUGMENTATION, epoch, step)
            control_step(task, run, batch, task.other.batch(places[1], augment))
        loss, correct, count = train_step(task, run, *batch)
        progress.add(loss=loss * count, correct=correct, images=count)
        run.step_done(len(places[0]), lr=lr, loss=loss if count else None)
    return training_metrics(run, task.steps, lr)


def set_lr(task: DartsTask, done: float) -> float:
    """The cosine's lr at the fraction `done` of all epochs; the operations' stays as it is."""
    options = task.config.optimizer
    lr = options.min_lr + lr_factor(done, "cosine") * (options.max_lr - options.min_lr)
    for group in task.optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def control_step(task: DartsTask, run: Session, batch: tuple, other: tuple) -> None:
    """Update what is trained bilevel, by the loss on the other half's batch.

    Every gradient is taken before anything moves. In a gradient of second order the weights look
    one step of SGD ahead; operations that are trained jointly stay where they are in it.
    """
    model, weights = task.model, task.weights()
    run.guard.begin(model)
    gradients = [
        gate_gradients(
            lambda: loss_of(task, run, *batch)[0],
            lambda: loss_of(task, run, *other)[0],
            parameters,
            weights,
            task.optimizer,
            model,
            order,
        )
        for order, parameters in task.bilevel.items()
    ]
    model.zero_grad(set_to_none=True)  # both optimizers leave parameters without gradient alone
    for parameters, found in zip(task.bilevel.values(), gradients):
        for parameter, gradient in zip(parameters, found):
            parameter.grad = gradient
    if run.allows(torch.zeros(1), model):
        task.optimizer.step()
        task.operations_optimizer.step()


def train_step(task: DartsTask, run: Session, images: Tensor, labels: Tensor) -> tuple:
    """One update of all that is joint; return (loss, number correct, images), 0 if skipped."""
    model = task.model
    run.guard.begin(model)
    model.zero_grad(set_to_none=True)
    loss, logits = loss_of(task, run, images, labels)
    loss.backward()
    if not run.allows(loss, model, lambda: loss_of(task, run, images, labels)):
        return 0.0, 0.0, 0
    for parameters in task.bilevel.values():
        for parameter in parameters:  # they have had their step
            parameter.grad = None
    if task.config.optimizer.grad_clip is not None:
        nn.utils.clip_grad_norm_(task.weights(), task.config.optimizer.grad_clip)
    task.optimizer.step()
    task.operations_optimizer.step()
    return loss.item(), (logits.argmax(1) == labels).sum().item(), len(labels)


def loss_of(task: DartsTask, run: Session, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and logits of the supernet on a batch."""
    with run.autocast():
        logits = task.model(run.to_device(images))
        return F.cross_entropy(logits, labels), logits


def validate(task: DartsTask, run: Session) -> dict[str, float]:
    """Loss and top-1 of the supernet on the held-out images, with running statistics."""
    batches = run.evaluating(task.val.batches(task.config.evaluation.batch_size))
    with run.autocast():
        return evaluate(task.model, batches, run.to_device)


if __name__ == "__main__":
    entry.start(main, "darts")

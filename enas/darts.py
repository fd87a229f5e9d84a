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

import time
from dataclasses import dataclass

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import sn
from sn.training.classification.bilevel import ORDERS, gate_gradients, split_images
from sn.training.classification.data import ImageData, build_data
from sn.training.classification.evaluation import evaluate
from sn.training.run import budget, entry
from sn.training.run.guard import check_finite
from sn.training.run.schedule import lr_factor
from sn.training.run.session import Session

from .benchmark import EDGES, OPERATIONS, Table, read_table, write_cell
from .config import DartsConfig
from .darts_network import Supernet, derive
from .data import DeviceImages

ORDER, AUGMENTATION, OTHER_ORDER, OTHER_AUGMENTATION = range(4)  # what a random number is for
CONVOLUTIONS = ("nor_conv_1x1", "nor_conv_3x3")


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
            facts=facts(task),
            headline=("top1", "cell", "cell_accuracy"),
            epochs=config.epochs,
            steps=task.steps,
            importance=task.model,
            score="top1",
        )
        announce(task, run)
        if config.plan:  # without the validations
            loops = {"training": (lambda: train_one_epoch(task, run, 0), config.epochs)}
            return budget.plan(run, task.model, None, loops)
        validation = None
        for epoch in run.epochs():
            metrics = train_one_epoch(task, run, epoch)
            validation = validate(task, run)
            loss = torch.tensor(validation["loss"])
            check_finite(loss, task.model, f"the end of epoch {epoch + 1}")
            metrics |= {
                "val/loss": validation["loss"],
                "val/top1": validation["top1"],
                "gap/loss": validation["loss"] - metrics["train/loss"],
                "gap/top1": metrics["train/top1"] - validation["top1"],
                **operation_metrics(task.model),
            }
            run.end_epoch(metrics, score=validation["top1"])
            print_epoch(run, metrics)
        validation = validation or validate(task, run)
        results = {"top1": validation["top1"], "val_loss": validation["loss"]}
        summary = run.finish(results | derived(task))
        accuracy = summary["cell_accuracy"]
        shown = "unknown without table=" if accuracy is None else f"{accuracy:.2f}"
        run.say(
            f"supernet: top-1 {summary['top1']:.2f}; derived {summary['cell']}, test accuracy "
            f"{shown}; records in {config.output_dir}"
        )
        return summary


@dataclass
class Task:
    """What is trained, on what: built once from the config."""

    config: DartsConfig
    data: ImageData
    train: DeviceImages  # what the weights learn from
    other: DeviceImages | None  # the other half, if something is trained bilevel
    val: DeviceImages  # held out from all training
    model: Supernet
    optimizer: torch.optim.SGD
    operations_optimizer: torch.optim.Adam  # of the operations' control parameters alone
    bilevel: dict[int, list[nn.Parameter]]  # control parameters trained on the other half, by order
    table: Table | None
    steps: int

    def parts(self) -> dict:
        """What a checkpoint holds."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        return parts | {"operations_optimizer": self.operations_optimizer}

    def weights(self) -> list[nn.Parameter]:
        """What SGD trains by the loss on the images of the weights."""
        elsewhere = {id(p) for parameters in self.bilevel.values() for p in parameters}
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if id(p) not in elsewhere]


def build(config: DartsConfig, run: Session) -> Task:
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
    return Task(
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


def train_one_epoch(task: Task, run: Session, epoch: int) -> dict:
    """Train to the end of the epoch, from its first step that is left; return its metrics."""
    config, progress, size = task.config, run.progress, task.config.optimizer.batch_size
    orders = [task.train.order(config.seed, ORDER, epoch)]
    if task.other is not None:
        orders.append(task.other.order(config.seed, OTHER_ORDER, epoch))
    lr = set_lr(task, epoch / config.epochs)
    task.model.train()
    began, first_image = time.perf_counter(), progress.images_seen
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
    if not progress.sums["images"]:
        raise FloatingPointError(f"every step of epoch {epoch + 1} was skipped")
    return {
        "step": (epoch + 1) * task.steps,
        "images_seen": progress.images_seen,
        "lr": lr,
        "train/loss": progress.sums["loss"] / progress.sums["images"],
        "train/top1": 100 * progress.sums["correct"] / progress.sums["images"],
        "images_per_s": (progress.images_seen - first_image) / (time.perf_counter() - began),
    }


def set_lr(task: Task, done: float) -> float:
    """The cosine's lr at the fraction `done` of all epochs; the operations' stays as it is."""
    options = task.config.optimizer
    lr = options.min_lr + lr_factor(done, "cosine") * (options.max_lr - options.min_lr)
    for group in task.optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def control_step(task: Task, run: Session, batch: tuple, other: tuple) -> None:
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


def train_step(task: Task, run: Session, images: Tensor, labels: Tensor) -> tuple:
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


def loss_of(task: Task, run: Session, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and logits of the supernet on a batch."""
    with run.autocast():
        logits = task.model(run.to_device(images))
        return F.cross_entropy(logits, labels), logits


def validate(task: Task, run: Session) -> dict[str, float]:
    """Loss and top-1 of the supernet on the held-out images, with running statistics."""
    batches = run.evaluating(task.val.batches(task.config.evaluation.batch_size))
    with run.autocast():
        return evaluate(task.model, batches, run.to_device)


def operation_metrics(model: Supernet) -> dict[str, float]:
    """The operation weights, of every edge and averaged over edges, and what a cell would hold."""
    weights = model.operation_weights().detach().double()
    rows = dict(zip((f"{start}-{end}" for start, end in EDGES), weights)) | {
        "mean": weights.mean(0)
    }
    cell = derive(weights)
    return {
        **{
            f"operations/{name}/{operation}": weight.item()
            for name, row in rows.items()
            for operation, weight in zip(OPERATIONS, row)
        },
        "cell/convolutions": sum(operation in CONVOLUTIONS for operation in cell),
        "cell/skip_connections": cell.count("skip_connect"),
    }


def derived(task: Task) -> dict:
    """The derived cell, what it is made of, and its accuracies in the table (None without one).

    Raises ValueError if the table lacks one of its operations.
    """
    cell = derive(task.model.operation_weights())
    test = val = None
    if task.table is not None:
        missing = [name for name in cell if name not in task.table.operations]
        if missing:
            raise ValueError(
                f"{task.config.table} has no cells with {missing[0]}, only "
                f"{', '.join(task.table.operations)}; the derived cell is {write_cell(list(cell))}"
            )
        places = [task.table.operations.index(name) for name in cell]
        number = sum(place * factor for place, factor in zip(places, task.table.factors))
        test, val = float(task.table.test[number]), float(task.table.val[number])
    return {
        "cell": write_cell(list(cell)),
        "cell_accuracy": test,
        "cell_val_accuracy": val,
        "convolutions": sum(operation in CONVOLUTIONS for operation in cell),
        "skip_connections": cell.count("skip_connect"),
        "operation_weights": task.model.operation_weights().tolist(),
    }


def facts(task: Task) -> dict:
    """The run's part of summary.json: what was trained, on what."""
    config, data, network = task.config, task.data.describe(), task.config.network
    layers = sn.importance_weights(task.model).values()
    model = f"{network.cells}x{network.channels}"
    full = data["name"] == "cifar10" and config.data.train_images is None
    full = full and config.data.image_size == 32 and config.epochs >= 50
    return {
        "task": "darts",
        "run": f"darts/{data['name']}_{model}/{config.run_name}/seed{config.seed}",
        "operations": config.operations,
        "gates": config.gates,
        "norm": config.norm["name"],
        "statistics": list(next(iter(layers))["mean"]) if layers else None,
        "data": data,
        "model": model,
        "table": None if task.table is None else task.table.describe(config.dataset),
        "scale": "full" if full and (network.cells, network.channels) == (5, 16) else "proxy",
    }


def announce(task: Task, run: Session) -> None:
    config, data = task.config, task.data.describe()
    parameters = sum(p.numel() for p in task.model.parameters())
    other = "" if task.other is None else f", {len(task.other):,} others for what is bilevel"
    run.say(
        f"{config.run_name}: supernet of {config.network.cells} cells per stage, {parameters:,} "
        f"parameters; {data['name']}, {len(task.train):,} images for the weights{other}, "
        f"{len(task.val):,} held out\n{config.epochs} epochs of {task.steps} steps"
    )
    if task.table is None:
        run.say("note: without table= the derived cell's accuracy stays unknown")
    if run.resumed:
        run.say(f"resuming after {run.progress.epoch} epochs and {run.progress.step} steps")


def print_epoch(run: Session, metrics: dict) -> None:
    run.say(
        f"epoch {run.progress.epoch}/{run.config.epochs}  loss {metrics['train/loss']:.4f}  "
        f"top-1 {metrics['train/top1']:.2f}  val loss {metrics['val/loss']:.4f}  "
        f"val top-1 {metrics['val/top1']:.2f}  {metrics['cell/convolutions']} convolutions  "
        f"{run.time_left()} left"
    )


if __name__ == "__main__":
    entry.start(main, "darts")

"""Search for an architecture with shared weights and a controller, or uniformly (random search).

    python -m enas.search                                        # bundled digits
    python -m enas.search experiment=enas/paper controller.norm=sn_ln_gn data.root=data
    python -m enas.search sampler=random                         # same budget, no controller

Section 4.4; Fig 5(b) ends at 73 % for SN, 70 % for LN, 69 % for GN. What is measured is the
accuracy of sampled architectures with *shared* weights (`shared_top1`); enas.retrain trains the
architecture that comes out. The same command resumes a run. See configs/enas.yaml.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import sn
from sn.training.classification.data import ImageData, build_data
from sn.training.run import budget, entry
from sn.training.run.config import number, whole
from sn.training.run.guard import check_finite, gradient_norm
from sn.training.run.schedule import cosine_restarts
from sn.training.run.session import Progress, Session

from .child import Child
from .config import ControllerKeys, SearchConfig
from .controller import Baseline, Controller, Samples, draw_uniformly, reinforce_loss
from .data import DeviceImages
from .space import Architecture, to_json

# what a random number is for; with seed, epoch and step it makes the seed of the draw
(ARCHITECTURES, ORDER, AUGMENTATION, DROPOUT, UPDATE, REWARD_ORDER, VALIDATION, CANDIDATES) = range(
    8
)
CIFAR10_SIZE = (45_000, 5_000)


@hydra.main(version_base="1.3", config_path="../configs", config_name="enas")
def main(cfg: DictConfig) -> None:
    entry.run(search, cfg)


def search(config: SearchConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    with Session(config, one_process="an update is made on one architecture") as run:
        if run.summary is not None:
            return run.has_ended("best shared_top1", "best_shared_top1")
        task = build(config, run)
        run.begin(
            parts=task.parts(),
            identity={"data": task.data.describe()},
            facts=functools.partial(facts, task, run),
            headline=("shared_top1", "best_shared_top1"),
            epochs=config.epochs,
            steps=task.steps + config.controller.updates,
            progress=SearchProgress,
            importance=task.controller,
            blocks=task.controller and task.controller.places_of_norms(),
        )
        announce(task, run)
        if config.plan:  # without the validations
            child = (lambda: train_child(task, run, 0), config.epochs)
            controller = (lambda: train_controller(task, run, 0), config.epochs)
            loops = {"child's training": child, "controller's training": controller}
            return budget.plan(run, task.child, None, loops)
        for epoch in run.epochs():
            began, seen = time.perf_counter(), run.progress.images_seen
            train_child(task, run, epoch)
            train_controller(task, run, epoch)
            speed = (run.progress.images_seen - seen) / (time.perf_counter() - began)
            metrics = epoch_metrics(task, run) | validate(task, run, epoch)
            metrics["images_per_s"] = speed
            run.progress.last = {
                "shared_top1": metrics["val/shared_top1"],
                "shared_loss": metrics["val/shared_loss"],
                "entropy": metrics["controller/entropy"],
                "reward": metrics["controller/reward"],
            }
            run.end_epoch(metrics, score=metrics["val/shared_top1"])
            print_epoch(run, metrics)
        summary = run.finish(run.progress.last | choose(task, run))
        run.say(
            f"shared_top1 {summary['shared_top1']:.2f} (drawn architectures, shared weights), best "
            f"of {config.evaluation.candidates}: {summary['best_shared_top1']:.2f}; records in "
            f"{config.output_dir}"
        )
        return summary


@dataclass
class SearchProgress(Progress):
    """`step` counts the child's steps."""

    update: int = whole(default=0)  # controller updates done of the next epoch
    last: dict[str, float] = field(default_factory=dict)  # results of the last epoch done
    baseline: float = number(None, default=0.0)
    images_scored: int = whole(0, 2**62, default=0)  # for rewards, in all

    @property
    def done(self) -> int:
        return self.step + self.update

    def begin_epoch(self) -> None:
        super().begin_epoch()
        self.update = 0


@dataclass
class Task:
    """What is searched, on what: built once from the config."""

    config: SearchConfig
    data: ImageData
    train: DeviceImages
    held_out: DeviceImages
    child: Child
    child_optimizer: torch.optim.Optimizer
    sampler: Callable[[int], Samples]  # draws architectures
    controller: Controller | None  # the sampler, if it learns
    controller_optimizer: torch.optim.Optimizer | None
    steps: int  # child steps per epoch

    def parts(self) -> dict:
        """What a checkpoint holds."""
        parts = {"child": self.child, "child_optimizer": self.child_optimizer}
        if self.controller is not None:
            parts["controller"] = self.controller
            parts["controller_optimizer"] = self.controller_optimizer
        return parts


def build(config: SearchConfig, run: Session) -> Task:
    """Data, child, controller and their optimizers, on the run's device."""
    data = build_data(**config.data.options())
    device, dtype = run.device, run.precision.dtype
    train, held_out = (DeviceImages(data, part, device, dtype) for part in (data.train, data.val))
    torch.manual_seed(config.seed)
    size = train.images.shape[-1]
    child = Child(data.num_classes, image_size=size, **vars(config.child)).to(device, dtype)
    for parameter in child.parameters():  # weights that an architecture leaves out step as well
        parameter.grad = torch.zeros_like(parameter)
    optimizer = config.optimizer
    child_optimizer = torch.optim.SGD(
        child.parameters(),
        lr=optimizer.max_lr,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        nesterov=optimizer.momentum > 0,
    )
    controller = controller_optimizer = None
    sampler = functools.partial(draw_uniformly, nodes=config.child.nodes)
    if config.sampler == "controller":
        sampler = controller = build_controller(config).to(device, dtype)
        controller_optimizer = build_adam(controller, config.controller)
    return Task(
        config=config,
        data=data,
        train=train,
        held_out=held_out,
        child=child,
        child_optimizer=child_optimizer,
        sampler=sampler,
        controller=controller,
        controller_optimizer=controller_optimizer,
        steps=max(1, len(train) // optimizer.batch_size),
    )


def build_controller(config: SearchConfig) -> Controller:
    return Controller(nodes=config.child.nodes, **config.controller.network())


def build_adam(controller: nn.Module, options: ControllerKeys) -> torch.optim.Adam:
    """Adam; the control parameters have the lr `gate_lr_factor` times the rest's."""
    groups = sn.parameter_groups(controller, options.lr, 0.0, options.gate_lr_factor)
    return torch.optim.Adam(groups, options.lr, (options.beta1, 0.999), options.eps)


@torch.no_grad()
def draw(task: Task, run: Session, count: int, *purpose: int) -> Tensor:
    """The decisions of `count` architectures of the sampler, from the seed."""
    run.draw_from(task.config.seed, *purpose)
    return task.sampler(count).decisions


def train_child(task: Task, run: Session, epoch: int) -> None:
    """One epoch of the shared weights, a newly drawn architecture for every batch."""
    config, progress, size = task.config, run.progress, task.config.optimizer.batch_size
    order = task.train.order(config.seed, ORDER, epoch)
    decisions = draw(task, run, task.steps, ARCHITECTURES, epoch)
    schedule = cosine_restarts(epoch, config.optimizer.first_period, config.optimizer.period_factor)
    lr = config.optimizer.min_lr + schedule * (config.optimizer.max_lr - config.optimizer.min_lr)
    for group in task.child_optimizer.param_groups:
        group["lr"] = lr
    task.child.train()
    steps = range(progress.step, task.steps)
    for _, step in run.steps(steps, task.steps, what="child step"):
        indices = order[step * size : (step + 1) * size]
        images, labels = task.train.batch(indices, (config.seed, AUGMENTATION, epoch, step))
        run.draw_from(config.seed, DROPOUT, epoch, step)
        architecture = Architecture.from_decisions(decisions[step])
        done = (epoch + step / task.steps) / config.epochs
        loss, correct, count = child_step(task, run, images, labels, architecture, done)
        progress.add(loss=loss * count, correct=correct, images=count)
        run.step_done(len(labels), lr=lr, loss=loss if count else None)
    if not progress.sums["images"]:
        raise FloatingPointError(f"every child step of epoch {epoch + 1} was skipped")


def child_step(
    task: Task,
    run: Session,
    images: Tensor,
    labels: Tensor,
    architecture: Architecture,
    done: float,
) -> tuple[float, float, int]:
    """One update of the shared weights; return (loss, number correct, images), 0 if skipped."""
    child, images = task.child, run.to_device(images)

    def forward():
        with run.autocast():
            return child(images, architecture, done)

    task.child_optimizer.zero_grad(set_to_none=False)
    outputs = forward()
    with run.autocast():
        loss = child.loss(outputs, labels)
    loss.backward()
    if not run.allows(loss, child, forward):
        return 0.0, 0.0, 0
    if task.config.optimizer.grad_clip is not None:
        nn.utils.clip_grad_norm_(child.parameters(), task.config.optimizer.grad_clip)
    task.child_optimizer.step()
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss.item(), (logits.argmax(1) == labels).sum().item(), len(labels)


def train_controller(task: Task, run: Session, epoch: int) -> None:
    """One epoch's updates of the controller; the random sampler scores as many architectures."""
    config, progress, options = task.config, run.progress, task.config.controller
    order = task.held_out.order(config.seed, REWARD_ORDER, epoch)
    task.child.eval()
    baseline = Baseline(options.baseline_decay)
    baseline.value = progress.baseline
    updates = range(progress.update, options.updates)
    for _, update in run.steps(updates, options.updates, "update", "controller update"):
        places = torch.arange(update * options.batch_size, (update + 1) * options.batch_size)
        images, labels = task.held_out.batch(order[places % len(order)])
        run.draw_from(config.seed, UPDATE, epoch, update)
        samples = task.sampler(1)
        accuracy = score(task, run, images, labels, samples.decisions[0])
        entropy, log_prob = samples.entropy.item(), samples.log_prob.item()
        reward = accuracy + options.entropy_weight * entropy
        progress.baseline = baseline.update(reward)
        norm = 0.0
        if task.controller is not None:
            norm = controller_step(task, run, samples, reward, progress.baseline)
        progress.add(accuracy=accuracy, reward=reward, entropy=entropy, log_prob=log_prob)
        progress.add(gradient_norm=norm)
        progress.images_scored += len(labels)
        run.step_done(reward=reward, accuracy=accuracy, entropy=entropy)


def controller_step(
    task: Task, run: Session, samples: Samples, reward: float, baseline: float
) -> float:
    """One REINFORCE update; return the gradient's norm before clipping."""
    controller, grad_clip = task.controller, task.config.controller.grad_clip
    task.controller_optimizer.zero_grad(set_to_none=True)
    loss = reinforce_loss(samples, reward, baseline)
    loss.backward()
    norm = gradient_norm(controller).item()
    if run.allows(loss, controller):
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(controller.parameters(), grad_clip)
        task.controller_optimizer.step()
    return norm


@torch.no_grad()
def score(task: Task, run: Session, images: Tensor, labels: Tensor, decisions: Tensor) -> float:
    """Accuracy, 0 to 1, of one architecture with the shared weights on one batch."""
    with run.autocast():
        logits = task.child(run.to_device(images), Architecture.from_decisions(decisions))
    return (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def validate(task: Task, run: Session, epoch: int) -> dict[str, float]:
    """Shared-weight loss and top-1 on held-out images, an architecture drawn for every batch."""
    options = task.config.evaluation
    total = min(len(task.held_out), options.images or len(task.held_out))
    decisions = draw(task, run, -(-total // options.batch_size), VALIDATION, epoch)
    task.child.eval()
    loss = correct = 0.0
    batches = zip(task.held_out.batches(options.batch_size, total), decisions)
    for (images, labels), chosen in run.evaluating(batches, "validation"):
        with run.autocast():
            logits = task.child(run.to_device(images), Architecture.from_decisions(chosen))
        loss += F.cross_entropy(logits.double(), labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    check_finite(torch.tensor(loss), task.child, f"the end of epoch {epoch + 1}")
    return {"val/shared_loss": loss / total, "val/shared_top1": 100 * correct / total}


def choose(task: Task, run: Session) -> dict:
    """Draw candidates, score each on the held-out images, and return the best one."""
    options = task.config.evaluation
    candidates = draw(task, run, options.candidates, CANDIDATES)
    task.child.eval()
    scores = []
    for decisions in candidates:
        right = total = 0.0
        batches = task.held_out.batches(options.batch_size, options.images)
        for images, labels in run.evaluating(batches, "the choice of the best architecture"):
            right += score(task, run, images, labels, decisions) * len(labels)
            total += len(labels)
        scores.append(100 * right / total)
    best = max(range(len(scores)), key=scores.__getitem__)
    return {
        "best_shared_top1": scores[best],
        "candidates_shared_top1": scores,
        "architecture": to_json(Architecture.from_decisions(candidates[best])),
    }


def epoch_metrics(task: Task, run: Session) -> dict:
    """The epoch's means over its child steps and controller updates."""
    progress, updates = run.progress, task.config.controller.updates
    sums, means = progress.sums, ("accuracy", "reward", "entropy", "log_prob", "gradient_norm")
    return {
        "step": (progress.epoch + 1) * task.steps,
        "images_seen": progress.images_seen,
        "lr": task.child_optimizer.param_groups[0]["lr"],
        "train/loss": sums["loss"] / sums["images"],
        "train/top1": 100 * sums["correct"] / sums["images"],
        "controller/baseline": progress.baseline,
        **{f"controller/{name}": sums[name] / updates for name in means},
    }


def facts(task: Task, run: Session) -> dict:
    """The run's part of summary.json: what was searched, how far, on what."""
    config, data, progress = task.config, task.data.describe(), run.progress
    sizes = (data["train_images"], data["val_images"])
    child = (config.child.layers, config.child.filters, config.child.nodes)
    full = sizes == CIFAR10_SIZE and config.epochs >= 150 and child == (6, 20, 5)
    full = full and (config.controller.updates >= 300 or config.sampler == "random")
    model = f"{config.child.layers}x{config.child.filters}_{config.child.nodes}nodes"
    return {
        "task": "enas",
        "run": f"enas/{data['name']}_{model}/{config.run_name}/seed{config.seed}",
        "sampler": config.sampler,
        "norm": config.controller.norm if task.controller is not None else None,
        "data": data,
        "model": model,
        "child_steps": progress.epoch * task.steps,
        "controller_updates": progress.epoch * config.controller.updates,
        "images_scored": progress.images_scored,
        "scale": "full" if full else "proxy",
    }


def announce(task: Task, run: Session) -> None:
    config, data = task.config, task.data.describe()
    random = task.controller is None
    modules: list = [task.child] if random else [task.child, task.controller]
    sizes = [f"{sum(p.numel() for p in module.parameters()):,}" for module in modules]
    run.say(
        f"{config.run_name}: child of {sizes[0]} shared parameters, "
        f"{'no controller' if random else f'controller of {sizes[1]}'}; {data['name']}, "
        f"{data['train_images']:,} training and {data['val_images']:,} held-out images\n"
        f"{config.epochs} epochs of {task.steps} child steps and {config.controller.updates} "
        f"{'scored architectures' if random else 'controller updates'}"
    )
    if run.resumed:
        progress = run.progress
        run.say(
            f"resuming after {progress.epoch} epochs, {progress.step} child steps and "
            f"{progress.update} updates"
        )


def print_epoch(run: Session, metrics: dict) -> None:
    run.say(
        f"epoch {run.progress.epoch}/{run.config.epochs}  loss {metrics['train/loss']:.4f}  "
        f"shared val top-1 {metrics['val/shared_top1']:.2f}  "
        f"reward {metrics['controller/reward']:.4f}  entropy {metrics['controller/entropy']:.3f}  "
        f"{run.time_left()} left"
    )


if __name__ == "__main__":
    entry.start(main, "enas")

"""Search for an architecture with shared weights and a controller, or uniformly (random search).

    python -m enas.search                                        # bundled digits
    python -m enas.search experiment=enas/paper controller.norm=sn_ln_gn data.root=data
    python -m enas.search sampler=random                         # same budget, no controller

Section 4.4; Fig 5(b) ends at 73 % for SN, 70 % for LN, 69 % for GN. What is measured is the
accuracy of sampled architectures with *shared* weights (`shared_top1`); enas.retrain trains the
architecture that comes out. The same command resumes a run. See configs/enas.yaml.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; entry.start collects again

import functools

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import sn
from sn.training.classification.data import build_data
from sn.training.run import budget, entry
from sn.training.run.guard import check_finite, gradient_norm
from sn.training.run.schedule import cosine_restarts
from sn.training.run.session import Session

from .child import Child
from .config import ControllerKeys, SearchConfig
from .controller import Baseline, Controller, Samples, draw_uniformly, reinforce_loss
from .data import DeviceImages
from .space import Architecture, to_json
from .tasks import SearchProgress, SearchTask

# what a random number is for; with seed, epoch and step it makes the seed of the draw
(ARCHITECTURES, ORDER, AUGMENTATION, DROPOUT, UPDATE, REWARD_ORDER, VALIDATION, CANDIDATES) = range(
    8
)


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
            facts=lambda: task.facts(run),
            headline=("shared_top1", "best_shared_top1"),
            epochs=config.epochs,
            steps=task.steps + config.controller.updates,
            progress=SearchProgress,
            importance=task.controller,
            blocks=task.controller and task.controller.places_of_norms(),
        )
        task.announce(run)
        if config.plan:
            child = (lambda: train_child(task, run, 0), config.epochs)
            controller = (lambda: train_controller(task, run, 0), config.epochs)
            loops = {"child's training": child, "controller's training": controller}
            return budget.plan(run, task.child, None, loops, "its evaluations")
        for epoch in run.epochs():
            train_child(task, run, epoch)
            train_controller(task, run, epoch)
            metrics = task.epoch_metrics(run) | validate(task, run, epoch)
            run.progress.last = {
                "shared_top1": metrics["val/shared_top1"],
                "shared_loss": metrics["val/shared_loss"],
                "entropy": metrics["controller/entropy"],
                "reward": metrics["controller/reward"],
            }
            run.end_epoch(metrics, score=metrics["val/shared_top1"])
            run.say_epoch(
                f"loss {metrics['train/loss']:.4f}  "
                f"shared val top-1 {metrics['val/shared_top1']:.2f}  "
                f"reward {metrics['controller/reward']:.4f}  "
                f"entropy {metrics['controller/entropy']:.3f}"
            )
        summary = run.finish(run.progress.last | choose(task, run))
        run.say(
            f"shared_top1 {summary['shared_top1']:.2f} (drawn architectures, shared weights), best "
            f"of {config.evaluation.candidates}: {summary['best_shared_top1']:.2f}; records in "
            f"{config.output_dir}"
        )
        return summary


def build(config: SearchConfig, run: Session) -> SearchTask:
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
    return SearchTask(
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
def draw(task: SearchTask, run: Session, count: int, *purpose: int) -> Tensor:
    """The decisions of `count` architectures of the sampler, from the seed."""
    run.draw_from(task.config.seed, *purpose)
    return task.sampler(count).decisions


def train_child(task: SearchTask, run: Session, epoch: int) -> None:
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
    task: SearchTask,
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


def train_controller(task: SearchTask, run: Session, epoch: int) -> None:
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
        norm: float | None = 0.0
        if task.controller is not None:
            norm = controller_step(task, run, samples, reward, progress.baseline)
        progress.add(accuracy=accuracy, reward=reward, entropy=entropy, log_prob=log_prob)
        if norm is not None:
            progress.add(gradient_norm=norm, updates_made=1)
        progress.images_scored += len(labels)
        run.step_done(reward=reward, accuracy=accuracy, entropy=entropy)


def controller_step(
    task: SearchTask, run: Session, samples: Samples, reward: float, baseline: float
) -> float | None:
    """One REINFORCE update; return the gradient's norm before clipping, None if it was skipped."""
    controller, grad_clip = task.controller, task.config.controller.grad_clip
    task.controller_optimizer.zero_grad(set_to_none=True)
    loss = reinforce_loss(samples, reward, baseline)
    loss.backward()
    norm = gradient_norm(controller).item()
    if not run.allows(loss, controller):
        return None
    if grad_clip is not None:
        nn.utils.clip_grad_norm_(controller.parameters(), grad_clip)
    task.controller_optimizer.step()
    return norm


@torch.no_grad()
def score(
    task: SearchTask, run: Session, images: Tensor, labels: Tensor, decisions: Tensor
) -> float:
    """Accuracy, 0 to 1, of one architecture with the shared weights on one batch."""
    with run.autocast():
        logits = task.child(run.to_device(images), Architecture.from_decisions(decisions))
    return (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def validate(task: SearchTask, run: Session, epoch: int) -> dict[str, float]:
    """Shared-weight loss and top-1 on held-out images, an architecture drawn for every batch."""
    options = task.config.evaluation
    total = min(len(task.held_out), options.images or len(task.held_out))
    decisions = draw(task, run, -(-total // options.batch_size), VALIDATION, epoch)
    task.child.eval()
    loss = correct = 0.0
    batches = zip(task.held_out.batches(options.batch_size, total), decisions)

    def forward(images: Tensor, chosen: Tensor) -> Tensor:
        with run.autocast():
            return task.child(run.to_device(images), Architecture.from_decisions(chosen))

    for (images, labels), chosen in run.evaluating(batches, "validation"):
        logits = forward(images, chosen)
        loss += F.cross_entropy(logits.double(), labels, reduction="sum").item()
        again = functools.partial(forward, images, chosen)
        check_finite(torch.tensor(loss), task.child, f"the end of epoch {epoch + 1}", again)
        correct += (logits.argmax(1) == labels).sum().item()
    return {"val/shared_loss": loss / total, "val/shared_top1": 100 * correct / total}


def choose(task: SearchTask, run: Session) -> dict:
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


if __name__ == "__main__":
    entry.start(main, "enas")

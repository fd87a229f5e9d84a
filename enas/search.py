"""Search for an architecture with shared weights and a controller, or uniformly (random search).

    python -m enas.search                                        # bundled digits
    python -m enas.search experiment=enas/paper controller.norm=sn_ln_gn data.root=data
    python -m enas.search sampler=random                         # same budget, no controller

Section 4.4; Fig 5(b) ends at 73 % for SN, 70 % for LN, 69 % for GN. What is measured is the
accuracy of sampled architectures with *shared* weights (`shared_top1`); enas.retrain trains the
architecture that comes out. The same command resumes a run. See configs/enas.yaml.
"""

import contextlib
import math
import sys
import time
from dataclasses import dataclass, field

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from sn.recurrent import LSTM_NORMS, LSTM_PLACES
from sn.training.classification.data import ImageData, build_data
from sn.training.run import distributed, entry
from sn.training.run.checkpoint import load_checkpoint, restore, save_checkpoint
from sn.training.run.entry import above, number, one_of, optional, switch, whole
from sn.training.run.guard import FiniteGuard, gradient_norm
from sn.training.run.record import Recorder, environment
from sn.training.run.schedule import cosine_restarts, mix_seed
from sn.training.run.stopping import Preempted, StopSignal, Watchdog

from .child import Child
from .controller import Baseline, Controller, Samples, reinforce_loss
from .data import DeviceImages
from .space import OPERATIONS, Architecture, random_decisions, to_json

AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16}
SAMPLERS = ("controller", "random")
# what a random number is for; with seed, epoch and step it makes the seed of the draw
(ARCHITECTURES, ORDER, AUGMENTATION, DROPOUT, UPDATE, REWARD_ORDER, VALIDATION, CANDIDATES) = range(
    8
)
CIFAR10_SIZE = (45_000, 5_000)

CHECKS = [
    (
        whole(1, 2**31),
        "a whole number, 1 or more",
        [
            "epochs",
            "controller.updates",
            "controller.batch_size",
            "controller.hidden_size",
            "child.layers",
            "child.filters",
            "child.nodes",
            "child.stem_stride",
            "optimizer.batch_size",
            "optimizer.first_period",
            "optimizer.period_factor",
            "evaluation.batch_size",
            "evaluation.candidates",
        ],
    ),
    (
        optional(whole(1, 2**31)),
        "a whole number, 1 or more, or null",
        ["data.train_images", "evaluation.images", "controller.num_groups"],
    ),
    (
        whole(0, 2**32),
        "a whole number, 0 to 2^32",
        ["seed", "checkpoint_steps", "max_skipped_steps", "data.workers"],
    ),
    (whole(2, 1000), "a whole number, 2 to 1000", ["keep_checkpoints"]),
    (
        number(),
        "a number, 0 or more",
        [
            "controller.operation_bias",
            "controller.lr",
            "controller.entropy_weight",
            "child.aux_weight",
            "optimizer.momentum",
            "optimizer.weight_decay",
            "optimizer.max_lr",
            "optimizer.min_lr",
        ],
    ),
    (
        above(),
        "a number above 0",
        [
            "controller.operation_temperature",
            "controller.eps",
            "controller.init",
            "timeout_minutes",
        ],
    ),
    (
        optional(above()),
        "null or a number above 0",
        ["controller.tanh_constant", "controller.grad_clip", "optimizer.grad_clip"],
    ),
    (
        lambda v: number(0, 1)(v) and v < 1,
        "a number, 0 or more and less than 1",
        ["controller.beta1", "controller.baseline_decay", "child.dropout", "child.drop_path"],
    ),
    (switch, "true or false", ["channels_last", "controller.per_gate", "data.download"]),
    (one_of(SAMPLERS), f"one of {SAMPLERS}", ["sampler"]),
    (one_of(LSTM_NORMS), f"one of {LSTM_NORMS}", ["controller.norm"]),
    (one_of(list(AUTOCAST)), f"one of {list(AUTOCAST)}", ["precision"]),
    (
        lambda v: OmegaConf.is_list(v) and all(place in LSTM_PLACES for place in v),
        f"a list of places from {LSTM_PLACES}",
        ["controller.places"],
    ),
]


@dataclass
class Progress:
    """Where the run is; what a checkpoint holds beside weights and optimizers."""

    epoch: int = 0  # epochs done
    step: int = 0  # child steps done of the next
    update: int = 0  # controller updates done of the next
    sums: dict[str, float] = field(default_factory=dict)  # over the steps and updates of the next
    last: dict[str, float] = field(default_factory=dict)  # results of the last epoch done
    baseline: float = 0.0
    images_seen: int = 0  # trained on, in all
    images_scored: int = 0  # for rewards, in all
    skipped_steps: int = 0
    wall_s: float = 0.0

    def add(self, **values: float) -> None:
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value


@dataclass
class Run:
    """Everything that is built once from the config."""

    cfg: DictConfig
    device: torch.device
    data: ImageData
    train: DeviceImages
    held_out: DeviceImages
    child: Child
    child_optimizer: torch.optim.Optimizer
    controller: Controller | None  # None: the random sampler
    controller_optimizer: torch.optim.Optimizer | None
    steps: int  # child steps per epoch
    guard: FiniteGuard
    stop: StopSignal
    watchdog: Watchdog

    def autocast(self):
        dtype = AUTOCAST[self.cfg.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    def layout(self, images: Tensor) -> Tensor:
        if self.cfg.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images


@hydra.main(version_base="1.3", config_path="../configs", config_name="enas")
def main(cfg: DictConfig) -> None:
    entry.run(search, cfg)


def search(cfg: DictConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    check_config(cfg)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    processes = distributed.start(cfg.device, cfg.timeout_minutes + 5)
    if processes.world_size > 1:
        raise ValueError("the search runs in one process; start it without torchrun")
    recorder = Recorder(cfg.output_dir, config)
    summary = recorder.summary()
    if summary is not None:
        print(f"{cfg.output_dir} has ended already: best shared_top1 {summary['best_shared_top1']}")
        return summary

    with StopSignal() as stop, Watchdog(cfg.timeout_minutes) as watchdog:
        run = build(cfg, processes.device, stop, watchdog)
        progress = resume(run)
        recorder.open(progress.epoch if progress.images_seen else -1)
        announce(run, progress)
        if progress.images_seen == 0:
            record_importance(recorder, run, 0)
        start = time.perf_counter() - progress.wall_s
        try:
            metrics = search_epochs(run, recorder, progress, start)
        except FloatingPointError as error:
            progress.wall_s = time.perf_counter() - start
            results = {"status": "diverged", "shared_top1": None, "best_shared_top1": None}
            recorder.finish(summarise(run, progress, results | {"error": str(error)}))
            raise
        results = {"status": "finished", **metrics, **choose(run)}
    progress.wall_s = time.perf_counter() - start
    summary = summarise(run, progress, results)
    recorder.finish(summary)
    print(
        f"shared_top1 {summary['shared_top1']:.2f} (drawn architectures, shared weights), best of "
        f"{cfg.evaluation.candidates}: {summary['best_shared_top1']:.2f}; records in "
        f"{cfg.output_dir}"
    )
    return summary


def search_epochs(run: Run, recorder: Recorder, progress: Progress, start: float) -> dict:
    """All epochs that are left; return the last one's results for the summary."""
    cfg = run.cfg
    while progress.epoch < cfg.epochs:
        began, seen = time.perf_counter(), progress.images_seen
        with progress_bar(run, progress) as bar:
            train_child(run, progress, start, bar)
            train_controller(run, progress, start, bar)
        save(run, progress)  # validation may be cut short
        speed = (progress.images_seen - seen) / (time.perf_counter() - began)
        metrics = epoch_metrics(run, progress) | validate(run, progress.epoch)
        metrics["images_per_s"] = speed
        progress.epoch += 1
        progress.step = progress.update = 0
        progress.sums = {}
        progress.wall_s = time.perf_counter() - start
        recorder.metrics(progress.epoch, metrics)
        record_importance(recorder, run, progress.epoch)
        progress.last = {
            "shared_top1": metrics["val/shared_top1"],
            "shared_loss": metrics["val/shared_loss"],
            "entropy": metrics["controller/entropy"],
            "reward": metrics["controller/reward"],
        }
        save(run, progress)
        print_epoch(run, progress, metrics)
    return progress.last


def check_config(cfg: DictConfig) -> None:
    """Raise ValueError for values that no run can have."""
    entry.check_values(cfg, CHECKS)
    entry.check_names(cfg, ["data.name", "run_name"])


def build(cfg: DictConfig, device: torch.device, stop: StopSignal, watchdog: Watchdog) -> Run:
    """Data, child, controller and their optimizers, on `device`."""
    data = build_data(**{k: v for k, v in cfg.data.items() if k != "workers"})
    dtype = torch.float64 if cfg.precision == "fp64" else torch.float32
    train, held_out = (DeviceImages(data, part, device, dtype) for part in (data.train, data.val))
    size = train.images.shape[-1]
    torch.manual_seed(cfg.seed)
    child = Child(data.num_classes, image_size=size, **cfg.child).to(device, dtype)
    for parameter in child.parameters():  # weights that an architecture leaves out step as well
        parameter.grad = torch.zeros_like(parameter)
    optimizer = cfg.optimizer
    child_optimizer = torch.optim.SGD(
        child.parameters(),
        lr=optimizer.max_lr,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        nesterov=optimizer.momentum > 0,
    )
    controller = controller_optimizer = None
    if cfg.sampler == "controller":
        controller = build_controller(cfg).to(device, dtype)
        controller_optimizer = torch.optim.Adam(
            controller.parameters(),
            lr=cfg.controller.lr,
            betas=(cfg.controller.beta1, 0.999),
            eps=cfg.controller.eps,
        )
    steps = max(1, len(train) // optimizer.batch_size)
    guard = FiniteGuard(cfg.max_skipped_steps)
    return Run(
        cfg,
        device,
        data,
        train,
        held_out,
        child,
        child_optimizer,
        controller,
        controller_optimizer,
        steps,
        guard,
        stop,
        watchdog,
    )


def build_controller(cfg: DictConfig) -> Controller:
    options = cfg.controller
    return Controller(
        cfg.child.nodes,
        options.hidden_size,
        options.norm,
        options.num_groups,
        list(options.places),
        options.per_gate,
        options.tanh_constant,
        options.operation_temperature,
        options.operation_bias,
        options.init,
    )


def announce(run: Run, progress: Progress) -> None:
    cfg, data = run.cfg, run.data.describe()
    random = run.controller is None
    modules = [run.child] if random else [run.child, run.controller]
    sizes = [f"{sum(p.numel() for p in module.parameters()):,}" for module in modules]
    print(
        f"{cfg.run_name}: child of {sizes[0]} shared parameters, "
        f"{'no controller' if random else f'controller of {sizes[1]}'}; {data['name']}, "
        f"{data['train_images']:,} training and {data['val_images']:,} held-out images\n"
        f"{cfg.epochs} epochs of {run.steps} child steps and {cfg.controller.updates} "
        f"{'scored architectures' if random else 'controller updates'}",
        flush=True,
    )
    if progress.images_seen:
        print(
            f"resuming after {progress.epoch} epochs, {progress.step} child steps and "
            f"{progress.update} updates",
            flush=True,
        )


def draw(run: Run, count: int, *purpose: int) -> Samples:
    """`count` architectures of the sampler, from the seed, without gradients."""
    seed = mix_seed(run.cfg.seed, *purpose)
    if run.controller is None:
        nodes = run.cfg.child.nodes
        generator = torch.Generator().manual_seed(seed)
        decisions = random_decisions(count, nodes, generator=generator)
        entropy = 2 * sum(2 * math.log((node + 2) * len(OPERATIONS)) for node in range(nodes))
        return Samples(decisions, torch.full((count,), -entropy), torch.full((count,), entropy))
    torch.manual_seed(seed)
    with torch.no_grad():
        return run.controller(count)


def progress_bar(run: Run, progress: Progress) -> tqdm:
    return tqdm(
        total=run.steps + run.cfg.controller.updates,
        initial=progress.step + progress.update,
        desc=f"epoch {progress.epoch + 1}/{run.cfg.epochs}",
        unit="step",
        leave=False,
        disable=not sys.stderr.isatty(),
    )


def train_child(run: Run, progress: Progress, start: float, bar: tqdm) -> None:
    """One epoch of the shared weights, a newly drawn architecture for every batch."""
    cfg, epoch, size = run.cfg, progress.epoch, run.cfg.optimizer.batch_size
    order = run.train.order(cfg.seed, ORDER, epoch)
    decisions = draw(run, run.steps, ARCHITECTURES, epoch).decisions
    schedule = cosine_restarts(epoch, cfg.optimizer.first_period, cfg.optimizer.period_factor)
    lr = cfg.optimizer.min_lr + schedule * (cfg.optimizer.max_lr - cfg.optimizer.min_lr)
    for group in run.child_optimizer.param_groups:
        group["lr"] = lr
    run.child.train()
    while progress.step < run.steps:
        step = progress.step
        where = f"epoch {epoch + 1}, child step {step + 1} of {run.steps}"
        run.watchdog.beat(where)
        indices = order[step * size : (step + 1) * size]
        images, labels = run.train.batch(indices, (cfg.seed, AUGMENTATION, epoch, step))
        torch.manual_seed(mix_seed(cfg.seed, DROPOUT, epoch, step))
        architecture = Architecture.from_decisions(decisions[step])
        loss, correct, count = child_step(run, images, labels, architecture, progress, where)
        progress.add(loss=loss * count, correct=correct, images=count)
        progress.images_seen += len(labels)
        progress.step += 1
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        save_if_due(run, progress, progress.step, start, where)
    if not progress.sums["images"]:
        raise FloatingPointError(f"every child step of epoch {epoch + 1} was skipped")


def child_step(
    run: Run,
    images: Tensor,
    labels: Tensor,
    architecture: Architecture,
    progress: Progress,
    where: str,
) -> tuple[float, float, int]:
    """One update of the shared weights; return (loss, number correct, images), 0 if skipped."""
    cfg, child, images = run.cfg, run.child, run.layout(images)
    done = (progress.epoch + progress.step / run.steps) / cfg.epochs

    def forward():
        with run.autocast():
            return child(images, architecture, done)

    run.child_optimizer.zero_grad(set_to_none=False)
    outputs = forward()
    with run.autocast():
        loss = child.loss(outputs, labels)
    loss.backward()
    values = torch.stack([loss.detach().double(), gradient_norm(child).to(loss.device)])
    if not run.guard.allows(values, child, where, forward):
        print(f"warning: not finite at {where}, step skipped", file=sys.stderr, flush=True)
        return 0.0, 0.0, 0
    if cfg.optimizer.grad_clip is not None:
        nn.utils.clip_grad_norm_(child.parameters(), cfg.optimizer.grad_clip)
    run.child_optimizer.step()
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss.item(), (logits.argmax(1) == labels).sum().item(), len(labels)


def train_controller(run: Run, progress: Progress, start: float, bar: tqdm) -> None:
    """One epoch's updates of the controller; the random sampler scores as many architectures."""
    cfg, epoch, size = run.cfg, progress.epoch, run.cfg.controller.batch_size
    order = run.held_out.order(cfg.seed, REWARD_ORDER, epoch)
    run.child.eval()
    baseline = Baseline(cfg.controller.baseline_decay)
    baseline.value = progress.baseline
    while progress.update < cfg.controller.updates:
        update = progress.update
        where = f"epoch {epoch + 1}, controller update {update + 1} of {cfg.controller.updates}"
        run.watchdog.beat(where)
        indices = order[torch.arange(update * size, (update + 1) * size) % len(order)]
        images, labels = run.held_out.batch(indices)
        if run.controller is None:
            samples = draw(run, 1, UPDATE, epoch, update)
        else:
            torch.manual_seed(mix_seed(cfg.seed, UPDATE, epoch, update))
            samples = run.controller(1)
        accuracy = score(run, images, labels, samples.decisions[0])
        reward = accuracy + cfg.controller.entropy_weight * samples.entropy.item()
        progress.baseline = baseline.update(reward)
        norm = 0.0
        if run.controller is not None:
            norm = controller_step(run, samples, reward, progress.baseline, where)
        progress.add(
            accuracy=accuracy,
            reward=reward,
            entropy=samples.entropy.item(),
            log_prob=samples.log_prob.item(),
            gradient_norm=norm,
        )
        progress.images_scored += len(labels)
        progress.update += 1
        bar.update()
        bar.set_postfix_str(f"reward {reward:.3f}", refresh=False)
        save_if_due(run, progress, progress.update, start, where)


def controller_step(
    run: Run, samples: Samples, reward: float, baseline: float, where: str
) -> float:
    """One REINFORCE update; return the gradient's norm before clipping."""
    cfg, controller = run.cfg.controller, run.controller
    run.controller_optimizer.zero_grad(set_to_none=True)
    loss = reinforce_loss(samples, reward, baseline)
    loss.backward()
    norm = gradient_norm(controller)
    values = torch.stack([loss.detach().double().cpu(), norm.cpu()])
    if run.guard.allows(values, controller, where):
        if cfg.grad_clip is not None:
            nn.utils.clip_grad_norm_(controller.parameters(), cfg.grad_clip)
        run.controller_optimizer.step()
    return norm.item()


@torch.no_grad()
def score(run: Run, images: Tensor, labels: Tensor, decisions: Tensor) -> float:
    """Accuracy, 0 to 1, of one architecture with the shared weights on one batch."""
    with run.autocast():
        logits = run.child(run.layout(images), Architecture.from_decisions(decisions))
    return (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def validate(run: Run, epoch: int) -> dict[str, float]:
    """Shared-weight loss and top-1 on held-out images, an architecture drawn for every batch."""
    options = run.cfg.evaluation
    total = min(len(run.held_out), options.images or len(run.held_out))
    decisions = draw(run, -(-total // options.batch_size), VALIDATION, epoch).decisions
    run.child.eval()
    loss = correct = 0.0
    for (images, labels), chosen in zip(run.held_out.batches(options.batch_size, total), decisions):
        run.watchdog.beat("validation")
        run.stop.check("validation")
        with run.autocast():
            logits = run.child(run.layout(images), Architecture.from_decisions(chosen))
        loss += F.cross_entropy(logits.double(), labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return {"val/shared_loss": loss / total, "val/shared_top1": 100 * correct / total}


def choose(run: Run) -> dict:
    """Draw candidates, score each on the held-out images, and return the best one."""
    options = run.cfg.evaluation
    candidates = draw(run, options.candidates, CANDIDATES).decisions
    run.child.eval()
    scores = []
    for decisions in candidates:
        right = total = 0.0
        for images, labels in run.held_out.batches(options.batch_size, options.images):
            run.watchdog.beat("the choice of the best architecture")
            run.stop.check("the choice of the best architecture")
            right += score(run, images, labels, decisions) * len(labels)
            total += len(labels)
        scores.append(100 * right / total)
    best = max(range(len(scores)), key=scores.__getitem__)
    return {
        "best_shared_top1": scores[best],
        "candidates_shared_top1": scores,
        "architecture": to_json(Architecture.from_decisions(candidates[best])),
    }


def epoch_metrics(run: Run, progress: Progress) -> dict:
    """The epoch's means over its child steps and controller updates."""
    sums, updates = progress.sums, run.cfg.controller.updates
    return {
        "step": (progress.epoch + 1) * run.steps,
        "images_seen": progress.images_seen,
        "lr": run.child_optimizer.param_groups[0]["lr"],
        "train/loss": sums["loss"] / sums["images"],
        "train/top1": 100 * sums["correct"] / sums["images"],
        "controller/accuracy": sums["accuracy"] / updates,
        "controller/reward": sums["reward"] / updates,
        "controller/baseline": progress.baseline,
        "controller/entropy": sums["entropy"] / updates,
        "controller/log_prob": sums["log_prob"] / updates,
        "controller/gradient_norm": sums["gradient_norm"] / updates,
    }


def record_importance(recorder: Recorder, run: Run, epoch: int) -> None:
    """The controller's importance weights, a block for each place that has a norm."""
    if run.controller is None:
        return
    names = [name for name, _ in run.controller.named_modules() if name.startswith("cell.norms.")]
    places = {name: name.split(".")[2] for name in names}  # cell.norms.<place>, per gate .<gate>
    recorder.importance(epoch, run.controller, blocks=places)


def save_if_due(run: Run, progress: Progress, count: int, start: float, where: str) -> None:
    """Save every `checkpoint_steps`, and when a signal asks the run to stop."""
    every = run.cfg.checkpoint_steps
    if run.stop.requested or every and count % every == 0:
        progress.wall_s = time.perf_counter() - start
        save(run, progress)
    if run.stop.requested:
        raise Preempted(f"stopped by a signal and saved after {where}; the same command goes on")


def save(run: Run, progress: Progress) -> None:
    progress.skipped_steps = run.guard.skipped
    state = {
        "child": run.child.state_dict(),
        "child_optimizer": run.child_optimizer.state_dict(),
        "controller": None if run.controller is None else run.controller.state_dict(),
        "controller_optimizer": (
            None if run.controller is None else run.controller_optimizer.state_dict()
        ),
        "progress": {**vars(progress), "sums": dict(progress.sums)},
        "data": run.data.describe(),
    }
    save_checkpoint(f"{run.cfg.output_dir}/checkpoint.pt", state, run.cfg.keep_checkpoints)


def resume(run: Run) -> Progress:
    """Load the run's checkpoint, if there is one, and return where it was."""
    needed = ("child", "child_optimizer", "controller", "controller_optimizer", "progress", "data")
    path = f"{run.cfg.output_dir}/checkpoint.pt"
    state = load_checkpoint(path, needed)
    if state is None:
        return Progress()
    if state["data"] != run.data.describe():
        raise ValueError(
            f"{run.cfg.output_dir} was searched on other data: {state['data']} there, "
            f"{run.data.describe()} now; choose another output_dir="
        )
    parts = {"child": run.child, "child_optimizer": run.child_optimizer}
    if run.controller is not None:
        parts |= {"controller": run.controller, "controller_optimizer": run.controller_optimizer}
    progress = restore(path, state, parts, Progress)
    run.guard.skipped = progress.skipped_steps
    return progress


def summarise(run: Run, progress: Progress, results: dict) -> dict:
    """The contents of summary.json."""
    cfg, data = run.cfg, run.data.describe()
    sizes = (data["train_images"], data["val_images"])
    child = (cfg.child.layers, cfg.child.filters, cfg.child.nodes)
    full = sizes == CIFAR10_SIZE and cfg.epochs >= 150 and child == (6, 20, 5)
    full = full and (cfg.controller.updates >= 300 or cfg.sampler == "random")
    model = f"{cfg.child.layers}x{cfg.child.filters}_{cfg.child.nodes}nodes"
    return {
        "task": "enas",
        "run": f"enas/{data['name']}_{model}/{cfg.run_name}/seed{cfg.seed}",
        "sampler": cfg.sampler,
        "norm": cfg.controller.norm if run.controller is not None else None,
        "data": data,
        "model": model,
        **results,
        "epochs": progress.epoch,
        "child_steps": progress.epoch * run.steps,
        "controller_updates": progress.epoch * cfg.controller.updates,
        "seed": cfg.seed,
        "images_seen": progress.images_seen,
        "images_scored": progress.images_scored,
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
        f"shared val top-1 {metrics['val/shared_top1']:.2f}  "
        f"reward {metrics['controller/reward']:.4f}  entropy {metrics['controller/entropy']:.3f}  "
        f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
        flush=True,
    )


if __name__ == "__main__":
    entry.start(main)

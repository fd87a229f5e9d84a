"""A run from its start to its end: what every entrypoint needs and no experiment is about."""

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .budget import Need, Pace
from .checkpoint import fitting, keep_best, newest_checkpoint, put, restore, save_checkpoint
from .config import RunConfig, machine_keys, number, recorded, whole
from .display import clock, counted, is_terminal, line, progress_bar, say
from .guard import (
    FiniteGuard,
    ToHost,
    can_decide,
    gradient_norm,
    gradient_norms,
    to_host,
)
from .lock import Busy, FolderLock
from .precision import Precision
from .record import Recorder, differences, environment
from .schedule import mix_seed
from .stopping import Preempted, StopSignal, Watchdog

# of what belongs to the machine: processes that differ would wait for one another, or end apart
ALIKE = ("plan", "checkpoint_steps", "max_skipped_steps")
SMALLEST_SCALE = 2.0**-20  # of fp16's loss, begun with 2^16 and halved by every skipped step


@dataclass
class Progress:
    """Where a run is; what a checkpoint holds beside weights and optimizer."""

    epoch: int = whole(default=0)  # epochs done
    step: int = whole(default=0)  # steps done of the next epoch; of all, in a run without epochs
    # over the steps since the last metrics; tensors until a checkpoint or `totals` needs them
    sums: dict[str, float] = field(default_factory=dict)
    logged: dict[str, list] = field(default_factory=dict)  # [sum, count] since steps' last line
    images_seen: int = whole(0, 2**62, default=0)  # trained on, in all
    skipped_steps: int = whole(default=0)  # in all: loss or gradients were not finite
    best: float | None = number(None, None, default=None)  # of the validations
    wall_s: float = number(0, None, default=0.0)

    @property
    def done(self) -> int:
        """Steps of any kind done of the next epoch."""
        return self.step

    def add(self, **values: float | Tensor) -> None:
        """Add to the sums; tensors stay where they are until `totals` are asked for."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value  # type: ignore[assignment]

    def totals(self) -> dict[str, float]:
        """The sums as numbers; waits for the device."""
        return {key: float(value) for key, value in self.sums.items()}

    def begin_epoch(self) -> None:
        """One more epoch is done."""
        self.epoch += 1
        self.step = 0
        self.sums, self.logged = {}, {}


@dataclass
class LateStep:
    """An update that the device has decided on, or will; what to do once its figures are there."""

    figures: ToHost  # losses, whether all was finite, whether a process has been told to stop
    losses: Tensor
    norms: Tensor
    model: nn.Module
    where: str
    again: Callable | None
    record: tuple[int, tuple[str, ...]] | None


class Session:
    """Processes, precision, signals, guard, records and checkpoints of one run.

    A context manager. A divergence (FloatingPointError) inside ends in a summary that says so. Use:

        with Session(config) as run:
            if run.summary is not None: ...             # this run has ended before
            task = build(config, run)
            run.begin(parts, facts=..., ...)            # resumes, if there is a checkpoint
            for epoch in run.epochs():
                for where, batch in run.steps(loader):
                    ...                                 # a step; run.allows(...) before the update
                    run.step_done()                     # saves if it is time, stops if it is told
                run.end_epoch(metrics)
            run.finish(results)

    A checkpoint is due after every `checkpoint_steps` steps, after the last step before an
    evaluation, after the evaluation that ends an epoch, and when a signal asks the run to stop.

    Args:
        unit: "epoch" or "step", what metrics and importance weights are numbered by.
        one_process: why this run cannot be distributed; None: it can.
    """

    def __init__(self, config: RunConfig, unit: str = "epoch", one_process: str | None = None):
        self.config: Any = config  # of the entrypoint's own schema
        self.unit, self._one_process = unit, one_process
        self.summary: dict | None = None
        self.progress: Any = Progress()
        self.guard = FiniteGuard(config.max_skipped_steps)
        self.stop = StopSignal()
        self.stopping = False  # some process has been told to stop
        self.where = "the start"
        self.pace: Pace | None = None  # measures a loop, in a plan
        self.latest: list[float] | None = None  # losses of the newest step known, None if skipped
        self._late: list[LateStep] = []
        self._stop_sum: Tensor | None = None
        self._facts: dict | Callable[[], dict] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Session":
        config = self.config
        if config.plan:
            folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            config.output_dir = self._stack.enter_context(folder)
        self.processes = distributed.start(config.device, config.timeout_minutes + 5)
        if self._one_process and self.processes.world_size > 1:
            raise ValueError(
                f"this runs in one process, not {self.processes.world_size}: {self._one_process}; "
                "start it without torchrun"
            )
        self._asked_alike()
        self.device, self.is_main = self.processes.device, self.processes.is_main
        self.late = self.device.type == "cuda"  # where the host should not wait for the device
        self.recorder = Recorder(
            config.output_dir, recorded(config), self.is_main, self.unit, machine_keys(type(config))
        )
        self.summary = self.recorder.summary()
        ended = distributed.any_process(self.is_main and self.summary is not None, self.device)
        if not self.is_main:  # on another machine the file may not be there yet
            self.summary = (self.summary or {}) if ended else None
        self.precision = Precision(config.precision, self.device, config.channels_last)
        self.scaler = self.precision.scaler
        self.autocast, self.to_device = self.precision.autocast, self.precision.to_device
        self._stack.enter_context(self.stop)
        self.watchdog = self._stack.enter_context(
            Watchdog(config.timeout_minutes, self.processes.rank)
        )
        self._lock = FolderLock(config.output_dir)
        self._stack.callback(self._lock.release)
        self._stack.callback(self.recorder.close)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        with self._stack:
            if isinstance(error, FloatingPointError) and self._facts is not None:
                results = {"status": "diverged", **dict.fromkeys(self._headline)}
                self._end(results | {"error": str(error)})

    def _asked_alike(self) -> None:
        """ValueError in all processes unless they have the same config, but for the machine's."""
        own = recorded(self.config) | {key: getattr(self.config, key) for key in ALIKE}
        if distributed.same_everywhere(own, self.processes):
            return
        keys = [field.name for field in dataclasses.fields(self.config)]
        other = [k for k in keys if not distributed.same_everywhere(own.get(k), self.processes)]
        raise ValueError(
            f"the processes were started with different {', '.join(other) or 'keys'}; start all of "
            "them, on every machine, with the same command"
        )

    # --- from the start to the end

    def warn_of(self, need: Callable[[], Need]) -> Need | None:
        """Say before a run starts where it needs more than there is; None: that is not known."""
        try:
            estimated = need()
        except (RuntimeError, ValueError):  # the run itself will say what is wrong, if it is
            return None
        except AssertionError as error:  # timm's and torchvision's, of the images' size
            raise ValueError(f"the network refuses its input: {error}") from None
        if not self.config.plan and self.is_main:
            for text in estimated.warnings():
                say(f"warning: {text}", error=True)
        return estimated

    def has_ended(self, what: str, key: str, now: dict[str, Any] | None = None) -> dict:
        """Say that the run has ended before, with the figure `key` of its summary; return that.

        now: what of the summary's facts can be told without the run being built, as the command has
            it; another is a ValueError.
        """
        summary = self.summary or {}
        for name, value in (now or {}).items():
            there = summary.get(name)
            if isinstance(there, dict) and isinstance(value, dict):
                there = {key: there.get(key) for key in value}
            if name in summary and there != value:
                raise ValueError(
                    f"{self.config.output_dir} has ended already, with other {name}: "
                    f"{differences(there, value)}; choose another output_dir="
                )
        value = "unknown" if summary.get(key) is None else f"{summary[key]:.4g}"
        made_of = []
        for part in ("data", "style"):
            facts = summary.get(part)
            if isinstance(facts, dict) and "name" in facts:
                images = facts.get("train_images")
                these = "" if images is None else f" ({counted(images, 'training image')})"
                made_of.append(f"{part} {facts['name']}{these}")
        of_these = f"; {', '.join(made_of)}" if made_of else ""
        self.say(f"{self.config.output_dir} has ended already: {what} {value}{of_these}")
        return summary

    def begin(
        self,
        parts: dict[str, Any],
        identity: dict[str, Any],
        facts: dict[str, Any] | Callable[[], dict[str, Any]],
        headline: tuple[str, ...],
        epochs: int = 1,
        steps: int = 1,
        progress: type[Progress] = Progress,
        saved: dict[str, Any] | None = None,
        importance: nn.Module | None = None,
        blocks: dict[str, str] | None = None,
        score: str | None = None,
        records_after_saving: bool = False,
    ) -> None:
        """Put the checkpoint back, if there is one, and open the records.

        Args:
            parts: what a checkpoint holds: anything with state_dict and load_state_dict.
            identity: what the run learns from, beyond its config; another at a resumption is a
                ValueError.
            facts: the run's part of summary.json; a function gives it at the end.
            headline: results that are None in the summary of a run that diverged.
            epochs, steps: in all, and per epoch.
            saved: further contents of the checkpoint.
            importance: the model whose importance weights are recorded.
            blocks: the block of each of its layers; by default as `block_names` says.
            score: the metric that the best checkpoint is chosen by.
            records_after_saving: a step's line of metrics follows its checkpoint.
        """
        distributed.in_main(self._alone, self.processes)
        self._parts, self._identity, self._saved = parts, identity, saved or {}
        self._importance, self._blocks, self._score = importance, blocks, score
        self.path = f"{self.config.output_dir}/checkpoint.pt"
        self.progress, self._epochs, self._steps = progress(), epochs, steps
        self.resumed = self._resume(progress)
        self.guard.skipped = self.progress.skipped_steps
        self._facts, self._headline = facts, headline
        count = self._recorded(records_after_saving)
        distributed.in_main(
            lambda: self.recorder.count_lines(count, self._lines, self._done()), self.processes
        )
        self.recorder.open(count, self._done(), steps)
        self._started = time.perf_counter() - self.progress.wall_s
        self._began, self._first = time.perf_counter(), self._done()
        self._epoch_began = self._began, self.progress.images_seen
        if not self.resumed and importance is not None:
            self.recorder.importance(0, importance, blocks=blocks)

    def _alone(self) -> None:
        """Take the folder's lock; what another process wrote there until then is seen here."""
        self._lock.acquire()
        self.recorder.check_config()
        if self.recorder.summary() != self.summary:
            raise Busy(f"{self.config.output_dir} has ended meanwhile; the same command shows it")

    def _resume(self, progress: type[Progress]) -> bool:
        found = newest_checkpoint(self.path, [*self._parts, *self._identity, "progress"])
        self._lines: dict[str, int] = {}
        self._begin_alike(found)
        if found is None:
            return False
        file, state = found
        with fitting(file):
            other = [key for key, value in self._identity.items() if state[key] != value]
        for key in other:
            raise ValueError(
                f"{self.config.output_dir} was trained with other {key}: "
                f"{differences(state[key], self._identity[key])}; choose another output_dir="
            )
        self.progress = restore(file, state, self._parts, progress, self._epochs, self._steps)
        own = state.get("running_statistics", [])  # where the checkpoint has the mean alone, that
        with fitting(file):
            for part, every in zip(self._models(), own):
                if len(every) == self.processes.world_size > 1:
                    distributed.put_own_running_statistics(part, every, self.processes)
        lines = state.get("lines")  # older checkpoints do not say
        if self._parts and isinstance(lines, dict):  # without parts the run begins anew
            self._lines = {name: count for name, count in lines.items() if type(count) is int}

        def mend() -> None:
            if file != Path(self.path):  # the newest was broken: this may become the best one
                put(file, Path(self.path))

        distributed.in_main(mend, self.processes)
        return True

    def _begin_alike(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """ValueError in all processes unless they have the same checkpoint, or none, and data."""
        name, progress = (None, None) if found is None else (found[0].name, found[1]["progress"])
        if distributed.same_everywhere((name, progress, self._identity), self.processes):
            return
        what = "no checkpoint"
        if isinstance(progress, dict):
            what = f"{name} after epoch {progress.get('epoch')} and step {progress.get('step')}"
        raise ValueError(
            f"the processes do not begin alike: process {self.processes.rank} finds {what} in "
            f"{self.config.output_dir}, others another one or other data; output_dir and the data "
            "must be the same on all machines, such as by a shared file system"
        )

    def _recorded(self, records_after_saving: bool) -> int:
        """Epochs or steps whose lines are kept at a resumption; -1: not even those of the start.

        A line that follows its checkpoint is written again.
        """
        if not self.resumed:
            return -1
        count = self.progress.epoch if self.unit == "epoch" else self.progress.step
        return max(0, count - records_after_saving)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left; each is over with `end_epoch`."""
        while self.progress.epoch < self._epochs:
            self._epoch_began = time.perf_counter(), self.progress.images_seen
            yield self.progress.epoch

    def steps(
        self, batches: Iterable, total: int, counter: str = "step", what: str = "step"
    ) -> Iterator[tuple[str, Any]]:
        """(where the run is, batch) of each step that is left; `step_done` ends each.

        Args:
            batches: those that are left.
            total: steps of this kind per epoch, done ones included.
            counter: the field of `Progress` that counts them.
            what: what such a step is called.
        """
        epoch = f"epoch {self.progress.epoch + 1}"
        label = f"{epoch}/{self._epochs}" if self.unit == "epoch" else None
        prefix = f"{epoch}, " if self.unit == "epoch" else ""
        done = getattr(self.progress, counter)
        if done > total:
            raise ValueError(
                f"{self.path} has done {done} {what}s of {total}; "
                f"delete {Path(self.path).parent} to start anew"
            )
        self._counter, self._total = counter, total
        if self.pace is not None:
            self.pace.total = total
        self._begin_pace()
        with progress_bar(total, done, label, self.is_main) as self.bar:
            for batch in batches:
                count = getattr(self.progress, counter) + 1
                self.where = f"{prefix}{what} {count} of {total}"
                self.watchdog.beat(self.where)
                yield self.where, batch

    def step_done(
        self,
        images: int = 0,
        evaluates: bool = False,
        lr: float | None = None,
        **values: float | Tensor | None,
    ) -> None:
        """Count a step of `images` images; save if it is time; raise Preempted if told to stop.

        `evaluates`: an evaluation follows. `values`: the step's loss, the first one, and more; None
        where an update was skipped. A line of `log_steps` holds their means; tensors are read then.
        """
        progress = self.progress
        count = getattr(progress, self._counter) + 1
        setattr(progress, self._counter, count)
        progress.images_seen += images
        progress.skipped_steps = self.guard.skipped
        if self.processes.world_size == 1:
            self.stopping = self.stop.requested
        for name, value in values.items():
            if value is not None:
                total, number = progress.logged.get(name, (0.0, 0))
                progress.logged[name] = [total + value, number + 1]
        if not self.bar.disable:
            shown = next(iter(values.values()), None)
            value = "" if shown is None else f"{shown:.3f}, "
            self.bar.set_postfix_str(f"{value}{self.time_left()} left", refresh=False)
            self.bar.update()
        if self.pace is not None:
            self.pace.step()
            return
        last = count == self._total
        ends = self.unit == "step" and (evaluates or last)  # an epoch has a line of its own
        if ends or _due(count, self.config.log_steps):
            self._log_steps(lr)
        if evaluates or last:
            self.save()
        elif _due(count, self.config.checkpoint_steps) or self.stopping:
            self.save(anywhere=True)
        if self.stopping:
            raise Preempted(
                f"stopped by a signal and saved after {self.where}; the same command goes on"
            )

    def _begin_pace(self) -> None:
        """Measure the speed from here on."""
        self._pace = (time.perf_counter(), self._done(), self.progress.images_seen)

    def _log_steps(self, lr: float | None) -> None:
        """A line of what has happened since the last one, before the step's checkpoint."""
        progress = self.progress
        values = {name: float(total) / n for name, (total, n) in progress.logged.items()}
        progress.logged = {}
        if not values:  # every update was skipped
            return
        if lr is not None:
            values["lr"] = lr
        began, done, images = self._pace
        seconds = max(time.perf_counter() - began, 1e-9)
        values["steps_per_s"] = (self._done() - done) / seconds
        if progress.images_seen > images:
            values["images_per_s"] = (progress.images_seen - images) / seconds
        self._begin_pace()
        epoch = {"epoch": progress.epoch + 1} if self.unit == "epoch" else {}
        self.recorder.step(self._done(), epoch | values)
        if self.bar.disable or not is_terminal(sys.stdout):
            short = {name.removeprefix("loss_"): value for name, value in values.items()}
            self.say(f"{self.where}  {line(short)}  {self.time_left()} left")

    def end_epoch(self, metrics: dict[str, Any], score: float | None = None) -> None:
        """Record the epoch and save; the checkpoint of the highest `score` is kept."""
        best = self._is_best(score)
        self.progress.begin_epoch()
        epoch = self.progress.epoch
        self.recorder.metrics(epoch, metrics)
        self.record_importance(epoch, epoch % max(1, self._epochs // 10) == 0)
        self.save(best)

    def _is_best(self, score: float | None) -> bool:
        best = self.progress.best
        better = score is not None and (best is None or score >= best)
        if better:
            self.progress.best = score
        return better

    def record_importance(self, count: int, figure: bool = False) -> None:
        """Record the importance weights after `count` epochs or steps."""
        if self._importance is not None:
            self.recorder.importance(count, self._importance, figure, self._blocks)

    def save(self, best: bool = False, anywhere: bool = False, **contents: Any) -> None:
        """Write the checkpoint; all processes take part, the main one writes.

        Running statistics are their mean over processes from then on. With `anywhere`, where the
        result must not depend on it, each process goes on with its own; the file has both.
        """
        self.settle()
        self.progress.skipped_steps = self.guard.skipped
        models, own = self._models(), list[Tensor]()
        if anywhere and self.processes.world_size > 1:
            own = [distributed.running_statistics_of_all(part, self.processes) for part in models]
            contents["running_statistics"] = own
        for part in models:
            distributed.average_running_statistics(part)
        self.progress.wall_s = self.wall_s
        progress = vars(self.progress).copy()
        progress["sums"] = self.progress.totals()
        progress["logged"] = {
            name: [float(total), n] for name, (total, n) in self.progress.logged.items()
        }
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"progress": progress, "lines": dict(self.recorder.lines)}
        state |= {**self._identity, **self._saved, **contents}

        def write() -> None:
            self.recorder.sync()
            save_checkpoint(self.path, state, self.config.keep_checkpoints, best)

        distributed.in_main(write, self.processes)
        for part, every in zip(models, own):
            distributed.put_own_running_statistics(part, every, self.processes)

    def _models(self) -> list[nn.Module]:
        return [part for part in self._parts.values() if isinstance(part, nn.Module)]

    def scored(self, score: float | None) -> None:
        """Keep the checkpoint just saved as the best one, if `score` is the best so far."""
        if self._is_best(score):
            distributed.in_main(lambda: keep_best(self.path), self.processes)

    def finish(self, results: dict[str, Any]) -> dict:
        """Write summary.json: the run has ended well; return it."""
        return self._end({"status": "finished"} | results)

    def _end(self, results: dict[str, Any]) -> dict:
        progress = self.progress
        progress.wall_s = self.wall_s
        count = {"epochs": progress.epoch} if self.unit == "epoch" else {"steps": progress.step}
        self.summary = {
            **(self._facts() if callable(self._facts) else self._facts or {}),
            **results,
            **count,
            **({f"best_{self._score}": progress.best} if self._score else {}),
            "seed": self.config.seed,
            "images_seen": progress.images_seen,
            "skipped_steps": self.guard.skipped,
            "wall_s": round(progress.wall_s, 1),
            "precision": self.config.precision,
            "note": self.config.note,
            **environment(self.device),
        }
        self.recorder.finish(self.summary)
        return self.summary

    # --- inside a step or an evaluation

    def draw_from(self, *where: int) -> None:
        """Seed torch's random numbers from where the run is, so that a resumption repeats them."""
        seed = mix_seed(*where)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # manual_seed's other devices cost 0.1 ms
        else:
            torch.manual_seed(seed)

    def together(self, totals: Tensor, late: bool = False) -> Tensor:
        """Sum a vector over all processes, in place; they agree here on whether to stop.

        `late`: they learn of it when `update` does.
        """
        if self.processes.world_size == 1:
            return totals
        stop = totals.new_full((1,), float(self.stop.requested))
        both = torch.cat([totals, stop])
        distributed.sum_over_processes(both)
        if late:
            self._stop_sum = both[-1:]
        else:
            self.stopping = to_host(both[-1:]) != [0.0]
        return both[:-1]

    def allows(self, losses: Tensor, model: nn.Module, again: Callable | None = None) -> bool:
        """Whether an update may happen: `losses` and the model's gradients are finite.

        False: it is one of the `max_skipped_steps`. Raises FloatingPointError, naming the first
        layer gone bad, if none of these is left; `again` repeats the forward pass to find it.
        """
        values = losses.detach().double().view(-1)
        norm = values.new_zeros(1)
        if not self.scaler.is_enabled():  # which sees to infinite gradients itself
            norm = gradient_norm(model).to(values).view(1)
        values = torch.cat([values, norm])
        allowed = self.guard.allows(values, model, self.where, again)
        if not allowed:
            self._say_skipped(self.where)
        return allowed

    def is_late(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the device decides on this step, without the host: not on the CPU or in fp16."""
        return self.late and can_decide(optimizer) and not self.scaler.is_enabled()

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        losses: Tensor,
        model: nn.Module,
        again: Callable | None = None,
        clip: tuple[list[nn.Parameter], float] | None = None,
        record: tuple[int, tuple[str, ...]] | None = None,
    ) -> Tensor:
        """The optimizer's step, if `losses` and the model's gradients are finite; whether it was.

        As `allows`, but where `is_late` the host does not wait: it learns a step later, or before
        the next checkpoint, whether the step was skipped, ends the run or was made. Meanwhile the
        weights are as before. `latest` holds the losses that it knows.

        Args:
            losses: (n,), the same in all processes.
            clip: parameters and the largest norm of their gradients together.
            record: number of the step and names of the losses, for a line of metrics; their sum is
                `loss`.
        """
        late, losses = self.is_late(optimizer), losses.detach().double().view(-1)
        made = torch.ones((), dtype=torch.bool, device=losses.device)
        if not late and not self.allows(losses, model, again):
            self._note(None, record)
            return ~made
        norms = gradient_norms(model) if late else None
        if clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(*clip)
        if not late:
            self.scaled_step(optimizer)
            self._note(to_host(losses), record)
            return made
        assert norms is not None
        made = self.guard.update(optimizer, torch.cat([losses, norms.norm().to(losses).view(1)]))
        stop = losses.new_zeros(1) if self._stop_sum is None else self._stop_sum.to(losses)
        figures = ToHost(torch.cat([losses, made.to(losses).view(1), stop]))
        self._late.append(LateStep(figures, losses, norms, model, self.where, again, record))
        self.settle(keep=1)
        return made

    def scaled_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step; in fp16 the scaler skips it where gradients are not finite.

        Raises FloatingPointError once they are not at any scale of the loss: all would be skipped.
        """
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise FloatingPointError(
                f"gradient is not finite at {self.where}, however little fp16's loss is scaled "
                f"({self.scaler.get_scale():g}): no step is made any more"
            )

    def settle(self, keep: int = 0) -> None:
        """Take note of the steps that the device decided on, of all but the last `keep`."""
        while len(self._late) > keep:
            step = self._late.pop(0)
            *losses, made, stop = step.figures.read()
            self.stopping = self.stopping or stop > 0
            if not made:
                values = torch.cat([step.losses, step.norms.norm().to(step.losses).view(1)])
                self.guard.refuse(values, step.model, step.where, step.again, step.norms)
                self._say_skipped(step.where)
            self._note(losses if made else None, step.record)

    def _note(self, losses: list[float] | None, record: tuple[int, tuple[str, ...]] | None) -> None:
        self.latest = losses
        if record is not None:
            step, names = record
            values = dict.fromkeys(("loss", *names))
            if losses is not None:
                values = {"loss": sum(losses), **dict(zip(names, losses))}
            self.recorder.metrics(step, {f"train/{name}": value for name, value in values.items()})

    def _say_skipped(self, where: str) -> None:
        if self.is_main:
            say(f"warning: not finite at {where}, step skipped", error=True)

    def evaluating(self, batches: Iterable, where: str = "evaluation") -> Iterator:
        """Batches outside training, each a sign of life. A signal ends them early.

        Then Preempted is raised in all processes together, at the end of the loop: one that left
        alone would leave the others waiting in a sum.
        """
        if self.pace is not None and isinstance(batches, Sized):
            self.pace.total = len(batches)
        for batch in self.watchdog.over(batches, where):
            yield batch
            if self.pace is not None:
                self.pace.step()
            if self.stop.requested:
                break
        if self.pace is not None and not self.stop.requested:
            self.pace.end()  # without a batch, as with fewer images than processes
        if distributed.any_process(self.stop.requested, self.device):
            raise Preempted(f"stopped by a signal at {where}; the same command goes on")
        self._begin_pace()

    # --- times and lines

    @property
    def wall_s(self) -> float:
        """Seconds of the run so far, those before a resumption included."""
        return time.perf_counter() - self._started

    def images_per_s(self) -> float | None:
        """Speed of training since the epoch began, or the run went on; None without a step."""
        began, before = self._epoch_began
        images = self.progress.images_seen - before
        return images / (time.perf_counter() - began) if images else None

    def _done(self) -> int:
        return self.progress.epoch * self._steps + self.progress.done

    def time_left(self) -> str:
        """`h:mm:ss` to the end at this process's speed, `?` before its first step."""
        done = self._done() - self._first
        if done <= 0:
            return "?"
        seconds = (time.perf_counter() - self._began) / done
        return clock(seconds * (self._epochs * self._steps - self._done()))

    def say(self, text: str) -> None:
        """Print a line, in the main process."""
        if self.is_main:
            say(text)

    def say_epoch(self, text: str) -> None:
        """Print the line of the epoch that has ended."""
        self.say(f"epoch {self.progress.epoch}/{self._epochs}  {text}  {self.time_left()} left")

    def say_resumed(self, bad_images: int = 0) -> None:
        """Say where the run goes on, and what was skipped so far, if it had begun before."""
        progress, skipped = self.progress, self.guard.skipped
        epochs = f"{counted(progress.epoch, 'epoch')} and " if self.unit == "epoch" else ""
        lost = f"; {skipped} steps and {bad_images} images were skipped"
        so_far = lost if skipped or bad_images else ""
        if self.resumed:
            self.say(f"resuming after {epochs}{counted(progress.step, 'step')}{so_far}")


def _due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0

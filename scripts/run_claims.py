"""Make the runs that the ledger of claims, results/claims.yaml, still lacks, in order of worth.

    python scripts/run_claims.py --list                       # what each claim needs and costs
    python scripts/run_claims.py --jobs 2 -- data.root=data   # everything, two runs at a time
    python scripts/run_claims.py C1 C5 --budget 120           # two claims, for two hours

Each run is a fresh process of its entrypoint. The same command again goes on with what is missing
and continues what was interrupted; records in results/ count as made. SIGTERM, SIGUSR1, Ctrl-C and
the end of a terminal (SIGHUP) are passed on: the runs save, and the script ends. With GPUs each of
the `--jobs` gets one of them in turn (CUDA_VISIBLE_DEVICES). What follows `--` are Hydra overrides
for every run; those that only some designs have (`takes` and `accepts` in the ledger, such as
data.root) are kept from the others. The searches of the lr go to ROOT/lr_search, as in results/.

A run that another process has in hand is skipped.

Exit code: 0 all made or the budget used, 1 some runs failed, 2 bad usage, 73 none failed, but some
were skipped, 75 stopped by a signal.
"""

import argparse
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.claims import (
    LEDGER,
    UNDECIDED,
    Claim,
    Evidence,
    Ledger,
    LedgerError,
    Verdict,
    Wanted,
    judge,
    load_ledger,
)
from common.records import ROOT, SEARCHES, Run, fail, load_roots, load_runs

DIVERGED, BUSY, PREEMPTED = 3, 73, 75  # exit codes of the entrypoints
# What stops the runs, and whether it stays ignored where it is already, as by nohup.
SIGNALS = {signal.SIGTERM: False, signal.SIGINT: False, signal.SIGHUP: True, signal.SIGUSR1: True}
FIRST_FAILURES = 3  # as many without a success: something is wrong with all of them


def main(argv: Sequence[str] | None = None) -> int:
    argv, overrides = split(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description="Make the runs that results/claims.yaml still lacks, in order of worth.",
        epilog="After --: Hydra overrides for every run, such as data.root=data device=cpu.",
    )
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="such as C1 (default: all)")
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help="stop then; the runs save (default: none)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("outputs"),
        metavar="ROOT",
        help="output_root of the runs; logs in ROOT/logs (default: outputs)",
    )
    parser.add_argument(
        "--seeds", metavar="FIRST-LAST", help="such as 1-10 (default: the ledger's)"
    )
    parser.add_argument("--list", action="store_true", help="what each claim needs; run nothing")
    parser.add_argument("--ledger", type=Path, default=LEDGER, metavar="FILE")
    args = parser.parse_args(argv)
    if args.jobs < 1 or (args.budget is not None and args.budget <= 0):
        parser.error("--jobs and --budget need a number above 0")
    try:
        ledger = load_ledger(args.ledger)
        claims = chosen(ledger, args.claims)
        seeds = seed_range(args.seeds)
        campaign = Campaign(ledger, claims, seeds, args.runs, args.jobs, overrides)
        listing = "\n".join(campaign.listing()) if args.list else ""
    except (LedgerError, ValueError) as error:
        fail(str(error))

    for note in campaign.notes():
        print(note, file=sys.stderr)
    if args.list:
        print(listing)
        return 0
    args.runs.mkdir(parents=True, exist_ok=True)
    with open(args.runs / ".run_claims.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"another run_claims.py works in {args.runs}; choose another --runs or wait")
        return campaign.make(args.budget)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments before and after `--`."""
    argv = list(argv)
    if "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def chosen(ledger: Ledger, names: Sequence[str]) -> list[Claim]:
    """The named claims, or all, in order of worth.

    A name that is no claim's own means a group: C2 is C2-text and C2-table, but C4 is not C4-x10.
    """
    known = [claim.id for claim in ledger.claims]
    wanted = set() if names else set(known)
    for name in names:
        found = {name} & set(known) or {one for one in known if one.split("-")[0] == name}
        if not found:
            raise ValueError(f"unknown claim {name!r}; there are {', '.join(known)}")
        wanted |= found
    claims = [claim for claim in ledger.claims if claim.id in wanted]
    return sorted(claims, key=lambda claim: claim.worth)


def seed_range(text: str | None) -> list[int] | None:
    """`1-10` as a list; None as it is."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        raise ValueError(f"--seeds {text!r} is no range such as 1-10")
    seeds = list(range(int(first), int(last or first) + 1))
    if len(seeds) == 0 or seeds[0] < 1:
        raise ValueError(f"--seeds {text!r}: seeds begin at 1; 0 is the lr search's")
    return seeds


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one GPU each; empty on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in found.stdout.splitlines())
    return [str(index) for index in range(count)] if found.returncode == 0 else []


def clock(minutes: float) -> str:
    """Minutes as h:mm."""
    whole = round(minutes)
    return f"{whole // 60}:{whole % 60:02d}"


@dataclass
class Job:
    """A run in progress."""

    wanted: Wanted
    process: subprocess.Popen
    log: Path
    slot: int
    start: float

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.start) / 60


class Campaign:
    """The runs that some claims lack, and the processes that make them."""

    def __init__(
        self,
        ledger: Ledger,
        claims: Sequence[Claim],
        seeds: Sequence[int] | None,
        root: Path,
        jobs: int,
        overrides: Sequence[str],
    ):
        self.ledger, self.claims, self.seeds = ledger, claims, seeds
        self.root, self.jobs, self.overrides = root, jobs, list(overrides)
        self.runs = made(root)
        self.evidence = Evidence(ledger, self.runs)
        self.running: list[Job] = []
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}  # another process has them in hand
        self.finished = 0
        self.around: list[float] = []  # minutes that a run took beyond what it recorded
        self.signals = 0  # received
        self.devices = gpus()
        self.prepared: set[str] = set()  # commands that were run before the first run of a design

    # --- what is missing

    def notes(self) -> list[str]:
        """What is said of the runs that are there: which are not counted, and which are wrong."""
        ignored = self.evidence.says_ignored()
        return [*([ignored] if ignored else []), *(f"refused: {what}" for what in self.faults())]

    def faults(self) -> list[str]:
        """What is wrong with the lr searches of the claims; what waits for them is not made."""
        found = (self.evidence.faults(claim) for claim in self.claims if claim.cells)
        return list(dict.fromkeys(fault for faults in found for fault in faults))

    def missing(self) -> dict[str, Wanted]:
        """Every run that is not there, each once, in order of worth."""
        found: dict[str, Wanted] = {}
        for claim in self.claims:
            for wanted in self.evidence.wanted(claim, self.seeds):
                first = self.evidence.pretraining(wanted)
                if first and self.checkpoint(first) is None:  # records in results/ have none
                    found.setdefault(first.name, first)
                found.setdefault(wanted.name, wanted)
        return found

    def checkpoint(self, wanted: Wanted) -> Path | None:
        """That of a run which has ended; None if it is not there."""
        cell = self.evidence.cell(wanted.design, wanted.arm.name, wanted.setting)
        paths = [self.root / run.name / "checkpoint.pt" for run in cell.get(wanted.seed, [])]
        return next((path for path in paths if path.is_file()), None)

    def next(self, missing: dict[str, Wanted]) -> Wanted | None:
        """The most worthy run that can start: its lr is known, its pretraining is done."""
        busy = {job.wanted.name for job in self.running} | set(self.failed) | set(self.skipped)
        for name, wanted in missing.items():
            first = self.evidence.pretraining(wanted)
            if first and self.checkpoint(first) is None:
                continue
            if name not in busy and (wanted.lr is not None or wanted.design.search is None):
                return wanted
        return None

    def left(self, missing: dict[str, Wanted]) -> float:
        """Minutes until everything is made, by the estimates."""
        start = sum(self.around) / max(1, len(self.around))
        foreseen = {n: self.evidence.minutes(w) + start for n, w in missing.items()}
        gone = self.failed.keys() | self.skipped.keys()
        total = sum(minutes for name, minutes in foreseen.items() if name not in gone)
        done = sum(min(job.minutes, foreseen.get(job.wanted.name, 0.0)) for job in self.running)
        return max(0.0, total - done) / self.jobs

    def listing(self) -> Iterator[str]:
        """A line for each claim: what it needs by itself, and beyond those above it."""
        verdicts = {verdict.claim.id: verdict for verdict in judge(self.ledger, self.runs)}
        head = f"{'claim':<9} {'runs':>5} {'cost':>7} {'beyond':>7}  {'now':<26} {'so long':>7}"
        yield f"{head}  statement"
        known: set[str] = set()
        total = 0.0
        for claim in self.claims:
            design = self.ledger.design_of(claim)
            if design.experiment is None:
                now = state(verdicts[claim.id])
                yield f"{claim.id:<9} {'':>21}  {now:<26} {'':>7}  {claim.claim}"
                if design.command and verdicts[claim.id].reason:
                    yield f"{'':<9} make it with: {design.command}"
                continue
            wanted = self.evidence.wanted(claim, self.seeds)
            cost = sum(map(self.evidence.minutes, wanted))
            more = sum(self.evidence.minutes(w) for w in wanted if w.name not in known)
            known |= {w.name for w in wanted}
            total += more
            text = f"{claim.id:<9} {len(wanted):>5} {clock(cost):>7} {clock(more):>7}"
            now, long = state(verdicts[claim.id]), self.to_decide(verdicts[claim.id])
            yield f"{text}  {now:<26} {clock(long) if long else '':>7}  {claim.claim}"
        yield ""
        yield (
            f"{len(known)} runs, {clock(total)} h of one job"
            + (f", {clock(total / self.jobs)} h of {self.jobs}" if self.jobs > 1 else "")
            + "; cost: hours of what is missing; beyond: of that, what no claim above needs too; "
            "so long: hours of the seeds that would decide, which --seeds 1-N makes"
        )

    def to_decide(self, verdict: Verdict) -> float:
        """Minutes of what is missing of the seeds that would decide a claim."""
        seeds = range(1, (verdict.needed or 0) + 1)
        wanted = self.evidence.wanted(verdict.claim, seeds) if seeds else []
        return sum(map(self.evidence.minutes, wanted))

    # --- making it

    def command(self, wanted: Wanted) -> list[str]:
        script, *options = wanted.arguments
        root = self.root / SEARCHES if wanted.search else self.root
        options += [f"output_root={quoted(str(root))}"]
        some = {key for design in self.ledger.designs.values() for key in design.keys}
        foreign = tuple(f"{key}=" for key in some - set(wanted.design.keys))
        options += [option for option in self.overrides if not option.startswith(foreign)]
        first = self.evidence.pretraining(wanted)
        if first:
            options += ["init=checkpoint", f"init.path={quoted(str(self.checkpoint(first)))}"]
        program = script.split() if script.startswith("-m ") else [str(ROOT / script)]
        return [sys.executable, *program, *options]

    def make(self, budget: float | None) -> int:
        """Make what is missing, `jobs` at a time; return the exit code."""
        (self.root / "logs").mkdir(exist_ok=True)
        heeded = [
            number
            for number, nohup in SIGNALS.items()
            if not (nohup and signal.getsignal(number) is signal.SIG_IGN)
        ]
        handlers = {number: signal.signal(number, self.on_signal) for number in heeded}
        try:
            return self.loop(None if budget is None else time.monotonic() + 60 * budget)
        finally:
            for job in self.running:  # an error of ours: leave no process behind
                job.process.terminate()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def loop(self, deadline: float | None) -> int:
        missing = self.missing()
        self.say(f"{len(missing)} runs to make", missing)
        stopping = False
        while True:
            stop = self.signals > 0 or (deadline is not None and time.monotonic() >= deadline)
            if stop and not stopping:
                self.say("a signal has come" if self.signals else "the budget is used", missing)
                for job in self.running:  # SIGINT would end a run without a checkpoint
                    job.process.terminate()
            stopping = stopping or stop
            while not stopping and len(self.running) < self.jobs:
                wanted = self.next(missing)
                if wanted is None:
                    break
                self.start(wanted)
            if not self.running:
                break
            ended = [job for job in self.running if job.process.poll() is not None]
            for job in ended:
                self.running.remove(job)
                self.end(job, stopping)
                missing = self.missing()
                self.say(self.result(job), missing)
            if not self.finished and len(self.failed) >= FIRST_FAILURES:
                stopping = True
            if not ended:
                time.sleep(0.1)
        for what, runs in (("skipped", self.skipped), ("failed", self.failed)):
            for name, reason in runs.items():
                print(f"{what}: {name}, {reason}", file=sys.stderr)
        if self.failed or self.faults():
            return 1
        return PREEMPTED if self.signals else BUSY if self.skipped else 0

    def start(self, wanted: Wanted) -> None:
        slots = {job.slot for job in self.running}
        slot = next(slot for slot in range(self.jobs) if slot not in slots)
        environment = dict(os.environ)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        if self.jobs > 1:  # several runs on a CPU must not fight for the cores
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        log = self.root / "logs" / f"{wanted.run_name}_seed{wanted.seed}.log"
        command = self.command(wanted)
        prepare = wanted.design.prepare
        with open(log, "a") as file:
            if prepare and prepare not in self.prepared:
                self.prepared.add(prepare)
                subprocess.run(
                    [sys.executable, "-m", *shlex.split(prepare)],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment | {"PYTHONPATH": str(ROOT)},
                )  # where it fails the run says what is missing
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the runs through us alone
            )
        self.running.append(Job(wanted, process, log, slot, time.monotonic()))

    def end(self, job: Job, stopping: bool) -> None:
        """Take in the record of a run that has ended, or note why there is none."""
        code, name = job.process.returncode, job.wanted.name
        if code in (0, DIVERGED):
            for record in self.root.rglob(f"{name}/summary.json"):
                for run in load_runs(record.parent, task=None):
                    self.runs.append(run)
                    self.around.append(job.minutes - (run.summary.get("wall_s") or 0) / 60)
            self.evidence = Evidence(self.ledger, self.runs)
            if name not in self.missing():
                self.finished += 1
                return
            self.failed[name] = f"its record is not the one the ledger asks for; see {job.log}"
        elif code == BUSY:
            self.skipped[name] = last_line(job.log)
        elif not (stopping and code in (PREEMPTED, -signal.SIGTERM, 128 + signal.SIGTERM)):
            self.failed[name] = f"exit code {code}, {job.log}: {last_line(job.log)}"

    def result(self, job: Job) -> str:
        text = f"{job.wanted.name} "
        if job.wanted.name in self.failed:
            return text + "failed"
        if job.wanted.name in self.skipped:
            return text + "skipped: another process has it in hand"
        if job.process.returncode == DIVERGED:
            return text + "diverged"
        if job.process.returncode:
            return text + "stopped"
        return text + f"in {job.minutes:.1f} min"

    def on_signal(self, number: int, frame: object) -> None:
        self.signals += 1
        if self.signals > 1:  # a second one is meant
            for job in self.running:
                job.process.kill()

    def say(self, what: str, missing: dict[str, Wanted]) -> None:
        line = f"{what}; {self.finished} made, {len(missing)} to go, about "
        with suppress(OSError):  # a terminal that is gone must not end the runs unsaved
            print(f"{line}{clock(self.left(missing))} h left", flush=True)


def state(verdict: Verdict) -> str:
    """A claim's verdict in a few words."""
    if verdict.needed:
        return f"undecided, needs {verdict.needed} seeds"
    return verdict.verdict if verdict.verdict != UNDECIDED else verdict.reason.split(",")[0]


def made(root: Path) -> list[Run]:
    """Runs of the campaign and those kept in results/; one in both counts once."""
    return load_roots(folder for folder in (ROOT / "results", root) if folder.is_dir())


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def quoted(path: str) -> str:
    """A path as Hydra's command line takes it: in single quotes, nothing interpolated."""
    path = re.sub(r"(\\*)(?='|$)", r"\1\1", path).replace("'", "\\'").replace("${", "\\${")
    return f"'{path}'"


if __name__ == "__main__":
    sys.exit(main())

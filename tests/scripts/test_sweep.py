"""scripts/sweep_settings.sh and scripts/launch.sh, as a user calls them."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workers import config

ROOT = Path(__file__).resolve().parents[2]
SWEEP, LAUNCH = ROOT / "scripts/sweep_settings.sh", ROOT / "scripts/launch.sh"
TINY = ["device=cpu", "data.train_images=32", "schedule.epochs=1"]
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


def call(script, *arguments, cwd=None, env=(), timeout=280):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | dict(env)
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def hear_interrupts():
    """For a child: a shell's background commands ignore SIGINT, and bash can then not trap it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def dry(*arguments, **options):
    """The commands of a dry run, split as a shell would."""
    result = call(SWEEP, "--dry-run", *arguments, **options)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def value(command, key):
    return [word.split("=", 1)[1] for word in command if word.startswith(f"{key}=")][-1]


def test_dry_run_of_the_whole_table():
    """Three norms at the nine settings of Table 4.1, and nothing is run."""
    commands = dry()
    assert len(commands) == 27
    cells = {
        (value(c, "norm"), value(c, "setting.gpus"), value(c, "setting.images_per_gpu"))
        for c in commands
    }
    assert len(cells) == 27
    assert ("sn_in_ln", "8", "1") in cells and ("sn", "8", "1") not in cells
    assert {norm for norm, _, images in cells if images != "1"} == {"bn", "gn", "sn"}
    for command in commands:
        assert Path(command[0]).exists() and Path(command[1]) == ROOT / "train_imagenet.py"


def test_sn_at_one_image_is_sn_in_ln_and_says_so():
    one, two = dry("--norms", "sn", "--settings", "4x1 4x2")
    assert value(one, "norm") == "sn_in_ln" and "IN and LN only" in value(one, "note")
    assert value(two, "norm") == "sn" and not [word for word in two if word.startswith("note=")]
    (bn,) = dry("--norms", "bn", "--settings", "8x1")
    assert value(bn, "norm") == "bn"


def test_no_run_comes_twice():
    """sn and sn_in_ln are the same run at one image per GPU: at a time they would collide."""
    commands = dry("--norms", "sn sn_in_ln", "--settings", "8x1 8x2", "--seeds", "0")
    runs = [
        tuple(value(c, key) for key in ("norm", "setting.gpus", "setting.images_per_gpu", "seed"))
        for c in commands
    ]
    assert len(set(runs)) == len(runs) == 3


def test_overrides_and_seeds_are_passed_on():
    commands = dry(
        *("--norms", "bn gn", "--settings", "2x3", "--seeds", "4 5", "--output", "some where"),
        *("--", "schedule.epochs=2", "note='two words'", "data=cifar10"),
    )
    assert [value(c, "seed") for c in commands] == ["4", "4", "5", "5"]
    for command in commands:
        assert config(*command[2:-3]).output_root == "some where"
        assert command[-3:] == ["schedule.epochs=2", "note='two words'", "data=cifar10"]
        assert value(command, "setting.gpus") == "2"
        assert value(command, "setting.images_per_gpu") == "3"


@pytest.mark.parametrize(
    "folder",
    ["/a (b), c", "/é", "/a=b", "/it's", "/a[0]{1}", "/a;b#c", "/a\\b", "/a\\'b", "/a${x}\\"],
)
def test_output_folder_of_any_name(folder):
    """Characters that mean something to Hydra are quoted."""
    (command,) = dry("--norms", "bn", "--settings", "8x2", "--output", folder)
    assert config(*command[2:]).output_root == folder


def test_processes():
    """As many as asked for, but no more than the setting has GPUs."""
    one, eight = dry("--norms", "bn", "--settings", "1x16 8x2", "--processes", "4")
    assert "launch.sh" not in " ".join(one)
    assert eight[:3] == [str(LAUNCH), "4", str(ROOT / "train_imagenet.py")]


def test_dry_run_writes_nothing(tmp_path):
    dry("--output", "there", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--norms", "bn xy"],
            ["unknown norm 'xy'", "bn brn frozen_bn gn in ln none sn sn_in_ln ssn sync_bn sync_sn"],
        ),
        (["--norms", "../norm/bn"], ["unknown norm '../norm/bn'"]),
        (["--settings", "8x32 8-4"], ["'8-4'", "8x32"]),
        (["--settings", "0x4"], ["'0x4'"]),
        (["--settings", "8x"], ["'8x'"]),
        (["--seeds", "0 one"], ["'one'"]),
        (["--seeds", "-1"], ["'-1'"]),
        (["--jobs", "0"], ["'0'"]),
        (["--processes", "two"], ["'two'"]),
        (["--norms"], ["--norms needs a value"]),
        (["schedule.epochs=1"], ["schedule.epochs=1", "after --"]),
        (["--sedes", "1"], ["--sedes"]),
        (["--norms", "", "--settings", "8x1"], ["norm"]),
        (["--settings", ""], ["setting"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_bad_usage(arguments, words, tmp_path):
    """Exit code 2, the usage and what was wrong; nothing is started or made."""
    result = call(SWEEP, "--output", tmp_path / "out", *arguments)
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert "--norms N" in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("sweep_settings.sh: ")
    for word in words:
        assert word in last
    assert not (tmp_path / "out").exists()


def test_help_is_the_head_of_the_file():
    result = call(SWEEP, "--help")
    text = result.stderr + result.stdout
    for option in ("--norms", "--settings", "--seeds", "--output", "--processes", "--jobs"):
        assert option in text
    assert "Exit code" in text and "set -euo" not in text


def summaries(output):
    return {
        "/".join(path.parts[-3:-1]): json.loads(path.read_text())
        for path in output.rglob("summary.json")
    }


def test_sweep_skips_what_has_finished(tmp_path):
    """One run; then two norms, two at a time: only the new one is trained."""
    output = tmp_path / "a sweep"
    arguments = ["--settings", "2x8", "--output", output, "--norms"]
    first = call(SWEEP, *arguments, "gn", "--", *TINY, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert set(summaries(output)) == {"gn_2x8/seed0"}
    log = output / "logs" / "gn_2x8_seed0.log"
    assert "epoch 1/1" in log.read_text() and "epoch 1/1" in first.stdout
    before = {path: path.read_bytes() for path in output.rglob("summary.json")}
    second = call(SWEEP, *arguments, "gn bn", "--jobs", 2, "--", *TINY, cwd=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert set(summaries(output)) == {"bn_2x8/seed0", "gn_2x8/seed0"}
    assert all(s["status"] == "finished" for s in summaries(output).values())
    assert all(path.read_bytes() == content for path, content in before.items())
    assert second.stdout.count("ended already") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a sweep"]


@pytest.mark.parametrize("processes, code", [(1, 73), (2, 1)])
def test_a_run_in_other_hands_is_skipped(processes, code, tmp_path):
    """With a python that finds bn's folder in use; torchrun makes a 1 of its exit code."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *norm=bn*) '
        f"echo train_imagenet.py: out is in use by process 7; exit {code};; esac\n"
    )
    fake.chmod(0o755)
    log = tmp_path / "out/logs/bn_2x8_seed0.log"
    log.parent.mkdir(parents=True)
    log.write_text("of the sweep that has it; train_imagenet.py: loss is not finite\n")
    arguments = ("--norms", "bn gn", "--settings", "2x8", "--output", tmp_path / "out")
    result = call(SWEEP, *arguments, "--processes", processes, env={"PYTHON": str(fake)})
    assert result.returncode == 73, result.stderr
    assert "== bn_2x8_seed0 skipped: another process has it in hand" in result.stdout
    assert "bn_2x8_seed0" in result.stderr and "gn_2x8" not in result.stderr
    assert log.read_text().startswith("of the sweep that has it")


@pytest.mark.parametrize("number, group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_signal_ends_the_runs_and_then_the_sweep(jobs, number, group, tmp_path):
    """As Ctrl-C does, and a kill: runs are told to save, waited for, and none begins any more."""
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\ntrap 'exit 130' INT\n"
        f"trap 'sleep 0.3; echo saved; echo x >> {tmp_path}/saved; exit 75' TERM\n"
        f"echo $$ >> {tmp_path}/begun\nwhile :; do sleep 0.05; done\n"
    )
    fake.chmod(0o755)
    arguments = ["--norms", "bn gn sn", "--settings", "2x8", "--output", tmp_path / "out"]
    process = subprocess.Popen(
        ["bash", str(SWEEP), *map(str, arguments), "--jobs", str(jobs)],
        env=os.environ | {"PYTHON": str(fake)},
        start_new_session=True,
        preexec_fn=hear_interrupts,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begun, deadline = tmp_path / "begun", time.monotonic() + 60
    while len(begun.read_text().split() if begun.exists() else ()) < jobs:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    try:
        (os.killpg if group else os.kill)(process.pid, number)
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}; the same line goes on" in said
        assert said.count("saved") == jobs == len((tmp_path / "saved").read_text().split())
        assert len(begun.read_text().split()) == jobs
    finally:
        process.kill()  # first: it would begin further runs
        for pid in map(int, begun.read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_steps_all_skipped_of_several_processes_are_a_divergence(tmp_path):
    """Of which torchrun tells the exit code 1 alone."""
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\necho 'train_imagenet.py (rank 0): every step of epoch 2 was skipped'; exit 1\n"
    )
    fake.chmod(0o755)
    arguments = ("--norms", "bn", "--settings", "2x8", "--output", tmp_path / "out")
    result = call(SWEEP, *arguments, "--processes", 2, env={"PYTHON": str(fake)})
    assert result.returncode == 0 and "bn_2x8_seed0 diverged" in result.stdout, result.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_runs_at_a_time_have_gpus_of_their_own(processes, tmp_path):
    """Six runs, three at a time on as many GPUs as they need, in jobs that meet one another."""
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\ngpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr , " ")\nfor gpu in $gpus; do mkdir '
        f"{tmp_path}/$gpu || exit 9; done\nsleep 0.3\nfor gpu in $gpus; do rmdir {tmp_path}/$gpu;"
        f' echo "$gpu" >> {tmp_path}/used; done\n'
    )
    fake.chmod(0o755)
    gpus = [f"g{number}" for number in range(3 * processes)]
    result = call(
        SWEEP,
        *("--norms", "bn gn sn", "--settings", "2x8", "--seeds", "0 1", "--jobs", 3),
        *("--processes", processes, "--output", tmp_path / "out"),
        env={"PYTHON": str(fake), "CUDA_VISIBLE_DEVICES": ",".join(gpus)},
    )
    assert result.returncode == 0, result.stderr
    used = (tmp_path / "used").read_text().split()
    assert set(used) == set(gpus) and len(used) == 6 * processes


def fakes(folder: Path, commands: dict[str, str]) -> dict[str, str]:
    """The environment of a Slurm job in `folder` with these commands; none of Slurm's own."""
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    env |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "h"}
    return env | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("tries, code", [(3, 0), (2, 73)])
def test_slurm_waits_for_the_job_before(tries, code, tmp_path):
    """srun finds the folder in use twice: no requeue, another try; then the end, or code 73."""
    commands = {
        "srun": 'echo x >> tries; [ "$(wc -l < tries)" -gt 2 ] || exit 73',
        "sleep": "true",
        "scontrol": 'echo "$@" >> asked; echo host0',
    }
    env = fakes(tmp_path, commands) | {"SLURM_NTASKS": "1", "TRIES": str(tries)}
    script = ROOT / "scripts/slurm/train.sbatch"
    result = call(script, "train_imagenet.py", cwd=tmp_path, env=env)
    assert result.returncode == code, result.stderr
    assert (tmp_path / "tries").read_text().count("x") == tries
    assert "requeue" not in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("per_node, local", [("4(x2)", "4"), ("3,1", "3"), ("", "1")])
def test_slurm_tasks_know_their_place(per_node, local, tmp_path):
    """What srun tells each task becomes what torch reads."""
    names = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE"
    commands = {"srun": '"$@"', "scontrol": "echo host0"}
    commands["fake"] = f'echo {names} "$@" > {tmp_path}/said'
    env = fakes(tmp_path, commands) | {"SLURM_NTASKS": "8", "PYTHON": str(tmp_path / "fake")}
    env |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": per_node}
    script = ROOT / "scripts/slurm/train.sbatch"
    result = call(script, "enas.search", "seed=1", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "said").read_text().split() == f"5 1 8 {local} -m enas.search seed=1".split()


@pytest.mark.parametrize(
    "given, words, size",
    [
        ({"SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "6"}, ["--cpus-per-task=6", "bash"], "8"),
        ({"SLURM_JOB_NUM_NODES": "2"}, ["bash"], "2"),
        ({}, ["bash"], "1"),
    ],
)
def test_slurm_tasks_have_their_cores_and_number(given, words, size, tmp_path):
    """srun does not take sbatch's --cpus-per-task; without --ntasks it starts a task per node."""
    commands = {
        "srun": f'printf "%s\\n" "$WORLD_SIZE" "$@" > {tmp_path}/said',
        "scontrol": "echo host0",
    }
    env = fakes(tmp_path, commands) | given
    script = ROOT / "scripts/slurm/train.sbatch"
    result = call(script, "train_imagenet.py", "note='two words'", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    found = (tmp_path / "said").read_text().splitlines()
    assert found[: len(words) + 1] == [size, *words]
    assert found[-2:] == ["train_imagenet.py", "note='two words'"]


@pytest.mark.slow
def test_sweep_goes_on_after_a_failure(tmp_path):
    """A failed run does not stop the others; exit code 1 and its log are named at the end.

    A diverged one is a result.
    """
    output = tmp_path / "out"
    (output / "imagenet/digits_resnet20/bn_1x8").mkdir(parents=True)
    (output / "imagenet/digits_resnet20/bn_1x8/seed0").write_text("a file in the way")
    result = call(
        SWEEP,
        *("--norms", "bn gn", "--settings", "1x8", "--output", output),
        *("--", "device=cpu", "data.train_images=16", "schedule.epochs=4"),
        *("schedule.lr_per_256=1e4", "optimizer.weight_decay=1e4"),  # weights * 10^6 a step
    )
    assert result.returncode == 1
    assert "bn_1x8_seed0 (exit code 2" in result.stderr and "bn_1x8_seed0.log" in result.stderr
    assert "gn_1x8" not in result.stderr and "gn_1x8_seed0 diverged" in result.stdout
    assert summaries(output)["gn_1x8/seed0"]["status"] == "diverged"


@pytest.mark.slow
def test_interrupted_sweep_continues(tmp_path):
    """Interrupted in mid-run, no process is left; the same line again finishes with one record."""
    output = tmp_path / "out"
    arguments = ["--norms", "bn gn", "--settings", "2x4", "--output", output, "--jobs", "2"]
    overrides = ["device=cpu", "data.train_images=64", "schedule.epochs=5", "checkpoint_steps=2"]
    process = subprocess.Popen(
        ["bash", str(SWEEP), *map(str, arguments), "--", *overrides],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    deadline = time.monotonic() + 120
    while not any(output.rglob("checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    assert process.returncode != 0
    time.sleep(1)
    alive = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(output) not in alive
    again = call(SWEEP, *arguments, "--", *overrides)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {s["epochs"] for s in summaries(output).values()} == {5}
    assert len(summaries(output)) == 2


@pytest.mark.slow
def test_diverged_run_of_several_processes_is_a_result(tmp_path):
    """torchrun turns every exit code into 1: the sweep must still see that the run diverged."""
    result = call(
        SWEEP,
        *("--norms", "gn", "--settings", "2x4", "--output", tmp_path, "--processes", "2"),
        *("--", "device=cpu", "data.train_images=16", "schedule.epochs=4"),
        *("schedule.lr_per_256=1e4", "optimizer.weight_decay=1e4"),  # weights * 10^6 a step
    )
    assert summaries(tmp_path)["gn_2x4/seed0"]["status"] == "diverged"
    assert result.returncode == 0, result.stderr


# --- launch.sh


@pytest.mark.parametrize(
    "arguments", [[], ["8"], ["eight", "train_imagenet.py"], ["0", "x.py"], ["-1", "x.py"]]
)
def test_launch_usage(arguments):
    result = call(LAUNCH, *arguments)
    assert result.returncode == 2
    assert "usage: scripts/launch.sh PROCESSES_PER_MACHINE SCRIPT" in result.stderr
    assert "NNODES=2" in result.stderr


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_launch_on_several_machines_needs_to_know_where(missing):
    env = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "first-host"}
    env.pop(missing)
    result = call(LAUNCH, "8", "train_imagenet.py", env=env)
    assert result.returncode != 0 and missing in result.stderr


@pytest.mark.parametrize("machines", ["two", "0", "2;ls"])
def test_launch_on_a_number_of_machines_that_is_none(machines):
    result = call(LAUNCH, "1", "train_imagenet.py", env={"NNODES": machines})
    assert result.returncode == 2 and f"NNODES={machines}" in result.stderr


def test_launch_builds_the_torchrun_line(tmp_path):
    """With a python that prints its arguments."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    env = {"PYTHON": str(fake)}
    words = call(LAUNCH, "8", "x.py", "a=1", "b='two words'", env=env).stdout.splitlines()
    assert words[:2] == ["-m", "torch.distributed.run"]
    assert words[-3:] == ["x.py", "a=1", "b='two words'"]
    assert "--standalone" in words and words[words.index("--nproc-per-node") + 1] == "8"
    nodes = env | {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "h", "MAX_RESTARTS": "3"}
    line = " ".join(call(LAUNCH, "4", "x.py", env=nodes).stdout.split())
    for part in ("--nnodes 2", "--node-rank 1", "--master-addr h", "--max-restarts 3"):
        assert part in line
    assert not re.search("--standalone", line)


@pytest.mark.slow
def test_launch_restarts_after_all_processes_failed(tmp_path):
    """MAX_RESTARTS: those of the next attempt meet one another, not the addresses of the last.

    (That a run resumes then, from whatever moment: tests/run/test_faults.py.)
    """
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch.distributed as dist\n"
        "from sn.training.run import distributed\n"
        "rank = distributed.start('cpu', timeout_minutes=1).rank\n"
        "dist.barrier()\n"
        "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "print(f'rank {rank} in attempt {attempt}')\n"
        "sys.exit(attempt < 2)\n"
    )
    result = call(LAUNCH, 2, script, env={"MAX_RESTARTS": "2"}, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert all(f"rank {rank} in attempt 2" in result.stdout for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_launch_passes_on_signals(number, tmp_path):
    """Its processes get the signal, are waited for, and none is left."""
    script = tmp_path / "waiting.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(0.5)\n"
        "    pathlib.Path(f'stopped{rank}').touch()\n"
        "    sys.exit(75)\n"
        "rank = os.environ['RANK']\n"
        f"signal.signal({int(number)}, stop)\n"
        "pathlib.Path(f'pid{rank}.tmp').write_text(str(os.getpid()))\n"
        "os.replace(f'pid{rank}.tmp', f'pid{rank}')\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        ["bash", str(LAUNCH), "2", str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    pids, deadline = [tmp_path / "pid0", tmp_path / "pid1"], time.monotonic() + 60
    while not all(path.exists() for path in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode > 0
        assert all((tmp_path / f"stopped{rank}").exists() for rank in (0, 1))
    finally:
        for path in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)

"""Every entrypoint under fault: killed, told to stop, hanging, on several machines."""

import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from faults import (
    LONG,
    ROOT,
    RUNS,
    assert_same,
    command,
    kill_again_and_again,
    measure,
    newest,
    outcome,
    ranks,
    readable,
    report,
    run,
    start,
    user_environment,
    wait_for,
)

DISTRIBUTED = [name for name in RUNS if name in ("imagenet", "detection")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run of an entrypoint leaves when nothing happens to it."""

    @functools.cache
    def of(name, processes=1):
        folder = tmp_path_factory.mktemp("whole") / "run"
        if processes == 1:
            run(*RUNS[name], f"output_dir={folder}")
        else:
            launcher = launch(folder.parent, processes, *distributed_run(name, folder))
            _, errors = launcher.communicate(timeout=300)
            assert launcher.returncode == 0, errors
        return outcome(folder)

    return of


def kill_runs(name, tmp_path, expected, kills, seed):
    """Kill runs until `kills` kills are reached; each must end like the undisturbed one."""
    module, *overrides = RUNS[name]
    rng, done, ended = random.Random(seed), 0, 0
    while done < kills:
        folder = tmp_path / f"killed{ended}"
        done += kill_again_and_again((module, *overrides), folder, kills - done, rng)
        assert_same(outcome(folder), expected, f"{name}, run {ended}, after {done} kills")
        ended += 1
        shutil.rmtree(folder)
    report(test="sigkill", entrypoint=name, kills=done, runs_equal_to_unbroken=ended)


@pytest.mark.parametrize("name", RUNS)
def test_stopped_moved_killed_and_run_again(name, tmp_path, undisturbed):
    """The same command ends with the same bits, whatever came between.

    SIGTERM: saved after the step, exit code 75. The folder is moved. SIGKILL in mid-run, at no
    chosen place: every file is whole.
    """
    module, *overrides = RUNS[name]
    stopped = tmp_path / "first place"
    # nothing is saved but what the signal asks for
    words = (*overrides, "checkpoint_steps=0", f"output_dir='{stopped}'")
    process = start(module, *words, errors=tmp_path / "errors")
    wait_for(lambda: (stopped / "config.yaml").exists())
    os.kill(process.pid, signal.SIGTERM)
    process.join(180)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 75, errors
    assert "stopped by a signal" in errors and "Traceback" not in errors
    saved = newest(stopped)
    assert saved and not (stopped / "summary.json").exists()
    for attempt in range(5):
        folder = tmp_path / f"it's; $(another) place{attempt}"
        shutil.copytree(stopped, folder)  # keeps times
        quoted = str(folder).replace("'", r"\'")
        process = start(module, *overrides, f"output_dir='{quoted}'")
        wait_for(lambda: newest(folder) != saved)  # noqa: B023
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break  # else it has ended before
    assert not (folder / "summary.json").exists()
    readable(folder)
    run(module, *overrides, f"output_dir='{quoted}'")
    assert_same(outcome(folder), undisturbed(name), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments(name, tmp_path, undisturbed):
    kill_runs(name, tmp_path, undisturbed(name), kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_fifty_times(name, tmp_path, undisturbed):
    kill_runs(name, tmp_path, undisturbed(name), kills=50, seed=1)


def launch(tmp_path, processes, *arguments, **variables):
    """scripts/launch.sh, as a user calls it."""
    line = [str(ROOT / "scripts" / "launch.sh"), str(processes), *arguments]
    return subprocess.Popen(
        line,
        cwd=tmp_path,
        env=user_environment(PYTHON=sys.executable, **variables),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def distributed_run(name, folder):
    module, *overrides = RUNS[name]
    return str(ROOT / f"{module}.py"), "device=cpu", *overrides, f"output_dir={folder}"


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_one_rank_dies_and_torchrun_restarts_all(name, tmp_path, undisturbed):
    folder = tmp_path / "killed"
    launcher = launch(tmp_path, 2, *distributed_run(name, folder), MAX_RESTARTS="2")
    pids = ranks(launcher, 2)
    wait_for(lambda: newest(folder))
    subprocess.run(["kill", "-KILL", str(pids[1])], check=True)
    _, errors = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, errors
    assert_same(outcome(folder), undisturbed(name, 2), name)
    report(test="torchrun_restart", entrypoint=name, kills=1, runs_equal_to_unbroken=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_preempted_under_torchrun(name, tmp_path, undisturbed):
    """One rank alone gets the signal; both stop after the same step, and nothing is lost."""
    folder = tmp_path / "stopped"
    launcher = launch(tmp_path, 2, *distributed_run(name, folder))
    pids = ranks(launcher, 2)
    wait_for(lambda: (folder / "config.yaml").exists())
    subprocess.run(["kill", "-TERM", str(pids[1])], check=True)
    _, errors = launcher.communicate(timeout=400)
    assert launcher.returncode != 0 and newest(folder)
    assert "(rank 0): stopped by a signal" in errors and "(rank 1): stopped by a signal" in errors
    again = launch(tmp_path, 2, *distributed_run(name, folder))
    _, errors = again.communicate(timeout=400)
    assert again.returncode == 0, errors
    assert_same(outcome(folder), undisturbed(name, 2), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_machines(name, tmp_path, undisturbed):
    """Two launchers of one process each, as on two nodes, against one launcher of two."""
    folder = tmp_path / "nodes"
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    launchers = [
        launch(tmp_path, 1, *distributed_run(name, folder), NODE_RANK=rank, **nodes)
        for rank in ("0", "1")
    ]
    for launcher in launchers:
        _, errors = launcher.communicate(timeout=400)
        assert launcher.returncode == 0, errors
    assert_same(outcome(folder), undisturbed(name, 2), name)
    report(test="two_launchers", entrypoint=name, runs_equal_to_unbroken=1)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_a_rank_that_hangs_ends_the_run(name, tmp_path):
    """One rank is frozen; the other ends in time and says which rank it is and where."""
    folder = tmp_path / "hangs"
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    module, *overrides = RUNS[name]
    line = command(module, *overrides, f"output_dir={folder}", "timeout_minutes=1")
    processes = [
        subprocess.Popen(
            line,
            cwd=tmp_path,
            env=user_environment(RANK=rank, LOCAL_RANK=rank, **variables),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        wait_for(lambda: newest(folder))
        processes[1].send_signal(signal.SIGSTOP)
        _, errors = processes[0].communicate(timeout=240)
        assert processes[0].returncode == 4, errors
        assert "rank 0: no progress for 1 minutes" in errors and "step" in errors
    finally:
        processes[1].kill()
        processes[1].communicate()
    run(module, *overrides, f"output_dir={folder}")  # its checkpoint is whole


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_left_alone(name, tmp_path):
    module, *overrides = RUNS[name]
    run(module, *overrides, f"output_dir={tmp_path / 'run'}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run(module, *overrides, f"output_dir={tmp_path / 'run'}")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_memory_and_files_do_not_grow(name, tmp_path):
    """2,000 steps after the 500 in which everything has been done once.

    At most 10 MiB more in the last 1,000: sizes of images and RoIs that vary take some to settle.
    """
    module, *overrides = RUNS[name]
    overrides += [*LONG[name], "checkpoint_steps=50", f"output_dir={tmp_path / 'run'}"]
    at, path = (500, 1500, 2500), tmp_path / "measured.json"
    arguments = (module, tuple(overrides), at, path)
    process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
    process.start()
    process.join(1800)
    assert process.exitcode == 0
    seen = json.loads(path.read_text())
    report(test="memory", entrypoint=name, after_steps=seen)
    first, middle, last = (seen[str(count)] for count in at)
    assert last["mib"] - middle["mib"] < 10 and last["mib"] - first["mib"] < 40, seen
    assert last["files"] <= first["files"], seen

"""The command line's common part: exit codes and messages."""

import gc
import importlib
import os
import subprocess
import sys

import hydra
import pytest
import torch
import yaml
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from workers import composed

from sn.training.run import entry
from sn.training.run.config import RunConfig, is_name
from sn.training.run.lock import Busy
from sn.training.run.options import COMMANDS, rows
from sn.training.run.stopping import Preempted

CONFIG = OmegaConf.structured(
    RunConfig(
        seed=0, precision="fp32", channels_last=False, device="cpu", deterministic=False,
        plan=False, log_steps=0, checkpoint_steps=0, keep_checkpoints=2,
        max_skipped_steps=0, timeout_minutes=30.0, note=None, run_name="toy",
        output_root="outputs", output_dir="outputs/toy",
    )
)  # fmt: skip


def ends_with(error, capsys, monkeypatch, **environment):
    monkeypatch.delenv("RANK", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)

    def fail(config):
        raise error

    with pytest.raises(SystemExit) as end:
        entry.run(fail, CONFIG)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, wanted",
    [
        (ValueError("seed=-1; expected more"), 2, "seed=-1; expected more"),
        (FileNotFoundError(2, "No such file", "/x/y"), 2, "/x/y"),
        (TypeError("no option 'x'"), 2, "no option 'x'"),
        (FloatingPointError("loss is not finite"), 3, "loss is not finite"),
        (Preempted("stopped by a signal"), 75, "stopped by a signal"),
        (Busy("out is in use by process 7"), 73, "out is in use by process 7"),
        (KeyboardInterrupt(), 130, "goes on from the last checkpoint"),
        (torch.OutOfMemoryError("CUDA out of memory.\nlong"), 2, "CUDA out of memory. Use setting"),
        (ValueError(), 2, "ValueError"),
        (ValueError("note=" + "x" * 5000), 2, "xxx... (5005 characters)"),
        (ValueError("a b " * 5000), 2, "a b ... (20000 characters)"),
        (OverflowError("math range error"), 2, "too large for this machine: math range error"),
        (MemoryError(), 2, "too large for this machine: MemoryError; choose smaller"),
    ],
)
def test_known_errors_are_one_line(error, code, wanted, capsys, monkeypatch):
    found, text = ends_with(error, capsys, monkeypatch)
    assert found == code and wanted in text and text.count("\n") == 1


def test_what_no_memory_can_hold_is_one_line(capsys, monkeypatch):
    """What torch raises for it on this machine, not what we think it does."""
    for sizes in ([2**50], [2**62, 2**62], [2**70]):
        with pytest.raises((RuntimeError, TypeError)) as error:
            torch.empty(sizes)
        code, text = ends_with(error.value, capsys, monkeypatch)
        assert code == 2 and text.count("\n") == 1 and "too large" in text, text
    with pytest.raises(RuntimeError, match="a bug"):
        entry.run(lambda config: (_ for _ in ()).throw(RuntimeError("a bug")), CONFIG)


def test_rank_and_worker_errors(capsys, monkeypatch):
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent)\n"
        '  File "x.py"\nValueError: cannot read image a.png: truncated'
    )
    _, text = ends_with(error, capsys, monkeypatch, RANK="5")
    assert text.endswith("(rank 5): cannot read image a.png: truncated\n")


def test_bugs_keep_their_traceback(capsys, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        entry.run(lambda config: 1 / 0, CONFIG)
    monkeypatch.setattr(entry, "TRACEBACKS", True)  # HYDRA_FULL_ERROR=1

    def fail(config):
        raise ValueError("all of it")

    with pytest.raises(ValueError, match="all of it"):
        entry.run(fail, CONFIG)


@pytest.mark.parametrize("error, code", [(Preempted("stopped"), 75), (Busy("in use"), 73)])
def test_exit_codes_stay_where_tracebacks_are_shown(error, code, capsys, monkeypatch):
    """A job that was told to stop is requeued by it."""
    monkeypatch.setattr(entry, "TRACEBACKS", True)
    found, text = ends_with(error, capsys, monkeypatch)
    assert found == code and "Traceback" in text and text.endswith(f": {error}\n")


@pytest.mark.parametrize(
    "name",
    ["../up", "a/b", "/abs", "..", ".hidden", "", "a\nb", "a\x00b", "a\\b", None, 3, "x" * 300],
)
def test_names_cannot_leave_their_folder(name):
    assert not is_name(name)


@pytest.mark.parametrize("name", ["sn_8x32", "a b", "$(reboot)", "it's;", "größe"])
def test_odd_names_are_names(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "word, wanted",
    [
        ("--norm", "--norm: keys have no dashes; write norm=..."),
        ("--seed=3", "--seed=3: keys have no dashes; write seed=3"),
        ("--data.root=data", "--data.root=data: keys have no dashes; write data.root=data"),
    ],
)
def test_keys_with_dashes(word, wanted, capsys, monkeypatch):
    importlib.import_module("sn.training.classification.config")
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", "--cfg", "job", "norm=sn"])
    entry.keys_with_dashes("imagenet")
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", word, "sn"])
    with pytest.raises(SystemExit) as end:
        entry.start(lambda: None, "imagenet")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"train_imagenet.py: {wanted}\n"


@pytest.mark.parametrize(
    "word, wanted",
    [
        ("setting=8_32", "setting=8_32: expected one of 1x16, 1x2, 1x32, 1x8, 8x1"),
        ("data=7", "data=7: expected one of cifar10,"),
        ("norm=true", "norm=true: expected one of bkn,"),
        ("norm=null", "norm=null: expected one of bkn,"),
        ("setting=8x2,8_32", "setting=8x2,8_32: expected one of 1x16,"),  # of a sweep
    ],
)
def test_options_picked_by_a_number(word, wanted, capsys, monkeypatch):
    """YAML reads 8_32 as a number, which Hydra takes for no option's name."""
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", "seed=3", word])
    with pytest.raises(SystemExit) as end:
        entry.numbers_as_options()
    assert end.value.code == 2 and wanted in capsys.readouterr().err


def test_none_in_a_sweep_is_left_to_hydra(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", "-m", "experiment=null,imagenet/smoke"])
    entry.numbers_as_options()


def test_a_sweep_may_be_asked_for_between_its_keys(monkeypatch):
    """argparse takes no keys on both sides of an option: it printed its whole usage."""
    found = []
    given = ["train_imagenet.py", "norm=bn", "-m", "seed=1,2", "--info"]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(entry, "_started", False)
    entry.start(lambda: found.extend(sys.argv), "imagenet")
    assert found == ["train_imagenet.py", "-m", "norm=bn", "seed=1,2", "--info"]


def test_a_plugin_of_hydra_that_is_not_there():
    """docs/runs.md needs one."""
    with pytest.raises(MissingConfigException) as error:
        composed("imagenet", "hydra/launcher=submitit_none")
    assert entry.explain(error.value, "imagenet") == (
        "hydra/launcher=submitit_none: no such option; install Hydra's plugin for it by "
        "pip install -e '.[slurm]', or choose basic"
    )


def test_a_setting_that_the_paper_has_not():
    with pytest.raises(MissingConfigException) as error:
        composed("imagenet", "setting=3x2")
    text = entry.explain(error.value, "imagenet")
    assert text.startswith("setting=3x2: no such option; choose one of 1x16, ")
    keys = text.rpartition(" or ")[2].split()
    setting = composed("imagenet", *keys).setting
    assert (setting.gpus, setting.images_per_gpu) == (3, 2)


def test_deterministic_is_applied():
    try:
        entry.prepare(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
    finally:
        entry.prepare(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


@pytest.mark.parametrize(
    "error",
    [RecursionError("maximum depth"), yaml.YAMLError("line 3"), OSError(36, "File name too long")],
)
def test_a_config_file_that_cannot_be_read(error, capsys, monkeypatch):
    """One that refers to itself has no end. Once a run has begun, it would be a bug."""

    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["train_imagenet.py"])
    monkeypatch.setattr(entry, "_begun", False)
    with pytest.raises(SystemExit) as end:
        entry.start(main, "imagenet")
    assert end.value.code == 2 and "cannot be read: " in capsys.readouterr().err
    monkeypatch.setattr(entry, "_begun", True)
    with pytest.raises(type(error)):
        entry.start(main, "imagenet")


def test_a_file_that_hydra_cannot_write(capsys, monkeypatch):
    """Such as a sweep's multirun.yaml in a folder of others; it is none of the config."""

    def main():
        raise PermissionError(13, "Permission denied", "multirun.yaml")

    monkeypatch.setattr(sys, "argv", ["train_imagenet.py"])
    monkeypatch.setattr(entry, "_begun", False)
    with pytest.raises(SystemExit) as end:
        entry.start(main, "imagenet")
    text = capsys.readouterr().err
    assert end.value.code == 2
    assert text == "train_imagenet.py: [Errno 13] Permission denied: 'multirun.yaml'\n"


@pytest.mark.parametrize("content", [b"a: &x {b: *x}", b"a: \xff", b"a: [", b"a: 1\na: 2"])
def test_a_config_file_that_cannot_be_read_is_named(content, tmp_path, capsys, monkeypatch):
    """Read by Hydra itself."""
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)

    @hydra.main(version_base="1.3", config_path=str(tmp_path), config_name="mine")
    def main(cfg):
        raise AssertionError("was read")

    monkeypatch.setattr(sys, "argv", ["train_imagenet.py"])
    monkeypatch.setattr(entry, "_begun", False)
    with pytest.raises(SystemExit) as end:
        entry.start(main, "imagenet")
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert f"{path} cannot be read: " in text and text.count("\n") == 1


@pytest.mark.parametrize(
    "root, own, other, offered",
    [
        ("detection", "data=coco", "data=digits", "digits_coco, coco"),
        ("detection", "parts=gn", "schedule=cosine", "detection_short, detection_1x"),
        ("imagenet", "init=checkpoint", "data=coco", "digits, cifar10"),
        ("enas", "experiment=enas/smoke", "experiment=imagenet/smoke", "enas/cifar10_proxy"),
        ("imagenet", "norm=bn,gn", "experiment=detection/c4_bn", "imagenet/brn_8x4"),
        ("darts", "data=cifar10", "data=imagenet", "digits, cifar10\n"),
    ],
)
def test_options_of_other_tasks_are_refused(root, own, other, offered, capsys, monkeypatch):
    for schemas in ("sn.training.classification", "sn.training.detection", "enas"):
        importlib.import_module(f"{schemas}.config")
    monkeypatch.setattr(sys, "argv", ["x.py", own, "experiment=mine", "schedule.epochs=2"])
    entry.options_of_others(root)
    monkeypatch.setattr(sys, "argv", ["x.py", own, other])
    with pytest.raises(SystemExit) as end:
        entry.options_of_others(root)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert f"{other} is not for {COMMANDS[root]}; choose one of {offered}" in told


@pytest.mark.parametrize(
    "root, word, belongs",
    [
        ("imagenet", "parts=sn", "train_detection.py; train_imagenet.py has model, norm, init,"),
        ("detection", "norm=gn", "train_imagenet.py, style_transfer.py, python -m enas.darts;"),
        ("nasbench201", "+data=digits", "train_imagenet.py, train_detection.py, python -m"),
    ],
)
def test_groups_of_other_tasks_are_refused(root, word, belongs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", word])
    with pytest.raises(SystemExit) as end:
        entry.options_of_others(root)
    group = word.lstrip("+").partition("=")[0]
    assert end.value.code == 2
    assert f"{word}: the group {group} belongs to {belongs}" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["a" * 300 + "=1", "norm=" + "a" * 300, "b" * 5000 + "=c"])
def test_a_word_too_long_for_a_path_is_left_to_hydra(word, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", word])
    entry.numbers_as_options()
    entry.options_of_others("imagenet")


def test_comments_of_one_option_carry_its_name():
    importlib.import_module("sn.training.classification.config")
    said = {row.key: row.comment for row in rows("imagenet")}
    assert said["data.workers"] == "held in memory (cifar10, digit_crops)"
    assert said["data.image_size"].endswith("; RandomResizedCrop / CenterCrop (imagenet)")
    assert said["data.lighting"] == "PCA lighting noise, official code (imagenet)"
    assert said["setting.emulation"] == "on fewer devices: grouped | accumulated | auto"
    importlib.import_module("sn.training.style.config")
    said = {row.key: row.comment for row in rows("style_transfer")}
    assert said["photos.max_bad_images"].endswith("may stand in for (coco, folder)")  # inherited


def test_garbage_is_collected_once_imports_are_done(monkeypatch):
    """Entrypoints turn it off while they import, unless they are imported themselves."""
    for command in set(COMMANDS.values()):
        importlib.import_module(command.split()[-1].removesuffix(".py"))
    assert gc.isenabled()

    def main():
        assert gc.isenabled() and gc.get_freeze_count() > 10_000

    monkeypatch.setattr(sys, "argv", ["train_imagenet.py"])
    gc.disable()
    try:
        entry.start(main, "imagenet")
    finally:
        gc.enable()
        gc.unfreeze()


SWEEP = """
import gc, sys
import hydra
from sn.training.run import distributed, entry
from sn.training.run.lock import Busy
from sn.training.run.stopping import Preempted

def task(config):
    processes = distributed.start("cpu", 0.2)
    print("seed", config.seed)
    if distributed.same_everywhere(config.seed, processes):
        print("met")
    error = [None, FloatingPointError("it diverged"), Busy("in use"), Preempted("told to stop")]
    if config.seed in (1, 2, 3):
        raise error[config.seed]
    if config.seed == 4:
        raise ValueError("seed=4; expected another")

@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="imagenet")
def main(cfg):
    entry.run(task, cfg)

import sn.training.classification.config
entry.start(main, "imagenet")
"""


def sweep(folder, seeds, *launcher):
    script = folder / "sweep.py"
    script.write_text(SWEEP.replace("CONFIGS", repr(str(entry.CONFIGS))))
    environment = os.environ | {"PYTHONPATH": str(entry.CONFIGS.parent)}
    environment.pop("HYDRA_FULL_ERROR", None)
    environment.pop("SN_ONE_LINE", None)
    return subprocess.run(
        [sys.executable, *launcher, script, "-m", f"seed={seeds}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_sweep_of_several_processes(tmp_path):
    """They meet once: torchrun's store would tell the second run's of the first one's addresses."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = sweep(tmp_path, "5,1,6,7", *torchrun)
    assert result.stdout.count("met") == 8, result.stderr
    assert "exitcode  : 3" in result.stderr


@pytest.mark.parametrize(
    "seeds, code, run",
    [
        ("1,2,0", 73, [1, 2, 0]),
        pytest.param("1,0", 3, [1, 0], marks=pytest.mark.slow),
        pytest.param("3,0", 75, [3], marks=pytest.mark.slow),
        pytest.param("4,0", 2, [4], marks=pytest.mark.slow),
    ],
)
def test_a_sweep_goes_on_after_a_run_that_diverged_or_is_in_other_hands(seeds, code, run, tmp_path):
    """Called again, too, it would end there before the runs that are left."""
    result = sweep(tmp_path, seeds)
    assert result.returncode == code, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("seed")] == [
        f"seed {seed}" for seed in run
    ]
    assert result.stderr.count("sweep.py: ") == sum(seed > 0 for seed in run)

"""What a launcher says in the environment: checked before anything starts."""

import pytest
import torch

from sn.training.run import distributed

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.fixture
def launch(monkeypatch):
    def launch(values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: 1 / 0)
    return launch


@pytest.mark.parametrize(
    "values, message",
    [
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''; expected a whole number, 1 to"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'; expected a whole number, 1 to"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'; expected a whole number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0'; expected a whole number"),
        ({"WORLD_SIZE": "9" * 400}, "expected a whole number"),
        ({"RANK": "-1"}, "RANK='-1'; expected a whole number, 0 to"),
        ({"RANK": ""}, "RANK=''; expected a whole number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'; expected a whole number"),
        (PLACE | TWO | {"RANK": "5"}, "RANK=5, but WORLD_SIZE is 2"),
        (PLACE | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
        (TWO, "WORLD_SIZE=2, but MASTER_ADDR is not set"),
        (TWO | {"MASTER_ADDR": "h"}, "WORLD_SIZE=2, but MASTER_PORT is not set"),
        (TWO | PLACE | {"MASTER_PORT": "http"}, "MASTER_PORT='http'; expected a whole number"),
        (TWO | PLACE | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000'; expected a whole number"),
    ],
    ids=str,
)
def test_what_no_launcher_sets_is_one_line(launch, values, message):
    launch(values)
    with pytest.raises(ValueError) as error:
        distributed.start("cpu")
    assert message in str(error.value) and "torchrun" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_launchers_set_is_taken(launch):
    launch({})
    assert distributed.launched() == (0, 1, 0)
    launch({"RANK": "0", "LOCAL_RANK": "3"})
    assert distributed.launched() == (0, 1, 3)
    launch(PLACE | {"WORLD_SIZE": "16", "RANK": "11", "LOCAL_RANK": "3"})
    assert distributed.launched() == (11, 16, 3)


def test_local_rank_beyond_the_gpus(launch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch(PLACE | TWO | {"LOCAL_RANK": "2"})
    with pytest.raises(ValueError, match="LOCAL_RANK=2 has no GPU of its own: there are 2"):
        distributed.start("auto")
    launch(PLACE | {"WORLD_SIZE": "2", "RANK": "0"})
    with pytest.raises(ValueError, match="LOCAL_RANK, whose GPU to use, is not set"):
        distributed.start("auto")


def test_processes_that_cannot_meet(launch, monkeypatch):
    def refused(*_, **__):
        raise torch.distributed.DistNetworkError("EADDRINUSE\nframe #0")

    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    launch(PLACE | TWO)
    with pytest.raises(OSError, match="2 processes cannot meet at 127.0.0.1:29500: EADDRINUSE$"):
        distributed.start("cpu")

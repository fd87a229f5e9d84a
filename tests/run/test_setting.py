"""A (GPUs, images per GPU) setting is the same experiment on any number of processes."""

import json

import pytest
import torch
from torch import nn
from workers import train_in_group

import sn
from sn.training.run.distributed import one_running_update, prepare_setting, untrained_statistics

SETTING = [
    "device=cpu",
    "precision=fp64",
    "setting.images_per_gpu=3",
    "schedule.epochs=2",
    "data.train_images=41",  # padded to 48 per epoch, augmented by random crops
    "evaluation.batch_average.batch_size=8",
    "evaluation.batch_size=100",
]
RUNS = {  # name -> (processes, None: as many as GPUs; emulation)
    "a process for each GPU": (None, "auto"),
    "2 processes of virtual GPUs, grouped": (2, "grouped"),
    "2 processes of virtual GPUs, accumulated": (2, "accumulated"),
    "1 process, grouped": (1, "grouped"),
    "1 process, accumulated": (1, "accumulated"),
}


BRN = ("norm.r_images=[20,60]", "norm.d_images=[20,60]", "norm.momentum=0.3")


SMALL = ("model=resnet8", "model.width=8")
CASES = [
    ("sn", 4, SMALL),
    pytest.param("bn", 4, SMALL, marks=pytest.mark.slow),
    *(
        pytest.param(norm, 8, ("model=resnet20",), marks=pytest.mark.slow)
        for norm in ("bn", "sn", "brn", "bkn")
    ),
]


@pytest.mark.parametrize("norm, gpus, network", CASES)
def test_emulation_equals_processes(norm, gpus, network, tmp_path):
    results = {}
    for index, (name, (processes, emulation)) in enumerate(RUNS.items()):
        out, processes = tmp_path / str(index), processes or gpus
        train_in_group(
            processes,
            *SETTING,
            *network,
            f"norm={norm}",
            f"setting.gpus={gpus}",
            *(BRN if norm == "brn" else ()),
            f"setting.emulation={emulation}",
            f"output_dir={out}",
        )
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)[key] for line in lines for key in ("train/loss", "val/loss")]
        summary = json.loads((out / "summary.json").read_text())
        assert summary["setting"]["world_size"] == processes
        assert summary["images_seen"] == 96
        results[name] = (losses, state["model"], state["batch_average"], summary)

    reference = results.pop("a process for each GPU")
    start = {k: v for k, v in reference[1].items() if k.endswith("conv1.weight")}
    # the right network, and it has moved:
    assert len(start) == (10 if network == ("model=resnet20",) else 4)
    assert reference[0][0] != reference[0][2]
    for name, (losses, model, batch_average, summary) in results.items():
        assert losses == pytest.approx(reference[0], abs=1e-9), name
        for ours, theirs in ((model, reference[1]), (batch_average, reference[2])):
            assert ours.keys() == theirs.keys()
            for key in ours:
                torch.testing.assert_close(
                    ours[key], theirs[key], rtol=0, atol=1e-9, msg=f"{name}: {key}"
                )
        for key in ("top1", "top1_batch_average"):
            assert summary[key] == reference[3][key], name


def test_emulation_is_not_the_whole_batch():
    """The test above would be empty if groups made no difference."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4) * torch.arange(1, 9.0).view(8, 1, 1, 1)
    for norm in ("bn", "sn"):
        whole, grouped = sn.make_norm(norm)(3), sn.make_norm(norm)(3)
        sn.set_virtual_gpus(nn.Sequential(grouped), 4)
        assert (whole(x) - grouped(x)).abs().max() > 0.1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_one_running_update(norm, momentum):
    """Micro-batches inside the context update once with the mean of their moments."""
    torch.manual_seed(0)
    x = torch.randn(12, 3, 4, 4, dtype=torch.float64) + 2
    layer = sn.make_norm(norm, momentum=momentum)(3).double()
    layer(x)
    grouped = sn.make_norm(norm, momentum=momentum)(3).double()
    grouped.load_state_dict(layer.state_dict())
    sn.set_virtual_gpus(grouped, 4)
    for _ in range(2):
        with one_running_update(nn.Sequential(layer), 4) as begin:
            for index, part in enumerate(x.chunk(4)):
                begin(index)
                layer(part)
        grouped(x)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, dict(grouped.named_buffers())[name])
    assert layer.momentum == momentum
    assert layer.num_batches_tracked == 3


def test_world_size_that_does_not_divide():
    with pytest.raises(ValueError, match=r"8 GPUs; 3 processes.*\[1, 2, 4, 8\]"):
        prepare_setting(nn.Sequential(), 8, 32, "auto", 3)


@pytest.mark.parametrize("emulation", ["auto", "grouped", "accumulated"])
def test_synchronised_norm_is_refused(emulation):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    with pytest.raises(ValueError, match="1 is a synchronised norm"):
        prepare_setting(model, 8, 2, emulation, 2)
    assert prepare_setting(model, 8, 2, emulation, 8) == ("none", 1)


def test_frozen_foreign_layers_are_no_matter_and_batches_without_a_running_mean_are():
    frozen = nn.Sequential(sn.freeze(nn.BatchNorm2d(4)), sn.freeze(nn.SyncBatchNorm(4)))
    model = nn.Sequential(frozen, sn.SwitchNorm2d(4))
    assert prepare_setting(model, 8, 2, "auto", 2) == ("grouped", 1)
    assert model[1].virtual_gpus == 4
    model[0] = nn.BatchNorm2d(4, track_running_stats=False)
    assert prepare_setting(model, 8, 2, "auto", 2) == ("accumulated", 4)
    with pytest.raises(ValueError, match="0 takes batch statistics"):
        prepare_setting(model, 8, 2, "grouped", 2)


def test_foreign_batch_norm_is_accumulated():
    model = nn.Sequential(nn.BatchNorm2d(4))
    assert prepare_setting(model, 8, 2, "auto", 2) == ("accumulated", 4)
    with pytest.raises(ValueError, match="setting.emulation=accumulated"):
        prepare_setting(model, 8, 2, "grouped", 2)
    with pytest.raises(ValueError, match="grouped or accumulated"):
        prepare_setting(model, 8, 2, "both", 2)
    with pytest.raises(ValueError, match="1 or more"):
        prepare_setting(model, 0, 2, "auto", 1)


def test_untrained_statistics():
    model = nn.Sequential(sn.SwitchNorm2d(3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    assert untrained_statistics(model) == ["0", "1"]
    model(torch.randn(2, 3, 4, 4))
    assert untrained_statistics(model) == []

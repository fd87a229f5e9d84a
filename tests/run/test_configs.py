"""Every config composes, says its own name, builds its model, and nothing in it is ignored."""

import dataclasses
import functools
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from common.records import Run, load_paper
from workers import CONFIGS, config

import sn
from sn.training.classification.models import build_model
from sn.training.run.config import recorded
from sn.training.run.schedule import lr_factor

GROUPS = ("norm", "model", "data", "setting", "schedule")
OF_DETECTION = (
    "faster_rcnn",
    "mask_rcnn",
    "coco",
    "digits_coco",
    "detection_",
)  # test_detection_configs.py
OPTIONS = [
    f"{group}={path.stem}"
    for group in GROUPS
    for path in sorted((Path(CONFIGS) / group).glob("*.yaml"))
    if not path.stem.startswith(OF_DETECTION)
]
EXPERIMENTS = sorted(path.stem for path in (Path(CONFIGS) / "experiment/imagenet").glob("*.yaml"))
TABLE_4_1 = ("8x32", "8x16", "8x8", "8x4", "8x2", "1x16", "1x32", "8x1", "1x8")
NAMED = {"model=torchvision": "resnet34", "model=timm": "resnet10t"}  # the user names the model


@functools.cache
def complete(*overrides):
    """The config as plain values, with what the user must say."""
    data = () if any(word.startswith("data.root=") for word in overrides) else ("data.root=/data",)
    return dataclasses.asdict(config(*overrides, *data))


def meta_model(cfg, num_classes=10):
    with torch.device("meta"):
        return build_model(
            **cfg["model"], num_classes=num_classes, norm=sn.make_norm(**cfg["norm"])
        )


def test_there_are_configs():
    assert len(OPTIONS) >= 22 and len(EXPERIMENTS) >= 6


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_builds(option):
    cfg = complete(option, *([f"model.name={NAMED[option]}"] if option in NAMED else []))
    group, name = option.split("=")
    if group != "setting" and option not in NAMED:
        assert cfg[group]["name"] == name  # an inherited name would share a run folder
    if group == "setting":
        assert f"{cfg['setting']['gpus']}x{cfg['setting']['images_per_gpu']}" == name
    assert sum(p.numel() for p in meta_model(cfg).parameters()) > 70_000
    factor = lr_factor(
        0.5, *(cfg["schedule"][key] for key in ("decay", "milestones", "gamma", "warmup"))
    )
    assert 0 < factor <= 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_builds(name):
    cfg = complete(f"experiment=imagenet/{name}")
    model = meta_model(cfg, 1000)
    if cfg["model"]["name"] == "resnet50":
        assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 53
    content = yaml.safe_load((Path(CONFIGS) / f"experiment/imagenet/{name}.yaml").read_text())
    assert content.get("name", name) == name
    text = (Path(CONFIGS) / f"experiment/imagenet/{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n#"), "what it is for"


def test_every_norm_builds():
    for option in OPTIONS:
        if option.startswith("norm="):
            layer = sn.connect_bkn(sn.make_norm(**complete(option)["norm"])(16))
            assert layer(torch.randn(4, 16, 5, 5)).shape == (4, 16, 5, 5)
    assert complete("norm=sn_in_ln")["norm"]["statistics"] == ["in", "ln"]


def test_settings_of_table_4_1():
    there = {path.stem for path in (Path(CONFIGS) / "setting").glob("*.yaml")}
    assert there == {*TABLE_4_1, "1x2"}  # and one for proxies of detection
    cfg = complete("setting.gpus=4", "setting.images_per_gpu=6")
    assert cfg["run_name"] == "sn_4x6"


def test_bare_default_is_embedded():
    """No download, no path, no GPU."""
    cfg = dataclasses.asdict(config())
    assert cfg["data"]["name"] == "digits" and cfg["model"]["name"] == "resnet20"
    assert cfg["norm"]["name"] == "sn" and cfg["run_name"] == "sn_8x32"
    assert cfg["output_dir"] == "outputs/imagenet/digits_resnet20/sn_8x32/seed0"


@pytest.mark.parametrize(
    "data, model", [("digits", "resnet20"), ("cifar10", "resnet20"), ("imagenet", "resnet50")]
)
def test_data_alone_picks_the_model(data, model):
    assert complete(f"data={data}")["model"]["name"] == model
    for order in (
        (f"data={data}", "model=cifar_resnet18"),
        ("model=cifar_resnet18", f"data={data}"),
    ):
        assert complete(*order)["model"]["name"] == "cifar_resnet18"
    assert complete(f"data={data}", "model=resnet50")["model"]["name"] == "resnet50"


def test_recipe_of_table_4_1():
    """Official recipe: 100 epochs, 0.1 per 256, decay on everything, zero last gain, no dropout."""
    cfg = complete("experiment=imagenet/table_4_1")
    assert cfg["schedule"] | {"name": 0} == {
        "name": 0, "epochs": 100, "lr_per_256": 0.1, "decay": "step",
        "milestones": [0.3, 0.6, 0.9], "gamma": 0.1, "warmup": 0.0, "last_fraction": 0.05,
    }  # fmt: skip
    assert cfg["optimizer"] == {
        "momentum": 0.9, "weight_decay": 1e-4, "gate_lr_factor": 1.0, "gate_weight_decay": None,
        "gate_clip": None,
    }  # fmt: skip
    assert cfg["model"] == {
        "name": "resnet50", "source": "torchvision", "dropout": 0.0, "zero_init_residual": True,
        "width": None, "fused_activation": False,
    }  # fmt: skip
    data = cfg["data"]
    assert (data["image_size"], data["resize"], data["lighting"]) == (224, 256, 0.1)
    assert data["color_jitter"] == 0 and data["last_crop"] == "center"
    assert data["train_images"] is None
    assert cfg["evaluation"]["batch_average"] == {"batch_size": 256, "batches": 200}
    assert complete("experiment=imagenet/table_4_1_dropout")["model"]["dropout"] == 0.5
    for name, dropout, momentum in (
        ("table_4_1_sn_official", 0.5, 0.003),
        ("table_4_1_sn", 0, 0.003),
    ):
        own = complete(f"experiment=imagenet/{name}")
        assert own["schedule"] == cfg["schedule"] and own["norm"]["name"] == "sn"
        assert (own["model"]["dropout"], own["norm"]["momentum"]) == (dropout, momentum)
    brn = complete("experiment=imagenet/brn_8x4")
    assert brn["schedule"] == cfg["schedule"] and brn["setting"]["images_per_gpu"] == 4
    assert (brn["norm"]["r_max"], brn["norm"]["d_max"]) == (1.5, 0.5)
    cosine = complete("experiment=imagenet/cosine120")
    assert cosine["model"]["dropout"] == 0.5 and cosine["norm"]["momentum"] == 0.1
    cosine = cosine["schedule"]
    assert cosine["epochs"] == 120 and cosine["decay"] == "cosine"
    assert cosine["warmup"] == 5 / 120
    cell = complete("experiment=imagenet/sn_8x1")
    assert cell["norm"]["statistics"] == ["in", "ln"] and cell["setting"]["images_per_gpu"] == 1


def test_command_line_beats_the_experiment():
    cfg = complete(
        *("experiment=imagenet/table_4_1", "schedule.epochs=7", "model.dropout=0.1"),
        *("data.image_size=64", "norm=gn", "setting=1x8", "model=cifar_resnet18", "seed=5"),
    )
    assert cfg["schedule"]["epochs"] == 7 and cfg["model"]["dropout"] == 0.1
    assert cfg["data"]["image_size"] == 64 and cfg["norm"]["name"] == "gn"
    assert cfg["model"]["name"] == "cifar_resnet18" and cfg["run_name"] == "gn_1x8"
    assert complete("experiment=imagenet/sn_8x1", "norm=bn", "setting=8x2")["run_name"] == "bn_8x2"
    assert (
        complete("experiment=imagenet/table_4_1", "schedule=cosine120")["schedule"]["epochs"] == 120
    )
    proxy = complete("experiment=imagenet/table_4_1", "data=cifar10", "model=resnet20")
    assert proxy["data"]["name"] == "cifar10" and proxy["model"]["name"] == "resnet20"


def test_the_size_of_images_is_recorded():
    """32 is what CIFAR-10 had before the option; of other data it is a choice like any other."""

    def data(*overrides):
        return recorded(config(*overrides, "data.root=/data"))["data"]

    assert "image_size" not in data("data=cifar10")
    assert data("data=cifar10", "data.image_size=16")["image_size"] == 16
    small = ("data=imagenet", "data.name=birds", "data.image_size=32", "data.resize=36")
    assert data(*small)["image_size"] == 32


RECIPES = {"table_4_1": True, "table_4_1_dropout": True, "table_4_1_sn": True, "sn_8x1": True}
RECIPES |= {"table_4_1_sn_official": True, "brn_8x4": True, "cosine120": False}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_stand_beside_table_4_1(name):
    """Such a run's config has what results/paper.yaml asks for; that of 77.49 has not."""
    run = Run(Path(name), {}, complete(f"experiment=imagenet/{name}"))
    assert run.follows(load_paper()["table_4_1"]["recipe"]) == RECIPES[name]
    small = complete(f"experiment=imagenet/{name}", "data.image_size=64")
    assert not Run(Path(name), {}, small).follows(load_paper()["table_4_1"]["recipe"])


@pytest.mark.parametrize("override", ["normm=bn", "setting=8x64", "experiment=imagenet/xy"])
def test_unknown_option_is_an_error(override):
    """Of a group; unknown keys are in test_config.py."""
    with pytest.raises(ValueError, match=override.split("=")[0]):
        config(override)


INTERFACE = {  # the names that other people's scripts rely on
    "norm=bn": ("norm.name", "bn"),
    "setting.gpus=3": ("setting.gpus", 3),
    "setting.images_per_gpu=5": ("setting.images_per_gpu", 5),
    "model=cifar_resnet18": ("model.name", "cifar_resnet18"),
    "data=cifar10": ("data.name", "cifar10"),
    "data.root=/x": ("data.root", "/x"),
    "schedule.epochs=9": ("schedule.epochs", 9),
    "seed=4": ("seed", 4),
    "output_dir=/y": ("output_dir", "/y"),
}


@pytest.mark.parametrize("override", INTERFACE)
def test_interface(override):
    key, value = INTERFACE[override]
    extra = ["data=cifar10"] if key == "data.root" else []
    group, _, name = key.rpartition(".")
    found = config(*extra, override)
    found = getattr(found, group) if group else found
    assert (found[name] if isinstance(found, dict) else getattr(found, name)) == value


def test_run_folder_is_the_runs_own():
    """One folder for every norm x setting x seed, the same for every process and every start."""
    norms = [option for option in OPTIONS if option.startswith("norm=")]
    runs = [*itertools.product(norms, ["setting=8x1", "setting=1x8"], ["seed=0"])]
    runs += [(norms[0], "setting=8x1", "seed=1"), (norms[0], "setting=8x1", "seed=10")]
    folders = [complete(*overrides)["output_dir"] for overrides in runs]
    assert len(set(folders)) == len(folders)
    by_data = {complete(o)["output_dir"] for o in OPTIONS if o.startswith("data=")}
    assert len(by_data) == 4
    assert folders[0] == config(*runs[0]).output_dir


def test_experiments_that_differ_do_not_share_a_folder():
    """Two of the paper's experiments in one folder would stop each other."""
    names = [name for name in EXPERIMENTS if name not in ("smoke", "demo", "cifar10_proxy")]
    configs = {name: complete(f"experiment=imagenet/{name}") for name in names}
    for name, other in itertools.combinations(names, 2):
        mine, theirs = configs[name], configs[other]
        if mine["output_dir"] == theirs["output_dir"]:
            ours = [config(f"experiment=imagenet/{n}", "data.root=/data") for n in (name, other)]
            same = recorded(ours[0]) == recorded(ours[1])
            assert same, f"{name} and {other} share {mine['output_dir']}"


def test_hydra_writes_nothing():
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(CONFIGS, version_base="1.3"):
        hydra = compose("imagenet", return_hydra_config=True).hydra
    assert hydra.output_subdir is None and hydra.run.dir == "."
    assert set(hydra.job_logging.root.handlers) == {"console"}


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_configs_are_in_git():
    """A pattern such as data/ in .gitignore would leave configs/data out of every clone."""
    root = Path(CONFIGS).parent
    git = ["git", "-C", str(root)]
    if subprocess.run([*git, "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    files = [str(path.relative_to(root)) for path in Path(CONFIGS).rglob("*.yaml")]
    tracked = subprocess.run([*git, "ls-files", "configs"], capture_output=True, text=True).stdout
    assert set(files) <= set(tracked.splitlines())
    ignored = subprocess.run([*git, "check-ignore", "--no-index", *files], capture_output=True)
    assert ignored.stdout == b""

"""Every config of train_detection.py composes and builds; every row of Tables 4.2-4.4 has one."""

import functools
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import make_tables
import pytest
import torch
import torchvision
import yaml
from common.records import Run, load_paper
from workers import CONFIGS, config

import sn
from sn.training.detection import detectors
from sn.training.detection.task import COCO_IMAGES, Task
from sn.training.run.config import recorded

FOLDER = Path(CONFIGS) / "experiment" / "detection"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PATTERNS = {
    "parts": "*.yaml",
    "init": "*.yaml",
    "schedule": "detection_*.yaml",
    "data": "*coco.yaml",
    "model": "*rcnn*.yaml",
}
OPTIONS = [
    f"{group}={path.stem}"
    for group, pattern in PATTERNS.items()
    for path in sorted((Path(CONFIGS) / group).glob(pattern))
]
NORMS = {"frozenBN": "frozen_bn", "BN": "bn", "GN": "gn", "SN": "sn", "none": "none"}
PAPER = load_paper()
ROWS = {
    **{f"c4_{NORMS[r['backbone']]}": ("table_4_2", r) for r in PAPER["table_4_2"]["finetune"]},
    **{
        f"c4_scratch_{NORMS[r['backbone']]}": ("table_4_2", r)
        for r in PAPER["table_4_2"]["scratch"]
    },
    **{
        f"{stem}_{NORMS[row['backbone']]}_{NORMS[row['head']]}": (table, row)
        for stem, table in (("fpn", "table_4_3"), ("mask", "table_4_4"))
        for row in PAPER[table]["rows"]
    },
}


@functools.cache
def complete(*overrides):
    """The checked config, with a value for what the user must say to train."""
    # before the overrides: what they say of the same keys holds
    return config("data.root=/data", "init.path=c.pt", *overrides, root="detection")


def meta_model(cfg, num_classes=80):
    with torch.device("meta"):
        return detectors.build_detector(num_classes=num_classes, **cfg.detector())


def names(cfg):
    return {part: options["name"] for part, options in vars(cfg.parts).items()}


def test_there_are_configs():
    assert len(ROWS) == 18 and len(OPTIONS) >= 20


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_builds(option):
    group, name = option.split("=")
    options = {
        "parts=none": ["model.box_head=mlp"],
        "parts=frozen_bn": ["mode=evaluate"],  # from scratch it cannot be trained
    }
    cfg = complete(option, *options.get(option, []))
    if group == "parts":
        assert set(names(cfg).values()) == {name}
    else:
        assert vars(cfg)[group].name == name
    least = 500_000 if "_r10_" in option else 10_000_000
    assert sum(p.numel() for p in meta_model(cfg, 3).parameters()) > least


def test_every_row_has_its_config():
    others = {"c4_sn_official", "fpn_sn_official", "digits_proxy", "coco_mini", "smoke"}
    others |= {"digits_scratch", "digits_finetune"}
    assert set(EXPERIMENTS) == set(ROWS) | others


def norm_names(module):
    """What the norm layers of a module are, as a set of classes and statistics."""
    layers = [layer for layer in module.modules() if detectors.is_norm(layer)]
    return {(type(layer).__name__, getattr(layer, "statistics", None)) for layer in layers}


CLASSES = {
    "frozen_bn": "FrozenBatchNorm",
    "bn": "GhostBatchNorm2d",
    "gn": "AutoGroupNorm",
    "sn": "SwitchNorm2d",
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_composes_and_builds(name):
    """The right norm in every part of a ResNet-50 detector, and the file says what to expect."""
    table, row = ROWS[name]
    cfg = complete(f"experiment=detection/{name}")
    model = meta_model(cfg)
    backbone, head = NORMS[row["backbone"]], NORMS[row["head"]]
    classes = {
        kind
        for kind, _ in norm_names(model.backbone.body if table != "table_4_2" else model.backbone)
    }
    assert classes == {CLASSES[backbone]}
    heads = [model.roi_heads.box_head]
    if table != "table_4_2":
        heads.append(model.backbone.fpn)
    if table == "table_4_4":
        heads.append(model.roi_heads.mask_head)
    for part in heads:
        expected = set() if head == "none" else {CLASSES[head]}
        assert {kind for kind, _ in norm_names(part)} == expected
    assert not norm_names(model.rpn)
    statistics = {s for _, s in norm_names(model) if s}
    assert statistics <= {("in", "ln") if table == "table_4_4" else ("in", "ln", "bn")}
    convolutions = [m for m in detectors.body(model).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == (53 if table != "table_4_2" else 43)

    text = (FOLDER / f"{name}.yaml").read_text()
    number = table.removeprefix("table_").replace("_", ".")
    assert f"Table {number}" in text.splitlines()[1]
    assert row["backbone"] in text.splitlines()[1]
    assert f"experiment=detection/{name} " in text
    assert re.search(rf"Expected box AP {row['values'][0]}\b", text)
    if table == "table_4_4":
        assert re.search(rf"mask AP {row['values'][3]}\b", text)
    assert "Cost: " in text
    assert ("Suspect" in text) == bool(row.get("suspect"))


def test_recipes():
    """paper/recipes.yaml: 1x, 2x, 3x in images, warm-up of 500 iterations of 16, lr 0.02 per 16."""
    iterations = {"1x": (90, [60, 80]), "2x": (180, [120, 160]), "3x": (270, [210, 250])}
    for name, (total, decays) in iterations.items():
        schedule = complete(f"schedule=detection_{name}").schedule
        assert schedule.images == total * 16_000 and schedule.lr_per_16 == 0.02
        steps = schedule.images // 16
        assert [m * steps for m in schedule.milestones] == pytest.approx([d * 1000 for d in decays])
        assert schedule.warmup_images == 500 * 16 and schedule.warmup_factor == 1 / 3
    for name in ROWS:
        cfg = complete(f"experiment=detection/{name}")
        assert (cfg.setting.gpus, cfg.setting.images_per_gpu) == (8, 2)
        assert cfg.optimizer.weight_decay == 1e-4
        decayed = 1e-4 if names(cfg)["backbone"] == "bn" else 0  # spared: SN's and GN's gains
        assert cfg.optimizer.norm_weight_decay == decayed
        assert cfg.optimizer.gate_weight_decay == cfg.optimizer.bias_weight_decay == 0
        for part in vars(cfg.parts).values():
            own = name.startswith(("c4", "fpn")) and part["name"] == "sn"
            assert not own or part["momentum"] in (0.003, 0.1)
    c4 = complete("experiment=detection/c4_sn")
    assert c4.data.test_size == 600 and c4.data.max_size == 1000 and c4.schedule.lr_per_16 == 0.01
    assert c4.parts.backbone["momentum"] == c4.parts.box_head["momentum"] == 0.003
    assert c4.model.rois_per_image == 256 and c4.model.freeze_at == 0
    assert c4.optimizer.bias_lr_factor == 1
    scratch = complete("experiment=detection/c4_scratch_sn")
    assert scratch.schedule.name == "detection_3x" and scratch.init.name == "scratch"
    fpn = complete("experiment=detection/fpn_sn_sn")
    assert fpn.model.freeze_at == 2 and fpn.model.rois_per_image == 512
    assert fpn.data.sizes == [800] and fpn.data.max_size == 1333
    assert fpn.optimizer.bias_lr_factor == 2 and fpn.schedule.name == "detection_2x"
    assert complete("experiment=detection/fpn_frozen_bn_none").schedule.name == "detection_1x"
    official = complete("experiment=detection/c4_sn_official")
    assert official.schedule.name == "detection_2x" and official.data.test_size == 800
    official = complete("experiment=detection/fpn_sn_official")
    assert list(names(official).values())[:3] == ["sn", "sn", "none"]
    assert official.model.box_head == "mlp" and official.schedule.name == "detection_2x"
    assert not norm_names(meta_model(official).roi_heads.box_head)


def facts(cfg, images=COCO_IMAGES):
    """What a run of this config on so many images says of itself."""
    task = Task.__new__(Task)
    task.config, task.init, task.micro_batches = cfg, {"name": cfg.init.name, "sha256": None}, 1
    described = {"name": cfg.data.name, "train_images": images[0], "val_images": images[1]}
    task.data = SimpleNamespace(describe=lambda: described)
    task.sampler = SimpleNamespace(steps=math.ceil(cfg.schedule.images / 16))
    return task.facts(SimpleNamespace(processes=SimpleNamespace(world_size=8)))


@pytest.mark.parametrize("name", sorted({*ROWS, "c4_sn_official", "fpn_sn_official"}))
def test_rows_of_the_paper_are_its_runs(name):
    """A whole run on COCO is full, and stands in its own row alone; the official ones in none."""
    cfg = complete(f"experiment=detection/{name}")
    assert facts(cfg)["scale"] == "full"
    assert facts(cfg, (117_266, 4_999))["scale"] == "proxy"
    run = Run(Path(name), facts(cfg), recorded(cfg))
    found = []
    for table in ("table_4_2", "table_4_3", "table_4_4"):
        for start in ("finetune", "scratch", "rows"):
            for row in PAPER[table].get(start, []):
                recipe = PAPER[table][f"recipe_{start}"] | row.get("recipe", {})
                same = make_tables.is_row(run, row, start == "scratch") and run.follows(recipe)
                if PAPER[table]["model"] == run.summary["model"] and same:
                    found.append((table, row))
    assert found == ([ROWS[name]] if name in ROWS else [])


def test_rows_do_not_share_a_folder():
    configs = {name: complete(f"experiment=detection/{name}") for name in EXPERIMENTS}
    for name, other in itertools.combinations(configs, 2):
        mine, theirs = configs[name], configs[other]
        if mine.output_dir == theirs.output_dir:
            assert recorded(mine) == recorded(theirs), f"{name} and {other}"


def test_runs_are_named_after_the_parts():
    assert complete().output_dir == (
        "outputs/detection/digits_coco_faster_rcnn_r18_fpn/sn-sn-sn_8x2_scratch/seed0"
    )
    one = complete("norm@parts.backbone=gn", "norm@parts.fpn=none", "model=mask_rcnn_r50_fpn")
    assert one.run_name == "gn-none-sn-sn_8x2_scratch"
    c4 = complete("model=faster_rcnn_r50_c4", "parts=bn", "init=torchvision", "setting=1x8")
    assert c4.run_name == "bn-bn_1x8_torchvision"


@pytest.mark.parametrize(
    "data, model", [("digits_coco", "faster_rcnn_r18_fpn"), ("coco", "faster_rcnn_r50_fpn")]
)
def test_data_alone_picks_the_model(data, model):
    assert complete(f"data={data}").model.name == model
    assert complete(f"data={data}", "model=mask_rcnn_r50_fpn").model.name == "mask_rcnn_r50_fpn"


def test_one_part_alone():
    cfg = complete(
        "init=checkpoint", "parts=gn", "norm@parts.backbone=frozen_bn", "parts.fpn.num_groups=8"
    )
    assert list(names(cfg).values()) == ["frozen_bn", "gn", "gn", "gn"]
    fpn = meta_model(cfg).backbone.fpn
    assert {m.num_groups for m in fpn.modules() if isinstance(m, sn.AutoGroupNorm)} == {8}


def test_batch_renorm_counts_images():
    """In a head it would count RoIs: only without a schedule."""
    with pytest.raises(ValueError, match=r"parts.box_head: brn counts the RoIs .*r_images=\[0,0\]"):
        complete("norm@parts.box_head=brn")
    spans = [f"++parts.box_head.{key}=[0,0]" for key in ("r_images", "d_images")]
    complete("norm@parts.box_head=brn", *spans)
    complete("norm@parts.backbone=brn")
    for spans in (["++parts.mask_head.r_images=[0,0]"], ["++parts.mask_head.d_images=[0,0]"]):
        with pytest.raises(ValueError, match="parts.mask_head: brn counts"):
            complete("norm@parts.mask_head=brn", "model=mask_rcnn_r50_fpn", *spans)


def test_command_line_beats_the_experiment():
    overrides = ("norm@parts.fpn=gn", "schedule=detection_1x", "model.freeze_at=0")
    cfg = complete("experiment=detection/mask_sn_sn", *overrides)
    assert names(cfg)["fpn"] == "gn" and names(cfg)["box_head"] == "sn_in_ln"
    assert cfg.schedule.name == "detection_1x" and cfg.model.freeze_at == 0
    with pytest.raises(ValueError, match="parts.fpn: norm 'gn' has no option 'momentum'"):
        complete("experiment=detection/fpn_sn_sn", *overrides)


@pytest.mark.parametrize(
    "override, words",
    [
        ("parts.neck.name=sn", "unknown key parts.neck; parts has backbone, fpn,"),
        ("norm.backbone=gn", "unknown key norm; the config has"),
        ("model.freezeat=2", "unknown key model.freezeat; did you mean freeze_at?"),
        ("parts=xy", "parts=xy: no such option; choose one of bn, frozen_bn,"),
        ("init=xy", "init=xy: no such option"),
        ("data.rot=/x", "unknown key data.rot; did you mean root?"),
    ],
)
def test_unknown_is_an_error(override, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        complete(override)


def test_torchvisions_weights_are_those_of_the_papers_time():
    """ResNet-50's of 76.13 % top-1, and the record says so; older runs started from DEFAULT."""
    options = ("init=torchvision", "model.backbone=resnet50")
    for given, chosen in {
        "null": {"weights": "IMAGENET1K_V1"},
        "IMAGENET1K_V2": {"weights": "IMAGENET1K_V2"},
        "DEFAULT": {},  # as the records of older runs have it
    }.items():
        cfg = complete(*options, f"init.weights={given}")
        assert recorded(cfg)["init"] == {"name": "torchvision"} | chosen
    weights = torchvision.models.get_model_weights("resnet50")[complete(*options).init.weights]
    assert weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] == 76.13
    assert recorded(complete("init=checkpoint"))["init"] == {"name": "checkpoint"}
    classifier = config("model=torchvision", "model.name=resnet50", "init=torchvision")
    assert classifier.init.weights is None
    assert "weights" not in recorded(classifier)["init"]


def test_headers_of_base_files():
    for path in (FOLDER / "base").glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# @package _global_\n# ") and yaml.safe_load(text)["defaults"]

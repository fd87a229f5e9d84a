"""AP of hand-made predictions equals pycocotools' own from files, whatever the processes."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from coco_files import annotation, content, write
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from workers import run_in_group

from sn.training.classification.data import BadImages
from sn.training.detection.data import load_coco
from sn.training.detection.digits import write_digits_coco
from sn.training.detection.evaluation import (
    STATS,
    coco_metrics,
    coco_results,
    detect,
    evaluate_detections,
    evaluation_batches,
    gather,
)


@pytest.fixture
def data(tmp_path):
    write_digits_coco(tmp_path / "d", 4, 12, size=80)
    return load_coco("digits", str(tmp_path / "d"), masks=True)


def shaken(images, seed=0, keep=0.8):
    """Detections as models give them: objects moved a little, some missed, some invented."""
    random = np.random.RandomState(seed)
    results = []
    for index, image in enumerate(images.images):
        _, target = images[index]
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"]):
            if random.rand() > keep:
                continue
            shift = random.randint(-2, 3, 2).tolist()
            moved = torch.roll(torch.as_tensor(mask), shift[::-1], (0, 1)).numpy()
            if random.rand() < 0.2:
                label = torch.tensor(random.randint(1, 11))
            shifted = torch.as_tensor(box).double() + torch.tensor(shift * 2)
            found = {
                "boxes": shifted[None],
                "labels": label[None],
                "scores": torch.tensor([random.rand()]),
            }
            results += coco_results(found, image["id"], images.file.category_ids, [moved])
    return results


def pycocotools_numbers(path, results, iou_type, tmp_path):
    """As its users call it: files in, `summarize` out."""
    kept = "segmentation" if iou_type == "segm" else "bbox"
    file = tmp_path / f"{iou_type}.json"
    keys = ("image_id", "category_id", "score", kept)
    file.write_text(json.dumps([{key: result[key] for key in keys} for result in results]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(str(file)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def assert_equal_to_stats(metrics, kind, stats):
    for name, position in STATS.items():
        expected = None if stats[position] < 0 else 100 * stats[position]
        assert metrics[f"{kind}_{name}"] == expected, name


def test_equals_pycocotools(data, tmp_path):
    results = shaken(data.val)
    metrics = coco_metrics(data.val.content(), results, masks=True)
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        stats = pycocotools_numbers(data.val.file.path, results, iou_type, tmp_path)
        assert 0.05 < stats[0] < 0.9
        assert_equal_to_stats(metrics, kind, stats)
    assert metrics["box_ap"] != metrics["mask_ap"]


def test_crowds_and_objects_without_area_as_pycocotools_has_them(tmp_path):
    """A detection inside a crowd is ignored, not a false positive."""
    data = load_coco("mine", str(write(tmp_path)), masks=False)
    rows = [  # image, category, box, score
        (10, 3, (4, 4, 20, 30), 0.9),
        (10, 17, (1, 2, 6, 40), 0.8),  # in the crowd
        (10, 44, (30, 10, 30, 36), 0.7),
        (7, 17, (0, 0, 10, 10), 0.6),
        (99, 3, (10, 10, 20, 20), 0.95),  # in a crowd of an image without objects
        (5, 44, (10, 10, 20, 20), 0.3),  # in the empty image: false
    ]
    results = [
        {"image_id": i, "category_id": c, "bbox": list(map(float, b)), "score": s}
        for i, c, b, s in rows
    ]
    metrics = coco_metrics(data.val.content(), results, masks=False)
    stats = pycocotools_numbers(data.val.file.path, results, "bbox", tmp_path)
    assert_equal_to_stats(metrics, "box", stats)
    # without the crowds the same detections are worth less
    content = data.val.content()
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
    assert coco_metrics(content, results, False)["box_ap"] < metrics["box_ap"]


def test_perfect_none_and_nothing_to_find(data):
    content = data.val.content()
    perfect = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 1.0,
            "segmentation": a["segmentation"],
        }
        for a in content["annotations"]
    ]
    metrics = coco_metrics(content, perfect, True)
    assert metrics["box_ap"] == metrics["mask_ap"] == pytest.approx(100)
    nothing = coco_metrics(content, [], True)
    assert nothing["box_ap"] == nothing["mask_ap"] == nothing["box_ar100"] == 0
    assert metrics["box_ap_l"] is None  # no digit is that large
    empty = coco_metrics(content | {"annotations": []}, [], False)
    assert empty["box_ap"] is None


def test_object_ids_do_not_matter(data):
    """pycocotools takes an id of 0 for no match, and of equal ids the last object for all."""
    results = shaken(data.val)
    expected = coco_metrics(data.val.content(), results, True)
    for change in (lambda place: place, lambda place: 1 + place % 3):
        content = data.val.content()
        content["annotations"] = [
            a | {"id": change(place)} for place, a in enumerate(content["annotations"])
        ]
        assert coco_metrics(content, results, True) == expected


def test_objects_without_a_whole_polygon_count_as_missed(tmp_path):
    mine = content()
    mine["annotations"] = [
        annotation(1, 10, 3, (4, 4, 20, 30), segmentation=[]),
        annotation(2, 7, 17, (5, 6, 30, 40), segmentation=[[1, 2, 3, 4]]),
        annotation(3, 10, 44, (30, 10, 20, 30)),
    ]
    data = load_coco("mine", str(write(tmp_path, None, mine)), masks=True)
    results = [
        {key: a[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 1}
        for a in data.val.content()["annotations"]
    ]
    metrics = coco_metrics(data.val.content(), results, True)
    assert metrics["box_ap"] == pytest.approx(100)
    assert metrics["mask_ap"] == pytest.approx(100 / 3)


def test_evaluation_changes_nothing(data):
    content, results = data.val.content(), shaken(data.val)
    before = json.dumps([content, results])
    coco_metrics(content, results, True)
    assert json.dumps([content, results]) == before


def test_results_are_in_cocos_format():
    found = {
        "boxes": torch.tensor([[1.0, 2.0, 11.0, 22.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.5]),
    }
    mask = np.zeros((30, 40), np.uint8)
    mask[5:9] = 1
    (result,) = coco_results(found, 139, [3, 17, 44], [mask])
    assert (result["image_id"], result["category_id"], result["score"]) == (139, 17, 0.5)
    assert result["bbox"] == [1, 2, 10, 20]
    assert result["segmentation"]["size"] == [30, 40]
    assert rle.decode(result["segmentation"]).sum() == 4 * 40
    assert json.loads(json.dumps(result)) == result
    nothing = {k: v[:0] for k, v in found.items()}
    assert coco_results(nothing, 1, [3]) == []


@pytest.mark.parametrize("count, world_size, batch_size", [(7, 2, 1), (7, 3, 2), (1, 4, 1)])
def test_every_image_once(count, world_size, batch_size):
    parts = [evaluation_batches(count, batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(count))
    assert all(0 < len(batch) <= batch_size for part in parts for batch in part)


class Finder(nn.Module):
    """Finds one box per image, its size told by the picture."""

    def forward(self, images):
        assert not self.training
        return [
            {
                "boxes": torch.tensor([[1.0, 1.0, image.shape[2] / 2, image.shape[1] / 2]]),
                "labels": torch.tensor([1 + int(1000 * image.mean()) % 3]),
                "scores": image.mean()[None],
            }
            for image in images
        ]


def test_detect_gives_original_pixels_and_restores_the_mode(tmp_path):
    images = load_coco("mine", str(write(tmp_path)), masks=False).val
    model = Finder().train()
    results = detect(model, images, evaluation_batches(len(images), 3), lambda x: x)
    assert model.training
    assert [r["image_id"] for r in results] == [10, 7, 99, 5]
    assert results[0]["bbox"] == [1, 1, 31, 23] and 0.4 < results[0]["score"] < 0.6
    assert {r["category_id"] for r in results} <= {3, 17, 44}


def evaluated(root, rank=0, world_size=1, bad=None):
    images = load_coco("mine", str(root), masks=False, bad=bad).val
    return evaluation_of(images, rank, world_size)


def evaluation_of(images, rank=0, world_size=1):
    batches = evaluation_batches(len(images), 1 if world_size > 1 else 3, rank, world_size)
    results = detect(Finder(), images, batches, lambda x: x)
    return evaluate_detections(images, results, masks=False)


def test_processes_count_every_image_once(tmp_path):
    """Metrics and results of 3 processes with unequal shares equal those of one.

    One picture cannot be read: it counts in none of them, whoever meets it.
    """
    root = write(tmp_path / "mine")
    (root / "val2017" / "b.png").write_bytes(b"no picture")
    expected = evaluated(root, bad=BadImages(tmp_path / "bad.txt", 1))
    run_in_group(3, _evaluate_in_group, str(root), str(tmp_path))
    for rank in range(3):
        ours = json.loads((tmp_path / f"{rank}.out").read_text())
        assert ours == json.loads(json.dumps(expected))


def test_an_image_that_cannot_be_read_does_not_count(tmp_path):
    """As if the file did not have it; without leave to pass over it, it is an error."""
    root = write(tmp_path / "mine")
    (root / "val2017" / "b.png").write_bytes(b"no picture")
    bad = BadImages(tmp_path / "bad.txt", 1)
    without = content()
    without["images"] = [image for image in without["images"] if image["id"] != 7]
    without["annotations"] = [a for a in without["annotations"] if a["image_id"] != 7]
    expected = evaluated(write(tmp_path / "without", None, without))
    found = evaluated(root, bad=bad)
    assert found == expected and found[0]["box_ar100"] is not None
    assert len(bad.lines()) == 1 and "image 7 of " in bad.lines()[0]
    with pytest.raises(ValueError, match="image 7 of .*instances_val2017.json: cannot read"):
        evaluated(root)


def test_a_picture_that_can_be_read_again_counts_again(tmp_path):
    """As on a network disk: what one evaluation passes over is no matter of the next."""
    root = write(tmp_path / "mine")
    expected, picture = evaluated(root), root / "val2017" / "a.png"
    images = load_coco("mine", str(root), masks=False, bad=BadImages(tmp_path / "bad.txt", 1)).val
    picture.rename(root / "away")
    passed_over = evaluation_of(images)
    assert images.unread == {10} and passed_over != expected
    (root / "away").rename(picture)
    assert evaluation_of(images) == expected and images.unread == set()


def _evaluate_in_group(rank, root, out):
    """Twice on the same images; the first time none of the pictures of rank 0 is there."""
    from sn.training.run import distributed

    distributed.start("cpu")
    images = load_coco("mine", root, masks=False, bad=BadImages(f"{out}/bad.txt", 4)).val
    folder = images.file.folder
    images.file.folder = folder / "away" if rank == 0 else folder
    evaluation_of(images, rank, 3)
    images.file.folder = folder
    found = evaluation_of(images, rank, 3)
    with open(f"{out}/{rank}.out", "w") as file:
        json.dump(found, file)
    distributed.stop()


def test_gather_orders_results():
    rows = [
        annotation(0, i, c, (0, 0, 1, 1)) | {"score": s}
        for i, c, s in [(2, 3, 0.1), (1, 3, 0.2), (1, 3, 0.9)]
    ]
    assert [(r["image_id"], r["score"]) for r in gather(rows)] == [(1, 0.9), (1, 0.2), (2, 0.1)]

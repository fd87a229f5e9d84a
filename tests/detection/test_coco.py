"""COCO files with every kind of fault, targets, augmentation, grouped batches, drawn digits."""

import collections
import copy
import gc
import hashlib
import json
import shutil
import types

import numpy as np
import pytest
import torch
from coco_files import annotation, content, write
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torchvision import datasets
from torchvision.transforms.v2 import functional as F

from sn.training.classification.data import IMAGENET_MEAN, IMAGENET_STD, BadImages, build_data
from sn.training.detection import digits
from sn.training.detection.data import (
    GroupedSampler,
    Packed,
    TrainingImages,
    augmentation,
    check_shape,
    compressed_mask,
    load_coco,
    read_run_lengths,
)
from sn.training.detection.digits import write_digit_crops, write_digits_coco
from sn.training.detection.evaluation import evaluate_detections
from sn.training.detection.predict import read_picture


def by_id(images, image_id):
    return next(i for i, image in enumerate(images.images) if image["id"] == image_id)


# --- files


def test_crowds_degenerate_boxes_and_empty_images(tmp_path):
    """Not trained on, but kept for evaluation; labels follow the order of category ids."""
    data = load_coco("mine", str(write(tmp_path)), masks=True)
    train, val = data.train, data.val
    assert data.names == ["cat", "dog", "cup"]
    assert [image["id"] for image in train.images] == [10, 7]
    assert [image["id"] for image in val.images] == [10, 7, 99, 5]
    assert (train.empty, train.crowds, train.degenerate) == (2, 2, 2)
    left_out = "2 images without objects, 2 crowds, 2 boxes without area and 0 empty masks"
    assert data.remarks() == [f"left out of training: {left_out}"]
    assert len(val.content()["annotations"]) == 7
    _, target = train[0]
    assert target["labels"].tolist() == [1, 3]
    assert target["boxes"].tolist() == [[4, 4, 24, 34], [30, 10, 63.5, 47]]
    assert target["masks"].shape == (2, 48, 64)
    assert target["masks"].sum((1, 2)).tolist() == [600, 34 * 37]
    _, empty = val[by_id(val, 5)]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 50, 50)
    assert data.describe()["classes"] == 3 and data.describe()["train_instances"] == 3


def test_pictures_of_both_splits_are_told(tmp_path):
    """By where they are: the same names in other folders are other pictures."""
    write(tmp_path)
    shutil.rmtree(tmp_path / "val2017")
    (tmp_path / "val2017").symlink_to("train2017")
    (line,) = load_coco("mine", str(tmp_path), masks=True).remarks()[1:]
    assert line.startswith(f"2 validation pictures are trained on, such as {tmp_path}/train2017/a")


def test_boxes_are_clipped_to_the_image(tmp_path):
    mine = content()
    mine["annotations"] = [
        annotation(1, 10, 3, (-5, -6, 20, 30)),
        annotation(2, 10, 3, (50, 40, 99, 99)),
    ]
    data = load_coco("mine", str(write(tmp_path, mine)), masks=False)
    _, target = data.train[0]
    assert target["boxes"].tolist() == [[0, 0, 15, 24], [50, 40, 64, 48]]
    assert "masks" not in target


def test_some_categories_only(tmp_path):
    data = load_coco("mine", str(write(tmp_path)), masks=False, categories=["dog", "cat"])
    assert data.names == ["cat", "dog"] and data.train.file.category_ids == [3, 17]
    kept = data.val.content()
    assert {a["category_id"] for a in kept["annotations"]} == {3, 17}
    assert [c["name"] for c in kept["categories"]] == ["cat", "dog"]
    assert len(kept["images"]) == 4
    with pytest.raises(ValueError, match=r"data.categories: \['cow'\] not in .*'cat'"):
        load_coco("mine", str(tmp_path), masks=False, categories=["cow"])


def test_a_limit_of_images(tmp_path):
    write(tmp_path)
    data = load_coco("mine", str(tmp_path), masks=False, train_images=1, val_images=2)
    assert [image["id"] for image in data.train.images] == [10]
    assert [image["id"] for image in data.val.images] == [10, 99]
    assert {a["image_id"] for a in data.val.content()["annotations"]} == {10, 99}
    with pytest.raises(ValueError, match="3 images asked for.*has 2"):
        load_coco("mine", str(tmp_path), masks=False, train_images=3)
    with pytest.raises(ValueError, match="data.val_images=0"):
        load_coco("mine", str(tmp_path), masks=False, val_images=0)


def test_paths_of_ones_own(tmp_path):
    write(tmp_path)
    (tmp_path / "train2017").rename(tmp_path / "pictures")
    (tmp_path / "annotations" / "instances_train2017.json").rename(tmp_path / "t.json")
    options = {"train_json": "t.json", "train_folder": str(tmp_path / "pictures")}
    assert len(load_coco("mine", str(tmp_path), masks=False, **options).train) == 2
    with pytest.raises(FileNotFoundError, match="no folder of images .*train2017; expected <root>"):
        load_coco("mine", str(tmp_path), masks=False, train_json="t.json")
    with pytest.raises(FileNotFoundError, match="no annotation file .*instances_train2017.json"):
        load_coco("mine", str(tmp_path), masks=False)


def broken(change):
    data = content()
    change(data)
    return data


FAULTS = {
    "wrong category": (
        lambda d: d["annotations"][3].update(category_id=18),
        r"annotation 4 has category_id 18; there are \[3, 17, 44\]",
    ),
    "missing image": (
        lambda d: d["annotations"][1].update(image_id=11),
        "annotation 2 is of image 11, which is not there",
    ),
    "no box": (lambda d: d["annotations"][0].pop("bbox"), "annotation 1 has no bbox"),
    "three numbers": (
        lambda d: d["annotations"][0].update(bbox=[1, 2, 3]),
        r"annotation 1 has bbox=\[1, 2, 3\]; expected four numbers",
    ),
    "infinite area": (
        lambda d: d["annotations"][0].update(area=float("inf")),
        "annotation 1 has area=inf; expected a number",
    ),
    "NaN": (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "annotation 1"),
    "crowd of a string": (
        lambda d: d["annotations"][2].update(iscrowd="no"),
        "annotation 3 has iscrowd='no'; expected 0 or 1",
    ),
    "crowd of a crowd": (
        lambda d: d["annotations"][2].update(iscrowd=256),
        "annotation 3 has iscrowd=256; expected 0 or 1",
    ),
    "no file name": (
        lambda d: d["images"][1].update(file_name=None),
        "image 7 has file_name=None; expected a text",
    ),
    "same id twice": (lambda d: d["images"][1].update(id=10), "two images have id 10"),
    "no categories": (lambda d: d.update(categories=[]), "category ids"),
    "same category twice": (lambda d: d["categories"].append({"id": 3, "name": "x"}), "distinct"),
    "nameless category": (lambda d: d["categories"].append({"id": 4}), "category 4 has no name"),
    "no annotations": (
        lambda d: d.pop("annotations"),
        "no COCO file: it has no list 'annotations'",
    ),
    "text as a number": (
        lambda d: d["annotations"][0].update(image_id="10"),
        "annotation 1 is of image '10', which is not there",
    ),
    "an id of half": (lambda d: d["images"][1].update(id=7.5), "image 7.5 has id=7.5; expected a"),
    "an id of yes": (
        lambda d: d["images"][1].update(id=True),
        "image True has id=True; expected a",
    ),
    "no id": (lambda d: d["images"][1].pop("id"), r"image \{'file_name': 'b.png'.* has no id"),
    "two kinds of ids": (
        lambda d: d["images"].append(d["images"][0] | {"id": "ten"}),
        "image ids are numbers and texts, such as .* and .*; expected one kind",
    ),
    "no pixels": (
        lambda d: d["images"][0].update(width=0),
        "image 10 has width=0; expected 1 to 65536 pixels",
    ),
    "too many pixels": (
        lambda d: d["images"][0].update(height=2**31),
        "image 10 has height=2147483648; expected 1 to 65536 pixels",
    ),
    "a string": (lambda d: d["annotations"].append("cat"), "annotation 'cat' has no id"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(fault, tmp_path):
    """The file and the entry's id."""
    change, words = FAULTS[fault]
    root = write(tmp_path)
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(ValueError, match=words) as error:
        load_coco("mine", str(root), masks=True)
    assert str(path) in str(error.value)


def test_no_json(tmp_path):
    root = write(tmp_path)
    (root / "annotations" / "instances_val2017.json").write_text("{'images'")
    with pytest.raises(ValueError, match="instances_val2017.json is not JSON"):
        load_coco("mine", str(root), masks=True)


def test_splits_with_other_categories(tmp_path):
    other = content()
    other["categories"][0] = {"id": 3, "name": "lynx"}
    root = write(tmp_path, val=other)
    with pytest.raises(ValueError, match="have other categories.*lynx"):
        load_coco("mine", str(root), masks=True)


def test_broken_picture_is_named(tmp_path):
    """Missing, cut short, of another size: path and id."""
    root = write(tmp_path)
    data = load_coco("mine", str(root), masks=False)
    path = root / "train2017" / "a.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="image 10 of .*instances_train2017.json: .*a.png"):
        data.train[0]
    path.unlink()
    with pytest.raises(ValueError, match="image 10 of .*: .*a.png"):
        data.train[0]
    path.write_bytes((root / "train2017" / "d.png").read_bytes())
    with pytest.raises(ValueError, match=r"image 10 .* has \(50, 50\) pixels.*\(64, 48\) in the"):
        data.train[0]


def test_a_picture_of_which_nothing_is_left_is_a_bad_one(tmp_path):
    """4000 x 2 pixels at a long side of 1333 have 0.67 rows: torchvision's own resize fails."""
    mine = content()
    mine["images"][0] |= {"width": 4000, "height": 2}
    mine["annotations"] = [annotation(1, 10, 3, (0, 0, 9, 2)), annotation(4, 7, 17, (5, 6, 30, 40))]
    path = str(write(tmp_path, mine, mine))
    words = r"image 10 of .*, .*a.png, has 4000 x 2 pixels: nothing is left .* data.max_size=1333"
    for images in (d := load_coco("mine", path, masks=False, max_size=1333)).train, d.val:
        with pytest.raises(ValueError, match=words):
            images[0]
    bad = BadImages(tmp_path / "bad.txt", 2)
    data = load_coco("mine", path, masks=False, max_size=1333, bad=bad)
    image, target = TrainingImages(data.train, augmentation([800], 1333, False), 0)[0, 0]
    assert image.shape == (3, 1280, 800) and target["labels"].tolist() == [2]  # the next one
    assert data.val.picture(0) is None and len(bad.lines()) == 2
    for height, width in ((3, 3998), (1, 1332)):  # what is let through has a row left
        assert F.resize(torch.zeros(3, height, width), None, max_size=1333).shape[1] >= 1
        check_shape(width, height, 1333, "picture")
    with pytest.raises(ValueError, match="picture has 25 x 2400 pixels"):
        check_shape(25, 2400, 96, "picture")  # 0.9999 by torchvision's arithmetic


def test_exif_turns_what_is_predicted_and_not_what_has_boxes(tmp_path, capsys):
    """Orientation 3, upside down: no size gives it away."""
    root = write(tmp_path)
    path = root / "train2017" / "a.png"
    stored = np.asarray(Image.open(path))
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(stored).save(path, exif=exif)
    images = load_coco("mine", str(root), masks=False).train
    index = by_id(images, 10)
    assert np.array_equal(images.picture(index).permute(1, 2, 0), stored)
    assert f"warning: {path}: its EXIF data" in capsys.readouterr().err
    seen = read_picture(path, 640).permute(1, 2, 0)
    assert np.array_equal(seen, stored[::-1, ::-1])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_one_thing_in_training_evaluation_and_prediction(mode, tmp_path):
    """Dropped, as torchvision's CocoDetection does: the colours below it are what a model sees."""
    root = write(tmp_path)
    colours = np.random.RandomState(0).randint(0, 256, (48, 64, 4)).astype(np.uint8)
    colours[10:30, 10:40, 3] = 0
    picture = Image.fromarray(colours)
    picture = picture.convert("RGB").quantize(16) if mode == "P" else picture.convert(mode)
    for split in ("train2017", "val2017"):
        options = {"transparency": 3} if mode == "P" else {}
        picture.save(root / split / "a.png", **options)
    data, path = load_coco("mine", str(root), masks=False), root / "val2017" / "a.png"
    assert Image.open(path).has_transparency_data
    coco = datasets.CocoDetection(path.parent, root / "annotations" / "instances_val2017.json")
    expected = np.asarray(coco[coco.ids.index(10)][0])
    found = [images.picture(by_id(images, 10)) for images in (data.train, data.val)]
    for pixels in (*found, read_picture(path, 640)):
        assert np.array_equal(pixels.permute(1, 2, 0), expected)


def square():
    """A mask (48, 64) and its forms: compressed RLE, RLE as a list, a polygon."""
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 5:25] = 1
    compressed = rle.encode(np.asfortranarray(mask))
    compressed["counts"] = compressed["counts"].decode()
    listed = {"size": [48, 64], "counts": digits._run_lengths(mask.astype(bool))}
    return mask, (compressed, listed, [[5, 10, 25, 10, 25, 30, 5, 30]])


def test_masks_of_every_form():
    """Polygons, RLE lists and compressed RLE give the same mask."""
    mask, shapes = square()
    for shape in shapes:
        one = annotation(1, 10, 3, (5, 10, 20, 20), segmentation=shape)
        assert np.array_equal(rle.decode(compressed_mask(one, 64, 48, "f.json")), mask)


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    "shape, words",
    [
        (None, "no mask that can be read: segmentation=None"),
        ("square", "no mask that can be read: segmentation='square'"),
        ([5, 10, 25, 10, 25, 30], "no mask that can be read: a polygon 5"),
        ([["a"] * 6], "a polygon with 'a'"),
        ([[5, 10, 25, 10, 25, nan]], "a polygon with nan"),
        ([[5, 10, inf, 10, 25, 30]], "a polygon with inf"),
        ([[5, 10, 25, 2e8, 25, 30]], "a polygon with 200000000.0; .* none beyond 256"),
        ([[5, 10, 25, -257, 25, 30]], "a polygon with -257"),
        ([[5, 10, 25, 10**400, 25, 30]], "a polygon with 1000.* characters"),
        ({"size": [48, 64]}, "no mask that can be read: its counts are not"),
        ({"size": [4, 4], "counts": [16]}, r"a mask of \[4, 4\], its image is \[48, 64\]"),
        ({"size": [2**31, 2**31], "counts": [2**62]}, "a mask of"),
        ({"size": [48, 64], "counts": [3071]}, "no mask that can be read: its counts are not"),
        ({"size": [48, 64], "counts": [-1, 3073]}, "no mask that can be read: its counts are not"),
        (
            {"size": [48, 64], "counts": [1.5, 3070.5]},
            "no mask that can be read: its counts are not",
        ),
        ({"size": [48, 64], "counts": ""}, "no mask that can be read: its counts are not"),
        ({"size": [48, 64], "counts": "PP3\x7f"}, "no mask that can be read: its counts are not"),
        (
            {"size": [48, 64], "counts": "PP3P"},
            "no mask that can be read: its counts are not",
        ),  # ends within a number
        (
            {"size": [48, 64], "counts": "PPPPPPPPPPPPPPPPPPPPPP1"},
            "no mask that can be read: its counts are not",
        ),
    ],
)
def test_what_is_no_mask_is_named(shape, words):
    """Where pycocotools would crash, take all memory, or raise anything."""
    one = annotation(8, 10, 3, (5, 10, 20, 20), segmentation=shape)
    with pytest.raises(ValueError, match=f"f.json: annotation 8 has {words}"):
        compressed_mask(one, 64, 48, "f.json")


def test_compressed_run_lengths_are_read_as_pycocotools_writes_them():
    random = np.random.RandomState(0)
    for density in (0.0, 0.02, 0.5, 0.98, 1.0):
        mask = (random.rand(97, 61) < density).astype(np.uint8)
        text = rle.encode(np.asfortranarray(mask))["counts"].decode()
        assert read_run_lengths(text) == digits._run_lengths(mask.astype(bool))


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_are_read_at_once(split, tmp_path):
    """Not after hours of training; where there is no mask head, not at all."""
    mine = content()
    mine["annotations"][3].pop("segmentation")
    root = write(tmp_path, **{split: mine})
    assert len(load_coco("mine", str(root), masks=False).val) == 4
    with pytest.raises(ValueError, match=f"{split}2017.json: annotation 4 has no mask"):
        load_coco("mine", str(root), masks=True)


def with_empty_masks(count):
    """Two objects, of two images, the first `count` of them with a mask that is empty."""
    mine = content()
    empty = ([], [[70, 5, 80, 5, 80, 15]])  # no polygon, and one outside of the image
    mine["annotations"] = [
        annotation(1, 10, 3, (4, 4, 20, 30)),
        annotation(2, 7, 17, (5, 6, 30, 40)),
    ]
    for entry, shape in zip(mine["annotations"][:count], empty):
        entry["segmentation"] = shape
    return mine


def test_empty_masks_are_left_out_and_counted(tmp_path):
    root = write(tmp_path, with_empty_masks(1), with_empty_masks(1))
    data = load_coco("mine", str(root), masks=True)
    assert [image["id"] for image in data.train.images] == [7]
    assert data.train.empty_masks == 1 and data.train.annotations[0][0]["id"] == 2
    training, validation = data.remarks()
    assert "3 images without objects" in training and "and 1 empty masks" in training
    assert "1 validation objects have an empty mask" in validation
    boxes = load_coco("mine", str(root), masks=False)
    assert len(boxes.train) == 2 and boxes.train.empty_masks == 0
    assert "masks" not in boxes.remarks()[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_but_empty_masks_is_refused(split, tmp_path):
    root = write(tmp_path, **{split: with_empty_masks(2)})
    with pytest.raises(ValueError, match=f"{split}2017.json has no .* 2 empty masks"):
        load_coco("mine", str(root), masks=True)
    assert len(load_coco("mine", str(root), masks=False).train) == 2


def reachable(start):
    """How many objects there are below one, but for classes, functions and modules."""
    seen, left = {}, [start]
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, type | types.ModuleType | types.FunctionType):
            continue
        seen[id(item)] = item
        left += gc.get_referents(item)
    return len(seen)


@pytest.mark.parametrize("masks", [True, False])
def test_workers_share_the_annotations(masks, tmp_path):
    """As many Python objects, whose counts of references every worker writes, for any number."""
    counts, mine = [], content()
    for part in ("few", "many"):
        data = load_coco("mine", str(write(tmp_path / part, mine, mine)), masks=masks)
        counts.append([reachable(data.train), reachable(data.val)])
        mine["images"] += [
            {"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(100, 110)
        ]
        mine["annotations"] += [
            annotation(i, 100 + i % 10, 17, (i % 30, 5, 20, 30)) for i in range(100, 200)
        ]
    assert counts[0] == pytest.approx(counts[1], abs=5)  # small integers are shared
    assert data.describe()["train_instances"] == 103 and len(data.train) == 12


def test_what_is_packed_is_what_the_file_has(tmp_path):
    """Of all images, those of an image in the file's order, whether trained on or not."""
    mine = content()
    mine["annotations"] = mine["annotations"][::-1]
    path = write(tmp_path, mine, mine)
    data = load_coco("mine", str(path), masks=False)
    found = data.val.content()
    theirs = json.loads((path / "annotations" / "instances_val2017.json").read_text())
    assert (found["images"], found["categories"]) == (theirs["images"], theirs["categories"])
    for image in theirs["images"]:
        ours, expected = (
            [a for a in c["annotations"] if a["image_id"] == image["id"]] for c in (found, theirs)
        )
        assert ours == expected
    assert [[a["id"] for a in own] for own in data.train.annotations] == [[2, 1], [4]]
    assert data.train.content()["images"] == [theirs["images"][0], theirs["images"][1]]


def test_packed_items():
    items = [[], {"a": [1, 2.5]}, "text", None]
    packed = Packed(iter(items))
    assert list(packed) == items and len(packed) == 4 and packed[-2] == "text"
    with pytest.raises(IndexError):
        packed[4]
    assert list(Packed([])) == []


def test_boxes_that_leave_their_image_are_counted(tmp_path):
    """More than a pixel: what is less comes from rounding."""
    mine = content()
    mine["annotations"] = [
        annotation(1, 10, 3, (-5, 4, 20, 30)),
        annotation(2, 10, 3, (50, 40, 15, 8)),  # one pixel beyond 64
        annotation(3, 7, 3, (10, 40, 10, 25.5)),
        annotation(4, 7, 3, (10, 40, 10, 20)),
    ]
    data = load_coco("mine", str(write(tmp_path, mine)), masks=False)
    assert (data.train.leaving, data.val.leaving) == (2, 0)
    assert "2 training and 0 validation boxes leave their image" in data.remarks()[1]


def renamed(change):
    """The content with every id of an image, an object and a category changed."""
    mine = copy.deepcopy(content())
    for entry in mine["images"] + mine["annotations"] + mine["categories"]:
        for key in ("id", "image_id", "category_id"):
            if key in entry:
                entry[key] = change(entry[key])
    return mine


@pytest.mark.parametrize("change", [float, "id-{:03d}".format], ids=["7.0", "id-007"])
def test_ids_may_be_whole_floats_or_texts(change, tmp_path):
    """Trained and evaluated on as under whole numbers."""
    plain = load_coco("mine", str(write(tmp_path / "plain")), masks=True)
    data = load_coco("mine", str(write(tmp_path / "own", renamed(change), renamed(change))), True)
    assert data.names == plain.names and data.describe() | {"sha256": 0} == (
        plain.describe() | {"sha256": 0}
    )
    for index in range(len(plain.train)):
        ours, theirs = data.train[index][1], plain.train[index][1]
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    def metrics(images, name):
        rows = [
            (10, 3, (4, 4, 20, 28), 0.9),
            (10, 44, (30, 12, 30, 30), 0.7),
            (7, 17, (5, 6, 30, 30), 0.6),
        ]
        results = [
            {"image_id": name(i), "category_id": name(c), "bbox": list(map(float, b)), "score": s}
            for i, c, b, s in rows
        ]
        return evaluate_detections(images, results, masks=False)[0]

    found = metrics(data.val, int if change is float else change)
    assert found == metrics(plain.val, int) and 0 < found["box_ap"] < 100


def test_no_area_is_that_of_the_box(tmp_path):
    mine = content()
    mine["annotations"][0] |= {"area": None, "iscrowd": None}
    first = load_coco("mine", str(write(tmp_path, mine)), masks=False).train.annotations[0][0]
    assert (first["area"], first["iscrowd"]) == (20 * 30, 0)


def test_no_area_is_that_of_the_mask_where_there_is_one(tmp_path):
    """A bar across its box: medium by the mask (pycocotools' area), large by the box."""
    mine = content()
    mine["images"] = [{"id": 10, "file_name": "a.png", "width": 200, "height": 200}]
    bar = [0, 0, 6, 0, 140, 134, 140, 140, 134, 140, 0, 6]
    mine["annotations"] = [annotation(1, 10, 3, (0, 0, 140, 140), segmentation=[bar], area=None)]
    path = str(write(tmp_path, mine, mine))
    (one,) = load_coco("mine", path, masks=True).val.content()["annotations"]
    coco = COCO()
    coco.dataset = mine
    coco.createIndex()
    assert one["area"] == coco.annToMask(mine["annotations"][0]).sum() > 0
    results = [
        {"image_id": 10, "category_id": 3, "bbox": [0, 0, 140, 140], "score": 1}
        | {"segmentation": one["segmentation"]}
    ]
    metrics, _ = evaluate_detections(load_coco("mine", path, masks=True).val, results, masks=True)
    assert metrics["mask_ap_m"] == metrics["box_ap_m"] == pytest.approx(100)
    assert metrics["mask_ap_l"] is None and metrics["box_ap_l"] is None
    (one,) = load_coco("mine", path, masks=False).val.content()["annotations"]
    assert one["area"] == 140 * 140


def test_an_object_with_an_empty_mask_is_left_out(tmp_path):
    mine = content()
    mine["annotations"][0]["segmentation"] = [[4, 4, 5, 4]]  # a line
    _, target = load_coco("mine", str(write(tmp_path, mine)), masks=True).train[0]
    assert target["labels"].tolist() == [3] and len(target["masks"]) == 1


# --- augmentation


def test_augmentation_moves_boxes_and_masks_together(tmp_path):
    """After flips and resizing a box is still the extent of its mask."""
    root = tmp_path / "digits"
    write_digits_coco(root, 12, 2, size=96)
    data = load_coco("digits", str(root), masks=True)
    images = TrainingImages(data.train, augmentation([64, 96, 160], 200, True), seed=3)
    shapes = set()
    for index in range(len(images)):
        for epoch in range(3):
            image, target = images[epoch, index]
            assert image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
            shapes.add(min(image.shape[1:]))
            assert max(image.shape[1:]) <= 200
            assert target["masks"].shape[1:] == image.shape[1:]
            for box, mask in zip(target["boxes"].tolist(), target["masks"]):
                ys, xs = mask.nonzero().T
                extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                assert np.abs(np.array(extent) - box).max() <= 2
    assert {64, 96, 160} <= shapes and max(shapes) == 160  # shorter where 200 is the limit


def test_crops_of_the_digits(tmp_path):
    """One a digit, in its class's folder: the square of twice the box around its centre."""
    root = tmp_path / "digits"
    write_digits_coco(root, 12, 12, size=96)
    folder = write_digit_crops(root, 32)
    assert write_digit_crops(root, 32) == folder == root / "crops"
    whole = 0
    for split in ("train", "val"):
        content = json.loads((root / f"annotations/instances_{split}2017.json").read_text())
        crops = sorted((folder / split).rglob("*.png"), key=lambda path: path.stem[-6:])
        assert len(crops) == len(content["annotations"]) > 20
        for path, found in zip(crops, content["annotations"]):
            assert path.parent.name == str(found["category_id"] - 1)
            picture = Image.open(root / f"{split}2017" / f"{found['image_id']:06d}.png")
            x, y, width, height = found["bbox"]
            side = max(width, height)
            left, top = x + width // 2 - side, y + height // 2 - side
            square = (left, top, left + 2 * side, top + 2 * side)
            if min(square) >= 0 and square[2] <= picture.width and square[3] <= picture.height:
                expected = picture.crop(square).resize((32, 32), Image.BICUBIC)
                assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))
                whole += 1
    assert whole > 5

    data = build_data("digit_crops", root=str(folder))
    assert len(data.train) == len(list((folder / "train").rglob("*.png")))
    image, label = data.val[0]  # the first image of the first class
    assert label == 0 and image.shape == (3, 32, 32)
    first = min((folder / "val" / "0").iterdir())
    expected = (np.asarray(Image.open(first)).transpose(2, 0, 1) / 255).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    shown = data.evaluation.usual(image)
    np.testing.assert_allclose(shown.numpy(), (expected - mean) / std, atol=1e-5)
    assert not data.augmentation.usual.flip and data.augmentation.usual.padding == 4
    assert len(build_data("digit_crops", root=str(folder), train_images=7).train) == 7
    with pytest.raises(ValueError, match="data.train_images=999, but there are"):
        build_data("digit_crops", root=str(folder), train_images=999)
    Image.new("RGB", (8, 8)).save(folder / "val" / "0" / "other.png")
    with pytest.raises(ValueError, match="of val differ in size"):
        build_data("digit_crops", root=str(folder))


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path):
    root = tmp_path / "digits"
    write_digits_coco(root, 8, 2, size=64)
    data = load_coco("digits", str(root), masks=False)
    images = TrainingImages(data.train, augmentation([48, 64, 80], 120, True), seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [images[0, index] for index in range(len(images))]
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    again = [images[0, index] for index in reversed(range(len(images)))][::-1]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again))
    other = [images[1, index] for index in range(len(images))]
    assert not all(a.shape == b.shape and torch.equal(a, b) for (a, _), (b, _) in zip(first, other))


def test_boxes_that_shrink_below_a_pixel_go_with_their_masks(tmp_path):
    mine = content()
    mine["annotations"] = [
        annotation(1, 10, 3, (4, 4, 20, 30)),
        annotation(2, 10, 17, (40, 4, 2, 30)),
    ]
    data = load_coco("mine", str(write(tmp_path, mine)), masks=True)
    _, target = TrainingImages(data.train, augmentation([16], 100, False), 0)[0, 0]
    assert target["labels"].tolist() == [1] and len(target["masks"]) == len(target["boxes"]) == 1


# --- batches

GROUPS = [0] * 11 + [1] * 6


@pytest.mark.parametrize("gpus, images_per_gpu", [(1, 2), (4, 2), (3, 1), (2, 4)])
def test_batches_are_of_one_group_and_complete(gpus, images_per_gpu):
    sampler = GroupedSampler(GROUPS, gpus, images_per_gpu, steps=1, seed=5)
    for epoch in range(3):
        batches = sampler.epoch_batches(epoch)
        assert batches.shape == (sampler.steps_per_epoch, gpus, images_per_gpu)
        counts = collections.Counter(batches.flatten().tolist())
        assert set(counts) == set(range(17))  # every image, at least once
        if gpus == 1 and images_per_gpu == 2:
            assert sorted(counts.values()) == [1] * 16 + [2]
        for gpu in batches.flatten(0, 1):
            assert len({GROUPS[i] for i in gpu.tolist()}) == 1
    assert not torch.equal(sampler.epoch_batches(0), sampler.epoch_batches(1))
    assert torch.equal(sampler.epoch_batches(1), sampler.epoch_batches(1))
    other = GroupedSampler(GROUPS, gpus, images_per_gpu, steps=1, seed=6)
    assert not torch.equal(sampler.epoch_batches(0), other.epoch_batches(0))


def test_batches_of_processes_and_of_a_resumed_run():
    """Two processes see what one does, GPU after GPU; a later start goes on in mid-epoch."""
    whole = list(GroupedSampler(GROUPS, 4, 2, steps=9, seed=1))
    assert len(whole) == 9 and all(len(batch) == 8 for batch in whole)
    parts = [list(GroupedSampler(GROUPS, 4, 2, 9, 1, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*parts)] == whole
    later = GroupedSampler(GROUPS, 4, 2, steps=9, seed=1)
    later.first_step = 4
    assert len(later) == 5 and list(later) == whole[4:]
    assert [batch[0][0] for batch in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # epochs


def test_fewer_images_than_a_step_has():
    sampler = GroupedSampler([0, 1], 8, 2, steps=2, seed=0)
    assert sampler.steps_per_epoch == 1
    assert {index for batch in sampler for _, index in batch} == {0, 1}


# --- digits


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_digits_are_a_function_of_the_arguments(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_digits_coco(tmp_path / name, 6, 3, size=64, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
    before = digest(tmp_path / "a")
    write_digits_coco(tmp_path / "a", 6, 3, size=64)  # there already
    assert digest(tmp_path / "a") == before
    with pytest.raises(ValueError, match="written with .*'size': 64.*asked for are .*'size': 96"):
        write_digits_coco(tmp_path / "a", 6, 3, size=96)
    for wrong in ({"val_images": 0}, {"size": 16}):
        with pytest.raises(ValueError, match="data.generate"):
            write_digits_coco(tmp_path / "d", **{"train_images": 1, "val_images": 1} | wrong)


def test_digits_are_real_coco_files(tmp_path):
    """pycocotools and torchvision read them; boxes and areas are those of the masks."""
    write_digits_coco(tmp_path / "d", 30, 10, size=96)
    api = COCO(str(tmp_path / "d" / "annotations" / "instances_train2017.json"))
    assert len(api.getImgIds()) == 30 and len(api.getCatIds()) == 10
    annotations = api.loadAnns(api.getAnnIds())
    assert len(annotations) > 40
    for one in annotations:
        mask = api.annToMask(one)
        ys, xs = mask.nonzero()
        assert one["area"] == mask.sum()
        assert one["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    pictures = datasets.CocoDetection(
        str(tmp_path / "d" / "train2017"),
        str(tmp_path / "d" / "annotations" / "instances_train2017.json"),
    )
    image, found = pictures[0]
    assert max(image.size) == 96 and isinstance(found, list)
    sides = {image["width"] >= image["height"] for image in api.loadImgs(api.getImgIds())}
    assert sides == {True, False}


def test_digits_of_training_and_validation_are_other_ones(tmp_path, monkeypatch):
    """As for the classifier: the 360 digits held out are drawn in validation images only."""
    drawn = collections.defaultdict(set)
    draw = digits.draw_digits

    def watched(random, digits, chosen, size):
        drawn[len(chosen)].update(chosen.tolist())
        return draw(random, digits, chosen, size)

    monkeypatch.setattr(digits, "draw_digits", watched)
    write_digits_coco(tmp_path / "d", 2, 2, size=48)
    assert set(drawn) == {1437, 360} and not drawn[1437] & drawn[360]


def test_run_lengths():
    mask = np.zeros((2, 3), bool)
    assert digits._run_lengths(mask) == [6]
    mask[0, 0] = True  # starts with a run of ones: zeros first
    assert digits._run_lengths(mask) == [0, 1, 5]
    mask[:, 2] = True
    assert digits._run_lengths(mask) == [0, 1, 3, 2]

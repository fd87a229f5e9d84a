"""COCO-format detection data: checked files, targets, augmentation, grouped batches.

Source: the COCO format (cocodataset.org); 2017 folder layout.
"""

import hashlib
import json
import math
import os
import pickle
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..run.config import SIZE, short
from ..run.images import BadImages, read_image
from ..run.schedule import mix_seed
from ..run.stopping import spare_worker

LAYOUT = (
    "expected <root>/annotations/instances_{train,val}2017.json and <root>/{train,val}2017/, or "
    "data.train_json, data.train_folder, data.val_json, data.val_folder relative to the root"
)


class CocoFile:
    """A COCO annotation file and its pictures' folder, every entry checked.

    `content` holds images, annotations and categories as in the file, restricted to `categories`
    (names; None: all): what is evaluated against, crowds and degenerate boxes included. Labels are
    1, 2, ... in the order of category ids.

    Raises FileNotFoundError or ValueError naming the file and the entry's id.
    """

    def __init__(self, path: Path, folder: Path, categories: Sequence[str] | None = None):
        self.path, self.folder = path, folder
        text = _read(path, folder)
        self.sha256 = hashlib.sha256(text).hexdigest()
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        for key in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise ValueError(f"{path} is no COCO file: it has no list {key!r}")
        self.info = content.get("info")
        chosen = self._categories(content["categories"], categories)
        self.category_ids = [category["id"] for category in chosen]
        self.names = [category["name"] for category in chosen]
        self.labels = {id: label for label, id in enumerate(self.category_ids, 1)}
        self._check_images(content["images"])
        every = {category["id"] for category in content["categories"]}
        images = {image["id"] for image in content["images"]}
        for annotation in content["annotations"]:
            self._check_annotation(annotation, every, images)
        self.content = {
            "images": content["images"],
            "annotations": [a for a in content["annotations"] if a["category_id"] in self.labels],
            "categories": chosen,
        }

    def release(self) -> None:
        """Forget images and annotations, once `CocoImages` has packed what it needs of them."""
        self.content |= {"images": [], "annotations": []}

    def _categories(self, categories: list, wanted: Sequence[str] | None) -> list[dict]:
        for category in categories:
            where = f"{self.path}: category {_named(category)}"
            _check_id(category, "id", where)
            _check(
                category, "name", isinstance(_value(category, "name", where), str), "a text", where
            )
        ids, names = ([category[key] for category in categories] for key in ("id", "name"))
        _check_kinds(ids, f"{self.path}: category ids")
        if len(set(ids)) < len(ids) or not ids:
            raise ValueError(f"{self.path}: category ids {ids[:10]} are not distinct, or none")
        categories = sorted(categories, key=lambda category: category["id"])
        if wanted is None:
            return categories
        if unknown := [name for name in wanted if name not in names]:
            raise ValueError(f"data.categories: {unknown} not in {self.path}; it has {names}")
        return [category for category in categories if category["name"] in wanted]

    def _check_images(self, images: list) -> None:
        seen = set()
        for image in images:
            where = f"{self.path}: image {_named(image)}"
            _check_id(image, "id", where)
            name = _value(image, "file_name", where)
            _check(image, "file_name", isinstance(name, str), "a text", where)
            for key in ("width", "height"):
                size = _whole(_value(image, key, where))
                right = isinstance(size, int) and 1 <= size <= SIZE
                _check(image, key, right, f"1 to {SIZE} pixels", where)
                image[key] = size
            if image["id"] in seen:
                raise ValueError(f"{self.path}: two images have id {image['id']!r}")
            seen.add(image["id"])
        _check_kinds(list(seen), f"{self.path}: image ids")

    def _check_annotation(self, annotation, categories: set, images: set) -> None:
        where = f"{self.path}: annotation {_named(annotation)}"
        for key in ("id", "image_id", "category_id"):
            _check_id(annotation, key, where)
        if annotation["image_id"] not in images:
            raise ValueError(f"{where} is of image {annotation['image_id']!r}, which is not there")
        if annotation["category_id"] not in categories:
            raise ValueError(
                f"{where} has category_id {short(repr(annotation['category_id']))}; there are "
                f"{sorted(categories)[:10]}{' ...' if len(categories) > 10 else ''}"
            )
        box = _value(annotation, "bbox", where)
        right = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
        _check(annotation, "bbox", right, "four numbers x, y, width, height", where)
        if annotation.get("iscrowd") is None:
            annotation["iscrowd"] = 0
        if annotation.get("area") is None:
            annotation.pop("area", None)  # `CocoImages` has the mask
        else:
            _check(annotation, "area", _is_number(annotation["area"]), "a number", where)
        _check(annotation, "iscrowd", annotation["iscrowd"] in (0, 1), "0 or 1", where)
        annotation["iscrowd"] = int(annotation["iscrowd"])


def _read(path: Path, folder: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}; {LAYOUT}")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images {folder}; {LAYOUT}")
    return path.read_bytes()


def _named(entry) -> str:
    """An entry by its id, or what there is of it."""
    if isinstance(entry, dict) and isinstance(entry.get("id"), int | float | str):
        return repr(entry["id"])
    return short(repr(entry))


def _value(entry, key: str, where: str):
    if not isinstance(entry, dict) or key not in entry:
        raise ValueError(f"{where} has no {key}")
    return entry[key]


def _check(entry: dict, key: str, right: bool, expected: str, where: str) -> None:
    if not right:
        raise ValueError(f"{where} has {key}={short(repr(entry[key]))}; expected {expected}")


def _check_id(entry, key: str, where: str) -> None:
    """Ids are whole numbers, written 7 or 7.0, or texts."""
    value = _whole(_value(entry, key, where))
    right = isinstance(value, int | str) and not isinstance(value, bool)
    _check(entry, key, right, "a whole number or a text", where)
    entry[key] = value


def _check_kinds(ids: list, what: str) -> None:
    """Ids are compared and sorted: all of one kind."""
    others = [value for value in ids if type(value) is not type(ids[0])]
    if others:
        raise ValueError(
            f"{what} are numbers and texts, such as {ids[0]!r} and {others[0]!r}; expected one kind"
        )


def _whole(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_number(value) -> bool:
    """Whether `value` is a finite number, of a size that a float holds."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def clipped_box(annotation: dict, width: int, height: int) -> tuple[float, ...] | None:
    """(x1, y1, x2, y2) within the image; None for a box without area there."""
    x, y, w, h = annotation["bbox"]
    x1, y1, x2, y2 = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def leaves_image(annotation: dict, width: int, height: int) -> bool:
    """Whether a box reaches out of its image by more than a pixel, so not by rounding alone."""
    x, y, w, h = annotation["bbox"]
    return min(x, y) < -1 or x + w > width + 1 or y + h > height + 1


def _box_area(annotation: dict) -> float:
    _, _, width, height = annotation["bbox"]
    return max(0.0, width) * max(0.0, height)


def check_shape(width: int, height: int, max_size: int, where: object) -> None:
    """Raise ValueError, naming `where`, for a picture of which `max_size` leaves nothing.

    That is a short side of no pixel at a long side of `max_size`; of one exactly, rounding decides.
    """
    if min(height, width) * max_size <= max(height, width):
        raise ValueError(
            f"{where} has {width} x {height} pixels: nothing is left of its short side at "
            f"data.max_size={max_size}"
        )


def compressed_mask(annotation: dict, width: int, height: int, path: Path) -> dict:
    """COCO's compressed RLE of polygons (empty without a whole one) or of RLE.

    Raises ValueError, naming file and id, for what is neither, or of another size. What
    pycocotools does not check, and dies of, is checked here.
    """
    where = f"{path}: annotation {annotation['id']!r}"
    shape = annotation.get("segmentation")
    if isinstance(shape, list):
        _check_polygons(shape, width, height, where)
        polygons = [polygon for polygon in shape if len(polygon) >= 6]
        if polygons:
            found = rle.merge(rle.frPyObjects(polygons, height, width))
        else:
            found = rle.encode(np.zeros((height, width), np.uint8, order="F"))
    elif isinstance(shape, dict):
        size, runs = shape.get("size"), shape.get("counts")
        if size != [height, width]:
            raise ValueError(f"{where} has a mask of {size}, its image is {[height, width]}")
        if isinstance(runs, str):
            runs = read_run_lengths(runs)
        whole = isinstance(runs, list) and all(isinstance(r, int) and r >= 0 for r in runs)
        if not whole or sum(runs) != height * width:
            raise ValueError(
                f"{where} has no mask that can be read: its counts are not the lengths of runs of "
                f"{width} x {height} pixels"
            )
        found = rle.frPyObjects({"size": size, "counts": runs}, height, width)
    else:
        raise ValueError(
            f"{where} has no mask that can be read: segmentation={short(repr(shape))}; expected "
            "polygons or RLE"
        )
    return {"size": [height, width], "counts": found["counts"].decode("ascii")}


def _check_polygons(polygons: list, width: int, height: int, where: str) -> None:
    """Rasterising takes memory by the length of the outline, and whole numbers of 32 bits."""
    far = 4 * max(width, height)
    for polygon in polygons:
        if not isinstance(polygon, list):
            raise ValueError(
                f"{where} has no mask that can be read: a polygon {short(repr(polygon))}; "
                "expected a list x, y, x, y, ..."
            )
        for value in polygon:
            if not (isinstance(value, int | float) and abs(value) <= far):
                raise ValueError(
                    f"{where} has a polygon with {short(repr(value))}; expected numbers, in an "
                    f"image of {width} x {height} pixels none beyond {far}"
                )


def read_run_lengths(text: str) -> list[int] | None:
    """The run lengths that COCO's compressed RLE spells; None if it is none.

    Six bits a character from "0" on: five of the number, least first, and whether more follow;
    from the fourth run on it is the difference from the last but one.
    """
    runs, value, bits = [], 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << bits
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = bits = 0
    return None if bits else runs


class Packed(Sequence):
    """A list whose items lie pickled in one array.

    Forked data workers share its memory. Of objects each would come to have a copy of its own,
    since reading one writes its reference count: 2 GB of COCO's annotations.
    """

    def __init__(self, items: Iterable):
        content, ends = bytearray(), [0]
        for item in items:
            content += pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
            ends.append(len(content))
        self.content, self.ends = np.frombuffer(content, np.uint8), np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index) -> Any:
        index = range(len(self))[index]
        return pickle.loads(self.content[self.ends[index] : self.ends[index + 1]])


class CocoImages:
    """(image, target) of a CocoFile's images: uint8 (3, H, W), and boxes, labels, masks.

    Targets leave out crowds, boxes without area and, with `masks`, objects whose mask is empty.
    Without an area in the file that of the mask counts, or of the box where no mask is read.
    `trained` keeps the images that have a target left. `limit` takes that many at even distances.
    Boxes are (x1, y1, x2, y2) in pixels. Masks are read at once, into compressed RLE. `images` and
    `annotations`, those of the targets of each image, are packed: `file` may be released.

    A picture that cannot be read, has another size, or of which a long side of `max_size` leaves
    nothing, is noted in `bad`. While that lets it pass,
    the next one that can be read stands in for it; `unread` holds such ids of this process's share
    of the last evaluation.

    Raises ValueError naming path and id for one bad picture too many, a mask that cannot be read,
    or a file of which nothing is left.
    """

    def __init__(
        self,
        file: CocoFile,
        masks: bool,
        trained: bool,
        limit: int | None = None,
        bad: BadImages | None = None,
        max_size: int | None = None,
    ):
        self.file, self.masks, self.bad = file, masks, bad or BadImages()
        self.max_size = max_size
        self.unread: set[int] = set()
        images = {image["id"]: image for image in file.content["images"]}
        by_image = {id: [] for id in images}  # of the targets
        others = {id: [] for id in images}  # (place among all of its image, annotation)
        self.crowds = self.degenerate = self.empty_masks = self.leaving = 0
        for annotation in file.content["annotations"]:
            id = annotation["image_id"]
            size, crowd = (images[id]["width"], images[id]["height"]), annotation["iscrowd"]
            mask = None
            if masks and not (trained and crowd):
                mask = annotation["segmentation"] = compressed_mask(annotation, *size, file.path)
            elif trained and not masks:
                annotation.pop("segmentation", None)
            if "area" not in annotation:
                annotation["area"] = int(rle.area(mask)) if mask else _box_area(annotation)
            used = not crowd and clipped_box(annotation, *size) is not None
            if crowd:
                self.crowds += 1
            elif not used:
                self.degenerate += 1
            elif mask is not None and rle.area(mask) == 0:
                self.empty_masks += 1
                used = False
            if used:
                by_image[id].append(annotation)
                self.leaving += leaves_image(annotation, *size)
            else:
                others[id].append((len(by_image[id]) + len(others[id]), annotation))
        kept = [image for id, image in images.items() if by_image[id] or not trained]
        self.empty = len(images) - len(kept)
        if not kept:
            raise ValueError(f"{file.path} has no image to use: {self.left_out()}")
        if self.empty_masks and not any(by_image.values()):
            raise ValueError(f"{file.path} has no object with a mask: {self.left_out()}")
        if limit is not None:
            if limit > len(kept):
                raise ValueError(f"{limit} images asked for, but {file.path} has {len(kept)}")
            kept = [kept[i * len(kept) // limit] for i in range(limit)]
        self.targets = sum(len(by_image[image["id"]]) for image in kept)
        self.instances = self.targets + sum(len(others[image["id"]]) for image in kept)
        self.images = Packed(kept)
        self.annotations = Packed(by_image[image["id"]] for image in kept)
        self._others = Packed(others[image["id"]] for image in kept)

    def __len__(self) -> int:
        return len(self.images)

    def left_out(self) -> str:
        """What of the file is not learned from, and why."""
        empty_masks = f" and {self.empty_masks} empty masks" if self.masks else ""
        return (
            f"{self.empty} images without objects, {self.crowds} crowds, {self.degenerate} boxes "
            f"without area{empty_masks}"
        )

    def content(self, without: Collection = ()) -> dict:
        """What these images are evaluated against, in COCO's format, but for the ids `without`."""
        images, annotations = [], []
        for image, own, others in zip(self.images, self.annotations, self._others):
            if image["id"] not in without:
                images.append(image)
                for place, annotation in others:
                    own.insert(place, annotation)
                annotations += own
        categories = self.file.content["categories"]
        return {"images": images, "annotations": annotations, "categories": categories}

    def landscape(self) -> list[bool]:
        return [image["width"] >= image["height"] for image in self.images]

    def picture(self, index: int) -> Tensor | None:
        """The uint8 image (3, H, W); None if it cannot be read and `bad` lets that pass."""
        try:
            return self._read(index)
        except ValueError as error:
            self.bad.add(error)
            return None

    def _read(self, index: int) -> Tensor:
        image = self.images[index]
        path = self.file.folder / image["file_name"]
        where = f"image {image['id']} of {self.file.path}"
        if self.max_size is not None:
            check_shape(image["width"], image["height"], self.max_size, f"{where}, {path},")
        try:
            picture = read_image(path, "boxes")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if picture.size != (image["width"], image["height"]):
            raise ValueError(
                f"{where} has {picture.size} pixels in {path}, but "
                f"{(image['width'], image['height'])} in the annotations"
            )
        return F.pil_to_tensor(picture)

    def _readable(self, first: int) -> tuple[int, Tensor]:
        """The first picture from index `first` on that can be read, and its index."""
        for place in range(first, first + len(self)):
            index = place % len(self)
            picture = self.picture(index)
            if picture is not None:
                return index, picture
        raise ValueError(f"none of {len(self)} images of {self.file.path} can be read")

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict]:
        index, picture = self._readable(index)
        return tv_tensors.Image(picture), self.target(index)

    def target(self, index: int) -> dict[str, Tensor]:
        """Boxes, labels and perhaps masks (N, H, W) of the image at `index`."""
        width, height = self.images[index]["width"], self.images[index]["height"]
        annotations = self.annotations[index]
        boxes = [clipped_box(a, width, height) for a in annotations]
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        labels = [self.file.labels[a["category_id"]] for a in annotations]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        if self.masks:
            masks = np.zeros((len(annotations), height, width), np.uint8)
            for mask, annotation in zip(masks, annotations):
                mask[:] = rle.decode(annotation["segmentation"])
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return target


def augmentation(sizes: Sequence[int], max_size: int, flip: bool) -> v2.Transform:
    """Flip, scale to [0, 1], and a short side drawn from `sizes` with a long side up to `max_size`.

    Resampled without antialiasing, as the detectors do in evaluation. Boxes of less than a pixel
    are dropped with their masks.
    """
    return v2.Compose(
        [
            *([v2.RandomHorizontalFlip()] if flip else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomShortestSize(list(sizes), max_size=max_size, antialias=False),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
    )


class TrainingImages(Dataset):
    """Transformed (image, target) by (epoch, index); random numbers depend on these and `seed`."""

    def __init__(self, images: CocoImages, transform: v2.Transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, index = key
        image, target = self.images[index]
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
        try:
            image, target = self.transform(image, target)
        finally:
            torch.set_rng_state(state)
        return image.as_subclass(Tensor), {k: v.as_subclass(Tensor) for k, v in target.items()}


class GroupedSampler(Sampler):
    """This process's batches of a (GPUs, images per GPU) setting, for a run of `steps` steps.

    Each epoch is a permutation drawn from (seed, epoch) and cut into GPU batches within which all
    images are of one group (landscape or portrait), so that little is padded; groups and steps are
    filled up by images of the same epoch, so that each comes at least once. A batch lists (epoch,
    index) of the process's gpus / world_size virtual GPUs, GPU after GPU. Set `first_step` before
    iterating.
    """

    def __init__(
        self,
        groups: Sequence[int],
        gpus: int,
        images_per_gpu: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.groups, self.images_per_gpu = torch.tensor(groups, dtype=torch.int64), images_per_gpu
        self.gpus, self.steps, self.seed = gpus, steps, seed
        share = gpus // world_size
        self.own = slice(rank * share, (rank + 1) * share)
        sizes = torch.bincount(self.groups).tolist()
        batches = sum(math.ceil(size / images_per_gpu) for size in sizes)
        self.steps_per_epoch = math.ceil(batches / gpus)
        self.first_step = 0

    def __len__(self) -> int:
        return self.steps - self.first_step

    def epoch_batches(self, epoch: int) -> Tensor:
        """(steps per epoch, gpus, images per GPU) indices of images."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(len(self.groups), generator=generator)
        batches = []  # (place in the permutation of the last image, images)
        for group in self.groups.unique().tolist():
            places = (self.groups[order] == group).nonzero().flatten()
            count = math.ceil(len(places) / self.images_per_gpu) * self.images_per_gpu
            ends = places.repeat(math.ceil(count / len(places)))[:count]
            for start in range(0, count, self.images_per_gpu):
                part = slice(start, start + self.images_per_gpu)
                whole = start + self.images_per_gpu <= len(places)
                place = ends[part][-1].item() if whole else len(order)
                batches.append((place, order[ends[part]]))
        batches = [images for _, images in sorted(batches, key=lambda batch: batch[0])]
        total = self.steps_per_epoch * self.gpus
        batches = (batches * math.ceil(total / len(batches)))[:total]
        return torch.stack(batches).view(self.steps_per_epoch, self.gpus, self.images_per_gpu)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, batches = None, None
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, batches = epoch, self.epoch_batches(epoch)
            yield [(epoch, index) for index in batches[place, self.own].flatten().tolist()]


@dataclass
class DetectionData:
    """A detection task. `sha256` is of the annotation files."""

    name: str
    train: CocoImages
    val: CocoImages
    names: list[str]  # of the classes, label 1 first
    sha256: str

    def describe(self) -> dict:
        """Name, sizes and hash, as they stand in a run's record."""
        return {
            "name": self.name,
            "train_images": len(self.train),
            "val_images": len(self.val),
            "train_instances": self.train.targets,
            "val_instances": self.val.instances,
            "classes": len(self.names),
            "sha256": self.sha256,
        }

    def remarks(self) -> list[str]:
        """What of the files is not used as it stands."""
        found = [f"left out of training: {self.train.left_out()}"]
        if self.val.empty_masks:
            found.append(
                f"{self.val.empty_masks} validation objects have an empty mask: missed, whatever "
                "is detected"
            )
        if self.train.leaving or self.val.leaving:
            found.append(
                f"{self.train.leaving} training and {self.val.leaving} validation boxes leave "
                "their image by more than a pixel: cut in training, evaluated as they are"
            )
        if both := _places(self.train) & _places(self.val):
            found.append(
                f"{len(both)} validation pictures are trained on, such as {min(both)}: their AP "
                "says little"
            )
        return found


def load_coco(
    name: str,
    root: str,
    masks: bool,
    train_json: str = "annotations/instances_train2017.json",
    train_folder: str = "train2017",
    val_json: str = "annotations/instances_val2017.json",
    val_folder: str = "val2017",
    categories: Sequence[str] | None = None,
    train_images: int | None = None,
    val_images: int | None = None,
    bad: BadImages | None = None,
    max_size: int | None = None,
) -> DetectionData:
    """COCO 2017, or any COCO-format files; paths are relative to `root` or absolute.

    masks: whether targets have masks. train_images, val_images: only that many, evenly spread.
    bad: notes pictures that cannot be read; None: each of them is an error. max_size: the long side
    in pixels that pictures are shrunk to, those of which nothing is left being bad; None: any.

    Raises FileNotFoundError or ValueError naming the file and the entry's id.
    """
    for key, limit in (("train_images", train_images), ("val_images", val_images)):
        if limit is not None and limit < 1:
            raise ValueError(f"data.{key}={limit}; expected 1 or more, or null for all")
    base = Path(root)
    train = CocoFile(base / train_json, base / train_folder, categories)
    val = CocoFile(base / val_json, base / val_folder, categories)
    if (train.category_ids, train.names) != (val.category_ids, val.names):
        raise ValueError(
            f"{train.path} and {val.path} have other categories: {len(train.names)} and "
            f"{len(val.names)}, first {train.names[:3]} and {val.names[:3]}"
        )
    images = [
        CocoImages(file, masks, trained, limit, bad, max_size)
        for file, trained, limit in ((train, True, train_images), (val, False, val_images))
    ]
    for file in (train, val):
        file.release()
    sha256 = hashlib.sha256((train.sha256 + val.sha256).encode()).hexdigest()
    return DetectionData(name, *images, train.names, sha256)


def _places(images: CocoImages) -> set[str]:
    """The paths of the pictures, a link to their folder followed."""
    folder = os.path.realpath(images.file.folder)
    names = (image["file_name"] for image in images.images)
    return {os.path.normpath(os.path.join(folder, name)) for name in names}


def training_loader(
    images: TrainingImages, sampler: GroupedSampler, workers: int, device: torch.device
) -> DataLoader:
    """Lists of images and of targets, a step's share of this process at a time."""
    return DataLoader(
        images,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=spare_worker,
        collate_fn=lists,
        pin_memory=device.type == "cuda",
    )


def lists(batch: list[tuple]) -> tuple[list, list]:
    images, targets = zip(*batch)
    return list(images), list(targets)

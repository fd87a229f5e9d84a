"""scikit-learn's digits on textured backgrounds: a detection task that is drawn, as COCO files.

    python -m sn.training.detection.digits data/digits_coco [IMAGES]    # and their crops

Crops of the same digits, in `root`/crops, are a classification task (`data=digit_crops`) that
pretrains a detector's backbone.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ..run.images import sklearn_digits
from ..run.schedule import mix_seed
from .data import CocoFile


def write_digits_coco(
    root: Path, train_images: int = 1600, val_images: int = 200, size: int = 128, seed: int = 0
) -> None:
    """Write scikit-learn's digits on textured backgrounds as COCO 2017 files, if not there.

    Up to five digits of 16 to 56 pixels (in 128), none overlapping another's box; a mask is what is
    drawn, a box its extent. Images have a long side of `size`; one in 25 is empty. The digits of
    training and validation are other ones, split as in data.load_digits. A function of its
    arguments alone.

    Raises ValueError if `root` holds digits written with other arguments, or for impossible ones.
    """
    if min(train_images, val_images) < 1 or size < 48:
        raise ValueError(
            f"data.generate: {train_images} and {val_images} images of {size} pixels; expected 1 "
            "or more, and 48 pixels or more"
        )
    info = {
        "description": "digits of scikit-learn (UCI Optical Recognition of Handwritten Digits)",
        "arguments": {
            "train_images": train_images,
            "val_images": val_images,
            "size": size,
            "seed": seed,
        },
    }
    there = root / "annotations" / "instances_val2017.json"
    if there.is_file():
        found = CocoFile(there, root / "val2017").info
        if found != info:
            raise ValueError(
                f"data.root={root} holds digits written with {(found or {}).get('arguments')}, "
                f"asked for are {info['arguments']}; choose another data.root"
            )
        return
    digits = sklearn_digits()
    order = np.random.RandomState(0).permutation(len(digits[0]))  # as data.load_digits
    part = root.with_name(f"{root.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    (part / "annotations").mkdir(parents=True)
    for split, (name, count, chosen) in enumerate(
        [("train2017", train_images, order[360:]), ("val2017", val_images, order[:360])]
    ):
        (part / name).mkdir()
        content = {"info": info, "images": [], "annotations": []}
        content["categories"] = [{"id": d + 1, "name": str(d)} for d in range(10)]
        for index in range(count):
            random = np.random.RandomState(mix_seed(seed, split, index))
            picture, objects = draw_digits(random, digits, chosen, size)
            height, width = picture.shape[:2]
            file_name = f"{index + 1:06d}.png"
            Image.fromarray(picture).save(part / name / file_name, compress_level=1)
            content["images"].append(
                {"id": index + 1, "file_name": file_name, "width": width, "height": height}
            )
            for digit, mask in objects:
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": index + 1,
                        "category_id": digit + 1,
                        "iscrowd": 0,
                        "bbox": _extent(mask),
                        "area": int(mask.sum()),
                        "segmentation": {"size": [height, width], "counts": _run_lengths(mask)},
                    }
                )
        with open(part / "annotations" / f"instances_{name}.json", "w") as file:
            json.dump(content, file)
    root.parent.mkdir(parents=True, exist_ok=True)
    _put(part, root, there)


def draw_digits(random, digits, chosen: np.ndarray, size: int) -> tuple[np.ndarray, list]:
    """One picture (H, W, 3) uint8 and its [(digit, mask (H, W) bool)].

    `digits`: images and labels, as by `sklearn_digits`; `chosen`: which of them may be drawn.
    """
    images, labels = digits
    sides = [size, int(size * random.uniform(0.7, 1.0))]
    width, height = sides if random.rand() < 0.6 else sides[::-1]
    canvas = texture(random, height, width)
    objects, boxes = [], []
    count = 0 if random.rand() < 0.04 else random.randint(1, 6)
    for _ in range(count):
        index = chosen[random.randint(len(chosen))]
        side = int(size / 128 * 16 * 3.5 ** random.rand())
        shape = Image.fromarray((images[index] * (255 / 16)).astype(np.uint8))
        strength = np.asarray(shape.resize((side, side), Image.BICUBIC)) / 255
        drawn = strength > 0.4
        color = random.uniform(0.75, 1.0, 3) if random.rand() < 0.5 else random.uniform(0, 0.15, 3)
        for _ in range(20):
            x, y = random.randint(width - side + 1), random.randint(height - side + 1)
            if all(x + side <= a or a + s <= x or y + side <= b or b + s <= y for a, b, s in boxes):
                break
        else:
            continue
        boxes.append((x, y, side))
        mask = np.zeros((height, width), bool)
        mask[y : y + side, x : x + side] = drawn
        canvas[mask] = color
        objects.append((int(labels[index]), mask))
    noise = random.normal(0, 0.03, canvas.shape)
    return ((canvas + noise).clip(0, 1) * 255).astype(np.uint8), objects


def texture(random, height: int, width: int) -> np.ndarray:
    """A background (H, W, 3) in 0.2 to 0.7: coloured clouds and stripes."""
    clouds = random.randint(0, 256, (random.randint(2, 9), random.randint(2, 9), 3))
    clouds = Image.fromarray(clouds.astype(np.uint8)).resize((width, height), Image.BICUBIC)
    y, x = np.mgrid[:height, :width]
    angle, period = random.uniform(0, np.pi), random.uniform(4, 24)
    stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)[..., None]
    return 0.2 + 0.5 * (0.8 * np.asarray(clouds) / 255 + 0.1 * (stripes + 1))


def write_digit_crops(root: Path, size: int = 64) -> Path:
    """Cut every digit out of `root`'s pictures, if that was not done yet; return `root`/crops.

    An image folder, {train,val}/<digit>/<picture>_<number>.png of `size` pixels: a square of twice
    the box's longer side around its centre, beyond the picture its border repeated.
    """
    folder = root / "crops"
    if folder.is_dir():
        return folder
    part = root / f"crops.part{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    for split in ("train", "val"):
        with open(root / "annotations" / f"instances_{split}2017.json") as file:
            content = json.load(file)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for category in content["categories"]:
            (part / split / category["name"]).mkdir(parents=True)
        for number, annotation in enumerate(content["annotations"]):
            file_name = names[annotation["image_id"]]
            picture = np.asarray(Image.open(root / f"{split}2017" / file_name).convert("RGB"))
            x, y, width, height = annotation["bbox"]
            side = max(width, height)
            padded = np.pad(picture, ((side, side), (side, side), (0, 0)), mode="edge")
            left, top = x + width // 2, y + height // 2  # of the square, in the padded picture
            crop = Image.fromarray(padded[top : top + 2 * side, left : left + 2 * side])
            name = f"{Path(file_name).stem}_{number:06d}.png"
            digit = str(annotation["category_id"] - 1)
            crop.resize((size, size), Image.BICUBIC).save(part / split / digit / name)
    _put(part, folder, folder)
    return folder


def _put(part: Path, folder: Path, there: Path) -> None:
    """Give a finished folder its name, unless another process was first, as `there` shows."""
    try:
        part.rename(folder)
    except OSError:
        shutil.rmtree(part)
        if not there.exists():
            raise


def _extent(mask: np.ndarray) -> list[int]:
    """Box x, y, width, height of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: lengths of runs in column order, zeros first."""
    flat = mask.flatten(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="where they go, such as data/digits_coco")
    parser.add_argument("images", type=int, nargs="?", default=1600, help="of training (1600)")
    args = parser.parse_args()
    if not 1 <= args.images <= 10**6:
        parser.error(f"{args.images} images; expected 1 to {10**6}")
    write_digits_coco(args.root, args.images)
    print(f"{args.root}, {write_digit_crops(args.root)}")


if __name__ == "__main__":
    main()

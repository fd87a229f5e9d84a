"""A small COCO data set by hand: crowds, boxes without area, an empty image, ids with gaps."""

import json

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}, {"id": 44, "name": "cup"}]


def annotation(id, image_id, category_id, bbox, **more):
    x, y, w, h = bbox
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    base = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": list(bbox)}
    return base | {"area": w * h, "iscrowd": 0, "segmentation": polygon} | more


def content():
    """Four images: two with objects, one with a crowd and a box without area only, one empty."""
    images = [
        {"id": 10, "file_name": "a.png", "width": 64, "height": 48},
        {"id": 7, "file_name": "b.png", "width": 40, "height": 64},
        {"id": 99, "file_name": "c.png", "width": 64, "height": 64},
        {"id": 5, "file_name": "d.png", "width": 50, "height": 50},
    ]
    crowd = {"size": [48, 64], "counts": [0, 48 * 8, 48 * 56]}
    annotations = [
        annotation(1, 10, 3, (4, 4, 20, 30)),
        annotation(2, 10, 44, (30, 10, 33.5, 37)),  # half a pixel from the right edge
        annotation(3, 10, 17, (0, 0, 8, 48), iscrowd=1, segmentation=crowd),
        annotation(4, 7, 17, (5, 6, 30, 40)),
        annotation(5, 7, 3, (10, 10, 0, 12)),  # no width
        annotation(
            6,
            99,
            3,
            (0, 0, 60, 60),
            iscrowd=1,
            segmentation={"size": [64, 64], "counts": [64 * 64]},
        ),  # fmt: skip
        annotation(7, 99, 3, (70, 5, 10, 10)),  # outside its image
    ]
    return {"images": images, "annotations": annotations, "categories": list(CATEGORIES)}


def write(root, train=None, val=None):
    """Write both splits as a COCO 2017 folder; returns it."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, data in (("train2017", train), ("val2017", val)):
        data = content() if data is None else data
        (root / split).mkdir(exist_ok=True)
        for place, image in enumerate(data["images"]):
            size = (int(image.get("height", 8)), int(image.get("width", 8)), 3)
            seed = image["id"] if isinstance(image.get("id"), int) else place
            pixels = np.random.RandomState(seed).randint(0, 256, size)
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / image["file_name"])
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root

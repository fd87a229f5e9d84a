"""Pictures with detections drawn on them, alone and as a grid."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .detectors import image_masks

# Okabe and Ito's colours: a class keeps its own, whatever else is in the picture
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
LEAST, MOST = 480, 1600  # pixels of a drawn picture's long side
FEW = 3  # detections drawn when none has the score asked for
FONT, LONGEST = 15, 24  # pixels; letters of a class's name

Box = tuple[float, float, float, float]


def draw_detections(
    picture: Tensor,
    found: dict[str, Tensor],
    names: Sequence[str],
    threshold: float = 0.5,
    truth: dict[str, Tensor] | None = None,
    most: int = MOST,
) -> Tensor:
    """`picture`, uint8 (3, H, W), with the detections of score `threshold` or more; larger.

    `found` is what a detector found: boxes in pixels, labels, scores, perhaps masks of the boxes.
    If there are none, the best few, and a note of it. `truth`, boxes and labels and perhaps masks
    (N, H, W), is drawn on a second copy, to the left. Small pictures are enlarged, and none has a
    long side of more than `most` pixels. Returns uint8 (3, H', W').
    """
    order = found["scores"].argsort(descending=True, stable=True).cpu()
    scores = found["scores"].cpu()[order]
    count = int((scores >= threshold).sum())
    percent = f"{100 * threshold:.0f} %"
    note = f"{count} detection{'' if count == 1 else 's'} of {percent} or more"
    if count == 0:
        count = min(FEW, len(scores))
        note = f"none of {percent} or more; the best {count}" if count else "no detections"
    kept = order[:count]
    texts = [f"{100 * score:.0f} %" for score in scores[:count].tolist()]
    panels = [_panel(picture, _chosen(found, kept, picture), names, texts, note, most)]
    if truth is not None:
        objects = len(truth["boxes"])
        title = f"ground truth, {objects} object{'' if objects == 1 else 's'}"
        panels.insert(0, _panel(picture, truth, names, [""] * objects, title, most))
    return grid(panels, columns=2)


def _chosen(found: dict[str, Tensor], kept: Tensor, picture: Tensor) -> dict[str, Any]:
    """The detections `kept`; their masks (H, W) one at a time."""
    chosen: dict[str, Any] = {
        key: found[key].cpu()[kept] for key in ("boxes", "labels", "masks") if key in found
    }
    return chosen | {"masks": image_masks(chosen, *picture.shape[1:])}


def _panel(
    picture: Tensor,
    objects: Mapping[str, Any],
    names: Sequence[str],
    texts: Sequence[str],
    title: str,
    most: int,
) -> Tensor:
    """One copy of the picture under its title, with boxes, masks of (H, W), names and `texts`."""
    height, width = picture.shape[1:]
    scale = min(max(1.0, LEAST / max(height, width)), most / max(height, width))
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    labels = objects["labels"].tolist()
    canvas = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    canvas = canvas.resize(size, Image.Resampling.BICUBIC)
    for label, mask in zip(labels, objects.get("masks", ())):
        area = Image.fromarray(255 * np.asarray(mask, np.uint8)).resize(size)
        canvas.paste(Image.blend(canvas, Image.new("RGB", size, color_of(label)), 0.5), mask=area)
    draw = ImageDraw.Draw(canvas)
    boxes = [tuple(scale * side for side in box) for box in objects["boxes"].tolist()]
    line = max(2, round(min(size) / 250))
    for label, box in reversed([*zip(labels, boxes)]):  # the best one last, on top
        draw.rectangle(_rising(box), outline=color_of(label), width=line)
    words = [f"{shortened(names[label - 1])} {text}".strip() for label, text in zip(labels, texts)]
    places = label_places(boxes, [_text_size(word) for word in words], size)
    for label, word, box, place in zip(labels, words, boxes, places):
        if place is None:
            continue
        if gap(place, box) > 2 * FONT:  # it had to move away
            draw.line([*_middle(place), *_middle(box)], fill=color_of(label), width=1)
        draw.rectangle(place, fill=color_of(label))
        draw.text(place[:2], word, fill=_ink(label), font=_font())
    missing = sum(place is None for place in places)
    title += f" ({missing} names left out)" if missing else ""
    sheet = Image.new("RGB", (size[0], size[1] + FONT + 6), "white")
    sheet.paste(canvas, (0, FONT + 6))
    ImageDraw.Draw(sheet).text((2, 1), title, fill="black", font=_font())
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def label_places(
    boxes: Sequence[Box], sizes: Sequence[tuple[int, int]], picture: tuple[int, int]
) -> list[Box | None]:
    """Where labels of `sizes` (width, height) go: near their boxes, none over another.

    Of what is free, the place that hides least of the other boxes, above its own first. None:
    there is no room left for it.
    """
    every = np.asarray(boxes, float).reshape(-1, 4)
    placed, result = np.empty((0, 4)), []
    for index, ((x1, y1, x2, y2), (width, height)) in enumerate(zip(boxes, sizes)):
        room = max(0, picture[0] - width), max(0, picture[1] - height)
        near = [(x1, y1 - height), (x1, y2), (x2, y1), (x1 - width, y1), (x1, y1)]
        near += [(x2 - width, y1 - height), (x2 - width, y2), (x1, y2 - height)]
        free = _free(near, room, (width, height), placed)
        others = np.delete(every, index, axis=0)
        free = free[overlap(free[:, None], others).sum(1).argsort(kind="stable")]
        if not len(free):
            rows = range(0, max(1, picture[1] - height), max(1, height))
            columns = range(0, max(1, picture[0] - width), max(1, width))
            far = np.array([(x, y) for y in rows for x in columns], float)
            free = _free(far, room, (width, height), placed)
            free = free[np.hypot(free[:, 0] - x1, free[:, 1] - y1).argsort(kind="stable")]
        placed = np.concatenate((placed, free[:1]))
        result.append(tuple(free[0].tolist()) if len(free) else None)
    return result


def _free(
    spots: Sequence, room: tuple[int, int], size: tuple[int, int], placed: np.ndarray
) -> np.ndarray:
    """Labels of `size` at `spots` (x, y), moved into the picture, that touch none of `placed`."""
    corners = np.clip(np.asarray(spots, float), 0, room)
    places = np.concatenate((corners, corners + size), 1)
    return places[~(overlap(places[:, None], placed) > 0).any(1)]


def overlap(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """The areas that boxes (..., 4) of x1, y1, x2, y2 share."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return sides.clip(0).prod(-1)


def gap(a: Box, b: Box) -> float:
    """The distance between two boxes, 0 if they touch."""
    x = max(0.0, a[0] - b[2], b[0] - a[2])
    return math.hypot(x, max(0.0, a[1] - b[3], b[1] - a[3]))


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."


def color_of(label: int) -> str:
    return COLORS[label % len(COLORS)]


def _ink(label: int) -> str:
    """Black or white, whichever reads better on the class's colour."""
    red, green, blue = (int(color_of(label)[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else "white"


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT)


def _text_size(text: str) -> tuple[int, int]:
    return math.ceil(_font().getlength(text)) + 2, FONT + 4


def _middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _rising(box: Box) -> Box:
    x1, y1, x2, y2 = box
    return x1, y1, max(x1, x2), max(y1, y2)


def grid(pictures: Sequence[Tensor], columns: int = 2) -> Tensor:
    """uint8 pictures of any sizes side by side on white, each row as high as its highest."""
    width = max(picture.shape[2] for picture in pictures) + 8
    columns = min(columns, len(pictures))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    strips = []
    for row in rows:
        height = max(picture.shape[1] for picture in row) + 8
        strips.append(torch.full((3, height, columns * width), 255, dtype=torch.uint8))
        for index, picture in enumerate(row):
            x = index * width
            strips[-1][:, : picture.shape[1], x : x + picture.shape[2]] = picture
    return torch.cat(strips, 1)


def save_picture(picture: Tensor, path) -> None:
    """Write a uint8 (3, H, W) picture."""
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(path)

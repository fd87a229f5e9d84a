"""Pictures with detections drawn on them, alone and as a grid."""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

# Okabe and Ito's colours: a class keeps its own, whatever else is in the picture
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def draw_detections(
    picture: Tensor, found: dict[str, Tensor], names: Sequence[str], threshold: float = 0.5
) -> Tensor:
    """`picture`, uint8 (3, H, W), with the boxes, masks and labels of score `threshold` or more."""
    kept = found["scores"] >= threshold
    if not kept.any():
        return picture.clone()
    labels, scores = found["labels"][kept].tolist(), found["scores"][kept].tolist()
    colors = [COLORS[label % len(COLORS)] for label in labels]
    if "masks" in found:
        masks = found["masks"][kept][:, 0] > 0.5
        picture = draw_segmentation_masks(picture, masks.cpu(), alpha=0.5, colors=colors)
    texts = [f"{names[label - 1]} {100 * score:.0f}" for label, score in zip(labels, scores)]
    width = max(1, min(picture.shape[1:]) // 150)
    return draw_bounding_boxes(picture, found["boxes"][kept].cpu(), texts, colors, width=width)


def grid(pictures: Sequence[Tensor], columns: int = 4) -> Tensor:
    """uint8 pictures of any sizes side by side on white, each in the top left of its cell."""
    height = max(picture.shape[1] for picture in pictures) + 4
    width = max(picture.shape[2] for picture in pictures) + 4
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    canvas = torch.full((3, rows * height, columns * width), 255, dtype=torch.uint8)
    for index, picture in enumerate(pictures):
        y, x = index // columns * height, index % columns * width
        canvas[:, y : y + picture.shape[1], x : x + picture.shape[2]] = picture
    return canvas


def save_picture(picture: Tensor, path) -> None:
    """Write a uint8 (3, H, W) picture."""
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(path)

"""Box and mask AP by COCO's own code, over any number of processes, each image once."""

import contextlib
import copy
import io
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from ...freezing import modes_kept
from ..run.distributed import in_group
from .data import CocoImages
from .detectors import image_masks

# positions in COCOeval.stats
STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_s": 3, "ap_m": 4, "ap_l": 5, "ar100": 8}


def evaluation_batches(
    num_images: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Batches of this process's share of indices; over all processes every image comes once."""
    own = list(range(rank, num_images, world_size))
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


@torch.no_grad()
def detect(
    model: nn.Module, images: CocoImages, batches: Iterable[list[int]], to_device: Callable
) -> list[dict]:
    """Detections on `images` of the indices in `batches`, in COCO's results format.

    A picture that cannot be read now, and may be passed over, is noted in `images.unread`, emptied
    before. The model resizes the images itself and is in evaluation mode meanwhile. Images of one
    batch are padded to a common size, which norms over space see: one at a time is what users get.
    """
    results = []
    images.unread = set()
    with modes_kept(model):
        model.eval()
        for indices in batches:
            read = {images.images[index]["id"]: images.picture(index) for index in indices}
            pictures = {id: picture for id, picture in read.items() if picture is not None}
            images.unread |= read.keys() - pictures.keys()
            inputs = [to_device(picture.float() / 255) for picture in pictures.values()]
            for id, found in zip(pictures, model(inputs) if inputs else []):
                masks = image_masks(found, *pictures[id].shape[1:])
                results += coco_results(found, id, images.file.category_ids, masks)
    return results


def coco_results(
    found: dict[str, Tensor],
    image_id: int,
    category_ids: Sequence[int],
    masks: Iterable[np.ndarray] = (),
) -> list[dict]:
    """One image's detections (labels 1, 2, ...) as COCO results; masks: uint8 (H, W) of each."""
    boxes, scores = found["boxes"].cpu().double(), found["scores"].cpu().tolist()
    boxes[:, 2:] -= boxes[:, :2]
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), found["labels"].tolist(), scores)
    ]
    for result, mask in zip(results, masks):
        encoded = rle.encode(np.asfortranarray(mask))
        encoded["counts"] = encoded["counts"].decode("ascii")
        result["segmentation"] = encoded
    return results


def gather(results: list[dict]) -> list[dict]:
    """The results of all processes, on every process, in the order of image ids and scores."""
    if in_group():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, results)
        results = [result for part in parts for result in part]
    return sorted(results, key=lambda r: (r["image_id"], -r["score"], r["category_id"], r["bbox"]))


def evaluate_detections(
    images: CocoImages, results: list[dict], masks: bool
) -> tuple[dict[str, float | None], list[dict]]:
    """(metrics, results) of all processes together, on every process; the main one computes.

    Images whose pictures could not be read do not count.
    """
    results, unread = gather(results), images.unread
    if in_group():
        parts = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, unread)
        unread = set().union(*parts)
    metrics = [None]
    if not in_group() or dist.get_rank() == 0:
        metrics = [coco_metrics(images.content(without=unread), results, masks)]
    if in_group():
        dist.broadcast_object_list(metrics)
    return metrics[0], results


def coco_metrics(content: dict, results: list[dict], masks: bool) -> dict[str, float | None]:
    """AP in percent by pycocotools: box_ap, box_ap50, ..., and mask_ap, ... with `masks`.

    content: images, annotations and categories in COCO's format. None where there is no object of
    that size.
    """
    metrics = {}
    for kind, iou_type in (("box", "bbox"), ("mask", "segm"))[: 1 + masks]:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = _coco(content)
            if results:
                found = truth.loadRes(copy.deepcopy(_of_type(results, iou_type)))
            else:  # loadRes looks at the first result
                found = _coco(content | {"annotations": []})
            evaluation = COCOeval(truth, found, iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for name, position in STATS.items():
            value = float(evaluation.stats[position])
            metrics[f"{kind}_{name}"] = None if value < 0 else 100 * value
    return metrics


def _coco(content: dict) -> COCO:
    coco = COCO()
    coco.dataset = copy.deepcopy(content)
    # COCOeval takes an object of id 0 for none, and one of an id used before for that one
    for id, annotation in enumerate(coco.dataset["annotations"], 1):
        annotation["id"] = id
    coco.createIndex()
    return coco


def _of_type(results: list[dict], iou_type: str) -> list[dict]:
    """loadRes tells the type by the keys, and prefers boxes."""
    if iou_type == "bbox":
        return [{k: v for k, v in r.items() if k != "segmentation"} for r in results]
    return [{k: v for k, v in r.items() if k != "bbox"} for r in results]


def describe_ap(metrics: dict[str, float | None]) -> str:
    """`box AP 12.3 (AP50 30.1, AP75 8.0)`, and the masks'."""

    def text(value: float | None) -> str:
        return "none" if value is None else f"{value:.1f}"

    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap50" in metrics]
    return "; ".join(
        f"{kind} AP {text(metrics[f'{kind}_ap'])} (AP50 {text(metrics[f'{kind}_ap50'])}, "
        f"AP75 {text(metrics[f'{kind}_ap75'])})"
        for kind in kinds
    )

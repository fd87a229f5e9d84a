"""With a trained detector: the modes evaluate and predict of train_detection.py."""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from ...freezing import modes_kept
from ..run import distributed
from ..run.checkpoint import load_weights, plain_names
from ..run.display import say
from ..run.images import BadImages, is_hidden, read_image
from ..run.precision import Precision
from ..run.record import environment, write_text
from .config import DetectionConfig
from .data import CocoImages, DetectionData, check_shape, load_coco
from .detectors import build_detector, image_masks
from .digits import write_digits_coco
from .evaluation import (
    coco_results,
    describe_ap,
    detect,
    evaluate_detections,
    evaluation_batches,
    gather,
)
from .pictures import draw_detections, grid, save_picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


def load_data(config: DetectionConfig) -> DetectionData:
    """The config's data, drawn first if they are digits that are not there."""
    data = config.data
    if data.generate is not None:
        write_digits_coco(Path(data.root), **vars(data.generate))
    note = f"{config.output_dir}/bad_images.txt"
    bad = BadImages(note, data.max_bad_images, root=data.root)
    return load_coco(**data.files(), masks=config.masks, bad=bad)


def detector_options(config: DetectionConfig) -> dict:
    """What a checkpoint's weights stand for beyond their shapes: norms and anchors."""
    parts = {
        part: {key: value for key, value in options.items() if key != "momentum"}
        for part, options in config.own_parts.items()
    }
    return {"anchor_sizes": config.model.anchor_sizes} | parts


def trained_model(config: DetectionConfig, precision: Precision) -> tuple[nn.Module, dict]:
    """(model in evaluation mode, checkpoint) of checkpoint.path or the run's own checkpoint."""
    path = config.checkpoint.path or f"{config.output_dir}/checkpoint.pt"
    options = detector_options(config)
    state = {"detector": options} | load_weights(path)  # older ones lack it
    kinds = {"model": dict, "classes": list, "category_ids": list, "detector": dict}
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"{path} is no checkpoint of train_detection.py: it has no {key!r}")
    for key, value in state["detector"].items():
        if options.get(key, value) != value:  # of another architecture: the shapes tell
            raise ValueError(
                f"{path} is not of this model and these parts ({config.run_name}): {key} is "
                f"{value} there, {options[key]} asked for"
            )
    model = build_detector(num_classes=len(state["classes"]), **config.detector())
    try:
        model.load_state_dict(plain_names(state["model"]))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not of this model and these parts ({config.run_name}): "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    return precision.model(model).eval(), state


def evaluate_checkpoint(config: DetectionConfig) -> dict:
    """mode=evaluate: AP of a checkpoint on the validation images, with results and pictures."""
    processes = distributed.start(config.device, config.timeout_minutes + 5)
    precision = Precision(config.precision, processes.device, config.channels_last)
    model, state = trained_model(config, precision)
    data = load_data(config)
    if data.names != state["classes"]:
        raise ValueError(
            f"the checkpoint's classes {state['classes'][:5]}... are not those of "
            f"{data.val.file.path}: {data.names[:5]}..."
        )
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    batches = evaluation_batches(
        len(data.val), config.evaluation.batch_size, processes.rank, processes.world_size
    )
    with precision.autocast():
        results = detect(model, data.val, batches, precision.to_device)
    metrics, results = evaluate_detections(data.val, results, config.masks)
    if processes.is_main:
        write_predictions(folder, results)
        draw_validation(config, model, data.val, precision)
        content = metrics | {"data": data.describe(), **environment(processes.device)}
        write_text(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
        say(f"{describe_ap(metrics)}; evaluation.json and predictions.json in {folder}")
    return metrics


def picture_names(files: list[Path]) -> list[str]:
    """A name of its own for each: its stem, beside a.png and a.jpg a_png and a_jpg."""
    stems = Counter(path.stem for path in files)
    long = [f"{path.stem}_{path.suffix[1:]}" for path in files]
    names = [path.stem if stems[path.stem] == 1 else name for path, name in zip(files, long)]
    return names if len(set(names)) == len(names) else long  # there is an a_jpg.png, too


def predict(config: DetectionConfig) -> list[dict]:
    """mode=predict: pictures with detections, and predictions.json, for an image or a folder.

    An image that cannot be read is named, left out, and ends in an error after all others.
    """
    if config.predict.images is None:
        raise ValueError("mode=predict needs predict.images=..., an image or a folder of images")
    files = picture_files(Path(config.predict.images))
    processes = distributed.start(config.device, config.timeout_minutes + 5)
    precision = Precision(config.precision, processes.device, config.channels_last)
    model, state = trained_model(config, precision)
    out = Path(config.predict.out or f"{config.output_dir}/predictions")
    if out.resolve() == files[0].parent.resolve():
        raise ValueError(f"predict.out={out} is where the images are; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    names = picture_names(files)
    results, errors = [], []
    for index in range(processes.rank, len(files), processes.world_size):
        try:
            picture = read_picture(files[index], config.data.max_size)
        except ValueError as error:
            say(f"warning: {error}; left out", error=True)
            errors.append(str(error))
            continue
        found = find(model, picture, precision)
        drawn = draw_detections(picture, found, state["classes"], config.evaluation.threshold)
        save_picture(drawn, out / f"{names[index]}.png")
        masks = image_masks(found, *picture.shape[1:])
        rows = coco_results(found, index, state["category_ids"], masks)
        labels = found["labels"].tolist()
        results += [
            row | {"file_name": files[index].name, "category": state["classes"][label - 1]}
            for row, label in zip(rows, labels)
        ]
    results = gather(results)
    if processes.is_main:
        write_predictions(out, results)
        say(f"{len(files)} images, {len(results)} detections; pictures in {out}")
    if errors:
        raise ValueError(f"{len(errors)} of {len(files)} images were left out: {errors[0]}")
    return results


def picture_files(source: Path) -> list[Path]:
    """The image `source`, or those of that folder. Raises ValueError if it has none."""
    if not source.is_dir():
        return [source]
    inside = (path for path in source.iterdir() if not (path.is_dir() or is_hidden(path.name)))
    files = sorted(path for path in inside if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"predict.images={source}: no image ({', '.join(SUFFIXES)}) in it")
    return files


def read_picture(path: Path, max_size: int) -> Tensor:
    """The uint8 picture (3, H, W), upright, of a size of which `max_size` leaves something.

    Transparency is dropped, as from the pictures that were trained on.
    """
    picture = F.pil_to_tensor(read_image(path, "upright"))
    check_shape(picture.shape[2], picture.shape[1], max_size, path)
    return picture


@torch.no_grad()
def find(model: nn.Module, picture: Tensor, precision: Precision) -> dict[str, Tensor]:
    """Detections on one uint8 picture (3, H, W), on the CPU; all modes are restored."""
    with modes_kept(model), precision.autocast():
        model.eval()
        (found,) = model([precision.to_device(picture.float() / 255)])
    return {key: value.cpu() for key, value in found.items()}


def draw_validation(
    config: DetectionConfig, model: nn.Module, images: CocoImages, precision: Precision
) -> Tensor | None:
    """predictions.png: the first validation images, ground truth and detections; returned too."""
    drawn = []
    for index in range(min(config.evaluation.pictures, len(images))):
        picture = images.picture(index)
        if picture is not None:
            found = find(model, picture, precision)
            names, threshold = images.file.names, config.evaluation.threshold
            truth = images.target(index)
            drawn.append(draw_detections(picture, found, names, threshold, truth, most=640))
    if not drawn:
        return None
    sheet = grid(drawn)
    save_picture(sheet, Path(config.output_dir) / "predictions.png")
    return sheet


def write_predictions(folder: Path, results: list[dict]) -> None:
    """predictions.json: COCO's results format."""
    write_text(folder / "predictions.json", json.dumps(results))

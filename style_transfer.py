"""Fast style transfer with any norm: train the network of a style, or stylize images with it.

    python style_transfer.py norm=sn vgg.weights=random        # bundled photos, just to see it run
    python style_transfer.py experiment=style_transfer/starry_night norm=sn \\
        photos.root=/data/coco/train2014 style.image=starry_night.jpg
    python style_transfer.py mode=stylize stylize.checkpoint=.../checkpoint.pt stylize.images=photos

Section 4.3; Fig 5(a) expects the training loss of SN below IN's below BN's. The same command
resumes a run that was interrupted. See configs/style_transfer.yaml for every option.
"""

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import sn
from sn.training.classification.data import BadImages
from sn.training.run import distributed, entry
from sn.training.run.checkpoint import load_checkpoint, restore, save_checkpoint
from sn.training.run.entry import above, number, one_of, optional, switch, whole
from sn.training.run.guard import FiniteGuard, check_finite, gradient_norm
from sn.training.run.record import Recorder, environment
from sn.training.run.schedule import mix_seed
from sn.training.run.stopping import Preempted, StopSignal, Watchdog
from sn.training.style import photos as style_data
from sn.training.style.networks import (
    LOSS_WEIGHTS,
    RELUS,
    LossNetwork,
    StyleNet,
    build_style_net,
    content_loss,
    gram,
    layer_blocks,
    load_loss_network,
    style_loss,
    total_variation,
)
from sn.training.style.stylize import export_onnx, load_style_net, onnx_difference, stylize

AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("content", "style", "tv")
PAPER_STEPS = 40_000  # Fig 5(a)
OTHER_MODES = ("mode", "stylize", "export")  # not part of what a training run is

CHECKS = [
    (whole(0, 2**32), "a whole number, 0 to 2^32", ["seed"]),
    (whole(1), "a whole number, 1 or more",
     ["schedule.steps", "schedule.batch_size", "model.width", "style.size", "importance_steps"]),
    (whole(2, 1000), "a whole number, 2 to 1000", ["keep_checkpoints"]),
    (whole(0), "a whole number, 0 or more",
     ["model.residual_blocks", "photos.workers", "checkpoint_steps", "max_skipped_steps",
      "evaluation.images", "photos.max_bad_images"]),
    (whole(16), "a whole number, 16 or more", ["photos.image_size", "photos.resize"]),
    (above(0), "a number above 0", ["schedule.lr", "timeout_minutes"]),
    (optional(number(0)), "a number, 0 or more, or null",
     ["loss.content_weight", "loss.style_weight", "loss.tv_weight"]),
    (optional(number(0, 1)), "a number, 0 to 1, or null", ["norm.momentum"]),
    (switch, "true or false",
     ["channels_last", "compile", "model.fused_activation"]),
    (one_of(list(AUTOCAST)), f"one of {list(AUTOCAST)}", ["precision"]),
    (one_of(list(RELUS)), f"one of {list(RELUS)}", ["loss.content_layer"]),
]  # fmt: skip


@dataclass
class Run:
    """Everything that is built once from the config."""

    cfg: DictConfig
    device: torch.device
    photos: style_data.Photos
    vgg: LossNetwork
    style_sha256: str
    style_grams: list[Tensor]  # (1, C, C) of each style layer
    weights: dict[str, float]  # of the parts of the loss
    model: StyleNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: FiniteGuard
    bad_images: BadImages
    stop: StopSignal
    watchdog: Watchdog

    def to_device(self, images: Tensor) -> Tensor:
        dtype = torch.float64 if self.cfg.precision == "fp64" else None
        layout = torch.channels_last if self.cfg.channels_last else torch.preserve_format
        return images.to(self.device, dtype, non_blocking=True, memory_format=layout)

    def autocast(self):
        dtype = AUTOCAST[self.cfg.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    def identity(self) -> dict:
        """What the run learns from, beyond its config."""
        return {
            "photos": self.photos.describe(),
            "style": {"name": self.cfg.style.name, "sha256": self.style_sha256},
            "vgg": self.vgg.describe(),
        }


@dataclass
class Progress:
    """Where the run is; what a checkpoint holds beside weights and optimizer."""

    step: int = 0  # steps done
    skipped_steps: int = 0  # of them without an update: something was not finite
    wall_s: float = 0.0


@hydra.main(version_base="1.3", config_path="configs", config_name="style_transfer")
def main(cfg: DictConfig) -> None:
    entry.run(dispatch, cfg)


def dispatch(cfg: DictConfig) -> None:
    modes = {"train": train, "stylize": stylize_images, "export": export}
    if cfg.mode not in modes:
        raise ValueError(f"unknown mode={cfg.mode!r}; choose one of {[*modes]}")
    modes[cfg.mode](cfg)


def train(cfg: DictConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    keys = [key for key in cfg if key not in OTHER_MODES]
    cfg = OmegaConf.masked_copy(cfg, keys)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_config(cfg)
    processes = distributed.start(cfg.device)
    if processes.world_size > 1:
        raise ValueError(
            f"style_transfer.py runs in one process, not {processes.world_size}: the paper's batch "
            "is 4 images; start it without torchrun"
        )
    recorder = Recorder(cfg.output_dir, config, unit="step")
    summary = recorder.summary()
    if summary is not None and summary["steps"] >= cfg.schedule.steps:
        print(f"{cfg.output_dir} has ended already: loss {summary['loss']}")
        return summary

    with StopSignal() as stop, Watchdog(cfg.timeout_minutes) as watchdog:
        run = build(cfg, processes.device, stop, watchdog)
        return run_to_the_end(run, recorder)


def run_to_the_end(run: Run, recorder: Recorder) -> dict:
    """Resume, train, evaluate, record."""
    cfg = run.cfg
    progress = resume(run)
    recorder.open(progress.step if progress.step else -1)
    (recorder.folder / "summary.json").unlink(missing_ok=True)  # of fewer steps: not the end now
    announce(run, progress)
    if progress.step == 0:
        recorder.importance(0, run.model, blocks=layer_blocks(run.model))
    start = time.perf_counter() - progress.wall_s
    try:
        train_steps(run, progress, recorder, start)
        results = {"status": "finished"} | evaluate(run)
    except FloatingPointError as error:
        progress.wall_s = time.perf_counter() - start
        results = {"status": "diverged", "loss": None, "error": str(error)}
        recorder.finish(summarise(run, progress, results))
        raise
    progress.wall_s = time.perf_counter() - start
    summary = summarise(run, progress, results)
    recorder.finish(summary)
    loss = "no" if summary["loss"] is None else f"{summary['loss']:.4g}"
    print(f"loss {loss} on centre crops, as in stylizing; records in {cfg.output_dir}")
    return summary


def check_config(cfg: DictConfig) -> None:
    """Raise ValueError for values that no run can have."""
    entry.check_values(cfg, CHECKS)
    entry.check_names(cfg, ["run_name", "norm.name", "photos.name", "style.name"])
    layers = cfg.loss.style_layers
    if not OmegaConf.is_list(layers) or not layers or any(name not in RELUS for name in layers):
        raise ValueError(
            f"loss.style_layers={layers}; expected a list of {list(RELUS)}, at least one"
        )
    if cfg.photos.resize < cfg.photos.image_size:
        raise ValueError(
            f"photos.resize={cfg.photos.resize} is below photos.image_size={cfg.photos.image_size}"
        )
    if cfg.photos.image_size % 4:
        raise ValueError(f"photos.image_size={cfg.photos.image_size}; expected a multiple of 4")


def build(cfg: DictConfig, device: torch.device, stop: StopSignal, watchdog: Watchdog) -> Run:
    """Photos, style, losses, network and optimizer of the config, on the device."""
    photos = style_data.load_photos(cfg.photos.name, cfg.photos.root)
    style, style_sha256 = style_data.load_style(cfg.style.image, cfg.style.size)
    vgg = load_loss_network(cfg.vgg.weights, cfg.vgg.input)
    torch.manual_seed(cfg.seed)  # after the loss network, whose construction draws numbers too
    model = build_style_net(sn.make_norm(**cfg.norm), **cfg.model).to(device)
    vgg.features.to(device)
    if cfg.precision == "fp64":
        model.double()
        vgg.features.double()
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
        vgg.features.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    defaults = dict(zip(PARTS, LOSS_WEIGHTS[vgg.input]))
    given = {part: cfg.loss[f"{part}_weight"] for part in PARTS}
    weights = {part: defaults[part] if given[part] is None else given[part] for part in PARTS}
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.schedule.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    run = Run(
        cfg,
        device,
        photos,
        vgg,
        style_sha256,
        [],
        weights,
        model,
        optimizer,
        scaler,
        FiniteGuard(cfg.max_skipped_steps),
        BadImages(
            f"{cfg.output_dir}/bad_images.txt",
            cfg.photos.max_bad_images,
            "photos.max_bad_images",
        ),
        stop,
        watchdog,
    )
    with torch.no_grad():  # in full precision, whatever the run's
        features = vgg(run.to_device(style), cfg.loss.style_layers)
    run.style_grams = [gram(features[layer]) for layer in cfg.loss.style_layers]
    return run


def announce(run: Run, progress: Progress) -> None:
    cfg = run.cfg
    parameters = sum(p.numel() for p in run.model.parameters())
    print(
        f"{cfg.run_name}: {cfg.norm.name}, {parameters:,} parameters; style {cfg.style.name}, "
        f"{len(run.photos.images):,} photos ({cfg.photos.name}), {cfg.schedule.steps} steps of "
        f"{cfg.schedule.batch_size} crops of {cfg.photos.image_size} px on {run.device.type}\n"
        f"VGG16 {run.vgg.weights} ({run.vgg.input} input); weights of the loss: "
        + ", ".join(f"{part} {weight:g}" for part, weight in run.weights.items()),
        flush=True,
    )
    if run.vgg.weights == "random":
        print("note: the loss network is random, so this is no style transfer; the record says so")
    if cfg.norm.name in ("bn", "sn") and cfg.schedule.batch_size == 1:
        print("note: with one image a step bn is in during training, but not when stylizing")
    if progress.step:
        print(f"resuming after {progress.step} steps", flush=True)


def train_steps(run: Run, progress: Progress, recorder: Recorder, start: float) -> None:
    """Train from `progress.step` to the last step, recording every one."""
    cfg, steps = run.cfg, run.cfg.schedule.steps
    crops = style_data.Crops(
        run.photos, cfg.photos.image_size, cfg.photos.resize, cfg.seed, run.bad_images
    )
    loader = DataLoader(
        crops,
        batch_sampler=list(style_data.batches(cfg.schedule.batch_size, progress.step, steps)),
        num_workers=cfg.photos.workers,
        pin_memory=run.device.type == "cuda",
    )
    blocks = layer_blocks(run.model)
    began, first_step = time.perf_counter(), progress.step
    bar = tqdm(
        total=steps,
        initial=progress.step,
        unit="step",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    run.model.train()
    for images in loader:
        sn.begin_step(run.model, progress.step / steps)
        torch.manual_seed(mix_seed(cfg.seed, progress.step))
        where = f"step {progress.step + 1} of {steps}"
        run.watchdog.beat(where)
        losses = train_step(run, run.to_device(images), where)
        progress.step += 1
        progress.skipped_steps = run.guard.skipped
        progress.wall_s = time.perf_counter() - start
        recorder.metrics(progress.step, {f"train/{name}": loss for name, loss in losses.items()})
        last = progress.step == steps
        if last or progress.step % cfg.importance_steps == 0:
            recorder.importance(progress.step, run.model, figure=last, blocks=blocks)
        if last or run.stop.requested or is_due(progress.step, cfg.checkpoint_steps):
            save(run, progress)
        if run.stop.requested and not last:
            raise Preempted(
                f"stopped by a signal and saved after {where}; the same command goes on"
            )
        if last or is_due(progress.step, max(1, steps // 20)):
            seconds = (time.perf_counter() - began) / (progress.step - first_step)
            print_step(run, progress, losses, seconds)
        bar.set_postfix_str(f"loss {losses['loss'] or 0:.4g}", refresh=False)
        bar.update()
    bar.close()


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train_step(run: Run, images: Tensor, where: str) -> dict[str, float | None]:
    """One update; return the weighted parts of the loss and their sum, None if it was skipped."""
    run.optimizer.zero_grad(set_to_none=True)
    run.guard.begin(run.model)
    parts = losses_of(run, images)
    run.scaler.scale(sum(parts.values())).backward()
    losses = torch.stack([part.detach().double() for part in parts.values()])
    finite = losses
    if not run.scaler.is_enabled():  # which sees to infinite gradients itself
        finite = torch.cat([losses, gradient_norm(run.model).to(losses).view(1)])
    if not run.guard.allows(finite, run.model, where, lambda: losses_of(run, images)):
        print(f"warning: not finite at {where}, step skipped", file=sys.stderr, flush=True)
        return dict.fromkeys(("loss", *parts))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    values = losses.tolist()
    return {"loss": sum(values)} | dict(zip(parts, values))


def losses_of(run: Run, images: Tensor) -> dict[str, Tensor]:
    """Weighted content, style and total variation losses of what the model makes of `images`."""
    options = run.cfg.loss
    with run.autocast():
        with torch.no_grad():
            target = run.vgg(images, [options.content_layer])[options.content_layer]
        stylized = run.model(images)
        features = run.vgg(stylized, [options.content_layer, *options.style_layers])
    wide = {name: layer.to(run.style_grams[0].dtype) for name, layer in features.items()}
    losses = {
        "content": content_loss(wide[options.content_layer], target.to(run.style_grams[0].dtype)),
        "style": style_loss([wide[name] for name in options.style_layers], run.style_grams),
        "tv": total_variation(stylized.to(run.style_grams[0].dtype)),
    }
    return {part: run.weights[part] * losses[part] for part in PARTS}


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float | None]:
    """Mean losses of centre crops, image by image: with the model as in stylizing."""
    cfg, count = run.cfg, min(run.cfg.evaluation.images, len(run.photos.images))
    run.model.eval()
    sums = dict.fromkeys(PARTS, 0.0)
    photos = style_data.Crops(
        run.photos, cfg.photos.image_size, cfg.photos.resize, cfg.seed, run.bad_images
    )
    for place in range(count):
        run.stop.check("evaluation")
        photo = photos.photo(place * len(run.photos.images) // count)
        image = style_data.crop(photo, cfg.photos.image_size, cfg.photos.resize, 0.5, 0.5)
        for part, loss in losses_of(run, run.to_device(image[None])).items():
            sums[part] += loss.item() / count
    run.model.train()
    check_finite(torch.tensor(sum(sums.values())), run.model, "the evaluation")
    if count == 0:
        return {"loss": None, **dict.fromkeys((f"{part}_loss" for part in PARTS), None)}
    parts = {f"{part}_loss": value for part, value in sums.items()}
    return {"loss": sum(sums.values()), **parts, "evaluation_images": count}


def save(run: Run, progress: Progress) -> None:
    save_checkpoint(
        f"{run.cfg.output_dir}/checkpoint.pt",
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "progress": vars(progress).copy(),
            "identity": run.identity(),
            # what stylizing builds the network from
            "style_net": {
                "norm": OmegaConf.to_container(run.cfg.norm, resolve=True),
                "model": OmegaConf.to_container(run.cfg.model, resolve=True),
            },
        },
        run.cfg.keep_checkpoints,
    )


def resume(run: Run) -> Progress:
    """Load the run's checkpoint, if there is one, and return where it was."""
    needed = ("model", "optimizer", "scaler", "progress", "identity")
    path = f"{run.cfg.output_dir}/checkpoint.pt"
    state = load_checkpoint(path, needed)
    if state is None:
        return Progress()
    if state["identity"] != run.identity():
        changed = [key for key, value in run.identity().items() if value != state["identity"][key]]
        raise ValueError(
            f"{run.cfg.output_dir} was trained with other {' and '.join(changed)}: "
            f"{[state['identity'][key] for key in changed]} there, "
            f"{[run.identity()[key] for key in changed]} now; choose another output_dir="
        )
    parts = {"model": run.model, "optimizer": run.optimizer, "scaler": run.scaler}
    progress = restore(path, state, parts, Progress)
    run.guard.skipped = progress.skipped_steps
    return progress


def summarise(run: Run, progress: Progress, results: dict) -> dict:
    """The contents of summary.json."""
    cfg, photos = run.cfg, run.photos.describe()
    full = cfg.photos.name == "coco" and len(run.photos.images) > 80_000
    full = full and cfg.schedule.steps >= PAPER_STEPS and cfg.photos.image_size >= 256
    layers = sn.importance_weights(run.model).values()
    folder = f"{cfg.photos.name}_{cfg.style.name}_{cfg.photos.image_size}px"
    return {
        "task": "style_transfer",
        "run": f"style_transfer/{folder}/{cfg.run_name}/seed{cfg.seed}",
        "norm": cfg.norm.name,
        "statistics": list(next(iter(layers))["mean"]) if layers else None,
        "data": photos,
        "style": {"name": cfg.style.name, "sha256": run.style_sha256, "size": cfg.style.size},
        "vgg": run.vgg.describe(),
        "loss_weights": run.weights,
        "image_size": cfg.photos.image_size,
        "batch_size": cfg.schedule.batch_size,
        **results,
        "steps": progress.step,
        "skipped_steps": progress.skipped_steps,
        "bad_images": len(run.bad_images.lines()),
        "seed": cfg.seed,
        "images_seen": progress.step * cfg.schedule.batch_size,
        "wall_s": round(progress.wall_s, 1),
        "lr": cfg.schedule.lr,
        "precision": cfg.precision,
        "scale": "full" if full and run.vgg.weights != "random" else "proxy",
        "note": cfg.note,
        **environment(run.device),
    }


def print_step(run: Run, progress: Progress, losses: dict, seconds: float) -> None:
    left = int((run.cfg.schedule.steps - progress.step) * seconds)
    parts = "  ".join(f"{k} {v:.4g}" for k, v in losses.items() if v is not None)
    print(
        f"step {progress.step}/{run.cfg.schedule.steps}  {parts}  {seconds:.3g} s/step  "
        f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
        flush=True,
    )


def stylize_images(cfg: DictConfig) -> list[Path]:
    """Write what a trained network makes of images as PNG; return the files written.

    An image that cannot be read is named, left out, and ends in an error after all others.
    """
    options = cfg.stylize
    entry.check_values(
        cfg,
        [
            (optional(whole(1)), "a whole number, 1 or more, or null", ["stylize.size"]),
            (number(1), "a number, 1 or more", ["stylize.strip_pixels"]),
        ],
    )
    device = distributed.start(cfg.device).device
    model = load_style_net(options.checkpoint).to(device)
    given = list(options.images) if OmegaConf.is_list(options.images) else [options.images]
    targets, errors = output_files(given, Path(options.output)), []
    for path, target in targets.items():
        start = time.perf_counter()
        try:
            image = style_data.read_image(path)
        except ValueError as error:
            print(f"warning: {error}; left out", file=sys.stderr, flush=True)
            errors.append(path)
            continue
        if options.size is not None:
            image = style_data.resize_long_side(image, options.size)
        y = stylize(model, style_data.to_tensor(image), options.strip_pixels, device)
        target.parent.mkdir(parents=True, exist_ok=True)
        style_data.to_pil(y).save(target)
        seconds = time.perf_counter() - start
        print(f"{target}  {image.width}x{image.height}  {seconds:.2f} s", flush=True)
    if errors:
        raise ValueError(f"{len(errors)} of {len(targets)} images could not be read: {errors[0]}")
    return list(targets.values())


def output_files(given: list[str], output: Path) -> dict[Path, Path]:
    """Image file -> PNG below `output`, at its place below the folder that was given."""
    targets = {}
    for root in map(Path, given):
        for path in style_data.find_images(root):
            if path in targets:
                continue
            name = path.relative_to(root) if root.is_dir() else Path(path.name)
            target = output / name.with_suffix(".png")
            if target in targets.values():  # a.jpg and a.png
                target = output / f"{name}.png"
            if target in targets.values():
                raise ValueError(f"{path} would overwrite {target}, made from another image")
            targets[path] = target
    clash = [target for path, target in targets.items() if target.resolve() in
             {source.resolve() for source in targets}]  # fmt: skip
    if clash:
        raise ValueError(f"stylize.output={output} would overwrite the image {clash[0]}")
    return targets


def export(cfg: DictConfig) -> float | None:
    """Write a trained network as ONNX and hold it to torch in onnxruntime, at two sizes."""
    model = load_style_net(cfg.export.checkpoint)
    export_onnx(model, cfg.export.output)
    difference = onnx_difference(model, cfg.export.output, [(64, 96), (120, 72)])
    if difference is None:
        print(f"{cfg.export.output} written, not checked: onnxruntime is not installed")
    elif difference > 1e-3:
        raise ValueError(f"{cfg.export.output} differs from torch by up to {difference:.2g}")
    else:
        print(f"{cfg.export.output}: at two sizes within {difference:.2g} of torch (pixels 0 to 1)")
    return difference


if __name__ == "__main__":
    entry.start(main)

"""Fast style transfer with any norm: train the network of a style, or stylize images with it.

    python style_transfer.py norm=sn vgg.weights=random        # bundled photos, just to see it run
    python style_transfer.py experiment=style_transfer/starry_night norm=sn \\
        photos.root=/data/coco/train2014 style.image=starry_night.jpg
    python style_transfer.py mode=stylize stylize.checkpoint=.../checkpoint.pt stylize.images=photos

Section 4.3; Fig 5(a) expects the training loss of SN below IN's below BN's. The same command
resumes a run that was interrupted. See configs/style_transfer.yaml for every option.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; entry.start collects again

import dataclasses
import functools

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sn
from sn.training.run import budget, entry
from sn.training.run.guard import check_finite
from sn.training.run.images import BadImages
from sn.training.run.session import Session
from sn.training.run.stopping import spare_worker
from sn.training.style import photos as style_data
from sn.training.style.config import StyleConfig
from sn.training.style.networks import (
    PARTS,
    build_style_net,
    content_loss,
    gram,
    layer_blocks,
    load_loss_network,
    style_loss,
    total_variation,
)
from sn.training.style.stylize import export, stylize_images
from sn.training.style.task import Task, facts_now


@hydra.main(version_base="1.3", config_path="configs", config_name="style_transfer")
def main(cfg: DictConfig) -> None:
    entry.run(dispatch, cfg)


def dispatch(config: StyleConfig) -> None:
    {"train": train, "stylize": stylize_images, "export": export}[config.mode](config)


def train(config: StyleConfig) -> dict:
    """Run the config to its end, from its checkpoint if there is one; return the summary."""
    with Session(config, unit="step", one_process="the paper's batch is 4 images") as run:
        if run.summary is not None and run.summary.get("steps", 0) >= config.schedule.steps:
            return run.has_ended("loss", "loss", facts_now(config))
        task = build(config, run)
        need = run.warn_of(lambda: needs(task, run))
        run.begin(
            parts={"model": task.model, "optimizer": task.optimizer, "scaler": run.scaler},
            identity={"identity": task.identity() | task.length()},
            facts=task.facts,
            headline=("loss",),
            steps=config.schedule.steps,
            saved={"style_net": config.style_net()},
            importance=task.model,
            blocks=layer_blocks(task.model),
        )
        task.announce(run)
        if config.plan:
            training = (lambda: train_steps(task, run), 1)
            loops = {"training": training, "evaluation": (lambda: evaluate(task, run), 1)}
            return budget.plan(run, task.model, need, loops)
        train_steps(task, run)
        summary = run.finish(evaluate(task, run))
        loss = "no" if summary["loss"] is None else f"{summary['loss']:.4g}"
        run.say(f"loss {loss} on centre crops, as in stylizing; records in {config.output_dir}")
        return summary


def build(config: StyleConfig, run: Session) -> Task:
    """Photos, style, losses, network and optimizer of the config, on the device."""
    if config.deterministic and run.device.type == "cuda":
        raise ValueError(
            "deterministic=true: on a GPU PyTorch has no deterministic backward pass of reflection "
            "padding; leave it out, or use device=cpu"
        )
    options = config.photos
    note, key = f"{config.output_dir}/bad_images.txt", "photos.max_bad_images"
    bad_images = BadImages(note, options.max_bad_images, key, options.root)
    photos = style_data.load_photos(options.name, options.root)
    crops = style_data.Crops(photos, options.image_size, options.resize, config.seed, bad_images)
    style, style_sha256 = style_data.load_style(config.style.image, config.style.size)
    vgg = load_loss_network(config.vgg.weights, config.vgg.input)
    run.precision.model(vgg.features)
    torch.manual_seed(config.seed)
    model = build_style_net(sn.make_norm(**config.norm), **vars(config.model))
    run.precision.model(model)
    if config.compile:
        model.compile()
    lr = config.schedule.lr
    groups = sn.parameter_groups(model, lr, 0.0, config.optimizer.gate_lr_factor)
    fused = (
        run.device.type == "cuda" or None
    )  # it can skip a step itself; the CPU's rounds otherwise
    with torch.no_grad():  # in full precision, whatever the run's
        features = vgg(run.to_device(style), config.loss.style_layers)
    return Task(
        config=config,
        photos=photos,
        crops=crops,
        bad_images=bad_images,
        vgg=vgg,
        style_sha256=style_sha256,
        style_grams=[gram(features[layer]) for layer in config.loss.style_layers],
        weights=config.loss.weights(vgg.input),
        model=model,
        optimizer=torch.optim.Adam(groups, lr=lr, fused=fused),
    )


def needs(task: Task, run: Session) -> budget.Need:
    """What a step needs, from the losses of one crop."""
    images, pixels = task.config.schedule.batch_size, task.config.photos.image_size

    def forward(model: nn.Module) -> tuple[dict[str, Tensor], int]:
        crop = run.to_device(torch.rand(1, 3, pixels, pixels))
        return losses_of(dataclasses.replace(task, model=model.train()), run, crop), 1

    return budget.estimate(
        task.model,
        forward,
        images,
        task.optimizer,
        photo_loader(task, run, 0),
        batch_bytes=4 * 3 * pixels**2 * images,
        device=run.device,
        workers_key="photos.workers",
    )


def photo_loader(task: Task, run: Session, first_step: int) -> DataLoader:
    """The batches of the steps that are left."""
    schedule = task.config.schedule
    return DataLoader(
        task.crops,
        batch_sampler=style_data.batches(schedule.batch_size, first_step, schedule.steps),
        num_workers=task.config.photos.workers,
        worker_init_fn=spare_worker,
        pin_memory=run.device.type == "cuda",
    )


def train_steps(task: Task, run: Session) -> None:
    """Train from the first step that is left to the last, recording every one."""
    config, steps, progress = task.config, task.config.schedule.steps, run.progress
    batch_size = config.schedule.batch_size
    progress.images_seen = progress.step * batch_size  # older checkpoints do not say
    loader = photo_loader(task, run, progress.step)
    task.model.train()
    for _, images in run.steps(loader, steps):
        sn.begin_step(task.model, progress.step / steps)
        run.draw_from(config.seed, progress.step)
        train_step(task, run, run.to_device(images))
        step = progress.step + 1
        if step == steps or step % config.importance_steps == 0:
            run.record_importance(step, figure=step == steps)
        losses = run.latest
        values = {"loss": sum(losses), **dict(zip(PARTS, losses))} if losses else {}
        run.step_done(batch_size, **values)


def train_step(task: Task, run: Session, images: Tensor) -> None:
    """One update; its line of metrics has the weighted parts of the loss and their sum."""
    task.optimizer.zero_grad(set_to_none=True)
    run.guard.begin(task.model)
    parts = losses_of(task, run, images)
    run.scaler.scale(sum(parts.values())).backward()
    losses = torch.stack([part.detach().double() for part in parts.values()])
    run.update(
        task.optimizer,
        losses,
        task.model,
        lambda: losses_of(task, run, images),
        record=(run.progress.step + 1, PARTS),
    )


def losses_of(task: Task, run: Session, images: Tensor) -> dict[str, Tensor]:
    """Weighted content, style and total variation losses of what the model makes of `images`."""
    options, dtype = task.config.loss, task.style_grams[0].dtype
    with run.autocast():
        with torch.no_grad():
            target = task.vgg(images, [options.content_layer])[options.content_layer]
        stylized = task.model(images)
        features = task.vgg(stylized, [options.content_layer, *options.style_layers])
    wide = {name: layer.to(dtype) for name, layer in features.items()}
    losses = {
        "content": content_loss(wide[options.content_layer], target.to(dtype)),
        "style": style_loss([wide[name] for name in options.style_layers], task.style_grams),
        "tv": total_variation(stylized.to(dtype)),
    }
    return {part: task.weights[part] * losses[part] for part in PARTS}


@torch.no_grad()
def evaluate(task: Task, run: Session) -> dict[str, float | None]:
    """Mean losses of centre crops, image by image: with the model as in stylizing."""
    options, photos = task.config.photos, len(task.photos.images)
    count = min(task.config.evaluation.images, photos)
    task.model.eval()
    sums = dict.fromkeys(PARTS, 0.0)
    for place in run.evaluating(range(count)):
        photo = task.crops.photo(place * photos // count)
        image = style_data.crop(photo, options.image_size, options.resize, 0.5, 0.5)
        again = functools.partial(losses_of, task, run, run.to_device(image[None]))
        for part, loss in again().items():
            sums[part] += loss.item() / count
        check_finite(torch.tensor(sum(sums.values())), task.model, "the evaluation", again)
    task.model.train()
    if count == 0:
        return {"loss": None, **dict.fromkeys((f"{part}_loss" for part in PARTS), None)}
    parts = {f"{part}_loss": value for part, value in sums.items()}
    return {"loss": sum(sums.values()), **parts, "evaluation_images": count}


if __name__ == "__main__":
    entry.start(main, "style_transfer")

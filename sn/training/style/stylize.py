"""A trained style network applied to images of any size, in strips if large; its export."""

import copy
import logging
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sn

from ..run import distributed
from ..run.checkpoint import load_checkpoint, plain_names
from ..run.config import check_norm, checked, short
from ..run.display import say
from ..run.images import read_image
from .config import Network, StyleConfig
from .networks import ConvNorm, StyleNet, build_style_net, to_image
from .photos import find_images, resize_long_side, to_pil, to_tensor

MULTIPLE, SMALLEST = 4, 8  # of the network's height and width
PART = 2**16  # positions of a map whose moments are taken at a time


def load_style_net(path: str | Path) -> StyleNet:
    """The network of a run's checkpoint, in evaluation mode.

    Raises FileNotFoundError or ValueError if there is none.
    """
    state = load_checkpoint(path)
    if state is None:
        raise FileNotFoundError(f"no checkpoint {path}; expected the checkpoint.pt of a run")
    options, weights = state.get("style_net"), state.get("model")
    if not (isinstance(options, dict) and isinstance(weights, dict)):
        raise ValueError(f"{path} is not a checkpoint of style_transfer.py")
    try:
        norm, network = (options.get(key) for key in ("norm", "model"))
        if not (isinstance(norm, dict) and isinstance(network, dict)):
            raise ValueError(f"style_net={short(options)}; expected norm and model")
        check_norm(norm)
        # the same parameters with and without fused activations; strips need them apart
        network = checked(Network, network | {"fused_activation": False}, "model")
        model = build_style_net(sn.make_norm(**norm), **vars(network))
        model.load_state_dict(plain_names(weights))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit its own network: {error}") from None
    return model.eval()


@torch.no_grad()
def stylize(
    model: StyleNet, image: Tensor, strip_pixels: float = 4e6, device: torch.device | None = None
) -> Tensor:
    """What `model` makes of an image (3, H, W) in [0, 1] of any size: (3, H, W), on the CPU.

    `model` is in evaluation mode. An image of more than `strip_pixels` pixels goes through the
    network layer by layer in strips of about so many pixels; only these are on `device`. IN, LN and
    GN need the statistics of the whole image: they are gathered over all strips of a layer before
    the next, so that there are no seams and the result is that of the whole image but for rounding.
    """
    height, width = image.shape[-2:]
    sides = [max(SMALLEST, -(-side // MULTIPLE) * MULTIPLE) for side in (height, width)]
    x = F.pad(image[None], (0, sides[1] - width, 0, sides[0] - height), mode="replicate")
    device = device or next(model.parameters()).device
    if sides[0] * sides[1] > strip_pixels:
        y = stylize_in_strips(model, x, max(1, int(strip_pixels // sides[1])), device)
    else:
        y = model(x.to(device)).cpu()
    return y[0, :, :height, :width]


@torch.no_grad()
def stylize_in_strips(model: StyleNet, image: Tensor, rows: int, device: torch.device) -> Tensor:
    """model(image) for (1, 3, H, W), `rows` rows of the image at a time on `device`."""
    x = 2 * image - 1
    for block in model.down:
        x = _layer(block, x, rows, device)
    for block in model.residual:
        x = _layer(block.second, _layer(block.first, x, rows, device), rows, device, x)
    for block in model.up:
        x = _layer(block, x, rows, device)
    y = torch.empty_like(image)
    for strip in _strips(image.shape[2], rows):
        y[:, :, strip] = to_image(_convolve(model.last, x, strip, device)).cpu()
    return y


def _layer(
    block: ConvNorm, x: Tensor, rows: int, device: torch.device, residual: Tensor | None = None
) -> Tensor:
    """block(x, residual): all strips convolved and measured, then all normalised."""
    stride, zoom = block.conv.stride[0], 2 if block.upsample else 1
    height, width = (side * zoom // stride for side in x.shape[2:])
    rows = max(1, rows * x.shape[3] // width)  # as many values in every layer, or fewer
    y = x.new_empty(1, block.conv.out_channels, height, width)
    moments = Moments()
    for strip in _strips(height, rows):
        values = _convolve(block.conv, x, strip, device, zoom)
        y[:, :, strip] = values.cpu()
        moments.add(values[0])
    scale, shift = channel_affine(block.norm, moments.mean, moments.deviation / moments.count)
    scale, shift = (v.to(x.dtype).view(-1, 1, 1) for v in (scale, shift))
    for strip in _strips(height, rows):
        values = (y[:, :, strip].to(device) * scale).add_(shift)
        if residual is not None:
            values += residual[:, :, strip].to(device)
        y[:, :, strip] = (values.relu_() if block.relu else values).cpu()
    return y


class Moments:
    """Means and sums of squared deviations (C,) of maps (C, H, W) in float64, part by part.

    `PART` positions at a time are turned to float64: a strip's copies would take more memory than
    the network does without strips. Source: Chan et al., the merging of moments.
    """

    def __init__(self):
        self.count, self.mean, self.deviation = 0, 0.0, 0.0

    def add(self, maps: Tensor) -> None:
        for part in _strips(maps.shape[1], max(1, PART // maps.shape[2])):
            flat = maps[:, part].double().flatten(1)
            count, mean = flat.shape[1], flat.mean(1)
            delta, total = mean - self.mean, self.count + count
            self.deviation += (flat - mean[:, None]).square_().sum(1)
            self.deviation += delta.square() * (self.count * count / total)
            self.mean, self.count = self.mean + delta * (count / total), total


def _strips(height: int, rows: int) -> list[slice]:
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def _convolve(conv: nn.Conv2d, x: Tensor, strip: slice, device: torch.device, zoom: int = 1):
    """Rows `strip` of conv(x zoomed), with reflection at the image's borders alone."""
    pad, stride, height = conv.kernel_size[0] // 2, conv.stride[0], x.shape[2] * zoom
    rows = torch.arange(strip.start * stride - pad, (strip.stop - 1) * stride + pad + 1)
    rows = rows.abs()
    rows = torch.where(rows < height, rows, 2 * (height - 1) - rows) // zoom
    part = x[:, :, rows].to(device)
    if zoom > 1:
        part = part.repeat_interleave(zoom, dim=3)
    part = F.pad(part, (pad, pad, 0, 0), mode="reflect")
    return F.conv2d(part, conv.weight, conv.bias, conv.stride)


def channel_affine(norm: nn.Module, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The (C,) scale and shift that `norm` is, in evaluation, on a map with these channel moments.

    Every statistic of an image is a function of its channels' means and biased variances, so a map
    of two pixels per channel that has the same moments has the same scale and shift.
    """
    norm = copy.deepcopy(norm).double()
    std = var.sqrt()
    pair = torch.stack([mean - std, mean + std], -1)[None, :, None]  # (1, C, 1, 2)
    low, high = norm(pair)[0, :, 0].unbind(-1)
    scale = torch.where(std > 0, (high - low) / (2 * std), 0.0)
    return scale, (low + high) / 2 - scale * mean


def stylize_images(config: StyleConfig) -> list[Path]:
    """Write what a trained network makes of images as PNG; return the files written."""
    options, device = config.stylize, distributed.start(config.device).device
    return stylize_files(
        load_style_net(options.checkpoint).to(device),
        options.paths(),
        options.folder(),
        options.size,
        options.strip_pixels,
        options.max_megapixels,
        device,
    )


def stylize_files(
    model: StyleNet,
    images: list[str],
    output: Path,
    size: int | None,
    strip_pixels: float,
    max_megapixels: float,
    device: torch.device,
) -> list[Path]:
    """Write what `model` makes of image files, or all those of folders, as PNG below `output`.

    size: the long side in pixels that they are resized to first. Returns the files written. An
    image that cannot be read is named and left out; after all others a ValueError says so.
    """
    targets, errors = output_files(images, output), []
    for path, target in targets.items():
        start = time.perf_counter()
        try:
            image = read_image(path, "picture", max_megapixels)
        except ValueError as error:
            say(f"warning: {error}; left out", error=True)
            errors.append(path)
            continue
        if size is not None:
            image = resize_long_side(image, size)
        y = stylize(model, to_tensor(image), strip_pixels, device)
        target.parent.mkdir(parents=True, exist_ok=True)
        to_pil(y).save(target)
        seconds = time.perf_counter() - start
        say(f"{target}  {image.width}x{image.height}  {seconds:.2f} s")
    if errors:
        raise ValueError(f"{len(errors)} of {len(targets)} images could not be read: {errors[0]}")
    return list(targets.values())


def output_files(given: list[str], output: Path) -> dict[Path, Path]:
    """Image file -> PNG below `output`, at its place below the folder that was given."""
    targets = {}
    for root in map(Path, given):
        for path in find_images(root):
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


def export(config: StyleConfig) -> float | None:
    """Write a trained network as ONNX and hold it to torch in onnxruntime, at two sizes."""
    output = config.export.path()
    model = load_style_net(config.export.checkpoint)
    new = output.with_name(f".{output.name}.tmp")  # until it is checked, an older file stays
    try:
        export_onnx(model, new)
        difference = onnx_difference(model, new, [(64, 96), (120, 72)])
        if difference is not None and difference > 1e-3:
            raise ValueError(f"the ONNX graph differs from torch by up to {difference:.2g}")
        new.replace(output)
    finally:
        new.unlink(missing_ok=True)
    if difference is None:
        say(f"{output} written, not checked: onnxruntime is not installed")
    else:
        say(f"{output}: at two sizes within {difference:.2g} of torch (pixels 0 to 1)")
    return difference


def export_onnx(model: StyleNet, path: str | Path) -> None:
    """Write `model` as ONNX: input (1, 3, H, W) in [0, 1], H and W any multiples of 4 from 8 on.

    Raises ValueError if the packages are missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError("mode=export needs onnx and onnxscript: pip install '.[onnx]'") from None
    height, width = (torch.export.Dim(name, min=2) for name in ("height_4", "width_4"))
    logging.disable(logging.INFO)  # the exporter's hundreds of lines, under Hydra's logger
    try:
        program = torch.onnx.export(
            model.eval().cpu(),
            (torch.rand(1, 3, 64, 48),),
            dynamic_shapes=({2: MULTIPLE * height, 3: MULTIPLE * width},),
            input_names=["image"],
            output_names=["stylized"],
            dynamo=True,
            verbose=False,
        )
    finally:
        logging.disable(logging.NOTSET)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))


def onnx_difference(
    model: StyleNet, path: str | Path, sizes: list[tuple[int, int]]
) -> float | None:
    """Largest difference between onnxruntime's and torch's pixels; None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    largest = 0.0
    for height, width in sizes:
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        (y,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            largest = max(largest, (torch.from_numpy(y) - model(image)).abs().max().item())
    return largest

"""Photographs and style images: any folder, any image file, crops drawn from (seed, number)."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..run.images import BadImages, files_below, listing, read_image, sklearn_file
from ..run.schedule import mix_seed

LEAST = 16  # pixels of a style image, each way
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 255


def to_pil(image: Tensor) -> Image.Image:
    """A (3, H, W) tensor in [0, 1], beyond it clipped, as 8-bit RGB."""
    pixels = (image.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def find_images(root: str | Path) -> list[Path]:
    """Image files anywhere below `root` (or that one file), by name; links are followed.

    A folder that is met twice, through links, is taken once; hidden ones and hidden files are not.
    Of a link to nothing `read_image` tells.

    Raises FileNotFoundError if there is none.
    """
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"no file or folder {root}")
    files = [Path(name) for name in files_below(root) if name.lower().endswith(SUFFIXES)]
    files.sort()
    if not files:
        raise FileNotFoundError(
            f"no images below {root}; expected files named {', '.join(SUFFIXES)}"
        )
    return files


@dataclass
class Photos:
    """Photographs to train on: a sequence of RGB images. `sha256` is of the listing with sizes."""

    name: str
    images: Sequence[Image.Image]
    sha256: str

    def describe(self) -> dict:
        return {"name": self.name, "train_images": len(self.images), "sha256": self.sha256}


class PhotoFiles:
    """RGB images of files, read when asked for."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.paths[index], "picture")


def load_photos(name: str, root: str | None = None) -> Photos:
    """The photographs below `root`; without it the two that come with scikit-learn.

    Raises FileNotFoundError if there are none.
    """
    sha256 = hashlib.sha256()
    if root is None:
        paths = [sklearn_file(f"images/{name}.jpg") for name in ("china", "flower")]
        images = [read_image(path, "picture") for path in paths]
        for image in images:
            sha256.update(image.tobytes())
        return Photos(name, images, sha256.hexdigest())
    try:
        paths = find_images(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"photos.root={root}: {error}") from None
    base = Path(root) if Path(root).is_dir() else Path(root).parent
    for line in listing(paths, base):
        sha256.update(line)
    return Photos(name, PhotoFiles(paths), sha256.hexdigest())


class Crops(Dataset):
    """Random square crops by running number: a pure function of (seed, number).

    Every epoch is a permutation of the photos; the short side is resized to `resize`, the crop is
    anywhere. A photo that cannot be read is noted in `bad`; while that lets it pass, the next one
    stands in for it.
    """

    def __init__(
        self, photos: Photos, image_size: int, resize: int, seed: int, bad: BadImages | None = None
    ):
        self.photos, self.image_size, self.resize, self.seed = photos, image_size, resize, seed
        self.bad = bad or BadImages()
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, number: int) -> Tensor:
        image = self.photo(self.index(number))
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 1, number))
        top, left = torch.rand(2, generator=generator).tolist()
        return crop(image, self.image_size, self.resize, top, left)

    def index(self, number: int) -> int:
        """Which photo is taken as the `number`-th of the run."""
        epoch, place = divmod(number, len(self.photos.images))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, 0, epoch))
            order = torch.randperm(len(self.photos.images), generator=generator)
            self._order = epoch, order.tolist()
        return self._order[1][place]

    def photo(self, index: int) -> Image.Image:
        """Photo `index`, or the next one that can be read."""
        count = len(self.photos.images)
        for position in range(index, index + count):
            try:
                return self.photos.images[position % count]
            except ValueError as error:
                self.bad.add(error)
        raise ValueError(f"none of {count} photos can be read")


def crop(image: Image.Image, image_size: int, resize: int, top: float, left: float) -> Tensor:
    """Resize the short side to `resize` and cut a square at fractions (top, left) of the slack."""
    width, height = image.size
    scale = resize / min(width, height)
    width, height = (max(resize, round(side * scale)) for side in (width, height))
    x = round(left * (width - image_size))
    y = round(top * (height - image_size))
    # the box in pixels of the photo: only that part is resized, so that a panorama costs no more
    box = (x / width * image.width, y / height * image.height)
    box += ((x + image_size) / width * image.width, (y + image_size) / height * image.height)
    size = (image_size, image_size)
    return to_tensor(image.resize(size, Image.Resampling.BILINEAR, box, reducing_gap=3.0))


def batches(batch_size: int, first_step: int, steps: int) -> Iterator[list[int]]:
    """Running numbers of each step's images, from `first_step` on."""
    for step in range(first_step, steps):
        yield list(range(step * batch_size, (step + 1) * batch_size))


def load_style(path: str | None, size: int) -> tuple[Tensor, str]:
    """The style image (1, 3, H, W) with its long side resized to `size`, and its sha256.

    Without a path it is drawn: coloured waves, so that everything runs without a file. Raises
    FileNotFoundError, or ValueError for one that is no image or narrower than VGG can take.
    """
    image = draw_waves() if path is None else _read_style(path)
    sha256 = hashlib.sha256(image.tobytes()).hexdigest()
    style = resize_long_side(image, size)
    if min(style.size) < LEAST:  # VGG halves it four times
        raise ValueError(
            f"style.image={path or 'null'} with style.size={size} has {style.width} x "
            f"{style.height} pixels; expected {LEAST} or more each way"
        )
    return to_tensor(style)[None], sha256


def resize_long_side(image: Image.Image, size: int) -> Image.Image:
    """`image` with its long side at `size` pixels, the aspect kept."""
    scale = size / max(image.size)
    shape = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(shape, Image.Resampling.BILINEAR)


def _read_style(path: str) -> Image.Image:
    if not Path(path).is_file():
        raise FileNotFoundError(f"style.image={path}: no such file")
    return read_image(path, "picture")


def draw_waves(size: int = 256) -> Image.Image:
    """Bands of colour along bent circles: a pattern with a palette and strokes, owned by nobody."""
    y, x = np.mgrid[0:size, 0:size] / size
    bend = 0.12 * np.sin(9 * x + 4 * y) + 0.08 * np.sin(13 * y - 5 * x)
    radius = np.hypot(x - 0.3, y - 0.4) + bend
    bands = np.sin(2 * np.pi * np.stack([9 * radius, 9 * radius + 0.15, 4.5 * radius + 0.4]))
    palette = np.array([[30, 60, 140], [240, 190, 60], [200, 70, 50]], dtype=np.float64)
    weights = np.exp(5 * bands) / np.exp(5 * bands).sum(0)  # (3, H, W)
    pixels = np.einsum("khw,kc->hwc", weights, palette)
    return Image.fromarray(pixels.round().astype(np.uint8))

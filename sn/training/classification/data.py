"""Data sets, and loaders whose batches depend on (seed, epoch, image) but not on the machine."""

import functools
import hashlib
import inspect
import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from ..run.display import say
from ..run.distributed import in_group, launched
from ..run.images import BadImages, files_below, is_hidden, listing, read_image, sklearn_digits
from ..run.schedule import mix_seed, steps_per_epoch
from ..run.stopping import spare_worker

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_STD = {  # image size -> of the 50,000 training images averaged down to it
    32: (0.2470, 0.2435, 0.2616),
    16: (0.2381, 0.2347, 0.2536),
    8: (0.2220, 0.2191, 0.2394),
}
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step: 2^64 / golden ratio, odd
# eigenvalues and eigenvectors of ImageNet's RGB values (Krizhevsky et al. 2012)
PCA_VALUES = (0.2175, 0.0188, 0.0045)
PCA_VECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


class Lighting(torch.nn.Module):
    """AlexNet's PCA lighting noise on a (3, H, W) image in [0, 1]."""

    def __init__(self, std: float):
        super().__init__()
        self.std = std
        self.axes = torch.tensor(PCA_VECTORS) * torch.tensor(PCA_VALUES)

    def forward(self, image: Tensor) -> Tensor:
        return image + (self.axes @ (torch.randn(3) * self.std)).view(3, 1, 1)


@dataclass
class ImageData:
    """A classification task. `train` and `val` are sequences of (image, label).

    `sha256` is of the images, or of an image folder's listing with sizes.
    """

    name: str
    train: Sequence
    val: Sequence
    num_classes: int
    augmentation: "Augmentation"
    evaluation: "Augmentation"
    sha256: str

    def describe(self) -> dict:
        """Name, sizes and hash, as they stand in a run's record."""
        return {
            "name": self.name,
            "train_images": len(self.train),
            "val_images": len(self.val),
            "classes": self.num_classes,
            "sha256": self.sha256,
        }


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass
class Augmentation:
    """The transform at a fraction of the run: `usual`, then `last` for its last fraction.

    `normalise` is for what either gives: a whole batch at once, which takes a worker less time.
    """

    usual: Any
    last: Callable | None = None
    last_fraction: float = 0.0
    normalise: Callable = _as_it_is

    def at(self, progress: float) -> Callable:
        end = progress + self.last_fraction >= 1 - 1e-9
        return self.last if self.last and self.last_fraction and end else self.usual


class ArrayImages:
    """uint8 images (N, 3, H, W) in memory with their labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]

    def subset(self, indices: list[int]) -> "ArrayImages":
        return ArrayImages(self.images[indices].numpy(), np.array(self.labels)[indices])

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Images (n, 3, H, W) and labels (n,)."""
        labels = torch.tensor([self.labels[index] for index in indices])
        return self.images[torch.tensor(indices)], labels


def random_bits(key: int, counters: np.ndarray) -> np.ndarray:
    """64 random bits for each of `counters` (whole numbers, 0 or more): uint64 of their shape.

    Item i of the splitmix64 stream that starts at `key`, without those before it.
    *Source:* Steele, Lea and Flood 2014, with the constants of Vigna's splitmix64.c.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64, also where numpy has a scalar
        z = np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def normaliser(mean: tuple[float, ...], std: tuple[float, ...]) -> v2.Compose:
    """uint8, or floats in [0, 1], (..., 3, H, W) to normalised float32; such floats in place."""
    return v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std, inplace=True)]
    )


class ArrayTransform:
    """Whole batches of uint8 images (n, 3, H, W) to normalised floats, augmented if asked for.

    Each image is shifted by -padding..padding pixels either way, black moving in, and mirrored in
    half of all cases if `flip`. `bits`, uint64 (n,), decide for each image. Where there is nothing
    to decide they may be left out, and the images be a single (3, H, W).
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        padding: int = 0,
        flip: bool = False,
    ):
        self.normalise = normaliser(mean, std)
        self.padding, self.flip = padding, flip

    def __call__(self, images: Tensor, bits: np.ndarray | None = None) -> Tensor:
        if self.padding or self.flip:
            images = self._crop_and_flip(images, *self.choices(bits))
        return self.normalise(images)

    def choices(self, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and columns that the crops in the padded images start at, and which are mirrored."""
        offsets = np.uint64(2 * self.padding + 1)
        rows = (bits >> np.uint64(40)) * offsets >> np.uint64(24)  # the upper 24 bits
        columns = (bits >> np.uint64(16) & np.uint64(0xFFFFFF)) * offsets >> np.uint64(24)
        return rows.astype(np.int64), columns.astype(np.int64), self.flip & (bits & 1).astype(bool)

    def _crop_and_flip(self, images: Tensor, top, left, mirrored) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, [self.padding] * 4)
        columns = np.arange(width)
        columns = np.where(mirrored[:, None], width - 1 - columns, columns) + left[:, None]
        rows = top[:, None] + np.arange(height)
        pixels = rows[:, :, None] * padded.shape[3] + columns[:, None]  # (n, H, W)
        pixels = torch.from_numpy(pixels).view(len(images), 1, -1)
        channels = images.shape[1]
        picked = padded.flatten(2).gather(2, pixels.expand(-1, channels, -1))
        return picked.view(images.shape)


class FileImages:
    """RGB images read from (path, label) samples.

    One that cannot be read is noted in `bad`. While that lets it pass, the next readable image
    stands in for it, or in an evaluation (`substitute=False`) a black one with label -1, which
    does not count.
    """

    def __init__(
        self, samples: list[tuple[str, int]], substitute: bool = True, bad: BadImages | None = None
    ):
        self.samples, self.substitute = samples, substitute
        self.bad = bad or BadImages()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        for position in range(index, index + len(self.samples)):
            path, label = self.samples[position % len(self.samples)]
            try:
                return read_image(path), label
            except ValueError as error:
                self.bad.add(error)
            if not self.substitute:
                return Image.new("RGB", (1, 1)), -1
        raise ValueError(f"none of {len(self.samples)} images can be read, from {path} on")


class TransformedImages(Dataset):
    """Images by (epoch, index); a transform's random numbers depend on these and `seed` alone.

    Images in memory are transformed a batch at a time, by an `ArrayTransform`.
    """

    def __init__(self, images: Sequence, augmentation: Augmentation, epochs: int, seed: int = 0):
        self.images, self.augmentation = images, augmentation
        self.epochs, self.seed = epochs, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        images, labels = self.__getitems__([key])
        return images[0], labels.item()

    def _transformed(self, epoch: int, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        transform = self.augmentation.at(epoch / self.epochs)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
        try:
            return transform(image), label
        finally:
            torch.set_rng_state(state)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The batch of `keys`, all of one epoch: images (n, 3, H, W) and labels (n,)."""
        if not isinstance(self.images, ArrayImages):
            images, labels = default_collate([self._transformed(*key) for key in keys])
            return self.augmentation.normalise(images), labels
        epoch, indices = keys[0][0], [index for _, index in keys]
        images, labels = self.images.batch(indices)
        bits = random_bits(mix_seed(self.seed, epoch), np.array(indices))
        return self.augmentation.at(epoch / self.epochs)(images, bits), labels


class SettingSampler(Sampler):
    """This process's (epoch, index) batches of a (GPUs, images per GPU) setting.

    Each epoch is a permutation drawn from (seed, epoch), repeated from its start until all GPUs
    have full batches: `steps` x `gpus` x `images_per_gpu`. A process takes the images of its
    gpus / world_size virtual GPUs, GPU after GPU. Set `epoch` and `first_step` before iterating.
    """

    def __init__(
        self,
        num_images: int,
        gpus: int,
        images_per_gpu: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_images, self.gpus, self.images_per_gpu = num_images, gpus, images_per_gpu
        self.seed = seed
        share = gpus // world_size
        self.own = slice(rank * share, (rank + 1) * share)
        self.steps = steps_per_epoch(num_images, gpus, images_per_gpu)
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        total = self.steps * self.gpus * self.images_per_gpu
        order = order.repeat(-(-total // self.num_images))[:total]
        order = order.view(self.steps, self.gpus, self.images_per_gpu)
        for step in range(self.first_step, self.steps):
            yield [(self.epoch, index) for index in order[step, self.own].flatten().tolist()]


def evaluation_batches(
    num_images: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[tuple[int, int]]]:
    """Batches of this process's share; over all processes every image comes once."""
    own = [(0, index) for index in range(rank, num_images, world_size)]
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def batch_average_batches(
    num_images: int,
    batch_size: int,
    batches: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    together: bool = False,
) -> list[list[tuple[int, int]]]:
    """This process's share of up to `batches` random full batches, capped by the data.

    With fewer images than `batch_size` there is one batch of them all. `together`: for synchronised
    layers, which need as many batches in every process: each takes a share of every batch's images,
    or all of a batch that has too few to share, which has the same statistics.
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, num_images))
    order = torch.randperm(num_images, generator=generator).tolist()
    batch_size = min(batch_size, num_images)
    count = min(batches, num_images // batch_size)
    own = range(count) if together else range(rank, count, world_size)
    images = slice(rank, None, world_size) if together and batch_size >= world_size else slice(None)
    return [
        [(0, index) for index in order[b * batch_size : (b + 1) * batch_size][images]] for b in own
    ]


def make_loader(
    dataset: TransformedImages,
    batches,
    workers: int,
    device: torch.device,
    epochs: int = 1,
) -> DataLoader:
    """A DataLoader over given batches of (epoch, index) keys; workers stay from epoch to epoch."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=spare_worker,
        collate_fn=_as_it_is,  # TransformedImages gives whole batches
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and epochs > 1,
    )


def build_data(name: str, **options) -> ImageData:
    """Load the data set `name`: digits, cifar10, digit_crops, or an ImageFolder of another name.

    Raises FileNotFoundError or ValueError, saying what layout is expected, if it is not there.
    """
    train_images = options.get("train_images")
    if train_images is not None and train_images < 1:
        raise ValueError(f"data.train_images={train_images}; expected 1 or more, or null for all")
    known = data_options(name)
    for key in options:
        if key not in known:
            raise ValueError(
                f"data.{key}={options[key]}: {name} has no {key}, only {', '.join(known)}"
            )
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise ValueError(f"data.{key} is not set; add data.{key}=... to the command")
    return _loader(name)(**options)


def data_options(name: str) -> Mapping[str, inspect.Parameter]:
    """The options of the data set `name`, as parameters of a function."""
    return inspect.signature(_loader(name)).parameters


def _loader(name: str) -> Callable[..., ImageData]:
    return LOADERS.get(name, functools.partial(load_image_folder, name))


def is_image_folder(name: str) -> bool:
    """Whether a data set of this name is a folder of image files."""
    return name not in LOADERS


def load_digits(train_images: int | None = None) -> ImageData:
    """scikit-learn's 1,797 handwritten 8x8 digits as (3, 8, 8); 360 random ones are held out.

    Source: bundled with scikit-learn (UCI Optical Recognition of Handwritten Digits, test part).
    """
    images, labels = sklearn_digits()
    images = (images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), 0..16 to 0..255
    images = np.repeat(images[:, None], 3, axis=1)
    order = np.random.RandomState(0).permutation(len(images))  # the same split for every run
    held_out, rest = order[:360], order[360:]
    return _in_memory(
        "digits",
        (images[rest], labels[rest]),
        (images[held_out], labels[held_out]),
        train_images,
        mean=(0.3053,) * 3,  # of the images
        std=(0.3760,) * 3,
        padding=1,
    )


def load_cifar10(
    root: str,
    download: bool = False,
    train_images: int | None = None,
    image_size: int = 32,
    classes: list[int] | None = None,
) -> ImageData:
    """CIFAR-10 from `root`/cifar-10-batches-py; the last 5,000 training images are held out.

    The images are averaged down to `image_size` pixels, 32, 16 or 8, and crops padded by an eighth
    of it. With `classes` only theirs are there, labelled 0, 1, ... in this order. Raises
    FileNotFoundError if the five training batches are not there, ValueError for any other size.
    """
    _check_cifar_size(image_size)
    if download:
        *_, local_rank = launched()
        if not (in_group() and local_rank):  # one process of a machine writes, the others wait
            datasets.CIFAR10(root, train=True, download=True)
        if in_group():
            dist.barrier()
    folder = Path(root) / "cifar-10-batches-py"
    files = [folder / f"data_batch_{i}" for i in range(1, 6)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"no CIFAR-10 in data.root={root}: {missing[0]} is missing; expected torchvision's "
            "layout <root>/cifar-10-batches-py/data_batch_1..5 (data.download=true fetches it)"
        )
    batches = [_load_cifar_batch(file) for file in files]
    images = average_down(np.concatenate([images for images, _ in batches]), image_size)
    labels = np.concatenate([labels for _, labels in batches])
    if len(images) <= 5000:
        raise ValueError(f"{folder} has {len(images)} training images; 5,000 are held out of them")
    held_out = np.arange(len(labels)) >= len(labels) - 5000
    chosen = np.full(len(labels), True)
    if classes is not None:
        if len(set(classes)) < max(2, len(classes)):
            raise ValueError(f"data.classes={classes}; expected two or more different ones, 0 to 9")
        label_of = np.full(10, -1)
        label_of[classes] = np.arange(len(classes))
        labels = label_of[labels]
        chosen = labels >= 0
    return _in_memory(
        "cifar10",
        (images[chosen & ~held_out], labels[chosen & ~held_out]),
        (images[chosen & held_out], labels[chosen & held_out]),
        train_images,
        mean=(0.4914, 0.4822, 0.4465),
        std=CIFAR10_STD[image_size],
        padding=image_size // 8,
        flip=True,
        classes=len(classes or range(10)),
    )


def _check_cifar_size(image_size: int) -> None:
    if image_size not in CIFAR10_STD:
        raise ValueError(f"data.image_size={image_size}; CIFAR-10 takes one of {list(CIFAR10_STD)}")


def average_down(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 images (N, C, H, H) averaged over squares to (N, C, size, size), rounded half up."""
    count, channels, height, _ = images.shape
    side = height // size  # of a square
    squares = images.reshape(count, channels, size, side, size, side)
    sums = squares.sum((3, 5), dtype=np.uint32)
    return ((sums + side * side // 2) // (side * side)).astype(np.uint8)


def load_cifar10_test(root: str, image_size: int = 32) -> ArrayImages:
    """CIFAR-10's test images, from `root`/cifar-10-batches-py/test_batch, for a last evaluation.

    Averaged down like the others. Raises FileNotFoundError if they are not there.
    """
    _check_cifar_size(image_size)
    path = Path(root) / "cifar-10-batches-py" / "test_batch"
    if not path.is_file():
        raise FileNotFoundError(f"no CIFAR-10 test images in data.root={root}: {path} is missing")
    images, labels = _load_cifar_batch(path)
    return ArrayImages(average_down(images, image_size), labels)


class _ArraysOnly(pickle.Unpickler):
    """Unpickler for files of dicts, lists, strings and numpy arrays; refuses everything else."""

    allowed = {"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar", "encode"}

    def find_class(self, module: str, name: str):
        if name in self.allowed and (module.split(".")[0] == "numpy" or module == "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused {module}.{name}: not a plain array")


def _load_cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        images = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(batch["labels"]).reshape(-1)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is not a CIFAR-10 batch: {error!r}") from None
    if len(images) != len(labels):
        raise ValueError(f"{path}: {len(images)} images but {len(labels)} labels")
    if labels.dtype.kind not in "iu" or len(labels) and not 0 <= labels.min() <= labels.max() <= 9:
        raise ValueError(f"{path}: labels are not all whole numbers from 0 to 9")
    return images, labels


def load_digit_crops(root: str, train_images: int | None = None) -> ImageData:
    """Crops of drawn digits, `root`/{train,val}/<digit>/<image>, all of one size, in memory.

    Written by `python -m sn.training.detection.digits`. Shifted by up to an eighth, never mirrored;
    normalised as the detectors' images. Raises FileNotFoundError or ValueError without them.
    """
    parts = []
    for part in ("train", "val"):
        folder = _image_folder(Path(root) / part, root)
        samples = _spread(folder.samples, train_images if part == "train" else None)
        images = [np.asarray(read_image(path)) for path, _ in samples]
        if len({image.shape for image in images}) > 1:
            raise ValueError(f"data.root={root}: the images of {part} differ in size")
        labels = np.array([label for _, label in samples])
        parts.append((np.stack(images).transpose(0, 3, 1, 2), labels))
    side = parts[0][0].shape[-1]
    return _in_memory(
        "digit_crops", parts[0], parts[1], None, IMAGENET_MEAN, IMAGENET_STD, padding=side // 8
    )


def _in_memory(
    name, train, val, train_images, mean, std, padding, flip=False, classes=10
) -> ImageData:
    if train_images is not None and train_images > len(train[0]):
        raise ValueError(f"data.train_images={train_images}, but {name} has {len(train[0])}")
    train = tuple(part[:train_images] for part in train)
    sha256 = hashlib.sha256()
    for part in (*train, *val):
        sha256.update(np.ascontiguousarray(part).tobytes())
    return ImageData(
        name,
        ArrayImages(*train),
        ArrayImages(*val),
        classes,
        Augmentation(ArrayTransform(mean, std, padding, flip)),
        Augmentation(ArrayTransform(mean, std)),
        sha256.hexdigest(),
    )


# name -> what loads it, with its options in configs/data; other names are folders of image files
LOADERS = {"digits": load_digits, "cifar10": load_cifar10, "digit_crops": load_digit_crops}


def load_image_folder(
    name: str,
    root: str,
    train_images: int | None = None,
    image_size: int = 224,
    resize: int = 256,
    lighting: float = 0.1,
    color_jitter: float = 0.0,
    last_crop: str = "center",
    last_fraction: float = 0.0,
    bad: BadImages | None = None,
) -> ImageData:
    """ImageNet, or any `root`/{train,val}/<class>/<image>.

    In the last `last_fraction` of the run the random scale gives way to a `last_crop` ("center" or
    "random") of the resized image. Source: official trainers, section 4.1.

    Raises FileNotFoundError or ValueError if the folders or their classes are not as expected.
    """
    if last_crop not in ("center", "random"):
        raise ValueError(f"unknown data.last_crop={last_crop!r}; choose center or random")
    if not 1 <= image_size <= resize:
        raise ValueError(f"data.image_size={image_size} must be 1..data.resize={resize}")
    train, val = (_image_folder(Path(root) / part, root) for part in ("train", "val"))
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"data.root={root}: train has {len(train.classes)} classes, val {len(val.classes)}; "
            f"in only one of them: {only[:5]}"
        )
    both = _real_folders(f for f, _ in train.samples) & _real_folders(f for f, _ in val.samples)
    if both:
        say(
            f"warning: data.root={root}: train and val both hold the images of {min(both)}: an "
            "accuracy on images trained on says little",
            error=True,
        )
    train_samples = _spread(train.samples, train_images)
    sha256 = hashlib.sha256()
    for part, samples in (("train", train_samples), ("val", val.samples)):
        for line in listing([file for file, _ in samples], root):
            sha256.update(f"{part} ".encode() + line)

    noise = [v2.RandomHorizontalFlip()]
    if color_jitter:
        noise.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    noise.append(v2.PILToTensor())
    if lighting:
        noise += [v2.ToDtype(torch.float32, scale=True), Lighting(lighting)]
    crop = v2.CenterCrop if last_crop == "center" else v2.RandomCrop
    usual = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), *noise])
    shrink = v2.Resize(resize, antialias=True)
    last = v2.Compose([shrink, crop(image_size), *noise])
    plain = v2.Compose([shrink, v2.CenterCrop(image_size), v2.PILToTensor()])
    normalise = normaliser(IMAGENET_MEAN, IMAGENET_STD)
    return ImageData(
        name,
        FileImages(train_samples, bad=bad),
        FileImages(val.samples, substitute=False, bad=bad),
        len(train.classes),
        Augmentation(usual, last, last_fraction, normalise),
        Augmentation(plain, normalise=normalise),
        sha256.hexdigest(),
    )


def _image_folder(folder: Path, root: str) -> datasets.ImageFolder:
    layout = "expected <root>/train/<class>/<image> and <root>/val/<class>/<image>"
    if not folder.is_dir():
        raise FileNotFoundError(f"data.root={root}: no folder {folder}; {layout}")
    try:
        found = _ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.root={root}: {error}; {layout}") from None
    if len(found.classes) < 2:
        raise ValueError(
            f"data.root={root}: {folder} has one class alone, {found.classes[0]}; {layout}"
        )
    return found


class _ImageFolder(datasets.ImageFolder):
    """torchvision's, without hidden folders and files, and without end where links lead back."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not is_hidden(name)]
        if not names:
            raise FileNotFoundError(f"no folders of classes in {directory}")
        for name in names:
            path = Path(directory, name)
            if Path(directory).resolve().is_relative_to(path.resolve()):
                raise ValueError(f"{path} is a link to a folder that holds it; remove it")
        return names, {name: label for label, name in enumerate(names)}

    @staticmethod
    def make_dataset(directory, class_to_idx, **options) -> list[tuple[str, int]]:
        samples: list[tuple[str, int]] = []
        owners: dict[str, str] = {}  # real folder -> its class
        for name, label in class_to_idx.items():
            files = files_below(os.path.join(directory, name))
            images = [file for file in files if file.lower().endswith(IMG_EXTENSIONS)]
            if not images:
                raise FileNotFoundError(f"no image in {os.path.join(directory, name)}")
            for folder in _real_folders(images):
                if owners.setdefault(folder, name) != name:
                    raise ValueError(
                        f"{directory}: the classes {owners[folder]} and {name} hold the same "
                        f"images, those in {folder}; remove the link to it in one of them"
                    )
            samples += [(file, label) for file in sorted(images, key=os.path.split)]
        return samples


def _real_folders(files: Iterable[str]) -> set[str]:
    """The folders of these files, links followed."""
    return {os.path.realpath(folder) for folder in {os.path.dirname(file) for file in files}}


def _spread(samples: list, count: int | None) -> list:
    """`count` of `samples` at even distances, so that every class keeps its share."""
    if count is None:
        return samples
    if count > len(samples):
        raise ValueError(f"data.train_images={count}, but there are {len(samples)}")
    return [samples[i * len(samples) // count] for i in range(count)]

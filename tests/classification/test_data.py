"""Data sets, their errors, and batches that depend on (seed, epoch, image) and nothing else."""

import itertools
import math
import os
import pickle
import shutil
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import v2

from sn.training.classification.data import (
    PCA_VALUES,
    PCA_VECTORS,
    ArrayImages,
    ArrayTransform,
    Augmentation,
    BadImages,
    FileImages,
    Lighting,
    SettingSampler,
    TransformedImages,
    average_down,
    batch_average_batches,
    build_data,
    evaluation_batches,
    load_image_folder,
    make_loader,
    random_bits,
    read_image,
)
from sn.training.classification.evaluation import evaluate
from sn.training.run.schedule import mix_seed

CPU = torch.device("cpu")
SETTINGS = [(8, 32), (8, 3), (4, 1), (1, 16), (2, 5)]
SIZES = [1, 5, 41, 64, 1437]


# --- the sampler of a setting


def epoch_of(sampler, epoch=0, first_step=0):
    sampler.epoch, sampler.first_step = epoch, first_step
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert {e for batch in batches for e, _ in batch} <= {epoch}
    return [[index for _, index in batch] for batch in batches]


@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("gpus, per_gpu", SETTINGS)
def test_every_image_and_full_batches(gpus, per_gpu, images):
    """Every GPU's batch is full, every image comes, and none much more often than another."""
    batches = epoch_of(SettingSampler(images, gpus, per_gpu, seed=0))
    assert len(batches) == math.ceil(math.ceil(images / gpus) / per_gpu)
    assert {len(batch) for batch in batches} == {gpus * per_gpu}
    counts = Counter(index for batch in batches for index in batch)
    assert set(counts) == set(range(images))
    assert max(counts.values()) - min(counts.values()) <= 1
    extra = len(batches) * gpus * per_gpu - images
    assert 0 <= extra < gpus * per_gpu + gpus


@pytest.mark.parametrize("images", [1, 41, 200])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_shares_of_processes_make_the_whole(world_size, images):
    """In the order of the ranks they are the batch of one process, image by image."""
    whole = epoch_of(SettingSampler(images, 8, 3, 5), epoch=2)
    shares = [
        epoch_of(SettingSampler(images, 8, 3, 5, rank, world_size), epoch=2)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert {len(part) for part in parts} == {24 // world_size}
        assert sum(parts, []) == batch


def test_orders_differ_between_epochs_and_seeds():
    orders = {
        (seed, epoch): tuple(map(tuple, epoch_of(SettingSampler(64, 2, 8, seed), epoch)))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == 6
    again = epoch_of(SettingSampler(64, 2, 8, 1), 2)
    assert tuple(map(tuple, again)) == orders[1, 2]


def test_order_does_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = epoch_of(SettingSampler(64, 2, 8, 0))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert epoch_of(SettingSampler(64, 2, 8, 0)) == first
    torch.set_rng_state(state)
    epoch_of(SettingSampler(64, 2, 8, 0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("first_step", [0, 1, 5, 6])
def test_resumed_epoch_is_the_tail(first_step):
    whole = epoch_of(SettingSampler(41, 2, 4, 3), epoch=1)
    assert len(whole) == 6
    resumed = epoch_of(SettingSampler(41, 2, 4, 3), epoch=1, first_step=first_step)
    assert resumed == whole[first_step:]


def test_settings_of_equal_totals_see_the_same_images():
    """(8,4), (2,16) and (1,32): the same images per step, so only the groups differ."""
    batches = [epoch_of(SettingSampler(320, *setting, 0)) for setting in ((8, 4), (2, 16), (1, 32))]
    assert batches[0] == batches[1] == batches[2]


# --- augmentation


class Noise:
    """A transform that shows its random numbers."""

    def __call__(self, image):
        return image + torch.rand(1)


def images_of(count=12):
    return [(torch.zeros(1), index) for index in range(count)]


def test_random_numbers_belong_to_the_image_and_the_epoch():
    data = TransformedImages(images_of(), Augmentation(Noise()), epochs=3, seed=7)
    keys = [(epoch, index) for epoch in range(3) for index in range(12)]
    values = {key: data[key][0].item() for key in keys}
    assert len(set(values.values())) == len(keys)
    for key in reversed(keys):
        torch.rand(3)
        assert data[key][0].item() == values[key]
    other = TransformedImages(images_of(), Augmentation(Noise()), epochs=3, seed=8)
    assert all(other[key][0].item() != values[key] for key in keys)


def test_global_generators_are_left_alone():
    data = build_data("digits", train_images=8)
    before = torch.get_rng_state(), np.random.get_state()
    for images in (
        TransformedImages(data.train, data.augmentation, epochs=2, seed=0),
        TransformedImages(images_of(), Augmentation(Noise()), epochs=2, seed=0),
    ):
        images[1, 3]
        images[0, 2]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1][1]).all()

    def broken(image):
        torch.rand(2)
        raise RuntimeError("no such image")

    images.augmentation = Augmentation(broken)
    with pytest.raises(RuntimeError, match="no such image"):
        images[0, 0]
    assert torch.equal(torch.get_rng_state(), before[0])


@pytest.mark.parametrize("workers, passes", [(1, 1), (1, 2), (2, 2)])
def test_workers_change_nothing(workers, passes):
    """They stay for the second epoch where it was announced."""
    data = build_data("digits", train_images=40)
    images = TransformedImages(data.train, data.augmentation, epochs=2, seed=1)

    def epochs(workers):
        sampler = SettingSampler(40, 2, 8, 1)
        loader = make_loader(images, sampler, workers, CPU, passes)
        result = []
        for sampler.epoch in range(2):
            sampler.first_step = sampler.epoch
            result += [(x.clone(), y.clone()) for x, y in loader]
        return result

    ours, theirs = epochs(workers), epochs(0)
    assert len(ours) == len(theirs) == 5
    for (x, y), (x0, y0) in zip(ours, theirs):
        assert torch.equal(x, x0) and torch.equal(y, y0)


def test_random_bits_are_splitmix64():
    """The published outputs of splitmix64.c from state 1234567, in any order and number."""
    stream = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert random_bits(1234567, np.arange(5)).tolist() == stream
    assert random_bits(1234567, np.array([4, 1])).tolist() == [stream[4], stream[1]]
    assert random_bits(2**64 - 1, np.arange(3)).dtype == np.uint64


class SlowTransform:
    """One image at a time: Python's whole numbers for splitmix64, pad, slice, flip, normalise."""

    def __init__(self, mean, std, padding, flip):
        self.mean, self.std = mean, std
        self.padding, self.flip = padding, flip

    def __call__(self, image, seed, epoch, index):
        mask = 2**64 - 1
        z = (mix_seed(seed, epoch) + (index + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        offsets, side = 2 * self.padding + 1, image.shape[1]
        row, column = (z >> 40) * offsets >> 24, ((z >> 16) % 2**24) * offsets >> 24
        padded = np.zeros((3, side + 2 * self.padding, side + 2 * self.padding), dtype=np.uint8)
        inside = slice(self.padding, self.padding + side)
        padded[:, inside, inside] = image.numpy()
        crop = padded[:, row : row + side, column : column + side].astype(np.float64) / 255
        if self.flip and z % 2:
            crop = crop[:, :, ::-1]
        return (crop - np.array(self.mean)[:, None, None]) / np.array(self.std)[:, None, None]


@pytest.mark.parametrize("padding, flip", [(0, False), (0, True), (1, False), (2, True), (4, True)])
def test_batches_are_augmented_as_their_images_one_by_one(padding, flip):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    part = ArrayImages(arrays, np.arange(40) % 10)
    augmentation = Augmentation(ArrayTransform(mean, std, padding, flip))
    images = TransformedImages(part, augmentation, epochs=3, seed=5)
    slow = SlowTransform(mean, std, padding, flip)
    for epoch in (0, 2):
        keys = [(epoch, int(index)) for index in generator.permutation(40)]
        x, y = images.__getitems__(keys)
        assert x.dtype == torch.float32 and y.tolist() == [index % 10 for _, index in keys]
        expected = np.stack([slow(part[index][0], 5, epoch, index) for _, index in keys])
        np.testing.assert_allclose(x.numpy(), expected, atol=1e-5)
        for size in (1, 7):  # other batches, other order: the same numbers
            parts = [images.__getitems__(keys[i : i + size])[0] for i in range(0, 40, size)]
            assert torch.equal(torch.cat(parts), x)
        single, label = images[keys[3]]
        assert torch.equal(single, x[3]) and label == keys[3][1] % 10


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_offsets_and_flips_are_uniform_and_independent(padding):
    """Chi-squared over (row, column, flip) of images, and of epochs and seeds for one image."""
    transform = ArrayTransform((0.5,) * 3, (0.5,) * 3, padding, flip=True)
    cells = 2 * (2 * padding + 1) ** 2
    of_images = random_bits(mix_seed(0, 0), np.arange(100 * cells))
    of_epochs = np.concatenate(
        [random_bits(mix_seed(seed, epoch), np.array([17])) for seed in range(20)
         for epoch in range(5 * cells)]
    )  # fmt: skip
    for bits in (of_images, of_epochs):
        rows, columns, mirrored = transform.choices(bits)
        reach = range(2 * padding + 1)
        assert set(rows) == set(columns) == set(reach) and set(mirrored) == {True, False}
        counts = Counter(zip(rows.tolist(), columns.tolist(), mirrored.tolist()))
        squares = sum((count - 100) ** 2 / 100 for count in counts.values())
        squares += 100 * (cells - len(counts))
        assert abs(squares - (cells - 1)) < 4 * (2 * (cells - 1)) ** 0.5
    rows, columns, mirrored = (v[:-1] for v in transform.choices(of_images))
    following = transform.choices(of_images[1:])
    for one in (rows, columns, mirrored):
        for other in following:  # of the next image
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / len(one) ** 0.5


def test_last_part_of_the_run_takes_the_other_transform():
    augmentation = Augmentation("usual", "last", 0.05)
    chosen = [augmentation.at(epoch / 100) for epoch in range(100)]
    assert chosen == ["usual"] * 95 + ["last"] * 5
    for epochs in (20, 40, 60, 80, 90, 100, 120, 200):
        for last in range(1, 20):
            if epochs * last % 100 == 0:
                count = epochs * last // 100
                augmentation.last_fraction = last / 100
                chosen = [augmentation.at(epoch / epochs) for epoch in range(epochs)]
                assert chosen.count("last") == count, (epochs, last)
    assert Augmentation("usual", "last", 0.0).at(0.999) == "usual"
    assert Augmentation("usual", None, 0.5).at(0.9) == "usual"


@pytest.mark.parametrize("lighting", [0.0, 0.1])
def test_files_are_normalised_together_as_one_by_one(tmp_path, lighting):
    """Against torchvision's v1 transforms of each image, the noise drawn from its own seed."""
    generator = np.random.default_rng(0)
    for part, name, index in itertools.product(("train", "val"), "ab", range(3)):
        (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    data = build_data("x", root=str(tmp_path), image_size=8, resize=10, lighting=lighting)
    images = TransformedImages(data.train, data.augmentation, epochs=2, seed=3)
    keys = [(1, index) for index in (4, 0, 5, 1)]
    batch, labels = images.__getitems__(keys)
    assert batch.shape == (4, 3, 8, 8) and labels.tolist() == [1, 0, 1, 0]
    seeded = transforms.Compose(
        [
            transforms.RandomResizedCrop(8, antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            *([Lighting(lighting)] if lighting else []),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    for key, image in zip(keys, batch):
        torch.manual_seed(mix_seed(3, *key))
        torch.testing.assert_close(image, seeded(data.train[key[1]][0]), atol=1e-6, rtol=0)
        assert torch.equal(image, images[key][0])
    to_tensor, normalise = seeded.transforms[2], seeded.transforms[-1]
    crop = (transforms.Resize(10), transforms.CenterCrop(8))
    plain = transforms.Compose([*crop, to_tensor, normalise])
    held_out, _ = TransformedImages(data.val, data.evaluation, 1).__getitems__([(0, 2), (0, 3)])
    for index, image in zip((2, 3), held_out):
        torch.testing.assert_close(image, plain(data.val[index][0]), atol=1e-6, rtol=0)


def test_lighting_formula():
    """image + eigenvectors (alpha * eigenvalues), alpha normal with the given deviation."""
    image = torch.rand(3, 4, 5)
    torch.manual_seed(3)
    ours = Lighting(0.1)(image)
    torch.manual_seed(3)
    alpha = 0.1 * torch.randn(3)
    shift = [
        sum(PCA_VECTORS[channel][k] * alpha[k].item() * PCA_VALUES[k] for k in range(3))
        for channel in range(3)
    ]
    torch.testing.assert_close(ours - image, torch.tensor(shift).view(3, 1, 1).expand(3, 4, 5))
    vectors = torch.tensor(PCA_VECTORS)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), atol=1e-3, rtol=0)
    # AlexNet's published values: eigenvectors of the RGB covariance are columns
    assert PCA_VALUES == (0.2175, 0.0188, 0.0045)
    assert [row[0] for row in PCA_VECTORS] == [-0.5675, -0.5808, -0.5836]


# --- evaluation and batch average


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_takes_every_image_once(batch_size, world_size):
    shares = [evaluation_batches(7, batch_size, rank, world_size) for rank in range(world_size)]
    seen = [key for share in shares for batch in share for key in batch]
    assert sorted(seen) == [(0, index) for index in range(7)]
    assert all(0 < len(batch) <= batch_size for share in shares for batch in share)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "images, size, count, expected",
    [(100, 8, 5, 5), (100, 8, 200, 12), (7, 8, 200, 1), (8, 8, 1, 1), (100, 1, 3, 3)],
)
def test_batch_average_batches(images, size, count, expected, world_size):
    """Full batches of different random images, as many as asked for or as there are."""
    shares = [
        batch_average_batches(images, size, count, 0, rank, world_size)
        for rank in range(world_size)
    ]
    batches = [batch for share in shares for batch in share]
    assert len(batches) == expected
    assert {len(batch) for batch in batches} == {min(size, images)}
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys) and all(0 <= index < images for _, index in keys)
    whole = batch_average_batches(images, size, count, 0)
    assert sorted(map(tuple, batches)) == sorted(map(tuple, whole))
    if images > size:
        assert whole != batch_average_batches(images, size, count, 1)
        assert [index for _, index in whole[0]] != list(range(size))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_batches_shared_by_synchronised_layers(world_size):
    """Each process has a part of every batch, or all of one that is too small; none has none."""
    shares = [
        batch_average_batches(100, 7, 5, 0, rank, world_size, together=True)
        for rank in range(world_size)
    ]
    for whole, *parts in zip(batch_average_batches(100, 7, 5, 0), *shares, strict=True):
        if world_size > 7:
            assert parts == [whole] * world_size
        else:
            assert all(parts) and sorted(key for part in parts for key in part) == sorted(whole)


# --- digits


def test_digits():
    data = build_data("digits")
    assert (len(data.train), len(data.val), data.num_classes) == (1437, 360, 10)
    images = torch.cat([data.train.images, data.val.images])
    assert images.shape == (1797, 3, 8, 8) and images.dtype == torch.uint8
    rows = {image.numpy().tobytes() for image in data.train.images}
    held = [image.numpy().tobytes() for image in data.val.images]
    assert len(rows & set(held)) <= 1  # the set itself holds a few equal images
    assert set(data.train.labels) == set(data.val.labels) == set(range(10))
    same, few = build_data("digits"), build_data("digits", train_images=100)
    assert torch.equal(few.train.images, data.train.images[:100])
    assert torch.equal(few.val.images, data.val.images)
    assert same.sha256 == data.sha256 != few.sha256 and len(data.sha256) == 64
    normalised = torch.stack([data.evaluation.usual(image) for image in images])
    assert normalised.mean().abs() < 0.01 and (normalised.std() - 1).abs() < 0.01


def test_digits_are_not_flipped():
    """A mirrored 3 is no 3: only shifts of a pixel."""
    data = build_data("digits", train_images=4)
    images = TransformedImages(data.train, data.augmentation, epochs=1)
    for index in range(4):
        whole = torch.nn.functional.pad(data.train[index][0], (1, 1, 1, 1))
        crops = [whole[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        crops = torch.stack([data.evaluation.usual(crop) for crop in crops])
        for seed in range(10):
            images.seed = seed
            assert (crops == images[0, index][0]).flatten(1).all(1).any()


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagenet"])
@pytest.mark.parametrize("count", [0, -1])
def test_no_training_images(name, count, tmp_path):
    with pytest.raises(ValueError, match=f"data.train_images={count}"):
        build_data(name, root=str(tmp_path), train_images=count)


def test_more_training_images_than_there_are():
    with pytest.raises(ValueError, match="data.train_images=1438.*1437"):
        build_data("digits", train_images=1438)


# --- CIFAR-10


def write_cifar(root, per_file=1100, **changes):
    """Five training files as torchvision's; the first byte of an image is its number mod 251."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        index = np.arange(per_file) + number * per_file
        data = np.zeros((per_file, 3072), dtype=np.uint8)
        data[:, 0] = index % 251
        data[:, 1024] = 1  # the green channel's first pixel
        batch = {"batch_label": "crafted", "labels": (index % 10).tolist(), "data": data}
        batch |= changes
        with open(folder / f"data_batch_{number + 1}", "wb") as file:
            pickle.dump(batch, file, protocol=2)
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    write_cifar(root)
    return root


def test_cifar10_holds_out_the_last_5000(cifar):
    data = build_data("cifar10", root=str(cifar))
    assert (len(data.train), len(data.val), data.num_classes) == (500, 5000, 10)
    first, label = data.train[499]
    assert first.shape == (3, 32, 32) and first[0, 0, 0] == 499 % 251 and label == 9
    assert first[1, 0, 0] == 1 and first[2, 0, 0] == 0
    for index in (0, 1, 4999):
        image, label = data.val[index]
        assert image[0, 0, 0] == (500 + index) % 251 and label == index % 10
    few = build_data("cifar10", root=str(cifar), train_images=33)
    assert len(few.train) == 33 and len(few.val) == 5000
    assert torch.equal(few.val.images, data.val.images)
    assert few.sha256 != data.sha256
    with pytest.raises(ValueError, match="501.*500"):
        build_data("cifar10", root=str(cifar), train_images=501)


def test_cifar10_as_torchvision_reads_it(tmp_path, monkeypatch):
    """The same images and labels in the same order (its checksum check left out)."""
    from torchvision.datasets import CIFAR10

    folder = write_cifar(tmp_path)
    with open(folder / "batches.meta", "wb") as file:
        pickle.dump({"label_names": [str(digit) for digit in range(10)]}, file)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    theirs = CIFAR10(str(tmp_path), train=True)
    ours = build_data("cifar10", root=str(tmp_path))
    images = torch.cat([ours.train.images, ours.val.images]).permute(0, 2, 3, 1).numpy()
    assert (images == theirs.data).all()
    assert ours.train.labels + ours.val.labels == theirs.targets


def test_cifar10_augmentation(cifar):
    data = build_data("cifar10", root=str(cifar), train_images=2)
    image = torch.arange(3072, dtype=torch.int64).remainder(256).to(torch.uint8).view(3, 32, 32)
    mean = torch.tensor((0.4914, 0.4822, 0.4465)).view(3, 1, 1)
    std = torch.tensor((0.2470, 0.2435, 0.2616)).view(3, 1, 1)
    torch.testing.assert_close(data.evaluation.usual(image), (image / 255 - mean) / std)
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[:, y : y + 32, x : x + 32]
            crops[data.evaluation.usual(crop).numpy().tobytes()] = (y, x, False)
            crops[data.evaluation.usual(crop.flip(-1)).numpy().tobytes()] = (y, x, True)
    bits = random_bits(0, np.arange(100))
    batch = data.augmentation.usual(image.expand(100, -1, -1, -1), bits)
    seen = {crops[augmented.numpy().tobytes()] for augmented in batch}
    assert len(seen) > 50 and {flipped for *_, flipped in seen} == {True, False}


@pytest.mark.parametrize("size, std", [(32, 0.2470), (16, 0.2381), (8, 0.2220)])
def test_cifar10_averaged_down(size, std, cifar, tmp_path):
    """As torch's mean over squares; crops and normalisation of that size."""
    data = build_data("cifar10", root=str(cifar), image_size=size)
    whole = build_data("cifar10", root=str(cifar))
    assert data.train.images.shape == (500, 3, size, size)
    pooled = torch.nn.functional.avg_pool2d(whole.train.images.double(), 32 // size)
    assert torch.equal(data.train.images.double(), (pooled + 0.5).floor())
    assert data.augmentation.usual.padding == {32: 4, 16: 2, 8: 1}[size]
    assert data.augmentation.usual.flip
    assert (data.sha256 == whole.sha256) == (size == 32)
    white = torch.full((3, size, size), 255, dtype=torch.uint8)
    assert data.evaluation.usual(white)[0, 0, 0].item() == pytest.approx((1 - 0.4914) / std)
    noise = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(noise).double(), 32 // size)
    assert (average_down(noise, size) == (pooled + 0.5).floor().numpy()).all()


@pytest.mark.parametrize("size", [0, 1, 4, 12, 24, 64, "16", None])
def test_cifar10_of_another_size(size, cifar):
    with pytest.raises(ValueError, match=f"data.image_size={size};.*32, 16, 8"):
        build_data("cifar10", root=str(cifar), image_size=size)


@pytest.mark.parametrize("missing", [1, 5])
def test_cifar10_missing_file(missing, tmp_path):
    folder = write_cifar(tmp_path, per_file=2)
    (folder / f"data_batch_{missing}").unlink()
    with pytest.raises(FileNotFoundError) as error:
        build_data("cifar10", root=str(tmp_path))
    for words in (str(tmp_path), f"data_batch_{missing}", "cifar-10-batches-py", "download=true"):
        assert words in str(error.value)


def test_cifar10_too_few_images(tmp_path):
    """Nothing is left to train on once 5,000 are held out: an error, not an empty set."""
    write_cifar(tmp_path, per_file=1000)
    with pytest.raises(ValueError, match="5,?000"):
        build_data("cifar10", root=str(tmp_path))


class Evil:
    """Unpickling it calls `call(*arguments)`."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("where", ["data", "labels", "note"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickle_is_refused(where, protocol, tmp_path):
    """Whatever a file asks to be called, it is not: the marker is not made."""
    folder = write_cifar(tmp_path, per_file=2)
    marker = tmp_path / "code ran"
    for call, *arguments in (
        (os.mkdir, str(marker)),
        (eval, f"__import__('os').mkdir({str(marker)!r})"),
        (getattr, "text", "upper"),
        (np.save, str(marker), [1]),
        (np.load, str(marker)),
        (np.ndarray.tofile, np.zeros(2), str(marker)),
        (np.frombuffer, b"12345678"),
        (__import__, "this"),
    ):
        file = folder / "data_batch_2"
        file.write_bytes(pickle.dumps({where: Evil(call, *arguments)}, protocol=protocol))
        with pytest.raises(ValueError, match="data_batch_2 is not a CIFAR-10 batch"):
            build_data("cifar10", root=str(tmp_path))
        assert not marker.exists() and not (tmp_path / "code ran.npy").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cnumpy.ndarray\ntofile\n.",
        b"cnumpy\nsave\n.",
        b"cnumpy.no_such_module\nndarray\n.",
        b"c_codecs\ndecode\n.",
        b"cbuiltins\neval\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93.",
        b"",
        b".",
        b"0",
        b"N.",
        b"]q\x00.",
        b"not a pickle",
        b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x63.",
        b"h\xff.",
        b"\x82\x01.",
        b"\xc3\x28",
        b"I9" + b"9" * 5000 + b"\n.",
    ],
)
def test_file_that_is_no_batch(text, tmp_path):
    folder = write_cifar(tmp_path, per_file=2)
    (folder / "data_batch_3").write_bytes(text)
    with pytest.raises(ValueError, match="data_batch_3 is not a CIFAR-10 batch"):
        build_data("cifar10", root=str(tmp_path))


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_cifar_file(kept, tmp_path):
    folder = write_cifar(tmp_path, per_file=4)
    file = folder / "data_batch_5"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match="data_batch_5 is not a CIFAR-10 batch"):
        build_data("cifar10", root=str(tmp_path))


def test_damaged_cifar_file_is_always_a_value_error(tmp_path):
    """Single damaged bytes of the pickle's structure: read, or a ValueError."""
    folder = write_cifar(tmp_path, per_file=2)
    file = folder / "data_batch_1"
    content = file.read_bytes()
    header = content.index(bytes(40))  # up to the images
    tail = content.rindex(bytes(40))
    places = [*range(header), *range(tail + 40, len(content))]
    generator = np.random.default_rng(0)
    for _ in range(150):
        place = int(generator.choice(places))
        file.write_bytes(content[:place] + generator.bytes(1) + content[place + 1 :])
        try:
            build_data("cifar10", root=str(tmp_path))
        except ValueError:
            pass


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": [0]},
        {"data": np.zeros((1100, 3071), dtype=np.uint8)},
        {"labels": "zero"},
        {"labels": [10] * 1100},
        {"labels": [-1] * 1100},
        {"labels": [0.5] * 1100},
    ],
    ids=["one label", "short rows", "text", "label 10", "label -1", "half a label"],
)
def test_cifar_file_of_the_wrong_content(changes, tmp_path):
    """Labels outside 0..9 would only show as an index error in the middle of training."""
    write_cifar(tmp_path, **changes)
    with pytest.raises(ValueError, match="data_batch_1"):
        build_data("cifar10", root=str(tmp_path))


# --- image folders


def write_folder(root, classes=("ant", "bee"), train=3, val=2, size=(12, 10)):
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                colour = (40 + 50 * label, 30 * index, 200)
                Image.new("RGB", size, colour).save(folder / f"{index}.png")
    return root


def small(root, **options):
    return build_data("bugs", root=str(root), image_size=8, resize=10, **options)


def test_image_folder(tmp_path):
    data = small(write_folder(tmp_path))
    assert (len(data.train), len(data.val), data.num_classes) == (6, 4, 2)
    assert data.describe()["name"] == "bugs" and str(tmp_path) not in str(data.describe())
    images = TransformedImages(data.train, data.augmentation, 1)
    for index in range(6):
        image, label = images[0, index]
        assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and label == index // 3
    image, _ = TransformedImages(data.val, data.evaluation, 1)[0, 2]
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    expected = ((torch.tensor((90, 0, 200)) / 255 - mean) / std).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(image, expected)


def test_evaluation_is_the_resized_center(tmp_path):
    """Short side to `resize`, then the centre; nothing random."""
    data = small(write_folder(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    resized = image.resize((20, 10), Image.Resampling.BILINEAR).crop((6, 1, 14, 9))
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    expected = (torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 - mean) / std
    for _ in range(2):
        shown = data.evaluation.normalise(data.evaluation.usual(image))
        torch.testing.assert_close(shown, expected)


def test_folder_hash_is_of_the_content_list_not_the_place(tmp_path):
    first, second = small(write_folder(tmp_path / "a")), small(write_folder(tmp_path / "b"))
    assert first.sha256 == second.sha256
    (tmp_path / "b" / "train" / "ant" / "0.png").rename(tmp_path / "b" / "train" / "ant" / "9.png")
    assert small(tmp_path / "b").sha256 != first.sha256
    assert small(tmp_path / "a", train_images=2).sha256 != first.sha256


def test_part_of_a_folder_is_spread_over_its_classes(tmp_path):
    write_folder(tmp_path, classes=("a", "b", "c", "d"), train=5, val=1)
    for count in (4, 8, 12, 20):
        labels = [label for _, label in small(tmp_path, train_images=count).train.samples]
        assert len(labels) == count and set(Counter(labels).values()) == {count // 4}
        paths = [path for path, _ in small(tmp_path, train_images=count).train.samples]
        assert len(set(paths)) == count
    with pytest.raises(ValueError, match="data.train_images=21.*20"):
        small(tmp_path, train_images=21)


LAYOUT = "<root>/train/<class>/<image> and <root>/val/<class>/<image>"


@pytest.mark.parametrize("broken", ["root", "train", "val", "empty train", "empty val", "class"])
def test_folder_of_another_layout(broken, tmp_path):
    root = tmp_path / "data"
    if broken != "root":
        write_folder(root)
    if broken in ("train", "val"):
        (root / broken).rename(root / "other")
    elif broken.startswith("empty"):
        part = root / broken.split()[1]
        part.rename(tmp_path / "away")
        part.mkdir()
    elif broken == "class":
        for image in (root / "val" / "bee").iterdir():
            image.rename(image.with_suffix(".txt"))
    with pytest.raises(FileNotFoundError) as error:
        small(root)
    assert f"data.root={root}" in str(error.value) and LAYOUT in str(error.value)
    if broken == "class":
        assert "bee" in str(error.value)
    if broken in ("train", "val"):
        assert str(root / broken) in str(error.value)


def test_train_and_val_of_different_classes(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cricket")
    with pytest.raises(ValueError, match=r"in only one of them: \['bee', 'cricket'\]"):
        small(tmp_path)


@pytest.mark.parametrize("options", [{"last_crop": "middle"}, {"image_size": 11}, {"resize": 0}])
def test_bad_folder_option(options, tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError) as error:
        build_data("bugs", root=str(tmp_path), **{"image_size": 8, "resize": 10} | options)
    assert str(*options.values()) in str(error.value)


def test_unknown_data_option(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match="image_sise"):
        build_data("bugs", root=str(tmp_path), image_sise=8)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_unreadable_image_names_its_path(kind, tmp_path):
    """Cut anywhere, an image loads or is a ValueError with its path: no other exception."""
    write_folder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    suffix = {"JPEG": ".jpeg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    path = tmp_path / "train" / "ant" / f"9{suffix}"
    Image.fromarray(pixels).save(path, format=kind)
    content = path.read_bytes()
    data = small(tmp_path)
    index = [sample for sample, _ in data.train.samples].index(str(path))
    assert data.train[index][0].size == (9, 9)
    cuts = [content[:length] for length in range(0, len(content), max(1, len(content) // 60))]
    errors = 0
    for cut in (*cuts, b"GIF89a but no image", b"\xff" * 100):
        path.write_bytes(cut)
        try:
            data.train[index]
        except ValueError as error:
            errors += 1
            assert str(path) in str(error)
    assert errors > len(cuts) // 2


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_images_never_end_in_another_exception(tmp_path):
    """Bytes changed at random: an image, or a ValueError with the path."""
    write_folder(tmp_path)
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    for kind in ("png", "jpeg", "tiff", "bmp", "webp"):
        path = tmp_path / "train" / "ant" / f"0.{kind}"
        Image.fromarray(pixels).save(path)
        content = bytearray(path.read_bytes())
        data = small(tmp_path)
        index = [sample for sample, _ in data.train.samples].index(str(path))
        for _ in range(60):
            bad = bytearray(content)
            for place in generator.integers(0, min(len(bad), 200), 3):
                bad[place] = generator.integers(256)
            path.write_bytes(bad)
            try:
                data.train[index]
            except ValueError as error:
                assert str(path) in str(error)
        path.unlink()


def test_decompression_bomb_is_refused(tmp_path):
    write_folder(tmp_path)
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path = tmp_path / "train" / "ant" / "0.png"
    import zlib

    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    path.write_bytes(content + struct.pack(">I", zlib.crc32(chunk)))
    data = small(tmp_path)
    with pytest.raises(ValueError, match="0.png"):
        data.train[0]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_loads_as_rgb(mode, tmp_path):
    write_folder(tmp_path)
    suffix = ".jpg" if mode in ("CMYK", "YCbCr") else ".png"
    path = tmp_path / "train" / "ant" / f"0{suffix}"
    (tmp_path / "train" / "ant" / "0.png").unlink()
    Image.new("RGB", (12, 10), (255, 255, 255)).convert(mode).save(path)
    data = small(tmp_path)
    image, _ = data.train[0]
    assert image.mode == "RGB" and min(image.getpixel((3, 3))) > 250
    assert TransformedImages(data.train, data.augmentation, 1)[0, 0][0].shape == (3, 8, 8)


def test_sixteen_bit_grey_is_not_all_white(tmp_path):
    """A 16-bit PNG of middle grey stays grey."""
    write_folder(tmp_path)
    grey = np.full((10, 12), 2**15, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "train" / "ant" / "0.png")
    image, _ = small(tmp_path).train[0]
    assert image.mode == "RGB" and 120 < image.getpixel((3, 3))[0] < 136


def steps_of(transform):
    return [type(step) for step in transform.transforms]


def test_augmentation_of_the_recipe(tmp_path):
    """Random resized crop, flip, lighting, normalise; at the end without the random scale."""
    data = small(write_folder(tmp_path), last_fraction=0.05)
    assert steps_of(data.augmentation.at(0.5)) == [
        v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.PILToTensor, v2.ToDtype, Lighting,
    ]  # fmt: skip
    assert steps_of(data.augmentation.normalise) == [v2.ToDtype, v2.Normalize]
    assert steps_of(data.augmentation.at(0.95))[:3] == [
        v2.Resize, v2.CenterCrop, v2.RandomHorizontalFlip,
    ]  # fmt: skip
    assert data.augmentation.at(0.949) is data.augmentation.usual
    assert data.augmentation.usual.transforms[4].std == 0.1
    crop = data.augmentation.usual.transforms[0]
    assert tuple(crop.scale) == (0.08, 1.0) and tuple(crop.size) == (8, 8)
    random = small(tmp_path, last_crop="random", last_fraction=0.5)
    assert steps_of(random.augmentation.at(0.5))[:2] == [v2.Resize, v2.RandomCrop]
    assert random.augmentation.at(0.49) is random.augmentation.usual


def test_last_crop_center_leaves_only_the_flip(tmp_path):
    data = small(write_folder(tmp_path), last_fraction=1.0, lighting=0.0)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    straight = data.evaluation.usual(image)
    seen = set()
    for _ in range(20):
        result = data.augmentation.at(0.0)(image)
        flipped = torch.equal(result, straight.flip(-1))
        assert flipped or torch.equal(result, straight)
        seen.add(flipped)
    assert seen == {True, False}


def test_color_jitter(tmp_path):
    data = small(write_folder(tmp_path), color_jitter=0.4, lighting=0.0)
    assert steps_of(data.augmentation.usual)[2] is v2.ColorJitter
    jitter = data.augmentation.usual.transforms[2]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4)
    assert jitter.hue is None
    assert Lighting not in steps_of(data.augmentation.usual)
    images = TransformedImages(data.train, data.augmentation, epochs=4)
    first = [images[epoch, 1][0] for epoch in range(4)]
    again = [images[epoch, 1][0] for epoch in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[1])


def folder_with_bad_images(tmp_path, bad=3):
    """4 readable grey images a class, two classes, and `bad` unreadable ones of different kinds."""
    kinds = [b"", b"not an image", None]
    for part in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (9, 9), (50 * index,) * 3).save(folder / f"{index}.png")
    for index in range(bad):
        content = kinds[index % len(kinds)]
        if content is None:  # truncated
            content = (tmp_path / "train" / "a" / "3.png").read_bytes()[:-30]
        (tmp_path / "train" / "a" / f"2bad{index}.png").write_bytes(content)
    return tmp_path


def test_bad_images_are_skipped_listed_and_counted_once(tmp_path, capsys):
    root = folder_with_bad_images(tmp_path / "data")
    bad = BadImages(tmp_path / "bad_images.txt", limit=3)
    images = load_image_folder("x", str(root), image_size=8, resize=8, bad=bad).train
    assert len(images) == 11
    for _ in range(2):
        found = [images[index] for index in range(11)]
    assert [image.size for image, _ in found] == [(9, 9)] * 11
    # the three bad ones lie between the third and the fourth of class a, which stands in for them
    assert [image.getpixel((0, 0))[0] for image, _ in found[:7]] == [0, 50, 100, 150, 150, 150, 150]
    assert len(bad.lines()) == 3 and all(f"2bad{i}.png" in bad.lines()[i] for i in range(3))
    assert capsys.readouterr().err.count("; skipped\n") == 3
    again = BadImages(tmp_path / "bad_images.txt", limit=3)  # a resumed run
    assert again.lines() == bad.lines()


def test_one_bad_image_too_many(tmp_path, capsys):
    root = folder_with_bad_images(tmp_path / "data")
    bad = BadImages(tmp_path / "bad_images.txt", limit=2)
    images = load_image_folder("x", str(root), image_size=8, resize=8, bad=bad).train
    images[0]
    with pytest.raises(ValueError, match="3 unreadable images, more than data.max_bad_images=2"):
        images[3]  # whose stand-ins are bad too
    with pytest.raises(ValueError, match="cannot read image .*2bad0.png"):
        load_image_folder("x", str(root), image_size=8, resize=8).train[3]


def test_bad_image_of_an_evaluation_does_not_count(tmp_path, capsys):
    """Accuracy over the readable images alone; nothing stands in for a bad one."""
    root = folder_with_bad_images(tmp_path / "data", bad=0)
    (root / "val" / "b" / "1.png").write_bytes(b"")
    bad = BadImages(tmp_path / "bad_images.txt", limit=1)
    data = load_image_folder("x", str(root), image_size=8, resize=8, bad=bad)
    loader = make_loader(
        TransformedImages(data.val, data.evaluation, 1),
        evaluation_batches(len(data.val), 3),
        0,
        torch.device("cpu"),
    )
    assert sum((labels < 0).sum() for _, labels in loader) == 1

    class SaysZero(torch.nn.Module):
        def forward(self, x):
            return torch.eye(2)[:1].expand(len(x), 2)

    result = evaluate(SaysZero(), loader, lambda x: x)
    assert result["top1"] == pytest.approx(100 * 4 / 7)


def test_all_images_bad(tmp_path, capsys):
    folder = tmp_path / "a.png"
    folder.write_bytes(b"")
    bad = BadImages(tmp_path / "bad_images.txt", limit=5)
    with pytest.raises(ValueError, match="none of 2 images can be read"):
        FileImages([(str(folder), 0)] * 2, bad=bad)[0]


def test_exif_rotation_is_left_as_stored(tmp_path):
    """As torchvision's and timm's loaders: the pixels as they are in the file."""
    image = Image.new("RGB", (6, 4), "red")
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (6, 4)


def test_hidden_folders_and_files_are_no_data(tmp_path):
    """Notebooks, macOS and network drives leave them; a link to nothing is a bad image."""
    root = folder_with_bad_images(tmp_path, bad=0)
    before = load_image_folder("x", str(root), image_size=8, resize=8)
    for part in ("train", "val"):
        for name in (".ipynb_checkpoints", "__MACOSX", "a/.ipynb_checkpoints"):
            (root / part / name).mkdir()
            Image.new("RGB", (9, 9)).save(root / part / name / "0.png")
        (root / part / "a" / "._0.png").write_bytes(b"no image")
    data = load_image_folder("x", str(root), image_size=8, resize=8)
    assert data.num_classes == 2 and data.describe() == before.describe()
    odd = b"\xff.png".decode("utf-8", "surrogateescape")
    (root / "train" / "a" / odd).symlink_to("nowhere")
    bad = BadImages(tmp_path / "bad_images.txt", limit=3)
    images = load_image_folder("x", str(root), image_size=8, resize=8, bad=bad).train
    assert len(images) == 9 and all(images[index][0].size == (9, 9) for index in range(9))
    (line,) = bad.lines()
    assert r"\udcff.png: a link to nothing" in line


def test_links_that_lead_back_have_an_end(tmp_path):
    """Each image once in a class, in torchvision's order; a class that holds all is refused."""
    root = folder_with_bad_images(tmp_path, bad=0)
    inside = root / "train" / "a" / "more" / "0"
    inside.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(inside / "x.png")
    expected = datasets.ImageFolder(str(root / "train")).samples
    for link, target in (("a/more/up", ".."), ("a/here", "."), ("b/back", "../b")):
        (root / "train" / link).symlink_to(target)
    data = load_image_folder("x", str(root), image_size=8, resize=8)
    assert data.train.samples == expected
    (root / "train" / "c").symlink_to("..")
    with pytest.raises(ValueError, match="train/c is a link to a folder that holds it"):
        load_image_folder("x", str(root), image_size=8, resize=8)


@pytest.mark.parametrize("link, target", [("c", "a"), ("a/z", "../b"), ("b/x", "../a/more")])
def test_two_classes_of_the_same_images_are_refused(link, target, tmp_path):
    root = folder_with_bad_images(tmp_path, bad=0)
    (root / "train" / "a" / "more").mkdir()
    Image.new("RGB", (9, 9)).save(root / "train" / "a" / "more" / "x.png")
    (root / "train" / link).symlink_to(target)
    with pytest.raises(ValueError, match=r"the classes a and [bc] hold the same images, those in "):
        load_image_folder("x", str(root), image_size=8, resize=8)


def test_validation_on_the_training_images_is_told(tmp_path, capsys):
    root = folder_with_bad_images(tmp_path, bad=0)
    load_image_folder("x", str(root), image_size=8, resize=8)
    assert not capsys.readouterr().err
    shutil.rmtree(root / "val" / "b")
    (root / "val" / "b").symlink_to("../train/b")
    load_image_folder("x", str(root), image_size=8, resize=8)
    line = capsys.readouterr().err
    assert line.startswith("warning: ") and f"the images of {root}/train/b: " in line


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root = folder_with_bad_images(tmp_path, bad=0)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (root / "train" / "a" / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="a/closed"):
        load_image_folder("x", str(root), image_size=8, resize=8)


def test_a_single_class_is_refused(tmp_path):
    root = folder_with_bad_images(tmp_path, bad=0)
    for part in ("train", "val"):
        shutil.rmtree(root / part / "b")
        (root / part / ".hidden").mkdir()
    with pytest.raises(ValueError, match="train has one class alone, a; expected <root>/train/"):
        load_image_folder("x", str(root), image_size=8, resize=8)
    shutil.rmtree(root / "train" / "a")
    with pytest.raises(FileNotFoundError, match="no folders of classes in .*train"):
        load_image_folder("x", str(root), image_size=8, resize=8)


def test_a_key_of_other_data_is_named():
    with pytest.raises(ValueError, match="image_size=8: digits has no image_size, only train_"):
        build_data("digits", image_size=8)

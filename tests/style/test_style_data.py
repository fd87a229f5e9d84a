"""Photographs of every kind, crops that depend on (seed, number) alone, style images."""

import numpy as np
import pytest
import torch
from PIL import Image

from sn.training.run.images import BadImages, read_image
from sn.training.style import photos as style_data
from sn.training.style.photos import (
    Crops,
    batches,
    crop,
    find_images,
    load_photos,
    load_style,
    to_pil,
    to_tensor,
)


def gradient(width=12, height=8):
    """Red grows to the right, green downwards: every turn and flip looks different."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([x, y, 0 * x + 40], -1).astype(np.uint8))


def folder_of(path, count=8):
    for number in range(count):
        gradient(20 + 3 * number, 24).save(path / f"{number}.png")
    return path


# --- pixels


def test_tensor_and_back():
    image = gradient()
    x = to_tensor(image)
    assert x.shape == (3, 8, 12) and x.dtype == torch.float32
    assert x[0, 0, -1] == 250 / 255 and x[1, -1, 0] == 250 / 255
    assert np.array_equal(to_pil(x), image)
    assert to_pil(torch.tensor([-0.5, 1.5, 0.5]).view(3, 1, 1)).getpixel((0, 0)) == (0, 255, 128)


# --- folders


def test_finds_images_anywhere_below(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.JPG", "b/a.png", "b/c/d.webp"):
        gradient().save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    names = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert names == ["b/a.png", "b/c/d.webp", "z.JPG"]
    assert find_images(tmp_path / "z.JPG") == [tmp_path / "z.JPG"]


def test_links_to_files_and_folders_are_followed(tmp_path):
    root, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (elsewhere / "in").mkdir(parents=True)
    root.mkdir()
    gradient().save(elsewhere / "in" / "a.png")
    (root / "file.png").symlink_to(elsewhere / "in" / "a.png")
    (root / "folder").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)  # in a circle
    names = [path.relative_to(root).as_posix() for path in find_images(root)]
    assert names == ["file.png", "folder/in/a.png"]


def test_no_images_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"photos.root={tmp_path}: no images below"):
        load_photos("folder", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="photos.root=nowhere: no file or folder"):
        load_photos("folder", "nowhere")
    with pytest.raises(FileNotFoundError, match="style.image=nowhere.jpg: no such file"):
        load_style("nowhere.jpg", 64)


def test_bundled_photographs():
    photos = load_photos("samples")
    assert photos.describe()["train_images"] == 2
    assert [image.size for image in photos.images] == [(640, 427)] * 2


def test_listing_identifies_the_photos_not_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folder_of(tmp_path / name)
    first, second = (load_photos("x", str(tmp_path / name)) for name in "ab")
    assert first.sha256 == second.sha256
    (tmp_path / "b" / "0.png").unlink()
    assert load_photos("x", str(tmp_path / "b")).sha256 != first.sha256


# --- crops


def test_crop_is_that_part_of_the_resized_photo():
    """Against resizing the whole and cutting; only the crop is resized here."""
    image = gradient(150, 100)
    for top, left in ((0, 0), (0.5, 1), (1, 0.3)):
        whole = image.resize((96, 64), Image.Resampling.BILINEAR)
        y, x = round(top * 16), round(left * 48)
        expected = to_tensor(whole)[:, y : y + 48, x : x + 48]
        assert (crop(image, 48, 64, top, left) - expected).abs().max() <= 2 / 255


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (3, 2), (4000, 7)])
def test_crops_of_odd_sizes(size):
    y = crop(Image.new("RGB", size, (255, 0, 51)), 32, 40, 0.7, 0.2)
    expected = torch.tensor([1, 0, 0.2]).view(3, 1, 1).expand(3, 32, 32)
    torch.testing.assert_close(y, expected)


def test_each_epoch_shows_every_photo_once(tmp_path):
    crops = Crops(load_photos("x", str(folder_of(tmp_path, 7))), 16, 16, seed=3)
    epochs = [[crops.index(number) for number in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_crops_depend_on_seed_and_number_alone(tmp_path):
    photos = load_photos("x", str(folder_of(tmp_path)))
    first, second = Crops(photos, 16, 20, seed=0), Crops(photos, 16, 20, seed=0)
    torch.manual_seed(0)
    ours = [first[number] for number in range(20)]
    torch.manual_seed(1)
    theirs = {number: second[number] for number in (19, 3, 11, 0)}
    for number, image in theirs.items():
        assert torch.equal(ours[number], image)
    other = Crops(photos, 16, 20, seed=1)
    assert [first.index(n) for n in range(8)] != [other.index(n) for n in range(8)]


def test_batches_go_on_where_a_run_stopped():
    whole = list(batches(3, 0, 5))
    assert whole == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14]]
    assert list(batches(3, 2, 5)) == whole[2:]


def test_a_broken_photo_gives_way_to_the_next(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    folder_of(folder)
    (folder / "3.png").write_bytes(b"gone")
    bad = BadImages(tmp_path / "bad.txt", 1, "photos.max_bad_images")
    crops = Crops(load_photos("x", str(folder)), 16, 24, seed=0, bad=bad)
    number = [crops.index(n) for n in range(8)].index(3)
    for _ in range(2):  # named once
        crops[number]
    assert capsys.readouterr().err.count("warning: cannot read image") == 1
    generator = torch.Generator().manual_seed(style_data.mix_seed(0, 1, number))
    top, left = torch.rand(2, generator=generator).tolist()
    expected = crop(read_image(folder / "4.png"), 16, 24, top, left)
    assert torch.equal(crops[number], expected)
    (folder / "6.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match="more than photos.max_bad_images=1; the last: .*6.png"):
        for number in range(8):
            crops[number]


def test_broken_photos_are_errors_by_default(tmp_path):
    (tmp_path / "only.png").write_bytes(b"gone")
    photos = load_photos("x", str(tmp_path))
    with pytest.raises(ValueError, match="cannot read image .*only.png"):
        Crops(photos, 16, 16, seed=0)[0]
    with pytest.raises(ValueError, match="none of 1 photos can be read"):  # no endless search
        Crops(photos, 16, 16, seed=0, bad=BadImages(tmp_path / "bad.txt", 5))[0]


# --- style images


def test_style_keeps_its_aspect(tmp_path):
    gradient(120, 80).save(tmp_path / "style.png")
    x, sha256 = load_style(str(tmp_path / "style.png"), 60)
    assert x.shape == (1, 3, 40, 60)
    drawn, other = load_style(None, 96)
    assert drawn.shape == (1, 3, 96, 96) and other != sha256
    assert drawn.flatten(2).std(-1).min() > 0.1, "a pattern, not a plain colour"
    assert torch.equal(load_style(None, 96)[0], drawn)


@pytest.mark.parametrize("size, wide", [((200, 10), 100), ((10, 10), 15), ((3, 900), 512)])
def test_a_style_too_narrow_for_the_loss_network_is_named(size, wide, tmp_path):
    Image.new("RGB", size).save(tmp_path / "s.png")
    with pytest.raises(
        ValueError, match=rf"s.png with style.size={wide} has .*expected 16 or more"
    ):
        load_style(str(tmp_path / "s.png"), wide)


def test_hidden_files_links_to_nothing_and_names_that_are_not_utf8(tmp_path):
    folder_of(tmp_path, 2)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    folder_of(tmp_path / ".ipynb_checkpoints", 2)
    (tmp_path / "._0.png").write_bytes(b"no image")
    odd = b"\xff.png".decode("utf-8", "surrogateescape")
    (tmp_path / odd).symlink_to("nowhere")
    assert [path.name for path in find_images(tmp_path)] == ["0.png", "1.png", odd]
    photos = load_photos("x", str(tmp_path))
    with pytest.raises(ValueError, match=".png: a link to nothing"):
        photos.images[2]

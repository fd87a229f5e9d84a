"""read_image: every kind of file, and what its use asks for."""

import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

from sn.training.run import images
from sn.training.run.display import say
from sn.training.run.images import (
    BadImages,
    is_hidden,
    listing,
    read_image,
    sklearn_digits,
    sklearn_file,
)


def gradient(width=12, height=8):
    """Red grows to the right, green downwards: every turn and flip looks different."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([x, y, 0 * x + 40], -1).astype(np.uint8))


def picture(path):
    return read_image(path, "picture")


def test_modes(tmp_path):
    """Grey, 16-bit grey, palette, CMYK: the picture stays the picture."""
    image = gradient()
    grey = np.asarray(image.convert("L"))
    image.save(tmp_path / "rgb.png")
    image.convert("L").save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.new("1", (4, 4), 1).save(tmp_path / "bilevel.png")
    assert np.array_equal(picture(tmp_path / "rgb.png"), image)
    for name in ("grey", "grey16"):
        pixels = np.asarray(picture(tmp_path / f"{name}.png"))
        assert np.array_equal(pixels, np.stack([grey] * 3, -1)), name
    cmyk = np.asarray(picture(tmp_path / "cmyk.tif")).astype(int)
    assert np.abs(cmyk - np.asarray(image)).max() <= 2
    assert np.asarray(picture(tmp_path / "bilevel.png")).min() == 255


# EXIF orientation -> what numpy does to the stored pixels for a viewer
TURNS = {
    2: lambda x: x[:, ::-1],
    3: lambda x: np.rot90(x, 2),
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


def turned(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient().save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_turns_pictures_alone(tmp_path, orientation, capsys):
    """6: a camera held upright; the picture is to be turned clockwise. Labels and boxes are not."""
    path, stored = turned(tmp_path / "x.png", orientation), np.asarray(gradient())
    assert np.array_equal(picture(path), TURNS[orientation](stored))
    assert np.array_equal(read_image(path), stored)
    assert capsys.readouterr().err == ""
    assert np.array_equal(read_image(path, "boxes"), stored)
    assert f"warning: {path}: its EXIF data say that viewers turn it" in capsys.readouterr().err


def test_one_warning_of_turned_images_in_a_folder(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    for name in ("a.png", "b.png", "other/c.png"):
        read_image(turned(tmp_path / name, 3), "boxes")
    read_image(turned(tmp_path / "upright.png", 1), "boxes")
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in shown] == [
        str(tmp_path / "a.png"), str(tmp_path / "other" / "c.png")
    ]  # fmt: skip


def test_transparency_is_white(tmp_path):
    image = gradient().convert("RGBA")
    alpha = np.full((8, 12), 255, dtype=np.uint8)
    alpha[:, :6] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "alpha.png")
    pixels = np.asarray(picture(tmp_path / "alpha.png"))
    assert (pixels[:, :6] == 255).all()
    assert np.array_equal(pixels[:, 6:], np.asarray(gradient())[:, 6:])
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(picture(tmp_path / "palette.png")).min() == 255


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert picture(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_corrupt_files_are_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content == "truncated":
        gradient(200, 200).save(path)
        content = path.read_bytes()[:-800]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read image {path}"):
        picture(path)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "EMF"])
def test_formats_of_no_photographs_are_refused(kind, tmp_path):
    """An EPS would be run as a program; Pillow divides by zero in an EMF of no size."""
    path = tmp_path / "x.png"
    if kind == "EMF":
        path.write_bytes(b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60))
    else:
        Image.new("RGB", (20, 12)).save(path, kind)
    reason = "division by zero" if kind == "EMF" else f"it is {kind}; expected one of AVIF, BMP,"
    for use in ("labels", "boxes", "picture"):
        with pytest.raises(ValueError, match=f"cannot read image {path}: .*{reason}"):
            read_image(path, use)


def test_none_allowed_says_what_would_allow_some(tmp_path):
    bad = BadImages(tmp_path / "bad_images.txt", limit=0)
    with pytest.raises(ValueError, match="cannot read x.jpg; data.max_bad_images=N lets a run ski"):
        bad.add(ValueError("cannot read x.jpg"))


def test_the_limit_is_named_and_a_setting(tmp_path, monkeypatch):
    """Twice MAX_IMAGE_PIXELS, as Pillow has it; the setting counts for that one image."""
    path = tmp_path / "huge.png"
    gradient(100, 100).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for use in ("labels", "boxes", "picture"):
        with pytest.raises(ValueError) as error:
            read_image(path, use)
        assert str(error.value) == (
            f"cannot read image {path}: Image size (10000 pixels) exceeds limit of 200 pixels; "
            "scale the file down"
        )
    with pytest.raises(ValueError, match="limit of 9000 pixels; .* raise stylize.max_megapixels"):
        read_image(path, "picture", max_megapixels=0.009)
    assert read_image(path, "picture", max_megapixels=0.01).size == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 100


ODD = b"caf\xe9 \xff.png".decode("utf-8", "surrogateescape")  # a name that is not UTF-8


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    for name, what in (("pipe", "no regular file"), ("folder", "no regular file"),
                       ("link", "a link to nothing"), ("none", "no such file")):  # fmt: skip
        path = tmp_path / f"{name}.png"
        with pytest.raises(ValueError) as error:
            read_image(path)
        assert str(error.value) == f"cannot read image {path}: {what}"


@pytest.mark.parametrize("name", [".DS_Store", ".ipynb_checkpoints", "._1.jpg", "__MACOSX"])
def test_hidden_names(name):
    assert is_hidden(name) and not is_hidden(name.strip("._"))


def test_listing_of_many_files(tmp_path, monkeypatch):
    """Of more than SIZES files only some, at even distances, are looked at; no order is lost."""
    files = [tmp_path / "a" / f"{number}.png" for number in range(7)]
    (tmp_path / "a").mkdir()
    for number, file in enumerate(files):
        file.write_bytes(b"x" * number)
    sizes = [line.decode().removeprefix("a/").strip() for line in listing(files, tmp_path)]
    assert sizes == [f"{number}.png {number}" for number in range(7)]
    looked_at, stat = [], os.stat
    monkeypatch.setattr(images, "SIZES", 3)
    monkeypatch.setattr(os, "stat", lambda path: looked_at.append(path) or stat(path))
    found = b"".join(listing([str(file) for file in files], f"{tmp_path}/"))
    monkeypatch.undo()
    assert looked_at == [str(files[i]) for i in (0, 3, 6)]
    assert found.decode().split("\n")[:4] == ["a/0.png 0", "a/1.png ?", "a/2.png ?", "a/3.png 3"]


@pytest.mark.parametrize("name", ["nowhere", "folder", "to_itself"])
def test_listing_of_what_is_no_file(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_itself").symlink_to("to_itself")
    assert list(listing([tmp_path / name], tmp_path)) == [f"{name} 0\n".encode()]


def test_names_that_are_not_utf8(tmp_path, capsys):
    """They are read, hashed as their bytes, noted and said in characters that there are."""
    gradient().save(tmp_path / ODD)
    assert read_image(tmp_path / ODD).size == (12, 8)
    size = (tmp_path / ODD).stat().st_size
    lines = list(listing([tmp_path / ODD, tmp_path / "é.png"], tmp_path))
    assert lines == [b"caf\xe9 \xff.png %d\n" % size, "é.png 0\n".encode()]
    (tmp_path / ODD).write_bytes(b"")
    bad = BadImages(tmp_path / "bad_images.txt", limit=1)
    for _ in range(2):  # noted once
        with pytest.raises(ValueError) as error:
            read_image(tmp_path / ODD)
        bad.add(error.value)
    (line,) = bad.lines()
    assert r"caf\udce9 \udcff.png" in line and r"caf\udce9" in capsys.readouterr().err


@pytest.mark.parametrize("first, second", [("a", "b"), ("a \\ é", "b c"), ("a", "a/a")])
def test_a_bad_image_counts_once_wherever_the_data_lie(first, second, tmp_path, capsys):
    """On a disk of the node, in a folder of the job's, they have another path after a requeue."""
    note = tmp_path / "bad_images.txt"
    for root in (tmp_path / first, tmp_path / second, tmp_path / first):
        (root / "train").mkdir(parents=True, exist_ok=True)
        (root / "train/1.png").write_bytes(b"no image")
        bad = BadImages(note, limit=1, root=root)
        with pytest.raises(ValueError) as error:
            read_image(root / "train/1.png")
        bad.add(error.value)
    assert bad.lines() == [
        "cannot read image train/1.png: cannot identify image file 'train/1.png'"
    ]
    assert str(tmp_path / first) in capsys.readouterr().err  # said in full
    note.write_text(f"{error.value}\n")  # as runs did that began earlier
    bad.add(error.value)
    assert len(bad.lines()) == 1


def test_an_output_without_such_characters(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    say("top-1 é \udcff")
    assert out.getvalue() == b"top-1 \\xe9 \\udcff\n"


def test_list_of_bad_images_that_is_no_text(tmp_path):
    path = tmp_path / "bad_images.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"{path} is no text"):
        BadImages(path, limit=1).lines()


def test_bundled_images_are_as_scikit_learn_loads_them(monkeypatch):
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn_digits()
    expected = datasets.load_digits()
    assert np.array_equal(images, expected.images) and images.dtype == expected.images.dtype
    assert np.array_equal(labels, expected.target) and labels.dtype == expected.target.dtype
    for name, pixels in zip(("china", "flower"), datasets.load_sample_images().images):
        assert np.array_equal(picture(sklearn_file(f"images/{name}.jpg")), pixels)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="scikit-learn is not installed"):
        sklearn_digits()

"""Image files: read as their use asks for; the unreadable ones counted."""

import contextlib
import importlib.util
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .display import printable, say
from .files import read_text

# of Pillow's formats those of photographs and drawings; an EPS would be run by Ghostscript
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
OTHERS = ("__MACOSX", "@eaDir")  # what systems put into folders for themselves, beside .names
SIZES = 20_000  # of a listing, at most
_warned_of: set[Path] = set()  # folders


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is nobody's data, such as `.DS_Store`, `._1.jpg`."""
    return name.startswith(".") or name in OTHERS


def files_below(root: str | Path) -> list[str]:
    """The files below `root`, links followed, hidden ones and those of hidden folders left out.

    A folder that is met twice, through links, is taken once. Raises OSError, naming it, for one
    that cannot be read.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    files, seen = [], set()
    for folder, inner, names in os.walk(root, onerror=fail, followlinks=True):
        inner[:] = sorted(name for name in inner if not is_hidden(name))
        if os.path.realpath(folder) in seen:  # a link back: no end
            inner.clear()
            continue
        seen.add(os.path.realpath(folder))
        files += [os.path.join(folder, name) for name in names if not is_hidden(name)]
    return files


def listing(files: Sequence[str | Path], root: str | Path) -> Iterator[bytes]:
    """A line per file for a hash: its path below `root`, its size (0: it is not there).

    Of more than `SIZES` files those at even distances tell their size: on a network disk each costs
    a fraction of a millisecond, ImageNet's 1.28 million minutes.
    """
    start = os.path.join(Path(root), "")
    every = max(1, -(-len(files) // SIZES))
    for index, file in enumerate(files):
        size = _size(file) if index % every == 0 else "?"
        line = f"{os.fspath(file).removeprefix(start)} {size}\n"
        yield line.encode("utf-8", "surrogateescape")  # names are bytes, not always UTF-8


def _size(file: str | Path) -> int:
    try:
        found = os.stat(file)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def sklearn_file(name: str) -> Path:
    """A file of sklearn.datasets, found without the seconds that importing scikit-learn takes."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("scikit-learn is not installed; run `make install`")
    return Path(found.origin).parent / "datasets" / name


def sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images (1797, 8, 8) of 0.0 to 16.0, labels (1797,).

    Source: UCI Optical Recognition of Handwritten Digits, test part.
    """
    table = np.loadtxt(sklearn_file("data/digits.csv.gz"), delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def read_image(
    path: str | Path,
    use: Literal["labels", "boxes", "upright", "picture"] = "labels",
    max_megapixels: float | None = None,
) -> Image.Image:
    """The image at `path` in RGB; of an animation the first frame.

    Args:
        use: "labels": the pixels as they are stored, as torchvision reads them. "boxes": the same,
            which is what COCO's coordinates count; of EXIF data that would turn the image a warning
            tells, once per folder. "upright": turned as its EXIF data say, to be compared with
            such. Of these three transparency is dropped, as by torchvision and Detectron, whatever
            colours lie below it. "picture": as viewers show it, turned, transparency on white.
        max_megapixels: None: Pillow's limit, 179.

    Raises ValueError, naming the file, if it cannot be read.
    """
    if not Path(path).is_file():  # to open a pipe would wait for ever
        what = "no regular file" if Path(path).exists() else "no such file"
        what = "a link to nothing" if os.path.islink(path) and what == "no such file" else what
        raise ValueError(f"cannot read image {path}: {what}")
    try:
        with _limit(max_megapixels), Image.open(path) as image:
            if image.format not in FORMATS:
                raise ValueError(f"it is {image.format}; expected one of {', '.join(FORMATS)}")
            if use in ("upright", "picture"):
                image = ImageOps.exif_transpose(image)
            elif use == "boxes" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                _warn_of_turning(Path(path))
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip
                levels = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            if use == "picture" and image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        reason = str(error).partition(",")[0]  # what follows speaks of an attack
        setting = "" if max_megapixels is None else ", or raise stylize.max_megapixels"
        raise ValueError(
            f"cannot read image {path}: {reason}; scale the file down{setting}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"cannot read image {path}: {error}") from None


@contextlib.contextmanager
def _limit(megapixels: float | None) -> Iterator[None]:
    """Let Pillow refuse larger images: those of more than twice its MAX_IMAGE_PIXELS."""
    if megapixels is None:
        yield
        return
    usual = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = int(megapixels * 1e6 / 2)
    try:
        with warnings.catch_warnings():  # from half the limit on it warns
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = usual


def _warn_of_turning(path: Path) -> None:
    if path.parent not in _warned_of:
        _warned_of.add(path.parent)
        say(
            f"warning: {path}: its EXIF data say that viewers turn it; boxes and masks are taken "
            "in the pixels as they are stored, as for all images of that folder",
            error=True,
        )


class BadImages:
    """Counts unreadable images over all processes, data workers and resumptions of a run.

    They share the text file `path`, one bad image a line, each once, named from the data's `root`
    on: that may be another folder at a resumption. Past `limit` of them `add` raises its error,
    naming the limit by `key`. Without a path nothing is counted and every bad image is past the
    limit.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        limit: int = 0,
        key: str = "data.max_bad_images",
        root: str | Path | None = None,
    ):
        self.path, self.limit, self.key = path and Path(path), limit, key
        start = os.path.join(Path(root), "") if root else ""  # or as errors quote it
        self._starts = sorted({printable(start), repr(start)[1:-1]}) if start else []

    def lines(self) -> list[str]:
        """What the file holds, each image once."""
        if self.path is None or not self.path.exists():
            return []
        return list(dict.fromkeys(map(self._from_root, read_text(self.path).splitlines())))

    def _from_root(self, line: str) -> str:
        for start in self._starts:
            line = re.sub(rf"(?<=[ '\"]){re.escape(start)}", "", line)
        return line

    def add(self, error: ValueError) -> None:
        """Note a bad image, described by `error`; raise ValueError if that is one too many."""
        if self.path is None:
            raise error
        if not self.limit:
            raise ValueError(f"{error}; {self.key}=N lets a run skip N such images") from None
        line = printable(str(error)).replace("\n", " ")
        noted, known = self._from_root(line), self.lines()
        if noted not in known:
            say(f"warning: {line}; skipped", error=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(noted + "\n")  # one short write: whole, whoever else appends
            known = self.lines()
        if len(known) > self.limit:
            raise ValueError(
                f"{len(known)} unreadable images, more than {self.key}={self.limit}; "
                f"the last: {line}; all of them in {self.path}"
            )

"""Images by number: the interface behind which everything lies that one can train on, and its plain kinds."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from frugan.config.recipe import Data
from frugan.config.section import flag
from frugan.data.decode import Pixels, fit, flatten
from frugan.data.pack import Pack

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

NAME_BYTES = 120  # of a source, in names of files: systems allow 255, and more than a source's name is in them

UNUSED = {  # why a setting of `Data` may change nothing
    "split": "is taken whole", "stream": "is not read from shards", "background": "has no transparent pixels",
    "image_column": "is no table", "label_column": "is no table",
}  # fmt: skip

Tell = Callable[[str], None]  # is called with what a person should know
Entry = tuple[str, int, int]  # a file: its path, its bytes, and what changes when they do


class Source(ABC):
    """Images by number.

    Attributes:
        name: short, for folders and titles.
        classes: names of the classes, or none.
        labels: class of each image, int64 ``[n]``, or None.
        unlabelled: why there are no labels, although some images have one: names one that has none.
        size: the side all images share in pixels, if the data set has one, else None.
        grey: whether images are grey, or None if only the images tell.
        place: where they lie, as one name.
        stamp: changes when the files do.
        random_access: whether images can be opened in any order.
        pack: the pack, if they are packed already.
        problems: what is amiss with the whole of it, a sentence each.
        unused: names of settings of `Data` that change nothing about it, of those in `UNUSED`.
    """

    name: str
    classes: Sequence[str] = ()
    labels: NDArray[np.int64] | None = None
    unlabelled: str | None = None
    size: int | None = None
    grey: bool | None = None
    place: str
    stamp: str
    random_access: bool = True
    pack: Pack | None = None
    problems: Sequence[str] = ()
    unused: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """What to call image ``index`` when it is bad."""

    @abstractmethod
    def open(self, index: int, at_least: int) -> Image.Image:
        """Image ``index`` as Pillow has it; may be decoded smaller, with sides of ``at_least`` pixels.

        Raises:
            OSError, SyntaxError, ValueError, Image.DecompressionBombError: it cannot be read.
        """

    def pixels(self, index: int, size: int, channels: int, background: tuple[int, int, int]) -> tuple[Pixels, bool]:
        """Image ``index`` as uint8 ``[channels, size, size]``, and whether it was smaller than that."""
        with self.open(index, size) as opened:
            small = min(opened.size) < size
            return fit(flatten(opened, background), size, channels), small

    def ignored(self, data: Data) -> Iterator[str]:
        """A sentence for each setting that ``data`` has and that changes nothing."""
        for name in self.unused:
            if (value := getattr(data, name)) != getattr(Data, name):
                said = flag(name) if value is True else f"{flag(name)} {value}"
                yield f"{said} does nothing here: {self.name} {UNUSED[name]}."


class ArraySource(Source):
    """Grey images in one array, uint8 ``[n, h, w]``."""

    unused: Sequence[str] = ("stream", "background", "image_column", "label_column")

    def __init__(
        self, name: str, images: NDArray[np.uint8], labels: NDArray[np.int64] | None, classes: Sequence[str],
        place: str = "", stamp: str = "",
    ) -> None:  # fmt: skip
        self.name = name
        self.place = place or name
        self.stamp = stamp
        self.images = images
        self.labels = labels
        self.classes = classes
        self.size = images.shape[1] if images.shape[1] == images.shape[2] else None
        self.grey = True

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """Names image ``index`` by its number in the source."""
        return f"image {index} of {self.name}"

    def open(self, index: int, at_least: int) -> Image.Image:
        """Image ``index`` in mode L."""
        return Image.fromarray(self.images[index])

    def fits(self, data: Data) -> bool:
        """Whether nothing needs to be done to the images: size and channels are their own."""
        return data.image_size == self.size and data.channels == 1

    def pixels(self, index: int, size: int, channels: int, background: tuple[int, int, int]) -> tuple[Pixels, bool]:
        """As the base class says; nothing to do where size and channels are the data's own."""
        if size == self.size and channels == 1:
            return self.images[index][None], False
        return super().pixels(index, size, channels, background)


def loaded(file: Path | IO[bytes], at_least: int) -> Image.Image:
    """The image in ``file``, with its pixels read; a JPEG is decoded at the least scale that is large enough."""
    image = Image.open(file)
    try:
        image.draft(None, (at_least, at_least))
        image.load()
    except BaseException:
        image.close()
        raise
    return image


def reason(error: Exception) -> str:
    """Why an image cannot be read, from what was raised."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or empty"
    if isinstance(error, FileNotFoundError):
        return "not there, or a link to what is not there"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def shown(path: str) -> str:
    """A path on one line, whatever is in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in path)


def plain(name: str) -> str:
    """``name`` as part of the name of a file or folder, whatever is in it: on one line, of one level, not hidden, not too long."""
    kept = "".join(c if c.isprintable() and c not in "/\\:" else "-" for c in name)
    kept = re.sub(r"\.{2,}", ".", kept).lstrip(".- ")
    return kept.encode()[:NAME_BYTES].decode(errors="ignore") or "images"


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, and not hidden."""
    parts = name.split("/")
    stem, _, suffix = parts[-1].rpartition(".")
    hidden = any(part.startswith((".", "__MACOSX")) and part != "." for part in parts)
    return bool(stem) and f".{suffix.lower()}" in SUFFIXES and not hidden


def outside(name: str) -> bool:
    """Whether a name in an archive points out of it."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or name.startswith(("/", "\\")) or name[1:2] == ":"


class Labels(NamedTuple):
    """What classes images have, as `Source` says."""

    classes: Sequence[str] = ()
    labels: NDArray[np.int64] | None = None
    unlabelled: str | None = None


def by_folder(paths: Sequence[str]) -> Labels:
    """The classes of files by the first folder in which their paths differ; none if some lie beside such folders."""
    folders = [PurePosixPath(path).parts[:-1] for path in paths]
    depth = len(os.path.commonprefix(folders))  # noqa: RUF071, of lists it compares items
    names = [parts[depth] if len(parts) > depth else None for parts in folders]
    beside = lambda i: f"{shown(paths[i])} lies beside the folders of classes"  # noqa: E731
    return by_name(names, beside, sorted({name for name in names if name}))


def by_name(names: Sequence[str | None], without: Callable[[int], str], classes: Sequence[str] = ()) -> Labels:
    """The classes of images by their names, in the order of ``classes``, or of numbers and letters if there are none.

    Where some have no name there are no classes, as ``without`` says of the first of them.
    """
    there = {name: shown(name) for name in {*names} if name is not None}
    if None in names:
        return Labels(unlabelled=without(names.index(None)) if there else None)
    if not classes or not there.keys() <= {*classes}:
        classes = sorted(there, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    number = {name: i for i, name in enumerate(classes)}
    numbers = np.array([number[name] for name in names if name is not None], np.int64)
    return Labels([there.get(name, name) for name in classes], numbers) if names else Labels()


def stamp_of(entries: Iterable[Entry]) -> str:
    """A name for just these entries."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update("\0".join(map(str, (*entry, ""))).encode(errors="surrogateescape"))
    return digest.hexdigest()

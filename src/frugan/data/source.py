"""Where images lie: folders, zips, IDX files, named data sets and the built-in digits, behind one small interface.

Add a source by writing a function that takes the `Data` section and returns a `Source`, or None if what is asked for is not
its kind, and putting it into `OPENERS`.
"""

import hashlib
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from frugan.data import idx
from frugan.data.decode import Pixels, fit, flatten
from frugan.errors import UserError, nearest
from frugan.recipe import Data

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DEFAULT_SIZE = 64


class Source(ABC):
    """Images by number.

    Attributes:
        name: short, for folders and titles.
        classes: names of the classes, or none.
        labels: class of each image, int64 ``[n]``, or None.
        size: the side all images share in pixels, if the data set has one, else None.
        grey: whether images are grey, or None if only the images tell.
        fingerprint: changes when the images do.
    """

    name: str
    classes: Sequence[str] = ()
    labels: NDArray[np.int64] | None = None
    size: int | None = None
    grey: bool | None = None
    fingerprint: str

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


class ArraySource(Source):
    """Grey images in one array, uint8 ``[n, h, w]``."""

    def __init__(self, name: str, images: NDArray[np.uint8], labels: NDArray[np.int64] | None, classes: Sequence[str]) -> None:
        self.name = name
        self.images = images
        self.labels = labels
        self.classes = classes
        self.size = images.shape[1] if images.shape[1] == images.shape[2] else None
        self.grey = True
        self.fingerprint = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """Its number."""
        return f"image {index} of {self.name}"

    def open(self, index: int, at_least: int) -> Image.Image:
        """Image ``index`` in mode L."""
        return Image.fromarray(self.images[index])

    def pixels(self, index: int, size: int, channels: int, background: tuple[int, int, int]) -> tuple[Pixels, bool]:
        """As the base class says; nothing to do where size and channels are the data's own."""
        if size == self.size and channels == 1:
            return self.images[index][None], False
        return super().pixels(index, size, channels, background)


class FileSource(Source):
    """Image files by path, in a folder or in a zip.

    The class of a file is the first folder in which the paths differ; files beside such folders mean that there are no classes.
    """

    def __init__(self, root: Path, paths: list[str], sizes: list[int], archive: zipfile.ZipFile | None) -> None:
        self.root = root
        self.name = root.stem if archive else root.absolute().name
        self.paths = paths
        self.archive = archive
        digest = hashlib.sha256()
        for path, size in zip(paths, sizes, strict=True):
            digest.update(f"{path}\0{size}\0".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

        folders = [PurePosixPath(path).parts[:-1] for path in paths]
        depth = len(os.path.commonprefix(folders))  # noqa: RUF071, of lists it compares items
        names = [parts[depth] if len(parts) > depth else None for parts in folders]
        if None not in names:
            self.classes = sorted({name for name in names if name})
            number = {name: i for i, name in enumerate(self.classes)}
            self.labels = np.array([number[name] for name in names if name], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, index: int) -> str:
        """Its path."""
        return self.paths[index].encode(errors="backslashreplace").decode()

    def open(self, index: int, at_least: int) -> Image.Image:
        """Image ``index`` with its pixels read; a JPEG is decoded at the least scale that is large enough."""
        path = self.paths[index]
        image = Image.open(self.archive.open(path) if self.archive else self.root / path)
        try:
            image.draft(None, (at_least, at_least))
            image.load()
        except BaseException:
            image.close()
            raise
        return image


def open_source(data: Data) -> Source:
    """The images that ``data`` names.

    Raises:
        UserError: they are not there, cannot be fetched, or are none; says what to do.
    """
    if not data.data.strip():
        raise UserError("the name of the data is empty: give a folder, a zip, or leave it out for the built-in digits.")
    path = Path(data.data)
    try:
        for opener in OPENERS:
            source = opener(data)
            if source is not None:
                if len(source) == 0:
                    raise UserError(f"{data.data} holds no images.")
                return source
        if path.exists():
            raise UserError(f"{path} is neither a folder nor a zip of images.")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    near = "check the path"
    if path.parent == Path():
        near += ", or " + nearest(data.data, [*NAMED, "digits"]).removesuffix(".").removesuffix("?")
    near += "."
    raise UserError(f"there is no folder or zip {path}: {near}")


def digits(data: Data) -> Source | None:
    """The 1,797 digits that scikit-learn carries (Alpaydin and Kaynak 1998), enlarged from 8x8 to 16x16 to be readable."""
    if data.data != "digits":
        return None
    from sklearn.datasets import load_digits  # half a second, and only this source needs it

    found = load_digits()
    small = np.rint(found.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BICUBIC)) for i in small])
    return ArraySource("digits", images, found.target.astype(np.int64), [str(i) for i in range(10)])


# Name: torchvision's class, and the names of the classes.
NAMED = {
    "mnist": ("MNIST", [str(i) for i in range(10)]),
    "fashion-mnist": (
        "FashionMNIST",
        ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
    ),
}


def cache_folder() -> Path:
    """Where downloads lie: ``$FRUGAN_CACHE``, or ``~/.cache/frugan``."""
    return Path(os.environ.get("FRUGAN_CACHE") or Path.home() / ".cache" / "frugan")


def named(data: Data) -> Source | None:
    """MNIST and Fashion-MNIST: a copy in the working folder, in ``data/`` or in the cache, else the download."""
    name = data.data.lower().replace("_", "-")
    if name == "fashionmnist":
        name = "fashion-mnist"
    if name not in NAMED or Path(data.data).exists():
        return None
    kind, classes = NAMED[name]
    for root in (Path(), Path("data"), cache_folder()):
        for folder in (root / name, root / kind / "raw"):
            if (source := idx_folder(folder, name, data.split, classes)) is not None:
                return source
    import torchvision.datasets

    part, whole = cache_folder() / f".{kind}.part", cache_folder() / kind
    shutil.rmtree(part, ignore_errors=True)
    try:
        getattr(torchvision.datasets, kind)(part, download=True)
        shutil.rmtree(whole, ignore_errors=True)
        (part / kind).replace(whole)  # so that what is there is complete
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download {name} ({error}); put its four IDX files into {Path('data') / name} and run the same command again."
        ) from None
    return idx_folder(whole / "raw", name, data.split, classes)


def idx_files(data: Data) -> Source | None:
    """A folder of IDX files, gzipped or not (LeCun's MNIST format)."""
    folder = Path(data.data)
    name = folder.absolute().name
    known = NAMED.get(name.lower())
    return idx_folder(folder, name, data.split, known[1] if known else None)


def idx_folder(folder: Path, name: str, split: str, classes: Sequence[str] | None) -> Source | None:
    """The images of ``split`` (train, test or all) in a folder of IDX files, or None if there are none."""
    if not folder.is_dir():
        return None
    files = idx.find(folder)
    image_files = sorted((k for k in files if "images-idx3" in k), reverse=True)  # train before t10k
    parts = {k: "test" if k.startswith(("t10k", "test")) else "train" for k in image_files}
    if not image_files:
        return None
    chosen = [k for k in image_files if split in ("all", parts[k])]
    if not chosen:
        raise UserError(f"{folder} has no {split} images, only {', '.join(sorted(set(parts.values())))}: change --split.")
    images, labels = [], []
    for key in chosen:
        images.append(idx.read(files[key], 3))
        if (label_file := files.get(key.replace("images-idx3", "labels-idx1"))) is not None:
            labels.append(idx.read(label_file, 1))
            if len(labels[-1]) != len(images[-1]):
                raise UserError(f"{label_file} has {len(labels[-1])} labels for {len(images[-1])} images.")
    if len({array.shape[1:] for array in images}) > 1:
        raise UserError(f"the IDX files in {folder} hold images of different sizes: use --split train or --split test.")
    together = np.concatenate(images) if len(images) > 1 else images[0]
    numbers = np.concatenate(labels).astype(np.int64) if len(labels) == len(images) else None
    if numbers is not None and classes is None:
        classes = [str(i) for i in range(int(numbers.max(initial=0)) + 1)]
    return ArraySource(name, together, numbers, classes or () if numbers is not None else ())


def archive(data: Data) -> Source | None:
    """A zip of images, flat or in folders."""
    path = Path(data.data)
    if not path.is_file() or path.suffix.lower() != ".zip":
        return None
    try:
        opened = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the zip {path}: {error}; it may be cut short, fetch it again.") from None
    entries = [(e.filename, e.file_size) for e in opened.infolist() if not e.is_dir()]
    return _files(path, entries, opened)


def folder(data: Data) -> Source | None:
    """A folder of images, flat or in folders, however deep."""
    root = Path(data.data)
    if not root.is_dir():
        return None
    os.scandir(root).close()  # says if it may not be read, which walking does not
    entries, seen = [], set()
    for parent, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or {"recipe.toml", "plan.json"} <= set(names):  # a link in a circle, or a run whose pictures are no data
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(parent, name)
            entries.append((path.relative_to(root).as_posix(), path.stat().st_size if path.exists() else -1))
    return _files(root, entries, None)


def _files(root: Path, entries: list[tuple[str, int]], opened: zipfile.ZipFile | None) -> Source:
    """The images among ``entries`` (path, bytes), in the order of their names."""

    def is_image(name: str) -> bool:
        path = PurePosixPath(name)
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        return path.suffix.lower() in SUFFIXES and not hidden

    images = sorted(entry for entry in entries if is_image(entry[0]))
    if not images:
        kinds = ", ".join(sorted(s[1:] for s in SUFFIXES))
        raise UserError(f"no images found in {root}: none of its {len(entries)} files is {kinds}.")
    return FileSource(root, [p for p, _ in images], [s for _, s in images], opened)


OPENERS: list[Callable[[Data], Source | None]] = [digits, named, idx_files, archive, folder]

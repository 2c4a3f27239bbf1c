"""What ``--data`` may name: folders, zips, tar shards, parquet, data sets on the hub, IDX files, packs and the built-in digits.

Add a source by writing a function that takes the `Data` section and returns a `Source`, or None if what is asked for is not
its kind, and putting it into `OPENERS`.
"""

import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from frugan.data import idx
from frugan.data.images import (
    SUFFIXES,
    ArraySource,
    Entry,
    FileSource,
    PackSource,
    Source,
    is_image,
    outside,
    plain,
    shown,
    stamp_of,
)  # fmt: skip
from frugan.data.pack import Pack
from frugan.data.shards import records, tars
from frugan.data.stream import stream
from frugan.errors import UserError, nearest
from frugan.files import cache_folder
from frugan.recipe import Data


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
                source.name = plain(source.name)  # which may come from a manifest or a URL, and becomes part of paths
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
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(part.with_suffix(".lock")):
            if (source := idx_folder(whole / "raw", name, data.split, classes)) is not None:
                return source  # another process has fetched it meanwhile
            shutil.rmtree(part, ignore_errors=True)
            getattr(torchvision.datasets, kind)(part, download=True)
            shutil.rmtree(whole, ignore_errors=True)
            (part / kind).replace(whole)  # so that what is there is complete
    except (OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200].rstrip(".")  # torchvision tells of each mirror on a line of its own
        raise UserError(
            f"cannot download {name} ({why}); put its four IDX files into {Path('data') / name} and run the same command again."
        ) from None
    return idx_folder(whole / "raw", name, data.split, classes)


def pack(data: Data) -> Source | None:
    """A folder that is a pack."""
    folder = Path(data.data)
    if not ((folder / "manifest.json").is_file() and (folder / "pixels.bin").is_file()):
        return None
    source = PackSource(Pack(folder))
    asked, there = (data.image_size, data.channels), (source.size, 1 if source.grey else 3)
    if any(a not in (None, b) for a, b in zip(asked, there, strict=True)):
        raise UserError(
            f"{folder} is packed as {there[0]}x{there[0]} with {there[1]} channels: leave --image-size and --channels out, or pack "
            "the images again."
        )
    return source


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
    about = [(key, (s := files[key].stat()).st_size, s.st_mtime_ns) for key in chosen]
    place = str(folder.absolute())
    return ArraySource(name, together, numbers, classes or () if numbers is not None else (), place, stamp_of(about))


def archive(data: Data) -> Source | None:
    """A zip of images, flat or in folders."""
    path = Path(data.data)
    if not path.is_file() or path.suffix.lower() != ".zip":
        return None
    try:
        opened = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the zip {path}: {error}; it may be cut short, fetch it again.") from None
    entries = [(e.filename, e.file_size, e.CRC) for e in opened.infolist() if not e.is_dir()]
    out = [name for name, *_ in entries if outside(name)]
    problems = [f"{shown(name)} in {path} points out of it: left out." for name in out]
    return _files(path, [entry for entry in entries if not outside(entry[0])], opened, problems)


def folder(data: Data) -> Source | None:
    """A folder of images, flat or in folders, however deep."""
    root = Path(data.data)
    if not root.is_dir():
        return None
    os.scandir(root).close()  # says if it may not be read, which walking does not
    entries: list[Entry] = []
    seen, problems = set(), []

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename} may not be read ({error.strerror}): left out.")

    for parent, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        if real in seen or {"recipe.toml", "plan.json"} <= set(names):  # a link in a circle, or a run whose pictures are no data
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(parent, name)
            about = path.stat() if path.exists() else None
            entries.append((path.relative_to(root).as_posix(), *((about.st_size, about.st_mtime_ns) if about else (-1, 0))))
    return _files(root, entries, None, problems)


def _files(root: Path, entries: list[Entry], opened: zipfile.ZipFile | None, problems: Sequence[str] = ()) -> Source:
    """The images among ``entries``, in the order of their names."""
    images = sorted(entry for entry in entries if is_image(entry[0]))
    if not images:
        kinds = ", ".join(sorted(s[1:] for s in SUFFIXES))
        raise UserError(f"no images found in {root}: none of its {len(entries)} files is {kinds}.")
    source = FileSource(root, images, opened)
    source.problems = problems
    return source


OPENERS: list[Callable[[Data], Source | None]] = [digits, named, stream, pack, idx_files, archive, tars, records, folder]

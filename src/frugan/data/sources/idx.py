"""IDX files: arrays of bytes as MNIST has them (LeCun et al. 1998), gzipped or not."""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from frugan.config.recipe import Data
from frugan.data.sources.base import ArraySource, Source, stamp_of
from frugan.memory import host
from frugan.utils.errors import UserError, counted
from frugan.utils.units import size

MOST = 1032  # times that deflate can make a file smaller
PIECE = 1 << 20  # bytes that are read at a time

# Names of the classes of data sets that are known by name.
CLASSES = {
    "mnist": [str(i) for i in range(10)],
    "fashion-mnist": ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
}


def idx_files(data: Data) -> Source | None:
    """A folder of IDX files, gzipped or not (LeCun's MNIST format)."""
    folder = Path(data.data)
    name = folder.absolute().name
    return idx_folder(folder, name, data.split, CLASSES.get(name.lower()))


def idx_folder(folder: Path, name: str, split: str, classes: Sequence[str] | None) -> Source | None:
    """The images of ``split`` (train, test or all) in a folder of IDX files, or None if there are none."""
    if not folder.is_dir():
        return None
    files = find(folder)
    image_files = sorted((k for k in files if "images-idx3" in k), reverse=True)  # train before t10k
    parts = {k: "test" if k.startswith(("t10k", "test")) else "train" for k in image_files}
    if not image_files:
        return None
    chosen = [k for k in image_files if split in ("all", parts[k])]
    if not chosen:
        raise UserError(f"{folder} has no {split} images, only {', '.join(sorted(set(parts.values())))}: change --split.")
    images, labels = [], []
    for key in chosen:
        images.append(read(files[key], 3))
        if (label_file := files.get(key.replace("images-idx3", "labels-idx1"))) is not None:
            labels.append(read(label_file, 1))
            if len(labels[-1]) != len(images[-1]):
                raise UserError(f"{label_file} has {counted(len(labels[-1]), 'label')} for {counted(len(images[-1]), 'image')}.")
    if len({array.shape[1:] for array in images}) > 1:
        raise UserError(f"the IDX files in {folder} hold images of different sizes: use --split train or --split test.")
    together = np.concatenate(images) if len(images) > 1 else images[0]
    numbers = np.concatenate(labels).astype(np.int64) if len(labels) == len(images) else None
    if numbers is not None and classes is None:
        classes = [str(i) for i in range(int(numbers.max(initial=0)) + 1)]
    about = [(key, (s := files[key].stat()).st_size, s.st_mtime_ns) for key in chosen]
    place = str(folder.absolute())
    return ArraySource(name, together, numbers, classes or () if numbers is not None else (), place, stamp_of(about))


class Readable(Protocol):
    """An open file."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes."""


def find(folder: Path) -> dict[str, Path]:
    """The files of ``folder`` by their name without ``.gz``; a plain file goes before a gzipped one."""
    return {p.name.removesuffix(".gz").replace(".idx", "-idx"): p for p in sorted(folder.iterdir(), reverse=True)}


def read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file; one that is not gzipped is mapped, not read.

    Raises:
        UserError: not such a file, or cut short, or more than fits into memory.
    """
    zipped = path.suffix == ".gz"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, 8, dimensions)) or len(header) < 4 + 4 * dimensions:
                raise UserError(f"{path} is not an IDX file of bytes with {dimensions} dimensions.")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            count = math.prod(shape)
            body: NDArray[np.uint8]
            if zipped:
                body = _unzipped(path, file, count)
            else:
                there = path.stat().st_size > len(header)  # mapping nothing is an error
                body = np.memmap(path, np.uint8, "r", offset=len(header)) if there else np.empty(0, np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    if len(body) < count:
        raise _cut(path, f"{len(body):,}", count)
    return body[:count].reshape(shape)


def _unzipped(path: Path, file: Readable, count: int) -> NDArray[np.uint8]:
    """At most ``count`` bytes of a gzipped file, after its header, which may claim anything."""
    if count > (most := MOST * path.stat().st_size):
        raise _cut(path, f"at most {most:,}", count)
    if count > (free := host.free()):
        raise UserError(
            f"{path} takes {size(count)} of memory, and {size(free)} are free: unpack it with gunzip, and it is mapped instead."
        )
    body = bytearray()  # which grows with what is there
    while piece := file.read(min(PIECE, count - len(body))):
        body += piece
    return np.frombuffer(body, np.uint8)


def _cut(path: Path, there: str, count: int) -> UserError:
    return UserError(f"{path} is cut short: it has {there} of {count:,} bytes; fetch it again.")

"""IDX files: arrays of bytes as MNIST has them (LeCun et al. 1998), gzipped or not."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from frugan.errors import UserError
from frugan.memory import host
from frugan.memory.plan import size

MOST = 1032  # times that deflate can make a file smaller
PIECE = 1 << 20  # bytes that are read at a time


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

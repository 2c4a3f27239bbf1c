"""IDX files: arrays of bytes as MNIST has them (LeCun et al. 1998), gzipped or not."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from frugan.errors import UserError


def find(folder: Path) -> dict[str, Path]:
    """The files of ``folder`` by their name without ``.gz``; a plain file goes before a gzipped one."""
    return {p.name.removesuffix(".gz").replace(".idx", "-idx"): p for p in sorted(folder.iterdir(), reverse=True)}


def read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file; one that is not gzipped is mapped, not read.

    Raises:
        UserError: not such a file, or cut short.
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
                body = np.frombuffer(file.read(count), np.uint8)
            else:
                there = path.stat().st_size > len(header)  # mapping nothing is an error
                body = np.memmap(path, np.uint8, "r", offset=len(header)) if there else np.empty(0, np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    if len(body) < count:
        raise UserError(f"{path} is cut short: it has {len(body):,} of {count:,} bytes; fetch it again.")
    return body[:count].reshape(shape)

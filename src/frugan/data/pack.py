"""Packs: images decoded, cropped and resized once, as rows of one file of bytes.

A pack is a folder of ``pixels.bin`` (uint8 ``[n, c, h, w]``), ``labels.bin`` (int64 ``[n]``, if there are classes) and
``manifest.json``, which is written last and renamed into place with the whole folder: what was killed halfway is no pack. Rows are
read by `os.preadv`, not by a map, because pages of a map count as the process's memory once they were touched.
"""

import json
import os
import weakref
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from frugan.utils.errors import UserError

VERSION = 1  # of the format, and of how images are made to fit
CHECKED = 1 << 30  # bytes of a file, a third of a second, up to which it is compared with its checksum each time
PIECE = 1 << 20  # bytes that are read at a time for that


@dataclass(frozen=True)
class Manifest:
    """What a pack holds.

    Args:
        name: of the source.
        stamp: of the source when it was packed.
        images: how many there are.
        channels: 1 or 3.
        size: side in pixels.
        background: what transparent pixels were laid upon.
        classes: their names, or none.
        labelled: whether there are labels.
        fingerprint: SHA-256 of all pixels, hexadecimal.
        skipped: how many could not be read.
        reasons: the first of them, and why.
        small: one that was smaller than ``size``, if there is one.
        pixels_crc32: checksum of ``pixels.bin``; None in packs of earlier versions.
        labels_crc32: of ``labels.bin``.
    """

    name: str
    stamp: str
    images: int
    channels: int
    size: int
    background: str
    classes: list[str]
    labelled: bool
    fingerprint: str
    skipped: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    small: str | None = None
    pixels_crc32: int | None = None
    labels_crc32: int | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        if not (isinstance(self.classes, list) and isinstance(self.reasons, dict)):
            raise ValueError("its manifest is not what a pack has")
        numbers = (self.images, self.channels, self.size, self.skipped, self.pixels_crc32 or 0, self.labels_crc32 or 0)
        texts = [self.name, self.stamp, self.background, self.fingerprint, self.small or "", *self.classes]
        texts += [text for pair in self.reasons.items() for text in pair]
        right = all(type(number) is int and number >= 0 for number in numbers) and all(isinstance(text, str) for text in texts)
        if not right or self.channels not in (1, 3) or not self.size:
            raise ValueError("its manifest is not what a pack has")


class Pack:
    """A pack that is there, to be read from.

    Raises:
        UserError: it is none, is of another version, or is cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            known = dict(json.loads((folder / "manifest.json").read_text()))
            if known.get("version") != VERSION:
                raise UserError(f"{folder} was packed by another version of frugan: pack it again.")
            self.manifest = Manifest(**known)
            self.shape = (self.manifest.channels, self.manifest.size, self.manifest.size)
            self._row = self.manifest.channels * self.manifest.size**2
            self._pixels = os.open(folder / "pixels.bin", os.O_RDONLY)
            weakref.finalize(self, os.close, self._pixels)
            files = {"pixels.bin": len(self) * self._row} | ({"labels.bin": 8 * len(self)} if self.manifest.labelled else {})
            for file, needed in files.items():
                if (there := (folder / file).stat().st_size) != needed:
                    raise UserError(f"{folder / file} is cut short: it has {there:,} of {needed:,} bytes; pack the images again.")
        except UserError:
            raise
        except json.JSONDecodeError:
            raise UserError(f"{folder / 'manifest.json'} is damaged: pack the images again.") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:  # a manifest may come from anybody
            raise UserError(f"{folder} is no pack ({error}): pack the images again.") from None

    def __len__(self) -> int:
        return self.manifest.images

    def check(self, most: int | None = None) -> None:
        """Reads the files, those of up to ``most`` bytes.

        Raises:
            UserError: one does not hold what was packed.
        """
        for file, checksum in (("pixels.bin", self.manifest.pixels_crc32), ("labels.bin", self.manifest.labels_crc32)):
            path, found = self.folder / file, 0
            if checksum is None or (most is not None and path.stat().st_size > most):
                continue
            with path.open("rb") as content:
                while piece := content.read(PIECE):
                    found = zlib.crc32(piece, found)
            if found != checksum:
                raise UserError(f"{path} is damaged, its bytes are not those that were packed: pack the images again.")

    @property
    def bytes(self) -> int:
        """The size of the file of pixels, in bytes."""
        return len(self) * self._row

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of ``rows``: uint8 ``[n, c, h, w]``."""
        images = np.empty((len(rows), *self.shape), np.uint8)
        file, row = self._pixels, self._row
        if not hasattr(os, "preadv"):  # Windows
            mapped = np.memmap(self.folder / "pixels.bin", np.uint8, "r").reshape(-1, *self.shape)
            return np.take(mapped, rows, axis=0, out=images)
        whole = memoryview(images.reshape(-1)) if len(rows) else memoryview(b"")  # type: ignore[arg-type]
        for i, number in enumerate(rows.tolist()):
            if os.preadv(file, [whole[i * row : (i + 1) * row]], number * row) != row:
                raise UserError(f"{self.folder} has become shorter while it was read: pack the images again.")
        return images

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Tells the system that ``rows`` will be read next, so that it fetches what it does not hold yet; returns at once."""
        if hasattr(os, "posix_fadvise"):
            for number in rows.tolist():
                os.posix_fadvise(self._pixels, number * self._row, self._row, os.POSIX_FADV_WILLNEED)

    def all(self) -> NDArray[np.uint8]:
        """Every image: uint8 ``[n, c, h, w]``."""
        return np.fromfile(self.folder / "pixels.bin", np.uint8).reshape(-1, *self.shape)

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """The classes of ``rows``: int64 ``[n]``, or None if there are none."""
        if not self.manifest.labelled:
            return None
        return np.array(np.memmap(self.folder / "labels.bin", "<i8", "r")[rows], np.int64)

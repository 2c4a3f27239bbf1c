"""Rows of features: a tensor, or a file for as many as there are."""

import hashlib
import shutil
import tempfile
import weakref
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from frugan.utils.errors import UserError
from frugan.utils.files import whole


class Rows(Protocol):
    """What distances read features from: a tensor ``[n, d]``, or `Features`."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, which: slice | Tensor, /) -> Tensor:
        """Some of them: those of a slice of step 1, or of indices int64 ``[m]``."""


class Features:
    """float32 rows ``[n, width]`` in a temporary file, so that memory does not grow with their number.

    They are read by calls, not through a map, because pages of a map count as the process's memory once they were touched. The
    file has no name, and is gone when this is closed, collected or killed.

    Args:
        folder: where the file lies; by default where the system puts such files, which on some systems is memory.

    Raises:
        UserError: the file cannot be made, or is full.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.width = 0
        self._length = 0
        try:
            self._file: FileIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot keep features in {self._where}: {error.strerror or error}.") from None
        weakref.finalize(self, self._file.close)

    @classmethod
    def open(cls, path: Path, width: int) -> "Features":
        """What `save` wrote, to be read from.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        found = cls.__new__(cls)
        try:
            found._file = path.open("rb", buffering=0)
            found._length = path.stat().st_size // (4 * width)
        except OSError as error:
            raise UserError(f"cannot read the features {path}: {error.strerror or error}.") from None
        found.folder, found.width = path.parent, width
        weakref.finalize(found, found._file.close)
        return found

    def save(self, path: Path) -> None:
        """Copies everything to ``path``, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        with whole(path) as part, part.open("wb") as file:
            self._file.seek(0)
            shutil.copyfileobj(self._file, file)

    def sha256(self) -> str:
        """Of all rows, hexadecimal."""
        digest = hashlib.sha256()
        self._file.seek(0)
        while block := self._file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, which: slice | Tensor, /) -> Tensor:
        if isinstance(which, Tensor):
            return self.rows(which)
        begin, end, step = which.indices(len(self))
        if step != 1:
            raise ValueError("rows of features are read one after another: a slice of step 1.")
        return self.read(begin, end)

    def add(self, rows: Tensor) -> None:
        """Appends ``[n, width]``."""
        self.put(len(self), rows)

    def put(self, first: int, rows: Tensor) -> None:
        """Writes ``[n, width]`` at ``first``; rows that were never written are zeros."""
        values = rows.detach().to("cpu", torch.float32).contiguous()
        self.width = self.width or values.shape[1]
        if values.shape[1:] != (self.width,):
            raise ValueError(f"these rows have the shape {tuple(values.shape)}, those before them [n, {self.width}].")
        if not len(values):
            return
        left = _bytes(values)
        try:
            self._file.seek(first * self.width * 4)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise UserError(f"cannot keep features in {self._where}: {error.strerror or error}.") from None
        self._length = max(self._length, first + len(values))

    def read(self, begin: int, end: int) -> Tensor:
        """The rows from ``begin`` up to ``end``, or as many as there are: float32 ``[m, width]``."""
        rows = torch.empty(max(0, min(end, len(self)) - begin), self.width)
        if len(rows):
            self._fill(_bytes(rows), begin)
        return rows

    def rows(self, indices: Tensor) -> Tensor:
        """The rows at ``indices``, int64 ``[m]``, none negative: float32 ``[m, width]``."""
        rows = torch.empty(len(indices), self.width)
        numbers = indices.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self):
            raise IndexError(f"there are {len(self)} rows of features: {min(numbers)} to {max(numbers)} were asked for.")
        for row, number in zip(rows, numbers, strict=True):
            self._fill(_bytes(row), number)
        return rows

    def close(self) -> None:
        """Deletes the file."""
        self._file.close()

    @property
    def _where(self) -> str:
        return str(self.folder or tempfile.gettempdir())

    def _fill(self, left: memoryview, first: int) -> None:
        self._file.seek(first * self.width * 4)
        while left:
            left = left[self._file.readinto(left) :]


def _bytes(rows: Tensor) -> memoryview:
    return memoryview(rows.numpy()).cast("B")  # type: ignore[arg-type]

"""Batches of uint8 images by the number of images seen.

Epoch after epoch is one endless order, a new permutation each; batch after batch is a slice of it, so that every image comes
once an epoch whatever the batch size, and resuming needs nothing but the number of images seen.

Images that fit into `SMALL` bytes are decoded once and kept; others are decoded anew each time by threads that run ahead of
training (Pillow's decoders let go of the interpreter, and threads cost no second copy of the process). A file that cannot be
read is named and skipped; where another image must stand in its place, it is the next one that can be read, so that a
resumed run sees the same.
"""

import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from frugan.data.decode import Pixels, background_colour, flatten, is_grey
from frugan.data.source import DEFAULT_SIZE, Source
from frugan.draws import derive
from frugan.errors import UserError
from frugan.recipe import Data

SMALL = 256 << 20  # bytes of decoded images that are kept in memory
MANY = 1000  # images whose decoding takes long enough to be announced
LOOKED_AT = 256  # images that decide whether a folder is grey

Tell = Callable[[str], None]
Images = Callable[[int, int], Tensor]


def resolve(source: Source, data: Data, tell: Tell) -> Data:
    """``data`` with image size and channels filled in from the images themselves."""
    size = data.image_size or source.size or DEFAULT_SIZE
    channels = data.channels
    if channels is None and source.grey is not None:
        channels = 1 if source.grey else 3
    if channels is None:
        background = background_colour(data.background)
        chosen = np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int)
        grey = [g for i in chosen if (g := _looks_grey(source, int(i), background)) is not None]
        channels = 1 if all(grey) else 3
        if channels == 1 and grey:
            tell(f"None of {len(grey)} images looked at has colour: training in grey; --channels 3 trains in colour.")
    return Data(**(vars(data) | {"image_size": max(size, 8), "channels": channels}))


def _looks_grey(source: Source, index: int, background: tuple[int, int, int]) -> bool | None:
    try:
        with source.open(index, DEFAULT_SIZE) as image:
            return is_grey(flatten(image, background))
    except Exception:  # as in `_read`, which names the file
        return None


def bytes_of(images: int, data: Data, batch: int, keep: int = SMALL) -> int:
    """Bytes that a `Loader` of so many images holds: all of them, or one batch in use and one decoded ahead."""
    each = math.prod(data.shape)
    return images * each if images * each <= keep else 2 * batch * each


def keepable(budget: int | None, resident: int) -> int:
    """Bytes of decoded images worth keeping: at most a quarter of what a budget leaves."""
    return SMALL if budget is None else max(0, min(SMALL, (budget - resident) // 4))


class Loader:
    """The images of ``source`` as ``data`` (resolved) wants them.

    Args:
        source: where they come from.
        data: how they are made to fit.
        seed: of their order.
        workers: threads that decode.
        tell: is called with each thing a person should know: bad files, images smaller than the target.
        keep: bytes of decoded images that may be kept in memory.

    Raises:
        UserError: no image can be read.
    """

    def __init__(self, source: Source, data: Data, *, seed: int, workers: int, tell: Tell, keep: int = SMALL) -> None:
        self.source = source
        self.shape = data.shape
        self.background = background_colour(data.background)
        self.seed = seed
        self.tell = tell
        self.bad: dict[int, str] = {}
        self._told_small = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._ahead: deque[tuple[int, int, list[Future[Pixels]]]] = deque()
        self._order: tuple[int, Tensor] | None = None
        self._kept: Tensor | None = None
        self.length = len(source)
        self._labels = None if source.labels is None else torch.from_numpy(source.labels)
        if len(source) * math.prod(self.shape) <= keep:
            self._keep()
        else:
            self._readable(0)  # one at least
            # All threads at once: each reserves its stack when it starts, which must not happen within a limit on memory.
            together = threading.Barrier(workers)
            list(self._pool.map(lambda _: together.wait(), range(workers)))

    def __len__(self) -> int:
        """Images in an epoch."""
        return self.length

    def batch(self, first: int, count: int) -> Tensor:
        """Images ``first`` to ``first + count`` of the endless order: uint8 ``[count, c, h, w]`` on the host."""
        return self.images(first, count)(first, count)

    def images(self, first: int, count: int) -> Images:
        """A batch to be read in pieces, ``(first, count)`` to uint8 ``[count, c, h, w]``; only what is asked for is copied."""
        if self._kept is not None:
            kept = self._kept
            return lambda begin, number: kept[self._indices(begin, number)]
        while self._ahead and self._ahead[0][:2] != (first, count):
            for future in self._ahead.popleft()[2]:
                future.cancel()
        if not self._ahead:
            self._decode_ahead(first, count)
        _, _, futures = self._ahead.popleft()
        self._decode_ahead(first + count, count)
        decoded = [future.result() for future in futures]
        return lambda begin, number: torch.from_numpy(np.stack(decoded[begin - first : begin - first + number]))

    def ahead(self, batch: int) -> int:
        """Bytes that decoded images will take besides those that are kept: one batch in use, one decoded ahead."""
        return 0 if self._kept is not None else 2 * batch * math.prod(self.shape)

    def labels(self, first: int, count: int) -> Tensor | None:
        """The classes of the images that `batch` gives: int64 ``[count]``, or None if there are none."""
        return None if self._labels is None else self._labels[self._indices(first, count)]

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _decode_ahead(self, first: int, count: int) -> None:
        indices = self._indices(first, count).tolist()
        self._ahead.append((first, count, [self._pool.submit(self._readable, i) for i in indices]))

    def _indices(self, first: int, count: int) -> Tensor:
        pieces = []
        while count:
            epoch, offset = divmod(first, self.length)
            if self._order is None or self._order[0] != epoch:
                generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
                self._order = (epoch, torch.randperm(self.length, generator=generator))
            piece = self._order[1][offset : offset + count]
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        return torch.cat(pieces)

    def _readable(self, index: int) -> Pixels:
        """Image ``index``, or the next one that can be read."""
        for step in range(self.length):
            pixels = self._read((index + step) % self.length)
            if pixels is not None:
                return pixels
        raise UserError(f"none of the {self.length} images of {self.source.name} can be read.")

    def _read(self, index: int) -> Pixels | None:
        if index in self.bad:
            return None
        channels, size, _ = self.shape
        try:
            pixels, small = self.source.pixels(index, size, channels, self.background)
        except MemoryError:
            raise
        except Exception as error:  # what decoders raise for files that are not what they say is without end
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "not an image, or empty"
            self.bad[index] = reason
            self.tell(f"Skipped {self.source.where(index)}: {reason}.")
            return None
        if small and not self._told_small:
            self._told_small = True
            self.tell(f"Some images are smaller than {size}x{size} and are enlarged, {self.source.where(index)} for one.")
        return pixels

    def _keep(self) -> None:
        """Decodes everything once; bad files drop out of the epoch."""
        if self.length > MANY:
            self.tell(f"Decoding {self.length:,} images once, to keep them in memory.")
        kept = torch.empty(self.length, *self.shape, dtype=torch.uint8)
        into = kept.numpy()

        good = torch.zeros(self.length, dtype=torch.bool)

        def decode(start: int) -> None:
            for index in range(start, min(start + 64, self.length)):
                if (pixels := self._read(index)) is not None:
                    into[index], good[index] = pixels, True

        list(self._pool.map(decode, range(0, self.length, 64)))
        if not good.any():
            raise UserError(f"none of the {self.length} images of {self.source.name} can be read.")
        if not good.all():
            kept = kept[good]
            self._labels = None if self._labels is None else self._labels[good]
            self.tell(f"{int((~good).sum())} of {self.length} images were skipped.")
            self.length = len(kept)
        self._kept = kept

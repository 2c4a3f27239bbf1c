"""Batches of uint8 images by the number of images seen.

Epoch after epoch is one endless order, a new permutation each; batch after batch is a slice of it, so that every image comes
once an epoch whatever the batch size, and resuming needs nothing but the number of images seen.

Images come from a pack (`frugan.data.pack`), which is made on first use. A small one is kept whole, on the device that trains.
Of others no more than a micro-batch is read at a time, while the system is told which rows come next. A thread that reads ahead
would cost more than it saves: it and the training take turns at the interpreter, row by row.
"""

import hashlib
from collections.abc import Callable
from copy import copy

import numpy as np
import torch
from torch import Tensor

from frugan.config.recipe import Data
from frugan.data.loader import Batch
from frugan.data.pack import Pack
from frugan.data.packing import Progress, packed
from frugan.data.sources.base import ArraySource, Source, Tell
from frugan.utils.draws import Order, derive

SMALL = 64 << 20  # bytes of images that are kept in the memory of the host: reading the rest is hardly slower


class PackLoader:
    """The images of ``source`` as ``data`` (resolved) wants them.

    Args:
        source: where they come from.
        data: how they are made to fit.
        seed: of their order.
        workers: threads that decode, if they are not packed yet.
        tell: is called with each thing a person should know: bad files, images smaller than the target.
        keep: bytes of images that may be kept in memory.
        device: where they are kept.
        progress: is called with how many images are packed, of how many.

    Raises:
        UserError: no image can be read, or the pack cannot be written.
    """

    random_access = True

    def __init__(
        self, source: Source, data: Data, *, seed: int, workers: int, tell: Tell, keep: int = SMALL,
        device: torch.device | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.shape = data.shape
        self.seed = seed
        self._order: tuple[int, Order] | None = None
        self._kept: Tensor | None = None
        self._pack = None
        self._repack: Callable[[], Pack] | None = None  # makes the pack, where images that are kept did without
        if isinstance(source, ArraySource) and source.fits(data) and source.images.nbytes <= keep:
            whole = np.ascontiguousarray(source.images[:, None])
            self._repack = lambda: packed(source, data, workers=workers, tell=tell, progress=progress)
            self.length = len(whole)
            self.fingerprint = hashlib.sha256(whole.data).hexdigest()
            self._labels = source.labels
        else:
            self._pack = pack = packed(source, data, workers=workers, tell=tell, progress=progress)
            self.length, self.fingerprint = len(pack), pack.manifest.fingerprint
            if pack.manifest.small:
                size = data.image_size
                tell(f"Some images are smaller than {size}x{size} and are enlarged, {pack.manifest.small} for one.")
            if pack.bytes > keep:
                return
            whole = pack.all()
        self._kept = torch.tensor(whole, device=device)

    def reordered(self, seed: int) -> "PackLoader":
        """The same images in another order; they are shared."""
        other = copy(self)
        other.seed, other._order = seed, None
        return other

    def __len__(self) -> int:
        """Images in an epoch."""
        return self.length

    @property
    def at_hand(self) -> int:
        """All images of an epoch."""
        return self.length

    def let_go(self) -> bool:
        """Reads images from their pack from now on; whether they were kept in memory until now."""
        if self._kept is None:
            return False
        if self._repack:
            self._pack, self._repack = self._repack(), None
        self._kept = None
        return True

    def batch(self, first: int, count: int) -> Tensor:
        """Images ``first`` to ``first + count`` of the endless order: uint8 ``[count, c, h, w]``, on the host or as kept."""
        return self.pieces(first, count).images(first, count)

    def pieces(self, first: int, count: int) -> Batch:
        """The same images, with their classes, to be read in pieces; only what is asked for is copied."""
        if self._kept is not None:
            kept = self._kept
            return Batch(lambda begin, number: kept[_there(self._indices(begin, number), kept.device)], self.labels)
        pack = self._pack
        assert pack
        pack.expect(self._indices(first + count, count).numpy())
        return Batch(lambda begin, number: torch.from_numpy(pack.read(self._indices(begin, number).numpy())), self.labels)

    def ahead(self, batch: int) -> int:
        """Bytes that images will take besides those that are kept and the micro-batch in use: none."""
        return 0

    def labels(self, first: int, count: int) -> Tensor | None:
        """The classes of the images that `batch` gives: int64 ``[count]``, or None if there are none."""
        indices = self._indices(first, count).numpy()
        if self._pack is None:
            return None if self._labels is None else torch.from_numpy(self._labels[indices])
        found = self._pack.labels(indices)
        return None if found is None else torch.from_numpy(found)

    def close(self) -> None:
        """Lets go of the images."""
        self._kept = self._pack = self._repack = None

    def _indices(self, first: int, count: int) -> Tensor:
        pieces = []
        while count:
            epoch, offset = divmod(first, self.length)
            if self._order is None or self._order[0] != epoch:
                self._order = (epoch, Order(derive(self.seed, "order", epoch), self.length))
            piece = self._order[1].read(offset, min(count, self.length - offset))
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        return torch.cat(pieces)


def _there(indices: Tensor, device: torch.device) -> Tensor:
    """``indices`` on ``device``; pinned on their way to a GPU, for which the host would else wait until all before is done."""
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)

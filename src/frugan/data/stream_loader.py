"""Images read from shards as training goes: for data larger than the disk, in constant memory.

An epoch reads all shards in a new order, one after the other, in blocks of images; within a block they are shuffled. Where an
image comes in an epoch follows from the seed and the number of images alone, so that a training resumes at the image where it
stopped. Processes that train together each read all shards and decode their share of every batch. An image that cannot be read is
named, and the one before it in its block stands in its place. Where the network or the system fails for a while, a shard
is opened again at the image where it stopped: no image is replaced for that.
"""

import io
import math
import tarfile
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frugan.config.recipe import Data
from frugan.data.decode import Pixels, background_colour, fit, flatten
from frugan.data.loader import Batch, Loader, unlabelled
from frugan.data.sources import streams
from frugan.data.sources.base import Tell, loaded, reason, stamp_of
from frugan.data.sources.streams import Damaged, Item, Shard, short
from frugan.utils.draws import Order, derive
from frugan.utils.errors import UserError, counted

Row = tuple[Pixels, int]  # an image and its class
Encoded = tuple[Item, int]  # the same as it was read

BLOCK_BYTES = 32 << 20  # of decoded images that are shuffled among each other; two such blocks are held


def block_of(data: Data) -> int:
    """Images that `BLOCK_BYTES` hold."""
    return max(1, BLOCK_BYTES // math.prod(data.shape))


class StreamLoader:
    """The images of ``shards`` as ``data`` (resolved) wants them, as `Loader` says.

    Args:
        shards: in any order that is always the same.
        data: how images are made to fit.
        seed: of their order.
        workers: threads that decode.
        tell: is called with each thing a person should know.
        batch: images of an update.
        share: the first of every batch that this process will ask for, and how many; others are there too, and take long.
        block: images that are shuffled among each other; None: as many as `BLOCK_BYTES` hold.
    """

    random_access = False

    def __init__(
        self, shards: Sequence[Shard], data: Data, *, seed: int, workers: int, tell: Tell, batch: int = 1,
        share: tuple[int, int] = (0, 1), block: int | None = None,
    ) -> None:  # fmt: skip
        self.shards = [shard for shard in shards if shard.images]
        self.shape = data.shape
        self.background = background_colour(data.background)
        self.seed, self.tell = seed, tell
        self.of, self.share = batch, share
        self.length = sum(shard.images for shard in self.shards)
        self.labelled = all(shard.labels is not None for shard in self.shards)
        if not self.length:
            raise UserError(f"no image is in {counted(len(shards), 'shard')}.")
        self.fingerprint = stamp_of((shard.name, shard.images, 0) for shard in self.shards)
        self.block = min(self.length, block or block_of(data))
        self._told: set[str] = set()
        self._decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._blocks: dict[tuple[int, int], Future[dict[int, Row]]] = {}
        self._closing = threading.Event()
        self._stream: tuple[int, int, Generator[tuple[Item, int]]] | None = None  # of which epoch, from which image on
        # All threads at once: each reserves its stack when it starts, which must not happen within a limit on memory.
        together = threading.Barrier(workers)
        list(self._decoders.map(lambda _: together.wait(), range(workers)))
        self._reader.submit(int).result()

    def __len__(self) -> int:
        """Images in an epoch."""
        return self.length

    @property
    def at_hand(self) -> int:
        """The images of the first block, which is held while they are asked for."""
        return self.block

    def batch(self, first: int, count: int) -> Tensor:
        """Images ``first`` to ``first + count`` of the endless order: uint8 ``[count, c, h, w]``."""
        return self.pieces(first, count).images(first, count)

    def pieces(self, first: int, count: int) -> Batch:
        """The same images to be read in pieces."""
        found = {p: self._image(p) for p in range(first, first + count)}
        rows, classes = {p: pixels for p, (pixels, _) in found.items()}, {p: label for p, (_, label) in found.items()}

        def images(begin: int, number: int) -> Tensor:
            return torch.from_numpy(np.stack([rows[p] for p in range(begin, begin + number)]))

        def labels(begin: int, number: int) -> Tensor:
            return torch.tensor([classes[p] for p in range(begin, begin + number)], dtype=torch.int64)

        return Batch(images, labels if self.labelled else unlabelled)

    def ahead(self, batch: int) -> int:
        """Bytes of the blocks that are held, whole as they may become, and of the batch in use."""
        return (2 * self.block + batch) * math.prod(self.shape)

    def labels(self, first: int, count: int) -> Tensor | None:
        """The classes of the images that `batch` gives: int64 ``[count]``, or None if there are none."""
        return self.pieces(first, count).labels(first, count)

    def reordered(self, seed: int) -> Loader:
        """Cannot be: a stream is read in its own order."""
        raise UserError("a stream gives its images in one order: copy it to this disk for another.")

    def let_go(self) -> bool:
        """Keeps nothing that could be given up."""
        return False

    def close(self) -> None:
        """Ends the threads."""
        self._closing.set()
        for pool in (self._reader, self._decoders):
            pool.shutdown(cancel_futures=True)

    def _image(self, position: int) -> Row:
        epoch, offset = divmod(position, self.length)
        key = (epoch, offset // self.block)
        if key not in self._blocks:
            self._blocks[key] = self._reader.submit(self._read, *key)
        try:
            rows = self._blocks[key].result()
            if offset % self.block not in rows:  # of another process's share
                self._blocks[key] = self._reader.submit(self._read, *key, whole=True)
                rows = self._blocks[key].result()
        except Exception:
            del self._blocks[key]  # to be read anew if it is asked for again
            raise
        found = rows[offset % self.block]
        if (after := self._after(key)) not in self._blocks:
            self._blocks = {key: self._blocks[key], after: self._reader.submit(self._read, *after)}
        return found

    def _after(self, key: tuple[int, int]) -> tuple[int, int]:
        epoch, block = key
        return (epoch, block + 1) if (block + 1) * self.block < self.length else (epoch + 1, 0)

    def _mine(self, position: int) -> bool:
        begin, count = self.share
        return begin <= position % self.of < begin + count

    def _read(self, epoch: int, block: int, whole: bool = False) -> dict[int, Row]:
        """Images of a block with their classes, by their place in it: this process's, or all."""
        whole = whole or self.share == (0, self.of)
        begin = block * self.block
        count = min(self.block, self.length - begin)
        places = np.empty(count, np.int64)  # of the image that is read n-th
        places[Order(derive(self.seed, "block", epoch, block), count).read(0, count).numpy()] = np.arange(count)
        before, self._stream = self._stream, None  # what fails is not gone on with
        stream = before[2] if before and before[:2] == (epoch, begin) else self._from(epoch, begin)
        try:
            waiting: dict[int, Future[Row | None]] = {}
            previous: Encoded | None = None
            for place in places.tolist():
                encoded = next(stream)
                if whole or self._mine(epoch * self.length + begin + place):
                    waiting[place] = self._decoders.submit(self._decoded, encoded, None if whole else previous)
                    if len(waiting) % 64 == 0:
                        waiting[place].result()  # what is encoded does not gather
                previous = encoded
            decoded = {place: future.result() for place, future in waiting.items()}
        except BaseException:
            stream.close()
            raise
        self._stream = (epoch, begin + count, stream)
        if None in decoded.values() and not whole:
            return self._read(epoch, block, whole=True)  # what stands for it is another process's
        good = next((row for row in decoded.values() if row is not None), None)
        if decoded and good is None:
            raise UserError(f"none of {len(decoded)} images in a row can be read, from {self.shards[0].name} on.")
        rows: dict[int, Row] = {}
        for place, row in decoded.items():
            good = row or good
            if good is not None:
                rows[place] = good
        return rows

    def _decoded(self, encoded: Encoded, before: Encoded | None) -> Row | None:
        """The image, or else the one ``before`` it."""
        for (name, content), label in filter(None, (encoded, before)):
            if (pixels := self._decode(name, content)) is not None:
                return pixels, label
        return None

    def _from(self, epoch: int, skip: int) -> Generator[tuple[Item, int]]:
        """Every image of an epoch but the first ``skip``, from shard to shard."""
        order = Order(derive(self.seed, "shards", epoch), len(self.shards)).read(0, len(self.shards)).tolist()
        for number in order:
            shard = self.shards[number]
            if skip < shard.images:
                yield from self._whole(shard, skip)
            skip = max(0, skip - shard.images)

    def _whole(self, shard: Shard, given: int) -> Iterator[tuple[Item, int]]:
        """Every image of ``shard`` but the first ``given``, with its class, or 0 where there are none.

        Where the network or the system fails, it is read on after a while.
        A shard that ends too early twice at the same image is cut short or damaged: its rest is named once, and images that cannot
        be read stand for it.
        """
        failed = 0  # attempts in a row that gave no image
        ended = None  # at which image it ended too early
        while given < shard.images:
            why = "it is cut short"
            try:
                for item in islice(shard.read(given), shard.images - given):
                    yield item, 0 if shard.labels is None else int(shard.labels[given])
                    given, failed = given + 1, 0
            except (UserError, MemoryError):
                raise
            except (tarfile.TarError, Damaged) as error:
                why = reason(error)
            except Exception as error:  # what networks, file systems and their drivers raise is without end
                self._wait(shard, error, failed)
                failed += 1
                continue
            if given == ended:
                rest = f"the rest of {shard.name}"
                if rest not in self._told:
                    self._told.add(rest)
                    self.tell(f"The rest of {shard.name} cannot be read: {why}.")
                for _ in range(given, shard.images):
                    yield (rest, why), 0
                return
            ended = given

    def _wait(self, shard: Shard, error: Exception, failed: int) -> None:
        if failed == len(streams.WAITS) or self._closing.is_set():
            raise UserError(
                f"cannot read on in {shard.name} ({short(error)}), tried {failed + 1} times: check the connection, and that the "
                "shard is whole, then run the same command again, which goes on from the last checkpoint."
            ) from None
        if not failed:
            self.tell(f"{shard.name}: {short(error)}; trying again.")
        self._closing.wait(streams.WAITS[failed])

    def _decode(self, name: str, content: bytes | str) -> NDArray[np.uint8] | None:
        channels, size, _ = self.shape
        try:
            if isinstance(content, str):
                raise ValueError(content)
            with loaded(io.BytesIO(content), size) as image:
                return fit(flatten(image, self.background), size, channels)
        except MemoryError:
            raise
        except Exception as error:  # what decoders raise for files that are not what they say is without end
            if name not in self._told:
                self._told.add(name)
                self.tell(f"Skipped {name}: {reason(error)}.")
            return None

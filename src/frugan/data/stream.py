"""Images read from shards as training goes: for data larger than the disk, in constant memory.

An epoch reads all shards in a new order, one after the other, in blocks of images; within a block they are shuffled. Where an
image comes in an epoch follows from the seed and the number of images alone, so that a training resumes at the image where it
stopped, and processes that share an epoch take every ``world``-th image each, without knowing of one another. An image that cannot
be read is named, and the one before it in its block stands in its place. Where the network or the system fails for a while, a shard
is opened again at the image where it stopped: no image is replaced for that.
"""

import io
import math
import re
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from frugan.data.decode import Pixels, background_colour, fit, flatten
from frugan.data.images import Source, Tell, is_image, loaded, reason, shown, stamp_of
from frugan.data.shards import TABLES, Archive, braced, file_in
from frugan.draws import Order, derive
from frugan.errors import UserError
from frugan.recipe import Data

BLOCK_BYTES = 32 << 20  # of decoded images that are shuffled among each other; two such blocks are held
WAITS = (1, 2, 4, 8, 16, 32)  # seconds between attempts to read a shard that the network or the system fails
AT_START = 3  # of them before a training begins: then somebody sits there
Item = tuple[str, bytes | str]  # what to call an image, and the file it is, or why there is none
T = TypeVar("T")


class Damaged(Exception):
    """A shard is not what it should be, however often it is read."""


class Unreachable(UserError):
    """A shard cannot be had now, and may be there later."""


# What trying again does not help against.
LASTING = (tarfile.TarError, Damaged, FileNotFoundError, PermissionError, ImportError, ValueError)


@dataclass(frozen=True)
class Shard:
    """A part of a data set that is read from its beginning.

    Args:
        name: of it.
        images: how many it has.
        read: gives its images in order, all but the first so many.
        problem: what a person should know of it.
    """

    name: str
    images: int
    read: Callable[[int], Iterator[Item]]
    problem: str = ""


def tar_shard(url: str) -> Shard:
    """A tar anywhere fsspec reaches, which is read through once to count its images.

    Raises:
        UserError: it cannot be read.
    """

    def count() -> tuple[int, bool]:
        images = 0
        with _opened(url) as archive:
            try:
                for member in archive:
                    images += member.isfile() and is_image(member.name)
            except tarfile.TarError:
                if not images:
                    raise
            return images, archive.whole

    def read(skip: int) -> Iterator[Item]:
        with _opened(url) as archive:
            for member in archive:
                if not (member.isfile() and is_image(member.name)):
                    continue
                if skip:
                    skip -= 1
                    continue
                file = archive.extractfile(member)
                yield f"{url}/{shown(member.name)}", file.read() if file else b""

    images, whole = _patiently(count, f"read the shard {url}")
    if not whole:  # the connection may have ended too early
        images, whole = max((images, whole), _patiently(count, f"read the shard {url}"))
    cut = "" if whole else f"{url} is cut short: {images} images before the cut are used; fetch it again for the rest."
    return Shard(url, images, read, cut)


@contextmanager
def _opened(url: str) -> Iterator[Archive]:
    import fsspec

    with fsspec.open(url, "rb") as file, Archive.open(fileobj=file, mode="r|*") as archive:
        yield archive


def table_shard(url: str, data: Data) -> Shard:
    """A parquet file anywhere fsspec reaches.

    Raises:
        UserError: it cannot be read, or has no column of images.
    """

    def opened() -> tuple[int, Any, str]:
        import datasets
        import fsspec
        from pyarrow import parquet

        datasets.disable_progress_bars()
        with fsspec.open(url, "rb") as file:
            count = parquet.ParquetFile(file).metadata.num_rows
        table = datasets.load_dataset("parquet", data_files=[url], split="train", streaming=True)
        column = data.image_column or next((c for c, k in table.features.items() if isinstance(k, datasets.Image)), "image")
        if column not in table.features:
            raise UserError(f"{url} has no column of images: name one of {', '.join(table.features)} with --image-column.")
        return count, table.select_columns([column]).cast_column(column, datasets.Image(decode=False)), column

    count, table, column = _patiently(opened, f"read the shard {url}")
    folders = [] if "://" in url else [Path(url).parent]

    def read(skip: int) -> Iterator[Item]:
        from pyarrow import ArrowInvalid

        try:
            for number, row in enumerate(table.skip(skip), skip):
                try:
                    content: bytes | str = file_in(row[column], folders)
                except (OSError, ValueError) as error:
                    content = reason(error)
                yield f"row {number} of {url}", content
        except ArrowInvalid as error:
            raise Damaged(reason(error)) from None

    return Shard(url, count, read)


def _patiently(attempt: Callable[[], T], what: str) -> T:
    """What ``attempt`` gives, tried again for some seconds where the network or the system fails.

    Raises:
        UserError: it fails for good; says that one cannot do ``what``.
    """
    for wait in (*WAITS[:AT_START], None):
        try:
            return attempt()
        except (UserError, MemoryError):
            raise
        except LASTING as error:
            raise UserError(f"cannot {what}: {_short(error)}.") from None
        except Exception as error:  # what networks, file systems and their drivers raise is without end
            why = _short(error)
        if wait is None:
            break
        time.sleep(wait)
    raise Unreachable(f"cannot {what} ({why}): check the connection, then run the same command again.")


def _short(error: Exception) -> str:
    return reason(error)[:200].rstrip(".")


class ShardSource(Source):
    """Shards that are read as training goes."""

    def __init__(self, name: str, shards: Sequence[Shard], problems: Sequence[str]) -> None:
        self.name, self.place, self.shards, self.problems = name, name, shards, problems
        self.grey = False  # unless --channels says so: to look at some would be to read them all
        self.stamp = stamp_of((shard.name, shard.images, 0) for shard in shards)

    def __len__(self) -> int:
        return sum(shard.images for shard in self.shards)

    def where(self, index: int) -> str:
        """Its number."""
        return f"image {index} of {self.name}"

    def open(self, index: int, at_least: int) -> Image.Image:
        """Never.

        Raises:
            UserError: always; streams are read in their own order.
        """
        raise UserError(f"{self.name} is a stream, which is only trained on: copy its shards here, and leave --stream out.")


def stream(data: Data) -> Source | None:
    """Shards by a URL or, with ``--stream``, by a path: tars or parquet, one, by a pattern, or all in a folder.

    Raises:
        UserError: they cannot be read, or are something else.
    """
    if not data.stream and "://" not in data.data:
        return None
    names, problems = _expanded(data.data)
    kinds = {Path(name).suffix for name in names}
    if not kinds or not kinds <= {".tar", ".gz", ".tgz", *TABLES}:
        raise UserError(f"{data.data} cannot be streamed: name tar or parquet shards, or leave --stream out.")
    shards = []
    for name in names:
        try:
            shards.append(table_shard(name, data) if Path(name).suffix in TABLES else tar_shard(name))
        except Unreachable:
            raise  # without it this would be another training
        except UserError as error:
            if len(names) == 1:
                raise
            problems.append(str(error))
    problems += [shard.problem for shard in shards if shard.problem]
    if not shards:
        raise UserError(f"none of the {len(names)} shards of {data.data} can be read: {problems[0]}")
    name = re.sub(r"[-_.]?[*?{\[].*$", "", Path(data.data).name).removesuffix(".tar") or Path(data.data).parent.name
    return ShardSource(name, shards, problems)


def _expanded(text: str) -> tuple[list[str], list[str]]:
    """The shards that ``text`` means, in the order of their names, and what is missing of them."""
    import fsspec

    if (numbered := braced(text)) is not None:
        there = [n for n in numbered if "://" in n or Path(n).is_file()]
        return there, [f"{n} is missing." for n in numbered if n not in there]
    if Path(text).is_dir():
        return sorted(str(p) for p in Path(text).iterdir() if p.suffix in (".tar", *TABLES)), []
    if any(c in text for c in "*?["):

        def listed() -> tuple[Any, list[str]]:
            system, path = fsspec.core.url_to_fs(text)
            return system, sorted(system.glob(path))

        system, found = _patiently(listed, f"list {text}")
        return [system.unstrip_protocol(p) if "://" in text else p for p in found], []
    return [text], []


def block_of(data: Data) -> int:
    """Images that `BLOCK_BYTES` hold."""
    return max(1, BLOCK_BYTES // math.prod(data.shape))


class StreamLoader:
    """The images of ``shards`` as ``data`` (resolved) wants them, as `frugan.data.loader.Loader` gives them.

    Args:
        shards: in any order that is always the same.
        data: how images are made to fit.
        seed: of their order.
        workers: threads that decode.
        tell: is called with each thing a person should know.
        rank: which of ``world`` processes this is: it gets the images whose number leaves ``rank`` when divided by ``world``.
        world: how many processes share the data.
        block: images that are shuffled among each other; None: as many as `BLOCK_BYTES` hold.
    """

    def __init__(
        self, shards: Sequence[Shard], data: Data, *, seed: int, workers: int, tell: Tell, rank: int = 0, world: int = 1,
        block: int | None = None,
    ) -> None:  # fmt: skip
        self.shards = [shard for shard in shards if shard.images]
        self.shape = data.shape
        self.background = background_colour(data.background)
        self.seed, self.rank, self.world, self.tell = seed, rank, world, tell
        self.length = sum(shard.images for shard in self.shards)
        if not self.length:
            raise UserError(f"none of the {len(shards)} shards has images.")
        self.fingerprint = stamp_of((shard.name, shard.images, 0) for shard in self.shards)
        self.block = min(self.length, block or block_of(data))
        self._told: set[str] = set()
        self._decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._blocks: dict[tuple[int, int], Future[dict[int, Pixels]]] = {}
        self._closing = threading.Event()
        self._stream: tuple[int, int, Generator[Item]] | None = None  # of which epoch, from which image on
        # All threads at once: each reserves its stack when it starts, which must not happen within a limit on memory.
        together = threading.Barrier(workers)
        list(self._decoders.map(lambda _: together.wait(), range(workers)))
        self._reader.submit(int).result()

    def __len__(self) -> int:
        """Images in an epoch."""
        return self.length

    def batch(self, first: int, count: int) -> Tensor:
        """Those of images ``first`` to ``first + count`` of the endless order that are this process's: uint8 ``[n, c, h, w]``."""
        return self.images(first, count)(first, count)

    def images(self, first: int, count: int) -> Callable[[int, int], Tensor]:
        """A batch to be read in pieces, ``(first, count)`` to uint8 ``[n, c, h, w]``."""
        rows = {p: self._image(p) for p in range(first, first + count) if p % self.world == self.rank}

        def piece(begin: int, number: int) -> Tensor:
            mine = [rows[p] for p in range(begin, begin + number) if p in rows]
            return torch.from_numpy(np.stack(mine)) if mine else torch.empty(0, *self.shape, dtype=torch.uint8)

        return piece

    def ahead(self, batch: int) -> int:
        """Bytes of the blocks that are held, and of the batch in use."""
        return (2 * self.block // self.world + batch) * math.prod(self.shape)

    def labels(self, first: int, count: int) -> Tensor | None:
        """None: streams have no classes."""
        return None

    def close(self) -> None:
        """Ends the threads."""
        self._closing.set()
        for pool in (self._reader, self._decoders):
            pool.shutdown(cancel_futures=True)

    def _image(self, position: int) -> Pixels:
        epoch, offset = divmod(position, self.length)
        key = (epoch, offset // self.block)
        if key not in self._blocks:
            self._blocks[key] = self._reader.submit(self._read, *key)
        try:
            found = self._blocks[key].result()[offset % self.block]
        except Exception:
            del self._blocks[key]  # to be read anew if it is asked for again
            raise
        if (after := self._after(key)) not in self._blocks:
            self._blocks = {key: self._blocks[key], after: self._reader.submit(self._read, *after)}
        return found

    def _after(self, key: tuple[int, int]) -> tuple[int, int]:
        epoch, block = key
        return (epoch, block + 1) if (block + 1) * self.block < self.length else (epoch + 1, 0)

    def _read(self, epoch: int, block: int) -> dict[int, Pixels]:
        """This process's images of a block, by their place in it."""
        begin = block * self.block
        count = min(self.block, self.length - begin)
        places = np.empty(count, np.int64)  # of the image that is read n-th
        places[Order(derive(self.seed, "block", epoch, block), count).read(0, count).numpy()] = np.arange(count)
        before, self._stream = self._stream, None  # what fails is not gone on with
        stream = before[2] if before and before[:2] == (epoch, begin) else self._from(epoch, begin)
        try:
            waiting: dict[int, Future[Pixels | None]] = {}
            for place in places.tolist():
                name, content = next(stream)
                if (epoch * self.length + begin + place) % self.world == self.rank:
                    waiting[place] = self._decoders.submit(self._decode, name, content)
                if len(waiting) % 64 == 0 and waiting:
                    next(reversed(waiting.values())).result()  # what is encoded does not gather
            decoded = {place: future.result() for place, future in waiting.items()}
        except BaseException:
            stream.close()
            raise
        self._stream = (epoch, begin + count, stream)
        good = next((pixels for pixels in decoded.values() if pixels is not None), None)
        if decoded and good is None:
            raise UserError(f"none of {len(decoded)} images in a row can be read, from {self.shards[0].name} on.")
        for place, pixels in decoded.items():
            decoded[place] = good = pixels if pixels is not None else good
        return {place: pixels for place, pixels in decoded.items() if pixels is not None}

    def _from(self, epoch: int, skip: int) -> Generator[Item]:
        """Every image of an epoch but the first ``skip``, from shard to shard."""
        order = Order(derive(self.seed, "shards", epoch), len(self.shards)).read(0, len(self.shards)).tolist()
        for number in order:
            shard = self.shards[number]
            if skip < shard.images:
                yield from self._whole(shard, skip)
            skip = max(0, skip - shard.images)

    def _whole(self, shard: Shard, given: int) -> Iterator[Item]:
        """Every image of ``shard`` but the first ``given``; where the network or the system fails, it is read on after a while.

        A shard that ends too early twice at the same image is cut short or damaged: its rest is named once, and images that cannot
        be read stand for it.
        """
        failed = 0  # attempts in a row that gave no image
        ended = None  # at which image it ended too early
        while given < shard.images:
            why = "it is cut short"
            try:
                for item in islice(shard.read(given), shard.images - given):
                    yield item
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
                    yield rest, why
                return
            ended = given

    def _wait(self, shard: Shard, error: Exception, failed: int) -> None:
        if failed == len(WAITS) or self._closing.is_set():
            raise UserError(
                f"cannot read on in {shard.name} ({_short(error)}), tried {failed + 1} times: check the connection, and that the "
                "shard is whole, then run the same command again, which goes on from the last checkpoint."
            ) from None
        if not failed:
            self.tell(f"{shard.name}: {_short(error)}; trying again.")
        self._closing.wait(WAITS[failed])

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

"""Shards that are read as training goes, by a path or a URL."""

import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from frugan.config.recipe import Data
from frugan.data.sources.base import Source, is_image, reason, shown, stamp_of
from frugan.data.sources.tables import TABLES, file_in
from frugan.data.sources.tars import Archive, braced
from frugan.utils.errors import UserError

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
            raise UserError(f"cannot {what}: {short(error)}.") from None
        except Exception as error:  # what networks, file systems and their drivers raise is without end
            why = short(error)
        if wait is None:
            break
        time.sleep(wait)
    raise Unreachable(f"cannot {what} ({why}): check the connection, then run the same command again.")


def short(error: Exception) -> str:
    """Why, in a few words."""
    return reason(error)[:200].rstrip(".")


class ShardSource(Source):
    """Shards that are read as training goes."""

    random_access = False

    def __init__(self, name: str, shards: Sequence[Shard], problems: Sequence[str]) -> None:
        self.name, self.place, self.shards, self.problems = name, name, shards, problems
        self.grey = False  # unless --channels says so: to look at some would be to read them all
        self.stamp = stamp_of((shard.name, shard.images, 0) for shard in shards)

    def __len__(self) -> int:
        return sum(shard.images for shard in self.shards)

    def where(self, index: int) -> str:
        """Names image ``index`` by its number in the source."""
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

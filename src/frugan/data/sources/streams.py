"""Shards that are read as training goes, by a path or a URL."""

import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from frugan.config.recipe import Data
from frugan.data.sources.base import Labels, Source, by_folder, by_name, is_image, reason, shown, stamp_of
from frugan.data.sources.tables import TABLES, file_in, label_column
from frugan.data.sources.tars import SAYING, Archive, braced, key_of, label_in
from frugan.utils.errors import UserError, counted

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
        values: what each image says is its class, or None.
        folders: where each image lies in it.
        names: of the classes, in their order, if it knows that.
        labels: the class of each image, int32 ``[images]``; None: there are none.
    """

    name: str
    images: int
    read: Callable[[int], Iterator[Item]]
    problem: str = ""
    values: Sequence[str | None] = ()
    folders: Sequence[str] = ()
    names: Sequence[str] = ()
    labels: NDArray[np.int32] | None = None


def tar_shard(url: str, label: str | None = None) -> Shard:
    """A tar anywhere fsspec reaches, which is read through once to count its images and to learn their classes.

    The class of an image stands in a member of the same name beside it (`label_in`), else the folders say.

    Raises:
        UserError: it cannot be read.
    """

    def count() -> tuple[list[str | None], list[str], bool]:
        values: list[str | None] = []  # of all images
        folders: list[str] = []
        sample, begin, said = "", 0, None  # the one at hand: its name, its first image, its class
        with _opened(url) as archive:
            try:
                for member in archive:
                    if not member.isfile():
                        continue
                    if (key := key_of(member.name)) != sample:
                        sample, begin, said = key, len(values), None
                    if is_image(member.name):
                        values.append(said)
                        folders.append(sys.intern(member.name.rpartition("/")[0]))
                    elif member.name.endswith(SAYING) and (value := label_in(archive, member, label or "label")) is not None:
                        said = sys.intern(value)
                        values[begin:] = [said] * (len(values) - begin)
            except tarfile.TarError:
                if not values:
                    raise
            return values, folders, archive.whole

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

    values, folders, whole = _patiently(count, f"read the shard {url}")
    if not whole:  # the connection may have ended too early
        before, again = (values, folders, whole), _patiently(count, f"read the shard {url}")
        values, folders, whole = max(before, again, key=lambda found: (len(found[0]), found[2]))
    images = len(values)
    cut = (
        "" if whole else f"{url} is cut short: {counted(images, 'image')} before the cut can be used; fetch it again for the rest."
    )
    return Shard(url, images, read, cut, values, folders)


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

    def opened() -> tuple[list[str | None], Sequence[str], Any, str]:
        import datasets
        import fsspec
        from pyarrow import parquet

        datasets.disable_progress_bars()
        table = datasets.load_dataset("parquet", data_files=[url], split="train", streaming=True)
        column = data.image_column or next((c for c, k in table.features.items() if isinstance(k, datasets.Image)), "image")
        if column not in table.features:
            raise UserError(f"{url} has no column of images: name one of {', '.join(table.features)} with --image-column.")
        label = label_column(table.features, url, data)
        names = getattr(table.features.get(label), "names", ())
        with fsspec.open(url, "rb") as file:
            shard = parquet.ParquetFile(file)
            found = shard.read(columns=[label]).column(label).to_pylist() if label else [None] * shard.metadata.num_rows
        if names:
            values = [names[v] if v is not None and 0 <= v < len(names) else None for v in found]
        else:
            values = [None if v is None else sys.intern(str(v)) for v in found]
        return values, names, table.select_columns([column]).cast_column(column, datasets.Image(decode=False)), column

    values, names, table, column = _patiently(opened, f"read the shard {url}")
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

    return Shard(url, len(values), read, values=values, names=names)


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
    unused = ("split",)

    def __init__(self, name: str, shards: Sequence[Shard], problems: Sequence[str]) -> None:
        self.name, self.place, self.problems = name, name, problems
        self.classes, self.labels, self.unlabelled = _labels(shards)
        ends = np.cumsum([shard.images for shard in shards])
        of = [None] * len(shards) if self.labels is None else np.split(self.labels.astype(np.int32), ends[:-1])
        self.shards = [replace(s, values=(), folders=(), labels=labels) for s, labels in zip(shards, of, strict=True)]
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


def _labels(shards: Sequence[Shard]) -> Labels:
    """The classes of all images of ``shards``: as they say themselves, else by their folders."""
    values = [value for shard in shards for value in shard.values]
    ends = [*accumulate(shard.images for shard in shards)]

    def without(image: int) -> str:
        of = next(i for i, end in enumerate(ends) if image < end)
        place = f"image {image - ends[of] + shards[of].images} of {shards[of].name}"
        return f"{place} has none, as {values.count(None):,} of {len(values):,} images"

    names = {*map(tuple, (shard.names for shard in shards))}
    found = by_name(values, without, names.pop() if len(names) == 1 else ())
    folders = [folder for shard in shards for folder in shard.folders]
    if found.labels is not None or len(folders) != len(values):
        return found
    there = sorted({*folders})
    classes, numbers, _ = by_folder([f"{folder}/image" for folder in there])
    if numbers is None:
        return found
    number = dict(zip(there, numbers.tolist(), strict=True))
    return Labels(classes, np.array([number[folder] for folder in folders], np.int64))


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
            shards.append(table_shard(name, data) if Path(name).suffix in TABLES else tar_shard(name, data.label_column))
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

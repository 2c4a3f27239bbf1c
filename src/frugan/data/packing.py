"""Making packs (`frugan.data.pack`) of sources, in the cache or where one wants them."""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout

from frugan.config.recipe import Data
from frugan.data.decode import Pixels, background_colour
from frugan.data.pack import CHECKED, VERSION, Manifest, Pack
from frugan.data.sources.base import ArraySource, Source, Tell, reason
from frugan.utils.errors import UserError, counted
from frugan.utils.files import cache_folder, sweep
from frugan.utils.units import size as in_words

NAMED = 1000  # bad files whose names a manifest keeps
AHEAD_BYTES = 64 << 20  # of images that are decoded before the first of them is written
PIECE_BYTES = 1 << 20  # of images that one thread decodes at a time, and at most
PIECE = 16  # so many
COPIED = 4096  # images that need no decoding, copied at a time

T = TypeVar("T")
Progress = Callable[[int, int], None]


def packed(source: Source, data: Data, *, workers: int, tell: Tell, progress: Progress | None = None) -> Pack:
    """The pack of ``source`` as ``data`` (resolved) wants it, from the cache, or made now; runs that want the same share it.

    Raises:
        UserError: no image can be read, or the disk is full; or ``source`` is a pack, and damaged.
    """
    for problem in source.problems:
        tell(problem)
    if source.pack is not None:
        source.pack.check(CHECKED)
        return source.pack
    wanted = json.dumps(
        [VERSION, source.place, source.name, *data.shape, data.background, data.split, data.image_column, data.label_column]
    )
    folder = cache_folder() / "packs" / f"{source.name}-{hashlib.sha256(wanted.encode(errors='surrogateescape')).hexdigest()[:16]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent, ".*.part")
        with _lock(folder):
            if folder.exists():
                try:
                    pack = Pack(folder)
                    if pack.manifest.stamp == source.stamp:
                        pack.check(CHECKED)
                        if pack.manifest.skipped:
                            name, why = next(iter(pack.manifest.reasons.items()))
                            tell(f"Packing skipped {counted(pack.manifest.skipped, 'image')}, {name} for one: {why}.")
                            _say_lost(source, pack, tell)
                        return pack
                    tell(f"{source.name} has changed since it was packed: packing it anew.")
                except UserError as error:
                    tell(f"{str(error).removesuffix('.')}, which is done now.")
            return _make(source, data, folder, workers, tell, progress)
    except OSError as error:
        raise _unwritable(folder, error) from None


def make(source: Source, data: Data, folder: Path, *, workers: int, tell: Tell, progress: Progress | None = None) -> Pack:
    """Packs ``source`` into ``folder``, which is replaced when everything is written; the same bytes however many ``workers``.

    Raises:
        UserError: no image can be read, or ``folder`` cannot be written, or another process is writing it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder).acquire(blocking=False):
            return _make(source, data, folder, workers, tell, progress)
    except Timeout:
        raise UserError(f"another process is packing into {folder}: wait for it, or give another --out.") from None
    except OSError as error:
        raise _unwritable(folder, error) from None


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def _make(source: Source, data: Data, folder: Path, workers: int, tell: Tell, progress: Progress | None) -> Pack:
    """Packs ``source``; ``folder`` is locked."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    try:
        part.mkdir(parents=True)
        needed, left = len(source) * math.prod(data.shape), shutil.disk_usage(part).free
        if needed > left:
            raise UserError(
                f"packing {source.name} takes {in_words(needed)}, and {in_words(left)} are free in {folder.parent}: set "
                "FRUGAN_CACHE to a folder on a larger disk, or use a smaller --image-size."
            )
        manifest = _write(source, data, part, workers, tell, progress)
        with (part / "manifest.json").open("w") as file:
            json.dump(asdict(manifest), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    pack = Pack(folder)
    _say_lost(source, pack, tell)
    return pack


def none_of(source: Source) -> str:
    """All images of ``source``, as a sentence begins that says what none of them can."""
    return f"none of the {len(source):,} images of {source.name}" if len(source) > 1 else f"not even the one image of {source.name}"


def _say_lost(source: Source, pack: Pack, tell: Tell) -> None:
    """Names the classes none of whose images could be read."""
    there = pack.labels(np.arange(len(pack))) if pack.manifest.skipped else None
    if there is not None and source.labels is not None:
        for number in np.setdiff1d(source.labels, there):
            tell(f"No image of class {source.classes[number]} can be read: nothing is learnt of it.")


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the pack {folder}: {error.strerror or error}; FRUGAN_CACHE names another place for packs.")


def _write(source: Source, data: Data, part: Path, workers: int, tell: Tell, progress: Progress | None) -> Manifest:
    channels, size, _ = data.shape
    background = background_colour(data.background)
    row_bytes = math.prod(data.shape)
    threads = 1 if isinstance(source, ArraySource) else workers  # small arrays are mostly work for Python
    digest = hashlib.sha256()
    checksum = labels_checksum = 0
    reasons: dict[str, str] = {}
    written = skipped = 0
    small: str | None = None

    def decode(index: int) -> tuple[Pixels, bool] | str:
        try:
            return source.pixels(index, size, channels, background)
        except MemoryError:
            raise
        except Exception as error:  # what decoders raise for files that are not what they say is without end
            return reason(error)

    with (part / "pixels.bin").open("wb") as pixels, (part / "labels.bin").open("wb") as classes:
        if isinstance(source, ArraySource) and source.fits(data):  # nothing to decode
            for begin in range(0, len(source), COPIED):
                rows = np.ascontiguousarray(source.images[begin : begin + COPIED]).data
                digest.update(rows)
                checksum = zlib.crc32(rows, checksum)
                pixels.write(rows)
            if source.labels is not None:
                classes.write(whole := source.labels.astype("<i8").data)
                labels_checksum = zlib.crc32(whole)
            written = len(source)
        for index, decoded in enumerate(in_order(decode, 0 if written else len(source), threads, row_bytes)):
            if isinstance(decoded, str):
                skipped += 1
                if skipped <= NAMED:
                    reasons[source.where(index)] = decoded
                    tell(f"Skipped {source.where(index)}: {decoded}.")
            else:
                image, enlarged = decoded
                small = source.where(index) if enlarged and small is None else small
                row = np.ascontiguousarray(image).data
                digest.update(row)
                checksum = zlib.crc32(row, checksum)
                pixels.write(row)
                if source.labels is not None:
                    label = int(source.labels[index]).to_bytes(8, "little", signed=True)
                    labels_checksum = zlib.crc32(label, labels_checksum)
                    classes.write(label)
                written += 1
            if progress:
                progress(index + 1, len(source))
        if not written:
            first = "".join(f", {name} for one: {why}" for name, why in list(reasons.items())[:1])
            raise UserError(f"{none_of(source)} can be read{first}.")
        for file in (pixels, classes):
            file.flush()
            os.fsync(file.fileno())
    if skipped:
        tell(f"{skipped} of {counted(len(source), 'image')} {'was' if skipped == 1 else 'were'} skipped.")
    return Manifest(
        source.name, source.stamp, written, channels, size, data.background, list(source.classes), source.labels is not None,
        digest.hexdigest(), skipped, reasons, small, checksum, labels_checksum,
    )  # fmt: skip


def in_order(function: Callable[[int], T], count: int, workers: int, each: int) -> Iterator[T]:
    """``function`` of 0 to ``count``, in order, by threads that run ahead of what is asked for by little.

    Pillow's decoders let go of the interpreter, and threads cost no second copy of the process. A result has ``each`` bytes.
    """
    size = max(1, min(PIECE, PIECE_BYTES // each))
    ahead = max(2 * workers, AHEAD_BYTES // (size * each))

    def piece(begin: int) -> list[T]:
        return [function(i) for i in range(begin, min(begin + size, count))]

    begins = iter(range(0, count, size))
    waiting: deque[Future[list[T]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            while True:
                while len(waiting) < ahead and (begin := next(begins, None)) is not None:
                    waiting.append(pool.submit(piece, begin))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

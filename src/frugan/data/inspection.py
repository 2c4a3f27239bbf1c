"""What is there, before one trains on it: how many images, how large, of which kinds, which twice, and which cannot be read."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from frugan.config.recipe import Data
from frugan.data.decode import Pixels, background_colour, fit, flatten, is_grey
from frugan.data.packing import Progress, in_order
from frugan.data.sources.base import Source, reason

SHOWN = 64  # images on the contact sheet
WHOLE = 1 << 20  # pixels that no image has: none is decoded smaller than it is


@dataclass(frozen=True)
class Looked:
    """One image that can be read."""

    size: tuple[int, int]
    mode: str
    grey: bool
    digest: int
    pixels: Pixels | None


@dataclass
class Report:
    """What was found.

    Args:
        images: how many can be read.
        unreadable: names, and why not.
        sizes: width and height, and how often.
        modes: Pillow's names, and how often.
        grey: how many have no colour in them.
        classes: names, and how often.
        duplicates: names of images that look the same once cropped and resized, the first of them first.
        small: how many are smaller than the target.
        cropped: mean share of an image that the middle square leaves out.
        shown: some of the images as training sees them, uint8 ``[c, h, w]`` each.
    """

    images: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    grey: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    duplicates: list[list[str]] = field(default_factory=list)
    small: int = 0
    cropped: float = 0.0
    shown: list[Pixels] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, without the pictures."""
        values = {k: v for k, v in vars(self).items() if k != "shown"}
        return values | {"sizes": [[*size, count] for size, count in self.sizes.most_common()]}


def check(source: Source, data: Data, *, workers: int, progress: Progress | None = None) -> Report:
    """Reads every image of ``source`` once, with few in memory at a time; ``data`` (resolved) says how they are made to fit."""
    channels, target, _ = data.shape
    background = background_colour(data.background)
    chosen = set(np.linspace(0, len(source) - 1, min(len(source), SHOWN)).astype(int).tolist())
    digests = np.zeros(len(source), np.uint64)
    good = np.zeros(len(source), bool)
    report = Report()

    def look(index: int) -> Looked | str:
        try:
            with source.open(index, WHOLE) as opened:
                size, mode = opened.size, opened.mode
                flat = flatten(opened, background)
                pixels = fit(flat, target, channels)
                digest = int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest())
                return Looked(size, mode, is_grey(flat), digest, pixels if index in chosen else None)
        except MemoryError:
            raise
        except Exception as error:  # whatever decoders raise
            return reason(error)

    for index, found in enumerate(in_order(look, len(source), workers, channels * target**2)):
        if isinstance(found, str):
            report.unreadable[source.where(index)] = found
        else:
            report.images += 1
            report.sizes[found.size] += 1
            report.modes[found.mode] += 1
            report.grey += found.grey
            report.small += min(found.size) < target
            report.cropped += 1 - min(found.size) / max(found.size)
            if source.labels is not None:
                report.classes[source.classes[int(source.labels[index])]] += 1
            if found.pixels is not None:
                report.shown.append(found.pixels)
            digests[index], good[index] = found.digest, True
        if progress:
            progress(index + 1, len(source))
    report.cropped /= max(1, report.images)
    report.duplicates = _twice(digests, good, source)
    return report


def _twice(digests: np.ndarray[Any, Any], good: np.ndarray[Any, Any], source: Source) -> list[list[str]]:
    numbers = np.flatnonzero(good)
    order = numbers[np.argsort(digests[numbers], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(digests[order])) + 1) if len(order) else []
    return sorted([source.where(int(i)) for i in group] for group in groups if len(group) > 1)

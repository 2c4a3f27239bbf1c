"""Sliced Wasserstein distance of patches (Karras et al. 2018, "Progressive growing", section 5): needs no network.

Images become Laplacian pyramids (Burt and Adelson 1983), from the largest power of two in their size down to 16 pixels; each level
says how the images look at one scale. Of a level, patches of 7x7 pixels at random places are compared: projected on random
directions and sorted, the nearer two sets are, the less their numbers differ.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from frugan.evaluation.families.base import Family, Metric, Options, folder
from frugan.evaluation.features import Features
from frugan.utils.draws import Draws, derive

SIDE = 7  # pixels of a patch
SMALLEST = 16  # pixels of the last level
DESCRIPTORS = 65_536  # patches of a level, of all images together
PIECE = 1 << 20  # numbers of the largest level at once: 4 MiB, and a few times that while a pyramid is built
BLOCK = 8192  # patches that are read at once
DIRECTIONS = 16  # on which patches are projected at once


class Patches:
    """Patches of a set of images, in temporary files: whatever the number of images, the same number of patches.

    Which patches an image gives depends on the seed, its number and the number of images, not on how they are cut into batches. Two
    sets that are to be compared may differ in their numbers of images.

    Args:
        size: side of the images, at least 7 pixels.
        channels: 1 or 3.
        images: how many there will be.
        seed: of the places.
        folder: where the files lie (`Features`); ``descriptors * channels * 196`` bytes a level.
        descriptors: patches of each level.
    """

    def __init__(
        self, size: int, channels: int, images: int, seed: int = 0, *, folder: Path | None = None, descriptors: int = DESCRIPTORS
    ) -> None:
        if size < SIDE or images < 1:
            raise ValueError(f"patches need images of at least {SIDE} pixels, and at least one: not {images} of {size}.")
        self.size = size
        self.channels = channels
        self.images = images
        self.descriptors = descriptors
        largest = 1 << (size.bit_length() - 1) if size >= SMALLEST else size
        self.levels = {level: Features(folder) for level in _halves(largest)}
        self._draws = Draws(seed)
        self._added = 0

    @property
    def complete(self) -> bool:
        """Whether all images have come."""
        return self._added == self.images

    def add(self, first: int, images: Tensor) -> None:
        """Takes in images ``first`` to ``first + n``, each once: uint8 ``[n, c, size, size]``."""
        if images.shape[1:] != (self.channels, self.size, self.size) or images.dtype != torch.uint8:
            raise ValueError(
                f"{self.channels} x {self.size} x {self.size} bytes an image were announced, not {tuple(images.shape)}."
            )
        if first + len(images) > self.images:
            raise ValueError(f"{self.images} images were announced, and number {first + len(images)} has come.")
        self._added += len(images)
        for piece in torch.split(images, max(1, PIECE // (self.channels * self.size**2))):
            self._extract(first, piece.to("cpu", torch.float32))
            first += len(piece)

    def close(self) -> None:
        """Deletes the patches."""
        for store in self.levels.values():
            store.close()

    def _extract(self, first: int, images: Tensor) -> None:
        ends = torch.arange(first, first + len(images) + 1) * self.descriptors // self.images
        begin, counts = int(ends[0]), ends.diff()
        owner = torch.arange(len(images)).repeat_interleave(counts)
        if not len(owner):
            return
        for level, band in zip(self.levels, pyramid(images, list(self.levels)), strict=True):
            places = self._draws.uniform(f"patches/{level}", begin, len(owner), 2).mul_(level - SIDE + 1).long()
            windows = band.unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # a view: [n, c, places, places, 7, 7]
            self.levels[level].put(begin, windows[owner, :, places[:, 0], places[:, 1]].flatten(1))


def _halves(largest: int) -> Iterator[int]:
    yield largest
    while (largest := largest // 2) >= SMALLEST:
        yield largest


def pyramid(images: Tensor, levels: list[int]) -> Iterator[Tensor]:
    """The Laplacian pyramid of float32 ``[n, c, h, w]``: what each level adds to the next, and the last one as it is."""
    if images.shape[-1] != levels[0]:
        images = functional.interpolate(images, (levels[0], levels[0]), mode="bilinear", antialias=True)
    for _ in levels[1:]:
        smaller = _blur(images)[..., ::2, ::2]
        spread = torch.zeros_like(images)
        spread[..., ::2, ::2] = smaller
        yield images - _blur(spread) * 4
        images = smaller
    yield images


def _blur(images: Tensor) -> Tensor:
    """The binomial filter of five pixels, both ways. Sums of shifted images, not a convolution: their rounding knows no batch."""
    x = functional.pad(images, (2, 2, 2, 2), mode="reflect")
    for dim in (-1, -2):
        n = x.shape[dim] - 4
        a, b, c, d, e = (x.narrow(dim, i, n) for i in range(5))
        x = ((a + e) + (b + d) * 4 + c * 6) / 16
    return x


def swd(a: Patches, b: Patches, *, directions: int = 512, chunk: int = 64, seed: int = 0) -> dict[int, float]:
    """Sliced Wasserstein distance times 1000 by level, the largest first; their mean is the one number.

    Args:
        a: one set, complete.
        b: the other, of images of the same shape and with as many patches.
        directions: how many random directions patches are projected on.
        chunk: directions at once; memory is that of a ``[chunk, descriptors]`` of float32 for each set.
        seed: of the directions.
    """
    if (a.size, a.channels, a.descriptors) != (b.size, b.channels, b.descriptors):
        raise ValueError("two sets of patches can be compared if images have one shape and the sets as many patches.")
    if not a.complete or not b.complete:
        raise ValueError("some of the images that were announced for patches have not come.")
    return {level: 1000 * _level(a, b, level, directions, chunk, seed) for level in a.levels}


def _level(a: Patches, b: Patches, level: int, directions: int, chunk: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(derive(seed, "directions", level))
    all_directions = torch.randn(directions, a.channels * SIDE**2, generator=generator)
    all_directions /= all_directions.norm(dim=1, keepdim=True)
    sets = [(store, *_spread(store, a.channels)) for store in (a.levels[level], b.levels[level])]
    total = 0.0
    for some in torch.split(all_directions, chunk):
        ours, theirs = (_sorted_projections(*one, some) for one in sets)
        ours -= theirs
        total += float(np.abs(ours, out=ours).sum(dtype=np.float64))
    return total / (directions * a.descriptors)


def _spread(store: Features, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all patches: float32 ``[channels, 1]``."""
    count = len(store) * SIDE**2
    mean, square = torch.zeros(2, channels, 1, dtype=torch.float64)
    for block in _blocks(store, channels):
        mean += block.double().sum((0, 2), keepdim=True)[0] / count
    for block in _blocks(store, channels):
        square += (block.double() - mean).square().sum((0, 2), keepdim=True)[0] / count
    deviation = square.sqrt()
    deviation[deviation == 0] = 1  # of one colour all over
    return mean.float(), deviation.float()


def _sorted_projections(store: Features, mean: Tensor, deviation: Tensor, directions: Tensor) -> NDArray[np.float32]:
    """float32 ``[directions, n]``, each row in ascending order."""
    projections, begin = np.empty((len(directions), len(store)), np.float32), 0
    for block in _blocks(store, len(mean)):
        projections[:, begin : begin + len(block)] = directions @ ((block - mean) / deviation).flatten(1).T
        begin += len(block)
    projections.sort(axis=1)
    return projections


def _blocks(store: Features, channels: int) -> Iterator[Tensor]:
    for begin in range(0, len(store), BLOCK):
        yield store.read(begin, begin + BLOCK).view(-1, channels, SIDE**2)


class PatchesFamily(Family[Patches]):
    """Sliced Wasserstein distance of patches, the mean over the levels."""

    name = "patches"
    metrics: ClassVar = {"swd": Metric("Sliced Wasserstein distance", False, 2, "of patches at several sizes, times 1000")}

    @classmethod
    def automatic(cls, options: Options) -> bool:
        """Always: nothing needs to be downloaded."""
        return True

    def new(self, images: int) -> Patches:
        """As `Family` says."""
        channels, size, _ = self.task.data.shape
        return Patches(size, channels, images, folder=folder())

    def compared(self, real: Patches, fake: Patches) -> dict[str, float]:
        """As `Family` says."""
        levels = swd(real, fake, chunk=DIRECTIONS)
        return {"swd": sum(levels.values()) / len(levels)}

    def needs(self) -> int:
        """As `Family` says."""
        projected = 2 * 4 * DIRECTIONS * DESCRIPTORS
        read = 8 * BLOCK * 8 * self.task.data.shape[0] * SIDE**2
        return projected + read + self.task.piece_bytes + (32 << 20)

    def protocol(self) -> str:
        """As `Family` says."""
        return f"{DESCRIPTORS:,} patches of {SIDE}x{SIDE} a level"

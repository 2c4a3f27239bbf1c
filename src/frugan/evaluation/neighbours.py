"""How near samples lie to the real images, seen from afar: nearer than those lie to one another is learnt by heart."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

SIDE = 16  # pixels to which images are averaged: what is left is what a person sees from afar
NEAR = 0.35  # of the distance between a real image and its nearest: nearer than chance
FEW = 1000  # real images below which a generator can know them all by heart, so that it is always measured


def thumbnails(images: Tensor) -> Tensor:
    """uint8 ``[n, c, h, w]`` averaged to `SIDE` pixels at most: float32 ``[n, c * side * side]`` in [0, 1]."""
    side = min(SIDE, images.shape[-1])
    return adaptive_avg_pool2d(images.cpu().float().div_(255), side).flatten(1)


def nearest(rows: Tensor, pieces: Iterable[tuple[int, Tensor]], *, others: bool = False) -> tuple[Tensor, Tensor]:
    """Distance to, and number of, the nearest of others to each of ``rows``.

    Args:
        rows: float32 ``[n, d]``.
        pieces: the others, each piece ``[m, d]`` with the number of its first.
        others: whether only those count that differ from a row.

    Returns:
        float32 ``[n]``, infinite where there is none, and int64 ``[n]``.
    """
    best = torch.full((len(rows),), torch.inf)
    which = torch.zeros(len(rows), dtype=torch.int64)
    for first, piece in pieces:
        distances = torch.cdist(rows, piece, compute_mode="donot_use_mm_for_euclid_dist")
        if others:
            distances[distances == 0] = torch.inf
        found = distances.min(1)
        closer = found.values < best
        best, which = torch.where(closer, found.values, best), torch.where(closer, found.indices + first, which)
    return best, which


def compared(samples: Tensor, real: Tensor, piece: int = 512) -> dict[str, float]:
    """How near ``samples`` ``[n, d]`` lie to ``real`` ones ``[m, d]``, both as `thumbnails` gives them.

    Returns:
        ``nearest``: the distance of a sample from its nearest real image, divided by that image's distance from its own nearest
        other, the median of all samples: one more real image would lie at about 1; NaN if all images are the same.
        ``copies``: the share of samples for which this is below `NEAR`.
    """

    def pieces() -> Iterable[tuple[int, Tensor]]:
        return ((first, real[first : first + piece]) for first in range(0, len(real), piece))

    distances, which = nearest(samples, pieces())
    usual, _ = nearest(real, pieces(), others=True)  # an image may be there twice
    known = usual.isfinite()  # all or none
    # Of each image by itself: blurred samples are near to plain images, which are near to one another.
    ratios = distances / usual[which]
    return {
        "nearest": float(ratios.median()) if known.all() else torch.nan,
        "copies": float((distances <= NEAR * usual.where(known, 0)[which]).float().mean()),
    }

"""Nearest neighbours from afar: whether the real images were learnt by heart. Taken by itself where there are few of them."""

from typing import ClassVar

import torch
from torch import Tensor

from frugan.evaluation.families.base import Family, Metric, Options
from frugan.evaluation.neighbours import FEW, NEAR, SIDE, compared, thumbnails


class Afar:
    """Thumbnails of a set of so many images."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.rows = torch.zeros(0, 0)

    def add(self, first: int, images: Tensor) -> None:
        """As `Seen` says."""
        small = thumbnails(images)
        if not self.rows.numel():
            self.rows = small.new_zeros(self.images, small.shape[1])
        self.rows[first : first + len(small)] = small


class NeighboursFamily(Family[Afar]):
    """How near samples lie to the real images."""

    name = "neighbours"
    metrics: ClassVar = {
        "nearest": Metric(
            "Distance to the nearest real image", None, 3, "about 1 for one more real image, far below 1 learnt by heart"
        ),
        "copies": Metric("Copies", False, 3, "share of samples that are nearly a real image"),
    }

    @classmethod
    def automatic(cls, options: Options) -> bool:
        """Where there are few real images."""
        return 0 < options.among < FEW

    def new(self, images: int) -> Afar:
        """As `Family` says."""
        return Afar(images)

    def compared(self, real: Afar, fake: Afar) -> dict[str, float]:
        """As `Family` says."""
        return compared(fake.rows, real.rows)

    def needs(self) -> int:
        """As `Family` says."""
        row = 4 * self.task.data.shape[0] * SIDE**2
        return 2 * row * self.task.reals + 16 * 512 * self.task.reals + self.task.piece_bytes

    def protocol(self) -> str:
        """As `Family` says."""
        return f"neighbours at {SIDE}x{SIDE}, copies below {NEAR} of a real image's distance from its nearest"

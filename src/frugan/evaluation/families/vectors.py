"""Families with one vector of features an image: Frechet distance, precision and recall, and a cache for the real images."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from frugan.evaluation.distances import InceptionScore, Moments, frechet, precision_recall, too_few
from frugan.evaluation.families.base import PIECE, Family, folder
from frugan.evaluation.features import Features
from frugan.utils import checkpoint
from frugan.utils.errors import UserError

BLOCK = 512  # rows of features whose distances are held at once


@dataclass
class Vectors:
    """The features of a set of images.

    Args:
        look: as `VectorFamily.look`.
        rows: where features are put.
        score: of the logits, if it is wanted.
        classes: how many there are, if they are counted.
    """

    look: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    rows: Features
    score: InceptionScore | None = None
    classes: int = 0
    moments: Moments = field(default_factory=Moments)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.classes, dtype=torch.int64)
        self.taken: list[Tensor] = []  # for which class each image was, if they are counted

    def add(self, first: int, images: Tensor) -> None:
        """As `Seen` says."""
        count = len(images)
        if count < PIECE:  # a network that meets a new shape takes more memory
            images = torch.cat([images, images[-1:].expand(PIECE - count, -1, -1, -1)])
        features, second = self.look(images)
        self.moments.add(features[:count])
        self.rows.put(first, features[:count])
        if self.score is not None and second is not None:
            self.score.add(second[:count])
        if self.classes and second is not None:
            self.counts += torch.bincount(second[:count], minlength=self.classes)
            self.taken.append(second[:count])


class VectorFamily(Family[Vectors]):
    """One vector of features an image, by a network for example; they lie in files, so that memory does not grow with the images.

    Attributes:
        frechet: the name of the Frechet distance.
        neighbours: the names of precision and recall, if they are taken.
        width: of the features.
    """

    loads = True
    frechet: ClassVar[str]
    neighbours: ClassVar[tuple[str, ...]] = ()
    width: int

    @abstractmethod
    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of uint8 images ``[PIECE, c, h, w]``.

        Returns:
            Features, float32 ``[PIECE, width]``, and logits ``[PIECE, k]``, classes int64 ``[PIECE]`` or None; all on the CPU.
        """

    @abstractmethod
    def key(self) -> list[str]:
        """What, besides the images, decides the features: those of real images are kept by it."""

    def new(self, images: int) -> Vectors:
        """As `Family` says."""
        return Vectors(self.look, Features(folder()))

    def compared(self, real: Vectors, fake: Vectors) -> dict[str, float]:
        """As `Family` says."""
        values: dict[str, float] = {}
        if self.frechet in self.task.wanted:
            values[self.frechet] = frechet(real.moments, fake.moments)
        if self.task.wanted & {*self.neighbours}:
            both = precision_recall(real.rows, fake.rows, chunk=BLOCK)
            values |= zip(self.neighbours, both, strict=True)
        return values

    def notices(self) -> Iterable[str]:
        """As `Family` says."""
        if self.frechet in self.task.wanted and (few := too_few(self.task.reals, self.width)):
            yield few

    def remembered(self) -> Vectors | None:
        """As `Family` says."""
        file = self._file()
        try:
            tensors, state = checkpoint.load(file.with_suffix(".safetensors"))
            seen = self.new(self.task.reals)
            seen.rows = Features.open(file, len(tensors["mean"]))
        except (UserError, LookupError, ValueError):  # not there yet, or damaged
            return None
        seen.moments, seen.counts = Moments.from_dict(tensors), tensors["classes"]
        return seen if seen.rows.sha256() == state.get("sha256") else None

    def remember(self, real: Vectors) -> None:
        """As `Family` says."""
        file = self._file()
        real.rows.save(file)
        tensors = real.moments.as_dict() | {"classes": real.counts}
        checkpoint.save(file.with_suffix(".safetensors"), tensors, {"sha256": real.rows.sha256()})  # last: now all is there

    def _file(self) -> Path:
        about = [self.task.data.fingerprint, str(self.task.reals), self.name, *self.key()]
        return folder() / f"{hashlib.sha256('/'.join(about).encode()).hexdigest()[:24]}.rows"

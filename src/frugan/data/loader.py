"""What training, evaluation and diagnostics take images from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Images = Callable[[int, int], Tensor]  # (first, count) to uint8 images [count, c, h, w]
Labels = Callable[[int, int], Tensor | None]  # (first, count) to their classes, int64 [count], or None if there are none


def unlabelled(first: int, count: int) -> None:
    """The labels of images that have none."""


@dataclass(frozen=True)
class Batch:
    """A batch to be read in pieces, by the number of images seen before each and its length: their images and their classes."""

    images: Images
    labels: Labels = unlabelled


class Loader(Protocol):
    """Batches of uint8 images by the number of images seen: epoch after epoch is one endless order, and a batch a slice of it.

    Attributes:
        shape: channels, height and width of an image.
        fingerprint: of all images, as they are.
        random_access: whether images can be asked for in any order, again and again.
        at_hand: the first so many images can be asked for again and again, at little cost: all, if there is random access.
    """

    shape: tuple[int, int, int]
    fingerprint: str
    random_access: bool

    @property
    def at_hand(self) -> int:
        """As the class says."""

    def __len__(self) -> int:
        """Images in an epoch."""

    def batch(self, first: int, count: int) -> Tensor:
        """Images ``first`` to ``first + count`` of the endless order: uint8 ``[count, c, h, w]``."""

    def pieces(self, first: int, count: int) -> Batch:
        """The same images, with their classes, to be read in pieces."""

    def labels(self, first: int, count: int) -> Tensor | None:
        """The classes of the images that `batch` gives: int64 ``[count]``, or None if there are none."""

    def reordered(self, seed: int) -> "Loader":
        """The same images in another order, if there is `random_access`."""

    def ahead(self, batch: int) -> int:
        """Bytes that images will take besides those that are kept and the micro-batch in use."""

    def let_go(self) -> bool:
        """Gives up images that are kept in memory, to read them from disk from now on; whether there were any."""

    def close(self) -> None:
        """Lets go of the images."""

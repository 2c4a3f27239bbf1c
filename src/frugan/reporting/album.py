"""The pictures of a run, each in its file of the run folder."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from frugan.data.loader import Loader
from frugan.memory.spare import spare
from frugan.reporting import pictures
from frugan.reporting.records import Line
from frugan.reporting.run_folder import RunFolder

T = TypeVar("T")
GRID = 64  # images in the pictures of real images and of samples during training
FINAL = 16  # images in the last picture
SHOWN = 16  # samples beside their nearest real images


class Album:
    """Makes them. Images are uint8 ``[n, c, h, w]``.

    Args:
        folder: where they are kept.
        loader: the real images.
        device: where training runs.
        tell: what tells a notice to the person.
        classes: how many classes samples have in turn; 0: they have none.
    """

    def __init__(
        self, folder: RunFolder, loader: Loader, device: torch.device, tell: Callable[[str], None], classes: int = 0
    ) -> None:
        self.folder, self.loader, self.device, self.tell, self.classes = folder, loader, device, tell, classes

    def real(self) -> None:
        """Some of the real images."""
        pictures.save(pictures.grid(self.loader.batch(0, min(GRID, len(self.loader)))), self.folder.real_images)

    def samples(self, images: Tensor, epoch: float) -> Image.Image:
        """The samples after so many epochs."""
        picture = pictures.grid(images, classes=self.classes)
        pictures.save(picture, self.folder.samples_after(epoch))
        return picture

    def neighbours(self, images: Tensor, nearest: Callable[[Tensor], Tensor]) -> None:
        """Some samples above the real images that ``nearest`` finds for them; left out where memory does not suffice for that."""
        if self.loader.random_access:
            self.spared(lambda: self._neighbours(images[:SHOWN], nearest), "looking for the nearest real images")

    def spared(self, look: Callable[[], T], doing: str) -> T | None:
        """What ``look`` gives, or None where memory or disk do not suffice for ``doing`` that."""
        return spare(look, doing, self.device, self.tell)

    def _neighbours(self, images: Tensor, nearest: Callable[[Tensor], Tensor]) -> None:
        beside = torch.cat([images, nearest(images)])
        pictures.save(pictures.grid(beside, columns=len(images)), self.folder.neighbours)

    def losses(self, lines: Sequence[Line]) -> None:
        """The curves of a log."""
        pictures.plot_losses(lines, self.folder.losses)

    def final(self, images: Tensor) -> None:
        """The samples at the end."""
        pictures.save(pictures.grid(images, classes=self.classes), self.folder.final_samples)

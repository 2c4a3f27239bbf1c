"""What a phase asks of the host, in places on its device that stay: new values in them, and the same work can be done again.

A CUDA graph repeats its work on the same addresses. Whatever a phase takes from outside its networks therefore has to lie where it
lay before: images, classes, noise, masks, mirrorings. All of it is asked of a batch and of `Draws`, and always by the place of
samples in the batch: a tape stands in for both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frugan.data.loader import Batch
from frugan.utils.draws import Draws

Make = Callable[[Batch, int], Tensor | None]  # of a batch, and the number of images seen before it


def set_to(place: Tensor, number: float) -> None:
    """``number`` is in ``place``, ``[]``, from now on. XLA would make another program where a number it fills with is 0 or 1."""
    if place.device.type == "xla":
        place.copy_(torch.tensor(number, dtype=place.dtype))
    else:
        place.fill_(number)


class Tape(Draws):
    """The draws and the batch of one phase, on the device.

    Args:
        draws: whose rows it gives.
        device: where the phase computes.

    Attributes:
        batch: to be computed with in place of the batch that it stands for.
        closed: whether nothing new may be asked for.
    """

    def __init__(self, draws: Draws, device: torch.device) -> None:
        self.seed = draws.seed
        self.draws = draws
        self.device = device
        self.closed = False
        self.batch = Batch(self._images, self._labels)
        self._places: dict[Any, tuple[Make, Tensor | None]] = {}
        self._now = Batch(lambda first, count: torch.empty(0)), 0
        self._first = torch.zeros((), dtype=torch.int64, device=device)

    def put(self, batch: Batch, first: int) -> None:
        """Stands for ``batch``, before which ``first`` images were seen, from now on: its values come to the places there are."""
        self._now = batch, first
        set_to(self._first, first)
        for make, place in self._places.values():
            if place is not None:
                value = make(batch, first)
                assert value is not None
                if value.device.type == "cpu" and self.device.type == "cuda":
                    value = value.pin_memory()  # else the host would wait for all that the device has still to do
                place.copy_(value, non_blocking=True)

    def normal(self, purpose: str, first: int, count: int, *shape: int) -> Tensor:
        """As `Draws`, on the device."""
        return self._drawn(Draws.normal, purpose, first, count, *shape)

    def uniform(self, purpose: str, first: int, count: int, *shape: int) -> Tensor:
        """As `Draws`, on the device."""
        return self._drawn(Draws.uniform, purpose, first, count, *shape)

    def among(self, purpose: str, first: int, count: int, numbers: tuple[int, ...]) -> Tensor:
        """As `Draws`, on the device."""
        return self._drawn(Draws.among, purpose, first, count, numbers)

    def keep(self, purpose: str, first: int | Tensor, count: int, shape: tuple[int, ...], p: float) -> Tensor:
        """As `Draws`; where masks are hashes, they are made anew each time, of the number of the first sample."""
        assert isinstance(first, int)
        if self.device.type == "cpu":
            return self._drawn(Draws.keep, purpose, first, count, shape, p)
        return self.draws.keep(purpose, self._first + (first - self._now[1]), count, shape, p)

    def kept(self) -> list[Tensor]:
        """As `Draws`, and the places."""
        return [*self.draws.kept(), *(place for _, place in self._places.values() if place is not None)]

    def _drawn(self, what: Callable[..., Tensor], purpose: str, first: int, count: int, *more: Any) -> Tensor:
        offset = first - self._now[1]
        found = self._place(
            (what, purpose, offset, count, more),
            lambda batch, first: what(self.draws, purpose, first + offset, count, *more),
        )
        assert found is not None
        return found

    def _images(self, first: int, count: int) -> Tensor:
        offset = first - self._now[1]
        found = self._place(("images", offset, count), lambda batch, first: batch.images(first + offset, count))
        assert found is not None
        return found

    def _labels(self, first: int, count: int) -> Tensor | None:
        offset = first - self._now[1]
        return self._place(("labels", offset, count), lambda batch, first: batch.labels(first + offset, count))

    def _place(self, key: Any, make: Make) -> Tensor | None:
        if key not in self._places:
            assert not self.closed, f"{key} was not asked for when the tape was made"
            value = make(*self._now)
            self._places[key] = make, None if value is None else value.to(self.device, copy=True)
        return self._places[key][1]

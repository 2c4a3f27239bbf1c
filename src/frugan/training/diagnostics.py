"""Cheap signs that a training goes wrong, each told once, in words, with what to try.

Add one by writing a subclass of `Diagnostic` and putting it into `DIAGNOSTICS`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from frugan.config.objectives import Bce, Hinge, Objective, RpGan
from frugan.data.loader import Loader
from frugan.reporting.records import Event, Line, Warned
from frugan.reporting.run_folder import NEIGHBOURS

SIDE = 16  # pixels to which images are averaged: what is left is what a person sees from afar
SETTLED = 500  # updates before which a generator may make anything
POOR = 0.4  # share of the data's variety
ROUNDS = 2  # one after another, in which variety is that poor
WON = 500  # updates without a break for which D is right about everything
NEAR = 0.35  # of the distance between a real image and its nearest: nearer than chance
LOOKED_AT = 50_000  # real images, and
BYTES = 512 << 20  # bytes of them, among which neighbours are sought
PIECE = 1 << 20  # numbers of real images at once


class Diagnostic:
    """One sign. A subclass overrides what it looks at; each gives a sentence when the sign is there, else None.

    Args:
        data: the real images.
        objective: what is minimised.

    Attributes:
        kind: what the warning is called; each kind is told once, whichever sign was first.
    """

    kind: str

    def __init__(self, data: Loader, objective: Objective) -> None:
        self.data = data
        self.objective = objective

    def line(self, line: Line) -> str | None:
        """Looks at one report."""
        return None

    def samples(self, images: Tensor, updates: int) -> str | None:
        """Looks at samples, uint8 ``[n, c, h, w]``, made after so many updates."""
        return None

    def classes(self, covered: float, of: int, updates: int) -> str | None:
        """Looks at how many classes samples cover, made after so many updates."""
        return None

    def neighbours(self, distances: Tensor, usual: Tensor) -> str | None:
        """Looks at how far each sample is from its nearest real image, and that from its own: float32 ``[n]``, from afar."""
        return None


class Collapse(Diagnostic):
    """Samples differ little from one another."""

    kind = "collapse"

    def __init__(self, data: Loader, objective: Objective) -> None:
        super().__init__(data, objective)
        self.variety = variety(data.batch(0, min(64, len(data))))
        self._poor = 0

    def samples(self, images: Tensor, updates: int) -> str | None:
        """Whether they are much more alike than real images, several times in a row."""
        share = variety(images) / max(self.variety, 1e-9)
        self._poor = self._poor + 1 if share < POOR and updates >= SETTLED else 0
        if self._poor < ROUNDS:
            return None
        return (
            f"Samples hardly differ from one another ({share:.0%} of the data's variety): the generator has collapsed. Try a "
            "lower --lr-g, a larger --batch-size, another seed, or --recipe r3, which is made not to."
        )


class MissingClasses(Diagnostic):
    """Samples are of few classes."""

    kind = "collapse"

    def classes(self, covered: float, of: int, updates: int) -> str | None:
        """Whether they are half of them or fewer."""
        if covered > of / 2 or updates < SETTLED:
            return None
        return (
            f"Samples cover {covered:.0f} of {of} classes: the generator leaves the others out. Try a lower --lr-g, a larger "
            "--batch-size, or --recipe r3."
        )


class DiscriminatorWon(Diagnostic):
    """D is right about everything, and G learns nothing from it."""

    kind = "discriminator won"

    def __init__(self, data: Loader, objective: Objective) -> None:
        super().__init__(data, objective)
        self._since: int | None = None

    def line(self, line: Line) -> str | None:
        """Whether it has been for long."""
        if not self._won(line):
            self._since = None
        elif self._since is None:
            self._since = line.updates
        elif line.updates - self._since >= WON:
            return (
                f"The discriminator has told all images apart for {WON} updates: the generator learns little from it. Try a lower "
                "--lr-d, --label-smoothing, an R1 penalty (--r1 1), a smaller discriminator (--width-d), or --recipe r3."
            )
        return None

    def _won(self, line: Line) -> bool:
        measured = line.measured
        if not {"Loss_D", "Loss_G", "D(x)", "D(G(z)) before"} <= measured.keys():
            return False
        if isinstance(self.objective, Bce):
            sure = measured["D(x)"] > 0.95 * (1 - self.objective.label_smoothing) and measured["D(G(z)) before"] < 0.01
            return sure and measured["Loss_G"] > 4.6
        return isinstance(self.objective, (Hinge, RpGan)) and measured["Loss_D"] < 0.02  # others know no such thing as right


class Memorising(Diagnostic):
    """Samples are copies of real images."""

    kind = "memorising"

    def neighbours(self, distances: Tensor, usual: Tensor) -> str | None:
        """Whether most are much nearer to a real image than that is to any other."""
        apart = usual > 0  # an image that is there twice tells nothing
        if int(apart.sum()) <= len(usual) // 2 or float((distances[apart] / usual[apart]).median()) >= NEAR:
            return None
        return (
            f"Samples are nearly copies of real images ({NEIGHBOURS} shows them side by side): the generator knows them by "
            "heart. Try more data, --flip, fewer --epochs, or smaller networks (--width-g, --width-d)."
        )


DIAGNOSTICS: list[type[Diagnostic]] = [Collapse, MissingClasses, DiscriminatorWon, Memorising]


class Diagnostics:
    """All of them: looks at lines and samples as a training goes.

    Args:
        data: the real images.
        objective: what is minimised.
        warn: is called with a kind and a sentence, once for each kind.
    """

    def __init__(self, data: Loader, objective: Objective, warn: Callable[[str, str], None]) -> None:
        self.data = data
        self.signs = [sign(data, objective) for sign in DIAGNOSTICS]
        self.told: set[str] = set()
        self._warn = warn

    def remember(self, events: Iterable[Event]) -> None:
        """Takes up what was told before."""
        self.told |= {event.kind for event in events if isinstance(event, Warned)}

    def line(self, line: Line) -> None:
        """Looks at one report."""
        self._look(lambda sign: sign.line(line))

    def samples(self, images: Tensor, updates: int) -> None:
        """Looks at samples, uint8 ``[n, c, h, w]``, made after so many updates."""
        self._look(lambda sign: sign.samples(images, updates))

    def classes(self, covered: float, of: int, updates: int) -> None:
        """Looks at how many classes samples cover, made after so many updates."""
        self._look(lambda sign: sign.classes(covered, of, updates))

    def neighbours(self, images: Tensor) -> Tensor:
        """The real image nearest to each sample, uint8 ``[n, c, h, w]``, after a look at how near they are."""
        count = min(len(self.data), LOOKED_AT, max(1024, BYTES // images[0].numel()))
        distances, which = _nearest(thumbnails(images), self.data, count)
        found = torch.cat([self.data.batch(int(i), 1).cpu() for i in which])
        usual, _ = _nearest(thumbnails(found), self.data, count, leave_out=which)
        self._look(lambda sign: sign.neighbours(distances, usual))
        return found

    def _look(self, at: Callable[[Diagnostic], str | None]) -> None:
        for sign in self.signs:
            text = at(sign)
            if text is not None and sign.kind not in self.told:
                self.told.add(sign.kind)
                self._warn(sign.kind, text)


def thumbnails(images: Tensor) -> Tensor:
    """uint8 ``[n, c, h, w]`` averaged to `SIDE` pixels at most: float32 ``[n, c * side * side]`` in [0, 1]."""
    side = min(SIDE, images.shape[-1])
    return adaptive_avg_pool2d(images.cpu().float().div_(255), side).flatten(1)


def variety(images: Tensor) -> float:
    """Root of the mean squared distance of two different images from afar, a pixel."""
    small = thumbnails(images)
    return float((small - small.mean(0)).square().mean().mul(2 * len(small) / max(1, len(small) - 1)).sqrt())


def _nearest(small: Tensor, data: Loader, count: int, leave_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance to, and number of, the nearest of the first ``count`` images of ``data``, to each of ``small``.

    ``leave_out``: for each the number of one that does not count.
    """
    best = torch.full((len(small),), torch.inf)
    which = torch.zeros(len(small), dtype=torch.int64)
    for first, real in _pieces(data, count):
        distances = torch.cdist(small, real, compute_mode="donot_use_mm_for_euclid_dist")
        if leave_out is not None:
            here = (leave_out >= first) & (leave_out < first + len(real))
            distances[here.nonzero().flatten(), leave_out[here] - first] = torch.inf
        nearest = distances.min(1)
        closer = nearest.values < best
        best, which = torch.where(closer, nearest.values, best), torch.where(closer, nearest.indices + first, which)
    return best, which


def _pieces(data: Loader, count: int) -> Iterable[tuple[int, Tensor]]:
    size = max(1, PIECE // data.batch(0, 1).numel())
    for first in range(0, count, size):
        yield first, thumbnails(data.batch(first, min(size, count - first)))

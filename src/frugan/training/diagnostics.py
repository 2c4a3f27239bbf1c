"""Cheap signs that a training goes wrong, each told once, in words, with what to try.

Add one by writing a subclass of `Diagnostic` and putting it into `DIAGNOSTICS`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from frugan.config.objectives import Bce, Hinge, Objective, RpGan
from frugan.data.loader import Loader
from frugan.evaluation.neighbours import FEW, NEAR, SIDE, compared, nearest, thumbnails
from frugan.gan.augment import MOST
from frugan.reporting.records import Event, Line, Metrics, Warned
from frugan.reporting.run_folder import NEIGHBOURS

SETTLED = 500  # updates before which a generator may make anything
POOR = 0.4  # share of the data's variety
ROUNDS = 2  # one after another, in which variety is that poor
LASTING = 500  # updates without a break for which something is so in the log before it is told
BLANK = 0.03  # of all pixels: more of them in blank grey than in real images
UNEVEN = 1.5  # times the spread of brightness of real images
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


class Lasting(Diagnostic):
    """Something in the log's lines that is bad once it has been so for `LASTING` updates without a break."""

    said: str

    def __init__(self, data: Loader, objective: Objective) -> None:
        super().__init__(data, objective)
        self._since: int | None = None

    def line(self, line: Line) -> str | None:
        """Whether it has been so for long."""
        if not self.is_so(line):
            self._since = None
        elif self._since is None:
            self._since = line.updates
        return self.said if self._since is not None and line.updates - self._since >= LASTING else None

    @abstractmethod
    def is_so(self, line: Line) -> bool:
        """Whether it is so now."""


class DiscriminatorWon(Lasting):
    """D is right about everything, and G learns nothing from it."""

    kind = "discriminator won"
    said = (
        f"The discriminator has told all images apart for {LASTING} updates: the generator learns little from it. Try a lower "
        "--lr-d, --label-smoothing, an R1 penalty (--r1 1), a smaller discriminator (--width-d), or --recipe r3."
    )

    def is_so(self, line: Line) -> bool:
        """Whether D is right about everything."""
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
            "heart. Try more data, --augment ada, --flip auto, fewer --epochs, or smaller networks (--width-g, --width-d)."
        )


class Overfitting(Lasting):
    """D overfits although its images are augmented as often as is safe."""

    kind = "overfitting"
    said = (
        f"D's images have been augmented as often as is safe (p {MOST}) for {LASTING} updates, and it still overfits: these "
        "are few images for so long a training. Try more of them, fewer --epochs, a smaller --width-d, or --init-from a "
        "run on images like these; and look for squares and borders in samples."
    )

    def is_so(self, line: Line) -> bool:
        """Whether p is at its maximum."""
        return abs(line.measured.get("p", 0.0) - MOST) <= 1e-3


class Leak(Diagnostic):
    """Samples look as D's augmented images do: squares or borders of grey, or more light and dark ones than the data has."""

    kind = "leak"

    def __init__(self, data: Loader, objective: Objective) -> None:
        super().__init__(data, objective)
        self._real: tuple[float, float] | None = None  # blank grey, and spread; once they are asked for
        self._augmented = False
        self._leaks = 0

    def line(self, line: Line) -> str | None:
        """Whether anything is augmented."""
        self._augmented = line.measured.get("p", 0.0) > 0
        return None

    def samples(self, images: Tensor, updates: int) -> str | None:
        """Whether they have more blank grey than real images, or differ much more in brightness, several times in a row."""
        if not self._augmented or updates < SETTLED:
            self._leaks = 0
            return None
        if self._real is None:
            real = self.data.batch(0, min(64, len(self.data)))
            self._real = blank(real), spread(real)
        grey, uneven = blank(images) - self._real[0], spread(images) / max(self._real[1], 0.01)
        self._leaks = self._leaks + 1 if grey > BLANK or uneven > UNEVEN else 0
        if self._leaks < ROUNDS:
            return None
        seen = f"{grey:.0%} more of blank grey" if grey > BLANK else f"a brightness that varies {uneven:.1f} times as much"
        return (
            f"Samples have {seen} than real images: the augmentation of D's images leaks into them. Try --augment ada in place of "
            "diff, a higher --ada-target, or leave the operation out of --augment-policy."
        )


DIAGNOSTICS: list[type[Diagnostic]] = [Collapse, MissingClasses, DiscriminatorWon, Memorising, Overfitting, Leak]


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
        distances, which = nearest(thumbnails(images), _pieces(self.data, count))
        found = torch.cat([self.data.batch(int(i), 1).cpu() for i in which])
        usual, _ = nearest(thumbnails(found), _pieces(self.data, count), others=True)
        self._look(lambda sign: sign.neighbours(distances, usual))
        return found

    def nearness(self, images: Tensor, seen: int) -> Metrics | None:
        """How near samples lie to real images, of which there are few, after ``seen`` images; None where there are many."""
        count = len(self.data)
        if count >= FEW or not self.data.random_access:
            return None
        real = torch.cat([piece for _, piece in _pieces(self.data, count)])
        protocol = f"{len(images)} samples of the grid against all {count} images, averaged to {SIDE}x{SIDE} pixels."
        return Metrics(images=seen, values=compared(thumbnails(images), real), samples=len(images), protocol=protocol)

    def _look(self, at: Callable[[Diagnostic], str | None]) -> None:
        for sign in self.signs:
            text = at(sign)
            if text is not None and sign.kind not in self.told:
                self.told.add(sign.kind)
                self._warn(sign.kind, text)


def variety(images: Tensor) -> float:
    """Root of the mean squared distance of two different images from afar, a pixel."""
    small = thumbnails(images)
    return float((small - small.mean(0)).square().mean().mul(2 * len(small) / max(1, len(small) - 1)).sqrt())


def blank(images: Tensor) -> float:
    """The share of squares of 2x2 pixels that are all of the grey that augmentation fills in (0 in [-1, 1])."""
    shares = []
    for image in torch.split(images.cpu(), 1):  # all at once would take four times what the plan has for pictures
        away = (image.float() / 127.5 - 1).abs().amax(1, keepdim=True)
        shares.append((max_pool2d(away, 2, 1) < 0.05).float().mean())
    return float(torch.stack(shares).mean())


def spread(images: Tensor) -> float:
    """The standard deviation of the images' mean brightness, in [0, 1]."""
    return float(torch.stack([image.float().mean() / 255 for image in images.cpu()]).std())


def _pieces(data: Loader, count: int) -> Iterable[tuple[int, Tensor]]:
    size = max(1, PIECE // data.batch(0, 1).numel())
    for first in range(0, count, size):
        yield first, thumbnails(data.batch(first, min(size, count - first)))

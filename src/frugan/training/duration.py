"""How long a training goes on: so many epochs, or so many minutes of a clock.

Everything in a training counts images. Minutes become images by decisions: the speed is measured, and from then on it is as if that
many images had been asked for. Decisions are part of the training's state, so that it can be repeated to the bit.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from time import monotonic
from typing import Any

from frugan.config.recipe import Training
from frugan.reporting.records import DurationDecided
from frugan.utils.errors import UserError, counted

WARM = 0.01  # share of the minutes that pass after the first update before speed is measured,
STRETCH = 0.03  # and share after that in which it is measured for the first decision
CHECKS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.97)  # shares of minutes or images at which it is asked whether the decision still holds
OFF = 0.02  # share of the minutes: if training would end further than that from them, it is decided anew
TAIL = 0.02  # share of the images seen so far that is left after a decision at least, so that learning rates fall smoothly
PICTURES = 0.25  # share of the minutes after which there are pictures of samples, however long an epoch is
CHECKPOINT = 300.0  # seconds after which there is a checkpoint


def now() -> float:
    """Seconds on the clock of trainings, which stands still while the machine sleeps."""
    return monotonic()


class Epochs:
    """So many epochs.

    Args:
        epochs: how many.
        length: images of an epoch.
        batch: images of an update.

    Attributes:
        words: as a person says it.
        total: images after which training ends, whole batches; None while that is not decided.
        timed: whether a clock decides.
    """

    timed = False

    def __init__(self, epochs: int, length: int, batch: int) -> None:
        self.words = counted(epochs, "epoch")
        self.length, self.batch = length, batch
        self._epochs = epochs

    @property
    def total(self) -> int | None:
        """As the class says."""
        return math.ceil(self._epochs * self.length / self.batch) * self.batch

    @property
    def epochs(self) -> float | None:
        """The same in epochs."""
        return self._epochs

    def over(self, images: int) -> bool:
        """Whether training ends after ``images`` images."""
        return self.total is not None and images >= self.total

    def share(self, images: int) -> float:
        """The share of a schedule that is behind after ``images`` images."""
        return min(1.0, images / self.length / self._epochs)

    def left(self, images: int, speed: float) -> float:
        """Seconds that are left after ``images`` images, at ``speed`` images a second."""
        return ((self.total or 0) - images) / speed

    def begin(self, images: int) -> None:
        """Training begins, or goes on, after ``images`` images.

        Raises:
            UserError: there is no time for it.
        """

    def look(self, images: int) -> DurationDecided | None:
        """Looks at the clock after an update; what it decides, if anything."""
        return None

    def decision(self, decided: DurationDecided | None) -> tuple[float, float, float]:
        """What `look` has ``decided`` in numbers, zeros if nothing, for `follow`."""
        return 0, 0, 0

    def follow(self, images: float, share: float, total: float) -> None:
        """Takes up what another process has decided."""

    def due(self) -> tuple[bool, bool]:
        """Whether it is time for pictures, and for a checkpoint, in the midst of an epoch."""
        return False, False

    def done(self, pictures: bool, checkpoint: bool) -> None:
        """Pictures or a checkpoint were made since `due` was asked."""

    def capture(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON has it."""
        return {}

    def restore(self, found: Mapping[str, Any]) -> None:
        """Takes up what `capture` gave."""


@dataclass(frozen=True)
class Decision:
    """That training goes on to ``total`` images.

    Args:
        images: seen when that was decided.
        share: of a schedule that was behind then.
        total: as above.
    """

    images: int
    share: float
    total: int

    def at(self, images: int) -> float:
        """The share of a schedule that is behind after ``images`` images: from the decision on it goes evenly to the end."""
        return self.share + (1 - self.share) * min(1.0, (images - self.images) / max(1, self.total - self.images))


class Minutes(Epochs):
    """So many minutes, from the start of the command on.

    Schedules stand at their beginning until the first decision. No later one moves what is behind: it spreads the rest.

    Args:
        minutes: how many.
        length: images of an epoch.
        batch: images of an update.
        began: when the command began, by `now`.
    """

    timed = True

    def __init__(self, minutes: float, length: int, batch: int, began: float) -> None:
        self.words = counted(minutes, "minute")
        self.length, self.batch = length, batch
        self.seconds = 60 * minutes
        self.decisions: list[Decision] = []
        self._began = began
        self._before = 0.0  # seconds that earlier commands took
        self._changed = False  # whether other minutes were asked for than the decisions were made for
        self._started = self._pictures = self._checkpoint = self._asked = began
        self._since: tuple[int, float] | None = None  # images and seconds from which speed is measured
        self._checked = 0  # checks that are behind
        self._ending = 0.0  # seconds that pictures and a checkpoint take, which also stand at the end

    @property
    def spent(self) -> float:
        """Seconds until now, those of earlier commands with them."""
        return self._before + now() - self._began

    @property
    def total(self) -> int | None:
        """As `Epochs` says."""
        return self.decisions[-1].total if self.decisions and not self._changed else None

    @property
    def epochs(self) -> float | None:
        """The same in epochs."""
        return self.total / self.length if self.total is not None else None

    def share(self, images: int) -> float:
        """As `Epochs` says."""
        return self.decisions[-1].at(images) if self.decisions else 0.0

    def left(self, images: int, speed: float) -> float:
        """As `Epochs` says; by the clock while nothing is decided."""
        return super().left(images, speed) if self.total is not None else max(0.0, self.seconds - self.spent)

    def begin(self, images: int) -> None:
        """As `Epochs` says."""
        self._started = self._pictures = self._checkpoint = now()
        self._checked = self._behind(images)
        if not images and self.spent >= self.seconds:
            ready = f"getting ready took {self.spent:.0f} s"
            raise UserError(f"--minutes {self.seconds / 60:g} is too short to make one update: {ready}; give more.")

    def look(self, images: int) -> DurationDecided | None:
        """As `Epochs` says."""
        spent, over = self.spent, self.spent >= self.seconds
        if self._changed:
            return self._decide(images, images / max(self._before, 1e-9))
        if self._since is None:
            if not over and now() - self._started < WARM * self.seconds:
                return None
            self._since = (images, spent)
        since = spent - self._since[1]
        if not self.decisions:
            return self._decide(images, self._speed(images)) if over or since >= STRETCH * self.seconds else None
        if self._behind(images) <= self._checked or since < WARM * self.seconds or self.over(images):
            return None
        speed = self._speed(images)
        end = spent + self.left(images, speed) + self._ending
        if abs(end - self.seconds) > OFF * self.seconds:
            return self._decide(images, speed)
        self._measure(images)
        return None

    def _measure(self, images: int) -> None:
        """From here on speed is measured, until the next check."""
        self._since, self._checked = (images, self.spent), self._behind(images)

    def _behind(self, images: int) -> int:
        """How many checks are behind, by the clock, or by images: a training that becomes faster could end before the next."""
        share = max(self.spent / self.seconds, images / self.total if self.total else 0.0)
        return sum(check <= share for check in CHECKS)

    def _speed(self, images: int) -> float:
        """Images a second, in the stretch that is measured if there is one."""
        begun, when = self._since or (0, 0.0)
        return (images - begun) / (self.spent - when) if images > begun else images / self.spent

    def _decide(self, images: int, speed: float) -> DurationDecided:
        rest = max(self.batch, TAIL * images, (self.seconds - self.spent - self._ending) * speed)
        total = images + round(rest / self.batch) * self.batch
        share = self.share(images)
        if self._changed:  # as if they had been asked for from the beginning
            first = self.decisions[0].images
            share = (images - first) / (total - first)
        self._changed = False
        self.decisions.append(Decision(images, share, total))
        self._measure(images)
        return DurationDecided(images=images, total=total, seconds=self.spent)

    def decision(self, decided: DurationDecided | None) -> tuple[float, float, float]:
        """As `Epochs` says."""
        return (self.decisions[-1].images, self.decisions[-1].share, self.decisions[-1].total) if decided else (0, 0, 0)

    def follow(self, images: float, share: float, total: float) -> None:
        """As `Epochs` says."""
        if total:
            self._changed = False
            self.decisions.append(Decision(int(images), share, int(total)))

    def due(self) -> tuple[bool, bool]:
        """As `Epochs` says."""
        self._asked = now()
        return self._asked - self._pictures >= PICTURES * self.seconds, self._asked - self._checkpoint >= CHECKPOINT

    def done(self, pictures: bool, checkpoint: bool) -> None:
        """As `Epochs` says."""
        self._pictures = now() if pictures else self._pictures
        self._checkpoint = now() if checkpoint else self._checkpoint
        self._ending = max(self._ending, now() - self._asked)

    def capture(self) -> dict[str, Any]:
        """As `Epochs` says."""
        return {"minutes": self.seconds / 60, "spent": self.spent, "decisions": [astuple(each) for each in self.decisions]}

    def restore(self, found: Mapping[str, Any]) -> None:
        """As `Epochs` says. Where other minutes were asked for then, the first look decides by the speed on average."""
        self._before = float(found.get("spent", 0.0))
        self.decisions = [Decision(*each) for each in found.get("decisions", ())]
        self._changed = bool(self.decisions) and found["minutes"] != self.seconds / 60


def duration_of(training: Training, length: int, began: float) -> Epochs:
    """How long ``training`` goes on, on ``length`` images an epoch; the command began when `now` gave ``began``."""
    if training.minutes is not None:
        return Minutes(training.minutes, length, training.batch_size, began)
    return Epochs(training.epochs, length, training.batch_size)

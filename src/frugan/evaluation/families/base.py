"""What a family is: features of images, and the metrics that are taken on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from frugan.data.loader import Loader
from frugan.utils.errors import UserError
from frugan.utils.files import cache_folder

AUTO = "auto"
MOST = 10_000  # real images, unless others are asked for
PIECE = 64  # images at once, as in a grid of samples, whose shapes are known to fit

Progress = Callable[[int, int], None]  # is called with what is done, and of how much


@dataclass(frozen=True)
class Metric:
    """One number.

    Args:
        label: its name for people. Only distances on Inception's features are called FID.
        higher: whether more is better; None: neither, a value is right or not.
        digits: behind the point, for people.
        means: in a few words, what it says.
        conditional: whether it is of samples whose classes were asked for, and of no others.
    """

    label: str
    higher: bool | None
    digits: int
    means: str
    conditional: bool = False


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Args:
        metrics: names of metrics, commas between them, or ``auto``: what can be had without a download, and what is of Inception
            if its weights are named.
        weights: a file of Inception's weights.
        any_weights: whether others than the published ones will do; then nothing is called FID.
        reals: how many real images at most.
        among: of how many real images; 0: not known yet.
    """

    metrics: str = AUTO
    weights: str | None = None
    any_weights: bool = False
    reals: int = MOST
    among: int = 0


@dataclass(frozen=True)
class Task:
    """What a family is built for.

    Args:
        data: the real images, in the order in which they are taken.
        reals: how many of them are taken, from the first on.
        classes: how many they have.
        wanted: names of the metrics, of this family and of others.
        options: what was asked for.
        device: where networks run.
        learning: is called with the updates of a network that is trained first, and of how many.
    """

    data: Loader
    reals: int
    classes: int
    wanted: frozenset[str]
    options: Options
    device: torch.device
    learning: Progress | None = None

    @property
    def piece_bytes(self) -> int:
        """Bytes of `PIECE` images in float32."""
        channels, height, width = self.data.shape
        return 4 * PIECE * channels * height * width


class Seen(Protocol):
    """What a family keeps of a set of images, which come piece by piece."""

    def add(self, first: int, images: Tensor) -> None:
        """Takes in images ``first`` to ``first + n``, at most `PIECE` of them: uint8 ``[n, c, h, w]``."""


S = TypeVar("S", bound=Seen)


class Family(ABC, Generic[S]):
    """Features of images, and the metrics that are taken on them.

    Attributes:
        name: for good, as the features of real images are kept by it.
        metrics: by their names, which no other family has; the most telling first.
        labelled: whether real images need labels, of at least two classes.
        loads: whether the first use loads what stays in memory, as a network does.
        official: whether its metrics may bear the names that papers use.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    labelled: ClassVar[bool] = False
    loads: ClassVar[bool] = False
    official: bool = True

    def __init__(self, task: Task) -> None:
        self.task = task

    @classmethod
    def automatic(cls, options: Options) -> bool:
        """Whether ``--metrics auto`` takes it (where there are labels, if it needs them)."""
        return False

    @abstractmethod
    def new(self, images: int) -> S:
        """What takes in a set of so many images."""

    @abstractmethod
    def compared(self, real: S, fake: S) -> dict[str, float]:
        """At least those of its metrics that are wanted, of two sets that are complete."""

    def by_class(self, real: S, fake: S, asked: Tensor) -> dict[str, Tensor]:
        """Metrics of each class of samples that were asked for by class: float64 ``[classes]``, NaN where there are too few.

        Args:
            real: what was seen in the real images.
            fake: what was seen in the samples.
            asked: the class that each sample was to have, int64 ``[n]``.
        """
        return {}

    @abstractmethod
    def needs(self) -> int:
        """Bytes that `compared` and taking in a piece take at most, besides networks; generously, as a few `Task.piece_bytes`."""

    def protocol(self) -> str:
        """How its features are taken, as a part of a sentence; may be empty."""
        return ""

    def notices(self) -> Iterable[str]:
        """What a person should know before the first number: whole sentences."""
        return ()

    def remembered(self) -> S | None:
        """What an earlier evaluation kept of these real images, or None."""
        return None

    def remember(self, real: S) -> None:
        """Keeps what was seen in the real images, if that is worth its bytes on the disk."""

    def told_apart(self, real: S) -> int:
        """How many classes it finds in the real images; 0 if it knows none."""
        return 0


def folder() -> Path:
    """Where features lie.

    Raises:
        UserError: it cannot be made.
    """
    found = cache_folder() / "features"
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {found}: {error.strerror or error}; FRUGAN_CACHE names another place.") from None
    return found

"""How good a generator is: its images against real ones, by the metrics of `frugan.evaluation.families`.

Images are made, looked at and let go of in pieces, so that memory does not grow with their number.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from frugan.data.loader import Images, Loader
from frugan.evaluation.families import FAMILIES, METRICS
from frugan.evaluation.families.base import AUTO, PIECE, Family, Options, Progress, Seen, Task
from frugan.utils.errors import UserError, nearest

SEED = 0  # of the samples, and of which real images are taken
FEWEST = 16  # images that can be evaluated, or that others can be evaluated by


def chosen(options: Options, labelled: bool, conditional: bool = False) -> list[str]:
    """The metrics that are asked for, in the order of `METRICS`; ``labelled``: whether there are labels of two classes;
    ``conditional``: whether samples are asked for by class.

    Raises:
        UserError: an unknown one, or one that cannot be had of these images.
    """
    unlabelled = {name for family in FAMILIES.values() if not family.labelled for name in family.metrics}
    if options.metrics == AUTO:
        automatic = {name for family in FAMILIES.values() if family.automatic(options) for name in family.metrics}
        return [
            name for name, metric in METRICS.items()
            if name in automatic and (labelled or name in unlabelled) and (conditional or not metric.conditional)
        ]  # fmt: skip
    asked = [name.strip() for name in options.metrics.split(",") if name.strip()]
    for name in asked:
        if name not in METRICS:
            raise UserError(f"there is no metric {name!r}: {nearest(name, METRICS)}")
        if not labelled and name not in unlabelled:
            raise UserError(f"{name} needs images of at least two classes: use swd, or metrics of Inception's features.")
        if METRICS[name].conditional and not conditional:
            raise UserError(
                f"{name} needs samples of a run with --conditional, and real images of the classes that it learnt: leave it out of "
                "--metrics."
            )
    if not asked:
        raise UserError("--metrics names none: leave it out, or say for example swd,fid.")
    return [name for name in METRICS if name in asked]


class Evaluator:
    """Evaluates images by the real ones of one data set, again and again.

    Args:
        data: the real images, prepared as training has them.
        name: what they are called.
        classes: how many classes they have.
        options: what is asked for.
        device: where networks run.
        tell: is called with what a person should know.
        progress: is called with the images looked at, and of how many.
        learning: is called with the updates of a classifier that is trained first, and of how many.
        conditional: whether samples are asked for by class.

    Attributes:
        metrics: their names; the first decides what is best.
        reals: how many real images are used.
        by_class: metrics of each class of the last samples, float64 ``[classes]`` each, if they were asked for by class.

    Raises:
        UserError: a metric that there is not, or that cannot be had here.
    """

    def __init__(
        self, data: Loader, name: str, classes: int, options: Options, device: torch.device, tell: Callable[[str], None],
        progress: Progress | None = None, learning: Progress | None = None, conditional: bool = False,
    ) -> None:  # fmt: skip
        self.data = data.reordered(SEED)
        self.name = name
        options = replace(options, among=len(data))
        self.metrics = chosen(options, classes > 1 and data.labels(0, 1) is not None, conditional)
        self.by_class: dict[str, Tensor] = {}
        self.reals = min(options.reals, len(data))
        if self.reals < FEWEST:
            raise UserError(f"evaluating needs at least {FEWEST} real images, not {self.reals}.")
        self.progress = progress or (lambda done, of: None)
        wanted = frozenset(self.metrics)
        self._task = Task(self.data, self.reals, classes, wanted, options, device, learning)
        self._families: dict[str, Family[Any]] = {}
        for kind in FAMILIES.values():
            if wanted & kind.metrics.keys():
                family = self._families[kind.name] = kind(self._task)
                for notice in family.notices():
                    tell(notice)
        self._real = self._look_at_reals()
        self._rehearse()

    def __call__(self, produce: Images, images: int, asked: Tensor | None = None) -> dict[str, float]:
        """The metrics of ``images`` images that ``produce`` makes; ``asked``: the class that each was to have, int64 ``[images]``.

        Raises:
            UserError: too few to be evaluated.
        """
        if images < FEWEST:
            raise UserError(f"evaluating needs at least {FEWEST} images, not {images}.")
        seen = {name: family.new(images) for name, family in self._families.items()}
        self._look(produce, images, seen)
        values: dict[str, float] = {}
        for name, family in self._families.items():
            values |= family.compared(self._real[name], seen[name])
            if asked is not None:
                self.by_class |= family.by_class(self._real[name], seen[name], asked)
        for name, of_each in self.by_class.items():
            if asked is not None and METRICS[name].conditional:
                values[name] = float(of_each[asked].mean())
        return {name: values[name] for name in self.metrics}

    @property
    def told_apart(self) -> int:
        """How many classes are found in the real images; 0 if nothing tells them apart."""
        return max(family.told_apart(self._real[name]) for name, family in self._families.items())

    @property
    def unofficial(self) -> set[str]:
        """Metrics that may not bear the names of papers: their network has other weights than the published ones."""
        return {name for family in self._families.values() if not family.official for name in family.metrics}

    def needs(self) -> int:
        """Bytes that evaluating takes at most, besides networks and images; generously."""
        pieces = 2 * self._task.piece_bytes + (16 << 20)
        return max(pieces, *(family.needs() for family in self._families.values()))

    def protocol(self, images: int, what: str) -> str:
        """How the numbers were taken, in a sentence; ``what`` was evaluated."""
        channels, size, _ = self.data.shape
        how = f"{size}x{size} {'grey' if channels == 1 else 'colour'}, middle squares resized by bicubic interpolation"
        real = f"{self.reals:,} of {len(self.data):,} real images of {self.name} ({self.data.fingerprint[:8]})"
        said = [f"{images:,} {what} against {real}, {how}", *(family.protocol() for family in self._families.values())]
        return "; ".join(filter(None, said)) + "."

    def _look_at_reals(self) -> dict[str, Any]:
        """What each family sees in the real images, or saw in them before."""
        seen = {name: family.remembered() for name, family in self._families.items()}
        missing = {name: self._families[name].new(self.reals) for name, found in seen.items() if found is None}
        if missing:
            self._look(self.data.batch, self.reals, missing)
        for name, found in missing.items():
            self._families[name].remember(found)
        return seen | missing

    def _rehearse(self) -> None:
        """Evaluates a few images for nobody, so that all that evaluating loads is there before memory is counted and limited."""
        for name, family in self._families.items():
            if family.loads:
                seen = family.new(PIECE)
                seen.add(0, self.data.batch(0, PIECE))
                family.compared(self._real[name], seen)

    def _look(self, produce: Images, images: int, by: dict[str, Seen]) -> None:
        for first in range(0, images, PIECE):
            count = min(PIECE, images - first)
            piece = produce(first, PIECE)[:count]  # whole pieces: no shapes that were never met
            for seen in by.values():
                seen.add(first, piece)
            self.progress(first + count, images)

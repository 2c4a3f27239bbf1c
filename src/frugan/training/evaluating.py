"""Evaluating while training: what samples are worth, and which were the best."""

from collections.abc import Iterable, Sequence
from math import isnan
from typing import Protocol

import torch
from torch import Tensor

from frugan.config.run import Run
from frugan.data.loader import Loader
from frugan.evaluation.evaluator import SEED, Evaluator
from frugan.evaluation.families import better, directed
from frugan.evaluation.families.base import Options
from frugan.gan.sampling import Recipe, natural
from frugan.memory.spare import spare
from frugan.reporting.console import Console
from frugan.reporting.records import Event, Metrics
from frugan.utils.errors import UserError

ENOUGH = 20  # samples for each class, before one that is missing tells something


class Sample(Protocol):
    """Makes images."""

    def __call__(self, seed: int, first: int, count: int, classes: Sequence[int] = ()) -> Tensor:
        """Images ``first`` to ``first + count`` of ``seed``, of ``classes`` in turn if any: uint8 ``[count, c, h, w]``."""


class Evaluating:
    """Evaluates the samples of one run against its real images.

    Args:
        run: how often, by what, and with how many samples.
        loader: the real images.
        name: what they are called.
        classes: how many classes they have.
        console: what speaks to the person.
        device: where training runs.
        recipe: what is trained (resolved).

    Raises:
        UserError: a metric that cannot be had of these images, or here.
    """

    def __init__(
        self, run: Run, loader: Loader, name: str, classes: int, console: Console, device: torch.device, recipe: Recipe
    ) -> None:
        if not loader.random_access:
            raise UserError("--evaluate-every needs images in any order: leave --stream out, or evaluate afterwards.")
        options = Options(run.metrics, run.weights, reals=run.evaluate_samples)
        self.every, self.count, self.device, self.tell = run.evaluate_every, run.evaluate_samples, device, console.tell
        self.classes = natural(recipe, SEED, 0, self.count)
        self.evaluator = Evaluator(
            loader, name, classes, options, device, console.tell, learning=console.learning, conditional=self.classes is not None
        )
        self.best: float | None = None

    @classmethod
    def asked(
        cls, run: Run, loader: Loader, name: str, classes: int, console: Console, device: torch.device, recipe: Recipe
    ) -> "Evaluating | None":
        """One, if that is asked for.

        Raises:
            UserError: it is not, but how is said; or it cannot be done.
        """
        if run.evaluate_every:
            return cls(run, loader, name, classes, console, device, recipe)
        if run.metrics != Run.metrics or run.weights:
            raise UserError("--metrics and --weights are for evaluating while training: say how often, as --evaluate-every 5.")
        return None

    def due(self, epoch: float) -> bool:
        """Whether to evaluate after ``epoch`` epochs."""
        return epoch % self.every == 0

    def needs(self) -> int:
        """Bytes that evaluating takes at most."""
        return self.evaluator.needs()

    def remember(self, events: Iterable[Event]) -> int:
        """Takes up what was measured before; after how many images it was best, 0 if nothing alike was measured."""
        protocol, best = self._protocol(), 0
        for event in events:
            if isinstance(event, Metrics) and event.protocol == protocol and self.improves(event):
                best = event.images
        return best

    def measure(self, images: int, sample: Sample) -> Metrics | None:
        """Evaluates what is generated after ``images`` images; None where memory or disk do not suffice for that."""
        values = spare(
            lambda: self.evaluator(lambda first, n: sample(SEED, first, n), self.count, self.classes),
            "evaluating",
            self.device,
            self.tell,
        )
        return None if values is None else Metrics(images=images, values=values, samples=self.count, protocol=self._protocol())

    def improves(self, found: Metrics) -> bool:
        """Whether this is the best so far, by the first of the metrics of which more or less is better, if there is one."""
        name = next(filter(directed, self.evaluator.metrics), "")
        value = found.values.get(name)
        if value is None or isnan(value) or (self.best is not None and not better(name, value, self.best)):
            return False
        self.best = value
        return True

    def covered(self, found: Metrics) -> tuple[float, int] | None:
        """How many classes samples cover, and of how many; None if they were not told apart, or are too few to tell."""
        of = self.evaluator.told_apart
        return (found.values["classes"], of) if "classes" in found.values and self.count >= ENOUGH * of else None

    def _protocol(self) -> str:
        return self.evaluator.protocol(self.count, "samples")

"""What a run folder tells, in bounded space: the log is thinned while it is read, however long the training was."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from frugan.config.recipe import Recipe, read
from frugan.evaluation.families import METRICS
from frugan.gan.penalties import PENALTY_NAMES as PENALTY_NAMES
from frugan.reporting.records import FeaturesLearnt, LayoutChanged, Line, MemoryMeasured, Metrics, Record, Warned, number
from frugan.reporting.run_folder import RunFolder
from frugan.utils.errors import UserError

POINTS = 600  # of one curve, at most
TOLD = 20  # kinds of warnings, and times that memory ran out, one by one

Point = tuple[float, float | None]  # images seen, and a value, or None where it was not finite
Join = Callable[[Sequence[Point]], Point]
Measure = tuple[str, str]  # a metric, and how it was measured: only what was measured alike is compared


def mean(points: Sequence[Point]) -> Point:
    """Of the finite values, where the last of them is."""
    values = [y for _, y in points if y is not None]
    return points[-1][0], sum(values) / len(values) if values else None


def highest(points: Sequence[Point]) -> Point:
    """The first of the points with the highest value."""
    return max(points, key=lambda p: -math.inf if p[1] is None else p[1])


def lowest(points: Sequence[Point]) -> Point:
    """The first of the points with the lowest value."""
    return min(points, key=lambda p: math.inf if p[1] is None else p[1])


# The keys of reports that become curves, and what neighbouring points are joined by.
MEANS = ("Loss_D", "Loss_G", "D(x)", "D(G(z))", *PENALTY_NAMES, "p", "r_t", "lr_g", "lr_d", "images/s")
KEYS: Mapping[str, Join] = dict.fromkeys(MEANS, mean) | {"memory": highest}


class Curve:
    """At most `POINTS` points, however many are added: then each stands for several neighbours, made one by ``join``."""

    def __init__(self, join: Join = mean) -> None:
        self.join = join
        self.last: float | None = None  # finite value
        self._each = 1
        self._points: list[Point] = []
        self._rest: list[Point] = []

    def add(self, images: float, value: float | None) -> None:
        """One more point."""
        self.last = self.last if value is None else value
        self._rest.append((images, value))
        if len(self._rest) == self._each:
            self._points.append(self.join(self._rest))
            self._rest = []
        if len(self._points) == POINTS:
            self._points = [self.join(self._points[i : i + 2]) for i in range(0, POINTS, 2)]
            self._each *= 2

    def joined(self, most: int = POINTS) -> list[Point]:
        """The points in the order of images seen, ``most`` of them."""
        points = sorted(self._points + ([self.join(self._rest)] if self._rest else []), key=lambda p: p[0])
        each = -(-len(points) // most) or 1
        return [self.join(points[i : i + each]) for i in range(0, len(points), each)]

    @property
    def best(self) -> Point | None:
        """The point that ``join`` keeps of all of them, if any is finite."""
        points = self.joined(1)
        return points[0] if points and points[0][1] is not None else None


@dataclass
class Story:
    """A run.

    Attributes:
        ended: whether nobody trains there, although the folder may be locked.
        last: the newest report.
        curves: by their keys.
        metrics: a curve each, which keeps its best point.
        warnings: the newest text of each kind, after how many images it came first, and how often.
        features: how those were learnt that D is built on, if it is.
        ran_out: what was done about memory running out, the first times.
        peak: bytes that the process held at most; 0 if that was not measured.
    """

    folder: RunFolder
    name: str
    recipe: Recipe
    plan: dict[str, Any]
    ended: bool = False
    last: Line = field(default_factory=lambda: Line(images=0))
    curves: dict[str, Curve] = field(default_factory=dict)
    metrics: dict[Measure, Curve] = field(default_factory=dict)
    warnings: dict[str, tuple[str, float, int]] = field(default_factory=dict)
    features: FeaturesLearnt | None = None
    ran_out: list[str] = field(default_factory=list)
    times_ran_out: int = 0
    peak: float = 0

    @classmethod
    def read(cls, run: Path, ended: bool = False) -> "Story":
        """Reads the files of a run.

        Raises:
            UserError: it is no run folder, or its recipe or log cannot be read.
        """
        folder = RunFolder(run)
        if not folder.recipe_file.is_file():
            raise UserError(
                f"{run} is no run folder: there is no {folder.recipe_file.name} in it; name a folder that a training wrote to."
            )
        try:
            plan = json.loads(folder.plan_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            plan = None  # the rest can be told without it
        story = cls(folder, run.resolve().name, read(folder.recipe_file), plan if isinstance(plan, dict) else {}, ended)
        for record in folder.records():
            story._add(record)
        return story

    def _add(self, record: Record) -> None:
        images = record.images
        match record:
            case Line():
                self.last = record
                self.peak = max(self.peak, record.memory)
                own = {"lr_g": record.lr_g, "lr_d": record.lr_d, "images/s": record.speed, "memory": record.memory or math.nan}
                values = {**record.measured, **{key: value for key, value in own.items() if not math.isnan(value)}}
                for key, join in KEYS.items():
                    if key in values:
                        self.curves.setdefault(key, Curve(join)).add(images, number(values[key]))
            case FeaturesLearnt():
                self.features = record
            case MemoryMeasured():
                self.peak = max(self.peak, record.measured)
            case Metrics():
                for name, value in record.values.items():
                    join = highest if name in METRICS and METRICS[name].higher else lowest
                    self.metrics.setdefault((name, record.protocol), Curve(join)).add(images, number(value))
            case Warned():
                _, since, times = self.warnings.get(record.kind, ("", images, 0))
                if times or len(self.warnings) < TOLD:
                    self.warnings[record.kind] = record.text, since, times + 1
            case LayoutChanged():
                self.times_ran_out += 1
                if self.times_ran_out <= TOLD:
                    why = "" if record.event == "memory ran out" else f"{record.event}, "
                    went_on = f"{why}went on with {record.change} ({record.guarantee})"
                    self.ran_out.append(f"{record.phase}'s phase, after {images:,.0f} images: {went_on}.")

    @property
    def images(self) -> int:
        """Images seen so far."""
        return self.last.images

    @property
    def total(self) -> int:
        """Images after which training ends; 0 if that is not known."""
        return int(number(self.plan.get("updates")) or 0) * self.recipe.training.batch_size

    @property
    def epoch(self) -> float:
        """Epochs seen so far; the last batch may reach into one more."""
        return self.last.epoch if self.recipe.training.minutes else min(self.last.epoch, self.recipe.training.epochs)

    @property
    def epochs(self) -> float:
        """Epochs after which training ends; 0 if that is not known."""
        length = number(self.plan.get("images"))
        by_clock = self.total / length if length else 0.0
        return by_clock if self.recipe.training.minutes else self.recipe.training.epochs

    @property
    def finished(self) -> bool:
        """Whether it was trained as long as was asked."""
        return 0 < self.total <= self.images

    @property
    def state(self) -> str:
        """Finished, training, or broken off, in words."""
        if self.finished:
            return "Finished"
        lock = self.folder.lock_file
        try:
            if lock.exists() and not self.ended:
                with FileLock(lock).acquire(blocking=False):
                    pass
        except Timeout:  # whoever trains holds it
            left = number(self.last.seconds_left)
            return "Training" if left is None else f"Training, about {timedelta(seconds=round(left))} left"
        except OSError:
            pass  # not ours to lock
        return "Broken off: the same command goes on" if self.images else "Begun, and nothing is reported yet"

    def grids(self, most: int) -> list[tuple[str, Path]]:
        """Pictures of samples with when they were made: ``most`` of them, evenly chosen, the last always."""
        numbered = self.folder.pictures_of_samples()
        grids = [(f"epoch {count:.10g}", path) for count, path in numbered]
        final = self.folder.final_samples
        if final.is_file() and (not numbered or (self.finished and numbered[-1][0] < int(self.epoch))):
            grids.append((f"epoch {self.epoch:.3g}", final))
        if len(grids) <= most:
            return grids
        chosen = [round(i * (len(grids) - 1) / (most - 1)) for i in range(most)] if most > 1 else [-1]
        return [grids[i] for i in chosen]

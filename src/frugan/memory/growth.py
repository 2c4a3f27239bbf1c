"""What micro-batches of any size allocate, told by two small ones.

Whatever a phase allocates grows evenly with its micro-batch: two traces of different sizes give a straight line for every storage,
and for what operators need inside. From them the timeline of any layout is made without running it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from frugan.memory.trace import GRADIENTS, OTHER, Event, Timeline

SMALL, LARGE = 2, 3  # samples of the two traces; a single one is computed by other operators


Line = tuple[float, float]  # at no sample, and for each


@dataclass(frozen=True)
class Rates:
    """How fast a kind of device is, roughly: what layouts are compared by."""

    flops: float  # a second
    bytes: float  # a second
    call: float  # seconds of every call
    fresh: float  # bytes of new memory a second, where freed memory went back to the system
    crossing: float  # bytes a second between host and device

    def seconds(self, calls: NDArray[Any]) -> float:
        """How long calls of this `Work` take, ``[calls, 3]``."""
        return float((calls / [self.flops, self.bytes, self.crossing]).max(1).sum()) + len(calls) * self.call


@dataclass(slots=True)
class Step:
    """One `Event`, as lines."""

    storages: list[int]
    inside: list[Line] | None
    flops: Line
    moved: Line
    crossed: Line
    random: bool
    into: tuple[int, int] | None


@dataclass
class Growth:
    """A micro-batch that finds gradients of earlier ones, as lines in the number of its samples.

    Args:
        sizes: bytes of each storage.
        labels: what each is for, if not for activations.
        held: the storages that are there before.
        steps: what happens, in order.
        granule: bytes of which the allocator gives out whole ones.
        seen: the samples of the larger of the two traces.
    """

    sizes: dict[int, Line]
    labels: dict[int, str]
    held: list[int]
    steps: list[Step]
    granule: int = 1
    seen: int = LARGE

    @classmethod
    def between(cls, low: Timeline, high: Timeline, granule: int = 1, *, small: int = SMALL, large: int = LARGE) -> Self:
        """Through two traces of the same computation, of ``small`` and of ``large`` samples."""
        if not alike(low, high):  # the operators depend on the size: the larger alone must do
            low = _shrunk(high, small / large)

        def line(a: float, b: float) -> Line:
            each = (b - a) / (large - small)
            return (a - small * each, each)

        sizes: dict[int, Line] = {}
        pairs = list(zip(sorted(low.held), sorted(high.held), strict=True))
        for a, b in zip(low.events, high.events, strict=True):
            pairs += [(x, y) for x, y in zip(a.storages, b.storages, strict=True)] if b.inside is not None else []
        for x, y in pairs:
            sizes[y] = line(low.sizes[x], high.sizes[y])
        steps = []
        for a, b in zip(low.events, high.events, strict=True):
            inside = (
                None if b.inside is None else _inside(a.inside or [], b.inside, {high.sizes[s]: sizes[s] for s in b.storages}, line)
            )
            steps.append(Step(
                [s for s in b.storages if s in sizes], inside, line(a.flops, b.flops), line(a.moved, b.moved),
                line(a.crossed, b.crossed), b.random, b.into,
            ))  # fmt: skip
        labels = {s: label for s, label in high.labels.items() if s in sizes and label != OTHER}
        return cls(sizes, labels, sorted(high.held), steps, granule, large)

    @property
    def random(self) -> bool:
        """Whether something draws from torch's global generators."""
        return any(step.random for step in self.steps)

    def timeline(self, sizes: Sequence[int], *, accumulated: bool = False) -> Timeline:
        """What micro-batches of ``sizes`` allocate one after the other; ``accumulated``: the first finds gradients already.

        Where it finds none, what it would add to them becomes the gradients.
        """
        timeline = Timeline()
        found = {count: (self._sizes(count), self._moves(count), self._work(count).tolist()) for count in {*sizes}}
        there = self._sizes(0)
        constant = {s for s in self.held if accumulated or self.labels.get(s) != GRADIENTS}
        for storage in constant:
            timeline.held.add(storage)
            timeline.sizes[storage] = there[storage]
            timeline.labels[storage] = self.labels.get(storage, OTHER)
        offset = max(self.sizes, default=0) + 1
        seen: set[int] = set()  # gradients that are there
        seen |= {s for s in constant if self.labels.get(s) == GRADIENTS}
        for turn, count in enumerate(sizes):
            shift = offset * (turn + 1)
            kept: set[int] = set()  # what became a gradient in this micro-batch
            of, moves, work = found[count]
            for step, inside, (flops, moved, crossed) in zip(self.steps, moves, work, strict=True):
                if step.inside is None:
                    gone = [s if s in constant else s + shift for s in step.storages if s not in kept]
                    if gone:
                        timeline.events.append(Event(gone))
                    continue
                if step.into and step.into[0] not in seen:
                    seen.add(step.into[0])
                    kept.add(step.into[1])
                    timeline.labels[step.into[1] + shift] = GRADIENTS
                    continue
                for s in step.storages:
                    timeline.sizes[s + shift] = of[s]
                    if s in self.labels:
                        timeline.labels[s + shift] = self.labels[s]
                timeline.events.append(Event([s + shift for s in step.storages], inside, flops, moved, crossed, step.random))
        return timeline

    def work(self, count: int) -> NDArray[Any]:
        """The `Work` of each call at ``count`` samples, ``[calls, 3]``."""
        return self._work(count)[[step.inside is not None for step in self.steps]]

    def fresh(self, count: int) -> int:
        """Bytes of all storages that are made at ``count`` samples."""
        sizes = self._sizes(count)
        return sum(sizes[s] for step in self.steps if step.inside is not None for s in step.storages)

    def _work(self, count: int) -> NDArray[Any]:
        return np.asarray(np.trunc(at(self._tables[0], count)), np.int64)

    def _sizes(self, count: int) -> dict[int, int]:
        return {s: max(0, size) for s, size in zip(self.sizes, self._whole(self._tables[1], count), strict=True)}

    def _moves(self, count: int) -> list[list[int]]:
        moves = iter(self._whole(self._tables[2], count))
        return [[*islice(moves, len(step.inside or ()))] for step in self.steps]

    def _whole(self, lines: Any, count: int) -> list[int]:
        values = np.rint(at(lines, count))
        whole: list[int] = (np.sign(values) * np.ceil(np.abs(values) / self.granule) * self.granule).astype(np.int64).tolist()
        return whole

    @cached_property
    def _tables(self) -> list[NDArray[Any]]:
        """Lines of the work of each step, of all storages, and of all that happens inside of calls, base and slope apart."""
        work = np.array([(s.flops, s.moved, s.crossed) for s in self.steps], float).reshape(-1, 3, 2)
        sizes = np.array([*self.sizes.values()], float).reshape(-1, 2)
        inside = np.array([line for s in self.steps for line in s.inside or ()], float).reshape(-1, 2)
        return [work.transpose(2, 0, 1), sizes.T, inside.T]

    def peaks(self, counts: Sequence[int], *, several: bool) -> list[int]:
        """See `Outline`."""
        return self.outline.peaks(counts, several=several)

    @cached_property
    def outline(self) -> "Outline":
        """What is live from moment to moment."""
        return Outline(*(np.array(self._levels(several), float).reshape(-1, 2) for several in (False, True)))

    def least(self, count: int) -> int:
        """Bytes without which no lever computes ``count`` samples at once: what is always there, and the two largest storages that
        are there together.

        Those are what an operator takes and gives, or a feature map and its gradient.
        """
        held = set(self.held)
        live: set[int] = set()
        most = 0.0
        for step in self.steps:
            if step.inside is None:
                live.difference_update(step.storages)
                continue
            live.update(s for s in step.storages if s not in held)
            most = max(most, sum(sorted(at(self.sizes[s], count) for s in live)[-2:]))
        return int(sum(at(self.sizes[s], count) for s in held if self.labels.get(s) != GRADIENTS) + most)

    def _levels(self, several: bool) -> list[Line]:
        """For each moment what is live, of a micro-batch that finds gradients (``several``) or of one alone."""
        begin = [self.sizes[s] for s in self.held if several or self.labels.get(s) != GRADIENTS]
        base, each = sum(line[0] for line in begin), sum(line[1] for line in begin)
        rows = [(base, each)]
        seen = {s for s in self.held if self.labels.get(s) == GRADIENTS} if several else set[int]()
        kept: set[int] = set()
        for step in self.steps:
            if step.inside is not None and step.into and step.into[0] not in seen:
                seen.add(step.into[0])
                kept.add(step.into[1])
                continue
            if step.inside is not None:
                a, b = base, each
                for line in step.inside:
                    a, b = a + line[0], b + line[1]
                    rows.append((a, b))
            sign = -1 if step.inside is None else 1
            for s in step.storages:
                if s not in kept:
                    base, each = base + sign * self.sizes[s][0], each + sign * self.sizes[s][1]
            rows.append((base, each))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "sizes": [[s, *line] for s, line in self.sizes.items()], "labels": [[s, label] for s, label in self.labels.items()],
            "held": self.held, "granule": self.granule, "seen": self.seen,
            "steps": [
                [s.storages, s.inside, s.flops, s.moved, s.crossed, s.random, s.into] for s in self.steps
            ],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> Self:
        """What `as_dict` gave."""
        steps = [
            Step(
                storages, None if inside is None else [(a, b) for a, b in inside], tuple(flops), tuple(moved), tuple(crossed),
                random, tuple(into) if into else None,
            )
            for storages, inside, flops, moved, crossed, random, into in known["steps"]
        ]  # fmt: skip
        sizes = {s: (a, b) for s, a, b in known["sizes"]}
        return cls(sizes, dict(known["labels"]), known["held"], steps, known["granule"], known["seen"])


@dataclass
class Outline:
    """What is live from moment to moment of a `Growth`, a line for each: of a micro-batch alone, and of one of several."""

    alone: np.ndarray[Any, Any]
    several: np.ndarray[Any, Any]

    def peaks(self, counts: Sequence[int], *, several: bool) -> list[int]:
        """The most that is live at micro-batches of each of ``counts``: of ``several``, or of one alone."""
        rows = self.several if several else self.alone
        return [int(np.ceil((rows[:, 0] + rows[:, 1] * count).max())) for count in counts]


def alike(low: Timeline, high: Timeline) -> bool:
    """Whether the same happens in both."""
    low_, high_ = ([(len(e.storages), e.inside is None) for e in t.events] for t in (low, high))
    return low_ == high_ and len(low.held) == len(high.held)


def traced(trace: Callable[[int], Timeline], granule: int, largest: int = 0) -> Growth:
    """The growth of what ``trace`` runs on so many samples; where few are computed otherwise than more, of more.

    With ``largest`` it is right at so many samples, whatever libraries do with as many: these are run.
    """
    if largest > LARGE:
        return Growth.between(trace(SMALL), trace(largest), granule, large=largest)
    low, high = trace(SMALL), trace(LARGE)
    if not alike(low, high):
        low = trace(SMALL)  # what ran for the first time met other things
    if alike(low, high):
        return Growth.between(low, high, granule)
    small, large = 2 * LARGE, 3 * LARGE
    return Growth.between(trace(small), trace(large), granule, small=small, large=large)


def at(line: Any, count: float) -> Any:
    """The value of ``line`` at ``count`` samples."""
    return line[0] + line[1] * count


def _inside(first: list[int], second: list[int], results: dict[int, Line], line: Callable[[float, float], Line]) -> list[Line]:
    """Lines through what a call allocated and freed in two traces; ``results`` are those of its results, by their bytes there."""
    if len(first) == len(second) and all(a * b > 0 for a, b in zip(first, second, strict=True)):
        return [line(a, b) for a, b in zip(first, second, strict=True)]
    found = []
    for move in second:  # another kernel for another size: what is no result of it is taken to stay as it is
        base, each = results.get(abs(move), (float(abs(move)), 0.0))
        found.append((base, each) if move > 0 else (-base, -each))
    return found


def _shrunk(timeline: Timeline, share: float) -> Timeline:
    """``timeline`` with all that it makes, but not what is there before, at ``share`` of its size."""
    sizes = {s: size if s in timeline.held else int(size * share) for s, size in timeline.sizes.items()}
    events = [
        Event(
            e.storages, None if e.inside is None else [int(m * share) for m in e.inside], int(e.flops * share),
            int(e.moved * share), int(e.crossed * share), e.random, e.into,
        )
        for e in timeline.events
    ]  # fmt: skip
    return Timeline(sizes, timeline.labels, timeline.held, events)

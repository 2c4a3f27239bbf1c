"""The search for a plan: which layouts there are, what each would allocate and how long it would take, and the fastest that fits.

Bytes are exact (`frugan.memory.trace`, `frugan.memory.probe`). Whatever a phase allocates grows evenly with its micro-batch, so two
small traces of each combination of levers give a straight line for every event, and with it the peak at any size; what is
about to be chosen is traced as it is. Times come from arithmetic and traffic at fixed rates, not from a clock: the same command
makes the same plan.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from frugan.memory import limit
from frugan.memory.heap import Heap
from frugan.memory.host import Handling
from frugan.memory.plan import SMALLEST_COUPLED, Guarantee, Layout, split
from frugan.memory.private import UNMEASURED, can_record
from frugan.memory.probe import Workspaces
from frugan.memory.segments import LEAST, ROUND, SMALL_SEGMENT, Full, Segments
from frugan.memory.trace import CALLS, Moment, Timeline

SMALL, LARGE = 4, 16  # micro-batches through which the lines are drawn
REUSE_MARGIN = 1.06  # of what the heap is predicted to hold: the prediction was up to 5% short (docs/LOG.md)
SEGMENTS_MARGIN = 1.02  # the same of an accelerator's segments: a guess, until `make gpu` has measured it
MARGIN = 24 << 20  # bytes of a budget left for what libraries load on their first use
SLACK = 1.05  # on the framework in what is named as smallest: it is not the same in every process, and planning loads more of it

M = TypeVar("M", Heap, Segments)


@dataclass(frozen=True)
class Rates:
    """How fast a kind of device is, roughly: what layouts are compared by."""

    flops: float  # a second
    bytes: float  # a second
    call: float  # seconds of every call
    fresh: float  # bytes of new memory a second, where freed memory went back to the system
    crossing: float  # bytes a second between host and device


# Those of accelerators are of a small GPU's data sheet and of PCIe 3; unmeasured.
RATES = {"cpu": Rates(1.5e11, 2e10, 6e-6, 2.5e9, 2e10), "cuda": Rates(2e13, 1e12, 1e-5, 5e10, 1.2e10)}


@dataclass(frozen=True)
class Job:
    """One phase of a training, as the search sees it.

    Args:
        name: of the phase.
        batch: its samples.
        variants: the combinations of levers there are, the plainest first: arguments of `Layout`.
        trace: a layout to what it allocates; ``True``: gradients are there from an earlier micro-batch.
        coupled: whether a sample's output depends on the others of its micro-batch.
        smallest: what a micro-batch must not be smaller than.
        parts: how many micro-batches, if that was asked for.
        draws: whether it draws from torch's global generators, which draw otherwise for micro-batches.
    """

    name: str
    batch: int
    variants: Sequence[dict[str, Any]]
    trace: Callable[[Layout, bool], Timeline]
    coupled: bool = False
    smallest: int = 1
    parts: int | None = None
    draws: bool = False

    @property
    def counts(self) -> list[int]:
        """The numbers of micro-batches worth a look: one for each size of the largest, few ones first."""
        if self.parts:
            return [self.parts]
        sizes = sorted({math.ceil(self.batch / k) for k in range(1, self.batch + 1)}, reverse=True)
        counts = [math.ceil(self.batch / size) for size in sizes]
        return [k for k in counts if k == 1 or min(split(self.batch, k)) >= self.smallest]


@dataclass(frozen=True)
class Candidate:
    """A layout for a job, with what it would allocate at its peak, hold for that if freed memory is kept (``held``) or goes back
    (``least``), and cost in an update."""

    job: Job
    layout: Layout
    allocated: int
    held: int
    least: int
    flops: int
    seconds: float
    fresh: int  # bytes allocated anew in one update

    @property
    def guarantee(self) -> Guarantee:
        """What holds for it."""
        return self.layout.guarantee(self.job.coupled or self.job.draws)

    def needs(self, handling: Handling) -> int:
        """Bytes of the process."""
        return self.held if handling == "reuse" else self.least

    def time(self, handling: Handling, rates: Rates) -> float:
        """Seconds of an update."""
        return self.seconds + (self.fresh / rates.fresh if handling == "return" else 0)


class Line:
    """What a combination of levers costs, as straight lines in the size of the micro-batch."""

    def __init__(self, low: Timeline, high: Timeline, workspaces: Workspaces, rates: Rates) -> None:
        self.low, self.high = (np.array([most for _, most in t.levels(workspaces)], float) for t in (low, high))
        if len(self.low) != len(self.high):  # the operators depend on the size: the larger alone must do
            self.low = self.high * (SMALL / LARGE)
        self.flops = high.flops / LARGE
        seconds = [t.seconds(rates) for t in (low, high)]
        self.each = max(0.0, (seconds[1] - seconds[0]) / (LARGE - SMALL))
        self.once = max(0.0, seconds[0] - SMALL * self.each)
        self.fresh = high.fresh / LARGE

    def peak(self, size: int) -> int:
        """Bytes at micro-batches of ``size``."""
        return math.ceil(float((self.low + (self.high - self.low) * ((size - SMALL) / (LARGE - SMALL))).max()))


@dataclass(frozen=True)
class Exact:
    """What a layout allocates, traced as it is."""

    timeline: Timeline
    moment: Moment
    held: int
    least: int


@dataclass(frozen=True)
class Choice:
    """What the search decided."""

    handling: Handling
    chosen: dict[str, Candidate]
    refused: dict[str, Candidate]  # what would have been taken next, had there been more memory

    @property
    def guarantee(self) -> Guarantee:
        """What holds for the whole."""
        return max(c.guarantee for c in self.chosen.values())


def shortened(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Micro-batches that show what all of ``sizes`` need: two of the largest, as the second finds gradients, and the last."""
    return sizes[:2] + sizes[-1:] if len(sizes) > 2 and sizes[-1] != sizes[1] else sizes[:2]


class Search:
    """The layouts of all ``jobs`` on ``device``."""

    def __init__(self, jobs: Sequence[Job], device: torch.device, *, approximate: bool = False) -> None:
        self.jobs = jobs
        self.device = device
        self.approximate = approximate  # whether coupled samples may be cut as small as one likes
        self.rates = RATES.get(device.type, RATES["cuda"])
        limit.handle("return", device)  # what probing frees must not stay in the heap, where a limit would not count it again
        self.workspaces = Workspaces(device)
        self._lines: dict[tuple[str, str], Line] = {}
        self._exact: dict[tuple[str, Layout], Exact] = {}
        self._timelines: dict[tuple[str, Layout], Timeline] = {}

    @property
    def handlings(self) -> tuple[Handling, ...]:
        """What can become of freed memory, the faster first."""
        return ("reuse", "return")

    def forget(self) -> None:
        """Lets go of traces and measurements; they are made anew when they are asked for."""
        self._exact.clear()
        self._timelines.clear()
        self.workspaces.clear()
        CALLS.clear()

    def exact(self, job: Job, layout: Layout) -> Exact:
        """Traces ``layout`` as it is."""
        key = (job.name, layout)
        if key not in self._exact:
            timeline = self._timeline(job, layout)
            self.workspaces.measure(timeline.calls())
            moment = timeline.peak(self.workspaces)
            held, least = self.holds([timeline], "reuse"), self.holds([timeline], "return")
            if self.device.type == "cpu":
                held = int(held * REUSE_MARGIN)
            else:
                held, least = int(held * SEGMENTS_MARGIN), int(least * SEGMENTS_MARGIN)
            self._exact[key] = Exact(timeline, moment, held, least)
        return self._exact[key]

    def _timeline(self, job: Job, layout: Layout) -> Timeline:
        """What ``layout`` allocates but for workspaces; more than two micro-batches of a size are as two."""
        key = (job.name, layout)
        if key not in self._timelines:
            self._timelines[key] = job.trace(replace(layout, sizes=shortened(layout.sizes)), False)
        return self._timelines[key]

    def holds(self, timelines: Sequence[Timeline], handling: Handling, available: int | None = None) -> int:
        """What is held for two updates in which ``timelines`` follow each other, whose first says what is there from the start.

        Where freed memory goes back, that is the least that will do; on an accelerator, whose allocator gives segments back only if
        it needs others, what it comes to hold within ``available`` bytes, if those are said.
        """
        most = max(timeline.peak(self.workspaces).bytes for timeline in timelines)
        if self.device.type == "cpu" and not can_record():
            most = int(most * UNMEASURED)
        if self.device.type == "cpu":
            return self._replayed(timelines, Heap()).top if handling == "reuse" else most
        held = self._replayed(timelines, Segments()).top
        if handling == "return":
            if available is not None:
                with suppress(Full):
                    return self._replayed(timelines, Segments(available - SMALL_SEGMENT)).top + SMALL_SEGMENT
            low, high = most // ROUND, held // ROUND
            while low < high:
                middle = (low + high) // 2
                try:
                    self._replayed(timelines, Segments(middle * ROUND))
                    high = middle
                except Full:
                    low = middle + 1
            held = high * ROUND
        return held + SMALL_SEGMENT  # for what a trace does not see, such as the numbers that are reported

    def _replayed(self, timelines: Sequence[Timeline], memory: M) -> M:
        for size in (timelines[0].sizes[s] for s in sorted(timelines[0].held)):
            memory.allocate(size)
        for timeline in [*timelines, *timelines]:
            memory.replay(timeline.moves(self.workspaces))
        return memory

    def candidate(self, job: Job, layout: Layout) -> Candidate:
        """``layout`` traced as it is."""
        exact = self.exact(job, layout)
        timeline, cut = exact.timeline, sum(layout.sizes) / sum(shortened(layout.sizes))
        return Candidate(
            job, layout, exact.moment.bytes, exact.held, exact.least, int(timeline.flops * cut),
            timeline.seconds(self.rates) * cut, int(timeline.fresh * cut),
        )  # fmt: skip

    def candidates(self, job: Job) -> Iterator[Candidate]:
        """All layouts of ``job``, estimated."""
        apart = 0 if self.device.type == "cpu" else LEAST
        for levers in job.variants:
            line = self._line(job, levers)
            for parts in job.counts:
                layout = Layout.of(job.batch, parts, **levers)
                peak = line.peak(layout.micro_batch)
                yield Candidate(
                    job, layout, peak, int(1.15 * REUSE_MARGIN * peak) + apart, peak + apart, int(line.flops * job.batch),
                    line.each * job.batch + line.once * len(layout.sizes), int(line.fresh * job.batch),
                )  # fmt: skip

    def prepare(self) -> None:
        """Runs every operator of the plainest layouts once, small, so that all libraries have loaded what they need."""
        for job in self.jobs:
            self._line(job, job.variants[0])

    def plain(self, available: float) -> Choice | None:
        """Everything as plainly as it may be done, if that fits into ``available`` bytes without a doubt."""
        chosen = {}
        for job in self.jobs:
            layout = Layout.of(job.batch, job.counts[0], **job.variants[0])
            if self._timeline(job, layout).peak().bytes > available:
                return None
            chosen[job.name] = self.candidate(job, layout)
        return (
            Choice(self.handlings[0], chosen, {}) if all(c.needs(self.handlings[0]) <= available for c in chosen.values()) else None
        )

    def choose(self, available: float) -> Choice | None:
        """The fastest that fits into ``available`` bytes, exact layouts before approximate ones; None if nothing does."""
        plain = [Layout.of(job.batch, job.counts[0], **job.variants[0]) for job in self.jobs]
        if all(self._line(job, job.variants[0]).peak(p.micro_batch) <= available for job, p in zip(self.jobs, plain, strict=True)):
            chosen = {job.name: self.candidate(job, p) for job, p in zip(self.jobs, plain, strict=True)}
            if all(c.needs(self.handlings[0]) <= available for c in chosen.values()):
                return Choice(self.handlings[0], chosen, {})
        choices = [c for handling in self.handlings if (c := self._best(available, handling))]
        return min(
            choices,
            key=lambda c: (c.guarantee == Guarantee.APPROXIMATE, sum(x.time(c.handling, self.rates) for x in c.chosen.values())),
            default=None,
        )

    def smallest(self) -> dict[str, Candidate]:
        """For each job what needs least, traced as it is."""
        return {job.name: self._leanest(job) for job in self.jobs}

    def _leanest(self, job: Job) -> Candidate:
        return self.candidate(job, min(self._allowed(job), key=lambda c: (c.least, c.seconds)).layout)

    def _best(self, available: float, handling: Handling) -> Choice | None:
        chosen: dict[str, Candidate] = {}
        refused: dict[str, Candidate] = {}
        for job in self.jobs:
            ranked = sorted(self._allowed(job), key=lambda c: (c.guarantee == Guarantee.APPROXIMATE, c.time(handling, self.rates)))
            short = 1.0  # by how much the estimates were short
            for estimate in ranked:
                if estimate.needs(handling) * short <= available:
                    candidate = self.candidate(job, estimate.layout)
                    if candidate.needs(handling) <= available:
                        chosen[job.name] = candidate
                        break
                    short = candidate.needs(handling) / estimate.needs(handling)
                refused[job.name] = estimate
            else:  # the estimates may be too high: what would be named as smallest is looked at as it is
                chosen[job.name] = self._leanest(job)
                if chosen[job.name].needs(handling) > available:
                    return None
        return Choice(handling, chosen, refused)

    def _allowed(self, job: Job) -> list[Candidate]:
        """Coupled samples are cut to `SMALLEST_COUPLED` at least, unless it was asked for otherwise."""
        least = 0 if self.approximate or job.parts or not job.coupled else SMALLEST_COUPLED
        return [c for c in self.candidates(job) if len(c.layout.sizes) == 1 or min(c.layout.sizes) >= least]

    def _line(self, job: Job, levers: dict[str, Any]) -> Line:
        key = (job.name, repr(levers))
        if key not in self._lines:
            low, high = (job.trace(Layout(sizes=(n,), **levers), True) for n in (SMALL, LARGE))
            for timeline in (low, high):
                self.workspaces.measure(timeline.calls())
            self._lines[key] = Line(low, high, self.workspaces, self.rates)
        return self._lines[key]

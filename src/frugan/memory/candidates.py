"""What a search is between: the jobs, layouts of them with what each needs, and what was chosen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from frugan.memory.growth import Growth, Rates
from frugan.memory.host import Freed
from frugan.memory.layout import Guarantee, Layout, Lever, split, uncoupling
from frugan.memory.trace import Event, Timeline

Levers = tuple[Lever, ...]


@dataclass(frozen=True)
class Job:
    """One phase of a training, as the search sees it.

    Args:
        name: of the phase.
        batch: its samples.
        variants: the combinations of levers there are, the plainest first.
        trace: a combination of levers to what a micro-batch allocates with them; where samples are named, of a growth that is right
            at so many, for libraries that need other workspaces for more samples.
        coupled: whether a sample's output depends on the others of its micro-batch.
        smallest: what a micro-batch must not be smaller than, but with levers that uncouple samples.
        parts: how many micro-batches, if that was asked for.
        draws: whether it draws from torch's global generators, which draw otherwise for micro-batches.
        loads: the name of a lever to the bytes besides tensors that come with it, such as libraries that it loads.
        keeps: a combination of levers to the bytes of each sample that stay until the phase has come to its end, which the growth
            has of one micro-batch.
    """

    name: str
    batch: int
    variants: Sequence[Levers]
    trace: Callable[[Levers, int], Growth]
    coupled: bool = False
    smallest: int = 1
    parts: int | None = None
    draws: bool = False
    loads: Callable[[str], int] = lambda lever: 0
    keeps: Callable[[Levers], int] = lambda levers: 0

    def kept(self, layout: Layout) -> int:
        """Bytes of the other micro-batches' samples that stay while one is computed."""
        return self.keeps(layout.levers) * (sum(layout.sizes) - layout.micro_batch)

    def counts(self, levers: Levers) -> list[int]:
        """The numbers of micro-batches worth a look with ``levers``: one for each size of the largest, few ones first."""
        if self.parts:
            return [self.parts]
        sizes = sorted({math.ceil(self.batch / k) for k in range(1, self.batch + 1)}, reverse=True)
        counts = [math.ceil(self.batch / size) for size in sizes]
        if uncoupling(levers):
            return counts[1:]  # there is nothing to uncouple in a whole batch
        return [k for k in counts if k == 1 or min(split(self.batch, k)) >= self.smallest]

    def timeline(self, layout: Layout, growth: Growth) -> Timeline:
        """What ``layout`` allocates, of whose micro-batches ``growth`` is."""
        timeline, kept = growth.timeline(shortened(layout.sizes)), self.kept(layout)
        if not kept:
            return timeline
        other = min(timeline.sizes, default=0) - 1
        events = [Event([other], [kept]), *timeline.events, Event([other])]
        return replace(timeline, sizes=timeline.sizes | {other: kept}, events=events)

    @property
    def can_uncouple(self) -> bool:
        """Whether there are levers with which micro-batches are exact although samples are coupled."""
        return any(uncoupling(levers) for levers in self.variants)


@dataclass(frozen=True)
class Candidate:
    """A layout for a job, with what it would allocate at its peak, hold for that if freed memory is kept (``held``) or goes back
    (``least``), both estimated, and cost in an update."""

    job: Job
    layout: Layout
    allocated: int
    held: int
    least: int
    flops: int
    seconds: float
    fresh: int  # bytes allocated anew in one update
    exact: "Exact | None" = None  # if it is no estimate

    @property
    def guarantee(self) -> Guarantee:
        """What this layout leaves as it is."""
        return self.layout.guarantee(self.job.coupled or self.job.draws)

    def needs(self, freed: Freed) -> int:
        """Bytes that the process holds for it, if freed memory is kept (``reuse``) or goes back (``return``)."""
        found = self.exact or self
        return self.loads + (found.held if freed == "reuse" else found.least)

    @property
    def loads(self) -> int:
        """Bytes besides tensors that come with its levers."""
        return sum(self.job.loads(lever.name) for lever in self.layout.levers)

    def time(self, freed: Freed, rates: Rates) -> float:
        """Seconds of an update on a device of these rates."""
        return self.seconds + (self.fresh / rates.fresh if freed == "return" else 0)


class Exact:
    """What a layout allocates, as its timeline says; ``lacked``: there was not enough memory to run it."""

    def __init__(self, timeline: Timeline, holds: Callable[[Freed, int], int], *, lacked: bool = False) -> None:
        self.timeline = timeline
        self.lacked = lacked
        self.moment = timeline.peak()
        self._holds = holds

    @cached_property
    def held(self) -> int:
        """Bytes of the process where freed memory is kept."""
        return self._holds("reuse", self.moment.bytes)

    @cached_property
    def least(self) -> int:
        """The same where it goes back."""
        return self._holds("return", self.moment.bytes)

    def forget_timeline(self) -> None:
        """Keeps the numbers alone."""
        _ = self.held, self.least  # which stay
        self.timeline = Timeline()
        del self._holds


@dataclass(frozen=True)
class Choice:
    """What the search decided."""

    freed: Freed
    chosen: dict[str, Candidate]
    refused: dict[str, Candidate]  # what would have been taken next, had there been more memory

    @property
    def guarantee(self) -> Guarantee:
        """What holds for the whole."""
        return max(c.guarantee for c in self.chosen.values())


def shortened(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Micro-batches that show what all of ``sizes`` need: two of the largest, as the second finds gradients, and the last."""
    return sizes[:2] + sizes[-1:] if len(sizes) > 2 and sizes[-1] != sizes[1] else sizes[:2]

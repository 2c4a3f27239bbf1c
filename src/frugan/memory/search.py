"""The search for a plan: which layouts there are, what each would allocate and how long it would take, and the fastest that fits.

Two small traces of each combination of levers say what micro-batches of any size allocate (`frugan.memory.growth`); on an
accelerator those that are to be chosen are run as they are. Combinations are looked at when they may be of use: where micro-batches
alone are exact and hardly slower than the whole batch, nothing is traced but these. Times are arithmetic at fixed rates, not a
clock: the same command makes the same plan.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial

import torch

from frugan.memory import limit, pool
from frugan.memory.candidates import Candidate, Exact, shortened
from frugan.memory.candidates import Choice as Choice
from frugan.memory.candidates import Job as Job
from frugan.memory.candidates import Levers as Levers
from frugan.memory.growth import Growth, Rates
from frugan.memory.host import Freed
from frugan.memory.layout import SMALLEST_COUPLED, Guarantee, Layout, split, uncoupling
from frugan.memory.private import UNMEASURED, can_record
from frugan.memory.segments import LEAST, ROUND, SMALL_SEGMENT, Full, Segments
from frugan.memory.trace import Timeline
from frugan.utils.accelerator import accelerator

KEPT = 1.4  # times what is live is what the C library's heap holds where there is no pool: 1.08 to 1.6 were seen (docs/LOG.md)
SEGMENTS_MARGIN = 1.02  # the same of an accelerator's segments: a guess; nearest upsampling may want more (docs/gpu.md)
LACKED = 1.1  # by how much an estimate was short, where memory ran out: a guess
SLOWER = 1.05  # micro-batches alone that take no longer than this, of the whole batch's time, are not bettered by levers

# Those of accelerators are of a small GPU's data sheet and of PCIe 3; unmeasured.
RATES = {"cpu": Rates(1.5e11, 2e10, 6e-6, 2.5e9, 2e10), "cuda": Rates(2e13, 1e12, 1e-5, 5e10, 1.2e10)}


class Search:
    """The layouts of all ``jobs`` on ``device``."""

    def __init__(self, jobs: Sequence[Job], device: torch.device, *, approximate: bool = False) -> None:
        self.jobs = jobs
        self.device = device
        self.approximate = approximate  # whether coupled samples may be cut as small as one likes
        self.rates = RATES.get(device.type, RATES["cuda"])
        self._sizes = cache(lambda batch, parts: tuple(split(batch, parts)))  # which layouts share: of a large batch they are many
        self._within: int | None = None  # the budget that is held to while something is run for a plan
        self._growths: dict[tuple[str, Levers, int], Growth] = {}
        self._lacking: set[tuple[str, Levers, int]] = set()  # of those, what did not fit into the budget
        self._exact: dict[tuple[str, Layout], Exact] = {}
        self._estimates: dict[tuple[str, Levers], list[Candidate]] = {}

    @property
    def freed_ways(self) -> tuple[Freed, ...]:
        """What can become of freed memory, the faster first."""
        return ("reuse",) if self.device.type == "cpu" and pool.available() else ("reuse", "return")

    @contextmanager
    def within(self, budget: int | None) -> Iterator[None]:
        """While open, what is run is held to ``budget`` bytes, if that is said: what does not fit is no candidate."""
        self._within = budget
        try:
            yield
        finally:
            self._within = None
            self._lacking.clear()

    def limited(self) -> AbstractContextManager[None]:
        """While open, nothing exceeds the budget of `within`; for each run anew, as the one before has loaded more."""
        return nullcontext() if self._within is None else limit.limited(self._within, self.device)

    def growth(self, job: Job, layout: Layout) -> Growth:
        """What a micro-batch of ``job`` allocates with the levers of ``layout``."""
        return self._growth(job, layout.levers)

    def _growth(self, job: Job, levers: Levers, largest: int = 0) -> Growth:
        key = (job.name, levers, largest)
        if key not in self._growths:
            with self.limited():
                self._growths[key] = job.trace(levers, largest)
        return self._growths[key]

    def _growth_if_it_fits(self, job: Job, levers: Levers, largest: int = 0) -> Growth | None:
        """The same; None where memory does not suffice to look at it."""
        key = (job.name, levers, largest)
        if key in self._lacking:
            return None
        try:
            return self._growth(job, levers, largest)
        except limit.SHORTAGE as error:
            if not limit.is_out_of_memory(error):
                raise
        self._lacking.add(key)
        limit.at_rest(self.device)  # with what the error had hold of
        return None

    def exact(self, job: Job, layout: Layout) -> Exact:
        """What ``layout`` allocates, its last and smaller micro-batch too; more than two of a size are as two.

        On an accelerator its micro-batch is run: cuDNN takes workspaces for many samples that it does not take for few.
        """
        key = (job.name, layout)
        if key not in self._exact:
            growth = self.growth(job, layout)
            if there := accelerator(self.device):
                run = self._growth_if_it_fits(job, layout.levers, layout.micro_batch)
                there.release()
                if run is None:  # more than there is now, whatever few samples tell; it is asked anew where there may be more
                    timeline = job.timeline(layout, growth)
                    return Exact(timeline, partial(self._with_margin, timeline, there.total()), lacked=True)
                growth = run
            timeline = job.timeline(layout, growth)
            self._exact[key] = Exact(timeline, partial(self._with_margin, timeline, 0))
        return self._exact[key]

    def _with_margin(self, timeline: Timeline, least: int, freed: Freed, most: int) -> int:
        if self.device.type == "cpu":
            return self._of_live(most, freed)
        return max(least, int(self.holds([timeline], freed) * SEGMENTS_MARGIN))

    def holds(self, timelines: Sequence[Timeline], freed: Freed, available: int | None = None) -> int:
        """What is held for two updates in which ``timelines`` follow each other, whose first says what is there from the start.

        Where freed memory goes back, and in a pool, that is the least that will do; on an accelerator, whose allocator gives
        segments back only if it needs others, what it comes to hold within ``available`` bytes, if those are said.
        """
        most = max(max((m for _, m in t.levels()), default=sum(t.sizes[s] for s in t.held)) for t in timelines)
        if self.device.type == "cpu":
            return self._of_live(most, freed)
        held = self._replayed(timelines, Segments()).top
        if freed == "return":
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

    def _of_live(self, most: int, freed: Freed) -> int:
        """What a process on the CPU holds of which ``most`` bytes are live at once."""
        most = most if can_record() else int(most * UNMEASURED)
        return most if freed == "return" or pool.available() else int(KEPT * most)

    def _replayed(self, timelines: Sequence[Timeline], memory: Segments) -> Segments:
        for size in (timelines[0].sizes[s] for s in sorted(timelines[0].held)):
            memory.allocate(size)
        for timeline in [*timelines, *timelines]:
            memory.replay(timeline.moves())
        return memory

    def candidate(self, job: Job, layout: Layout) -> Candidate:
        """``layout`` traced as it is."""
        exact = self.exact(job, layout)
        timeline, cut = exact.timeline, sum(layout.sizes) / sum(shortened(layout.sizes))
        return Candidate(
            job, layout, exact.moment.bytes, exact.moment.bytes, exact.moment.bytes, int(timeline.flops * cut),
            self.rates.seconds(timeline.work()) * cut, int(timeline.fresh * cut), exact,
        )  # fmt: skip

    def candidates(self, job: Job, levers: Levers) -> list[Candidate]:
        """All layouts of ``job`` with ``levers``, estimated, few micro-batches first; none where memory lacks to look at them."""
        key = (job.name, levers)
        if key not in self._estimates:
            growth = self._growth_if_it_fits(job, levers)
            if growth is None:
                return []
            apart = 0 if self.device.type == "cpu" else LEAST
            kept = 1.15 * SEGMENTS_MARGIN if apart else 1 if pool.available() else KEPT
            layouts = [Layout(self._sizes(job.batch, parts), tuple(sorted(levers))) for parts in job.counts(levers)]
            alone = growth.peaks([x.micro_batch for x in layouts], several=False)
            several = growth.peaks([x.micro_batch for x in layouts], several=True)
            few, many = (self.rates.seconds(growth.work(n)) for n in (4, 16))
            each = max(0.0, (many - few) / 12)
            once = max(0.0, few - 4 * each)
            flops, fresh = (int(a / 16 * job.batch) for a in (growth.work(16)[:, 0].sum(), growth.fresh(16)))
            found = []
            for layout, one, more in zip(layouts, alone, several, strict=True):
                peak = (one if len(layout.sizes) == 1 else more) + job.kept(layout)
                found.append(Candidate(
                    job, layout, peak, int(kept * peak) + apart, peak + apart, flops,
                    each * job.batch + once * len(layout.sizes), fresh,
                ))  # fmt: skip
            self._estimates[key] = found
        return self._estimates[key]

    def prepare(self) -> None:
        """Traces every job as plainly as may be, so that all libraries have loaded what they need."""
        for job in self.jobs:
            self._growth_if_it_fits(job, job.variants[0])

    def plain(self, available: float) -> Choice | None:
        """Everything as plainly as it may be done, if that fits into ``available`` bytes without a doubt."""
        chosen = {}
        for job in self.jobs:
            estimate = next(iter(self.candidates(job, job.variants[0])), None)
            if estimate is None or estimate.allocated > available:
                return None
            chosen[job.name] = self.candidate(job, estimate.layout)
            if chosen[job.name].needs(self.freed_ways[0]) > available:
                return None
        return Choice(self.freed_ways[0], chosen, {})

    def choose(self, available: float) -> Choice | None:
        """The fastest that fits into ``available`` bytes, exact layouts before approximate ones; None if nothing does."""
        if plain := self.plain(available):
            return plain
        choices = [c for freed in self.freed_ways if (c := self._best(available, freed))]
        return min(
            choices,
            key=lambda c: (c.guarantee == Guarantee.APPROXIMATE, sum(x.time(c.freed, self.rates) for x in c.chosen.values())),
            default=None,
        )

    def smallest(self) -> dict[str, Candidate]:
        """For each job what needs least, traced as it is.

        Raises:
            torch.OutOfMemoryError: memory does not suffice to look at any.
        """
        found = {job.name: self._leanest(job) for job in self.jobs}
        if lacking := [name for name, candidate in found.items() if candidate is None]:
            raise torch.OutOfMemoryError(f"{self.device} has too little memory left to look at the phase of {lacking[0]}")
        return {name: candidate for name, candidate in found.items() if candidate}

    def looked(self, candidate: Candidate) -> int:
        """Bytes that had to be there to look at the levers of ``candidate``, on an accelerator."""
        if self.device.type == "cpu":
            return 0
        growth = self.growth(candidate.job, candidate.layout)
        return self.holds([growth.timeline((growth.seen,), accumulated=True)], "return")

    def _leanest(self, job: Job) -> Candidate | None:
        every = [c for levers in job.variants for c in self._allowed(job, levers)]
        if not every:
            return None
        return self.candidate(job, min(every, key=lambda c: (c.needs("return"), c.seconds)).layout)

    def _best(self, available: float, freed: Freed) -> Choice | None:
        chosen: dict[str, Candidate] = {}
        refused: dict[str, Candidate] = {}
        for job in self.jobs:
            found = self._fitting(job, available, freed, refused)
            if found is None:  # the estimates may be too high: what would be named as smallest is looked at as it is
                found = self._leanest(job)
                if found is None or found.needs(freed) > available:
                    return None
            chosen[job.name] = found
        return Choice(freed, chosen, refused)

    def _fitting(self, job: Job, available: float, freed: Freed, refused: dict[str, Candidate]) -> Candidate | None:
        """The fastest layout of ``job`` that fits; what would have been faster goes into ``refused``."""
        plain = self._first(self._allowed(job, job.variants[0]), available, freed, refused)
        looked = self._growth_if_it_fits(job, job.variants[0])
        least = looked.least(job.batch) if looked else math.inf
        if plain and plain.time(freed, self.rates) <= SLOWER * self.candidates(job, job.variants[0])[0].time(freed, self.rates):
            if plain.guarantee != Guarantee.APPROXIMATE:
                return plain
            all_levers = self.candidates(job, job.variants[-1])[:1]
            if not job.can_uncouple and (least > available or all(c.needs(freed) > available for c in all_levers)):
                return plain  # no lever helps it to be exact, nor do all of them
        if job.can_uncouple:  # in the order of what they take, all exact; the leanest is traced only where nothing else fits
            at_once = [levers for levers in job.variants if not uncoupling(levers)] if least <= available else []
            whole = [c for levers in at_once for c in self.candidates(job, levers)[:1]]
            if found := self._first(whole, available, freed, refused):
                return found
            for levers in filter(uncoupling, job.variants):
                if found := self._first(self._allowed(job, levers), available, freed, refused):
                    return found
        return self._first([c for levers in job.variants for c in self._allowed(job, levers)], available, freed, refused)

    def _first(
        self, candidates: Sequence[Candidate], available: float, freed: Freed, refused: dict[str, Candidate]
    ) -> Candidate | None:
        ranked = sorted(candidates, key=lambda c: (c.guarantee == Guarantee.APPROXIMATE, c.time(freed, self.rates)))
        short = 1.0  # by how much the estimates were short
        for estimate in ranked:
            if estimate.needs(freed) * short <= available:
                candidate = self.candidate(estimate.job, estimate.layout)
                if candidate.needs(freed) <= available:
                    return candidate
                lacked = candidate.exact and candidate.exact.lacked  # then nobody knows by how much
                short = short * LACKED if lacked else candidate.needs(freed) / estimate.needs(freed)
            refused[estimate.job.name] = estimate
        return None

    def _allowed(self, job: Job, levers: Levers) -> list[Candidate]:
        """Coupled samples are cut to `SMALLEST_COUPLED` at least, unless it was asked for otherwise or a lever uncouples them."""
        least = 0 if self.approximate or job.parts or not job.coupled or uncoupling(levers) else SMALLEST_COUPLED
        every = self.candidates(job, levers)
        return [c for c in every if len(c.layout.sizes) == 1 or min(c.layout.sizes) >= least]

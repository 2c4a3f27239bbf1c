"""The plan of a training within a budget, for any list of phases: the fastest that fits, or the smallest budget that would do.

`frugan.memory.Engine` plans its one phase by it, and a GAN's trainer its two.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from frugan.memory import limit
from frugan.memory.candidates import Candidate
from frugan.memory.host import Freed
from frugan.memory.layout import Layout
from frugan.memory.limit import MIB
from frugan.memory.plan import Plan
from frugan.memory.search import Choice, Search
from frugan.memory.segments import LEAST
from frugan.memory.trace import Timeline
from frugan.utils.errors import UserError
from frugan.utils.units import size

MARGIN = 12 << 20  # bytes of a budget left free: the framework differs by a few from process to process
AHEAD = 8 << 20  # bytes that what is named as smallest has above what would do: the next process may hold a little more
TRIES = 4  # of a plan, while what is run for it loads more
SIZES = 3  # of micro-batches, of which two phases have two each, that there is room for


@dataclass(frozen=True)
class Process:
    """What a process holds besides what its phases allocate, in bytes.

    Args:
        base: with what it comes to load for one size of micro-batch.
        each: more of every further size, for which libraries make code of their own.
        begun: that it has held already, or needs to begin again: no smaller budget is named.
        now: that it holds now; None: ``base``.
        reserved: of addresses that libraries reserve beyond that and never touch.
        reserved_each: the same of every size.
    """

    base: int
    each: int = 0
    begun: int = 0
    now: int | None = None
    reserved: int = 0
    reserved_each: int = 0

    def framework(self, sizes: int = SIZES) -> int:
        """What it holds for so many sizes of micro-batches."""
        return self.base + (min(sizes, SIZES) - 1) * self.each


class Beside(NamedTuple):
    """What happens between phases, while no gradients are there: a timeline, and what is held meanwhile besides it."""

    timeline: Timeline
    held: Mapping[str, int]


@dataclass(frozen=True)
class Shortage:
    """Why nothing fits into a budget, in bytes.

    Args:
        budget: that there is.
        named: whether a person named it.
        smallest: the smallest that would do, whole MiB.
        framework: what the process holds besides.
        data: what samples hold that are kept in memory.
        begun: what the process has held already.
        binding: what needs most where everything is done as leanly as can be.
        state: what of its bytes is weights, gradients, moments and the like.
        free: what is left free.
        looking: what it takes more to look for a plan than to follow it.
    """

    budget: int
    named: bool
    smallest: int
    framework: int
    data: int
    begun: int
    binding: Candidate
    state: int
    free: int
    looking: int = 0

    def sentence(self, said: str, flag: str = "", ending: str = "") -> str:
        """What a person reads: ``said`` is the budget in words, ``flag`` comes before the smallest one."""
        phase, layout = self.binding.job.name, self.binding.layout
        if self.budget < self.framework:
            why = f"the framework itself holds {size(self.framework)}"
        elif self.smallest <= self.begun + MIB:
            why = f"importing torch and opening the data took {size(self.begun)}"
        else:
            data = f"data {size(self.data)}, " if self.data else ""
            why = (
                f"the framework holds {size(self.framework)}, {data}weights with gradients, moments and average "
                f"{size(self.state)}, {phase}'s phase, with {layout}, {size(self.binding.needs('return') - self.state)}, and "
                f"{size(self.free)} are left free"
            )
            why += f"; to look for a plan takes {size(self.looking)} more" if self.looking else ""
        return (
            f"{said} is too little for this training: the smallest that works is {flag}{self.smallest // MIB}MiB, because "
            f"{why}{ending}."
        )


class TooLittle(UserError):
    """Nothing fits into the budget; ``shortage`` says why, and which would do."""

    def __init__(self, sentence: str, smallest: int, shortage: Shortage | None = None) -> None:
        super().__init__(sentence)
        self.smallest = smallest
        self.shortage = shortage


@dataclass
class BudgetPlanner:
    """Plans the phases of ``search`` on ``device``.

    Args:
        search: the phases, and what layouts of them allocate.
        device: on what.
        named: the budget in bytes, if a person named one.
        process: what the process holds besides; is asked again after ``let_go``.
        spare: bytes that may be taken where no budget was named.
        data: bytes of samples that training will hold besides what the process holds already.
        besides: a micro-batch's size to what happens between phases, by name.
        moments: bytes, by what they are for, of what else happens between phases, by name.
        let_go: is called where nothing fits beside samples that are kept in memory; gives them up, and says whether there were any.
    """

    search: Search
    device: torch.device
    named: int | None
    process: Callable[[], Process]
    spare: Callable[[], int]
    data: int = 0
    besides: Callable[[int], Mapping[str, Beside]] = lambda micro_batch: {}
    moments: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    let_go: Callable[[], bool] | None = None
    choice: Choice = field(init=False, default_factory=lambda: Choice("return", {}, {}))  # of the newest plan
    kept: dict[str, int] = field(init=False, default_factory=dict)  # bytes, by phase, that it holds through that for another

    def plan(self) -> Plan:
        """The fastest plan that fits.

        Raises:
            TooLittle: none does; names the smallest budget that would do, and what binds it.
        """
        process, tries = self.process(), 0
        while self.named is None or self.named >= process.begun - AHEAD:
            plan = self._fitting(process)
            before, process, tries = process, self.process(), tries + 1
            if plan and (process.base <= before.base or tries == TRIES):
                return plan
            if plan:
                continue  # what was run for it has loaded more, which counts
            if not (self.let_go and self.let_go()):
                break
            self.let_go, self.data = None, 0
            process = self.process()
        raise self.refusal()

    def _fitting(self, process: Process) -> Plan | None:
        """The fastest plan that fits beside what ``process`` holds."""
        budget = self._budget(process)
        available = self.available(process, budget)
        try:
            with self.search.within(self._within()):
                choice = self.search.choose(available)
                plan = choice and self._described(choice, process, budget)
                if choice and plan and plan.predicted <= budget and self._between(_last(choice)) <= available:
                    return plan
        except limit.SHORTAGE as error:  # to look for it takes more already
            if not limit.is_out_of_memory(error):
                raise
        return None

    def prepare(self) -> None:
        """Has libraries load what every plan needs (`Search.prepare`), within the budget."""
        with self.search.within(self._within()):
            self.search.prepare()

    def available(self, process: Process, budget: int) -> int:
        """Bytes of ``budget`` for phases."""
        return budget - process.framework() - self.data - MARGIN

    def with_layouts(self, layouts: Mapping[str, Layout], freed: Freed) -> Plan | None:
        """The plan with these layouts, if it fits."""
        try:
            with self.search.within(self._within()):
                chosen = {job.name: self.search.candidate(job, layouts[job.name]) for job in self.search.jobs}
        except limit.SHORTAGE as error:  # to look at it takes more already
            if not limit.is_out_of_memory(error):
                raise
            return None
        process = self.process()
        budget = self._budget(process)
        if any(c.needs(freed) > self.available(process, budget) for c in chosen.values()):
            return None
        return self._described(Choice(freed, chosen, {}), process, budget)

    def smallest(self) -> tuple[int, Candidate, int]:
        """The smallest budget that would do, what binds it, and what looking for a plan takes more than that."""
        leanest = self.search.smallest().values()
        binding = max(leanest, key=lambda c: c.needs("return"))
        between = self._between(binding.layout.micro_batch)
        held = max(binding.needs("return"), between)
        looking = max(0, *(self.search.looked(c) - held for c in leanest))
        process = self.process()  # with what that has loaded
        needs = process.framework() + self.data + MARGIN + self._ahead(process) + held + looking
        return math.ceil(max(needs, process.begun) / MIB) * MIB, binding, looking

    def refusal(self) -> TooLittle:
        """What says that nothing fits into the budget."""
        smallest, binding, looking = self.smallest()
        process = self.process()
        budget = self._budget(process)
        parts = self.search.exact(binding.job, binding.layout).moment.parts
        state = sum(parts.get(name, 0) for name in ("weights", "moments", "average", "gradients"))
        shortage = Shortage(
            budget, self.named is not None, smallest, process.framework(), self.data, process.begun, binding, state,
            MARGIN + self._ahead(process), looking,
        )  # fmt: skip
        return TooLittle(shortage.sentence(size(budget)), smallest, shortage)

    def why(self, plan: Plan) -> list[str]:
        """For each phase why the next faster layout is not taken."""
        available = plan.budget - plan.framework - plan.data
        return [
            f"{name}: the next faster, {c.layout}, would hold {size(c.needs(plan.freed))} of {size(available)} left."
            for name, c in self.choice.refused.items()
        ]

    def compared(self, plan: Plan) -> list[dict[str, Any]]:
        """For each combination of levers the largest micro-batch that fits, or if none does the smallest, beside what was taken."""
        available = plan.budget - plan.framework - plan.data - MARGIN
        rows = []
        for job in self.search.jobs:
            taken = self.choice.chosen[job.name]
            plain = next(iter(self.search.candidates(job, job.variants[0])), taken)
            for levers in job.variants:
                if not (mine := self.search.candidates(job, levers)):
                    continue
                fits = next((c for c in mine if c.needs(plan.freed) <= available), mine[-1])
                candidate = taken if taken.layout.levers == levers else fits
                needs = candidate.needs(plan.freed)
                rows.append({
                    "phase": job.name, "layout": candidate.layout.as_dict(), "in_words": str(candidate.layout),
                    "guarantee": str(candidate.guarantee), "allocates": candidate.allocated, "holds": needs,
                    "arithmetic": candidate.flops / plain.flops if plain.flops else 1.0,
                    "speed": plain.seconds / candidate.seconds,
                    "taken": candidate is taken, "too_much": max(0, int(needs - available)),
                })  # fmt: skip
        return rows

    def timelines(self) -> dict[str, tuple[Timeline, int]]:
        """What each phase of the newest plan allocates over time, with the number of its micro-batches (two of them are traced)."""
        chosen = self.choice.chosen
        return {
            name: (self.search.exact(c.job, c.layout).timeline.beside(self.kept.get(name, 0)), len(c.layout.sizes))
            for name, c in chosen.items()
        }

    def _budget(self, process: Process) -> int:
        if self.named is not None:
            return self.named
        return (process.base if process.now is None else process.now) + self.spare()

    def _ahead(self, process: Process) -> int:
        if self.device.type == "cpu":
            return AHEAD
        # What planning has left may pin a segment more in the next process: seen on a GPU (docs/gpu.md).
        return min(LEAST, process.framework() // 32)

    def _within(self) -> int | None:
        """What may be held while an accelerator runs something for a plan: what that loads comes on top, and is not refused."""
        if self.named is None or self.device.type == "cpu":
            return None
        return self.named - min(LEAST, limit.held(self.device) // 32)

    def _between(self, micro_batch: int) -> int:
        """Bytes that what happens between phases holds at most."""
        return max((self.search.holds([b.timeline], "return") for b in self._besides(micro_batch).values()), default=0)

    def _besides(self, micro_batch: int) -> Mapping[str, Beside]:
        with self.search.limited():
            return self.besides(micro_batch)

    def _described(self, choice: Choice, process: Process, budget: int) -> Plan:
        self.choice, self.kept = choice, {}
        sizes = {size for c in choice.chosen.values() for size in c.layout.sizes}
        framework = process.framework(len(sizes))
        phases, timelines = {}, []
        for name, candidate in choice.chosen.items():
            exact = self.search.exact(candidate.job, candidate.layout)
            phases[f"{name}'s phase"] = exact.moment.parts | {"workspaces": exact.moment.workspace}
            if candidate.loads:
                phases[f"{name}'s phase"]["libraries"] = candidate.loads
            timelines.append(exact.timeline)
        # Between phases what is free goes back: only phases follow one another in the same memory.
        held = self.search.holds(timelines, choice.freed, budget - process.framework() - self.data)
        held += max(c.loads for c in choice.chosen.values())
        for name, beside in self._besides(_last(choice)).items():
            moment = beside.timeline.peak()
            phases[name] = moment.parts | {"workspaces": moment.workspace} | dict(beside.held)
        phases |= {name: dict(parts) for name, parts in self.moments.items()}
        held = max(held, self._between(_last(choice)), *(sum(parts.values()) for parts in phases.values()))
        return Plan(
            {name: c.layout for name, c in choice.chosen.items()}, choice.freed, budget, self.named is not None, framework,
            self.data, phases, held, choice.guarantee, process.reserved + (len(sizes) + 1) * process.reserved_each,
        )  # fmt: skip


def _last(choice: Choice) -> int:
    """The micro-batch of the last phase, whose size what happens between phases keeps to."""
    return list(choice.chosen.values())[-1].layout.micro_batch

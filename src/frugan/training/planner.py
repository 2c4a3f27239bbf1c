"""The plan of a training: how its two phases are laid out within a budget, and what the process needs besides."""

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from frugan.config.recipe import Recipe
from frugan.data.opening import bytes_of, keepable
from frugan.data.sources.base import Tell
from frugan.gan import build
from frugan.gan.levers import LEVERS, PHASES, jobs
from frugan.memory import limit
from frugan.memory.host import Handling
from frugan.memory.layout import SMALLEST_COUPLED, Guarantee, Layout
from frugan.memory.limit import MIB
from frugan.memory.plan import Plan
from frugan.memory.search import AHEAD, MARGIN, Candidate, Choice, Search
from frugan.memory.trace import Timeline
from frugan.reporting.pictures import GRID
from frugan.training.model import Model
from frugan.training.session import Session, resolved
from frugan.training.traces import Traces
from frugan.utils.device import arithmetic
from frugan.utils.errors import UserError
from frugan.utils.units import size

SIZES = 3  # of micro-batches, of which D and G have two each, that there is room for


class TooLittle(UserError):
    """Nothing fits into the budget; ``smallest`` is the one that would do, in bytes."""

    def __init__(self, sentence: str, smallest: int) -> None:
        super().__init__(sentence)
        self.smallest = smallest


def find(recipe: Recipe, device: torch.device, *, approximate: bool = False, **options: Any) -> "tuple[Planner, Plan]":
    """The planner of ``recipe`` (resolved), and its plan.

    Where nothing fits, moments and average wait on the host if they may, and then bf16 is taken if ``approximate`` allows it. The
    arguments are the `Planner`'s, and so are the errors.
    """
    ways = [recipe]
    if recipe.memory.offload_state == "auto" and device.type != "cpu":
        ways.append(recipe.replace(offload_state="yes"))
    if approximate and recipe.memory.precision == "fp32":
        ways += [way.replace(precision="bf16") for way in ways]
    refused: TooLittle | None = None
    for way in ways:
        planner = Planner(way, device, approximate=approximate, **options)
        try:
            plan = planner.plan()
            rounded = way.memory.precision != recipe.memory.precision
            return planner, replace(plan, guarantee=Guarantee.APPROXIMATE) if rounded else plan
        except TooLittle as error:
            refused = error if refused is None or error.smallest < refused.smallest else refused
        del planner  # with what it measured
    assert refused
    raise refused


class Planner:
    """Plans trainings of ``recipe`` (resolved) on ``device``.

    Args:
        recipe: what is trained.
        device: on what.
        data: bytes of images that training will hold besides what the process holds already.
        evaluation: bytes that an evaluation takes, between two epochs.
        memory: the budget, as said.
        approximate: whether batch norm may work on micro-batches below `SMALLEST_COUPLED`.
        let_go: is called where nothing fits beside images that are kept in memory; gives them up, and says whether there were any.
        apart: whether what must be run for a plan is run by another process (`Traces`).

    Raises:
        UserError: the budget says nothing, is more than the machine has, or cannot be held on this device.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, *, data: int = 0, evaluation: int = 0, memory: str | None = None,
        approximate: bool = False, let_go: Callable[[], bool] | None = None, apart: bool = False,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.device = device
        self.data = data
        self.evaluation = evaluation
        self.named = limit.budget(memory, device)
        self.let_go = let_go
        self.approximate = approximate
        self._before = limit.baseline(device)  # in this process, without what planning leaves in it
        self._most = limit.most() if device.type == "cpu" else 0
        self.traces = Traces(recipe, device, apart=apart and self.named is not None)
        try:
            self.facts = self.traces.facts
            self.coupled = self.facts.coupled_g, self.facts.coupled_d
            self.search = Search(jobs(recipe, device, self.coupled, self.traces.growth), device, approximate=approximate)
        except BaseException:
            self.traces.close()
            raise
        self.choice = Choice("return", {}, {})  # of the newest plan

    def framework(self, sizes: int = SIZES) -> int:
        """Bytes that the process holds besides what it trains, with what it will come to load for ``sizes`` of micro-batches."""
        if self.device.type == "cpu":
            return self._before + self.facts.loaded + (sizes - 1) * self.facts.loaded_each
        self.traces.close()  # whose networks would be counted
        return limit.baseline(self.device)

    def plan(self) -> Plan:
        """The fastest plan that fits.

        Raises:
            UserError: none does; names the smallest budget that would do, and what binds it.
        """
        try:
            return self._plan()
        finally:
            self.traces.close()

    def _plan(self) -> Plan:
        if self.device.type != "cpu":
            build.rehearse(self.device)
            self.search.prepare()
        framework = self.framework()
        if self.named is None:
            spare = limit.spare(self.device)
            choice = self.search.choose(spare - self.data - self.facts.loaded - MARGIN)
            if choice is None:
                raise self._refusal(self._before + spare)
            return self._describe(choice, framework, self._before + spare)
        held = self.data + MARGIN + sum(self._evaluating().values())
        if self.evaluation and framework + held > self.named:
            needs = framework + held
            raise TooLittle(
                f"--memory {size(self.named)} is too little to evaluate while training: that takes --memory "
                f"{math.ceil(needs / MIB)}MiB; leave --evaluate-every out, and use frugan evaluate afterwards.",
                needs,
            )
        if self.named < self._most:
            raise self._refusal(self.named)
        while True:
            choice = self.search.choose(self.named - framework - self.data - MARGIN)
            plan = choice and self._describe(choice, framework, self.named)
            if plan and plan.predicted <= self.named:
                return plan
            if not (self.let_go and self.let_go()):
                raise self._refusal(self.named)
            self.let_go, self.data = None, 0
            self._before = min(self._before, limit.baseline(self.device))
            framework = self.framework()

    def _ahead(self) -> int:
        return AHEAD if self.device.type == "cpu" else 0  # an accelerator's context does not differ

    def _begun(self) -> int:
        """What the process has held already, on the CPU: importing torch takes more than some trainings do afterwards."""
        return self._most + AHEAD if self._most else 0

    def with_layouts(self, layouts: Mapping[str, Layout], handling: Handling) -> Plan | None:
        """The plan with these layouts, if it fits."""
        try:
            chosen = {job.name: self.search.candidate(job, layouts[job.name]) for job in self.search.jobs}
            framework = self.framework()
            budget = self.named or self._before + limit.spare(self.device)
            if any(c.needs(handling) > budget - framework - self.data - MARGIN for c in chosen.values()):
                return None
            return self._describe(Choice(handling, chosen, {}), framework, budget)
        finally:
            self.traces.close()

    def looked_at(self, plan: Plan) -> list[dict[str, Any]]:
        """For each combination of levers the largest micro-batch that fits, or if none does the smallest, beside what was taken."""
        available = plan.budget - plan.framework - plan.data - MARGIN
        rows = []
        for job in self.search.jobs:
            plain, taken = self.search.candidates(job, job.variants[0])[0], self.choice.chosen[job.name]
            for chosen in job.variants:
                mine = self.search.candidates(job, chosen)
                if taken.layout.levers == chosen:
                    candidate = taken
                else:
                    candidate = next((c for c in mine if c.needs(plan.handling) <= available), mine[-1])
                needs = candidate.needs(plan.handling)
                rows.append({
                    "phase": job.name, "layout": candidate.layout.as_dict(), "in_words": str(candidate.layout),
                    "guarantee": str(candidate.guarantee), "allocates": candidate.allocated, "holds": needs,
                    "arithmetic": candidate.flops / plain.flops if plain.flops else 1.0,
                    "speed": plain.seconds / candidate.seconds,
                    "taken": candidate is taken, "too_much": max(0, int(needs - available)),
                })  # fmt: skip
        self.traces.close()
        return rows

    def why(self, plan: Plan) -> list[str]:
        """For each phase why the next faster layout is not taken."""
        available = plan.budget - plan.framework - plan.data
        return [
            f"{name}: the next faster, {c.layout}, would hold {size(c.needs(plan.handling))} of {size(available)} left."
            for name, c in self.choice.refused.items()
        ]

    def timelines(self, plan: Plan) -> dict[str, tuple[Timeline, int]]:
        """What each phase allocates over time, with the number of its micro-batches (two of them are traced)."""
        chosen = self.choice.chosen
        return {name: (self.search.exact(c.job, c.layout).timeline, len(c.layout.sizes)) for name, c in chosen.items()}

    def images_per_second(self, plan: Plan) -> float:
        """About how fast ``plan`` trains here: the first micro-batch of each phase is run and timed."""
        model = Model(self.recipe, self.device)
        limit.handle(plan.handling, self.device)
        total = sum(model.seconds(name, layout) for name, layout in plan.layouts.items())
        limit.handle("return", self.device)
        return self.recipe.training.batch_size / total

    def smallest(self) -> tuple[int, int, Candidate]:
        """The smallest budget that would do, the framework's part of it, and what binds it."""
        binding = max(self.search.smallest().values(), key=lambda c: c.needs("return"))
        framework = self.framework()
        besides = [self.search.holds([t], "return") for t in self._besides(binding.layout.micro_batch).values()]
        needs = max(framework + self.data + MARGIN + self._ahead() + max(binding.needs("return"), *besides), self._begun())
        return math.ceil(needs / MIB) * MIB, framework, binding

    def _besides(self, micro_batch: int) -> dict[str, Timeline]:
        """What happens between phases, while no gradients are there, but for evaluations."""
        found = {"samples": self.traces.sampling().timeline((micro_batch,))}
        if self.recipe.memory.moments != "fp32":  # else Adam allocates nothing, offloaded moments have memory of their own
            updates = [self.traces.updating(phase).timeline((1,)) for phase in PHASES]
            found["update"] = max(updates, key=lambda t: t.peak().bytes)
        return found

    def _describe(self, choice: Choice, framework: int, budget: int) -> Plan:
        self.choice = choice
        sizes = {size for c in choice.chosen.values() for size in c.layout.sizes}
        framework -= max(0, SIZES - len(sizes)) * self.facts.loaded_each
        phases, timelines = {}, []
        for name, candidate in choice.chosen.items():
            exact = self.search.exact(candidate.job, candidate.layout)
            phases[f"{name}'s phase"] = exact.moment.parts | {"workspaces": exact.moment.workspace}
            timelines.append(exact.timeline)
        # Before samples are made, what is free goes back: only phases follow one another in the same memory.
        held = self.search.holds(timelines, choice.handling, budget - framework - self.data)
        pictures = 2 * GRID * math.prod(self.recipe.data.shape) if self.device.type == "cpu" else 0
        for name, timeline in self._besides(choice.chosen["G"].layout.micro_batch).items():
            moment = timeline.peak()
            phases[name] = moment.parts | {"workspaces": moment.workspace}
            held = max(held, self.search.holds([timeline], "return"))
            if name == "samples":
                phases[name]["pictures"] = pictures
                held = max(held, moment.bytes + pictures)
        if self.evaluation:
            phases["evaluating"] = self._evaluating()
        held = max(held, *(sum(parts.values()) for parts in phases.values()))
        return Plan(
            {name: c.layout for name, c in choice.chosen.items()}, choice.handling, budget, self.named is not None,
            framework, self.data, phases, held, choice.guarantee, self.facts.reserved + (len(sizes) + 1) * self.facts.reserved_each,
        )  # fmt: skip

    def _evaluating(self) -> dict[str, int]:
        return self.facts.held | {"evaluation": self.evaluation}

    def _refusal(self, budget: int) -> UserError:
        smallest, framework, binding = self.smallest()
        said = f"--memory {size(budget)}" if self.named else f"the {size(budget)} that are free"
        if budget < framework:
            why = f"the framework itself holds {size(framework)}"
        elif smallest <= self._begun() + MIB:
            why = f"importing torch and opening the images took {size(self._begun())}"
        else:
            parts = self.search.exact(binding.job, binding.layout).moment.parts
            state = sum(parts.get(k, 0) for k in ("weights", "moments", "average", "gradients"))
            why = (
                f"the framework holds {size(framework)}, images {size(self.data)}, weights with gradients, moments and average "
                f"{size(state)}, {binding.job.name}'s phase, with {binding.layout}, {size(binding.needs('return') - state)}, and "
                f"{size(MARGIN + self._ahead())} are left free"
            )
        lifted = [f"micro-batches below {SMALLEST_COUPLED} under batch norm"] if any(self.coupled) else []
        lifted += ["bf16"] if self.recipe.memory.precision == "fp32" else []
        way = f" (--allow-approximate also takes {' and '.join(lifted)})" if lifted and not self.approximate else ""
        return TooLittle(
            f"{said} is too little for this training: the smallest that works is --memory {smallest // MIB}MiB, "
            f"because {why}{way}.",
            smallest,
        )


def plan_of(session: Session, evaluation: int) -> tuple[Plan, Recipe]:
    """The plan of a run, and its recipe as planned: the plan it was started with if that still fits, so that it goes on as it was.

    Args:
        session: the run.
        evaluation: bytes that evaluating takes, between two epochs.

    Raises:
        UserError: nothing fits; names the smallest budget that would do.
    """
    recipe, run, loader, folder = session.recipe, session.run, session.loader, session.folder
    options: dict[str, Any] = {"data": loader.ahead(session.batch), "memory": run.memory, "evaluation": evaluation}
    options |= {"approximate": run.allow_approximate, "apart": True}
    saved = folder.saved_plan() if folder.newest_checkpoint() else {}
    if "layouts" in saved:
        layouts, planned = (
            {name: Layout.from_dict(layout, LEVERS.values()) for name, layout in saved.get(key, {}).items()}
            for key in ("layouts", "planned")
        )
        if all(sum(layout.sizes) == session.batch for layout in layouts.values()):
            plan = Planner(recipe, session.device, **options).with_layouts(layouts, saved["freed_memory"])
            if plan is not None:
                return replace(plan, planned=planned or None), recipe
            session.console.tell("The plan this run was started with does not fit any more; planning anew.")
    planner, plan = find(recipe, session.device, let_go=loader.let_go, **options)
    return plan, planner.recipe


def plan_for(recipe: Recipe, device: torch.device, tell: Tell, *, memory: str | None, approximate: bool) -> tuple[Planner, Plan]:
    """The planner and the plan of a training of ``recipe`` that is not begun.

    Raises:
        UserError: as for a training.
    """
    recipe, source = resolved(recipe, device, tell)
    with arithmetic(recipe.memory.precision, device):  # which refuses what the device has not
        keep = keepable(limit.budget(memory, device), device)
    held = bytes_of(source, recipe.data, recipe.training.batch_size, keep)
    let_go = (lambda: True) if source.random_access and held else None
    gc.collect()
    gc.freeze()  # as training does: collections, of which planning makes many, need not look at what was imported
    return find(recipe, device, data=held, memory=memory, approximate=approximate, let_go=let_go)

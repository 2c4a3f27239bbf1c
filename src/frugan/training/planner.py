"""The plan of a training: how its two phases are laid out within a budget, and what the process needs besides."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from frugan.config.recipe import Recipe
from frugan.gan import build
from frugan.gan.networks import Network
from frugan.gan.step import Step
from frugan.memory import host, limit, pool
from frugan.memory.host import Handling
from frugan.memory.layout import SMALLEST_COUPLED, Guarantee, Layout
from frugan.memory.limit import MIB
from frugan.memory.plan import Plan
from frugan.memory.recover import Change, Recovery
from frugan.memory.search import AHEAD, MARGIN, Candidate, Choice, Search
from frugan.memory.trace import Timeline
from frugan.reporting.album import GRID
from frugan.training.phases import PHASES, Model, jobs, levers, penalised
from frugan.training.traces import Traces
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
                if taken.layout == replace(taken.layout, **chosen):
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


def notices(recipe: Recipe, plan: Plan, generator: Network, discriminator: Network, device: torch.device) -> list[str]:
    """What a person should know of what ``plan`` and ``recipe`` do to the training."""
    told = []
    if recipe.memory.offload_state == "yes" and device.type != "cpu":
        told.append("Moments and the averaged generator wait on the host: the same bits, and copies in every update.")
    if recipe.memory.moments == "8bit":
        told.append("Approximate: Adam keeps its moments in 8 bits; --moments fp32 does not.")
    if "yes" in (recipe.memory.offload_state, recipe.memory.offload_activations) and device.type == "cpu":
        told.append("On the CPU there is nothing to offload to: --offload-state and --offload-activations do nothing.")
    if device.type == "cpu" and host.libc() and not pool.available():
        told.append(
            "The pool for tensors is not there, so that training is slower or needs more memory: install frugan where there is "
            "a C compiler (gcc)."
        )
    precision = recipe.memory.precision
    if precision == "fp16" and device.type == "cpu":
        told.append("The CPU has no arithmetic of its own for fp16 and is many times slower in it: use --precision bf16 or fp32.")
    if precision in ("tf32", "bf16", "fp16"):
        told.append(f"Approximate: {precision} rounds inside the networks; --precision fp32 does not.")
    for name, network in (("discriminator", discriminator), ("generator", generator)):
        cut = {p: layout.micro_batch for p, layout in plan.layouts.items() if len(layout.sizes) > 1}
        if network.couples_samples and cut:
            where = " and ".join(f"{size} in {p}'s phase" for p, size in cut.items())
            told.append(f"Approximate: batch norm in the {name} takes its statistics from micro-batches of {where}.")
    if discriminator.couples_samples and penalised(recipe):
        told.append(
            "Gradient penalties are meant for each sample alone, and batch norm in D couples them: consider --norm-d group."
        )
    return told


def recovery(recipe: Recipe, plan: Plan, step: Step, approximate: bool, changed: Callable[[Change], None]) -> Recovery:
    """What runs both phases as ``plan`` says, and goes on in a cheaper way when memory runs out."""
    device = step.like.device
    coupled = step.generator.couples_samples or step.discriminator.couples_samples
    least = {p: min(SMALLEST_COUPLED, *layout.sizes) if coupled else 1 for p, layout in plan.layouts.items()}
    coupled_d = step.discriminator.couples_samples

    traces = Traces(recipe, device)
    known = Search(jobs(recipe, device, (step.generator.couples_samples, coupled_d), traces.growth), device)

    @cache
    def needs(phase: str, layout: Layout) -> int | None:
        """What a layout allocates, if it is known: now is no time to find out."""
        if not traces.knows(phase, {k: v for k, v in vars(layout).items() if k != "sizes"}):
            return None
        job = next(job for job in known.jobs if job.name == phase)
        return known.exact(job, layout).moment.bytes

    usable = {p: {k for k, v in levers(recipe, p, device, coupled_d).items() if len(v) > 1} for p in PHASES}
    return Recovery(
        [step.generator, step.discriminator], device, plan.layouts, plan.handling, levers=usable,
        smallest=dict.fromkeys(PHASES, 2) if coupled and approximate else least, coupled=coupled, changed=changed, needs=needs,
        planned=plan.planned,
    )  # fmt: skip

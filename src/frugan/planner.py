"""The plan of a training: how its two phases are laid out within a budget, and what the process needs besides."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from frugan import build
from frugan.errors import UserError
from frugan.memory import limit
from frugan.memory.host import Handling
from frugan.memory.limit import MIB
from frugan.memory.plan import SMALLEST_COUPLED, Guarantee, Layout, size
from frugan.memory.probe import seconds
from frugan.memory.recover import Change, Recovery
from frugan.memory.search import MARGIN, SLACK, Candidate, Choice, Search, shortened
from frugan.memory.trace import Timeline
from frugan.networks import Network
from frugan.phases import PHASES, Model, jobs, levers, penalised
from frugan.pictures import FINAL, GRID, rehearse
from frugan.plans import Plan
from frugan.recipe import Recipe
from frugan.step import Step


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
        tell: is called with what a person should know.

    Raises:
        UserError: the budget says nothing, is more than the machine has, or cannot be held on this device.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, *, data: int = 0, evaluation: int = 0, memory: str | None = None,
        approximate: bool = False, let_go: Callable[[], bool] | None = None, tell: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.device = device
        self.data = data
        self.evaluation = evaluation
        self.named = limit.budget(memory, device)
        self.let_go = let_go
        self.tell = tell
        self.model = Model(recipe, device)
        self.search = Search(jobs(self.model, self._trace), device, approximate=approximate)
        self.choice = Choice("return", {}, {})  # of the newest plan

    def _trace(self, phase: str, layout: Layout, accumulated: bool) -> Timeline:
        try:
            return self.model.trace(phase, layout, accumulated)
        except UserError:
            raise
        except Exception as error:  # whatever a tracer cannot follow: values looked at, numpy, operators it does not know
            if self.model.real or limit.is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.tell(f"The networks cannot be followed without running them ({reason}): measured by running them instead.")
            self.model = Model(self.recipe, self.device, real=True)
            return self.model.trace(phase, layout, accumulated)

    def plan(self) -> Plan:
        """The fastest plan that fits.

        Raises:
            UserError: none does; names the smallest budget that would do, and what binds it.
        """
        if self.device.type != "cpu":
            build.rehearse(self.device)
        if self.named is None:
            before, spare = limit.baseline(self.device), limit.spare(self.device)
            available = spare - self.data - MARGIN
            plain = self.search.plain(available)
            choice = plain or self.search.choose(available)
            if choice is None:
                raise self._refusal(before + spare)
            plan = self._describe(choice, before, before + spare)
            rehearse()
            self.search.forget()
            framework = limit.baseline(self.device)
            return replace(plan, framework=framework, loaded=max(0, framework - before), plain=plain is not None)

        rehearse()
        self.search.prepare()
        framework = limit.baseline(self.device)
        held = self.data + MARGIN + sum(self._evaluating().values())
        if self.evaluation and framework + held > self.named:
            needs = math.ceil(SLACK * framework + held)
            raise TooLittle(
                f"--memory {size(self.named)} is too little to evaluate while training: that takes --memory "
                f"{math.ceil(needs / MIB)}MiB; leave --evaluate-every out, and use frugan evaluate afterwards.",
                needs,
            )
        attempts = 2
        while attempts:
            choice = self.search.choose(self.named - framework - self.data - MARGIN)
            if choice is None:
                if not (self.let_go and self.let_go()):
                    break
                self.let_go, self.data, framework = None, 0, limit.baseline(self.device)
                continue
            attempts -= 1
            plan = self._describe(choice, framework, self.named)
            # Planning runs operators, which loads more of the libraries; what it keeps itself does not count.
            self.search.forget()
            plan = replace(plan, framework=limit.baseline(self.device))
            if plan.predicted <= self.named - MARGIN // 4:
                return plan
            framework = plan.framework
        raise self._refusal(self.named)

    def with_layouts(self, layouts: Mapping[str, Layout], handling: Handling) -> Plan | None:
        """The plan with these layouts, if it fits."""
        chosen = {job.name: self.search.candidate(job, layouts[job.name]) for job in self.search.jobs}
        framework = limit.baseline(self.device)
        budget = self.named or framework + limit.spare(self.device)
        if any(c.needs(handling) > budget - framework - self.data - MARGIN for c in chosen.values()):
            return None
        return self._describe(Choice(handling, chosen, {}), framework, budget)

    def looked_at(self, plan: Plan) -> list[dict[str, Any]]:
        """For each combination of levers the largest micro-batch that fits, or if none does the smallest, beside what was taken."""
        available = plan.budget - plan.framework - plan.data - MARGIN
        rows = []
        for job in self.search.jobs:
            every = list(self.search.candidates(job))
            plain, taken = every[0], self.choice.chosen[job.name]
            for chosen in job.variants:
                mine = [c for c in every if c.layout == replace(c.layout, **chosen)]
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
        """About how fast ``plan`` trains here: each distinct operator of it is run and timed, alone."""
        total = 0.0
        limit.handle(plan.handling, self.device)
        for candidate in self.choice.chosen.values():
            timeline, sizes = self.search.exact(candidate.job, candidate.layout).timeline, candidate.layout.sizes
            total += seconds(timeline.calls(), self.device) * sum(sizes) / sum(shortened(sizes))
        limit.handle("return", self.device)
        return self.recipe.training.batch_size / total

    def smallest(self) -> tuple[int, int, Candidate]:
        """The smallest budget that would do, the framework's part of it, and what binds it."""
        binding = max(self.search.smallest().values(), key=lambda c: c.least)
        self.search.forget()
        framework = limit.baseline(self.device)
        return math.ceil((SLACK * framework + self.data + MARGIN + binding.least) / MIB) * MIB, framework, binding

    def _describe(self, choice: Choice, framework: int, budget: int) -> Plan:
        self.choice = choice
        phases, timelines = {}, []
        for name, candidate in choice.chosen.items():
            exact = self.search.exact(candidate.job, candidate.layout)
            phases[f"{name}'s phase"] = exact.moment.parts | {"workspaces": exact.moment.workspace}
            timelines.append(exact.timeline)
        layout = choice.chosen["G"].layout
        besides = {"judging": [self.model.judging(replace(layout, sizes=shortened(layout.sizes)))]}
        if self.recipe.memory.moments != "fp32":  # else Adam allocates nothing, offloaded moments have memory of their own
            besides["update"] = [self.model.updating(phase) for phase in PHASES]
        besides["samples"] = [self.model.sampling(count, layout.micro_batch) for count in (GRID, FINAL)]
        for name, traced in besides.items():
            timelines += traced
            for timeline in traced:
                self.search.workspaces.measure(timeline.calls())
            moment = max((t.peak(self.search.workspaces) for t in traced), key=lambda m: m.bytes)
            phases[name] = moment.parts | {"workspaces": moment.workspace}
        if self.evaluation:
            phases["evaluating"] = self._evaluating()
        held = max(sum(parts.values()) for parts in phases.values())
        # Before samples are made, what is free goes back: only phases follow one another in the same memory.
        held = max(held, self.search.holds(timelines[: len(PHASES)], choice.handling, budget - framework - self.data))
        held = max(held, *(self.search.holds([t], "return") for t in timelines[len(PHASES) :]))
        return Plan(
            {name: c.layout for name, c in choice.chosen.items()}, choice.handling, budget, self.named is not None,
            framework, self.data, phases, held, choice.guarantee,
        )  # fmt: skip

    def _evaluating(self) -> dict[str, int]:
        held = self.model.held().items()
        there = {name: sum(t.numel() * t.element_size() for t in tensors if t is not None) for name, tensors in held}
        return there | {"evaluation": self.evaluation}

    def _refusal(self, budget: int) -> UserError:
        smallest, framework, binding = self.smallest()
        said = f"--memory {size(budget)}" if self.named else f"the {size(budget)} that are free"
        if budget < framework:
            why = f"the framework itself holds {size(framework)}"
        else:
            parts = self.search.exact(binding.job, binding.layout).moment.parts
            state = sum(parts.get(k, 0) for k in ("weights", "moments", "average", "gradients"))
            why = (
                f"the framework holds {size(framework)}, images {size(self.data)}, weights with gradients, moments and average "
                f"{size(state)}, and {binding.job.name}'s phase, with {binding.layout}, {size(binding.least - state)}"
            )
        lifted = [f"micro-batches below {SMALLEST_COUPLED} under batch norm"] if self.model.coupled else []
        lifted += ["bf16"] if self.recipe.memory.precision == "fp32" else []
        way = f" (--allow-approximate also takes {' and '.join(lifted)})" if lifted and not self.search.approximate else ""
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

    @cache
    def prepare(phase: str, layout: Layout) -> int | None:
        model = Model(recipe, device)
        if model.real:
            return None
        job = next(job for job in jobs(model) if job.name == phase)
        try:
            return Search([job], device).exact(job, layout).moment.bytes
        except Exception as error:  # networks that cannot be followed have nothing prepared
            if limit.is_out_of_memory(error):
                raise
            return None

    usable = {p: {k for k, v in levers(recipe, p, device, coupled_d).items() if len(v) > 1} for p in PHASES}
    return Recovery(
        [step.generator, step.discriminator], device, plan.layouts, plan.handling, levers=usable,
        smallest=dict.fromkeys(PHASES, 2) if coupled and approximate else least, coupled=coupled, changed=changed, prepare=prepare,
        planned=plan.planned,
    )  # fmt: skip

"""The plan of a training: its two phases traced on networks without memory, and what the process needs besides."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frugan import networks
from frugan.draws import Draws
from frugan.errors import UserError
from frugan.memory import limit
from frugan.memory.limit import MIB, Handling
from frugan.memory.plan import SMALLEST_COUPLED, Guarantee, Layout, size, split
from frugan.memory.recover import Change, Recovery
from frugan.memory.search import MARGIN, Candidate, Choice, Job, Search
from frugan.memory.trace import Timeline, trace, without_memory
from frugan.networks import Network
from frugan.networks.blocks import Dropout
from frugan.optim import Ema, FrugalAdam, adam
from frugan.recipe import Recipe, WganGp
from frugan.step import Step

PHASES = {"D": "discriminator_phase", "G": "generator_phase"}


def lay_out(recipe: Recipe, generator: Network, discriminator: Network) -> None:
    """Does to new networks what the recipe's memory section says: their memory format, and what overwrites what."""
    layout = torch.channels_last if recipe.memory.channels_last else torch.contiguous_format
    for network in (generator, discriminator):
        network.to(memory_format=layout)
        for module in network.modules():
            if isinstance(module, (nn.LeakyReLU, nn.ReLU)):
                module.inplace = recipe.memory.in_place


def freeze(recipe: Recipe, discriminator: Network) -> None:
    """Keeps the first blocks as they are, running statistics too, if the recipe says so.

    Raises:
        UserError: there is nothing to start from, or nothing would be left to train.
    """
    training = recipe.training
    if training.freeze_d >= len(discriminator.blocks):
        raise UserError(f"--freeze-d {training.freeze_d} leaves nothing to train: D has {len(discriminator.blocks)} blocks.")
    if training.freeze_d and not training.init_from:
        raise UserError("--freeze-d is for fine-tuning: name the run to start from with --init-from.")
    for block in discriminator.blocks[: training.freeze_d]:
        block.requires_grad_(False).eval()


def optimizers(recipe: Recipe, generator: Network, discriminator: Network, device: torch.device) -> tuple[FrugalAdam, FrugalAdam]:
    """Of the generator and of the discriminator, whose frozen blocks have none."""
    options, memory = recipe.optimizer, recipe.memory
    offload = memory.offload_state == "yes" and device.type != "cpu"
    return (
        adam(generator.parameters(), options.lr_g, options, lean=memory.lean_adam, offload=offload),
        adam(
            [p for p in discriminator.parameters() if p.requires_grad],
            options.lr_d,
            options,
            lean=memory.lean_adam,
            offload=offload,
        ),
    )


def average(recipe: Recipe, generator: Network, device: torch.device) -> Ema | None:
    """The averaged generator, if there is one."""
    half_life = recipe.training.ema_half_life
    host = torch.device("cpu") if recipe.memory.offload_state == "yes" and device.type not in ("cpu", "meta") else None
    return Ema(generator, half_life, host).eval() if half_life else None


class Model:
    """Everything that a training of ``recipe`` (resolved) holds on ``device``, and traces of its phases.

    It is without memory; ``real`` gives it memory, for networks that cannot be followed without running them.
    """

    def __init__(self, recipe: Recipe, device: torch.device, real: bool = False) -> None:
        self.recipe = recipe
        self.device = device
        self.mode: AbstractContextManager[object] = nullcontext() if real else FakeTensorMode()
        self._offloaded = recipe.memory.offload_state == "yes" and device.type != "cpu"
        channels, size, _ = recipe.data.shape
        with torch.device(device if real else "meta"):
            self.generator, self.discriminator = networks.build(recipe.network, size, channels)
            lay_out(recipe, self.generator, self.discriminator)
            self.average = average(recipe, self.generator, torch.device("meta"))
        freeze(recipe, self.discriminator)
        with self.mode:
            for module in (self.generator, self.discriminator, self.average):
                if module is not None and not real:
                    without_memory(module, torch.device("cpu") if module is self.average and self._offloaded else device)
            self.optimizers = optimizers(recipe, self.generator, self.discriminator, device)
            self.step = make_step(recipe, self.generator, self.discriminator)
        self.coupled = self.generator.couples_samples or self.discriminator.couples_samples
        self._first = 0
        self.real = real
        self._draws_masks = any(isinstance(m, Dropout) for m in self.discriminator.modules())

    def held(self) -> dict[str, list[Tensor | None]]:
        """What is there all the time, by what it is for."""
        moments = [t for o in self.optimizers for state in o.state.values() for t in state.values()]
        on_device = [t for t in moments if t.device.type == self.device.type]
        averaged = _tensors(self.average) if self.average else []
        return {
            "weights": [*_tensors(self.generator), *_tensors(self.discriminator)],
            "moments": [*on_device],
            "average": [t for t in averaged if t.device.type == self.device.type],
        }

    def trace(self, phase: str, layout: Layout, accumulated: bool) -> Timeline:
        """What ``phase`` allocates; ``accumulated``: gradients of earlier micro-batches are there."""
        if self._draws_masks:
            self._draws_masks = False
            for either in PHASES:  # masks that are drawn ahead are held from one phase to the other, so they must be there
                self.trace(either, Layout(sizes=(2,)), False)
        learning = list((self.discriminator if phase == "D" else self.generator).parameters())
        self._first += 1 << 20  # rows that were not drawn before
        with self.mode:
            if accumulated:
                for parameter in learning:
                    parameter.grad = torch.zeros_like(parameter)
            held: dict[str, list[Tensor | None]] = {"gradients": [p.grad for p in learning], "noise": [*self.step.draws.kept()]}
            held |= self.held()
            run = getattr(self.step, PHASES[phase])
            try:
                return trace(
                    lambda: run(self._images, self._first, layout), held, {"gradients": lambda: [p.grad for p in learning]}
                )
            finally:
                for parameter in [*self.generator.parameters(), *self.discriminator.parameters()]:
                    parameter.grad = None

    def sampling(self, images: int) -> Timeline:
        """What making ``images`` images allocates."""
        network = self.average.module if self.average else self.generator
        with self.mode, torch.no_grad():
            noise = torch.empty(images, self.recipe.network.latent_dim, device=self.device)
            return trace(lambda: network(noise).float().add(1).to(torch.uint8), self.held())

    def _images(self, first: int, count: int) -> Tensor:
        return torch.empty(count, *self.recipe.data.shape, dtype=torch.uint8)


def make_step(recipe: Recipe, generator: Network, discriminator: Network) -> Step:
    """The step of ``recipe`` on these networks."""
    memory = recipe.memory
    device = next(generator.parameters()).device
    return Step(
        generator, discriminator, recipe.objective, recipe.network.latent_dim, Draws(recipe.training.seed, device),
        flip=recipe.data.flip, precision=memory.precision, channels_last=memory.channels_last,
    )  # fmt: skip


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


SLACK = 1.05  # the framework is not the same in every process, and planning closer to a limit loads more of it
LEVERS = {"D": ("separate_terms", "checkpoint_blocks", "offload_activations"),
          "G": ("recompute_generator", "checkpoint_blocks", "offload_activations")}  # fmt: skip


def levers(recipe: Recipe, phase: str, device: torch.device, coupled_d: bool) -> dict[str, tuple[Any, ...]]:
    """The values that each lever of ``phase`` may take, the plainest first.

    Raises:
        UserError: penalties by jvp were asked for with batch norm in D, whose forward derivative torch differentiates as if the
            batch's statistics were constants; with group norm it is right.
    """
    memory = recipe.memory
    allowed: dict[str, tuple[Any, ...]] = {}
    for name in LEVERS[phase]:
        if name == "offload_activations" and device.type == "cpu":
            allowed[name] = (False,)  # they are on the host
        else:
            allowed[name] = {"auto": (False, True), "yes": (True,), "no": (False,)}[getattr(memory, name)]
    if phase == "D" and penalised(recipe):
        if memory.penalty == "jvp" and coupled_d:
            raise UserError("--penalty jvp would be wrong with batch norm in the discriminator: use --norm-d group, or none.")
        allowed["penalty"] = ("double-backward", "jvp") if memory.penalty == "auto" else (memory.penalty,)
        if coupled_d:
            allowed["penalty"] = ("double-backward",)
    return allowed


def penalised(recipe: Recipe) -> bool:
    """Whether D's loss has a gradient penalty."""
    objective = recipe.objective
    return bool(objective.r1 or objective.r2 or (isinstance(objective, WganGp) and objective.gradient_penalty))


def variants(recipe: Recipe, phase: str, device: torch.device, coupled_d: bool) -> list[dict[str, Any]]:
    """The combinations of levers worth a look, the plainest first.

    Penalties by jvp need as much as by double backward until blocks are recomputed, and blocks under a double backward are all
    needed at once: the two are used together or not at all, unless one was asked for.
    """
    allowed = levers(recipe, phase, device, coupled_d)
    made = [dict(zip(allowed, values, strict=True)) for values in product(*allowed.values())]
    if recipe.memory.checkpoint_blocks == "auto" and len(allowed.get("penalty", ())) > 1:
        made = [
            v for v in made if (v["penalty"] == "jvp") == v["checkpoint_blocks"] and v["separate_terms"] >= v["checkpoint_blocks"]
        ]
    return sorted(made, key=lambda v: sum(x not in (False, "double-backward") for x in v.values()))


def jobs(model: Model, trace: Callable[[str, Layout, bool], Timeline] | None = None) -> list[Job]:
    """Both phases, for the search, traced by ``trace`` (default: the model's own).

    Raises:
        UserError: batch norm was asked to work on single samples.
    """
    memory, batch = model.recipe.memory, model.recipe.training.batch_size
    parts = {"D": memory.accumulation_steps, "G": memory.generator_accumulation_steps or memory.accumulation_steps}
    if model.coupled and min(min(split(batch, count or 1)) for count in parts.values()) < 2:
        raise UserError(
            "batch norm cannot train on micro-batches of 1: use a larger --batch-size or fewer --accumulation-steps, "
            "or --norm-g group --norm-d group."
        )
    return [
        Job(
            phase, batch, variants(model.recipe, phase, model.device, model.discriminator.couples_samples),
            partial(trace or model.trace, phase), coupled=model.coupled, smallest=2 if model.coupled else 1, parts=parts[phase],
        )
        for phase in PHASES
    ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a training is laid out, what it needs, and what there is.

    Args:
        layouts: of each phase.
        handling: what becomes of freed memory on the CPU.
        budget: bytes that the process may hold.
        named: whether a person named the budget.
        framework: bytes that the process holds before training.
        data: bytes of images.
        phases: for each moment of a training the bytes it allocates, by what they are for.
        held: bytes that the process holds for them.
        guarantee: what is left as it is.
        candidates: what was looked at, for people.
    """

    layouts: dict[str, Layout]
    handling: Handling
    budget: int
    named: bool
    framework: int
    data: int
    phases: dict[str, dict[str, int]]
    held: int
    guarantee: Guarantee
    choice: Choice

    @property
    def allocated(self) -> int:
        """The most that training allocates."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def predicted(self) -> int:
        """The most that the process will hold."""
        return self.framework + self.data + self.held

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "layouts": {name: layout.as_dict() for name, layout in self.layouts.items()},
            "guarantee": str(self.guarantee), "freed_memory": self.handling,
            "budget": self.budget, "budget_named": self.named, "predicted": self.predicted,
            "framework": self.framework, "data": self.data, "training_allocates": self.allocated, "training_holds": self.held,
            "phases": self.phases,
        }  # fmt: skip


class Planner:
    """Plans trainings of ``recipe`` (resolved) on ``device``.

    Args:
        recipe: what is trained.
        device: on what.
        data: bytes of images that training will hold besides what the process holds already.
        memory: the budget, as said.
        approximate: whether batch norm may work on micro-batches below `SMALLEST_COUPLED`.
        tell: is called with what a person should know.

    Raises:
        UserError: the budget says nothing, is more than the machine has, or cannot be held on this device.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, *, data: int = 0, memory: str | None = None, approximate: bool = False,
        tell: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.device = device
        self.data = data
        self.named = limit.budget(memory, device)
        self.tell = tell
        self.model = Model(recipe, device)
        self.search = Search(jobs(self.model, self._trace), device, approximate=approximate)

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
        if self.named is None:
            framework = limit.baseline(self.device)
            budget = framework + limit.spare(self.device)
            choice = self.search.plain(budget - framework - self.data - MARGIN) or self.search.choose(
                budget - framework - self.data - MARGIN
            )
            if choice is None:
                raise self._refusal(budget)
            return self._describe(choice, framework, budget)

        self.search.prepare()
        framework = limit.baseline(self.device)
        for _ in range(2):
            choice = self.search.choose(self.named - framework - self.data - MARGIN)
            if choice is None:
                break
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
            plain, taken = every[0], plan.choice.chosen[job.name]
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
            for name, c in plan.choice.refused.items()
        ]

    def timelines(self, plan: Plan) -> dict[str, tuple[Timeline, int]]:
        """What each phase allocates over time, with the number of its micro-batches (two of them are traced)."""
        chosen = plan.choice.chosen
        return {name: (self.search.exact(c.job, c.layout).timeline, len(c.layout.sizes)) for name, c in chosen.items()}

    def smallest(self) -> tuple[int, int, Candidate]:
        """The smallest budget that would do, the framework's part of it, and what binds it."""
        binding = max(self.search.smallest().values(), key=lambda c: c.allocated)
        self.search.forget()
        framework = limit.baseline(self.device)
        return math.ceil((SLACK * framework + self.data + MARGIN + binding.allocated) / MIB) * MIB, framework, binding

    def _describe(self, choice: Choice, framework: int, budget: int) -> Plan:
        phases, timelines = {}, []
        for name, candidate in choice.chosen.items():
            exact = self.search.exact(candidate.job, candidate.layout)
            phases[f"{name}'s phase"] = exact.moment.parts | {"workspaces": exact.moment.workspace}
            timelines.append(exact.timeline)
        sampling = self.model.sampling(64)
        self.search.workspaces.measure(sampling.calls())
        moment = sampling.peak(self.search.workspaces)
        phases["samples"] = moment.parts | {"workspaces": moment.workspace}
        held = max(sum(parts.values()) for parts in phases.values())
        if choice.handling == "reuse":
            held = max(held, self.search.heap(timelines))
        return Plan(
            {name: c.layout for name, c in choice.chosen.items()}, choice.handling, budget, self.named is not None,
            framework, self.data, phases, held, choice.guarantee, choice,
        )  # fmt: skip

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
                f"{size(state)}, and {binding.job.name}'s phase, with {binding.layout}, {size(binding.allocated - state)}"
            )
        way = "" if self.search.approximate or not self.model.coupled else (
            f" (batch norm keeps micro-batches at {SMALLEST_COUPLED} or more; --allow-approximate lifts that)"
        )  # fmt: skip
        return UserError(
            f"{said} is too little for this training: the smallest that works is --memory {smallest // MIB}MiB, because {why}{way}."
        )


def notices(recipe: Recipe, plan: Plan, generator: Network, discriminator: Network) -> list[str]:
    """What a person should know of what ``plan`` and ``recipe`` do to the training."""
    told = []
    precision = recipe.memory.precision
    if precision in ("bf16", "fp16"):
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
    usable = {p: {k for k, v in levers(recipe, p, device, coupled_d).items() if len(v) > 1} for p in PHASES}
    return Recovery(
        [step.generator, step.discriminator], device, plan.layouts, plan.handling, levers=usable,
        smallest=dict.fromkeys(PHASES, 2) if coupled and approximate else least, coupled=coupled, changed=changed,
    )  # fmt: skip

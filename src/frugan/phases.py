"""The phases of a training as the memory engine sees them: what they allocate, and which levers they have."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from frugan import generate, networks
from frugan.build import average, freeze, lay_out, make_step, optimizers
from frugan.errors import UserError
from frugan.memory import private
from frugan.memory.plan import Layout, split
from frugan.memory.search import Job
from frugan.memory.trace import Timeline, trace, without_memory
from frugan.networks.blocks import Dropout
from frugan.recipe import Recipe, WganGp

PHASES = {"D": "discriminator_phase", "G": "generator_phase"}
LEVERS = {"D": ("separate_terms", "checkpoint_blocks", "offload_activations"),
          "G": ("recompute_generator", "checkpoint_blocks", "offload_activations")}  # fmt: skip


class Model:
    """Everything that a training of ``recipe`` (resolved) holds on ``device``, and traces of its phases.

    It is without memory; ``real`` gives it memory, for networks that cannot be followed without running them, and where this torch
    has no tensors without memory.
    """

    def __init__(self, recipe: Recipe, device: torch.device, real: bool = False) -> None:
        self.recipe = recipe
        self.device = device
        mode = None if real else private.imitating()
        real = mode is None
        self.mode: AbstractContextManager[object] = mode or nullcontext()
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
        moments += [t for o in self.optimizers for t in o.staged()]
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
                gradients = {"gradients": lambda: [p.grad for p in learning]}
                return trace(lambda: run(self._images, self._first, layout), held, gradients, device=self.device)
            finally:
                for parameter in [*self.generator.parameters(), *self.discriminator.parameters()]:
                    parameter.grad = None

    def sampling(self, images: int, chunk: int) -> Timeline:
        """What making ``images`` images allocates, ``chunk`` at a time."""
        network = self.average.module if self.average else self.generator
        with self.mode:
            noise = torch.empty(images, self.recipe.network.latent_dim)
            return trace(lambda: generate.to_images(network, noise, chunk), self.held(), device=self.device)

    def updating(self, phase: str) -> Timeline:
        """What Adam allocates in its update of the network that ``phase`` trains."""
        network, optimizer = (self.discriminator, self.optimizers[1]) if phase == "D" else (self.generator, self.optimizers[0])
        with self.mode:
            gradients = {p: torch.zeros_like(p) for p in network.parameters() if p.requires_grad}
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            try:
                return trace(optimizer.step, self.held() | {"gradients": [*gradients.values()]}, device=self.device)
            finally:
                network.zero_grad(set_to_none=True)

    def judging(self, layout: Layout) -> Timeline:
        """What D(G(z)) after an update allocates."""
        self._first += 1 << 20
        with self.mode:
            return trace(lambda: self.step.judge_generated(self._first, layout.sizes), self.held(), device=self.device)

    def _images(self, first: int, count: int) -> Tensor:
        return torch.empty(count, *self.recipe.data.shape, dtype=torch.uint8)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


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

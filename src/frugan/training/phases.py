"""The phases of a training as the memory engine sees them: what they allocate, and which levers they have."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from frugan.config.objectives import WganGp
from frugan.config.recipe import Recipe
from frugan.gan import networks, sampling
from frugan.gan.build import average, freeze, lay_out, make_step, optimizers
from frugan.gan.optim import FrugalAdam
from frugan.memory import limit
from frugan.memory.growth import SMALL, Growth, traced
from frugan.memory.layout import Layout, split
from frugan.memory.search import Job
from frugan.memory.trace import GRADIENTS, GRANULE, Timeline, trace
from frugan.utils.errors import UserError

PHASES = {"D": "discriminator_phase", "G": "generator_phase"}
LEVERS = {"D": ("separate_terms", "checkpoint_blocks", "offload_activations"),
          "G": ("recompute_generator", "checkpoint_blocks", "offload_activations")}  # fmt: skip


class Model:
    """All that a training of ``recipe`` (resolved) holds on ``device``, weights zero, and traces of what it does on few samples."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        channels, size, _ = recipe.data.shape
        with _Undrawn():
            self.generator, self.discriminator = networks.build(recipe.network, size, channels)
        lay_out(recipe, self.generator, self.discriminator)
        freeze(recipe, self.discriminator)
        self.generator.to(device)
        self.discriminator.to(device)
        networks_ = {"D": self.discriminator, "G": self.generator}
        self._learning = {phase: [p for p in network.parameters() if p.requires_grad] for phase, network in networks_.items()}
        self.average = average(recipe, self.generator, device)
        self.optimizers = optimizers(recipe, self.generator, self.discriminator, device)
        self.step = make_step(recipe, self.generator, self.discriminator)
        self._first = 0
        self._granule = 1 if device.type == "cpu" else GRANULE
        self._met = False

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

    def growth(self, phase: str, levers: dict[str, Any]) -> Growth:
        """What a micro-batch of ``phase`` allocates with ``levers``; it finds gradients of an earlier one."""
        if not self._met:
            self.warm()
        return traced(lambda count: self._trace(phase, Layout(sizes=(count,), **levers)), self._granule)

    def warm(self, count: int = SMALL) -> None:
        """Does all that a training does on ``count`` samples: libraries load what they need, and masks are drawn ahead."""
        self._met = True
        for phase, optimizer in zip(PHASES, reversed(self.optimizers), strict=True):
            self._run(phase, Layout(sizes=(count,)), optimizer)
        if self.average:
            self.average.update(self.generator, count, count)
        self.step.judge_generated(self._first, (count,))
        sampling.to_images(self.average.module if self.average else self.generator, self.step.latents("latent/g", 0, count), count)

    def multiply(self, rows: int = 16) -> None:
        """Runs every dense layer on enough rows for the library of matrix products to make the buffers that it keeps."""
        for network in (self.generator, self.discriminator):
            for layer in (m for m in network.modules() if isinstance(m, nn.Linear)):
                with self.step.autocast():
                    product = layer(torch.zeros(rows, layer.in_features, device=self.device, requires_grad=True))
                product.sum().backward()
            network.zero_grad(set_to_none=True)

    def _trace(self, phase: str, layout: Layout) -> Timeline:
        learning = self._learning[phase]
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter)
        held: dict[str, list[Tensor | None]] = {GRADIENTS: [p.grad for p in learning], "noise": [*self.step.draws.kept()]}
        made = {GRADIENTS: lambda: [p.grad for p in learning]}
        return trace(lambda: self._run(phase, layout), held | self.held(), made, device=self.device)

    def _run(self, phase: str, layout: Layout, optimizer: FrugalAdam | None = None) -> None:
        self._first += 1 << 20  # rows that were not drawn before
        try:
            getattr(self.step, PHASES[phase])(self._images, self._first, layout)
            if optimizer:
                optimizer.step()
        finally:
            for parameter in [*self.generator.parameters(), *self.discriminator.parameters()]:
                parameter.grad = None

    def sampling(self) -> Growth:
        """What making images allocates, in the number that is made at a time."""
        network = self.average.module if self.average else self.generator
        noise = torch.zeros(16, self.recipe.network.latent_dim)
        return traced(
            lambda n: trace(lambda: sampling.to_images(network, noise[:n], n), self.held(), device=self.device), self._granule
        )

    def updating(self, phase: str) -> Growth:
        """What Adam allocates in its update of the network that ``phase`` trains."""
        network, optimizer = (self.discriminator, self.optimizers[1]) if phase == "D" else (self.generator, self.optimizers[0])

        def update(_: int) -> Timeline:
            gradients = {p: torch.zeros_like(p) for p in network.parameters() if p.requires_grad}
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            try:
                return trace(optimizer.step, self.held() | {"updated": [*gradients.values()]}, device=self.device)
            finally:
                network.zero_grad(set_to_none=True)

        return traced(update, self._granule)

    def seconds(self, phase: str, layout: Layout) -> float:
        """How long ``phase`` takes here: run twice, the second time by the clock."""
        short = replace(layout, sizes=layout.sizes[:1])
        took = 0.0
        for _ in range(2):
            limit.wait(self.device)
            begin = time.perf_counter()
            self._run(phase, short)
            limit.wait(self.device)
            took = time.perf_counter() - begin
        return took * sum(layout.sizes) / sum(short.sizes)

    def _images(self, first: int, count: int) -> Tensor:
        return torch.empty(count, *self.recipe.data.shape, dtype=torch.uint8)


class _Undrawn(TorchFunctionMode):
    """While open, zeros are written where random numbers would be drawn: that takes time, and what is allocated does not change."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


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


def jobs(
    recipe: Recipe, device: torch.device, coupled: tuple[bool, bool], trace: Callable[[str, dict[str, Any]], Growth]
) -> list[Job]:  # fmt: skip
    """Both phases, for the search, traced by ``trace`` (`Model.growth`).

    Args:
        recipe: what is trained.
        device: on what.
        coupled: whether a sample's output depends on the others of its micro-batch, in the generator and in the discriminator.
        trace: a phase and its levers to what a micro-batch allocates.

    Raises:
        UserError: batch norm was asked to work on single samples.
    """
    memory, batch = recipe.memory, recipe.training.batch_size
    either, coupled_d = any(coupled), coupled[1]
    parts = {"D": memory.accumulation_steps, "G": memory.generator_accumulation_steps or memory.accumulation_steps}
    if either and min(min(split(batch, count or 1)) for count in parts.values()) < 2:
        raise UserError(
            "batch norm cannot train on micro-batches of 1: use a larger --batch-size or fewer --accumulation-steps, "
            "or --norm-g group --norm-d group."
        )
    return [
        Job(
            phase, batch, variants(recipe, phase, device, coupled_d), partial(trace, phase), coupled=either,
            smallest=2 if either else 1, parts=parts[phase],
        )
        for phase in PHASES
    ]  # fmt: skip

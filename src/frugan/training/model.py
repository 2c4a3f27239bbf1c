"""A training on zeros and few samples: what its phases allocate."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from frugan.config.recipe import Recipe
from frugan.gan import networks, sampling
from frugan.gan.build import Batch, Phase, average, freeze, lay_out, make_step, optimizers, phases
from frugan.gan.features import feature_step
from frugan.memory import limit
from frugan.memory.calls import Calls
from frugan.memory.growth import SMALL, Growth, traced
from frugan.memory.layout import Layout, Lever
from frugan.memory.trace import GRADIENTS, GRANULE, Timeline, trace

FEW = 1 << 12  # numbers that are drawn all the same, so that what draws is loaded
DRAWING = {Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_}


class Model:
    """All that a training of ``recipe`` (resolved) holds on ``device``, weights zero, and traces of what it does on few samples."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        channels, size, _ = recipe.data.shape
        with _Undrawn():
            self.generator, self.discriminator = networks.build(recipe.network, size, channels, classes=len(recipe.classes))
        lay_out(recipe, self.generator, self.discriminator)
        freeze(recipe, self.discriminator)
        self.generator.to(device)
        self.discriminator.to(device)
        self.average = average(recipe, self.generator, device)
        self.optimizers = optimizers(recipe, self.generator, self.discriminator, device)
        self.step = make_step(recipe, self.generator, self.discriminator)
        self.phases = phases(self.step, *self.optimizers)
        # While G learns D does not, and says so: asked now, both say what they learn.
        self._learn = {name: [p for p in phase.network.parameters() if p.requires_grad] for name, phase in self.phases.items()}
        self._first = 0
        self._granule = 1 if device.type == "cpu" else GRANULE
        self._met = False
        self._calls = Calls()

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

    def waiting(self) -> list[Tensor]:
        """What waits on the host, where that is not the device: moments and the average."""
        state = [t for o in self.optimizers for state in o.state.values() for t in state.values()]
        state += _tensors(self.average) if self.average else []
        return [t for t in state if t.device.type != self.device.type]

    def growth(self, phase: str, levers: tuple[Lever, ...], largest: int = 0) -> Growth:
        """What a micro-batch of ``phase`` allocates with ``levers``, looked at with ``largest`` samples too if that is said; it
        finds gradients of an earlier one."""
        if not self._met:
            self.warm()
        return traced(lambda count: self._trace(phase, Layout((count,), levers)), self._granule, largest)

    def warm(self, count: int = SMALL) -> None:
        """Does all that a training does on ``count`` samples: libraries load what they need, and masks are drawn ahead."""
        self._met = True
        for phase in self.phases.values():
            self.run(phase.name, Layout((count,)), update=True)
        if self.average:
            self.average.update(self.generator, count, count)
        self.step.score_generated(self._first, Layout((count,)), self._labels)
        if learner := feature_step(self.recipe, self.discriminator, self.step):
            with learner.learning():
                learner.rehearse(self._batch(), count)
                learner.update(0.0)
        sampling.to_images(self._sampled(), self.step.latents("latent/g", 0, count), count, self._classes(count))

    @contextmanager
    def unpenalised(self) -> Iterator[None]:
        """While open, D's phase has no penalties."""
        kept = self.step.penalties
        self.step.penalties = {where: [] for where in kept}
        try:
            yield
        finally:
            self.step.penalties = kept

    def _trace(self, phase: str, layout: Layout) -> Timeline:
        learning = self._learn[phase]
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter)
        held: dict[str, list[Tensor | None]] = {GRADIENTS: [p.grad for p in learning], "noise": [*self.step.draws.kept()]}
        made = {GRADIENTS: lambda: [p.grad for p in learning]}
        calls = None if layout.uses("penalty") else self._calls  # forward mode
        return trace(lambda: self.run(phase, layout), held | self.held(), made, device=self.device, calls=calls)

    def run(self, phase: str, layout: Layout, *, update: bool = False) -> None:
        """Computes ``phase`` once, and if asked for its optimizer's update; gradients are gone afterwards."""
        self._first += 1 << 20  # rows that were not drawn before
        try:
            self.phases[phase].compute(self._batch(), self._first, layout)
            if update:
                self.phases[phase].optimizer.step()
        finally:
            self._forget_gradients()

    def sampling(self, largest: int = 0) -> Growth:
        """What making images allocates, in the number that is made at a time; right at ``largest`` of them, if that is said."""
        noise = torch.zeros(max(16, largest), self.recipe.network.latent_dim)

        def sample(count: int) -> Timeline:
            inputs = noise[:count], count, self._classes(count)
            return trace(lambda: sampling.to_images(self._sampled(), *inputs), self.held(), device=self.device)

        return traced(sample, self._granule, largest)

    def kept(self) -> Growth:
        """What making generated images allocates whose graph is kept for G's phase; it is still there at the end."""

        def generate(count: int) -> Timeline:
            self._first += 1 << 20  # rows that were not drawn before
            self.step.keeps = True
            try:
                return trace(lambda: self.step.generate_for_both(self._first, count, self._labels), self.held(), device=self.device)
            finally:
                self.step.forget()

        return traced(generate, self._granule)

    def _sampled(self) -> nn.Module:
        return self.average.module if self.average else self.generator

    def features(self) -> Growth:
        """What a micro-batch allocates from which features are learnt that D is built on; it finds gradients of an earlier one."""
        learner = feature_step(self.recipe, self.discriminator, self.step)
        assert learner

        def learn(count: int) -> Timeline:
            with learner.learning():
                for parameter in learner.parameters:
                    parameter.grad = torch.zeros_like(parameter)
                held: dict[str, list[Tensor | None]] = {
                    GRADIENTS: [p.grad for p in learner.parameters],
                    "features": [*learner.held()],
                }
                made = {GRADIENTS: lambda: [p.grad for p in learner.parameters]}
                return trace(lambda: learner.rehearse(self._batch(), count), held | self.held(), made, device=self.device)

        return traced(learn, self._granule)

    def updating(self, phase: str) -> Growth:
        """What Adam allocates in its update of the network that ``phase`` trains."""
        network, optimizer = self.phases[phase].network, self.phases[phase].optimizer

        def update(_: int) -> Timeline:
            gradients = {p: torch.zeros_like(p) for p in self._learn[phase]}
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            try:
                return trace(optimizer.step, self.held() | {"updated": [*gradients.values()]}, device=self.device)
            finally:
                network.zero_grad(set_to_none=True)

        return traced(update, self._granule)

    def seconds(self, layouts: Mapping[str, Layout], *, keeps: bool) -> float:
        """How long an update takes here: one micro-batch of each phase and its update are run twice, the second time by the clock.

        Args:
            layouts: of each phase.
            keeps: whether G's phase finds the generated images of D's (`Step.keeps`).
        """
        found = 0.0
        self.step.keeps = keeps
        try:
            for _ in range(2):
                self._first += 1 << 20  # rows that were not drawn before
                found = sum(self._seconds(self.phases[name], layout) for name, layout in layouts.items())
        finally:
            self.step.forget()
            self._forget_gradients()
        return found

    def _seconds(self, phase: Phase, layout: Layout) -> float:
        short = replace(layout, sizes=layout.sizes[:1])
        computing = self._timed(lambda: phase.compute(self._batch(), self._first, short))
        updating = self._timed(phase.optimizer.step)
        phase.network.zero_grad(set_to_none=True)
        return computing * sum(layout.sizes) / sum(short.sizes) + updating

    def _timed(self, action: Callable[[], Any]) -> float:
        limit.wait(self.device)
        begin = time.perf_counter()
        action()
        limit.wait(self.device)
        return time.perf_counter() - begin

    def _forget_gradients(self) -> None:
        for parameter in [*self.generator.parameters(), *self.discriminator.parameters()]:
            parameter.grad = None

    def _batch(self) -> Batch:
        images = lambda first, count: torch.empty(count, *self.recipe.data.shape, dtype=torch.uint8)  # noqa: E731
        return Batch(images, self._labels)

    def _labels(self, first: int, count: int) -> Tensor | None:
        return self._classes(count)

    def _classes(self, count: int) -> Tensor | None:
        return torch.zeros(count, dtype=torch.int64) if self.recipe.classes else None


class _Undrawn(TorchFunctionMode):
    """While open, zeros are written in place of many random numbers, which take time: what is allocated does not change."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func in DRAWING:
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            if tensor.numel() > FEW:
                tensor.detach().zero_()
                return tensor
        return func(*args, **kwargs)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]

"""One phase of training, in micro-batches: the only place that calls networks and ``backward``.

A phase adds the gradients of its network to ``.grad`` and returns what it measured; it neither loads, logs nor updates. Each
micro-batch's terms are summed and divided by the size of the whole batch, so that micro-batches of any sizes add up to the
gradient of the whole batch's mean (up to rounding, on networks that do not couple samples).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from frugan.config.objectives import Objective, WganGp
from frugan.gan.losses import LOSSES, squared_norm, unit_norm
from frugan.gan.networks import Network
from frugan.memory import levers, private
from frugan.memory.layout import Layout, slices
from frugan.utils.draws import Draws, Rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Images = Callable[[int, int], Tensor]  # (first, count) to uint8 images [count, c, h, w] on the host
Terms = dict[str, Tensor]


def normalise(images: Tensor, mirrored: Tensor | None, like: Tensor) -> Tensor:
    """uint8 images ``[n, c, h, w]`` to [-1, 1], on the device and in the dtype of ``like``, those in ``mirrored`` flipped."""
    images = images.to(like.device, non_blocking=True)
    if mirrored is not None:
        images = torch.where(mirrored.to(like.device)[:, None, None, None], images.flip(3), images)
    return images.to(like.dtype).div_(127.5).sub_(1)


@dataclass(frozen=True)
class Penalty:
    """A function of D's gradient at its input, ``[n, c, h, w]`` to ``[n]``, and its weight in D's loss."""

    name: str
    weight: float
    function: Callable[[Tensor], Tensor]


@dataclass
class Step:
    """Both phases of one objective on one pair of networks.

    Args:
        generator: maps noise ``[n, latent_dim]`` to images ``[n, c, h, w]``.
        discriminator: maps images to logits ``[n]``.
        objective: what is minimised, with its penalties.
        latent_dim: length of a noise vector.
        draws: where noise, masks and mirrorings come from.
        flip: whether half of the real images are mirrored.
        precision: ``fp32`` computes in the networks' own dtype, ``bf16`` and ``fp16`` under autocast.
        channels_last: memory format of the images that enter the networks.
    """

    generator: Network
    discriminator: Network
    objective: Objective
    latent_dim: int
    draws: Draws
    flip: bool = False
    precision: str = "fp32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        self.loss = LOSSES[type(self.objective)]
        self.like = next(self.generator.parameters())  # its device and dtype are the networks'
        self._learning = [p for p in self.discriminator.parameters() if p.requires_grad]  # the others are frozen for good
        self._generating = [*self.generator.parameters()]
        # Gradients of fp16 arithmetic underflow without a scale; with the other precisions the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.like.device.type, enabled=self.precision == "fp16")
        objective = self.objective
        self.r1 = Penalty("R1", objective.r1, squared_norm) if objective.r1 else None
        self.r2 = Penalty("R2", objective.r2, squared_norm) if objective.r2 else None
        weight = objective.gradient_penalty if isinstance(objective, WganGp) else 0.0
        self.between = Penalty("GP", weight, unit_norm) if weight else None

    def discriminator_phase(self, images: Images, first: int, layout: Layout) -> Terms:
        """Adds D's gradients for one batch.

        Args:
            images: real images by the number of images seen before them.
            first: the number of images seen before this batch, which also says what is drawn.
            layout: the sizes of the micro-batches and how each is computed.

        Returns:
            Means over the batch, as tensors without graph: ``Loss_D``, ``D(x)`` and each penalty.
        """
        total: Terms = {}
        batch = sum(layout.sizes)
        self._judging(True)
        for begin, count in slices(layout.sizes):
            row = first + begin
            real = self._real(images, row, count)
            fake = self._layout(self._generate("latent/d", row, count))
            between = None
            if self.between:
                share = self.draws.uniform("between", row, count, 1, 1, 1).to(real)
                between = torch.lerp(fake, real, share)
            compute = self._one_by_one if layout.separate_terms else self._at_once
            _add(total, compute(real, fake, row, batch, layout), batch)
            if self.between and between is not None:
                _, slope, values = self._penalised(between, row, "between", self.between, layout)
                self._backward(self.between.weight * slope, batch, self._learning)
                _add(total, {"GP": values}, batch)
        return total

    def generator_phase(self, images: Images, first: int, layout: Layout) -> Terms:
        """Adds G's gradients for one batch, with D frozen; arguments as in `discriminator_phase`.

        Returns:
            Means over the batch: ``Loss_G`` and ``D(G(z))``, of D as it is now.
        """
        total: Terms = {}
        batch = sum(layout.sizes)
        self._judging(False)
        for begin, count in slices(layout.sizes):
            row = first + begin
            fake = self._generate("latent/g", row, count, learns=not layout.recompute_generator, layout=layout)
            if layout.recompute_generator:
                fake.requires_grad_(True)
            with self._saving(self.discriminator, layout):
                fake_logits = self._judge(self._layout(fake), row, "g/fake")
            real_logits = None
            if self.loss.paired:
                with torch.no_grad():
                    real_logits = self._judge(self._real(images, row, count), row, "g/real")
            terms = self.loss.generator(self.objective, fake_logits, real_logits)
            _add(total, {"Loss_G": terms, "D(G(z))": self._score(fake_logits)}, batch)
            self._backward(terms, batch, [fake] if layout.recompute_generator else self._generating)
            if layout.recompute_generator:
                gradient = fake.grad
                del fake, fake_logits, terms
                with levers.still_statistics(self.generator):
                    fake = self._generate("latent/g", row, count, learns=True, layout=layout)
                levers.backward_from(fake, gradient, self._generating)
        return total

    @torch.no_grad()
    def judge_generated(self, first: int, sizes: Sequence[int]) -> Tensor:
        """Mean D(G(z)) of both networks as they are now, on the noise of `generator_phase`; changes neither."""
        total: Terms = {}
        with levers.still_statistics(self.generator), levers.still_statistics(self.discriminator):
            for begin, count in slices(sizes):
                logits = self._judge(self._layout(self._generate("latent/g", first + begin, count)), first + begin, "g/fake")
                _add(total, {"D(G(z))": self._score(logits)}, sum(sizes))
        return total["D(G(z))"]

    def latents(self, purpose: str, first: int, count: int) -> Tensor:
        """Rows of noise ``[count, latent_dim]`` on the device."""
        return self.draws.normal(purpose, first, count, self.latent_dim).to(self.like)

    def _at_once(self, real: Tensor, fake: Tensor, row: int, batch: int, layout: Layout) -> Terms:
        """One backward for everything that concerns real and generated images."""
        real_logits, real_slope, measured = self._judged(real, row, "real", self.r1, layout)
        fake_logits, fake_slope, more = self._judged(fake, row, "fake", self.r2, layout)
        terms = self.loss.discriminator(self.objective, real_logits, fake_logits)
        loss = {"Loss_D": terms.detach(), "D(x)": self._score(real_logits)}
        for penalty, slope in ((self.r1, real_slope), (self.r2, fake_slope)):
            if penalty and slope is not None:
                terms = terms + penalty.weight * slope
        self._backward(terms, batch, self._learning)
        return loss | measured | more

    def _one_by_one(self, real: Tensor, fake: Tensor, row: int, batch: int, layout: Layout) -> Terms:
        """One backward for real images, then one for generated ones, so that never both graphs are held.

        A loss that compares both needs the other's logits first, which cost a pass without graph.
        """
        other = real.new_zeros(len(fake))
        if self.loss.paired:
            with torch.no_grad(), levers.still_statistics(self.discriminator):
                other = self._judge(fake, row, "fake")
        logits, slope, measured = self._judged(real, row, "real", self.r1, layout)
        terms = self.loss.discriminator(self.objective, logits, other)
        self._backward(terms if slope is None or not self.r1 else terms + self.r1.weight * slope, batch, self._learning)
        real_logits = logits.detach()
        del logits, slope, terms
        logits, slope, more = self._judged(fake, row, "fake", self.r2, layout)
        terms = self.loss.discriminator(self.objective, real_logits, logits)
        loss = {"Loss_D": terms.detach(), "D(x)": self._score(real_logits)}
        self._backward(terms if slope is None or not self.r2 else terms + self.r2.weight * slope, batch, self._learning)
        return loss | measured | more

    def _judged(
        self, images: Tensor, row: int, scope: str, penalty: Penalty | None, layout: Layout
    ) -> tuple[Tensor, Tensor | None, Terms]:
        """Logits, what to backpropagate for the penalty if there is one, and the penalty's values by name."""
        if penalty:
            logits, slope, values = self._penalised(images, row, scope, penalty, layout)
            return logits, slope, {penalty.name: values}
        with self._saving(self.discriminator, layout):
            return self._judge(images, row, scope), None, {}

    def _penalised(self, images: Tensor, row: int, scope: str, penalty: Penalty, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, terms ``[n]`` whose gradient in D's weights is the penalty's, and the penalty's values ``[n]``."""
        images.requires_grad_(True)
        if layout.penalty == "double-backward":
            with self._offloading(self.discriminator, layout):
                logits = self._judge(images, row, scope)
                values = penalty.function(_input_gradient(logits, images, create_graph=True))
            return logits, values, values.detach()
        private.load_forward_mode()
        self._judging(False)
        with self._saving(self.discriminator, layout):
            gradient = _input_gradient(self._judge(images, row, scope), images)
        self._judging(True)
        gradient.requires_grad_(True)
        values = penalty.function(gradient)
        (direction,) = torch.autograd.grad(values.sum(), gradient)
        rows = Rows(self.draws, scope, row, len(images))
        blocks = list(self.discriminator.blocks)
        with (
            self.autocast(),
            self._offloading(self.discriminator, layout),
            levers.still_statistics(self.discriminator),
        ):  # they have moved in the pass before
            logits, slope = levers.directional(blocks, images.detach(), direction, rows, recompute=layout.checkpoint_blocks)
        return logits.to(self.like.dtype), slope.to(self.like.dtype), values.detach()

    def _judging(self, learns: bool) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(learns)

    def _generate(self, purpose: str, row: int, count: int, *, learns: bool = False, layout: Layout | None = None) -> Tensor:
        """Generated images in the networks' dtype, with a graph to G if it ``learns``."""
        with torch.set_grad_enabled(learns), self.autocast(), self._saving(self.generator, layout if learns else None):
            images: Tensor = self.generator(self.latents(purpose, row, count))
            return images.to(self.like.dtype)

    def _real(self, images: Images, row: int, count: int) -> Tensor:
        mirrored = self.draws.uniform("flip", row, count) < 0.5 if self.flip else None
        return self._layout(normalise(images(row, count), mirrored, self.like))

    def _layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def autocast(self) -> AbstractContextManager[object]:
        """While open, networks compute in the precision that was asked for."""
        if self.precision not in DTYPES:
            return nullcontext()
        return torch.autocast(self.like.device.type, DTYPES[self.precision])

    @contextmanager
    def _saving(self, network: Network, layout: Layout | None) -> Iterator[None]:
        """While open, what ``network`` keeps for backward is kept as ``layout`` says."""
        blocks = network.blocks if layout and layout.checkpoint_blocks else ()
        with self._offloading(network, layout), levers.recomputing(blocks):
            yield

    def _offloading(self, network: Network, layout: Layout | None) -> AbstractContextManager[object]:
        return levers.offloading(self.like.device, bool(layout and layout.offload_activations), network.parameters())

    def _judge(self, images: Tensor, row: int, scope: str) -> Tensor:
        """Logits ``[n]`` in at least single precision."""
        with self.autocast():
            logits: Tensor = self.discriminator(images, Rows(self.draws, scope, row, len(images)))
        return logits.to(self.like.dtype)

    def _score(self, logits: Tensor) -> Tensor:
        """What is reported as D(.): the probability of being real where the loss defines one, else the logit."""
        return logits.detach().sigmoid() if self.loss.probability else logits.detach()

    def _backward(self, terms: Tensor, batch: int, leaves: Sequence[Tensor]) -> None:
        """Adds gradients to ``leaves`` alone: those of images, which penalties make leaves too, nobody reads."""
        torch.autograd.backward(self.scaler.scale(terms.sum() / batch), inputs=leaves)


def _input_gradient(logits: Tensor, images: Tensor, *, create_graph: bool = False) -> Tensor:
    """Each sample's gradient of its logit, ``[n, c, h, w]``.

    It is not divided by the batch and needs no scale in fp16; with the loss's scale it would overflow.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=create_graph)
    return gradient


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """While open, ``network`` is in evaluation mode and builds no graph."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


def _add(total: Terms, measured: Terms, batch: int) -> None:
    for name, values in measured.items():
        mean = values.detach().sum() / batch
        total[name] = total[name] + mean if name in total else mean

"""One phase of training, in micro-batches: the only place that calls networks and ``backward``.

A phase adds the gradients of its network to ``.grad`` and returns what it measured; it neither loads, logs nor updates. Each
micro-batch's terms are summed and divided by the size of the whole batch, so that micro-batches of any sizes add up to the
gradient of the whole batch's mean (up to rounding, on networks that do not couple samples).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from frugan import recipe
from frugan.draws import Draws, Rows
from frugan.networks import Network, still_statistics
from frugan.objective import LOSSES, squared_norm, unit_norm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Terms = dict[str, Tensor]


def split(batch: int, parts: int) -> list[int]:
    """Sizes of ``parts`` micro-batches of ``batch`` samples, the last ones one smaller if need be; never an empty one."""
    parts = min(parts, batch)
    return [batch // parts + (i < batch % parts) for i in range(parts)]


def normalise(images: Tensor, mirrored: Tensor | None, like: Tensor) -> Tensor:
    """uint8 images ``[n, c, h, w]`` to [-1, 1], on the device and in the dtype of ``like``, those in ``mirrored`` flipped."""
    images = images.to(like.device, non_blocking=True)
    if mirrored is not None:
        images = torch.where(mirrored.to(like.device)[:, None, None, None], images.flip(3), images)
    return images.to(like.dtype).div_(127.5).sub_(1)


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
    objective: recipe.Objective
    latent_dim: int
    draws: Draws
    flip: bool = False
    precision: str = "fp32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        self.loss = LOSSES[type(self.objective)]
        self.like = next(self.generator.parameters())  # its device and dtype are the networks'
        self._learning = [p for p in self.discriminator.parameters() if p.requires_grad]  # the others are frozen for good
        # Gradients of fp16 arithmetic underflow without a scale; with the other precisions the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.like.device.type, enabled=self.precision == "fp16")

    def discriminator_phase(self, images: Tensor, first: int, sizes: Sequence[int]) -> Terms:
        """Adds D's gradients for one batch.

        Args:
            images: real images, uint8 ``[n, c, h, w]`` on the host.
            first: the number of images seen before this batch, which says what is drawn.
            sizes: of the micro-batches; they sum to n.

        Returns:
            Means over the batch, as tensors without graph: ``Loss_D``, ``D(x)`` and each penalty.
        """
        total: Terms = {}
        objective = self.objective
        self._judging(True)
        for begin, count in _slices(sizes):
            row = first + begin
            real = self._real(images, row, begin, count)
            with torch.no_grad(), self._autocast():
                fake = self.generator(self.latents("latent/d", row, count))
            fake = self._layout(fake.to(real.dtype))
            real.requires_grad_(objective.r1 > 0)
            fake.requires_grad_(objective.r2 > 0)

            real_logits = self._judge(real, row, "real")
            fake_logits = self._judge(fake, row, "fake")
            terms = self.loss.discriminator(objective, real_logits, fake_logits)
            measured = {"Loss_D": terms, "D(x)": self._score(real_logits)}
            if objective.r1:
                measured["R1"] = squared_norm(self._input_gradient(real_logits, real))
                terms = terms + objective.r1 * measured["R1"]
            if objective.r2:
                measured["R2"] = squared_norm(self._input_gradient(fake_logits, fake))
                terms = terms + objective.r2 * measured["R2"]
            if isinstance(objective, recipe.WganGp) and objective.gradient_penalty:
                share = self.draws.uniform("between", row, count, 1, 1, 1).to(real)
                between = torch.lerp(fake.detach(), real.detach(), share).requires_grad_(True)
                gradient = self._input_gradient(self._judge(between, row, "between"), between)
                measured["GP"] = unit_norm(gradient)
                terms = terms + objective.gradient_penalty * measured["GP"]
            self._backward(terms, images.shape[0])
            _add(total, measured, images.shape[0])
        return total

    def generator_phase(self, images: Tensor, first: int, sizes: Sequence[int]) -> Terms:
        """Adds G's gradients for one batch, with D frozen; arguments as in `discriminator_phase`.

        Returns:
            Means over the batch: ``Loss_G`` and ``D(G(z))``, of D as it is now.
        """
        total: Terms = {}
        batch = sum(sizes)
        self._judging(False)
        for begin, count in _slices(sizes):
            row = first + begin
            with self._autocast():
                fake = self.generator(self.latents("latent/g", row, count))
            fake_logits = self._judge(self._layout(fake.to(self.like.dtype)), row, "g/fake")
            real_logits = None
            if self.loss.paired:
                with torch.no_grad():
                    real_logits = self._judge(self._real(images, row, begin, count), row, "g/real")
            terms = self.loss.generator(self.objective, fake_logits, real_logits)
            self._backward(terms, batch)
            _add(total, {"Loss_G": terms, "D(G(z))": self._score(fake_logits)}, batch)
        return total

    @torch.no_grad()
    def judge_generated(self, first: int, sizes: Sequence[int]) -> Tensor:
        """Mean D(G(z)) of both networks as they are now, on the noise of `generator_phase`; changes neither."""
        total: Terms = {}
        with still_statistics(self.generator), still_statistics(self.discriminator):
            for begin, count in _slices(sizes):
                with self._autocast():
                    fake = self.generator(self.latents("latent/g", first + begin, count))
                logits = self._judge(self._layout(fake.to(self.like.dtype)), first + begin, "g/fake")
                _add(total, {"D(G(z))": self._score(logits)}, sum(sizes))
        return total["D(G(z))"]

    def latents(self, purpose: str, first: int, count: int) -> Tensor:
        """Rows of noise ``[count, latent_dim]`` on the device."""
        return self.draws.normal(purpose, first, count, self.latent_dim).to(self.like)

    def _judging(self, learns: bool) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(learns)

    def _real(self, images: Tensor, row: int, begin: int, count: int) -> Tensor:
        mirrored = self.draws.uniform("flip", row, count) < 0.5 if self.flip else None
        return self._layout(normalise(images[begin : begin + count], mirrored, self.like))

    def _layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision not in DTYPES:
            return nullcontext()
        return torch.autocast(self.like.device.type, DTYPES[self.precision])

    def _judge(self, images: Tensor, row: int, scope: str) -> Tensor:
        """Logits ``[n]`` in at least single precision."""
        with self._autocast():
            logits: Tensor = self.discriminator(images, Rows(self.draws, scope, row, len(images)))
        return logits.to(self.like.dtype)

    def _score(self, logits: Tensor) -> Tensor:
        """What is reported as D(.): the probability of being real where the loss defines one, else the logit."""
        return logits.detach().sigmoid() if self.loss.probability else logits.detach()

    def _input_gradient(self, logits: Tensor, images: Tensor) -> Tensor:
        """Each sample's gradient of its logit, ``[n, c, h, w]``, with a graph to D's weights.

        It is not divided by the batch and needs no scale in fp16; with the loss's scale it would overflow.
        """
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient

    def _backward(self, terms: Tensor, batch: int) -> None:
        torch.autograd.backward(self.scaler.scale(terms.sum() / batch))


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


def _slices(sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    begin = 0
    for count in sizes:
        yield begin, count
        begin += count


def _add(total: Terms, measured: Terms, batch: int) -> None:
    for name, values in measured.items():
        mean = values.detach().sum() / batch
        total[name] = total[name] + mean if name in total else mean

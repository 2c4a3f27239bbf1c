"""One phase of training, in micro-batches: the only place that calls networks and ``backward``.

A phase adds the gradients of its network to ``.grad`` and returns what it measured; it neither loads, logs nor updates. Each
micro-batch's terms are summed and divided by the size of the whole batch, so that micro-batches of any sizes add up to the
gradient of the whole batch's mean (up to rounding, on networks that do not couple samples).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from frugan.config.objectives import Objective
from frugan.data.loader import Batch as Batch
from frugan.data.loader import Labels as Labels
from frugan.data.loader import unlabelled
from frugan.gan.augment import Augment
from frugan.gan.losses import LOSSES
from frugan.gan.networks import Network
from frugan.gan.penalties import Penalty, penalties, weighted
from frugan.memory import levers, private
from frugan.memory.layout import Layout, slices
from frugan.utils.draws import Draws, Rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Terms = dict[str, Tensor]
Weighted = tuple[float, Tensor]  # a weight, and terms [n]


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
        generator: maps noise ``[n, latent_dim]``, and what it needs to know of the samples, to images ``[n, c, h, w]``.
        discriminator: maps images, and the same, to logits ``[n]``.
        objective: what is minimised, with its penalties.
        latent_dim: length of a noise vector.
        draws: where noise, masks and mirrorings come from.
        flip: whether half of the real images are mirrored.
        augment: what D sees of images; None: the images themselves.
        precision: ``fp32`` computes in the networks' own dtype, ``bf16`` and ``fp16`` under autocast.
        channels_last: memory format of the images that enter the networks.
        conditional: whether both networks are told the classes of images, which then need labels.
        balanced: the classes that generated images have equally often; none: each has the class of the real image of its number.
    """

    generator: Network
    discriminator: Network
    objective: Objective
    latent_dim: int
    draws: Draws
    flip: bool = False
    augment: Augment | None = None
    precision: str = "fp32"
    channels_last: bool = False
    conditional: bool = False
    balanced: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.loss = LOSSES[type(self.objective)]
        self.like = next(self.generator.parameters())  # its device and dtype are the networks'
        self._learning = [p for p in self.discriminator.parameters() if p.requires_grad]  # the others are frozen for good
        self._generating = [*self.generator.parameters()]
        # Gradients of fp16 arithmetic underflow without a scale; with the other precisions the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.like.device.type, enabled=self.precision == "fp16")
        self.penalties: dict[str, list[Penalty]] = {"real": [], "fake": [], "between": []}  # by the images that they are taken at
        for penalty in penalties(self.objective):
            self.penalties[penalty.where].append(penalty)

    def discriminator_phase(self, batch: Batch, first: int, layout: Layout) -> Terms:
        """Adds D's gradients for one batch.

        Args:
            batch: real images, and their classes, by the number of images seen before them.
            first: the number of images seen before this batch, which also says what is drawn.
            layout: the sizes of the micro-batches and how each is computed.

        Returns:
            Means over the batch, as tensors without graph: ``Loss_D``, ``D(x)``, each penalty, and ``r_t`` and ``p`` if images
            are augmented.
        """
        total: Terms = {}
        whole = sum(layout.sizes)
        self._set_learning(True)
        compute = self._one_by_one if layout.uses("separate_terms") else self._at_once
        for begin, count in slices(layout.sizes):
            of_real = self._of_real(first + begin, count, batch.labels)
            of_fake = self._of_fake("latent/d", first + begin, count, batch.labels)
            real = self._real(batch, of_real)
            fake = self._shown(self._generate(of_fake), of_fake.used_as("fake"))
            between = None
            if self.penalties["between"]:
                share = self.draws.uniform("between", of_real.first, count, 1, 1, 1).to(real)
                between = torch.lerp(fake, real, share)
            _add(total, compute(real, fake, of_real.used_as("real"), of_fake.used_as("fake"), whole, layout), whole)
            if between is not None:
                _, (weight, slope), measured = self._penalised(between, of_real.used_as("between"), layout)
                self._backward(weight * slope, whole, self._learning)
                _add(total, measured, whole)
        if self.augment:
            total["p"] = self.like.new_full((), self.augment.p)
        return total

    def generator_phase(self, batch: Batch, first: int, layout: Layout) -> Terms:
        """Adds G's gradients for one batch, with D frozen; arguments as in `discriminator_phase`.

        Returns:
            Means over the batch: ``Loss_G`` and ``D(G(z))``, of D as it is now.
        """
        total: Terms = {}
        whole = sum(layout.sizes)
        self._set_learning(False)
        recompute = layout.uses("recompute_generator")
        for begin, count in slices(layout.sizes):
            rows = self._of_fake("latent/g", first + begin, count, batch.labels)
            fake = self._generate(rows, learns=not recompute, layout=layout)
            if recompute:
                fake.requires_grad_(True)
            with self._saving(self.discriminator, layout):
                fake_logits = self._discriminate(self._shown(fake, rows.used_as("g/fake")), rows.used_as("g/fake"))
            real_logits = None
            if self.loss.paired:
                with torch.no_grad():
                    of_real = self._of_real(rows.first, count, batch.labels).used_as("g/real")
                    real_logits = self._discriminate(self._real(batch, of_real), of_real)
            terms = self.loss.generator(self.objective, fake_logits, real_logits)
            _add(total, {"Loss_G": terms, "D(G(z))": self._score(fake_logits)}, whole)
            self._backward(terms, whole, [fake] if recompute else self._generating)
            if recompute:
                gradient = fake.grad
                del fake, fake_logits, terms
                with levers.still_statistics(self.generator):
                    fake = self._generate(rows, learns=True, layout=layout)
                levers.backward_from(fake, gradient, self._generating)
        return total

    @torch.no_grad()
    def score_generated(self, first: int, sizes: Sequence[int], labels: Labels = unlabelled) -> Tensor:
        """Mean D(G(z)) of both networks as they are now, on the noise and ``labels`` of `generator_phase`; changes neither."""
        total: Terms = {}
        with levers.still_statistics(self.generator), levers.still_statistics(self.discriminator):
            for begin, count in slices(sizes):
                rows = self._of_fake("latent/g", first + begin, count, labels)
                logits = self._discriminate(self._shown(self._generate(rows), rows.used_as("g/fake")), rows.used_as("g/fake"))
                _add(total, {"D(G(z))": self._score(logits)}, sum(sizes))
        return total["D(G(z))"]

    def latents(self, purpose: str, first: int, count: int) -> Tensor:
        """Rows of noise ``[count, latent_dim]`` on the device."""
        return self.draws.normal(purpose, first, count, self.latent_dim).to(self.like)

    def _at_once(self, real: Tensor, fake: Tensor, of_real: Rows, of_fake: Rows, batch: int, layout: Layout) -> Terms:
        """One backward for everything that concerns real and generated images."""
        real_logits, real_penalty, measured = self._with_penalties(real, of_real, layout)
        fake_logits, fake_penalty, more = self._with_penalties(fake, of_fake, layout)
        terms = self.loss.discriminator(self.objective, real_logits, fake_logits)
        loss = self._measured(terms, real_logits, fake_logits)
        self._backward(_plus(_plus(terms, real_penalty), fake_penalty), batch, self._learning)
        return loss | measured | more

    def _one_by_one(self, real: Tensor, fake: Tensor, of_real: Rows, of_fake: Rows, batch: int, layout: Layout) -> Terms:
        """One backward for real images, then one for generated ones, so that never both graphs are held.

        A loss that compares both needs the other's logits first, which cost a pass without graph.
        """
        other = real.new_zeros(len(fake))
        if self.loss.paired:
            with torch.no_grad(), levers.still_statistics(self.discriminator):
                other = self._discriminate(fake, of_fake)
        logits, penalty, measured = self._with_penalties(real, of_real, layout)
        terms = self.loss.discriminator(self.objective, logits, other)
        self._backward(_plus(terms, penalty), batch, self._learning)
        real_logits = logits.detach()
        del logits, penalty, terms
        logits, penalty, more = self._with_penalties(fake, of_fake, layout)
        terms = self.loss.discriminator(self.objective, real_logits, logits)
        loss = self._measured(terms, real_logits, logits)
        self._backward(_plus(terms, penalty), batch, self._learning)
        return loss | measured | more

    def _with_penalties(self, images: Tensor, rows: Rows, layout: Layout) -> tuple[Tensor, Weighted | None, Terms]:
        """Logits, what penalties there are add to D's loss, and their values by name."""
        if self.penalties[rows.scope]:
            return self._penalised(images, rows, layout)
        with self._saving(self.discriminator, layout):
            return self._discriminate(images, rows), None, {}

    def _penalised(self, images: Tensor, rows: Rows, layout: Layout) -> tuple[Tensor, Weighted, Terms]:
        """Logits, a weight with terms ``[n]`` whose gradient in D's weights is the penalties', and their values ``[n]``."""
        penalties = self.penalties[rows.scope]
        images.requires_grad_(True)
        if not layout.uses("penalty"):
            with self._offloading(self.discriminator, layout):
                logits = self._discriminate(images, rows)
                weight, terms, measured = weighted(penalties, _input_gradient(logits, images, create_graph=True))
            return logits, (weight, terms), measured
        private.load_forward_mode()
        self._set_learning(False)
        with self._saving(self.discriminator, layout):
            gradient = _input_gradient(self._discriminate(images, rows), images)
        self._set_learning(True)
        gradient.requires_grad_(True)
        weight, terms, measured = weighted(penalties, gradient)
        (direction,) = torch.autograd.grad(terms.sum(), gradient)
        recompute = layout.uses("checkpoint_blocks")
        with (
            self.autocast(),
            self._offloading(self.discriminator, layout),
            levers.still_statistics(self.discriminator),
        ):  # they have moved in the pass before
            logits, slope = levers.directional(self.discriminator.chain, images.detach(), direction, rows, recompute=recompute)
        return logits.to(self.like.dtype), (weight, slope.to(self.like.dtype)), measured

    def _set_learning(self, learns: bool) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(learns)

    def _of_real(self, first: int, count: int, labels: Labels) -> Rows:
        """The real images ``first`` to ``first + count``."""
        classes = labels(first, count) if self.conditional else None
        return Rows(self.draws, "real", first, count, None if classes is None else classes.to(self.like.device))

    def _of_fake(self, scope: str, first: int, count: int, labels: Labels) -> Rows:
        """As many generated ones, whose noise is drawn for ``scope``.

        A loss that compares each with a real image must not compare classes: both have the same, unless balanced ones are asked
        for.
        """
        if not self.balanced:
            return self._of_real(first, count, labels).used_as(scope)
        place = self.draws.uniform(f"class/{scope}", first, count).mul(len(self.balanced)).long().clamp_(max=len(self.balanced) - 1)
        classes = torch.tensor(self.balanced)[place]
        return Rows(self.draws, scope, first, count, classes.to(self.like.device))

    def _generate(self, rows: Rows, *, learns: bool = False, layout: Layout | None = None) -> Tensor:
        """Generated images in the networks' dtype, with a graph to G if it ``learns``."""
        with torch.set_grad_enabled(learns), self.autocast(), self._saving(self.generator, layout if learns else None):
            images: Tensor = self.generator(self.latents(rows.scope, rows.first, rows.count), rows)
            return images.to(self.like.dtype)

    def _real(self, batch: Batch, rows: Rows) -> Tensor:
        mirrored = self.draws.uniform("flip", rows.first, rows.count) < 0.5 if self.flip else None
        return self._shown(normalise(batch.images(rows.first, rows.count), mirrored, self.like), rows)

    def _shown(self, images: Tensor, rows: Rows) -> Tensor:
        """Images as D sees them: the only place where they are augmented, for the use that ``rows`` name, and laid out."""
        if self.augment:
            images = self.augment(images, rows)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def autocast(self) -> AbstractContextManager[object]:
        """While open, networks compute in the precision that was asked for."""
        if self.precision not in DTYPES:
            return nullcontext()
        return torch.autocast(self.like.device.type, DTYPES[self.precision])

    @contextmanager
    def _saving(self, network: Network, layout: Layout | None) -> Iterator[None]:
        """While open, what ``network`` keeps for backward is kept as ``layout`` says."""
        blocks = network.blocks if layout and layout.uses("checkpoint_blocks") else ()
        with self._offloading(network, layout), levers.recomputing(blocks):
            yield

    def _offloading(self, network: Network, layout: Layout | None) -> AbstractContextManager[object]:
        return levers.offloading(self.like.device, bool(layout and layout.uses("offload_activations")), network.parameters())

    def _discriminate(self, images: Tensor, rows: Rows) -> Tensor:
        """Logits ``[n]`` in at least single precision."""
        with self.autocast():
            logits: Tensor = self.discriminator(images, rows)
        return logits.to(self.like.dtype)

    def _measured(self, terms: Tensor, real: Tensor, fake: Tensor) -> Terms:
        """What D's phase reports of each sample, ``[n]`` each: by its terms, and its logits of real and generated images."""
        measured = {"Loss_D": terms.detach(), "D(x)": self._score(real)}
        if self.augment:  # the sign that D overfits: `frugan.gan.augment.Adaptive`
            measured["r_t"] = ((real if self.loss.centred else real - fake) > 0).to(real.dtype) * 2 - 1
        return measured

    def _score(self, logits: Tensor) -> Tensor:
        """What is reported as D(.): the probability of being real where the loss defines one, else the logit."""
        return logits.detach().sigmoid() if self.loss.probability else logits.detach()

    def _backward(self, terms: Tensor, batch: int, leaves: Sequence[Tensor]) -> None:
        """Adds gradients to ``leaves`` alone: those of images, which penalties make leaves too, nobody reads."""
        torch.autograd.backward(self.scaler.scale(terms.sum() / batch), inputs=leaves)


def _plus(terms: Tensor, penalty: Weighted | None) -> Tensor:
    return terms if penalty is None else terms + penalty[0] * penalty[1]


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

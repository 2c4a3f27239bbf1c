"""One phase of training, in micro-batches: with its bases, `frugan.gan.slopes` and `frugan.gan.passes`, the only place of an update
that calls networks and ``backward``.

A phase adds the gradients of its network to ``.grad`` and returns what it measured; it neither loads, logs nor updates. Each
micro-batch's terms are summed and divided by the size of the whole batch, so that micro-batches of any sizes add up to the
gradient of the whole batch's mean: up to rounding, on networks that do not couple samples, or where batch norm takes its statistics
from the whole batch (`frugan.memory.batchnorm`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from frugan.config.objectives import Objective
from frugan.data.loader import Batch as Batch
from frugan.data.loader import Labels as Labels
from frugan.data.loader import unlabelled
from frugan.gan.levers import keeps_fakes
from frugan.gan.losses import LOSSES
from frugan.gan.networks import Network
from frugan.gan.passes import Augment, Part
from frugan.gan.slopes import Slopes, per_sample
from frugan.gan.slopes import Terms as Terms
from frugan.memory import levers
from frugan.memory.layout import Layout, slices
from frugan.utils.draws import Draws, Rows


@dataclass
class Step(Slopes):
    """Both phases of one objective on one pair of networks.

    Args:
        generator: maps noise ``[n, latent_dim]``, and what it needs to know of the samples, to images ``[n, c, h, w]``.
        discriminator: maps images, and the same, to logits ``[n]``, or ``[n, heads]``.
        objective: what is minimised, with its penalties.
        latent_dim: length of a noise vector.
        draws: where noise, masks and mirrorings come from.
        flip: whether half of the real images are mirrored.
        augment: what D sees of images; None: the images themselves.
        precision: ``fp32`` computes in the networks' own dtype, ``bf16`` and ``fp16`` under autocast.
        channels_last: memory format of the images that enter the networks.
        conditional: whether both networks are told the classes of images, which then need labels.
        balanced: the classes that generated images have equally often; none: each has the class of the real image of its number.
        reuse_fakes: whether G learns from the generated images that D has just seen, which are made once for both where there is
            memory for that (``keeps``), else twice.
        four_passes: whether penalties are computed so where that can be done (`frugan.gan.bends`); no: by double backward.
        whole: samples of a batch, where other processes compute some of them; None: all are in the layout.

    Attributes:
        in_four_passes: whether penalties are.
        keeps: whether the graph of generated images is held through D's phase, for G's: bitwise the same without.
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
    reuse_fakes: bool = False
    four_passes: bool = True
    whole: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss = LOSSES[type(self.objective)]
        self._generating = [*self.generator.parameters()]

    def discriminator_phase(self, batch: Batch, first: int, layout: Layout) -> Terms:
        """Adds D's gradients for one batch.

        Args:
            batch: real images, and their classes, by the number of images seen before them.
            first: the number of images seen before this batch, which also says what is drawn.
            layout: the sizes of the micro-batches and how each is computed.

        Returns:
            Means over the batch, as tensors without graph: ``Loss_D``, ``D(x)``, each penalty, and ``r_t`` and ``p`` if images
            are augmented. Of some of a batch (``whole``), what these add to them.
        """
        total: Terms = {}
        whole, parts = self.whole or sum(layout.sizes), _parts(first, layout)
        self._set_learning(True)
        compute = self._one_by_one if layout.uses("separate_terms") else self._at_once

        def generate(first: int, count: int) -> Tensor:
            rows = self._of_fake("latent/d", first, count, batch.labels)
            at_once = len(parts) == 1 and not layout.uncoupled
            images = self.generate_for_both(first, count, batch.labels) if at_once else self._generate(rows)
            return self._shown(images, rows.used_as("fake"))

        if self._keeps_fakes(layout):
            generate = cache(generate)

        def judge_real(first: int, count: int) -> Tensor:
            rows = self._of_real(first, count, batch.labels)
            return self._judge(self._real(batch, rows), rows.used_as("real"), layout)

        def judge_fake(first: int, count: int) -> Tensor:
            rows = self._of_fake("latent/d", first, count, batch.labels)
            return self._judge(generate(first, count), rows.used_as("fake"), layout)

        with self._measured(layout, parts, {"latent/d": generate, "real": judge_real, "fake": judge_fake}):
            for begin, count in parts:
                of_real = self._of_real(begin, count, batch.labels)
                of_fake = self._of_fake("latent/d", begin, count, batch.labels)
                real = self._real(batch, of_real)
                fake = generate(begin, count)
                between = None
                if self.penalties["between"]:
                    share = self.draws.uniform("between", begin, count, 1, 1, 1).to(real)
                    between = torch.lerp(fake, real, share)
                _add(total, compute(real, fake, of_real.used_as("real"), of_fake.used_as("fake"), whole, layout), whole)
                if between is not None:
                    judged = self._penalised(between, of_real.used_as("between"), layout)
                    self._learn(judged.plus(share.new_zeros(count)), whole, [judged])
                    _add(total, judged.measured, whole)
            self._whole.bring_back("real", partial(self._carry, "real", judge_real, self._learning))
            self._whole.bring_back("fake", partial(self._carry, "fake", judge_fake, self._learning))
        if self.augment:
            total["p"] = self.augment.chance(self.like) * (sum(layout.sizes) / whole)
        return total

    def generator_phase(self, batch: Batch, first: int, layout: Layout) -> Terms:
        """Adds G's gradients for one batch, with D frozen; arguments as in `discriminator_phase`.

        Returns:
            Means over the batch: ``Loss_G`` and ``D(G(z))``, of D as it is now.
        """
        total: Terms = {}
        whole, parts = self.whole or sum(layout.sizes), _parts(first, layout)
        self._set_learning(False)
        kept = self._kept_of(parts, layout)

        def generate(first: int, count: int) -> Tensor:
            if kept:
                return kept.pop()
            return self._generate(self._of_fake(self._latent_g, first, count, batch.labels), learns=True, layout=layout)

        @cache
        def made(first: int, count: int) -> Tensor:
            """Generated images that gradients are gathered at, for one pass back through G."""
            return self._generate(self._of_fake(self._latent_g, first, count, batch.labels)).requires_grad_(True)

        gathers = self._keeps_fakes(layout)

        def judge(first: int, count: int, fake: Tensor) -> Tensor:
            rows = self._of_fake(self._latent_g, first, count, batch.labels).used_as("g/fake")
            return self._judge(self._shown(fake, rows), rows, layout)

        def judge_real(first: int, count: int) -> Tensor:
            rows = self._of_real(first, count, batch.labels).used_as("g/real")
            with torch.no_grad():
                return self._discriminate(self._real(batch, rows), rows)

        def lose(first: int, count: int, fake: Tensor) -> Tensor:
            fake_logits = judge(first, count, fake)
            real_logits = judge_real(first, count) if self.loss.paired else None
            terms = per_sample(self.loss.generator(self.objective, fake_logits, real_logits))
            _add(total, {"Loss_G": terms, "D(G(z))": self._score(fake_logits)}, whole)
            return self.scaler.scale(terms.sum() / whole)

        def add(score: Callable[..., Tensor], *part: int) -> None:
            if gathers:
                self._go_back(score(*part, made(*part)), [made(*part)])
            else:
                self._through_generator(partial(generate, *part), partial(score, *part), layout)

        given = made if gathers else generate
        passes = {self._latent_g: generate, "g/fake": lambda first, count: judge(first, count, given(first, count))}
        moved = levers.still_statistics(self.generator) if self.reuse_fakes else nullcontext()  # in D's phase, by the same images
        with moved, self._measured(layout, parts, passes | ({"g/real": judge_real} if self.loss.paired else {})):
            for part in parts:
                add(lose, *part)
            self._whole.bring_back("g/fake", partial(add, partial(self._whole.carried, "g/fake", judge)))
            for part in parts if gathers else ():
                self._back_through(partial(generate, *part), made(*part).grad)
            self._whole.bring_back(self._latent_g, partial(self._carry, self._latent_g, generate, self._generating))
        return total

    @torch.no_grad()
    def score_generated(self, first: int, layout: Layout, labels: Labels = unlabelled) -> Tensor:
        """Mean D(G(z)) of both networks as they are now, on the noise and ``labels`` of `generator_phase`; changes neither."""
        total: Terms = {}
        whole, parts = self.whole or sum(layout.sizes), _parts(first, layout)

        def generate(first: int, count: int) -> Tensor:
            rows = self._of_fake(self._latent_g, first, count, labels)
            return self._shown(self._generate(rows), rows.used_as("g/fake"))

        if self._keeps_fakes(layout):
            generate = cache(generate)

        def judge(first: int, count: int) -> Tensor:
            rows = self._of_fake(self._latent_g, first, count, labels)
            return self._discriminate(generate(first, count), rows.used_as("g/fake"))

        with (
            levers.still_statistics(self.generator), levers.still_statistics(self.discriminator),
            self._measured(layout, parts, {self._latent_g: generate, "g/fake": judge}),
        ):  # fmt: skip
            for part in parts:
                _add(total, {"D(G(z))": self._score(judge(*part))}, whole)
        return total["D(G(z))"]

    def _keeps_fakes(self, layout: Layout) -> bool:
        return keeps_fakes(layout.levers, self.discriminator.couples_samples)

    def _at_once(self, real: Tensor, fake: Tensor, of_real: Rows, of_fake: Rows, batch: int, layout: Layout) -> Terms:
        """One backward for everything that concerns real and generated images."""
        judged = [self._judged(real, of_real, layout), self._judged(fake, of_fake, layout)]
        terms = self._lost(judged[0].logits, judged[1].logits)
        loss = self._reported(terms, judged[0].logits, judged[1].logits)
        self._learn(judged[1].plus(judged[0].plus(terms)), batch, judged)
        return loss | judged[0].measured | judged[1].measured

    def _one_by_one(self, real: Tensor, fake: Tensor, of_real: Rows, of_fake: Rows, batch: int, layout: Layout) -> Terms:
        """One backward for real images, then one for generated ones, so that never both graphs are held.

        A loss that compares both needs the other's logits first, which cost a pass without graph.
        """
        other = None
        if self.loss.paired:
            with torch.no_grad(), levers.still_statistics(self.discriminator):
                other = self._discriminate(fake, of_fake)
        judged = self._judged(real, of_real, layout)
        terms = self._lost(judged.logits, torch.zeros_like(judged.logits) if other is None else other)
        self._learn(judged.plus(terms), batch, [judged])
        real_logits, measured = judged.logits.detach(), judged.measured
        del judged, terms
        judged = self._judged(fake, of_fake, layout)
        terms = self._lost(real_logits, judged.logits)
        loss = self._reported(terms, real_logits, judged.logits)
        self._learn(judged.plus(terms), batch, [judged])
        return loss | measured | judged.measured

    def _lost(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """D's terms ``[n]``."""
        return per_sample(self.loss.discriminator(self.objective, real_logits, fake_logits))

    def _reported(self, terms: Tensor, real: Tensor, fake: Tensor) -> Terms:
        """What D's phase reports of each sample, ``[n]`` each: by its terms, and its logits of real and generated images."""
        measured = {"Loss_D": terms.detach(), "D(x)": self._score(real)}
        if self.augment:  # the sign that D overfits: `frugan.gan.augment.Adaptive`
            signs = ((real if self.loss.centred else real - fake) > 0).to(real.dtype) * 2 - 1
            measured["r_t"] = per_sample(signs)
        return measured

    def _score(self, logits: Tensor) -> Tensor:
        """What is reported as D(.): the probability of being real where the loss defines one, else the logit; ``[n]``."""
        return per_sample(logits.detach().sigmoid() if self.loss.probability else logits.detach())

    def _through_generator(self, generate: Callable[[], Tensor], score: Callable[[Tensor], Tensor], layout: Layout) -> None:
        """Adds G's gradients of ``score``, a number, of the images that ``generate`` gives."""
        if not layout.uses("recompute_generator"):
            self._go_back(score(generate()), self._generating)
            return
        with torch.no_grad():
            fake = generate()
        self._go_back(score(fake.requires_grad_(True)), [fake])
        gradient = fake.grad
        del fake
        self._back_through(generate, gradient)

    def _back_through(self, generate: Callable[[], Tensor], gradient: Tensor | None) -> None:
        """Adds G's gradients of what has that ``gradient`` in the images that ``generate`` gives once more."""
        with levers.still_statistics(self.generator):
            fake = generate()
        levers.backward_from(fake, gradient, [*self._generating, *self._whole.leaves])

    def _carry(self, scope: str, forward: Callable[..., Tensor], leaves: Sequence[Tensor], *part: int) -> None:
        self._go_back(self._whole.carried(scope, forward, *part), leaves)


def _parts(first: int, layout: Layout) -> list[Part]:
    """The micro-batches of a batch that begins at sample ``first``."""
    return [(first + begin, count) for begin, count in slices(layout.sizes)]


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

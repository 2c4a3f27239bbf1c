"""Logits of images and what gradient penalties at them add to D's loss, in the ways that there are to differentiate that."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from frugan.config.objectives import Objective
from frugan.gan.bends import Passage, bends_alone
from frugan.gan.passes import Passes
from frugan.gan.penalties import Penalty, penalties, weighted
from frugan.memory import levers, private
from frugan.memory.layout import Layout
from frugan.utils.draws import Rows

Terms = dict[str, Tensor]


@dataclass
class Judged:
    """What D says of images.

    Args:
        logits: ``[n]``, or ``[n, heads]``.
        penalty: what is added to D's terms, ``[n]``, if that has a graph.
        measured: each penalty's values ``[n]``, by its name; with a ``passage``, once D has learnt.
        passage: what D learns by in place of the graph, and the penalties at its images.
    """

    logits: Tensor
    penalty: Tensor | None = None
    measured: Terms = field(default_factory=dict)
    passage: tuple[Passage, Sequence[Penalty]] | None = None

    def plus(self, terms: Tensor) -> Tensor:
        """``terms``, and the penalty."""
        return terms if self.penalty is None else terms + self.penalty


class Slopes(Passes):
    """Base of `frugan.gan.step.Step`: what D learns by."""

    objective: Objective

    def __post_init__(self) -> None:
        super().__post_init__()
        self._learning = [p for p in self.discriminator.parameters() if p.requires_grad]  # the others are frozen for good
        # Gradients of fp16 arithmetic underflow without a scale; with the other precisions the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.like.device.type, enabled=self.precision == "fp16")
        self.penalties: dict[str, list[Penalty]] = {"real": [], "fake": [], "between": []}  # by the images that they are taken at
        for penalty in penalties(self.objective):
            self.penalties[penalty.where].append(penalty)
        # In fp16 the gradients at layers would need a scale of their own.
        self.in_four_passes = self.four_passes and self.precision != "fp16" and bends_alone(self.discriminator)

    def _judged(self, images: Tensor, rows: Rows, layout: Layout) -> Judged:
        return self._penalised(images, rows, layout) if self.penalties[rows.scope] else Judged(self._judge(images, rows, layout))

    def _penalised(self, images: Tensor, rows: Rows, layout: Layout) -> Judged:
        """By double backward where there is no better way: for which all blocks are held at once."""
        if layout.uses("penalty"):
            return self._penalised_by_jvp(images, rows, layout)
        if self.in_four_passes:
            return self._penalised_in_four_passes(images, rows, layout)
        images.requires_grad_(True)
        with self._offloading(self.discriminator, layout):
            logits = self._discriminate(images, rows)
            gradient = _input_gradient(logits, images, create_graph=True)
            weight, terms, measured = weighted(self.penalties[rows.scope], gradient)
        return Judged(logits, weight * terms, measured)

    def _penalised_in_four_passes(self, images: Tensor, rows: Rows, layout: Layout) -> Judged:
        self._set_learning(False)
        kept = self._offloading(self.discriminator, layout)
        with self.autocast():
            passage = Passage(
                self.discriminator, images, rows, recompute=layout.uses("checkpoint_blocks"),
                pack=getattr(kept, "pack_hook", _itself), unpack=getattr(kept, "unpack_hook", _itself),
            )  # fmt: skip
        self._set_learning(True)
        return Judged(passage.logits, passage=(passage, self.penalties[rows.scope]))

    def _penalised_by_jvp(self, images: Tensor, rows: Rows, layout: Layout) -> Judged:
        """The penalty is a term whose gradient in D's weights is the penalty's, not its value."""
        private.load_forward_mode()
        self._set_learning(False)
        images.requires_grad_(True)
        with self._saving(self.discriminator, layout):
            gradient = _input_gradient(self._discriminate(images, rows), images)
        self._set_learning(True)
        gradient.requires_grad_(True)
        weight, terms, measured = weighted(self.penalties[rows.scope], gradient)
        (direction,) = torch.autograd.grad(terms.sum(), gradient)
        recompute = layout.uses("checkpoint_blocks")
        with (
            self.autocast(),
            self._offloading(self.discriminator, layout),
            levers.still_statistics(self.discriminator),
        ):  # they have moved in the pass before
            logits, slope = levers.directional(self.discriminator.chain, images.detach(), direction, rows, recompute=recompute)
        return Judged(logits.to(self.like.dtype), weight * per_sample(slope).to(self.like.dtype), measured)

    def _learn(self, terms: Tensor, batch: int, judged: Sequence[Judged]) -> None:
        """Adds D's gradients of ``terms``, ``[n]``, which are a function of what was ``judged``, divided by ``batch``."""
        leaves = [each.logits for each in judged if each.passage]
        self._go_back(self.scaler.scale(terms.sum() / batch), [*self._learning, *leaves])
        for each in judged:
            if each.passage:
                passage, penalties = each.passage
                each.passage = None  # what it holds goes as it is used
                self._set_learning(False)
                with self.autocast():
                    gradient = passage.back()
                self._set_learning(True)
                weight, slopes, each.measured = weighted(penalties, gradient)
                (direction,) = torch.autograd.grad(weight * slopes.sum() / batch, gradient)
                with self.autocast():
                    passage.learn(direction)

    def _set_learning(self, learns: bool) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(learns)

    def _go_back(self, value: Tensor, leaves: Sequence[Tensor]) -> None:
        """Adds gradients to ``leaves`` alone: those of images, which penalties make leaves too, nobody reads."""
        if value.requires_grad:  # what statistics carry need not come from anything that learns
            torch.autograd.backward(value, inputs=[*leaves, *self._whole.leaves])


def per_sample(values: Tensor) -> Tensor:
    """Means over the heads of a discriminator that has several: ``[n]`` or ``[n, heads]`` to ``[n]``."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _input_gradient(logits: Tensor, images: Tensor, *, create_graph: bool = False) -> Tensor:
    """Each sample's gradient of its logit, ``[n, c, h, w]``.

    It is not divided by the batch and needs no scale in fp16; with the loss's scale it would overflow.
    """
    (gradient,) = torch.autograd.grad(per_sample(logits).sum(), images, create_graph=create_graph)
    return gradient

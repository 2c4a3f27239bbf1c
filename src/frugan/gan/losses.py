"""Losses: logits in, one term per logit out. Nothing here sees a module.

A term per sample is what makes accumulation exact: micro-batches of any size add up to the mean over the whole batch. Add a
loss by adding a dataclass to `frugan.config.objectives` and its two functions to `LOSSES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, relu, softplus

from frugan.config.objectives import Bce, Hinge, Objective, RpGan, WganGp


@dataclass(frozen=True)
class Loss:
    """Both players' losses. Where it says ``[n]`` there is one logit a sample; of a discriminator with several heads it is
    ``[n, heads]``, and the terms are alike.

    Args:
        discriminator: (options, logits of real images ``[n]``, logits of generated images ``[n]``) to terms ``[n]``.
        generator: (options, logits of generated images ``[n]``, logits of real images ``[n]`` or None) to terms ``[n]``.
        paired: whether real and generated images are compared. If not, D's terms are a part for each side, which may come with
            zeros in the place of the other's logits, and G's come without those of real images.
        probability: whether the sigmoid of a logit is D's probability that the image is real.
        centred: whether a logit above 0 says that the image is real; if not, logits only mean something beside one another.
    """

    discriminator: Callable[[Any, Tensor, Tensor], Tensor]
    generator: Callable[[Any, Tensor, Tensor | None], Tensor]
    paired: bool = False
    probability: bool = False
    centred: bool = False


def _bce_d(options: Bce, real: Tensor, fake: Tensor) -> Tensor:
    target = torch.full_like(real, 1 - options.label_smoothing)
    return binary_cross_entropy_with_logits(real, target, reduction="none") + softplus(fake)


def _bce_g(options: Bce, fake: Tensor, real: Tensor | None) -> Tensor:
    return softplus(-fake)


def _hinge_d(options: Hinge, real: Tensor, fake: Tensor) -> Tensor:
    return relu(1 - real) + relu(1 + fake)


def _wgan_d(options: WganGp, real: Tensor, fake: Tensor) -> Tensor:
    return fake - real


def _negated(options: Objective, fake: Tensor, real: Tensor | None) -> Tensor:
    return -fake


def _rpgan_d(options: RpGan, real: Tensor, fake: Tensor) -> Tensor:
    return softplus(fake - real)


def _rpgan_g(options: RpGan, fake: Tensor, real: Tensor | None) -> Tensor:
    assert real is not None
    return softplus(real - fake)


LOSSES: dict[type[Objective], Loss] = {
    Bce: Loss(_bce_d, _bce_g, probability=True, centred=True),
    Hinge: Loss(_hinge_d, _negated, centred=True),
    WganGp: Loss(_wgan_d, _negated),
    RpGan: Loss(_rpgan_d, _rpgan_g, paired=True),
}

"""Optimizers, learning-rate schedules and the averaged generator."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from frugan import recipe

EMA_RAMP = 0.05  # the half-life is at most this share of the images seen, so that the start is forgotten soon


def adam(parameters: Iterable[nn.Parameter], rate: float, options: recipe.Optimizer) -> Adam:
    """Adam over ``parameters``; fused, so that a step makes no copy of them."""
    return Adam(parameters, lr=rate, betas=(options.beta1, options.beta2), fused=True)


def rate_factor(options: recipe.Optimizer, epochs_done: float, epochs: int) -> float:
    """What the learning rates are multiplied by after ``epochs_done`` of ``epochs``. Plateau, which depends on the losses, has
    its state in torch's `ReduceLROnPlateau` and is 1 here."""
    match options.schedule:
        case "step":
            return float(options.schedule_factor ** (int(epochs_done) // options.schedule_epochs))
        case "exponential":
            return float(options.schedule_factor ** (epochs_done / options.schedule_epochs))
        case "cosine":
            return (1 + math.cos(math.pi * min(1.0, epochs_done / epochs))) / 2
        case _:
            return 1.0


class Ema(AveragedModel):
    """The generator averaged over training, buffers included, with a half-life in images (Karras et al. 2020, appendix B)."""

    def __init__(self, network: nn.Module, half_life: float) -> None:
        super().__init__(network, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)  # type: ignore[no-untyped-call]
        self.requires_grad_(False)
        self.half_life = half_life

    def update(self, network: nn.Module, batch: int, images_seen: int) -> None:
        """Takes in ``network`` as it is after ``images_seen`` images, ``batch`` of them since the last time."""
        half_life = min(self.half_life, images_seen * EMA_RAMP)
        decay = 0.5 ** (batch / half_life) if half_life else 0.0
        self.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.update_parameters(network)

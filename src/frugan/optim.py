"""Optimizers, learning-rate schedules and the averaged generator."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from frugan import recipe

EMA_RAMP = 0.05  # the half-life is at most this share of the images seen, so that the start is forgotten soon


def adam(
    parameters: Iterable[nn.Parameter], rate: float, options: recipe.Optimizer, *, lean: bool = True, offload: bool = False
) -> "FrugalAdam":
    """Adam over ``parameters`` as ``options`` say."""
    return FrugalAdam(parameters, rate, (options.beta1, options.beta2), lean=lean, offload=offload)


class FrugalAdam(Adam):
    """torch's fused Adam with its moments allocated at once, so that memory cannot run out in the middle of an update.

    Where beta1 is 0 the first moment is the gradient itself and takes no memory of its own, unless ``lean`` is false. Equal to
    rounding: torch adds the difference to the old moment, which need not give the gradient's last bit.

    Args:
        parameters: what it updates.
        rate: learning rate.
        betas: decay of the first and of the second moment.
        lean: keep no first moment if it can be done without.
        offload: keep the moments on the host, and on the device only during an update.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rate: float,
        betas: tuple[float, float],
        *,
        lean: bool = True,
        offload: bool = False,
    ) -> None:
        super().__init__(parameters, lr=rate, betas=betas, fused=True)
        self.moments = ("exp_avg_sq",) if lean and betas[0] == 0 else ("exp_avg", "exp_avg_sq")
        self.offload = offload
        for parameter in self._parameters():
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {"step": step} | {name: torch.zeros_like(parameter) for name in self.moments}
        self._stow()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by the gradients there are."""
        learning = [p for p in self._parameters() if p.grad is not None]
        for parameter in learning:
            state = self.state[parameter]
            if self.offload:
                state |= {name: state[name].to(parameter.device, non_blocking=True) for name in self.moments}
            if "exp_avg" not in self.moments:
                state["exp_avg"] = parameter.grad  # the kernel writes beta1 * it + (1 - beta1) * gradient into it: itself
        try:
            super().step()
        finally:
            for parameter in learning:
                if "exp_avg" not in self.moments:
                    del self.state[parameter]["exp_avg"]
            self._stow()

    def _stow(self) -> None:
        if self.offload:
            for state in self.state.values():
                state |= {name: state[name].to("cpu") for name in self.moments}

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]


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

    def __init__(self, network: nn.Module, half_life: float, device: torch.device | None = None) -> None:
        super().__init__(network, device, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)  # type: ignore[no-untyped-call]
        self.requires_grad_(False)
        self.half_life = half_life

    def update(self, network: nn.Module, batch: int, images_seen: int) -> None:
        """Takes in ``network`` as it is after ``images_seen`` images, ``batch`` of them since the last time."""
        half_life = min(self.half_life, images_seen * EMA_RAMP)
        decay = 0.5 ** (batch / half_life) if half_life else 0.0
        self.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.update_parameters(network)

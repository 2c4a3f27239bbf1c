"""Optimizers, learning-rate schedules and the averaged generator."""

import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.adam import adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from frugan.config.recipe import Optimizer
from frugan.memory import private
from frugan.utils.errors import UserError

BLOCK = 256  # numbers that share a scale in moments of 8 bits
PIECE = BLOCK << 10  # numbers whose moments are made whole, or are on the device, at a time
EMA_RAMP = 0.05  # the half-life is at most this share of the images seen, so that the start is forgotten soon


def moments_of(beta1: float, lean: bool) -> tuple[str, ...]:
    """The moments that `FrugalAdam` keeps of every parameter."""
    return ("exp_avg_sq",) if lean and beta1 == 0 else ("exp_avg", "exp_avg_sq")


class FrugalAdam(Adam):
    """torch's fused Adam with its moments allocated at once, so that memory cannot run out in the middle of an update.

    Where beta1 is 0 the first moment is the gradient itself and takes no memory of its own, unless ``lean`` is false. Equal to
    rounding: torch adds the difference to the old moment, which need not give the gradient's last bit.

    Args:
        parameters: what it updates.
        rate: learning rate.
        betas: decay of the first and of the second moment.
        lean: keep no first moment if it can be done without.
        offload: keep the moments on the host; an update takes them to the device a piece at a time, into memory that is there from
            the start, so that it allocates nothing.
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
        parameters = list(parameters)
        # XLA has no fused one and fuses by itself, where all numbers are on the device.
        self._kernel = (
            {"foreach": False, "capturable": True} if parameters and parameters[0].device.type == "xla" else {"fused": True}
        )
        super().__init__(parameters, lr=rate, betas=betas, **self._kernel)
        self.moments = moments_of(betas[0], lean)
        self.offload = offload
        self._stage: dict[str, Tensor] = {}  # on the device, for a piece of moments that lie on the host
        for parameter in self._parameters():
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {"step": step} | self._new_moments(parameter)
        if offload:
            device = next(self._parameters()).device
            longest = min(PIECE, max(p.numel() for p in self._parameters()))
            self._stage = {name: torch.empty(longest, device=device) for name in self.moments}
            self._stage["step"] = torch.zeros((), device=device)

    def _new_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if not self.offload:
            return {name: torch.zeros_like(parameter) for name in self.moments}
        pinned = parameter.device.type == "cuda"
        made = {}
        for name in self.moments:
            empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cpu", pin_memory=pinned)
            made[name] = empty.zero_()
        return made

    def staged(self) -> list[Tensor]:
        """What is on the device besides weights and state."""
        return list(self._stage.values())

    # torch has the compiler leave these alone, for which it imports it: 1.2 s and 150 MiB that nothing here needs.
    add_param_group = private.unwrapped(Adam.add_param_group)
    zero_grad = private.unwrapped(Adam.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by the gradients there are."""
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if self.offload:
                for parameter in learning:
                    self._by_pieces(group, parameter)
            else:
                self._adam(group, learning, [p.grad for p in learning], [self.state[p] for p in learning])

    def _by_pieces(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        """An update of one parameter whose moments are on the host."""
        assert parameter.grad is not None
        state, stage = self.state[parameter], self._stage
        weights, gradient = _in_memory_order(parameter), _in_memory_order(_laid_out_as(parameter, parameter.grad))
        moments = {name: _in_memory_order(state[name]) for name in self.moments}
        for begin in range(0, len(weights), PIECE):
            piece = slice(begin, min(begin + PIECE, len(weights)))
            here = {name: stage[name][: piece.stop - begin] for name in self.moments}
            for name, moment in moments.items():
                here[name].copy_(moment[piece], non_blocking=True)
            here["step"] = stage["step"].copy_(state["step"])  # each piece is of the same update
            self._adam(group, [weights[piece]], [gradient[piece]], [here])
            for name, moment in moments.items():
                moment[piece].copy_(here[name], non_blocking=True)
        state["step"].copy_(stage["step"])

    def _adam(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        """torch's kernel; without a first moment it writes beta1 * gradient + (1 - beta1) * gradient into the gradient: itself."""
        first = [state.get("exp_avg", gradient) for state, gradient in zip(states, gradients, strict=True)]
        adam(
            weights, gradients, first, [state["exp_avg_sq"] for state in states], [], [state["step"] for state in states],
            **self._kernel, grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=_rate(group["lr"], weights), weight_decay=0.0,
            eps=group["eps"], maximize=False,
        )  # fmt: skip

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]


class LowBitAdam(FrugalAdam):
    """`FrugalAdam` with moments of 8 bits in blocks of 256 (Dettmers et al. 2022), by torchao's numerics. Approximate.

    As there, parameters of fewer than 4096 numbers, or of a number that 256 does not divide, keep moments in fp32. Moments are
    made whole a piece at a time, so that little is held besides. Blocks follow the memory of the weights, and the names of codes
    and scales say its order: moments of a run in another memory format do not fit, and begin anew.

    Raises:
        UserError: torchao is not installed.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what torchao finds amiss with torch, none concerns arithmetic
                logging.disable(logging.WARNING)
                from torchao.optim import quant_utils
        except ImportError:
            raise UserError("--moments 8bit needs torchao: pip install torchao, or use --moments fp32.") from None
        finally:
            logging.disable(logging.NOTSET)
        self.numerics = quant_utils
        self.maps: dict[str, Tensor] = {}
        super().__init__(*arguments, **named)

    def _new_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        count = parameter.numel()
        if count < 4096 or count % BLOCK:
            return super()._new_moments(parameter)
        made = {}
        for name in self.moments:
            levels = self.numerics.create_dynamic_map(signed=name == "exp_avg")
            if name not in self.maps:
                self.maps[name] = torch.tensor(levels, device=parameter.device)
            codes, scale = _names(name, parameter)
            place = "cpu" if self.offload else parameter.device
            made[codes] = torch.full((count,), levels.index(0), dtype=torch.uint8, device=place)
            made[scale] = torch.zeros(count // BLOCK, device=place)
        return made

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by the gradients there are."""
        low = [p for p in self._parameters() if p.grad is not None and "exp_avg_sq" not in self.state[p]]
        gradients = [p.grad for p in low]
        for parameter in low:
            self._step_of(parameter)
            parameter.grad = None
        super().step()
        for parameter, gradient in zip(low, gradients, strict=True):
            parameter.grad = gradient

    def _step_of(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        group, state, device = self.param_groups[0], self.state[parameter], parameter.device
        weights, gradient = _in_memory_order(parameter), _in_memory_order(_laid_out_as(parameter, parameter.grad))
        named = {name: _names(name, parameter) for name in self.moments}
        for begin in range(0, len(weights), PIECE):
            piece = slice(begin, begin + PIECE)
            blocks = slice(begin // BLOCK, (begin + PIECE) // BLOCK)
            whole = {
                name: self.numerics.dequant_with_qmap(
                    state[codes][piece].to(device), self.maps[name], state[scale][blocks].to(device)
                )
                for name, (codes, scale) in named.items()
            }
            step = state["step"].clone()
            self._adam(group, [weights[piece]], [gradient[piece]], [whole | {"step": step}])
            for name, (codes, scale) in named.items():
                scaled, new = self.numerics.scale_tensor(whole[name], BLOCK)
                state[codes][piece] = self.numerics.quantize_8bit_with_qmap(scaled, self.maps[name]).to(state[codes].device)
                state[scale][blocks] = new.to(state[scale].device)
        state["step"].copy_(step)


def _rate(rate: float | Tensor, weights: list[Tensor]) -> float | Tensor:
    """``rate`` as an accelerator's kernel reads it from a tensor, in single precision, whether it is one or not."""
    if isinstance(rate, Tensor) or not weights or weights[0].device.type == "cpu":
        return rate
    return float(np.float32(rate))


def _names(moment: str, parameter: Tensor) -> tuple[str, str]:
    """Of the codes and the scales of a moment in 8 bits."""
    order = "" if parameter.is_contiguous() else "/channels_last"
    return f"{moment}/codes{order}", f"{moment}/scale{order}"


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` with the strides of its parameter, which it nearly always has."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The numbers of a dense tensor as they lie in memory, ``[n]``, without a copy."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def rate_factor(options: Optimizer, epochs_done: float, share: float) -> float:
    """What the learning rates are multiplied by after ``epochs_done`` epochs, when ``share`` of the training is behind.

    Plateau, which depends on the losses, has its state in torch's `ReduceLROnPlateau` and is 1 here.
    """
    match options.schedule:
        case "step":
            return float(options.schedule_factor ** (int(epochs_done) // options.schedule_epochs))
        case "exponential":
            return float(options.schedule_factor ** (epochs_done / options.schedule_epochs))
        case "cosine":
            return (1 + math.cos(math.pi * share)) / 2
        case _:
            return 1.0


class Ema(AveragedModel):
    """The generator averaged over training, buffers included, with a half-life in images (Karras et al. 2020, appendix B)."""

    def __init__(self, network: nn.Module, half_life: float, device: torch.device | None = None) -> None:
        super().__init__(network, device, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)  # type: ignore[no-untyped-call]
        self.requires_grad_(False)
        self.half_life = half_life
        self._of: tuple[nn.Module, ...] = ()  # the network, whose tensors stay where they are; a module would be saved as a part
        self._kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}  # those of the average, and its
        self._begun: bool | None = None  # whether anything was taken in; None: to be asked of the device, which waits for it
        self.register_load_state_dict_post_hook(lambda *_: setattr(self, "_begun", None))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, network: nn.Module, batch: int, images_seen: int) -> None:
        """Takes in ``network`` as it is after ``images_seen`` images, ``batch`` of them since the last time.

        As torch's ``update_parameters``, which asks the device at every tensor whether it is the first time.
        """
        half_life = min(self.half_life, images_seen * EMA_RAMP)
        decay = 0.5 ** (batch / half_life) if half_life else 0.0
        if self._begun is None:
            self._begun = bool(self.n_averaged)
        if network not in self._of:
            self._of, self._kinds = (network,), {}
            for pair in zip(_tensors(self.module), _tensors(network), strict=True):
                for tensors, tensor in zip(self._kinds.setdefault(pair[0].dtype, ([], [])), pair, strict=True):
                    tensors.append(tensor)
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        if next(self.parameters()).device.type == "xla":
            average = partial(_average_on_xla, decay)
        # Whole numbers first: averaging them allocates, and what is done again where memory runs out must not have begun.
        for averaged, tensors in sorted(self._kinds.values(), key=lambda kind: kind[0][0].is_floating_point()):
            newest = [tensor.to(mine.device) for tensor, mine in zip(tensors, averaged, strict=True)]
            if self._begun:
                average(averaged, newest, self.n_averaged)
            else:
                for old, new in zip(averaged, newest, strict=True):
                    old.copy_(new)
        self.n_averaged += 1
        self._begun = True


def _average_on_xla(decay: float, averaged: list[Tensor], newest: list[Tensor], _: Tensor) -> None:
    """The same with the decay on the device: a number from the host makes another program where it is 0, and above one half."""
    share = torch.tensor(1 - decay).to(averaged[0].device)
    for old, new in zip(averaged, newest, strict=True):
        old.copy_(old + (new - old) * share)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (p.detach() for p in module.parameters())
    yield from module.buffers()


def warm_up_update(device: torch.device) -> None:
    """Updates and averages a network of two numbers, so that what only an update loads on ``device`` is there and counted."""
    network = nn.Linear(1, 1, device=device)
    optimizer, ema = FrugalAdam(network.parameters(), 0.0, (0.5, 0.9)), Ema(network, 1.0, device)
    for images in (1, 2):
        network(torch.ones(1, 1, device=device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(network, 1, images)
    all(bool(p.isfinite().all()) for p in ema.parameters())

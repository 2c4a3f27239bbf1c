"""What an optimizer, anyone's, makes and allocates in its updates: found on copies of a few parameters."""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frugan.memory import limit
from frugan.memory.limit import MIB
from frugan.memory.trace import Event, Timeline, trace

TRIED = 32 * MIB  # bytes of a parameter that an optimizer is tried on


def tried(optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[list[int], Timeline | None]:
    """Bytes of each tensor of state that ``optimizer`` will make, and what an update allocates, or None where it cannot be tried.

    Copies of the optimizer make two updates of one parameter of each kind, so that its own state is left to begin as it would.
    """
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    made: dict[tuple[Any, ...], tuple[list[int], int]] = {}
    sizes: list[int] = []
    most = together = 0
    try:
        for parameter in learning:
            kind = (tuple(parameter.shape), parameter.dtype, parameter.stride())
            if kind not in made:
                made[kind] = _tried(optimizer, [parameter], device)
            sizes += made[kind][0]
            most, together = max(most, made[kind][1]), together + made[kind][1]
        largest = max(learning, key=lambda p: p.numel())
        one, three = (_tried(optimizer, [largest] * n, device, MIB)[1] for n in (1, 3))
        if three > 2.5 * one:  # it updates all of them at once
            most = together
        elif one:  # what one leaves lasts until the next at most
            most = int(most * max(1, three / one))
    except Exception as error:  # what an optimizer of somebody's own may do with a parameter alone
        if limit.is_out_of_memory(error):
            raise
        sizes, most = [p.untyped_storage().nbytes() for p in learning for _ in range(2)], 0  # as Adam's
    if not most:
        return sizes, None
    state = sum(sizes) + 2 * sum(p.untyped_storage().nbytes() for p in learning)  # weights and gradients too
    return sizes, Timeline({0: state}, {0: "moments"}, {0}, [Event([], [most, -most])])


def _tried(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], device: torch.device, largest: int = TRIED
) -> tuple[list[int], int]:
    """Bytes of each tensor of state that ``optimizer`` makes for copies of ``parameters``, and what an update allocates.

    Of a parameter of more than ``largest`` bytes a part is tried, and counted as the whole.
    """
    whole = len(parameters[0]) if parameters[0].dim() else 1
    part = max(1, min(whole, whole * largest // max(1, parameters[0].nbytes)))
    twin = _twin(optimizer, parameters, part)
    weights = [p for group in twin.param_groups for p in group["params"]]
    for p in weights:
        p.grad = torch.zeros_like(p)
    type(twin).step(twin)
    there = [*weights, *(p.grad for p in weights), *state_of(twin)]
    timeline = trace(lambda: type(twin).step(twin), {}, ignore=there, device=device)
    state = [t for t in state_of(twin) if t.device.type == device.type]
    grows = [whole / part if t.dim() and len(t) == part else 1 for t in state]
    sizes = [round(t.untyped_storage().nbytes() * more) for t, more in zip(state, grows, strict=True)]
    return sizes, round(timeline.peak().bytes * whole / part)


def _twin(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], part: int) -> torch.optim.Optimizer:
    """A copy of ``optimizer`` as new, without hooks, nor what hung on ``step``; on copies of ``part`` rows of ``parameters``."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    twin.state = defaultdict(dict)
    of = next(group for group in optimizer.param_groups if any(p is parameters[0] for p in group["params"]))
    copies = [(p.detach()[:part] if p.dim() else p.detach()).clone() for p in parameters]
    twin.param_groups = [
        of | {"params": [nn.Parameter(p, copied.requires_grad) for p, copied in zip(copies, parameters, strict=True)]}
    ]
    for name in vars(twin):
        if name.endswith("_hooks"):
            setattr(twin, name, OrderedDict())
    return twin


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state."""
    return [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]

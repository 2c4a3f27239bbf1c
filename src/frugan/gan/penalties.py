"""Gradient penalties: functions of D's gradient at its input. Add one by adding it to `PENALTIES`, and its weight to an objective.

An objective has the penalties whose weights it names and does not set to 0; step, planner, log and report go over them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frugan.config.objectives import Objective


@dataclass(frozen=True)
class Penalty:
    """A penalty on the slope of D.

    Args:
        name: under which its mean is logged.
        where: at which images: real ones, generated ones, or on the way from each generated one to a real one.
        weight: in D's loss, per sample.
        function: D's gradient at its input ``[n, c, h, w]`` to ``[n]``.
    """

    name: str
    where: Literal["real", "fake", "between"]
    weight: float
    function: Callable[[Tensor], Tensor]


def squared_norm(gradient: Tensor) -> Tensor:
    """Half the squared norm of each sample's gradient, ``[n, ...]`` to ``[n]``: R1 at real images, R2 at generated ones
    (Mescheder et al. 2018, arXiv 1801.04406, equation 9)."""
    return gradient.square().flatten(1).sum(1) / 2


def unit_norm(gradient: Tensor) -> Tensor:
    """(norm - 1)^2 of each sample's gradient, ``[n, ...]`` to ``[n]`` (Gulrajani et al. 2017, equation 3)."""
    # The square root has no slope at 0, where images are that D has no opinion on.
    return (gradient.square().flatten(1).sum(1).clamp_min(1e-12).sqrt() - 1).square()


# The setting that is its weight, its name, where it is taken, and of what. A weight of 0 means that there is none.
PENALTIES: list[tuple[str, str, Literal["real", "fake", "between"], Callable[[Tensor], Tensor]]] = [
    ("r1", "R1", "real", squared_norm),
    ("r2", "R2", "fake", squared_norm),
    ("gradient_penalty", "GP", "between", unit_norm),
]
PENALTY_NAMES = tuple(name for _, name, _, _ in PENALTIES)


def penalties(objective: Objective) -> list[Penalty]:
    """The penalties of ``objective``."""
    weights = vars(objective)
    return [Penalty(name, where, weights[key], function) for key, name, where, function in PENALTIES if weights.get(key)]


def weighted(penalties: Sequence[Penalty], gradient: Tensor) -> tuple[float, Tensor, dict[str, Tensor]]:
    """What ``penalties``, all at the same images, are at D's ``gradient`` ``[n, c, h, w]`` there.

    Returns:
        A weight and terms ``[n]``, whose product is added to D's loss; each penalty's values ``[n]`` by its name, without graph.
    """
    found = {p.name: p.function(gradient) for p in penalties}
    measured = {name: value.detach() for name, value in found.items()}
    if len(penalties) == 1:
        return penalties[0].weight, found[penalties[0].name], measured
    return 1.0, torch.stack([p.weight * found[p.name] for p in penalties]).sum(0), measured

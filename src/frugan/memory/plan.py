"""Plans: how a training is laid out, and what it needs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from frugan.memory.host import Freed
from frugan.memory.layout import Guarantee as Guarantee
from frugan.memory.layout import Layout, Lever


@dataclass(frozen=True)
class Plan:
    """How a training is laid out, what it needs, and what there is.

    Args:
        layouts: of each phase.
        freed: what becomes of freed memory on the CPU.
        budget: bytes that the process may hold.
        named: whether a person named the budget.
        framework: bytes that the process holds besides training, with what it comes to load.
        data: bytes of samples that are kept in memory.
        phases: for each moment of a training the bytes it allocates, by what they are for.
        held: bytes that the process holds for them.
        guarantee: what is left as it is.
        reserved: bytes of addresses that libraries reserve beyond ``framework`` and never touch.
        planned: the layouts that were planned, where memory ran out since and ``layouts`` are others.
        graphs: whether phases are recorded as CUDA graphs, and what these take is counted.
        keeps: whether what one phase makes is held for the next, which would make it again, and is counted.
        host: bytes that the process will hold on the host besides, where it trains on another device.
    """

    layouts: dict[str, Layout]
    freed: Freed
    budget: int
    named: bool
    framework: int
    data: int
    phases: dict[str, dict[str, int]]
    held: int
    guarantee: Guarantee
    reserved: int = 0
    planned: dict[str, Layout] | None = None
    graphs: bool = False
    keeps: bool = False
    host: int = 0

    @property
    def allocated(self) -> int:
        """The most that training allocates."""
        return max((sum(parts.values()) for parts in self.phases.values()), default=0)

    @property
    def predicted(self) -> int:
        """The most that the process will hold."""
        return self.framework + self.data + self.held

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "layouts": {name: layout.as_dict() for name, layout in self.layouts.items()},
            "planned": {name: layout.as_dict() for name, layout in (self.planned or self.layouts).items()},
            "guarantee": str(self.guarantee), "freed_memory": self.freed,
            "budget": self.budget, "budget_named": self.named, "predicted": self.predicted,
            "framework": self.framework, "data": self.data, "training_allocates": self.allocated, "training_holds": self.held,
            "phases": self.phases, "reserved": self.reserved, "cuda_graphs": self.graphs,
            "keeps": self.keeps, "host": self.host,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], levers: Iterable[Lever]) -> Self:
        """What `as_dict` wrote, where there are ``levers``; what else stands beside it is left alone.

        Raises:
            LookupError: something is missing, or is none of the words that it could be.
        """
        levers = tuple(levers)
        layouts, planned = (
            {name: Layout.from_dict(layout, levers) for name, layout in found.items()}
            for found in (values["layouts"], values.get("planned", values["layouts"]))
        )
        return cls(
            layouts, values["freed_memory"], values["budget"], values["budget_named"], values["framework"], values["data"],
            values["phases"], values["training_holds"], Guarantee[values["guarantee"].upper()], values.get("reserved", 0),
            planned if planned != layouts else None, host=values.get("host", 0),
        )  # fmt: skip

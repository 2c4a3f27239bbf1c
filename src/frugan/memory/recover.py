"""When memory runs out in spite of the plan, a phase is done again with a cheaper layout.

A phase changes nothing but gradients and running statistics, so it can be thrown away and begun anew; moments are allocated
from the start, so that memory does not run out in an update.
"""

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from frugan.memory import limit
from frugan.memory.limit import Handling
from frugan.memory.plan import Guarantee, Layout

T = TypeVar("T")


class OutOfMemory(Exception):
    """Memory ran out, and there is nothing cheaper left."""


@dataclass(frozen=True)
class Change:
    """What was changed to go on, and what that leaves as it is."""

    phase: str
    change: str
    guarantee: Guarantee


class Recovery:
    """Runs phases so that memory may run out in them.

    Args:
        modules: whose gradients and running statistics a phase changes.
        device: where they are.
        layouts: of each phase.
        handling: what becomes of freed memory on the CPU now.
        levers: for each phase the names of the levers that may be used (`Layout`).
        smallest: for each phase what a micro-batch must not be smaller than.
        coupled: whether a sample's output depends on the others of its micro-batch.
        changed: is told of every change.
        prepare: is called with a phase and its new layout before that is used, while nothing is limited, so that libraries load
            what they need for it.
    """

    def __init__(
        self, modules: Sequence[nn.Module], device: torch.device, layouts: Mapping[str, Layout], handling: Handling, *,
        levers: Mapping[str, Collection[str]], smallest: Mapping[str, int], coupled: bool, changed: Callable[[Change], None],
        prepare: Callable[[str, Layout], object],
    ) -> None:  # fmt: skip
        self.modules = modules
        self.device = device
        self.layouts = dict(layouts)
        self.handling = handling
        self.levers = levers
        self.smallest = smallest
        self.coupled = coupled
        self.changed = changed
        self.prepare = prepare

    def run(self, phase: str, compute: Callable[[Layout], T]) -> T:
        """``compute`` with the layout of ``phase``; with cheaper ones if memory runs out.

        Raises:
            OutOfMemory: the cheapest needs more than there is.
        """
        buffers = [b for module in self.modules for b in module.buffers()]
        gradients = [p for module in self.modules for p in module.parameters() if p.grad is not None]
        assert not gradients, "gradients of an earlier phase would be lost"
        before = self.again(lambda: [b.clone() for b in buffers])
        while True:
            try:
                return compute(self.layouts[phase])
            except (RuntimeError, MemoryError) as error:
                if not limit.is_out_of_memory(error):
                    raise
            # Outside the except block: while the error is alive, so are the tensors of the frames it went through.
            for module in self.modules:
                module.zero_grad(set_to_none=True)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            self._make_cheaper(phase)

    def again(self, action: Callable[[], T]) -> T:
        """``action``, which can be repeated; once more with what can be freed, if memory runs out."""
        try:
            return action()
        except (RuntimeError, MemoryError) as error:
            if not limit.is_out_of_memory(error):
                raise
        self._give_back()
        return action()

    def _give_back(self) -> None:
        gc.collect()
        if self.device.type == "cpu":
            self.handling = "return"
            limit.handle("return")
        limit.release(self.device)

    def _make_cheaper(self, phase: str) -> None:
        reused = self.handling == "reuse" and self.device.type == "cpu"
        self._give_back()
        if reused:
            self.changed(Change(phase, "freed memory given back at once", Guarantee.BITWISE))
            return
        before = self.layouts[phase]
        cheaper = before.cheaper(self.levers[phase], self.smallest[phase])
        if cheaper is None:
            raise OutOfMemory(f"memory ran out in {phase}'s phase with {before}, and there is nothing cheaper left")
        with limit.unlimited():
            self.prepare(phase, cheaper)
        self.layouts[phase] = cheaper
        new = {name: guarantee for name, guarantee in cheaper.named().items() if name not in before.named()}
        cut = self.coupled and cheaper.sizes != before.sizes
        self.changed(Change(phase, ", ".join(new), Guarantee.APPROXIMATE if cut else max(new.values())))

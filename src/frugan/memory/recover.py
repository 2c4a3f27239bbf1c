"""When memory runs out in spite of the plan, a phase is done again with a cheaper layout.

A phase changes nothing but gradients and running statistics, so it can be thrown away and begun anew; moments are allocated
from the start, so that memory does not run out in an update. After a while without shortage the layouts of the plan are tried
again.
"""

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn

from frugan.memory import limit
from frugan.memory.host import Freed
from frugan.memory.layout import Guarantee, Layout, Lever

T = TypeVar("T")
Cause = Literal["memory ran out", "the budget was exceeded", "memory suffices again"]
PATIENCE = 64  # times that a phase ends well before a more expensive layout is tried again; doubled by each attempt that failed


class OutOfMemory(Exception):
    """Memory ran out, and there is nothing cheaper left."""


@dataclass(frozen=True)
class Change:
    """What was changed to go on, why, and what that leaves as it is."""

    phase: str
    change: str
    guarantee: Guarantee
    cause: Cause = "memory ran out"


class Recovery:
    """Runs phases so that memory may run out in them.

    Args:
        modules: whose gradients and running statistics a phase changes.
        device: where they are.
        layouts: of each phase.
        freed: what becomes of freed memory on the CPU now.
        levers: for each phase those that may be used.
        smallest: for each phase what a micro-batch must not be smaller than.
        coupled: whether a sample's output depends on the others of its micro-batch.
        changed: is told of every change.
        needs: of a phase and a layout the bytes that it allocates, or None if it is not known.
        planned: of each phase the layout to come back to, if it is another than that of ``layouts``.
    """

    def __init__(
        self, modules: Sequence[nn.Module], device: torch.device, layouts: Mapping[str, Layout], freed: Freed, *,
        levers: Mapping[str, Collection[Lever]], smallest: Mapping[str, int], coupled: bool, changed: Callable[[Change], None],
        needs: Callable[[str, Layout], int | None], planned: Mapping[str, Layout] | None = None,
    ) -> None:  # fmt: skip
        self.modules = modules
        self.device = device
        self.layouts = dict(layouts)
        self.freed = freed
        self.levers = levers
        self.smallest = smallest
        self.coupled = coupled
        self.changed = changed
        self.needs = needs
        self.patience = dict.fromkeys(layouts, PATIENCE)
        self._calm = dict.fromkeys(layouts, 0)  # how often each phase has ended well since the last change
        before = planned or {}
        self._left = {p: [before[p]] if before.get(p, now) != now else [] for p, now in layouts.items()}  # to be tried again
        self._trying: set[str] = set()  # phases that went back and have not proved it yet
        self._met: set[tuple[str, Layout]] = set()  # what has been computed once
        self._settled = False  # whether all has that is done now
        self._cheapest: set[str] = set()  # phases that exceed the budget, and for which nothing cheaper is left
        self.let_go: Callable[[], None] = lambda: None  # gives up memory that only makes training faster

    def run(self, phase: str, compute: Callable[[Layout], T]) -> T:
        """``compute`` with the layout of ``phase``; with cheaper ones if memory runs out.

        Raises:
            OutOfMemory: the cheapest needs more than there is.
        """
        buffers = [b for module in self.modules for b in module.buffers()]
        gradients = [p for module in self.modules for p in module.parameters() if p.grad is not None]
        assert not gradients, "gradients of an earlier phase would be lost"
        before = self.again(lambda: [b.clone() for b in buffers])
        self._go_back(phase)
        last = False  # whether the cheapest is tried once more, since a shortage may pass
        while True:
            try:
                result = compute(self.layouts[phase])
                break
            except limit.SHORTAGE as error:
                if not limit.is_out_of_memory(error):
                    raise
            # Outside the except block: while the error is alive, so are the tensors of the frames it went through.
            for module in self.modules:
                module.zero_grad(set_to_none=True)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            if not self._make_cheaper(phase, "memory ran out") and not (last := not last):
                layout = self.layouts[phase]
                raise OutOfMemory(f"memory ran out in {phase}'s phase with {layout}, and there is nothing cheaper left")
        if limit.went_over(self.device) is not None and phase not in self._cheapest:
            exceeded: Cause = "the budget was exceeded"
            if not self._make_cheaper(phase, exceeded):  # others hold it, such as the program that trains: said once
                self._cheapest.add(phase)
                self.changed(Change(phase, "the cheapest way there is, as before", Guarantee.BITWISE, exceeded))
        self._calm[phase] += 1
        self._met.add((phase, self.layouts[phase]))
        if not self._settled and all(each in self._met for each in self.layouts.items()):
            self._settled = True
            limit.settle()
            limit.set_freed(self.freed, self.device)  # not before: what libraries keep would lie between tensors for ever
        return result

    def again(self, action: Callable[[], T]) -> T:
        """``action``, which can be repeated; once more with what can be freed, if memory runs out."""
        try:
            return action()
        except limit.SHORTAGE as error:
            if not limit.is_out_of_memory(error):
                raise
        self._give_back()
        return action()

    def _loosen(self) -> None:
        """Lets libraries load what the next layout needs."""
        self._settled = False
        limit.loosen()

    def _give_back(self) -> None:
        self.let_go()
        gc.collect()
        if self.device.type == "cpu":
            self.freed = "return"
            limit.set_freed("return", self.device)
        limit.release(self.device)

    def _go_back(self, phase: str) -> None:
        """Tries a layout that was left, once memory has sufficed for long enough."""
        if not self._left[phase] or self._calm[phase] < self.patience[phase]:
            if phase in self._trying and self._calm[phase]:
                self._trying.discard(phase)
            return
        layout = self._left[phase].pop()
        self.layouts[phase], self._calm[phase] = layout, 0
        self._loosen()
        self._trying.add(phase)
        self._cheapest.discard(phase)
        guarantee = max(layout.guarantee(self.coupled), Guarantee.REASSOCIATION)
        self.changed(Change(phase, str(layout), guarantee, "memory suffices again"))

    def _make_cheaper(self, phase: str, cause: Cause) -> bool:
        """Goes on in a way that needs less; whether there is one."""
        self._calm[phase] = 0
        if phase in self._trying:  # it does not suffice yet
            self._trying.discard(phase)
            self.patience[phase] *= 2
        reused = self.freed == "reuse" and self.device.type == "cpu"
        self._give_back()
        if reused:
            self.changed(Change(phase, "freed memory given back at once", Guarantee.BITWISE, cause))
            return True
        before = self.layouts[phase]
        if (cheaper := self._cheaper(phase, before)) is None:
            return False
        self._left[phase].append(before)
        self.layouts[phase] = cheaper
        self._loosen()
        new = {name: guarantee for name, guarantee in cheaper.named().items() if name not in before.named()}
        cut = self.coupled and cheaper.sizes != before.sizes and not cheaper.uncoupled
        guarantee = Guarantee.APPROXIMATE if cut else max(new.values())
        self.changed(Change(phase, ", ".join(new), guarantee, cause))
        return True

    def _cheaper(self, phase: str, before: Layout) -> Layout | None:
        """The first layout of the ladder that needs less than ``before``, without levers that save nothing on the way to it."""
        needed = self.needs(phase, before)
        levers = set(self.levers[phase])
        refused: set[Layout] = set()
        while True:
            for layout in before.cheaper(levers, self.smallest[phase], self.coupled):
                if layout in refused:
                    continue
                needs = self.needs(phase, layout)
                if needed is None or needs is None or needs < needed:
                    return layout
                refused.add(layout)
                if useless := levers & set(layout.levers) - set(before.levers):
                    levers -= useless
                    break  # the ladder without it
            else:
                return None

"""Phases as CUDA graphs: their work is recorded once, and then given to the GPU as a whole.

Started one by one from Python, the operators of a small network take the host longer than the GPU. What is computed is the same, to
the bit; docs/gpu.md says how much faster.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from frugan.config.recipe import Recipe
from frugan.gan.build import Batch, Phase
from frugan.gan.step import Step
from frugan.gan.tape import Tape, set_to
from frugan.memory import limit
from frugan.memory.layout import Layout
from frugan.memory.plan import Plan
from frugan.memory.recover import Recovery
from frugan.training.state import State as State
from frugan.training.state import Terms
from frugan.utils import xla

HOST = {"offload_activations", "checkpoint_blocks"}  # levers that wait for the host


# What graphs take besides what phases hold without: of CUDA's own memory, and of torch's, which keeps theirs apart from all other.
# Seen on an H200: 70 to 76 MiB, and 30 to 66 (three networks that held 70 to 434).
DRIVER, POOL, SHARE = 76 << 20, 24 << 20, 0.1


def possible(recipe: Recipe, device: torch.device) -> bool:
    """Whether a training of ``recipe`` (resolved) asks the host nothing in the middle of a phase but what a `Tape` has."""
    memory = recipe.memory
    return (
        device.type == "cuda"
        and memory.precision != "fp16"  # whose scale is read after every update
        and memory.moments == "fp32"
        and memory.offload_state != "yes"
    )


def with_graphs(plan: Plan, recipe: Recipe, asked: str, device: torch.device) -> Plan:
    """``plan`` with graphs, if they are ``asked`` for and `possible`; auto: without a named budget, where they fit.

    What CUDA takes for them is not torch's, and cannot be refused: on an H200 a budget of 1,426 MiB was exceeded by 58.
    """
    levers = {lever.name for layout in plan.layouts.values() for lever in layout.levers}
    if asked == "no" or (asked == "auto" and plan.named) or not possible(recipe, device) or levers & HOST:
        return plan
    more = replace(plan, framework=plan.framework + DRIVER, held=plan.held + POOL + int(SHARE * plan.held), graphs=True)
    return more if asked == "yes" or more.predicted <= plan.budget else plan


class Recorded:
    """A phase with one layout.

    Args:
        phase: what is recorded.
        layout: how it is computed.
        state: of the training.
        device: on what.
    """

    def __init__(self, phase: Phase, layout: Layout, state: State, device: torch.device) -> None:
        self.phase = phase
        self.layout = layout
        self.step = state.step
        self.tape = Tape(state.step.draws, device)
        self.rate = torch.zeros((), device=device)
        self.chance = torch.zeros((), device=device)  # that D's images are augmented
        self.terms: Terms = {}
        self.graph: torch.cuda.CUDAGraph | None = None

    def put(self, batch: Batch, first: int) -> None:
        """Sets everything that the phase asks for to what it is for ``batch``."""
        self.tape.put(batch, first)
        set_to(self.rate, self.phase.optimizer.param_groups[0]["lr"])
        if self.step.augment:
            set_to(self.chance, self.step.augment.p)

    def compute(self, first: int) -> Terms:
        """The phase, from what was `put`."""
        with _reading(self.step, self.tape, self.chance):
            return self.phase.compute(self.tape.batch, first, self.layout)

    def update(self, first: int) -> None:
        """The phase and its optimizer's update; ``terms`` is what was measured."""
        self.terms = self.compute(first)
        group = self.phase.optimizer.param_groups[0]
        rate, group["lr"] = group["lr"], self.rate
        try:
            self.phase.optimizer.step()
        finally:
            group["lr"] = rate
            self.phase.optimizer.zero_grad(set_to_none=True)

    def record(self, first: int, stream: torch.cuda.Stream, pool: Any) -> None:
        """Records `update`, which is not done by that; ``pool`` is the memory of other graphs."""
        self.tape.closed = True
        graph = torch.cuda.CUDAGraph()
        # By this thread alone: others may write pictures meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.update(first)
        self.graph = graph


@contextmanager
def _reading(step: Step, tape: Tape, chance: Tensor) -> Iterator[None]:
    """While open, ``step`` draws from ``tape``, and augments with ``chance``."""
    step.draws = tape
    if step.augment:
        step.augment.place = chance
    try:
        yield
    finally:
        step.draws = tape.draws
        if step.augment:
            step.augment.place = None


class Graphs:
    """Updates of phases, recorded as soon as they have been computed twice.

    The first time libraries load what they need, and the second time the tape is made; both are updates like any other. Where
    memory runs out, graphs are given up, and training goes on without.

    Args:
        state: of the training.
        recovery: runs phases that are not recorded.
        device: on what.
        used: whether phases are recorded.
        tell: is called with what a person should know.
        exchange: is given a network and what was measured of a part of a batch; gradients and terms become the whole batch's. One
            process has the whole batch.
    """

    def __init__(
        self, state: State, recovery: Recovery, device: torch.device, used: bool, tell: Callable[[str], None],
        exchange: Callable[[torch.nn.Module, Terms], Terms] = lambda network, terms: terms,
    ) -> None:  # fmt: skip
        self.state = state
        self.recovery = recovery
        self.device = device
        self.used = used
        self.tell = tell
        self.exchange = exchange
        self.recorded: dict[str, Recorded] = {}
        self._met: set[tuple[str, Layout]] = set()
        self._stream: torch.cuda.Stream | None = None
        recovery.let_go = self.give_up

    def update(self, phase: Phase, batch: Batch, first: int) -> Terms:
        """Computes ``phase`` and updates its network; what was measured.

        Raises:
            frugan.memory.recover.OutOfMemory: the cheapest layout needs more than there is.
        """
        layout = self.recovery.layouts[phase.name]
        recorded = self.recorded.get(phase.name)
        try:
            if self.used and recorded and recorded.layout == layout:
                recorded.put(batch, first)
                if recorded.graph or self._record(recorded, first):
                    assert recorded.graph
                    recorded.graph.replay()
                    return recorded.terms
            elif self.used and (phase.name, layout) in self._met and not any(x.name in HOST for x in layout.levers):
                recorded = self.recorded[phase.name] = Recorded(phase, layout, self.state, self.device)
                recorded.put(batch, first)
        except limit.SHORTAGE as error:  # nothing was computed
            if not limit.is_out_of_memory(error):
                raise
            self.give_up()
        self._met.add((phase.name, layout))
        taped = self.recorded.get(phase.name)

        def compute(layout: Layout) -> Terms:
            return taped.compute(first) if taped and taped.layout == layout else phase.compute(batch, first, layout)

        terms = self.exchange(phase.network, self.recovery.run(phase.name, compute))
        self.state.update(phase.optimizer)
        return terms

    def end(self) -> None:
        """What follows the update of all phases has been asked for."""

    def give_up(self) -> None:
        """Lets go of all graphs, those of autograd that are kept between phases too, and of their memory; there are none from now
        on."""
        self.used = False
        self.state.step.forget()
        self.recorded.clear()

    def _record(self, recorded: Recorded, first: int) -> bool:
        """Records a phase; whether that can be done."""
        self._stream = self._stream or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        pools = [other.graph.pool() for other in self.recorded.values() if other.graph]
        try:
            recorded.record(first, self._stream, next(iter(pools), None))
        except RuntimeError as error:
            recorded.phase.network.zero_grad(set_to_none=True)
            limit.wait(self.device)
            if limit.is_out_of_memory(error):
                raise
            self.give_up()
            reason = str(error).strip().splitlines()[0].rstrip(".")
            self.tell(f"Going on without CUDA graphs, which cannot be recorded here: {reason}.")
        return recorded.graph is not None


class Programs(Graphs):
    """Phases as programs of PyTorch/XLA: one for each with its optimizer's update, one for what follows both.

    A program is met again only if nothing of an update comes from the host but in a `Tape`. Where memory runs out training ends, as
    what was noted down for the program is gone.
    """

    def __init__(self, state: State, recovery: Recovery, device: torch.device) -> None:
        super().__init__(state, recovery, device, used=False, tell=lambda text: None)

    def update(self, phase: Phase, batch: Batch, first: int) -> Terms:
        """As `Graphs`."""
        recorded = self.recorded.get(phase.name)
        if recorded is None:
            recorded = Recorded(phase, self.recovery.layouts[phase.name], self.state, self.device)
            self.recorded[phase.name] = recorded
        recorded.put(batch, first)
        recorded.update(first)
        xla.run()
        return recorded.terms

    def end(self) -> None:
        """As `Graphs`."""
        xla.run()

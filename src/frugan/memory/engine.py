"""The engine for any model: a module and a loss that gives one term a sample, trained within a budget.

engine = Engine(model, loss, optimizer, batch=512, memory="1GiB")
engine.plan(images[:16])
with engine:
    for images in batches:
        engine.step(images)
"""

import inspect
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from frugan.memory import levers, limit
from frugan.memory.budget import SIZES, Beside, BudgetPlanner, Process, TooLittle
from frugan.memory.growth import SMALL, Growth, Outline, traced
from frugan.memory.layout import CHECKPOINT_BLOCKS, MOST, WHOLE_BATCH_NORM, Layout, split
from frugan.memory.optimizer import state_of, tried
from frugan.memory.recover import Change, Recovery
from frugan.memory.search import Choice, Job, Levers, Search
from frugan.memory.trace import GRADIENTS, GRANULE, Timeline, trace
from frugan.utils.errors import UserError

STEP = "the step"
T = TypeVar("T")


class Engine(AbstractContextManager["Engine"]):
    """Trains ``module`` by ``loss`` in batches of ``batch`` samples, within ``memory``.

    Args:
        module: on its device; one with lazy layers has been run once.
        loss: see `levers.accumulate`.
        optimizer: over the module's parameters. Memory for the state that it has not made yet is kept free for it.
        batch: samples in an update, at most; up to a million.
        memory: the most that the process (on an accelerator: its part of the device) may hold, as ``2GiB`` or in bytes; None: most
            of what is free.
        blocks: parts of the module, or one, that may be recomputed in backward; of a ``ModuleList`` or ``Sequential`` each layer.
            What they draw from torch's global generators (dropout) they draw again.
        whole_batch_norm: whether micro-batches may be exact under batch norm, by passes that compute the loss again and again; not
            of a module that draws.
        changed: is told of every change to go on when memory ran out.

    Raises:
        UserError: the budget says nothing, or cannot be held on this device; the batch is none or too large, the optimizer needs a
            closure, the module has lazy layers that were never run, or a block is no part of it.
    """

    def __init__(
        self, module: nn.Module, loss: levers.Loss, optimizer: torch.optim.Optimizer, *, batch: int,
        memory: str | int | None = None, blocks: Sequence[nn.Module] | nn.Module = (), whole_batch_norm: bool = True,
        changed: Callable[[Change], None] = print,
    ) -> None:  # fmt: skip
        if not 1 <= batch <= MOST:
            raise UserError(f"the engine's batch must be at least one sample and at most {MOST:,}, not {batch:,}.")
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise UserError(
                f"{type(optimizer).__name__} asks for the loss in its step(): the engine needs an optimizer that does not."
            )
        if lazy := next((name for name, t in [*module.named_parameters(), *module.named_buffers()] if is_lazy(t)), None):
            raise UserError(f"{lazy} of the module has no shape yet, as its layer is lazy: run the module once before the engine.")
        if (first := next(module.parameters(), None)) is None:
            raise UserError(f"the module, a {type(module).__name__}, has no parameters: there is nothing to train.")
        if isinstance(blocks, nn.Module) and not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
            blocks = [blocks]
        self.blocks = list(blocks)
        for place, block in enumerate(self.blocks):
            if not any(block is part for part in module.modules()):
                words = f"a {type(block).__name__}" if isinstance(block, nn.Module) else repr(block)
                raise UserError(f"blocks[{place}] of the engine, {words}, is no part of the module: name parts of it.")
        self.module = module
        self.loss = loss
        self.optimizer = optimizer
        self.batch = batch
        self.whole_batch_norm = whole_batch_norm
        self.device = first.device
        self.budget = limit.budget(memory, self.device)
        self.coupled = levers.couples(module)
        self.draws = False  # whether it draws from torch's global generators
        self.changed = changed
        self.choice: Choice | None = None
        self.predicted = 0
        self._reserved: list[Tensor] = []  # for the optimizer's state, until its first update
        self._loads = 0  # bytes of addresses that libraries reserve for a new size
        self._more = 0  # bytes that a step takes at most
        self._open = ExitStack()

    def plan(self, *tensors: Tensor) -> Choice:
        """Chooses how a batch is computed; ``tensors`` are what `step` gets, of at least one sample, and are not trained on.

        Raises:
            UserError: nothing fits; names the smallest budget that would do. Or the loss does not give one term a sample.
        """
        with limit.as_before():
            return self._plan(tensors)

    def _plan(self, tensors: Sequence[Tensor]) -> Choice:
        counts = {len(t) if t.dim() else 0 for t in tensors}
        if not counts or min(counts) < 1:
            raise UserError(
                f"the engine cuts tensors along their first dimension, the samples: it needs at least one tensor, each of at "
                f"least one sample, not shapes {[list(t.shape) for t in tensors]}."
            )
        limit.set_freed("return", self.device)
        before = limit.baseline(self.device)
        sizes, update = tried(self.optimizer, self.device)
        if not self.optimizer.state:
            self._reserved = [torch.empty(n, dtype=torch.uint8, device=self.device).fill_(0) for n in sizes if n]
        least = min(2, self.batch)
        smallest = least if self.coupled else 1
        cpu = self.device.type == "cpu"
        # The first meets what libraries load, and the second what they load for one more size: what the training's own will take.
        self._trace(tensors, (), SMALL)
        first, data = limit.at_rest(self.device), limit.addresses()
        growths = Growths(partial(self._growth, tensors))
        self.draws = growths(()).random
        size_loads = max(0, limit.at_rest(self.device) - first) if cpu else 0
        reserved = max(0, limit.addresses() - data - size_loads) if cpu else 0
        usable = self._usable()
        variants: list[Levers] = list(dict.fromkeys([(), *((lever,) for lever in usable), usable]))
        job = Job(STEP, self.batch, variants, growths, self.coupled, smallest, draws=self.draws)
        state = sum(t.untyped_storage().nbytes() for t in self._held() if t.device.type == self.device.type)
        besides = {"update": Beside(update, {})} if update else {}

        def plan() -> tuple[Any, Choice]:  # with its `Plan`
            # The state is there already, and is part of every timeline.
            process = Process(limit.at_rest(self.device) - state + size_loads, size_loads, begun=before)
            planner = BudgetPlanner(
                Search([job], self.device), self.device, self.budget, lambda: process, lambda: limit.spare(self.device),
                besides=lambda _: besides,
            )  # fmt: skip
            return planner.plan(), planner.choice

        found, choice = growths.settled(plan)
        self.choice = choice
        self.predicted = found.predicted
        self._loads = reserved
        self._more = self.predicted - found.framework - state
        outlines = growths.outlines
        self.recovery = Recovery(
            [self.module], self.device, {STEP: choice.chosen[STEP].layout}, choice.freed, coupled=self.coupled or self.draws,
            levers={STEP: usable}, smallest={STEP: smallest}, changed=self.changed, needs=lambda _, x: _needs(outlines, x),
        )  # fmt: skip
        if cpu:
            for candidate in (*choice.chosen.values(), *choice.refused.values()):
                if candidate.exact:
                    candidate.exact.forget_timeline()
        return choice

    def __enter__(self) -> Self:
        if self.choice is None:
            raise UserError("the engine has no plan yet: call plan() with a few samples first.")
        self._open.enter_context(limit.as_before())
        self._open.enter_context(limit.held_to(self.budget, self.device, SIZES * self._loads, self._more))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def step(self, *tensors: Tensor) -> Tensor:
        """One update by a batch of at most ``batch`` samples, each tensor ``[n, ...]``; the mean loss over them, without graph.

        Raises:
            UserError: too many samples, none, or not the same number in every tensor; or parameters have gradients already.
            frugan.memory.recover.OutOfMemory: the cheapest way needs more than there is.
        """
        if self.choice is None:
            raise UserError("the engine has no plan yet: call plan() with a few samples first.")
        counts = {len(t) for t in tensors}
        if len(counts) != 1 or not 1 <= (count := counts.pop()) <= self.batch:
            raise UserError(
                f"the engine takes batches of 1 to {self.batch} samples, as many in every tensor, not {[len(t) for t in tensors]}."
            )
        if any(p.grad is not None for p in self.module.parameters()):
            raise UserError(
                "the module has gradients already, which would be added to: call zero_grad() before the engine's step()."
            )
        back = levers.drawn(self.device) if self.draws else None

        def compute(layout: Layout) -> Tensor:
            if back:
                back()  # what is begun anew draws the same
            return self._compute(fitted(layout, count, self.recovery.smallest[STEP]), tensors)

        mean = self.recovery.run(STEP, compute)
        self._reserved = []
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def _usable(self) -> Levers:
        """The levers that there are for this module."""
        uncouples = self.whole_batch_norm and self.coupled and not self.draws and self.batch > 1
        return (*([CHECKPOINT_BLOCKS] if self.blocks else []), *([WHOLE_BATCH_NORM] if uncouples else []))

    def _compute(self, layout: Layout, tensors: Sequence[Tensor], draws: bool = True) -> Tensor:
        with levers.recomputing(self.blocks if layout.uses(CHECKPOINT_BLOCKS.name) else (), draws):
            whole = layout.uses(WHOLE_BATCH_NORM.name)
            return levers.accumulate(self.loss, self.module, tensors, layout.sizes, whole_batch_norm=whole)

    def _held(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers(), *state_of(self.optimizer), *self._reserved]

    def _growth(self, tensors: Sequence[Tensor], used: Levers, largest: int = 0) -> Growth:
        granule = 1 if self.device.type == "cpu" else GRANULE
        return traced(lambda count: self._trace(tensors, used, count), granule, largest)

    def _trace(self, tensors: Sequence[Tensor], used: Levers, count: int) -> Timeline:
        """What ``count`` samples allocate, whose gradients are thrown away; statistics and generators are as before.

        Raises:
            UserError: the module or the loss cannot take so many.
        """
        learning = [p for p in self.module.parameters() if p.requires_grad]
        inputs = [t[torch.arange(count) % len(t)] for t in tensors]
        buffers = [b.clone() for b in self.module.buffers()]
        back = levers.drawn(self.device)
        own = [p.grad for p in learning]
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter)
        held: dict[str, list[Tensor | None]] = {
            "weights": [*self.module.parameters(), *self.module.buffers()],
            "moments": [*state_of(self.optimizer), *self._reserved],
            GRADIENTS: [p.grad for p in learning],
        }
        layout = Layout((count,), used)
        try:
            return trace(
                lambda: self._compute(layout, inputs, draws=False), held, {GRADIENTS: lambda: [p.grad for p in learning]},
                ignore=[*inputs, *buffers], device=self.device,
            )  # fmt: skip
        except Exception as error:
            if isinstance(error, UserError) or limit.is_out_of_memory(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            shapes = [list(t.shape) for t in inputs]
            way = "; whole_batch_norm=False does without passes of their own for batch norm" if WHOLE_BATCH_NORM in used else ""
            raise UserError(
                f"the module and its loss cannot be run on {count} samples, of shapes {shapes}: {reason}{way}"
            ) from error
        finally:
            back()
            with torch.no_grad():
                for buffer, value in zip(self.module.buffers(), buffers, strict=True):
                    buffer.copy_(value)
            for parameter, gradient in zip(learning, own, strict=True):
                parameter.grad = gradient


class Growths:
    """What micro-batches allocate, by levers; kept packed: read, what resnet50 does takes 40 MiB.

    Args:
        make: of levers, and samples to be looked at, that are asked for the first time.
    """

    def __init__(self, make: Callable[[Levers, int], Growth]) -> None:
        self.make = make
        self.outlines: dict[Levers, Outline] = {}
        self._packed: dict[tuple[Levers, int], bytes] = {}

    def __call__(self, levers: Levers, largest: int = 0) -> Growth:
        """Of a micro-batch with ``levers``."""
        if (levers, largest) not in self._packed:
            made = self.make(levers, largest)
            self.outlines[levers] = made.outline
            self._packed[levers, largest] = zlib.compress(json.dumps(made.as_dict()).encode(), 1)
        return Growth.from_dict(json.loads(zlib.decompress(self._packed[levers, largest])))

    def settled(self, plan: Callable[[], T]) -> T:
        """What ``plan`` gives once it makes no more of them: what running them has left in the process has a part in it.

        Raises:
            UserError: nothing fits.
        """
        while True:
            known = len(self._packed)
            try:
                found = plan()
            except TooLittle:
                if known == len(self._packed):
                    raise
            else:
                if known == len(self._packed):
                    return found
                del found


def _needs(outlines: Mapping[Levers, Outline], layout: Layout) -> int | None:
    """What ``layout`` allocates, if its levers have been traced: where memory has run out is no place to do that."""
    if layout.levers not in outlines:
        return None
    return outlines[layout.levers].peaks([layout.micro_batch], several=len(layout.sizes) > 1)[0]


def fitted(layout: Layout, count: int, smallest: int = 1) -> Layout:
    """``layout`` for a batch of ``count`` samples, in micro-batches that are no larger, unless one had fewer than ``smallest``."""
    if count == sum(layout.sizes):
        return layout
    smallest = 1 if layout.uncoupled else smallest
    parts = min(-(-count // layout.micro_batch), max(1, count // smallest))
    used = layout.levers if parts > 1 else tuple(lever for lever in layout.levers if not lever.uncouples)
    return replace(layout, sizes=tuple(split(count, parts)), levers=used)

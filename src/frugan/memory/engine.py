"""The engine for any model: a module and a loss that gives one term a sample, trained within a budget.

engine = Engine(model, loss, optimizer, batch=512, memory="1GiB")
engine.plan(images[:16])
with engine:
    for images in batches:
        engine.step(images)
"""

import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from frugan.errors import UserError
from frugan.memory import levers, limit, private
from frugan.memory.accelerator import drawn
from frugan.memory.limit import MIB
from frugan.memory.plan import Layout, size, slices, split
from frugan.memory.recover import Change, Recovery
from frugan.memory.search import MARGIN, SLACK, Choice, Job, Search
from frugan.memory.trace import Timeline, trace

Loss = Callable[..., Tensor]
STEP = "the step"


def accumulate(loss: Loss, module: nn.Module, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Adds the gradients of the mean of ``loss(module, *tensors)`` over all samples, in micro-batches of ``sizes``.

    Args:
        loss: gives one term a sample, ``[n]``; what it draws at random should come with ``tensors``.
        module: what is trained.
        tensors: each ``[n, ...]``; are cut along their first dimension, and moved to the module's device a piece at a time.
        sizes: sum to n.

    Returns:
        The mean loss, without graph.

    Raises:
        UserError: the loss gives something else than one term a sample, or ``sizes`` do not sum to n.
    """
    if any(len(t) != sum(sizes) for t in tensors):
        raise UserError(
            f"micro-batches of {list(sizes)} are {sum(sizes)} samples, but the tensors have {[len(t) for t in tensors]}."
        )
    device = next(module.parameters()).device
    total = torch.zeros((), device=device)
    for begin, count in slices(sizes):
        terms = loss(module, *(t[begin : begin + count].to(device) for t in tensors))
        if tuple(terms.shape) != (count,):
            raise UserError(
                f"the loss gave a tensor of shape {list(terms.shape)} for {count} samples: it must give one term a sample, "
                f"[{count}] (reduction='none'), of which the engine takes the mean."
            )
        mean = terms.sum() / sum(sizes)
        torch.autograd.backward(mean)
        total = total + mean.detach()  # a loss in double precision gives a mean in double precision
    return total


class Engine(AbstractContextManager["Engine"]):
    """Trains ``module`` by ``loss`` in batches of ``batch`` samples, within ``memory``.

    Args:
        module: on its device.
        loss: see `accumulate`.
        optimizer: over the module's parameters. Memory for the state that it has not made yet is kept free for it.
        batch: samples in an update, at most.
        memory: the most that the process (on an accelerator: its part of the device) may hold, as ``2GiB``; None: most of what is
            free.
        blocks: parts of the module, each called with one tensor, that may be recomputed in backward. What they draw from torch's
            global generators (dropout) they draw again.
        changed: is told of every change to go on when memory ran out.

    Raises:
        UserError: the budget says nothing, or cannot be held on this device; the batch is none, or the optimizer needs a closure.
    """

    def __init__(
        self, module: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, *, batch: int, memory: str | None = None,
        blocks: Sequence[nn.Module] = (), changed: Callable[[Change], None] = print,
    ) -> None:  # fmt: skip
        if batch < 1:
            raise UserError(f"the engine's batch must be at least one sample, not {batch}.")
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise UserError(
                f"{type(optimizer).__name__} asks for the loss in its step(): the engine needs an optimizer that does not."
            )
        self.module = module
        self.loss = loss
        self.optimizer = optimizer
        self.batch = batch
        self.blocks = blocks
        self.device = next(module.parameters()).device
        self.budget = limit.budget(memory, self.device)
        self.coupled = any(isinstance(m, private.batch_norm()) for m in module.modules())
        self.draws = False  # whether it draws from torch's global generators
        self.changed = changed
        self.followed = True  # whether the module could be traced without running it
        self.choice: Choice | None = None
        self.predicted = 0
        self._reserved: list[Tensor] = []  # for the optimizer's state, until its first update
        self._open = ExitStack()

    def plan(self, *tensors: Tensor) -> Choice:
        """Chooses how a batch is computed; ``tensors`` are what `step` gets, of at least one sample, and are not trained on.

        Raises:
            UserError: nothing fits; names the smallest budget that would do. Or the loss does not give one term a sample.
        """
        with limit.as_before():
            return self._plan(tensors)

    def _plan(self, tensors: Sequence[Tensor]) -> Choice:
        update = self._reserve()
        least = min(2, self.batch)
        self.draws = any(call.random for call in self._trace(tensors, Layout(sizes=(least,)), False).calls())
        variants = [{"checkpoint_blocks": False}] + ([{"checkpoint_blocks": True}] if self.blocks else [])
        smallest = least if self.coupled else 1
        job = Job(STEP, self.batch, variants, partial(self._trace, tensors), self.coupled, smallest, draws=self.draws)
        search = Search([job], self.device)
        search.prepare()
        state = sum(t.untyped_storage().nbytes() for t in self._held() if t.device.type == self.device.type)
        framework = limit.baseline(self.device) - state  # the state is there already, and is part of every timeline
        updating = 0
        if update:
            search.workspaces.measure(update.calls())
            updating = search.holds([update], "return")
        available = (self.budget or framework + limit.spare(self.device)) - framework - MARGIN
        choice = search.choose(available) if updating <= available else None
        if choice is None:
            binding = search.smallest()[STEP]
            needs = max(binding.least, updating)
            what = f"{binding.layout} allocates {size(needs)}" if needs > updating else f"the update allocates {size(updating)}"
            raise UserError(
                f"{size(self.budget or 0)} are too little for this training: the smallest that works is "
                f"{math.ceil((SLACK * framework + MARGIN + needs) / MIB)}MiB, because "
                f"the framework holds {size(framework)}, and {what}."
            )
        self.choice = choice
        self.predicted = framework + max(choice.chosen[STEP].needs(choice.handling), updating)
        self.recovery = Recovery(
            [self.module], self.device, {STEP: choice.chosen[STEP].layout}, choice.handling, coupled=self.coupled or self.draws,
            levers={STEP: {"checkpoint_blocks"} if self.blocks else set()}, smallest={STEP: smallest},
            changed=self.changed, prepare=lambda _, layout: search.exact(job, layout).moment.bytes,
        )  # fmt: skip
        return choice

    def __enter__(self) -> Self:
        if self.choice is None:
            raise UserError("the engine has no plan yet: call plan() with a few samples first.")
        self._open.enter_context(limit.as_before())
        self._open.enter_context(limit.held_to(self.budget, self.choice.handling, self.device))
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
        back = drawn(self.device) if self.draws else None

        def compute(layout: Layout) -> Tensor:
            if back:
                back()  # what is begun anew draws the same
            return self._compute(fitted(layout, count, self.recovery.smallest[STEP]), tensors)

        mean = self.recovery.run(STEP, compute)
        self._reserved = []
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def _compute(self, layout: Layout, tensors: Sequence[Tensor], draws: bool = True) -> Tensor:
        with levers.recomputing(self.blocks if layout.checkpoint_blocks else (), draws):
            return accumulate(self.loss, self.module, tensors, layout.sizes)

    def _reserve(self) -> Timeline | None:
        """What an update of the optimizer allocates, or None where it cannot be followed; keeps memory for the state it will make.

        A copy of the optimizer makes two updates of parameters without memory, so that its own state is left to begin as it would.
        """
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        sizes = [p.untyped_storage().nbytes() for p in learning for _ in range(2)]  # where nothing is known: as Adam's
        update = None
        if (mode := private.imitating()) is not None:
            try:
                with mode:
                    twin = _twin(self.optimizer)
                    weights = [p for group in twin.param_groups for p in group["params"]]
                    for p in weights:
                        p.grad = torch.zeros_like(p)
                    type(twin).step(twin)
                    state = _tensors(twin)
                    held: dict[str, list[Tensor | None]] = {"weights": [*weights], "moments": [*state]}
                    held["gradients"] = [p.grad for p in weights]
                    update = trace(lambda: type(twin).step(twin), held, device=self.device)
                    sizes = [t.untyped_storage().nbytes() for t in state if t.device.type == self.device.type]
            except Exception as error:  # what an optimizer of somebody's own does with numbers that are not there
                if limit.is_out_of_memory(error):
                    raise
        if not self.optimizer.state:
            self._reserved = [torch.empty(n, dtype=torch.uint8, device=self.device).fill_(0) for n in sizes if n]
        return update

    def _held(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers(), *_tensors(self.optimizer), *self._reserved]

    def _trace(self, tensors: Sequence[Tensor], layout: Layout, accumulated: bool) -> Timeline:
        moments = [*_tensors(self.optimizer), *self._reserved]

        def run() -> Timeline:
            weights = [*self.module.parameters(), *self.module.buffers()]
            learning = [p for p in self.module.parameters() if p.requires_grad]
            for parameter in learning:
                parameter.grad = torch.zeros_like(parameter) if accumulated else None
            count = sum(layout.sizes)
            inputs = [torch.zeros(count, *t.shape[1:], dtype=t.dtype) for t in tensors]
            held: dict[str, list[Tensor | None]] = {
                "weights": [*weights],
                "moments": [*moments],
                "gradients": [p.grad for p in learning],
            }
            return trace(
                lambda: self._compute(layout, inputs, draws=False), held, {"gradients": lambda: [p.grad for p in learning]},
                ignore=inputs, device=self.device,
            )  # fmt: skip

        reason = ""
        if self.followed:
            try:
                mode = private.imitating()
                if mode is None:
                    raise NotImplementedError("this torch has no tensors without memory")
                with imitated(self.module, mode), mode:
                    return run()
            except UserError:
                raise
            except Exception as error:  # whatever a tracer cannot follow: values looked at, numpy, operators it does not know
                if limit.is_out_of_memory(error):
                    raise
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        buffers = [b.clone() for b in self.module.buffers()]
        back = drawn(self.device)
        try:
            timeline = run()
            if self.followed:  # what fails here too is no fault of following
                self.followed = False
                print(f"The model cannot be followed without running it ({reason}): measured by running it instead.")
            return timeline
        finally:
            back()
            for buffer, value in zip(self.module.buffers(), buffers, strict=True):
                buffer.copy_(value)
            self.module.zero_grad(set_to_none=True)


def fitted(layout: Layout, count: int, smallest: int = 1) -> Layout:
    """``layout`` for a batch of ``count`` samples, in micro-batches that are no larger, unless one had fewer than ``smallest``."""
    if count == sum(layout.sizes):
        return layout
    parts = min(-(-count // layout.micro_batch), max(1, count // smallest))
    return replace(layout, sizes=tuple(split(count, parts)))


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy of ``optimizer`` as new, on copies of its parameters; without its hooks, nor what was hung on its ``step``."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    twin.state = defaultdict(dict)
    twin.param_groups = [group | {"params": [_imitation(p) for p in group["params"]]} for group in optimizer.param_groups]
    for name in vars(twin):
        if name.endswith("_hooks"):
            setattr(twin, name, OrderedDict())
    return twin


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]


def _imitation(tensor: Tensor) -> Tensor:
    """One of the same layout, made in whatever mode is open."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


@contextmanager
def imitated(module: nn.Module, mode: AbstractContextManager[object]) -> Iterator[None]:
    """While open, ``module`` has tensors in the place of its own that are without memory, made in ``mode``."""
    own = [
        (part, [*part.named_parameters(recurse=False, remove_duplicate=False)], [*part.named_buffers("", False, False)])
        for part in module.modules()
    ]
    fakes: dict[int, Tensor] = {}

    def imitate(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = _imitation(tensor)
        return fakes[id(tensor)]

    try:
        with mode:
            for part, parameters, buffers in own:
                for name, tensor in [*parameters, *buffers]:
                    setattr(part, name, imitate(tensor))
        yield
    finally:
        for part, parameters, buffers in own:
            for name, tensor in [*parameters, *buffers]:
                setattr(part, name, tensor)

"""The engine for any model: a module and a loss that gives one term a sample, trained within a budget.

engine = Engine(model, loss, optimizer, batch=512, memory="1GiB")
engine.plan(images[:16])
with engine:
    for images in batches:
        engine.step(images)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frugan.errors import UserError
from frugan.memory import levers, limit
from frugan.memory.limit import MIB
from frugan.memory.plan import Layout, size, slices
from frugan.memory.recover import Change, Recovery
from frugan.memory.search import MARGIN, SLACK, Choice, Job, Search
from frugan.memory.trace import Timeline, trace

Loss = Callable[..., Tensor]
STEP = "the step"


def accumulate(loss: Loss, module: nn.Module, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Adds the gradients of the mean of ``loss(module, *tensors)`` over all samples, in micro-batches of ``sizes``.

    Args:
        loss: gives one term a sample, ``[n]``; what it draws at random must come with ``tensors``.
        module: what is trained.
        tensors: each ``[n, ...]``; are cut along their first dimension, and moved to the module's device a piece at a time.
        sizes: sum to n.

    Returns:
        The mean loss, without graph.
    """
    device = next(module.parameters()).device
    total = torch.zeros((), device=device)
    for begin, count in slices(sizes):
        mean = loss(module, *(t[begin : begin + count].to(device) for t in tensors)).sum() / sum(sizes)
        torch.autograd.backward(mean)
        total += mean.detach()
    return total


class Engine(AbstractContextManager["Engine"]):
    """Trains ``module`` by ``loss`` in batches of ``batch`` samples, within ``memory``.

    Args:
        module: on its device.
        loss: see `accumulate`.
        optimizer: over the module's parameters. Moments it has not made yet are made by `plan`.
        batch: samples in an update.
        memory: the most that the process (on CUDA: its part of the device) may hold, as ``2GiB``; None: most of what is free.
        blocks: parts of the module, each called with one tensor, that may be recomputed in backward.
        changed: is told what was changed when memory ran out.

    Raises:
        UserError: the budget says nothing, or cannot be held on this device.
    """

    def __init__(
        self, module: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, *, batch: int, memory: str | None = None,
        blocks: Sequence[nn.Module] = (), changed: Callable[[Change], None] = print,
    ) -> None:  # fmt: skip
        self.module = module
        self.loss = loss
        self.optimizer = optimizer
        self.batch = batch
        self.blocks = blocks
        self.device = next(module.parameters()).device
        self.budget = limit.budget(memory, self.device)
        self.coupled = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
        self.changed = changed
        self.followed = True  # whether the module could be traced without running it
        self.choice: Choice | None = None
        self.predicted = 0

    def plan(self, *tensors: Tensor) -> Choice:
        """Chooses how a batch is computed; ``tensors`` are what `step` gets, of at least one sample, and are not trained on.

        Raises:
            UserError: nothing fits; names the smallest budget that would do.
        """
        self._make_moments()
        variants = [{"checkpoint_blocks": False}] + ([{"checkpoint_blocks": True}] if self.blocks else [])
        job = Job(STEP, self.batch, variants, partial(self._trace, tensors), self.coupled, 2 if self.coupled else 1)
        search = Search([job], self.device)
        search.prepare()
        state = sum(t.untyped_storage().nbytes() for t in self._held())
        framework = limit.baseline(self.device) - state  # the state is there already, and is part of every timeline
        choice = search.choose((self.budget or framework + limit.spare(self.device)) - framework - MARGIN)
        if choice is None:
            least = search.smallest()[STEP]
            smallest = SLACK * framework + MARGIN + least.allocated
            raise UserError(
                f"{size(self.budget or 0)} are too little for this training: the smallest that works is "
                f"{math.ceil(smallest / MIB)}MiB, because "
                f"the framework holds {size(framework)}, and {least.layout} allocates {size(least.allocated)}."
            )
        self.choice = choice
        self.predicted = framework + choice.chosen[STEP].needs(choice.handling)
        self.recovery = Recovery(
            [self.module], self.device, {STEP: choice.chosen[STEP].layout}, choice.handling, coupled=self.coupled,
            levers={STEP: {"checkpoint_blocks"} if self.blocks else set()}, smallest={STEP: 2 if self.coupled else 1},
            changed=self.changed, prepare=lambda _, layout: search.exact(job, layout),
        )  # fmt: skip
        return choice

    def __enter__(self) -> Self:
        assert self.choice is not None, "plan first"
        self._held_to = limit.held_to(self.budget, self.choice.handling, self.device)
        self._held_to.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held_to.__exit__(*error)

    def step(self, *tensors: Tensor) -> Tensor:
        """One update by a batch; the mean loss, without graph."""
        mean = self.recovery.run(STEP, lambda layout: self._compute(layout, tensors))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def _compute(self, layout: Layout, tensors: Sequence[Tensor]) -> Tensor:
        with levers.recomputing(self.blocks if layout.checkpoint_blocks else ()):
            return accumulate(self.loss, self.module, tensors, layout.sizes)

    def _make_moments(self) -> None:
        """An update by zero gradients at rate zero makes them, and changes nothing else."""
        if self.optimizer.state:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _held(self) -> list[Tensor]:
        state = [v for values in self.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        return [*self.module.parameters(), *self.module.buffers(), *state]

    def _trace(self, tensors: Sequence[Tensor], layout: Layout, accumulated: bool) -> Timeline:
        moments = self._held()[len([*self.module.parameters(), *self.module.buffers()]) :]

        def run() -> Timeline:
            weights = [*self.module.parameters(), *self.module.buffers()]
            learning = list(self.module.parameters())
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
                lambda: self._compute(layout, inputs), held, {"gradients": lambda: [p.grad for p in learning]}, ignore=inputs
            )

        if self.followed:
            try:
                with imitated(self.module) as mode, mode:
                    return run()
            except Exception as error:  # whatever a tracer cannot follow: values looked at, numpy, operators it does not know
                if limit.is_out_of_memory(error):
                    raise
                self.followed = False
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                print(f"The model cannot be followed without running it ({reason}): measured by running it instead.")
        buffers = [b.clone() for b in self.module.buffers()]
        try:
            return run()
        finally:
            for buffer, value in zip(self.module.buffers(), buffers, strict=True):
                buffer.copy_(value)
            self.module.zero_grad(set_to_none=True)


@contextmanager
def imitated(module: nn.Module) -> Iterator[FakeTensorMode]:
    """While open, ``module`` has fake tensors in the place of its own."""
    mode = FakeTensorMode()
    own = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    fakes: dict[int, Tensor] = {}

    def imitate(tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and id(tensor) not in fakes:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        return fakes[id(tensor)] if tensor is not None else None

    with mode:
        for part, parameters, buffers in own:
            part._parameters = {name: imitate(p) for name, p in parameters.items()}  # type: ignore[misc]
            part._buffers = {name: imitate(b) for name, b in buffers.items()}
    try:
        yield mode
    finally:
        for part, parameters, buffers in own:
            part._parameters, part._buffers = parameters, buffers

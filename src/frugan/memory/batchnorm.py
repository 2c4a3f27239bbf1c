"""Batch norm over the whole batch, although the batch is computed in micro-batches.

Batch norm (Ioffe and Szegedy 2015, arXiv 1502.03167) of x is y = w h + b with h = (x - m) / sqrt(v + eps), where m and v are mean
and variance over all samples. With means over all samples too, its gradient is

    dx = w / sqrt(v + eps) (dy - mean(dy) - h mean(dy h)).

A micro-batch knows none of the means. They come from passes of their own:

1. `WholeBatch.measure`: statistics of the first layer, by passing all micro-batches up to it without a graph; then those of the
   second, up to which the first normalises by what is known now; and so on. Of parts `Beside` one another each goes on by a layer.
2. All micro-batches pass whole, forward and backward, with these statistics as constants: the first term of dx. The sums of dy
   and dy h are the gradients of b and w, which is why each call of a layer has copies of both.
3. `WholeBatch.bring_back`: the other terms, for the last layer first, as they change the sums of those before: all micro-batches
   pass up to it, and from there backward.

Between passes a few numbers a channel are kept, so memory does not grow with the batch. Time does, with the number of layers that
follow one another.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from frugan.memory import private
from frugan.memory.batch_statistics import Call, carrying
from frugan.utils.errors import UserError

Part = tuple[Any, ...]  # what tells a micro-batch to who computes it
Place = tuple[Any, int]  # of a call of batch norm: the layer, and how often it was called before in the same pass
UNLIKE = "batch norm over the whole batch needs a module that calls its layers alike for all samples."
PATCHED = ("whole_batch", "forward")  # of a layer, while a micro-batch passes it


class Reached(Exception):
    """A pass has come to the calls of batch norm at which it ends, with these inputs (None once they have been taken in)."""

    def __init__(self, inputs: dict[Place, Tensor | None]) -> None:
        super().__init__("a pass of batch norm's ended outside of it")
        self.inputs = inputs


class Beside:
    """What calls parts of a module that do not see what the others give, so that a pass ends in all of them, not in one after the
    other. A part that has ended gives None, and leaving raises `Reached`."""

    def __init__(self) -> None:
        self._inputs: dict[Place, Tensor | None] = {}

    def __enter__(self) -> Self:
        return self

    def __call__(self, part: Callable[..., Any], *inputs: Any) -> Any:
        """``part(*inputs)``."""
        try:
            return part(*inputs)
        except Reached as reached:
            self._inputs |= reached.inputs
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Reached):
            error.inputs = self._inputs | error.inputs
        elif error is None and self._inputs:
            raise Reached(self._inputs)


class WholeBatch:
    """A batch that passes ``module`` in micro-batches, each of which its batch norm layers normalise by statistics of all.

    Args:
        module: whose layers they are. Each micro-batch must call them alike, in every pass.
        calls: how often it calls them, if that is known; else a micro-batch more is passed to see.
    """

    def __init__(self, module: nn.Module, calls: int | None = None) -> None:
        self.layers = layers_of(module)
        self.expected = calls
        self.calls: dict[Place, Call] = {}
        self._steps: list[dict[Place, Call]] = []  # the same, in the order in which they are measured
        self._measured: dict[Place, Call] | None = None  # those whose statistics are being taken
        self._ends: set[Place] = set()  # the calls at which passes end
        self._met: Counter[Any] = Counter()  # calls of each layer in this pass

    @contextmanager
    def passing(self, met: Mapping[Any, int] | None = None) -> Iterator[None]:
        """While open, one micro-batch passes the module; ``met``: how often it has called each layer before."""
        before, self._met = self._met, Counter(met or {})
        with ExitStack() as after:
            after.callback(setattr, self, "_met", before)
            for layer in self.layers:
                after.callback(_put_back, layer, {name: vars(layer)[name] for name in PATCHED if name in vars(layer)})
                layer.whole_batch, layer.forward = self, partial(self._called, layer)
            yield

    def again(self) -> Callable[[], Any]:
        """What passes once more what is passed from here on, to where it ended, as `levers.recomputed` does."""
        met = dict(self._met)

        @contextmanager
        def opened() -> Iterator[None]:
            with self.passing(met), suppress(Reached):
                yield

        return opened

    def measure(self, forward: Callable[..., Any], parts: Sequence[Part]) -> None:
        """Finds all statistics; running ones move. ``forward(*part)`` passes a micro-batch, within `passing`.

        Raises:
            UserError: micro-batches call other layers than others did.
        """
        with torch.no_grad():
            while self.expected is None or len(self.calls) < self.expected:
                self._measured = {}
                try:
                    for part in parts:
                        reached = self._reach(forward, part)
                        if not self._measured and self.expected is None:
                            return
                        if not reached or reached.keys() != self._measured.keys():
                            raise UserError(UNLIKE)
                    for call in self._measured.values():
                        call.settle()
                    self._steps.append(self._measured)
                    self.calls |= self._measured
                finally:
                    self._measured = None

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients must reach beside parameters."""
        return [t for call in self.calls.values() for t in (call.weight, call.bias)]

    def bring_back(self, add: Callable[..., None], parts: Sequence[Part]) -> None:
        """Adds to gradients what they have by way of the statistics.

        ``add(*part)`` goes backward from what `carried` gives for that micro-batch, if that has a graph.
        """
        for calls in reversed(self._steps):
            self._ends = {place for place, call in calls.items() if call.weight.grad is not None}
            for part in parts if self._ends else ():  # else nothing comes back to them
                add(*part)
        self._ends = set()
        for call in self.calls.values():
            call.finish()

    def carried(self, forward: Callable[..., Any], *part: Any) -> Tensor:
        """Zero, with the graph of a micro-batch up to the layers whose turn it is, and the gradient that their statistics carry."""
        inputs = self._reach(forward, part)
        assert inputs.keys() == self._ends
        found = [carrying(x, self.calls[place].gradient(x)) for place, x in inputs.items() if x is not None]
        return found[0] if len(found) == 1 else torch.stack(found).sum()

    def _reach(self, forward: Callable[..., Any], part: Part) -> dict[Place, Tensor | None]:
        """The calls at which the pass ends, and their inputs."""
        try:
            forward(*part)
        except Reached as reached:  # with the exception go the frames it went through, and what they hold
            return reached.inputs
        return {}

    def _called(self, layer: Any, x: Tensor) -> Tensor:
        place = layer, self._met[layer]
        self._met[layer] += 1
        if place in self._ends:
            raise Reached({place: x})
        if place in self.calls:
            return self.calls[place].normalise(x)
        if self._measured is None:
            raise UserError(UNLIKE)
        if place not in self._measured:
            self._measured[place] = Call(layer, x)
        self._measured[place].take_in(x.detach())  # who passes it may have turned graphs on
        raise Reached({place: None})


def _put_back(layer: Any, before: dict[str, Any]) -> None:
    for name in PATCHED:
        delattr(layer, name)  # what the class says shows again
    for name, value in before.items():
        setattr(layer, name, value)


def layers_of(module: nn.Module) -> list[Any]:
    """The batch norm layers of ``module`` that take statistics of what they are given, as they are now."""
    return [m for m in module.modules() if isinstance(m, private.batch_norm()) and (m.training or m.running_mean is None)]


class WholeBatches:
    """Batches under way, by name: those of a computation in which a module sees several, or several modules one."""

    def __init__(self) -> None:
        self._found: dict[str, WholeBatch] = {}
        self._parts: Sequence[Part] = ()

    @contextmanager
    def measured(self, parts: Sequence[Part], passes: Mapping[str, tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
        """While open, batch norm takes its statistics over all of ``parts``.

        Args:
            parts: what each micro-batch's passes are called with.
            passes: by names, in the order in which statistics are needed, a module that calls each batch norm layer once, and what
                passes a micro-batch through it, within `passing` of that name.
        """
        self._parts = parts
        try:
            for name, (module, forward) in passes.items():
                if calls := len(layers_of(module)):
                    self._found[name] = WholeBatch(module, calls)
                    self._found[name].measure(forward, parts)
            yield
        finally:
            self._found = {}

    def passing(self, name: str) -> AbstractContextManager[object]:
        """While open, one micro-batch of the batch called ``name`` passes; if there is none, as ever."""
        return self._found[name].passing() if name in self._found else nullcontext()

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients must reach beside parameters."""
        return [t for whole in self._found.values() for t in whole.leaves]

    def bring_back(self, name: str, add: Callable[..., None]) -> None:
        """`WholeBatch.bring_back`, if there is a batch called ``name``."""
        if name in self._found:
            self._found[name].bring_back(add, self._parts)

    def carried(self, name: str, forward: Callable[..., Any], *part: Any) -> Tensor:
        """`WholeBatch.carried` of the batch called ``name``."""
        return self._found[name].carried(forward, *part)


def accumulate(module: nn.Module, share: Callable[..., Tensor], parts: Sequence[Part]) -> Tensor:
    """Adds the gradients of the sum of ``share(*part)`` over all micro-batches, with statistics of all of them.

    Args:
        module: what ``share`` passes samples through.
        share: of a micro-batch, a number; computes the same in every pass.
        parts: what it is called with.

    Returns:
        The sum, without graph.

    Raises:
        UserError: micro-batches call layers in another order than others.
    """
    whole = WholeBatch(module)

    def passed(*part: Any) -> Tensor:
        with whole.passing():
            return share(*part)

    def add(*part: Any) -> None:
        value = whole.carried(passed, *part)
        if value.requires_grad:
            torch.autograd.backward(value)

    whole.measure(passed, parts)
    total = None
    for part in parts:
        value = passed(*part)
        torch.autograd.backward(value)
        total = value.detach() if total is None else total + value.detach()
    whole.bring_back(add, parts)
    assert total is not None
    return total

"""Batch norm over the whole batch, although the batch is computed in micro-batches.

Batch norm (Ioffe and Szegedy 2015, arXiv 1502.03167) of x is y = w h + b with h = (x - m) / sqrt(v + eps), where m and v are mean
and variance over all samples. With means over all samples too, its gradient is

    dx = w / sqrt(v + eps) (dy - mean(dy) - h mean(dy h)).

A micro-batch knows none of the means. They come from passes of their own:

1. `WholeBatch.measure`: statistics of the first layer, by passing all micro-batches up to it without a graph; then those of the
   second, up to which the first normalises by what is known now; and so on.
2. All micro-batches pass whole, forward and backward, with these statistics as constants: the first term of dx. The sums of dy
   and dy h are the gradients of b and w, which is why each call of a layer has copies of both.
3. `WholeBatch.bring_back`: the other terms, for the last layer first, as they change the sums of those before: all micro-batches
   pass up to it, and from there backward.

Between passes a few numbers a channel are kept, so memory does not grow with the batch. Time does, with the number of layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from frugan.memory import private
from frugan.memory.batch_statistics import Call, carrying
from frugan.utils.errors import UserError

Part = tuple[Any, ...]  # what tells a micro-batch to who computes it
UNLIKE = "batch norm over the whole batch needs a module that calls its layers alike for all samples."
PATCHED = ("whole_batch", "forward")  # of a layer, while a micro-batch passes it


class Reached(Exception):
    """A pass has come to the call of batch norm at which it ends."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        super().__init__("a pass of batch norm's ended outside of it")
        self.layer = layer
        self.x = x


class WholeBatch:
    """A batch that passes ``module`` in micro-batches, each of which its batch norm layers normalise by statistics of all.

    Args:
        module: whose layers they are. Each micro-batch must call them in the same order, in every pass alike.
        calls: how often it calls them, if that is known; else a micro-batch more is passed to see.
    """

    def __init__(self, module: nn.Module, calls: int | None = None) -> None:
        self.layers = layers_of(module)
        self.expected = calls
        self.calls: list[Call] = []
        self._place = 0  # of the next call
        self._end: int | None = None  # of the call at which passes end

    @contextmanager
    def passing(self, place: int = 0) -> Iterator[None]:
        """While open, one micro-batch passes the module; ``place``: the call of batch norm that it meets first."""
        before, self._place = self._place, place
        with ExitStack() as after:
            after.callback(setattr, self, "_place", before)
            for layer in self.layers:
                after.callback(_put_back, layer, {name: vars(layer)[name] for name in PATCHED if name in vars(layer)})
                layer.whole_batch, layer.forward = self, partial(self._called, layer)
            yield

    def again(self) -> Callable[[], Any]:
        """What passes once more what is passed from here on, to where it ended, as `levers.recomputed` does."""
        place = self._place

        @contextmanager
        def opened() -> Iterator[None]:
            with self.passing(place), suppress(Reached):
                yield

        return opened

    def measure(self, forward: Callable[..., Any], parts: Sequence[Part]) -> None:
        """Finds all statistics; running ones move. ``forward(*part)`` passes a micro-batch, within `passing`.

        Raises:
            UserError: a micro-batch calls fewer layers than another did.
        """
        with torch.no_grad():
            while self.expected is None or len(self.calls) < self.expected:
                self._end = len(self.calls)
                call: Call | None = None
                for part in parts:
                    reached = self._reach(forward, part)
                    if reached is None and call is None and self.expected is None:
                        break
                    if reached is None or (call and call.layer is not reached[0]):
                        raise UserError(UNLIKE)
                    layer, x = reached
                    call = call or Call(layer, x)
                    call.take_in(x)
                    del x, reached
                self._end = None
                if call is None:
                    break
                call.settle()
                self.calls.append(call)

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients must reach beside parameters."""
        return [t for call in self.calls for t in (call.weight, call.bias)]

    def bring_back(self, add: Callable[..., None], parts: Sequence[Part]) -> None:
        """Adds to gradients what they have by way of the statistics.

        ``add(*part)`` goes backward from what `carried` gives for that micro-batch, if that has a graph.
        """
        for number in reversed(range(len(self.calls))):
            if self.calls[number].weight.grad is None:
                continue  # nothing comes back to it
            self._end = number
            for part in parts:
                add(*part)
        self._end = None
        for call in self.calls:
            call.finish()

    def carried(self, forward: Callable[..., Any], *part: Any) -> Tensor:
        """Zero, with the graph of a micro-batch up to the layer whose turn it is, and the gradient that its statistics carry."""
        reached = self._reach(forward, part)
        assert reached and self._end is not None
        return carrying(reached[1], self.calls[self._end].gradient(reached[1]))

    def _reach(self, forward: Callable[..., Any], part: Part) -> tuple[Any, Tensor] | None:
        """The layer at which the pass ends, and its input; None where it is not called."""
        try:
            forward(*part)
        except Reached as reached:  # with the exception go the frames it went through, and what they hold
            return reached.layer, reached.x
        return None

    def _called(self, layer: Any, x: Tensor) -> Tensor:
        place = self._place
        self._place += 1
        if place == self._end:
            raise Reached(layer, x)
        if place >= len(self.calls):
            raise UserError(UNLIKE)
        return self.calls[place].normalise(x)


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

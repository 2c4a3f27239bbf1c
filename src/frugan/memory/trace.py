"""What a computation allocates: every storage that comes and goes while it runs once, on few samples.

A dispatch mode sees every operator, forward and backward, and what the allocator gives out inside it (its workspace). Two such
runs, of two sizes, tell what any size would allocate (`frugan.memory.growth`). Where numbers do not matter, an operator that has
run on arguments of the same shapes is not run again: it is known what it allocates (`Calls`).

torch's dispatch modes, which have no other name than one with an underscore, are used here as they are: without them nothing could
be followed, and nothing planned.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from frugan.memory import private
from frugan.memory.calls import Calls, tensors_in
from frugan.utils.accelerator import accelerator

OTHER = "activations"  # what no label says otherwise of
GRADIENTS = "gradients"
CPU = torch.device("cpu")
GRANULE = 512  # bytes of which accelerators' allocators give out whole ones


Work = tuple[int, int, int]  # of a call: its flops, the bytes that it moves, and those among them that cross


@dataclass(slots=True)
class Event:
    """A call, or what went.

    Args:
        storages: those that the call made, or that went.
        inside: what the call allocated (> 0) and freed (< 0), its results included, in order; None: what went.
        flops: of convolutions and matrix products.
        moved: bytes that the call reads and writes.
        crossed: those among them that it copies between host and device.
        random: whether it draws from torch's global generators.
        into: a gradient, and what was added to it in place; without gradients the latter becomes the gradient.
    """

    storages: list[int]
    inside: list[int] | None = None
    flops: int = 0
    moved: int = 0
    crossed: int = 0
    random: bool = False
    into: tuple[int, int] | None = None


@dataclass
class Moment:
    """The peak of a timeline: bytes in all, by label, the workspace among them, and the index of its event."""

    bytes: int
    parts: dict[str, int]
    workspace: int
    index: int


@dataclass
class Timeline:
    """Everything that happened, in order.

    Args:
        sizes: bytes of each storage.
        labels: what each storage is for, where something was said of it.
        held: the storages that were there before the first event.
        events: in order.
    """

    sizes: dict[int, int] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)

    @property
    def random(self) -> bool:
        """Whether something draws from torch's global generators."""
        return any(e.random for e in self.events)

    @property
    def flops(self) -> int:
        """Floating-point operations of convolutions and matrix products."""
        return sum(e.flops for e in self.events)

    @property
    def fresh(self) -> int:
        """Bytes of all storages that were made."""
        return sum(self.sizes[s] for e in self.events if e.inside is not None for s in e.storages)

    def work(self) -> NDArray[Any]:
        """The `Work` of each call, ``[calls, 3]``."""
        return np.array([(e.flops, e.moved, e.crossed) for e in self.events if e.inside is not None]).reshape(-1, 3)

    def levels(self) -> list[tuple[int, int]]:
        """For each event the bytes that are live after it, and the most that were live during it."""
        of = self.sizes.__getitem__
        live = sum(map(of, self.held))
        levels = []
        for event in self.events:
            size = sum(map(of, event.storages))
            if event.inside is None:
                live -= size
                levels.append((live, live))
            else:
                most = live + max(size, highest(event.inside))
                live += size
                levels.append((live, most))
        return levels

    def course(self) -> list[Counter[str]]:
        """For each event the bytes that are live during it, by what they are for; what a call needs inside as workspaces."""
        now = Counter[str]()
        for storage in self.held:
            now[self.labels.get(storage, OTHER)] += self.sizes[storage]
        course = []
        for event in self.events:
            for storage in event.storages:
                now[self.labels.get(storage, OTHER)] += self.sizes[storage] * (-1 if event.inside is None else 1)
            made = sum(self.sizes[s] for s in event.storages)
            inside = highest(event.inside) - made if event.inside else 0
            course.append(now + Counter(workspaces=max(0, inside)))
        return course

    def moves(self) -> Iterator[tuple[object, int]]:
        """Every allocation after the first event, those inside calls included: which, and its bytes; 0 bytes give it back."""
        for number, event in enumerate(self.events):
            if event.inside is None:
                yield from ((storage, 0) for storage in event.storages)
                continue
            results = list(event.storages)
            inside = event.inside
            stays = Counter(m for m in inside if m > 0) - Counter(-m for m in inside if m < 0)
            made: dict[int, list[object]] = {}
            for i, move in enumerate(inside):
                if move < 0:
                    if made.get(-move):
                        yield made[-move].pop(), 0
                    continue
                result = next((s for s in results if self.sizes[s] == move), None) if stays[move] else None
                if result is not None:
                    results.remove(result)
                    stays[move] -= 1
                    yield result, move
                else:
                    made.setdefault(move, []).append((number, i))
                    yield (number, i), move
            yield from ((storage, self.sizes[storage]) for storage in results)
            yield from ((key, 0) for keys in made.values() for key in keys)

    def left(self) -> int:
        """Bytes that were made and are still live at the end."""
        return sum(self.sizes[s] * (-1 if e.inside is None else 1) for e in self.events for s in e.storages)

    def beside(self, held: int) -> "Timeline":
        """The same while ``held`` bytes more are there from the start."""
        other = min(self.sizes, default=0) - 1
        return replace(self, sizes=self.sizes | {other: held}, held=self.held | {other})

    def peak(self) -> Moment:
        """The moment at which most is live."""
        levels = self.levels()
        index, most = max(enumerate(level[1] for level in levels), key=lambda pair: pair[1], default=(-1, 0))
        live = set(self.held)
        for event in self.events[: index + 1]:
            (live.difference_update if event.inside is None else live.update)(event.storages)
        parts: Counter[str] = Counter()
        for storage in live:
            parts[self.labels.get(storage, OTHER)] += self.sizes[storage]
        most = most if levels else sum(parts.values())
        return Moment(most, dict(parts), most - sum(parts.values()), index)


def highest(moves: Iterable[int]) -> int:
    """The most that is live while allocations (> 0) and frees (< 0) happen in turn."""
    live = most = 0
    for move in moves:
        live += move
        most = max(most, live)
    return most


def allocations(computation: Callable[[], Any]) -> list[int]:
    """What ``computation`` allocates (> 0) and frees (< 0) of the CPU allocator's bytes, in order."""
    moves: list[int] = []
    with private.recording(moves):
        computation()
    return moves


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records a `Timeline` of what happens on ``device`` while it is active; what lies on the host beside it has no bytes there."""

    def __init__(self, device: torch.device, calls: Calls | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.timeline = Timeline()
        self._calls = calls
        self.device = device
        self._there = accelerator(device)
        self._known: dict[int, weakref.ref[Any]] = {}  # by address; the reference says when it is gone
        self._numbers: dict[int, int] = {}
        self._next = 0
        self._sum: Event | None = None  # what was done last, if it was a sum that autograd made
        self._summands: set[int] = set()  # the storages of its summands that are no views
        self._stands_for: dict[int, int] = {}  # a sum: the summand whose storage it really is in

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Calls ``func`` and writes down which storages are new."""
        kwargs = kwargs or {}
        if func.is_view or func.namespace == "prim":
            return func(*args, **kwargs)
        result, inside, apart, work = self._watched(func, args, kwargs)
        event = Event([], inside, *work, random=torch.Tag.nondeterministic_seeded in func.tags)
        self.timeline.events.append(event)  # before the storages: what the result replaces goes afterwards
        event.storages += [n for t in tensors_in(result) if (n := self._meet(t)) is not None]
        if self._there:  # what it kept first, then what it needed besides: the order in which convolutions ask
            event.inside = [*(self.timeline.sizes[s] for s in event.storages), *([apart, -apart] if apart > 0 else [])]
        if func.overloadpacket.__name__ == "_efficientzerotensor":  # zeros of forward-mode, which are nowhere
            self.timeline.sizes.update(dict.fromkeys(event.storages, 0))
            event.inside = []
        # Autograd sums gradients that meet in place, where it holds the last reference to one that is no view; but not while a
        # mode looks on.
        self._sum = event if func is torch.ops.aten.add.Tensor and private.in_backward() else None
        if self._sum:
            summands = [t for t in args if isinstance(t, Tensor) and not private.is_view(t)]
            self._summands = {self._numbers.get(private.address(t), -1) for t in summands}
        if func is torch.ops.aten.add_.Tensor:
            summands = [t for t in args if isinstance(t, Tensor)]
            numbers = [self._stands_for.get(n, n) for t in summands if (n := self._numbers.get(private.address(t))) is not None]
            if len(numbers) == 2 and self.timeline.labels.get(numbers[0]) == GRADIENTS:
                event.into = numbers[0], numbers[1]
        return result

    def _watched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[int], int, Work]:
        """The result of ``func``, what it allocated and freed on the CPU, what it needed besides results elsewhere, its work."""
        if self._calls is None:
            return self._ran(func, args, kwargs)
        result, (inside, apart, work) = self._calls.run(func, args, kwargs, self._ran)
        return result, [*inside], apart, work

    def _ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[int], int, Work]:
        inside: list[int] = []
        apart = 0
        if self._there is None:
            with private.recording(inside):
                result = func(*args, **kwargs)
        else:  # allocators count on the host, whatever the device has done of it
            self._there.forget_peak()
            result = func(*args, **kwargs)
            apart = self._there.besides()
        return result, inside, apart, self._work(func, args, kwargs, result)

    def _work(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Work:
        sizes = [(t.device.type, t.numel() * t.element_size()) for t in tensors_in([args, kwargs, result])]
        here = [size for kind, size in sizes if kind == self.device.type]
        crossed = max((size for kind, size in sizes if kind != self.device.type), default=0) if here else 0
        return private.flops(func, *args, result=result, **kwargs), sum(here), crossed

    def hold(self, label: str, tensors: "Tensors") -> None:
        """Says that ``tensors`` are there already, and what for."""
        for tensor in tensors:
            if tensor is not None:
                number = self._meet(tensor)
                if number is not None:
                    self.timeline.held.add(number)
                self.name(label, [tensor])

    def name(self, label: str, tensors: "Tensors") -> None:
        """Says what ``tensors`` are for."""
        for tensor in tensors:
            if tensor is not None and (number := self._numbers.get(private.address(tensor))) is not None:
                self.timeline.labels[number] = label

    def _meet(self, tensor: Tensor) -> int | None:
        """The number of a storage that is new and on the device, else None."""
        if tensor.device.type != self.device.type:
            return None
        storage = tensor.untyped_storage()
        address = private.address(tensor)
        if address in self._known and self._known[address]() is not None:
            return None
        number = self._next
        self._next += 1

        def gone(_: object) -> None:
            if self._numbers.get(address) == number:
                del self._known[address], self._numbers[address]
            events, sizes = self.timeline.events, self.timeline.sizes
            real = self._stands_for.get(number, number)
            in_place = self._sum and events[-1] is self._sum and self._sum.storages and number in self._summands
            if in_place and self._sum and sizes[self._sum.storages[0]] == sizes[real]:
                self._stands_for[self._sum.storages.pop()] = real
                self._sum.inside = []  # what happens in place needs nothing
            else:
                events.append(Event([real]))

        self._known[address] = weakref.ref(storage, gone)
        self._numbers[address] = number
        self.timeline.sizes[number] = storage.nbytes()
        return number


# torch has its compiler leave this alone, for which it would import it: 1.5 s and 150 MiB.
Tracer.__torch_dispatch__ = private.unwrapped(Tracer.__torch_dispatch__)  # type: ignore[method-assign]


Tensors = Iterable[Tensor | None]


def trace(
    computation: Callable[[], Any],
    held: Mapping[str, Tensors],
    made: Mapping[str, Callable[[], Tensors]] | None = None,
    ignore: Tensors = (),
    device: torch.device = CPU,
    calls: Calls | None = None,
) -> Timeline:
    """What ``computation`` allocates.

    Args:
        computation: is run once; its result is dropped at its end.
        held: tensors that are there before, by what they are for. They count towards the peak.
        made: asked at the end, tensors that ``computation`` made, by what they are for; the rest are activations.
        ignore: tensors that are there before and do not count.
        device: whose memory is looked at.
        calls: what is known of calls, if nothing in ``computation`` is decided by numbers.
    """
    tracer = Tracer(device, calls)
    tracer.hold("", ignore)
    tracer.timeline = Timeline()
    for label, tensors in held.items():
        tracer.hold(label, tensors)
    with tracer:
        computation()
    for label, ask in (made or {}).items():
        tracer.name(label, ask())
    timeline = tracer.timeline
    tracer.timeline = Timeline()  # what goes from now on is none of this computation's
    return timeline

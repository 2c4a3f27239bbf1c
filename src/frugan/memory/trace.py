"""What a computation would allocate, found without allocating it.

In a ``FakeTensorMode`` tensors are fake: they have shapes, dtypes and an autograd graph, but no memory. A dispatch mode sees every
operator, forward and backward, and every storage that comes and goes. What an operator needs inside (its workspace) is not
visible to fake tensors; `frugan.memory.probe` measures it once for each distinct call, and `Timeline.peak` adds it.

torch's dispatch modes and trees of tensors, which have no other name than one with an underscore, are used here and in `probe` as
they are: without them nothing could be followed, and nothing planned.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from frugan.memory import private

OTHER = "activations"  # what no label says otherwise of
CPU = torch.device("cpu")
GRANULE = 512  # bytes of which accelerators' allocators give out whole ones


@dataclass(frozen=True, slots=True)
class Spec:
    """What of a tensor decides how an operator treats it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        """The spec of ``tensor``."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, str(tensor.device))


@dataclass(frozen=True, slots=True)
class Call:
    """One distinct call of an operator: equal calls need equal workspaces."""

    operator: Any
    arguments: Any  # as they were, with a Spec for each tensor
    key: str
    here: bool = True  # whether it works on the device that is looked at, not on the host beside it
    random: bool = False  # whether it draws from a generator

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and self.key == other.key


CALLS: dict[str, Call] = {}  # one of each, however often it is traced


@dataclass(slots=True)
class Event:
    """A call with the storages that it made, its arithmetic, the bytes it reads and writes, and those among them that it copies
    between host and device; without a call, what went."""

    call: Call | None
    storages: list[int]
    flops: int = 0
    moved: int = 0
    crossed: int = 0


@dataclass
class Moment:
    """The peak of a timeline: bytes in all, by label, the workspace among them, and the index of its event."""

    bytes: int
    parts: dict[str, int]
    workspace: int
    index: int


Workspaces = Mapping[Call, "list[int]"]  # what a call allocates (> 0) and frees (< 0), in order


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

    def calls(self) -> Counter[Call]:
        """How often each distinct call was made."""
        return Counter(e.call for e in self.events if e.call is not None)

    @property
    def flops(self) -> int:
        """Floating-point operations of convolutions and matrix products."""
        return sum(e.flops for e in self.events)

    @property
    def fresh(self) -> int:
        """Bytes of all storages that were made."""
        return sum(self.sizes[s] for e in self.events if e.call is not None for s in e.storages)

    def seconds(self, rates: Any) -> float:
        """What it would take at these rates (`frugan.memory.search.Rates`)."""
        calls = [e for e in self.events if e.call is not None]
        return float(sum(max(e.flops / rates.flops, e.moved / rates.bytes, e.crossed / rates.crossing) + rates.call for e in calls))

    def levels(self, workspaces: Workspaces | None = None) -> list[tuple[int, int]]:
        """For each event the bytes that are live after it, and the most that were live during it."""
        live = sum(self.sizes[s] for s in self.held)
        levels = []
        for event in self.events:
            size = sum(self.sizes[s] for s in event.storages)
            if event.call is None:
                live -= size
                levels.append((live, live))
            else:
                most = live + max(size, highest(workspaces.get(event.call, ())) if workspaces else 0)
                live += size
                levels.append((live, most))
        return levels

    def course(self, workspaces: Workspaces) -> list[Counter[str]]:
        """For each event the bytes that are live during it, by what they are for; what a call needs inside as workspaces."""
        now = Counter[str]()
        for storage in self.held:
            now[self.labels.get(storage, OTHER)] += self.sizes[storage]
        course = []
        for event in self.events:
            for storage in event.storages:
                now[self.labels.get(storage, OTHER)] += self.sizes[storage] * (1 if event.call else -1)
            made = sum(self.sizes[s] for s in event.storages)
            inside = highest(workspaces.get(event.call, ())) - made if event.call else 0
            course.append(now + Counter(workspaces=max(0, inside)))
        return course

    def moves(self, workspaces: Workspaces) -> Iterator[tuple[object, int]]:
        """Every allocation after the first event, those inside calls included: which, and its bytes; 0 bytes give it back."""
        for number, event in enumerate(self.events):
            if event.call is None:
                yield from ((storage, 0) for storage in event.storages)
                continue
            results = list(event.storages)
            inside = workspaces.get(event.call, [])
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

    def peak(self, workspaces: Workspaces | None = None) -> Moment:
        """The moment at which most is live."""
        levels = self.levels(workspaces)
        index, most = max(enumerate(level[1] for level in levels), key=lambda pair: pair[1], default=(-1, 0))
        live = set(self.held)
        for event in self.events[: index + 1]:
            (live.difference_update if event.call is None else live.update)(event.storages)
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


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records a `Timeline` of what happens on ``device`` while it is active; what lies on the host beside it has no bytes there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.timeline = Timeline()
        self.device = device
        self._granule = 1 if device.type == "cpu" else GRANULE
        self._known: dict[int, weakref.ref[Any]] = {}  # by address; the reference says when it is gone
        self._numbers: dict[int, int] = {}
        self._next = 0
        self._sum: Event | None = None  # what was done last, if it was such a sum
        self._summands: set[int] = set()  # the storages of its summands that are no views
        self._stands_for: dict[int, int] = {}  # a sum: the summand whose storage it really is in

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Calls ``func`` and writes down which storages are new."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func.namespace == "prim":
            return result
        arguments = tree_map_only(Tensor, Spec.of, (args, kwargs))
        key = f"{func} {arguments}"
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        inside = [t.numel() * t.element_size() for t in tensors if t.device.type == self.device.type]
        outside = [t.numel() * t.element_size() for t in tensors if t.device.type != self.device.type]
        call = CALLS.setdefault(key, Call(func, arguments, key, bool(inside), torch.Tag.nondeterministic_seeded in func.tags))
        event = Event(
            call, [], flops=private.flops(func, *args, result=result, **kwargs), moved=sum(inside),
            crossed=max(outside, default=0) if inside else 0,
        )  # fmt: skip
        self.timeline.events.append(event)  # before the storages: what the result replaces goes afterwards
        event.storages += [n for t in tree_leaves(result) if isinstance(t, Tensor) and (n := self._meet(t)) is not None]
        if func.overloadpacket.__name__ == "_efficientzerotensor":
            self.timeline.sizes.update(dict.fromkeys(event.storages, 0))  # zeros of forward-mode, which are nowhere
        # Autograd sums gradients that meet in place, where it holds the last reference to one that is no view; but not while a
        # mode looks on.
        self._sum = event if func is torch.ops.aten.add.Tensor and private.in_backward() else None
        if self._sum:
            summands = [t for t in args if isinstance(t, Tensor) and not private.is_view(t)]
            self._summands = {self._numbers.get(private.address(t), -1) for t in summands}
        return result

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
                self._sum.call = None  # what happens in place needs nothing
            else:
                events.append(Event(None, [real]))

        self._known[address] = weakref.ref(storage, gone)
        self._numbers[address] = number
        self.timeline.sizes[number] = -(-storage.nbytes() // self._granule) * self._granule
        return number


def without_memory(module: nn.Module, device: torch.device) -> nn.Module:
    """Replaces what ``module`` holds by fake tensors of the same layout on ``device``; to be called in a ``FakeTensorMode``."""

    def imitate(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(imitate(parameter), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, imitate(buffer))
    return module


Tensors = Iterable[Tensor | None]


def trace(
    computation: Callable[[], Any],
    held: Mapping[str, Tensors],
    made: Mapping[str, Callable[[], Tensors]] | None = None,
    ignore: Tensors = (),
    device: torch.device = CPU,
) -> Timeline:
    """What ``computation`` allocates, on tensors that are fake already, or on real ones.

    Args:
        computation: is run once; its result is dropped at its end.
        held: tensors that are there before, by what they are for. They count towards the peak.
        made: asked at the end, tensors that ``computation`` made, by what they are for; the rest are activations.
        ignore: tensors that are there before and do not count.
        device: whose memory is looked at.
    """
    tracer = Tracer(device)
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

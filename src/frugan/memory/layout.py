"""Layouts: how a batch is computed in the memory there is. Pure: names in, choices out; no torch."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import groupby
from typing import Any, Self

SMALLEST_COUPLED = 16  # samples of which batch statistics may be taken without being asked
MOST = 1_000_000  # samples of a batch: of more there are so many layouts that it takes minutes to look at them
FEW = 4  # samples below which micro-batches cost more than other ways of saving


class Guarantee(IntEnum):
    """What a way of saving memory leaves as it is, best first."""

    BITWISE = 0  # the same bits
    REASSOCIATION = 1  # the same sums in another order: equal to rounding
    APPROXIMATE = 2  # it changes the training

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, order=True, kw_only=True)
class Lever:
    """A way of computing the same in less memory, for more time. Who computes declares it, and asks `Layout.uses` for it.

    Args:
        rung: when it is tried if memory runs out: low ones first, those of the same rung together, as they help only one another.
        name: under which plans keep it.
        words: what a person reads where it is in use.
        guarantee: what it leaves as it is.
        plain: what plans say where it is not in use.
        used: what they say where it is.
        uncouples: whether micro-batches are exact with it although a sample's output depends on the others.
    """

    rung: int
    name: str
    words: str
    guarantee: Guarantee
    plain: Any = False
    used: Any = True
    uncouples: bool = False


CHECKPOINT_BLOCKS = Lever(rung=2, name="checkpoint_blocks", words="blocks recomputed", guarantee=Guarantee.BITWISE)
WHOLE_BATCH_NORM = Lever(
    rung=4, name="whole_batch_norm", words="batch norm over the whole batch", guarantee=Guarantee.REASSOCIATION, uncouples=True
)


def uncoupling(levers: Iterable[Lever]) -> bool:
    """Whether one of ``levers`` makes micro-batches exact although samples are coupled."""
    return any(lever.uncouples for lever in levers)


def split(batch: int, parts: int) -> list[int]:
    """Sizes of ``parts`` micro-batches of ``batch`` samples, the last ones one smaller if need be; never an empty one."""
    parts = min(parts, batch)
    return [batch // parts + (i < batch % parts) for i in range(parts)]


def slices(sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The beginning and the length of each micro-batch."""
    begin = 0
    for count in sizes:
        yield begin, count
        begin += count


@dataclass(frozen=True)
class Layout:
    """How one phase computes its batch.

    Args:
        sizes: of the micro-batches.
        levers: those in use, the lowest rung first.
    """

    sizes: tuple[int, ...]
    levers: tuple[Lever, ...] = ()

    @classmethod
    def of(cls, batch: int, parts: int, levers: Iterable[Lever] = ()) -> Self:
        """A layout of ``parts`` micro-batches."""
        return cls(tuple(split(batch, parts)), tuple(sorted(levers)))

    @property
    def micro_batch(self) -> int:
        """The largest micro-batch."""
        return self.sizes[0]

    def uses(self, name: str) -> bool:
        """Whether the lever called ``name`` is in use."""
        return any(lever.name == name for lever in self.levers)

    @property
    def uncoupled(self) -> bool:
        """Whether a sample's output depends on the whole batch alone, however that is cut."""
        return uncoupling(self.levers)

    def using(self, levers: Iterable[Lever]) -> Self:
        """The same with ``levers`` in use besides."""
        return replace(self, levers=tuple(sorted({*self.levers, *levers})))

    def named(self) -> dict[str, Guarantee]:
        """What saves memory here, in words, with what each guarantees."""
        cut = {f"micro-batches of {self.micro_batch}": Guarantee.REASSOCIATION} if len(self.sizes) > 1 else {}
        return cut | {lever.words: lever.guarantee for lever in self.levers}

    def guarantee(self, coupled: bool) -> Guarantee:
        """What holds for the whole; ``coupled``: a sample's output depends on the others of its micro-batch."""
        if coupled and len(self.sizes) > 1 and not self.uncoupled:
            return Guarantee.APPROXIMATE
        return max(self.named().values(), default=Guarantee.BITWISE)

    def __str__(self) -> str:
        return ", ".join(self.named()) or "whole batch"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"sizes": list(self.sizes)} | {lever.name: lever.used for lever in self.levers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], levers: Iterable[Lever]) -> Self:
        """What `as_dict` wrote, where there are ``levers``."""
        used = [lever for lever in levers if values.get(lever.name, lever.plain) != lever.plain]
        return cls(tuple(values["sizes"]), tuple(sorted(used)))

    def cheaper(self, levers: Collection[Lever], smallest: int, coupled: bool = False) -> Iterator[Self]:
        """The layouts that may need less memory, the fastest first: smaller micro-batches while they are large, then the levers one
        rung upon the other, then smaller micro-batches again. Where samples are coupled, smaller micro-batches change the training,
        or take long where a lever uncouples them: the others go first.

        Args:
            levers: those that may be used.
            smallest: what a micro-batch must not be smaller than.
            coupled: whether a sample's output depends on the others of its micro-batch.
        """
        layout = self
        least = max(smallest, FEW)
        while not coupled and (halved := layout.halved(least)) is not None:
            yield (layout := halved)
        for _, rung in groupby(sorted(lever for lever in levers if not lever.uncouples), key=lambda lever: lever.rung):
            if unused := [lever for lever in rung if lever not in layout.levers]:
                yield (layout := layout.using(unused))
        if coupled and len(layout.sizes) == 1:  # of a whole batch, with which there is nothing to uncouple
            layout = layout.using(lever for lever in levers if lever.uncouples)
        smallest = 1 if layout.uncoupled else smallest
        while (halved := layout.halved(smallest)) is not None:
            yield (layout := halved)

    def halved(self, smallest: int) -> Self | None:
        """The same with micro-batches of half the size, or None where one would be smaller than ``smallest``."""
        if self.micro_batch == 1:
            return None
        sizes = tuple(split(sum(self.sizes), -(-sum(self.sizes) // (self.micro_batch // 2))))
        return replace(self, sizes=sizes) if min(sizes) >= smallest else None

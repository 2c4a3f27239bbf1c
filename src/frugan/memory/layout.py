"""Plans: how a batch is computed in the memory there is. Pure: bytes and names in, choices out; no torch."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, Self

SMALLEST_COUPLED = 16  # samples of which batch statistics may be taken without being asked
FEW = 4  # samples below which micro-batches cost more than other ways of saving
# What is tried in turn when memory runs out, besides smaller micro-batches; penalties by jvp and blocks that are recomputed gain
# nothing without one another.
STEPS = (("recompute_generator",), ("separate_terms",), ("checkpoint_blocks", "penalty"), ("offload_activations",))


class Guarantee(IntEnum):
    """What a way of saving memory leaves as it is, best first."""

    BITWISE = 0  # the same bits
    REASSOCIATION = 1  # the same sums in another order: equal to rounding
    APPROXIMATE = 2  # it changes the training

    def __str__(self) -> str:
        return self.name.lower()


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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one phase computes its batch.

    Args:
        sizes: of the micro-batches.
        separate_terms: one backward after the other for the parts of the loss, so that never all graphs are held.
        penalty: how gradient penalties are differentiated, see `frugan.memory.levers.directional`.
        recompute_generator: in the generator's phase, generate once without a graph and once more for backward.
        checkpoint_blocks: keep the inputs of each block alone, and compute it again in backward.
        offload_activations: what backward needs waits on the host.
    """

    sizes: tuple[int, ...]
    separate_terms: bool = False
    penalty: Literal["double-backward", "jvp"] = "double-backward"
    recompute_generator: bool = False
    checkpoint_blocks: bool = False
    offload_activations: bool = False

    @classmethod
    def of(cls, batch: int, parts: int, **levers: Any) -> Self:
        """A layout of ``parts`` micro-batches."""
        return cls(sizes=tuple(split(batch, parts)), **levers)

    @property
    def micro_batch(self) -> int:
        """The largest micro-batch."""
        return self.sizes[0]

    def named(self) -> dict[str, Guarantee]:
        """The levers that are in use, in words, with what each guarantees."""
        used = {
            f"micro-batches of {self.micro_batch}": (len(self.sizes) > 1, Guarantee.REASSOCIATION),
            "separate terms": (self.separate_terms, Guarantee.REASSOCIATION),
            "penalties by jvp": (self.penalty == "jvp", Guarantee.REASSOCIATION),
            "generator recomputed": (self.recompute_generator, Guarantee.BITWISE),
            "blocks recomputed": (self.checkpoint_blocks, Guarantee.BITWISE),
            "activations on the host": (self.offload_activations, Guarantee.BITWISE),
        }
        return {name: guarantee for name, (is_used, guarantee) in used.items() if is_used}

    def guarantee(self, coupled: bool) -> Guarantee:
        """What holds for the whole; ``coupled``: a sample's output depends on the others of its micro-batch."""
        if coupled and len(self.sizes) > 1:
            return Guarantee.APPROXIMATE
        return max(self.named().values(), default=Guarantee.BITWISE)

    def __str__(self) -> str:
        return ", ".join(self.named()) or "whole batch"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return vars(self) | {"sizes": list(self.sizes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What `as_dict` wrote."""
        return cls(**(values | {"sizes": tuple(values["sizes"])}))

    def cheaper(self, levers: Collection[str], smallest: int, coupled: bool = False) -> Iterator[Self]:
        """The layouts that may need less memory, the fastest first: smaller micro-batches while they are large, then the levers one
        upon the other, then smaller micro-batches again. Where samples are coupled, smaller micro-batches change the training, and
        levers go first.

        Args:
            levers: the names of those that may be used.
            smallest: what a micro-batch must not be smaller than.
            coupled: whether a sample's output depends on the others of its micro-batch.
        """
        layout = self
        least = max(smallest, FEW)
        while not coupled and (halved := layout.halved(least)) is not None:
            yield (layout := halved)
        for step in STEPS:
            unused = [lever for lever in step if lever in levers and getattr(layout, lever) in (False, "double-backward")]
            if unused and not ("penalty" in levers and unused == ["checkpoint_blocks"] and layout.penalty != "jvp"):
                layout = replace(layout, **{lever: "jvp" if lever == "penalty" else True for lever in unused})  # type: ignore[arg-type]
                yield layout
        while (halved := layout.halved(smallest)) is not None:
            yield (layout := halved)

    def halved(self, smallest: int) -> Self | None:
        """The same with micro-batches of half the size, or None where one would be smaller than ``smallest``."""
        if self.micro_batch == 1:
            return None
        sizes = tuple(split(sum(self.sizes), -(-sum(self.sizes) // (self.micro_batch // 2))))
        return replace(self, sizes=sizes) if min(sizes) >= smallest else None

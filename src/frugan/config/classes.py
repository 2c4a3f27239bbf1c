"""The classes of images, as a conditional generator knows them."""

from collections.abc import Iterable
from dataclasses import dataclass

from frugan.utils.errors import UserError, nearest

MANY = 12  # classes that a sentence does not name any more


@dataclass(frozen=True)
class Classes:
    """Names of classes, by number, and how many images of the data each has. Empty where classes are not learnt.

    Raises:
        UserError: they are something else, or not as many.
    """

    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names, counts = self.names, self.counts
        lists = isinstance(names, (list, tuple)) and isinstance(counts, (list, tuple)) and len(names) == len(counts)
        if not lists or not all(isinstance(n, str) for n in names) or not all(type(c) is int and c >= 0 for c in counts):
            raise UserError("[classes] must hold names, and as many counts of images.")
        object.__setattr__(self, "names", tuple(names))
        object.__setattr__(self, "counts", tuple(counts))

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return ", ".join(self.names[:MANY]) + (" ..." if len(self) > MANY else "")

    @property
    def present(self) -> tuple[int, ...]:
        """The numbers of those that have images: of the others nothing can be learnt."""
        return tuple(number for number, count in enumerate(self.counts) if count)

    def find(self, asked: Iterable[str]) -> list[int]:
        """The numbers of classes by their names, whatever their case; or by their numbers, if no name is one.

        Raises:
            UserError: one that there is not, or that had no images.
        """
        known = {str(number): number for number in range(len(self))} if not any(n.isdecimal() for n in self.names) else {}
        known |= {name.casefold(): number for number, name in enumerate(self.names)}
        known |= {name: number for number, name in enumerate(self.names)}
        numbers = []
        for name in asked:
            number = known.get(name, known.get(name.casefold()))
            if number is None:
                there = f"there are {self}." if len(self) <= MANY else nearest(name, self.names)
                raise UserError(f"there is no class {name!r}: {there}")
            if not self.counts[number]:
                raise UserError(f"class {name!r} had no images to learn from: leave it out.")
            numbers.append(number)
        return numbers

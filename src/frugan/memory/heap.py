"""How large the C library's heap grows while tensors come and go on the CPU.

Freed memory is not given back but used again, in pieces; what is left between them is fragmentation. This follows what glibc's
malloc does with large chunks (best fit, neighbours joined, the top extended when nothing fits), and so predicts it.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

ALIGNMENT = 64  # of tensors
SLACK = ALIGNMENT + 48  # an aligned allocation looks for this much more than it keeps


class Heap:
    """A heap that only grows; ``top`` is its size in bytes."""

    def __init__(self) -> None:
        self.top = 0
        self._free: list[tuple[int, int]] = []  # (size, begin), sorted
        self._by_begin: dict[int, int] = {}  # begin to size of free chunks
        self._by_end: dict[int, int] = {}  # end to begin of free chunks

    def allocate(self, size: int) -> tuple[int, int]:
        """Takes a chunk; its begin and end."""
        kept = -(-(size + 16) // ALIGNMENT) * ALIGNMENT
        place = bisect_left(self._free, (kept + SLACK, 0))
        if place < len(self._free):
            length, begin = self._free[place]
            self._remove(begin, length)
            if length > kept:
                self._insert(begin + kept, length - kept)
            return begin, begin + kept
        begin = self._by_end.get(self.top, self.top)  # what is free below the top is part of it
        if begin < self.top:
            self._remove(begin, self.top - begin)
        if begin + kept < self.top:
            self._insert(begin + kept, self.top - begin - kept)
        self.top = max(self.top, begin + kept)
        return begin, begin + kept

    def free(self, begin: int, end: int) -> None:
        """Gives a chunk back; neighbours that are free join it."""
        if (length := self._by_begin.get(end)) is not None:
            self._remove(end, length)
            end += length
        if (before := self._by_end.get(begin)) is not None:
            self._remove(before, begin - before)
            begin = before
        self._insert(begin, end - begin)

    def _insert(self, begin: int, length: int) -> None:
        insort(self._free, (length, begin))
        self._by_begin[begin] = length
        self._by_end[begin + length] = begin

    def _remove(self, begin: int, length: int) -> None:
        del self._free[bisect_left(self._free, (length, begin))]
        del self._by_begin[begin], self._by_end[begin + length]

    def replay(self, moves: Iterable[tuple[object, int]]) -> None:
        """Does ``moves``, each an allocation by its key and bytes, or 0 bytes to give it back; what is left at the end goes."""
        chunks: dict[object, tuple[int, int]] = {}
        for key, size in moves:
            if size:
                chunks[key] = self.allocate(size)
            elif key in chunks:
                self.free(*chunks.pop(key))
        for chunk in chunks.values():
            self.free(*chunk)

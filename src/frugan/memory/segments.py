"""How much an accelerator's allocator reserves while tensors come and go.

torch's caching allocator takes memory from the driver in segments, cuts tensors from them, and keeps what is freed for the next
tensors of its kind. What is limited, and what other programs see, is what it has reserved. This follows its rules
(CUDACachingAllocator in torch 2.11 to 2.15: rounding to 512 B, segments of 2 and 20 MiB, best fit, neighbours joined, whole
segments given back when nothing more may be reserved), and so predicts it. docs/gpu.md compares it with what CUDA's reserved.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

MIB = 1 << 20
SMALL = MIB  # tensors up to this come from segments of 2 MiB, and from a pool of their own
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
LARGE = 10 * MIB  # tensors of this size and more have segments of their own
ROUND = 2 * MIB
GRANULE = 512
LEAST = SMALL_SEGMENT + LARGE_SEGMENT  # what a training with tensors of both pools reserves at least


class Full(Exception):
    """Nothing more may be reserved."""


class Segments:
    """An allocator that may reserve ``cap`` bytes; ``reserved`` are those it has, ``top`` the most it had."""

    def __init__(self, cap: int | None = None) -> None:
        self.cap = cap
        self.reserved = self.top = 0
        self._next = 0
        self._segments: dict[int, int] = {}  # begin to size
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by pool: (size, begin), sorted
        self._begins: dict[int, int] = {}  # begin to size of free blocks
        self._ends: dict[int, int] = {}  # end to begin of free blocks

    def allocate(self, size: int) -> tuple[int, int, bool]:
        """Takes a block; its begin, its end and whether it is of the pool of small ones.

        Raises:
            Full: it would need a segment more than ``cap`` allows, even after giving back what is free.
        """
        size = -(-size // GRANULE) * GRANULE
        small = size <= SMALL
        pool = self._free[small]
        place = bisect_left(pool, (size, 0))
        if place == len(pool):
            self._reserve(size, small)
            place = bisect_left(pool, (size, 0))
        length, begin = pool[place]
        self._remove(begin, length, small)
        rest = length - size
        if rest >= GRANULE if small else rest > SMALL:
            self._insert(begin + size, rest, small)
            length = size
        return begin, begin + length, small

    def free(self, begin: int, end: int, small: bool) -> None:
        """Gives a block back; neighbours that are free join it."""
        if (length := self._begins.get(end)) is not None:
            self._remove(end, length, small)
            end += length
        if (before := self._ends.get(begin)) is not None:
            self._remove(before, begin - before, small)
            begin = before
        self._insert(begin, end - begin, small)

    def replay(self, moves: Iterable[tuple[object, int]]) -> None:
        """Does ``moves``, each an allocation by its key and bytes, or 0 bytes to give it back; what is left at the end goes."""
        blocks: dict[object, tuple[int, int, bool]] = {}
        for key, size in moves:
            if size:
                blocks[key] = self.allocate(size)
            elif key in blocks:
                self.free(*blocks.pop(key))
        for block in blocks.values():
            self.free(*block)

    def _reserve(self, size: int, small: bool) -> None:
        segment = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND
        if self.cap is not None and self.reserved + segment > self.cap:
            self._release()
            if self.reserved + segment > self.cap:
                raise Full
        self._segments[self._next] = segment
        self._insert(self._next, segment, small)
        self._next += segment + GRANULE  # a gap: blocks of two segments are no neighbours
        self.reserved += segment
        self.top = max(self.top, self.reserved)

    def _release(self) -> None:
        for small, pool in self._free.items():
            for size, begin in [block for block in pool if self._segments.get(block[1]) == block[0]]:
                self._remove(begin, size, small)
                del self._segments[begin]
                self.reserved -= size

    def _insert(self, begin: int, length: int, small: bool) -> None:
        insort(self._free[small], (length, begin))
        self._begins[begin] = length
        self._ends[begin + length] = begin

    def _remove(self, begin: int, length: int, small: bool) -> None:
        pool = self._free[small]
        del pool[bisect_left(pool, (length, begin))]
        del self._begins[begin], self._ends[begin + length]

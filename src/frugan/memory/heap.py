"""How large the C library's heap grows while tensors come and go on the CPU.

Freed memory is not given back but used again, in pieces; what is left between them is fragmentation. This follows what glibc's
malloc does (best fit, neighbours joined, the top extended when nothing fits, aligned chunks cut from longer ones), and so predicts
it. A tensor comes with small objects (its description, its place in autograd's graph), which settle in the splinters beside tensors
and keep neighbours apart: without them the prediction was 10 to 20% short (docs/LOG.md).
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

ALIGNMENT = 64  # of tensors
LEAST = 32  # bytes of the smallest chunk
BESIDE = (24, 32, 40, 48, 64, 200, 300)  # bytes of the small objects that are taken to come and go with a tensor
LARGE = 1024  # bytes from which a tensor has them: with smaller ones it makes no difference

Chunk = tuple[int, int]  # begin and length


class Heap:
    """A heap; ``top`` is the largest size that it had, in bytes."""

    def __init__(self) -> None:
        self.top = 0
        self._end = 0
        self._free: list[tuple[int, int]] = []  # (length, begin), sorted
        self._by_begin: dict[int, int] = {}  # begin to length of free chunks
        self._by_end: dict[int, int] = {}  # end to begin of free chunks

    def allocate(self, size: int) -> list[Chunk]:
        """Takes chunks for a tensor of ``size`` bytes, its small objects included."""
        beside = [self._take(_rounded(small)) for small in BESIDE] if size >= LARGE else []
        kept = _rounded(size)
        begin, length = self._take(kept + ALIGNMENT + LEAST)
        if (begin + 16) % ALIGNMENT:  # what is before an aligned place is another chunk
            aligned = -(-(begin + 16) // ALIGNMENT) * ALIGNMENT - 16
            aligned += ALIGNMENT if aligned - begin < LEAST else 0
            self.free((begin, aligned - begin))
            begin, length = aligned, length - (aligned - begin)
        if length > kept + LEAST:
            self.free((begin + kept, length - kept))
            length = kept
        return [(begin, length), *beside]

    def free(self, chunk: Chunk) -> None:
        """Gives a chunk back; neighbours that are free join it."""
        begin, length = chunk
        if (after := self._by_begin.get(begin + length)) is not None:
            self._remove(begin + length, after)
            length += after
        if (before := self._by_end.get(begin)) is not None:
            self._remove(before, begin - before)
            begin, length = before, length + begin - before
        if begin + length == self._end:  # what is free below the end is used again by whatever comes
            self._end = begin
        else:
            self._insert(begin, length)

    def _take(self, kept: int) -> Chunk:
        place = bisect_left(self._free, (kept, 0))
        if place < len(self._free):
            length, begin = self._free[place]
            self._remove(begin, length)
            if length - kept < LEAST:
                return begin, length
            self._insert(begin + kept, length - kept)
            return begin, kept
        begin = self._end
        self._end += kept
        self.top = max(self.top, self._end)
        return begin, kept

    def _insert(self, begin: int, length: int) -> None:
        insort(self._free, (length, begin))
        self._by_begin[begin] = length
        self._by_end[begin + length] = begin

    def _remove(self, begin: int, length: int) -> None:
        del self._free[bisect_left(self._free, (length, begin))]
        del self._by_begin[begin], self._by_end[begin + length]

    def replay(self, moves: Iterable[tuple[object, int]]) -> None:
        """Does ``moves``, each an allocation by its key and bytes, or 0 bytes to give it back; what is left at the end goes."""
        chunks: dict[object, list[Chunk]] = {}
        for key, size in moves:
            if size:
                chunks[key] = self.allocate(size)
            else:
                for chunk in chunks.pop(key, ()):
                    self.free(chunk)
        for left in chunks.values():
            for chunk in left:
                self.free(chunk)


def _rounded(size: int) -> int:
    return max(LEAST, -(-(size + 8) // 16) * 16)

"""The model of an accelerator's allocator, whatever is asked of it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugan.memory.segments import GRANULE, LARGE_SEGMENT, MIB, ROUND, SMALL_SEGMENT, Full, Segments

# Around everything that the rules tell apart: granules, the pool of small ones, 10 MiB, 20 MiB.
SIZES = st.one_of(
    st.integers(1, 3 * MIB),
    st.integers(1, 40 * MIB),
    st.sampled_from([1, 512, 513, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 20 * MIB]),
)
# A number of bytes to take, or which of the blocks that are there goes back.
MOVES = st.lists(st.one_of(SIZES, st.floats(0, 1, exclude_max=True)), min_size=1, max_size=60)
CAPS = st.integers(0, 100).map(lambda n: n * MIB)
Block = tuple[int, int]


def assert_apart(blocks: list[Block]) -> None:
    assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(blocks)))


@given(moves=MOVES, cap=st.none() | CAPS)
def test_segments_give_every_tensor_its_own_bytes_and_never_more_than_the_cap(moves: list[int | float], cap: int | None) -> None:
    memory = Segments(cap)
    blocks: list[tuple[int, int, bool]] = []
    top = 0
    for move in moves:
        if isinstance(move, float):
            if blocks:
                memory.free(*blocks.pop(int(move * len(blocks))))
        else:
            try:
                block = memory.allocate(move)
            except Full:
                assert cap is not None
            else:
                assert block[1] - block[0] >= move and block[0] % GRANULE == block[1] % GRANULE == 0
                assert block[2] == (move <= MIB)
                blocks.append(block)
        top = max(top, memory.reserved)
        assert_apart([block[:2] for block in blocks])
        assert sum(end - begin for begin, end, _ in blocks) <= memory.reserved <= (cap if cap is not None else memory.reserved)
        assert memory.reserved % ROUND == 0 and memory.top == top


@given(moves=MOVES)
def test_segments_that_are_all_free_again_are_whole_and_go_back(moves: list[int | float]) -> None:
    memory = Segments()
    blocks = []
    for move in moves:
        if isinstance(move, float):
            if blocks:
                memory.free(*blocks.pop(int(move * len(blocks))))
        else:
            blocks.append(memory.allocate(move))
    for block in blocks:
        memory.free(*block)
    memory.cap = whole = max(memory.reserved, LARGE_SEGMENT) + ROUND
    _, _, small = memory.allocate(whole)  # fits into none that there is: all of them have to go
    assert not small and memory.reserved == whole


@given(moves=MOVES)
def test_a_cap_that_is_never_reached_changes_nothing(moves: list[int | float]) -> None:
    free = Segments()
    wanted = list(taken(free, moves))
    capped = Segments(free.top)
    assert list(taken(capped, moves)) == wanted and (capped.reserved, capped.top) == (free.reserved, free.top)
    with pytest.raises(Full):
        list(taken(Segments(SMALL_SEGMENT - 1), [1]))


def taken(memory: Segments, moves: list[int | float]) -> list[tuple[int, int, bool]]:
    """The blocks that ``moves`` take, in order; those that go back are free for the next."""
    blocks: list[tuple[int, int, bool]] = []
    every = []
    for move in moves:
        if isinstance(move, float):
            if blocks:
                memory.free(*blocks.pop(int(move * len(blocks))))
        else:
            blocks.append(memory.allocate(move))
            every.append(blocks[-1])
    return every


def test_more_cap_is_not_always_enough() -> None:
    """torch's rules: what a smaller cap has given back in time is in the way of larger blocks later. So no test says otherwise."""
    first, second, large = 30 * MIB, 30 * MIB, 40 * MIB

    def fits(cap: int) -> bool:
        memory = Segments(cap)
        both = [memory.allocate(first), memory.allocate(second)]
        for block in both:
            memory.free(*block)
        try:
            for size in (large, 16 * MIB, 16 * MIB, 26 * MIB):
                memory.allocate(size)
        except Full:
            return False
        return True

    assert fits(98 * MIB) and not fits(100 * MIB) and fits(126 * MIB)

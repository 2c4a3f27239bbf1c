"""Budgets in words, ladders, and how the heap grows: what needs no training."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugan.errors import UserError
from frugan.memory.heap import Heap
from frugan.memory.plan import Guarantee, Layout, parse_bytes, size, split
from frugan.memory.trace import highest


@pytest.mark.parametrize(
    ("said", "bytes_"),
    [("2GiB", 2 << 30), ("800MiB", 800 << 20), ("1.5 GB", 1_500_000_000), ("512m", 512 << 20), ("4096", 4096), (".5g", 1 << 29)],
)
def test_budgets_as_people_write_them(said: str, bytes_: int) -> None:
    assert parse_bytes(said) == bytes_


@pytest.mark.parametrize("said", ["2 parsecs", "lots", "", "-1GiB", "2GiBs", "1e3"])
def test_budgets_nobody_understands(said: str) -> None:
    with pytest.raises(UserError, match="--memory"):
        parse_bytes(said)


def test_bytes_in_words() -> None:
    assert [size(n) for n in (0, 1023, 1024, 300 << 20, 3 << 29)] == ["0 B", "1023 B", "1.0 KiB", "300 MiB", "1.50 GiB"]


@given(batch=st.integers(1, 300), parts=st.integers(1, 300))
def test_split_covers_the_batch_with_parts_as_equal_as_can_be(batch: int, parts: int) -> None:
    sizes = split(batch, parts)
    assert sum(sizes) == batch
    assert len(sizes) == min(parts, batch)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - 1 <= sizes[-1] > 0


@given(
    batch=st.integers(1, 600),
    levers=st.sets(st.sampled_from(["recompute_generator", "checkpoint_blocks", "separate_terms", "penalty"])),
)
def test_the_ladder_goes_down_bitwise_first_and_ends(batch: int, levers: set[str]) -> None:
    layout = Layout.of(batch, 1)
    guarantees, sizes = [], []
    while (cheaper := layout.cheaper(levers, smallest=1)) is not None:
        new = cheaper.named().keys() - layout.named().keys()
        guarantees.append(max(cheaper.named()[name] for name in new))
        sizes.append(cheaper.micro_batch)
        assert sum(cheaper.sizes) == batch
        assert cheaper.micro_batch <= layout.micro_batch
        layout = cheaper
    assert guarantees == sorted(guarantees)
    assert layout.micro_batch == 1
    assert len(guarantees) <= len(levers) + 11
    assert Layout.from_dict(layout.as_dict()) == layout


def test_the_ladder_stops_where_batch_statistics_would_become_too_small() -> None:
    layout = Layout.of(64, 2)
    assert layout.cheaper((), smallest=16) == Layout.of(64, 4)
    assert Layout.of(64, 4).cheaper((), smallest=16) is None


def test_cutting_is_approximate_only_where_samples_are_coupled() -> None:
    assert Layout.of(8, 2).guarantee(coupled=False) == Guarantee.REASSOCIATION
    assert Layout.of(8, 2).guarantee(coupled=True) == Guarantee.APPROXIMATE
    assert Layout.of(8, 1, checkpoint_blocks=True).guarantee(coupled=True) == Guarantee.BITWISE


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10_000_000)), max_size=200))
def test_the_heap_holds_what_is_live_without_overlaps(operations: list[tuple[int, int]]) -> None:
    heap, live = Heap(), {}
    moves: list[int] = []
    for key, bytes_ in operations:
        if key in live:
            begin, end, was = live.pop(key)
            heap.free(begin, end)
            moves.append(-was)
        else:
            begin, end = heap.allocate(bytes_)
            assert end - begin >= bytes_
            assert all(end <= b or begin >= e for b, e, _ in live.values())
            live[key] = begin, end, bytes_
            moves.append(bytes_)
    assert heap.top >= highest(moves)
    for begin, end, _ in live.values():
        heap.free(begin, end)
    assert heap.allocate(max(1, heap.top - 4096))[0] == 0  # all of it is one piece again

"""Budgets in words, and ladders: what needs no training."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugan.config.recipe import Training
from frugan.config.run import Run
from frugan.gan.levers import LEVERS, named
from frugan.memory.layout import FEW, MOST, Guarantee, Layout, Lever, split
from frugan.memory.plan import Plan
from frugan.utils.errors import UserError
from frugan.utils.units import parse_bytes, size


@pytest.mark.parametrize(
    ("said", "bytes_"),
    [("2GiB", 2 << 30), ("800MiB", 800 << 20), ("1.5 GB", 1_500_000_000), ("512m", 512 << 20), ("4096", 4096), (".5g", 1 << 29)],
)
def test_budgets_as_people_write_them(said: str, bytes_: int) -> None:
    assert parse_bytes(said) == bytes_


@pytest.mark.parametrize("said", [1 << 30, 4096, 0, 2e9])
def test_a_budget_in_python_may_be_a_number_of_bytes(said: int) -> None:
    assert parse_bytes(said) == said
    memory = Run(memory=said).memory  # type: ignore[arg-type]
    assert memory and parse_bytes(memory) == said


@pytest.mark.parametrize("said", ["2 parsecs", "lots", "", "-1GiB", "2GiBs", "1e3", -1, True, [1]])
def test_budgets_nobody_understands(said: str) -> None:
    with pytest.raises(UserError, match="a budget of"):
        parse_bytes(said)


def test_a_recipe_asks_for_no_larger_batches_than_can_be_planned() -> None:
    assert Training(batch_size=MOST).batch_size == MOST
    with pytest.raises(UserError, match="--batch-size must be at most 1,000,000, not 1,000,001 "):
        Training(batch_size=MOST + 1)


def test_bytes_in_words() -> None:
    assert [size(n) for n in (0, 1023, 1024, 300 << 20, 3 << 29)] == ["0 B", "1023 B", "1.0 KiB", "300 MiB", "1.50 GiB"]


@given(batch=st.integers(1, 300), parts=st.integers(1, 300))
def test_split_covers_the_batch_with_parts_as_equal_as_can_be(batch: int, parts: int) -> None:
    sizes = split(batch, parts)
    assert sum(sizes) == batch
    assert len(sizes) == min(parts, batch)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - 1 <= sizes[-1] > 0


USABLE = [LEVERS[name] for name in ("recompute_generator", "checkpoint_blocks", "separate_terms", "penalty")]


@given(batch=st.integers(1, 600), levers=st.sets(st.sampled_from(USABLE)), coupled=st.booleans(), smallest=st.sampled_from([1, 2]))
def test_the_ladder_changes_as_little_as_can_be_and_ends(batch: int, levers: set[Lever], coupled: bool, smallest: int) -> None:
    smallest = min(smallest, batch)
    ladder = [Layout.of(batch, 1), *Layout.of(batch, 1).cheaper(levers, smallest, coupled)]
    for before, after in pairwise(ladder):
        assert sum(after.sizes) == batch and min(after.sizes) >= smallest and after.micro_batch <= before.micro_batch
        cut, pulled = after.sizes != before.sizes, replace(after, sizes=before.sizes) != before
        assert cut != pulled  # one thing at a time
        if pulled and coupled:
            assert len(before.sizes) == 1  # what leaves the training as it is comes first
        elif pulled:
            assert before.halved(FEW) is None  # the fastest comes first
        else:
            assert after.micro_batch <= before.micro_batch // 2
    assert ladder[-1].halved(smallest) is None
    assert set(ladder[-1].levers) == levers
    assert list(ladder[-1].cheaper(levers, smallest, coupled)) == []
    assert Layout.from_dict(ladder[-1].as_dict(), USABLE) == ladder[-1]


def test_the_ladder_stops_where_batch_statistics_would_become_too_small() -> None:
    assert list(Layout.of(64, 2).cheaper((), smallest=16, coupled=True)) == [Layout.of(64, 4)]
    assert list(Layout.of(64, 4).cheaper((), smallest=16, coupled=True)) == []


def test_cutting_is_approximate_only_where_samples_are_coupled() -> None:
    assert Layout.of(8, 2).guarantee(coupled=False) == Guarantee.REASSOCIATION
    assert Layout.of(8, 2).guarantee(coupled=True) == Guarantee.APPROXIMATE
    assert Layout.of(8, 1, named(["checkpoint_blocks"])).guarantee(coupled=True) == Guarantee.BITWISE


def test_a_plan_reads_back_what_it_writes() -> None:
    layouts = {"D": Layout.of(12, 3, named(["separate_terms"])), "G": Layout.of(12, 1)}
    before = {"D": Layout.of(12, 1), "G": Layout.of(12, 1)}
    for planned in (None, before):
        plan = Plan(layouts, "reuse", 1 << 30, True, 5, 6, {"D's phase": {"weights": 7}}, 8, Guarantee.REASSOCIATION, 9, planned)
        assert Plan.from_dict(json.loads(json.dumps(plan.as_dict() | {"threads": 2})), LEVERS.values()) == plan

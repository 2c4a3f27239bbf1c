"""Draws do not depend on how they are asked for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from frugan.utils.draws import Draws


@given(first=st.integers(0, 500), counts=st.lists(st.integers(1, 90), min_size=1, max_size=5), seed=st.integers(0, 3))
def test_pieces_are_slices_of_the_whole(first: int, counts: list[int], seed: int) -> None:
    whole, pieces, row = Draws(seed), Draws(seed), first
    for draw in ("normal", "uniform"):
        got, row = [], first
        for count in counts:
            got.append(getattr(pieces, draw)("z", row, count, 3))
            row += count
        assert torch.equal(torch.cat(got), getattr(whole, draw)("z", first, sum(counts), 3))
    kept = torch.cat([pieces.keep("k", first + sum(counts[:i]), n, (3,), 0.4) for i, n in enumerate(counts)])
    assert torch.equal(kept, whole.keep("k", first, sum(counts), (3,), 0.4))


def test_seeds_purposes_and_rows_differ() -> None:
    draws = Draws(0)
    a = draws.normal("a", 0, 256, 4)
    assert not torch.equal(a, draws.normal("b", 0, 256, 4))
    assert not torch.equal(a, Draws(1).normal("a", 0, 256, 4))
    assert len(a.unique(dim=0)) == 256


def test_distributions() -> None:
    draws = Draws(0)
    z = draws.normal("z", 0, 20_000)
    assert abs(float(z.mean())) < 0.03
    assert abs(float(z.std()) - 1) < 0.03
    u = draws.uniform("u", 0, 20_000)
    assert 0 <= float(u.min()) <= float(u.max()) < 1
    for p in (0.0, 0.3, 0.5, 0.9):
        mask = draws.keep(f"k{p}", 0, 20_000, (3, 5), p)
        assert mask.shape == (20_000, 3, 5)
        assert abs(float(mask.float().mean()) - (1 - p)) < 0.005
        assert not p or (mask.float().mean(0) - (1 - p)).abs().max() < 0.02

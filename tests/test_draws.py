"""Draws do not depend on how they are asked for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from frugan.memory import private
from frugan.utils.draws import Draws, hashed


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


def test_hashes_are_bits_like_any_others_and_those_of_their_rows() -> None:
    device = torch.device("cpu")
    bits = hashed(5, 0, 4096, 6, device)
    assert len(bits.unique()) == bits.numel()
    ones = torch.stack([(bits >> place) & 1 for place in range(64)]).double()  # [64, rows, words]
    assert (ones.mean((1, 2)) - 0.5).abs().max() < 0.015 and (ones.mean((0, 2)) - 0.5).abs().max() < 0.12
    around = ones.reshape(64 * 6, -1) - 0.5  # neither places nor rows go together
    together = around @ around.T / around.shape[1]
    assert (together - torch.eye(len(together)) / 4).abs().max() < 0.025
    assert abs(float((ones[:, 1:] != ones[:, :-1]).double().mean()) - 0.5) < 0.002
    assert torch.equal(hashed(5, torch.tensor(7), 3, 6, device), bits[7:10])
    assert not (hashed(6, 0, 64, 6, device) == bits[:64]).any()


def test_what_is_drawn_within_a_transformation_does_not_stay() -> None:
    """There it is a wrapper, which is nothing afterwards: penalties by jvp draw dropout's masks so."""
    private.load_forward_mode()
    draws, plain = Draws(0), Draws(0)

    def dropped(x: torch.Tensor) -> torch.Tensor:
        return x * draws.keep("a", 0, len(x), (3,), 0.5)

    _, found = torch.func.jvp(dropped, (torch.ones(6, 3),), (torch.ones(6, 3),))
    assert torch.equal(found, plain.keep("a", 0, 6, (3,), 0.5).float()) and draws.kept() == []
    assert torch.equal(draws.keep("a", 4, 2, (3,), 0.5), plain.keep("a", 4, 2, (3,), 0.5)) and len(draws.kept()) == 1

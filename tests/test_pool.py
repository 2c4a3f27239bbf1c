"""The pool of large tensors: every tensor has its own bytes, and no more is held than was said."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from frugan.memory import host, pool
from frugan.memory.limit import MIB

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
pytestmark = pytest.mark.skipif(not pool.available(), reason="there is no C compiler here, or the system has no pool")
SIZES = st.one_of(st.integers(64 << 10, 3 * MIB), st.sampled_from([64 << 10, 65 << 10, MIB, 2 * MIB - 1, 2 * MIB]))
MOVES = st.lists(st.one_of(SIZES, st.floats(0, 0.999)), max_size=60)


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    pool.use(None)
    yield
    host.restore()
    pool.end()


def pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def filled(size: int, value: int) -> Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


@settings(deadline=None)
@given(moves=MOVES, limit=st.one_of(st.none(), st.integers(0, 20 * MIB)))
def test_every_tensor_keeps_its_bytes_and_no_more_is_held_than_tensors_or_the_limit_take(
    moves: list[int | float], limit: int | None
) -> None:
    before = pool.state().used
    pool.use(limit)
    most = before
    taken: list[Tensor] = []
    for turn, move in enumerate(moves):
        if isinstance(move, float):
            if taken:
                taken.pop(int(move * len(taken)))
        else:
            taken.append(filled(move, turn))
        assert all(bool((t == t[0]).all()) for t in taken)
        used = before + sum(pages(len(t)) for t in taken)
        most = max(most, used)
        state = pool.state()
        assert state.used == used <= state.held
        assert limit is None or state.held <= max(limit, most)
        spans = sorted((t.data_ptr(), t.data_ptr() + pages(len(t))) for t in taken)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    taken.clear()
    pool.trim()
    assert pool.state() == (before, before)


def test_fragments_take_addresses_and_no_memory() -> None:
    """Where no gap is long enough, pages move from the gaps to where they are needed."""
    begin = pool.state().used
    pool.use(begin + 40 * MIB)
    small = [filled(MIB, 1) for _ in range(40)]
    before = host.resident()
    del small[::2]  # 20 gaps of 1 MiB
    large = [filled(10 * MIB, 2), filled(10 * MIB, 3)]
    assert pool.state().held == begin + 40 * MIB
    assert host.resident() <= before + 2 * MIB
    assert all(int(t[0]) == int(t[-1]) == 1 for t in small) and [int(t[-1]) for t in large] == [2, 3]


def test_what_is_free_is_used_again_without_a_fault() -> None:
    import resource

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    filled(32 * MIB, 1)
    before = faults()
    for _ in range(10):
        filled(32 * MIB, 1)
    kept = faults() - before
    pool.use(0)
    before = faults()
    for _ in range(10):
        filled(32 * MIB, 1)
    assert kept < 1000 and (faults() - before > 10 * 32 * MIB // PAGE * 0.9 or faults() - before > 100)


def test_tensors_outlive_the_use_of_the_pool() -> None:
    begin = pool.state().used
    old = filled(MIB, 7)
    pool.end()
    new = filled(MIB, 8)
    assert pool.state().used == begin + MIB
    assert int(old.sum()) == 7 * MIB and int(new.sum()) == 8 * MIB
    del old
    assert pool.state().used == pool.state().held == begin


def test_a_refusal_of_the_system_is_an_error_like_any_other_and_what_is_free_is_given_first() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    kept = [filled(8 * MIB, 1) for _ in range(8)]
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (host.status("VmData") + 16 * MIB, before[1]))
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            filled(64 * MIB, 2)
        del kept[::2]  # 32 MiB, in gaps of 8
        assert int(filled(40 * MIB, 3)[-1]) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert all(int(t[0]) == int(t[-1]) == 1 for t in kept)


def test_a_forked_process_has_a_pool_of_its_own() -> None:
    mine = filled(MIB, 1)
    child = os.fork()
    if not child:
        mine.fill_(2)
        theirs = filled(2 * MIB, 3)
        os._exit(0 if int(theirs[-1]) == 3 and int(mine[0]) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0 and int(mine[0]) == 1


def test_without_the_pool_the_same_is_trained_within_the_same_budget(few: Path, tmp_path: Path) -> None:
    weights = []
    for name, said in (("with", {}), ("without", {"FRUGAN_POOL": "0"})):
        command = [sys.executable, "-m", "frugan", "train", str(few), "--recipe", "r3", "--epochs", "1", "--batch-size", "32"]
        command += ["--memory", "1GiB", "--accumulation-steps", "4", "--out", str(tmp_path / name)]
        subprocess.run(command, check=True, env=os.environ | said, capture_output=True)
        weights.append(load_file(next((tmp_path / name / "checkpoints").rglob("*.safetensors"))))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

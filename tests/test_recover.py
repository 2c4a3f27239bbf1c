"""Memory that runs out at any allocation of an update: training goes on, and says under which guarantee."""

import errno
import gc
import os
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from frugan.config import recipes
from frugan.config.run import Run
from frugan.gan.levers import named as levers_called
from frugan.memory import limit
from frugan.memory.calls import tensors_in
from frugan.memory.layout import Guarantee, Layout, slices
from frugan.memory.recover import PATIENCE, Change, OutOfMemory, Recovery
from frugan.reporting.console import Console
from frugan.training.session import Session
from frugan.training.trainer import Trainer

from .conftest import OWN_CODE

EACH = {} if os.environ.get("FRUGAN_TEST_ALL") else {"r3": 3, "projected": 5}  # of how many allocations one is made to fail
TINY = {"batch_size": 16, "epochs": 1, "image_size": 8, "latent_dim": 4, "width_g": 4, "width_d": 4, "precision": "fp32"}


class Scarce(TorchDispatchMode):
    """The allocation number ``fails`` fails, as the allocator says it; None only counts them."""

    def __init__(self, fails: int | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.fails = fails
        self.device = device
        self.allocations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tensors_in([args, kwargs])}
        result = func(*args, **(kwargs or {}))
        if any(t.untyped_storage()._cdata not in known for t in tensors_in(result)):
            self.allocations += 1
            if self.allocations - 1 == self.fails:
                torch.empty(1 << 60, dtype=torch.uint8, device=self.device)  # more than there is: the allocator's own error
        return result


def everything(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.loop
    return {name: t.clone() for name, t in trainer.loop.state.capture()[0].items()}


@pytest.mark.parametrize("name", OWN_CODE)
def test_memory_running_out_at_every_allocation_of_an_update(name: str, few: Path, tmp_path: Path) -> None:
    outcomes: list[tuple[int, Guarantee]] = []
    asked = {k: v for k, v in TINY.items() if k in recipes.get(name).flat()}

    def every_allocation(images: int) -> None:
        if images != 32:  # the second update is the one that is done again and again
            return
        assert trainer.loop
        loop = trainer.loop
        state, recovery = loop.state, loop.recovery
        before, layouts = everything(trainer), dict(recovery.layouts)
        counters, keeps = (state.images, state.updates), state.step.keeps
        assert keeps == recipes.get(name).training.reuse_fakes

        def update(fails: int | None) -> tuple[dict[str, Tensor], int]:
            for key, tensor in state.capture()[0].items():
                tensor.copy_(before[key])
            state.images, state.updates = counters
            recovery.layouts, recovery.freed, state.step.keeps = dict(layouts), "reuse", keeps
            changes.clear()
            with Scarce(fails) as scarce:
                loop.advance()
            return everything(trainer), scarce.allocations

        changes: list[Change] = []
        recovery.changed = changes.append
        wanted, allocations = update(None)
        gc.collect()
        gc.freeze()  # what is there now is not looked at again each time memory runs out
        assert allocations > 50
        for number, fails in enumerate(range(0, allocations, EACH.get(name, 1))):
            for already in ("reuse", "return"):
                if already == "return" and number % 5:
                    continue  # the ladder beyond its first rung, at a fifth of them
                got, _ = update(fails) if already == "reuse" else with_handling(update, recovery, fails)
                guarantee = max((c.guarantee for c in changes), default=Guarantee.BITWISE)
                outcomes.append((fails, guarantee))
                for key, tensor in wanted.items():
                    if guarantee == Guarantee.BITWISE:
                        assert torch.equal(tensor, got[key]), (fails, key, changes)
                    elif guarantee == Guarantee.REASSOCIATION:
                        assert torch.allclose(tensor.float(), got[key].float(), rtol=1e-4, atol=1e-4), (fails, key, changes)
        update(None)

    asked_for = recipes.get(name).replace(data=str(few), conditional=True, **asked)  # which allocates all that others do too
    trainer = Trainer(Session.open(asked_for, Run(out=str(tmp_path / "r"), device="cpu"), Console(True)), every_allocation)
    trainer.train()
    assert len(outcomes) > 60


def with_handling(update: Any, recovery: Recovery, fails: int) -> Any:
    """The update with freed memory given back from the start, so that the layout itself has to change."""
    run = recovery.run

    def handled(phase: str, compute: Any) -> Any:
        recovery.freed = "return"
        return run(phase, compute)

    recovery.run = handled  # type: ignore[method-assign]
    try:
        return update(fails)
    finally:
        del recovery.run


class Told:
    """A recovery of a batch of 16 over a small real module, and a computation that needs what it is told.

    Args:
        needs: the bytes of a layout; what is more than ``there`` fails, as the allocator says it.
        named: arguments of `Recovery`.
    """

    def __init__(self, needs: Callable[[Layout], int], there: int, **named: Any) -> None:
        self.needs = needs
        self.there = there
        self.error: Exception = torch.OutOfMemoryError("none left")
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(4)] if named.get("coupled") else []
        self.module = nn.Sequential(nn.Linear(3, 4), *norm, nn.Linear(4, 1)).double()
        self.samples = torch.randn(16, 3, dtype=torch.float64)
        self.tried: list[Layout] = []
        self.told: list[Change] = []
        options: dict[str, Any] = {
            "levers": {"D": levers_called(["checkpoint_blocks"])},
            "smallest": {"D": 1},
            "coupled": False,
            "needs": None,
        }
        known = named.pop("known", True)
        options |= {"needs": lambda _, layout: needs(layout) if known else None} | named
        layouts = options.pop("layouts", {"D": Layout.of(16, 1)})
        self.recovery = Recovery(
            [self.module], torch.device("cpu"), layouts, "return", changed=self.told.append, **options
        )  # fmt: skip

    def run(self) -> Layout:
        """One phase; the layout that did it."""
        self.module.zero_grad(set_to_none=True)
        return self.recovery.run("D", self._compute)

    def _compute(self, layout: Layout) -> Layout:
        self.tried.append(layout)
        for begin, count in slices(layout.sizes):
            (self.module(self.samples[begin : begin + count]).sum() / 16).backward()
            if self.needs(layout) > self.there:
                raise self.error
        return layout

    def words(self) -> list[tuple[str, Guarantee]]:
        return [(change.change, change.guarantee) for change in self.told]


def halves(layout: Layout) -> int:
    """Bytes that go with the micro-batch, and by half with recomputed blocks."""
    return 10 * layout.micro_batch // (2 if layout.uses("checkpoint_blocks") else 1)


@pytest.fixture
def _as_before() -> Iterator[None]:
    with limit.as_before():
        torch.set_num_threads(1)
        gc.freeze()  # what is there now is not looked at again each time memory runs out
        yield


@pytest.mark.usefixtures("_as_before")
def test_the_fastest_way_of_saving_is_taken_first() -> None:
    told = Told(halves, 0)
    with pytest.raises(OutOfMemory, match="in D's phase with micro-batches of 1, blocks recomputed, and there is nothing cheaper"):
        told.run()
    assert told.words() == [
        ("micro-batches of 8", Guarantee.REASSOCIATION),
        ("micro-batches of 4", Guarantee.REASSOCIATION),
        ("blocks recomputed", Guarantee.BITWISE),
        ("micro-batches of 2", Guarantee.REASSOCIATION),
        ("micro-batches of 1", Guarantee.REASSOCIATION),
    ]
    assert [str(layout) for layout in told.tried[1:4]] == [
        "micro-batches of 8", "micro-batches of 4", "micro-batches of 4, blocks recomputed",
    ]  # fmt: skip


@pytest.mark.usefixtures("_as_before")
def test_where_samples_are_coupled_what_changes_the_training_comes_last() -> None:
    told = Told(halves, 25, coupled=True, smallest={"D": 2})
    assert told.run() == Layout.of(16, 4, levers_called(["checkpoint_blocks"]))
    assert told.words() == [
        ("blocks recomputed", Guarantee.BITWISE),
        ("micro-batches of 8", Guarantee.APPROXIMATE),
        ("micro-batches of 4", Guarantee.APPROXIMATE),
    ]


@pytest.mark.usefixtures("_as_before")
def test_what_saves_nothing_is_neither_tried_nor_told() -> None:
    def needs(layout: Layout) -> int:
        return 100 + 10 * layout.micro_batch if layout.micro_batch > 4 else 140 - layout.uses("checkpoint_blocks")

    told = Told(needs, 139, levers={"D": levers_called(["separate_terms", "checkpoint_blocks", "offload_activations"])})
    assert told.run() == Layout.of(16, 4, levers_called(["checkpoint_blocks"]))
    assert [change for change, _ in told.words()] == ["micro-batches of 8", "micro-batches of 4", "blocks recomputed"]
    assert not any(layout.uses("separate_terms") for layout in told.tried)
    told.there = 0
    with pytest.raises(OutOfMemory):
        told.run()
    assert len(told.told) == 3  # nor are smaller micro-batches and other levers, which need the same


@pytest.mark.usefixtures("_as_before")
def test_where_nobody_knows_what_a_layout_needs_all_are_tried() -> None:
    told = Told(halves, 25, known=False)
    assert told.run() == Layout.of(16, 4, levers_called(["checkpoint_blocks"]))


@pytest.mark.usefixtures("_as_before")
def test_after_a_passing_shortage_training_climbs_back_step_by_step() -> None:
    told = Told(halves, 45)
    told.run()
    told.there = 1000
    used = [told.run().micro_batch for _ in range(3 * PATIENCE)]
    assert [len(list(same)) for _, same in groupby(used)] == [PATIENCE - 1, PATIENCE, PATIENCE + 1]
    assert [size for size, _ in groupby(used)] == [4, 8, 16]
    assert [(c.cause, c.change) for c in told.told] == [
        ("memory ran out", "micro-batches of 8"), ("memory ran out", "micro-batches of 4"),
        ("memory suffices again", "micro-batches of 8"), ("memory suffices again", "whole batch"),
    ]  # fmt: skip


@pytest.mark.usefixtures("_as_before")
def test_an_attempt_to_climb_back_that_fails_makes_training_wait_twice_as_long() -> None:
    told = Told(halves, 90)
    for _ in range(7 * PATIENCE + 2):
        told.run()
    attempts = [i for i, layout in enumerate(told.tried) if len(layout.sizes) == 1]
    assert [b - a for a, b in pairwise(attempts)] == [PATIENCE + 1, 2 * PATIENCE + 1, 4 * PATIENCE + 1]
    told.there = 1000
    used = [told.run().micro_batch for _ in range(9 * PATIENCE)]
    assert [len(list(same)) for _, same in groupby(used)] == [8 * PATIENCE - 2, PATIENCE + 2]


@pytest.mark.usefixtures("_as_before")
def test_a_run_that_began_short_of_memory_goes_back_to_its_plan() -> None:
    told = Told(halves, 1000, layouts={"D": Layout.of(16, 2)}, planned={"D": Layout.of(16, 1)})
    assert [told.run().micro_batch for _ in range(PATIENCE + 1)] == [8] * PATIENCE + [16]
    assert [c.cause for c in told.told] == ["memory suffices again"]


FOUR = {"D": Layout.of(16, 4, levers_called(["checkpoint_blocks"]))}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), OSError(errno.ENOMEM, "x")], ids=lambda e: type(e).__name__
)
@pytest.mark.usefixtures("_as_before")
def test_a_phase_that_was_thrown_away_leaves_nothing_behind(error: Exception) -> None:
    def state(told: Told) -> list[Tensor]:
        return [*told.module.state_dict().values(), *(p.grad for p in told.module.parameters() if p.grad is not None)]

    told, calm = Told(halves, 50, coupled=True), Told(halves, 1000, coupled=True, layouts=FOUR)
    told.there, told.error = 25, error
    told.run()
    calm.run()
    assert len(told.tried) == 4 and told.tried[-1] == calm.tried[-1]
    assert all(torch.equal(a, b) for a, b in zip(state(told), state(calm), strict=True))


@pytest.mark.usefixtures("_as_before")
def test_other_errors_are_not_taken_for_a_shortage() -> None:
    told = Told(halves, 0)
    told.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        told.run()
    assert len(told.tried) == 1 and not told.told

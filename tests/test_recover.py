"""Memory that runs out at any allocation of an update: training goes on, and says under which guarantee."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frugan import recipes
from frugan.console import Console
from frugan.memory.plan import Guarantee
from frugan.memory.recover import Change, Recovery
from frugan.recipe import Run
from frugan.trainer import Trainer

TINY = {"batch_size": 16, "epochs": 1, "image_size": 8, "latent_dim": 4, "width_g": 4, "width_d": 4}


class Scarce(TorchDispatchMode):
    """The allocation number ``fails`` fails, as the allocator says it; None only counts them."""

    def __init__(self, fails: int | None = None) -> None:
        super().__init__()
        self.fails = fails
        self.allocations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        if any(t.untyped_storage()._cdata not in known for t in tree_leaves(result) if isinstance(t, Tensor)):
            self.allocations += 1
            if self.allocations - 1 == self.fails:
                torch.empty(1 << 60, dtype=torch.uint8)  # more than there is: the allocator's own error
        return result


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in trainer.state.capture()[0].items()}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_memory_running_out_at_every_allocation_of_an_update(name: str, few: Path, tmp_path: Path) -> None:
    outcomes: list[tuple[int, Guarantee]] = []
    asked = {k: v for k, v in TINY.items() if k in recipes.get(name).flat()}

    def every_allocation(images: int) -> None:
        if images != 32:  # the second update is the one that is done again and again
            return
        state, recovery = trainer.state, trainer.recovery
        before, layouts = everything(trainer), dict(recovery.layouts)
        counters = state.images, state.updates

        def update(fails: int | None) -> tuple[dict[str, Tensor], int]:
            for key, tensor in state.capture()[0].items():
                tensor.copy_(before[key])
            state.images, state.updates = counters
            recovery.layouts, recovery.handling = dict(layouts), "reuse"
            changes.clear()
            with Scarce(fails) as scarce:
                trainer._advance()
            return everything(trainer), scarce.allocations

        gc.collect()
        gc.freeze()  # what is there now is not looked at again each time memory runs out
        changes: list[Change] = []
        recovery.changed = changes.append
        wanted, allocations = update(None)
        assert allocations > 50
        for fails in range(allocations):
            for already in ("reuse", "return"):
                if already == "return" and fails % 5:
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

    trainer = Trainer(
        recipes.get(name).replace(data=str(few), **asked),
        Run(out=str(tmp_path / "r"), device="cpu"),
        Console(True),
        every_allocation,
    )
    try:
        trainer.train()
    finally:
        gc.unfreeze()
    assert len(outcomes) > 60


def with_handling(update: Any, recovery: Recovery, fails: int) -> Any:
    """The update with freed memory given back from the start, so that the layout itself has to change."""
    run = recovery.run

    def handled(phase: str, compute: Any) -> Any:
        recovery.handling = "return"
        return run(phase, compute)

    recovery.run = handled  # type: ignore[method-assign]
    try:
        return update(fails)
    finally:
        del recovery.run

"""What cannot be known without asking the machine: operators' workspaces, and what the allocator really gave out."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from frugan.memory import private
from frugan.memory.accelerator import accelerator, drawn
from frugan.memory.limit import is_out_of_memory
from frugan.memory.trace import GRANULE, Call, Spec


def allocations(computation: Callable[[], Any]) -> list[int]:
    """What ``computation`` allocates (> 0) and frees (< 0) of the CPU allocator's bytes, in order."""
    moves: list[int] = []
    with private.recording(moves):
        computation()
    return moves


class Workspaces(dict[Call, list[int]]):
    """What each distinct call allocates and frees inside, its results included; measured once, on ``device``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def measure(self, calls: Iterable[Call]) -> None:
        """Runs those of ``calls`` that are new once for real, on made-up numbers."""
        for call in calls:
            if call not in self:
                if not call.here:
                    self[call] = []
                    continue
                back = drawn(self.device) if call.random else None
                try:
                    self[call] = self._of(call)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    self[call] = []  # made-up numbers do not satisfy it: its results alone are counted
                finally:
                    if back:
                        back()

    def _of(self, call: Call) -> list[int]:
        args, kwargs = tree_map_only(Spec, _made_up, call.arguments)
        results: list[Any] = []

        def run() -> None:
            results.append(call.operator(*args, **kwargs))

        there = accelerator(self.device)
        with torch.no_grad():
            if there is None:
                return allocations(run)
            there.wait()
            there.forget_peak()
            before = there.allocated()
            run()
            there.wait()
            most, kept = there.most_allocated() - before, there.allocated() - before
        made = {private.address(t): t.untyped_storage().nbytes() for t in tree_leaves(results) if isinstance(t, Tensor)}
        given = {private.address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        sizes = [-(-size // GRANULE) * GRANULE for address, size in made.items() if address not in given and size]
        # What it kept first, then what it needed besides: the order in which convolutions ask.
        return [*sizes, most - kept, kept - most] if most > kept else sizes


def seconds(calls: Mapping[Call, int], device: torch.device) -> float:
    """How long ``calls``, each so many times, take on ``device``: of each distinct one the second of two runs is timed."""

    there = accelerator(device)
    wait = there.wait if there else lambda: None
    total = 0.0
    for call, times in calls.items():
        args, kwargs = tree_map_only(Spec, _made_up, call.arguments)
        try:
            with torch.no_grad():
                for _ in range(2):
                    wait()
                    begin = time.perf_counter()
                    call.operator(*args, **kwargs)
                    wait()
                    took = time.perf_counter() - begin
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            continue  # made-up numbers do not satisfy it
        total += times * took
    return total


def _made_up(spec: Spec) -> Tensor:
    tensor = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)
    return tensor.fill_(0.5 if spec.dtype.is_floating_point else 0)

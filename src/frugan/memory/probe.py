"""What cannot be known without asking the machine: operators' workspaces, and what the allocator really gave out."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import (  # type: ignore[attr-defined]
    ProfilerConfig,
    ProfilerState,
    _disable_profiler_legacy,
    _enable_profiler_legacy,
)
from torch.utils._pytree import tree_map_only

from frugan.memory.limit import is_out_of_memory
from frugan.memory.trace import Call, Spec


def allocations(computation: Callable[[], Any]) -> list[int]:
    """What ``computation`` allocates (> 0) and frees (< 0) of the CPU allocator's bytes, in order.

    The profiler's older interface is used: it reports the same allocations as the newer one, but starts in milliseconds instead
    of seconds and writes nothing on the terminal.
    """
    record()
    try:
        computation()
    finally:
        moves = recorded()
    return moves


def record() -> None:
    """Begins what `recorded` ends."""
    nothing = False
    config = ProfilerConfig(
        ProfilerState.CPU, nothing, True, nothing, nothing, nothing, _ExperimentalConfig()
    )  # the third is: report memory
    _enable_profiler_legacy(config)


def recorded() -> list[int]:
    """What was allocated and freed since `record`. Every operator is remembered until then: a long stretch takes gigabytes."""
    threads = _disable_profiler_legacy()
    return [event.cpu_memory_usage() for events in threads for event in events if event.kind() == "memory_alloc"]  # type: ignore[comparison-overlap]


class Workspaces(dict[Call, list[int]]):
    """What each distinct call allocates and frees inside, its results included; measured once, on ``device``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def measure(self, calls: Iterable[Call]) -> None:
        """Runs those of ``calls`` that are new once for real, on made-up numbers."""
        for call in calls:
            if call not in self:
                try:
                    self[call] = self._of(call)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    self[call] = []  # made-up numbers do not satisfy it: its results alone are counted

    def _of(self, call: Call) -> list[int]:
        args, kwargs = tree_map_only(Spec, _made_up, call.arguments)
        results: list[Any] = []

        def run() -> None:
            results.append(call.operator(*args, **kwargs))

        with torch.no_grad():
            if self.device.type != "cuda":
                return allocations(run)
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            most = torch.cuda.max_memory_allocated(self.device) - before
            kept = torch.cuda.memory_allocated(self.device) - before
            return [most, kept - most] if most else []


def seconds(calls: Mapping[Call, int], device: torch.device) -> float:
    """How long ``calls``, each so many times, take on ``device``: of each distinct one the second of two runs is timed."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

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

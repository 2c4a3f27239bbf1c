"""The parts of torch that it does not promise to keep, and what is done where one of them is missing.

Nothing else in frugan touches them. Each stands behind a function that goes on without it: less exactly, more slowly, or with the
sentence that says so; ``tests/test_private.py`` takes them away in turn. Where a part was found: torch 2.11 to 2.15.
"""

import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

PROFILER = ("on", "off", "config", "kind", "state")
UNMEASURED = 1.2  # of a prediction where operators' workspaces cannot be seen: with them it was up to 1.15 times it (docs/LOG.md)


def find(path: str) -> Any:
    """What is called ``path`` in torch, or None."""
    with warnings.catch_warnings(), suppress(ImportError, AttributeError):
        warnings.simplefilter("ignore")
        return pkgutil.resolve_name(path)
    return None


# Each is looked up when it is needed, and no import of torch._dynamo (1.2 s, 150 MiB) happens before.
PARTS = {
    "profiler_on": "torch.autograd._enable_profiler_legacy",
    "profiler_off": "torch.autograd._disable_profiler_legacy",
    "profiler_config": "torch._C._profiler._ExperimentalConfig",
    "profiler_kind": "torch.autograd.ProfilerConfig",
    "profiler_state": "torch.autograd.ProfilerState",
    "graph_task": "torch._C._current_graph_task_id",
    "flops": "torch.utils.flop_counter.flop_registry",
    "wrapped": "torch.optim.Adam.add_param_group.__wrapped__",
    "batch_norm": "torch.nn.modules.batchnorm._BatchNorm",
    "view": "torch.Tensor._is_view",
    "address": "torch.UntypedStorage._cdata",
    "schema": "torch.ops.aten.add.Tensor._schema",
    "amx": "torch.cpu._is_amx_tile_supported",
    "transforming": "torch._C._are_functorch_transforms_active",
    "jvp": "torch._decomp.decompositions_for_jvp.decomposition_table_for_jvp",
}


@cache
def part(name: str) -> Any:
    """The part of torch called ``name`` in `PARTS`, or None where this torch has none."""
    return find(PARTS[name])


def can_record() -> bool:
    """Whether `recording` sees anything."""
    return all(part(f"profiler_{name}") for name in PROFILER)


@contextmanager
def recording(moves: list[int]) -> Iterator[bool]:
    """While open, the CPU allocator is watched; at the end ``moves`` has what it gave (> 0) and took back (< 0), in order.

    Gives False, and no moves, where torch's older profiler is gone. That one reports the same allocations as the newer one, but
    starts in milliseconds instead of seconds and writes nothing on the terminal. Every operator is remembered: a long stretch takes
    gigabytes.
    """
    if not can_record():
        yield False
        return
    on, off, config, kind, state = (part(f"profiler_{name}") for name in PROFILER)
    nothing = False
    on(kind(state.CPU, nothing, True, nothing, nothing, nothing, config()))  # the third is: report memory
    try:
        yield True
    finally:
        moves += [e.cpu_memory_usage() for events in off() for e in events if e.kind() == "memory_alloc"]


def in_backward() -> bool:
    """Whether autograd is running a graph; no where nobody can tell, so that sums in place count as copies (up to 14% over)."""
    task = part("graph_task")
    return bool(task and task() != -1 and not torch.is_grad_enabled())


def flops(operator: Any, *args: Any, result: Any, **kwargs: Any) -> int:
    """Floating-point operations of a convolution or matrix product; 0 for others, and where torch has no formulas."""
    registry = part("flops")
    formula = registry.get(operator.overloadpacket) if registry else None
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def unwrapped(method: Any) -> Callable[..., Any]:
    """A method of an optimizer without the wrapper that has torch's compiler leave it alone, for which it would be imported."""
    found: Callable[..., Any] = getattr(method, "__wrapped__", method) if part("wrapped") else method
    return found


def batch_norm() -> tuple[type[nn.Module], ...]:
    """The classes of modules that take statistics over a batch."""
    base = part("batch_norm")
    return (base,) if base else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def applied(function: type[Function], *given: Any) -> Any:
    """``function.apply``, without what torch does to find default values among ``given``: some 20 microseconds each time.

    It looks for them where a function has a context of its own, which only transformations need.
    """
    transforming = part("transforming")
    return (function if transforming is None or transforming() else _joined(function)).apply(*given)


@cache
def _joined(function: type[Function]) -> type[Function]:
    """``function``, with its context set up while it is computed."""
    if function.setup_context is Function.setup_context:
        return function

    class Joined(function):  # type: ignore[misc, valid-type]
        setup_context = staticmethod(Function.setup_context)

        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            output = function.forward(*given)
            function.setup_context(ctx, given, output)
            return output

    Joined.__name__ = function.__name__
    return Joined


def amx() -> bool:
    """Whether this processor has instructions that multiply tiles of matrices in bfloat16; no where nobody can tell."""
    asked = part("amx")
    return bool(asked and asked())


def load_forward_mode() -> None:
    """Loads torch's formulas of forward mode now, if they are where they were; they warn of torch's own deprecated parts."""
    part("jvp")


def address(tensor: Tensor) -> int:
    """What tells the storage of a tensor, fake ones too, from all others that are alive."""
    storage = tensor.untyped_storage()
    return int(storage._cdata) if part("address") else id(storage)  # its object lives as long as the storage


def changes(operator: Any) -> bool:
    """Whether ``operator`` changes what it is given; yes where nobody can tell."""
    return bool(operator._schema.is_mutable) if part("schema") else True


def is_view(tensor: Tensor) -> bool:
    """Whether ``tensor`` shows part of another; yes where nobody can tell, so that sums in place count as copies."""
    return tensor._is_view() if part("view") else True

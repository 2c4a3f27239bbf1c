"""Ways of computing the same gradients in less memory; each says what it guarantees."""

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, which passes samples through ``block``: keeps its inputs alone, and computes it again in backward.

    Bitwise the same: running statistics take part in the first pass only, and nothing here draws from a global generator.
    """
    layers = _batch_norms(block)
    tracked = [m.track_running_stats for m in layers]
    return checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _as_before(layers, tracked)),
    )  # fmt: skip


@contextmanager
def recomputing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, each of ``blocks`` is `recomputed` in backward wherever it is called. Bitwise the same."""
    with ExitStack() as after:
        for block in blocks:
            block.forward = partial(recomputed, block, block.forward)
            after.callback(delattr, block, "forward")  # what the class says shows again
        yield


@cache
def load_forward_mode() -> None:
    """Loads torch's formulas of forward mode, which warn about torch's own use of what it deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def directional(blocks: Sequence[nn.Module], x: Tensor, v: Tensor, *inputs: Any, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """A chain of blocks at ``x``, and its derivative there in the direction ``v``, which is a constant.

    With v = the gradient of a penalty p(g) with respect to g = grad_x D(x), the derivative's gradient in the weights is that of
    p(grad_x D(x)): a gradient penalty without double backward. Equal but for rounding.

    Args:
        blocks: are called with what the one before returned and ``inputs``.
        x: samples ``[n, ...]``.
        v: a direction for each, of the same shape.
        inputs: what each block is called with besides.
        recompute: keep each block's inputs alone, and compute it again in backward.

    Returns:
        The last block's output and its directional derivative, of the same shape.
    """
    for block in blocks:

        def dual(x: Tensor, v: Tensor, block: nn.Module = block) -> tuple[Tensor, Tensor]:
            output, tangent = torch.func.jvp(lambda x: block(x, *inputs), (x,), (v,))  # type: ignore[misc]
            return output, tangent

        x, v = recomputed(block, dual, x, v) if recompute else dual(x, v)
    return x, v


def offloading(device: torch.device, wanted: bool) -> AbstractContextManager[object]:
    """While open, what backward needs of the forward pass waits on the host. Bitwise the same."""
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda") if wanted else nullcontext()


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """While open, passing samples through ``module`` leaves its running statistics as they are."""
    layers = [m for m in _batch_norms(module) if m.track_running_stats]
    for m in layers:
        m.track_running_stats = False  # in training the batch's own statistics are used all the same
    try:
        yield
    finally:
        for m in layers:
            m.track_running_stats = True


@contextmanager
def _as_before(layers: Sequence[_BatchNorm], tracked: Sequence[bool]) -> Iterator[None]:
    """While open, ``layers`` do the same as when they ``tracked`` statistics or not, but leave them as they are."""
    now = [(m.track_running_stats, m.momentum) for m in layers]
    counts = [m.num_batches_tracked.clone() if m.num_batches_tracked is not None else None for m in layers]
    for m, tracks in zip(layers, tracked, strict=True):
        m.track_running_stats, m.momentum = tracks, 0.0
    try:
        yield
    finally:
        for m, count, (tracks, momentum) in zip(layers, counts, now, strict=True):
            m.track_running_stats, m.momentum = tracks, momentum
            if count is not None and m.num_batches_tracked is not None:
                m.num_batches_tracked.copy_(count)


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]

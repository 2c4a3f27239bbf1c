"""Ways of computing the same gradients in less memory; each says what it guarantees."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from frugan.memory import batchnorm, private
from frugan.memory.batch_statistics import carrying
from frugan.memory.layout import slices
from frugan.utils.accelerator import accelerator
from frugan.utils.errors import UserError

Loss = Callable[..., Tensor]


def accumulate(
    loss: Loss, module: nn.Module, tensors: Sequence[Tensor], sizes: Sequence[int], *, whole_batch_norm: bool = False
) -> Tensor:  # fmt: skip
    """Adds the gradients of the mean of ``loss(module, *tensors)`` over all samples, in micro-batches of ``sizes``.

    Args:
        loss: gives one term a sample, ``[n]``; what it draws at random should come with ``tensors``.
        module: what is trained.
        tensors: each ``[n, ...]``; are cut along their first dimension, and moved to the module's device a piece at a time.
        sizes: sum to n.
        whole_batch_norm: whether batch norm takes its statistics over all samples, for which the loss is computed again and again
            (`frugan.memory.batchnorm`); it must draw nothing, and differentiate nothing itself.

    Returns:
        The mean loss, without graph.

    Raises:
        UserError: the loss gives something else than one term a sample, or ``sizes`` do not sum to n.
    """
    if any(len(t) != sum(sizes) for t in tensors):
        raise UserError(
            f"micro-batches of {list(sizes)} are {sum(sizes)} samples, but the tensors have {[len(t) for t in tensors]}."
        )
    device = next(module.parameters()).device

    def share(begin: int, count: int) -> Tensor:
        terms = loss(module, *(t[begin : begin + count].to(device) for t in tensors))
        if tuple(terms.shape) != (count,):
            raise UserError(
                f"the loss gave a tensor of shape {list(terms.shape)} for {count} samples: it must give one term a sample, "
                f"[{count}] (reduction='none'), of which the engine takes the mean."
            )
        return terms.sum() / sum(sizes)

    if whole_batch_norm:
        return batchnorm.accumulate(module, share, list(slices(sizes)))
    total = torch.zeros((), device=device)
    for part in slices(sizes):
        mean = share(*part)
        torch.autograd.backward(mean)
        total = total + mean.detach()  # a loss in double precision gives a mean in double precision
    return total


def drawn(device: torch.device) -> Callable[[], None]:
    """What puts torch's global generators, of the CPU and of ``device``, back to where they are now."""
    there = accelerator(device)
    host, other = torch.get_rng_state(), there.generator() if there else None

    def back() -> None:
        torch.set_rng_state(host)
        if there and other is not None:
            there.set_generator(other)

    return back


def recomputed(
    block: nn.Module, function: Callable[..., Any], *inputs: Any, draws: bool = False, named: Mapping[str, Any] | None = None
) -> Any:
    """``function(*inputs, **named)``, which passes samples through ``block``: keeps its inputs alone, and computes it again in
    backward.

    Bitwise the same: running statistics take part in the first pass only. ``draws``: ``function`` draws from torch's global
    generators, which then draw the same again. (`torch.utils.checkpoint` imports torch's compiler, which holds 150 MiB.)
    """
    named = named or {}
    layers = batch_norms(block)
    tracked = [m.track_running_stats for m in layers]
    whole = next((m.whole_batch.again() for m in layers if "whole_batch" in vars(m)), nullcontext)  # `frugan.memory.batchnorm`
    first = next((t for t in (*inputs, *named.values()) if isinstance(t, Tensor)), None)
    device = first.device if first is not None else torch.device("cpu")
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    before = drawn(device) if draws else None
    count = 0  # of what the first pass would have kept
    found: dict[int, Tensor] = {}  # what the second has found, until it is fetched

    def pack(_: Tensor) -> int:
        nonlocal count
        count += 1
        return count - 1

    def unpack(number: int) -> Tensor:
        if number not in found:
            again()
        return found.pop(number)

    def again() -> None:
        found.clear()
        place = 0

        def keep(tensor: Tensor) -> None:
            nonlocal place
            found[place] = tensor.detach()
            place += 1

        after = drawn(device) if before else None
        if before:
            before()
        fresh = [_apart(t) for t in inputs]
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, _never), torch.enable_grad(), torch.autocast(kind, dtype, enabled),
            _as_before(layers, tracked), whole(),
        ):  # fmt: skip
            function(*fresh, **{name: _apart(t) for name, t in named.items()})
        if after:
            after()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(*inputs, **named)


def _apart(value: Any) -> Any:
    """``value``; of a tensor, its numbers without its graph."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _never(_: object) -> Tensor:
    raise AssertionError("nothing goes backward through what is only computed again")


@contextmanager
def recomputing(blocks: Iterable[nn.Module], draws: bool = False) -> Iterator[None]:
    """While open, each of ``blocks`` is `recomputed` in backward wherever it is called. Bitwise the same."""
    with ExitStack() as after:
        for block in blocks:
            if (own := vars(block).get("forward")) is None:
                after.callback(delattr, block, "forward")  # what the class says shows again
            else:
                after.callback(setattr, block, "forward", own)
            block.forward = partial(_called, block, block.forward, draws)
        yield


def _called(block: nn.Module, forward: Callable[..., Any], draws: bool, /, *inputs: Any, **named: Any) -> Any:
    return recomputed(block, forward, *inputs, draws=draws, named=named)


def directional(blocks: Sequence[nn.Module], x: Tensor, v: Tensor, *inputs: Any, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """A chain of blocks at ``x``, and its derivative there in the direction ``v``, which is a constant.

    With v = the gradient of a function p(g) with respect to g = grad_x f(x), the derivative's gradient in the weights is that of
    p(grad_x f(x)): what is asked of a gradient, without double backward. Equal but for rounding.

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


def backward_from(tensor: Tensor, gradient: Tensor | None, leaves: Sequence[Tensor]) -> None:
    """``torch.autograd.backward(tensor, gradient, inputs=leaves)``, for which torch would import SymPy (20 MiB)."""
    assert gradient is not None
    torch.autograd.backward(carrying(tensor, gradient), inputs=leaves)


def offloading(device: torch.device, wanted: bool, kept: Iterable[Tensor] = ()) -> AbstractContextManager[object]:
    """While open, what backward needs of the forward pass waits on the host, but for ``kept``, which stays on the device anyway.

    Bitwise the same: strides come back as they were, as kernels are chosen by them. (`torch.autograd.graph.save_on_cpu` makes
    everything contiguous, and copies the weights too.)
    """
    if not wanted or device.type == "cpu":
        return nullcontext()
    staying = {private.address(t) for t in kept}

    def pack(tensor: Tensor) -> Tensor | tuple[Tensor]:
        if tensor.device.type == "cpu" or not _is_dense(tensor) or private.address(tensor) in staying:
            return tensor
        pinned = device.type == "cuda"
        host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=pinned)
        return (host.copy_(tensor, non_blocking=pinned),)

    def unpack(packed: Tensor | tuple[Tensor]) -> Tensor:
        if isinstance(packed, Tensor):  # it stayed where it was, be that the host
            return packed
        (host,) = packed
        tensor = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
        return tensor.copy_(host, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_dense(tensor: Tensor) -> bool:
    """Whether ``tensor`` has every number once in one piece of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """While open, passing samples through ``module`` leaves its running statistics as they are."""
    layers = [m for m in batch_norms(module) if m.track_running_stats]
    for m in layers:
        m.track_running_stats = False  # in training the batch's own statistics are used all the same
    try:
        yield
    finally:
        for m in layers:
            m.track_running_stats = True


@contextmanager
def _as_before(layers: Sequence[Any], tracked: Sequence[bool]) -> Iterator[None]:
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


def couples(module: nn.Module) -> bool:
    """Whether ``module`` takes statistics over a batch, so that a sample's output depends on the others."""
    return bool(batch_norms(module))


def batch_norms(module: nn.Module) -> list[Any]:
    """The batch norm layers of ``module``."""
    return [m for m in module.modules() if isinstance(m, private.batch_norm())]

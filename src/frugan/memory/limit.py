"""The memory of this process on whatever it trains on: how much it holds, how much it held at most, and how much it may.

On the CPU that is what the system counts as resident; on an accelerator what torch's allocator has reserved there, and the driver's
context. What exactly is held to a budget, and what is not, stands in ``docs/memory.md``.
"""

import errno
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from frugan.memory import host, pool
from frugan.memory.host import Freed
from frugan.utils.accelerator import accelerator
from frugan.utils.errors import UserError
from frugan.utils.units import parse_bytes, size

MIB = 1 << 20
ALWAYS = 8 << 20  # bytes that are never refused: Python, and libraries that end the process where they are
EXCEEDED = 128 << 20  # the same where others hold more than the budget already: enough for small micro-batches to go on
LEFT = 0.9  # of what is free, to be taken where no budget is named
_budgets: list[int] = []  # what this process's memory is limited to now, on the CPU
_beyond = _reserved = 0  # bytes of addresses that libraries may take beyond the budget: when they meet something new, and now
_kept: int | None = None  # bytes that the pool may keep, with its tensors
_most = 0  # the most that was held on the CPU until `went_over` last looked

# What says that memory ran out, where only words tell: of torch's CPU allocator, oneDNN, CUDA, its libraries, MPS, XLA, the system.
WORDS = (
    "can't allocate memory", "could not create a primitive", "CUDA error: out of memory", "CUDA out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY", "STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED", "HOST_ALLOCATION_FAILED",
    "MPS backend out of memory", "Cannot allocate memory", "can't start new thread", "RESOURCE_EXHAUSTED",
)  # fmt: skip
SHORTAGE = (RuntimeError, MemoryError, OSError)  # what to catch before asking `is_out_of_memory`


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in WORDS)


def set_freed(how: Freed, device: torch.device) -> None:
    """Says what becomes of freed memory on the CPU (`frugan.memory.host.set_freed`); on accelerators torch's allocator decides."""
    if device.type == "cpu":
        host.set_freed(how, _kept)
        if how == "return" and _budgets:
            _limit_data()  # the system counts the gaps of the heap as held for ever, but tensors do not go there any more


def release(device: torch.device) -> None:
    """Gives memory that is free inside the process back to the system."""
    if there := accelerator(device):
        there.release()
    host.trim()


def wait(device: torch.device) -> None:
    """Waits until everything asked of ``device`` is done."""
    if there := accelerator(device):
        there.wait()


def held(device: torch.device) -> int:
    """Bytes that this process holds now: of ``device``, of the host for the CPU."""
    there = accelerator(device)
    return there.context() + there.reserved() if there else host.resident()


def forget_peak(device: torch.device) -> None:
    """Lets `peak` begin anew, and on the host `most`."""
    global _most
    if there := accelerator(device):
        there.forget_peak()
    _most = 0
    _clear_peak()


def _clear_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: then the peak is that of the whole process


def peak(device: torch.device) -> int | None:
    """The most bytes that this process held since `forget_peak`: of ``device``, of the host for the CPU; None if nobody says."""
    if there := accelerator(device):
        most = there.most_reserved()
        return None if most is None else there.context() + most
    return max(_most, host.status("VmHWM")) or None


def went_over(device: torch.device) -> int | None:
    """The bytes that were held beyond a budget for a moment since this was last asked (CPU); None where it was kept.

    `limited` has the system refuse what would be too much, but pages that were reserved before, and pages of files, can still
    become resident: this sees them.
    """
    global _most
    if device.type != "cpu" or not _budgets:
        return None
    most = host.status("VmHWM")
    if most <= min(_budgets):
        return None
    _most = max(_most, most)
    _clear_peak()
    return most


def budget(memory: str | int | None, device: torch.device) -> int | None:
    """The bytes that ``memory`` says, as 2GiB or a number of them, once it is clear that they can be held.

    Raises:
        UserError: it says nothing, is more than the machine has, or cannot be held on this device.
    """
    if memory is None:
        return None
    named = parse_bytes(memory)
    if not can_be_limited(device):
        raise UserError(f"a budget of {memory} cannot be held on {device} here: leave it out, or use a GPU, or the CPU on Linux.")
    found = accelerator(device)
    there = found.total() if found else host.total()
    if named > there:
        raise UserError(f"a budget of {memory} is more than the {size(there)} there are: name less, or leave it out.")
    return named


def baseline(device: torch.device) -> int:
    """Bytes that this process holds now, with all given back that it does not need."""
    if device.type == "cpu":
        host.drop_code()
    return at_rest(device)


def addresses() -> int:
    """Bytes of addresses of data that this process has on the host, whether it has touched them or not."""
    return host.status("VmData")


def at_rest(device: torch.device) -> int:
    """Bytes that this process holds now, without tensors that nobody has any more."""
    gc.collect()
    release(device)
    return held(device)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """While open, Python looks for garbage seldom, and not at all that was imported: traces are many small objects that stay."""
    gc.collect(1)  # what is older are imports, and to look through these takes a tenth of a second
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def most() -> int:
    """The most bytes that this process has held on the host since it began (`getrusage` would include the process it came from)."""
    return max(_most, host.status("VmHWM"))


def spare(device: torch.device) -> int:
    """Most of the bytes that are free, which may be taken where no budget is named."""
    there = accelerator(device)
    return int(LEFT * (there.free() if there else host.free()))


def can_be_limited(device: torch.device) -> bool:
    """Whether `limited` can hold a budget on ``device``."""
    there = accelerator(device)
    return there.can_be_limited if there else device.type == "cpu" and sys.platform == "linux"


@contextmanager
def limited(budget: int, device: torch.device) -> Iterator[None]:
    """While open, this process cannot hold more than ``budget`` bytes: what asks for more is refused, and says so.

    On the CPU (Linux) the system refuses to enlarge the process's data by more than what is left of the budget now; on an
    accelerator torch's allocator refuses, the context counted.
    """
    if there := accelerator(device):
        there.limit(budget)
        try:
            yield
        finally:
            there.limit(None)
        return
    import resource

    np.linalg.inv(np.ones((64, 64)) @ np.eye(64) + np.eye(64))  # numpy's BLAS ends the process when it cannot reserve its buffers
    before = resource.getrlimit(resource.RLIMIT_DATA)
    baseline(device)
    _budgets.append(budget)
    _limit_data()
    try:
        yield
    finally:
        _budgets.pop()
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextmanager
def within_free(device: torch.device) -> Iterator[None]:
    """While open, this process's data cannot grow by more than what is free now (CPU, Linux): what asks for more is refused, where
    the system would end the process without a word."""
    if device.type != "cpu" or not can_be_limited(device):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (host.status("VmData") + host.free(), before[1]))  # free within limits that there are
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _limit_data() -> None:
    """Lets the process's data grow by what is left of its budget now, and by a little even where nothing is left."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    left = min(_budgets) - host.resident()
    cap = host.status("VmData") + _reserved + (max(ALWAYS, left) if left > 0 else EXCEEDED)
    resource.setrlimit(resource.RLIMIT_DATA, (cap if hard == resource.RLIM_INFINITY else min(cap, hard), hard))


def settle() -> None:
    """Holds the budget without what libraries reserve: to be called once everything that is done over and over has been done."""
    global _reserved
    if _reserved and _budgets:
        _reserved = 0
        host.drop_code()  # that only the beginning needed
        _limit_data()


def loosen() -> None:
    """Lets libraries reserve again what they do when they meet something new, until `settle`."""
    global _reserved
    _reserved = _beyond
    if _budgets:
        _limit_data()


@contextmanager
def held_to(budget: int | None, device: torch.device, reserved: int = 0, more: int | None = None) -> Iterator[None]:
    """While open, the process is `limited` to ``budget`` if there is one; freed memory goes back at first.

    Later (`set_freed`) it is kept for new tensors, up to what is there now and ``more`` bytes, those of tensors counted.

    Until `settle`, libraries may reserve ``reserved`` bytes of addresses beyond that, which they do not touch: oneDNN does for the
    code of every convolution it has not met before, does not look whether it got them, and runs it.
    """
    global _beyond, _reserved, _kept
    baseline(device)  # lets go of what planning has left
    _kept = None if more is None else pool.state().used + more
    set_freed("return", device)
    forget_peak(device)
    _beyond = _reserved = reserved
    try:
        with limited(budget, device) if budget is not None else nullcontext():
            yield
    finally:
        _beyond, _reserved, _kept = 0, 0, None
        release(device)


@contextmanager
def as_before() -> Iterator[None]:
    """While open, the C library, the number of torch's threads and frozen collections may be set; at the end they are as before.

    A library that trains leaves the program that called it as it found it, and none of its tensors in it.
    """
    threads, frozen = torch.get_num_threads(), gc.get_freeze_count()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if not frozen:
            gc.unfreeze()
        gc.collect()
        host.restore()

"""The memory of this process: how much it is, how much it was at most, how much it may be, and how the C library handles it."""

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from frugan.errors import UserError
from frugan.memory.plan import parse_bytes, size

Handling = Literal["reuse", "return"]
# Of mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
MIB = 1 << 20
UNKNOWN = 1 << 50  # bytes that are free where nobody says
LEFT = 0.9  # of what is free, to be taken where no budget is named
_budgets: list[int] = []  # what this process's memory is limited to now, on the CPU


def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None  # another C library lacks them


def handle(how: Handling) -> None:
    """Says what becomes of freed memory on the CPU; other C libraries than glibc do as they like.

    ``return`` gives every tensor of more than 64 KiB back at once, so that the process holds what is live and no more; each new
    tensor then costs the system a page fault every 4 KiB. ``reuse`` keeps what is free for the next tensor, which is much
    faster, and holds somewhat more than is live (`frugan.memory.heap` says how much).
    """
    if libc := _libc():
        libc.mallopt(M_ARENA_MAX, 1)  # threads that start from now on share one heap: what one frees, another can use
        if how == "reuse":
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        else:
            libc.mallopt(M_MMAP_MAX, 65536)
            libc.mallopt(M_MMAP_THRESHOLD, 65536)
            libc.mallopt(M_TRIM_THRESHOLD, 65536)
            libc.malloc_trim(0)
            if _budgets:
                _limit_data()  # the system counts the gaps of the heap as held for ever, but tensors do not go there any more


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out; on the CPU and in libraries only its words tell."""
    words = ("can't allocate memory", "could not create a primitive", "STATUS_ALLOC_FAILED", "MPS backend out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words)


def release(device: torch.device) -> None:
    """Gives memory that is free inside the process back to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    if libc := _libc():
        libc.malloc_trim(0)


def _status(name: str) -> int:
    status = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    return _status("VmRSS")


def held(device: torch.device) -> int:
    """Bytes that this process holds now: of ``device``, of the host for the CPU."""
    return context(device) + torch.cuda.memory_reserved(device) if device.type == "cuda" else resident()


def forget_peak() -> None:
    """Lets `peak` begin anew."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: then the peak is that of the whole process


def peak(device: torch.device) -> int | None:
    """The most bytes that this process held since `forget_peak`: of ``device``, of the host for the CPU; None if nobody says."""
    if device.type == "cuda":
        return context(device) + torch.cuda.max_memory_reserved(device)
    return _status("VmHWM") or None


def free() -> int:
    """Bytes that this process could still take (Linux): of the machine, of its control group, and of its own limit on data."""
    there = _meminfo("MemAvailable")
    if there is None:
        return UNKNOWN
    import resource  # there is none on Windows

    if (group := _group()) is not None:
        there = min(there, group[0] - group[1])
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return max(0, there if soft == resource.RLIM_INFINITY else min(there, soft - _status("VmData")))


def total() -> int:
    """Bytes of memory that there are for this process at all (Linux)."""
    there = _meminfo("MemTotal") or UNKNOWN
    group = _group()
    return min(there, group[0]) if group else there


def _meminfo(name: str) -> int | None:
    info = Path("/proc/meminfo")
    found = re.search(rf"^{name}:\s+(\d+) kB", info.read_text(), re.MULTILINE) if info.exists() else None
    return int(found[1]) * 1024 if found else None


def _group() -> tuple[int, int] | None:
    """Limit and use of the control group, if it has a limit; what the page cache holds can be given up and is not counted."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((root / "memory.current").read_text())
        cache = re.search(r"^inactive_file (\d+)", (root / "memory.stat").read_text(), re.MULTILINE)
        return int(limit), used - (int(cache[1]) if cache else 0)
    except (OSError, ValueError):
        return None


def budget(memory: str | None, device: torch.device) -> int | None:
    """The bytes that ``--memory`` says, once it is clear that they can be held.

    Raises:
        UserError: it says nothing, is more than the machine has, or cannot be held on this device.
    """
    if memory is None:
        return None
    named = parse_bytes(memory)
    if not can_be_limited(device):
        raise UserError(f"--memory {memory} cannot be held on {device} here: leave it out, or use --device cuda, or cpu on Linux.")
    there = total() if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
    if named > there:
        raise UserError(f"--memory {memory} is more than the {size(there)} there are: name less, or leave it out.")
    return named


def baseline(device: torch.device) -> int:
    """Bytes that this process holds now, with all given back that it does not need."""
    FakeTensorMode.cache_clear()
    gc.collect()
    release(device)
    return context(device) + torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()


def spare(device: torch.device) -> int:
    """Most of the bytes that are free, which may be taken where no budget is named."""
    return int(LEFT * (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free()))


def can_be_limited(device: torch.device) -> bool:
    """Whether `limited` can hold a budget on ``device``."""
    return device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux")


@contextmanager
def limited(budget: int, device: torch.device) -> Iterator[None]:
    """While open, this process cannot hold more than ``budget`` bytes: what asks for more is refused, and says so.

    On the CPU (Linux) the system refuses to enlarge the process's data by more than what is left of the budget now; on CUDA torch's
    allocator refuses, the context counted.
    """
    if device.type == "cuda":
        share = max(0.0, budget - context(device)) / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    import resource

    _ = np.ones((64, 64)) @ np.ones((64, 64))  # numpy's BLAS ends the process when it cannot reserve its buffers later
    before = resource.getrlimit(resource.RLIMIT_DATA)
    baseline(device)
    _budgets.append(budget)
    _limit_data()
    try:
        yield
    finally:
        _budgets.pop()
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _limit_data() -> None:
    """Lets the process's data grow by what is left of its budget now."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    cap = _status("VmData") + max(0, min(_budgets) - resident())
    resource.setrlimit(resource.RLIMIT_DATA, (cap if hard == resource.RLIM_INFINITY else min(cap, hard), hard))


@contextmanager
def unlimited() -> Iterator[None]:
    """While open, `limited` does not hold: for what libraries load, who may end the process when they are refused memory.

    oneDNN reserves memory for the code of every convolution it has not met before, does not look whether it got it, and
    runs it. Little of what it reserves is ever held.
    """
    if not _budgets:
        yield
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    try:
        yield
    finally:
        _limit_data()


@contextmanager
def held_to(budget: int | None, handling: Handling, device: torch.device) -> Iterator[None]:
    """While open, freed memory is handled as ``handling`` says, and the process is `limited` to ``budget`` if there is one."""
    if budget is not None:
        baseline(device)  # lets go of what planning has left
    if device.type == "cpu":
        handle(handling)
    forget_peak()
    try:
        with limited(budget, device) if budget is not None else nullcontext():
            yield
    finally:
        release(device)


def context(device: torch.device) -> int:
    """Bytes of a CUDA device that are in use outside torch's allocator: the context, and other processes if there are any."""
    there, whole = torch.cuda.mem_get_info(device)
    return max(0, whole - there - torch.cuda.memory_reserved(device))

"""The memory of this process on the host: how much it is, how much there is, and how the C library handles it."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from frugan.memory import pool

Freed = Literal["reuse", "return"]
# Of mallopt (malloc.h), with the environment's name for each and glibc's default.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
DEFAULTS = {
    M_TRIM_THRESHOLD: ("MALLOC_TRIM_THRESHOLD_", 128 << 10), M_MMAP_THRESHOLD: ("MALLOC_MMAP_THRESHOLD_", 128 << 10),
    M_MMAP_MAX: ("MALLOC_MMAP_MAX_", 65536), M_ARENA_MAX: ("MALLOC_ARENA_MAX", 0),
}  # fmt: skip
MADV_DONTNEED = 4  # of sys/mman.h
UNKNOWN = 1 << 50  # bytes that are free where nobody says
_handled = False  # whether the C library was told something


def lacks_pool() -> bool:
    """Whether this system could have a pool for tensors, and has none."""
    return libc() is not None and not pool.available()


def libc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None  # another one lacks them


def set_freed(how: Freed, most: int | None = None) -> None:
    """Says what becomes of freed memory on the CPU; other C libraries than glibc do as they like.

    ``return`` gives every tensor of more than 64 KiB back at once, so that the process holds what is live and no more; each new
    tensor then costs the system a page fault every 4 KiB. ``reuse`` keeps what is free for the next tensor, which is much
    faster: in a pool, so that tensors and what is free between them take no more than ``most`` bytes if tensors alone do not
    (`frugan.memory.pool`), or where there is none in the C library's heap, which comes to hold up to half as much again.
    """
    global _handled
    if not (library := libc()):
        return
    _handled = True
    library.mallopt(M_ARENA_MAX, 1)  # threads that start from now on share one heap: what one frees, another can use
    if pool.available():
        pool.use(most if how == "reuse" else 0)
    if how == "reuse" and not pool.available():
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    else:
        library.mallopt(M_MMAP_MAX, 65536)
        library.mallopt(M_MMAP_THRESHOLD, 65536)
        library.mallopt(M_TRIM_THRESHOLD, 65536)
        library.malloc_trim(0)


def restore() -> None:
    """Undoes `set_freed`: the C library's own thresholds, or those that the environment names.

    But for one thing: glibc no longer raises its threshold by itself as it does in a program that never named one.
    """
    global _handled
    if _handled and (library := libc()):
        for parameter, (name, value) in DEFAULTS.items():
            said = os.environ.get(name, "")
            library.mallopt(parameter, int(said) if said.isdigit() else value)
        library.malloc_trim(0)
        pool.end()
        _handled = False


def trim() -> None:
    """Gives memory that is free inside the process back to the system."""
    if library := libc():
        pool.trim()
        library.malloc_trim(0)


def drop_code() -> None:
    """Lets go of the pages of programs and libraries; those that are needed again come back from the page cache at once.

    Importing torch touches code by the 100 MiB, of CUDA's libraries too, most of which never runs again, and all of it counts as
    resident.
    """
    if (library := libc()) is None:
        return
    with Path("/proc/self/maps").open() as file:
        mapped = [line.split(maxsplit=5) for line in file]
    for span, rights, *_, name in (m for m in mapped if len(m) == 6):
        if rights == "r-xp" and name.startswith("/"):  # never written to, so that nothing is lost
            begin, end = (int(address, 16) for address in span.split("-"))
            library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)


def status(name: str) -> int:
    """A figure of ``/proc/self/status`` in bytes; 0 where there is none."""
    file = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE) if file.exists() else None
    return int(found[1]) * 1024 if found else 0


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    return status("VmRSS")


def free() -> int:
    """Bytes that this process could still take (Linux): of the machine, of its control groups, and of its own limit on data."""
    there = _meminfo("MemAvailable")
    if there is None:
        return UNKNOWN
    import resource  # there is none on Windows

    there = min([there, *(limit - used for limit, used in groups())])
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return max(0, there if soft == resource.RLIM_INFINITY else min(there, soft - status("VmData")))


def total() -> int:
    """Bytes of memory that there are for this process at all (Linux)."""
    return min([_meminfo("MemTotal") or UNKNOWN, *(limit for limit, _ in groups())])


def _meminfo(name: str) -> int | None:
    info = Path("/proc/meminfo")
    found = re.search(rf"^{name}:\s+(\d+) kB", info.read_text(), re.MULTILINE) if info.exists() else None
    return int(found[1]) * 1024 if found else None


def groups(process: Path = Path("/proc/self"), root: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of every control group that holds this process and has a limit: its own and those above it.

    Of version 2 and version 1, at the root (containers) and below it (systemd, SLURM). What the page cache holds can be given up
    and is not counted.
    """
    try:
        lines = (process / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            for folder in (root, root / "unified"):  # the second where both versions are mounted
                found += _chain(folder, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            found += _chain(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return found


def _chain(root: Path, path: str, limit: str, used: str, cache: str) -> Iterator[tuple[int, int]]:
    """The limits of the group at ``path`` and of all above it; a container may see the host's path, while its own is the root."""
    parts = [p for p in path.split("/") if p not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:depth])
        try:
            bytes_ = int((folder / limit).read_text())  # "max" is none
            now = int((folder / used).read_text())
            idle = re.search(rf"^{cache} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):
            continue
        if bytes_ < UNKNOWN:  # version 1 says none by a very large number
            yield bytes_, now - (int(idle[1]) if idle else 0)

"""How much memory this process may take: control groups of every kind; and what says that memory ran out."""

import errno
import os
from pathlib import Path

import pytest
import torch

from frugan.memory import limit
from frugan.memory.host import UNKNOWN, groups

NONE_IN_V1 = "9223372036854771712"


def tree(folder: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A process with these control groups, and the file system of those."""
    process, root = folder / "proc", folder / "cgroup"
    process.mkdir()
    root.mkdir()
    (process / "cgroup").write_text(lines)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return process, root


def v2(where: str, most: int | str, now: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon 7\ninactive_file {cache}\nactive_file 9"
    return {f"{where}memory.max": str(most), f"{where}memory.current": str(now), f"{where}memory.stat": stat}


def v1(where: str, most: int | str, now: int, cache: int = 0) -> dict[str, str]:
    stat = f"inactive_file 1\ntotal_inactive_file {cache}\n"
    names = ("memory/{}memory.limit_in_bytes", "memory/{}memory.usage_in_bytes", "memory/{}memory.stat")
    return {name.format(where): text for name, text in zip(names, (str(most), str(now), stat), strict=True)}


SLICE = "user.slice/user-1000.slice/run.scope"
V1_LINES = "12:cpu,cpuacct:/job\n5:memory:/slurm/uid_7/job_3\n1:name=systemd:/elsewhere\n"
HYBRID = "4:memory:/box\n1:name=systemd:/box\n0::/box\n"
PLACES: dict[str, tuple[str, dict[str, str], list[tuple[int, int]]]] = {
    "v2, at the root of a container": ("0::/\n", v2("", 1000, 600, 100), [(1000, 500)]),
    "v2, no limit": ("0::/\n", v2("", "max", 600), []),
    "v2, its own and one above it": (
        f"0::/{SLICE}\n",
        v2(f"{SLICE}/", "max", 1) | v2("user.slice/user-1000.slice/", 800, 300, 50) | v2("user.slice/", 900, 400),
        [(800, 250), (900, 400)],
    ),
    "v2, a container that sees the host's path": ("0::/docker/3f2a\n", v2("", 1000, 600), [(1000, 600)]),
    "v2, a name space below another": ("0::/../../job\n", v2("job/", 700, 60) | v2("", "max", 90), [(700, 60)]),
    "v1, SLURM": (
        V1_LINES,
        v1("slurm/uid_7/job_3/", 500, 200, 20)
        | v1("slurm/uid_7/", NONE_IN_V1, 300)
        | v1("slurm/", 900, 400)
        | v1("", NONE_IN_V1, 1),
        [(500, 180), (900, 400)],
    ),
    "v1, a container that sees the host's path": ("5:memory:/docker/3f2a\n", v1("", 400, 100), [(400, 100)]),
    "both, memory in v1": (HYBRID, v1("box/", 400, 100) | {"unified/box/cgroup.procs": "1"}, [(400, 100)]),
    "both, memory in v2": ("1:name=systemd:/box\n0::/box\n", v2("unified/box/", 300, 100), [(300, 100)]),
    "a limit that cannot be read": ("0::/\n", v2("", "soon", 1), []),
    "no groups at all": ("", {}, []),
    "a line that nobody knows": ("hello\n0::/\n", v2("", 1000, 600), [(1000, 600)]),
}


@pytest.mark.parametrize("place", PLACES)
def test_limits_of_control_groups_are_found(place: str, tmp_path: Path) -> None:
    lines, files, wanted = PLACES[place]
    assert groups(*tree(tmp_path, lines, files)) == wanted


def test_where_there_are_no_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert groups(tmp_path / "nowhere", tmp_path / "neither") == []
    assert all(0 < most < UNKNOWN and used >= 0 for most, used in groups())


def shown_by_torch() -> Exception:
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has an exabyte")


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1 MB, max allowed: 9.07 GB)."),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes."),
    RuntimeError("could not create a primitive"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    shown_by_torch(),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("unsupported memory format option ChannelsLast"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.ENOENT, os.strerror(errno.ENOENT)),
    OSError("libgomp.so.1: cannot allocate memory in static TLS block"),
    ValueError("too few images"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda e: str(e)[:40] or type(e).__name__)
def test_what_says_that_memory_ran_out_is_known(error: Exception) -> None:
    assert limit.is_out_of_memory(error) and isinstance(error, limit.SHORTAGE)


@pytest.mark.parametrize("error", OTHERS, ids=lambda e: str(e)[:40])
def test_what_says_something_else_is_no_shortage(error: Exception) -> None:
    assert not limit.is_out_of_memory(error)

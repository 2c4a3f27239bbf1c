"""A device that is not the CPU, on the CPU: ``torch.device("sim")``, in the words of ``torch.cuda``.

`setup` compiles ``sim.cpp`` (a minute, once for each torch) and registers it as torch's PrivateUse1 backend. This module is then
``torch.sim``: the functions below have the names, signatures and documented errors of ``torch.cuda``, which a test compares, so
that what goes over `torch.get_device_module` runs here as it would there. What is simulated and what is not stands in ``sim.cpp``.
"""

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

HERE = Path(__file__).parent
_library: Any = None


def missing() -> str | None:
    """Why the device cannot be had here, or None."""
    if sys.platform != "linux":
        return "the simulated device is built on Linux"
    if torch.cuda.is_available():
        return "torch knows one accelerator in a process, and there is a GPU: FRUGAN_TEST_DEVICE=cuda tests that"
    return None if shutil.which("c++") else "the simulated device needs a C++ compiler (c++)"


def setup() -> None:
    """Registers the device; once a process, before anything uses it."""
    global _library
    if _library is not None:
        return
    library = _built()
    torch.ops.load_library(library)
    _library = ctypes.CDLL(str(library))
    for name in ("allocated", "reserved", "most_allocated", "most_reserved", "allocations", "total", "used", "state"):
        getattr(_library, f"sim_{name}").restype = ctypes.c_int64
    _library.sim_state.argtypes = _library.sim_set_state.argtypes = (ctypes.c_int, ctypes.c_void_p)
    _library.sim_seed.argtypes = (ctypes.c_int, ctypes.c_uint64)
    for name in ("limit", "others", "fail"):
        getattr(_library, f"sim_{name}").argtypes = (ctypes.c_int, ctypes.c_int64)
    _library.sim_setup()
    torch.utils.rename_privateuse1_backend("sim")
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    torch._register_device_module("sim", sys.modules[__name__])


def _built() -> Path:
    source = HERE / "sim.cpp"
    about = hashlib.sha256(source.read_bytes() + f"{torch.__version__} {sys.version}".encode()).hexdigest()[:12]
    library = HERE / "build" / f"sim-{about}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        folder = Path(torch.__file__).parent / "lib"
        headers = folder.with_name("include")
        with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so") as part:  # two processes may build at once
            includes = [f"-isystem{path}" for path in (headers, headers / "torch" / "csrc" / "api" / "include")]
            libraries = [f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder}"]
            command = ["c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", *includes, str(source), "-o", part.name, *libraries]
            subprocess.run(command, check=True)
            shutil.copy(part.name, library.with_suffix(".part"))
            library.with_suffix(".part").replace(library)
    return library


# ---- torch.cuda's words --------------------------------------------------------------------------------------------------------


def _index(device: Any, optional: bool = True) -> int:
    """As torch.cuda._utils._get_device_index: a device without an index is the current one only where that is ``optional``."""
    if isinstance(device, int):
        return device
    if device is None:
        return current_device()
    device = torch.device(device)
    if device.type != "sim":
        raise ValueError(f"Expected a sim device, but got: {device}")
    if device.index is None:
        if not optional:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got: {device}")
        return current_device()
    return int(device.index)


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def init() -> None: ...


def device_count() -> int:
    return int(_library.sim_count())


def current_device() -> int:
    return int(_library.sim_current())


def set_device(device: Any) -> None:
    _library.sim_set_current(_index(device))


def synchronize(device: Any = None) -> None: ...


def empty_cache() -> None:
    _library.sim_release()


def memory_allocated(device: Any = None) -> int:
    return int(_library.sim_allocated(_index(device)))


def memory_reserved(device: Any = None) -> int:
    return int(_library.sim_reserved(_index(device)))


def max_memory_allocated(device: Any = None) -> int:
    return int(_library.sim_most_allocated(_index(device)))


def max_memory_reserved(device: Any = None) -> int:
    return int(_library.sim_most_reserved(_index(device)))


def memory_stats_as_nested_dict(device: Any = None) -> dict[str, Any]:
    figures = {"current": memory_allocated(device), "peak": max_memory_allocated(device)}
    return {"allocated_bytes": {"all": figures}}


def reset_peak_memory_stats(device: Any = None) -> None:
    _library.sim_forget_peak(_index(device))


def mem_get_info(device: Any = None) -> tuple[int, int]:
    index = _index(device)
    total = int(_library.sim_total(index))
    return total - int(_library.sim_used(index)), total


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    index = _index(device, optional=device is None)
    if not isinstance(fraction, float):
        raise TypeError("Invalid type for fraction argument, must be `float`")
    if fraction < 0 or fraction > 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    _library.sim_limit(index, int(fraction * int(_library.sim_total(index))))


def get_device_properties(device: Any = None) -> Any:
    return SimpleNamespace(name="sim", total_memory=int(_library.sim_total(_index(device))))


def get_device_name(device: Any = None) -> str:
    return "sim"


def get_rng_state(device: Any = "sim") -> torch.Tensor:
    index = _index(device)
    state = torch.empty(int(_library.sim_state(index, None)), dtype=torch.uint8)
    _library.sim_state(index, ctypes.c_void_p(state.data_ptr()))
    return state


def set_rng_state(new_state: torch.Tensor, device: Any = "sim") -> None:
    _library.sim_set_state(_index(device), ctypes.c_void_p(new_state.data_ptr()))


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _library.sim_seed(index, seed)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


@contextmanager
def device(device: Any) -> Iterator[None]:
    """While open, ``device`` is the current one."""
    before = current_device()
    set_device(device)
    try:
        yield
    finally:
        set_device(before)


# ---- what a GPU does not let one set -------------------------------------------------------------------------------------------


def others(count: int, index: int = 0) -> None:
    """So many bytes of the device belong to other programs from now on."""
    _library.sim_others(index, count)


def fail(after: int, index: int = 0) -> None:
    """The allocation after ``after`` others fails; -1: none does."""
    _library.sim_fail(index, after)


def allocations(index: int = 0) -> int:
    """How many there have been."""
    return int(_library.sim_allocations(index))

"""The machine: which device, what precision it is fast at, and giving memory back to it."""

import ctypes
import sys

import torch

from frugan.errors import UserError


def choose(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first of cuda, mps and cpu that is there.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: there is no such device here; use cpu, or auto to take the best there is.") from None
    return device


def fast_precision(device: torch.device) -> str:
    """What ``--precision auto`` means on ``device``: bf16 or fp16 where the hardware computes in it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        return "bf16"
    return "fp32"


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
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            pass  # another C library, which has no such call

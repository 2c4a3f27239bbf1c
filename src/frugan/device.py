"""The machine: which device, and what precision it is fast at."""

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

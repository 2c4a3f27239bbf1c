"""PyTorch/XLA, for TPUs: operators are only noted down, until `run` has the device compute all of them as one program.

A program is compiled the first time that it is met, which takes seconds; it is met again where the same operators come in the same
order, on tensors of the same shapes. Run on XLA's own CPU device; unrun on a TPU.
"""

from typing import Any

import torch

from frugan.utils.errors import UserError


def begin(name: str) -> torch.device:
    """The device called ``name``: ``xla``, or with a number.

    Raises:
        UserError: PyTorch/XLA is not installed, or not for this torch, or has no such device.
    """
    try:
        import torch_xla
    except ImportError:  # an undefined symbol, where it was built for another torch
        raise UserError(
            f"--device {name} needs torch_xla, made for the torch that is installed, which is {torch.__version__}: "
            "pip install 'frugan[tpu]' brings both."
        ) from None
    index = name.partition(":")[2]
    try:
        device: torch.device = torch_xla.device(int(index) if index else None)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"--device {name}: there is no such device here ({reason}); use xla, cpu, or auto to take the best there is."
        ) from None
    try:
        torch.ones(1, device=device, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError:  # of autograd, which has begun a thread for each device that there was at its first backward
        raise UserError(
            f"--device {name}: gradients were computed in this process before it met XLA; train there first, or in another process."
        ) from None
    return device


def run(*, wait: bool = False) -> None:
    """Has the device compute all that was noted down; goes on meanwhile, unless it shall ``wait``."""
    import torch_xla

    torch_xla.sync(wait=wait)


def is_tpu() -> bool:
    """Whether the device is a TPU, whose arithmetic is bf16."""
    import torch_xla.runtime

    return bool(torch_xla.runtime.device_type() == "TPU")


def memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of ``device`` in use, and all that it has; None where it does not say, as XLA's CPU device."""
    import torch_xla.core.xla_model

    try:
        found: Any = torch_xla.core.xla_model.get_memory_info(device)
        return int(found["bytes_used"]), int(found["bytes_limit"])
    except (RuntimeError, KeyError):
        return None

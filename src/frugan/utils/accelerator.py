"""The memory of one accelerator, in the words that ``torch.cuda`` and other backends share (`torch.get_device_module`).

Run on a simulated device in the test suite; what only CUDA or Metal can tell is unrun but for ``make gpu`` (docs/gpu.md).
"""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from frugan.utils import xla

MPS_SHARE = 1.7  # of what Metal recommends: torch's own limit (PYTORCH_MPS_HIGH_WATERMARK_RATIO)
_others: dict[torch.device, int] = {}  # bytes in use on a device before this process began with it


class Accelerator:
    """One device that is not the CPU.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.words: Any = torch.get_device_module(device)

    @property
    def can_be_limited(self) -> bool:
        """Whether `limit` can hold a budget."""
        return hasattr(self.words, "set_per_process_memory_fraction") and hasattr(self.words, "mem_get_info")

    def allocated(self) -> int:
        """Bytes of tensors."""
        return int(self.words.memory_allocated(self.device))

    def reserved(self) -> int:
        """Bytes that torch's allocator has taken, for tensors and to be used again."""
        return int(self.words.memory_reserved(self.device))

    def most_allocated(self) -> int:
        """The most `allocated` since `forget_peak`."""
        return int(self.words.max_memory_allocated(self.device))

    def most_reserved(self) -> int | None:
        """The most `reserved` since `forget_peak`; None if nobody says."""
        return int(self.words.max_memory_reserved(self.device))

    def forget_peak(self) -> None:
        """Begins `most_allocated` and `most_reserved` anew."""
        self.words.reset_peak_memory_stats(self.device)

    def besides(self) -> int:
        """Bytes that the most `allocated` since `forget_peak` is above what is allocated now."""
        # One question in place of two, each of which sorts a hundred figures.
        found = self.words.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]
        return int(found["peak"] - found["current"])

    def free(self) -> int:
        """Bytes that nobody has taken."""
        return int(self.words.mem_get_info(self.device)[0])

    def total(self) -> int:
        """Bytes of memory that the device has."""
        return int(self.words.mem_get_info(self.device)[1])

    def release(self) -> None:
        """Gives reserved memory without tensors in it back."""
        self.words.empty_cache()

    def wait(self) -> None:
        """Waits until everything asked of the device is done."""
        self.words.synchronize(self.device)

    def generator(self) -> Tensor | None:
        """The state of torch's global generator of the device; None where it has none."""
        return self.words.get_rng_state(self.device) if hasattr(self.words, "get_rng_state") else None

    def set_generator(self, state: Tensor) -> None:
        """Sets what `generator` gave."""
        self.words.set_rng_state(state, self.device)

    def meet(self) -> None:
        """Notes what other programs hold, before this one takes anything."""
        if self.device in _others:
            return
        if self.device.type != "cuda":
            if self.can_be_limited and not self.reserved():
                _others[self.device] = self.total() - self.free()
            return
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # too late: this process holds something already
            return
        if (handle := _nvml(self.device)) is not None:
            import pynvml

            # The second version leaves out what the driver reserves for itself, as CUDA's own figure of all there is does.
            _others[self.device] = int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)

    def context(self) -> int:
        """Bytes that this process holds outside torch's allocator: the driver's context and loaded kernels.

        By what the driver says of this process; where it does not know the process (in containers), by what is in use beyond what
        was before it began; and where that is not known either, all that is in use, other programs' too: rather too much.
        """
        if (own := self._of_process()) is not None:
            return max(0, own - self.reserved())
        return max(0, self.total() - self.free() - self.reserved() - _others.get(self.device, 0))

    def limit(self, count: int | None) -> None:
        """Refuses this process more than ``count`` bytes, the context counted; None: no limit.

        Raises:
            ValueError: of torch, for a device without an index.
        """
        share = 1.0 if count is None else max(0.0, count - self.context()) / self.total()
        self.words.set_per_process_memory_fraction(min(1.0, share), self.device)

    def _of_process(self) -> int | None:
        if self.device.type != "cuda" or (handle := _nvml(self.device)) is None:
            return None
        import pynvml

        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except pynvml.NVMLError:
            return None
        return next((int(p.usedGpuMemory) for p in processes if p.pid == os.getpid() and p.usedGpuMemory), None)


class Unpeaked(Accelerator):
    """A device that keeps no peak, and does not tell what is its own from what is others'."""

    def most_allocated(self) -> int:
        """Bytes of tensors now: there is no peak."""
        return self.allocated()

    def most_reserved(self) -> int | None:
        """None: there is no peak."""
        return None

    def forget_peak(self) -> None:
        """Does nothing: there is no peak."""

    def besides(self) -> int:
        """0: there is no peak."""
        return 0

    def meet(self) -> None:
        """Does nothing: other processes' memory is not counted."""

    def context(self) -> int:
        """None beside what is reserved."""
        return 0


class Metal(Unpeaked):
    """Apple's MPS, whose memory is the machine's. Unrun."""

    @property
    def can_be_limited(self) -> bool:
        """True: torch has a limit for it."""
        return True

    def allocated(self) -> int:
        """Bytes of tensors."""
        return int(torch.mps.current_allocated_memory())

    def reserved(self) -> int:
        """Bytes that Metal has taken."""
        return int(torch.mps.driver_allocated_memory())

    def free(self) -> int:
        """Bytes up to what Metal recommends."""
        return max(0, self.total() - self.reserved())

    def total(self) -> int:
        """Bytes that Metal recommends to use at most."""
        return int(torch.mps.recommended_max_memory())

    def wait(self) -> None:
        """Waits until everything asked of the device is done."""
        torch.mps.synchronize()

    def generator(self) -> Tensor:
        """The state of torch's global generator."""
        return torch.mps.get_rng_state()

    def set_generator(self, state: Tensor) -> None:
        """Sets what `generator` gave."""
        torch.mps.set_rng_state(state)

    def limit(self, count: int | None) -> None:
        """Refuses this process more than ``count`` bytes; None: torch's own limit."""
        torch.mps.set_per_process_memory_fraction(MPS_SHARE if count is None else min(count / self.total(), MPS_SHARE))


class Xla(Unpeaked):
    """A device of PyTorch/XLA. Its compiler decides what programs hold, which nobody knows before, and no limit is held."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def can_be_limited(self) -> bool:
        """False: XLA has no limit that a process could set."""
        return False

    def allocated(self) -> int:
        """Bytes in use; 0 if the device does not say."""
        return (xla.memory(self.device) or (0, 0))[0]

    def reserved(self) -> int:
        """The same: XLA keeps nothing that could be told apart."""
        return self.allocated()

    def free(self) -> int:
        """Bytes that nobody has taken; 0 if the device does not say."""
        return self.total() - self.allocated()

    def total(self) -> int:
        """Bytes of memory that the device has; 0 if it does not say."""
        return (xla.memory(self.device) or (0, 0))[1]

    def release(self) -> None:
        """Does nothing: XLA decides."""

    def wait(self) -> None:
        """Waits until everything asked of the device is done."""
        xla.run(wait=True)

    def generator(self) -> None:
        """None: nothing draws there."""


def accelerator(device: torch.device) -> Accelerator | None:
    """The memory of ``device``; None for the CPU, and for devices without memory."""
    if device.type in ("cpu", "meta"):
        return None
    kind = {"mps": Metal, "xla": Xla}.get(device.type, Accelerator)
    return kind(device)


def _nvml(device: torch.device) -> Any:
    """The driver's own handle of a CUDA device, or None where there is no driver."""
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    uuid = str(torch.cuda.get_device_properties(device).uuid) if begun else ""
    return _handle(device.index or 0, f"GPU-{uuid}" if uuid else "")


@cache
def _handle(index: int, uuid: str) -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        if not uuid:  # without CUDA's help: as CUDA_VISIBLE_DEVICES numbers them
            name = [*os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","), *[""] * (index + 1)][index].strip()
            if not name or name.isdigit():
                return pynvml.nvmlDeviceGetHandleByIndex(int(name or index))
            uuid = name
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None

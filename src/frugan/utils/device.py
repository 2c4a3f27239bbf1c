"""The machine: which device, and what arithmetic it does."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from frugan.utils import xla
from frugan.utils.accelerator import accelerator
from frugan.utils.errors import UserError
from frugan.utils.threads import apart as apart


def choose(name: str) -> torch.device:
    """The device called ``name``, with its index; ``auto`` is the first of cuda, xpu, mps and cpu that is there.

    Raises:
        UserError: no such device on this machine, or none that this torch can use.
    """
    if name == "auto":
        there = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
        name = next((kind for kind, words in there.items() if words.is_available()), "cpu")
    if name.partition(":")[0] == "xla":
        return xla.begin(name)
    shown = name or "''"
    missing = UserError(f"--device {shown}: there is no such device here; use cpu, or auto to take the best there is.")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise missing from None
    if device.type == "meta" or (device.type == "cpu" and device.index):  # torch would take both
        raise missing
    if device.type == "cuda" and not (torch.version.cuda or torch.version.hip):
        raise UserError(f"--device {name}: torch {torch.__version__} is built without CUDA; install one that has it, or use cpu.")
    try:
        if device.type != "cpu" and ":" not in name:
            # CUDA is not asked which is current before `meet` has looked, as that would begin with it: until then it is the first.
            begun = device.type != "cuda" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            asked = begun and device.type != "mps"
            device = torch.device(device.type, torch.get_device_module(device).current_device() if asked else 0)
        if memory := accelerator(device):
            memory.meet()
        device = torch.empty(1, device=device).device
    except torch.OutOfMemoryError:
        raise UserError(f"--device {name}: other programs have taken all of its memory; close some of them, or use cpu.") from None
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError) as error:
        if "out of memory" in str(error):  # CUDA's own words, where not even its context has room
            raise UserError(f"--device {name}: other programs have taken its memory; close some of them, or use cpu.") from None
        raise missing from None
    if device.type == "cuda" and torch.version.cuda:
        capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
        if not runs_on(capability, built_for):
            raise UserError(
                f"--device {name}: torch {torch.__version__} is not built for {torch.cuda.get_device_name(device)} (compute "
                f"capability {capability[0]}.{capability[1]}, it has {', '.join(built_for)}); install a torch that is, or use cpu."
            )
    if device.type == "cuda":  # cuBLAS warns where it is the first thing that a thread does, as it would be in backward's
        (torch.empty(1, device=device, requires_grad=True) * 1).backward()  # type: ignore[no-untyped-call]
    return device


def runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a GPU of ``capability`` runs something of what torch was built for (`torch.cuda.get_arch_list`).

    ``sm_`` is code for its own generation, from that minor version on, and with a letter for that one GPU alone (``a``) or its
    family (``f``); ``compute_`` is compiled anew for any later GPU.
    """
    for kind, digits, letter in re.findall(r"(sm|compute)_(\d+)([af]?)", " ".join(built_for)):
        made_for = divmod(int(digits), 10)
        if letter == "a":
            fits = capability == made_for
        elif kind == "compute" and not letter:
            fits = capability >= made_for
        else:
            fits = capability[0] == made_for[0] and capability[1] >= made_for[1]
        if fits:
            return True
    return False


def fast_precision(device: torch.device) -> str:
    """What ``--precision auto`` means on ``device``: bf16 or fp16 where the hardware computes in it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "xla":
        return "bf16" if xla.is_tpu() else "fp32"
    if device.type == "xpu":  # unrun
        return "bf16" if torch.xpu.is_bf16_supported() else "fp32"
    if device.type == "cpu":
        said: Any = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.9 does not say
        return "bf16" if said().get("avx512_bf16") else "fp32"
    return "fp32"


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """While open, products in single precision are as ``precision`` says: TF32 (10 bits of mantissa) for ``tf32``, whole otherwise;
    convolutions give the same bits each time, and products of half precision are added up in single precision.

    torch by itself lets convolutions round to TF32 on GPUs that have it (Ampere and later), cuDNN add up in any order, and cuBLAS
    round sums of parts of a product.

    Raises:
        UserError: TF32 on a device that has none.
    """
    has = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not has:
        raise UserError(f"--precision tf32 is of NVIDIA GPUs from Ampere on, and {device} has none: use fp32, or bf16.")
    matmul = torch.backends.cuda.matmul
    places = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, matmul]  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    repeats = torch.backends.cudnn.deterministic
    sums = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    for place in places:
        place.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = repeats
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = sums
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value

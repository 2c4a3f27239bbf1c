"""Whole training states on disk: one safetensors file each, written atomically and verified when read.

The file holds the tensors; its header holds everything else as JSON, and a SHA-256 of both, so that a file that was cut
short or edited is told from a good one. It is written here and not by the library, which would hold two copies of the whole
state in memory while it writes; the library reads it.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from frugan.utils.errors import UserError
from frugan.utils.files import whole

Tensors = dict[str, Tensor]
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes ``tensors`` and the JSON-able ``state`` to ``path``, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(state)
    header: dict[str, Any] = {"__metadata__": {"state": text, "sha256": _digest(tensors, text)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with whole(path) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """What `save` wrote: tensors on the CPU, and the state.

    Raises:
        UserError: there is no such file, or it is not as it was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read, it may be cut short: {error}.") from None
    text = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise UserError(f"{path} is not as it was written: its checksum differs.")
    return tensors, json.loads(text)


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("images_*.safetensors"))


def path_for(folder: Path, images: int) -> Path:
    """The file of the checkpoint after ``images`` images."""
    return folder / f"images_{images:012d}.safetensors"


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints."""
    for path in all_in(folder)[:-keep]:
        path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The values of one tensor, in order; a copy of this one alone where it lies otherwise in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

"""Whole training states on disk: one safetensors file each, written atomically and verified when read.

The file holds the tensors; its header holds everything else as JSON, and a SHA-256 of both, so that a file that was cut
short or edited is told from a good one.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from frugan.errors import UserError
from frugan.files import whole

Tensors = dict[str, Tensor]


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes ``tensors`` and the JSON-able ``state`` to ``path``, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(state)
    with whole(path) as part:
        try:
            save_file(flat, part, metadata={"state": text, "sha256": _digest(flat, text)})
        except SafetensorError as error:
            raise OSError(str(error)) from None


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
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

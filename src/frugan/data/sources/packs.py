"""Packs as a source: images that were decoded, cropped and resized beforehand."""

from pathlib import Path

import numpy as np
from PIL import Image

from frugan.config.recipe import Data
from frugan.data.pack import Pack
from frugan.data.sources.base import Source
from frugan.utils.errors import UserError, counted


class PackSource(Source):
    """Images that are packed already."""

    unused = ("split", "background", "image_column", "label_column")

    def __init__(self, pack: Pack) -> None:
        manifest = pack.manifest
        self.pack = pack
        self.name, self.classes = manifest.name, manifest.classes
        self.size, self.grey = manifest.size, manifest.channels == 1
        self.place, self.stamp = str(pack.folder.absolute()), manifest.fingerprint
        if manifest.labelled:
            self.labels = pack.labels(np.arange(len(pack)))

    def __len__(self) -> int:
        return len(self.pack) if self.pack else 0

    def where(self, index: int) -> str:
        """Names image ``index`` by its number in the source."""
        return f"image {index} of {self.name}"

    def open(self, index: int, at_least: int) -> Image.Image:
        """Image ``index`` in mode L or RGB."""
        assert self.pack
        pixels = self.pack.read(np.array([index]))[0]
        return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def pack(data: Data) -> Source | None:
    """A folder that is a pack."""
    folder = Path(data.data)
    if not ((folder / "manifest.json").is_file() and (folder / "pixels.bin").is_file()):
        return None
    source = PackSource(Pack(folder))
    asked, there = (data.image_size, data.channels), (source.size, 1 if source.grey else 3)
    if any(a not in (None, b) for a, b in zip(asked, there, strict=True)):
        raise UserError(
            f"{folder} is packed as {there[0]}x{there[0]} with {counted(there[1], 'channel')}: leave --image-size and --channels "
            "out, or pack the images again."
        )
    return source

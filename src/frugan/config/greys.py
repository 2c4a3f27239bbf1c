"""Which images are grey and have labels, and how large they are, as far as names and the beginnings of files say.

That decides which recipe is the default, and so which flags there are: before torch is imported, and images are opened.
"""

import gzip
import json
import zlib
from contextlib import suppress
from pathlib import Path

from frugan.config.recipe import Data

NAMED = {"digits": 16, "mnist": 28, "fashion-mnist": 28, "fashionmnist": 28}  # data sets that `frugan.data.sources` knows by name
UNREADABLE = OSError, EOFError, ValueError, KeyError, TypeError, zlib.error  # said by who reads the images


def grey_size(data: Data) -> int | None:
    """Pixels a side at which ``data`` is trained on, if its images are known to be grey, square and labelled, else None.

    So it is of named data sets, and of IDX files and grey packs with labels.
    """
    if data.channels == 3:
        return None
    folder, size = Path(data.data), None
    with suppress(*UNREADABLE):
        if (folder / "pixels.bin").is_file():
            manifest = json.loads((folder / "manifest.json").read_bytes())
            size = int(manifest["size"]) if manifest["channels"] == 1 and manifest["labelled"] else None
        elif folder.is_dir() and data.data != "digits":  # which is that name, whatever lies here
            size = _of_idx(folder, data.split)
        else:
            size = NAMED.get(data.data.lower().replace("_", "-"))
    return size and (data.image_size or size)


def _of_idx(folder: Path, split: str) -> int | None:
    for path in folder.glob("*images?idx3*"):
        part = "test" if path.name.startswith(("t10k", "test")) else "train"
        if split in (part, "all") and [*folder.glob("*labels?idx1*")]:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                header = file.read(16)  # two zeros, type, dimensions; images, height, width
            return int.from_bytes(header[12:], "big") if header[8:12] == header[12:] else None
    return None

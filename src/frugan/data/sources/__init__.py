"""What ``--data`` may name: one file a kind of source.

Add a source by writing a file here with a function that takes the `Data` section and returns a `Source`, or None if what is asked
for is not its kind, and putting it into `OPENERS`.
"""

from collections.abc import Callable
from pathlib import Path

from frugan.config.recipe import Data
from frugan.data.sources.base import Source as Source
from frugan.data.sources.base import Tell as Tell
from frugan.data.sources.base import is_image, plain
from frugan.data.sources.files import archive, folder
from frugan.data.sources.idx import CLASSES, idx_files
from frugan.data.sources.packs import pack
from frugan.data.sources.standard import digits, named
from frugan.data.sources.streams import stream
from frugan.data.sources.tables import records
from frugan.data.sources.tars import tars
from frugan.utils.errors import UserError, nearest, nearest_path

# In this order: the first that knows the kind opens it.
OPENERS: list[Callable[[Data], Source | None]] = [digits, named, stream, pack, idx_files, archive, tars, records, folder]


def open_source(data: Data) -> Source:
    """The images that ``data`` names.

    Raises:
        UserError: they are not there, cannot be fetched, or are none; says what to do.
    """
    if not data.data.strip():
        raise UserError("the name of the data is empty: give a folder, a zip, or leave it out for the built-in digits.")
    path = Path(data.data)
    try:
        for opener in OPENERS:
            source = opener(data)
            if source is not None:
                if len(source) == 0:
                    raise UserError(f"{data.data} holds no images.")
                source.name = plain(source.name)  # which may come from a manifest or a URL, and becomes part of paths
                return source
        if path.exists():
            alone = f": name its folder, {path.parent}" if is_image(path.name) else ""
            raise UserError(f"{path} is neither a folder nor a zip of images{alone}.")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    if any(c in path.name for c in "*?[") and path.parent.is_dir():
        raise UserError(f"patterns such as {path} are for tars: name the folder of the images, {path.parent}.")
    if (near := nearest_path(path)) is not None:
        raise UserError(f"there is no folder or zip {path}: did you mean {str(near)!r}?")
    known = nearest(data.data, [*CLASSES, "digits"]) if path.parent == Path() else "check the path."
    raise UserError(f"there is no folder or zip {path}: {'check the path, or ' * known.startswith('choose')}{known}")

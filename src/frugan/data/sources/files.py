"""Image files in a folder or in a zip, flat or in folders, however deep."""

import os
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from frugan.config.recipe import Data
from frugan.data.sources.base import SUFFIXES, Entry, Source, by_folder, is_image, loaded, outside, shown, stamp_of
from frugan.utils.errors import UserError, counted


class FileSource(Source):
    """Image files by path, in a folder or in a zip.

    The class of a file is the first folder in which the paths differ; files beside such folders mean that there are no classes.
    """

    unused = ("split", "image_column", "label_column")

    def __init__(self, root: Path, entries: list[Entry], archive: zipfile.ZipFile | None) -> None:
        self.root = root
        self.name = root.stem if archive else root.absolute().name
        self.place = str(root.absolute())
        self.stamp = stamp_of(entries)
        self.paths = paths = [entry[0] for entry in entries]
        self.archive = archive

        self.classes, self.labels, self.unlabelled = by_folder(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, index: int) -> str:
        """The path of image ``index``, on one line."""
        return shown(self.paths[index])

    def open(self, index: int, at_least: int) -> Image.Image:
        """Image ``index`` with its pixels read; a JPEG is decoded at the least scale that is large enough."""
        path = self.paths[index]
        if self.archive:
            return loaded(self.archive.open(path), at_least)
        mode = (self.root / path).stat().st_mode
        if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
            raise ValueError("not a file of bytes")
        return loaded(self.root / path, at_least)


def archive(data: Data) -> Source | None:
    """A zip of images, flat or in folders."""
    path = Path(data.data)
    if not path.is_file() or path.suffix.lower() != ".zip":
        return None
    try:
        opened = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the zip {path}: {error}; it may be cut short, fetch it again.") from None
    entries = [(e.filename, e.file_size, e.CRC) for e in opened.infolist() if not e.is_dir()]
    out = {name for name, *_ in entries if outside(name)}
    problems = [f"{shown(name)} in {path} points out of it: left out." for name, *_ in entries if name in out]
    return _files(path, [entry for entry in entries if entry[0] not in out], opened, problems)


def folder(data: Data) -> Source | None:
    """A folder of images, flat or in folders, however deep."""
    root = Path(data.data)
    if not root.is_dir():
        return None
    os.scandir(root).close()  # says if it may not be read, which walking does not
    entries: list[Entry] = []
    seen, problems = set(), []

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename} may not be read ({error.strerror}): left out.")

    for parent, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        if real in seen or {"recipe.toml", "plan.json"} <= set(names):  # a link in a circle, or a run whose pictures are no data
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(parent, name)
            about = path.stat() if path.exists() else None
            entries.append((path.relative_to(root).as_posix(), *((about.st_size, about.st_mtime_ns) if about else (-1, 0))))
    return _files(root, entries, None, problems)


def _files(root: Path, entries: list[Entry], opened: zipfile.ZipFile | None, problems: Sequence[str] = ()) -> Source:
    """The images among ``entries``, in the order of their names."""
    images = sorted(entry for entry in entries if is_image(entry[0]))
    if not images:
        kinds = ", ".join(sorted(s[1:] for s in SUFFIXES))
        raise UserError(f"no images found in {root}, among {counted(len(entries), 'file')}: an image is {kinds}.")
    source = FileSource(root, images, opened)
    source.problems = problems
    return source

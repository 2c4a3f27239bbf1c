"""Tar shards in WebDataset's layout."""

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Self

from PIL import Image

from frugan.config.recipe import Data
from frugan.data.sources.base import Source, by_folder, by_name, is_image, loaded, outside, shown, stamp_of
from frugan.utils.errors import UserError, counted


@dataclass(slots=True)
class Member:
    """An image file in a tar: of which shard, where its bytes are, and the name of its sample."""

    shard: int
    begin: int
    length: int
    path: str


SAYING = (".cls", ".json")  # members that say the class of the image of the same name


class _Header(tarfile.TarInfo):
    """A header that tells its archive whether it is the mark of the end: `tarfile` takes a cut for one."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """The next header."""
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(archive, Archive):
                archive.whole = type(error).__name__ == "EOFHeaderError"
            raise


class Archive(tarfile.TarFile):
    """A tar that keeps nothing of what was read, which would grow with the data, and knows whether it was read to its end."""

    tarinfo = _Header
    whole = False

    def next(self) -> tarfile.TarInfo | None:
        """The next member."""
        member = super().next()
        self.members.clear()  # type: ignore[attr-defined]
        return member


class TarSource(Source):
    """Images in tar files, by their place in them; nothing is unpacked.

    The class of an image stands in a ``.cls`` or ``.json`` (``{"label": ...}``) member of the same name, else the folders say.

    Raises:
        UserError: there are no images in them.
    """

    unused = ("split", "image_column")

    def __init__(self, name: str, place: str, shards: Sequence[Path], label: str | None, missing: Sequence[str] = ()) -> None:
        self.name, self.place = name, place
        self.shards = shards
        problems = [f"{shard} is missing." for shard in missing]
        self.members: list[Member] = []
        said: dict[tuple[int, str], str] = {}
        for number, shard in enumerate(shards):
            self._scan(number, shard, said, label or "label", problems)
        if not self.members:
            raise UserError(" ".join(problems) or f"{place} holds no images.")
        self.problems = problems
        self.stamp = stamp_of((str(s), (about := s.stat()).st_size, about.st_mtime_ns) for s in shards)
        values = [said.get((m.shard, key_of(m.path))) for m in self.members]
        found = by_name(values, lambda i: f"{self.where(i)} has none, as {values.count(None):,} of {len(values):,} images")
        if found.labels is None:
            folders = by_folder([m.path for m in self.members])
            found = folders if folders.labels is not None or not found.unlabelled else found
        self.classes, self.labels, self.unlabelled = found

    def _scan(self, number: int, shard: Path, said: dict[tuple[int, str], str], label: str, problems: list[str]) -> None:
        length, before = shard.stat().st_size, len(self.members)
        try:
            with Archive.open(shard, "r:") as archive:
                while (member := archive.next()) is not None:
                    path = PurePosixPath(member.name)
                    if outside(member.name) or member.issym() or member.islnk():
                        problems.append(f"{shown(member.name)} in {shard} points out of it: left out.")
                    elif not member.isfile():
                        continue
                    elif member.offset_data + member.size > length:
                        raise tarfile.ReadError
                    elif path.suffix in SAYING and (value := label_in(archive, member, label)) is not None:
                        said[number, key_of(member.name)] = value
                    elif is_image(member.name):
                        self.members.append(Member(number, member.offset_data, member.size, member.name))
                if not archive.whole:
                    raise tarfile.ReadError
        except tarfile.TarError as error:
            here = len(self.members) - before
            if here or _is_tar(shard):
                problems.append(
                    f"{shard} is cut short: {counted(here, 'image')} before the cut can be used; fetch it again for the rest."
                )
            else:
                why = error or "it is empty"
                problems.append(f"cannot read the tar {shard} ({why}): unpack it if it is compressed, else fetch it again.")

    def __len__(self) -> int:
        return len(self.members)

    def where(self, index: int) -> str:
        """Its shard and its path there."""
        member = self.members[index]
        return shown(f"{self.shards[member.shard].name}/{member.path}")

    def open(self, index: int, at_least: int) -> Image.Image:
        """Image ``index`` with its pixels read."""
        member = self.members[index]
        with self.shards[member.shard].open("rb") as file:
            file.seek(member.begin)
            return loaded(BytesIO(file.read(member.length)), at_least)


def key_of(path: str) -> str:
    """The name of a sample: a path up to the first dot of its last part."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def label_in(archive: tarfile.TarFile, member: tarfile.TarInfo, label: str) -> str | None:
    """What a ``.cls`` or ``.json`` member says is the class, under ``label`` if it is JSON; None if nothing."""
    file = archive.extractfile(member)
    text = file.read().decode(errors="replace").strip() if file else ""
    if PurePosixPath(member.name).suffix == ".cls":
        return text or None
    try:
        value = json.loads(text).get(label)
    except (ValueError, AttributeError):
        return None
    return None if value is None else str(value)


def _is_tar(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(512)[257:262] == b"ustar"


def braced(text: str) -> list[str] | None:
    """``a-{00..11}.tar`` as the names it stands for, or None if it is no such thing."""
    if not (found := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", text)):
        return None
    before, first, last, after = found.groups()
    return [f"{before}{i:0{len(first)}}{after}" for i in range(int(first), int(last) + 1)]


def tars(data: Data) -> Source | None:
    """A tar, a folder of tars, or tars by a pattern: ``train-*.tar``, ``train-{000..099}.tar``."""
    path = Path(data.data)
    missing: list[str] = []
    if path.is_dir():
        shards = sorted(p for p in path.iterdir() if p.suffix == ".tar")
        if not shards or any(is_image(p.name) for p in path.iterdir()):
            return None
    elif path.suffix == ".tar" and (numbered := braced(data.data)) is not None:
        named = [Path(name) for name in numbered]
        shards = [p for p in named if p.is_file()]
        missing = [str(p) for p in named if not p.is_file()]
        if not shards:
            raise UserError(f"none of the {len(named)} shards {data.data} is there: check the path.")
    elif any(c in data.data for c in "*?[") and path.suffix == ".tar":
        shards = sorted(path.parent.glob(path.name))
        if not shards:
            raise UserError(f"no file fits {data.data}: check the pattern.")
    elif path.is_file() and path.suffix == ".tar":
        shards = [path]
    elif path.is_file() and re.search(r"\.(tgz|tar\.\w+)$", path.name):
        raise UserError(
            f"{path} is compressed, which images gain nothing by and which makes them slow to reach: unpack it to a .tar."
        )
    else:
        return None
    name = path.name if path.is_dir() else re.sub(r"[-_.]?[*?{\[].*$", "", path.name) or path.parent.absolute().name
    return TarSource(name.removesuffix(".tar"), str(path.absolute()), shards, data.label_column, missing)

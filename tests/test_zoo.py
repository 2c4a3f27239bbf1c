"""Files of every bad kind: each is named with its reason, and training goes on with the rest."""

import http.server
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from frugan.config.recipe import Data
from frugan.data.opening import resolve
from frugan.data.pack_loader import PackLoader
from frugan.data.sources import open_source
from frugan.data.sources.streams import ShardSource
from frugan.data.stream_loader import StreamLoader
from frugan.utils.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(buffer, kind, **options)
    return buffer.getvalue()


def cut(kind: str, share: float = 0.5) -> bytes:
    whole = encoded(kind)
    return whole[: int(len(whole) * share)]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int = 8, colour: int = 0, body: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def with_text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * (70 << 20), zip=True)
    return encoded("PNG", pnginfo=info)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


NOTHING = "not an image, or empty"
# Name of the file: its bytes, and what is said of it.
BAD: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", NOTHING),
    "empty.jpg": (b"", NOTHING),
    "text.png": (b"this is no image", NOTHING),
    "html.jpg": (b"<!doctype html><title>404</title>", NOTHING),
    "drawing.svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NOTHING),
    "zeros.png": (bytes(1000), NOTHING),
    "video.gif": (b"\x00\x00\x00\x18ftypmp42" + bytes(100), NOTHING),
    "document.tif": (b"%PDF-1.7" + bytes(100), NOTHING),
    "archive.webp": (b"PK\x03\x04" + bytes(100), NOTHING),
    "pickle.bmp": (b"\x80\x04\x95" + bytes(50), NOTHING),
    "signature_alone.png": (b"\x89PNG\r\n\x1a\n", NOTHING),
    "marker_alone.jpg": (b"\xff\xd8", NOTHING),
    "header_alone.jpg": (encoded("JPEG")[:100], "."),
    "cut.jpg": (cut("JPEG"), "truncated"),
    "cut.png": (cut("PNG"), "truncated|incomplete"),
    "cut.gif": (cut("GIF"), "truncated|not processed"),
    "cut.webp": (cut("WEBP"), "."),
    "cut.bmp": (cut("BMP"), "truncated"),
    "cut.tif": (cut("TIFF"), "."),
    "cut_header.bmp": (cut("BMP", 0.002), NOTHING + "|."),
    "end_lost.jpg": (encoded("JPEG")[:-100], "truncated"),
    "wrong_check.png": (flipped(encoded("PNG"), 20), "broken|CRC|checksum|" + NOTHING),
    "wrong_data.png": (flipped(encoded("PNG"), 200), "broken|data|CRC|checksum"),
    "no_width.png": (png(0, 10), "."),
    "no_pixels.png": (png(10, 10), "."),
    "wrong_depth.png": (png(10, 10, depth=7), NOTHING + "|."),
    "bomb.png": (png(60_000, 60_000, body=bytes(1000)), "decompression bomb|exceeds limit"),
    "wide_bomb.png": (png(2_000_000_000, 2, body=bytes(1000)), "decompression bomb|exceeds limit"),
    "text_bomb.png": (with_text_bomb(), "too large|limit"),
    "raw.tiff": (b"II*\x00\x08\x00\x00\x00\x00\x00", "."),
    "loop.tiff": (b"II*\x00\x08\x00\x00\x00" + b"\x01\x00" + bytes(12) + b"\x08\x00\x00\x00", "."),
    "huge.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0), "."),
}  # fmt: skip


def odd() -> dict[str, bytes]:
    """Kinds that are unusual, and can be read."""
    frames = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]
    palette = Image.fromarray(NOISE).quantize(16)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "misnamed.jpg": encoded("PNG"),
        "animated.gif": encoded("GIF", save_all=True, append_images=frames),
        "animated.png": encoded("PNG", save_all=True, append_images=frames),
        "animated.webp": encoded("WEBP", save_all=True, append_images=frames),
        "cmyk.jpg": encoded("JPEG", Image.fromarray(NOISE).convert("CMYK")),
        "deep.png": encoded("PNG", Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)),
        "float.tiff": encoded("TIFF", Image.fromarray(NOISE[..., 0].astype(np.float32) / 255)),
        "palette.png": encoded("PNG", palette, transparency=3),
        "bits.png": encoded("PNG", Image.fromarray(NOISE[..., 0]).convert("1")),
        "layers.png": encoded("PNG", Image.fromarray(NOISE).convert("RGBA")),
        "grey_alpha.png": encoded("PNG", Image.fromarray(NOISE[..., 0]).convert("LA")),
        "one_pixel.png": encoded("PNG", Image.fromarray(NOISE[:1, :1])),
        "wide.png": encoded("PNG", Image.new("RGB", (30_000, 20), "red")),
        "tall.jpg": encoded("JPEG", Image.new("RGB", (3, 30_000), "blue")),
        "rotated.jpg": encoded("JPEG", exif=rotated),
        "wrong_exif.jpg": encoded("JPEG", exif=b"Exif\x00\x00" + b"II*\x00" + b"\xff" * 40),
        "日本語 العربية 🦀.png": encoded("PNG"),
        "white space\tand\nlines.png": encoded("PNG"),
    }


def loaded(data: Path | str, **settings: object) -> tuple[PackLoader, list[str]]:
    said: list[str] = []
    wanted = Data(data=str(data), image_size=16, channels=3, **settings)
    source = open_source(wanted)
    return PackLoader(source, resolve(source, wanted, said.append), seed=0, workers=2, tell=said.append), said


def as_folder(root: Path, files: dict[str, bytes]) -> Path:
    root.mkdir(parents=True)
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


def write_table(table: Any, path: Path) -> None:
    """As parquet, with its cells as they are: datasets itself would put the files into them."""
    from pyarrow import parquet

    schema = table.data.table.schema.with_metadata(table.features.arrow_schema.metadata)
    parquet.write_table(table.data.table.cast(schema), path)


def as_zip(root: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return root.with_suffix(".zip")


def as_tar(root: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(root.with_suffix(".tar"), "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return root.with_suffix(".tar")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # what Pillow says of one that can be read
@pytest.mark.parametrize("pack_up", [as_folder, as_zip, as_tar])
def test_every_bad_file_is_named_with_its_reason(pack_up: Callable[..., Path], tmp_path: Path) -> None:
    assert len(BAD) >= 30
    good = odd()
    files = good | {name: content for name, (content, _) in BAD.items()}
    loader, said = loaded(pack_up(tmp_path / "zoo", files))
    assert len(loader) == len(good), said
    assert f"{len(BAD)} of {len(files)} images were skipped." in said
    for name, (_, reason) in BAD.items():
        lines = [line for line in said if line.startswith("Skipped") and re.search(rf"[ /]{re.escape(name)}:", line)]
        assert len(lines) == 1, (name, said)
        assert re.search(reason, lines[0].split(":", 1)[1]), lines
        assert "\n" not in lines[0]
        assert lines[0].endswith(".")
    assert not any(name in line for name in good for line in said if line.startswith("Skipped"))


@pytest.mark.filterwarnings("ignore")  # Pillow says of its own that a file is cut short
def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "zoo", {"good.png": encoded("PNG")})
    (root / "broken_link.png").symlink_to(tmp_path / "nowhere.png")
    (root / "round_link.png").symlink_to(root / "round_link.png")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(root / "socket.png"))
    with listening:
        loader, said = loaded(root)
    assert len(loader) == 1
    for name, reason in (
        ("broken_link.png", "not there, or a link to what is not there"),
        ("round_link.png", "Too many levels"),
        ("pipe.png", "not a file of bytes"),
        ("socket.png", "not a file of bytes"),
    ):
        assert any(line.startswith(f"Skipped {name}") and reason in line for line in said), (name, said)


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "zoo", {"good.png": encoded("PNG"), "secret.png": encoded("PNG")})
    (root / "closed").mkdir()
    (root / "secret.png").chmod(0)
    (root / "closed").chmod(0)
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.test_zoo import loaded
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)  # root may read everything
loader, said = loaded({str(root)!r})
print(len(loader), *said, sep="\\n")
"""
    for parent in [tmp_path, *tmp_path.parents][:4]:
        parent.chmod(parent.stat().st_mode | 0o055)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    environment = os.environ | {"FRUGAN_CACHE": str(cache), "HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    (root / "closed").chmod(0o755)
    assert done.stdout.startswith("1\n"), done
    assert "closed may not be read (Permission denied): left out." in done.stdout
    assert "Skipped secret.png: Permission denied." in done.stdout


def test_archives_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    files = {f"{i}.png": encoded("PNG") for i in range(4)}
    archive = as_zip(tmp_path / "ways", files | {"../above.png": encoded("PNG"), "/root.png": encoded("PNG")})
    loader, said = loaded(archive)
    assert len(loader) == 4
    assert f"../above.png in {archive} points out of it: left out." in said
    tar = as_tar(tmp_path / "ways", files | {"../above.png": encoded("PNG")})
    with tarfile.open(tar, "a") as opened:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
    loader, said = loaded(tar)
    assert len(loader) == 4
    assert sum("points out of it: left out." in line for line in said) == 2

    whole = as_zip(tmp_path / "whole", files)
    content = whole.read_bytes()
    whole.write_bytes(flipped(content, content.index(b"IDAT") + 100))
    loader, said = loaded(whole)
    assert len(loader) == 3
    assert any("Bad CRC-32" in line for line in said)
    whole.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="may be cut short, fetch it again"):
        loaded(whole)


def test_names_in_archives_are_said_on_one_line(tmp_path: Path) -> None:
    evil = "a\nfrugan: all is well\x1b[2J.png"
    files = {"good.png": encoded("PNG"), evil: b"no image", f"../{evil}": encoded("PNG")}
    for archive in (as_zip(tmp_path / "ways", files), as_tar(tmp_path / "ways", files)):
        loader, said = loaded(archive)
        assert len(loader) == 1 and sum("all is well" in line for line in said) == 2
        assert all(line.isprintable() for line in said), said
    source, said = open_source(Data(data=str(as_tar(tmp_path / "stream", files)), stream=True)), list[str]()
    assert isinstance(source, ShardSource)
    StreamLoader(source.shards, Data(image_size=16, channels=3), seed=0, workers=1, tell=said.append).batch(0, 3)
    assert any("all is well" in line for line in said) and all(line.isprintable() for line in said), said


OUTSIDE = "outside the folder of the table: move the table above its images"


@pytest.mark.filterwarnings("ignore")  # of what datasets imports
@pytest.mark.parametrize("stream", [False, True])
def test_a_table_reads_no_file_outside_its_folder(stream: bool, tmp_path: Path) -> None:
    import datasets

    root = as_folder(tmp_path / "table", {"beside.png": encoded("PNG"), "held.png": encoded("PNG")})
    secret = tmp_path / "secret.png"
    Image.new("RGB", (40, 40), (250, 0, 250)).save(secret)
    (root / "link.png").symlink_to(secret)
    os.mkfifo(root / "pipe.png")
    named = {
        "held": ({"bytes": (root / "held.png").read_bytes(), "path": str(secret)}, ""),  # what is held goes first
        "beside": ({"bytes": None, "path": "beside.png"}, ""),
        "whole": ({"bytes": None, "path": str(root / "beside.png")}, ""),
        "secret": ({"bytes": None, "path": str(secret)}, OUTSIDE),
        "above": ({"bytes": None, "path": "../secret.png"}, OUTSIDE),
        "link": ({"bytes": None, "path": "link.png"}, OUTSIDE),
        "pipe": ({"bytes": None, "path": "pipe.png"}, "where there is no file"),
        "url": ({"bytes": None, "path": f"file://{secret}"}, "instead of holding an image"),
        "chain": ({"bytes": None, "path": f"simplecache::file://{secret}"}, "instead of holding an image"),
        "none": ({"bytes": None, "path": "no\nwhere\x1b.png"}, "where there is no file"),
        "empty": (None, "there is no image in it"),
    }
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    table = datasets.Dataset.from_dict({"image": [cell for cell, _ in named.values()]}, features=features)
    table = table.cast_column("image", datasets.Image(decode=False))
    write_table(table, root / "t.parquet")
    bad = [(number, why) for number, (_, why) in enumerate(named.values()) if why]
    if stream:
        source, said = open_source(Data(data=str(root / "t.parquet"), stream=True)), list[str]()
        assert isinstance(source, ShardSource)
        loader = StreamLoader(source.shards, Data(image_size=16, channels=3), seed=0, workers=1, tell=said.append)
        images = loader.batch(0, len(named))
    else:
        loaded_table, said = loaded(root / "t.parquet")
        assert len(loaded_table) == 3
        images = loaded_table.batch(0, 3)
    for number, why in bad:
        lines = [line for line in said if re.match(rf"Skipped row {number} of .*{why}\.$", line)]
        assert len(lines) == 1 and lines[0].isprintable(), (number, said)
    assert sum(line.startswith("Skipped") for line in said) == len(bad)
    assert len(images.flatten(1).unique(dim=0)) == 1  # all of them the one image that may be read


def test_a_tar_cut_short_gives_what_is_before_the_cut_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    files = {f"{i}.png": encoded("PNG") for i in range(6)}
    for i in range(3):
        as_tar(tmp_path / f"part-00{i}", files)
    content = (tmp_path / "part-001.tar").read_bytes()
    (tmp_path / "part-001.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "part-002.tar").rename(tmp_path / "elsewhere")
    loader, said = loaded(f"{tmp_path}/part-{{000..002}}.tar")
    assert 6 < len(loader) < 12
    assert any("part-001.tar is cut short: " in line and "fetch it again" in line for line in said)
    assert f"{tmp_path}/part-002.tar is missing." in said
    (tmp_path / "part-001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="cannot read the tar"):
        loaded(tmp_path / "part-001.tar")
    with pytest.raises(UserError, match="none of the 2 shards"):
        loaded(f"{tmp_path}/other-{{0..1}}.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"is compressed.*unpack it to a \.tar"):
        loaded(tmp_path / "a.tar.gz")


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 3 images of zoo can be read, 0\.png for one: not an image, or empty\.$"):
        loaded(as_folder(tmp_path / "zoo", {f"{i}.png": b"" for i in range(3)}))


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has nothing; or, at a path below ``/ill``, one that is out of order."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked += [self.path] * ("photoz" in self.path)  # the library asks for things of its own too
        self.send_response(503 if self.path.startswith("/ill") else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a `Hub`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Hub.asked.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("place", "asked", "why"),
    [("", 1, "the hub has none of that name"), ("/ill", 1, "503"), ("away", 0, ""), ("offline", 0, "offline mode")],
)
def test_a_hub_that_has_not_what_is_asked_for_or_does_not_answer(
    place: str, asked: int, why: str, hub: str, tmp_path: Path, photos: Callable[..., Path]
) -> None:
    photos(n=2)
    script = """
from frugan.cli import main
main(["train", "photoz/nothing", "--out", "r"])
"""
    there = {"HF_ENDPOINT": "http://127.0.0.1:9" if place == "away" else hub + place * (place == "/ill")}
    there |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": str(int(place == "offline"))}
    command, environment = [sys.executable, "-c", script], os.environ | there
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and len(Hub.asked) == asked
    assert done.stderr.startswith("frugan: there is no folder photoz/nothing, and as a data set on the hub it cannot be had (")
    assert why in done.stderr and "parquet files" in done.stderr and done.stderr.count("\n") == 1  # and no noise of tries


@pytest.mark.parametrize("where", ["in a header", "in an extended header", "between two members", "in an image"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_tar_that_is_cut_is_named_wherever_it_is_cut_and_what_is_before_is_used(
    where: str, streamed: bool, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(6):
            content = encoded("PNG")
            member = tarfile.TarInfo(f"{'long' * 30}\u00e9{i}.png")  # which needs an extended header
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with tarfile.open(whole) as archive:
        fourth = archive.getmembers()[3]
    at = {
        "in a header": fourth.offset_data - 400, "in an extended header": fourth.offset + 600,
        "between two members": fourth.offset, "in an image": fourth.offset_data + fourth.size // 2,
    }[where]  # fmt: skip
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:at])
    for path, images in ((whole, 6), (cut, 3)):
        source = open_source(Data(data=str(path), stream=streamed))
        said = " ".join(source.problems)
        assert len(source) in (images, images + (path == cut and where == "in an image")), said
        assert ("is cut short" in said and "fetch it again" in said) == (path == cut), said

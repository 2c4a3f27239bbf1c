"""Images of every kind to uint8 batches."""

import gzip
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from frugan.cli import main, parse
from frugan.config.greys import NAMED, grey_size
from frugan.config.recipe import Data
from frugan.data import decode
from frugan.data.decode import fit, flatten, is_grey
from frugan.data.opening import opened, resolve
from frugan.data.pack_loader import SMALL, PackLoader
from frugan.data.sources import open_source, standard
from frugan.data.sources.base import ArraySource
from frugan.data.sources.standard import as_published
from frugan.gan.passes import normalise
from frugan.utils.errors import UserError

from .conftest import write_idx

WHITE = (255, 255, 255)
PEAK = """
import re
import sys
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
"""


def load(path: Path | str, tell: Callable[[str], None] = lambda text: None, keep: int = SMALL, **settings: object) -> PackLoader:
    data = Data(data=str(path), **settings)
    source = open_source(data)
    return PackLoader(source, resolve(source, data, tell), seed=0, workers=2, tell=tell, keep=keep)


def decoded(image: Image.Image, channels: int = 3, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    return fit(flatten(image, background), 8, channels)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tiff"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    colour = Image.new("RGB", (30, 20), (200, 40, 90))
    colour.save(tmp_path / f"a.{suffix}")
    loader = load(tmp_path, image_size=16)
    assert loader.batch(0, 1).shape == (1, 3, 16, 16)
    assert np.abs(loader.batch(0, 1).float().mean((0, 2, 3)).numpy() - (200, 40, 90)).max() < 12


def test_modes() -> None:
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert decoded(half)[:, 0, 0].tolist() == [255, 127, 127]
    assert decoded(half, background=(0, 0, 0))[:, 0, 0].tolist() == [128, 0, 0]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decoded(palette)[:, 0, 0].tolist() == [10, 20, 30]
    palette.info["transparency"] = 1
    assert decoded(palette)[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded(Image.new("1", (8, 8), 1), 1)[0, 0, 0] == 255
    assert decoded(Image.new("LA", (8, 8), (0, 0)), 1)[0, 0, 0] == 255
    assert decoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)))[0, 0, 0] > 200
    assert decoded(Image.fromarray(np.full((8, 8), 65535, np.uint16)), 1)[0, 0, 0] == 255
    assert decoded(Image.fromarray(np.full((8, 8), 257 * 7, np.uint16)), 1)[0, 0, 0] == 7
    assert decoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), 1)[0, 0, 0] == 128


def at_once(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """What `flatten` gives, worked out on the whole image."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if image.mode == "F" and values.max() <= 1:
            values = values * 255
        elif image.mode.startswith("I;16") or values.max() > 255:
            values = values / 257
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    layer = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image.convert("RGBA"))
    return layer.convert("L" if image.mode in ("L", "LA") and len(set(background)) == 1 else "RGB")


def random_image(mode: str, width: int, height: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "RGBA":
        return Image.fromarray(pixels)
    if mode == "LA":
        return Image.fromarray(pixels).convert("LA")
    if mode in ("P", "L", "RGB"):
        image = Image.fromarray(np.ascontiguousarray(pixels[..., :3])).convert(mode)
        first = image.getpixel((0, 0))
        image.info["transparency"] = first if seed % 2 or mode != "P" else random.bytes(256)
        return image
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "I":
        return Image.fromarray(random.integers(-9, (300, 70_000)[seed % 2], (height, width), dtype=np.int32))
    values = random.random((height, width), dtype=np.float32) * (1, 200, 70_000)[seed % 3]
    values[random.random((height, width)) < 0.1] = np.nan
    return Image.fromarray(values)


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(["RGBA", "LA", "P", "L", "RGB", "I;16", "I", "F"]), width=st.integers(1, 23), height=st.integers(1, 23),
    strip=st.integers(1, 300), seed=st.integers(0, 5), background=st.sampled_from([WHITE, (10, 200, 90)]),
)  # fmt: skip
def test_an_image_flattened_in_strips_is_the_image_flattened_at_once(
    mode: str, width: int, height: int, strip: int, seed: int, background: tuple[int, int, int]
) -> None:
    image = random_image(mode, width, height, seed)
    assert image.mode == mode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "STRIP", strip, raising=False)
        flat = flatten(image, background)
    expected = at_once(image, background)
    assert flat.mode == expected.mode and flat.size == image.size
    assert np.array_equal(np.asarray(flat), np.asarray(expected))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks as Linux tells them")
@pytest.mark.parametrize("mode", ["RGBA", "F"])
def test_flattening_a_large_image_takes_little_beside_it(mode: str) -> None:
    script = """
from PIL import Image
from frugan.data.decode import flatten
flatten(Image.new(sys.argv[1], (8, 8), 0), (255, 255, 255))
image = Image.new(sys.argv[1], (6000, 6000), 0)
image.load()
before = peak()
flat = flatten(image, (255, 255, 255))
print(flat.mode, before, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", PEAK + script, mode], capture_output=True, text=True)
    flat, before, more = done.stdout.split()
    assert int(before) > 6000 * 6000 * 4  # the image is there, and counts
    result = 6000 * 6000 * {"RGB": 4, "L": 1}[flat]
    assert result * 0.9 < int(more) < result + (64 << 20), (mode, more)


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))  # light above
    exif = image.getexif()
    exif[0x0112] = 3  # taken upside down
    image.save(tmp_path / "a.png", exif=exif)
    pixels = load(tmp_path, image_size=8).batch(0, 1)[0, 0]
    assert pixels[0].max() == 0
    assert pixels[7].min() == 255


def test_wide_images_are_cropped_in_the_middle() -> None:
    image = Image.new("L", (32, 8))
    image.paste(255, (12, 0, 20, 8))
    assert decoded(image, 1).min() == 255


def test_grey_is_found_out(photos: Callable[..., Path], tmp_path: Path) -> None:
    assert load(photos("colour", n=3), image_size=8).shape[0] == 3
    (tmp_path / "grey").mkdir()
    Image.new("RGB", (9, 9), (7, 7, 7)).save(tmp_path / "grey" / "a.jpg")
    said: list[str] = []
    assert load(tmp_path / "grey", said.append, image_size=8).shape[0] == 1
    assert any("--channels 3" in text for text in said)
    assert load(tmp_path / "grey", image_size=8, channels=3).shape[0] == 3
    assert not is_grey(Image.new("RGB", (9, 9), (7, 7, 20)))


@pytest.mark.parametrize("size", [8, 28, 33, 64])
def test_any_size(size: int, photos: Callable[..., Path]) -> None:
    assert load(photos(n=2), image_size=size).batch(0, 2).shape == (2, 3, size, size)


def test_classes_by_folder_however_deep(photos: Callable[..., Path], tmp_path: Path) -> None:
    photos("data/name", n=6, classes=3)
    source = open_source(Data(data=str(tmp_path / "data")))
    assert list(source.classes) == ["class0", "class1", "class2"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    (tmp_path / "data" / "name" / "class1" / "001.png").write_bytes(b"")
    loader = load(tmp_path / "data", image_size=8)
    labels = loader.labels(0, 5)
    assert labels is not None
    assert sorted(labels.tolist()) == [0, 0, 1, 2, 2]
    whole = [source.pixels(i, 8, 3, WHITE)[0] for i in range(6) if i != 2]
    for image, label in zip(loader.batch(0, 5), labels, strict=True):
        same = [i for i, pixels in enumerate(whole) if torch.equal(torch.from_numpy(pixels), image)]
        assert [0, 0, 1, 2, 2][same[0]] == label
    flat = open_source(Data(data=str(photos("flat", n=3))))
    assert flat.labels is None


def test_zip_is_the_same_as_its_folder(photos: Callable[..., Path], tmp_path: Path) -> None:
    folder = photos(n=12, classes=2)
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("no image")
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
    one, other = load(folder, image_size=16), load(archive, image_size=16)
    assert torch.equal(one.batch(0, 12), other.batch(0, 12))
    assert one.fingerprint == other.fingerprint
    assert list(open_source(Data(data=str(archive))).classes) == ["class0", "class1"]


def test_runs_links_in_a_circle_and_hidden_folders_are_no_data(photos: Callable[..., Path]) -> None:
    folder = photos(n=4)
    shutil.copytree(folder, folder / "runs" / "photos-dcgan")
    for name in ("recipe.toml", "plan.json"):
        (folder / "runs" / "photos-dcgan" / name).write_text("")
    shutil.copytree(folder / "runs" / "photos-dcgan", folder / ".thumbnails")
    (folder / "again").symlink_to(folder)
    assert len(open_source(Data(data=str(folder)))) == 4


def test_idx_with_and_without_gzip_and_its_parts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    train, test = random.integers(0, 256, (7, 9, 9), np.uint8), random.integers(0, 256, (3, 9, 9), np.uint8)
    plain = write_idx(write_idx(tmp_path / "plain", train, np.arange(7)), test, np.arange(3), "t10k")
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for path in plain.iterdir():
        (zipped / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    for folder in (plain, zipped):
        for split, images in (("train", train), ("test", test), ("all", np.concatenate([train, test]))):
            source = open_source(Data(data=str(folder), split=split))
            assert isinstance(source, ArraySource)
            assert np.array_equal(source.images, images)
            assert source.labels is not None
            assert len(source.labels) == len(images)
    assert load(plain).shape == (1, 9, 9)


def zipped(folder: Path, shape: tuple[int, int, int], body: bytes) -> Path:
    """A gzipped IDX file whose header claims ``shape``, whatever is in it."""
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", *shape) + body, 1))
    return folder


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2**32 - 1, 2**32 - 1, 2**32 - 1), r"it has at most [\d,]+ of 79,228,162,458,924,105,385,300,197,375 bytes"),
        ((2**20, 2**10, 2**10), r"it has at most [\d,]+ of 1,099,511,627,776 bytes"),  # too much for the memory there is
        ((40, 30, 30), r"it has 30,000 of 36,000 bytes"),
    ],
)
def test_what_the_header_of_a_gzipped_file_claims_is_not_believed(shape: tuple[int, int, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^.*train-images-idx3-ubyte\.gz is cut short: {said}; fetch it again\.$"):
        open_source(Data(data=str(zipped(tmp_path / "idx", shape, bytes(30_000)))))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory as Linux tells it")
def test_a_gzipped_file_larger_than_memory_is_named_before_it_is_read(tmp_path: Path) -> None:
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert available
    images = 2 * int(available[1]) * 1024 // 10**6
    folder = zipped(tmp_path / "idx", (images, 1000, 1000), np.random.default_rng(0).bytes(1 << 20))
    os.truncate(folder / "train-images-idx3-ubyte.gz", images * 10**6 // 1000)  # as large as such a file is at least; a hole
    with pytest.raises(
        UserError, match=r"takes [\d.]+ .iB of memory, and [\d.]+ .iB are free: unpack it with gunzip, and it is mapped"
    ):
        open_source(Data(data=str(folder)))


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 13), start=st.integers(0, 40))
def test_every_image_once_an_epoch_whatever_the_batch(batch: int, start: int) -> None:
    images = np.arange(13, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    source = ArraySource("numbers", images, None, ())
    loader = PackLoader(source, Data(image_size=8, channels=1), seed=0, workers=1, tell=print)
    stream = torch.cat([loader.batch(first, batch) for first in range(0, 39, batch)])[:39, 0, 0, 0].tolist()
    assert all(sorted(stream[i : i + 13]) == list(range(13)) for i in (0, 13, 26))
    again = loader.batch(start, 5)[:, 0, 0, 0].tolist()
    endless = torch.cat([loader.batch(first, 1) for first in range(start, start + 5)])[:, 0, 0, 0].tolist()
    assert again == endless
    loader.close()


def test_reading_gives_what_keeping_gives(photos: Callable[..., Path]) -> None:
    folder = photos(n=20)
    kept, read = load(folder, image_size=16), load(folder, image_size=16, keep=0)
    for first in (0, 6, 12, 18, 3):  # ahead, across an epoch, and back
        assert torch.equal(kept.batch(first, 6), read.batch(first, 6))


@pytest.mark.parametrize("keep", [SMALL, 0])
def test_bad_files_are_named_and_skipped(keep: int, photos: Callable[..., Path]) -> None:
    folder = photos(n=8)
    (folder / "001.png").write_bytes(b"")
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:2000])
    (folder / "003.png").write_bytes(b"this is no image")
    said: list[str] = []
    loader = load(folder, said.append, keep, image_size=16)
    assert loader.batch(0, 8).shape[0] == 8
    for name in ("001.png", "002.png", "003.png"):
        assert any(name in text and "Skipped" in text for text in said)
    assert len(loader) == 5
    assert "3 of 8 images were skipped." in said


def test_enlarging_is_said_once(photos: Callable[..., Path]) -> None:
    said: list[str] = []
    load(photos(n=6, side=40), said.append, image_size=64)
    assert sum("enlarged" in text for text in said) == 1


def test_normalising_and_mirroring() -> None:
    images = torch.tensor([[[[0, 255]]], [[[0, 255]]]], dtype=torch.uint8)
    got = normalise(images, torch.tensor([False, True]), torch.zeros(1))
    assert got.flatten().tolist() == [-1, 1, 1, -1]


def test_fingerprints_tell_data_apart(photos: Callable[..., Path]) -> None:
    one, same, more = (load(photos(name, n), image_size=8) for name, n in (("a", 4), ("b", 4), ("c", 5)))
    assert one.fingerprint == same.fingerprint != more.fingerprint


def test_the_built_in_digits_are_the_published_ones() -> None:
    """By the counts of the classes of the test set on its page, and bit for bit as scikit-learn 1.9 gives them."""
    images, labels = as_published()
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.max() == 16
    both = images.tobytes() + labels.astype(np.uint8).tobytes()
    assert hashlib.sha256(both).hexdigest() == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_a_download_that_cannot_be_had_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRUGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"^cannot download mnist \(.*\); put its four IDX files into data/mnist and run the same"
    ) as caught:
        open_source(Data(data="mnist"))
    assert "\n" not in str(caught.value)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders that are served as the mirrors of a tiny MNIST: ``empty``, ``bad`` with another file, and ``good``."""
    for part in ("train", "t10k"):
        write_idx(tmp_path / "plain", np.arange(3 * 28 * 28).reshape(3, 28, 28), np.array([0, 1, 9]), part)
    (tmp_path / "good").mkdir()
    hashes = {}
    for file in (tmp_path / "plain").iterdir():
        packed = gzip.compress(file.read_bytes())
        (tmp_path / "good" / f"{file.name}.gz").write_bytes(packed)
        hashes[file.name] = hashlib.sha256(packed).hexdigest()
    (tmp_path / "bad").mkdir()
    for name in hashes:
        (tmp_path / "bad" / f"{name}.gz").write_bytes(b"<title>Log in</title>")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRUGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{name}/" for name in ("empty", "bad", "good")]
        monkeypatch.setitem(standard.MIRRORS, "mnist", urls)
        monkeypatch.setitem(standard.SHA256, "mnist", hashes)
        yield tmp_path
        server.shutdown()


def test_a_named_data_set_comes_from_the_first_mirror_that_has_it(mirrors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = mirrors / "cache" / "MNIST" / "raw"
    (mirrors / "cache" / ".MNIST.part" / "raw").mkdir(parents=True)
    (mirrors / "cache" / ".MNIST.part" / "raw" / "train-images-idx3-ubyte.gz").touch()  # a kill left it
    source = open_source(Data(data="mnist"))
    assert source.labels is not None and source.labels.tolist() == [0, 1, 9]
    assert isinstance(source, ArraySource) and isinstance(source.images, np.memmap)
    assert {p.name: p.read_bytes() for p in raw.iterdir()} == {p.name: p.read_bytes() for p in (mirrors / "plain").iterdir()}
    assert sorted(p.name for p in (mirrors / "cache").iterdir()) == [".MNIST.lock", "MNIST"]
    monkeypatch.setitem(standard.MIRRORS, "mnist", [])
    assert len(open_source(Data(data="mnist", split="all"))) == 6


def test_what_each_mirror_answered_is_said(mirrors: Path) -> None:
    standard.MIRRORS["mnist"].pop()
    with pytest.raises(UserError, match=r"\(127.0.0.1:\d+: File not found; 127.0.0.1:\d+: another file than was published\); put"):
        open_source(Data(data="mnist"))
    assert not (mirrors / "cache" / "MNIST").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_what_torchvision_downloaded_is_read(packed: bool, mirrors: Path) -> None:
    raw = mirrors / "cache" / "MNIST" / "raw"
    shutil.copytree(mirrors / "good", raw)
    if not packed:
        shutil.copytree(mirrors / "plain", raw, dirs_exist_ok=True)
    standard.MIRRORS["mnist"].clear()
    assert isinstance(open_source(Data(data="mnist")).images, np.memmap) is not packed


def test_a_local_copy_of_a_named_data_set_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "data" / "fashion-mnist", np.zeros((3, 28, 28), np.uint8), np.array([0, 1, 9]))
    source = open_source(Data(data="fashion_mnist"))
    assert len(source) == 3
    assert source.classes[9] == "Ankle boot"


def test_who_waits_for_the_download_of_another_process_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRUGAN_CACHE", str(tmp_path / "cache"))
    for proxy in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nothing can be fetched
    found: list[object] = []

    def look() -> None:
        try:
            found.append(len(open_source(Data(data="mnist"))))
        except UserError as error:
            found.append(str(error))

    (tmp_path / "cache").mkdir()
    waiting = threading.Thread(target=look)
    with FileLock(tmp_path / "cache" / ".MNIST.lock"):  # as the other process holds it
        waiting.start()
        time.sleep(0.5)
        write_idx(tmp_path / "cache" / "MNIST" / "raw", np.zeros((3, 28, 28), np.uint8), np.array([0, 1, 9]))
    waiting.join()
    assert found == [3]


def test_what_is_known_of_grey_images_beforehand_is_what_they_are(tmp_path: Path, photos: Callable[..., Path]) -> None:
    large, small = np.zeros((3, 12, 12), np.uint8), np.zeros((3, 9, 9), np.uint8)
    labels = np.array([0, 1, 0])
    both = write_idx(tmp_path / "both", large, labels, part="train")
    write_idx(both, small, labels, part="t10k")
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        with gzip.open(zipped / f"{name}.gz", "wb") as file:
            file.write((both / name).read_bytes())
    for channels, classes in ((1, 2), (1, 0), (3, 2)):
        packed = str(tmp_path / f"packed{channels}{classes}")
        main(
            [
                "data",
                "pack",
                str(photos(f"photos{classes}", classes=classes)),
                "--image-size",
                "20",
                "--channels",
                f"{channels}",
                "--out",
                packed,
            ]
        )
    for data in (Data(), Data(data=str(both)), Data(data=str(both), split="test"), Data(data=str(zipped)),
                 Data(data=str(tmp_path / "packed12")), Data(data=str(both), image_size=40)):  # fmt: skip
        known, there = grey_size(data), opened(data, print)[1]
        assert (known, 1) == (there.image_size, there.channels), data
        way = ["train", data.data, "--split", data.split] + (["--image-size", "40"] if data.image_size else [])
        assert parse(way)[1].recipe == ("resize" if known == 40 else "projected")
        assert parse([*way, "--channels", "3"])[1].recipe == "resize"
    (both / "train-images-idx3-ubyte").write_bytes(b"no such file")
    wide = write_idx(tmp_path / "wide", np.zeros((3, 12, 10), np.uint8), labels)
    bare = write_idx(tmp_path / "bare", large)
    for unknown in (
        both,
        wide,
        bare,
        photos(),
        tmp_path / "packed10",
        tmp_path / "packed32",
        tmp_path / "nowhere",
        "nobody/nothing",
    ):
        assert grey_size(Data(data=str(unknown), image_size=16)) is None
    assert {*standard.FOLDERS, "digits"} <= NAMED.keys()
    assert [grey_size(Data(data=name)) for name in ("mnist", "fashion_mnist", "FashionMNIST")] == [28, 28, 28]


def test_the_images_are_found_among_the_arguments(tmp_path: Path) -> None:
    data = str(write_idx(tmp_path / "few", np.zeros((3, 40, 40), np.uint8)))
    ways = [["--quiet", data], ["--epochs", "5", data], ["--data_path", data], [f"--data-path={data}"], ["--no-in-place", data]]
    for arguments in [*ways, ["--lr-g=1e-3", data, "--conditional"], ["--flip", "auto", data]]:
        assert parse(["train", *arguments])[1].recipe == "resize", arguments
    assert parse(["train", "--epochs", "5"])[1].recipe == "projected"


@pytest.mark.parametrize(
    ("named", "asked", "told"),
    [
        ("digits", {"split": "test"}, "--split test does nothing here: digits is taken whole."),
        ("digits", {"stream": True}, "--stream does nothing here: digits is not read from shards."),
        ("digits", {"background": "red"}, "--background red does nothing here: digits has no transparent pixels."),
        ("few", {"background": "black", "split": "all"}, "--background black does nothing here: few has no transparent pixels."),
        ("photos", {"split": "test", "background": "red"}, "--split test does nothing here: photos is taken whole."),
        ("photos", {"label_column": "kind"}, "--label-column kind does nothing here: photos is no table."),
        ("zip", {"image_column": "x"}, "--image-column x does nothing here: photos is no table."),
        ("tar", {"image_column": "x", "label_column": "y"}, "--image-column x does nothing here: photos is no table."),
        ("pack", {"split": "test"}, "--split test does nothing here: photos is taken whole."),
        ("tar", {"stream": True, "split": "test"}, "--split test does nothing here: photos is taken whole."),
        ("photos", {"flip": "yes", "background": "red", "channels": 3, "image_size": 16}, None),
        ("few", {"split": "all"}, None),
    ],
    ids=str,
)
def test_settings_that_do_nothing_with_these_images_are_named(
    named: str, asked: dict[str, object], told: str | None, few: Path, photos: Callable[..., Path], tmp_path: Path
) -> None:
    folder = photos(n=2)
    if named in ("zip", "tar"):
        shutil.make_archive(str(folder), named, folder)
    elif named == "pack":
        main(["data", "pack", str(folder), "--out", str(tmp_path / "p")])
    places = {"few": few, "photos": folder, "zip": f"{folder}.zip", "tar": f"{folder}.tar", "pack": tmp_path / "p"}
    said = list[str]()
    opened(Data(**{"data": str(places.get(named, named))} | asked), said.append)  # type: ignore[arg-type]
    assert [line for line in said if "does nothing" in line] == ([told] if told else [])


@pytest.mark.parametrize("named", ["digits", "few"])
def test_a_colour_that_is_none_is_refused_where_none_is_needed(named: str, few: Path) -> None:
    with pytest.raises(UserError, match="--background 'nocolour' is no colour"):
        opened(Data(data=str(few) if named == "few" else named, background="nocolour"), print)

"""Images of every kind to uint8 batches."""

import gzip
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from frugan.data.decode import fit, flatten, is_grey
from frugan.data.loader import SMALL, Loader, resolve
from frugan.data.source import ArraySource, open_source
from frugan.errors import UserError
from frugan.recipe import Data
from frugan.step import normalise

from .conftest import write_idx

WHITE = (255, 255, 255)


def load(path: Path | str, tell: Callable[[str], None] = lambda text: None, keep: int = SMALL, **settings: object) -> Loader:
    data = Data(data=str(path), **settings)
    source = open_source(data)
    return Loader(source, resolve(source, data, tell), seed=0, workers=2, tell=tell, keep=keep)


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


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 13), start=st.integers(0, 40))
def test_every_image_once_an_epoch_whatever_the_batch(batch: int, start: int) -> None:
    images = np.arange(13, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    source = ArraySource("numbers", images, None, ())
    loader = Loader(source, Data(image_size=8, channels=1), seed=0, workers=1, tell=print)
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


def test_a_download_that_cannot_be_had_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRUGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="put its four IDX files into data/mnist"):
        open_source(Data(data="mnist"))


def test_a_local_copy_of_a_named_data_set_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "data" / "fashion-mnist", np.zeros((3, 28, 28), np.uint8), np.array([0, 1, 9]))
    source = open_source(Data(data="fashion_mnist"))
    assert len(source) == 3
    assert source.classes[9] == "Ankle boot"

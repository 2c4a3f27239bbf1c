"""Packs: made once, whole or not at all, shared, and read in memory that does not grow with the data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from frugan.cli import main
from frugan.config.recipe import Data
from frugan.data.opening import resolve
from frugan.data.pack import Pack
from frugan.data.pack_loader import PackLoader
from frugan.data.packing import packed
from frugan.data.sources import open_source
from frugan.utils.draws import KEPT, Order
from frugan.utils.errors import UserError

from .conftest import assert_same_state, write_idx


def pack(data: Path | str, said: list[str] | None = None, workers: int = 2, **settings: object) -> Pack:
    tell = (said if said is not None else []).append
    wanted = Data(**{"data": str(data), "image_size": 16, "channels": 3} | settings)
    source = open_source(wanted)
    return packed(source, resolve(source, wanted, tell), workers=workers, tell=tell)


def test_a_pack_is_made_once_whatever_the_number_of_threads(photos: Callable[..., Path]) -> None:
    folder = photos(n=40, classes=4)
    first, second = pack(folder), pack(folder, workers=1)
    assert first.folder == second.folder
    rows = np.array([3, 0, 39, 3])
    assert np.array_equal(first.read(rows), second.all()[rows])
    labels = first.labels(np.arange(40))
    assert labels is not None and np.bincount(labels).tolist() == [10] * 4
    assert pack(folder, image_size=8).folder != first.folder
    alone = pack(folder, workers=1, background="black")
    assert alone.manifest.fingerprint == first.manifest.fingerprint


def test_a_changed_source_is_packed_anew_and_that_is_said(photos: Callable[..., Path]) -> None:
    folder = photos(n=6)
    before, said = pack(folder), list[str]()
    assert pack(folder, said).manifest == before.manifest and not said
    Image.new("RGB", (40, 40), "red").save(folder / "000.png")
    after = pack(folder, said)
    assert said == ["photos has changed since it was packed: packing it anew."]
    assert after.manifest.fingerprint != before.manifest.fingerprint


def test_a_damaged_pack_is_made_again(photos: Callable[..., Path]) -> None:
    folder, said = photos(n=6), list[str]()
    before = pack(folder)
    with (before.folder / "pixels.bin").open("r+b") as file:
        file.truncate(100)
    assert pack(folder, said).manifest == before.manifest
    assert "is cut short" in said[0]
    (before.folder / "manifest.json").write_text("{")
    assert pack(folder, said).manifest == before.manifest


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["pixels.bin", "labels.bin"])
@pytest.mark.parametrize("as_it_is", [False, True])
def test_a_bit_that_is_wrong_is_noticed(
    file: str, as_it_is: bool, photos: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    bare = write_idx(tmp_path / "few", random.integers(0, 255, (9, 8, 8)), random.integers(0, 3, 9))
    folder, said = bare if as_it_is else photos(n=6, classes=2), list[str]()
    settings = {"image_size": 8, "channels": 1} if as_it_is else {}  # packed without decoding
    before = pack(folder, **settings)
    flip_a_bit(before.folder / file)
    assert pack(folder, said, **settings).manifest == before.manifest
    assert said == [
        f"{before.folder / file} is damaged, its bytes are not those that were packed: pack the images again, which is done now."
    ]
    said.clear()
    assert pack(folder, said, **settings).manifest == before.manifest and not said

    mine = tmp_path / "mine"
    shutil.copytree(before.folder, mine)
    flip_a_bit(mine / file)
    kept = (mine / file).read_bytes()
    for command in (["train", str(mine), "--out", str(tmp_path / "r")], ["data", "check", str(mine)]):
        with pytest.raises(SystemExit):
            main(command)
        assert f"frugan: {mine / file} is damaged, its bytes are not those that were packed" in capsys.readouterr().err
    assert (mine / file).read_bytes() == kept and not (tmp_path / "r").exists()
    known = json.loads((mine / "manifest.json").read_text())
    for name in ("pixels_crc32", "labels_crc32"):  # as earlier versions packed
        del known[name]
    (mine / "manifest.json").write_text(json.dumps(known))
    assert len(pack(mine, **settings)) == len(before)


def test_packing_that_is_killed_leaves_nothing_that_is_trusted(photos: Callable[..., Path], tmp_path: Path) -> None:
    folder = photos(n=300, side=300)
    command = [sys.executable, "-m", "frugan", "data", "pack", str(folder), "--image-size", "256", "--out", str(tmp_path / "p")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part = tmp_path / ".p.part" / "pixels.bin"
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert part.exists() and not (tmp_path / "p").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(Pack(tmp_path / "p")) == 300 and not part.parent.exists()


def test_two_processes_that_pack_the_same_share_one_pack(photos: Callable[..., Path], tmp_path: Path) -> None:
    folder = photos(n=60, side=100)
    environment = os.environ | {"FRUGAN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "frugan", "data", "pack", str(folder), "--image-size", "64"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert said[0] == said[1]
    assert len([p for p in (tmp_path / "cache" / "packs").iterdir() if p.is_dir()]) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes that are stopped, as POSIX has them")
def test_who_packs_into_the_folder_that_another_packs_into_is_told_so(
    photos: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "pack", str(photos(n=300, side=200)), "--image-size", "128", "--out", str(tmp_path / "p")]
    command = [sys.executable, "-m", "frugan", *arguments]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part, until = tmp_path / ".p.part" / "pixels.bin", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < until:
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)  # in the middle of it
    os.waitpid(first.pid, os.WUNTRACED)  # until it stands still
    try:
        there = part.stat().st_ino, part.stat().st_size
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert (part.stat().st_ino, part.stat().st_size) == there
    finally:
        first.send_signal(signal.SIGCONT)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said == f"frugan: another process is packing into {tmp_path / 'p'}: wait for it, or give another --out.\n"
    assert first.communicate()[1] == "" and first.returncode == 0
    assert len(Pack(tmp_path / "p")) == 300


def test_a_part_that_a_kill_left_in_the_cache_goes_and_one_that_grows_stays(
    photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRUGAN_CACHE", str(tmp_path / "cache"))
    left, growing = (tmp_path / "cache" / "packs" / name for name in (".left-0123.part", ".growing-0123.part"))
    for part in (left, growing):
        part.mkdir(parents=True)
        (part / "pixels.bin").write_bytes(b"some")
        for old in (part / "pixels.bin", part):
            os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    (growing / "pixels.bin").write_bytes(b"some more")
    pack(photos(n=2))
    assert not left.exists() and (growing / "pixels.bin").exists()


def test_a_full_disk_is_said_before_anything_is_written(photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("frugan.data.packing.shutil.disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"takes 7\.5 KiB, and 1000 B are free in .*: set FRUGAN_CACHE"):
        pack(photos("full", n=10))


def test_a_pack_is_data(photos: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(n=10, classes=2)
    main(["data", "pack", str(folder), "--image-size", "16", "--out", str(tmp_path / "p")])
    assert "10 images of 16x16, 3 channels" in capsys.readouterr().out
    source = open_source(Data(data=str(tmp_path / "p")))
    loader = PackLoader(source, resolve(source, Data(data=str(tmp_path / "p")), print), seed=0, workers=1, tell=print)
    assert loader.batch(0, 10).shape == (10, 3, 16, 16)
    with pytest.raises(UserError, match="packed as 16x16 with 3 channels"):
        open_source(Data(data=str(tmp_path / "p"), image_size=32))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("of years")
    with pytest.raises(SystemExit):
        main(["data", "pack", str(folder), "--out", str(tmp_path / "mine")])
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()


HOSTILE = [
    "../../x", "/abs", "..", ".", "", "a/b", "..\\x", "C:\\x", "~", "a\nb\x1b[2J\x00", "\ud800", "\u202egnp", "e" * 5000,
    "é" * 5000,
]  # fmt: skip


@pytest.fixture
def rewritten(made: Pack, tmp_path: Path) -> Callable[..., Path]:
    """Makes a pack whose manifest says something else."""

    def make(**changes: object) -> Path:
        folder = tmp_path / "somebodys"
        if not folder.exists():
            shutil.copytree(made.folder, folder)
        known = json.loads((made.folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(known | changes))
        return folder

    return make


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(HOSTILE) | st.text(max_size=200) | st.text("./\\ -~:\0a", max_size=9))
def test_no_name_in_a_manifest_leads_out_of_a_folder(name: str, rewritten: Callable[..., Path]) -> None:
    named = open_source(Data(data=str(rewritten(name=name)))).name
    run = Path("runs") / f"{named}-dcgan"
    assert run.parent == Path("runs") and len(run.parts) == 2 and os.path.normpath(run) == str(run)
    assert not set(named) & set("/\\:") and ".." not in named and not run.name.startswith(".")
    assert named.isprintable() and 0 < len(named.encode()) <= 200  # a name may have 255 bytes, and a run's has more in it


def test_a_hostile_manifest_trains_into_runs(
    rewritten: Callable[..., Path], train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = rewritten(name="../../x\n\x1b[2J")
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "deeper")

    def stop(images: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(None, folder, image_size=16, on_update=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "somebodys"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["deeper"]
    (run,) = Path("runs").iterdir()
    assert [p.name for p in Path().iterdir()] == ["runs"] and run.name.isprintable() and (run / "plan.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 5}, {"name": None}, {"images": "40"}, {"images": -40}, {"images": 40.0}, {"size": 0}, {"size": 1 << 70},
        {"channels": 2}, {"classes": "ab"}, {"classes": [1]}, {"reasons": []}, {"small": 3}, {"fingerprint": 1},
        {"more": "than there is"}, {"version": 99}, {"labelled": True}, {"pixels_crc32": "1"}, {"labels_crc32": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_is_not_right_is_one_sentence(changes: dict[str, object], rewritten: Callable[..., Path]) -> None:
    folder = rewritten(**changes)
    with pytest.raises(
        UserError, match=r"(is no pack \(.*\):|is cut short: .*;|another version of frugan:) pack (the images|it) again\.$"
    ):
        open_source(Data(data=str(folder)))


def test_a_manifest_that_is_cut_short_is_one_sentence(rewritten: Callable[..., Path]) -> None:
    file = rewritten() / "manifest.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(UserError, match=r"manifest\.json is damaged: pack the images again\.$"):
        open_source(Data(data=str(file.parent)))


@pytest.mark.parametrize("text", ["[]", "5", "null", "[" * 100_000, '{"version": 1}', ""])
def test_what_is_no_manifest_is_one_sentence(text: str, rewritten: Callable[..., Path]) -> None:
    folder = rewritten()
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"pack (the images|it) again\.$") as caught:
        open_source(Data(data=str(folder)))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("n", [13, KEPT, KEPT + 1, 10**9 + 7])
def test_orders_are_permutations_that_are_read_anywhere(n: int) -> None:
    order = Order(5, n)
    assert order.read(n - 10, 10).tolist() == [int(order.read(i, 1)) for i in range(n - 10, n)]
    some = order.read(0, min(n, 2 * KEPT))
    assert len(some.unique()) == len(some) and some.min() >= 0 and some.max() < n
    if n <= 2 * KEPT:
        assert torch.equal(some.sort().values, torch.arange(n))
    else:
        assert abs(float(some.double().mean()) / n - 0.5) < 0.01
        assert not torch.equal(some, Order(6, n).read(0, len(some)))


@given(rows=st.lists(st.integers(0, 39), max_size=60))
def test_any_rows_are_read(rows: list[int], made: Pack) -> None:
    wanted = made.all()[np.array(rows, dtype=np.int64)]
    assert np.array_equal(made.read(np.array(rows, dtype=np.int64)), wanted)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    root = tmp_path_factory.mktemp("made")
    for i in range(40):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(root / f"{i:02}.png")
    return pack(root)


def containers(root: Path, images: np.ndarray, labels: np.ndarray) -> dict[str, str]:
    """The same grey images as a folder, a zip, tars, parquet and IDX."""
    import datasets

    folder = root / "folder"
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{i:03}.png")
    files = sorted(folder.rglob("*.png"))
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for path in files:
            archive.write(path, path.relative_to(folder))
    for number in range(2):
        with tarfile.open(root / f"shard-{number}.tar", "w") as tar:
            for path in files[number * len(files) // 2 : (number + 1) * len(files) // 2]:
                tar.add(path, f"{path.stem}.png")
                (root / "label").write_text(path.parent.name)
                tar.add(root / "label", f"{path.stem}.cls")
    rows = {"image": [str(path) for path in files], "label": [int(path.parent.name) for path in files]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(rows, features=kinds)
    table.to_parquet(root / "train-00000-of-00001.parquet")  # which names the files, below the folder it lies in
    write_idx(root / "idx", images, labels)
    return {
        "folder": str(folder), "zip": str(root / "images.zip"), "tar": f"{root}/shard-{{0..1}}.tar",
        "parquet": str(root / "train-00000-of-00001.parquet"), "idx": str(root / "idx"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of what datasets imports
def test_the_same_images_from_anything_train_the_same_bitwise(tmp_path: Path, train: Callable[..., Path]) -> None:
    random = np.random.default_rng(0)
    labels = np.sort(random.integers(0, 3, 48)).astype(np.uint8)  # folders come in the order of their names
    images = random.integers(0, 256, (48, 16, 16), dtype=np.uint8)
    where = containers(tmp_path, images, labels)
    where["pack"] = str(pack(where["folder"], channels=1).folder)
    runs = {kind: train(tmp_path / f"run-{kind}", data, epochs=1, image_size=16, conditional=True) for kind, data in where.items()}
    for kind, run in runs.items():
        assert json.loads((run / "plan.json").read_text())["images"] == 48, kind
        assert_same_state(run, runs["idx"])
    for kind, data in where.items():
        source = open_source(Data(data=data))
        assert source.labels is not None and source.labels.tolist() == labels.tolist(), kind


@pytest.mark.filterwarnings("ignore")
def test_columns_of_tables_are_named_if_they_are_not_found(tmp_path: Path) -> None:
    where = containers(tmp_path, np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.uint8))["parquet"]
    with pytest.raises(UserError, match="name one of image, label with --image-column"):
        open_source(Data(data=where, image_column="picture"))
    with pytest.raises(UserError, match="name one of image, label with --label-column"):
        open_source(Data(data=where, label_column="class"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"cannot read .*bad\.parquet"):
        open_source(Data(data=str(tmp_path / "bad.parquet")))


def test_data_check_tells_what_is_there(photos: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(n=12, classes=3)
    (folder / "class1" / "again.png").write_bytes((folder / "class0" / "000.png").read_bytes())
    (folder / "class2" / "empty.png").write_bytes(b"")
    Image.new("L", (50, 100), 7).save(folder / "class0" / "tall.png")
    sheet = tmp_path / "sheet.png"
    main(["data", "check", str(folder), "--sheet", str(sheet)])
    said = " ".join(capsys.readouterr().out.split())
    for text in ("class2/empty.png: not an image, or empty.", "The same: class0/000.png, class1/again.png.", "40x40 ",
                 "RGB 13, L 1", "class0 5", "1 without colour", "64x64, colour: the middle square", "14 are smaller"):  # fmt: skip
        assert text in said, (text, said)
    with Image.open(sheet) as picture:
        assert picture.width > 64
    main(["data", "check", str(folder), "--sheet", str(sheet), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 14 and found["unreadable"] == {"class2/empty.png": "not an image, or empty"}


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """A training on a pack of 150,000 images beside one on 3,000; benchmarks/data.py does it with a million."""
    script = """
import sys
import frugan
from frugan.memory import host
small = dict(recipe="dcgan", batch_size=500, image_size=28, width_g=2, width_d=2, latent_dim=4)
print(frugan.train(sys.argv[1], out=sys.argv[2], epochs=1, **small, device="cpu", quiet=True,
                    on_update=lambda n: n >= 3000 and (print(host.resident()), sys.exit())))
"""
    held = []
    for n in (3_000, 150_000):
        images = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        data = write_idx(tmp_path / str(n), images)
        for i in range(2):  # the second time it is packed and planned already
            command = [sys.executable, "-c", script, str(data), str(tmp_path / f"r{n}-{i}")]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FRUGAN_CACHE": str(tmp_path / "c")})
        held.append(int(done.stdout.split()[0]))
    assert abs(held[1] - held[0]) < 64 << 20, held

"""Streams of shards: every image once an epoch, whoever reads and whenever it is killed."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import frugan
from frugan.cli import main
from frugan.config.recipe import Data
from frugan.data import stream_loader
from frugan.data.sources import open_source, streams
from frugan.data.sources.streams import Shard, ShardSource
from frugan.data.stream_loader import StreamLoader
from frugan.utils.errors import UserError

from .conftest import SMALL, assert_same_state, final_state

DATA = Data(image_size=8, channels=1)


def numbered(i: int) -> bytes:
    """A PNG that has its number in its first two pixels."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0, :2] = divmod(i, 256)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0].int() * 256 + images[:, 0, 0, 1]).tolist()


def write_shard(file: Path | io.BytesIO, images: dict[str, bytes]) -> None:
    with tarfile.open(file if isinstance(file, Path) else None, "w", None if isinstance(file, Path) else file) as archive:
        for name, content in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 numbered images in five shards of different sizes."""
    root, begin = tmp_path_factory.mktemp("shards"), 0
    for number, count in enumerate((80, 10, 100, 50, 60)):
        write_shard(root / f"s-{number:03}.tar", {f"{i:05}.png": numbered(i) for i in range(begin, begin + count)})
        begin += count
    return f"{root}/s-{{000..004}}.tar"


def load(where: str, said: list[str] | None = None, **options: object) -> StreamLoader:
    source = open_source(Data(data=where, stream=True))
    assert isinstance(source, ShardSource)
    tell = (said if said is not None else []).append
    for problem in source.problems:
        tell(problem)
    return StreamLoader(source.shards, DATA, **{"seed": 3, "workers": 2, "tell": tell, "block": 70} | options)


READ = """
import sys
from tests.test_stream import load, numbers
where, rank, first, last, batch = sys.argv[1], *map(int, sys.argv[2:])
loader = load(where, batch=batch, share=(batch // 2 * rank, batch // 2))
for begin in range(first, last, batch):
    print(*numbers(loader.batch(begin + batch // 2 * rank, batch // 2)), flush=True)
    if begin == 100 and first == 0:
        import os
        os.kill(os.getpid(), 9)
"""


def test_two_processes_one_of_them_killed_read_every_image_once_an_epoch(shards: str) -> None:
    def read(rank: int, first: int) -> list[int]:
        command = [sys.executable, "-c", READ, shards, *map(str, (rank, first, 600, 20))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == (-9 if first == 0 else 0), done.stderr
        return [int(n) for n in done.stdout.split()]

    killed, resumed = {}, {}
    for rank in (0, 1):
        killed[rank], resumed[rank] = read(rank, 0), read(rank, 120)
    whole = [np.reshape(killed[rank] + resumed[rank], (30, 10)) for rank in (0, 1)]
    together = np.concatenate(whole, axis=1).ravel().tolist()
    assert sorted(together[:300]) == sorted(together[300:]) == list(range(300))
    alone = load(shards)
    assert numbers(alone.batch(0, 600)) == together
    assert together[:300] != together[300:]
    assert sum(a < b for a, b in pairwise(together[:300])) < 200  # shuffled


def test_a_process_decodes_its_share_alone_and_has_the_rest_all_the_same(tmp_path: Path) -> None:
    class Counting(StreamLoader):
        decoded = 0

        def _decode(self, name: str, content: bytes | str) -> Any:
            self.decoded += 1
            return super()._decode(name, content)

    damaged = {23, 24, 61}  # of which two lie beside each other: what stands for them may be another process's
    shard = tmp_path / "s.tar"
    write_shard(shard, {f"{i:05}.png": b"no image" if i in damaged else numbered(i) for i in range(120)})
    source = open_source(Data(data=str(shard), stream=True))
    assert isinstance(source, ShardSource)
    wanted = [0, 20, 40, 60, 80, 100]
    options: dict[str, Any] = {"seed": 3, "workers": 2, "tell": lambda said: None, "block": 60}
    with closing(StreamLoader(source.shards, DATA, **options)) as alone:
        whole = numbers(alone.batch(0, 120))
    for rank in (0, 1):
        with closing(Counting(source.shards, DATA, **options, batch=20, share=(10 * rank, 10))) as loader:
            mine = [n for first in wanted for n in numbers(loader.batch(first + 10 * rank, 10))]
            assert mine == [n for first in wanted for n in whole[first + 10 * rank : first + 10 * rank + 10]]
            assert numbers(loader.batch(0, 120)) == whole
    with closing(Counting(source.shards, DATA, **options, batch=20, share=(0, 20))) as loader:
        assert numbers(loader.batch(0, 60)) == whole[:60]
        loader.close()
        assert loader.decoded <= 120  # each once, although two that cannot be read lie beside each other
    write_shard(shard, {f"{i:05}.png": numbered(i) for i in range(120)})
    with closing(Counting(source.shards, DATA, **options, batch=20, share=(0, 10))) as loader:
        for first in wanted[:-1]:
            loader.batch(first, 10)
        assert loader.decoded <= 90  # 60 of this epoch, and of the block after it


@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 700), count=st.integers(1, 90))
def test_images_are_the_same_wherever_one_begins(first: int, count: int, shards: str) -> None:
    loader, other = load(shards), load(shards)
    whole = numbers(loader.batch(0, 800))
    assert numbers(other.batch(first, count)) == whole[first : first + count]
    loader.close()
    other.close()


def test_a_training_on_a_stream_resumes_exactly(shards: str, tmp_path: Path) -> None:
    options = SMALL | {"stream": True, "channels": 1, "batch_size": 50, "checkpoint_every": 1}
    whole = frugan.train(shards, out=tmp_path / "whole", **options | {"epochs": 2})

    def stop(images: int) -> None:
        if images == 450:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        frugan.train(shards, out=tmp_path / "half", on_update=stop, **options | {"epochs": 2})
    half = frugan.train(shards, out=tmp_path / "half", **options | {"epochs": 2})
    assert_same_state(whole, half)


def test_what_is_amiss_with_shards_is_named_and_training_goes_on(tmp_path: Path) -> None:
    for number in range(3):
        files = {f"{i}.png": numbered(i) for i in range(number * 20, number * 20 + 20)}
        if number == 0:
            files["5.png"] = b"no image"
        write_shard(tmp_path / f"s-{number}.tar", files)
    said: list[str] = []
    loader = load(f"{tmp_path}/s-{{0..3}}.tar", said)
    assert said == [f"{tmp_path}/s-3.tar is missing."]
    content = (tmp_path / "s-1.tar").read_bytes()
    (tmp_path / "s-1.tar").write_bytes(content[: len(content) // 2])  # cut while it is in use
    got = numbers(loader.batch(0, 60))
    assert len(got) == 60
    assert set(range(40, 60)) <= set(got) and not set(got) >= set(range(20, 40))
    assert any(line == f"Skipped {tmp_path}/s-0.tar/5.png: not an image, or empty." for line in said)
    assert any(line.startswith(f"The rest of {tmp_path}/s-1.tar cannot be read") for line in said)
    (tmp_path / "s-2.tar").write_bytes(b"x" * 2000)
    said.clear()
    load(f"{tmp_path}/s-?.tar", said)
    assert any("cannot read the shard" in line and "s-2.tar" in line for line in said)


def test_any_file_system_that_fsspec_knows(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(2):
        buffer = io.BytesIO()
        write_shard(buffer, {f"{i}.png": numbered(i) for i in range(number * 10, number * 10 + 10)})
        memory.pipe(f"/bucket/s-{number}.tar", buffer.getvalue())
    for where in ("memory://bucket/s-{0..1}.tar", "memory://bucket/*.tar"):
        source = open_source(Data(data=where))
        assert isinstance(source, ShardSource)
        assert sorted(numbers(StreamLoader(source.shards, DATA, seed=0, workers=1, tell=print).batch(0, 20))) == list(range(20))
    with pytest.raises(UserError, match=r"cannot read the shard memory://bucket/none\.tar"):
        open_source(Data(data="memory://bucket/none.tar"))
    with pytest.raises(UserError, match="cannot be streamed"):
        open_source(Data(data=str(tmp_path), stream=True))


@pytest.mark.filterwarnings("ignore")  # of what datasets imports
def test_parquet_is_streamed(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["zebra", "ant"])})
    for part in range(2):
        own = range(part * 10, part * 10 + 10)
        rows = {"image": [{"bytes": numbered(i), "path": None} for i in own], "kind": [i % 2 for i in own]}
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / f"train-{part}.parquet")
    with closing(load(str(tmp_path), block=7)) as loader:
        batch = loader.pieces(0, 20)
    assert sorted(found := numbers(batch.images(0, 20))) == list(range(20))
    assert batch.labels(0, 20).tolist() == [i % 2 for i in found]
    assert list(open_source(Data(data=str(tmp_path), stream=True)).classes) == ["zebra", "ant"]


@pytest.mark.parametrize("how", ["cls", "json", "folders"])
def test_streams_carry_the_classes_of_their_images(how: str, tmp_path: Path) -> None:
    for part in range(3):
        files = {}
        for i in range(part * 20, part * 20 + 20):
            kind = str(i % 3 * 5)
            if how == "cls":
                files[f"{i:03}.cls"] = kind.encode()
            files[f"{kind}/{i:03}.png" if how == "folders" else f"{i:03}.png"] = numbered(i) if i != 7 else b"bad"
            if how == "json":
                files[f"{i:03}.json"] = f'{{"label": {kind}}}'.encode()
        write_shard(tmp_path / f"s-{part}.tar", files)
    source, whole = (open_source(Data(data=str(tmp_path), stream=stream)) for stream in (True, False))
    assert list(source.classes) == list(whole.classes)
    assert source.labels.tolist() == whole.labels.tolist()
    with closing(load(str(tmp_path), block=25)) as loader:
        for first in range(0, 120, 40):
            batch = loader.pieces(first, 40)
            for begin, count in ((first, 15), (first + 15, 25)):  # what stands for the bad one brings its own class
                of = [list(source.classes).index(str(i % 3 * 5)) for i in numbers(batch.images(begin, count))]
                assert batch.labels(begin, count).tolist() == of


def test_classes_that_come_and_go_are_refused_by_who_learns_them(tmp_path: Path, train: Callable[..., Path]) -> None:
    files = {f"{i:03}.png": numbered(i) for i in range(40)} | {"012.cls": b"1", "030.cls": b"1"}
    write_shard(tmp_path / "s-0.tar", dict(sorted(files.items())))
    write_shard(
        tmp_path / "s-1.tar",
        dict(sorted({f"{i:03}.{k}": v for i in range(40, 60) for k, v in (("cls", b"2"), ("png", numbered(i)))}.items())),
    )
    for stream, where in ((True, r"image 0 of .*s-0\.tar"), (False, r"s-0\.tar/000\.png")):
        with pytest.raises(UserError, match=f"--conditional learns classes, and {where} has none, as 38 of 60 images"):
            train(tmp_path / "run", tmp_path, stream=stream, conditional=True)


def test_a_stream_is_learnt_with_classes_and_gone_on_with(tmp_path: Path, train: Callable[..., Path]) -> None:
    for part in range(2):
        own = range(part * 24, part * 24 + 24)
        write_shard(tmp_path / f"s-{part}.tar", {f"{i % 2}/{i:03}.png": numbered(i) for i in own})
    settings = {"data": tmp_path, "stream": True, "conditional": True, "channels": 1, "epochs": 2, "batch_size": 10}
    straight = train(tmp_path / "straight", **settings)
    train(tmp_path / "broken", **settings | {"epochs": 1})
    assert_same_state(straight, train(tmp_path / "broken", **settings))


def test_memory_stays_while_shards_go_by(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    write_shard(tmp_path / "s.tar", {f"{i}.png": buffer.getvalue() for i in range(2000)})
    script = """
import sys
from frugan.data.sources.streams import tar_shard
from frugan.data.stream_loader import StreamLoader
from frugan.memory import host
from frugan.config.recipe import Data
loader = StreamLoader([tar_shard(sys.argv[1])] * 4, Data(image_size=32, channels=3), seed=0, workers=2, tell=print, block=500)
held = []
for first in range(0, 24000, 100):
    loader.batch(first, 100)
    held.append(host.resident())
print(held[40], max(held[40:]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "s.tar")], capture_output=True, text=True, env=os.environ)
    early, most = map(int, done.stdout.split())
    assert most < early + (16 << 20), (early, most)


def test_plans_for_streams(shards: str, capsys: pytest.CaptureFixture[str], train: Callable[..., Path]) -> None:
    asked = ["--stream", "--image-size", "8", "--channels", "1", "--batch-size", "10", "--device", "cpu"]
    main(["plan", shards, "--recipe", "dcgan", *asked])
    assert "data" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["data", "check", shards, "--stream"])
    assert "is a stream, which is only trained on" in capsys.readouterr().err


def test_a_shard_without_images() -> None:
    with pytest.raises(UserError, match="no image is in 1 shard"):
        StreamLoader([Shard("empty", 0, lambda skip: iter(()))], DATA, seed=0, workers=1, tell=print)


class Dropped(Exception):
    """What the driver of a network raises, which knows nothing of OSError."""


class Flaky(fsspec.AbstractFileSystem):
    """Files in memory, behind a network that fails when it is told to."""

    protocol = "flaky"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    down: ClassVar[Exception | None] = None  # what every attempt raises while it is set
    failures: ClassVar[list[tuple[int, Exception | None]]] = []  # one an opening: after how many bytes, and what; None: it ends
    opened: ClassVar[int] = 0

    def ls(self, path: str, detail: bool = True, **options: object) -> list[Any]:
        found = [
            {"name": n, "size": len(c), "type": "file"} for n, c in self.files.items() if n == path or n.startswith(f"{path}/")
        ]
        return found if detail else [about["name"] for about in found]

    def _open(self, path: str, mode: str = "rb", **options: object) -> io.RawIOBase:
        Flaky.opened += 1
        if Flaky.down:
            raise Flaky.down
        if path not in self.files:
            raise FileNotFoundError(path)
        return Line(self.files[path], *(Flaky.failures.pop(0) if Flaky.failures else (1 << 60, None)))


class Line(io.BytesIO):
    """A file that fails ``after`` so many bytes, and whenever the network is down."""

    def __init__(self, content: bytes, after: int, error: Exception | None) -> None:
        super().__init__(content)
        self.after, self.error = after, error

    def read(self, size: int | None = -1, /) -> bytes:
        if Flaky.down:
            raise Flaky.down
        begin, content = self.tell(), super().read(size)
        if begin + len(content) <= self.after:
            return content
        if self.error:
            raise self.error
        return content[: max(0, self.after - begin)]


FAILURES = [ConnectionResetError(104, "Connection reset by peer"), Dropped("stream 3 was reset"), TimeoutError()]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    """Three shards of 30 images behind a network that fails as the test says; there is little patience with it."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(streams, "WAITS", (0.001,) * 6, raising=False)
    for number in range(3):
        buffer = io.BytesIO()
        write_shard(buffer, {f"{i}.png": numbered(i) for i in range(number * 30, number * 30 + 30)})
        Flaky.files[f"s-{number}.tar"] = buffer.getvalue()
    yield Flaky
    Flaky.files, Flaky.down, Flaky.failures, Flaky.opened = {}, None, [], 0


FLAKY = "flaky://s-{0..2}.tar"


def undisturbed(count: int) -> list[int]:
    """The images of `FLAKY` while nothing fails."""
    with closing(load(FLAKY, block=20)) as loader:  # which would read ahead into what fails next
        return numbers(loader.batch(0, count))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(failures=st.lists(st.tuples(st.integers(0, 32_000), st.sampled_from([*FAILURES])), max_size=6), data=st.data())
def test_no_image_is_replaced_because_the_network_failed(
    failures: list[tuple[int, Exception]], data: st.DataObject, network: type[Flaky]
) -> None:
    network.failures = []
    whole, said = undisturbed(180), list[str]()
    first = data.draw(st.integers(0, 89))
    with closing(load(FLAKY, said, block=20)) as loader:
        network.failures = failures.copy()
        assert numbers(loader.batch(first, 90)) == whole[first : first + 90]
    assert not any("cannot be read" in line or "Skipped" in line for line in said)
    assert all(line.startswith("flaky://s-") and line.endswith("; trying again.") for line in said), said


def test_a_connection_that_ends_too_early_once_replaces_no_image(network: type[Flaky]) -> None:
    said: list[str] = []
    whole = undisturbed(90)
    with closing(load(FLAKY, said, block=20)) as loader:
        network.failures = [(20_000, None), (25_000, None)]  # as if that were all
        assert numbers(loader.batch(0, 90)) == whole
    assert not said and not network.failures


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_block_that_failed_is_read_when_the_network_is_back(error: Exception, network: type[Flaky]) -> None:
    said: list[str] = []
    whole = undisturbed(90)
    again = r"^cannot read on in flaky://s-\d\.tar \(.+\), tried 7 times: check the connection"
    with closing(load(FLAKY, said, block=20)) as loader:
        network.down, network.opened = error, 0
        for _ in range(2):
            with pytest.raises(UserError, match=again) as caught:
                loader.batch(0, 90)
            assert "goes on from the last checkpoint." in str(caught.value) and "\n" not in str(caught.value)
        assert network.opened == 14  # an opening and six more, each time
        assert len(said) == 2  # not once for each
        network.down = None
        assert numbers(loader.batch(0, 90)) == whole


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_start_waits_for_the_network_and_never_leaves_a_shard_out_for_it(error: Exception, network: type[Flaky]) -> None:
    network.failures = [(15_000, error), (0, error), (15_000, error)]
    source, said = open_source(Data(data=FLAKY)), list[str]()
    assert len(source) == 90 and not source.problems
    network.failures = [(1 << 60, None)] + 4 * [(15_000, error)]  # only the second shard fails: without it it were another training
    with pytest.raises(UserError, match=r"^cannot read the shard flaky://s-1.tar \(.+\): check the connection, then run the same"):
        open_source(Data(data=FLAKY))
    del network.files["s-1.tar"]  # which waiting does not help against
    network.opened = 0
    with closing(load(FLAKY, said)) as loader:
        assert len(loader) == 60
    assert network.opened == 3 and len(said) == 1 and "cannot read the shard flaky://s-1.tar" in said[0]


def test_a_training_whose_network_goes_away_keeps_every_update_and_goes_on(
    network: type[Flaky], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SMALL | {"channels": 1, "batch_size": 10, "epochs": 2, "checkpoint_every": 100}
    monkeypatch.setattr(stream_loader, "BLOCK_BYTES", 20 * 64)  # two updates
    whole = frugan.train(FLAKY, out=tmp_path / "whole", **options)

    def cut(images: int) -> None:
        if images == 50:
            network.down = Dropped("gone")

    with pytest.raises(UserError, match="cannot read on in flaky://") as caught:
        frugan.train(FLAKY, out=tmp_path / "half", on_update=cut, **options)
    assert "check the connection" in str(caught.value)
    _, state = final_state(tmp_path / "half")
    assert isinstance(state["images"], int) and state["images"] >= 50  # and no checkpoint was due so early
    network.down = None
    half = frugan.train(FLAKY, out=tmp_path / "half", **options)
    assert_same_state(whole, half)


@pytest.mark.filterwarnings("ignore")  # of what datasets imports
def test_parquet_is_read_on_after_a_failure_too(network: type[Flaky]) -> None:
    import datasets

    buffer = io.BytesIO()
    rows = {"image": [{"bytes": numbered(i), "path": None} for i in range(60)]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(buffer, batch_size=10)
    network.files["t.parquet"] = buffer.getvalue()
    said: list[str] = []
    with closing(load("flaky://t.parquet", said, block=7)) as loader:
        network.failures = [(len(buffer.getvalue()) // 2, Dropped("gone")), (0, FAILURES[0])]
        assert sorted(numbers(loader.batch(0, 60))) == list(range(60))
    assert not network.failures and said and not any("cannot be read" in line for line in said)

"""What follows a training: records read back as they were written, and whatever is registered is told what it should be."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from frugan.config.objectives import Objective
from frugan.config.run import Run
from frugan.data.loader import Loader
from frugan.reporting import trackers
from frugan.reporting.records import (
    EVENTS,
    FIXED,
    Event,
    LayoutChanged,
    Line,
    MemoryMeasured,
    Metrics,
    Record,
    Unknown,
    Warned,
    parse,
)
from frugan.reporting.run_folder import RunFolder
from frugan.training import diagnostics
from frugan.training.diagnostics import Diagnostic
from frugan.utils.errors import UserError

COUNTS = st.integers(0, 2**53)
NUMBERS = st.floats(-1e200, 1e200)
MEASURED = st.dictionaries(st.text().filter(lambda name: name not in {*FIXED, "event"}), NUMBERS, max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)
CHANGES = [name for name, kind in EVENTS.items() if kind is LayoutChanged]
RECORDS = st.one_of(
    st.builds(
        Line, images=COUNTS, epoch=NUMBERS, updates=COUNTS, speed=NUMBERS, seconds_left=NUMBERS, memory=COUNTS, measured=MEASURED,
        lr_g=NUMBERS, lr_d=NUMBERS,
    ),
    st.builds(Metrics, images=COUNTS, values=st.dictionaries(st.text(), NUMBERS), samples=COUNTS, protocol=st.text(min_size=1)),
    st.builds(Warned, images=COUNTS, kind=st.text(), text=st.text()),
    st.builds(LayoutChanged, event=st.sampled_from(CHANGES), images=COUNTS, phase=st.text(), change=st.text(), guarantee=st.text()),
    st.builds(MemoryMeasured, images=COUNTS, predicted=COUNTS, measured=COUNTS, budget=st.none() | st.integers(1, 2**53)),
    st.builds(Unknown, event=st.just("something new"), images=COUNTS, rest=MEASURED),
)  # fmt: skip


@given(RECORDS)
def test_a_record_is_read_as_it_was_written(record: Record) -> None:
    text = json.dumps(record.as_dict())
    read = parse(text)
    assert read == record and type(read) is type(record)
    assert json.dumps(read.as_dict()) == text


@given(RECORDS, st.integers(0, 400))
def test_a_record_that_was_cut_short_is_none(record: Record, length: int) -> None:
    text = json.dumps(record.as_dict())
    assert parse(text[: min(length, len(text) - 1)]) is None


@given(
    st.sampled_from([*EVENTS, "something new", None]), st.dictionaries(st.sampled_from([*FIXED, "values", "kind", "Loss_D"]), JSON)
)
def test_odd_lines_are_read_as_far_as_they_go(event: str | None, found: dict[str, Any]) -> None:
    record = parse(json.dumps(found | {"images": 9} | ({} if event is None else {"event": event})))
    assert record is not None and record.images == 9
    assert isinstance(record, Line) == (event is None)
    assert parse(json.dumps(found | {"images": None})) is None


def test_the_log_has_the_keys_that_it_always_had(train: Callable[..., Path], tmp_path: Path) -> None:
    run = train(tmp_path / "r", epochs=1, r1=1.0)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    own = ["images", "epoch", "updates", "images/s", "looking", "seconds left", "memory"]
    measured = list(lines[0])[len(own) : -2]
    assert {"Loss_D", "Loss_G", "D(x)", "D(G(z))", "R1", "D(G(z)) before", "D(G(z)) after"} == {*measured}
    assert list(lines[0]) == [*own, *measured, "lr_g", "lr_d"]
    assert list(lines[-1]) == ["event", "images", "predicted", "measured", "budget", "host_predicted", "host"]
    assert [record.as_dict() for record in RunFolder(run).records()] == lines


def test_going_back_keeps_the_log_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for images in (16, 32, 48):
        folder.log(Line(images=images, measured={"Loss_D": 0.1 + images}))
        folder.log(Unknown(event="something new", images=images, rest={"a": [1.0]}))
    before = folder.log_file.read_text().splitlines(keepends=True)
    folder.log_file.write_text("".join(before) + before[0][:-5])
    folder.rewind_log(32)
    assert folder.log_file.read_text().splitlines(keepends=True) == before[:4]


@pytest.fixture
def registries() -> Iterator[None]:
    """Leaves both as they were."""
    kept, signs = trackers.TRACKERS.copy(), diagnostics.DIAGNOSTICS.copy()
    yield
    trackers.TRACKERS.clear()
    trackers.TRACKERS.update(kept)
    diagnostics.DIAGNOSTICS[:] = signs


class Toy:
    """Remembers what it was told."""

    def __init__(self, folder: RunFolder, images: int, tell: Callable[[str], None]) -> None:
        self.folder, self.begun = folder, images
        self.lines: list[Line] = []
        self.events: list[Event] = []
        self.pictures: list[tuple[str, tuple[int, int], int]] = []
        self.closed = 0

    def line(self, line: Line) -> None:
        self.lines.append(line)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def images(self, name: str, picture: Image.Image, images_seen: int) -> None:
        self.pictures.append((name, picture.size, images_seen))
        raise MemoryError  # which is no reason to end a training

    def close(self) -> None:
        self.closed += 1


def test_a_new_tracker_is_a_class(
    registries: None, train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[Toy] = []

    def toy(folder: RunFolder, images: int, tell: Callable[[str], None]) -> Toy:
        opened.append(Toy(folder, images, tell))
        return opened[-1]

    trackers.TRACKERS["toy"] = toy

    def stop(images: int) -> None:
        if images == 160:
            raise KeyboardInterrupt

    ways = {"trackers": "toy", "sample_every": 1, "evaluate_every": 1, "evaluate_samples": 16, "metrics": "swd", "quiet": False}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "r", on_update=stop, **ways)
    assert "Broken off" in (tmp_path / "r" / "report.html").read_text()
    run = train(tmp_path / "r", **ways)
    first, second = opened
    log = RunFolder(run)
    assert (first.begun, second.begun) == (0, 128) and first.folder.path == run
    again = [record for record in log.records() if record.images > 128]
    assert [*second.lines, *second.events] == [r for r in again if isinstance(r, Line)] + [r for r in again if isinstance(r, Event)]
    assert [line.images for line in second.lines] == [176, 192]
    assert [type(event) for event in second.events][:1] == [Metrics] and isinstance(second.events[-1], MemoryMeasured)
    assert [(name, images) for name, _, images in first.pictures] == [("samples", 64), ("samples", 128)]
    assert [(name, images) for name, _, images in second.pictures] == [("samples", 192)]
    assert first.closed == second.closed == 1
    assert "Memory ran out while writing the toy: left out this time" in capsys.readouterr().out
    assert "Finished" in (run / "report.html").read_text()


def test_a_new_diagnostic_is_a_class(registries: None, train: Callable[..., Path], tmp_path: Path) -> None:
    seen: list[tuple[object, ...]] = []

    class Toy(Diagnostic):
        kind = "toy"

        def __init__(self, data: Loader, objective: Objective) -> None:
            super().__init__(data, objective)
            seen.append(("data", len(data)))

        def line(self, line: Line) -> str | None:
            seen.append(("line", line.images))
            return f"After {line.images} images." if line.images > 50 else None

        def samples(self, images: Tensor, updates: int) -> str | None:
            seen.append(("samples", tuple(images.shape), updates))
            return None

        def classes(self, covered: float, of: int, updates: int) -> str | None:
            seen.append(("classes", of, updates))
            return None

        def neighbours(self, distances: Tensor, usual: Tensor) -> str | None:
            seen.append(("neighbours", tuple(distances.shape), tuple(usual.shape)))
            return "Again, and not told again."

    diagnostics.DIAGNOSTICS.append(Toy)
    run = train(
        tmp_path / "r", data="digits", image_size=16, batch_size=128, epochs=1, report_every=1000, sample_every=1, evaluate_every=1,
        evaluate_samples=256, metrics="classes",
    )  # fmt: skip
    assert seen == [
        ("data", 1797), ("line", 1920), ("samples", (64, 1, 16, 16), 15), ("classes", 10, 15), ("neighbours", (16,), (16,)),
    ]  # fmt: skip
    told = [event for event in RunFolder(run).read_events() if isinstance(event, Warned)]
    assert told == [Warned(images=1920, kind="toy", text="After 1920 images.")]


def test_trackers_by_name() -> None:
    assert trackers.chosen(Run()) == ["log", "report"]
    assert trackers.chosen(Run(tensorboard=True)) == ["log", "tensorboard", "report"]
    assert trackers.chosen(Run(tensorboard=True, trackers=" tensorboard, ,log")) == ["log", "tensorboard", "report"]


def test_a_tracker_that_there_is_not(train: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tracker 'tensorbord': choose of log, tensorboard, report\.$"):
        train(tmp_path / "r", trackers="tensorbord")
    assert not (tmp_path / "r").exists()

"""Minutes become images by decisions of a clock, and from there on a training is like any other. The clock is the test's."""

import math
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import frugan
from frugan.config.recipe import Optimizer
from frugan.gan.optim import rate_factor
from frugan.reporting.records import DurationDecided
from frugan.reporting.run_folder import RunFolder
from frugan.reporting.story import Story
from frugan.training import duration
from frugan.training.duration import Minutes
from frugan.training.loop import Loop
from frugan.training.state import Labels, Terms
from frugan.utils.errors import UserError
from frugan.utils.signals import Stopped
from tests.conftest import SMALL, assert_same_state, final_state
from tests.test_resume import Killed


class Clock:
    """Stands still, but for an update, which takes as long as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        self.update: Callable[[int], float] = lambda images: 0.0  # after so many images
        advance = Loop.advance

        def timed(loop: Loop) -> tuple[Terms, Labels]:
            self.time += self.update(loop.state.images)
            return advance(loop)

        monkeypatch.setattr(Loop, "advance", timed)
        monkeypatch.setattr(duration, "now", lambda: self.time)
        monkeypatch.setattr("frugan.training.session.now", lambda: self.time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def train(few: Path) -> Callable[..., Path]:
    """A training of a second; settings as `frugan.train` takes them."""
    small = {name: value for name, value in SMALL.items() if name != "epochs"}
    return lambda out, data=few, **own: frugan.train(data, out=out, **(small | own))


def walked(clock: Clock, speed: Callable[[float], float], minutes: float = 10) -> tuple[Minutes, int, list[float]]:
    """A training of no network, ``speed(seconds)`` images a second: the duration, the images, and the share after each update."""
    batch = 10
    lasts = Minutes(minutes, 1000, batch, clock.time)
    clock.time += 5  # to get ready
    lasts.begin(0)
    images, shares = 0, [lasts.share(0)]
    while not lasts.over(images):
        clock.time += batch / speed(clock.time)
        images += batch
        lasts.look(images)
        shares.append(lasts.share(images))
    return lasts, images, shares


@pytest.mark.parametrize(
    ("speed", "decisions"),
    [
        (lambda t: 100, 1),
        (lambda t: 101 + math.sin(t), 1),
        (lambda t: 100 if t < 200 else 40, 4),
        (lambda t: 30 if t < 320 else 90, 4),
        (lambda t: 0.3, 1),
    ],
)
def test_it_ends_near_the_minutes_with_the_schedule_at_its_end_and_never_jumps(
    clock: Clock, speed: Callable[[float], float], decisions: int
) -> None:
    lasts, images, shares = walked(clock, speed)
    assert clock.time == pytest.approx(600, rel=0.03 if speed(0) > 1 else 0.07)  # or an update
    assert len(lasts.decisions) <= decisions
    assert shares[-1] == 1.0 and images == lasts.total
    first = lasts.decisions[0].images // 10
    assert set(shares[: first + 1]) == {0.0}
    most = 4 / (len(shares) - first)  # of an even course, where the rest turned out four times shorter
    assert all(0 <= b - a <= most for a, b in pairwise(shares))
    rates = [rate_factor(Optimizer(schedule="cosine"), 0, share) for share in shares]
    assert rates[0] == 1 and rates[-1] == pytest.approx(0) and rates == sorted(rates, reverse=True)


def test_a_time_that_is_up_before_anything_was_measured(clock: Clock) -> None:
    _, images, shares = walked(clock, lambda t: 0.01, minutes=0.5)
    assert images == 20 and shares[-1] == 1.0  # one update, and one for the schedule to end with
    with pytest.raises(UserError, match=r"--minutes 0.05 is too short to make one update: getting ready took 5 s; give more"):
        walked(clock, lambda t: 1, minutes=0.05)


def decided(run: Path) -> list[tuple[int, int]]:
    return [(e.images, e.total) for e in RunFolder(run).read_events() if isinstance(e, DurationDecided)]


def test_killed_and_resumed_it_ends_as_it_would_have(train: Callable[..., Path], clock: Clock, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"minutes": 1, "schedule": "cosine", "report_every": 1, "checkpoint_every": 3}
    clock.update = lambda images: 1.5 if images < 320 else 1.0  # faster from a check on
    straight = train(tmp_path / "straight", **settings)
    assert clock.time == pytest.approx(60, abs=2)
    assert len(decided(straight)) > 1

    def killed_at(at: int, error: type[BaseException] | None) -> Callable[[int], None]:
        def after(images: int) -> None:
            if images == at and error:
                raise error
            if images == at:
                signal.raise_signal(signal.SIGTERM)

        return after

    out = tmp_path / "broken"
    for at, error in ((160, Killed), (352, None), (592, Killed)):
        with pytest.raises(error or Stopped):
            train(out, on_update=killed_at(at, error), **settings)
    train(out, **settings)
    assert decided(out) == decided(straight), (decided(out), decided(straight))
    assert_same_state(straight, out)
    logged = [[(line.images, line.lr_g) for line in RunFolder(run).read_log()] for run in (straight, out)]
    assert logged[0] == logged[1]


def test_less_than_an_epoch_is_looked_at_saved_and_told(
    train: Callable[..., Path], clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"data": "digits", "batch_size": 10, "minutes": 40, "evaluate_every": 3, "evaluate_samples": 16}
    settings |= {"keep_checkpoints": 99, "quiet": False, "metrics": "swd"}
    clock.update = lambda images: 20
    run = train(tmp_path / "run", **settings)
    images = final_state(run)[1]["images"]
    folder, story = RunFolder(run), Story.read(run)
    assert story.finished and story.total == images and story.epochs == images / 1797 == story.epoch
    saved = [int(path.stem[7:]) for path in sorted(folder.checkpoints.iterdir())]
    assert all(b - a <= 10 * 300 / 20 for a, b in pairwise([0, *saved]))  # every five minutes
    pictures = folder.pictures_of_samples()
    assert len(pictures) == 4 and pictures[-1][0] == float(f"{images / 1797:.3g}")
    assert len([e for e in folder.read_events() if e.event == "metrics"]) == 1  # at the end
    said = capsys.readouterr().out
    assert "40 minutes, fp32" in said and f"{images:,} images, {images / 1797:.3g} epochs, are 40 minutes" in said
    assert f"epoch {images / 1797:.3g} of {images / 1797:.3g}" in folder.report_file.read_text()


def test_more_minutes_go_on_and_a_finished_run_says_so(
    train: Callable[..., Path], clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.update = lambda images: 2
    run = train(tmp_path / "run", minutes=1, **(settings := {"checkpoint_every": 99}))
    before = final_state(run)[1]
    train(run, minutes=1, quiet=False, **settings)
    assert "is already trained for" in (said := capsys.readouterr().out) and "more --minutes go on" in said
    assert final_state(run)[1] == before
    clock.time = begun = 1000.0
    train(run, minutes=2, **settings)
    assert clock.time - begun == pytest.approx(60, abs=4)
    with pytest.raises(UserError, match="--epochs was 20 and is now 3, --minutes was 2 and is now unset"):
        train(run, epochs=3)
    with pytest.raises(UserError, match="--schedule was constant and is now cosine"):
        train(run, minutes=2, schedule="cosine")
    train(run, minutes=3, schedule="cosine", accept_changes=True, **settings)
    rates = final_state(run)[1]["rates"]
    assert rates[0] < 1e-7

"""A training that goes wrong is told, once and in words; one that goes well is left alone."""

import json
from pathlib import Path

import pytest
import torch

import frugan
from frugan.config.objectives import Bce, Hinge, RpGan, WganGp
from frugan.config.recipe import Data
from frugan.data.pack_loader import PackLoader
from frugan.data.sources import open_source
from frugan.gan.augment import MOST, Augment
from frugan.reporting.records import Line, Warned
from frugan.reporting.run_folder import RunFolder
from frugan.training.diagnostics import LASTING, SETTLED, Diagnostics
from frugan.utils.draws import Draws, Rows

Told = list[tuple[str, str]]


@pytest.fixture(scope="module")
def digits() -> PackLoader:
    asked = Data(data="digits", image_size=16, channels=1)
    return PackLoader(open_source(asked), asked, seed=0, workers=1, tell=print)


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def watch(digits: PackLoader, told: Told) -> Diagnostics:
    return Diagnostics(digits, Bce(), lambda kind, text: told.append((kind, text)))


def test_samples_that_are_all_alike_are_told_once(watch: Diagnostics, digits: PackLoader, told: Told) -> None:
    one = digits.batch(5, 1).expand(64, -1, -1, -1)
    noisy = (one.float() + 8 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    watch.samples(noisy, SETTLED - 1)
    watch.samples(noisy, SETTLED)
    assert not told  # once can be chance
    for i in range(3):
        watch.samples(noisy, SETTLED + i)
    assert [kind for kind, _ in told] == ["collapse"]
    assert "--lr-g" in told[0][1]


def test_real_images_are_neither_alike_nor_copies(watch: Diagnostics, digits: PackLoader, told: Told) -> None:
    for i in range(4):
        watch.samples(digits.batch(100 * i, 64), SETTLED + i)
    asked = Data(data="digits", image_size=16, channels=1)
    source = open_source(asked)
    source.images, source.labels = source.images[:1200], None  # the others are new to it
    fewer = Diagnostics(
        PackLoader(source, asked, seed=0, workers=1, tell=print), Bce(), lambda kind, text: told.append((kind, text))
    )
    fewer.neighbours(torch.from_numpy(open_source(asked).images[1200:1264, None]))
    assert not told


def test_samples_that_are_copies_are_told_with_what_they_copy(watch: Diagnostics, digits: PackLoader, told: Told) -> None:
    copied = digits.batch(40, 16)
    noisy = (copied.float() + 10 * torch.randn(copied.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    assert torch.equal(watch.neighbours(noisy), copied)
    assert [kind for kind, _ in told] == ["memorising"]


def test_few_classes_are_a_collapse(watch: Diagnostics, told: Told) -> None:
    watch.classes(5, 10, SETTLED - 1)
    watch.classes(6, 10, SETTLED)
    assert not told
    watch.classes(5, 10, SETTLED)
    assert told[0][0] == "collapse" and "5 of 10 classes" in told[0][1]


@pytest.mark.parametrize(
    ("objective", "won", "open_"),
    [
        (
            Bce(label_smoothing=0.1),
            {"D(x)": 0.89, "D(G(z)) before": 0.001, "Loss_D": 0.33, "Loss_G": 7.0},
            {"D(G(z)) before": 0.05},
        ),
        (Hinge(), {"D(x)": 4.0, "D(G(z)) before": -4.0, "Loss_D": 0.0, "Loss_G": 4.0}, {"Loss_D": 0.4}),
        (RpGan(), {"D(x)": 9.0, "D(G(z)) before": -4.0, "Loss_D": 0.001, "Loss_G": 13.0}, {"Loss_D": 0.3}),
        (WganGp(), {"D(x)": 90.0, "D(G(z)) before": -40.0, "Loss_D": -130.0, "Loss_G": 40.0}, None),
    ],
)
def test_a_discriminator_that_wins_is_told_only_when_it_lasts(
    objective: Bce, won: dict[str, float], open_: dict[str, float] | None, digits: PackLoader, told: Told
) -> None:
    watch = Diagnostics(digits, objective, lambda kind, text: told.append((kind, text)))
    for updates in range(0, LASTING, 50):
        watch.line(line(updates, won))
    watch.line(line(LASTING, won | (open_ or {})))
    for updates in range(LASTING + 50, 2 * LASTING + 50, 50):
        watch.line(line(updates, won))
    assert not told
    for updates in range(2 * LASTING + 50, 3 * LASTING, 50):
        watch.line(line(updates, won))
    assert [kind for kind, _ in told] == ([] if open_ is None else ["discriminator won"])


def line(updates: int, measured: dict[str, float]) -> Line:
    return Line(images=64 * updates, updates=updates, measured=measured)


def warnings(run: Path) -> list[str]:
    return [event.kind for event in RunFolder(run).read_events() if isinstance(event, Warned)]


@pytest.mark.parametrize("recipe", ["mlp", "upsample", "dcgan", "r3"])
def test_a_healthy_training_is_not_warned_of(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frugan.training.diagnostics.SETTLED", 150)
    run = frugan.train(
        "digits", recipe=recipe, epochs=4, batch_size=32, width_g=8, width_d=8, sample_every=2, out=tmp_path / "r", quiet=True
    )
    assert warnings(run) == []
    assert (run / "neighbours.png").exists()


def test_a_training_that_collapses_is_warned_of_also_when_it_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("frugan.training.diagnostics.SETTLED", 20)
    ways = {"recipe": "dcgan", "batch_size": 64, "width_g": 8, "width_d": 8, "lr_g": 0.05, "lr_d": 1e-6, "out": tmp_path / "r"}
    frugan.train("digits", epochs=3, quiet=True, **ways)
    assert warnings(tmp_path / "r") == ["collapse"]
    frugan.train("digits", epochs=5, **ways)
    assert warnings(tmp_path / "r") == ["collapse"]
    assert "Warning" not in capsys.readouterr().out  # it was told before
    lines = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert next(line for line in lines if line.get("event") == "warning")["text"].startswith("Samples")


def test_augmentation_at_its_maximum_is_told_when_it_lasts(watch: Diagnostics, told: Told) -> None:
    for updates in range(0, 3 * LASTING, 50):
        watch.line(line(updates, {"p": 1.0}))  # diff, which is meant to be there always
        watch.line(line(updates, {"p": 0.7}))
    assert not told
    for updates in range(0, LASTING + 50, 50):
        watch.line(line(updates, {"p": MOST}))
    assert [kind for kind, _ in told] == ["overfitting"] and "p 0.8" in told[0][1]


@pytest.mark.parametrize("operation", ["cutout", "translation", "color"])
def test_augmentations_that_leak_are_told(operation: str, watch: Diagnostics, digits: PackLoader, told: Told) -> None:
    leaking = Augment(operation)(digits.batch(50, 64).float() / 127.5 - 1, Rows(Draws(0), "leak", 0, 64))
    samples = ((leaking.clamp(-1, 1) + 1) * 127.5).byte()
    for _ in range(2):
        watch.samples(samples, SETTLED)
    assert not told  # nothing is augmented
    watch.line(line(SETTLED, {"p": 0.5}))
    watch.samples(samples, SETTLED - 1)
    for _ in range(2):
        watch.samples(digits.batch(200, 64), SETTLED)
        watch.samples(samples, SETTLED)
    assert not told
    watch.samples(samples, SETTLED)
    assert [kind for kind, _ in told] == ["leak"]

"""Features that a projected discriminator is built on: learnt exactly in micro-batches, once, and the same in every way to them."""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from frugan.config.architectures import Projected
from frugan.config.objectives import Bce
from frugan.config.recipe import Training
from frugan.data.classes import present
from frugan.data.loader import Batch
from frugan.data.sources.base import ArraySource
from frugan.gan.features import Course, FeatureStep, rotated
from frugan.gan.networks import build
from frugan.gan.step import Step
from frugan.memory.layout import Layout
from frugan.reporting.records import FeaturesLearnt
from frugan.reporting.run_folder import RunFolder
from frugan.utils.draws import Draws
from frugan.utils.errors import UserError
from frugan.utils.signals import Stopped

from .conftest import assert_same_state, final_state, write_idx

PROJECTED = {"recipe": "projected", "precision": "fp32", "feature_width": 8, "feature_updates": 12, "epochs": 1}


def learner(size: int = 12, features: str = "both", flip: bool = True) -> FeatureStep:
    options = Projected(latent_dim=5, width_g=4, width_d=4, feature_width=4, features=features)
    generator, discriminator = (n.double() for n in build(options, size, 2))
    step = Step(generator, discriminator, Bce(), 5, Draws(3), flip=flip)
    return FeatureStep(options, discriminator, step, classes=3, size=size, seed=0)


def encoder_of(run: Path) -> dict[str, Tensor]:
    return {k: v for k, v in final_state(run)[0].items() if k.startswith("discriminator/") and int(k.split(".")[1]) > 2}


@pytest.mark.parametrize("size", [12, 130])
def test_micro_batches_of_features_add_up_and_images_are_seen_alike(size: int) -> None:
    images = torch.randint(0, 256, (9, 2, size, size), dtype=torch.uint8)
    labels = torch.arange(9) % 3
    found = []
    for micro_batch in (9, 2):
        student = learner(size)
        course = Course(updates=3, batch=9, learnt=9, held_out=0)
        with student.learning():
            student.gradients(Batch(lambda f, n: images[f : f + n], lambda f, n: labels[f : f + n]), course, 2, micro_batch)
            found.append([p.grad for p in student.parameters])
        assert all(p.grad is None for p in student.parameters) and not any(p.requires_grad for p in student.encoder.parameters())
    for whole, cut in zip(*found, strict=True):
        assert (whole - cut).norm() <= 1e-12 * whole.norm()


@pytest.mark.parametrize(
    ("size", "images", "training", "said", "updates"),
    [
        (28, 60_000, Training(epochs=1), None, 400), (28, 60_000, Training(epochs=5), None, 1000),
        (28, 60_000, Training(epochs=99), None, 2000), (28, 60_000, Training(minutes=3), None, 400),
        (28, 60_000, Training(minutes=12), None, 1200), (28, 60_000, Training(minutes=60), None, 2000),
        (64, 60_000, Training(minutes=60), None, 400), (28, 60_000, Training(minutes=60), 7, 7),
        (28, 1000, Training(minutes=60), None, 40 * 900 // 128),
    ],
)  # fmt: skip
def test_the_longer_a_training_of_small_images_the_longer_features_are_learnt(
    size: int, images: int, training: Training, said: int | None, updates: int
) -> None:
    assert Course.of(Projected(feature_updates=said), training, size, images, images).updates == updates


def test_turns_are_quarter_turns() -> None:
    images = torch.randint(0, 256, (8, 3, 5, 5), dtype=torch.uint8)
    turns = torch.arange(8) % 4
    assert rotated(images, turns).equal(torch.stack([torch.rot90(i, int(k), (1, 2)) for i, k in zip(images, turns, strict=True)]))


def test_labels_outside_of_the_classes_are_no_labels_to_learn_from() -> None:
    images = np.zeros((4, 8, 8), np.uint8)
    for labels, count in (([0, 1, 1, 0], 2), ([0, 0, 0, 0], 1), ([0, 1, -1, 1], 0), ([0, 1, 2, 1], 0), (None, 0)):
        there = None if labels is None else np.array(labels)
        assert present(ArraySource("made", images, there, ("a", "b"))) == count


def test_scales_of_features_change_nothing_but_scales() -> None:
    student = learner()
    images = torch.randint(0, 256, (7, 2, 12, 12), dtype=torch.uint8)
    x = images.double()
    before = student.encoder(x)
    student.calibrate(Batch(lambda f, n: images[f : f + n]), 7, 3)
    after = student.encoder(x)
    ratio = (after / before.clamp_min(1e-12)).amax((0, 2, 3), keepdim=True)
    assert torch.allclose(before * ratio, after)
    levels = images.double().div(127.5).sub(1)
    for level in student.levels:
        levels = level(levels)
        squares = levels.square().mean((0, 2, 3))
        assert torch.allclose(squares[squares > 0], torch.ones((), dtype=torch.float64))


def test_a_channel_that_few_images_touch_does_not_drown_the_others() -> None:
    student = learner()
    with torch.no_grad():
        for parameter in (student.levels[1].weight, student.levels[1].bias):
            parameter[0] *= 1e-5  # as if only corners of these images reached it
    images = torch.randint(0, 256, (7, 2, 12, 12), dtype=torch.uint8)
    student.calibrate(Batch(lambda f, n: images[f : f + n]), 7, 7)
    scales = student.encoder[:2](images.double().div(127.5).sub(1)).square().mean((0, 2, 3)).sqrt()
    assert 0 < scales[0] < 1e-3 and scales[1:].amax() < 1 + 1e-9
    assert student.levels[1].weight[0].norm() < 1e-3 * student.levels[1].weight[1:].norm()


def test_the_discriminators_phase_keeps_nothing_of_the_encoder() -> None:
    student = learner()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        student.step.discriminator_phase(Batch(lambda f, n: torch.zeros(n, 2, 12, 12, dtype=torch.uint8)), 0, Layout((4,)))
    weights = {level.weight.data_ptr() for level in student.levels}
    assert kept and not any(t.data_ptr() in weights for t in kept)


def test_features_come_from_anywhere_the_same(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRUGAN_CACHE", str(tmp_path / "cache"))
    straight = train(tmp_path / "straight", **PROJECTED)
    assert_same_state(straight, train(tmp_path / "cached", **PROJECTED))
    told = [
        next(e for e in RunFolder(run).read_events() if isinstance(e, FeaturesLearnt)) for run in (straight, tmp_path / "cached")
    ]
    assert f"{told[0].accuracy['labels']:.1%} of labels" in (straight / "report.html").read_text()
    assert [e.found for e in told] == [False, True] and told[0].updates == 12 and told[0].accuracy == told[1].accuracy
    monkeypatch.setenv("FRUGAN_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(
        "frugan.reporting.console.Console.features", lambda self, done, total, s: done == 5 and signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(Stopped, match="after 0 images"):
        train(tmp_path / "stopped", **PROJECTED)
    monkeypatch.undo()
    monkeypatch.setenv("FRUGAN_CACHE", str(tmp_path / "empty"))
    assert_same_state(straight, train(tmp_path / "stopped", **PROJECTED))

    narrow = PROJECTED | {"width_g": 4, "features": "rotations", "quiet": False}
    tuned = train(tmp_path / "tuned", init_from=straight, **narrow)  # with the other run's features
    assert "Features" not in capsys.readouterr().out
    assert all(v.equal(encoder_of(straight)[k]) for k, v in encoder_of(tuned).items())
    own = train(tmp_path / "own", **narrow)
    assert any(not v.equal(encoder_of(straight)[k]) for k, v in encoder_of(own).items())


def test_memory_that_runs_out_while_features_are_learnt(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    compute = FeatureStep.gradients

    def short(self: FeatureStep, *arguments: object) -> Tensor:
        sizes.append(arguments[-1])  # type: ignore[arg-type]
        if sizes[-1] > 8:
            torch.empty(1 << 60)
        return compute(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FeatureStep, "gradients", short)
    train(tmp_path / "r", **PROJECTED)
    assert 16 in sizes and sizes[-1] <= 8


def test_features_from_labels_that_are_not_there(train: Callable[..., Path], tmp_path: Path) -> None:
    data = write_idx(tmp_path / "bare", np.zeros((32, 8, 8)))
    with pytest.raises(UserError, match="--features labels needs labels, and there are none"):
        train(tmp_path / "r", data, **PROJECTED, features="labels")
    run = train(tmp_path / "r", data, **PROJECTED)
    (event,) = (e for e in RunFolder(run).read_events() if isinstance(e, FeaturesLearnt))
    assert event.task == "rotations" and not event.accuracy.keys() - {"rotations"}

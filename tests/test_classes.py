"""Classes: from any data into training, into the generator's file, and out of it by name."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import frugan
from frugan.cli import main
from frugan.config import recipes
from frugan.config.architectures import Architecture
from frugan.config.classes import Classes
from frugan.config.recipe import Recipe
from frugan.gan.networks import build
from frugan.gan.networks.blocks import Head
from frugan.gan.sampling import natural
from frugan.reporting import pictures
from frugan.reporting.records import Metrics
from frugan.reporting.run_folder import RunFolder
from frugan.utils.draws import Draws, Rows
from frugan.utils.errors import UserError

from .conftest import final_state, write_idx

TWO = Classes(("cats", "dogs"), (3, 1))


@pytest.fixture
def animals(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of grey images of 8x8, dark cats and bright dogs, so many of each."""

    def make(name: str = "animals", **of: int) -> Path:
        random = np.random.default_rng(0)
        for number, (kind, count) in enumerate((of or {"cats": 24, "dogs": 24}).items()):
            (tmp_path / name / kind).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = random.integers(0, 60, (8, 8), dtype=np.uint8) + np.uint8(min(number, 1) * 190)
                Image.fromarray(pixels).save(tmp_path / name / kind / f"{i:02}.png")
        return tmp_path / name

    return make


def size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as opened:
        return opened.size


@pytest.mark.parametrize("kind", Architecture.kinds)
def test_networks_are_those_without_classes_and_what_classes_add(kind: str) -> None:
    options = Architecture.of(kind)(latent_dim=6)
    plain, conditional = build(options, 12, 1, seed=1), build(options, 12, 1, seed=1, classes=3)
    for network, other in zip(plain, conditional, strict=True):
        own, more = network.state_dict(), other.state_dict()
        assert all(torch.equal(value, more[name]) for name, value in own.items())
        assert more.keys() > own.keys()
    generator, discriminator = (network.eval() for network in conditional)
    with torch.no_grad():
        for head in (m for m in discriminator.modules() if isinstance(m, Head)):
            head.classes.normal_()
    z = torch.randn(1, 6).expand(3, 6)
    rows = Rows(Draws(0), "t", 0, 3, torch.tensor([0, 1, 1]))
    images = generator(z, rows)
    assert not torch.allclose(images[0], images[1]) and torch.allclose(images[1], images[2], atol=1e-5)
    logits = discriminator(images[:1].expand(3, -1, -1, -1), rows)
    assert not torch.allclose(logits[0], logits[1]) and torch.allclose(logits[1], logits[2], atol=1e-4)


def test_a_conditional_training_makes_the_classes_it_is_asked_for(train: Callable[..., Path], animals: Callable[..., Path]) -> None:
    data = animals(cats=32, dogs=16)
    run = train(data.parent / "run", data, recipe="upsample", conditional=True, epochs=25, lr_g=5e-3, lr_d=5e-3)
    data.rename(data.parent / "elsewhere")  # the generator's file says all there is to know
    generator = frugan.load(run / "generator.safetensors")
    assert generator.classes == ("cats", "dogs") and generator.recipe.classes.counts == (32, 16)
    means = [generator.generate(32, classes=[name]).float().mean() for name in ("cats", "Dogs")]
    assert means[1] - means[0] > 100
    for one in ("Dogs", 1, "1", [1]):  # a class alone need not be in a list, and a number is one
        assert torch.equal(generator.generate(4, classes=one), generator.generate(4, classes=["dogs"]))
    assert torch.equal(generator.generate(4, classes=0), generator.generate(4, classes=["cats"]))
    with pytest.raises(UserError, match="there is no class 'hats': there are cats, dogs"):
        generator.generate(4, classes="hats")
    in_turn = generator.generate(5, classes=["cats", "dogs"])
    assert torch.equal(in_turn[1::2], generator.generate(5, classes=["dogs"])[1::2])
    assert torch.equal(in_turn[3:], generator.generate(2, first=3, classes=["cats", "dogs"]))
    bright = (generator.generate(300).float().mean((1, 2, 3)) > 127).float().mean()
    assert 0.2 < bright < 0.47  # a third of the data are dogs
    assert generator.interpolate([1, 2], 4, of="dogs").float().mean() - means[0] > 60  # nine images


def test_pictures_have_a_row_for_each_class(
    train: Callable[..., Path], animals: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(animals().parent / "run", animals("again", cats=20, dogs=20), conditional=True, epochs=1, sample_every=1)
    side = 64 + pictures.GAP
    for name in ("final_generated_images.png", "generated_images/epoch_1.png"):
        assert size(run / name) == (32 * side + pictures.GAP, 2 * side + pictures.GAP)
    main(["generate", str(run), "--classes", "dogs", "cats", "--n", "5", "--out", str(run / "made.png")])
    assert size(run / "made.png") == (3 * side + pictures.GAP, 2 * side + pictures.GAP)
    main(["generate", str(run), "--n", "3", "--separate", "--out", str(run / "made")])
    assert sorted(p.name for p in (run / "made").iterdir()) == [
        "seed_0_00000_cats.png", "seed_0_00001_dogs.png", "seed_0_00002_cats.png",
    ]  # fmt: skip
    main(["generate", str(run), "--classes", "dogs", "--interpolate", "1", "2", "--frames", "4"])
    for name in ("dogs", "cats"):
        main(["generate", str(run), "--classes", name, "--n", "2"])
    assert {"interpolation_1-2_f4_dogs.png", "seed_0_n2_dogs.png", "seed_0_n2_cats.png"} <= {
        p.name for p in (run / "generated").iterdir()
    }
    with pytest.raises(SystemExit):
        main(["generate", str(run), "--classes", "dogs", "cats", "--interpolate", "1", "2"])
    assert "--interpolate keeps to one class" in capsys.readouterr().err


def test_pictures_that_are_larger_than_their_format_are_refused_before_they_are_made(
    train: Callable[..., Path], animals: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(train(tmp_path / "run", animals(cats=20, dogs=20), conditional=True, epochs=1))
    most = (65_500 - pictures.GAP) // (64 + pictures.GAP)  # in a row of JPEG
    seeds = [str(seed) for seed in range(most // 8 + 2)]
    for name, asked, pixels in (
        ("a.jpg", ["--classes", "cats", "--n", str(most + 1)], "65,540x68"),
        ("a.JPEG", ["--n", str(2 * most + 1)], "65,540x134"),
        ("a.webp", ["--classes", "cats", "--n", "249"], "16,436x68"),
        ("a.jpg", ["--classes", "cats", "--interpolate", *seeds, "--frames", "9"], "74,318x68"),
    ):
        out = tmp_path / name
        with pytest.raises(SystemExit):
            main(["generate", run, "--out", str(out), *asked])
        said = capsys.readouterr().err
        assert said.startswith(f"frugan: {out} would have {pixels} pixels, and {out.suffix} has at most") and said.count("\n") == 1
        assert "write a .png, or ask for fewer images" in said and not out.exists()
    main(["generate", run, "--out", str(tmp_path / "a.jpg"), "--classes", "cats", "--n", str(most)])
    assert size(tmp_path / "a.jpg")[0] == most * 66 + 2 <= 65_500
    main(["generate", run, "--out", str(tmp_path / "a.webp"), "--classes", "cats", "--n", "248"])
    main(["generate", run, "--out", str(tmp_path / "b.png"), "--classes", "cats", "--interpolate", "1", "2", "--frames", "17"])
    assert size(tmp_path / "b.png")[0] == 10 * 66 + 2  # every other one, and the last


def test_natural_classes_are_as_often_as_in_the_data_and_belong_to_the_sample() -> None:
    recipe = replace(recipes.get("dcgan"), classes=Classes(("a", "none", "b"), (30, 0, 10)))
    whole = natural(recipe, 5, 0, 4000)
    assert whole is not None
    assert torch.equal(whole[130:300], natural(recipe, 5, 130, 170))
    assert 0.72 < (whole == 0).float().mean() < 0.78 and (whole == 1).sum() == 0
    assert natural(recipes.get("dcgan"), 5, 0, 3) is None


def test_names_and_numbers_of_classes() -> None:
    assert TWO.find(["dogs", "CATS", "1"]) == [1, 0, 1]
    digits = Classes(("3", "1"), (1, 1))
    assert digits.find(["1"]) == [1]  # a name, not a number
    recipe = replace(recipes.get("dcgan"), classes=TWO)
    assert Recipe.from_toml(recipe.to_toml(), "here") == recipe


@pytest.mark.parametrize(
    ("classes", "asked", "sentence"),
    [
        (TWO, "dgos", "there is no class 'dgos': there are cats, dogs."),
        (TWO, "2", "there is no class '2': there are cats, dogs."),
        (Classes(tuple(f"class{i}" for i in range(40)), (1,) * 40), "clas7", "there is no class 'clas7': did you mean 'class7'?"),
        (Classes(("a", "b", "c"), (1, 0, 1)), "b", "class 'b' had no images to learn from: leave it out."),
    ],
)
def test_classes_that_are_not_there(classes: Classes, asked: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        classes.find([asked])
    assert str(caught.value) == sentence


def test_a_generator_without_classes_is_asked_for_one(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", epochs=1)
    with pytest.raises(SystemExit):
        main(["generate", str(run), "--classes", "cats"])
    assert "there is no class 'cats': this generator was trained without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("of", "sentence"),
    [
        ({"cats": 30}, "--conditional learns classes, and animals has none: put the images of each into a folder of its own"),
        ({"cats": 30, ".": 1}, "--conditional learns classes, and 00.png lies beside the folders of classes: put"),
    ],
)
def test_images_without_classes(
    of: dict[str, int], sentence: str, train: Callable[..., Path], animals: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", animals(**of), conditional=True)
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_class_none_of_whose_images_can_be_read_is_not_learnt(
    train: Callable[..., Path], animals: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = animals(cats=24, dogs=24, newts=1)
    (folder / "newts" / "00.png").write_bytes(b"none")
    settings = {"conditional": True, "quiet": False, "class_sampling": "balanced"}
    run = train(tmp_path / "run", folder, **settings, epochs=1)
    said = capsys.readouterr().out
    assert (
        said.count("No image of class newts can be read: nothing is learnt of it.") == 1
        and "48 images of animals in 2 classes" in said
    )
    recipe = (run / "recipe.toml").read_text()
    assert Recipe.from_toml(recipe, "here").classes == Classes(("cats", "dogs", "newts"), (24, 24, 0))
    assert frugan.load(run).classes == ("cats", "dogs")
    counts = "\n    24,\n    24,\n    0,"
    assert counts in recipe  # earlier versions wrote what there would have been
    (run / "recipe.toml").write_text(recipe.replace(counts, counts.replace("0", "1")))
    train(run, folder, **settings, epochs=2)
    said = capsys.readouterr().out  # of a pack that was there
    assert said.count("No image of class newts can be read: nothing is learnt of it.") == 1
    assert Recipe.from_toml((run / "recipe.toml").read_text(), "here").classes.counts == (24, 24, 0)
    (run / "recipe.toml").write_text(recipe.replace(counts, "\n    23,\n    25,\n    0,"))
    with pytest.raises(UserError, match="was started with other classes of the same images"):
        train(run, folder, **settings, epochs=3)


def test_of_two_classes_one_cannot_be_read(train: Callable[..., Path], animals: Callable[..., Path], tmp_path: Path) -> None:
    folder = animals(cats=24, dogs=2)
    for path in (folder / "dogs").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="needs two classes, and the images of animals are all of one, cats: leave it out"):
        train(tmp_path / "run", folder, conditional=True)
    assert not (tmp_path / "run").exists()


def test_labels_out_of_range_and_one_class_only(few: Path, train: Callable[..., Path], tmp_path: Path) -> None:
    images = np.zeros((64, 8, 8), np.uint8)
    strange = np.full(64, 1, np.uint8)
    with pytest.raises(UserError, match=r"--conditional needs two classes, and the images of one are all of one, 1: leave it out"):
        train(tmp_path / "run", write_idx(tmp_path / "one", images, strange), conditional=True)
    strange[7] = 200
    data = write_idx(tmp_path / "mnist", images, strange)
    with pytest.raises(UserError, match=r"image 7 of mnist is of class 200, and mnist has classes 0 to 9: mend the labels \(1 of"):
        train(tmp_path / "run", data, conditional=True)
    assert train(tmp_path / "run", data, epochs=1).exists()  # who learns no classes does not care


def test_classes_of_few_images_are_named(
    train: Callable[..., Path], animals: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", animals(cats=30, dogs=3), conditional=True, epochs=1, quiet=False)
    assert "Few images are of dogs (3): expect samples of such a class to repeat them." in capsys.readouterr().out


def test_balanced_classes_are_refused_where_images_are_compared(train: Callable[..., Path], few: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--class-sampling balanced draws classes anew .* rpgan compares each with a real one"):
        train(tmp_path / "run", recipe="r3", conditional=True, class_sampling="balanced")


def test_fine_tuning_with_classes_from_a_run_without_and_the_other_way(
    train: Callable[..., Path], animals: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(tmp_path / "plain", animals(), epochs=1)
    three = animals("three", cats=20, dogs=20, mice=20)
    conditional = train(tmp_path / "conditional", three, init_from=str(plain), conditional=True, epochs=1, quiet=False)
    said = capsys.readouterr().out
    assert "tensors of the generator fit; new are entry.classes [3, 8]." in said
    assert "tensors of the discriminator fit; new are blocks.1.classes [3, 8, 4, 4]." in said
    assert "Of 3 classes 3 are not known there: cats, dogs, mice." in said
    others = animals("others", ants=20, mice=20)
    changed = train(tmp_path / "changed", others, init_from=str(conditional), conditional=True, epochs=1, lr_g=1e-9, quiet=False)
    assert "Of 2 classes 1 are not known there: ants." in capsys.readouterr().out
    before, after = (final_state(run)[0] for run in (conditional, changed))
    assert torch.allclose(after["generator/entry.classes"][1], before["ema/module.entry.classes"][2], atol=1e-6)  # of mice
    strange = animals("strange", owls=20, rats=20)
    train(tmp_path / "none", strange, init_from=str(conditional), conditional=True, epochs=1, quiet=False)
    assert "tensors of the generator fit; new are entry.classes [2, 8]." in capsys.readouterr().out
    train(tmp_path / "back", others, init_from=str(conditional), epochs=1, quiet=False)
    assert "tensors of the generator fit." in capsys.readouterr().out


def test_an_evaluation_asks_whether_samples_are_of_their_class(
    train: Callable[..., Path], animals: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frugan.evaluation.families.classifier.UPDATES", 30)
    data = animals(cats=160, dogs=40)
    settings = {"epochs": 8, "lr_g": 5e-3, "lr_d": 5e-3, "evaluate_every": 8, "evaluate_samples": 64, "metrics": "class_accuracy"}
    run = train(data.parent / "run", data, recipe="upsample", conditional=True, **settings)
    (measured,) = [event for event in RunFolder(run).read_events() if isinstance(event, Metrics)]
    assert measured.values["class_accuracy"] > 0.9
    main(["evaluate", str(run), "--samples", "190", "--metrics", "class_accuracy", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["class_accuracy"] > 0.9
    assert found["classes"]["cats"]["frechet_classifier"] > 0 and found["classes"]["dogs"]["frechet_classifier"] is None  # too few
    main(["evaluate", str(run), "--samples", "64", "--metrics", "class_accuracy"])
    assert re.search(r"dogs +[01]\.\d{3} +-", capsys.readouterr().out)
    others = animals("others", ants=30, bees=30)
    for command in (["evaluate", str(data), str(data), "--image-size", "8"], ["evaluate", str(run), str(others)]):
        with pytest.raises(SystemExit):
            main([*command, "--samples", "32", "--metrics", "class_accuracy"])
        said = capsys.readouterr()
        assert "class_accuracy needs samples of a run with --conditional, and real images of the classes that it learnt" in said.err
    assert "The classes of others are others than those of" in said.out

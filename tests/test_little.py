"""Few images: mirroring that the images allow, samples learnt by heart, weights of a run at another size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import frugan
from frugan.cli import main
from frugan.cli.parsing import spelled_out
from frugan.config.recipe import Data, Recipe
from frugan.config.recipes import get
from frugan.evaluation.neighbours import compared, thumbnails
from frugan.gan.networks import build
from frugan.gan.networks.projected import Level
from frugan.gan.transfer import matched, said, take_weights
from frugan.reporting.records import Metrics
from frugan.reporting.run_folder import RunFolder
from frugan.training.mirroring import FEWEST, TOLD_APART, small, told_apart
from frugan.utils.errors import UserError

from .conftest import final_state


def blobs(n: int, side: int = 16) -> np.ndarray:
    """Bright squares anywhere: as likely as their mirror images."""
    random = np.random.default_rng(0)
    images = np.full((n, side, side), 40, np.uint8)
    for image in images:
        y, x = random.integers(0, side - 5, 2)
        image[y : y + 5, x : x + 5] = 220
    return images


def test_digits_are_told_from_their_mirror_images_and_symmetric_images_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from frugan.data.sources.standard import as_published

    digits = torch.from_numpy(np.rint(as_published()[0][:400] * 15.9375).astype(np.uint8))[:, None]
    assert told_apart(small(digits)) > TOLD_APART + 0.15
    assert told_apart(small(torch.from_numpy(blobs(400))[:, None])) < TOLD_APART
    monkeypatch.setattr("frugan.training.mirroring.UPDATES", 2)
    assert told_apart(small(torch.full((80, 3, 20, 20), 7, dtype=torch.uint8))) == 0.5  # nothing to tell


def test_flip_auto_asks_once_and_is_written_down(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "blobs"
    folder.mkdir()
    for i, image in enumerate(blobs(FEWEST)):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    monkeypatch.setattr("frugan.training.mirroring.told_apart", lambda images: TOLD_APART - 0.01)
    out = train(tmp_path / "run", folder, flip="auto", epochs=1, quiet=False)
    told = capsys.readouterr().out
    assert "--flip auto: a probe tells 59% of images from their mirror images" in told and "so that images are mirrored." in told
    assert "Only 64 images: expect variations of these at best" in told
    assert 'flip = "yes"' in (out / "recipe.toml").read_text()
    monkeypatch.setattr("frugan.training.mirroring.told_apart", lambda images: pytest.fail("asked again"))
    train(tmp_path / "run", folder, flip="auto", epochs=2)
    (folder / "063.png").unlink()
    capsys.readouterr()
    train(tmp_path / "fewer", folder, flip="auto", epochs=1, quiet=False)
    assert "63 images are too few to ask" in capsys.readouterr().out


def test_words_for_flip_old_and_new() -> None:
    assert Data(flip=True).flip == "yes" and Data(flip=False) == Data()  # type: ignore[arg-type]
    recipe = Recipe.from_toml("recipe = 'dcgan'\n[data]\nflip = true", "here")
    assert recipe.data.flip == "yes" and Recipe.from_toml(recipe.to_toml(), "here") == recipe
    for arguments, plain in (
        (["train", "--flip", "x/"], ["train", "--flip", "yes", "x/"]),
        (["--flip", "auto"], ["--flip", "auto"]),
        (["--flip"], ["--flip", "yes"]),
        (["--flip", "False"], ["--flip", "no"]),
        (["--flip=true"], ["--flip", "yes"]),
        (["--no-flip", "--epochs", "3"], ["--flip", "no", "--epochs", "3"]),
        (["--flip", "--epochs", "3"], ["--flip", "yes", "--epochs", "3"]),
    ):
        assert spelled_out(arguments) == plain


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--augment", "always"], "--augment must be one of none, diff, ada, auto, not 'always'."),
        (["--augment", "diff", "--augment-policy", "cut"], "there is no operation 'cut' in --augment-policy"),
        (["--ada-target", "1.5"], "--ada-target must be at most 1, not 1.5"),
        (["--ada-images", "0"], "--ada-images must be at least 1, not 0"),
        (["--flip=maybe"], "--flip must be one of no, yes, auto, not 'maybe'."),
    ],
)
def test_bad_words_get_a_sentence(
    arguments: list[str], sentence: str, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", str(few), "--batch-size", "16", "--image-size", "8", "--out", str(tmp_path / "r"), "--quiet", *arguments])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_copies_are_near_and_new_images_are_as_near_as_real_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (120, 1, 16, 16), generator=draw, dtype=torch.uint8)
    real, new = thumbnails(images[:80]), thumbnails(images[80:])
    values = compared(new, real)
    assert values["nearest"] == pytest.approx(1, abs=0.05) and values["copies"] == 0
    values = compared(real[:40] * 0.98, real, piece=7)
    assert values["nearest"] < 0.1 and values["copies"] == 1
    twice = torch.cat([real, real])
    assert compared(real, twice) == {"nearest": 0, "copies": 1}
    assert compared(new, twice) == compared(new, real)
    one = real[:1].expand(5, -1)
    assert np.isnan(compared(new, one)["nearest"]) and compared(new, one)["copies"] == 0 and compared(one, one)["copies"] == 1


def test_a_run_on_few_images_says_how_near_its_samples_lie(train: Callable[..., Path], tmp_path: Path) -> None:
    out = train(tmp_path / "run", sample_every=1, epochs=1, augment="diff")
    (event,) = [e for e in RunFolder(out).read_events() if isinstance(e, Metrics)]
    assert event.values.keys() == {"nearest", "copies"} and "all 64 images" in event.protocol
    assert RunFolder(out).read_log()[-1].measured.keys() >= {"p", "r_t"}
    page = (out / "report.html").read_text()
    assert "Best Copies" in page and "Best Distance" not in page  # noise lies farthest, and is not the best


def test_blocks_are_matched_by_the_size_of_their_maps() -> None:
    small, large = [(0, 2), (2, 3), (3, 4), (4, 5)], [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert matched(large, small, "generator") == {0: 0, 1: 1, 2: 2, 3: 3}
    down_small, down_large = [(5, 4), (4, 3), (3, 2), (2, 0)], [(6, 5), (5, 4), (4, 3), (3, 2), (2, 0)]
    assert matched(down_large, down_small, "discriminator") == {4: 3, 3: 2, 2: 1, 1: 0}
    assert matched(down_small, down_large, "discriminator") == {3: 4, 2: 3, 1: 2, 0: 1}
    ends = [(5, 4), (4, 4), (4, 0)]  # of other maps all but the last: the ends that see images are matched all the same
    assert matched([(6, 5), (5, 0)], ends, "discriminator") == {0: 0}


@pytest.mark.parametrize("name", ["dcgan", "upsample", "r3"])
def test_a_network_for_larger_images_takes_what_works_on_maps_of_the_same_size(name: str) -> None:
    other = get(name).replace(image_size=16, channels=3, width_g=16, width_d=16, latent_dim=8)
    recipe = get(name).replace(image_size=32, channels=3, width_g=8, width_d=8, latent_dim=8, init_from="old")
    before = dict(zip("gd", build(other.network, 16, 3, seed=1), strict=True))
    after = dict(zip("gd", build(recipe.network, 32, 3, seed=2), strict=True))
    tensors = {f"generator/{k}": v for k, v in before["g"].state_dict().items()}
    tensors |= {f"discriminator/{k}": v for k, v in before["d"].state_dict().items()}
    taken = take_weights(tensors, after["g"], after["d"], recipe, other)
    assert all(found.fitted >= 0.5 * found.of for found in taken.values()), taken
    first, last = after["g"].blocks[0].state_dict(), after["d"].blocks[-1].state_dict()
    assert all(v.equal(before["g"].blocks[0].state_dict()[k]) for k, v in first.items())
    assert all(v.equal(before["d"].blocks[-1].state_dict()[k]) for k, v in last.items())
    sentences = said(taken, recipe, other)
    assert "From old (16x16): " in sentences[0] and "fit, matched by the size of their maps; new are blocks." in sentences[0]
    wide = recipe.replace(width_g=16, width_d=16)
    assert said(taken, wide, other)[-1].endswith("in maps of the same size: --width-g 8 --width-d 8.")


def test_features_and_heads_are_taken_by_their_level() -> None:
    other = get("projected").replace(image_size=28, channels=3, feature_width=4)
    recipe = other.replace(image_size=48)  # which has a level more, and heads on all of them
    before = dict(zip("gd", build(other.network, 28, 3, seed=1), strict=True))
    after = dict(zip("gd", build(recipe.network, 48, 3, seed=2), strict=True))
    assert [sum(isinstance(b, Level) for b in networks["d"].blocks) for networks in (before, after)] == [4, 5]
    assert [before["d"].heads, after["d"].heads] == [4, 6]
    tensors = {
        f"{kind}/{k}": v for kind, n in (("generator", "g"), ("discriminator", "d")) for k, v in before[n].state_dict().items()
    }
    taken = take_weights(tensors, after["g"], after["d"], recipe, other)
    assert not any("--width-d" in sentence for sentence in said(taken, recipe, other))  # heads have the same width at any size
    for mine, there in zip(after["d"].encoder, before["d"].encoder, strict=False):
        assert mine.weight.equal(there.weight) and mine.bias.equal(there.bias)
    assert not after["d"].encoder[-1].weight.equal(before["d"].encoder[-1].weight)
    for mine, there in ((0, 0), (2, 1), (3, 2), (4, 3)):  # pixels, and levels two to four
        first, second = (n["d"].blocks[i].state_dict()["0.weight"] for n, i in ((after, mine), (before, there)))
        assert first.equal(second)


def test_a_run_starts_from_one_of_another_size(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tmp_path / "first", epochs=1, image_size=8, width_g=16, width_d=16)
    second = train(tmp_path / "second", epochs=1, image_size=16, init_from=first, freeze_d=0, quiet=False)
    assert f"From {first} (8x8): " in capsys.readouterr().out
    assert final_state(second)[1]["updates"] == 4
    assert frugan.load(second).generate(2).shape == (2, 1, 16, 16)
    with pytest.raises(UserError, match=r"--freeze-d 2 would keep what is new in D: .* has nothing for blocks\.0\.0\.weight"):
        train(tmp_path / "frozen", epochs=1, image_size=16, init_from=first, freeze_d=2, channels=3)
    assert not (tmp_path / "frozen").exists()

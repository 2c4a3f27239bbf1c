"""The newcomer's map in CONTRIBUTING.md: each kind of addition, done as it says, trains."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from torch import Tensor, nn

import frugan
from frugan.cli import main
from frugan.config import recipes
from frugan.config.architectures import Architecture, Dcgan
from frugan.config.objectives import Hinge, Objective
from frugan.config.recipe import Data, Recipe
from frugan.config.section import option
from frugan.data import sources
from frugan.data.sources.base import ArraySource, Source
from frugan.gan import losses, networks
from frugan.gan.networks.blocks import Block, Network

from .conftest import SMALL, final_state


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Leaves every registry as it was."""
    kept = [(r, r.copy()) for r in (Objective.kinds, Architecture.kinds, losses.LOSSES, networks.BUILDERS, recipes.RECIPES)]
    openers = sources.OPENERS.copy()
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)
    sources.OPENERS[:] = openers


def test_a_new_loss_is_a_dataclass_and_two_functions(few: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class LeastSquares(Objective):  # in recipe.py
        kind: ClassVar[str] = "least-squares"
        target: float = option(1.0, "what D should say of real images", above=0)

    def discriminator(options: LeastSquares, real: Tensor, fake: Tensor) -> Tensor:  # in objective.py
        return (real - options.target).square() + fake.square()

    def generator(options: LeastSquares, fake: Tensor, real: Tensor | None) -> Tensor:
        return (fake - options.target).square()

    losses.LOSSES[LeastSquares] = losses.Loss(discriminator, generator)

    command = [
        "--objective",
        "least-squares",
        "--target",
        "0.9",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--quiet",
        "--r1",
        "0.1",
    ]
    main(["train", str(few), *command, "--out", str(tmp_path / "r")])
    saved = frugan.Recipe.from_toml(str(final_state(tmp_path / "r")[1]["recipe"]), "r")
    assert saved.objective == LeastSquares(target=0.9, r1=0.1)


def test_a_new_network_is_a_dataclass_and_a_file_with_build(few: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Tiny(Architecture):  # in recipe.py
        kind: ClassVar[str] = "tiny"
        width_g: int = option(8, "units")
        width_d: int = option(8, "units")

    def build(options: Tiny, image_size: int, channels: int) -> tuple[Network, Network]:  # in networks/tiny.py
        pixels = channels * image_size**2
        shape = nn.Unflatten(1, (channels, image_size, image_size))
        generator = Network(Block(nn.Linear(options.latent_dim, pixels), nn.Tanh(), shape))
        return generator, Network(
            Block(nn.Flatten(), nn.Linear(pixels, options.width_d), nn.ReLU()),
            Block(nn.Linear(options.width_d, 1), nn.Flatten(0)),
        )

    networks.BUILDERS[Tiny] = build  # in networks/__init__.py

    chosen = recipes.dcgan().replace(network="tiny")
    run = frugan.train(few, recipe=chosen, out=tmp_path / "r", **SMALL)
    assert frugan.load(run).generate(3).shape == (3, 1, 8, 8)


def test_a_new_recipe_is_a_function(few: Path, tmp_path: Path) -> None:
    def lean() -> Recipe:  # in recipes.py
        return Recipe(recipe="lean", network=Dcgan(norm_d="none"), objective=Hinge())

    recipes.RECIPES["lean"] = lean

    run = frugan.train(few, recipe="lean", out=tmp_path / "r", **SMALL)
    assert 'recipe = "lean"' in (run / "recipe.toml").read_text()


def test_a_new_data_source_is_a_function(tmp_path: Path) -> None:
    def arrays(data: Data) -> Source | None:  # in data/source.py
        path = Path(data.data)
        return ArraySource(path.stem, np.load(path), None, ()) if path.suffix == ".npy" else None

    sources.OPENERS.append(arrays)

    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (32, 8, 8), np.uint8))
    run = frugan.train(tmp_path / "noise.npy", out=tmp_path / "r", **SMALL)
    assert (run / "final_generated_images.png").exists()

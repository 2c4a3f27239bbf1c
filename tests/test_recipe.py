"""Recipes: names, ranges, TOML there and back."""

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugan.cli import parse
from frugan.cli.parsing import recipe_said
from frugan.config import recipes
from frugan.config.architectures import Architecture
from frugan.config.objectives import Hinge, Objective
from frugan.config.recipe import Recipe
from frugan.config.run import Run
from frugan.config.section import Kinded
from frugan.gan import networks
from frugan.gan.losses import LOSSES
from frugan.gan.penalties import PENALTIES
from frugan.utils.errors import UserError

names = st.sampled_from(sorted(recipes.RECIPES))


def test_a_file_may_say_what_differs_from_a_recipe_that_it_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('recipe = "mlp"\n[training]\nepochs = 1\n')
    assert recipes.get(str(file)) == recipes.mlp().replace(epochs=1)
    file.write_text('recipe = "r3"\n[objective]\nkind = "hinge"\n[optimizer]\nlr_g = 1e-3\n')
    found = recipes.get(str(file))
    assert found.network == recipes.r3().network and found.objective == Hinge() and found.optimizer.lr_g == 1e-3
    assert found.optimizer.lr_d == recipes.r3().optimizer.lr_d
    file.write_text('recipe = "mpl"')
    with pytest.raises(UserError, match="there is no recipe called 'mpl': did you mean 'mlp'"):
        recipes.get(str(file))
    file.write_text(recipes.r3().replace(lr_g=1e-3).to_toml().replace('recipe = "r3"', 'recipe = "my own"'))
    assert recipes.get(str(file)).recipe == "my own"


@given(name=names, objective=st.sampled_from(sorted(Objective.kinds)), lr=st.floats(1e-6, 1), size=st.none() | st.integers(8, 999))
def test_toml_there_and_back(name: str, objective: str, lr: float, size: int | None) -> None:
    recipe = recipes.get(name).replace(objective=objective, lr_g=lr, image_size=size, flip=True)
    assert Recipe.from_toml(recipe.to_toml(), "here") == recipe


def test_registries_agree() -> None:
    assert all((Path(networks.__path__[0]) / f"{kind}.py").exists() for kind in Architecture.kinds)
    assert set(Objective.kinds.values()) == set(LOSSES), "each kind of objective has its entry in LOSSES of gan/losses.py"
    weights = {f.name for kind in Objective.kinds.values() for f in fields(kind) if f.metadata["help"].startswith("weight of")}
    assert weights == {key for key, *_ in PENALTIES}, "each weight of a penalty has its entry in PENALTIES of gan/penalties.py"
    assert all(recipes.get(name).recipe == name for name in recipes.RECIPES)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_flat_names_belong_to_one_section_and_have_help(name: str) -> None:
    recipe = recipes.get(name)
    every = [f.name for s in recipe.sections().values() for f in fields(s)] + [f.name for f in fields(Run)]
    assert len(every) == len(set(every))
    assert all(f.metadata["help"] for s in recipe.sections().values() for f in fields(s))
    assert sum(isinstance(s, Kinded) for s in recipe.sections().values()) == 2


def test_replacing_the_objective_keeps_what_both_have() -> None:
    recipe = recipes.r3().replace(objective="hinge")
    assert recipe.objective.kind == "hinge"
    assert recipe.objective.r1 == recipes.r3().objective.r1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr_g": 0}, "--lr-g must be above 0, not 0"),
        ({"lr_d": -1.5}, "--lr-d must be above 0, not -1.5"),
        ({"image_size": 7}, "--image-size must be at least 8, not 7"),
        ({"norm_g": "layer"}, "--norm-g must be one of batch, group, none, not 'layer'"),
        ({"epochs": 1.5}, "--epochs must be a whole number, not 1.5"),
        ({"minutes": 0}, "--minutes must be above 0, not 0"),
        ({"minutes": -3.0}, "--minutes must be above 0, not -3"),
        ({"minutes": 3.0, "epochs": 3}, "--epochs and --minutes both say how long to train: leave one out."),
        ({"flip": 1}, "--flip must be one of no, yes, auto, not 1"),
        ({"batchsize": 8}, "there is no setting 'batchsize' in recipe 'dcgan': did you mean 'batch_size'?"),
        ({"objective": "hings"}, "there is no objective called 'hings': did you mean 'hinge'?"),
    ],
)
def test_wrong_settings_say_what_and_how(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.get("dcgan").replace(**settings)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("recipe = ", "mine.toml is not valid TOML"),
        ("[optimizer]\nlr_h = 1", "mine.toml: there is no key 'lr_h' in [optimizer]: did you mean 'lr_"),
        ("[optimiser]\nlr_g = 1", "mine.toml: there is no section 'optimiser' in a recipe: did you mean 'optimizer'?"),
        ("[network]\nkind = 'dcgam'", "mine.toml: there is no network called 'dcgam': did you mean 'dcgan'?"),
        ("data = 3", "mine.toml: 'data' must be a table, [data]."),
    ],
)
def test_wrong_files_say_what_and_where(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.from_toml(text, "mine.toml")
    assert sentence in str(caught.value)


def test_what_is_said_last_of_epochs_and_minutes_counts(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(recipes.dcgan().replace(minutes=12).to_toml())

    def said(*flags: str) -> tuple[int, float | None]:
        training = recipe_said(parse(["train", "--recipe", *flags])[1]).training
        return training.epochs, training.minutes

    mine = str(tmp_path / "mine.toml")
    assert said(mine) == (20, 12) and said(mine, "--epochs", "3") == (3, None) and said(mine, "--minutes", "0.5") == (20, 0.5)
    assert said("r3") == (20, None) and said("r3", "--minutes=3") == (20, 3)
    with pytest.raises(UserError, match="both say how long"):
        said("r3", "--minutes=3", "--epochs", "20")

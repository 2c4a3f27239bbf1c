"""The README's commands are real."""

import re
import shlex
from pathlib import Path

import pytest

from frugan.cli import main, parse
from frugan.config import recipes
from frugan.config.augmentation import FEW
from frugan.gan.levers import LEVERS
from frugan.memory.layout import Guarantee

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(?:sh|console)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("frugan ")]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_in_the_readme_exists(command: str) -> None:
    parse(shlex.split(command)[1:])


def test_its_table_of_guarantees_is_what_levers_declare() -> None:
    said = {Guarantee.BITWISE: "the same bits", Guarantee.REASSOCIATION: "the same gradients up to rounding"}
    table = re.search(r"\| \| guarantee \|\n\|---\|---\|\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert table
    rows = [row.split("|")[1:3] for row in table[1].splitlines()]
    for lever in LEVERS.values():
        (told,) = (guarantee for ways, guarantee in rows if lever.words in [way.strip() for way in ways.split(",")])
        assert told.strip().startswith(said[lever.guarantee]), lever


def test_its_table_of_recipes_has_them_all_with_the_default_and_its_precision() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)`(?: \((default.*?)\))? \|", text.partition("## Recipes")[2].partition("\n## ")[0], re.M))
    assert sorted(table) == sorted(recipes.RECIPES)
    said = {
        recipes.DEFAULT_GREY: f"default for labelled grey images up to {recipes.SMALL} pixels",
        recipes.DEFAULT: "default for others",
    }
    assert {name: default for name, default in table.items() if default} == said
    automatic = [name for name in recipes.RECIPES if recipes.get(name).memory.precision != "fp32"]
    (asking,) = re.findall(r"\(((?:`\w+`(?: and )?)+) ask for `--precision auto`", text)
    assert automatic == re.findall(r"`(\w+)`", asking)
    augmented = [name for name in recipes.RECIPES if recipes.get(name).augmentation.augment == "auto"]
    assert augmented == re.findall(rf"^\| `(\w+)`.*below {FEW:,} images D sees them augmented", text, re.M)


def test_its_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(BLOCKS), re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert targets[:2] == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: object) -> None:
    monkeypatch.chdir(tmp_path)
    photos(n=70)  # type: ignore[operator]
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    exec(compile(example.replace("epochs=5", "epochs=1, quiet=True, width_g=4, width_d=4"), "README.md", "exec"), {})


def test_the_walk_of_the_readme_on_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["train", "--epochs", "1", "--width-g", "4", "--width-d", "4", "--quiet"])
    main(["generate", "runs/digits-projected", "--n", "16", "--seed", "7"])
    assert Path(capsys.readouterr().out.strip()).exists()

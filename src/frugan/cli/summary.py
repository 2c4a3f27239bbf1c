"""``frugan summary``: both networks of a recipe, layer by layer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from frugan.cli.parsing import Command, recipe_options, recipe_said


class Summary:
    """Prints both networks of a recipe, layer by layer."""


def options(arguments: Sequence[str]) -> type[Any]:
    """Everything about the recipe."""
    return recipe_options(Summary, arguments)


def run(said: Any) -> None:
    """Prints both networks of a recipe, layer by layer."""
    recipe = recipe_said(said)
    from frugan.data.classes import classes_of
    from frugan.data.opening import opened
    from frugan.gan.summary import summarise
    from frugan.reporting.console import Console

    console = Console()
    data = recipe.data
    if recipe.memory.precision == "auto":
        from frugan.utils import device

        recipe = recipe.replace(precision=device.fast_precision(device.choose("auto")))
    if not (data.image_size and data.channels) or recipe.training.conditional:
        source, data = opened(data, console.tell)
        recipe = replace(recipe, classes=classes_of(source, recipe.training.conditional, console.tell))
    console.networks(summarise(recipe.replace(image_size=data.image_size, channels=data.channels)))


COMMAND = Command(options, run)

"""``frugan train``: trains, or goes on with a training that was interrupted."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from frugan.cli.parsing import Command, described, extra, recipe_options, recipe_said
from frugan.config.run import Run
from frugan.training import run_training
from frugan.utils import threads


class Train:
    """Trains, or goes on with a training that was interrupted."""


def options(arguments: Sequence[str]) -> type[Any]:
    """Everything about the recipe and the run."""
    return recipe_options(Train, arguments, *described(Run), extra("quiet", bool, "print nothing but errors", False))


def run(said: Any) -> None:
    """Trains, or goes on with a training that was interrupted."""
    recipe = recipe_said(said)
    asked = Run(**{f.name: getattr(said, f.name) for f in fields(Run)})
    threads.begin(asked.threads)
    from frugan.utils.processes import leads
    from frugan.utils.signals import Stopped

    try:
        run_training(recipe, asked, said.quiet)
    except Stopped as stopped:
        if leads():
            print(f"frugan: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)


COMMAND = Command(options, run)

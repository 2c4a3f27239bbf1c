"""``frugan plan``: what a training would need and how it would be laid out, without training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from frugan.cli.parsing import Command, described, extra, recipe_options, recipe_said, spin_briefly
from frugan.config.run import Run
from frugan.utils.errors import UserError


class Plan:
    """Says what a training would need and how it would be laid out, without training."""


def options(arguments: Sequence[str]) -> type[Any]:
    """Everything about the recipe, and what of the run the plan depends on."""
    return recipe_options(
        Plan, arguments, *[o for o in described(Run) if o[0] in ("memory", "allow_approximate", "device", "threads")],
        extra("json", bool, "print the plan as JSON", False),
        extra("compare", tyro.conf.FlagCreatePairsOff[bool], "list every combination of levers, and time the one chosen", False),
        extra("plot", str | None, "picture of memory over one update to write"),
    )  # fmt: skip


def run(said: Any) -> None:
    """Says what a training would need and how it would be laid out."""
    recipe = recipe_said(said)
    if said.plot and Path(said.plot).suffix.lower() not in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
        raise UserError(f"--plot {said.plot}: pictures are written as .png, .jpg, .svg or .pdf.")
    spin_briefly()
    import frugan.training.trainer  # noqa: F401  # what a training imports is part of what it needs
    from frugan.reporting import pictures
    from frugan.reporting.console import Console
    from frugan.training.planning import plan_for
    from frugan.utils import device
    from frugan.utils.units import size

    console = Console(quiet=said.json)
    if said.threads:
        import torch

        torch.set_num_threads(said.threads)
    where = device.choose(said.device)
    planner, found = plan_for(recipe, where, console.tell, memory=said.memory, approximate=said.allow_approximate)
    recipe = planner.recipe
    looked_at = planner.budget.compared(found) if said.compare else []
    speed = planner.images_per_second(found) if said.compare else None
    if said.json:
        about = {"precision": planner.recipe.memory.precision, "candidates": looked_at, "images_per_second": speed}
        print(json.dumps(found.as_dict() | about))
    else:
        console.bytes(found)
        if looked_at:
            console.candidates(looked_at)
        for reason in planner.budget.why(found):
            console.tell(reason)
        console.plan(found, recipe.training.batch_size)
        precision = planner.recipe.memory.precision
        if speed is not None:
            console.tell(f"Speed: about {speed:,.0f} images/s in {precision}: one micro-batch of each phase was run and timed.")
    if said.plot:
        courses = {
            f"{name}: {min(2, parts)} of {parts} micro-batches" if parts > 1 else name: timeline.course()
            for name, (timeline, parts) in planner.budget.timelines().items()
        }
        side, batch = recipe.data.image_size, recipe.training.batch_size
        title = f"{recipe.recipe}, {side}x{side}, batch {batch}: {size(found.allocated)}"
        pictures.plot_memory(courses, Path(said.plot), title)
        console.tell(f"Memory over one update is drawn in {said.plot}.")


COMMAND = Command(options, run)

"""``frugan plan``: what a training would need and how it would be laid out, without training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from frugan.cli.parsing import Command, described, extra, recipe_options, recipe_said, spin_briefly
from frugan.config.run import Run
from frugan.utils.errors import UserError, counted


class Plan:
    """Says what a training would need and how it would be laid out, without training."""


def options(arguments: Sequence[str]) -> type[Any]:
    """Everything about the recipe, and what of the run the plan depends on."""
    return recipe_options(
        Plan, arguments, *[o for o in described(Run) if o[0] in ("memory", "allow_approximate", "device", "threads")],
        extra("json", bool, "print the plan as JSON", False),
        extra("compare", tyro.conf.FlagCreatePairsOff[bool], "list every combination of levers, and time the one chosen", False),
        extra("processes", int | None, "say what it would be in up to so many processes, each like this one, and time that"),
        extra("link", str | None, "bytes a second between two of --processes, as 12GB/s; unset: measured here, on the CPU"),
        extra("plot", str | None, "picture of memory over one update to write"),
    )  # fmt: skip


def run(said: Any) -> None:
    """Says what a training would need and how it would be laid out."""
    recipe = recipe_said(said)
    if said.plot and Path(said.plot).suffix.lower() not in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
        raise UserError(f"--plot {said.plot}: pictures are written as .png, .jpg, .svg or .pdf.")
    if said.link is not None and said.processes is None:
        raise UserError("--link says how fast processes exchange: say how many there are too, as in --processes 8.")
    spin_briefly()
    import frugan.training.trainer  # noqa: F401  # what a training imports is part of what it needs
    from frugan.reporting import pictures
    from frugan.reporting.console import Console
    from frugan.training.planning import proposed
    from frugan.training.scaling import Scaling
    from frugan.utils import device
    from frugan.utils.units import size

    console = Console(quiet=said.json)
    if said.threads:
        import torch

        torch.set_num_threads(said.threads)
    where = device.choose(said.device)
    training = proposed(recipe, where, console.tell, memory=said.memory, approximate=said.allow_approximate)
    scaling = Scaling(training, said.processes, said.link) if said.processes is not None else None
    planner, found = training.plan()
    recipe = planner.recipe
    looked_at = planner.budget.compared(found) if said.compare else []
    speed = planner.images_per_second(found) if said.compare else None
    scales = [row.as_dict() for row in scaling.rows(planner)] if scaling else []
    if said.json:
        about = {"precision": planner.recipe.memory.precision, "candidates": looked_at, "images_per_second": speed}
        about |= {"processes": scales} if scaling else {}
        print(json.dumps(found.as_dict() | about))
    else:
        console.bytes(found)
        if looked_at:
            console.candidates(looked_at)
        for reason in planner.budget.why(found):
            console.tell(reason)
        console.plan(found, recipe.training.batch_size)
        if training.source.random_access and len(training.source) < recipe.training.batch_size:
            console.tell(
                f"{training.source.name} has {counted(len(training.source), 'image')}: a training wants as many as a batch has."
            )
        precision = planner.recipe.memory.precision
        if speed is not None:
            console.tell(f"Speed: about {speed:,.0f} images/s in {precision}: one micro-batch of each phase was run and timed.")
        if scales:
            console.scales(scales, said.link)
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

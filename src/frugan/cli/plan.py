"""``frugan plan``: what a training would need and how it would be laid out, without training."""

import gc
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
    from frugan.data.opening import bytes_of, keepable, resolve
    from frugan.data.sources import open_source
    from frugan.memory import limit
    from frugan.reporting import pictures
    from frugan.reporting.console import Console
    from frugan.training.planner import find
    from frugan.utils import device
    from frugan.utils.units import size

    console = Console(quiet=said.json)
    where = device.choose(said.device)
    if said.threads:
        import torch

        torch.set_num_threads(said.threads)
    source = open_source(recipe.data)
    data = resolve(source, recipe.data, console.tell)
    recipe = recipe.replace(image_size=data.image_size, channels=data.channels)
    if recipe.memory.precision == "auto":
        recipe = recipe.replace(precision=device.fast_precision(where))
    with device.arithmetic(recipe.memory.precision, where):  # which refuses what the device has not
        keep = keepable(limit.budget(said.memory, where), where)
    batch = recipe.training.batch_size
    held = bytes_of(source, data, batch, keep)
    let_go = (lambda: True) if source.random_access and held else None
    gc.collect()
    gc.freeze()  # as training does: collections, of which planning makes many, need not look at what was imported
    planner, found = find(recipe, where, data=held, memory=said.memory, approximate=said.allow_approximate, let_go=let_go)
    looked_at = planner.looked_at(found) if said.compare else []
    speed = planner.images_per_second(found) if said.compare else None
    if said.json:
        about = {"precision": planner.recipe.memory.precision, "candidates": looked_at, "images_per_second": speed}
        print(json.dumps(found.as_dict() | about))
    else:
        console.bytes(found)
        if looked_at:
            console.candidates(looked_at)
        for reason in planner.why(found):
            console.tell(reason)
        console.plan(found, recipe.training.batch_size)
        precision = planner.recipe.memory.precision
        if speed is not None:
            console.tell(f"Speed: about {speed:,.0f} images/s in {precision}: one micro-batch of each phase was run and timed.")
    if said.plot:
        courses = {
            f"{name}: {min(2, parts)} of {parts} micro-batches" if parts > 1 else name: timeline.course()
            for name, (timeline, parts) in planner.timelines(found).items()
        }
        title = f"{recipe.recipe}, {data.image_size}x{data.image_size}, batch {recipe.training.batch_size}: {size(found.allocated)}"
        pictures.plot_memory(courses, Path(said.plot), title)
        console.tell(f"Memory over one update is drawn in {said.plot}.")


COMMAND = Command(options, run)

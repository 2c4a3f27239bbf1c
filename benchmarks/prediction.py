"""Predicted against measured memory, over recipes, image sizes, batches and levers.

    python benchmarks/prediction.py [--quick]

Each cell is a process of its own. *Allocator*: everything a training allocates from its first weight to the end of one update of
both networks, as the CPU allocator reports it, against the prediction made from two and three samples. *Adds*: the most that the
process holds during four updates (VmHWM) beyond what it held before, against the prediction of that (with what libraries load),
with freed memory reused or given back as the cell says.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does

import tyro
from rich.console import Console
from rich.table import Table

SIZES, BATCHES = (16, 28, 48, 64), (16, 64, 128)
LEVERS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # (settings, layout)
    ({}, {}),
    ({}, {"parts": 4}),
    ({}, {"levers": ["separate_terms"]}),
    ({"precision": "bf16"}, {"parts": 2}),
    ({}, {"levers": ["recompute_generator"], "parts": 2}),
    ({}, {"levers": ["checkpoint_blocks"]}),
    ({"in_place": False}, {}),
    ({"lean_adam": False}, {"parts": 3}),
    ({"channels_last": False}, {"levers": ["separate_terms"], "parts": 2}),
    ({}, {"levers": ["penalty"]}),
    ({}, {"levers": ["penalty", "checkpoint_blocks", "separate_terms", "recompute_generator"], "parts": 4}),
    ({"precision": "bf16"}, {"levers": ["penalty", "separate_terms"]}),
]


@dataclass
class Options:
    quick: bool = False  # a tenth of the cells
    only: str = ""  # cells that have this word in them, as penalty
    cell: str | None = None  # used by the script itself: measures one


def cells() -> Iterator[dict[str, Any]]:
    """All recipes x sizes x batches with levers in turn, and all levers at 28 pixels on r3, where all of them matter."""
    turn = 0
    for recipe in ("mlp", "upsample", "dcgan", "r3"):
        usable = [lever for lever in LEVERS if recipe == "r3" or "penalty" not in lever[1].get("levers", ())]
        for side in SIZES:
            for batch in BATCHES:
                settings, layout = usable[turn % len(usable)]
                freed = ("reuse", "return")[turn % 2]
                yield {"recipe": recipe, "side": side, "batch": batch, "settings": settings, "layout": layout, "freed": freed}
                turn += 1
    for i, (settings, layout) in enumerate(LEVERS):
        freed = ("reuse", "return")[i % 2]
        yield {"recipe": "r3", "side": 28, "batch": 64, "settings": settings, "layout": layout, "freed": freed}


def measure(cell: dict[str, Any]) -> dict[str, int]:
    """Predictions and measurements of one cell, in bytes."""
    import torch

    from frugan.config import recipes
    from frugan.data.loader import Batch
    from frugan.gan import sampling
    from frugan.gan.build import average, lay_out, make_step, optimizers
    from frugan.gan.levers import jobs, named
    from frugan.gan.networks import build
    from frugan.memory import host, limit, pool
    from frugan.memory.layout import Layout
    from frugan.memory.search import Search
    from frugan.memory.trace import allocations, highest
    from frugan.reporting.pictures import warm_up
    from frugan.training.traces import Traces

    device = torch.device("cpu")
    side, batch = cell["side"], cell["batch"]
    channels = 1 if side == 28 else 3
    recipe = recipes.get(cell["recipe"]).replace(image_size=side, channels=channels, batch_size=batch, **cell["settings"])
    layout = Layout.of(batch, cell["layout"].get("parts", 1), named(cell["layout"].get("levers", ())))
    before = limit.baseline(device)
    traces = Traces(recipe, device, separate=True)
    facts = traces.facts
    coupled = facts.coupled_g, facts.coupled_d
    search = Search(jobs(recipe, device, coupled, traces.growth, in_four_passes=facts.in_four_passes), device)
    exact = {job.name: search.exact(job, layout) for job in search.jobs}
    predicted = max(e.moment.bytes for e in exact.values())
    tensors = search.holds([e.timeline for e in exact.values()], cell["freed"])
    loads = sum(traces.loads(lever.name) for lever in layout.levers)
    held = tensors + facts.loaded + (len(set(layout.sizes)) - 1) * facts.loaded_each + loads
    traces.close()
    del traces, search, exact  # as planning does

    def training(updates: int) -> None:
        generator, discriminator = build(recipe.network, side, channels)
        lay_out(recipe, generator, discriminator)
        optimizer_g, optimizer_d = optimizers(recipe, generator, discriminator, device)
        step, ema = make_step(recipe, generator, discriminator), average(recipe, generator, device)
        for seen in range(0, updates * batch, batch):
            for phase, optimizer in ((step.discriminator_phase, optimizer_d), (step.generator_phase, optimizer_g)):
                phase(Batch(lambda row, n: torch.zeros(n, channels, side, side, dtype=torch.uint8)), seen, layout)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.update(generator, batch, seen + batch)
            step.score_generated(seen, layout)  # as a report does, and then samples are made
            sampling.to_images(ema.module if ema else generator, step.latents("sample", 0, layout.micro_batch), layout.micro_batch)

    limit.baseline(device)
    host.set_freed("return")  # in the first update, as training does
    limit.forget_peak(device)
    training(1)
    warm_up()
    host.set_freed(cell["freed"], pool.state().used + tensors)
    training(3)
    process = limit.peak(device) or 0
    allocated = highest(allocations(lambda: training(1)))
    return {"predicted": predicted, "allocated": allocated, "predicted_process": held, "process": process - before}


def main(options: Options) -> None:
    if options.cell:
        print(json.dumps(measure(json.loads(options.cell))))
        return
    table = Table(title="MiB predicted and measured")
    for heading in ("recipe", "images", "batch", "settings and levers", "freed memory"):
        table.add_column(heading)
    for heading in ("predicted", "allocator", "error", "predicted", "adds", "error"):
        table.add_column(heading, justify="right")
    errors, process_errors = [], []
    chosen = [cell for cell in cells() if options.only in json.dumps(cell)]
    for cell in chosen[:: 10 if options.quick else 1]:
        command = [sys.executable, __file__, "--cell", json.dumps(cell)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        errors.append(found["predicted"] / found["allocated"] - 1)
        process_errors.append(found["predicted_process"] / found["process"] - 1)
        print(cell, found, f"{errors[-1]:+.4%} {process_errors[-1]:+.2%}", file=sys.stderr, flush=True)
        used = cell["settings"] | cell["layout"]
        numbers = [f"{found[k] / 2**20:.1f}" for k in ("predicted", "allocated", "predicted_process", "process")]
        table.add_row(
            cell["recipe"], str(cell["side"]), str(cell["batch"]), ", ".join(f"{k} {v}" for k, v in used.items()) or "plain",
            cell["freed"], *numbers[:2], f"{errors[-1]:+.2%}", *numbers[2:], f"{process_errors[-1]:+.1%}",
        )  # fmt: skip
    Console(width=160).print(table)
    import torch

    print(
        f"{len(errors)} cells, torch {torch.__version__}, {torch.get_num_threads()} threads. Allocator: {min(errors):+.2%} to "
        f"{max(errors):+.2%}. Process: {min(process_errors):+.1%} to {max(process_errors):+.1%}."
    )


if __name__ == "__main__":
    main(tyro.cli(Options))

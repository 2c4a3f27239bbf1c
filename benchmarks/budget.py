"""One training within ever smaller budgets: what it holds, how long an update takes, and whether it is the same training.

    python benchmarks/budget.py [--recipe r3] [--image-size 64] [--batch-size 512]

100% is what a plain PyTorch loop allocates. Each budget is planned and enforced as ``frugan train --memory`` does, in a process
of its own: framework + three times the planner's margin + the share of 100%. The last column trains in double precision with the
same levers and micro-batches, plain against planned, and gives the largest relative difference of a weight tensor.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does

import tyro
from plain import plain
from rich.console import Console
from rich.table import Table


@dataclass
class Options:
    recipe: str = "r3"
    image_size: int = 64
    batch_size: int = 512
    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    updates: int = 2
    check_updates: int = 20
    check_batch: int = 64  # of the comparison in double precision
    cell: str | None = None  # used by the script itself: measures one


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """One training: of the plain loop (share 0) or within a share of ``plain`` bytes; or weights in double precision."""
    import torch

    from frugan.config import recipes
    from frugan.data.loader import Batch
    from frugan.gan.build import lay_out, make_step, optimizers
    from frugan.gan.levers import LEVERS
    from frugan.gan.networks import build
    from frugan.memory import limit
    from frugan.memory.budget import MARGIN
    from frugan.memory.layout import Layout
    from frugan.memory.trace import allocations, highest
    from frugan.training.planner import Planner

    device = torch.device("cpu")
    side, batch = cell["side"], cell["batch"]
    recipe = recipes.get(cell["recipe"]).replace(image_size=side, channels=3, batch_size=batch, ema_half_life=0.0)
    checked = cell["what"] == "weights"
    dtype = torch.float64 if checked else torch.float32
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=random)

    def trained(layouts: dict[str, Layout] | None, updates: int) -> tuple[list[float], list[torch.Tensor]]:
        generator, discriminator = (n.to(dtype) for n in build(recipe.network, side, 3))
        if layouts is None:
            loop = plain(recipe, generator, discriminator)
        else:
            lay_out(recipe, generator, discriminator)
            optimizer_g, optimizer_d = optimizers(recipe, generator, discriminator, device)
            step = make_step(recipe, generator, discriminator)
        seconds = []
        for first in range(0, updates * batch, batch):
            begin = time.perf_counter()
            if layouts is None:
                loop.update(
                    lambda row, n, first=first: pixels[row - first : row - first + n].to(dtype).div(127.5).sub(1), first, batch
                )
            else:
                for phase, name, optimizer in (
                    (step.discriminator_phase, "D", optimizer_d), (step.generator_phase, "G", optimizer_g)
                ):  # fmt: skip
                    phase(Batch(lambda row, n, first=first: pixels[row - first : row - first + n]), first, layouts[name])
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - begin)
        return seconds, [p.detach() for n in (generator, discriminator) for p in n.parameters()]

    if checked:

        def cut(layout: dict[str, Any]) -> Layout:
            whole = Layout.from_dict(layout, LEVERS.values())
            return Layout.of(batch, -(-batch // min(batch, whole.micro_batch)), whole.levers)

        _, wanted = trained(None, cell["updates"])
        errors = []
        for layouts in cell["plans"]:
            _, got = trained({name: cut(layout) for name, layout in layouts.items()}, cell["updates"])
            errors.append(max(float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(wanted, got, strict=True)))
        return {"errors": errors}
    if not cell["share"]:
        allocated = highest(allocations(lambda: trained(None, 1)))
        seconds, _ = trained(None, 1 + cell["updates"])
        return {"allocated": allocated, "seconds": statistics.median(seconds[1:])}
    framework = limit.baseline(device)
    planner = Planner(recipe, device, memory=str(framework + 3 * MARGIN + int(cell["share"] * cell["plain"])))
    plan = planner.plan()
    del planner
    with limit.held_to(plan.budget, device, plan.reserved):
        limit.set_freed(plan.freed, device)
        seconds, _ = trained(plan.layouts, 1 + cell["updates"])
        peak = limit.peak(device)
    return {
        "seconds": statistics.median(seconds[1:]), "budget": plan.budget, "predicted": plan.predicted, "peak": peak,
        "allocated": plan.allocated, "layouts": {n: layout.as_dict() for n, layout in plan.layouts.items()},
        "words": ["; ".join(f"{n}: {layout}" for n, layout in plan.layouts.items()), plan.freed],
    }  # fmt: skip


def measured(**cell: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print({k: v for k, v in found.items() if k != "layouts"}, file=sys.stderr, flush=True)
    return dict(found)


def main(options: Options) -> None:
    if options.cell:
        print(json.dumps(run(json.loads(options.cell))))
        return
    common = {"recipe": options.recipe, "side": options.image_size, "batch": options.batch_size, "updates": options.updates}
    base = measured(what="time", share=0, **common)
    found = [measured(what="time", share=share, plain=base["allocated"], **common) for share in options.shares]
    errors: list[float] = []
    if options.check_updates:
        check = common | {"batch": options.check_batch, "updates": options.check_updates}
        errors = measured(what="weights", plans=[f["layouts"] for f in found], **check)["errors"]
    table = Table(title=f"{options.recipe}, {options.image_size}x{options.image_size}, batch {options.batch_size}, fp32")
    headings = ("budget", "MiB", "plan", "allocates", "process", "held", "predicted", "time", f"fp64, {options.check_updates}")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    table.add_row(
        "plain loop", "-", "whole batch", f"{base['allocated'] >> 20}", "-", "-", "-", f"1.00 ({base['seconds']:.1f} s)", "-"
    )
    for i, (share, f) in enumerate(zip(options.shares, found, strict=True)):
        bytes_ = [int(share * base["allocated"]), f["allocated"], f["budget"], f["peak"], f["predicted"]]
        mib = [str(b >> 20) for b in bytes_]
        time_, error = f"{f['seconds'] / base['seconds']:.2f}", f"{errors[i]:.1e}" if errors else "-"
        table.add_row(f"{share:.0%}", mib[0], f"{f['words'][0]} ({f['words'][1]})", *mib[1:], time_, error)
        assert f["peak"] <= f["budget"]
    Console(width=160).print(table)
    import torch

    print(
        f"MiB; time relative to the plain loop, medians of {options.updates} updates; fp64 at batch {options.check_batch}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))

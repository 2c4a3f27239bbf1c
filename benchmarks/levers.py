"""What each lever saves and costs: R1 in every way in the discriminator alone, then each lever in an update of both networks.

    python benchmarks/levers.py [--recipe r3] [--image-size 64] [--batch-size 32] [--rounds 5] [--compile] [--device cuda]

MiB are what the allocator gives out beyond weights and images; times are medians of rounds in which all rows take turns.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from frugan.config import recipes
from frugan.data.loader import Batch
from frugan.gan.bends import Passage, bends_alone
from frugan.gan.build import lay_out, make_step
from frugan.gan.levers import named
from frugan.gan.networks import build
from frugan.gan.penalties import squared_norm
from frugan.gan.step import Step
from frugan.memory import levers, limit, private
from frugan.memory.layout import Layout
from frugan.memory.trace import allocations, highest
from frugan.utils.draws import Rows


@dataclass
class Options:
    recipe: str = "r3"
    image_size: int = 64
    batch_size: int = 32
    rounds: int = 5
    compile: bool = False  # also compiled with fullgraph=True
    device: str = "cpu"


def same(tensor: Tensor) -> Tensor:
    return tensor


def main(options: Options) -> None:
    device, side, batch = torch.device(options.device), options.image_size, options.batch_size
    recipe = recipes.get(options.recipe).replace(image_size=side, channels=3, batch_size=batch)
    generator, discriminator = (n.to(device) for n in build(recipe.network, side, 3))
    lay_out(recipe, generator, discriminator)
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    images = pixels.to(device).float().div(127.5).sub(1)
    step, blocks = make_step(recipe, generator, discriminator), list(discriminator.blocks)
    behind = make_step(recipe.replace(penalty="double-backward"), generator, discriminator)
    private.load_forward_mode()
    rows_of = Rows(step.draws, "real", 0, batch)

    def double_backward() -> None:
        x = images.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
        squared_norm(gradient).sum().backward()

    def in_four_passes(recompute: bool) -> None:
        discriminator.requires_grad_(False)
        passage = Passage(discriminator, images, rows_of, recompute=recompute, pack=same, unpack=same)
        gradient = passage.back()
        discriminator.requires_grad_(True)
        passage.learn(gradient.detach())

    def slope(x: Tensor, v: Tensor) -> Tensor:
        return levers.directional(blocks, x, v)[1].sum()

    def by_jvp(slope: Callable[[Tensor, Tensor], Tensor], parts: int = 1) -> None:
        for some in images.chunk(parts):
            x = some.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(discriminator(x).sum(), x)
            slope(some, gradient).backward()

    rows: dict[str, Callable[[], object]] = {
        "R1 by double backward": double_backward,
        "R1 in four passes": partial(in_four_passes, False),
        "R1 in four passes, blocks recomputed": partial(in_four_passes, True),
        "R1 by jvp": lambda: by_jvp(slope),
        "R1 by jvp, blocks recomputed": lambda: by_jvp(lambda x, v: levers.directional(blocks, x, v, recompute=True)[1].sum()),
    }
    if not bends_alone(discriminator):
        rows = {name: compute for name, compute in rows.items() if "four" not in name}
    if options.compile:
        compiled = torch.compile(slope, fullgraph=True)
        rows["R1 by jvp, compiled"] = lambda: by_jvp(compiled)
    update = {
        "update, whole batch": [], "separate terms": ["separate_terms"], "penalties by jvp": ["penalty"],
        "blocks recomputed": ["checkpoint_blocks"], "generator recomputed": ["recompute_generator"],
        "activations on the host": ["offload_activations"],
        "separate, recomputed": ["separate_terms", "checkpoint_blocks"],
        "by jvp, separate, recomputed": ["penalty", "separate_terms", "checkpoint_blocks"],
        "micro-batches of a quarter": [],
        "all of these but jvp": ["separate_terms", "checkpoint_blocks", "recompute_generator"],
        "all of these": ["penalty", "separate_terms", "checkpoint_blocks", "recompute_generator"],
    }  # fmt: skip
    if not recipe.objective.r1:
        update = {name: used for name, used in update.items() if "penalty" not in used}

    def updated(layout: Layout, step: Step = step) -> None:
        step.discriminator_phase(Batch(lambda row, n: pixels[row : row + n]), 0, layout)
        step.generator_phase(Batch(lambda row, n: pixels[row : row + n]), 0, layout)

    for name, used in update.items():
        parts = 4 if name.startswith(("micro-batches", "all of these")) else 1
        rows[name] = partial(updated, Layout.of(batch, parts, named(used)))
    if step.in_four_passes and recipe.objective.r1:
        rows["penalties by double backward"] = partial(updated, Layout.of(batch, 1), behind)

    def clear() -> None:
        for network in (generator, discriminator):
            network.zero_grad(set_to_none=True)
            network.requires_grad_(True)  # the generator's phase wants no gradients of D

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    peaks, seconds = {}, {name: [] for name in rows}
    if device.type == "cpu":
        limit.set_freed("reuse", device)  # as training does
    for name, compute in rows.items():
        compute()  # what libraries load, and compiling
        clear()
        if device.type == "cuda":
            wait()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            compute()
            wait()
            peaks[name] = torch.cuda.max_memory_allocated() - before
        else:
            peaks[name] = highest(allocations(compute))
        clear()
    for _ in range(options.rounds):
        for name, compute in rows.items():
            wait()
            begin = time.perf_counter()
            compute()
            wait()
            seconds[name].append(time.perf_counter() - begin)
            clear()
    table = Table(title=f"{options.recipe}, {side}x{side} colour, batch {batch}, fp32")
    for heading in ("", "MiB", "of plain", "ms", "of plain"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in rows:
        plain = "R1 by double backward" if name.startswith("R1") else "update, whole batch"
        if name == "update, whole batch":
            table.add_section()
        took, base = (statistics.median(seconds[n]) for n in (name, plain))
        table.add_row(
            name, f"{peaks[name] / 2**20:.1f}", f"{peaks[name] / peaks[plain]:.2f}", f"{1e3 * took:.0f}", f"{took / base:.2f}"
        )
    Console(width=120).print(table)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"medians of {options.rounds} rounds; torch {torch.__version__}, {where}")


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Images/s of one training update: frugan against a plain PyTorch loop with the same networks, batch and losses.

The plain loop is what the tutorials show: single precision, contiguous images, Adam as it comes, gradients for D computed (and
thrown away) in G's phase, everything on the default generator. Both train on the same resident batch; they take turns, and the
table has medians over the turns. Run it on a machine that does nothing else:

    python benchmarks/speed.py [--image-size 28] [--batch-size 128] [--rounds 7]
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from frugan.config import recipes
from frugan.config.recipe import Recipe
from frugan.data.loader import Batch
from frugan.gan.losses import LOSSES
from frugan.gan.networks import build
from frugan.gan.optim import FrugalAdam
from frugan.gan.step import Step
from frugan.memory.layout import Layout
from frugan.utils.device import choose
from frugan.utils.draws import Draws, Rows


@dataclass
class Options:
    image_size: int = 28
    channels: int = 1
    batch_size: int = 128
    updates: int = 8
    rounds: int = 7
    device: str = "auto"


def plain(recipe: Recipe, options: Options, device: torch.device) -> Callable[[], None]:
    """The tutorials' loop, for objectives without penalties."""
    generator, discriminator = (n.to(device) for n in build(recipe.network, options.image_size, options.channels))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    n = options.batch_size
    real = torch.rand(n, options.channels, options.image_size, options.image_size, device=device) * 2 - 1
    loss, draws = LOSSES[type(recipe.objective)], Draws(0, device)

    def update() -> None:
        optimizer_d.zero_grad()
        fake = generator(torch.randn(n, recipe.network.latent_dim, device=device))
        rows = Rows(draws, "d", 0, n)
        judged = discriminator(real, rows), discriminator(fake.detach(), rows)
        loss.discriminator(recipe.objective, *judged).mean().backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        loss.generator(recipe.objective, discriminator(fake, rows), None).mean().backward()
        optimizer_g.step()

    return update


def frugal(recipe: Recipe, options: Options, device: torch.device, precision: str, parts: int) -> Callable[[], None]:
    """The same through `frugan.gan.step`."""
    built = build(recipe.network, options.image_size, options.channels)
    generator, discriminator = (n.to(device, memory_format=torch.channels_last) for n in built)
    optimizers = [
        FrugalAdam(n.parameters(), 2e-4, (recipe.optimizer.beta1, recipe.optimizer.beta2)) for n in (discriminator, generator)
    ]
    step = Step(
        generator, discriminator, recipe.objective, recipe.network.latent_dim, Draws(0, device),
        precision=precision, channels_last=True,
    )  # fmt: skip
    shape = options.batch_size, options.channels, options.image_size, options.image_size
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    layout, seen = Layout.of(options.batch_size, parts), 0

    def update() -> None:
        nonlocal seen
        for phase, optimizer in zip((step.discriminator_phase, step.generator_phase), optimizers, strict=True):
            phase(Batch(lambda row, n: images[row - seen : row - seen + n]), seen, layout)
            step.scaler.step(optimizer)
            step.scaler.update()
            optimizer.zero_grad(set_to_none=True)
        seen += options.batch_size

    return update


def main(options: Options) -> None:
    device = choose(options.device)
    table = Table(title=f"images/s at {options.image_size}x{options.image_size}, batch {options.batch_size}, {device}")
    for heading in ("recipe", "loop", "images/s", "of the plain loop"):
        table.add_column(heading, justify="left" if heading in ("recipe", "loop") else "right")
    for name in recipes.RECIPES:
        recipe = recipes.get(name)
        loops = {} if recipe.objective.r1 else {"plain PyTorch, fp32": plain(recipe, options, device)}
        for precision in ("fp32", "bf16"):
            loops[f"frugan, {precision}"] = frugal(recipe, options, device, precision, 1)
        loops["frugan, fp32, 4 micro-batches"] = frugal(recipe, options, device, "fp32", 4)
        rates: dict[str, list[float]] = {loop: [] for loop in loops}
        for turn in range(options.rounds + 1):
            for loop, update in loops.items():
                begin = time.perf_counter()
                for _ in range(options.updates):
                    update()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:  # the first warms up
                    rates[loop].append(options.updates * options.batch_size / (time.perf_counter() - begin))
        base = rates.get("plain PyTorch, fp32", rates["frugan, fp32"])
        for loop, measured in rates.items():
            ratios = [a / b for a, b in zip(measured, base, strict=True)]
            shown = f"{statistics.median(ratios):.2f}" if "plain PyTorch, fp32" in rates else "-"
            table.add_row(name, loop, f"{statistics.median(measured):,.0f}", shown)
    Console().print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} interleaved rounds")


if __name__ == "__main__":
    main(tyro.cli(Options))

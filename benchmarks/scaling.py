"""What one training of internet scale would take, from plans and counted arithmetic: the figures of ``docs/scaling.md``.

    python benchmarks/scaling.py [--images 1e8] [--epochs 3]

R3GAN's networks for 256x256 (Huang et al. 2024, arXiv 2501.05441: stages of 96 to 768 channels, two blocks each), traced here on
two and three samples. How fast a GPU is nobody has measured at this size. Two guesses: what an H200 was measured to reach in an
update of ``r3`` at 28 pixels (``docs/gpu.md``; the arithmetic is counted here), whose kernels are too small to be fast; and a fifth
of the peak that its data sheet gives for bf16.
"""

from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from frugan.config import recipes
from frugan.config.recipe import Recipe
from frugan.gan.levers import jobs
from frugan.memory.search import Search
from frugan.training.model import Model
from frugan.training.scaling import gradients

MEASURED = 127.9  # updates a second of r3 at 28 pixels, batch 128, bf16, CUDA graphs, on an H200 (docs/gpu.md)
LINKS = {"NVLink 4, 450 GB/s": 450e9, "a network of 400 Gbit/s": 50e9, "a network of 25 Gbit/s, 3.1 GB/s": 3.1e9}  # of data sheets
PEAK = 989e12  # operations a second of an H200 in bf16, by its data sheet
JPEG = 25e3  # bytes of an image of 256x256, a guess


@dataclass
class Options:
    images: float = 1e8
    epochs: float = 3
    batch: int = 2048
    size: int = 256
    processes: tuple[int, ...] = (1, 8, 64, 512)


def searched(recipe: Recipe, model: Model) -> Search:
    """What a plan looks at, traced on two and three samples and no more: arithmetic of this size takes minutes on a CPU."""
    return Search(jobs(recipe, model.device, (False, False), model.growth, in_four_passes=model.step.in_four_passes), model.device)


def arithmetic(recipe: Recipe, search: Search) -> float:
    """Operations of an update, of one image."""
    return sum(search.candidates(job, job.variants[0])[0].flops for job in search.jobs) / recipe.training.batch_size


def main(options: Options) -> None:
    cpu = torch.device("cpu")
    large = recipes.r3().replace(
        image_size=options.size, channels=3, width_g=96, width_d=96, blocks=2, expansion=2, groups=12, batch_size=options.batch
    )  # fmt: skip
    small = recipes.r3().replace(image_size=28, channels=1, batch_size=128)
    reached = arithmetic(small, searched(small, Model(small, cpu))) * 128 * MEASURED
    model = Model(large, cpu)
    search = searched(large, model)
    each, sizes = arithmetic(large, search), gradients(large)
    held = sum(t.nbytes for tensors in model.held().values() for t in tensors if t is not None)
    print(
        f"{options.size}x{options.size}: {sum(sizes) / 4e6:.1f} million parameters, {each / 1e12:.2f} TFLOP an image and update; "
        f"weights, moments and average {held / 2**30:.2f} GiB, gradients {sum(sizes) / 2**20:.0f} MiB; an H200 reached "
        f"{reached / 1e12:.1f} TFLOP/s at 28 pixels"
    )
    table = Table(title="GiB of tensors in a process, fp32, by its micro-batch")
    columns = (1, 2, 4, 8, 16, 32, 64)
    for heading in ("phase", "levers", *map(str, columns)):
        table.add_column(heading, justify="right")
    for job in search.jobs:
        for levers in (job.variants[0], job.variants[-1]):
            found = {c.layout.micro_batch: c.allocated for c in search.candidates(job, levers)}
            table.add_row(
                job.name, ", ".join(lever.words for lever in levers) or "none",
                *(f"{found[n] / 2**30:.1f}" if n in found else "-" for n in columns),
            )  # fmt: skip
    Console(width=140).print(table)
    for words, speed in {"as fast as at 28 pixels": reached / each, "a fifth of the peak": PEAK / 5 / each}.items():
        times(options, words, speed, sum(sizes))


def times(options: Options, words: str, speed: float, size: int) -> None:
    """What GPUs take that do ``speed`` images a second each and exchange ``size`` bytes an update."""
    rounds = options.images * options.epochs / options.batch
    table = Table(title=f"GPUs {words} ({speed:.3g} images/s): {rounds:,.0f} updates with {options.batch} images")
    for heading in ("GPUs", "images each", "computing", *LINKS, "days", "read"):
        table.add_column(heading, justify="right")
    for n in options.processes:
        computing = options.batch / n / speed
        exchanging = [size * 2 * (n - 1) / n / link for link in LINKS.values()]
        seconds = computing + exchanging[1]
        table.add_row(
            str(n), str(options.batch // n), f"{computing:.3g} s",
            *(f"{s * 1e3:.1f} ms, {s / (s + computing):.1%}" for s in exchanging), f"{rounds * seconds / 86400:,.1f}",
            f"{options.batch / seconds * JPEG / 1e6:,.0f} MB/s",
        )  # fmt: skip
    Console(width=140).print(table)
    for words, link in LINKS.items():
        print(f"{words}: exchanging takes as long as computing from {options.batch / speed * link / (2 * size):,.0f} on")


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Where an update's time goes on a GPU: its kernels, the arithmetic it does a second, and beside loops of others.

    python benchmarks/kernels.py --recipes resize dcgan --batch 512     # kernels of recorded phases, in the order of their time
    python benchmarks/kernels.py --recipes resize --loops               # images/s beside the tutorials' and a tuned loop

On the CPU (``--device cpu``) operators take the place of kernels, and memory is not handled as in a training; on a GPU the numbers
of docs/gpu.md are of a sketch of this script, and it is unrun as it is. Kernels are those of ten updates of both networks, seen by
torch's profiler; arithmetic is counted by torch's `FlopCounterMode`, whose products and convolutions are nearly all there is, and
compared with the product of two large matrices in the same precision, just before. Rates are medians of interleaved rounds.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from gpu_cells import Frugan, Gpu, pictures, recipe_of, timed, tutorial
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from frugan.utils.device import arithmetic

PROFILED = 10  # updates


@dataclass
class Options:
    recipes: tuple[str, ...] = ("dcgan", "resize", "projected", "r3")
    side: int = 28
    batch: int = 128
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    device: str = "cuda"
    loops: bool = False  # the rates of loops of others too (not of projected, which has no tutorial)
    rows: int = 20  # kernels that are shown
    updates: int = 40  # in a round
    rounds: int = 3


def peak(gpu: Gpu, precision: str) -> float:
    """FLOP/s of the product of two large matrices."""
    size = 8192 if gpu.device.type == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=gpu.device, dtype=dtype) for _ in range(2))
    with arithmetic(precision, gpu.device):
        timed(gpu, lambda: a @ b, 3, 1)
        return 2 * size**3 * timed(gpu, lambda: a @ b, 10, 1)


def kernels(gpu: Gpu, loop: Frugan) -> list[tuple[str, float, float]]:
    """Name, milliseconds and number of each kernel of an update, the longest first; of operators on the CPU."""
    cpu = gpu.device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU if cpu else ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            loop.update()
        gpu.wait()
    events: Any = seen.key_averages()
    found = [(e.key, e.self_cpu_time_total if cpu else e.self_device_time_total, e.count) for e in events]
    return sorted(((key, us / PROFILED / 1e3, n / PROFILED) for key, us, n in found if us), key=lambda row: -row[1])


def main(options: Options) -> None:
    gpu, console = Gpu(options.device), Console(width=150)
    graphs = gpu.device.type == "cuda" and options.precision != "fp16"
    most = peak(gpu, options.precision)
    console.print(
        f"{options.device}, torch {torch.__version__}, {options.precision}: products of large matrices {most / 1e12:,.1f} TFLOP/s"
    )
    for name in options.recipes:
        cell = {"recipe": name, "side": options.side, "batch": options.batch, "quick": False}
        images = pictures(recipe_of(cell))
        with arithmetic(options.precision, gpu.device):
            loop = Frugan(recipe_of(cell, precision=options.precision), gpu, images, graphs=graphs)
            for _ in range(4):  # two as they are, one to record each phase
                loop.update()
            plain = Frugan(recipe_of(cell, precision=options.precision), gpu, images)
            with FlopCounterMode(display=False) as counter:
                plain.update()
            del plain
            rates: dict[str, tuple[str | None, Callable[[], object], list[float]]] = {
                "frugan": (options.precision, loop.update, [])
            }
            if options.loops and name != "projected":
                rates["tutorial"] = None, tutorial(recipe_of(cell), gpu, images), []
                rates["tuned"] = None, tutorial(recipe_of(cell), gpu, images, tuned=options.precision), []
        for round_ in range(options.rounds + 1):  # the first warms up
            for precision, update, taken in rates.values():
                if precision is None:  # torch as it comes
                    rate = timed(gpu, update, options.updates, options.batch)
                else:
                    with arithmetic(precision, gpu.device):
                        rate = timed(gpu, update, options.updates, options.batch)
                if round_:
                    taken.append(rate)
        medians = {who: statistics.median(taken) for who, (_, _, taken) in rates.items()}
        with arithmetic(options.precision, gpu.device):
            rows = kernels(gpu, loop)
        second = counter.get_total_flops() * medians["frugan"] / options.batch
        console.print(
            f"\n{name}, {options.side} px, batch {options.batch}: "
            + ", ".join(f"{who} {rate:,.0f} images/s" for who, rate in medians.items())
            + f"; {1e3 * options.batch / medians['frugan']:.2f} ms an update, of which {sum(ms for _, ms, _ in rows):.2f} in "
            f"{sum(n for _, _, n in rows):,.0f} kernels; {second / 1e12:.2f} TFLOP/s, {second / most:.1%} of large products'."
        )
        table = Table()
        for heading in ("ms an update", "times", "kernel"):
            table.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
        for key, ms, times in rows[: options.rows]:
            table.add_row(f"{ms:.3f}", f"{times:g}", key[:110])
        console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

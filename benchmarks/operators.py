"""Milliseconds of convolutions and their gradients on the CPU: torch's (oneDNN) and by products of matrices.

    python benchmarks/operators.py [--batch-sizes 128 32] [--rounds 11]

The geometries are those of the recipes' layers. Each pair takes turns; medians. Where a product is faster it is used, if that is
written in `frugan.gan.networks.convolutions`; stars say where it is.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from frugan.gan.networks.convolutions import EVERY, Geometry, chosen, down, pair, up
from frugan.memory import limit

SIZES = (  # channels of large maps and of small ones, pixels a side of large maps, kernel, stride, padding
    (1, 64, 28, 4, 2, 1), (1, 32, 28, 3, 1, 1), (1, 64, 64, 4, 2, 1), (3, 64, 64, 4, 2, 1), (3, 32, 64, 3, 1, 1),
    (64, 128, 14, 4, 2, 1), (64, 128, 32, 4, 2, 1), (128, 256, 16, 4, 2, 1), (256, 512, 8, 4, 2, 1),
    (64, 64, 7, 3, 1, 1), (128, 128, 4, 3, 1, 1), (96, 64, 7, 4, 2, 1), (1, 16, 28, 1, 1, 0), (1, 16, 64, 1, 1, 0),
)  # fmt: skip


@dataclass
class Options:
    batch_sizes: tuple[int, ...] = (128, 32)
    rounds: int = 11


def in_turn(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Milliseconds of both."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 2):
        for compute, seconds in zip((first, second), found, strict=True):
            begin = time.perf_counter()
            compute()
            if turn > 1:  # the first two warm up
                seconds.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found[0]), statistics.median(found[1])


@torch.no_grad()
def main(options: Options) -> None:
    limit.set_freed("reuse", torch.device("cpu"))
    table = Table(title="milliseconds: torch's convolution, and by a product; * where frugan takes the product")
    for heading in ("", "channels", "pixels", "kernel", "images", "down", "up", "gradient of the kernel"):
        table.add_column(heading, justify="right" if heading == "images" else "left")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for a, b, side, k, stride, padding in SIZES:
            small = (side + 2 * padding - k) // stride + 1
            geometry = Geometry(k, stride, padding, (side, side), (small, small), EVERY)
            torchs, taken = replace(geometry, products=frozenset()), chosen(a, (small, small), k, stride, dtype)
            for n in options.batch_sizes:

                def maps(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

                large, little, kernel = maps(n, a, side, side), maps(n, b, small, small), maps(b, a, k, k)
                cells = []
                for what, compute in (
                    ("down", lambda how: down(large, kernel, None, how)),  # noqa: B023
                    ("up", lambda how: up(little, kernel, None, how)),  # noqa: B023
                    ("pair", lambda how: pair(large, little, how)),  # noqa: B023
                ):
                    found = in_turn(lambda: compute(torchs), lambda: compute(geometry), options.rounds)  # noqa: B023
                    cells.append(f"{found[0]:.2f}, {found[1]:.2f}{' *' if what in taken else ''}")
                table.add_row(name, f"{a}, {b}", f"{side}, {small}", f"{k}, stride {stride}", str(n), *cells)
    Console(width=150).print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} turns")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

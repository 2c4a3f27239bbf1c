"""What a second process gives on one machine, and what of an update is spent on exchanging gradients.

    python benchmarks/processes.py [--data ../shared/data/fashion-mnist] [--recipes dcgan r3] [--processes 1 2] [--rounds 3]

`frugan train` with the cores of this machine shared out evenly: one process with all, two with half each, one with half.
Images a second are of the last line of the log; ways take turns, medians. *Exchanged*: the bytes of gradients in an update, and how
long summing them takes (`frugan.training.scaling`: two processes that begin at once), as a share of an update.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from frugan.config import recipes
from frugan.training.scaling import gradients, measured


@dataclass
class Options:
    data: Path = Path("../shared/data/fashion-mnist")
    recipes: tuple[str, ...] = ("dcgan", "r3")
    processes: tuple[int, ...] = (1, 2)
    batch: int = 128
    minutes: float = 0.4
    rounds: int = 3


def started(processes: int, threads: int, command: list[str]) -> str:
    """What ``command`` says, run by so many processes."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run([sys.executable, *run, *command], env=environment, check=True, capture_output=True, text=True).stdout


def speed(options: Options, recipe: str, processes: int, threads: int) -> float:
    """Images a second."""
    with tempfile.TemporaryDirectory() as folder:
        asked = ["train", str(options.data), "--recipe", recipe, "--batch-size", str(options.batch), "--threads", str(threads)]
        asked += ["--minutes", str(options.minutes), "--out", f"{folder}/run", "--quiet"]
        started(processes, threads, ["-m", "frugan", *asked])
        lines = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
        return float([line for line in lines if "images/s" in line][-1]["images/s"])


def main(options: Options) -> None:
    cores = os.cpu_count() or 1
    ways = [(n, cores // n) for n in options.processes] + [(1, cores // max(options.processes))]
    table = Table(title=f"28x28 grey, batch {options.batch}, recipes as they come")
    for heading in ("recipe", "processes", "threads each", "images/s", "to the first", "exchanged", "of an update"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for recipe in options.recipes:
        speeds: dict[Any, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way in ways:
                speeds[way].append(speed(options, recipe, *way))
                print(recipe, way, speeds[way][-1], file=sys.stderr, flush=True)
        first = statistics.median(speeds[ways[0]])
        for processes, threads in ways:
            median = statistics.median(speeds[processes, threads])
            share = "-"
            moved = "-"
            if processes > 1:
                sizes = gradients(recipes.get(recipe).replace(image_size=28, channels=1))
                seconds = measured(sizes).seconds(processes)
                share = f"{seconds * median / options.batch:.1%}"
                moved = f"{sum(sizes) / 2**20:.1f} MiB, {seconds * 1e3:.1f} ms"
            table.add_row(recipe, str(processes), str(threads), f"{median:.0f}", f"{median / first:.2f}", moved, share)
    Console(width=120).print(table)
    import torch

    print(f"torch {torch.__version__}, {cores} cores, medians of {options.rounds} interleaved rounds.")


if __name__ == "__main__":
    main(tyro.cli(Options))

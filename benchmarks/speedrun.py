"""Thirty epochs of Fashion-MNIST as fast as the device allows: the clock on the wall, and what comes out.

    python benchmarks/speedrun.py --data ../shared/data/fashion-mnist [--device cuda] [--repeats 3]

`frugan train` with one picture, at the end. The clock runs from the start of the process: to the picture of samples, and to the end
of the process. Samples are then scored as `unseen.py` does, which takes some minutes of a processor; ``--quality no`` leaves that
out.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from unseen import COLUMNS, Judge, samples_of, words

from frugan.config.recipe import Data
from frugan.reporting.run_folder import RunFolder

# The only ones that were timed. On a GPU larger batches, where an update costs little more, with higher rates (docs/gpu.md); on a
# CPU also narrower networks, as arithmetic is what takes the time there (docs/LOG.md).
RATES = "--lr-g 2e-3 --lr-d 2e-3"
SETTINGS = {
    "cuda": f"--recipe resize --batch-size 512 {RATES}",
    "cpu": f"--recipe resize --batch-size 256 --width-g 16 --width-d 32 {RATES}",
}


@dataclass
class Options:
    data: Path = Path("../shared/data/fashion-mnist")
    epochs: int = 30
    device: str = "auto"
    repeats: int = 1
    flags: tuple[str, ...] = ()  # for frugan train instead of those of the device, without dashes, as recipe=dcgan
    quality: Literal["yes", "no"] = "yes"
    samples: int = 10_000
    keep: Path | None = None  # where the last generator is copied to


def main(options: Options) -> None:
    kind = options.device.split(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    asked = [f"--{flag}" for flag in options.flags] or SETTINGS.get(kind, "").split()
    found: list[tuple[float, float, float]] = []
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            out = Path(folder) / f"{repeat}"
            command = [sys.executable, "-m", "frugan", "train", f"{options.data}", *asked, "--epochs", f"{options.epochs}"]
            command += ["--device", options.device, "--out", f"{out}"]
            command += ["--sample-every", f"{options.epochs}", "--checkpoint-every", f"{options.epochs}"]
            began, clock = time.time(), time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            whole = time.perf_counter() - clock
            picture = (out / "final_generated_images.png").stat().st_mtime - began
            found.append((picture, whole, RunFolder(out).read_log()[-1].speed))
            print(f"{' '.join(asked)}: {picture:.1f} s to the picture, {whole:.1f} s in all", file=sys.stderr, flush=True)
        if options.keep:
            options.keep.write_bytes((out / "generator.safetensors").read_bytes())
        if options.quality == "yes":
            judge = Judge(Data(data=f"{options.data}"), options.samples)
            metrics = judge(*samples_of(f"{out}", None).images(max(judge.samples, len(judge.real))))
    there = [name for name in COLUMNS if name in metrics]
    table = Table("", "to the picture, s", "to the end, s", "images/s", *there)
    picture, whole, speed = (statistics.median(each) for each in zip(*found, strict=True))
    table.add_row(
        " ".join(asked) or "as it comes", f"{picture:.1f}", f"{whole:.1f}", f"{speed:,.0f}", *(words(metrics, n) for n in there)
    )
    Console(width=200).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

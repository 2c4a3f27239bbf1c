"""Every recipe on real images: the trainings behind the README's table and pictures.

    python benchmarks/recipes.py --data DATA [--out runs/recipes] [--pictures docs/pictures]

DATA holds ``fashion-mnist/`` (the four IDX files), ``noto-emoji-128/noto-emoji-128.zip`` and ``clothing/clothing.zip``. Finished
trainings are not repeated; what was interrupted goes on (its minutes then count only from there). Run it on a machine that does
nothing else.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from frugan.reporting.run_folder import RunFolder

FASHION, EMOJI, CLOTHING = "fashion-mnist", "noto-emoji-128/noto-emoji-128.zip", "clothing/clothing.zip"
TRAININGS = {
    "dcgan": (FASHION, "--recipe dcgan --epochs 5 --sample-every 1"),
    "upsample": (FASHION, "--recipe upsample --epochs 5 --sample-every 1"),
    "mlp": (FASHION, "--recipe mlp --epochs 5 --sample-every 1"),
    "r3": (FASHION, "--recipe r3 --epochs 3 --precision bf16 --sample-every 1"),
    "projected": (FASHION, "--minutes 12 --sample-every 1"),
    "clothing": (CLOTHING, "--image-size 64 --epochs 30 --threads 1 --sample-every 10"),
    "emoji": (EMOJI, "--image-size 64 --epochs 30 --threads 1 --sample-every 10"),
}


@dataclass
class Options:
    data: Path
    out: Path = Path("runs/recipes")
    pictures: Path | None = None


def main(options: Options) -> None:
    table = Table(title=f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    for heading in ("frugan train", "images seen", "minutes", "images/s"):
        table.add_column(heading, justify="left" if heading == "frugan train" else "right")
    for name, (data, flags) in TRAININGS.items():
        run = RunFolder(options.out / name)
        command = [str(options.data / data), *flags.split(), "--out", str(run.path)]
        subprocess.run([sys.executable, "-m", "frugan", "train", *command], check=True, stdout=sys.stderr)
        last = run.read_log()[-1]
        minutes = last.images / last.speed / (1 - last.looking) / 60
        table.add_row(f"{data} {flags}", f"{last.images:,}", f"{minutes:.1f}", f"{last.speed:,.0f}")
        if options.pictures:
            options.pictures.mkdir(parents=True, exist_ok=True)
            shutil.copy(run.pictures_of_samples()[-1][1], options.pictures / f"{name}.png")
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))

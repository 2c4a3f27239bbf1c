"""How fast images are packed and read, what training waits for them, and what memory it takes with ever more of them.

    pip install torchvision
    python benchmarks/data.py --data ../shared/data [--images 20000] [--million 1000000]

Reading: random batches of 128 from a pack, against torchvision's `ImageFolder` with a `DataLoader` of as many workers as there are
cores, on the same PNG files, resized the same way; both once through, taking turns, medians. Training: updates of a small dcgan
with images from a pack that is read, against the same batch again and again.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from frugan.config import recipes
from frugan.config.recipe import Data
from frugan.data.loader import Batch
from frugan.data.opening import resolve
from frugan.data.pack_loader import PackLoader
from frugan.data.packing import make
from frugan.data.sources import open_source
from frugan.gan.build import lay_out, make_step, optimizers
from frugan.gan.networks import build
from frugan.memory import host
from frugan.memory.layout import Layout

CORES = len(os.sched_getaffinity(0))


@dataclass
class Options:
    data: str = "../shared/data"
    images: int = 10_000  # PNG files that are read
    rounds: int = 3
    million: int = 1_000_000  # images of the largest pack
    cell: str | None = None  # used by the script itself: a training whose memory is measured


def packing(where: str, side: int, workers: int, folder: Path) -> float:
    """Images a second."""
    asked = Data(data=where, image_size=side)
    source = open_source(asked)
    begin = time.perf_counter()
    pack = make(source, resolve(source, asked, lambda _: None), folder, workers=workers, tell=lambda _: None)
    return len(pack) / (time.perf_counter() - begin)


def by_image_folder(root: Path) -> float:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = v2.Compose([v2.Resize(28), v2.CenterCrop(28), v2.PILToTensor()])
    data = DataLoader(ImageFolder(str(root), steps), batch_size=128, shuffle=True, num_workers=CORES)
    begin = time.perf_counter()
    count = sum(len(images) for images, _ in data)
    return count / (time.perf_counter() - begin)


def by_pack(loader: PackLoader) -> float:
    begin, count = time.perf_counter(), len(loader) // 128 * 128
    for first in range(0, count, 128):
        loader.batch(first, 128)
    return count / (time.perf_counter() - begin)


def training(loader: PackLoader, updates: int) -> tuple[float, float]:
    """Seconds of an update with images from ``loader``, and with one batch that is there, taking turns."""
    recipe = recipes.get("dcgan").replace(image_size=28, channels=1, width_g=16, width_d=16)
    generator, discriminator = build(recipe.network, 28, 1)
    lay_out(recipe, generator, discriminator)
    device = torch.device("cpu")
    optimizer_g, optimizer_d = optimizers(recipe, generator, discriminator, device)
    step, layout = make_step(recipe, generator, discriminator), Layout.of(128, 1)
    host.set_freed("reuse")
    there = loader.batch(0, 128)

    def update(first: int, read: bool) -> float:
        begin = time.perf_counter()
        batch = loader.pieces(first, 128) if read else Batch(lambda row, n: there[row - first : row - first + n])
        for phase, optimizer in ((step.discriminator_phase, optimizer_d), (step.generator_phase, optimizer_g)):
            phase(batch, first, layout)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin

    taken: dict[bool, list[float]] = {True: [], False: []}
    for i in range(updates):
        for read in (True, False) if i % 2 else (False, True):
            taken[read].append(update(i * 128, read))
    return statistics.median(taken[True]), statistics.median(taken[False])


def cell(where: str) -> None:
    """A training of 100 updates on the data in ``where``: how long until images could be had, until it began, and what it held."""
    import frugan

    asked, begin = Data(data=where), time.perf_counter()
    source = open_source(asked)
    PackLoader(source, resolve(source, asked, print), seed=0, workers=CORES, tell=print).batch(0, 64)
    found: dict[str, float] = {"open": time.perf_counter() - begin}
    begin = time.perf_counter()

    def update(images: int) -> None:
        found.setdefault("start", time.perf_counter() - begin)
        if images >= 6400:
            found["resident"] = host.resident()
            raise KeyboardInterrupt

    try:
        with tempfile.TemporaryDirectory() as out:
            frugan.train(
                where,
                out=Path(out) / "r",
                epochs=1,
                batch_size=64,
                device="cpu",
                width_g=8,
                width_d=8,
                quiet=True,
                on_update=update,
            )
    except KeyboardInterrupt:
        print(json.dumps(found))


def main(options: Options) -> None:
    if options.cell:
        cell(options.cell)
        return
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["FRUGAN_CACHE"] = temporary
        root, shared = Path(temporary), Path(options.data)
        table = Table(title=f"data, {CORES} cores")
        for heading in ("what", "", "against", "ratio"):
            table.add_column(heading, justify="left" if heading == "what" else "right")
        sources = [("packing noto-emoji-128 at 64", str(next((shared / "noto-emoji-128").glob("*.zip"), "")), 64),
                   ("packing Fashion-MNIST at 64", str(shared / "fashion-mnist"), 64),
                   ("packing Fashion-MNIST at 28", str(shared / "fashion-mnist"), 28)]  # fmt: skip
        for name, where, side in sources:
            if not where or not Path(where).exists():
                continue
            rates = {workers: [packing(where, side, workers, root / "p") for _ in range(3)] for workers in (CORES, 1)}
            two, one = (statistics.median(rates[workers]) for workers in (CORES, 1))
            if where.endswith(".zip"):
                table.add_row(name, f"{two:,.0f} images/s", f"{one:,.0f} with one thread", f"{two / one:.2f}")
            else:  # the loader takes one thread for small arrays
                table.add_row(name, f"{one:,.0f} images/s", "with one thread; a second one only waits", "")

        fashion = open_source(Data(data=str(shared / "fashion-mnist")))
        (root / "png" / "all").mkdir(parents=True)
        for i in range(options.images):
            with fashion.open(i % len(fashion), 28) as image:
                image.convert("RGB").save(root / "png" / "all" / f"{i:06}.png")
        asked = Data(data=str(root / "png"), image_size=28, channels=3)
        loader = PackLoader(open_source(asked), asked, seed=0, workers=CORES, tell=lambda _: None, keep=0)
        theirs, ours = [], []
        for _ in range(options.rounds):
            theirs.append(by_image_folder(root / "png"))
            ours.append(by_pack(loader))
        a, b = statistics.median(ours), statistics.median(theirs)
        table.add_row(
            "reading random batches", f"{a:,.0f} images/s", f"{b:,.0f} by ImageFolder, DataLoader({CORES} workers)", f"{a / b:.0f}"
        )
        grey = Data(data=str(shared / "fashion-mnist"), image_size=28, channels=1)
        loader = PackLoader(open_source(grey), grey, seed=0, workers=CORES, tell=lambda _: None, keep=0)
        read, resident = training(loader, 300)
        table.add_row(
            "an update, images read",
            f"{1e3 * read:.1f} ms",
            f"{1e3 * resident:.1f} ms, one batch that is there",
            f"{read / resident:.3f}",
        )

        found = {}
        for n in (10_000, options.million):
            folder = root / f"idx-{n}"
            folder.mkdir()
            random = np.random.default_rng(0)
            with (folder / "train-images-idx3-ubyte").open("wb") as file:
                file.write(bytes((0, 0, 8, 3)) + np.array([n, 28, 28], ">u4").tobytes())
                for _ in range(n // 10_000):
                    file.write(random.integers(0, 256, (10_000, 28, 28), dtype=np.uint8).tobytes())
            for _ in range(2):  # packed by the first
                done = subprocess.run([sys.executable, __file__, "--cell", str(folder)], capture_output=True, text=True, check=True)
                found[n] = json.loads(done.stdout.splitlines()[-1])
        (few, many) = found.values()
        mib = [round(f["resident"] / 2**20) for f in (many, few)]
        table.add_row(f"resident, {options.million:,} images", f"{mib[0]} MiB", f"{mib[1]} MiB, 10,000", f"+{mib[0] - mib[1]} MiB")
        opens = [f["open"] for f in (many, few)]
        table.add_row("first batch after", f"{opens[0]:.3f} s", f"{opens[1]:.3f} s, 10,000", f"{opens[0] / opens[1]:.2f}")
        starts = [f["start"] for f in (many, few)]
        table.add_row("first update after", f"{starts[0]:.2f} s", f"{starts[1]:.2f} s, 10,000", f"{starts[0] / starts[1]:.2f}")
    Console(width=130).print(table)
    print(f"medians; torch {torch.__version__}, Pillow {Image.__version__}")


if __name__ == "__main__":
    main(tyro.cli(Options))

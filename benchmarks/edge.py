"""Does the smallest budget that is named work, and does nine tenths of it not?

    python benchmarks/edge.py [--processes 5] [--quick]

For each recipe, size and set of images: what the refusal of a tiny budget names as smallest; whether that many processes of their
own train within it (two updates of 256, pictures, plots, a checkpoint), and the most that one of them held from first to last
page as the system counts it (``ru_maxrss``, as ``/usr/bin/time -v`` shows it); whether 90% of it is refused.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

MIB = 1 << 20


@dataclass
class Options:
    processes: int = 5  # that train at each budget
    recipes: tuple[str, ...] = ("mlp", "upsample", "dcgan", "resize", "r3", "projected")
    sizes: tuple[int, ...] = (48, 64)
    data: tuple[Path, ...] = (  # archives of images, of which the first are taken
        Path("../shared/data/clothing/clothing.zip"),
        Path("../shared/data/noto-emoji-128/noto-emoji-128.zip"),
    )
    images: int = 500
    batch: int = 256
    quick: bool = False  # one process, the first set


def unpacked(archive: Path, images: int, folder: Path) -> Path:
    """The first ``images`` pictures of a zip archive, as files."""
    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))[:images]
        for number, name in enumerate(names):
            folder.joinpath(f"{number:05}{Path(name).suffix}").write_bytes(opened.read(name))
    return folder


def run(arguments: list[str]) -> tuple[int, str, int]:
    """``frugan train`` in a process of its own: its exit status, what it said, and the most bytes it held."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "frugan", "train", *arguments, "--out", f"{folder}/run"]
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return process.returncode, said.read(), usage.ru_maxrss * 1024


def cells(options: Options) -> Iterator[tuple[str, int, Path]]:
    """Recipes x sizes x archives."""
    yield from product(options.recipes, options.sizes, options.data[: 1 if options.quick else None])


def main(options: Options) -> None:
    table = Table(
        title=f"MiB, {options.images} images, batches of {options.batch}, {options.processes} processes each"
        if not options.quick
        else "MiB, one process each"
    )
    for heading in ("recipe", "images", "data"):
        table.add_column(heading)
    for heading in ("named", "held at most", "trained within it", "90% refused"):
        table.add_column(heading, justify="right")
    processes = 1 if options.quick else options.processes
    if missing := [str(path) for path in options.data if not path.exists()]:
        sys.exit(f"there is no {', nor '.join(missing)}: name archives of images by --data.")
    for recipe, size, archive in cells(options):
        with tempfile.TemporaryDirectory() as folder:
            data = unpacked(archive, options.images, Path(folder))
            how = [
                str(data), "--recipe", recipe, "--image-size", str(size), "--batch-size", str(options.batch), "--epochs", "1",
                "--memory",
            ]  # fmt: skip
            _, said, _ = run([*how, "64MiB"])
            found = re.search(r"smallest that works is --memory (\d+)MiB", said)
            if not found:
                sys.exit(f"{recipe} at {size} pixels named no budget: {said[-500:]}")
            named = int(found[1])
            trained = [run([*how, f"{named}MiB"]) for _ in range(processes)]
            refused, _, _ = run([*how, f"{named * 9 // 10}MiB"])
            held = max(most for _, _, most in trained)
            good = sum(status == 0 and most <= named * MIB for status, _, most in trained)
            row = [recipe, str(size), archive.stem, str(named), f"{held / MIB:.0f}", f"{good} of {processes}"]
            table.add_row(*row, "yes" if refused == 2 else f"no: {refused}")
            print(*row, refused, file=sys.stderr, flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))

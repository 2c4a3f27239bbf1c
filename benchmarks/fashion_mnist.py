"""Quality against minutes on Fashion-MNIST: every recipe, several seeds, with classes and without. Writes the published page.

    python benchmarks/fashion_mnist.py --data ../shared/data/fashion-mnist [--minutes 3 12 --seeds 3]

Runs `frugan train` for each, one after the other, and scores it as `unseen.py` does. Trainings go by the clock: let nothing run
beside. What was found is kept in OUT/results.json, whose rows are not measured again, with the machine and the day; an interrupted
training goes on. ``--only`` writes the page from what is there.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import torch
import tyro
from unseen import COLUMNS, Judge, samples_of, words

from frugan.config.recipe import Data
from frugan.config.recipes import RECIPES
from frugan.reporting.records import MemoryMeasured
from frugan.reporting.run_folder import RunFolder
from frugan.utils.files import whole, write_text

HEADINGS = {
    "unseen": "Frechet, unseen network", "unseen precision": "precision", "unseen recall": "recall", "accuracy": "class told",
    "frechet_classifier": "Frechet, classifier", "precision_classifier": "precision", "recall_classifier": "recall", "swd": "SWD",
}  # fmt: skip


@dataclass
class Options:
    data: Path = Path("../shared/data/fashion-mnist")
    minutes: tuple[float, ...] = (3, 12)
    seeds: int = 3
    recipes: tuple[str, ...] = tuple(RECIPES)
    conditional: tuple[bool, ...] = (False, True)
    flags: tuple[str, ...] = ()  # more for frugan train, without dashes, as threads=1
    also: tuple[str, ...] = ()  # trainings made otherwise, NAME@MINUTES=RUN
    samples: int = 10_000
    out: Path = Path("runs/fashion-mnist")
    page: Path = Path("docs/fashion_mnist.md")
    picture: Path = Path("docs/pictures/fashion_mnist.png")
    only: bool = False  # write the page alone
    note: str = ""  # a sentence more on how it was measured, for the page


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        name: of what was trained: the recipe, and whether with classes.
        minutes: asked for.
        speed: images a second.
        peak: bytes that the process held.
        metrics: by their names.
        machine: it was measured on.
        day: on which.
    """

    name: str
    minutes: float
    seed: int
    images: int
    speed: float
    peak: int
    metrics: dict[str, float]
    machine: str
    day: str


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open() if Path("/proc/cpuinfo").exists() else Path(os.devnull).open() as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{model}, {cores} cores"
    return f"{device}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def train(options: Options, name: str, minutes: float, seed: int) -> Path:
    run = options.out / f"{name.replace(' ', '-')}-{minutes:g}min-{seed}"
    recipe, *classes = name.split()
    said = [str(options.data), "--recipe", recipe, "--minutes", f"{minutes:g}", "--seed", f"{seed}", "--out", str(run)]
    said += ["--conditional" if classes else "--no-conditional"] + [f"--{flag}" for flag in options.flags]
    subprocess.run([sys.executable, "-m", "frugan", "train", *said], check=True, stdout=sys.stderr)
    return run


def score(judge: Judge, run: Path, name: str, minutes: float, seed: int) -> Row:
    folder = RunFolder(run)
    last = folder.read_log()[-1]
    peak = max((e.measured for e in folder.read_events() if isinstance(e, MemoryMeasured)), default=0)
    metrics = judge(*samples_of(str(run), None).images(max(judge.samples, len(judge.real))))
    kept = {key: metrics[key] for key in COLUMNS if key in metrics}
    return Row(name, minutes, seed, last.images, last.speed, peak, kept, machine(), date.today().isoformat())


def spread(values: Iterable[float], name: str) -> str:
    """The mean, and how far from it the values reach."""
    there = list(values)
    if not there:
        return "-"
    mean = statistics.fmean(there)
    reach = max(max(there) - mean, mean - min(there))
    return words({name: mean}, name) + (f" ± {words({name: reach}, name)}" if len(there) > 1 else "")


def plot(rows: list[Row], real: dict[str, float], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(17, 4.5), layout="constrained")
    names = dict.fromkeys(row.name for row in rows)
    marks = dict(zip(names, cycle("osD^v<>pPX*"), strict=False))  # of which there are more than colours
    for axis, key, low in zip(axes, ("unseen", "unseen precision", "unseen recall"), (True, False, False), strict=True):
        for name in marks:
            points = []
            for minutes in sorted({row.minutes for row in rows if row.name == name}):
                values = [row.metrics[key] for row in rows if (row.name, row.minutes) == (name, minutes)]
                points.append((minutes, statistics.fmean(values), min(values), max(values)))
            x, y, least, most = zip(*points, strict=True)
            errors = [[a - b for a, b in zip(y, least, strict=True)], [b - a for a, b in zip(y, most, strict=True)]]
            axis.errorbar(x, y, errors, marker=marks[name], capsize=3, label=name, linestyle="--" if " " in name else "-")
        axis.axhline(real[key], color="grey", linewidth=0.8, label="other real images")
        axis.set(xlabel="minutes", title=f"{HEADINGS[key]}, {'lower' if low else 'higher'} is better", xscale="log")
        axis.set_xticks(ticks := sorted({row.minutes for row in rows}), [f"{minutes:g}" for minutes in ticks], minor=False)
        axis.minorticks_off()
        if low:
            axis.set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    with whole(path) as part:
        figure.savefig(part, dpi=110)
    pyplot.close(figure)


def page(rows: list[Row], real: dict[str, float], options: Options, protocol: str) -> str:
    names = {key: HEADINGS[key] for key in COLUMNS if any(key in row.metrics for row in rows)}
    head = ["", "minutes", "runs", "images seen", "images/s", "peak memory", *names.values()]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, minutes in sorted(dict.fromkeys((row.name, row.minutes) for row in rows), key=lambda pair: pair[1]):
        of = [row for row in rows if (row.name, row.minutes) == (name, minutes)]
        cells = [f"`{name}`", f"{minutes:g}", f"{len(of)}", f"{statistics.fmean(row.images for row in of):,.0f}"]
        cells += [f"{statistics.fmean(row.speed for row in of):,.0f}"]
        cells += [f"{max(row.peak for row in of) / 2**20:,.0f} MiB" if any(row.peak for row in of) else "-"]
        cells += [spread((row.metrics[key] for row in of if key in row.metrics), key) for key in names]
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["other real images", *[""] * 5, *(words(real, key) for key in names)]
    lines.append(f"| {' | '.join(cells)} |")
    measured = sorted({(row.machine, row.day) for row in rows})
    when = "; ".join(f"{where} ({', '.join(day for w, day in measured if w == where)})" for where in dict(measured))
    shown = os.path.relpath(options.picture, options.page.parent)
    but = "".join(f", but `--{flag}`" for flag in options.flags)
    return f"""# Quality against minutes, Fashion-MNIST

`frugan train fashion-mnist --recipe NAME --minutes M`, everything else as it comes{but}; "classes" is `--conditional`. Minutes are
those of the whole command. Means over seeds, and how far the furthest seed lies from them. Lower is better for distances (Frechet,
SWD), higher for precision, recall, and the share of samples that the unseen network takes for the class that was asked for.
`python benchmarks/fashion_mnist.py` writes this page.

![quality against minutes]({shown})

{chr(10).join(lines)}

The first columns of metrics: {protocol.removesuffix(".")}.

Measured on: {when}. {options.note}
"""


def main(options: Options) -> None:
    file = options.out / "results.json"
    rows = [Row(**row) for row in json.loads(file.read_text())] if file.exists() else []
    judge = Judge(Data(data=str(options.data)), options.samples)
    real = judge.reals()
    done = {(row.name, row.minutes, row.seed) for row in rows}
    names = [f"{recipe} classes" if classes else recipe for recipe in options.recipes for classes in options.conditional]
    wanted = [(name, minutes, seed) for minutes in options.minutes for seed in range(options.seeds) for name in names]
    also = {(n, float(m), -1): Path(run) for a in options.also for what, run in [a.split("=")] for n, m in [what.split("@")]}
    for each in [*also, *wanted]:
        if each not in done and not options.only:
            rows.append(score(judge, also.get(each) or train(options, *each), *each))
            write_text(file, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if not rows:
        sys.exit(f"there is nothing in {file} yet")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, real, options.picture)
    write_text(options.page, page(rows, real, options, judge.words))
    print(options.page.read_text())


if __name__ == "__main__":
    main(tyro.cli(Options))

"""What each verb of the command line does. torch is imported only once there is work to do."""

import gc
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from frugan.errors import UserError
from frugan.recipe import Data, Recipe, Run

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def train(options: Any, recipe: Recipe) -> None:
    """Trains, or goes on with a training that was interrupted."""
    run = Run(**{f.name: getattr(options, f.name) for f in fields(Run)})
    _spin_briefly()
    from frugan.console import Console
    from frugan.signals import Stopped
    from frugan.trainer import train

    try:
        train(recipe, run, Console(options.quiet))
    except Stopped as stopped:
        print(f"frugan: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)


def plan(options: Any, recipe: Recipe) -> None:
    """Says what a training would need and how it would be laid out."""
    if options.plot and Path(options.plot).suffix.lower() not in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
        raise UserError(f"--plot {options.plot}: pictures are written as .png, .jpg, .svg or .pdf.")
    _spin_briefly()
    import frugan.trainer  # noqa: F401  # what a training imports is part of what it needs
    from frugan import device, pictures
    from frugan.console import Console
    from frugan.data.loader import bytes_of, keepable, resolve
    from frugan.data.source import open_source
    from frugan.data.stream import ShardSource, block_of
    from frugan.memory import limit
    from frugan.memory.plan import size
    from frugan.planner import find

    console = Console(quiet=options.json)
    where = device.choose(options.device)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    source = open_source(recipe.data)
    data = resolve(source, recipe.data, console.tell)
    recipe = recipe.replace(image_size=data.image_size, channels=data.channels)
    if recipe.memory.precision == "auto":
        recipe = recipe.replace(precision=device.fast_precision(where))
    with device.arithmetic(recipe.memory.precision, where):  # which refuses what the device has not
        keep = keepable(limit.budget(options.memory, where), where)
    batch = recipe.training.batch_size
    if isinstance(source, ShardSource):
        held = (2 * min(block_of(data), len(source)) + batch) * math.prod(data.shape)
    else:
        held = bytes_of(len(source), data, keep)
    let_go = None if isinstance(source, ShardSource) or not held else lambda: True
    gc.collect()
    gc.freeze()  # as training does: collections, of which planning makes many, need not look at what was imported
    planner, found = find(recipe, where, data=held, memory=options.memory, approximate=options.allow_approximate, let_go=let_go)
    looked_at = planner.looked_at(found) if options.compare else []
    speed = planner.images_per_second(found) if options.compare else None
    if options.json:
        about = {"precision": planner.recipe.memory.precision, "candidates": looked_at, "images_per_second": speed}
        print(json.dumps(found.as_dict() | about))
    else:
        console.bytes(found)
        if looked_at:
            console.candidates(looked_at)
        for reason in planner.why(found):
            console.tell(reason)
        console.plan(found, recipe.training.batch_size)
        precision = planner.recipe.memory.precision
        if speed is not None:
            console.tell(f"Speed: about {speed:,.0f} images/s in {precision}: one micro-batch of each phase was run and timed.")
    if options.plot:
        courses = {
            f"{name}: {min(2, parts)} of {parts} micro-batches" if parts > 1 else name: timeline.course()
            for name, (timeline, parts) in planner.timelines(found).items()
        }
        title = f"{recipe.recipe}, {data.image_size}x{data.image_size}, batch {recipe.training.batch_size}: {size(found.allocated)}"
        pictures.plot_memory(courses, Path(options.plot), title)
        console.tell(f"Memory over one update is drawn in {options.plot}.")


def summary(options: Any, recipe: Recipe) -> None:
    """Prints both networks of a recipe, layer by layer."""
    from frugan.console import Console
    from frugan.data.loader import resolve
    from frugan.data.source import open_source
    from frugan.summary import summarise

    console = Console()
    data = recipe.data
    if recipe.memory.precision == "auto":
        from frugan import device

        recipe = recipe.replace(precision=device.fast_precision(device.choose("auto")))
    if not (data.image_size and data.channels):
        data = resolve(open_source(data), data, console.tell)
    console.networks(summarise(recipe.replace(image_size=data.image_size, channels=data.channels)))


def generate(options: Any) -> None:
    """Makes images with a trained generator."""
    from frugan import pictures
    from frugan.generate import load

    generator = load(options.run, options.device, best=options.best)
    run = Path(options.run)
    out = Path(options.out) if options.out else (run if run.is_dir() else run.parent) / "generated"
    single = out if out.suffix else None
    if single and single.suffix.lower() not in PICTURES:
        raise UserError(f"--out {out}: pictures are written as .png, .jpg, .webp or .bmp.")
    if single and options.separate:
        raise UserError(f"--separate writes many files: --out {out} must be a folder.")
    if options.interpolate and options.separate:
        raise UserError("--interpolate writes a strip and a GIF: leave --separate out.")
    if options.interpolate:
        images = generator.interpolate(options.interpolate, options.frames)
        name = "-".join(map(str, options.interpolate))
        strip, loop = (
            single or out / f"interpolation_{name}.png",
            (single or out / f"interpolation_{name}.gif").with_suffix(".gif"),
        )
        every = max(1, options.frames // 8)  # a strip of every frame would be too wide to look at
        kept = images[::every] if (len(images) - 1) % every == 0 else images
        pictures.save(pictures.grid(kept, columns=len(kept)), strip)
        pictures.save_loop(images, loop)
        print(f"{strip}\n{loop}")
        return
    images = generator.generate(options.n, seed=options.seed)
    if options.separate:
        for i, image in enumerate(images):
            pictures.save(pictures.single(image), out / f"seed_{options.seed}_{i:05d}.png")
        print(f"{len(images)} images in {out}")
    else:
        path = single or out / f"seed_{options.seed}.png"
        pictures.save(pictures.grid(images), path)
        print(path)


def evaluate(options: Any) -> None:
    """Judges a trained generator, or images, against real ones."""
    _spin_briefly()
    from frugan import device
    from frugan import evaluate as judging
    from frugan.console import Console
    from frugan.data.loader import Loader, resolve
    from frugan.data.source import open_source
    from frugan.data.stream import ShardSource

    if options.samples < judging.FEWEST:
        raise UserError(f"--samples {options.samples} is too few to judge by: at least {judging.FEWEST} are needed.")
    console = Console(quiet=options.json)
    what, run = f"images of {options.run}", Path(options.run)
    asked = Data(data=options.data or Data().data, image_size=options.image_size, channels=options.channels)
    split = {"split": options.split} if options.split else {}
    produce: Callable[[int, int], Any] | None = None
    count = options.samples
    if run.suffix == ".safetensors" or (run / "recipe.toml").exists():
        from frugan.generate import load

        generator = load(options.run, options.device, best=options.best)
        if options.image_size or options.channels:
            raise UserError(f"--image-size and --channels are for images: {run} has its own.")
        said: dict[str, Any] = {"data": options.data} if options.data else {}
        asked = replace(generator.recipe.data, stream=False, **said)  # of the size that it makes
        averaged = ", averaged over training" if generator.recipe.training.ema_half_life else ", not averaged"
        which = "the best checkpoint of " if options.best else ""
        what = f"samples of {which}{options.run} (seed {options.seed}, after {generator.images_seen:,} images{averaged})"
        produce = lambda first, n: generator.generate(n, seed=options.seed, first=first)  # noqa: E731
    elif options.data is None:
        raise UserError(f"{run} is no run folder: name a run, or images and DATA to judge them against.")
    asked = replace(asked, **split)
    source = open_source(asked)
    if isinstance(source, ShardSource):
        raise UserError(
            f"{asked.data} is a stream, and real images are needed in any order: copy them to this disk, and name the copy as DATA."
        )
    ways: dict[str, Any] = {"workers": options.workers, "tell": console.tell, "progress": console.packing}
    asked = resolve(source, asked, console.tell)
    real = Loader(source, asked, seed=judging.SEED, **ways)
    if produce is None:
        asked = replace(asked, data=options.run, split=options.run_split)
        judged = open_source(asked)
        images = Loader(judged, asked, seed=judging.SEED, **ways)
        produce, count = images.batch, min(count, len(images))
        what = f"{'images' if options.run_split == 'train' else options.run_split + ' images'} of {judged.name}"
    asking = judging.Options(options.metrics, options.weights, options.any_weights, min(options.samples, len(real)))
    judge = judging.Judge(
        real,
        source.name,
        len(source.classes),
        asking,
        device.choose(options.device),
        console.tell,
        console.judging,
        console.learning,
    )
    values = judge(produce, count)
    protocol = judge.protocol(count, what)
    if options.json:
        if not judge.official:
            other = judging.FAMILIES["inception"]
            values = {f"{name}_by_other_weights" if name in other else name: value for name, value in values.items()}
        print(json.dumps({"metrics": values, "protocol": protocol, "official": judge.official}))
    else:
        console.judged(values, judge.official)
        console.tell(protocol)


def report(options: Any) -> None:
    """Writes the report of a run, or compares several."""
    from frugan import report as page

    runs = [Path(run) for run in options.runs]
    if len(runs) == 1:
        print(page.write(runs[0], Path(options.out) if options.out else None))
    else:
        print(page.compare(runs, Path(options.out or "comparison.html")))


def _images(options: Any, tell: Callable[[str], None]) -> tuple[Any, Data]:
    """The source that was named, and the data section with everything filled in."""
    from frugan.data.loader import resolve
    from frugan.data.source import open_source
    from frugan.data.stream import ShardSource

    said = {f.name: getattr(options, f.name) for f in fields(Data) if f.name not in ("data", "flip")}
    asked = Data(data=options.data or Data().data, **said)
    source = open_source(asked)
    if isinstance(source, ShardSource):
        source.open(0, 0)
    return source, resolve(source, asked, tell)


def pack(options: Any) -> None:
    """Packs images beforehand."""
    from frugan.console import Console
    from frugan.data.packing import make, packed

    console = Console()
    source, data = _images(options, console.tell)
    ways: dict[str, Any] = {"workers": options.workers, "tell": console.tell, "progress": console.packing}
    if options.out is None:
        made = packed(source, data, **ways)
    else:
        out = Path(options.out)
        if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} holds something else: name a new folder.")
        for problem in source.problems:
            console.tell(problem)
        made = make(source, data, out, **ways)
    known = made.manifest
    skipped = f", {known.skipped} skipped" if known.skipped else ""
    print(f"{made.folder}: {known.images:,} images of {known.size}x{known.size}, {known.channels} channels{skipped}")


def check(options: Any) -> None:
    """Tells what is there, before one trains on it."""
    from frugan import pictures
    from frugan.console import Console
    from frugan.data.check import check as look

    console = Console(quiet=options.json)
    source, data = _images(options, console.tell)
    found = look(source, data, workers=options.workers, progress=console.looking)
    sheet = Path(options.sheet or f"{source.name}-check.png")
    if found.shown:
        import numpy as np
        import torch

        pictures.save(pictures.grid(torch.from_numpy(np.stack(found.shown))), sheet)
    if options.json:
        print(json.dumps(found.as_dict() | {"problems": list(source.problems), "sheet": str(sheet)}))
    else:
        console.found(found, source.problems, data)
        console.tell(f"Images as training sees them are in {sheet}.")
    if not found.images:
        raise UserError(f"none of the {len(source)} images of {source.name} can be read.")


def _spin_briefly() -> None:
    """Lets idle worker threads of torch spin only briefly before they sleep, unless told otherwise; must run before its import.

    Threads that spin for long on a core that another process wants slow both down; threads that never spin make short
    operations wait for them (docs/LOG.md has the numbers).
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "5000"

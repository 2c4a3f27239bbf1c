"""``frugan evaluate``: a trained generator, or images, against real ones."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from frugan.cli.parsing import Command, spin_briefly
from frugan.config.recipe import Data
from frugan.utils.errors import UserError


@dataclass(kw_only=True)
class Evaluate:
    """Evaluates a trained generator, or images, against real ones: how it is done is printed with every number."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="run folder, generator.safetensors, or images")]
    data: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA", help="real images; unset: the run's", help_behavior_hint="")
    ] = None
    metrics: Annotated[
        str, tyro.conf.arg(help="auto (what needs no download), or names as swd,frechet_classifier,fid: docs/evaluation.md")
    ] = "auto"
    samples: Annotated[int, tyro.conf.arg(help="how many, and as many real images")] = 10_000
    seed: Annotated[int, tyro.conf.arg(help="of the samples")] = 0
    split: Annotated[
        str | None, tyro.conf.arg(help="part of the real images: train, test or all; unset: the run's", help_behavior_hint="")
    ] = None
    run_split: Annotated[str, tyro.conf.arg(help="the same of RUN, where it is images")] = "train"
    best: Annotated[bool, tyro.conf.arg(help="the best generator by --evaluate-every, not the last one")] = False
    image_size: Annotated[
        int | None,
        tyro.conf.arg(help="side that images are brought to; unset: the run's or the data's own, or 64", help_behavior_hint=""),
    ] = None
    channels: Annotated[int | None, tyro.conf.arg(help="1 or 3, where RUN is images; unset: DATA's", help_behavior_hint="")] = None
    weights: Annotated[
        str | None, tyro.conf.arg(help="file of Inception's weights; unset: downloaded if asked for", help_behavior_hint="")
    ] = None
    any_weights: Annotated[bool, tyro.conf.arg(help="also take other weights than the published ones; then nothing is FID")] = False
    workers: Annotated[int, tyro.conf.arg(help="threads that decode images")] = 2
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, mps or auto")] = "cpu"
    json: Annotated[bool, tyro.conf.arg(help="print the numbers as JSON")] = False


def run(options: Evaluate) -> None:
    """Evaluates a trained generator, or images, against real ones."""
    spin_briefly()
    from frugan.data.opening import open_loader, resolve
    from frugan.data.sources import open_source
    from frugan.evaluation.evaluator import FEWEST, SEED, Evaluator
    from frugan.evaluation.families.base import Options
    from frugan.reporting.console import Console
    from frugan.utils import device

    if options.samples < FEWEST:
        raise UserError(f"--samples {options.samples} is too few to evaluate by: at least {FEWEST} are needed.")
    console = Console(quiet=options.json)
    what, path = f"images of {options.run}", Path(options.run)
    asked = Data(data=options.data or Data().data, image_size=options.image_size, channels=options.channels)  # type: ignore[arg-type]
    split: dict[str, Any] = {"split": options.split} if options.split else {}
    produce: Callable[[int, int], Any] | None = None
    count = options.samples
    if path.suffix == ".safetensors" or (path / "recipe.toml").exists():
        from frugan.reporting.run_folder import load_generator

        generator = load_generator(options.run, options.device, best=options.best)
        if options.image_size or options.channels:
            raise UserError(f"--image-size and --channels are for images: {path} has its own.")
        said: dict[str, Any] = {"data": options.data} if options.data else {}
        asked = replace(generator.recipe.data, stream=False, **said)  # of the size that it makes
        averaged = ", averaged over training" if generator.recipe.training.ema_half_life else ", not averaged"
        which = "the best checkpoint of " if options.best else ""
        what = f"samples of {which}{options.run} (seed {options.seed}, after {generator.images_seen:,} images{averaged})"
        produce = lambda first, n: generator.generate(n, seed=options.seed, first=first)  # noqa: E731
    elif options.data is None:
        raise UserError(f"{path} is no run folder: name a run, or images and DATA to evaluate them by.")
    asked = replace(asked, **split)
    source = open_source(asked)
    if not source.random_access:
        raise UserError(
            f"{asked.data} is a stream, and real images are needed in any order: copy them to this disk, and name the copy as DATA."
        )
    ways: dict[str, Any] = {"workers": options.workers, "tell": console.tell, "progress": console.packing}
    asked = resolve(source, asked, console.tell)
    real = open_loader(source, asked, seed=SEED, **ways)
    if produce is None:
        asked = replace(asked, data=options.run, split=options.run_split)
        evaluated = open_source(asked)
        images = open_loader(evaluated, asked, seed=SEED, **ways)
        produce, count = images.batch, min(count, len(images))
        what = f"{'images' if options.run_split == 'train' else options.run_split + ' images'} of {evaluated.name}"
    asking = Options(options.metrics, options.weights, options.any_weights, min(options.samples, len(real)))
    evaluator = Evaluator(
        real,
        source.name,
        len(source.classes),
        asking,
        device.choose(options.device),
        console.tell,
        console.evaluating,
        console.learning,
    )
    values, unofficial = evaluator(produce, count), evaluator.unofficial
    protocol = evaluator.protocol(count, what)
    if options.json:
        values = {f"{name}_by_other_weights" if name in unofficial else name: value for name, value in values.items()}
        print(json.dumps({"metrics": values, "protocol": protocol, "official": not unofficial}))
    else:
        console.evaluated(values, unofficial)
        console.tell(protocol)


COMMAND = Command(lambda _: Evaluate, run)

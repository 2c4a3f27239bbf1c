"""``frugan evaluate``: a trained generator, or images, against real ones."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import tyro

from frugan.cli.parsing import Command, data_options, data_said, spin_briefly
from frugan.config.recipe import Data
from frugan.utils.errors import UserError


@dataclass(kw_only=True)
class Evaluate:
    """Evaluates a trained generator, or images, against real ones: how it is done is printed with every number."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="run folder, generator.safetensors, or images")]
    metrics: Annotated[
        str, tyro.conf.arg(help="auto (what needs no download), or names as swd,frechet_classifier,fid: docs/evaluation.md")
    ] = "auto"
    samples: Annotated[int, tyro.conf.arg(help="how many, and as many real images")] = 10_000
    seed: Annotated[int, tyro.conf.arg(help="of the samples")] = 0
    truncation: Annotated[float, tyro.conf.arg(help="what the samples' noise is multiplied by, as generate does")] = 1.0
    run_split: Annotated[str, tyro.conf.arg(help="as --split, of RUN where it is images")] = "train"
    best: Annotated[bool, tyro.conf.arg(help="the best generator by --evaluate-every, not the last one")] = False
    weights: Annotated[
        str | None, tyro.conf.arg(help="file of Inception's weights; unset: downloaded if asked for", help_behavior_hint="")
    ] = None
    any_weights: Annotated[bool, tyro.conf.arg(help="also take other weights than the published ones; then nothing is FID")] = False
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, mps or auto")] = "cpu"
    json: Annotated[bool, tyro.conf.arg(help="print the numbers as JSON")] = False


def options(_: Sequence[str]) -> type[Any]:
    """What is said of the real images, unset as the run has it, and how they are compared."""
    return data_options(Evaluate, without=("stream",), unset=True)


def _samples(generator: Any, seed: int, truncation: float, first: int, n: int) -> Any:
    return generator.generate(n, seed=seed, first=first, truncation=truncation)


def run(said: Any) -> None:
    """Evaluates a trained generator, or images, against real ones."""
    spin_briefly()
    from frugan.data.opening import open_loader, opened
    from frugan.data.sources import open_source
    from frugan.evaluation.evaluator import FEWEST, SEED, Evaluator
    from frugan.evaluation.families.base import Options
    from frugan.reporting.console import Console
    from frugan.utils import device

    if said.samples < FEWEST:
        raise UserError(f"--samples {said.samples} is too few to evaluate by: at least {FEWEST} are needed.")
    console = Console(quiet=said.json)
    what, path = f"images of {said.run}", Path(said.run)
    asked = Data(**data_said(said))
    produce: Callable[[int, int], Any] | None = None
    drawn, trained = None, tuple[str, ...]()
    count = said.samples
    if path.suffix == ".safetensors" or (path / "recipe.toml").exists():
        from frugan.reporting.run_folder import load_generator

        generator = load_generator(said.run, said.device, best=said.best)
        if said.image_size or said.channels:
            raise UserError(f"--image-size and --channels are for images: {path} has its own.")
        if said.run_split != "train":
            raise UserError(f"--run-split is for images: {path} makes its own.")
        asked = replace(generator.recipe.data, stream=False, **data_said(said))  # of the size that it makes
        averaged = ", averaged over training" if generator.recipe.training.ema_half_life else ", not averaged"
        averaged += f", truncation {said.truncation:g}" if said.truncation != 1 else ""
        which = "the best checkpoint of " if said.best else ""
        what = f"samples of {which}{said.run} (seed {said.seed}, after {generator.images_seen:,} images{averaged})"
        produce = partial(_samples, generator, said.seed, said.truncation)
        drawn, trained = generator.drawn(count, seed=said.seed), generator.recipe.classes.names
    elif said.data is None:
        raise UserError(f"{path} is no run folder: name a run, or images and DATA to evaluate them by.")
    elif said.truncation != 1:
        raise UserError(f"--truncation is for a generator, and {path} is none.")
    try:
        source, asked = opened(asked, console.tell)
    except UserError as error:
        if said.data is not None:
            raise
        elsewhere = f"{said.run} was trained on {asked.data!r}, which is not to be had from here: name it as DATA"
        raise UserError(f"{elsewhere} ({error})") from None
    if not source.random_access:
        raise UserError(
            f"{asked.data} is a stream, and real images are needed in any order: copy them to this disk, and name the copy as DATA."
        )
    ways: dict[str, Any] = {"workers": said.workers, "tell": console.tell, "progress": console.packing}
    real = open_loader(source, asked, seed=SEED, **ways)
    if produce is None:
        asked = replace(asked, data=said.run, split=said.run_split)
        evaluated = open_source(asked)
        part = f"{said.run_split} " if said.run_split != "train" else ""
        if part and "split" in evaluated.unused:
            console.tell(f"--run-split {said.run_split} does nothing here: {evaluated.name} is taken whole.")
            part = ""
        images = open_loader(evaluated, asked, seed=SEED, **ways)
        produce, count = images.batch, min(count, len(images))
        what = f"{part}images of {evaluated.name}"
    classes = tuple(map(str, source.classes))
    if drawn is not None and trained != classes:
        drawn = None
        there = f"The classes of {source.name} are others than those of {said.run}" if classes else f"{source.name} has no classes"
        console.tell(f"{there}: samples are not compared by class.")
    asking = Options(said.metrics, said.weights, said.any_weights, min(said.samples, len(real)))
    evaluator = Evaluator(
        real, source.name, len(source.classes), asking, device.choose(said.device), console.tell, console.evaluating,
        console.learning, drawn is not None,
    )  # fmt: skip
    values, unofficial = evaluator(produce, count, drawn), evaluator.unofficial
    by_class = {name: found.tolist() for name, found in evaluator.by_class.items()}
    protocol = evaluator.protocol(count, what)
    if said.json:
        values = {f"{name}_by_other_weights" if name in unofficial else name: value for name, value in values.items()}
        numbers = {name: None if isnan(value) else value for name, value in values.items()}  # JSON has no NaN
        found: dict[str, Any] = {"metrics": numbers, "protocol": protocol, "official": not unofficial}
        if by_class:
            found["classes"] = {
                name: {key: None if isnan(v[number]) else v[number] for key, v in by_class.items()}
                for number, name in enumerate(classes)
            }
        print(json.dumps(found, allow_nan=False))
    else:
        console.evaluated(values, unofficial)
        if by_class:
            console.by_class(classes, by_class)
        console.tell(protocol)


COMMAND = Command(options, run)

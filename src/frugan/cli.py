"""The command line: verbs and flags, nothing else.

Every field of a recipe is a flag, with the help, type and default that stand in `frugan.recipe`; ``--recipe`` and
``--objective`` are read first, because they decide which fields there are. torch is imported only once there is work to do.
"""

import json
import math
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import tyro

from frugan import recipes
from frugan.errors import UserError, nearest
from frugan.recipe import Data, Recipe, Run
from frugan.section import Section, flag, readable, spoken


def _described(section: type[Section] | Section) -> list[tuple[str, Any, Any]]:
    """Fields of a section for tyro, with their help; defaults are the values of the instance, if it is one."""
    kind = section if isinstance(section, type) else type(section)
    hints = typing.get_type_hints(kind)
    return [
        (f.name, Annotated[hints[f.name], tyro.conf.arg(help=f.metadata["help"], help_behavior_hint=_default)],
         field(default=getattr(section, f.name)))
        for f in fields(kind)
    ]  # fmt: skip


def _default(value: str) -> str:
    return "" if value == "None" else f"(default: {value})"


DataArgument = Annotated[
    str | None,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="DATA",
        help="folder, zip or tars of images, parquet, IDX files, a data set on the hub, or digits (default), mnist, fashion-mnist",
        help_behavior_hint="",
    ),
]
DataFlag = Annotated[str | None, tyro.conf.arg(metavar="DATA", help="the same as DATA", help_behavior_hint="")]
RecipeFlag = Annotated[str, tyro.conf.arg(help=f"{', '.join(recipes.RECIPES)}, or a TOML file; it decides the defaults below")]
ObjectiveFlag = Annotated[str, tyro.conf.arg(help="what is minimised: bce, hinge, wgan-gp, rpgan")]


def _recipe_options(name: str, base: type[Any], recipe: Recipe, *extra: Any) -> type[Any]:
    """A flat dataclass, a kind of ``base``, of everything that can be said about ``recipe``."""
    options: list[Any] = [("data", DataArgument, field(default=None)), ("data_path", DataFlag, field(default=None))]
    options += [("recipe", RecipeFlag, field(default=recipe.recipe)), *extra]
    options += [("objective", ObjectiveFlag, field(default=recipe.objective.kind))]
    for section in recipe.sections().values():
        options += [o for o in _described(section) if o[0] != "data"]
    made = make_dataclass(name, options, bases=(base,), kw_only=True)
    made.__doc__ = base.__doc__
    return made


class Train:
    """Trains, or goes on with a training that was interrupted."""


class Plan:
    """Says what a training would need and how it would be laid out, without training."""


class Summary:
    """Prints both networks of a recipe, layer by layer."""


@dataclass(kw_only=True)
class Generate:
    """Makes images with a trained generator."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="run folder, or a generator.safetensors")]
    n: Annotated[int, tyro.conf.arg(help="how many images")] = 64
    seed: Annotated[int, tyro.conf.arg(help="the same seed gives the same images")] = 0
    out: Annotated[str | None, tyro.conf.arg(help="picture or folder to write; unset: RUN/generated", help_behavior_hint="")] = None
    separate: Annotated[bool, tyro.conf.arg(help="one file an image, not one grid")] = False
    interpolate: Annotated[
        tuple[int, ...],
        tyro.conf.arg(help="seeds to go between: a strip and a GIF", metavar="SEED SEED ...", help_behavior_hint=""),
    ] = ()
    frames: Annotated[int, tyro.conf.arg(help="steps from one seed to the next")] = 16
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, mps or auto")] = "cpu"


class Pack:
    """Decodes, crops and resizes images once, into a pack that trainings read: beforehand, instead of on first use."""


class Check:
    """Tells what is there, before one trains on it; writes a sheet of images to look at."""


def _data_options(name: str, base: type[Any], *extra: Any) -> type[Any]:
    """A dataclass, a kind of ``base``, of everything that can be said about images."""
    options: list[Any] = [("data", DataArgument, field(default=None)), *extra]
    options += [o for o in _described(Data) if o[0] not in ("data", "flip")]
    options += [o for o in _described(Run) if o[0] == "workers"]
    made = make_dataclass(name, options, bases=(base,), kw_only=True)
    made.__doc__ = base.__doc__
    return made


def _data_verbs() -> dict[str, Callable[..., Any]]:
    out = tyro.conf.arg(help="folder to write; unset: the cache, where trainings find it", help_behavior_hint="")
    sheet = tyro.conf.arg(help="picture to write; unset: NAME-check.png", help_behavior_hint="")
    as_json = ("json", Annotated[bool, tyro.conf.arg(help="print what was found as JSON")], field(default=False))
    return {
        "pack": _data_options("Pack", Pack, ("out", Annotated[str | None, out], field(default=None))),
        "check": _data_options("Check", Check, ("sheet", Annotated[str | None, sheet], field(default=None)), as_json),
    }


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


def _pack(options: Any) -> None:
    from frugan.console import Console
    from frugan.data.packing import make, packed

    console = Console()
    source, data = _images(options, console.tell)
    ways: dict[str, Any] = {"workers": options.workers, "tell": console.tell, "progress": console.packing}
    if options.out is None:
        pack = packed(source, data, **ways)
    else:
        out = Path(options.out)
        if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} holds something else: name a new folder.")
        for problem in source.problems:
            console.tell(problem)
        pack = make(source, data, out, **ways)
    known = pack.manifest
    skipped = f", {known.skipped} skipped" if known.skipped else ""
    print(f"{pack.folder}: {known.images:,} images of {known.size}x{known.size}, {known.channels} channels{skipped}")


def _check(options: Any) -> None:
    from frugan import pictures
    from frugan.console import Console
    from frugan.data.check import check

    console = Console(quiet=options.json)
    source, data = _images(options, console.tell)
    report = check(source, data, workers=options.workers, progress=console.looking)
    sheet = Path(options.sheet or f"{source.name}-check.png")
    if report.shown:
        import numpy as np
        import torch

        pictures.save(pictures.grid(torch.from_numpy(np.stack(report.shown))), sheet)
    if options.json:
        print(json.dumps(report.as_dict() | {"problems": list(source.problems), "sheet": str(sheet)}))
    else:
        console.found(report, source.problems, data)
        console.tell(f"Images as training sees them are in {sheet}.")
    if not report.images:
        raise UserError(f"none of the {len(source)} images of {source.name} can be read.")


def _recipe_of(arguments: Sequence[str]) -> Recipe:
    """The recipe that ``--recipe`` and ``--objective`` name, by which the other flags are known."""
    said = {"--recipe": recipes.DEFAULT, "--objective": ""}
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in said:
            said[name] = value if equals else next(iter(arguments[i + 1 : i + 2]), "")
    recipe = recipes.get(said["--recipe"])
    return recipe.replace(objective=said["--objective"]) if said["--objective"] else recipe


def _asked(options: Any, recipe: Recipe) -> Recipe:
    """``recipe`` with what was said on the command line."""
    if options.data is not None and options.data_path is not None:
        raise UserError(f"the data is named twice, {options.data} and --data-path {options.data_path}: leave one out.")
    names = set(recipe.flat()) - {"data", "network", "objective"}
    said = {name: getattr(options, name) for name in names}
    named = [d for d in (options.data, options.data_path, recipe.data.data) if d is not None]
    return recipe.replace(**said, data=named[0])


def _train(options: Any, recipe: Recipe) -> None:
    recipe = _asked(options, recipe)
    run = Run(**{f.name: getattr(options, f.name) for f in fields(Run)})
    _spin_briefly()
    from frugan.console import Console
    from frugan.signals import Stopped
    from frugan.trainer import Trainer

    try:
        Trainer(recipe, run, Console(options.quiet)).train()
    except Stopped as stopped:
        print(f"frugan: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)


def _plan(options: Any, recipe: Recipe) -> None:
    recipe = _asked(options, recipe)
    if options.plot and Path(options.plot).suffix.lower() not in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
        raise UserError(f"--plot {options.plot}: pictures are written as .png, .jpg, .svg or .pdf.")
    _spin_briefly()
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
    keep = keepable(limit.budget(options.memory, where), where)
    batch = recipe.training.batch_size
    if isinstance(source, ShardSource):
        held = (2 * min(block_of(data), len(source)) + batch) * math.prod(data.shape)
    else:
        held = bytes_of(len(source), data, keep)
    planner, plan = find(recipe, where, data=held, memory=options.memory, approximate=options.allow_approximate, tell=console.tell)
    looked_at, speed = planner.looked_at(plan), planner.images_per_second(plan)
    if options.json:
        about = {"precision": planner.recipe.memory.precision, "candidates": looked_at, "images_per_second": speed}
        print(json.dumps(plan.as_dict() | about))
    else:
        console.bytes(plan)
        console.candidates(looked_at)
        for reason in planner.why(plan):
            console.tell(reason)
        console.plan(plan, recipe.training.batch_size)
        precision = planner.recipe.memory.precision
        console.tell(f"Speed: about {speed:,.0f} images/s in {precision}, from its operators run and timed one by one.")
    if options.plot:
        courses = {
            f"{name}: {min(2, parts)} of {parts} micro-batches" if parts > 1 else name: timeline.course(planner.search.workspaces)
            for name, (timeline, parts) in planner.timelines(plan).items()
        }
        title = f"{recipe.recipe}, {data.image_size}x{data.image_size}, batch {recipe.training.batch_size}: {size(plan.allocated)}"
        pictures.plot_memory(courses, Path(options.plot), title)
        console.tell(f"Memory over one update is drawn in {options.plot}.")


def _summary(options: Any, recipe: Recipe) -> None:
    recipe = _asked(options, recipe)
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


def _generate(options: Generate) -> None:
    from frugan import generate, pictures

    generator = generate.load(options.run, options.device)
    run = Path(options.run)
    out = Path(options.out) if options.out else (run if run.is_dir() else run.parent) / "generated"
    single = out if out.suffix else None
    if single and single.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
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


def _spin_briefly() -> None:
    """Lets idle worker threads of torch spin only briefly before they sleep, unless told otherwise; must run before its import.

    Threads that spin for long on a core that another process wants slow both down; threads that never spin make short
    operations wait for them (docs/LOG.md has the numbers).
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "5000"


def parse(arguments: Sequence[str]) -> tuple[Any, Recipe]:
    """What was asked for, an instance of `Train`, `Plan`, `Generate` or `Summary`, and the recipe whose settings its defaults are.

    Raises:
        UserError: an unknown recipe, objective or flag, or a value of the wrong type.
        SystemExit: with 2, after saying which arguments are too many or missing; with 0 after ``--help``.
    """
    recipe = _recipe_of(arguments) if arguments[:1] in (["train"], ["plan"], ["summary"]) else recipes.get(recipes.DEFAULT)
    quiet = ("quiet", Annotated[bool, tyro.conf.arg(help="print nothing but errors")], field(default=False))
    shown = [o for o in _described(Run) if o[0] in ("memory", "allow_approximate", "device", "threads")]
    as_json = ("json", Annotated[bool, tyro.conf.arg(help="print the plan as JSON")], field(default=False))
    plot_arg = tyro.conf.arg(help="picture of memory over one update to write", help_behavior_hint="")
    plot = ("plot", Annotated[str | None, plot_arg], field(default=None))
    verbs: dict[str, Callable[..., Any]] = {
        "train": _recipe_options("Train", Train, recipe, *_described(Run), quiet),
        "plan": _recipe_options("Plan", Plan, recipe, *shown, as_json, plot),
        "generate": Generate,
        "summary": _recipe_options("Summary", Summary, recipe),
    }
    prog = "frugan"
    if arguments[0] == "data":
        arguments, verbs, prog = arguments[1:] or ["--help"], _data_verbs(), "frugan data"
    if not arguments[0].startswith("-") and arguments[0] not in verbs:
        known = [*verbs, "data"] if prog == "frugan" else [*verbs]
        raise UserError(f"there is no command {arguments[0]!r}: {nearest(arguments[0], known)}")
    if arguments[0] in verbs:
        _check_flags(arguments[1:], typing.get_type_hints(verbs[arguments[0]]))
    options = tyro.extras.subcommand_cli_from_dict(
        verbs, prog=prog, description="Trains GANs in the memory you have.", args=arguments
    )
    return options, recipe


def _check_flags(arguments: Sequence[str], hints: dict[str, Any]) -> None:
    """Says what is wrong with a flag or its value in one sentence, where tyro would draw a box; ``hints`` has their types."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        key = name[2:].replace("-", "_")
        if not name.startswith("--") or key in ("", "help") or hints.get(key.removeprefix("no_")) is bool:
            continue
        if key not in hints:
            raise UserError(f"there is no flag {name}: {nearest(flag(key), map(flag, hints))}")
        following = [value] if equals else [a for a in arguments[i + 1 : i + 2] if not a.startswith("--")]
        if not following:
            raise UserError(f"{name} needs a value.")
        hint = hints[key]
        if typing.get_origin(hint) is tuple:  # as many values as there are
            following = [value] if equals else list(takewhile(lambda a: not a.startswith("--"), arguments[i + 1 :]))
            hint = typing.get_args(hint)[0]
        for text in following:
            if not readable(text, hint):
                raise UserError(f"{name} must be {spoken(hint)}, not {text!r}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 2 on an error of the user's, 130 or 143 when stopped by a signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options, recipe = parse(arguments or ["--help"])
        if isinstance(options, Generate):
            _generate(options)
        elif isinstance(options, Train):
            _train(options, recipe)
        elif isinstance(options, Plan):
            _plan(options, recipe)
        elif isinstance(options, Pack):
            _pack(options)
        elif isinstance(options, Check):
            _check(options)
        else:
            _summary(options, recipe)
    except UserError as error:
        print(f"frugan: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as in `frugan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)

"""The command line: verbs and flags, nothing else.

Every field of a recipe is a flag, with the help, type and default that stand in `frugan.recipe`; ``--recipe`` and
``--objective`` are read first, because they decide which fields there are. `frugan.verbs` does the work.
"""

import atexit
import os
import sys
import threading
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, make_dataclass
from importlib.metadata import version
from itertools import takewhile
from typing import Annotated, Any

import tyro

from frugan import recipes, verbs
from frugan.errors import UserError, nearest
from frugan.metrics import METRICS
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
    best: Annotated[bool, tyro.conf.arg(help="the generator that was judged best while training, not the last one")] = False
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, mps or auto")] = "cpu"


@dataclass(kw_only=True)
class Evaluate:
    """Judges a trained generator, or images, against real ones: how it is done is printed with every number."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="run folder, generator.safetensors, or images")]
    data: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA", help="real images; unset: the run's", help_behavior_hint="")
    ] = None
    metrics: Annotated[str, tyro.conf.arg(help=f"auto (what needs no download), or of {', '.join(METRICS)}, with commas")] = "auto"
    samples: Annotated[int, tyro.conf.arg(help="how many, and as many real images")] = 10_000
    seed: Annotated[int, tyro.conf.arg(help="of the samples")] = 0
    split: Annotated[
        str | None, tyro.conf.arg(help="part of the real images: train, test or all; unset: the run's", help_behavior_hint="")
    ] = None
    run_split: Annotated[str, tyro.conf.arg(help="the same of RUN, where it is images")] = "train"
    best: Annotated[bool, tyro.conf.arg(help="the generator that was judged best while training, not the last one")] = False
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


@dataclass(kw_only=True)
class Report:
    """Writes the page that shows a run, or several beside one another."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help="run folders")]
    out: Annotated[
        str | None,
        tyro.conf.arg(help="page to write; unset: RUN/report.html, or comparison.html of several", help_behavior_hint=""),
    ] = None


@dataclass
class Images:
    """Packs images, or tells what is there: see frugan data --help."""


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


def parse(arguments: Sequence[str]) -> tuple[Any, Recipe]:
    """What was asked for, an instance of a class above, and the recipe whose settings its defaults are.

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
    compare_arg = tyro.conf.arg(help="also list every combination of levers, and time the one that was chosen")
    compare = ("compare", Annotated[bool, compare_arg, tyro.conf.FlagCreatePairsOff], field(default=False))
    verbs: dict[str, Callable[..., Any]] = {
        "train": _recipe_options("Train", Train, recipe, *_described(Run), quiet),
        "plan": _recipe_options("Plan", Plan, recipe, *shown, as_json, compare, plot),
        "generate": Generate,
        "evaluate": Evaluate,
        "report": Report,
        "data": Images,  # for the help alone: what follows it is parsed by itself
        "summary": _recipe_options("Summary", Summary, recipe),
    }
    prog = "frugan"
    if arguments[0] == "data":
        arguments, verbs, prog = arguments[1:] or ["--help"], _data_verbs(), "frugan data"
    if arguments[0] not in (*verbs, "-h", "--help"):
        if arguments[0].startswith("-"):
            raise UserError(
                f"a command comes before {arguments[0]}: {prog} {'|'.join(verbs)}, as in {prog} {next(iter(verbs))} --help."
            )
        raise UserError(f"there is no command {arguments[0]!r}: {nearest(arguments[0], verbs)}")
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
        if arguments[:1] == ["--version"]:
            print(f"frugan {version('frugan')}")
            return
        options, recipe = parse(arguments or ["--help"])
        verb = getattr(verbs, type(options).__name__.lower())
        if isinstance(options, (Train, Plan, Summary)):
            verb(options, _asked(options, recipe))
        else:
            verb(options)
    except UserError as error:
        print(f"frugan: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as in `frugan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def run() -> None:
    """Runs the command line and ends the process.

    On Linux it ends at once, when all that was registered for the end has run: the end of CUDA's libraries, which importing torch
    loads, touches 150 MiB of them that this process never needed, and would exceed its budget.
    """
    code: object = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    if sys.platform != "linux":
        sys.exit(code if isinstance(code, int) else 1)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)

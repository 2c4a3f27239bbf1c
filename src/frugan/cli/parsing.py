"""What commands share: how options become flags, and what is said about recipes and images.

Every field of a section of settings is a flag, with the help, type and default that stand in `frugan.config`; ``--recipe`` and
``--objective`` are read first, because they decide which fields there are.
"""

import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import tyro

from frugan.config import recipes
from frugan.config.greys import NAMED
from frugan.config.objectives import Objective
from frugan.config.recipe import BOTH, Data, Recipe
from frugan.config.run import Run
from frugan.config.section import Section, flag, readable, spoken
from frugan.utils.errors import UserError, nearest
from frugan.utils.threads import spin_briefly as spin_briefly

SWITCHES = {"quiet", "json", "compare", "help"}  # of commands that have a recipe, besides those of sections
TRUTHS = {"yes", "no", "true", "false", "on", "off", "1", "0"}  # that one may take for the value of a switch


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        options: the arguments that follow it to a dataclass of what can be said to it, by which tyro makes flags.
        run: does what an instance of that dataclass says.
    """

    options: Callable[[Sequence[str]], type[Any]]
    run: Callable[[Any], None]


def described(section: type[Section] | Section, unset: bool = False) -> list[tuple[str, Any, Any]]:
    """Fields of a section for tyro, with their help; defaults are the instance's values, if it is one, or if ``unset`` None."""
    kind = section if isinstance(section, type) else type(section)
    hints = typing.get_type_hints(kind)
    return [
        (f.name, Annotated[hints[f.name] | None if unset else hints[f.name],
                           tyro.conf.arg(help=f.metadata["help"], help_behavior_hint=_default)],
         field(default=None if unset else getattr(section, f.name)))
        for f in fields(kind)
    ]  # fmt: skip


def extra(name: str, kind: Any, help: str, default: Any = None) -> tuple[str, Any, Any]:
    """A field that no section has; without a default value none is shown."""
    hint: dict[str, Any] = {"help_behavior_hint": ""} if default is None else {}
    return name, Annotated[kind, tyro.conf.arg(help=help, **hint)], field(default=default)


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
RecipeFlag = Annotated[
    str,
    tyro.conf.arg(
        help=f"{', '.join(recipes.RECIPES)}, or a TOML file; it decides the defaults; unset: {recipes.DEFAULT_GREY} "
        f"for mnist and other labelled grey images up to {recipes.SMALL} pixels, else {recipes.DEFAULT}"
    ),
]
ObjectiveFlag = Annotated[
    str, tyro.conf.arg(help=f"what is minimised: {', '.join(Objective.kinds)}; --help after it shows its settings")
]


def recipe_options(base: type[Any], arguments: Sequence[str], *more: Any) -> type[Any]:
    """A flat dataclass, a kind of ``base``, of everything that can be said about the recipe that ``arguments`` name."""
    recipe = _recipe_of(arguments)
    options: list[Any] = [("data", DataArgument, field(default=None)), ("data_path", DataFlag, field(default=None))]
    options += [("recipe", RecipeFlag, field(default=recipe.recipe)), *more]
    options += [("objective", ObjectiveFlag, field(default=recipe.objective.kind))]
    for section in recipe.sections().values():
        options += [o for o in described(section) if o[0] != "data"]
    return _made(base, options)


def recipe_said(said: Any) -> Recipe:
    """The recipe whose settings were said, an instance of what `recipe_options` gave."""
    recipe = recipes.get(said.recipe).replace(objective=said.objective)
    if said.data is not None and said.data_path is not None:
        raise UserError(f"the data is named twice, {said.data} and --data-path {said.data_path}: leave one out.")
    names = set(recipe.flat()) - {"data", "network", "objective", "epochs" if said.minutes is not None else "minutes"}
    named = [d for d in (said.data, said.data_path, recipe.data.data) if d is not None]
    return recipe.replace(**{name: getattr(said, name) for name in names}, data=named[0])


def data_options(base: type[Any], *more: Any, without: Sequence[str] = (), unset: bool = False) -> type[Any]:
    """A dataclass, a kind of ``base``, of everything that can be said about images.

    Args:
        base: has what else can be said.
        more: fields besides, as `extra` makes them.
        without: names of fields that it has not.
        unset: whether what is not said is None, not its default.
    """
    options: list[Any] = [("data", DataArgument, field(default=None)), *more]
    options += [o for o in described(Data, unset) if o[0] not in ("data", "flip", *without)]
    options += [o for o in described(Run) if o[0] == "workers"]
    return _made(base, options)


def data_said(said: Any) -> dict[str, Any]:
    """What was said about images, by the names of `Data`, an instance of what `data_options` gave."""
    found = {f.name: getattr(said, f.name, None) for f in fields(Data)}
    return {name: value for name, value in found.items() if value is not None}


def _made(base: type[Any], options: list[Any]) -> type[Any]:
    made = make_dataclass(base.__name__, options, bases=(base,), kw_only=True)
    made.__doc__ = base.__doc__
    return made


def _recipe_of(arguments: Sequence[str]) -> Recipe:
    """The recipe that ``--recipe`` and ``--objective`` name, or that the images ask for: by it the other flags are known."""
    names = "--recipe", "--objective", "--epochs", "--minutes", "--data-path", "--split", "--image-size", "--channels"
    said = dict.fromkeys(names, "")
    data = ""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name in said:
            said[name] = value if equals else next(iter(arguments[i + 1 : i + 2]), "")
        elif not argument.startswith("--") and not data and (i == 0 or not _takes_value(arguments[i - 1])):
            data = argument
    if said["--epochs"] and said["--minutes"]:
        raise UserError(BOTH)
    if not said["--recipe"]:
        size = int(said["--image-size"]) if said["--image-size"].isdecimal() else None
        asked = Data(data=data or said["--data-path"] or "digits", split=said["--split"] or "train", image_size=size)
        said["--recipe"] = recipes.DEFAULT if said["--channels"] == "3" else recipes.default(asked)
    recipe = recipes.get(said["--recipe"])
    if said["--epochs"]:
        recipe = recipe.replace(minutes=None)
    return recipe.replace(objective=said["--objective"]) if said["--objective"] else recipe


def _takes_value(argument: str) -> bool:
    """Whether what follows ``argument`` is its value: not if it is a switch."""
    if not argument.startswith("--") or "=" in argument:
        return False
    kinds = [Run, *map(type, recipes.get(recipes.DEFAULT).sections().values())]
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    name = argument[2:].replace("-", "_").removeprefix("no_")
    return name not in SWITCHES and hints.get(name) is not bool


def check(arguments: Sequence[str], options: type[Any], prog: str) -> None:
    """Says what is wrong with a flag, its value or the words beside them in one sentence, where tyro would draw a box.

    Args:
        arguments: what was said.
        options: has the types.
        prog: the command, as it is called.
    """
    hints, places = typing.get_type_hints(options), _places(options)
    named, rest = list[str](), list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        key = name[2:].replace("-", "_")
        if not name.startswith("-"):
            named.append(argument)
            continue
        if name in ("--", "-h", "--help"):
            continue
        if not name.startswith("--"):
            raise UserError(f"there is no flag {name}: flags begin with two dashes, and {prog} --help lists them.")
        if hints.get(key.removeprefix("no_")) is bool:
            _check_switch(name, key.removeprefix("no_"), [value] if equals else rest[:1], options, bool(equals))
            continue
        if key in places:
            raise UserError(f"there is no flag {name}: write {key.upper()} without it, as in {prog} {key.upper()}.")
        if key not in hints:
            of = [
                kind for kind, found in Objective.kinds.items() if key in {f.name for f in fields(found)} and "objective" in hints
            ]
            if of:
                raise UserError(f"{name} is a setting of --objective {' or '.join(of)}, which was not asked for.")
            of = [r for r, made in recipes.RECIPES.items() if key.removeprefix("no_") in vars(made().network)]
            if of and "recipe" in hints:
                raise UserError(f"{name} is a setting of --recipe {' or '.join(of)}, which was not asked for.")
            raise UserError(f"there is no flag {name}: {nearest(flag(key), map(flag, hints))}")
        hint = hints[key]
        several = typing.get_origin(hint) is tuple  # as many values as there are
        following = [value] if equals else [*takewhile(lambda a: not a.startswith("--"), rest if several else rest[:1])]
        if not following:
            raise UserError(f"{name} needs a value.")
        if not equals and following[0].startswith("-") and not readable(following[0], float):
            raise UserError(
                f"{name} needs a value, and {following[0]} looks like a flag: write {name}={following[0]} if it is one."
            )
        if not equals:
            del rest[: len(following)]
        hint = typing.get_args(hint)[0] if several else hint
        for text in following:
            if not readable(text, hint):
                before = f"; what is no value of {name} comes before it" if several and not equals else ""
                raise UserError(f"{name} must be {spoken(hint)}, not {text!r}{before}.")
    if not {"-h", "--help"} & {*arguments}:
        _check_words(named, options, prog)


def _check_switch(name: str, key: str, following: Sequence[str], options: type[Any], equals: bool) -> None:
    """``name`` is a switch; a word like yes that follows it, and names nothing that is there, is meant to be its value."""
    pair = f"write {flag(key)} or --no-{flag(key)[2:]}"
    if tyro.conf.FlagCreatePairsOff in getattr(typing.get_type_hints(options, include_extras=True)[key], "__metadata__", ()):
        if name.startswith("--no"):
            raise UserError(f"there is no flag {name}: leave {flag(key)} out.")
        pair = f"write {flag(key)} alone, or leave it out"
    for word in following:
        if equals or (word.lower() in TRUTHS and not Path(word).exists()):
            raise UserError(f"{name} takes no value, and {word!r} was given: {pair}.")


def _places(options: type[Any]) -> list[str]:
    """The names of the fields of ``options`` that are words without a flag, in their order."""
    hints = typing.get_type_hints(options, include_extras=True)
    return [f.name for f in fields(options) if tyro.conf.Positional in getattr(hints[f.name], "__metadata__", ())]


def _check_words(words: Sequence[str], options: type[Any], prog: str) -> None:
    """There must be a word for each place that needs one, and no more of them than places."""
    places, hints = _places(options), typing.get_type_hints(options)
    if any(typing.get_origin(hints[place]) is tuple for place in places):  # as many as there are
        return
    needed = [f.name for f in fields(options) if f.default is MISSING and f.name in places[len(words) :]]
    if needed:
        name = needed[0].upper()
        raise UserError(f"{name} is missing: write {prog} {name}, before all flags; {prog} --help says what it may be.")
    if len(words) <= len(places):
        return
    taken = " and ".join(map(str.upper, places)) or "flags"
    listed = words[len(places) - 1 :]
    if taken.endswith("DATA") and all(word and Path(word).exists() for word in listed):
        quoted = ", or put the pattern in quotes" if listed[0].endswith(".tar") else ""
        raise UserError(
            f"{len(listed)} names came for DATA, {listed[0]} the first: name the folder that holds them, "
            f"{Path(listed[0]).parent}{quoted}."
        )
    left = words[len(places)]
    raise UserError(f"{left!r} is too much, {prog} takes {taken} alone: leave it out, or put a name with spaces in quotes.")


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with ``--flip`` and ``--no-flip`` alone, and its values true and false, as the words that they stand for."""
    said: list[str] = []
    meant = {"true": "yes", "false": "no"}
    for argument in arguments:
        if argument.lower() in ("--flip=true", "--flip=false"):
            said.append("--flip")
            argument = argument.split("=")[1]
        if said[-1:] == ["--flip"]:
            if argument.lower() in (*meant, "yes", "no", "auto"):
                argument = meant.get(argument.lower(), argument.lower())
            else:
                if not argument.startswith("-") and not _names_images(argument):
                    kinds = spoken(typing.get_type_hints(Data)["flip"])
                    raise UserError(f"--flip must be {kinds}, not {argument!r}, and there are no images of that name.")
                said.append("yes")
        said += ["--flip", "no"] if argument in ("--no-flip", "--no_flip") else [argument]
    return [*said, "yes"] if said[-1:] == ["--flip"] else said


def _names_images(word: str) -> bool:
    """Whether ``word`` is meant to name images: they are there, or it is more than a plain word."""
    return word.lower().replace("_", "-") in NAMED or Path(word).exists() or bool(re.search(r"[/\\:.*{]", word))

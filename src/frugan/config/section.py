"""Sections of settings: frozen dataclasses whose fields carry their help and range, and are checked when built."""

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from frugan.utils.errors import UserError, nearest

UNIONS = (types.UnionType, typing.Union)  # what X | Y is, without and with a Literal in it


def option(default: Any, help: str, *, above: float | None = None, least: float | None = None, most: float | None = None) -> Any:
    """A field with its one line of help and its range: ``above`` excludes its bound, ``least`` and ``most`` include theirs."""
    return field(default=default, metadata={"help": help, "above": above, "least": least, "most": most})


def lever(
    words: str, guarantee: str, phases: str, rung: int, help: str, used: str = "yes", plain: str = "no", *, uncouples: bool = False
) -> Any:  # fmt: skip
    """A field for a way of saving memory, with the values ``auto``, ``used`` and ``plain``; `frugan.gan.levers` makes it a lever.

    Args:
        words: what a person reads where it is in use.
        guarantee: ``bitwise``, ``reassociation`` or ``approximate``.
        phases: that have it, one letter each.
        rung: when it is tried if memory runs out, see `frugan.memory.layout.Lever`.
        help: its line of help.
        used: its value where it is in use.
        plain: its value where it is not.
        uncouples: whether micro-batches are exact with it although a sample's output depends on the others.
    """
    about = {"words": words, "guarantee": guarantee, "phases": phases, "rung": rung, "used": used, "plain": plain}
    about["uncouples"] = uncouples
    return field(default="auto", metadata={"help": f"{help} ({guarantee})", "lever": about})


def flag(name: str) -> str:
    """How a field is written on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections: checks each field's type and range when built.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if not _fits(value, hints[f.name]):
                raise UserError(f"{flag(f.name)} must be {spoken(hints[f.name])}, not {value!r}.")
            if value is None or isinstance(value, (str, bool)):
                continue
            bounds: list[tuple[str, Callable[[Any, Any], bool], str]] = [
                ("above", lambda v, b: v > b, "above"),
                ("least", lambda v, b: v >= b, "at least"),
                ("most", lambda v, b: v <= b, "at most"),
            ]
            for bound, holds, words in bounds:
                limit = f.metadata.get(bound)
                if limit is not None and not holds(value, limit):
                    said = f"{words} {_number(limit)}, not {_number(value)}"
                    raise UserError(f"{flag(f.name)} must be {said} ({f.metadata['help']}).")

    def idle(self, needs: Mapping[str, tuple[bool, str]]) -> Iterator[str]:
        """A sentence for each field that has not its default although nothing looks at it.

        Args:
            needs: fields that only matter with others, each with whether it does here, and what it needs.
        """
        for f in fields(self):
            matters, needed = needs.get(f.name, (True, ""))
            if not matters and getattr(self, f.name) != f.default:
                yield f"{flag(f.name)} does nothing without {needed}."


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _fits(value: object, hint: Any) -> bool:
    if typing.get_origin(hint) in UNIONS:
        return any(_fits(value, h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def readable(text: str, hint: Any) -> bool:
    """Whether ``text`` can be read as a value of type ``hint``; words always can."""
    if typing.get_origin(hint) in UNIONS:
        return any(readable(text, h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return text in map(str, typing.get_args(hint))
    if hint is types.NoneType:
        return text == "None"
    try:
        if hint in (int, float):
            hint(text)
    except ValueError:
        return False
    return True


def spoken(hint: Any) -> str:
    """A type as an error names it, such as `a whole number`."""
    if typing.get_origin(hint) in UNIONS:
        return " or ".join(spoken(h) for h in typing.get_args(hint) if h is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(a) for a in typing.get_args(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(hint, str(hint))


@dataclass(frozen=True, kw_only=True)
class Kinded(Section):
    """A section of which there are kinds: each is a subclass with a ``kind`` and is found by it."""

    role: ClassVar[str]
    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            cls.kinds[cls.kind] = cls

    @classmethod
    def of(cls, kind: str) -> type[Any]:
        """The subclass called ``kind``."""
        if kind not in cls.kinds:
            raise UserError(f"there is no {cls.role} called {kind!r}: {nearest(kind, cls.kinds)}")
        return cls.kinds[kind]

"""Errors that are the user's to mend, as opposed to bugs of ours, and what their sentences share."""

import difflib
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

LOOKED_AT = 10_000  # names in a folder among which one that is near is looked for


class UserError(ValueError):
    """What was wrong, where, and what to do, in one sentence; the command line prints it and exits with 2.

    Attributes:
        said: whether another process says it already.
    """

    said = False


def counted(number: float, noun: str, plural: str = "") -> str:
    """``number`` with its noun in singular or plural: 1 epoch, 2,000 epochs, 2 classes."""
    said = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{said} {noun if number == 1 else plural or noun + 's'}"


def nearest(word: str, options: Iterable[str]) -> str:
    """How to go on from an unknown ``word``: the closest of ``options``, or all of them when none is close."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(options)}."


def nearest_path(path: Path) -> Path | None:
    """The folder, zip, tar or table whose name is near to that of ``path``, which is not there, part by part; None: none is."""
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not (found / part).exists():
            names = list[str]()
            with suppress(OSError):
                names = [
                    p.name for p in islice(found.iterdir(), LOOKED_AT) if p.is_dir() or p.suffix in (".zip", ".tar", ".parquet")
                ]
            close = difflib.get_close_matches(part, [name for name in names if not name.startswith(".")], n=1)
            if not close:
                return None
            part = close[0]
        found /= part
    return found

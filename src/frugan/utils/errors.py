"""Errors that are the user's to mend, as opposed to bugs of ours."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was wrong, where, and what to do, in one sentence; the command line prints it and exits with 2.

    Attributes:
        said: whether another process says it already.
    """

    said = False


def nearest(word: str, options: Iterable[str]) -> str:
    """How to go on from an unknown ``word``: the closest of ``options``, or all of them when none is close."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(options)}."

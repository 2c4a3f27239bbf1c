"""Bytes in words, and words in bytes."""

import re

from frugan.utils.errors import UserError

UNITS = {"": 1, "b": 1, "k": 2**10, "kib": 2**10, "kb": 10**3, "m": 2**20, "mib": 2**20, "mb": 10**6,
         "g": 2**30, "gib": 2**30, "gb": 10**9, "t": 2**40, "tib": 2**40, "tb": 10**12}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """``2GiB``, ``1.5 GB``, ``800M`` or a plain number of bytes, in words or as it is.

    Raises:
        UserError: no number, or a unit nobody knows.
    """
    found = None if isinstance(text, bool) else re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if not found:
        raise UserError(f"a budget of {text!r} is no amount of memory: say it like 800MiB or 2GiB.")
    number, unit = found.groups()
    if unit.lower() not in UNITS:
        raise UserError(f"a budget of {text!r}: there is no unit {unit!r}; use KiB, MiB, GiB or TiB (or KB, MB, GB, TB).")
    return int(float(number) * UNITS[unit.lower()])


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"

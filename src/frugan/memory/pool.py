"""The pool that large tensors of the CPU come from: memory is used again, and the process holds what was live at most.

It is a small library in C (``pool.c``, which says how), made when frugan is installed if there is a C compiler. Without it, on
other systems than Linux, and with ``FRUGAN_POOL=0`` in the environment, tensors come from the C library as ever.
"""

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

ADDRESSES = 4  # times the machine's memory: what the pool may spread over


class State(NamedTuple):
    """Bytes of tensors, and held for them with what is free."""

    used: int
    held: int


@cache
def _library() -> ctypes.CDLL | None:
    found = find_spec("frugan.memory._pool")
    if found is None or found.origin is None or os.environ.get("FRUGAN_POOL") == "0":
        return None
    try:
        library = ctypes.CDLL(found.origin)
        library.frugan_pool_limit.argtypes = [ctypes.c_size_t]
        library.frugan_pool_begin.argtypes = [ctypes.c_size_t]
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return library if library.frugan_pool_begin(ADDRESSES * memory) else None
    except (OSError, AttributeError, ValueError):  # made for another system
        return None


def available() -> bool:
    """Whether there is a pool."""
    return _library() is not None


def use(most: int | None) -> None:
    """From now on large tensors come from the pool, which keeps what is free up to ``most`` bytes with the tensors; None: all."""
    if library := _library():
        library.frugan_pool_begin(0)
        library.frugan_pool_limit(2**63 if most is None else most)


def end() -> None:
    """New tensors come from the C library again, and what is free goes back; tensors of the pool stay where they are."""
    if library := _library():
        library.frugan_pool_end()
        library.frugan_pool_limit(0)


def trim() -> None:
    """Gives back what is free."""
    if library := _library():
        library.frugan_pool_trim()


def state() -> State:
    """What is in the pool."""
    if not (library := _library()):
        return State(0, 0)
    figures = (ctypes.c_size_t * 2)()
    library.frugan_pool_state(figures)
    return State(*figures)

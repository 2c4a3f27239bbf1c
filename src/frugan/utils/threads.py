"""How torch's threads behave where others want the processors too. They wait for one another within each operation.

What libgomp is told it reads when torch is imported: `begin` comes before that, and needs no torch.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SPIN = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # with which somebody has decided how long idle threads wait actively
PLACED = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "OMP_NUM_THREADS", "WORLD_SIZE"}  # and where threads run
_places: list[int] = []  # the processors that threads keep to, that of this one first


def spin_briefly() -> None:
    """Lets idle threads spin only briefly before they sleep, unless told otherwise.

    Threads that spin for long on a processor that another program wants slow both down; threads that never spin make short
    operations wait for them (docs/LOG.md has the numbers).
    """
    if not os.environ.keys() & SPIN:
        os.environ["GOMP_SPINCOUNT"] = "5000"


def begin(threads: int | None) -> None:
    """Imports torch such that each of its threads keeps to a processor of its own, if there will be one for each.

    Where another program keeps one busy, the system would move two of them onto one processor, and as they wait for one another
    by spinning, in oneDNN without end, little would get done: a fifth of the speed, and less, instead of two fifths to half
    (docs/LOG.md).

    Args:
        threads: how many were asked for; None: as many as there are processors.
    """
    spin_briefly()
    if sys.platform != "linux" or os.environ.keys() & PLACED:
        return
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2 or threads not in (None, len(processors)) or _siblings(processors):
        return
    os.environ["OMP_PROC_BIND"] = "true"
    import torch

    del os.environ["OMP_PROC_BIND"]  # what this process starts places its threads itself
    _keep_to(processors)  # threads begin where the one is that starts them, and those of Python are free
    if torch.get_num_threads() == len(processors):
        _places[:] = processors


@contextmanager
def apart() -> Iterator[None]:
    """While open, this thread keeps to its processor too, if `begin` gave it one and there are others to wait for."""
    import torch

    if not _places or torch.get_num_threads() < 2:
        yield
        return
    _keep_to(_places[:1])
    try:
        yield
    finally:
        _keep_to(_places)


def _keep_to(processors: list[int]) -> None:
    """Has this thread run on ``processors``, unless the system has taken them from this process meanwhile, or refuses."""
    with suppress(OSError):
        os.sched_setaffinity(0, processors)


def _siblings(processors: list[int]) -> bool:
    """Whether two of them are one core's, of which the system knows better than we which to use first."""
    for number in processors:
        try:
            there = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            return True
        if there != str(number):
            return True
    return False

"""What a computation can do without where memory does not suffice."""

from collections.abc import Callable
from typing import TypeVar

import torch

from frugan.memory import limit
from frugan.utils.errors import UserError

T = TypeVar("T")


def spare(look: Callable[[], T], doing: str, device: torch.device, tell: Callable[[str], None]) -> T | None:
    """What ``look`` gives, or None where memory or disk do not suffice: ``tell`` says so, and training goes on.

    Args:
        look: may raise a `UserError`, or run out of memory.
        doing: what it does, for people.
        device: whose free memory is given back first.
        tell: takes a sentence.
    """
    limit.release(device)
    try:
        return look()
    except UserError as error:
        tell(f"While {doing}: {error} Left out this time, training goes on.")
    except (RuntimeError, MemoryError) as error:
        if not limit.is_out_of_memory(error):
            raise
        tell(f"Memory ran out while {doing}: left out this time, training goes on.")
    return None

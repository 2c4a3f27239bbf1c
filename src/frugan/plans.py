"""Plans: how a training is laid out, what it needs, and where those lie that need not be made again."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugan.errors import UserError
from frugan.files import cache_folder, write_text
from frugan.memory import limit
from frugan.memory.host import Handling
from frugan.memory.plan import Guarantee, Layout
from frugan.memory.search import MARGIN
from frugan.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """How a training is laid out, what it needs, and what there is.

    Args:
        layouts: of each phase.
        handling: what becomes of freed memory on the CPU.
        budget: bytes that the process may hold.
        named: whether a person named the budget.
        framework: bytes that the process holds before training.
        data: bytes of images.
        phases: for each moment of a training the bytes it allocates, by what they are for.
        held: bytes that the process holds for them.
        guarantee: what is left as it is.
        loaded: bytes of ``framework`` that are libraries which training loads by and by.
        plain: whether nothing is done to save memory but what was asked for, as there is plenty.
        planned: the layouts that were planned, where memory ran out since and ``layouts`` are others.
    """

    layouts: dict[str, Layout]
    handling: Handling
    budget: int
    named: bool
    framework: int
    data: int
    phases: dict[str, dict[str, int]]
    held: int
    guarantee: Guarantee
    loaded: int = 0
    plain: bool = False
    planned: dict[str, Layout] | None = None

    @property
    def allocated(self) -> int:
        """The most that training allocates."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def predicted(self) -> int:
        """The most that the process will hold."""
        return self.framework + self.data + self.held

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "layouts": {name: layout.as_dict() for name, layout in self.layouts.items()},
            "planned": {name: layout.as_dict() for name, layout in (self.planned or self.layouts).items()},
            "guarantee": str(self.guarantee), "freed_memory": self.handling,
            "budget": self.budget, "budget_named": self.named, "predicted": self.predicted,
            "framework": self.framework, "data": self.data, "training_allocates": self.allocated, "training_holds": self.held,
            "phases": self.phases,
        }  # fmt: skip


class Remembered:
    """Plans of trainings for which there is plenty of memory, so that the next start has none to make.

    A plan that saves is made anew each time, since there may be more memory by now; and under a budget planning is needed, to load
    all that training will use.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        files = sorted(Path(__file__).parent.rglob("*.py"))
        alike = recipe.replace(data="", seed=0, epochs=1, init_from=None)  # what planning does not look at
        about = [torch.__version__, torch.get_num_threads(), str(device), alike.to_toml(), [f.stat().st_mtime_ns for f in files]]
        self.file = cache_folder() / "plans" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]}.json"
        self.device = device

    def recall(self, data: int) -> Plan | None:
        """The plan, if there is one and it still fits without a doubt."""
        try:
            known = json.loads(self.file.read_text())
            layouts = {name: Layout.from_dict(layout) for name, layout in known["layouts"].items()}
            guarantee, phases, held = Guarantee[known["guarantee"].upper()], known["phases"], int(known["training_holds"])
            loaded = int(known["loaded"])
        except (OSError, ValueError, LookupError, TypeError):
            return None
        there, spare = limit.baseline(self.device), limit.spare(self.device)
        if held + data + loaded > spare - MARGIN:
            return None
        return Plan(layouts, known["freed_memory"], there + spare, False, there + loaded, data, phases, held, guarantee)

    def keep(self, plan: Plan) -> None:
        """Remembers ``plan`` if it is such a one, and if it can be written down."""
        if plan.plain:
            with suppress(UserError):
                write_text(self.file, json.dumps(plan.as_dict() | {"loaded": plan.loaded}))

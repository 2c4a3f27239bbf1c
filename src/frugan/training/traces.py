"""Traces of a recipe, kept in the cache so that they need not be made twice."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from frugan.config.recipe import Recipe
from frugan.gan.build import least_held, warm_up_update
from frugan.memory import limit
from frugan.memory.growth import Growth
from frugan.memory.host import Freed
from frugan.memory.layout import Layout
from frugan.memory.search import Levers
from frugan.training.tracing import Facts, InProcess, Maker, Subprocess
from frugan.utils.errors import UserError
from frugan.utils.files import cache_folder, cached, write_text

T = TypeVar("T")


class Traces:
    """Traces of trainings of ``recipe`` (resolved) on ``device``.

    Args:
        recipe: what is trained.
        device: on what.
        separate: whether another process makes them, on the CPU.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, separate: bool = False) -> None:
        self.recipe = recipe
        self.device = device
        self.separate = separate and device.type == "cpu"
        self.file = cache_folder() / "plans" / f"{fingerprint(recipe, device)}.json"
        self._maker: Maker | None = None
        self._new = False
        self._known: dict[str, str] = {}  # JSON that is read when it is needed: read, a trace takes megabytes
        with suppress(OSError, ValueError):
            known = json.loads(cached(self.file).read_text())
            self._known = known if isinstance(known, dict) else {}
        if device.type != "cpu":  # what is loaded there must be there before memory is counted
            self._known = {}

    @property
    def facts(self) -> Facts:
        """See `Facts`; with what plots load.

        What is loaded shows in a process that has loaded nothing yet: facts of a separate process are preferred.
        """
        elsewhere = ["separate"] if self.separate or self._key("facts", ["separate"]) in self._known else []
        found = self._read("facts", elsewhere, lambda known: Facts(**known))
        held, reserved = self.plots() if self.device.type == "cpu" else (0, 0)
        return replace(found, loaded=found.loaded + held, reserved=found.reserved + reserved)

    def least(self) -> dict[str, int]:
        """Bytes that every training holds, see `frugan.gan.build.least_held`: for them nothing is run, nor takes memory."""
        try:
            return least_held(self.recipe, self.device)
        except RuntimeError:  # of a network that looks at its weights while it is built
            return {"G": 0, "D": 0, "gradients": 0}

    def plots(self) -> tuple[int, int]:
        """Bytes that drawing plots loads on the CPU: held, and of addresses.

        They are the same for all recipes, so that only the first plan on a machine takes half a second for them.
        """
        about = [torch.__version__, version("matplotlib"), version("numpy"), sys.version, platform.machine(), platform.libc_ver()]
        file = self.file.with_name(f"plots-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]}.json")
        with suppress(OSError, ValueError):
            held, reserved = map(int, json.loads(cached(file).read_text()))
            return held, reserved
        held, reserved = self._made("plots", [])
        with suppress(UserError):
            write_text(file, json.dumps([held, reserved]))
        return held, reserved

    def loads(self, lever: str) -> int:
        """Bytes besides tensors that come with ``lever``: of torch's formulas of forward mode, in place of double backward's."""
        return self._read("loads", [lever], int) if lever == "penalty" and self.device.type == "cpu" else 0

    def growth(self, phase: str, levers: Levers, largest: int = 0) -> Growth:
        """What a micro-batch of ``phase`` allocates with ``levers``, looked at with ``largest`` samples too if that is said."""
        for lever in levers:
            self.loads(lever.name)  # which a trace would have loaded already
        sizes = [largest] if largest else []
        return self._read("growth", [phase, [lever.name for lever in levers], *sizes], Growth.from_dict)

    def sampling(self, largest: int = 0) -> Growth:
        """What making images allocates; right at ``largest`` of them at a time, if that is said."""
        return self._read("sampling", [largest] if largest else [], Growth.from_dict)

    def kept(self) -> Growth:
        """What making generated images allocates whose graph is kept for G's phase, and is still there at the end."""
        return self._read("kept", [], Growth.from_dict)

    def updating(self, phase: str) -> Growth:
        """What an update of the network that ``phase`` trains allocates."""
        return self._read("updating", [phase], Growth.from_dict)

    def features(self) -> Growth:
        """What a micro-batch allocates from which features are learnt."""
        return self._read("features", [], Growth.from_dict)

    def knows_features(self) -> bool:
        """Whether `features` need not be made."""
        return self._key("features", []) in self._known

    def knows(self, phase: str, levers: Levers) -> bool:
        """Whether `growth` need not be made."""
        return self._key("growth", [phase, [lever.name for lever in levers]]) in self._known

    def _key(self, what: str, arguments: list[Any]) -> str:
        return f"{what} {json.dumps(arguments, sort_keys=True)}"

    def _read(self, what: str, arguments: list[Any], read: Callable[[Any], T]) -> T:
        key = self._key(what, arguments)
        if key in self._known:
            try:
                return read(json.loads(self._known[key]))
            except (TypeError, ValueError, LookupError):
                pass  # of a damaged file
        made = self._made(what, arguments)
        self._known[key] = json.dumps(made)
        self._new = True
        return read(made)

    def _made(self, what: str, arguments: list[Any]) -> Any:
        if self._maker is None:
            self._maker = Subprocess(self.recipe, self.device) if self.separate else InProcess(self.recipe, self.device)
        try:
            return self._maker.ask(what, arguments)
        except RuntimeError as error:
            if not self.separate or limit.is_out_of_memory(error):
                raise
        self._maker.close()  # whatever is the matter with the other process: then here
        self.separate, self._maker = False, InProcess(self.recipe, self.device)
        return self._maker.ask(what, arguments)

    def warm_up(self) -> None:
        """Has what only an update loads on an accelerator there, so that it is counted."""
        warm_up_update(self.device)

    def seconds(self, layouts: Mapping[str, Layout], freed: Freed, *, keeps: bool) -> float:
        """About how long an update takes here with ``layouts``: the first micro-batch of each phase is run and timed."""
        limit.set_freed(freed, self.device)
        total = InProcess(self.recipe, self.device).seconds(layouts, keeps=keeps)
        limit.set_freed("return", self.device)
        self.close()
        return total

    def close(self) -> None:
        """Writes down what is new, if that can be done, and lets go of what made it."""
        if self._maker is not None:
            self._maker.close()
            self._maker = None
        if self._new and self.device.type == "cpu":
            self._new = False
            with suppress(UserError):
                write_text(self.file, json.dumps(self._known))
                cached(self.file)


def fingerprint(recipe: Recipe, device: torch.device) -> str:
    """What traces depend on: the recipe but for its data, batch and rates; torch, frugan's own code, machine, cores and threads."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    frozen = "somewhere" if recipe.training.init_from else None
    alike = recipe.replace(
        data="", seed=0, epochs=1, batch_size=2, init_from=frozen, accumulation_steps=None, generator_accumulation_steps=None,
        lr_g=1e-4, lr_d=1e-4,
    )  # fmt: skip
    numbers = tuple(str(number) for number in range(len(alike.classes)))  # how many there are is all that matters of classes
    alike = replace(alike, classes=replace(alike.classes, names=numbers, counts=(1,) * len(numbers)))
    about = [
        torch.__version__, torch.get_num_threads(), os.cpu_count(), platform.machine(), platform.libc_ver(),
        torch.backends.cpu.get_cpu_capability(), str(device), alike.to_toml(), [(f.name, f.stat().st_mtime_ns) for f in files],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]

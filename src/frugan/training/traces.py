"""What the phases of a recipe allocate, kept in the cache so that it need not be found twice.

Traces are made by running phases on two and three samples (`Model`). Where a process is about to train within a budget another
one does that (``python -m frugan.training.traces``), so that nothing of it is left in the one that trains.
"""

import gc
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from frugan.config.recipe import Recipe
from frugan.memory import host, limit
from frugan.memory.growth import LARGE, SMALL, Growth
from frugan.memory.host import Freed
from frugan.memory.layout import Layout
from frugan.memory.search import Levers
from frugan.reporting.pictures import warm_up
from frugan.training.model import Model, warm_up_update
from frugan.utils.errors import UserError
from frugan.utils.files import cache_folder, write_text

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """What planning needs to know of a training besides its traces.

    Args:
        coupled_g: whether samples of the generator depend on one another.
        coupled_d: the same of the discriminator.
        held: bytes that are there all the time, by what they are for.
        loaded: bytes that the process comes to hold by and by besides tensors (libraries, their code, plots), on the CPU.
        reserved: bytes by which addresses grow more than what the process holds (or less).
        loaded_each: the same as ``loaded`` of every further size of micro-batch, for which libraries make code of their own.
        reserved_each: the same as ``reserved``.
    """

    coupled_g: bool
    coupled_d: bool
    held: dict[str, int]
    loaded: int
    reserved: int
    loaded_each: int
    reserved_each: int


class Maker(Protocol):
    """Makes what `Traces` does not know yet."""

    def ask(self, what: str, arguments: list[Any]) -> Any:
        """The answer, as JSON has it: ``facts``; ``growth`` of a phase with levers; ``sampling``; ``updating`` a phase."""

    def close(self) -> None:
        """Lets go of everything."""


class InProcess:
    """Makes traces in this process."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.model: Model | None = None

    def _model(self) -> Model:
        if self.model is None:
            self.model = Model(self.recipe, self.device)
        return self.model

    def ask(self, what: str, arguments: list[Any]) -> Any:
        """See `Maker`."""
        if what == "facts":  # wherever they are asked for
            return asdict(self._facts())
        found: Growth = getattr(self._model(), what)(*arguments)
        return found.as_dict()

    def _facts(self) -> Facts:
        if self.device.type != "cpu":  # what is loaded there is seen in what the driver says is taken
            model = self._model()
            return Facts(model.generator.couples_samples, model.discriminator.couples_samples, _bytes(model), 0, 0, 0, 0)
        found = [(limit.baseline(self.device), host.status("VmData"))]
        with ThreadPoolExecutor(1) as plots:
            drawn = plots.submit(warm_up)
            model = self._model()
            model.warm(SMALL)
            model.multiply()
            drawn.result()
        tensors = sum(_bytes(model).values())
        for size in (SMALL, LARGE):
            if size == LARGE:
                model.warm(size)
            found.append((limit.at_rest(self.device) - tensors, host.status("VmData") - tensors))
        (loaded, reserved), (loaded_each, reserved_each) = (
            (max(0, b[0] - a[0]), b[1] - b[0] - a[1] + a[0]) for a, b in pairwise(found)
        )
        return Facts(
            model.generator.couples_samples, model.discriminator.couples_samples, _bytes(model), loaded, reserved,
            loaded_each, max(0, reserved_each),
        )  # fmt: skip

    def close(self) -> None:
        """Lets go of the networks."""
        self.model = None


class Subprocess:
    """Has another process make traces."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        about = {"recipe": recipe.to_toml(), "device": str(device), "threads": torch.get_num_threads()}
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "frugan.training.traces"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        self._send(about)

    def _send(self, message: Any) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def ask(self, what: str, arguments: list[Any]) -> Any:
        """See `Maker`.

        Raises:
            UserError: of the other process; or memory ran out there.
            RuntimeError: it failed in another way.
        """
        self._send([what, arguments])
        assert self._process.stdout
        try:
            answer = json.loads(self._process.stdout.readline())
        except ValueError:
            answer = {"shortage": True} if self._process.wait() in (-9, 137) else {"failed": f"it ended by {self._process.wait()}"}
        if "shortage" in answer:
            raise UserError("memory ran out while planning: close other programs, then run the same command; nothing was written.")
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer["found"]

    def close(self) -> None:
        """Ends the other process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.stdout.close()  # type: ignore[union-attr]
        self._process.wait()


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
            known = json.loads(self.file.read_text())
            self._known = known if isinstance(known, dict) else {}
        if device.type != "cpu":  # what is loaded there must be there before memory is counted
            self._known = {}

    @property
    def facts(self) -> Facts:
        """See `Facts`.

        What is loaded shows in a process that has loaded nothing yet: facts of a separate process are preferred.
        """
        elsewhere = ["separate"] if self.separate or self._key("facts", ["separate"]) in self._known else []
        return self._read("facts", elsewhere, lambda known: Facts(**known))

    def growth(self, phase: str, levers: Levers) -> Growth:
        """What a micro-batch of ``phase`` allocates with ``levers``."""
        return self._read("growth", [phase, [lever.name for lever in levers]], Growth.from_dict)

    def sampling(self) -> Growth:
        """What making images allocates."""
        return self._read("sampling", [], Growth.from_dict)

    def updating(self, phase: str) -> Growth:
        """What an update of the network that ``phase`` trains allocates."""
        return self._read("updating", [phase], Growth.from_dict)

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

    def seconds(self, layouts: Mapping[str, Layout], freed: Freed) -> float:
        """About how long an update takes here with ``layouts``: the first micro-batch of each phase is run and timed."""
        model = Model(self.recipe, self.device)
        limit.set_freed(freed, self.device)
        total = sum(model.seconds(name, layout) for name, layout in layouts.items())
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


def fingerprint(recipe: Recipe, device: torch.device) -> str:
    """What traces depend on: the recipe but for its data, batch and rates; torch, frugan's own code, machine, cores and threads."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    frozen = "somewhere" if recipe.training.init_from else None
    alike = recipe.replace(
        data="", seed=0, epochs=1, batch_size=2, init_from=frozen, accumulation_steps=None, generator_accumulation_steps=None,
        lr_g=1e-4, lr_d=1e-4,
    )  # fmt: skip
    about = [
        torch.__version__, torch.get_num_threads(), os.cpu_count(), platform.machine(), platform.libc_ver(),
        torch.backends.cpu.get_cpu_capability(), str(device), alike.to_toml(), [(f.name, f.stat().st_mtime_ns) for f in files],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


def _bytes(model: Model) -> dict[str, int]:
    return {name: sum(t.untyped_storage().nbytes() for t in tensors if t is not None) for name, tensors in model.held().items()}


def serve() -> None:
    """Answers requests for traces, a line of JSON each, until there are none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))  # the other process's limit is its own
    about = json.loads(sys.stdin.readline())
    torch.set_num_threads(about["threads"])
    device = torch.device(about["device"])
    limit.set_freed("return", device)
    gc.collect()
    gc.freeze()  # so that later collections, of which there are many, do not look at all that was imported
    maker = InProcess(Recipe.from_toml(about["recipe"], "the recipe"), device)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = {"found": maker.ask(what, arguments)}
        except UserError as error:
            answer = {"refused": str(error)}
        except Exception as error:
            answer = {"shortage": True} if limit.is_out_of_memory(error) else {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()

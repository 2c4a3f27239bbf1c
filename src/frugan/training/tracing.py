"""Makes traces of what the phases of a recipe allocate, in this process or in a separate one (``-m frugan.training.tracing``).

Traces are made by running phases on two and three samples (`Model`). Where a process is about to train within a budget a separate
one does that, so that nothing of it is left in the one that trains.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from frugan.config.recipe import Recipe
from frugan.gan.levers import named
from frugan.gan.penalties import penalties
from frugan.memory import host, limit
from frugan.memory.growth import LARGE, Growth
from frugan.memory.layout import Layout
from frugan.reporting.pictures import warm_up
from frugan.training.model import Model
from frugan.utils.errors import UserError

ENOUGH = 8  # samples from which on libraries use the kernels, and keep the buffers, that they do for more
PRODUCTS = 3 << 19  # bytes of buffers for products of many rows, 0 to 5 MB (docs/LOG.md), where D is dense
TRACED = 5 << 19  # bytes of what forward mode loads that tracing has loaded before (torch 2.14; docs/LOG.md)


@dataclass(frozen=True)
class Facts:
    """What planning needs to know of a training besides its traces.

    Args:
        coupled_g: whether samples of the generator depend on one another.
        coupled_d: the same of the discriminator.
        held: bytes that are there all the time, by what they are for.
        loaded: bytes that the process comes to hold by and by besides tensors (libraries, their code), on the CPU.
        reserved: bytes by which addresses grow more than what the process holds (or less).
        loaded_each: the same as ``loaded`` of every further size of micro-batch, for which libraries make code of their own.
        reserved_each: the same as ``reserved``.
        waiting: bytes that wait on the host, where training is on another device.
        in_four_passes: whether gradient penalties are computed so (`frugan.gan.bends`).
    """

    coupled_g: bool
    coupled_d: bool
    held: dict[str, int]
    loaded: int
    reserved: int
    loaded_each: int
    reserved_each: int
    waiting: int = 0
    in_four_passes: bool = False


class Maker(Protocol):
    """Makes what `Traces` does not know yet."""

    def ask(self, what: str, arguments: list[Any]) -> Any:
        """The answer, as JSON has it: ``facts``; ``plots``; ``growth`` of a phase with levers; ``loads`` of a lever; ``sampling``,
        ``updating``, ``kept`` and ``features``."""

    def close(self) -> None:
        """Lets go of everything."""


class InProcess:
    """Makes traces in this process."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.model: Model | None = None
        self._penalties: int | None = None  # bytes that they load
        self._traced = False

    def _model(self) -> Model:
        if self.model is None:
            self.model = Model(self.recipe, self.device)
        return self.model

    def ask(self, what: str, arguments: list[Any]) -> Any:
        """See `Maker`."""
        if what == "facts":  # wherever they are asked for
            return asdict(self._facts())
        if what == "plots":
            return self._plots()
        if what == "loads":
            return self._loads(*arguments)
        if what == "growth":
            arguments = [arguments[0], named(arguments[1]), *arguments[2:]]
        self._traced = True
        found: Growth = getattr(self._model(), what)(*arguments)
        return found.as_dict()

    def seconds(self, layouts: Mapping[str, Layout], *, keeps: bool) -> float:
        """See `Model.seconds`."""
        return self._model().seconds(layouts, keeps=keeps)

    def _facts(self) -> Facts:
        if self.device.type != "cpu":  # what is loaded there is seen in what the driver says is taken
            model = self._model()
            waiting = sum(t.untyped_storage().nbytes() for t in model.waiting())
            return Facts(
                model.generator.couples_samples, model.discriminator.couples_samples, _bytes(model), 0, 0, 0, 0, waiting,
                model.step.in_four_passes,
            )  # fmt: skip
        found = [(limit.baseline(self.device), host.status("VmData"))]
        model = self._model()
        with model.unpenalised():
            model.warm(ENOUGH)
        tensors = sum(_bytes(model).values())
        self._load_penalties(model)
        found.append((limit.at_rest(self.device) - tensors, host.status("VmData") - tensors))
        model.warm(LARGE)
        found.append((limit.at_rest(self.device) - tensors, host.status("VmData") - tensors))
        (loaded, reserved), (loaded_each, reserved_each) = (
            (max(0, b[0] - a[0]), b[1] - b[0] - a[1] + a[0]) for a, b in pairwise(found)
        )
        loaded += PRODUCTS if all(p.dim() <= 2 for p in model.discriminator.parameters()) else 0
        return Facts(
            model.generator.couples_samples, model.discriminator.couples_samples, _bytes(model), loaded, reserved,
            loaded_each, max(0, reserved_each), in_four_passes=model.step.in_four_passes,
        )  # fmt: skip

    def _plots(self) -> list[int]:
        """Bytes that drawing plots loads: held, and of addresses."""
        before = limit.at_rest(self.device), host.status("VmData")
        warm_up()
        return [max(0, limit.at_rest(self.device) - before[0]), max(0, host.status("VmData") - before[1])]

    def _load_penalties(self, model: Model) -> None:
        self._penalties = 0
        if penalties(self.recipe.objective):
            self._penalties -= limit.at_rest(self.device)
            model.run("D", Layout((ENOUGH,)))
            self._penalties += limit.at_rest(self.device)

    def _loads(self, lever: str) -> int:
        """Bytes that ``lever`` of D's phase loads in place of what it does without."""
        model = self._model()
        if self._penalties is None:  # facts were known already
            limit.baseline(self.device)  # lets go of code that imports have touched, as a training does
            with model.unpenalised():
                model.warm(ENOUGH)
            self._load_penalties(model)
        before = limit.at_rest(self.device)
        model.run("D", Layout((ENOUGH,), named([lever])))
        return max(0, limit.at_rest(self.device) - before - (self._penalties or 0)) + (TRACED if self._traced else 0)

    def close(self) -> None:
        """Lets go of the networks."""
        self.model = None


class Subprocess:
    """Has another process make traces."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        about = {"recipe": recipe.to_toml(), "device": str(device), "threads": torch.get_num_threads()}
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "frugan.training.tracing"],
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
            raise UserError(
                "memory ran out while planning: close other programs, give a larger --memory or choose smaller networks, then run "
                "the command again; nothing was written."
            )
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer["found"]

    def close(self) -> None:
        """Ends the other process."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):  # it has ended already, and what was not sent yet is lost
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


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
    maker = InProcess(Recipe.from_toml(about["recipe"], "the recipe"), device)
    with limit.seldom_collected():
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

"""What a training would be in more processes: the memory of each, and how long an update computes and exchanges gradients.

Computing is measured here, for the share of a batch that each process would have; every process is taken to have what this one has.
Exchanging is measured between two processes on this machine, or follows from how fast a link is said to be. With more processes it
is the arithmetic of a ring (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"): of
``n``, each sends 2 (n - 1) messages one after another, of 1 / n of the gradients each. On a simulated accelerator it has run; on a
GPU it has not.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from frugan.config.recipe import Recipe
from frugan.gan.build import unmade
from frugan.training.planner import Planner, TooLittle
from frugan.training.planning import Proposal
from frugan.utils.errors import UserError
from frugan.utils.processes import check_share, joined
from frugan.utils.units import parse_bytes

ROUNDS = 30  # exchanges that are timed


@dataclass(frozen=True)
class Link:
    """How long two processes take to exchange all gradients of an update.

    Args:
        messages: seconds of it that as many empty messages take; 0 where nobody has measured them.
        bytes: seconds of it that the bytes take.
    """

    messages: float
    bytes: float

    def seconds(self, processes: int) -> float:
        """The same with so many processes."""
        return (processes - 1) * (self.messages + self.bytes * 2 / processes)


@dataclass(frozen=True)
class Scale:
    """A training in so many processes.

    Args:
        processes: how many.
        images: of each batch in each process.
        memory: bytes that each holds at most; None if no plan fits.
        smallest: the smallest budget that would do where none fits.
        computing: seconds of an update that each computes.
        exchanging: seconds of an update in which gradients are exchanged.
    """

    processes: int
    images: int
    memory: int | None
    smallest: int | None
    computing: float
    exchanging: float

    @property
    def images_per_second(self) -> float:
        """Images a second of all together."""
        return self.processes * self.images / (self.computing + self.exchanging)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"images_per_second": self.images_per_second if self.memory else None}


class Scaling:
    """What ``training`` would be in up to so many processes.

    Args:
        training: in one process.
        processes: how many.
        link: bytes a second from one process to another, as ``12GB/s``; None: measured between two on this machine's CPU.

    Raises:
        UserError: the batch does not divide; the speed is none; or it is not said, and cannot be measured here.
    """

    def __init__(self, training: Proposal, processes: int, link: str | None) -> None:
        self.training = training
        self.batch = training.recipe.training.batch_size
        if processes < 1:
            raise UserError(f"--processes {processes} is none: say 2 or more.")
        check_share(self.batch, processes)
        self.counts = sorted({n for n in (1 << k for k in range(processes.bit_length())) if self.batch % n == 0} | {processes})
        self.speed = _bytes_a_second(link) if link is not None else None
        if link is None and training.device.type != "cpu":
            raise UserError(f"how fast processes on {training.device} exchange is not measured: say it, as in --link 12GB/s.")

    def rows(self, before: Planner) -> Iterator[Scale]:
        """From one process on, in powers of two where the batch divides; ``before`` has planned in this process first.

        Raises:
            UserError: it cannot be trained in such shares, or two processes could not exchange anything here.
        """
        sizes = gradients(self.training.recipe)
        link = Link(0.0, sum(sizes) / self.speed) if self.speed else measured(sizes)
        for n in self.counts:
            share = self.batch // n
            try:
                planner, plan = self.training.plan(share, before)
            except TooLittle as error:
                yield Scale(n, share, None, error.smallest, 0.0, 0.0)
                continue
            yield Scale(n, share, plan.predicted, None, share / planner.images_per_second(plan), link.seconds(n))


def gradients(recipe: Recipe) -> list[int]:
    """Bytes of each gradient that an update of ``recipe`` (resolved) exchanges, of both networks."""
    parameters = [p for network in unmade(recipe) for p in network.parameters()]
    return [p.numel() * p.element_size() for p in parameters if p.requires_grad]


def _bytes_a_second(said: str) -> int:
    with suppress(UserError):
        if found := parse_bytes(said.strip().removesuffix("/s")):
            return found
    raise UserError(f"--link {said} is no speed: say the bytes a second between two processes, as 12GB/s.")


def measured(sizes: list[int]) -> Link:
    """How long two processes take here, on the CPU, to exchange gradients of ``sizes`` bytes.

    Raises:
        UserError: they could not.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "gradients.json")
        asked.write_text(json.dumps(sizes))
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "frugan.training.scaling",
            str(asked),
        ]
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        found = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    try:
        return Link(**json.loads(found.stdout.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        raise UserError("two processes could not exchange anything here: say how fast they would, as in --link 12GB/s.") from None


def _exchange(sizes: list[int]) -> None:
    """Measures, as one of two processes, how long gradients of ``sizes`` bytes take, and the first says it."""
    took: list[float] = []
    with joined("cpu") as group:
        for numbers in ([1] * len(sizes), [max(1, size // 4) for size in sizes]):
            network = torch.nn.ParameterList(torch.zeros(n) for n in numbers)
            for p in network:
                p.grad = torch.zeros_like(p)
            times = []
            for _ in range(ROUNDS):
                group.most([0.0])  # both begin at once
                began = time.perf_counter()
                group.sum_phase(network, {})
                times.append(time.perf_counter() - began)
            took.append(statistics.median(times))
        if group.leads:
            print(json.dumps(asdict(Link(took[0], max(0.0, took[1] - took[0])))), flush=True)


if __name__ == "__main__":
    _exchange(json.loads(Path(sys.argv[1]).read_text()))

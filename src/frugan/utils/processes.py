"""Processes that train one pair of networks together, as ``torchrun`` starts them: which of them this is, and what they exchange.

Each computes its share of every batch; gradients and what is measured are sums over all. The first process, which leads, speaks and
writes; the others read.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from frugan.utils.errors import UserError

T = TypeVar("T")

MEET = timedelta(minutes=2)  # in which all must have come, unless FRUGAN_MEET says how many seconds
WORK = timedelta(hours=2)  # in which each must be done with what it does between two exchanges
SAID = "said"  # what is in the store that all have when one of them has said why it ends


class Gone(UserError):
    """Another process has ended, or does not answer."""

    def __init__(self) -> None:
        super().__init__(
            "another of the processes that train together has ended or does not answer: see what it said, then run the same "
            "command again, which goes on from the last checkpoint."
        )
        self.said = not leads()


@dataclass(frozen=True)
class Share:
    """The samples of a batch that one process computes: ``count`` from ``begin`` on."""

    begin: int
    count: int


class Alone:
    """One process, which has nobody to exchange anything with; what `Together` does otherwise."""

    rank = 0
    size = 1
    here = 1  # processes that share the memory of this machine, or of a GPU

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def share(self, batch: int) -> Share:
        """What of a batch is computed here.

        Raises:
            UserError: there is not as much for each.
        """
        check_share(batch, self.size)
        count = batch // self.size
        return Share(self.rank * count, count)

    def first(self, action: Callable[[], T]) -> T:
        """``action`` in the first process, and when it is done there in the others, which find in caches what it has made."""
        return action()

    def sum_phase(self, network: nn.Module, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of ``terms`` over all processes; the network's gradients become theirs, in place."""
        return self.sum_terms(terms)

    def sum_terms(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of ``terms``, numbers, over all processes."""
        return dict(terms)

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each of ``values`` over all processes."""
        return list(values)

    def agree(self, about: Mapping[str, Any]) -> None:
        """All processes must say the same.

        Raises:
            UserError: one does not; in the first process.
        """

    def give(self, tensors: Sequence[Tensor]) -> None:
        """What the first process has in ``tensors`` is then in those of all."""


class Together(Alone):
    """One of several processes.

    Args:
        kind: of the device on which tensors are that are exchanged.
    """

    def __init__(self, kind: str) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        backend = "gloo"
        if kind == "cuda":  # unrun: there was no machine with two GPUs
            self.here = -(-self.here // torch.cuda.device_count())
            backend = "nccl"
        self._words: Any = dist.new_group(backend="gloo", timeout=WORK)
        self._tensors: Any = self._words if backend == "gloo" else dist.new_group(backend=backend, timeout=WORK)

    def first(self, action: Callable[[], T]) -> T:
        """As `Alone` says."""
        if not self.leads:
            self._wait()
        result = action()
        if self.leads:
            self._wait()
        return result

    def sum_phase(self, network: nn.Module, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `Alone` says."""
        found = [p for p in network.parameters() if p.grad is not None]
        for p in found:
            assert p.grad is not None
            if p.grad.stride() != p.stride():  # all processes must lay them out alike
                p.grad = torch.empty_like(p, memory_format=torch.preserve_format).copy_(p.grad)
        with _answered():
            begun = [self._dist.all_reduce(_flat(p.grad), group=self._tensors, async_op=True) for p in found if p.grad is not None]
            for work in begun:
                work.wait()
        return self.sum_terms(terms)

    def sum_terms(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `Alone` says."""
        if not terms:
            return {}
        names = sorted(terms)
        numbers = torch.stack([terms[name] for name in names])
        with _answered():
            self._dist.all_reduce(numbers, group=self._tensors)
        return dict(zip(names, numbers.unbind(), strict=True))

    def most(self, values: Sequence[float]) -> list[float]:
        """As `Alone` says."""
        numbers = torch.tensor(values, dtype=torch.float64)
        with _answered():
            self._dist.all_reduce(numbers, self._dist.ReduceOp.MAX, group=self._words)
        return [float(number) for number in numbers]

    def agree(self, about: Mapping[str, Any]) -> None:
        """As `Alone` says."""
        found: list[Any] = [None] * self.size
        with _answered():
            self._dist.all_gather_object(found, dict(about), group=self._words)
        for rank, other in enumerate(found):
            if differing := [name for name, value in found[0].items() if other.get(name) != value]:
                if not self.leads:
                    raise Gone
                said = ", ".join(
                    f"{name} is {found[0][name]} in process 0 and {other.get(name)} in process {rank}" for name in differing
                )
                raise UserError(f"the processes do not train the same: {said}; give all the same command, data and version.")

    def give(self, tensors: Sequence[Tensor]) -> None:
        """As `Alone` says."""
        with _answered():
            for tensor in tensors:
                self._dist.broadcast(_flat(tensor), 0, group=self._tensors)

    def _wait(self) -> None:
        with _answered():
            self._dist.barrier(group=self._words)


def check_share(batch: int, processes: int) -> None:
    """A batch must divide among processes.

    Raises:
        UserError: it does not.
    """
    if batch % processes:
        less, more = batch // processes * processes, -(-batch // processes) * processes
        near = f"{less} or {more} does" if less else f"{more} does"
        raise UserError(f"--batch-size {batch} does not divide among {processes} processes: {near}.")


def started() -> bool:
    """Whether this process is one of several, by the variables of the environment that ``torchrun`` sets."""
    return _number("WORLD_SIZE", 1) > 1


def leads() -> bool:
    """Whether this process speaks and writes, before it has `joined` others."""
    return _number("RANK", 0) == 0 or not started()


def _number(name: str, default: int) -> int:
    said = os.environ.get(name) or str(default)
    if not said.isdecimal():
        raise UserError(f"{name}={said} is no number: start processes with torchrun, which sets it, or unset it.")
    return int(said)


def place(name: str) -> str:
    """The device for ``name``, where each process of a machine has a GPU of its own."""
    if not started() or name not in ("auto", "cuda"):
        return name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return "cpu" if name == "auto" else name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}"


@contextmanager
def joined(name: str) -> Iterator[Alone]:
    """While open, this process is one of those that ``torchrun`` has started, if it has, to train on the device called ``name``;
    what was begun elsewhere stays.

    Raises:
        UserError: the others do not come, or there is nothing to reach them with.
    """
    if not started():
        yield Alone()
        return
    import torch.distributed as dist

    kind = place(name).split(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        kind = "cpu"  # the first process says that there is no such device
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: several processes train together on cpu or cuda alone; use one of them, or one process.")
    backend = "NCCL" if kind == "cuda" else "gloo"
    if not dist.is_available() or not (dist.is_nccl_available() if backend == "NCCL" else dist.is_gloo_available()):
        raise UserError(f"this torch cannot exchange tensors between processes on {kind}: install one with {backend}.")
    if dist.is_initialized():  # by the program that trains
        with _answered():
            group = Together(kind)
        yield group
        return
    store = _met()
    try:
        with _answered():
            group = Together(kind)
        yield group
    except UserError as error:
        if isinstance(error, Gone):
            with suppress(RuntimeError):
                error.said = error.said or store.check([SAID])
        elif not leads():
            with suppress(RuntimeError):
                store.set(SAID, "")
        raise
    finally:
        dist.destroy_process_group()


def _met() -> Any:
    """Meets the other processes; what all can write into and read from."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        timeout = timedelta(seconds=float(os.environ.get("FRUGAN_MEET", MEET.total_seconds())))
    except (ValueError, OverflowError):
        raise UserError(f"FRUGAN_MEET={os.environ['FRUGAN_MEET']} is no number of seconds.") from None
    if unsaid := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that several processes train together, and nothing says {unsaid[0]}: "
            "start them with torchrun, or unset WORLD_SIZE."
        )
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # Those that were started again would find where the ones before them were to be reached.
        store = dist.distributed_c10d.PrefixStore(f"frugan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set_timeout(timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError):
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {os.environ.get('WORLD_SIZE')} processes could not meet at {where} within {timeout.total_seconds():g} s: "
            "check that all were started, and that this address can be reached from each machine."
        ) from None
    return store


@contextmanager
def _answered() -> Iterator[None]:
    """What exchanges raise when another process is gone is `Gone`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise Gone from error


def _flat(tensor: Tensor) -> Tensor:
    """All numbers of a dense tensor, in the order in which they lie."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))

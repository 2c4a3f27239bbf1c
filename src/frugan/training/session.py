"""A session: everything that a training is about, found and resolved before anything is planned or written."""

import os
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from frugan.config.recipe import Recipe
from frugan.config.run import Run
from frugan.data.opening import Loader, Source, Tell, classes_of, classes_read, open_within, opened, present
from frugan.memory import limit
from frugan.reporting.console import Console, counted
from frugan.reporting.run_folder import Followed, RunFolder
from frugan.training.duration import Epochs, duration_of, now
from frugan.training.mirroring import decided
from frugan.utils import device
from frugan.utils.processes import Alone, Share, place
from frugan.utils.processes import joined as joined


def resolved(recipe: Recipe, where: torch.device, tell: Tell) -> tuple[Recipe, Source]:
    """``recipe`` with nothing left open, for the images that it names and for the device ``where``; and those images.

    Raises:
        UserError: they are not there, or cannot be read; or classes are to be learnt, and there are none.
    """
    source, data = opened(recipe.data, tell)
    memory = recipe.memory
    if memory.precision == "auto":
        memory = replace(memory, precision=device.fast_precision(where))  # type: ignore[arg-type]
    network = recipe.network.resolved(present(source))
    augmentation = recipe.augmentation.settled(len(source))
    classes = classes_of(source, recipe.training.conditional, tell)
    return replace(recipe, data=data, memory=memory, network=network, augmentation=augmentation, classes=classes), source


@dataclass(frozen=True)
class Session:
    """What a training is about.

    Args:
        recipe: what to train, resolved.
        run: where, and with what.
        device: on what.
        name: of the images.
        classes: how many classes they have.
        loader: gives them.
        folder: the run folder.
        console: what speaks to the person.
        duration: how long training goes on.
        group: the processes that train together.
    """

    recipe: Recipe
    run: Run
    device: torch.device
    name: str
    classes: int
    loader: Loader
    folder: RunFolder
    console: Console
    duration: Epochs
    group: Alone

    @classmethod
    def open(
        cls, recipe: Recipe, run: Run, console: Console, began: float | None = None, group: Alone | None = None
    ) -> "Session":  # fmt: skip
        """Finds and resolves everything, for a command that began when the clock (`frugan.training.duration`) showed ``began``.

        Raises:
            UserError: anything about data, recipe or folder that cannot be trained; nothing was written then.
        """
        began, group = now() if began is None else began, group or Alone()
        where = device.choose(place(run.device))
        limit.set_freed("return", where)  # until there is a plan
        recipe, source = resolved(recipe, where, console.tell)
        batch = recipe.training.batch_size
        share = group.share(batch)  # refuses what does not divide
        loader = open_within(
            run.memory, source, recipe.data, batch, where, seed=recipe.training.seed, workers=run.workers, tell=console.tell,
            share=(share.begin, share.count), progress=console.packing,
        )  # fmt: skip
        if recipe.classes and source.random_access and len(loader) < len(source):
            recipe = replace(recipe, classes=classes_read(source, loader))
        out = Path(run.out) if run.out else Path("runs") / f"{source.name}-{recipe.recipe}"
        folder = RunFolder(out) if group.leads else Followed(out)
        saved = folder.saved_plan()
        _set_threads(run, saved.get("threads"), console.tell)  # before anything is computed
        recipe = decided(recipe, loader, folder, console.tell)
        if run.allow_approximate and saved.get("precision") == "bf16":
            recipe = recipe.replace(precision="bf16")  # as it was planned
        if recipe.memory.offload_state == "auto" and saved.get("offload_state") == "yes":
            recipe = recipe.replace(offload_state="yes")
        # Not the source, which may hold a million names.
        duration = duration_of(recipe.training, len(loader), began)
        return cls(recipe, run, where, source.name, len(source.classes), loader, folder, console, duration, group)

    @property
    def share(self) -> Share:
        """What of a batch this process computes."""
        return self.group.share(self.batch)

    @property
    def batch(self) -> int:
        """Images of an update."""
        return self.recipe.training.batch_size

    def arithmetic(self) -> AbstractContextManager[None]:
        """While open, products in single precision are as the recipe says, see `frugan.utils.device.arithmetic`."""
        return device.arithmetic(self.recipe.memory.precision, self.device)

    def apart(self) -> AbstractContextManager[None]:
        """While open, each thread that computes keeps to a processor of its own, see `frugan.utils.threads`."""
        return device.apart() if self.device.type == "cpu" else nullcontext()

    def machine(self) -> dict[str, Any]:
        """What results depend on up to rounding: torch's version, the kind of device, the number of threads."""
        return {"torch": torch.__version__, "device": self.device.type, "threads": torch.get_num_threads()}

    def essence(self) -> dict[str, Any]:
        """What several processes must have in common to train together."""
        settings = {f"--{name.replace('_', '-')}": value for name, value in self.recipe.flat().items() if name != "data"}
        with suppress(PackageNotFoundError):  # run from its sources
            settings["frugan"] = version("frugan")
        return settings | {"torch": torch.__version__, "images": self.loader.fingerprint[:12]}

    def about(self) -> dict[str, Any]:
        """What this run is about, so that it is known again."""
        return {
            "images": len(self.loader), "fingerprint": self.loader.fingerprint, "device": str(self.device),
            "precision": self.recipe.memory.precision, "updates": (self.duration.total or 0) // self.batch,
            "offload_state": self.recipe.memory.offload_state, "threads": torch.get_num_threads(), "processes": self.group.size,
        }  # fmt: skip


def _set_threads(run: Run, before: object, tell: Tell) -> None:
    """As asked for, else as many as the run was started with (``before``), since sums are split by threads.

    Before memory is limited: each thread reserves its stack when it starts.
    """
    if run.threads:
        torch.set_num_threads(run.threads)
    elif isinstance(before, int) and before != torch.get_num_threads():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(before)
        slow = f", more than this machine's {cores} cores: slow" if before > cores else ""
        tell(
            f"With {counted(before, 'thread')}, as it was started{slow}; --threads {cores} uses all cores, and differs by rounding."
        )

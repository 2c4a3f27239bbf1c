"""A run folder: what is in it, whose it is, and that only one training writes to it."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from operator import ge
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from frugan.config.recipe import Recipe, read
from frugan.config.section import flag
from frugan.gan import sampling
from frugan.gan.sampling import Generator
from frugan.reporting.records import Event, Line, Record, parse
from frugan.utils import checkpoint
from frugan.utils.errors import UserError
from frugan.utils.files import whole, write_text

NEIGHBOURS = "neighbours.png"


class RunFolder:
    """The folder ``path``, and what lies where in it; as a context manager it is locked against a second training."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.recipe_file = path / "recipe.toml"
        self.plan_file = path / "plan.json"
        self.log_file = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.generator_file = path / "generator.safetensors"
        self.best_file = path / "best.safetensors"
        self.samples = path / "generated_images"
        self.final_samples = path / "final_generated_images.png"
        self.real_images = path / "real_images.png"
        self.neighbours = path / NEIGHBOURS
        self.losses = path / "training_loss.png"
        self.report_file = path / "report.html"
        self.tensorboard = path / "tensorboard"
        self.lock_file = path / ".lock"
        self._lock = FileLock(self.lock_file)
        self._claimed: dict[Path, str] = {}  # files by which this run is known again, as they were last written

    def __enter__(self) -> Self:
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file: give --out a folder of its own.")
            if self.path.is_dir() and not self.plan_file.exists() and any(p != self.lock_file for p in self.path.iterdir()):
                raise UserError(f"{self.path} holds files of something else: give --out a new or empty folder.")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"another training is writing to {self.path}: wait for it, or give another --out.") from None
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; give another --out.") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()
        begun = self.plan_file.exists() or not self.path.is_dir()
        if not begun and all(p == self.lock_file for p in self.path.iterdir()):  # refused: leave no trace
            self.lock_file.unlink(missing_ok=True)
            self.path.rmdir()

    def check(self, recipe: Recipe, plan: Mapping[str, Any], accept_changes: bool) -> None:
        """Checks that what is there belongs to this training, which ``recipe`` and ``plan`` tell.

        Raises:
            UserError: the folder is another run's, or this run's with other settings that were not accepted.
        """
        if self.generator_file.exists() and not checkpoint.all_in(self.checkpoints):
            raise UserError(f"{self.path} has a trained generator but no checkpoint to go on from: give another --out.")
        if not (self.plan_file.exists() and self.recipe_file.exists()):
            return
        before, then = read(self.recipe_file), self._read_plan()
        if then.get("fingerprint") != plan["fingerprint"]:
            raise UserError(
                f"{self.path} belongs to another run, of {before.recipe} on other images, or its images ({before.data.data}) have "
                "changed since: give another --out; --init-from starts from its weights."
            )
        if then.get("images") != plan["images"]:
            raise UserError(
                f"{plan['images']} of the images can be read, and {then.get('images')} could when {self.path} was started: "
                "mend them, or give another --out."
            )
        # Earlier versions counted images that cannot be read too.
        same = before.classes.names == recipe.classes.names and all(map(ge, before.classes.counts, recipe.classes.counts))
        if before.classes and recipe.classes and not same:
            raise UserError(
                f"{self.path} was started with other classes of the same images ({before.classes} then, "
                f"{recipe.classes} now): give another --out; --init-from starts from its weights."
            )
        changes = before.differences(recipe)
        changes.pop("data", None)  # the same images by another path are the same images
        new, old = recipe.training, before.training
        by_clock = new.minutes is not None and old.minutes is not None
        if by_clock:
            changes.pop("epochs", None)  # which say nothing then
        longer = (new.minutes or 0) > (old.minutes or 0) if by_clock else new.minutes == old.minutes and new.epochs > old.epochs
        if longer and (recipe.optimizer.schedule != "cosine" or not self.newest_checkpoint()):  # it changes nothing that was done
            changes.pop("minutes" if by_clock else "epochs", None)
        if changes and not accept_changes:
            shown = {k: ["unset" if value is None else value for value in pair] for k, pair in changes.items()}
            if before.recipe != recipe.recipe:  # by which most of them differ
                shown = {"recipe": [before.recipe, recipe.recipe]}
            listed = ", ".join(
                f"{'the network' if k == 'network' else flag(k)} was {was} and is now {now}" for k, (was, now) in shown.items()
            )
            raise UserError(
                f"{self.path} was started with other settings: {listed}. "
                "Give another --out to start anew, or --accept-changes to go on with the new ones."
            )

    def claim(self, recipe: Recipe, plan: Mapping[str, Any], images: int) -> bool:
        """Writes down what is asked of this run and how it is laid out, clears away what a kill left half written, and drops what
        was logged after ``images`` images: it is about to be trained. Whether there was a checkpoint to go on from."""
        resumed = self.newest_checkpoint() is not None
        if resumed:
            self.rewind_log(images)
        for part in self.path.rglob(".*.part.*"):
            part.unlink(missing_ok=True)
        self._claimed = {self.plan_file: json.dumps(plan, indent=2) + "\n", self.recipe_file: recipe.to_toml()}
        for path, text in self._claimed.items():
            write_text(path, text)
        if not resumed:
            self.log_file.unlink(missing_ok=True)
        return resumed

    def mend(self) -> bool:
        """Writes again what this run is known by, if the folder was moved or removed since `claim`; whether it was."""
        gone = [path for path in self._claimed if not path.exists()]
        for path in gone:
            write_text(path, self._claimed[path])
        return bool(gone)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint, or None."""
        return next(reversed(checkpoint.all_in(self.checkpoints)), None)

    def keep_best(self) -> None:
        """Keeps the newest checkpoint as the best one.

        Raises:
            UserError: it cannot be copied.
        """
        newest = self.newest_checkpoint()
        assert newest
        with whole(self.best_file) as part:
            try:
                os.link(newest, part)  # the same file under two names, where that can be
            except OSError:
                shutil.copyfile(newest, part)

    def load_newest(self) -> tuple[checkpoint.Tensors, dict[str, Any]] | None:
        """The state of the newest checkpoint, or None if there is none yet.

        Raises:
            UserError: it is damaged; says how to go on from the one before.
        """
        newest = self.newest_checkpoint()
        if newest is None:
            return None
        try:
            return checkpoint.load(newest)
        except UserError as error:
            way = "There is none before it: give another --out."
            if len(checkpoint.all_in(self.checkpoints)) > 1:
                way = "Remove it to go on from the one before it, then run the same command again."
            raise UserError(f"{error} {way}") from None

    def samples_after(self, epoch: float) -> Path:
        """Where the picture of the samples after ``epoch`` epochs lies."""
        return self.samples / f"epoch_{epoch:.10g}.png"

    def pictures_of_samples(self) -> list[tuple[float, Path]]:
        """The pictures there are of samples, with their epochs, in order."""
        found = self.samples.glob("epoch_*.png")
        return sorted((float(path.stem[6:]), path) for path in found if re.fullmatch(r"[0-9]+(\.[0-9]+)?", path.stem[6:]))

    def log(self, record: Record) -> None:
        """Adds a line to ``log.jsonl``.

        Raises:
            UserError: it cannot be written.
        """
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record.as_dict()) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.log_file}: {error.strerror}.") from None

    def records(self) -> Iterator[Record]:
        """What stands in ``log.jsonl``, one after another: it may be as large as memory. Lines that were cut short are left out.

        Raises:
            UserError: it cannot be read.
        """
        return filter(None, map(parse, self._log_lines()))

    def read_log(self) -> list[Line]:
        """The reports in ``log.jsonl``."""
        return [record for record in self.records() if isinstance(record, Line)]

    def read_events(self) -> list[Event]:
        """The events in ``log.jsonl``: what was measured, changed or warned of between its reports."""
        return [record for record in self.records() if isinstance(record, Event)]

    def _log_lines(self) -> Iterator[str]:
        try:
            with self.log_file.open(encoding="utf-8", errors="replace") as lines:
                yield from lines
        except FileNotFoundError:
            return  # nothing is reported yet
        except OSError as error:
            raise UserError(f"cannot read {self.log_file}: {error.strerror}; make it readable, or move it away.") from None

    def saved_plan(self) -> dict[str, Any]:
        """What ``plan.json`` says, if there is one."""
        return self._read_plan() if self.plan_file.exists() else {}

    def rewrite_plan(self, changes: Mapping[str, Any]) -> None:
        """Changes what ``plan.json`` says."""
        self._claimed[self.plan_file] = json.dumps(self._read_plan() | dict(changes), indent=2) + "\n"
        write_text(self.plan_file, self._claimed[self.plan_file])

    def rewind_log(self, images: int) -> None:
        """Drops what was logged after ``images`` images: it is about to be trained again."""
        kept = [line for line in self._log_lines() if (record := parse(line)) and record.images <= images]
        write_text(self.log_file, "".join(line.rstrip("\n") + "\n" for line in kept))

    def _read_plan(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.plan_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.plan_file} cannot be read: {error}; give another --out.") from None


class Followed(RunFolder):
    """The folder of a training of several processes, for those that do not write: nothing is changed in it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def claim(self, recipe: Recipe, plan: Mapping[str, Any], images: int) -> bool:
        """Whether there was a checkpoint to go on from."""
        return self.newest_checkpoint() is not None

    def rewrite_plan(self, changes: Mapping[str, Any]) -> None:
        """Changes nothing."""


def load_generator(run: str | Path, device: str = "cpu", *, best: bool = False) -> Generator:
    """The generator of a run folder, or of a ``generator.safetensors`` alone.

    Args:
        run: where it is.
        device: where it shall run.
        best: of a run folder, the one that was best while training.

    Raises:
        UserError: there is none, or the file is damaged.
    """
    path = Path(run)
    if path.is_dir():
        folder = RunFolder(path)
        path = folder.best_file if best else folder.generator_file
        if best and not path.exists():
            raise UserError(f"{folder.path} has no best checkpoint: --evaluate-every keeps one while training.")
        if not path.exists():
            raise UserError(
                f"{folder.path} has no generator yet: train it for an epoch first."
                if folder.recipe_file.exists()
                else f"{folder.path} is no run folder: it has no {path.name}."
            )
    return sampling.load(path, device)

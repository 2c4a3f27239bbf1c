"""What looks at a training as it goes and writes down what it sees. Nothing here changes what is trained."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frugan.config.recipe import Recipe
from frugan.config.run import Run
from frugan.data.loader import Loader
from frugan.evaluation.evaluator import SEED, Evaluator
from frugan.evaluation.families import better
from frugan.evaluation.families.base import Options
from frugan.memory import limit
from frugan.reporting import pictures, report
from frugan.reporting.console import Console, losses
from frugan.reporting.pictures import FINAL, GRID
from frugan.reporting.run_folder import RunFolder
from frugan.training.diagnostics import Watch
from frugan.utils.errors import UserError

FINAL_PICTURE = "final_generated_images.png"
SHOWN = 16  # samples beside their nearest real images
ENOUGH = 20  # samples for each class, before one that is missing tells something

Sample = Callable[[int, int, int], Tensor]  # (seed, first, count) to uint8 images [count, c, h, w]


class Observer:
    """The eyes of one run.

    Args:
        recipe: what is trained (resolved).
        run: how often it is looked at, and by what.
        folder: where everything is written.
        loader: the real images.
        name: what they are called.
        classes: how many classes they have.
        console: what speaks to the person.
        device: where training runs.

    Raises:
        UserError: a metric that cannot be had of these images, or here.
    """

    def __init__(
        self, recipe: Recipe, run: Run, folder: RunFolder, loader: Loader, name: str, classes: int,
        console: Console, device: torch.device,
    ) -> None:  # fmt: skip
        self.recipe, self.run, self.folder, self.loader, self.console, self.device = recipe, run, folder, loader, console, device
        self.evaluator: Evaluator | None = None
        if not run.evaluate_every and (run.metrics != Run.metrics or run.weights):
            raise UserError("--metrics and --weights are for evaluating while training: say how often, as --evaluate-every 5.")
        if run.evaluate_every:
            if not loader.random_access:
                raise UserError("--evaluate-every needs images in any order: leave --stream out, or evaluate afterwards.")
            options = Options(run.metrics, run.weights, reals=run.evaluate_samples)
            self.evaluator = Evaluator(loader, name, classes, options, device, console.tell, learning=console.learning)
        self.watch = Watch(loader, recipe.objective, self._warn)
        self.best: float | None = None
        self.best_images = 0
        self.images = 0
        self._board: Any = None

    def needs(self) -> int:
        """Bytes that evaluating takes at most."""
        return self.evaluator.needs() if self.evaluator else 0

    def begin(self, images: int) -> None:
        """Takes up what was seen before; training begins after ``images`` images."""
        self.images = images
        if not images:
            pictures.save(pictures.grid(self.loader.batch(0, min(GRID, len(self.loader)))), self.folder.path / "real_images.png")
        for event in self.folder.read_events():
            if event["event"] == "warning":
                self.watch.told.add(str(event.get("kind")))
            elif event["event"] == "metrics" and self.evaluator and event.get("protocol") == self._protocol():  # else no comparison
                values = event.get("values")
                value = values.get(self.evaluator.metrics[0]) if isinstance(values, dict) else None
                if isinstance(value, float) and self._improves(value):
                    self.best_images = event["images"]
        if images and self.best_images == images:
            self.folder.keep_best()  # it could have been killed before it was kept
        if self.run.tensorboard:
            self._board = _board(self.folder, images)

    def line(self, line: dict[str, Any]) -> None:
        """Looks at one report."""
        self.images = line["images"]
        self.watch.line(line)
        if self._board:
            for name, value in line.items():
                if name not in ("images", "seconds left"):
                    self._board.add_scalar(name, value, self.images)

    def epoch(self, number: int, images: int, updates: int, sample: Sample) -> bool:
        """Looks at what is generated after epoch ``number``; whether it is the best so far."""
        self.images = images
        grid = sample(self.recipe.training.seed, 0, GRID)
        self.watch.samples(grid, updates)
        is_best = False
        if self.evaluator and number % self.run.evaluate_every == 0:
            is_best = self._spare(lambda: self._evaluate(sample), "evaluating") or False
        if number % self.run.sample_every == 0:
            picture = pictures.grid(grid)
            pictures.save(picture, self.folder.samples / f"epoch_{number}.png")
            if self._board:
                self._board.add_image("samples", np.asarray(picture.convert("RGB")), images, dataformats="HWC")
            if self.loader.random_access:
                self._spare(lambda: self._neighbours(grid[:SHOWN]), "looking for the nearest real images")
            pictures.plot_losses(self.folder.read_log(), self.folder.path / "training_loss.png")
            self._spare(self.write, "writing the report")
        return is_best

    def write(self) -> None:
        """Writes the report as things are now; where that cannot be, it is said, and training goes on."""
        try:
            report.write(self.folder.path)
        except UserError as error:
            self.console.tell(f"No report: {error}")

    def finish(self, sample: Sample) -> None:
        """The last pictures, and the last words."""
        final = self.folder.path / FINAL_PICTURE
        pictures.save(pictures.grid(sample(self.recipe.training.seed, 0, FINAL)), final)
        log = self.folder.read_log()
        pictures.plot_losses(log, self.folder.path / "training_loss.png")
        self.console.stop()
        self.console.tell(f"Final {losses(log[-1] if log else {})}")
        self.console.tell(f"Samples are in {final}, everything else beside them; {self.folder.path / 'report.html'} shows it all.")

    def close(self) -> None:
        """Lets go of what is open."""
        if self._board:
            self._board.close()

    def _evaluate(self, sample: Sample) -> bool:
        assert self.evaluator
        count = self.run.evaluate_samples
        values = self.evaluator(lambda first, n: sample(SEED, first, n), count)
        event = {"event": "metrics", "images": self.images, "values": values, "samples": count}
        self.folder.log(event | {"protocol": self._protocol()})
        self.console.metrics(values)
        if "classes" in values and count >= ENOUGH * self.evaluator.told_apart:
            self.watch.classes(values["classes"], self.evaluator.told_apart, self.images // self.recipe.training.batch_size)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"metrics/{name}", value, self.images)
        return self._improves(values[self.evaluator.metrics[0]])

    def _protocol(self) -> str:
        assert self.evaluator
        return self.evaluator.protocol(self.run.evaluate_samples, "samples")

    def _improves(self, value: float) -> bool:
        assert self.evaluator
        if self.best is not None and not better(self.evaluator.metrics[0], value, self.best):
            return False
        self.best = value
        return True

    def _neighbours(self, samples: Tensor) -> None:
        found = self.watch.neighbours(samples)
        pictures.save(pictures.grid(torch.cat([samples, found]), columns=len(samples)), self.folder.path / "neighbours.png")

    def _warn(self, kind: str, text: str) -> None:
        self.console.tell(f"Warning: {text}")
        self.folder.log({"event": "warning", "images": self.images, "kind": kind, "text": text})

    def _spare(self, look: Callable[[], Any], doing: str) -> Any:
        """What ``look`` gives, or None where memory or disk do not suffice: training goes on."""
        limit.release(self.device)
        try:
            return look()
        except UserError as error:
            self.console.tell(f"While {doing}: {error} Left out this time, training goes on.")
            return None
        except (RuntimeError, MemoryError) as error:
            if not limit.is_out_of_memory(error):
                raise
            self.console.tell(f"Memory ran out while {doing}: left out this time, training goes on.")
            return None


def _board(folder: RunFolder, images: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard: pip install frugan[tensorboard], or leave it out.") from None
    return SummaryWriter(folder.path / "tensorboard", purge_step=images + 1)

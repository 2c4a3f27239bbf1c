"""What looks at a training as it goes and writes down what it sees. Nothing here changes what is trained."""

import torch
from torch import Tensor

from frugan.config.recipe import Recipe
from frugan.config.run import Run
from frugan.data.loader import Loader
from frugan.reporting.album import FINAL, GRID, Album
from frugan.reporting.console import Console, losses
from frugan.reporting.records import Event, Line, Warned
from frugan.reporting.run_folder import RunFolder
from frugan.reporting.trackers import Trackers
from frugan.training.diagnostics import Diagnostics
from frugan.training.evaluating import Evaluating, Sample

ROWS = 16  # classes in pictures of samples


class Bystander:
    """In place of an `Observer`, where another process observes: sees nothing."""

    def needs(self) -> int:
        """Nothing."""
        return 0

    def begin(self, images: int) -> None:
        """Takes up nothing."""

    def line(self, line: Line) -> None:
        """Takes in nothing."""

    def event(self, event: Event) -> None:
        """Takes in nothing."""

    def look(self, epoch: float, images: int, updates: int, sample: Sample, pictures: bool, last: bool) -> bool:
        """Looks at nothing."""
        return False

    def finish(self, sample: Sample) -> None:
        """Nothing is left to be done."""

    def close(self) -> None:
        """Has nothing open."""


class Observer(Bystander):
    """The eyes of one run: what it calls at every report, event and end of an epoch.

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
        UserError: a metric that cannot be had of these images, or here; an unknown tracker.
    """

    def __init__(
        self, recipe: Recipe, run: Run, folder: RunFolder, loader: Loader, name: str, classes: int,
        console: Console, device: torch.device,
    ) -> None:  # fmt: skip
        self.recipe, self.run, self.folder, self.console = recipe, run, folder, console
        self.evaluating = Evaluating.asked(run, loader, name, classes, console, device, recipe)
        self.trackers = Trackers(run, folder, device, console.tell)
        self.diagnostics = Diagnostics(loader, recipe.objective, self._warn)
        self.rows = recipe.classes.present[:ROWS]
        self.album = Album(folder, loader, device, console.tell, len(self.rows))
        self.images = 0

    def needs(self) -> int:
        """Bytes that evaluating takes at most."""
        return self.evaluating.needs() if self.evaluating else 0

    def begin(self, images: int) -> None:
        """Takes up what was seen before; training begins after ``images`` images.

        Raises:
            UserError: a tracker that cannot be had here.
        """
        self.images = images
        if not images:
            self.album.real()
        events = self.folder.read_events()
        self.diagnostics.remember(events)
        best = self.evaluating.remember(events) if self.evaluating else 0
        if images and best == images:
            self.folder.keep_best()  # it could have been killed before it was kept
        self.trackers.open(images)

    def line(self, line: Line) -> None:
        """Takes in one report."""
        self.images = line.images
        self.trackers.line(line)
        self.diagnostics.line(line)

    def event(self, event: Event) -> None:
        """Takes in what happened between two reports."""
        self.trackers.event(event)

    def look(self, epoch: float, images: int, updates: int, sample: Sample, pictures: bool, last: bool) -> bool:
        """Looks at what is generated after ``epoch`` epochs, which may be the ``last`` time; whether it is the best so far."""
        self.images = images
        grid = self._grid(sample, GRID)
        self.diagnostics.samples(grid, updates)
        is_best = False
        if self.evaluating and (self.evaluating.due(epoch) or (last and self.recipe.training.minutes)):
            is_best = self._evaluate(self.evaluating, updates, sample)
        if pictures:
            picture = self.album.samples(grid, epoch if epoch == int(epoch) else float(f"{epoch:.3g}"))
            self.album.neighbours(grid, self.diagnostics.neighbours)
            found = self.album.spared(
                lambda: self.diagnostics.nearness(grid, images), "measuring how near samples are to real images"
            )
            if found:
                self.event(found)
            self.album.losses(self.folder.read_log())
            self.trackers.images("samples", picture, images)
        return is_best

    def finish(self, sample: Sample) -> None:
        """The last pictures, and the last words."""
        self.album.final(self._grid(sample, FINAL))
        log = self.folder.read_log()
        self.album.losses(log)
        self.console.stop()
        measured = {name: value for line in log for name, value in line.measured.items()}  # the last line may be of D alone
        self.console.tell(f"Final {losses(measured)}")
        folder = self.folder
        self.console.tell(f"Samples are in {folder.final_samples}, everything else beside them; {folder.report_file} shows it all.")

    def close(self) -> None:
        """Lets go of what is open; the report says that training has ended."""
        self.trackers.close()

    def _grid(self, sample: Sample, most: int) -> Tensor:
        """At most so many samples, or a row of them for each class."""
        count = max(1, GRID // len(self.rows)) * len(self.rows) if self.rows else most
        return sample(self.recipe.training.seed, 0, count, self.rows)

    def _evaluate(self, evaluating: Evaluating, updates: int, sample: Sample) -> bool:
        found = evaluating.measure(self.images, sample)
        if found is None:
            return False
        self.event(found)
        self.console.metrics(found.values)
        if covered := evaluating.covered(found):
            self.diagnostics.classes(*covered, updates)
        return evaluating.improves(found)

    def _warn(self, kind: str, text: str) -> None:
        self.console.tell(f"Warning: {text}")
        self.event(Warned(images=self.images, kind=kind, text=text))

"""What follows a training and keeps or shows what it is told: ``log.jsonl``, TensorBoard, the report.

Add a tracker by writing its class, with the methods of `Tracker`, and putting it into `TRACKERS`; ``--trackers`` names it.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from frugan.config.run import Run
from frugan.memory.spare import spare
from frugan.reporting import report
from frugan.reporting.records import Event, Line, Metrics
from frugan.reporting.run_folder import RunFolder
from frugan.utils.errors import UserError

Tell = Callable[[str], None]


class Tracker(Protocol):
    """One of them. It changes nothing of what is trained; what it raises but for a lack of memory in `images` ends training."""

    def line(self, line: Line) -> None:
        """Takes in a report."""

    def event(self, event: Event) -> None:
        """Takes in what happened between two reports."""

    def images(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Takes in a picture, ``samples`` after every ``--sample-every`` epochs, once all that belongs to them is written."""

    def close(self) -> None:
        """Training ends here, finished or broken off."""


class Log:
    """Writes records into ``log.jsonl``."""

    def __init__(self, folder: RunFolder, images: int, tell: Tell) -> None:
        self.folder = folder

    def line(self, line: Line) -> None:
        """Adds it."""
        self.folder.log(line)

    def event(self, event: Event) -> None:
        """Adds it."""
        self.folder.log(event)

    def images(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Has no place for pictures."""

    def close(self) -> None:
        """Nothing is open."""


class TensorBoard:
    """Writes curves and samples for TensorBoard.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: RunFolder, images: int, tell: Tell) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs TensorBoard: pip install frugan[tensorboard], or leave it out.") from None
        self._writer: Any = SummaryWriter(folder.tensorboard, purge_step=images + 1)

    def line(self, line: Line) -> None:
        """A point of each curve."""
        for name, value in line.as_dict().items():
            if name not in ("images", "seconds left"):
                self._writer.add_scalar(name, value, line.images)

    def event(self, event: Event) -> None:
        """A point of each metric's curve."""
        if isinstance(event, Metrics):
            for name, value in event.values.items():
                self._writer.add_scalar(f"metrics/{name}", value, event.images)

    def images(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """The picture, in colour."""
        self._writer.add_image(name, np.asarray(picture.convert("RGB")), images_seen, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class Report:
    """Writes ``report.html`` with every picture of samples, and at the end; where that cannot be, it is said."""

    def __init__(self, folder: RunFolder, images: int, tell: Tell) -> None:
        self.folder, self.tell = folder, tell

    def line(self, line: Line) -> None:
        """It stands in ``log.jsonl``."""

    def event(self, event: Event) -> None:
        """It stands in ``log.jsonl``."""

    def images(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Writes the page as things are now; pictures lie in the folder."""
        self._write()

    def close(self) -> None:
        """Writes the page once more: nobody trains any more."""
        self._write(ended=True)

    def _write(self, ended: bool = False) -> None:
        try:
            report.write(self.folder.path, ended=ended)
        except UserError as error:
            self.tell(f"No report: {error}")


# By their names; each is opened with the run folder, the number of images seen before (it may have been told of later ones by a
# training that was broken off), and what tells a notice to the person.
TRACKERS: dict[str, Callable[[RunFolder, int, Tell], Tracker]] = {"log": Log, "tensorboard": TensorBoard, "report": Report}


def chosen(run: Run) -> list[str]:
    """The trackers of a run: the log and the report always, others if asked for.

    Raises:
        UserError: there is none of a name that was asked for.
    """
    asked = [name.strip() for name in (run.trackers or "").split(",") if name.strip()]
    for name in asked:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker {name!r}: choose of {', '.join(TRACKERS)}.")
    asked += ["tensorboard"] if run.tensorboard else []
    return list(dict.fromkeys(["log", *asked, "report"]))  # the report tells what the others have written


class Trackers:
    """Those of one run, told one after another; nobody is told anything before `open`.

    Args:
        run: which are asked for.
        folder: where they write.
        device: where training runs.
        tell: what tells a notice to the person.

    Raises:
        UserError: an unknown one is asked for.
    """

    def __init__(self, run: Run, folder: RunFolder, device: torch.device, tell: Tell) -> None:
        self.names = chosen(run)
        self.folder, self.device, self.tell = folder, device, tell
        self.opened: dict[str, Tracker] = {}
        self._stack = ExitStack()

    def open(self, images: int) -> None:
        """Opens them for a training that begins, or goes on, after ``images`` images.

        Raises:
            UserError: one cannot be opened.
        """
        for name in self.names:
            tracker = TRACKERS[name](self.folder, images, self.tell)
            self._stack.callback(tracker.close)
            self.opened[name] = tracker

    def line(self, line: Line) -> None:
        """Tells them of a report."""
        for tracker in self.opened.values():
            tracker.line(line)

    def event(self, event: Event) -> None:
        """Tells them of an event."""
        for tracker in self.opened.values():
            tracker.event(event)

    def images(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Shows them a picture; one that memory does not suffice for goes without."""
        for what, tracker in self.opened.items():
            spare(partial(tracker.images, name, picture, images_seen), f"writing the {what}", self.device, self.tell)

    def close(self) -> None:
        """Closes them, the last opened first, all of them even if one cannot be."""
        self._stack.close()

"""Ctrl-C and SIGTERM as a wish that the loop looks at between two updates."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from frugan.utils.errors import counted


class Stopped(Exception):
    """Training was asked to stop by a signal (``number``) and has saved its state."""

    def __init__(self, number: int, images: int) -> None:
        super().__init__(f"stopped after {counted(images, 'image')}; the same command goes on from here.")
        self.number = number


class Signals:
    """While open, the first SIGINT or SIGTERM is only noted in ``received``; a second one ends the process at once.

    Outside the main thread, where Python delivers no signals, it does nothing.

    Args:
        quiet: whether nothing is said then.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        if not self.quiet:
            os.write(2, b"\nStopping after this update and saving; once more stops at once.\n")  # print could be in use

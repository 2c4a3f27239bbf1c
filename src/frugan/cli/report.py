"""``frugan report``: the page that shows a run, or several beside one another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from frugan.cli.parsing import Command


@dataclass(kw_only=True)
class Report:
    """Writes the page that shows a run, or several beside one another."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help="run folders")]
    out: Annotated[
        str | None,
        tyro.conf.arg(help="page to write; unset: RUN/report.html, or comparison.html of several", help_behavior_hint=""),
    ] = None


def run(options: Report) -> None:
    """Writes the report of a run, or compares several."""
    from frugan.reporting import report as page

    runs = [Path(run) for run in options.runs]
    if len(runs) == 1:
        print(page.write(runs[0], Path(options.out) if options.out else None))
    else:
        print(page.compare(runs, Path(options.out or "comparison.html")))


COMMAND = Command(lambda _: Report, run)

"""What a person sees: notices, tables, progress. Plain lines when it is not a terminal."""

import atexit
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from math import isnan
from typing import Any

from rich.console import Console as Rich
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Table

from frugan.config.recipe import Data
from frugan.data.inspection import Report
from frugan.evaluation.families import METRICS, shown
from frugan.gan.summary import Row
from frugan.memory.plan import Plan
from frugan.reporting.records import Line, MemoryMeasured
from frugan.utils.errors import counted as counted
from frugan.utils.units import size

MANY = 1000  # images whose packing takes long enough to be announced
SHOWN_EVERY = 0.1  # seconds between two looks at progress on a terminal
PLAIN_EVERY = 30.0  # seconds between two lines of progress where there is no terminal


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def losses(measured: Mapping[str, float]) -> str:
    """What a line of the log has measured, in words."""
    parts = [f"{name} {measured[name]:.3f}" for name in ("Loss_D", "Loss_G", "D(x)") if name in measured]
    if {"D(G(z)) before", "D(G(z)) after"} <= measured.keys():
        parts.append(f"D(G(z)) {measured['D(G(z)) before']:.3f} -> {measured['D(G(z)) after']:.3f}")
    return "  ".join(parts)


def _of(epochs: float | None) -> str:
    return "" if epochs is None else f"/{epochs:.10g}" if epochs == int(epochs) else f"/{_places(epochs, epochs)}"


def _places(epoch: float, epochs: float | None) -> str:
    return f"{epoch:.2f}" if epochs is not None and epochs < 1 else f"{epoch:.1f}"


class Console:
    """Speaks on standard output unless ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.rich = Rich(quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_plain = self._last_shown = 0.0
        self._counted = ""

    def tell(self, text: str) -> None:
        """Prints ``text`` on a line of its own."""
        self.rich.print(text, markup=False)
        self.rich.file.flush()  # into a file too, which is read while training goes on

    def networks(self, summary: Mapping[str, Iterable[Row]]) -> None:
        """Both networks, layer by layer."""
        for network, rows in summary.items():
            rows = list(rows)
            table = Table(title=network, title_justify="left", box=None, pad_edge=False, header_style="bold")
            table.add_column("layer", no_wrap=True)
            table.add_column("kind", no_wrap=True)
            for heading in ("output shape", "parameters", "activations an image"):
                table.add_column(heading, justify="right", no_wrap=True)
            for row in rows:
                shape = " x ".join(map(str, row.shape)) or "1"
                count = f"{row.parameters:,}" if row.parameters else "-"
                table.add_row(row.name, row.kind, shape, count, size(row.activation_bytes) if row.activation_bytes else "-")
            table.add_section()
            table.add_row("total", "", "", f"{sum(r.parameters for r in rows):,}", size(sum(r.activation_bytes for r in rows)))
            self.rich.print(table, soft_wrap=False)
            self.rich.print()

    def plan(self, plan: Plan, batch: int) -> None:
        """How a batch is computed, and what that takes."""
        phases = "; ".join(f"{name}: {layout}" for name, layout in plan.layouts.items())
        self.tell(f"Plan for batches of {batch} ({plan.guarantee}): {phases}.")
        if not plan.phases:
            self.tell("Memory: the device's compiler decides what is held, and nothing is predicted.")
            return
        budget = f" of --memory {size(plan.budget)}" if plan.named else f" of {size(plan.budget)} there are"
        self.tell(
            f"Memory: {size(plan.predicted)} predicted{budget}: framework {size(plan.framework)}, data {size(plan.data)}, "
            f"training {size(plan.held)}."
        )
        if plan.host:
            self.tell(f"Memory of the host besides: {size(plan.host)} predicted.")

    def peak(self, found: MemoryMeasured) -> None:
        """The measured peak beside the predicted one."""
        within = "" if found.budget is None else f", within --memory {size(found.budget)}"
        self.tell(f"Memory: {size(found.measured)} at most, {size(found.predicted)} predicted{within}.")
        if found.host:
            self.tell(f"Memory of the host besides: {size(found.host)} at most, {size(found.host_predicted)} predicted.")

    def bytes(self, plan: Plan) -> None:
        """Where the bytes go, in each moment of a training."""
        table = Table(title="Where the bytes go", title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("", no_wrap=True)
        for moment in plan.phases:
            table.add_column(moment, justify="right", no_wrap=True)
        names = list(dict.fromkeys(name for parts in plan.phases.values() for name in parts))
        for name in names:
            table.add_row(name, *(size(parts[name]) if parts.get(name) else "-" for parts in plan.phases.values()))
        table.add_section()
        table.add_row("training allocates", *(size(sum(parts.values())) for parts in plan.phases.values()))
        self.rich.print(table, soft_wrap=False)
        self.rich.print()
        between = plan.held - plan.allocated
        self.tell(
            f"Process: framework {size(plan.framework)} + data {size(plan.data)} + training {size(plan.allocated)} + "
            f"between tensors {size(between)} = {size(plan.predicted)} predicted."
        )

    def candidates(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """What was looked at, and what is taken."""
        table = Table(title="Candidates", title_justify="left", box=None, pad_edge=False, header_style="bold")
        for heading in ("phase", "layout", "guarantee"):
            table.add_column(heading)
        for heading in ("memory", "arithmetic", "speed"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for row in rows:
            verdict = "taken" if row["taken"] else f"{size(row['too_much'])} too much" if row["too_much"] else "fits"
            table.add_row(
                row["phase"], row["in_words"], row["guarantee"], size(row["holds"]), f"{row['arithmetic']:.2f}x",
                f"{row['speed']:.2f}x", verdict, style="bold" if row["taken"] else None,
            )  # fmt: skip
        self.rich.print(table, soft_wrap=False)
        self.rich.print()

    def scales(self, rows: Sequence[Mapping[str, Any]], link: str | None) -> None:
        """The training in more and more processes, and from how many on exchanging takes longer than computing."""
        title = "In more processes, each like this one"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for heading in ("processes", "images", "memory", "together", "computing", "exchange", "images/s", ""):
            table.add_column(heading, justify="right", no_wrap=True)
        fits = [row for row in rows if row["memory"]]
        for row in rows:
            number, begin = row["processes"], [str(row["processes"]), str(row["images"])]
            if row not in fits:
                table.add_row(*begin, f"needs {size(row['smallest'])}", *["-"] * 5)
                continue
            table.add_row(
                *begin, size(row["memory"]), size(number * row["memory"]), f"{row['computing'] * 1e3:.4g} ms",
                f"{row['exchanging'] * 1e3:.3g} ms" if number > 1 else "-", f"{row['images_per_second']:,.0f}",
                f"{row['images_per_second'] / rows[0]['images_per_second']:.2f}x" if rows[0] in fits else "-",
            )  # fmt: skip
        self.rich.print(table, soft_wrap=False)
        self.rich.print()
        how = (
            "as two processes on this machine do"
            if link is None
            else f"at {link.removesuffix('/s')}/s, without the delay of messages,"
        )
        if longer := [row["processes"] for row in fits if row["exchanging"] > row["computing"]]:
            self.tell(f"From {longer[0]} processes on, exchanging gradients {how} takes longer than computing them.")
        elif fits and (last := fits[-1])["processes"] > 1:
            share = last["exchanging"] / (last["computing"] + last["exchanging"])
            self.tell(f"Exchanging gradients {how} is {share:.1%} of an update in {last['processes']} processes.")

    def found(self, report: Report, problems: Iterable[str], data: Data) -> None:
        """What `frugan data check` found."""
        for problem in problems:
            self.tell(problem)
        for name, why in report.unreadable.items():
            self.tell(f"{name}: {why}.")
        for names in report.duplicates:
            self.tell(f"The same: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}.")
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()

        def most(counter: Counter[Any]) -> str:
            parts = [f"{name} {count:,}" for name, count in counter.most_common(8)]
            return ", ".join(parts) + (f" and {len(counter) - 8} more" if len(counter) > 8 else "")

        sizes = Counter({f"{w}x{h}": count for (w, h), count in report.sizes.items()})
        twice = sum(len(names) - 1 for names in report.duplicates)
        table.add_row("images", f"{report.images:,}")
        table.add_row("unreadable", f"{len(report.unreadable):,}")
        table.add_row("twice or more", f"{twice:,}")
        table.add_row("sizes", most(sizes))
        table.add_row("modes", f"{most(report.modes)}; {report.grey:,} without colour")
        table.add_row("classes", most(report.classes) or "none")
        target = f"{data.image_size}x{data.image_size}, {'grey' if data.channels == 1 else 'colour'}"
        cut = (
            f"the middle square; {report.cropped:.0%} of an image is cut off on average"
            if report.cropped >= 0.005
            else "whole images"
        )
        table.add_row("trained as", f"{target}: {cut}; {report.small:,} are smaller and are enlarged")
        self.rich.print(table, soft_wrap=False)

    def metrics(self, values: Mapping[str, float]) -> None:
        """One line of what was measured while training."""
        self.tell("  ".join(f"{METRICS[name].label} {shown(name, value)}" for name, value in values.items()))

    def evaluated(self, values: Mapping[str, float], unofficial: Container[str]) -> None:
        """What `frugan evaluate` measured; ``unofficial``: on a network of other weights than the published ones."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading, side in (("metric", "left"), ("", "right"), ("better", "left"), ("what it is", "left")):
            table.add_column(heading, justify=side, no_wrap=heading != "what it is")  # type: ignore[arg-type]
        for name, value in values.items():
            metric = METRICS[name]
            label = f"{name}, other weights" if name in unofficial else metric.label
            table.add_row(label, shown(name, value), {True: "higher", False: "lower", None: ""}[metric.higher], metric.means)
        self.rich.print(table, soft_wrap=False)
        self.rich.print()

    def by_class(self, names: Sequence[str], found: Mapping[str, Sequence[float]]) -> None:
        """What `frugan evaluate` measured of each class."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("class")
        for name in found:
            table.add_column(METRICS[name].label, justify="right")
        for number, name in enumerate(names):
            table.add_row(name, *("-" if isnan(v[number]) else shown(key, v[number]) for key, v in found.items()))
        self.rich.print(table, soft_wrap=False)
        self.rich.print()

    def learning(self, done: int, total: int) -> None:
        """Shows how far the classifier is that samples are evaluated by."""
        self._count("Updates of the classifier", done, total)

    def features(self, done: int, total: int, seconds: float) -> None:
        """Shows how far the features are that D is built on: ``seconds`` have passed."""
        if self.rich.is_terminal:
            self._count("Updates of the features", done, total)
        elif done == 1:
            self._last_plain = time.monotonic()
        elif time.monotonic() - self._last_plain >= PLAIN_EVERY:
            self._last_plain = time.monotonic()
            self.tell(f"Features: {seconds:.0f} of {seconds / done * total:.0f} s.")

    def evaluating(self, done: int, total: int) -> None:
        """Shows how many images are evaluated."""
        self._count("Evaluated", done, total)

    def packing(self, done: int, total: int) -> None:
        """Shows how many images are packed."""
        self._count("Packed", done, total)

    def looking(self, done: int, total: int) -> None:
        """Shows how many images are looked at."""
        self._count("Looked at", done, total)

    def _count(self, verb: str, done: int, total: int) -> None:
        if verb != self._counted or done <= 1:
            self._counted, self._last_plain = verb, time.monotonic()
        if self.rich.is_terminal and not self.rich.quiet:
            if self._bar is None:
                self._bar = Progress(TextColumn(verb), *Progress.get_default_columns(), console=self.rich)
                self._task = self._bar.add_task("", total=total)
                self._bar.start()
                atexit.register(self.stop)  # an error or Ctrl-C while packing must not leave the terminal without its cursor
            self._bar.update(self._task, completed=done)
            if done == total:
                self.stop()
                self._counted = ""
        elif total >= MANY and (done == total or time.monotonic() - self._last_plain >= PLAIN_EVERY):
            self._last_plain = time.monotonic()
            self.tell(f"{verb}: {done:,} of {total:,}.")

    def start(self, done: int, total: int | None) -> None:
        """Begins showing progress in images."""
        self._last_plain = time.monotonic()
        if self.rich.is_terminal and not self.rich.quiet:
            columns: list[ProgressColumn] = [
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=12),
                TextColumn("{task.percentage:.0f}%  {task.fields[rate]}  {task.fields[left]}"),
            ]
            if self.rich.width >= 120:  # else they would push the rest together; each epoch's line has them
                columns.append(TextColumn("{task.fields[losses]}"))
            self._bar = Progress(*columns, console=self.rich)
            self._task = self._bar.add_task("", total=total, completed=done, epoch="", rate="", left="", losses="")
            self._bar.start()

    def due(self) -> bool:
        """Whether it is time for `progress` again."""
        since = time.monotonic() - (self._last_plain if self._bar is None else self._last_shown)
        return since >= (PLAIN_EVERY if self._bar is None else SHOWN_EVERY)

    def progress(self, line: Line, total: int | None, epochs: float | None, budget: int | None = None) -> None:
        """Shows how far training is, of how much if that is known, the newest measurements, and what is held of a budget that was
        named."""
        where, measured = f"{_places(line.epoch, epochs)}{_of(epochs)}", losses(line.measured)
        rate, left = f"{line.speed:,.0f} images/s", f"{duration(line.seconds_left)} left"
        if budget:
            rate += f"  {size(line.memory)} of {size(budget)}"
        if self._bar is not None:
            self._last_shown = time.monotonic()
            self._bar.update(self._task, total=total, completed=line.images, epoch=where, rate=rate, left=left, losses=measured)
        elif time.monotonic() - self._last_plain >= PLAIN_EVERY:
            self._last_plain = time.monotonic()
            self.tell(f"epoch {where}  {measured}  {rate}  {left}")

    def epoch(self, line: Line, number: int, epochs: float | None) -> None:
        """One line at the end of an epoch."""
        self._last_plain = time.monotonic()
        self.tell(
            f"epoch {number}{_of(epochs)}  {losses(line.measured)}  {line.speed:,.0f} images/s  {duration(line.seconds_left)} left"
        )

    def stop(self) -> None:
        """Ends the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

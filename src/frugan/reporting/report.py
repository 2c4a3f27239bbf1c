"""The report of a run, and several runs beside one another: pages that need nothing but themselves.

What is told of a run is `frugan.reporting.story`'s, what a page is made of `frugan.reporting.page`'s.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path, PurePath
from typing import Any

from frugan.config import recipes
from frugan.config.recipe import Recipe
from frugan.config.section import flag
from frugan.evaluation.families import METRICS, directed, shown
from frugan.gan.levers import read_layout
from frugan.reporting import page
from frugan.reporting.records import number
from frugan.reporting.story import PENALTY_NAMES, Curve, Measure, Story
from frugan.utils.errors import UserError
from frugan.utils.units import size

GRIDS = 24  # pictures of samples, at most
SHARE = page.PICTURE_BYTES // (GRIDS + 2)  # bytes of each, of real images and of neighbours
COMPARED_POINTS = 150  # of a curve that lies over others: fewer, so that they can be told apart

# Charts: a title, what to know about it, keys of the log with their names, and digits behind the point.
PANELS: tuple[tuple[str, str, Mapping[str, str], int | None], ...] = (
    ("Losses", "Without penalties.", {"Loss_D": "D", "Loss_G": "G"}, 3),
    (
        "What D says of images",
        "The chance that they are real for bce; a number without bounds for other objectives.",
        {"D(x)": "D(x), real", "D(G(z))": "D(G(z)), generated"},
        3,
    ),
    ("Memory", "What the process holds.", {"memory": "held"}, None),
    ("Speed", "On average since training began or went on, without what is looked at and saved.", {"images/s": "images/s"}, 0),
    ("Penalties", "Before their weights.", {name: name for name in PENALTY_NAMES}, None),
    (
        "Augmentation",
        "p is the chance of each operation; ada raises it while r_t, how surely D knows real images, is above its target.",
        {"p": "p", "r_t": "r_t"},
        3,
    ),
    ("Learning rates", "", {"lr_g": "G", "lr_d": "D"}, None),
)
COMPARED = {"Loss_D": "Loss of D", "Loss_G": "Loss of G", "D(x)": "D(x)", "D(G(z))": "D(G(z))"}
GUARANTEES = {
    "bitwise": "the same bits as whole batches",
    "reassociation": "the same sums in another order, equal to rounding",
    "approximate": "not quite the same training as with whole batches in full precision",
}


def write(run: Path, out: Path | None = None, *, ended: bool = False) -> Path:
    """Writes ``report.html`` into the run folder ``run``, or the same page to ``out``, at any time of its training.

    ``ended``: whether nobody trains there any more, although the folder may still be locked.

    Raises:
        UserError: it is no run folder, its recipe or log cannot be read, or the page cannot be written.
    """
    story = Story.read(run, ended)
    return page.save(out or story.folder.report_file, story.name, _report(story))


def compare(runs: Sequence[Path], out: Path) -> Path:
    """Writes a page with ``runs`` beside one another to ``out``.

    Raises:
        UserError: there are none, one is no run folder or cannot be read, or the page cannot be written.
    """
    if not runs:
        raise UserError("there is nothing to compare: name one run folder or more.")
    stories = [Story.read(run) for run in runs]
    names = Counter(story.name for story in stories)
    for story, run in zip(stories, runs, strict=True):
        story.name = str(run) if names[story.name] > 1 else story.name
    return page.save(out, f"{len(runs)} runs compared", _comparison(stories))


# The page of one run


def _report(story: Story) -> Iterator[str]:
    recipe, plan = story.recipe, story.plan
    data = recipe.data
    source = PurePath(data.data).name if PurePath(data.data).is_absolute() else data.data
    kind = f"{data.image_size}x{data.image_size} {'grey' if data.channels == 1 else 'colour'}" if data.image_size else ""
    about = [f"{recipe.recipe} on {source}", kind, f"batches of {recipe.training.batch_size}", recipe.memory.precision]
    about += [f"on {plan['device']}"] if "device" in plan else []
    yield f"<header>\n<h1>{escape(story.name)}</h1>\n<p>{escape(', '.join(filter(None, about)))}</p>\n"
    of = f" of {story.total:,}" if story.total else ""
    of_epochs = f" of {story.epochs:.10g}" if story.epochs == int(story.epochs) else f" of {story.epochs:.3g}"
    yield (
        f'<p class="state"><strong>{escape(story.state)}</strong> {story.images:,}{of} images, '
        f'epoch {story.epoch:.3g}{of_epochs if story.epochs else ""} <span class="note">as of {page.now()}</span></p>\n'
    )
    if story.total and not story.finished:
        yield f'<progress value="{story.images}" max="{story.total}" aria-label="images seen"></progress>\n'
    yield from _glance(story)
    yield "</header>\n<main>\n"
    if story.warnings:
        yield '<section class="warnings" aria-label="Warnings">\n'
        for kind, (text, since, times) in story.warnings.items():
            text = re.sub(r"--[\w-]+", r"<code>\g<0></code>", escape(text))
            when = f"after {since:,.0f} images" + (f", said {times} times" if times > 1 else "")
            yield f'<div><h2>{escape(kind.capitalize())}</h2><p>{text}</p><p class="note">{when}</p></div>\n'
        yield "</section>\n"
    yield from _samples(story)
    yield from _quality([story])
    yield page.charts("Curves", _curves(story), _epoch([story]))
    neighbours = page.image(story.folder.neighbours, "Samples, and below each its nearest real image", SHARE)
    if neighbours:
        yield f"<section>\n<h2>Nearest neighbours</h2>\n<figure>{neighbours}"
        yield "<figcaption>Above samples, below each the real image that is nearest to it.</figcaption></figure>\n</section>\n"
    yield from _settings(recipe)
    yield from _plan(story)
    yield "</main>\n"


def _glance(story: Story) -> Iterator[str]:
    tiles = []
    for key, title in (("Loss_D", "Loss of D"), ("Loss_G", "Loss of G")):
        if key in story.curves and (last := story.curves[key].last) is not None:
            tiles.append((title, f"{last:.4g}", ""))
    for measure in [m for m in _measures([story]) if directed(m[0])][:1]:
        if best := story.metrics[measure].best:
            tiles.append((f"Best {_label(measure)}", _value(measure, best[1]), f"after {best[0]:,.0f} images"))
    if (speed := number(story.last.speed)) is not None:
        looking = number(story.last.looking)
        beside = f", and {looking:.1%} of the time until then for pictures, checkpoints and evaluation" if looking else ""
        tiles.append(("Speed", f"{speed:,.0f}", f"images/s{beside}"))
    if learnt := story.features:
        right = ", ".join(f"{share:.1%} of {task}" for task, share in learnt.accuracy.items()) or learnt.task
        tiles.append(("Features of D", right, f"right after {learnt.updates:,} updates" if learnt.accuracy else ""))
    predicted, budget = number(story.plan.get("predicted")), number(story.plan.get("budget"))
    if story.peak or predicted:
        beside = f"of {size(budget)} budget" if budget and story.plan.get("budget_named") else ""
        beside = beside or (f"{size(predicted)} predicted" if predicted and story.peak else "")
        tiles.append(("Peak memory" if story.peak else "Predicted memory", size(story.peak or predicted or 0), beside))
    if tiles:
        cells = (f"<div><dt>{escape(t)}</dt><dd>{escape(v)} <small>{escape(b)}</small></dd></div>" for t, v, b in tiles)
        yield f'<dl class="glance">{"".join(cells)}</dl>\n'


def _samples(story: Story) -> Iterator[str]:
    grids = story.grids(GRIDS)
    real = page.image(story.folder.real_images, "Grid of real images", SHARE)
    if not (grids or real):
        return
    yield '<section>\n<h2>Samples</h2>\n<div class="pair">\n<figure class="frames">\n'
    for when, path in grids:
        yield page.image(path, f"Grid of samples after {when}", SHARE)
    if grids:
        yield (
            f'<figcaption><label for="frame">Generated, <output for="frame">after {escape(grids[-1][0])}</output></label>'
            '<span class="slider" hidden><button type="button">Play</button>'
            '<input type="range" id="frame" min="0" value="0" step="1"></span></figcaption></figure>\n'
        )
    else:
        yield "<figcaption>No samples yet.</figcaption></figure>\n"
    yield f"<figure>{real}<figcaption>Real</figcaption></figure>\n" if real else ""
    yield "</div>\n</section>\n"


def _settings(recipe: Recipe) -> Iterator[str]:
    helps = {f.name: f.metadata.get("help", "") for s in recipe.sections().values() for f in fields(s)}
    try:
        changed = recipes.get(recipe.recipe).differences(recipe)
    except UserError:
        told, head = "All of them: its recipe is none of the named ones.", ["setting", "here"]
        rows = [page.row(flag(name), [_said(value)], note=helps.get(name, "")) for name, value in recipe.flat().items()]
    else:
        told, head = f"Where they differ from the recipe {recipe.recipe}.", ["setting", "here", "default"]
        rows = [page.row(flag(n), [_said(here), _said(default)], note=helps.get(n, "")) for n, (default, here) in changed.items()]
    yield f'<section>\n<h2>Settings</h2>\n<p class="note">{escape(told)}</p>\n{page.table(head, rows)}</section>\n'


def _plan(story: Story) -> Iterator[str]:
    plan = story.plan
    layouts, phases = plan.get("layouts"), plan.get("phases")
    if not (isinstance(layouts, dict) and isinstance(phases, dict)):
        return
    guarantee = str(plan.get("guarantee", ""))
    yield f"<section>\n<h2>Plan</h2>\n<p>Guarantee: {escape(guarantee)}, {GUARANTEES.get(guarantee, '')}.</p>\n"
    yield page.table(["phase", "how its batch is computed"], [page.row(name, [_layout(layouts[name])]) for name in layouts])
    parts = {key: number(plan.get(key)) or 0 for key in ("framework", "data", "training_holds")}
    yield (
        f"<p>{size(number(plan.get('predicted')) or 0)} predicted: framework {size(parts['framework'])}, "
        f"images {size(parts['data'])}, training {size(parts['training_holds'])}.</p>\n"
    )
    names = list(dict.fromkeys(name for moment in phases.values() for name in moment))
    most = max((sum(moment.values()) for moment in phases.values()), default=0) or 1
    yield '<h3>Where the bytes of training go</h3>\n<p class="legend">'
    yield "".join(f'<span><i style="background:var(--c{i % 8})"></i>{escape(name)}</span> ' for i, name in enumerate(names))
    yield '</p>\n<div class="bars">\n'
    for name, moment in phases.items():
        pieces = (
            f'<i style="width:{100 * moment.get(part, 0) / most:.2f}%;background:var(--c{i % 8})"></i>'
            for i, part in enumerate(names)
        )
        yield f"<span>{escape(name)}</span><span class='bar' aria-hidden='true'>{''.join(pieces)}</span>"
        yield f"<span>{size(sum(moment.values()))}</span>\n"
    rows = [page.row(name, [size(m[name]) if m.get(name) else "-" for m in phases.values()]) for name in names]
    yield f"</div>\n<details><summary>In numbers</summary>{page.table(['', *phases], rows)}</details>\n"
    if story.ran_out:
        more = story.times_ran_out - len(story.ran_out)
        listed = "".join(f"<li>{escape(text)}</li>" for text in story.ran_out) + (f"<li>And {more:,} more.</li>" if more else "")
        yield f"<h3>When memory ran out</h3>\n<ul>{listed}</ul>\n"
    yield "</section>\n"


# The page of several runs


def _comparison(stories: Sequence[Story]) -> Iterator[str]:
    yield f'<header>\n<h1>{len(stories)} runs compared</h1>\n<p class="note">as of {page.now()}</p>\n</header>\n<main>\n'
    yield "<section>\n<h2>Side by side</h2>\n"
    head = "".join(
        f'<th scope="col"><i style="background:var(--c{i % 8})"></i>{escape(story.name)}</th>' for i, story in enumerate(stories)
    )
    yield f'<div class="wide"><table class="sided"><thead><tr><th scope="col">run</th>{head}</tr></thead>\n<tbody>\n'
    flat = [story.recipe.flat() for story in stories]
    for name in dict.fromkeys(name for settings in flat for name in settings):
        said = [_said(settings[name]) if name in settings else "-" for settings in flat]
        if len(set(said)) > 1:
            yield page.row(flag(name), said)
    yield "</tbody>\n<tbody>\n"
    yield page.row("images seen", [f"{s.images:,}" for s in stories])
    yield page.row("guarantee", [str(s.plan.get("guarantee", "-")) for s in stories])
    yield page.row("peak memory", [size(s.peak) if s.peak else "-" for s in stories])
    yield page.row("images/s", [f"{speed:,.0f}" if (speed := number(s.last.speed)) else "-" for s in stories])
    measures = _measures(stories)
    for how in dict.fromkeys(how for _, how in measures):
        yield f'</tbody>\n<tbody>\n<tr><th colspan="{len(stories) + 1}" scope="colgroup"><small>{escape(how)}</small></th></tr>\n'
        for measure in (m for m in measures if m[1] == how):
            curves = [s.metrics.get(measure, Curve()) for s in stories]
            best = [curve.best[1] if curve.best else None for curve in curves]
            there = [value for value in best if value is not None]
            metric = METRICS.get(measure[0])
            if metric is None or metric.higher is not None:
                ahead = (max if metric.higher else min)(there) if metric and len(there) > 1 else math.nan
                yield page.row(f"{_label(measure)}, best", [_value(measure, value) for value in best], [b == ahead for b in best])
            yield page.row(f"{_label(measure)}, last", [_value(measure, curve.last) for curve in curves])
    yield "</tbody></table></div>\n</section>\n"
    yield from _quality(stories)
    yield page.charts("Curves", _compared_curves(stories), _epoch(stories))
    yield '<section>\n<h2>Newest samples</h2>\n<div class="pair">\n'
    for story in stories:
        grids = story.grids(1)
        share = min(2 * SHARE, page.PICTURE_BYTES // len(stories))
        picture = page.image(grids[0][1], f"Grid of samples of {story.name} after {grids[0][0]}", share) if grids else ""
        told = f"{story.name}, {grids[0][0]}" if picture else f"{story.name}: no samples yet"
        yield f"<figure>{picture}<figcaption>{escape(told)}</figcaption></figure>\n"
    yield "</div>\n</section>\n</main>\n"


# Charts


WAYS = {True: "Higher is better; ", False: "Lower is better; ", None: "To be read as: "}


def _quality(stories: Sequence[Story]) -> Iterator[str]:
    """The metrics: what was measured alike is drawn together."""
    measures = _measures(stories)
    for how in dict.fromkeys(how for _, how in measures):
        charts = []
        for measure in (m for m in measures if m[1] == how):
            metric = METRICS.get(measure[0])
            note = f"{WAYS[metric.higher]}{metric.means}." if metric else ""
            curves = {story.name: story.metrics[measure] for story in stories if measure in story.metrics}
            chart = page.chart(_label(measure), note, curves, metric.digits if metric else None, best=directed(measure[0]))
            charts.append(_coloured(chart, stories))
        yield page.charts("Metrics", charts, _epoch(stories), how)


def _curves(story: Story) -> list[dict[str, Any]]:
    charts = []
    for title, note, keys, digits in PANELS:
        curves = {name: story.curves[key] for key, name in keys.items() if key in story.curves}
        if not curves or (title == "Learning rates" and all(len({y for _, y in c.joined()}) == 1 for c in curves.values())):
            continue
        chart = page.chart(title, note, curves, digits)
        if title == "Memory":
            wanted = ("predicted", "budget") if story.plan.get("budget_named") else ("predicted",)
            chart |= {"bytes": True, "lines": {name: v for name in wanted if (v := number(story.plan.get(name)))}}
        charts.append(chart)
    return charts


def _compared_curves(stories: Sequence[Story]) -> list[dict[str, Any]]:
    charts = []
    for key, title in COMPARED.items():
        if curves := {story.name: story.curves[key] for story in stories if key in story.curves}:
            charts.append(_coloured(page.chart(title, "", curves, 3, most=COMPARED_POINTS), stories))
    return charts


def _coloured(chart: dict[str, Any], stories: Sequence[Story]) -> dict[str, Any]:
    """The chart with each run in its own colour, also where others have no curve."""
    names = [story.name for story in stories]
    for series in chart["series"]:
        series["colour"] = names.index(series["name"])
    return chart


def _epoch(stories: Sequence[Story]) -> float | None:
    """Images of an epoch, if it is the same for all."""
    counts = {number(story.plan.get("images")) for story in stories}
    return counts.pop() if len(counts) == 1 else None


def _measures(stories: Iterable[Story]) -> list[Measure]:
    """What was measured in any of them, the most telling metrics first."""
    order = list(METRICS)
    every = dict.fromkeys(measure for story in stories for measure in story.metrics)
    return sorted(every, key=lambda m: (order.index(m[0]) if m[0] in order else len(order), m))


# Words


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "unset" if value is None else str(value)


def _label(measure: Measure) -> str:
    return METRICS[measure[0]].label if measure[0] in METRICS else measure[0]


def _value(measure: Measure, value: float | None) -> str:
    if value is None:
        return "-"
    return shown(measure[0], value) if measure[0] in METRICS else f"{value:.4g}"


def _layout(layout: Any) -> str:
    try:
        return str(read_layout(layout))
    except (TypeError, ValueError, LookupError):
        return "in a way that this version does not know"

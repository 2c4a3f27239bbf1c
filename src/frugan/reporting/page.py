"""Self-contained pages: HTML with its looks, its script, its pictures and its curves inside, written piece by piece."""

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from frugan.reporting.story import POINTS, Curve
from frugan.utils.files import whole

PICTURE_BYTES = 5_500_000  # of all pictures of a page; as text they take a third more
SMALL_FILE = 64 << 10  # bytes up to which a picture is taken as it is
SIDE = 800  # pixels that the side of larger pictures is halved, or divided by three, down to
SHOWN_SIDE = 560  # pixels that small pictures are enlarged up to, by whole factors

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # the network is out of reach
SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
"""


def save(out: Path, title: str, body: Iterable[str]) -> Path:
    """Writes a page with ``body``, which is HTML in pieces; whole or not at all, never holding more than one of them.

    Raises:
        UserError: it cannot be written.
    """
    style, script = (
        resources.files("frugan.reporting").joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    with whole(out) as part, part.open("w", encoding="utf-8", errors="replace") as file:
        file.write(SHELL.format(title=escape(title), style=style, policy=POLICY))
        file.writelines(body)
        file.write(f"<script>\n{script}</script>\n</body>\n</html>\n")
    return out


def charts(heading: str, charts: Sequence[Mapping[str, Any]], epoch: float | None, note: str = "") -> str:
    """A section of charts, drawn by the script from the JSON that stands in it; ``epoch``: images of one, if that is known."""
    data = json.dumps({"charts": charts, "epoch": epoch}, allow_nan=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # so that no name in it ends the script
    return (
        f'<section>\n<h2>{escape(heading)}</h2>\n<p class="note">{escape(note)}</p>\n'
        f'<div class="charts"><script type="application/json">{data}</script></div>\n'
        "<noscript><p>They are drawn by a script, and scripts are switched off here.</p></noscript>\n</section>\n"
    )


def now() -> str:
    """When a page was written."""
    return f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"


def chart(
    title: str, note: str, curves: Mapping[str, Curve], digits: int | None = None, *, best: bool = False, most: int = POINTS
) -> dict[str, Any]:
    """Curves over images seen, as the script takes them.

    Args:
        title: above it.
        note: below the title.
        curves: by their names.
        digits: behind the point of a value, if they are always as many.
        best: whether the best point of each curve is marked.
        most: points of each.
    """
    series = []
    for i, (name, curve) in enumerate(curves.items()):
        points = curve.joined(most)
        marked = points.index(curve.best) if best and curve.best else None
        rounded = [[round(x), None if y is None else float(f"{y:.6g}")] for x, y in points]
        series.append({"name": name, "points": rounded, "colour": i, "best": marked})
    return {"title": title, "note": note, "digits": digits, "series": series}


def table(head: Iterable[str], rows: Iterable[str]) -> str:
    """A table of what `row` gave."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody></table></div>\n'


def row(name: str, cells: Sequence[str], best: Sequence[bool] = (), note: str = "") -> str:
    """A row of texts, some marked as the ``best``, with a ``note`` on what it is about."""
    marked = [*best, *[False] * (len(cells) - len(best))]
    tags = (f"<strong>{escape(c)} <small>best</small></strong>" if b else escape(c) for c, b in zip(cells, marked, strict=True))
    more = f" <small>{escape(note)}</small>" if note else ""
    return f'<tr><th scope="row">{escape(name)}{more}</th>{"".join(f"<td>{tag}</td>" for tag in tags)}</tr>\n'


def image(path: Path, alt: str, most: int) -> str:
    """A picture of ``most`` bytes or fewer; nothing if it is not there or cannot be read."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
        kind, content = _packed(path, path.stat().st_mtime_ns, most)
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    factor = max(1, SHOWN_SIDE // width)
    small = ' class="small"' if max(width, height) < 2 * SHOWN_SIDE else ""
    encoded = base64.b64encode(content).decode()
    size = f'width="{factor * width}" height="{factor * height}"'
    return f'<img{small} {size} alt="{escape(alt)}" src="data:image/{kind};base64,{encoded}">\n'


@lru_cache(maxsize=32)  # the report of a training is written again and again, with mostly the same pictures
def _packed(path: Path, changed: int, most: int) -> tuple[str, bytes]:
    """The PNG at ``path`` as it is, or as WebP if that takes half as much, or if it has more than ``most`` bytes."""
    before = path.stat().st_size
    if before > SMALL_FILE:
        with Image.open(path) as opened:
            picture = (opened if opened.mode in ("L", "RGB") else opened.convert("RGB")).reduce(max(1, max(opened.size) // SIDE))
        file = _webp(picture)
        while len(file) > most and max(picture.size) > 64:
            factor = 0.95 * math.sqrt(most / len(file))
            picture = picture.resize([max(1, int(factor * side)) for side in picture.size], Image.Resampling.BOX)
            file = _webp(picture)
        if 2 * len(file) <= before or before > most:
            return "webp", file
    return "png", path.read_bytes()


def _webp(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "webp", quality=80, method=1)
    return file.getvalue()

"""Pictures of a run: grids of images, strips and loops of interpolations, the loss curves."""

import gc
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from frugan.reporting.records import Line
from frugan.utils.errors import UserError
from frugan.utils.files import whole

GAP = 2  # pixels between the images of a grid
LEAST_SIDE = 64  # pixels that a small image is enlarged to in a grid, so that a person can see it
LARGEST = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # pixels a side that a format can have; others have what is needed


def _sheet(count: int, side: int, columns: int | None, classes: int) -> tuple[int, int, int, int]:
    """Columns, the side of an image, width and height of a `grid` of ``count`` images of ``side`` pixels."""
    columns = -(-count // classes) if classes else columns or math.isqrt(count - 1) + 1
    side *= max(1, LEAST_SIDE // side)
    rows = min(classes, count) or -(-count // columns)
    return columns, side, columns * (side + GAP) + GAP, rows * (side + GAP) + GAP


def check_fits(path: Path, count: int, side: int, columns: int | None = None, *, classes: int = 0) -> None:
    """The format of ``path`` must have room for a `grid` of ``count`` images of ``side`` pixels.

    Raises:
        UserError: it has not.
    """
    _, _, width, height = _sheet(max(1, count), side, columns, classes)
    if max(width, height) > (most := LARGEST.get(path.suffix.lower(), sys.maxsize)):
        raise UserError(
            f"{path} would have {width:,}x{height:,} pixels, and {path.suffix} has at most {most:,} a side: write a .png, or ask "
            "for fewer images."
        )


def grid(images: Tensor, columns: int | None = None, *, classes: int = 0) -> Image.Image:
    """uint8 images ``[n, c, h, w]`` side by side, ``columns`` to a row (default: as square as it gets), small ones enlarged.

    Where images are of so many ``classes`` in turn, each class has a row of its own.
    """
    images = images.cpu()  # at once, wherever they are
    columns, side, width, height = _sheet(len(images), images.shape[-1], columns, classes)
    sheet = Image.new("L" if images.shape[1] == 1 else "RGB", (width, height), "white")
    for i, image in enumerate(images):  # torchvision's make_grid would do, but importing it takes 160 MiB
        row, column = (i % classes, i // classes) if classes else divmod(i, columns)
        picture = single(image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (GAP + column * (side + GAP), GAP + row * (side + GAP)))
    return sheet


def single(image: Tensor) -> Image.Image:
    """One uint8 image ``[c, h, w]``, as large as it is."""
    pixels = image.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels)


def save(picture: Image.Image, path: Path) -> None:
    """Writes a picture, whole or not at all."""
    with whole(path) as part:
        picture.save(part)


def save_loop(images: Tensor, path: Path, milliseconds: int = 60) -> None:
    """Writes uint8 images ``[n, c, h, w]`` as an animated GIF that runs there and back."""
    frames = [grid(image[None]) for image in torch.cat([images, images.flip(0)[1:-1]])]
    with whole(path) as part:
        frames[0].save(part, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def _figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Any:
    from matplotlib.figure import Figure  # half a second; and without pyplot, which would keep every figure alive

    return Figure(figsize=(width, height), layout=layout)


def plot_memory(phases: Mapping[str, Sequence[Mapping[str, int]]], path: Path, title: str) -> None:
    """Draws what is live during one update, event by event, by what it is for; ``phases`` follow one another."""
    names = list(dict.fromkeys(name for course in phases.values() for now in course for name in now))
    figure = _figure(10, 4.5, "constrained")
    axes = figure.subplots()
    whole_course = [now for course in phases.values() for now in course]
    values = np.array([[now.get(name, 0) for now in whole_course] for name in names]) / 2**20
    axes.stackplot(np.arange(len(whole_course)), values, labels=names, step="post", linewidth=0)
    begin = 0
    for name, course in phases.items():
        axes.axvline(begin, color="black", linewidth=0.6)
        axes.text(begin + len(whole_course) / 200, values.sum(0).max() * 1.02, name)
        begin += len(course)
    axes.set_xlim(0, len(whole_course))
    axes.set_xlabel("operators of one update, in order")
    axes.set_ylabel("MiB that training has allocated")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    with whole(path) as part:
        figure.savefig(part, dpi=120)
    del figure, axes
    gc.collect()


@cache
def warm_up() -> None:
    """Draws once for nobody, so that all that drawing loads is there before the memory for it is counted."""
    with tempfile.TemporaryDirectory() as folder:
        plot_losses([Line(images=1, measured={"Loss_D": 1.0})], Path(folder) / "nothing.png")


def plot_losses(lines: Sequence[Line], path: Path) -> None:
    """Draws Loss_D, Loss_G and D's opinions over the images seen."""
    figure = _figure(9, 6)
    margins = {"left": 0.1, "right": 0.98, "bottom": 0.09, "top": 0.95, "hspace": 0.12}  # to find these would draw all of it twice
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw=margins)
    for axes, names in ((above, ("Loss_D", "Loss_G")), (below, ("D(x)", "D(G(z))"))):
        for name in names:
            points = [(line.images, line.measured[name]) for line in lines if name in line.measured]
            axes.plot(*np.array(points).reshape(-1, 2).T, label=name, linewidth=1)
        axes.legend(loc="upper right")
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))  # a critic's numbers can be large, and the margin is not
    above.set_ylabel("loss")
    below.set_ylabel("discriminator's output")
    below.set_xlabel("images seen")
    with whole(path) as part:
        figure.savefig(part, dpi=120, pil_kwargs={"compress_level": 2})
    del figure, above, below, axes
    gc.collect()  # a figure's parts refer to one another: left alone, many of them gather before Python looks for such

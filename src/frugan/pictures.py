"""Pictures of a run: grids of images, strips and loops of interpolations, the loss curves."""

import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure  # without pyplot, which would keep every figure alive
from PIL import Image
from torch import Tensor

from frugan.files import whole

GAP = 2  # pixels between the images of a grid
LEAST_SIDE = 64  # pixels that a small image is enlarged to in a grid, so that a person can see it


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """uint8 images ``[n, c, h, w]`` side by side, ``columns`` to a row (default: as square as it gets), small ones enlarged."""
    factor = max(1, LEAST_SIDE // images.shape[-1])
    columns = columns or math.isqrt(len(images) - 1) + 1
    side = images.shape[-1] * factor
    rows = -(-len(images) // columns)
    sheet = Image.new("L" if images.shape[1] == 1 else "RGB", (columns * (side + GAP) + GAP, rows * (side + GAP) + GAP), "white")
    for i, image in enumerate(images):  # torchvision's make_grid would do, but importing it takes 160 MiB
        row, column = divmod(i, columns)
        picture = single(image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (GAP + column * (side + GAP), GAP + row * (side + GAP)))
    return sheet


def single(image: Tensor) -> Image.Image:
    """One uint8 image ``[c, h, w]``, as large as it is."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def save(picture: Image.Image, path: Path) -> None:
    """Writes a picture, whole or not at all."""
    with whole(path) as part:
        picture.save(part)


def save_loop(images: Tensor, path: Path, milliseconds: int = 60) -> None:
    """Writes uint8 images ``[n, c, h, w]`` as an animated GIF that runs there and back."""
    frames = [grid(image[None]) for image in torch.cat([images, images.flip(0)[1:-1]])]
    with whole(path) as part:
        frames[0].save(part, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def plot_losses(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws Loss_D, Loss_G and D's opinions over the images seen."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, names in ((above, ("Loss_D", "Loss_G")), (below, ("D(x)", "D(G(z))"))):
        for name in names:
            points = [(line["images"], line[name]) for line in lines if name in line]
            axes.plot(*np.array(points).reshape(-1, 2).T, label=name, linewidth=1)
        axes.legend(loc="upper right")
        axes.grid(alpha=0.3)
    above.set_ylabel("loss")
    below.set_ylabel("discriminator's output")
    below.set_xlabel("images seen")
    with whole(path) as part:
        figure.savefig(part, dpi=120)
    del figure, above, below, axes
    gc.collect()  # a figure's parts refer to one another: left alone, many of them gather before Python looks for such

"""Stacked MNIST: does a generator find all of 1,000 modes? Three digits (or garments) in three channels, as in R3GAN's Table 3.

    python benchmarks/modes.py --data ../shared/data/fashion-mnist --minutes 12 --train recipe=dcgan "recipe=r3 batch-size=64"

Each image is three of the training images of an IDX folder, drawn independently, one a channel. They are packed once, and each
``--train`` trains on them for so many minutes, unless it has. Nothing knows the modes, as in the papers, unless ``--labels`` gives
each image the number of its own: then `projected` learns its features from them, as with any labelled set, while G and D still
train without classes. A classifier of single channels, trained on nine tenths of the same images, tells the mode of each of 25,600
samples. A mode is covered by one sample. KL is the reverse one of the papers, of the samples' modes from the real ones', in nats:
from what the classifier says of real images (the channels are independent, so that its shares of single images say all), and from
an even spread. ``real`` are as many other real images: what so few samples can have.
"""

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from unseen import by_class, learnt, say

import frugan
from frugan.config.recipe import Data
from frugan.data.opening import open_loader, resolve
from frugan.data.packing import make
from frugan.data.sources import open_source
from frugan.data.sources.base import ArraySource, Source, plain
from frugan.utils.draws import derive

CLASSES = 10
MODES = CLASSES**3
PLACES = np.array([CLASSES**2, CLASSES, 1])  # of the channels' classes in a mode's number


@dataclass
class Options:
    data: str = "../shared/data/fashion-mnist"  # a folder of IDX files with ten classes, mnist, or digits
    train: tuple[str, ...] = ("recipe=dcgan",)  # flags of frugan train without their dashes, once for each training
    minutes: float = 12
    images: int = 60_000  # to train on
    labels: bool = False  # each image has its mode as label, which features can be learnt from
    samples: int = 25_600
    out: Path = Path("runs/modes")


class Stacked(Source):
    """Images of three channels, each an image of ``base`` of its own."""

    def __init__(self, base: ArraySource, images: int, seed: int, labelled: bool = False) -> None:
        self.name, self.size, self.grey = f"stacked-{base.name}", base.size, False
        self.place, self.stamp = self.name, f"{base.stamp}/{images}/{seed}"
        self._base = base.images
        self._chosen = np.random.default_rng(derive(seed, "stacked")).integers(len(base), size=(images, 3))
        if labelled:
            assert base.labels is not None
            self.labels = base.labels[self._chosen] @ PLACES
            self.classes = [f"{mode:03}" for mode in range(MODES)]

    def __len__(self) -> int:
        return len(self._chosen)

    def where(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def stacked(self, index: int | slice) -> NDArray[np.uint8]:
        return self._base[self._chosen[index]]

    def pixels(self, index: int, size: int, channels: int, background: tuple[int, int, int]) -> tuple[NDArray[np.uint8], bool]:
        return self.stacked(index), False

    def open(self, index: int, at_least: int) -> Image.Image:
        return Image.fromarray(self.stacked(index).transpose(1, 2, 0))


class Modes:
    """Tells modes apart, and counts them.

    Attributes:
        accuracy: share of single images that the classifier was not trained on whose class it tells.
    """

    def __init__(self, options: Options) -> None:
        asked = Data(data=options.data)
        source = open_source(asked)
        data = open_loader(source, resolve(source, asked, say), seed=0, workers=2, tell=say)
        some = 9 * len(data) // 10
        self.classifier = learnt(f"modes/{data.fingerprint}", by_class(data), some, CLASSES)
        images, labels = by_class(data)(some, len(data) - some)
        self.accuracy = float((self.classifier.look(images)[1] == labels).double().mean())
        said = self.classifier.look(data.batch(0, len(data)))[1]
        single = torch.bincount(said, minlength=CLASSES).double() / len(said)
        self.real = torch.einsum("a,b,c->abc", single, single, single).flatten()

    def __call__(self, images: Tensor) -> tuple[int, float, float]:
        """How many modes images, uint8 ``[n, 3, h, w]``, cover, and the KL of theirs from real ones and from an even spread."""
        classes = torch.stack([self.classifier.look(images[:, [c]])[1] for c in range(3)], 1)
        counts = torch.bincount(classes @ torch.from_numpy(PLACES), minlength=MODES).double()
        p = counts / counts.sum()
        from_real = (torch.special.xlogy(p, p) - torch.special.xlogy(p, self.real)).sum()
        return int((counts > 0).sum()), float(from_real), float(torch.special.xlogy(p, p).sum() + math.log(MODES))


def main(options: Options) -> None:
    base = open_source(Data(data=options.data))
    assert isinstance(base, ArraySource)
    source = Stacked(base, options.images, 0, options.labels)
    known = "-labelled" if options.labels else ""
    pack = options.out / f"{source.name}-{options.images}{known}"
    if not pack.exists():
        wanted = resolve(source, Data(data=str(pack)), say)
        make(source, wanted, pack, workers=2, tell=say)
    modes = Modes(options)
    table = Table(title=f"{options.samples:,} samples, {source.name}, {options.images:,} images to train on{known}")
    for heading in ("", "minutes", "images seen", "modes of 1,000", "KL from real", "KL from even"):
        table.add_column(heading, justify="right" if heading else "left")

    def row(name: str, images: Tensor, *more: str) -> None:
        covered, real, even = modes(images)
        say(f"{name}: {covered} modes, KL {real:.4f} from real, {even:.4f} from even")
        table.add_row(name, *more, f"{covered:,}", f"{real:.4f}", f"{even:.4f}")

    row("real", torch.from_numpy(Stacked(base, options.samples, 1).stacked(slice(None))), "", "")
    for flags in options.train:
        run = options.out / f"{plain(flags)}-{options.minutes:g}min{known}"
        said = [str(pack), *(f"--{flag}" for flag in flags.split()), f"--minutes={options.minutes}", f"--out={run}"]
        subprocess.run([sys.executable, "-m", "frugan", "train", *said], check=True, stdout=sys.stderr)
        generator = frugan.load(run)
        row(flags, generator.generate(options.samples), f"{options.minutes:g}", f"{generator.images_seen:,}")
    Console(width=120).print(table)
    print(
        f"A classifier of single channels, {modes.accuracy:.1%} right about images that it was not trained on, tells modes apart."
    )


if __name__ == "__main__":
    main(tyro.cli(Options))

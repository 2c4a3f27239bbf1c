"""How good are trained generators by a network that no part of training or of ``frugan evaluate`` has seen?

    python benchmarks/unseen.py RUN RUN ... [--data ../shared/data/fashion-mnist]

A residual network with batch norm is trained on the test images by their classes; where there is no such part, on two fifths of the
images in another order than training's, and where there are no classes, by how images are turned. It is kept in the cache. Its
features, averages over positions after the last batch norm, are compared between samples and as many real images that it was not
trained on; ``real`` compares other real images with these. The other columns are those of ``frugan evaluate``.

RUN is a run folder, a ``generator.safetensors``, a checkpoint, or images, of what today's frugan cannot load: a folder, an archive,
a ``.npy`` of uint8 ``[n, c, h, w]``, or an ``.npz`` of such ``images`` and the ``labels`` that were asked for.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu

from frugan.config.recipe import Data
from frugan.data.loader import Loader
from frugan.data.opening import open_loader, opened
from frugan.data.sources import open_source
from frugan.evaluation.distances import Moments, frechet, precision_recall
from frugan.evaluation.evaluator import SEED, Evaluator
from frugan.evaluation.families import METRICS, shown
from frugan.evaluation.families.base import Options
from frugan.gan import sampling
from frugan.reporting.run_folder import load_generator
from frugan.utils import checkpoint
from frugan.utils.draws import derive
from frugan.utils.errors import UserError
from frugan.utils.files import cache_folder, write_text

VERSION = 1  # of the network and of its training
WIDTHS = (24, 48, 96)  # of its stages; the last is that of the features
BATCH = 64
EPOCHS, UPDATES = 30, 1200  # at most
RATE = 2e-3
SHIFT = 2  # pixels by which batches are moved, at most
PIECE = 250  # images looked at at once
APART = 1  # seed of the order in which images are shared out
OWN = ("frechet_classifier", "precision_classifier", "recall_classifier", "swd")  # of `frugan evaluate`

Labelled = Callable[[int, int], tuple[Tensor, Tensor]]  # (first, count) to uint8 images [count, c, h, w] and classes [count]


class Block(nn.Module):
    """Two convolutions beside a shortcut, batch norm before each (He et al. 2016): ``[n, narrow, h, w]`` to half the side."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(narrow), nn.BatchNorm2d(wide)
        self.down = nn.Conv2d(narrow, wide, 3, 2, 1, bias=False)
        self.flat = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(narrow, wide, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        active = relu(self.first(x))
        found: Tensor = self.flat(relu(self.second(self.down(active)))) + self.shortcut(active)
        return found


class Network(nn.Module):
    """uint8 images ``[n, channels, size, size]`` to features ``[n, WIDTHS[-1]]`` of both signs; `head` maps these to logits."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        stride = 2 if size > 32 else 1
        self.body = nn.Sequential(
            nn.Conv2d(channels, WIDTHS[0], 3, stride, 1, bias=False),
            *(Block(narrow, wide) for narrow, wide in pairwise(WIDTHS)), nn.BatchNorm2d(WIDTHS[-1]),
        )  # fmt: skip
        self.head = nn.Linear(WIDTHS[-1], classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """As the class says."""
        x = images.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.body(x).mean((2, 3))
        return features

    @torch.inference_mode()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[n, WIDTHS[-1]]`` and classes int64 ``[n]`` of any number of images."""
        pieces = [self(piece) for piece in torch.split(images, PIECE)]
        return torch.cat(pieces), torch.cat([self.head(piece).argmax(1) for piece in pieces])


def learnt(name: str, batch: Labelled, images: int, classes: int) -> Network:
    """The network that tells apart the classes of ``batch``, which has ``images``: from the cache by ``name``, or trained."""
    example, _ = batch(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(APART, "unseen"))
        network = Network(example.shape[1], example.shape[2], classes)
    updates = min(UPDATES, EPOCHS * images // BATCH)
    about = "/".join(map(str, (VERSION, name, images, classes, *example.shape, *[updates] * (updates < UPDATES))))
    file = cache_folder() / "unseen" / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.safetensors"
    try:
        network.load_state_dict(checkpoint.load(file)[0])
        return network.eval()
    except (UserError, RuntimeError):  # not there yet, or damaged
        pass
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    where = torch.Generator().manual_seed(APART)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = RATE * min(1, 10 * (update + 1) / updates) * (1 - update / updates)
        pixels, labels = batch(update * BATCH % (images - BATCH + 1), BATCH)
        y, x = torch.randint(2 * SHIFT + 1, (2,), generator=where).tolist()
        moved = pad(pixels.float(), (SHIFT,) * 4, "replicate")[:, :, y : y + pixels.shape[2], x : x + pixels.shape[3]]
        loss = cross_entropy(network.head(network(moved)), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (update + 1) % 100 == 0:
            print(f"the unseen network: {update + 1} of {updates} updates, loss {float(loss.detach()):.3f}", file=sys.stderr)
    checkpoint.save(file, network.state_dict(), {})
    return network.eval()


def by_class(data: Loader) -> Labelled:
    """Images of ``data`` with their classes."""

    def batch(first: int, count: int) -> tuple[Tensor, Tensor]:
        labels = data.labels(first, count)
        assert labels is not None
        return data.batch(first, count), labels

    return batch


def turned(data: Loader) -> Labelled:
    """Images of ``data``, each by 0 to 3 right angles, and by how many."""

    def batch(first: int, count: int) -> tuple[Tensor, Tensor]:
        turns = torch.arange(first, first + count) % 4
        images = data.batch(first, count)
        return torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(images, turns, strict=True)]), turns

    return batch


class Judge:
    """Compares images with the real ones of a data set, by the unseen network and as ``frugan evaluate`` does.

    Args:
        data: the images, resolved.
        samples: how many are compared at most.

    Attributes:
        samples: how many are compared by the metrics of ``frugan evaluate``.
        network: the unseen one.
        told: share of images that it was not trained on whose class it tells.
    """

    def __init__(self, data: Data, samples: int) -> None:
        source, data = opened(data, say)
        whole = _loader(data)
        self.samples = min(samples, len(whole))
        self.evaluator = Evaluator(
            whole, source.name, len(source.classes), Options(reals=self.samples), torch.device("cpu"), say
        )  # fmt: skip
        held_out = _test(data, whole.fingerprint)
        if held_out is None:
            shared = whole.reordered(APART)
            learning, first = shared, 2 * len(whole) // 5
        else:
            shared, learning, first = whole.reordered(SEED), held_out, 0  # real images as `frugan evaluate` has them
        self.apart = held_out is not None
        some = min(samples, (len(shared) - first) // 2)  # twice
        count = len(held_out) if held_out is not None else first
        labelled = len(source.classes) > 1 and learning.labels(0, 1) is not None
        classes = len(source.classes) if labelled else 4
        batch, kind = (by_class(learning), "classes") if labelled else (turned(learning), "turns")
        self.network = learnt(f"{kind}/{learning.fingerprint}", batch, count, classes)
        images, labels = (by_class if labelled else turned)(shared)(first, min(some, 2000))
        self.told = float((self.network.look(images)[1] == labels).double().mean())
        self.real = self.network.look(shared.batch(first, some))[0]
        self.others = shared.batch(first + some, some)
        about = f"{VERSION}/{kind}/{learning.fingerprint}/{whole.fingerprint}/{some}/{self.samples}/{self.told}"
        self.file = cache_folder() / "unseen" / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.json"
        self.words = f"{some:,} samples against {some:,} real images, by a network told {kind}, {self.told:.1%} right; the others: "
        self.words += self.evaluator.protocol(self.samples, "samples")

    def __call__(self, images: Tensor, asked: Tensor | None = None) -> dict[str, float]:
        """What is found of ``images``, uint8 ``[n, c, h, w]``; with the classes ``asked`` for, int64 ``[n]``, if that was done."""
        own = self.evaluator(lambda first, n: images[first : first + n], min(self.samples, len(images)))
        return self.unseen(images, asked) | own

    def reals(self) -> dict[str, float]:
        """What is found of other real images, from the cache; of `frugan evaluate` only where it has not seen them."""
        with suppress(OSError, ValueError):
            return dict(json.loads(self.file.read_text()))
        values = self(self.others) if self.apart else self.unseen(self.others)
        write_text(self.file, json.dumps(values))
        return values

    def unseen(self, images: Tensor, asked: Tensor | None = None) -> dict[str, float]:
        """What the unseen network says."""
        features, classes = self.network.look(images)
        ours, theirs = Moments(), Moments()
        some = features[: len(self.real)]
        real = self.real[: len(some)]
        ours.add(some)
        theirs.add(real)
        values = {"unseen": frechet(theirs, ours)}
        values |= zip(("unseen precision", "unseen recall"), precision_recall(real, some), strict=True)
        if asked is not None:
            values["accuracy"] = float((classes == asked).double().mean())
        return values


def _loader(data: Data) -> Loader:
    return open_loader(open_source(data), data, seed=SEED, workers=2, tell=say)


def _test(data: Data, fingerprint: str) -> Loader | None:
    """The test images, where there are others than those to train on."""
    try:
        found = _loader(replace(data, split="test"))
    except UserError:
        return None
    return None if found.fingerprint == fingerprint else found


def say(text: str) -> None:
    """On the standard error, so that a table can be kept."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Samples:
    """What is compared: uint8 images ``[n, c, h, w]``, the classes that were asked for, how long it was trained, and on what."""

    images: Callable[[int], tuple[Tensor, Tensor | None]]
    seen: int
    data: Data


def samples_of(run: str, data: str | None, truncation: float = 1.0) -> Samples:
    """The samples that ``run`` names; of generators by ``truncation``.

    Raises:
        UserError: there are none.
    """
    path = Path(run)
    if path.suffix in (".npy", ".npz"):
        found = np.load(path)
        images, labels = (found, None) if path.suffix == ".npy" else (found["images"], found.get("labels"))
        asked = Data(data=data or "digits", image_size=images.shape[2], channels=images.shape[1])
        which = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        return Samples(
            lambda n: (torch.from_numpy(images[:n].astype(np.uint8)), None if which is None else which[:n]), 0, asked
        )  # fmt: skip
    if path.suffix == ".safetensors" or (path / "recipe.toml").exists():
        generator = load_generator(path)
        own = replace(generator.recipe.data, stream=False)
        own = replace(own, data=data) if data else own

        def made_and_asked(n: int) -> tuple[Tensor, Tensor | None]:
            asked = sampling.natural(generator.recipe, SEED, 0, n) if generator.recipe.classes else None
            return generator.generate(n, seed=SEED, truncation=truncation), asked

        return Samples(made_and_asked, generator.images_seen, own)
    _, like = opened(Data(data=data or run), say)
    made = _loader(replace(like, data=run))
    return Samples(lambda n: (made.batch(0, min(n, len(made))), None), 0, like)


@dataclass
class Arguments:
    """What is compared."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    data: str | None = None  # the real images; unset: those that a run was trained on
    samples: int = 10_000
    truncation: float = 1.0  # of generators


COLUMNS = ("unseen", "unseen precision", "unseen recall", "accuracy", *OWN)


def words(values: dict[str, float], name: str) -> str:
    """``values[name]`` as a table shows it."""
    if name not in values:
        return "-"
    return shown(name, values[name]) if name in METRICS else f"{values[name]:.3f}"


def main(arguments: Arguments) -> None:
    """Prints one table for each kind of images."""
    judges: dict[Data, Judge] = {}
    tables: dict[Data, Table] = {}
    for run in arguments.runs:
        found = samples_of(run, arguments.data, arguments.truncation)
        data = found.data
        if data not in judges:
            judge = judges[data] = Judge(data, arguments.samples)
            table = tables[data] = Table(title=f"{data.data}, {'x'.join(map(str, data.shape))}")
            for heading in ("", *COLUMNS, "images seen"):
                table.add_column(heading.removesuffix("_classifier"), justify="right" if heading else "left")
            values = judge.reals()
            table.add_row("real", *(words(values, name) for name in COLUMNS), "")
        judge = judges[data]
        values = judge(*found.images(max(judge.samples, len(judge.real))))
        say(f"{run}: {values}")
        tables[data].add_row(run, *(words(values, name) for name in COLUMNS), f"{found.seen:,}" if found.seen else "-")
    for data, table in tables.items():
        Console(width=180).print(table)
        print(judges[data].words)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except UserError as error:
        sys.exit(f"unseen.py: {error}")

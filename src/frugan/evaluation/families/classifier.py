"""A small classifier of the images at hand: its features tell two sets of them apart where Inception's weights cannot be had.

It is trained once for each set of images, in a minute or less, and kept in the cache. Numbers that are taken from it compare
generators of the same images, and nothing else: they are never called FID.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from frugan.evaluation.distances import Moments, class_coverage, frechet
from frugan.evaluation.families.base import Metric, Options, Task, folder
from frugan.evaluation.families.vectors import BLOCK, VectorFamily, Vectors
from frugan.evaluation.features import Features
from frugan.gan.optim import FrugalAdam
from frugan.utils import checkpoint
from frugan.utils.draws import derive
from frugan.utils.errors import UserError
from frugan.utils.files import cache_folder, cached

VERSION = 1  # of the network and of its training
SIDE = 32  # pixels that images are brought to
PIECE = 1 << 20  # numbers of images that are brought to it at once
FEATURES = 128
BATCH = 64
UPDATES = 800  # at most
EPOCHS = 20  # at most
HELD_OUT = 1000  # images, or a tenth, on which it is examined
RATE = 2e-3


class Labelled(Protocol):
    """Images in an endless random order, with their classes; `frugan.data.loader.Loader` is one."""

    fingerprint: str

    def __len__(self) -> int: ...

    def batch(self, first: int, count: int) -> Tensor:
        """uint8 ``[count, c, h, w]``."""

    def labels(self, first: int, count: int) -> Tensor | None:
        """int64 ``[count]``."""


class Network(nn.Module):
    """uint8 images ``[n, channels, h, w]`` to features ``[n, FEATURES]``; `head` maps these to logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 4, 2, 1), nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 4, 2, 1), nn.GroupNorm(8, 64), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(64 * (SIDE // 4) ** 2, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        """As the class says."""
        size = max(1, PIECE // images[0].numel())
        features: Tensor = self.body(torch.cat([_small(piece) for piece in torch.split(images, size)]))
        return features


def _small(images: Tensor) -> Tensor:
    x = images.cpu().float().div_(127.5).sub_(1)
    return x if x.shape[-1] == SIDE else nn.functional.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)


@dataclass(frozen=True)
class Classifier:
    """A trained network, and the share of held-out images whose class it tells."""

    network: Network
    accuracy: float

    @property
    def fingerprint(self) -> str:
        """Of its weights, hexadecimal."""
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in self.network.state_dict().values())).hexdigest()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of images, uint8 ``[n, c, h, w]``, the features, float32 ``[n, FEATURES]``, and the classes, int64 ``[n]``."""
        features = self.network(images)
        return features, self.network.head(features).argmax(1)


def classifier(data: Labelled, classes: int, *, progress: Callable[[int, int], None] | None = None) -> Classifier:
    """The classifier of ``data``, from the cache, or trained now.

    Args:
        data: images with labels.
        classes: how many there are.
        progress: is called with the updates done, and of how many.

    Raises:
        UserError: there are no labels, or one class only.
    """
    if classes < 2 or data.labels(0, 1) is None:
        raise UserError("a classifier needs images of at least two classes: one folder a class, or labels.")
    channels = data.batch(0, 1).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(0, "classifier"))
        network = Network(channels, classes)
    about = [str(VERSION), str(classes), data.fingerprint, _digest(data)]
    name = hashlib.sha256("/".join(about).encode()).hexdigest()[:24]
    file = cache_folder() / "classifiers" / f"{name}.safetensors"
    try:
        tensors, state = checkpoint.load(cached(file))
        network.load_state_dict(tensors)
        return Classifier(network.eval(), float(state["accuracy"]))
    except (UserError, RuntimeError, KeyError):  # not there yet, or damaged
        pass
    accuracy = _train(network, data, progress or (lambda done, of: None))
    try:
        checkpoint.save(file, network.state_dict(), {"accuracy": accuracy})
    except UserError:
        pass  # the next time trains it again
    return Classifier(network.eval(), accuracy)


def _digest(data: Labelled) -> str:
    labels = data.labels(0, min(len(data), 10_000))
    assert labels is not None
    return hashlib.sha256(labels.numpy().tobytes()).hexdigest()


def _train(network: Network, data: Labelled, progress: Callable[[int, int], None]) -> float:
    """Trains on all images of an epoch but the first few, on which it is then examined: the share it gets right."""
    held_out = min(HELD_OUT, len(data) // 10)
    learnt = len(data) - held_out
    updates = max(1, min(UPDATES, EPOCHS * learnt // BATCH))
    optimizer = FrugalAdam(network.parameters(), RATE, (0.9, 0.999))
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = RATE * (1 - update / updates)
        images, classes = _batch(data, held_out, learnt, update)
        loss = nn.functional.cross_entropy(network.head(network(images)), classes)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress(update + 1, updates)
    trained = Classifier(network.eval(), 0.0)
    right = 0
    for first in range(0, held_out, BATCH):
        count = min(BATCH, held_out - first)
        labels = data.labels(first, count)
        assert labels is not None
        right += int((trained(data.batch(first, count))[1] == labels).sum())
    return right / held_out if held_out else 0.0


def _batch(data: Labelled, held_out: int, learnt: int, update: int) -> tuple[Tensor, Tensor]:
    """Batch ``update`` of the images after the first ``held_out``, over and over in the order of the first epoch."""
    count = min(BATCH, learnt)
    first = update * count % (learnt - count + 1)
    labels = data.labels(held_out + first, count)
    assert labels is not None
    return data.batch(held_out + first, count), labels


class ClassifierFamily(VectorFamily):
    """Frechet distance, precision and recall on the features, and what classes samples are taken for."""

    name = "classifier"
    metrics: ClassVar = {
        "frechet_classifier": Metric("Frechet distance (classifier)", False, 3, "on a classifier of these images"),
        "precision_classifier": Metric("Precision (classifier)", True, 3, "share of samples among real images, by the classifier"),
        "recall_classifier": Metric("Recall (classifier)", True, 3, "share of real images among samples, by the classifier"),
        "coverage_kl": Metric("Class KL divergence", False, 4, "of the samples' classes from the real ones', in nats"),
        "classes": Metric("Classes covered", True, 0, "classes that samples have at least a tenth of their share of"),
        "class_accuracy": Metric("Class accuracy", True, 3, "share of samples taken for the class asked for", conditional=True),
    }
    labelled = True
    frechet = "frechet_classifier"
    neighbours = ("precision_classifier", "recall_classifier")
    width = FEATURES

    @classmethod
    def automatic(cls, options: Options) -> bool:
        """Always: nothing needs to be downloaded."""
        return True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.classifier = classifier(task.data, task.classes, progress=task.learning)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `VectorFamily` says: with classes."""
        return self.classifier(images)

    def key(self) -> list[str]:
        """The version, and the fingerprint of the weights."""
        return [str(VERSION), self.classifier.fingerprint]

    def new(self, images: int) -> Vectors:
        """As `Family` says."""
        return Vectors(self.look, Features(folder()), classes=self.task.classes)

    def compared(self, real: Vectors, fake: Vectors) -> dict[str, float]:
        """As `Family` says."""
        values = super().compared(real, fake)
        values["coverage_kl"], values["classes"] = class_coverage(fake.counts, real.counts)
        return values

    def by_class(self, real: Vectors, fake: Vectors, asked: Tensor) -> dict[str, Tensor]:
        """As `Family` says: how many are taken for their class, and the Frechet distance of each class from the real one's."""
        right = torch.cat(fake.taken) == asked
        labels = self.task.data.labels(0, self.task.reals)
        assert labels is not None
        found = torch.full((2, self.task.classes), torch.nan, dtype=torch.float64)
        for number in sorted({*asked.tolist()}):
            ours, theirs = (asked == number).nonzero().flatten(), (labels == number).nonzero().flatten()
            found[0, number] = right[ours].double().mean()
            if min(len(ours), len(theirs)) > FEATURES:  # else it says more of their number than of them
                found[1, number] = frechet(_moments(fake.rows, ours), _moments(real.rows, theirs))
        return {"class_accuracy": found[0], self.frechet: found[1]}

    def needs(self) -> int:
        """As `Family` says."""
        return 8 * 8 * BLOCK**2 + 3 * self.task.piece_bytes

    def protocol(self) -> str:
        """As `Family` says."""
        return f"classifier of these images, version {VERSION}, {self.classifier.accuracy:.1%} right"

    def notices(self) -> Iterable[str]:
        """As `Family` says."""
        yield f"A classifier of these images is right about {self.classifier.accuracy:.1%} of those it was not trained on."
        if self.classifier.accuracy < 0.5:
            yield "It can hardly tell the classes apart: what is taken with it says little."
        yield from super().notices()

    def told_apart(self, real: Vectors) -> int:
        """As `Family` says."""
        return int((real.counts > 0).sum())


def _moments(rows: Features, of: Tensor) -> Moments:
    moments = Moments()
    for some in torch.split(of, BLOCK):
        moments.add(rows[some])
    return moments

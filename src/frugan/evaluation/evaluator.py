"""How good a generator is: its images against real ones, by the metrics that can be had (`frugan.evaluation.metrics`).

Images are made, looked at and let go of in pieces, and features lie in files, so that memory does not grow with their number. What
was seen in the real images is kept in the cache by their fingerprint.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from frugan.data.loader import Loader
from frugan.evaluation.classifier import FEATURES, VERSION, Classifier, classifier
from frugan.evaluation.distances import InceptionScore, Moments, class_coverage, frechet, kid, precision_recall
from frugan.evaluation.features import Features
from frugan.evaluation.inception import DINOV2, INCEPTION, Extractor, too_few
from frugan.evaluation.patches import DESCRIPTORS, SIDE, Patches, swd
from frugan.utils import checkpoint
from frugan.utils.errors import UserError, nearest
from frugan.utils.files import cache_folder

PIECE = 64  # images at once, as in a grid of samples, whose shapes are known to fit
BLOCK = 512  # rows of features whose distances are held at once
DIRECTIONS = 16  # on which patches are projected at once
MOST = 10_000  # samples and real images, unless more are asked for
SEED = 0  # of the samples, and of which real images are taken

# What is looked at with what; the first of those that were asked for decides which checkpoint is the best.
FAMILIES = {
    "inception": ("fid", "kid", "is", "precision", "recall"),
    "dinov2": ("frechet_dinov2",),
    "classifier": ("frechet_classifier", "precision_classifier", "recall_classifier", "coverage_kl", "classes"),
    "patches": ("swd",),
}
FRECHET = {"inception": "fid", "dinov2": "frechet_dinov2", "classifier": "frechet_classifier"}
AUTO = "auto"
FEWEST = 16  # images that can be judged, or judged by

Produce = Callable[[int, int], Tensor]  # (first, count) to uint8 images [count, c, h, w]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Args:
        metrics: names of `METRICS`, commas between them, or ``auto``: what can be had without a download, and what is of Inception
            if its weights are named.
        weights: a file of Inception's weights.
        any_weights: whether others than the published ones will do; then nothing is called FID.
        reals: how many real images at most.
    """

    metrics: str = AUTO
    weights: str | None = None
    any_weights: bool = False
    reals: int = MOST

    def chosen(self, labelled: bool) -> list[str]:
        """The metrics, in the order of `FAMILIES`.

        Raises:
            UserError: an unknown one, or one that cannot be had of these images.
        """
        known = [name for names in FAMILIES.values() for name in names]
        if self.metrics == AUTO:
            left_out = {"dinov2"} | (set() if self.weights else {"inception"}) | (set() if labelled else {"classifier"})
            return [name for family, names in FAMILIES.items() if family not in left_out for name in names]
        asked = [name.strip() for name in self.metrics.split(",") if name.strip()]
        for name in asked:
            if name not in known:
                raise UserError(f"there is no metric {name!r}: {nearest(name, known)}")
            if name in FAMILIES["classifier"] and not labelled:
                raise UserError(f"{name} needs images of at least two classes: use swd, or metrics of Inception's features.")
        if not asked:
            raise UserError("--metrics names none: leave it out, or say for example swd,fid.")
        return [name for name in known if name in asked]


class Looking(Protocol):
    """What takes in images piece by piece."""

    def add(self, first: int, images: Tensor) -> None:
        """Takes in images ``first`` to ``first + n``: uint8 ``[n, c, h, w]``."""


@dataclass
class Seen:
    """What a network saw in a set of images.

    Args:
        look: images to features ``[n, d]`` and either logits or classes.
        rows: where features are put.
        score: of the logits, if it is wanted.
        classes: how many there are, if they are counted.
    """

    look: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    rows: Features
    score: InceptionScore | None = None
    classes: int = 0
    moments: Moments = field(default_factory=Moments)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.classes, dtype=torch.int64)

    def add(self, first: int, images: Tensor) -> None:
        """As `Looking` says."""
        count = len(images)
        if count < PIECE:  # a network that meets a new shape takes more memory
            images = torch.cat([images, images[-1:].expand(PIECE - count, -1, -1, -1)])
        features, second = self.look(images)
        self.moments.add(features[:count])
        self.rows.put(first, features[:count])
        if self.score is not None and second is not None:
            self.score.add(second[:count])
        if self.classes and second is not None:
            self.counts += torch.bincount(second[:count], minlength=self.classes)


class Judge:
    """Judges images against the real ones of one data set, again and again.

    Args:
        data: the real images, prepared as training has them.
        name: what they are called.
        classes: how many classes they have.
        options: what is asked for.
        device: where networks run.
        tell: is called with what a person should know.
        progress: is called with the images looked at, and of how many.

    Attributes:
        metrics: their names; the first decides what is best.
        reals: how many real images are used.

    Raises:
        UserError: a metric that there is not, or that cannot be had here.
    """

    def __init__(
        self, data: Loader, name: str, classes: int, options: Options, device: torch.device, tell: Callable[[str], None],
        progress: Progress | None = None, learning: Progress | None = None,
    ) -> None:  # fmt: skip
        self.data = data.reordered(SEED)
        self.name = name
        labelled = classes > 1 and data.labels(0, 1) is not None
        self.metrics = options.chosen(labelled)
        self.reals = min(options.reals, len(data))
        if self.reals < FEWEST:
            raise UserError(f"{self.reals} real images are too few to judge by: at least {FEWEST} are needed.")
        self.progress = progress or (lambda done, of: None)
        self._families = [f for f, names in FAMILIES.items() if set(names) & set(self.metrics)]
        self._networks: dict[str, Classifier | Extractor] = {}
        for family in self._families:
            if family == "classifier":
                found = self._networks[family] = classifier(self.data, classes, progress=learning)
                tell(f"A classifier of these images is right about {found.accuracy:.1%} of those it was not trained on.")
                if found.accuracy < 0.5:
                    tell("It can hardly tell the classes apart: what is taken with it says little.")
                if few := too_few(self.reals, FEATURES):
                    tell(few)
            elif family != "patches":
                weights = Path(options.weights) if options.weights and family == "inception" else None
                kind = INCEPTION if family == "inception" else DINOV2
                network = Extractor(kind, weights=weights, any_weights=options.any_weights, device=device)
                self._networks[family] = network
                if not network.official:
                    tell(f"These are not the published weights of Inception: what is taken with {weights} is no FID, KID or IS.")
                if FRECHET[family] in self.metrics and (few := too_few(self.reals, network.width)):
                    tell(few)
        self.classes = classes
        self._real = self._look_at_reals()
        self._rehearse()

    def __call__(self, produce: Produce, images: int) -> dict[str, float]:
        """The metrics of ``images`` images that ``produce`` makes.

        Raises:
            UserError: too few to be judged.
        """
        if images < FEWEST:
            raise UserError(f"{images} images are too few to be judged: at least {FEWEST} are needed.")
        seen = {family: self._new(family, images) for family in self._families}
        for first, piece in _pieces(produce, images):
            for looking in seen.values():
                looking.add(first, piece)
            self.progress(first + len(piece), images)
        values: dict[str, float] = {}
        for family in self._families:
            values |= self._compared(family, self._real[family], seen[family])
        return {name: values[name] for name in self.metrics}

    @property
    def told_apart(self) -> int:
        """How many classes the classifier finds in the real images."""
        return int((self._real["classifier"].counts > 0).sum()) if "classifier" in self._real else 0

    @property
    def official(self) -> bool:
        """Whether what is called FID is FID: by the published weights."""
        return all(network.official for network in self._networks.values() if isinstance(network, Extractor))

    def needs(self) -> int:
        """Bytes that judging takes at most, besides networks and images; generously."""
        channels, size, _ = self.data.shape
        image = 4 * PIECE * channels * size**2
        needed = 2 * image + (16 << 20)
        if "patches" in self._families:
            patches = 2 * 4 * DIRECTIONS * DESCRIPTORS + 8 * 8192 * 8 * channels * SIDE**2
            needed = max(needed, patches + image + (32 << 20))
        if "classifier" in self._families:
            needed = max(needed, 8 * 8 * BLOCK**2 + 3 * image)
        if "inception" in self._families or "dinov2" in self._families:
            needed = max(needed, 400 << 20)
        return needed

    def protocol(self, images: int, what: str) -> str:
        """How the numbers were taken, in a sentence; ``what`` was judged."""
        channels, size, _ = self.data.shape
        how = f"{size}x{size} {'grey' if channels == 1 else 'colour'}, middle squares resized by bicubic interpolation"
        real = f"{self.reals:,} of {len(self.data):,} real images of {self.name} ({self.data.fingerprint[:8]})"
        said = [f"{images:,} {what} against {real}, {how}"]
        if "inception" in self._networks:
            network = self._networks["inception"]
            assert isinstance(network, Extractor)
            grey = ", grey repeated to RGB" if channels == 1 else ""
            said.append(f"Inception v3 as in the TensorFlow original (weights {(network.sha256 or '')[:8]}) at 299x299{grey}")
        if "classifier" in self._networks:
            network = self._networks["classifier"]
            assert isinstance(network, Classifier)
            said.append(f"classifier of these images, version {VERSION}, {network.accuracy:.1%} right")
        if "patches" in self._families:
            said.append(f"{DESCRIPTORS:,} patches of {SIDE}x{SIDE} a level")
        return "; ".join(said) + "."

    def _new(self, family: str, images: int) -> Any:
        if family == "patches":
            channels, size, _ = self.data.shape
            return Patches(size, channels, images, SEED, folder=_folder())
        network = self._networks[family]
        if isinstance(network, Classifier):
            return Seen(network, Features(_folder()), classes=self.classes)
        score = InceptionScore(images) if "is" in self.metrics and family == "inception" else None
        return Seen(lambda some: _layers(network(some)), Features(_folder()), score)

    def _rehearse(self) -> None:
        """Judges a few images for nobody, so that all that judging loads is there before memory is counted and limited."""
        for family in self._families:
            if family != "patches":
                seen = self._new(family, PIECE)
                seen.add(0, self.data.batch(0, PIECE))
                self._compared(family, self._real[family], seen)

    def _look_at_reals(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        missing: dict[str, Any] = {}
        files = {family: self._file(family) for family in self._families if family != "patches"}
        for family in self._families:
            if family in files and (seen := self._remembered(family, files[family])):
                found[family] = seen
            else:
                missing[family] = self._new(family, self.reals)
        for first, piece in _pieces(self.data.batch, self.reals if missing else 0):
            for looking in missing.values():
                looking.add(first, piece)
            self.progress(first + len(piece), self.reals)
        for family, seen in missing.items():
            if family in files:
                seen.rows.save(files[family])
                tensors = seen.moments.as_dict() | {"classes": seen.counts}
                checkpoint.save(files[family].with_suffix(".safetensors"), tensors, {"sha256": seen.rows.sha256()})  # all is there
        return found | missing

    def _remembered(self, family: str, file: Path) -> Seen | None:
        try:
            tensors, state = checkpoint.load(file.with_suffix(".safetensors"))
            seen: Seen = self._new(family, self.reals)
            seen.rows = Features.open(file, len(tensors["mean"]))
        except (UserError, LookupError, ValueError):
            return None
        seen.moments, seen.counts = Moments.from_dict(tensors), tensors["classes"]
        return seen if seen.rows.sha256() == state.get("sha256") else None

    def _file(self, family: str) -> Path:
        network = self._networks[family]
        about = [self.data.fingerprint, str(self.reals), family]
        if isinstance(network, Classifier):
            about += [str(VERSION), network.fingerprint]
        else:
            about += [network.name, str(network.sha256)]
        return _folder() / f"{hashlib.sha256('/'.join(about).encode()).hexdigest()[:24]}.rows"

    def _compared(self, family: str, real: Any, fake: Any) -> dict[str, float]:
        if family == "patches":
            levels = swd(real, fake, chunk=DIRECTIONS)
            return {"swd": sum(levels.values()) / len(levels)}
        values: dict[str, float] = {}
        wanted = set(self.metrics)
        if (name := FRECHET[family]) in wanted:
            values[name] = frechet(real.moments, fake.moments)
        ending = "_classifier" if family == "classifier" else ""
        if family != "dinov2" and wanted & {f"precision{ending}", f"recall{ending}"}:
            both = precision_recall(real.rows, fake.rows, chunk=BLOCK)
            values[f"precision{ending}"], values[f"recall{ending}"] = both
        if family == "classifier":
            values["coverage_kl"], values["classes"] = class_coverage(fake.counts, real.counts)
        if family == "inception" and "kid" in wanted:
            values["kid"] = kid(real.rows, fake.rows, subset_size=min(1000, self.reals))[0]
        if fake.score is not None:
            values["is"] = fake.score.result()[0]
        return values


def _layers(outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return outputs["features"], outputs.get("logits")


def _pieces(produce: Produce, images: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, images, PIECE):
        count = min(PIECE, images - first)
        yield first, produce(first, PIECE)[:count]  # whole pieces: no shapes that were never met


def _folder() -> Path:
    folder = cache_folder() / "features"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; FRUGAN_CACHE names another place.") from None
    return folder

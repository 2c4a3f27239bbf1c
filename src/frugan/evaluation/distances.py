"""Distances between two sets of features. Sums are float64, and memory does not grow with the number of samples.

Features are float ``[n, d]`` on the CPU; `kid` and `precision_recall` read them from any `Rows`, a block at a time.
"""

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from frugan.evaluation.features import Rows

TIE = 1e-9  # distances that differ by less, relatively, are the same: the rounding of sums must not decide between them
NOTHING = 1e-12  # a squared distance below this share of both squared norms is that of a row from itself, rounded


class Moments:
    """Count, mean and covariance of features that come in pieces.

    Pieces are merged as Chan, Golub and LeVeque (1979) do, so that neither their sizes nor their order matter beyond rounding, and
    a large mean costs no digits. Memory is that of a ``[d, d]`` of float64: 32 MiB for 2048 features.

    Attributes:
        count: samples so far.
        mean: float64 ``[d]``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def add(self, features: Tensor) -> None:
        """Takes in ``[n, d]``."""
        if not len(features):
            return
        x = features.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        if not mean.isfinite().all():
            raise ValueError("some features are not finite numbers.")
        if not self.count:
            self.mean, self._scatter = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        centred = x - mean
        self._scatter.addmm_(centred.T, centred)
        self._shift(len(x), mean)

    def merge(self, other: "Moments") -> None:
        """Takes in the samples of ``other``."""
        if not self.count:
            self.count, self.mean, self._scatter = other.count, other.mean.clone(), other._scatter.clone()
        elif other.count:
            self._scatter += other._scatter
            self._shift(other.count, other.mean)

    def _shift(self, count: int, mean: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self._scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """float64 ``[d, d]``, unbiased."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two samples; there are {self.count}.")
        return self._scatter / (self.count - 1)

    def as_dict(self) -> dict[str, Tensor]:
        """All that `from_dict` needs."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> "Moments":
        """What `as_dict` gave."""
        moments = cls()
        moments.count, moments.mean, moments._scatter = int(tensors["count"]), tensors["mean"].clone(), tensors["scatter"].clone()
        return moments


def frechet(a: Moments, b: Moments) -> float:
    """The squared Frechet distance of two Gaussians (Dowson and Landau 1982): on Inception's features, FID (Heusel et al. 2017).

    The trace of the root of the product of two covariances ``F F^T`` and ``G G^T`` is the sum of the singular values of ``F^T G``.
    That way no root is taken of a rounding error, as there are many in the eigenvalues of the product when there are fewer samples
    than features.
    """
    first, second = a.covariance, b.covariance
    roots = torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * roots
    return max(0.0, float(distance))


def _factor(covariance: Tensor) -> Tensor:
    """``F`` with ``F F^T`` the covariance, without the directions that are nothing but rounding: ``[d, rank]``."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor


def too_few(images: int, width: int) -> str | None:
    """What a person should know of a Frechet distance between so many samples, or None if they are as many as features."""
    if images > width:
        return None
    return (
        f"{images:,} images are few for a Frechet distance on {width:,} features: it comes out much too large, and can be compared "
        f"only with that of as many images. KID has no such bias."
    )


def kid(a: Rows, b: Rows, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018): unbiased squared maximum mean discrepancy with a cubic polynomial kernel.

    Args:
        a: one set of features.
        b: the other.
        subsets: how many random subsets it is the mean of.
        subset_size: samples in each, without replacement; where a set has fewer, as many as the smaller set has.
        seed: of the subsets, which are drawn as torch-fidelity draws them (its default is 2020).

    Returns:
        Mean and standard deviation over the subsets. The mean of two samples of one distribution can be below 0.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(f"KID needs at least two samples of each set; there are {len(a)} and {len(b)}.")
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (rows[torch.from_numpy(random.choice(len(rows), size, replace=False))].double() for rows in (a, b))
        within = sum(float(kernel.sum() - kernel.trace()) for kernel in (_cubic(x, x), _cubic(y, y)))
        values.append(within / (size * (size - 1)) - 2 * float(_cubic(x, y).mean()))
    return float(np.mean(values)), float(np.std(values))


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return torch.addmm(x.new_ones(1), x, y.T, alpha=1 / x.shape[1]).pow_(3)


class InceptionScore:
    """Inception score (Salimans et al. 2016): how sure a classifier is of each sample, and how many classes there are.

    Args:
        images: how many samples will come.
        splits: the score is the mean over so many runs of samples one after another; with fewer samples, one each.
    """

    def __init__(self, images: int, splits: int = 10) -> None:
        if images < 1:
            raise ValueError("an inception score needs at least one sample.")
        splits = min(splits, images)
        self._ends = [(i + 1) * images // splits for i in range(splits)]
        self._seen = 0
        self._sums: list[Tensor | float] = [0.0] * splits  # of p
        self._entropies = [0.0] * splits  # of -p log p

    def add(self, logits: Tensor) -> None:
        """Takes in float ``[n, classes]``, the next samples in order; logarithms of probabilities will do."""
        if self._seen + len(logits) > self._ends[-1]:
            raise ValueError(f"{self._ends[-1]} samples were announced, and more have come.")
        while len(logits):
            split = bisect_right(self._ends, self._seen)
            count = min(self._ends[split] - self._seen, len(logits))
            p = logits[:count].detach().to("cpu", torch.float64).softmax(1)
            self._sums[split] = p.sum(0) + self._sums[split]
            self._entropies[split] += float(torch.special.entr(p).sum())
            self._seen, logits = self._seen + count, logits[count:]

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        if self._seen != self._ends[-1]:
            raise ValueError(f"{self._ends[-1]} samples were announced, and {self._seen} have come.")
        scores = []
        for begin, end, total, entropy in zip([0, *self._ends], self._ends, self._sums, self._entropies, strict=False):
            marginal = torch.as_tensor(total) / (end - begin)
            scores.append(np.exp(float(torch.special.entr(marginal).sum()) - entropy / (end - begin)))
        return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: Rows, fake: Rows, *, k: int = 3, chunk: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its samples, each with the distance to the k-th nearest other sample as radius; a
    sample on the edge is inside, and duplicates count as neighbours. Time is quadratic in the number of samples, memory is that of
    ``[chunk, chunk]`` and two ``[chunk, d]`` of float64.

    Returns:
        The share of ``fake`` within the manifold of ``real``, and the share of ``real`` within that of ``fake``.
    """
    for rows in (real, fake):
        if len(rows) <= k:
            raise ValueError(
                f"precision and recall with {k} neighbours need more than {k} samples of each set; there are {len(rows)}."
            )
    real_radii, fake_radii = (_radii(rows, k, chunk) * (1 + TIE) for rows in (real, fake))
    precise, recalled = torch.zeros(len(fake), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for i in range(0, len(real), chunk):
        x = real[i : i + chunk].double()
        for j in range(0, len(fake), chunk):
            distances = _squared(x, fake[j : j + chunk].double())
            precise[j : j + chunk] |= (distances <= real_radii[i : i + chunk, None]).any(0)
            recalled[i : i + chunk] |= (distances <= fake_radii[j : j + chunk]).any(1)
    return float(precise.double().mean()), float(recalled.double().mean())


def _radii(rows: Rows, k: int, chunk: int) -> Tensor:
    """Squared distances to the k-th nearest other row: float64 ``[n]``. Blocks are symmetric, so that half of them will do."""
    nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64)

    def closer(begin: int, distances: Tensor) -> None:
        some = nearest[begin : begin + len(distances)]
        some.copy_(torch.cat([some, distances], 1).topk(k, largest=False).values)

    for i in range(0, len(rows), chunk):
        x = rows[i : i + chunk].double()
        closer(i, _squared(x, x).fill_diagonal_(torch.inf))
        for j in range(i + chunk, len(rows), chunk):
            distances = _squared(x, rows[j : j + chunk].double())
            closer(i, distances)
            closer(j, distances.T)
    return nearest[:, -1]


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances of all rows: float64 ``[n, m]``, exactly 0 between equal rows."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = torch.addmm(norms, x, y.T, alpha=-2)
    return distances.masked_fill_(distances <= NOTHING * norms, 0)


def class_coverage(fake: Tensor, real: Tensor) -> tuple[float, int]:
    """How the classes of samples are spread, given how many there are of each: two int ``[classes]``.

    Returns:
        The Kullback-Leibler divergence of the classes of ``fake`` from those of ``real``, in nats, where a class that only ``fake``
        has counts as if ``real`` had one of it; and of how many classes of ``real``, ``fake`` has at least a tenth of their share.
    """
    ours, theirs = fake.to("cpu", torch.int64), real.to("cpu", torch.int64)
    if not ours.sum() or not theirs.sum():
        raise ValueError("class coverage needs at least one sample of each set.")
    covered = (theirs > 0) & (10 * ours * theirs.sum() >= theirs * ours.sum())
    smoothed = theirs + ((theirs == 0) & (ours > 0))
    p, q = (counts.double() / counts.sum() for counts in (ours, smoothed))
    divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)
    return max(0.0, float(divergence.sum())), int(covered.sum())

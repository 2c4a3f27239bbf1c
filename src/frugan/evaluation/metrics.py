"""Numbers that say how good a generator is: which there are, and how they are read. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number.

    Args:
        label: its name for people. Only distances on Inception's features are called FID.
        higher: whether more is better.
        digits: behind the point, for people.
        means: in a few words, what it says.
    """

    label: str
    higher: bool
    digits: int
    means: str


METRICS = {
    "fid": Metric("FID", False, 2, "Frechet distance on Inception's features"),
    "kid": Metric("KID", False, 5, "squared maximum mean discrepancy on Inception's features"),
    "is": Metric("Inception Score", True, 2, "how sure Inception is of each image, and how many classes there are"),
    "precision": Metric("Precision", True, 3, "share of samples among real images, by Inception's features"),
    "recall": Metric("Recall", True, 3, "share of real images among samples, by Inception's features"),
    "frechet_dinov2": Metric("Frechet distance (DINOv2)", False, 1, "Frechet distance on DINOv2's features"),
    "frechet_classifier": Metric("Frechet distance (classifier)", False, 3, "on a classifier of these images"),
    "precision_classifier": Metric("Precision (classifier)", True, 3, "share of samples among real images, by the classifier"),
    "recall_classifier": Metric("Recall (classifier)", True, 3, "share of real images among samples, by the classifier"),
    "coverage_kl": Metric("Class KL divergence", False, 4, "of the samples' classes from the real ones', in nats"),
    "classes": Metric("Classes covered", True, 0, "classes that samples have at least a tenth of their share of"),
    "swd": Metric("Sliced Wasserstein distance", False, 2, "of patches at several sizes, times 1000"),
}  # fmt: skip


def better(name: str, a: float, b: float) -> bool:
    """Whether ``a`` is better than ``b`` by the metric ``name``."""
    return a > b if METRICS[name].higher else a < b


def shown(name: str, value: float) -> str:
    """The number for people."""
    return f"{value:,.{METRICS[name].digits}f}"

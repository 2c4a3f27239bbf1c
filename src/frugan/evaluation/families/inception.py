"""Metrics on the features of Inception v3, as papers report them."""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from frugan.evaluation.distances import InceptionScore, kid
from frugan.evaluation.families.base import Metric, Options, Task
from frugan.evaluation.families.extractor import INCEPTION, Extractor, ExtractorFamily
from frugan.evaluation.families.vectors import Vectors


class InceptionFamily(ExtractorFamily):
    """FID, KID, Inception Score, precision and recall."""

    name = "inception"
    metrics: ClassVar = {
        "fid": Metric("FID", False, 2, "Frechet distance on Inception's features"),
        "kid": Metric("KID", False, 5, "squared maximum mean discrepancy on Inception's features"),
        "is": Metric("Inception Score", True, 2, "how sure Inception is of each image, and how many classes there are"),
        "precision": Metric("Precision", True, 3, "share of samples among real images, by Inception's features"),
        "recall": Metric("Recall", True, 3, "share of real images among samples, by Inception's features"),
    }
    frechet = "fid"
    neighbours = ("precision", "recall")

    def __init__(self, task: Task) -> None:
        weights = Path(task.options.weights) if task.options.weights else None
        super().__init__(task, Extractor(INCEPTION, weights=weights, any_weights=task.options.any_weights, device=task.device))
        self.official = self.network.official

    @classmethod
    def automatic(cls, options: Options) -> bool:
        """If its weights are at hand."""
        return bool(options.weights)

    def new(self, images: int) -> Vectors:
        """As `Family` says."""
        seen = super().new(images)
        if "is" in self.task.wanted:
            seen.score = InceptionScore(images)
        return seen

    def compared(self, real: Vectors, fake: Vectors) -> dict[str, float]:
        """As `Family` says."""
        values = super().compared(real, fake)
        if "kid" in self.task.wanted:
            values["kid"] = kid(real.rows, fake.rows, subset_size=min(1000, self.task.reals))[0]
        if fake.score is not None:
            values["is"] = fake.score.result()[0]
        return values

    def protocol(self) -> str:
        """As `Family` says."""
        grey = ", grey repeated to RGB" if self.task.data.shape[0] == 1 else ""
        return f"Inception v3 as in the TensorFlow original (weights {(self.network.sha256 or '')[:8]}) at 299x299{grey}"

    def notices(self) -> Iterable[str]:
        """As `Family` says."""
        if not self.official:
            weights = self.task.options.weights
            yield f"These are not the published weights of Inception: what is taken with {weights} is no FID, KID or IS."
        yield from super().notices()

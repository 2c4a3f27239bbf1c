"""Metrics on the features of DINOv2."""

from typing import ClassVar

from frugan.evaluation.families.base import Metric, Options, Task
from frugan.evaluation.families.extractor import DINOV2, Extractor, ExtractorFamily


class Dinov2Family(ExtractorFamily):
    """A Frechet distance (Stein et al. 2023)."""

    name = "dinov2"
    metrics: ClassVar = {"frechet_dinov2": Metric("Frechet distance (DINOv2)", False, 1, "Frechet distance on DINOv2's features")}
    frechet = "frechet_dinov2"

    def __init__(self, task: Task) -> None:
        super().__init__(task, Extractor(DINOV2, device=task.device))

    @classmethod
    def automatic(cls, options: Options) -> bool:
        """Never: it is a download, and code that is run unchecked."""
        return False

"""The metrics, and the features that they are taken on: one file a family of them.

Add a metric on features that are there to the ``metrics`` and the ``compared`` of its family. Add one on new features by writing a
file here with a kind of `Family` (`VectorFamily` for a vector an image and a Frechet distance), and putting it into `IN_ORDER`.
"""

from typing import Any

from frugan.evaluation.families.base import Family, Metric
from frugan.evaluation.families.classifier import ClassifierFamily
from frugan.evaluation.families.dinov2 import Dinov2Family
from frugan.evaluation.families.inception import InceptionFamily
from frugan.evaluation.families.neighbours import NeighboursFamily
from frugan.evaluation.families.patches import PatchesFamily

FAMILIES: dict[str, type[Family[Any]]] = {}
METRICS: dict[str, Metric] = {}  # of all families


def register(family: type[Family[Any]]) -> None:
    """Makes the metrics of ``family`` known, after those that are.

    Raises:
        ValueError: its name, or that of one of its metrics, is taken.
    """
    taken = [family.name] * (family.name in FAMILIES) + [name for name in family.metrics if name in METRICS]
    if taken:
        raise ValueError(f"there is already a family or a metric called {taken[0]!r}.")
    FAMILIES[family.name] = family
    METRICS.update(family.metrics)


# The first metric of those that are asked for, and of which more or less is better, decides which checkpoint is the best.
IN_ORDER: tuple[type[Family[Any]], ...] = (InceptionFamily, Dinov2Family, ClassifierFamily, PatchesFamily, NeighboursFamily)
for _family in IN_ORDER:
    register(_family)


def better(name: str, a: float, b: float) -> bool:
    """Whether ``a`` is better than ``b`` by the metric ``name``, which has a direction."""
    return a > b if METRICS[name].higher else a < b


def directed(name: str) -> bool:
    """Whether more, or less, of the metric ``name`` is better."""
    return name in METRICS and METRICS[name].higher is not None


def shown(name: str, value: float) -> str:
    """``value`` with as many digits as its metric is read with."""
    return f"{value:,.{METRICS[name].digits}f}"

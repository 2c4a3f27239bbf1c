"""What classes images have, for a training that learns them."""

import numpy as np
from numpy.typing import NDArray

from frugan.config.classes import Classes
from frugan.data.loader import Loader
from frugan.data.sources.base import Source, Tell
from frugan.utils.errors import UserError

FEW = 20  # images of a class, below which a generator can hardly do more than repeat them


def present(source: Source) -> int:
    """How many classes have images; 0 if there are no labels, or not every image has one of the classes."""
    labels = source.labels
    if labels is None or not len(labels) or labels.min() < 0 or labels.max() >= len(source.classes):
        return 0
    return len(np.unique(labels))


def classes_of(source: Source, conditional: bool, tell: Tell) -> Classes:
    """The classes of ``source`` that a ``conditional`` training learns; none if it is not. ``tell`` says which have few images.

    Raises:
        UserError: there are none, one only, or not every image has one of those that there are.
    """
    if not conditional:
        return Classes()
    if source.labels is None:
        raise UserError(
            f"--conditional learns classes, and {source.unlabelled or f'{source.name} has none'}: put the images of each into a "
            "folder of its own, name a --label-column, or leave --conditional out."
        )
    names = [*map(str, source.classes)]
    outside = np.flatnonzero((source.labels < 0) | (source.labels >= len(names)))
    if len(outside):
        number = int(outside[0])
        raise UserError(
            f"{source.where(number)} is of class {source.labels[number]}, and {source.name} has classes 0 to {len(names) - 1}: "
            f"mend the labels ({len(outside):,} of {len(source):,} are like that), or leave --conditional out."
        )
    classes = _counted(source, source.labels)
    few = [f"{names[number]} ({classes.counts[number]})" for number in classes.present if classes.counts[number] < FEW]
    if few:
        more = f" and {len(few) - 3} more" if len(few) > 3 else ""
        tell(
            f"Few images are of {', '.join(few[:3])}{more}: expect samples of such a class to repeat them. Classes that look alike "
            "are better put into one."
        )
    return classes


def classes_read(source: Source, images: Loader) -> Classes:
    """The same once it is known which ``images`` of ``source`` can be read: one of which none can has nothing to learn from.

    Raises:
        UserError: one only has images.
    """
    labels = images.labels(0, len(images))
    assert labels is not None
    return _counted(source, labels.numpy())


def _counted(source: Source, labels: NDArray[np.int64]) -> Classes:
    """The classes of ``source``, with how many ``labels`` name each."""
    names = [*map(str, source.classes)]
    classes = Classes(tuple(names), tuple(np.bincount(labels, minlength=len(names)).tolist()))
    if len(classes.present) < 2:
        only = "".join(f", {names[number]}" for number in classes.present)
        raise UserError(f"--conditional needs two classes, and the images of {source.name} are all of one{only}: leave it out.")
    return classes

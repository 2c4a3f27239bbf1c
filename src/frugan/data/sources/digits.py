"""The built-in digits."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from frugan.config.recipe import Data
from frugan.data.sources.base import ArraySource, Source

FILE = Path(__file__).with_name("digits.npz")  # digits.txt says what it is and whose


def as_published() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1,797 digits of Alpaydin and Kaynak (1998): grey uint8 ``[1797, 8, 8]`` in 0..16, and labels int64 ``[1797]`` in 0..9."""
    with np.load(FILE) as arrays:
        return arrays["images"], arrays["labels"].astype(np.int64)


def digits(data: Data) -> Source | None:
    """The built-in digits, brought to 0..255 and enlarged from 8x8 to 16x16 to be readable."""
    if data.data != "digits":
        return None
    images, labels = as_published()
    small = np.rint(images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BICUBIC)) for i in small])
    return ArraySource("digits", large, labels, [str(i) for i in range(10)])

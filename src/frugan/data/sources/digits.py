"""The built-in digits."""

import numpy as np
from PIL import Image

from frugan.config.recipe import Data
from frugan.data.sources.base import ArraySource, Source


def digits(data: Data) -> Source | None:
    """The 1,797 digits that scikit-learn carries (Alpaydin and Kaynak 1998), enlarged from 8x8 to 16x16 to be readable."""
    if data.data != "digits":
        return None
    from sklearn.datasets import load_digits  # half a second, and only this source needs it

    found = load_digits()
    small = np.rint(found.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BICUBIC)) for i in small])
    return ArraySource("digits", images, found.target.astype(np.int64), [str(i) for i in range(10)])

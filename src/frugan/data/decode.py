"""One image of any kind to uint8 ``[channels, size, size]``."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from frugan.errors import UserError

Pixels = NDArray[np.uint8]


def background_colour(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour name or ``#rrggbb``.

    Raises:
        UserError: no such colour.
    """
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise UserError(f"--background {name!r} is no colour: use a name such as white, or #rrggbb.") from None


def flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """``image`` upright (EXIF), with 8 bits, without transparency: mode L or RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        grey = image.mode in ("LA", "La", "1", "L") and len(set(background)) == 1
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), layer)
        return image.convert("L" if grey else "RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit and floating-point grey to mode L: values above 255 mean 16 bits, floating point up to 1 means [0, 1]."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    largest = values.max(initial=0.0)
    if image.mode == "F" and largest <= 1:
        values = values * 255
    elif image.mode.startswith("I;16") or largest > 255:
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def fit(image: Image.Image, size: int, channels: int) -> Pixels:
    """A flattened image resized and centre-cropped to a square: uint8 ``[channels, size, size]``."""
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def is_grey(image: Image.Image) -> bool:
    """Whether a flattened image has no colour in it."""
    if image.mode == "L":
        return True
    small = np.asarray(image.resize((min(64, image.width), min(64, image.height)), Image.Resampling.BOX), dtype=np.int16)
    return bool((small.max(axis=2) - small.min(axis=2)).max() <= 2)  # JPEG's rounding tints grey a little

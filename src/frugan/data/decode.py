"""One image of any kind to uint8 ``[channels, size, size]``."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, ImageOps

from frugan.utils.errors import UserError

Pixels = NDArray[np.uint8]
STRIP = 1 << 20  # pixels of an image that are worked on at a time: what is in between takes little memory, however large it is


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
    """``image`` upright (EXIF), with 8 bits, without transparency: mode L or RGB; itself where it is all that already."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image)
    if image.has_transparency_data:
        grey = image.mode in ("LA", "La", "1", "L") and len(set(background)) == 1
        flat = Image.new("L" if grey else "RGB", image.size)
        for top, strip in _strips(image):
            layer = Image.alpha_composite(Image.new("RGBA", strip.size, (*background, 255)), strip.convert("RGBA"))
            flat.paste(layer.convert(flat.mode), (0, top))
        return flat
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit and floating-point grey to mode L: values above 255 mean 16 bits, floating point up to 1 means [0, 1]."""
    largest = max((_values(strip).max(initial=0.0) for _, strip in _strips(image)), default=0.0)
    flat = Image.new("L", image.size)
    for top, strip in _strips(image):
        values = _values(strip)
        if image.mode == "F" and largest <= 1:
            values = values * 255
        elif image.mode.startswith("I;16") or largest > 255:
            values = values / 257
        flat.paste(Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)), (0, top))
    return flat


def _values(image: Image.Image) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(image, dtype=np.float64))


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """``image`` from top to bottom in strips, each with the row it begins at."""
    rows = max(1, STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def fit(image: Image.Image, size: int, channels: int) -> Pixels:
    """A flattened image resized and centre-cropped to a square: uint8 ``[channels, size, size]``."""
    wanted = "L" if channels == 1 else "RGB"
    image = image if image.mode == wanted else image.convert(wanted)  # which would copy it
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

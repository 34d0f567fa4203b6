"""Encoded bytes to a square of pixels: guided-diffusion's centre crop, and the crops of decoder training.

The rules: decoded by Pillow and converted to RGB (alpha is dropped, CMYK converted, EXIF rotation ignored, as
guided-diffusion does); 16-bit grey keeps its upper 8 bits; an animation gives its first frame.
"""

import io
import math
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from raecli.errors import InputError

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode_rgb refuses what it warns of

# What Pillow raises on bytes that are no image, or not a whole one.
UNREADABLE = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
WINDOW_PIXELS = 64_000_000  # above this a resized strip is not made whole: its window alone is


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Decode an image. Raises InputError naming it if it is none, is cut off, or is a decompression bomb."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise InputError(f"{name}: not a readable image: {image.width} x {image.height}, a decompression bomb")
        image.load()
    except UNREADABLE as error:
        raise InputError(f"{name}: not a readable image: {error}") from None
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to `size`: halved by BOX while twice too large or more, then BICUBIC."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    if wide * high > WINDOW_PIXELS:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return image.resize((wide, high), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's centre crop: uint8 [size, size, 3]."""
    pixels = np.asarray(resize_shorter(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, resize: int, size: int, across: float, down: float) -> np.ndarray:
    """Shorter side to `resize`, then a crop of `size` at fractions (across, down) in [0, 1) of the room. App. E.2."""
    pixels = np.asarray(resize_shorter(image, resize))
    top = int(down * (pixels.shape[0] - size + 1))
    left = int(across * (pixels.shape[1] - size + 1))
    return pixels[top : top + size, left : left + size]


def center_square(data: bytes, name: str, size: int) -> np.ndarray:
    """An encoded image's centre crop, uint8 [size, size, 3]. Raises InputError as decode_rgb does."""
    return center_crop(decode_rgb(data, name), size)

"""Encoded bytes to a square of pixels: guided-diffusion's centre crop, and the crops of decoder training.

The rules: decoded by Pillow and converted to RGB (alpha is dropped, CMYK converted, EXIF rotation ignored, as
guided-diffusion does); 16-bit grey keeps its upper 8 bits; an animation gives its first frame.
"""

import contextlib
import functools
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from raecli.data.resample import Window, resized_window
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
WINDOW_PIXELS = 64_000_000  # above this a resized strip is not made whole: its window alone is, by Pillow's box


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Decode an image. Raises InputError naming it if it is none, is cut off, or is a decompression bomb."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise InputError(f"{name}: not a readable image: {image.width} x {image.height}, a decompression bomb")
        image.load()
    except UnidentifiedImageError:  # its text has an address, and a cache's manifest the reasons
        raise InputError(f"{name}: not a readable image: of no known format") from None
    except UNREADABLE as error:
        raise InputError(f"{name}: not a readable image: {error}") from None
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


Room = Callable[[tuple[int, int, int]], np.ndarray]


def new_array(shape: tuple[int, int, int]) -> np.ndarray:
    """Memory for an image, uint8 [H, W, 3]."""
    return np.empty(shape, np.uint8)


def decode_pixels(data: bytes, name: str, room: Room = new_array) -> np.ndarray:
    """decode_rgb's pixels, uint8 [H, W, 3]; plain JPEGs by simplejpeg where it is installed: the same, in less time.

    room: gives the memory that simplejpeg decodes to.
    """
    if data[:3] == b"\xff\xd8\xff" and (quick := quick_jpeg()):
        pixels = quick(data, room)
        if pixels is not None:
            return pixels
    return np.asarray(decode_rgb(data, name))


@functools.lru_cache(maxsize=1)
def quick_jpeg() -> Callable[[bytes, Room], np.ndarray | None] | None:
    """A decoder that returns None for what is Pillow's to judge; None where it is missing, or differs from Pillow."""
    try:
        import simplejpeg
    except ImportError:
        return None

    def decode(data: bytes, room: Room) -> np.ndarray | None:
        with contextlib.suppress(ValueError):  # damaged, or no JPEG after all: Pillow says what it is
            high, wide, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "Gray") and wide * high <= (Image.MAX_IMAGE_PIXELS or math.inf):
                memory = room((high, wide, 3))
                return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False, buffer=memory)
        return None

    pixels = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    for subsampling in (0, 1, 2):  # two builds of libjpeg-turbo: held against each other once
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=subsampling)
        if not np.array_equal(decode(buffer.getvalue(), new_array), np.asarray(decode_rgb(buffer.getvalue(), "trial"))):
            return None
    return decode


def shorter_sides(wide: int, high: int, size: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """The sizes on the way to a shorter side of `size`: halves while that is twice too large or more, then the last."""
    halves = []
    while min(wide, high) >= 2 * size:
        wide, high = wide // 2, high // 2
        halves.append((wide, high))
    scale = size / min(wide, high)
    return halves, (round(wide * scale), round(high * scale))


def center_window(wide: int, high: int, size: int) -> Window:
    """The square of `size` in the middle, as guided-diffusion rounds it."""
    return (wide - size) // 2, (high - size) // 2, size, size


def resized_crop(pixels: np.ndarray, shorter: int, size: int, across: float | None, down: float | None) -> np.ndarray:
    """The shorter side to `shorter`, halved by BOX and then BICUBIC; of that a crop of `size` at fractions of the room.

    pixels: uint8 [H, W, 3]. across, down: in [0, 1); None: the centre, as guided-diffusion rounds it.
    """
    halves, (wide, high) = shorter_sides(pixels.shape[1], pixels.shape[0], shorter)
    for half in halves:
        pixels = resized_window(pixels, half, (0, 0, *half), "box")
    left, top, *_ = center_window(wide, high, size)
    left = left if across is None else int(across * (wide - size + 1))
    top = top if down is None else int(down * (high - size + 1))
    if wide * high > WINDOW_PIXELS:
        return boxed(pixels, shorter)[:size, :size]
    return resized_window(pixels, (wide, high), (left, top, size, size), "bicubic")


def boxed(pixels: np.ndarray, size: int) -> np.ndarray:
    """The square in the middle of a strip that is too long to be resized whole."""
    image, side = Image.fromarray(pixels), min(pixels.shape[:2])
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def center_square(data: bytes, name: str, size: int) -> np.ndarray:
    """guided-diffusion's centre crop of an encoded image: uint8 [size, size, 3]. Errors are decode_rgb's."""
    return center_crop(decode_pixels(data, name), size)


def center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """guided-diffusion's centre crop of uint8 [H, W, 3]: [size, size, 3]."""
    return resized_crop(pixels, size, size, None, None)


def random_crop(pixels: np.ndarray, resize: int, size: int, across: float, down: float) -> np.ndarray:
    """Shorter side to `resize`, then a crop of `size` at fractions (across, down) in [0, 1) of the room. App. E.2."""
    return resized_crop(pixels, resize, size, across, down)

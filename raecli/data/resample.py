"""Pillow's BOX and BICUBIC resampling over a window of the result, equal to the bit and several times faster.

Pillow computes whole images, a pixel at a time. Here a window alone is computed, sixteen rows at a time, by resample.c,
which is compiled once (compiled.py). Without a compiler, or where a trial at the first use differs from Pillow in one
bit, Pillow does the work.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from raecli.compiled import library_of

BITS = 22  # of Pillow's coefficients
SUPPORT = {"box": 0.5, "bicubic": 2.0}
PILLOW = {"box": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC}
SOURCE = Path(__file__).with_name("resample.c")

Window = tuple[int, int, int, int]  # left, top, width, height in the result


def resized_window(pixels: np.ndarray, size: tuple[int, int], window: Window, kind: str) -> np.ndarray:
    """What lies in a window of `pixels` resized, uint8 [window height, window width, 3].

    pixels: uint8 [H, W, 3]; size: width and height of the whole result; kind: box or bicubic.
    """
    if size == (pixels.shape[1], pixels.shape[0]):
        left, top, wide, high = window
        return pixels[top : top + high, left : left + wide]
    compiled = None if down_first(pixels.shape[1], pixels.shape[0], *size) else compiled_resample()
    return (compiled or by_pillow)(pixels, size, window, kind)


def down_first(wide: int, high: int, new_wide: int, new_high: int) -> bool:
    """Where Pillow may go down before it goes across: 13.0 does so if height shrinks by more than twice what width does
    (read off 4000 random sizes), older ones where height is above 100 widths. Rare: photographs above 2:1, standing.
    """
    return new_high < high and high - new_high > 2 * (wide - new_wide)


def by_pillow(pixels: np.ndarray, size: tuple[int, int], window: Window, kind: str) -> np.ndarray:
    """The same by Pillow: the whole result, then the window."""
    left, top, wide, high = window
    return np.asarray(Image.fromarray(pixels).resize(size, PILLOW[kind]))[top : top + high, left : left + wide]


@functools.lru_cache(maxsize=1024)
def coefficients(before: int, after: int, first: int, count: int, kind: str) -> tuple[np.ndarray, ...]:
    """Of positions [first, first + count) of an axis resized from `before` to `after`: first source position, taps,
    weights int32 [count, taps at most]. Pillow's precompute_coeffs and normalize_coeffs_8bpc, operation by operation.
    """
    if before == after:  # Pillow leaves such an axis alone
        unit = np.full((count, 1), 1 << BITS, np.int32)
        return np.arange(first, first + count, dtype=np.int32), np.ones(count, np.int32), unit
    scale = before / after
    stretch = max(scale, 1.0)
    support = SUPPORT[kind] * stretch
    center = (np.arange(first, first + count) + 0.5) * scale
    low = np.maximum((center - support + 0.5).astype(np.int64), 0)
    taps = np.minimum((center + support + 0.5).astype(np.int64), before) - low
    step = np.arange(math.ceil(support) * 2 + 1)
    distance = (step + low[:, None] - center[:, None] + 0.5) * (1.0 / stretch)
    weights = np.where(step < taps[:, None], FILTERS[kind](distance), 0.0)
    total = np.zeros(count)
    for column in weights.T:  # in Pillow's order: a sum's last bit depends on it
        total = total + column
    weights = weights / np.where(total == 0, 1.0, total)[:, None] * (1 << BITS)
    rounded = np.trunc(np.where(weights < 0, weights - 0.5, weights + 0.5))
    return low.astype(np.int32), taps.astype(np.int32), np.ascontiguousarray(rounded, np.int32)


def box(distance: np.ndarray) -> np.ndarray:
    """1 within half a pixel."""
    return ((distance > -0.5) & (distance <= 0.5)).astype(np.float64)


def bicubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.5."""
    a, x = -0.5, np.abs(distance)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


FILTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"box": box, "bicubic": bicubic}


@functools.lru_cache(maxsize=1)
def compiled_resample() -> Callable[[np.ndarray, tuple[int, int], Window, str], np.ndarray] | None:
    """The compiled form of by_pillow; None where it cannot be made, or differs from Pillow."""
    library = library_of(SOURCE)
    if library is None:
        return None

    def resample(pixels: np.ndarray, size: tuple[int, int], window: Window, kind: str) -> np.ndarray:
        left, top, wide, high = window
        pixels = np.ascontiguousarray(pixels)
        across = coefficients(pixels.shape[1], size[0], left, wide, kind)
        down = coefficients(pixels.shape[0], size[1], top, high, kind)
        out, scratch = np.empty((high, wide, 3), np.uint8), np.empty(high, np.int32)
        counts = [ctypes.c_long(count) for count in (pixels.shape[1], wide, across[2].shape[1], high, down[2].shape[1])]
        x, y = ([address(array) for array in arrays] for arrays in (across, down))
        if library.resample(
            address(pixels),
            counts[0],
            counts[1],
            *x,
            counts[2],
            counts[3],
            *y,
            counts[4],
            address(scratch),
            address(out),
        ):
            raise MemoryError
        return out

    generator = np.random.default_rng(0)
    for wide, high, size, window in ((61, 47, (40, 31), (3, 2, 30, 28)), (33, 20, (50, 31), (0, 5, 50, 20))):
        pixels = generator.integers(0, 256, (high, wide, 3), dtype=np.uint8)
        for kind in FILTERS:
            if not np.array_equal(resample(pixels, size, window, kind), by_pillow(pixels, size, window, kind)):
                return None
    return resample


def address(array: np.ndarray) -> ctypes.c_void_p:
    """Where an array's numbers begin."""
    return ctypes.c_void_p(array.ctypes.data)

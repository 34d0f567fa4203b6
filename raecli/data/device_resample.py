"""Pillow's resampling on any torch device: the arithmetic of resample.c in int32, equal to the bit, a batch at a time.

Coefficients have 22 bits, both passes are rounded to 8, and a sum of taps fits an int32: nothing depends on the order
of a sum or on a device's floats. A batch takes as many kernels as an image, of whatever sizes its images are: their
pixels lie one after the other, and every row of a window knows where it begins.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from raecli.data.preprocess import WINDOW_PIXELS, center_window, decode_pixels, resized_crop, shorter_sides
from raecli.data.resample import BITS, FILTERS, Window, by_pillow, coefficients, down_first

TOGETHER = 64  # images a round of kernels: at 256 pixels their sums take at most 100 MB
LARGEST = 16_000_000  # pixels; above, an image is the host's
GROUP_PIXELS = 64_000_000  # that a device holds at once, .2 GB: 128 of ImageNet's images take 24, five photographs 60


def host_pixels(data: bytes, name: str, size: int, *, pinned: bool) -> Tensor:
    """Decode what `center_squares` will crop: uint8 [H, W, 3] on the host, decoded in place into pinned memory.

    What is not for a device (`suits_device`) comes as the finished square. Errors are decode_rgb's.
    """
    memory: list[Tensor] = []

    def room(shape: tuple[int, int, int]) -> np.ndarray:
        memory.append(torch.empty(shape, dtype=torch.uint8, pin_memory=pinned))
        return memory[-1].numpy()

    pixels = decode_pixels(data, name, room)
    if not suits_device(pixels.shape[1], pixels.shape[0], size):
        pixels = resized_crop(pixels, size, size, None, None)
    elif memory and pixels.ctypes.data == memory[-1].data_ptr():
        return memory[-1]
    copy = torch.from_numpy(np.array(pixels))
    return copy.pin_memory() if pinned else copy


def suits_device(wide: int, high: int, size: int) -> bool:
    """Whether the centre crop of an image is resampled here: not where Pillow goes down first, nor of a giant."""
    halves, last = shorter_sides(wide, high, size)
    if wide * high > LARGEST or last[0] * last[1] > WINDOW_PIXELS:
        return False
    return not any(down_first(*before, *after) for before, after in itertools.pairwise([(wide, high), *halves, last]))


def squares_in_groups(images: Iterable[Tensor], size: int, device: torch.device) -> Tensor:
    """`center_squares` of images on the host, uint8 [B, 3, size, size] on a device.

    Each is sent as it comes; as soon as the next one would not fit into GROUP_PIXELS, those before it are resampled.
    """
    parts: list[Tensor] = []
    group: list[Tensor] = []
    pixels = 0
    for image in images:
        area = image.shape[0] * image.shape[1]
        if group and pixels + area > GROUP_PIXELS:
            parts.append(center_squares(group, size))
            group, pixels = [], 0
        group.append(image.to(device, non_blocking=True))
        pixels += area
    if group:
        parts.append(center_squares(group, size))
    return torch.cat(parts) if parts else torch.empty((0, 3, size, size), dtype=torch.uint8)


def center_squares(images: Sequence[Tensor], size: int) -> Tensor:
    """guided-diffusion's centre crops of images that suit: uint8 [B, 3, size, size], on the images' device.

    images: uint8 [H, W, 3], dense, of any sizes.
    """
    halved, sizes, windows = [], [], []
    for image in images:
        halves, last = shorter_sides(image.shape[1], image.shape[0], size)
        for half in halves:
            image = resized_windows([image], [half], [(0, 0, *half)], "box")[0]
        halved.append(image)
        sizes.append(last)
        windows.append(center_window(*last, size))
    return resized_windows(halved, sizes, windows, "bicubic").permute(0, 3, 1, 2)


def resized_windows(
    images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], windows: Sequence[Window], kind: str
) -> Tensor:
    """What lies in windows of images resized: uint8 [B, window height, window width, 3], on the images' device.

    images: uint8 [H, W, 3], dense; sizes: width and height of each whole result; windows: all of one width and height;
    kind: box or bicubic. Not for sizes of which `down_first` is true.
    """
    parts = []
    for start in range(0, len(images), TOGETHER):
        part = slice(start, start + TOGETHER)
        tables = host_tables([image.shape for image in images[part]], sizes[part], windows[part], kind)
        parts.append(resampled(images[part], tables))
    return torch.cat(parts)


def host_tables(
    shapes: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]], windows: Sequence[Window], kind: str
) -> list[np.ndarray]:
    """What a device has to know of a batch, int32: [B, 4], where each image begins (in pixels), its width, the first
    and the last row that are needed; then first positions [B, n] and weights [B, taps, n] of the window's columns,
    and those of its rows, counted from the first row that is needed.
    """
    across, down, rows, begin = [], [], [], 0
    for (high, wide, _), (new_wide, new_high), (left, top, columns, lines) in zip(shapes, sizes, windows, strict=True):
        across.append(coefficients(wide, new_wide, left, columns, kind))
        first, taps, weights = coefficients(high, new_high, top, lines, kind)
        rows.append((begin, wide, first[0], (first + taps).max() - 1))
        down.append((first - first[0], taps, weights))
        begin += high * wide
    told = np.array(rows, np.int32)
    return [told, *stacked(across), *stacked(down)]


def stacked(axes: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of several axes in one: first positions [B, n], weights [B, taps, n], with 0 for taps too many."""
    most = max(int(taps.max()) for _, taps, _ in axes)
    weights = np.zeros((len(axes), most, len(axes[0][0])), np.int32)
    for row, (_, taps, own) in zip(weights, axes, strict=True):
        row[: taps.max()] = own.T[: taps.max()]
    return np.stack([first for first, _, _ in axes]), weights


def resampled(images: Sequence[Tensor], tables: list[np.ndarray]) -> Tensor:
    """Both passes, by the tables: uint8 [B, rows, columns, 3]."""
    device, count = images[0].device, len(images)
    high = int((tables[0][:, 3] - tables[0][:, 2]).max()) + 1
    rows, x_first, x_weights, y_first, y_weights = sent(tables, device)
    begin, wide, top, bottom = (column[:, None] for column in rows.unbind(1))
    pixels = torch.cat([image.reshape(-1, 3) for image in images])
    line = begin + torch.minimum(top + torch.arange(high, dtype=torch.int32, device=device), bottom) * wide
    columns = (torch.minimum(x_first + tap, wide - 1) for tap in range(x_weights.shape[1]))
    places = (line[:, :, None] + column[:, None, :] for column in columns)
    middle = weighed(pixels, places, x_weights[:, :, None, :, None])  # [B, high, columns, 3]
    lines = torch.arange(0, count * high, high, dtype=torch.int32, device=device)[:, None]
    places = (lines + (y_first + tap).clamp(max=high - 1) for tap in range(y_weights.shape[1]))
    return weighed(middle.flatten(0, 1), places, y_weights[:, :, :, None, None])


def sent(tables: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Tables on a device, by one transfer."""
    together = torch.from_numpy(np.concatenate([table.ravel() for table in tables]))
    if device.type == "cuda":  # from pageable memory a copy waits for all that is queued
        together = together.pin_memory()
    parts = together.to(device, non_blocking=True).split([table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def weighed(pixels: Tensor, places: Iterable[Tensor], weights: Tensor) -> Tensor:
    """Sum over taps of weights[:, tap] * pixels[places of the tap], rounded to 8 bits as Pillow does."""
    total: Tensor | None = None
    for tap, place in enumerate(places):
        found = pixels.index_select(0, place.flatten()).view(*place.shape, *pixels.shape[1:])
        term = found * weights[:, tap]
        total = term.add_(1 << (BITS - 1)) if total is None else total.add_(term)
    assert total is not None
    return (total >> BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=8)
def equals_pillow(device: torch.device) -> bool:
    """A trial on a device that was never met: whether all bits of a small batch are Pillow's."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (high, wide, 3), dtype=np.uint8) for high, wide in ((47, 61), (20, 33))]
    sizes, windows = [(40, 31), (50, 31)], [(3, 2, 30, 28), (0, 3, 30, 28)]
    for kind in FILTERS:
        found = resized_windows([torch.from_numpy(image).to(device) for image in images], sizes, windows, kind).cpu()
        for image, size, window, own in zip(images, sizes, windows, found.numpy(), strict=True):
            if not np.array_equal(own, by_pillow(image, size, window, kind)):
                return False
    return True

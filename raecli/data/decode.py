"""Batches of pixels out of an image source, on a pool of threads; what cannot be read is listed or skipped."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raecli.data.images import ImageSource
from raecli.data.preprocess import center_square
from raecli.errors import InputError

CHECK_SECONDS = 60.0  # after a bad image, how long the others are looked at for a full list

Skipped = dict[str, str]  # source, reason


@dataclass(frozen=True)
class Decoded:
    """Images of one batch that could be read, and what was wrong with the others."""

    indices: list[int]  # into the source
    images: Tensor  # uint8 [B, 3, S, S]
    skipped: list[Skipped]


class Decoder:
    """Reads images of a source as centre crops of `size` pixels."""

    def __init__(self, source: ImageSource, size: int, *, threads: int, skip_bad: bool, pinned: bool) -> None:
        self.source, self.size, self.skip_bad, self.pinned = source, size, skip_bad, pinned
        self.pool = ThreadPoolExecutor(threads)

    def batch(self, indices: list[int]) -> Decoded:
        """Decode some. Raises InputError with every unreadable image found within a minute, unless they are skipped."""
        decoded = list(self.pool.map(self.one, indices))
        skipped = [entry for entry in decoded if isinstance(entry, dict)]
        if skipped and not self.skip_bad:
            raise bad_images(self.source, skipped, self.one)
        good = [entry for entry in decoded if isinstance(entry, np.ndarray)]
        pixels = np.stack(good) if good else np.empty((0, self.size, self.size, 3), np.uint8)
        images = torch.from_numpy(pixels)
        images = (images.pin_memory() if self.pinned else images).permute(0, 3, 1, 2)
        kept = [index for index, entry in zip(indices, decoded, strict=True) if isinstance(entry, np.ndarray)]
        return Decoded(kept, images, skipped)

    def one(self, index: int) -> np.ndarray | Skipped:
        """The pixels of an image, uint8 [S, S, 3], or why there are none."""
        item = self.source.items[index]
        try:
            return center_square(item.read(), item.name, self.size)
        except InputError as error:
            return {"source": item.name, "reason": str(error).removeprefix(f"{item.name}: ")}


def bad_images(source: ImageSource, bad: list[Skipped], decode: Callable[[int], np.ndarray | Skipped]) -> InputError:
    """The error that lists every unreadable image found within a minute."""
    found = {entry["source"]: entry["reason"] for entry in bad}
    until, checked = time.monotonic() + CHECK_SECONDS, 0
    for index in range(len(source.items)):
        if time.monotonic() > until:
            break
        entry, checked = decode(index), checked + 1
        if isinstance(entry, dict):
            found[entry["source"]] = entry["reason"]
    lines = "".join(f"\n  {name}: {reason}" for name, reason in sorted(found.items()))
    looked = f"{checked} of {len(source.items)} looked at"
    return InputError(
        f"{source.path}: {len(found)} unreadable images ({looked}); mend them, or --on-bad-image skip{lines}"
    )

"""Batches of pixels out of an image source, on a pool of threads; what cannot be read is listed or skipped."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raecli.data.device_resample import center_squares, equals_pillow, host_pixels
from raecli.data.images import ImageSource
from raecli.data.preprocess import center_square
from raecli.errors import InputError

CHECK_SECONDS = 60.0  # after a bad image, how long the others are looked at for a full list

Skipped = dict[str, str]  # source, reason


@dataclass(frozen=True)
class Decoded:
    """Images of one batch that could be read, and what was wrong with the others."""

    indices: list[int]  # into the source
    images: Tensor  # uint8 [B, 3, S, S], where they were resampled
    skipped: list[Skipped]


class Decoder:
    """Reads images of a source as centre crops of `size` pixels.

    resample_on: a device that resamples, once it has shown that its bits are Pillow's; None: the host does.
    """

    def __init__(
        self, source: ImageSource, size: int, *, threads: int, skip_bad: bool, resample_on: torch.device | None
    ) -> None:
        self.source, self.size, self.skip_bad = source, size, skip_bad
        self.device = resample_on if resample_on is not None and equals_pillow(resample_on) else None
        self.pinned = resample_on is not None and resample_on.type == "cuda"
        self.pool = ThreadPoolExecutor(threads)

    def batch(self, indices: list[int]) -> Decoded:
        """Decode some. Raises InputError with every unreadable image found within a minute, unless they are skipped."""
        decoded = list(self.pool.map(self.one, indices))
        skipped = [entry for entry in decoded if isinstance(entry, dict)]
        if skipped and not self.skip_bad:
            raise bad_images(self.source, skipped, self.one)
        kept = [index for index, entry in zip(indices, decoded, strict=True) if not isinstance(entry, dict)]
        return Decoded(kept, self.squares([entry for entry in decoded if not isinstance(entry, dict)]), skipped)

    def squares(self, pixels: list[Any]) -> Tensor:
        """A batch out of what `one` gives."""
        if not pixels:
            return torch.empty((0, 3, self.size, self.size), dtype=torch.uint8)
        if self.device is not None:
            return center_squares([image.to(self.device, non_blocking=True) for image in pixels], self.size)
        images = torch.from_numpy(np.stack(pixels))
        return (images.pin_memory() if self.pinned else images).permute(0, 3, 1, 2)

    def one(self, index: int) -> np.ndarray | Tensor | Skipped:
        """The square of an image, uint8 [S, S, 3]; or what a device makes it of, in a tensor; or why there is none."""
        item = self.source.items[index]
        try:
            if self.device is not None:
                return host_pixels(item.read(), item.name, self.size, pinned=self.pinned)
            return center_square(item.read(), item.name, self.size)
        except InputError as error:
            return {"source": item.name, "reason": str(error).removeprefix(f"{item.name}: ")}


def bad_images(
    source: ImageSource, bad: list[Skipped], decode: Callable[[int], np.ndarray | Tensor | Skipped]
) -> InputError:
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

"""Batches of pixels out of an image source, on a pool of threads; what cannot be read is listed or skipped."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raecli.data.device_resample import GROUP_PIXELS, equals_pillow, host_pixels, squares_in_groups
from raecli.data.images import ImageSource
from raecli.data.preprocess import center_square
from raecli.errors import InputError, counted

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
        self.threads, self.pool = threads, ThreadPoolExecutor(threads)

    def batch(self, indices: list[int]) -> Decoded:
        """Decode some. Raises InputError with every unreadable image found within a minute, unless they are skipped."""
        kept: list[int] = []
        skipped: list[Skipped] = []

        def readable() -> Iterator[Any]:
            for index, entry in zip(indices, self.decoded(indices), strict=True):
                if isinstance(entry, dict):
                    skipped.append(entry)
                else:
                    kept.append(index)
                    yield entry

        images = self.squares(readable())
        if skipped and not self.skip_bad:
            raise bad_images(self.source, skipped, self.one)
        return Decoded(kept, images, skipped)

    def decoded(self, indices: list[int]) -> Iterator[np.ndarray | Tensor | Skipped]:
        """What `one` gives of each, in order.

        Bounds the host's memory: while those decoded and not yet taken have more than GROUP_PIXELS, none is begun
        beyond one a thread and one that waits for a thread.
        """
        slots, areas, taken = threading.Semaphore(self.threads + 1), [0], 0
        begun: deque[Future[np.ndarray | Tensor | Skipped]] = deque()

        def counted(index: int) -> np.ndarray | Tensor | Skipped:
            try:
                entry = self.one(index)
                areas.append(area_of(entry))
                return entry
            finally:
                slots.release()

        for index in indices:
            while sum(areas) - taken > GROUP_PIXELS:
                entry = begun.popleft().result()
                taken += area_of(entry)
                yield entry
            slots.acquire()
            begun.append(self.pool.submit(counted, index))
        while begun:
            yield begun.popleft().result()

    def squares(self, pixels: Iterator[Any]) -> Tensor:
        """A batch out of what `one` gives."""
        if self.device is not None:
            return squares_in_groups(pixels, self.size, self.device)
        squares = list(pixels)
        if not squares:
            return torch.empty((0, 3, self.size, self.size), dtype=torch.uint8)
        images = torch.from_numpy(np.stack(squares))
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


def area_of(entry: np.ndarray | Tensor | Skipped) -> int:
    """Pixels of what `one` gives."""
    return 0 if isinstance(entry, dict) else entry.shape[0] * entry.shape[1]


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
        f"{source.path}: {counted(len(found), 'unreadable image')} ({looked}); mend them, or --on-bad-image skip{lines}"
    )

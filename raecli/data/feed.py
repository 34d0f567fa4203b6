"""Work done ahead of its use, in order: batches in a background thread, images in a pool of them."""

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from raecli.store.latent_cache import LatentCache
from raecli.store.memory import fresh_memory

Item = TypeVar("Item")
Result = TypeVar("Result")
DONE = object()
DEPTH = 2  # batches that are made ahead of the one in use
READ_AHEAD = 4  # further batches that the system is asked to read

Samples = tuple[np.ndarray, list[bool] | None]  # indices into a cache, and which of them mirrored


def ahead(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """make(item) for each item, in order, at most DEPTH results ahead in one thread. Its exceptions come through."""
    results: queue.Queue[Any] = queue.Queue(maxsize=DEPTH)
    leave = threading.Event()

    def put(value: Any) -> None:
        while not leave.is_set():
            try:
                results.put(value, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if leave.is_set():
                    return
                put((make(item), None))
            put((DONE, None))
        except BaseException as error:  # handed to the reader, who raises it
            put((DONE, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            result, error = results.get()
            if error is not None:
                raise error
            if result is DONE:
                return
            yield result
    finally:
        leave.set()
        thread.join()


class Abandoned(Exception):
    """What a consumer behind gets instead of a next item, when there will be none because the producer failed."""


@contextlib.contextmanager
def behind(consume: Callable[[Iterator[Item]], None]) -> Iterator[Callable[[Item], None]]:
    """consume(items) in a thread of its own; yields the call that hands it an item, and waits for it at the end.

    At most DEPTH items wait. Its exceptions come through; if the body fails, its iterator raises Abandoned.
    """
    items: queue.Queue[Any] = queue.Queue(maxsize=DEPTH)
    failures: list[BaseException] = []

    def received() -> Iterator[Item]:
        while (item := items.get()) is not DONE:
            if item is Abandoned:
                raise Abandoned
            yield item

    def work() -> None:
        try:
            consume(received())
        except BaseException as error:  # raised again where items are put
            failures.append(error)

    def put(item: Any) -> None:
        while not failures:
            try:
                items.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
        raise failures[0]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield put
        put(DONE)
    except BaseException:
        if not failures:
            with contextlib.suppress(queue.Empty):
                while True:
                    items.get_nowait()
            items.put(Abandoned)
        raise
    finally:
        thread.join()
    if failures:
        raise failures[0]


def pooled(make: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """make(item) for each item, in order, on `workers` threads."""
    if workers <= 1:
        return [make(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(make, items))


class LatentFeed:
    """One rank's latents, batch after batch, in a ring of buffers that is made once: pinned where there is a GPU.

    To be called in order by the thread of `ahead`. A batch is good until the next but one is taken: by then its copy
    to the GPU has been asked for, and its buffer waits for that copy to end.
    """

    def __init__(
        self, cache: LatentCache, samples_of: Callable[[int], Samples], size: int, device: torch.device
    ) -> None:
        self.cache, self.samples_of = cache, samples_of
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        shape = (size, *cache.layout.latent_shape)
        count = DEPTH + 3  # one is filled, DEPTH wait, one is in use, one may still be on its way to the GPU
        self.buffers = [host_buffer(shape, cache.dtype, pinned=self.stream is not None) for _ in range(count)]
        self.turn, self.sent = 0, None
        self.asked = -1  # the last step that was read ahead

    def batch(self, step: int) -> tuple[np.ndarray, Tensor]:
        """Indices [B] and latents [B, C, H, W] of a step, while the next steps' are read from the disk."""
        for later in range(max(self.asked, step) + 1, step + READ_AHEAD + 1):
            self.cache.read_ahead(*self.samples_of(later))
        self.asked = step + READ_AHEAD
        indices, flips = self.samples_of(step)
        return indices, self.cache.latents(indices.tolist(), flips, out=self.take())

    def take(self) -> Tensor:
        """The next buffer. What was sent to the GPU before the last call has arrived there."""
        if self.stream is not None:
            if self.sent is not None:
                self.sent.synchronize()
            self.sent = self.stream.record_event()
        self.turn += 1
        return self.buffers[self.turn % len(self.buffers)]


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Memory for a batch, touched, at a page: pinned, or plain."""
    if pinned:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    memory = fresh_memory(math.prod(shape) * dtype.itemsize)
    memory.fill(0)  # touched now, rather than in the first batches
    return torch.from_numpy(memory).view(dtype).view(shape)

"""PERFORMANCE rows 1 and 2: latents in global random order out of plain tars, against memcpy of the same bytes.

Both fill buffers of their own, in batches of 64, from memory that is warm; buffers and both sources of memcpy begin at
a page, where memcpy is quickest. Row 1, CPU seconds of this thread, sides alternated batch by batch, medians: ours from
mapped tars; memcpy of the same rows from a mapped file (the page cache's memory), and from an array in huge pages. Once
with as many buffers in turn as the feed has, once with a single one, which stays in the processor's cache.
`first_touch`: all tars mapped anew, so that each page faults once. Row 2, wall: the feed's iterator, with its thread,
ring and readahead, against memcpy out of the mapped file into as many buffers in turn. One JSON line each.

    python benchmarks/latent_read.py [--mb 512]
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from latent_cache import make_cache

from raecli.data.feed import DEPTH, LatentFeed, ahead, host_buffer
from raecli.data.order import stream_slice
from raecli.store.latent_cache import LatentCache

BATCH = 64


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one run."""
    begin = clock()
    work()
    return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=512, help="size of the cache")
    torch.set_num_threads(1)
    samples = parser.parse_args().mb * 10**6 // (2 * 768 * 256) // BATCH * BATCH
    with tempfile.TemporaryDirectory() as folder:
        measure(make_cache(Path(folder), samples), Path(folder))


def measure(cache: LatentCache, folder: Path) -> None:
    """Both rows."""
    samples, size = len(cache), cache.layout.latent_bytes
    batches = [stream_slice(0, samples, start, BATCH).tolist() for start in range(0, samples, BATCH)]
    huge = host_buffer((samples, size), torch.uint8, pinned=False).numpy()
    huge[:] = np.random.default_rng(0).integers(0, 256, (samples, size), dtype=np.uint8)
    huge.tofile(folder / "plain")
    plain = np.memmap(folder / "plain", np.uint8, "r", shape=huge.shape)
    for buffers in (DEPTH + 3, 1):
        row_1(cache, batches, {"memcpy": plain, "memcpy_huge_pages": huge}, buffers)
    ring = [host_buffer((BATCH, size), torch.uint8, pinned=False).numpy() for _ in range(DEPTH + 3)]
    walls = [(feed_wall(cache, batches), seconds(lambda: around(ring, batches, plain))) for _ in range(15)]
    ours, other = (statistics.median(side) for side in zip(*walls, strict=True))
    line = {"row": 2, "feed_gb_per_s": samples * size / 1e9 / ours, "memcpy_gb_per_s": samples * size / 1e9 / other}
    print(json.dumps({**line, "ratio": other / ours, "bar": ">= 0.85"}))


def row_1(cache: LatentCache, batches: list[list[int]], sources: dict[str, np.ndarray], buffers: int) -> None:
    """Its line, for so many buffers in turn on each side."""
    size = cache.layout.latent_bytes
    outs = [host_buffer((BATCH, *cache.layout.latent_shape), cache.dtype, pinned=False) for _ in range(buffers)]
    rows = [host_buffer((BATCH, size), torch.uint8, pinned=False).numpy() for _ in range(buffers)]
    turns = {name: itertools.cycle(rows) for name in sources} | {"ours": itertools.cycle(outs)}
    sides: dict[str, Callable[[list[int]], object]] = {
        "ours": lambda batch: cache.latents(batch, out=next(turns["ours"]))
    }
    for name, source in sources.items():
        sides[name] = lambda batch, name=name, source=source: around([next(turns[name])], [batch], source)
    rate = rates(sides, batches, size)
    first = [seconds(lambda: touch_first(cache, batches, outs[0]), time.thread_time) for _ in range(5)]
    line: dict[str, object] = {"row": 1, "buffers": buffers}
    line |= {f"{name}_gb_per_cpu_s": value for name, value in rate.items()}
    line["first_touch_gb_per_cpu_s"] = len(cache) * size / 1e9 / statistics.median(first)
    line |= {"ratio": rate["ours"] / rate["memcpy"], "ratio_huge_pages": rate["ours"] / rate["memcpy_huge_pages"]}
    print(json.dumps({**line, "samples": len(cache), "bar": ">= 0.95"}))


def rates(sides: dict[str, Callable[[list[int]], object]], batches: list[list[int]], size: int) -> dict[str, float]:
    """GB per CPU second of each side, the sides in turn at every batch."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(12):
        for number, batch in enumerate(batches):
            turn = list(sides)[(number + repeat) % len(sides) :] + list(sides)[: (number + repeat) % len(sides)]
            for name in turn:
                found[name].append(seconds(lambda side=sides[name], b=batch: side(b), time.thread_time))
    return {name: len(batches[0]) * size / 1e9 / statistics.median(values) for name, values in found.items()}


def around(ring: list[np.ndarray], batches: list[list[int]], source: np.ndarray) -> None:
    """memcpy of all batches into buffers in turn."""
    for number, batch in enumerate(batches):
        rows = ring[number % len(ring)]
        for row, index in enumerate(batch):
            rows[row] = source[index]


def touch_first(cache: LatentCache, batches: list[list[int]], out: torch.Tensor) -> None:
    """A pass with every tar mapped anew."""
    cache.maps.clear()
    for batch in batches:
        cache.latents(batch, out=out)


def feed_wall(cache: LatentCache, batches: list[list[int]]) -> float:
    """Seconds of a pass through the iterator; its ring is made once a run and not counted."""
    feed = LatentFeed(cache, lambda step: (np.array(batches[step % len(batches)]), None), BATCH, torch.device("cpu"))
    return seconds(lambda: [None for _ in ahead(feed.batch, range(len(batches)))])


if __name__ == "__main__":
    main()

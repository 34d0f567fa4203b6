"""Work done ahead of its use, in order: batches in a background thread, images in a pool of them."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
DONE = object()


def ahead(make: Callable[[Item], Result], items: Iterable[Item], depth: int = 2) -> Iterator[Result]:
    """make(item) for each item, in order, at most `depth` results ahead in one thread. Its exceptions come through."""
    results: queue.Queue[Any] = queue.Queue(maxsize=depth)
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


def pooled(make: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """make(item) for each item, in order, on `workers` threads."""
    if workers <= 1:
        return [make(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(make, items))

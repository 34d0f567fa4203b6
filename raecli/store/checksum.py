"""A checksum as fast as memory, for files that are read back whole before every use. No defence against malice.

Each MiB is a grid of 256 rows of 512 words of 64 bits; the checksum is the sha256 of the length and of all sums of rows
and of columns, modulo 2^64. Two files with one checksum differ, if at all, by errors that cancel in every row and every
column that they touch: one to three wrong words are always found, and so is anything within 4096 neighbouring bytes (a
row's length: every column has one wrong word at most), which is a flipped bit, a bad sector, a lost page. Larger damage
is missed by chance alone, once in 2^64 or rarer.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from raecli.store.memory import fresh_memory, native

ROWS, COLUMNS = 256, 512
GRID = ROWS * COLUMNS * 8  # bytes
PIECE = 8 * GRID  # bytes that a thread takes at a time
NOWHERE = np.empty((0, 3), np.int64)
CUT = -1  # what memory.c says of a file that ends before


class Checksum:
    """The checksum of bytes that come in parts of any size."""

    def __init__(self) -> None:
        self.digest, self.length, self.rest = hashlib.sha256(), 0, bytearray()

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""
        self.length += len(data)
        if self.rest:
            missing = GRID - len(self.rest)
            self.rest += data[:missing]
            data = data[missing:]
            if len(self.rest) < GRID:
                return
            self.digest.update(sums_of(self.rest))
        whole = len(data) // GRID * GRID
        self.digest.update(sums_of(data[:whole]))
        self.rest = bytearray(data[whole:])

    def hexdigest(self) -> str:
        """Of all that came, once."""
        self.digest.update(sums_of(self.rest) + self.length.to_bytes(8, "little"))
        return self.digest.hexdigest()


def sums_of(data: bytes | bytearray | memoryview) -> bytes:
    """Sums of rows and columns, little-endian, grid after grid; the last grid is filled up with zeros."""
    library, grids = compiled_sums(), len(data) // GRID
    if library is None:
        return plain_sums(data)
    sums = np.empty((grids, ROWS + COLUMNS), "<u8")
    if grids:
        library.sums_of_grids(address_of(data), grids, sums.ctypes.data)
    return sums.tobytes() + plain_sums(data[grids * GRID :])


def plain_sums(data: bytes | bytearray | memoryview) -> bytes:
    """The same by numpy."""
    sums = []
    for start in range(0, len(data), GRID):
        part = data[start : start + GRID]
        filled = part if len(part) == GRID else bytes(part).ljust(GRID, b"\0")
        grid = np.frombuffer(filled, "<u8").reshape(ROWS, COLUMNS)
        sums += [grid.sum(1).tobytes(), grid.sum(0).tobytes()]
    return b"".join(sums)


@functools.lru_cache(maxsize=1)
def compiled_sums() -> ctypes.CDLL | None:
    """memory.c; None where it cannot be compiled, or adds otherwise than numpy."""
    library = native()
    if library is None:
        return None
    trial, sums = np.random.default_rng(0).integers(0, 256, GRID, np.uint8), np.empty(ROWS + COLUMNS, "<u8")
    library.sums_of_grids(trial.ctypes.data, 1, sums.ctypes.data)
    return library if sums.tobytes() == plain_sums(trial.tobytes()) else None


def nowhere(name: str) -> np.ndarray:
    """The places of a file that is read for its checksum alone."""
    return NOWHERE


def checksums(folder: Path, names: Iterable[str], places: Callable[[str], np.ndarray] = nowhere) -> dict[str, str]:
    """Checksums of files in a folder, on all cores, whatever their sizes: every thread takes pieces of them.

    places: where parts of a file are to go on the way, int64 [N, 3]: begin, end, address in memory; sorted, none over
    another. Asked for one file while those before are read. Raises OSError naming the file where a part of it cannot
    be had.
    """
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("rb", buffering=0)) for name in names}
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
        pool, memory = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0)))), GridMemory()
        sums = {}
        for name, file in files.items():
            wanted, starts = places(name), range(0, sizes[name], PIECE)
            pieces = [(start, min(start + PIECE, sizes[name])) for start in starts]
            sums[name] = [
                pool.submit(piece_sums, file, *piece, memory, overlapping(wanted, *piece)) for piece in pieces
            ]
        return {name: tied([part.result() for part in parts], sizes[name]) for name, parts in sums.items()}


def overlapping(places: np.ndarray, start: int, end: int) -> np.ndarray:
    """The places that want some of the bytes from start to end."""
    first, last = np.searchsorted(places[:, 1], start, side="right"), np.searchsorted(places[:, 0], end)
    return np.ascontiguousarray(places[first:last])


class GridMemory(threading.local):
    """Memory for a grid, each thread's own: it stays in the core's cache."""

    def __init__(self) -> None:
        self.grid = memoryview(fresh_memory(GRID))


def address_of(data: bytes | bytearray | memoryview) -> int:
    """Where bytes lie."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)


def piece_sums(file: io.FileIO, start: int, end: int, memory: GridMemory, places: np.ndarray = NOWHERE) -> bytes:
    """Sums of a file's bytes from start to end. They are read, not mapped: a page that cannot be had is an OSError."""
    library = compiled_sums()
    if library is None:
        return plain_piece_sums(file, start, end, memory, places)
    sums = np.empty((-(-(end - start) // GRID), ROWS + COLUMNS), "<u8")
    failed = library.sums_of_file(
        file.fileno(), start, end, address_of(memory.grid), sums.ctypes.data, places.ctypes.data, len(places)
    )
    if failed == CUT:
        raise OSError(errno.EIO, "was cut while it was read", file.name)
    if failed:
        raise OSError(failed, os.strerror(failed), file.name)
    return sums.tobytes()


def plain_piece_sums(file: io.FileIO, start: int, end: int, memory: GridMemory, places: np.ndarray) -> bytes:
    """The same by numpy."""
    sums = []
    for offset in range(start, end, GRID):
        part = memory.grid[: min(GRID, end - offset)]
        read_whole(file, offset, part)
        sums.append(plain_sums(part))
        for begin, stop, address in overlapping(places, offset, offset + len(part)).tolist():
            wanted = part[max(begin - offset, 0) : stop - offset]
            ctypes.memmove(address + max(offset - begin, 0), address_of(wanted), len(wanted))
    return b"".join(sums)


def read_whole(file: io.FileIO, offset: int, memory: memoryview) -> None:
    """Fill memory from a file. Raises OSError naming the file if it refuses, or ends before."""
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(file.fileno(), [memory[done:]], offset + done)
        except OSError as error:
            error.filename = file.name
            raise
        if not count:
            raise OSError(errno.EIO, "was cut while it was read", file.name)
        done += count


def tied(parts: list[bytes], length: int) -> str:
    """The checksum of a file out of its pieces' sums."""
    return hashlib.sha256(b"".join(parts) + length.to_bytes(8, "little")).hexdigest()

"""A checksum as fast as memory, for files that are read back whole before every use. No defence against malice.

Each MiB is a grid of 256 rows of 512 words of 64 bits; the checksum is the sha256 of the length and of all sums of rows
and of columns, modulo 2^64. Two files with one checksum differ, if at all, by errors that cancel in every row and every
column that they touch: one to three wrong words are always found, and so is anything within 4096 neighbouring bytes (a
row's length: every column has one wrong word at most), which is a flipped bit, a bad sector, a lost page. Larger damage
is missed by chance alone, once in 2^64 or rarer.
"""

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROWS, COLUMNS = 256, 512
GRID = ROWS * COLUMNS * 8  # bytes
PIECE = 8 * GRID  # bytes that a thread takes at a time


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
    sums = []
    for start in range(0, len(data), GRID):
        part = data[start : start + GRID]
        filled = part if len(part) == GRID else bytes(part).ljust(GRID, b"\0")
        grid = np.frombuffer(filled, "<u8").reshape(ROWS, COLUMNS)
        sums += [grid.sum(1).tobytes(), grid.sum(0).tobytes()]
    return b"".join(sums)


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Checksums of files in a folder, on all cores, whatever their sizes: every thread takes pieces of them."""
    with contextlib.ExitStack() as stack:
        maps = {name: stack.enter_context(mapped(folder / name)) for name in names}
        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0))))
        sums = {
            name: [pool.submit(piece_sums, data, start) for start in range(0, len(data), PIECE)]
            for name, data in maps.items()
        }
        return {name: tied([part.result() for part in parts], len(maps[name])) for name, parts in sums.items()}


def mapped(path: Path) -> contextlib.AbstractContextManager[mmap.mmap | bytes]:
    """A file's bytes where they lie."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return contextlib.nullcontext(b"")
        return contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def piece_sums(data: mmap.mmap | bytes, start: int) -> bytes:
    """Sums of one piece."""
    with memoryview(data) as view, view[start : start + PIECE] as piece:
        return sums_of(piece)


def tied(parts: list[bytes], length: int) -> str:
    """The checksum of a file out of its pieces' sums."""
    return hashlib.sha256(b"".join(parts) + length.to_bytes(8, "little")).hexdigest()

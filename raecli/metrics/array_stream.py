"""Arrays of .npy files and of .npz members, read by ranges of their first axis: never whole in memory."""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from raecli.errors import InputError
from raecli.store.foreign import ARRAYS

LOCAL_HEADER = 30  # bytes of a zip member's own header before its name; the lengths of name and extra at its end
HEADER_LEAST = 10  # bytes of an array's magic, version and header length
ENCRYPTED = 1  # bit of a member's flags


def members_of(path: Path) -> frozenset[str]:
    """Names of the arrays of an .npz; none for anything else."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return frozenset()
    try:
        with zipfile.ZipFile(path) as file:
            return frozenset(name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy"))
    except ARRAYS as error:
        raise InputError(f"{path}: cannot be read ({error}); make or download the file again") from error


class ArrayStream:
    """One array [N, ...] in C order. Reading forwards is cheap; backwards starts a compressed member again."""

    def __init__(self, path: Path, member: str, expected: str) -> None:
        """Reads the header only. member: of an .npz. expected: what the file should have been, for messages."""
        self.path = path
        self.stream = open_array(path, member, expected)
        self.is_stored = isinstance(self.stream, io.BufferedReader)  # any place is as near as any other
        self.shape, self.dtype = read_header(path, self.stream)
        self.bytes_each = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.offset = self.stream.tell()
        told, there = math.prod(self.shape) * self.dtype.itemsize, bytes_of(path, member) - HEADER_LEAST
        if told > there:
            raise InputError(f"{path}: says {told} bytes of array {list(self.shape)}, holds {max(0, there)}: damaged")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, not writable."""
        wanted = (stop - start) * self.bytes_each
        try:
            self.stream.seek(self.offset + start * self.bytes_each)
            data = self.stream.read(wanted)
        except ARRAYS as error:
            raise InputError(f"{self.path}: damaged ({error}); make or download the file again") from error
        if len(data) != wanted:
            raise InputError(f"{self.path}: ends before image {stop - 1} of {self.shape[0]}; make the file again")
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


def bytes_of(path: Path, member: str) -> int:
    """What an .npy, or the member of an .npz, has room for: a header may claim any number of images."""
    if path.suffix == ".npy":
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{member}.npy").file_size


def open_array(path: Path, member: str, expected: str) -> IO[bytes]:
    """The stream of an .npy, or of a member of an .npz."""
    try:
        if path.suffix == ".npy":
            return path.open("rb")
        archive = zipfile.ZipFile(path)
        entry = archive.getinfo(f"{member}.npy")
        if entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & ENCRYPTED:
            return at_stored_member(path, entry)
        return archive.open(entry)
    except KeyError as error:
        raise InputError(f"{path}: no such array in it (key {member} is missing); {expected}") from error
    except ARRAYS as error:
        raise InputError(f"{path}: cannot be read ({error}); make or download the file again") from error


def at_stored_member(path: Path, entry: zipfile.ZipInfo) -> IO[bytes]:
    """The file itself, at the first byte of a member that is not compressed: zipfile would seek by reading."""
    file = path.open("rb")
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER)
    if len(header) != LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise InputError(f"{path}: damaged (no member at byte {entry.header_offset}); make or download the file again")
    name, extra = struct.unpack("<HH", header[26:30])
    file.seek(name + extra, 1)
    return file


def read_header(path: Path, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, the stream left at its first value."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, by_columns, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except ARRAYS as error:
        raise InputError(f"{path}: its array cannot be read ({error}); make or download the file again") from error
    if by_columns:
        raise InputError(f"{path}: its array is in Fortran order; save it with numpy.ascontiguousarray")
    if dtype.hasobject:
        raise InputError(f"{path}: its array holds Python objects; expected numbers")
    return shape, dtype

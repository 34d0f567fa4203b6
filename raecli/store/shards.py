"""Latent shards: ordinary ustar files whose samples all take the same room, so that sample i lies at a known offset."""

import functools
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raecli.errors import StorageError

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
NUMPY_DTYPES = {
    "fp16": "<f2",
    "fp32": "<f4",
    "int8": "|i1",
}  # numpy has no bf16: such members are raw, the manifest tells shape and dtype
READ_DTYPES = TORCH_DTYPES | {"int8": torch.bfloat16}  # what a reader gets: int8 comes multiplied by its scales
BLOCK = 512
CHECKSUM = slice(148, 156)  # of a header: six octal digits, NUL, blank
WRITE_PIECES = 1024  # buffers that one writev takes: Linux's IOV_MAX


def padded(size: int) -> int:
    """Room that `size` bytes take in a tar."""
    return -(-size // BLOCK) * BLOCK


def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """What stands before an array's numbers in an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class Member(NamedTuple):
    """A member that holds numbers: how its name ends, its size, and what stands before and after the numbers."""

    ending: bytes
    size: int
    prefix: bytes
    padding: bytes


@dataclass(frozen=True)
class ShardLayout:
    """Where things lie in a shard. A sample is, for each view, a member with its numbers (and with int8 a second one
    with a scale a channel), then `KEY.cls` with its label in digits."""

    latent_shape: tuple[int, int, int]  # C, H, W
    dtype: str  # bf16, fp16, fp32, int8
    views: tuple[str, ...]  # "latent", or "latent" and "flip"

    @functools.cached_property
    def prefix(self) -> bytes:
        """What stands before a latent's numbers inside its member: .npy's header, or nothing for bf16."""
        return b"" if self.dtype == "bf16" else npy_header(NUMPY_DTYPES[self.dtype], self.latent_shape)

    @functools.cached_property
    def scale_prefix(self) -> bytes:
        """The .npy header of a sample's scales, float32 [C, 1, 1]."""
        return npy_header("<f4", (self.latent_shape[0], 1, 1))

    @property
    def quantised(self) -> bool:
        """Whether numbers are int8 beside their scales."""
        return self.dtype == "int8"

    @property
    def latent_bytes(self) -> int:
        """Bytes of one latent's numbers."""
        count = self.latent_shape[0] * self.latent_shape[1] * self.latent_shape[2]
        return count * TORCH_DTYPES[self.dtype].itemsize

    @property
    def numbers_bytes(self) -> int:
        """Room of a view's numbers: header, prefix, numbers, padding."""
        return BLOCK + padded(len(self.prefix) + self.latent_bytes)

    @property
    def scale_bytes(self) -> int:
        """Room of a view's scales, 0 without."""
        return BLOCK + padded(len(self.scale_prefix) + 4 * self.latent_shape[0]) if self.quantised else 0

    @property
    def member_bytes(self) -> int:
        """Room of one view."""
        return self.numbers_bytes + self.scale_bytes

    @property
    def sample_bytes(self) -> int:
        """Room of one sample: its views and its label."""
        return len(self.views) * self.member_bytes + 2 * BLOCK

    def shard_bytes(self, samples: int) -> int:
        """Size of a shard: its samples and the two empty blocks that end a tar."""
        return samples * self.sample_bytes + 2 * BLOCK

    def latent_offset(self, sample: int, view: int) -> int:
        """Where the numbers of a sample's view begin, in bytes from the shard's start."""
        return sample * self.sample_bytes + view * self.member_bytes + BLOCK + len(self.prefix)

    def scale_offset(self, sample: int, view: int) -> int:
        """Where its scales begin."""
        return self.latent_offset(sample, view) - len(self.prefix) + self.numbers_bytes + len(self.scale_prefix)

    def extension(self, view: str) -> str:
        """The member's ending, as webdataset shows it: latent.bf16, latent.npy, flip.npy."""
        return f"{view}.{'bf16' if self.dtype == 'bf16' else 'npy'}"

    @functools.cached_property
    def members(self) -> list["Member"]:
        """A sample's members in their order, but for its label."""
        members = []
        for view in self.views:
            told = [(f".{self.extension(view)}", self.prefix, self.latent_bytes)]
            told += [(f".{view}_scale.npy", self.scale_prefix, 4 * self.latent_shape[0])] * self.quantised
            for ending, prefix, count in told:
                size = len(prefix) + count
                members.append(Member(ending.encode(), size, prefix, bytes(padded(size) - size)))
        return members

    def strided(self, data: Tensor, samples: int) -> tuple[list[Tensor], list[Tensor]]:
        """An int8 shard's bytes as tensors on them, one a view: numbers [samples, C*H*W] and scales [samples, C]."""

        def tensor(dtype: torch.dtype, offset: int, count: int) -> Tensor:
            size = dtype.itemsize
            return data.view(dtype).as_strided((samples, count), (self.sample_bytes // size, 1), offset // size)

        dtype, views = TORCH_DTYPES[self.dtype], range(len(self.views))
        count = self.latent_bytes // dtype.itemsize
        numbers = [tensor(dtype, self.latent_offset(0, view), count) for view in views]
        return numbers, [tensor(torch.float32, self.scale_offset(0, view), self.latent_shape[0]) for view in views]


@functools.lru_cache(maxsize=4096)
def header_of_nobody(ending: bytes, size: int) -> tuple[bytes, int]:
    """A ustar header without a name, and the sum of its bytes with a blank checksum and the name's ending.

    No clock, no user in it.
    """
    header = tarfile.TarInfo("")
    header.size = size
    data = header.tobuf(tarfile.USTAR_FORMAT)
    return data, sum(data) - sum(data[CHECKSUM]) + 8 * ord(" ") + sum(ending)


def header_of(key: bytes, total: int, ending: bytes, size: int) -> bytes:
    """The header of member key + ending: tarfile's, made once an ending and size, with name and checksum patched in.

    total: the sum of the key's bytes.
    """
    template, rest = header_of_nobody(ending, size)
    length = len(key) + len(ending)
    if not key or b"\0" in key:
        raise ValueError(f"{key!r} is no name for a tar's member")
    if length > 100:
        raise ValueError(f"{(key + ending).decode()}: a tar's name has room for 100 characters")
    checksum = b"%06o\0 " % (total + rest)
    return b"".join((key, ending, template[length : CHECKSUM.start], checksum, template[CHECKSUM.stop :]))


def quantise(latents: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [B, C, H, W] and float32 scales [B, C, 1, 1] of latents: each channel of each sample by its largest value.

    A channel of zeros has scale 0. scale * int8 differs from the latent by half a scale at most.
    """
    latents = latents.float()
    scales = latents.abs().amax(dim=(2, 3), keepdim=True) / 127
    return (latents / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127).to(torch.int8), scales


def dequantise(numbers: Tensor, scales: Tensor) -> Tensor:
    """What a reader gets of int8 latents, bf16: numbers * scales."""
    return (numbers.float() * scales).to(READ_DTYPES["int8"])


class ShardWriter:
    """Appends batches of samples to a new shard file, with few system calls and no copy of the numbers."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path, self.layout, self.samples = path, layout, 0
        self.file = path.open("wb", buffering=0)
        self.members = layout.members

    def add(self, keys: Sequence[str], labels: Sequence[int], views: Sequence[Tensor]) -> list[Tensor]:
        """Append samples; returns each view as its readers will get it, [B, C, H, W].

        views: [B, C, H, W] a view, on any device, finite; of the layout's dtype, or of any float type for int8.
        """
        parts: list[list[Tensor]] = []  # one list of arrays a view: numbers, scales
        for latents in views:
            parts.append(list(quantise(latents)) if self.layout.quantised else [latents])
        rows = [array.contiguous().flatten(1).view(torch.uint8).cpu().numpy() for view in parts for array in view]
        pieces: list[bytes | np.ndarray] = []
        for key, label, *arrays in zip(keys, labels, *rows, strict=True):
            pieces += self.pieces_of(key.encode("ascii"), label, arrays)
        self.write(pieces)
        self.samples += len(keys)
        return [dequantise(*view) for view in parts] if self.layout.quantised else list(views)

    def pieces_of(self, key: bytes, label: int, arrays: list[np.ndarray]) -> list[bytes | np.ndarray]:
        """One sample's bytes: what stands between two runs of numbers is one piece, the numbers are not copied."""
        pieces: list[bytes | np.ndarray] = []
        total, padding = sum(key), b""
        for (ending, size, prefix, room), array in zip(self.members, arrays, strict=True):
            pieces += [padding + header_of(key, total, ending, size) + prefix, array]
            padding = room
        text = b"%d" % label
        pieces.append(padding + header_of(key, total, b".cls", len(text)) + text.ljust(BLOCK, b"\0"))
        return pieces

    def write(self, pieces: list[bytes | np.ndarray]) -> None:
        """All pieces, in order."""
        for start in range(0, len(pieces), WRITE_PIECES):
            some = pieces[start : start + WRITE_PIECES]
            try:
                written = os.writev(self.file.fileno(), some)
            except OSError as error:
                raise self.refused(pieces, error) from None
            if written != sum(map(len, some)):  # a signal or 2 GiB: the rest in one run
                rest = memoryview(b"".join(some))[written:]
                while rest:
                    try:
                        rest = rest[self.file.write(rest) :]
                    except OSError as error:
                        raise self.refused(pieces, error) from None

    def refused(self, pieces: list[bytes | np.ndarray], error: OSError) -> StorageError:
        """What to say when the disk does not take a batch."""
        needed = sum(map(len, pieces))
        return StorageError(
            f"{self.path}: {needed} more bytes could not be written ({error}); free space, then run the same command"
        )

    def close(self) -> None:
        """End the tar."""
        self.write([bytes(2 * BLOCK)])
        self.file.close()

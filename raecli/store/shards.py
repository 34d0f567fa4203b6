"""Latent shards: ordinary ustar files whose samples all take the same room, so that sample i lies at a known offset."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUMPY_DTYPES = {
    "fp16": "<f2",
    "fp32": "<f4",
}  # numpy has no bf16: such members are raw, the manifest tells shape and dtype
BLOCK = 512


def padded(size: int) -> int:
    """Room that `size` bytes take in a tar."""
    return -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class ShardLayout:
    """Where things lie in a shard. A sample is one member a view, then `KEY.cls` with its label in digits."""

    latent_shape: tuple[int, int, int]  # C, H, W
    dtype: str  # bf16, fp16, fp32
    views: tuple[str, ...]  # "latent", or "latent" and "flip"

    @property
    def prefix(self) -> bytes:
        """What stands before a latent's numbers inside its member: .npy's header, or nothing for bf16."""
        if self.dtype == "bf16":
            return b""
        header = {"descr": NUMPY_DTYPES[self.dtype], "fortran_order": False, "shape": self.latent_shape}
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, header)
        return buffer.getvalue()

    @property
    def latent_bytes(self) -> int:
        """Bytes of one latent's numbers."""
        count = self.latent_shape[0] * self.latent_shape[1] * self.latent_shape[2]
        return count * TORCH_DTYPES[self.dtype].itemsize

    @property
    def member_bytes(self) -> int:
        """Room of one view: header, prefix, numbers, padding."""
        return BLOCK + padded(len(self.prefix) + self.latent_bytes)

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

    def extension(self, view: str) -> str:
        """The member's ending, as webdataset shows it: latent.bf16, latent.npy, flip.npy."""
        return f"{view}.{'bf16' if self.dtype == 'bf16' else 'npy'}"


def member(name: str, data: bytes) -> bytes:
    """One member of a tar: header, data, padding. The same bytes for the same input: no clock, no user."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(padded(len(data)) - len(data))


class ShardWriter:
    """Appends samples to a new shard file."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.layout, self.samples = layout, 0
        self.file = path.open("wb")

    def add(self, key: str, label: int, latents: Sequence[Tensor]) -> None:
        """Append a sample. latents: one [C, H, W] a view, of the layout's dtype, on the CPU."""
        for view, latent in zip(self.layout.views, latents, strict=True):
            numbers = latent.contiguous().view(torch.uint8).numpy().tobytes()
            self.file.write(member(f"{key}.{self.layout.extension(view)}", self.layout.prefix + numbers))
        self.file.write(member(f"{key}.cls", str(label).encode()))
        self.samples += 1

    def close(self) -> None:
        """End the tar."""
        self.file.write(bytes(2 * BLOCK))
        self.file.close()

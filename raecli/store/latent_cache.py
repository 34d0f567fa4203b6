"""Reading a latent cache: any sample by its index, straight out of the mapped shards."""

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raecli.errors import InputError
from raecli.store.atomic import sha256_of
from raecli.store.manifest import Manifest, read_manifest
from raecli.store.shards import TORCH_DTYPES, ShardLayout
from raecli.store.statistics import STATISTICS, LatentStatistics, load_statistics
from raecli.store.tensors import save_tensors

INDEX = "index.safetensors"
VIEWS = {"center": ("latent",), "center+flip": ("latent", "flip")}


class LatentCache:
    """A latent cache, opened: `len(cache)`, `cache[i] -> (latent [C, H, W], label, key)`. Latents are un-normalised.

    Sample i is i-th in the cache's own, seeded order, not in the order of the images' names.
    """

    def __init__(self, folder: Path, manifest: Manifest, labels: Tensor, keys: list[str]) -> None:
        self.folder, self.manifest = folder, manifest
        self.verify_at_first_use = False  # hold each shard against its digest when it is first mapped
        self.labels = labels  # int64 [N]
        self.keys = keys
        self.layout = ShardLayout(manifest.latent_shape, manifest.dtype, VIEWS[manifest.views])
        self.starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        self.maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        """The centre view of a sample, its label and its key."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a cache of {len(self)}")
        return self.latents([index])[0], int(self.labels[index]), self.keys[index]

    @property
    def statistics(self) -> LatentStatistics:
        """Mean and variance over all samples and views."""
        return load_statistics(self.folder / STATISTICS)

    @property
    def has_flips(self) -> bool:
        """Whether each sample has a second view, of the mirrored image."""
        return len(self.layout.views) > 1

    def latents(self, indices: Sequence[int], flipped: Sequence[bool] | None = None) -> Tensor:
        """Latents [B, C, H, W] of samples in the cache's dtype; `flipped` chooses the mirrored views."""
        batch = torch.empty((len(indices), *self.layout.latent_shape), dtype=TORCH_DTYPES[self.layout.dtype])
        rows = batch.view(len(indices), -1).view(torch.uint8).numpy()
        for row, index in enumerate(indices):
            shard = int(np.searchsorted(self.starts, index, side="right")) - 1
            view = int(flipped[row]) if flipped is not None else 0
            offset = self.layout.latent_offset(int(index - self.starts[shard]), view)
            rows[row] = np.frombuffer(self.mapped(shard), np.uint8, self.layout.latent_bytes, offset)
        return batch

    def mapped(self, shard: int) -> mmap.mmap:
        """A shard's file in memory, mapped at its first use."""
        if shard not in self.maps:
            if self.verify_at_first_use and (problems := self.bad_shards([shard])):
                raise damaged(self.folder, problems)
            with (self.folder / self.manifest.shards[shard].name).open("rb") as file:
                self.maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self.maps[shard]

    def bad_shards(self, shards: Iterable[int] | None = None) -> list[str]:
        """`name: what is wrong` for each shard whose bytes are not the manifest's, by sha256."""
        problems = []
        for number in range(len(self.manifest.shards)) if shards is None else shards:
            record = self.manifest.shards[number]
            if sha256_of(self.folder / record.name) != record.sha256:
                problems.append(f"{record.name}: its bytes changed since it was written (sha256 differs)")
        return problems


def open_cache(path: str | Path) -> LatentCache:
    """Open a latent cache; checks its manifest, the digests of index and statistics, and the size of every shard.

    Raises InputError naming every file that is missing or not as it was written.
    """
    folder = Path(path)
    manifest = check_cache(folder)
    return LatentCache(folder, manifest, *read_index(folder / INDEX))


def check_cache(path: str | Path) -> Manifest:
    """The checks of open_cache; returns the manifest."""
    folder = Path(path)
    manifest = read_manifest(folder)
    layout = ShardLayout(manifest.latent_shape, manifest.dtype, VIEWS[manifest.views])
    problems = bad_tables(folder, manifest)
    for record in manifest.shards:
        file = folder / record.name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            problems.append(f"{record.name}: missing")
        elif found != record.bytes or found != layout.shard_bytes(record.samples):
            problems.append(f"{record.name}: {found} bytes, {record.bytes} expected")
    if problems:
        raise damaged(folder, problems)
    labels, keys = read_index(folder / INDEX)
    if not len(labels) == len(keys) == manifest.samples == sum(record.samples for record in manifest.shards):
        raise InputError(f"{folder}: manifest and index count samples differently; run rae encode-cache anew")
    return manifest


def bad_tables(folder: Path, manifest: Manifest) -> list[str]:
    """`name: what is wrong` for index and statistics, by their digests."""
    tables = ((INDEX, manifest.index_sha256), (STATISTICS, manifest.statistics_sha256))
    return [
        f"{name}: missing, or its bytes changed since it was written (sha256 differs)"
        for name, digest in tables
        if not (folder / name).is_file() or sha256_of(folder / name) != digest
    ]


def damaged(folder: Path, problems: list[str]) -> InputError:
    """The error that names every bad shard."""
    lines = "".join(f"\n  {problem}" for problem in problems)
    return InputError(
        f"{folder}: {len(problems)} bad files; run the same rae encode-cache again: it makes those anew{lines}"
    )


def write_index(path: Path, labels: list[int], keys: list[str]) -> None:
    """Labels, and keys as one run of bytes with their ends: no pickle, and quick for a million samples."""
    encoded = [key.encode() for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
    tensors = {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "keys": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
        "key_ends": torch.from_numpy(ends),
    }
    save_tensors(tensors, path)


def read_index(path: Path) -> tuple[Tensor, list[str]]:
    """Labels int64 [N] and keys."""
    try:
        tensors = load_file(path)
        ends = tensors["key_ends"].tolist()
        text = tensors["keys"].numpy().tobytes()
        return tensors["labels"], [text[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    except (OSError, SafetensorError, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no index of a latent cache: {error}; run rae encode-cache anew") from None

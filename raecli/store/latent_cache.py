"""Reading a latent cache: any sample by its index, straight out of the mapped shards."""

import mmap
import os
import resource
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raecli.errors import InputError
from raecli.store.atomic import sha256_of
from raecli.store.manifest import MANIFEST, Manifest, read_manifest
from raecli.store.memory import copy_memory, is_plain
from raecli.store.remote import PLACE, RemoteShards, local_folder, remote_of
from raecli.store.shards import READ_DTYPES, ShardLayout
from raecli.store.statistics import STATISTICS, LatentStatistics, load_statistics
from raecli.store.tensors import save_tensors
from raecli.store.verify import shard_problem, shard_problems, size_problem

INDEX = "index.safetensors"
PROBE = 8  # while all that was asked for is in memory, one sample of so many is asked about
VIEWS = {"center": ("latent",), "center+flip": ("latent", "flip")}


class LatentCache:
    """A latent cache, opened: `len(cache)`, `cache[i] -> (latent [C, H, W], label, key)`. Latents are un-normalised.

    Sample i is i-th in the cache's own, seeded order, not in the order of the images' names.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, labels: Tensor, keys: list[str], remote: RemoteShards | None = None
    ) -> None:
        self.folder, self.manifest, self.remote = folder, manifest, remote
        self.verify_at_first_use = False  # hold each shard against its digest when it is first mapped
        self.labels = labels  # int64 [N]
        self.keys = keys
        self.layout = ShardLayout(manifest.latent_shape, manifest.dtype, VIEWS[manifest.views])
        self.begins = np.array([self.layout.latent_offset(0, view) for view in range(len(self.layout.views))])
        self.starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        self.maps: dict[int, Mapped] = {}
        self.all_there = False  # whether the last batch that was read ahead was in memory
        allow_open_files(2 * len(manifest.shards))

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

    @property
    def dtype(self) -> torch.dtype:
        """What `latents` gives: the dtype on disk; bf16 for int8."""
        return READ_DTYPES[self.layout.dtype]

    def latents(
        self, indices: Sequence[int], flipped: Sequence[bool] | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Latents [B, C, H, W] of samples, of dtype `self.dtype`; `flipped` chooses the mirrored views.

        out: where to put them; its first B rows are returned. Without it memory is asked for, which costs as much
        as the reading.
        """
        batch = torch.empty((len(indices), *self.layout.latent_shape), dtype=self.dtype) if out is None else out
        if not is_plain(batch) or batch.dtype != self.dtype or batch.shape[1:] != self.layout.latent_shape:
            raise ValueError(f"out: {self.dtype} [{len(indices)}, {self.layout.latent_shape}] is wanted, dense")
        if len(batch) < len(indices):
            raise ValueError(f"out: {len(batch)} rows for {len(indices)} samples")
        batch = batch[: len(indices)]
        places = self.places(indices, flipped)
        rows = batch.flatten(1)
        if self.remote:  # one after the other: a shard that must go for the next one is not held on to
            for shard in np.unique(places.shards):
                own = np.flatnonzero(places.shards == shard)
                self.copy(places.some(own), rows, own)
        else:
            self.copy(places, rows, np.arange(len(batch)))
        return batch

    def copy(self, places: "Places", rows: Tensor, numbers: np.ndarray) -> None:
        """Bring samples to rows [B, C*H*W] of these numbers. Keeps all their shards mapped until it is done."""
        held = {shard: self.mapped(shard) for shard in set(places.shards.tolist())}
        if self.layout.quantised:
            own = rows.unbind(0)
            for row, shard, sample, view in zip(numbers.tolist(), *places.lists(), strict=True):
                held[shard].dequantise(sample, view, own[row])
            return
        size = self.layout.latent_bytes
        source = np.array([held[shard].address for shard in places.shards.tolist()], np.int64)
        source += self.begins[places.views] + places.samples * self.layout.sample_bytes
        copy_memory(rows.data_ptr() + numbers * size, source, np.full(len(numbers), size))

    def read_ahead(self, indices: Sequence[int], flipped: Sequence[bool] | None = None) -> None:
        """Ask the system to bring samples into memory, and go on at once: for batches that come later.

        While all are there already, a part of each batch is asked about: it costs a tenth of the reading.
        """
        places = self.places(indices, flipped)
        few = places.some(slice(None, None, PROBE))
        if self.all_there and not self.remote and not self.called_in(few):
            return
        self.all_there = not self.called_in(places)

    def called_in(self, places: "Places") -> bool:
        """Ask the system for those samples that are not in memory; whether there were any."""
        asked = [
            self.mapped(shard).will_need(sample, view) for shard, sample, view in zip(*places.lists(), strict=True)
        ]
        return any(asked)

    def places(self, indices: Sequence[int], flipped: Sequence[bool] | None) -> "Places":
        """Where samples lie. Raises IndexError for one that the cache does not have."""
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"samples {wanted.min()} to {wanted.max()} of a cache of {len(self)}")
        shards = np.searchsorted(self.starts, wanted, side="right") - 1
        views = np.zeros(len(wanted), np.int64) if flipped is None else np.asarray(flipped, np.int64)
        return Places(shards, wanted - self.starts[shards], views)

    def mapped(self, shard: int) -> "Mapped":
        """A shard's file in memory, mapped at its first use and from then on."""
        if shard not in self.maps:
            if self.remote:
                self.bring(shard, self.remote)
            elif self.verify_at_first_use and (problems := self.bad_shards([shard])):
                raise damaged(self.folder, problems)
            record = self.manifest.shards[shard]
            self.maps[shard] = Mapped(self.folder / record.name, self.layout, record.samples)
        return self.maps[shard]

    def bring(self, shard: int, remote: RemoteShards) -> None:
        """Have a remote shard here, in the room of those that go for it."""
        record = self.manifest.shards[shard]
        remote.fetch(record.name, record.bytes, record.sha256, self.let_go)
        self.let_go()  # of what other ranks removed, too

    def let_go(self) -> None:
        """Unmap the shards whose files were removed: until then they take their room on the disk."""
        for other in list(self.maps):
            if not (self.folder / self.manifest.shards[other].name).exists():
                del self.maps[other]

    def bad_shards(self, shards: Iterable[int] | None = None) -> list[str]:
        """`name: what is wrong` for each shard whose bytes are not the manifest's, by sha256."""
        problems: list[str] = []
        if self.remote:  # each is held against its digest when it arrives
            return problems
        for number in range(len(self.manifest.shards)) if shards is None else shards:
            record = self.manifest.shards[number]
            if problem := shard_problem(self.folder / record.name, record, self.layout, fast=False):
                problems.append(f"{record.name}: {problem}")
        return problems


@dataclass(frozen=True)
class Places:
    """Where the samples of a batch lie, int64 [B] each: shard, sample in it, view."""

    shards: np.ndarray
    samples: np.ndarray
    views: np.ndarray

    def some(self, which: np.ndarray | slice) -> "Places":
        """Those of some rows."""
        return Places(self.shards[which], self.samples[which], self.views[which])

    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """The three as numbers of Python."""
        return self.shards.tolist(), self.samples.tolist(), self.views.tolist()


def allow_open_files(count: int) -> None:
    """Raise this process's limit, where it may: every mapped shard keeps two files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


class Mapped:
    """A shard's file in memory, from `address` on as long as this lives."""

    def __init__(self, path: Path, layout: ShardLayout, samples: int) -> None:
        self.file = path.open("rb")
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        self.knows_what_is_cached = hasattr(os, "RWF_NOWAIT")
        self.begins = [layout.latent_offset(0, view) for view in range(len(layout.views))]
        self.stride, self.room = layout.sample_bytes, layout.member_bytes  # once: a layout computes them at every call
        if len(self.map) < layout.shard_bytes(samples):  # cut since the cache was opened
            raise InputError(f"{path}: {len(self.map)} bytes, which {samples} samples do not take")
        self.address = np.frombuffer(self.map, np.uint8).ctypes.data
        if layout.quantised:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it is read-only, as told; nothing writes to it
                self.tensors = layout.strided(torch.frombuffer(self.map, dtype=torch.uint8), samples)

    def dequantise(self, sample: int, view: int, row: Tensor) -> None:
        """Numbers times scales of a sample's view to `row`, [C*H*W]."""
        numbers, scales = (tensors[view].select(0, sample) for tensors in self.tensors)
        torch.mul(numbers.view(len(scales), -1), scales[:, None], out=row.view(len(scales), -1))

    def will_need(self, sample: int, view: int) -> bool:
        """Start reading a sample's view from the disk, if it is not in memory; whether it was not."""
        begin = self.begins[view] + sample * self.stride
        start, end = begin // mmap.PAGESIZE * mmap.PAGESIZE, min(begin + self.room, len(self.map))
        if self.cached(start) and self.cached(end - 1):
            return False
        self.map.madvise(mmap.MADV_WILLNEED, start, end - start)
        return True

    def cached(self, offset: int) -> bool:
        """Whether a byte is in memory: a tenth of the time that an idle madvise takes. False where nobody can tell."""
        if self.knows_what_is_cached:
            try:
                return os.preadv(self.file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                return False
            except OSError:  # a network file system that cannot tell
                self.knows_what_is_cached = False
        return False


def open_cache(path: str | Path, remote_cache_gb: float = 100.0) -> LatentCache:
    """Open a latent cache; checks its manifest, the digests of index and statistics, and the size of every shard.

    path: a folder, or a URL (store/remote.py), whose shards take at most remote_cache_gb here. Raises InputError
    naming every file that is missing or not as it was written.
    """
    folder = local_folder(path)
    manifest = check_cache(folder)
    return LatentCache(folder, manifest, *read_index(folder / INDEX), remote_of(folder, remote_cache_gb))


def check_cache(path: str | Path, read_bytes: float = 0) -> Manifest:
    """The checks of open_cache; returns the manifest.

    read_bytes: where something is wrong, a cache up to this size is read whole, so that every bad file is named.
    """
    folder = local_folder(path)
    manifest = read_manifest(folder)
    layout = ShardLayout(manifest.latent_shape, manifest.dtype, VIEWS[manifest.views])
    problems = bad_tables(folder, manifest)
    for record in () if (folder / PLACE).is_file() else manifest.shards:  # remote ones come when they are needed
        file = folder / record.name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            problems.append(f"{record.name}: missing")
        elif found != record.bytes:
            problems.append(f"{record.name}: {size_problem(found, record, layout)}")
        elif found != layout.shard_bytes(record.samples):
            problems.append(f"{record.name}: {found} bytes, which {record.samples} samples do not take")
    if problems and not (folder / PLACE).is_file() and sum(record.bytes for record in manifest.shards) <= read_bytes:
        problems = [f"{name}: {told}" for name, told in cache_problems(folder, manifest, fast=False)] or problems
    if problems:
        raise damaged(folder, problems)
    labels, keys = read_index(folder / INDEX)
    if not len(labels) == len(keys) == manifest.samples == sum(record.samples for record in manifest.shards):
        raise InputError(f"{folder}: manifest and index count samples differently; run rae encode-cache anew")
    return manifest


def cache_problems(folder: Path, manifest: Manifest, *, fast: bool) -> list[tuple[str, str]]:
    """(name, what is wrong) of every file that is not as the manifest tells. fast: shards by sizes and headers only."""
    layout = ShardLayout(manifest.latent_shape, manifest.dtype, VIEWS[manifest.views])
    tables = [tuple(problem.split(": ", 1)) for problem in bad_tables(folder, manifest)]
    problems = [(name, told) for name, told in tables] + list(shard_problems(folder, manifest, layout, fast=fast))
    counted = sum(record.samples for record in manifest.shards)
    if counted != manifest.samples:
        problems.append((MANIFEST, f"tells {manifest.samples} samples, its shards have {counted}"))
    if not tables and len(read_index(folder / INDEX)[0]) != manifest.samples:
        problems.append((INDEX, f"counts samples otherwise than the manifest's {manifest.samples}"))
    return problems


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

"""Reading a latent cache: any sample by its index, straight out of the mapped shards."""

import itertools
import mmap
import os
import resource
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raecli.errors import InputError
from raecli.store.atomic import sha256_of
from raecli.store.manifest import MANIFEST, Manifest, read_manifest
from raecli.store.remote import PLACE, RemoteShards, local_folder, remote_of
from raecli.store.shards import READ_DTYPES, ShardLayout
from raecli.store.statistics import STATISTICS, LatentStatistics, load_statistics
from raecli.store.tensors import save_tensors
from raecli.store.verify import shard_problem, shard_problems, size_problem

INDEX = "index.safetensors"
Place = tuple[int, tuple[int, int, int]]  # row of a batch; shard, sample in it, view
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
        self.starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        self.maps: dict[int, Mapped] = {}
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
        batch = batch[: len(indices)]
        places = list(enumerate(self.places(indices, flipped)))
        if self.remote:  # one after the other: a shard that must go for the next one is not held on to
            places.sort(key=shard_of)
            for _, own in itertools.groupby(places, shard_of):
                self.copy(list(own), batch.flatten(1))
        else:
            self.copy(places, batch.flatten(1))
        return batch

    def copy(self, places: list[Place], rows: Tensor) -> None:
        """Bring samples to their rows, of [B, C*H*W]. Keeps all their shards mapped until it is done."""
        if self.layout.quantised:
            own = rows.unbind(0)
            for row, (shard, sample, view) in places:
                self.mapped(shard).dequantise(sample, view, own[row])
            return
        numbers = {shard: self.mapped(shard).numbers for _, (shard, _, _) in places}
        lines = rows.view(torch.uint8).numpy()
        for row, (shard, sample, view) in places:
            lines[row] = numbers[shard][view][sample]

    def read_ahead(self, indices: Sequence[int], flipped: Sequence[bool] | None = None) -> None:
        """Ask the system to bring samples into memory, and go on at once: for batches that come later."""
        for shard, sample, view in self.places(indices, flipped):
            self.mapped(shard).will_need(sample, view)

    def places(self, indices: Sequence[int], flipped: Sequence[bool] | None) -> Iterator[tuple[int, int, int]]:
        """Shard, sample in it and view of samples."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        samples = np.asarray(indices) - self.starts[shards]
        views = [0] * len(indices) if flipped is None else [int(flip) for flip in flipped]
        return zip(shards.tolist(), samples.tolist(), views, strict=True)

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


def shard_of(place: Place) -> int:
    """The shard that a row of a batch comes from."""
    return place[1][0]


def allow_open_files(count: int) -> None:
    """Raise this process's limit, where it may: every mapped shard keeps two files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


class Mapped:
    """A shard's file in memory.

    numbers: of each view the latents' bytes where they lie, [samples, bytes]. numpy copies them by memcpy, to memory
    that begins at a page (feed.host_buffer) more quickly than torch does.
    """

    def __init__(self, path: Path, layout: ShardLayout, samples: int) -> None:
        self.file = path.open("rb")
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        self.knows_what_is_cached = hasattr(os, "RWF_NOWAIT")
        self.begins = [layout.latent_offset(0, view) for view in range(len(layout.views))]
        self.stride, self.room = layout.sample_bytes, layout.member_bytes  # once: a layout computes them at every call
        shape, strides = (samples, layout.latent_bytes), (self.stride, 1)
        self.numbers = [np.ndarray(shape, np.uint8, self.map, begin, strides) for begin in self.begins]
        if layout.quantised:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it is read-only, as told; nothing writes to it
                self.tensors = layout.strided(torch.frombuffer(self.map, dtype=torch.uint8), samples)

    def dequantise(self, sample: int, view: int, row: Tensor) -> None:
        """Numbers times scales of a sample's view to `row`, [C*H*W]."""
        numbers, scales = (tensors[view].select(0, sample) for tensors in self.tensors)
        torch.mul(numbers.view(len(scales), -1), scales[:, None], out=row.view(len(scales), -1))

    def will_need(self, sample: int, view: int) -> None:
        """Start reading a sample's view from the disk, if it is not in memory."""
        begin = self.begins[view] + sample * self.stride
        start, end = begin // mmap.PAGESIZE * mmap.PAGESIZE, min(begin + self.room, len(self.map))
        if not (self.cached(start) and self.cached(end - 1)):
            self.map.madvise(mmap.MADV_WILLNEED, start, end - start)

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

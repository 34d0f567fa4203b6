"""Is a latent cache as it was written? What is wrong with each shard, in words."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from raecli.store.atomic import sha256_of
from raecli.store.manifest import Manifest, ShardRecord

if TYPE_CHECKING:
    from raecli.store.shards import ShardLayout

BLOCK = 512


def shard_problems(folder: Path, manifest: Manifest, layout: "ShardLayout", *, fast: bool) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of every bad shard. fast: sizes and headers; else every byte, by sha256."""
    for record in manifest.shards:
        if problem := shard_problem(folder / record.name, record, layout, fast=fast):
            yield record.name, problem


def shard_problem(path: Path, record: ShardRecord, layout: "ShardLayout", *, fast: bool) -> str | None:
    """What is wrong with a shard, in a few words; None if nothing is."""
    try:
        return problem_of(path, record, layout, fast=fast)
    except OSError as error:  # no permission, or a bad sector: the other shards are still looked at
        return f"cannot be read: {error.strerror}"


def problem_of(path: Path, record: ShardRecord, layout: "ShardLayout", *, fast: bool) -> str | None:
    """The same, of a shard that can be read."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != record.bytes:
        return size_problem(size, record, layout)
    with path.open("rb") as file:
        headers = header_problem(file, record, layout)
    if headers or fast:
        return headers
    return None if sha256_of(path) == record.sha256 else "its bytes changed since it was written (sha256 differs)"


def size_problem(size: int, record: ShardRecord, layout: "ShardLayout") -> str:
    """How a shard of another size than the manifest's went wrong."""
    if size == 0:
        return "empty"
    if size > record.bytes:
        return f"{size} bytes, {record.bytes} expected: something follows its end"
    sample, rest = divmod(size, layout.sample_bytes)
    where = "at the end of a member" if rest in member_starts(layout) else "inside a member"
    done = f"after {sample} of {record.samples} samples"
    return f"{size} bytes, {record.bytes} expected: cut {where}, {done}"


def member_starts(layout: "ShardLayout") -> list[int]:
    """Where a sample's members begin, in bytes from the sample's start."""
    starts = [0]
    for member in layout.members:
        starts.append(starts[-1] + BLOCK + -(-member.size // BLOCK) * BLOCK)
    return starts


def header_problem(file: BinaryIO, record: ShardRecord, layout: "ShardLayout") -> str | None:
    """The first header that is not where it belongs, with its name and size; or an end that is not empty."""
    starts, label = member_starts(layout), "cls"
    members = [(member.ending.decode().removeprefix("."), member.size) for member in layout.members] + [(label, 0)]
    for sample in range(record.samples):
        key = None
        for (ending, size), start in zip(members, starts, strict=True):
            offset = sample * layout.sample_bytes + start
            file.seek(offset)
            try:
                header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return f"no header of a member at byte {offset}, in sample {sample}"
            found, _, told = header.name.partition(".")
            key = found if key is None else key
            if (found, told) != (key, ending) or (ending != label and header.size != size):
                return f"{header.name} of {header.size} bytes at byte {offset}, where {key}.{ending} belongs"
    file.seek(record.samples * layout.sample_bytes)
    return None if not any(file.read()) else "no end of archive behind its last sample"

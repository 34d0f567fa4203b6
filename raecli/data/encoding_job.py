"""The work of `rae encode-cache`: which images go to which shard, and what of it is done by now."""

import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raecli.data.images import ImageSource, open_images, unique_keys
from raecli.data.order import permutation
from raecli.errors import InputError, UsageError
from raecli.recipe.recipes import EncodeCacheRecipe
from raecli.store.atomic import sha256_of, sweep_scratch, write_json
from raecli.store.json_file import read_json
from raecli.store.latent_cache import VIEWS
from raecli.store.lock import Claims
from raecli.store.manifest import MANIFEST, Manifest, differing_fields, encoder_identity, read_manifest
from raecli.store.room import check_free
from raecli.store.shards import ShardLayout

PLAN = "plan.json"
UNRECORDED = ("batch_size", "on_bad_image")  # have to stay while a cache is being made; its manifest does not tell them
TIE = "tie.claim"


@dataclass(frozen=True)
class Job:
    """What every shard of a run has in common."""

    recipe: EncodeCacheRecipe
    source: ImageSource
    keys: list[str]
    order: np.ndarray  # cache position -> source index
    layout: ShardLayout
    output: Path

    @property
    def shards(self) -> int:
        """How many shards the cache has."""
        return -(-len(self.order) // self.recipe.samples_per_shard)

    def indices(self, shard: int) -> np.ndarray:
        """Source indices of a shard's samples, in their order."""
        size = self.recipe.samples_per_shard
        return self.order[shard * size : (shard + 1) * size]

    def shard_file(self, shard: int) -> Path:
        """shard-000000.tar"""
        return self.output / f"shard-{shard:06d}.tar"

    def record_file(self, shard: int) -> Path:
        """Its record, there while the job is not finished."""
        return self.output / f"shard-{shard:06d}.json"

    def sums_file(self, shard: int) -> Path:
        """Its sums for the statistics, likewise."""
        return self.output / f"shard-{shard:06d}.sums.safetensors"


def make_job(recipe: EncodeCacheRecipe) -> Job:
    """List the images and fix their order."""
    if os.path.realpath(recipe.output) == os.path.realpath(recipe.source):
        raise UsageError(f"{recipe.output}: is the images' own folder; choose another one for the latents")
    source = open_images(recipe.source)
    encoder = recipe.encoder
    layout = ShardLayout(encoder.latent_shape, recipe.dtype, VIEWS[recipe.views])
    order = permutation(recipe.seed, "cache", 0, len(source.items))
    return Job(recipe, source, unique_keys(item.name for item in source.items), order, layout, Path(recipe.output))


def plan_of(job: Job) -> dict[str, Any]:
    """What has to agree for two runs to make one cache."""
    recipe = job.recipe
    return {
        **{f"encoder.{key}": value for key, value in encoder_identity(recipe.encoder).items()},
        **{
            key: getattr(recipe, key)
            for key in ("image_size", "views", "dtype", "precision", "samples_per_shard", "seed")
        },
        "source_sha256": job.source.fingerprint(),
        **{key: getattr(recipe, key) for key in UNRECORDED},
    }


def prepare_output(job: Job, *, alone: bool) -> None:
    """Sweep the folder where nobody else is at work; check that what lies in it belongs to this very job."""
    if alone:
        sweep_scratch(job.output)
    if not belongs_to(job):
        check_room(job)
        write_json(job.output / PLAN, plan_of(job))


def belongs_to(job: Job) -> bool:
    """Whether a cache in the output, finished or not, is of this very job. InputError if it is another one's."""
    plan, found = plan_of(job), None
    if (job.output / MANIFEST).exists():
        manifest = read_manifest(job.output)
        identity = {f"encoder.{key}": value for key, value in encoder_identity(manifest.encoder).items()}
        plan = {key: value for key, value in plan.items() if key not in UNRECORDED}
        found = identity | {key: getattr(manifest, key) for key in plan if not key.startswith("encoder.")}
    elif (job.output / PLAN).exists():
        found = read_json(job.output / PLAN)
        if (
            found != plan and found | {"on_bad_image": "skip"} == plan
        ):  # what --on-bad-image fail finished left none out
            write_json(job.output / PLAN, plan)
            found = plan
    if found is not None and found != plan:
        fields = "".join(f"\n  {field}" for field in differing_fields(found, plan))
        raise InputError(f"{job.output}: holds another cache; choose another folder or delete it{fields}")
    return found is not None


def check_room(job: Job) -> None:
    """Refuse a disk that is plainly too small."""
    needed = job.layout.shard_bytes(len(job.order))
    check_free(job.output, needed, f"a cache of {len(job.order)} images", "or choose another folder")


def finished_cache(job: Job) -> Manifest | None:
    """The manifest, if this cache was finished before."""
    return read_manifest(job.output) if (job.output / MANIFEST).exists() else None


def is_finished(job: Job, shard: int, manifest: Manifest | None) -> bool:
    """Whether a shard is there and whole: by its digest in a finished cache, by its record in an unfinished one."""
    file = job.shard_file(shard)
    if manifest is not None:
        record = manifest.shards[shard]
        return file.is_file() and file.stat().st_size == record.bytes and sha256_of(file) == record.sha256
    if not (job.record_file(shard).is_file() and job.sums_file(shard).is_file() and file.is_file()):
        return False
    try:
        return sha256_of(file) == read_json(job.record_file(shard))["sha256"]
    except (InputError, KeyError):  # a damaged record: the shard is made anew
        return False


def is_done_by_any(job: Job, shard: int, finished: Manifest | None) -> bool:
    """Whether a shard of a shared job needs nobody: it has its record, or the whole cache has been finished since."""
    if finished is not None:
        return is_finished(job, shard, finished)
    recorded = all(file.is_file() for file in (job.record_file(shard), job.sums_file(shard), job.shard_file(shard)))
    return recorded or (job.output / MANIFEST).exists()


def shards_to_make(job: Job, finished: Manifest | None, rank: int, world: int, claims: Claims | None) -> Iterator[int]:
    """A rank's shards: every world-th one that is not done; or, where jobs share the work, all that it can claim."""
    if claims is None:
        own = range(rank, job.shards, world)  # whatever is done: all ranks agree on whose is whose
        yield from (shard for shard in own if not is_finished(job, shard, finished))
        return
    first, found = random.randrange(job.shards), True
    while found:  # another look, as who held a claim may have died since
        found = False
        for shard in [*range(first, job.shards), *range(first)]:
            if is_done_by_any(job, shard, finished) or not claims.take(name_of(shard)):
                continue
            if is_done_by_any(job, shard, finished):  # between the two looks
                claims.release(name_of(shard))
                continue
            found = True
            yield shard


def name_of(shard: int) -> str:
    """shard-000000"""
    return f"shard-{shard:06d}"


def batches_of(job: Job, shards: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
    """The shard and the source indices of each batch."""
    size = job.recipe.batch_size
    for shard in shards:
        indices = job.indices(shard).tolist()
        yield from ((shard, indices[start : start + size]) for start in range(0, len(indices), size))


def remove_records(job: Job) -> None:
    """Take away what only an unfinished cache needs."""
    (job.output / PLAN).unlink(missing_ok=True)
    for claim in job.output.glob("*.claim"):  # of processes that died, too
        claim.unlink(missing_ok=True)
    for shard in range(job.shards):
        job.record_file(shard).unlink(missing_ok=True)
        job.sums_file(shard).unlink(missing_ok=True)

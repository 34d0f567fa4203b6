"""`rae encode-cache`: reads images and a frozen encoder; writes a latent cache.

Shards are encoded whole, in batches of fixed make-up, so a shard's bytes depend on neither ranks nor restarts. A
finished shard has a record beside it; the manifest comes last, and then the records go.
"""

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raecli.data.feed import ahead, pooled
from raecli.data.images import ImageItem, ImageSource, open_images, unique_keys
from raecli.data.order import permutation
from raecli.data.preprocess import center_crop, decode_rgb
from raecli.errors import InputError, NonFiniteError, StorageError, UsageError
from raecli.models.build import FrozenEncoder, encoder_of
from raecli.recipe.recipes import EncodeCacheRecipe
from raecli.store.atomic import atomic_file, sha256_of, sweep_scratch, write_json
from raecli.store.latent_cache import INDEX, VIEWS, LatentCache, bad_tables, write_index
from raecli.store.manifest import MANIFEST, Manifest, differing_fields, encoder_identity, read_manifest, tuples
from raecli.store.shards import TORCH_DTYPES, ShardLayout, ShardWriter
from raecli.store.statistics import STATISTICS, LatentSums
from raecli.training.distributed import Ranks, decode_threads
from raecli.training.progress import Progress

PLAN = "plan.json"
UNRECORDED = ("batch_size", "on_bad_image")  # have to stay while a cache is being made; its manifest does not tell them
CHECK_SECONDS = 60.0  # after a bad image, how long the others are looked at for a full list


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


def run(recipe: EncodeCacheRecipe, ranks: Ranks) -> None:
    """Encode all images that have no latents yet, then tie the cache together."""
    job = make_job(recipe)
    with ranks.holding(job.output):
        ranks.main_first(lambda: prepare_output(job))
        finished = finished_cache(job)
        own = range(ranks.rank, job.shards, ranks.world)  # whatever is done already: all ranks agree on whose is whose
        made = [shard for shard in own if not is_finished(job, shard, finished)]
        if made:
            encode_shards(job, made, ranks)
        made = sorted(shard for part in ranks.gather(made) for shard in part)
        ranks.main_first(lambda: finish(job, finished, made))


def finish(job: Job, finished: Manifest | None, made: list[int]) -> None:
    """Write or check what ties the shards together, and say what there is."""
    if finished is None:
        manifest = tie_together(job)
    else:
        manifest = finished
        check_repaired(job, manifest, made)
        if bad_tables(job.output, manifest):
            mend_tables(job, manifest)
    remove_records(job)
    shards, skipped = len(manifest.shards), len(manifest.skipped)
    print(f"{job.output}: {manifest.samples} samples in {shards} shards, {skipped} images skipped")


def make_job(recipe: EncodeCacheRecipe) -> Job:
    """List the images and fix their order."""
    if Path(recipe.output).resolve() == Path(recipe.source).resolve():
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


def prepare_output(job: Job) -> None:
    """Make the folder, or check that what lies in it belongs to this very job."""
    sweep_scratch(job.output)
    plan, found = plan_of(job), None
    if (job.output / MANIFEST).exists():
        manifest = read_manifest(job.output)
        identity = {f"encoder.{key}": value for key, value in encoder_identity(manifest.encoder).items()}
        plan = {key: value for key, value in plan.items() if key not in UNRECORDED}
        found = identity | {key: getattr(manifest, key) for key in plan if not key.startswith("encoder.")}
    elif (job.output / PLAN).exists():
        found = json.loads((job.output / PLAN).read_text(encoding="utf-8"))
    if found is not None and found != plan:
        fields = "".join(f"\n  {field}" for field in differing_fields(found, plan))
        raise InputError(f"{job.output}: holds another cache; choose another folder or delete it{fields}")
    if found is None:
        check_room(job)
        write_json(job.output / PLAN, plan)


def check_room(job: Job) -> None:
    """Refuse a disk that is plainly too small."""
    import shutil

    needed = job.layout.shard_bytes(len(job.order))
    free = shutil.disk_usage(job.output).free
    if needed > free:
        raise StorageError(f"{job.output}: the cache takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


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
        return sha256_of(file) == json.loads(job.record_file(shard).read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError):  # a damaged record: the shard is made anew
        return False


@torch.inference_mode()
def encode_shards(job: Job, shards: list[int], ranks: Ranks) -> None:
    """Encode this rank's shards, one after the other; decoding runs ahead of the encoder."""
    encoder = encoder_of(job.recipe.encoder).to(ranks.device)
    count = sum(len(job.indices(shard)) for shard in shards)
    progress = Progress(count, "images", "encode-cache", shown=ranks.is_main)
    for shard in shards:
        encode_shard(job, shard, encoder, ranks, progress)
    progress.close()


def encode_shard(job: Job, shard: int, encoder: FrozenEncoder, ranks: Ranks, progress: Progress) -> None:
    """Write one shard, its sums, and last its record."""
    indices, size = job.indices(shard), job.recipe.batch_size
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    sums = LatentSums(job.layout.latent_shape, ranks.device)
    keys, labels, skipped = [], [], []
    with atomic_file(job.shard_file(shard)) as scratch:
        writer = ShardWriter(scratch, job.layout)
        for batch, images, bad in ahead(lambda batch: decode_batch(job, batch), batches):
            skipped += bad
            kept = [index for index in batch if job.source.items[index].name not in {entry["source"] for entry in bad}]
            views = encode_views(job, encoder, images.to(ranks.device)) if kept else []
            check_finite(views, [job.source.items[index] for index in kept])
            for row, index in enumerate(kept):
                sample = torch.stack([latents[row] for latents in views])  # its views
                sums.add(sample)
                keys.append(job.keys[index])
                labels.append(job.source.items[index].label)
                writer.add(keys[-1], labels[-1], list(sample.cpu()))
            progress.advance(len(batch))
        writer.close()
    with atomic_file(job.sums_file(shard)) as scratch:
        sums.save(scratch)
    file = job.shard_file(shard)
    record = {"name": file.name, "samples": len(keys), "bytes": file.stat().st_size, "sha256": sha256_of(file)}
    write_json(job.record_file(shard), record | {"keys": keys, "labels": labels, "skipped": skipped})


def encode_views(job: Job, encoder: FrozenEncoder, images: Tensor) -> list[Tensor]:
    """Latents of each view, [B, C, H, W] in the cache's dtype. images: uint8 [B, 3, S, S]."""
    views = [images] if len(job.layout.views) == 1 else [images, images.flip(3)]
    bf16 = job.recipe.precision == "bf16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return [encoder(view.float() / 255).to(TORCH_DTYPES[job.layout.dtype]) for view in views]


def check_finite(views: list[Tensor], items: list[ImageItem]) -> None:
    """Stop at a latent that is not a number, before it is stored."""
    for latents in views:
        bad = (~latents.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(items[row].name for row in bad)
            raise NonFiniteError(f"the encoder gives NaN or infinity for {names}; try --precision fp32 or --dtype fp32")


def decode_batch(job: Job, indices: np.ndarray) -> tuple[np.ndarray, Tensor, list[dict[str, str]]]:
    """Pixels uint8 [B, 3, S, S] of the images that can be read, and what was wrong with the others."""

    def decode(index: int) -> np.ndarray | dict[str, str]:
        item = job.source.items[index]
        try:
            return center_crop(decode_rgb(item.read(), item.name), job.recipe.image_size)
        except InputError as error:
            return {"source": item.name, "reason": str(error).removeprefix(f"{item.name}: ")}

    decoded = pooled(decode, indices.tolist(), decode_threads())
    bad = [entry for entry in decoded if isinstance(entry, dict)]
    if bad and job.recipe.on_bad_image == "fail":
        raise bad_images(job, bad, decode)
    good = [entry for entry in decoded if isinstance(entry, np.ndarray)]
    pixels = np.stack(good) if good else np.empty((0, job.recipe.image_size, job.recipe.image_size, 3), np.uint8)
    return indices, torch.from_numpy(pixels).permute(0, 3, 1, 2), bad


def bad_images(job: Job, bad: list[dict[str, str]], decode: Any) -> InputError:
    """The error that lists every unreadable image found within a minute."""
    found = {entry["source"]: entry["reason"] for entry in bad}
    until, checked = time.monotonic() + CHECK_SECONDS, 0
    for index in range(len(job.source.items)):
        if time.monotonic() > until:
            break
        entry, checked = decode(index), checked + 1
        if isinstance(entry, dict):
            found[entry["source"]] = entry["reason"]
    lines = "".join(f"\n  {name}: {reason}" for name, reason in sorted(found.items()))
    looked = f"{checked} of {len(job.source.items)} looked at"
    return InputError(
        f"{job.source.path}: {len(found)} unreadable images ({looked}); mend them, or --on-bad-image skip{lines}"
    )


def tie_together(job: Job) -> Manifest:
    """Index, statistics and last the manifest, out of the shards' records."""
    records = [json.loads(job.record_file(shard).read_text(encoding="utf-8")) for shard in range(job.shards)]
    sums = LatentSums(job.layout.latent_shape)
    for shard in range(job.shards):
        sums.merge(LatentSums.load(job.sums_file(shard)))
    if not sums.count:
        raise InputError(f"{job.source.path}: not one readable image")
    labels = [label for record in records for label in record["labels"]]
    write_tables(job, sums, labels, [key for record in records for key in record["keys"]])
    manifest = manifest_of(job, records)
    write_json(job.output / MANIFEST, manifest.to_dict())
    return manifest


def write_tables(job: Job, sums: LatentSums, labels: list[int], keys: list[str]) -> None:
    """Statistics and index of a cache."""
    with atomic_file(job.output / STATISTICS) as scratch:
        sums.statistics().save(scratch)
    with atomic_file(job.output / INDEX) as scratch:
        write_index(scratch, labels, keys)


def mend_tables(job: Job, manifest: Manifest) -> None:
    """Statistics and index anew, out of a finished cache's shards; they have to come out as they were."""
    skipped = {entry.source for entry in manifest.skipped}
    kept = [index for index in job.order.tolist() if job.source.items[index].name not in skipped]
    labels, keys = [job.source.items[index].label for index in kept], [job.keys[index] for index in kept]
    cache = LatentCache(job.output, manifest, torch.tensor(labels), keys)
    total = LatentSums(job.layout.latent_shape)
    for first, last in itertools.pairwise(cache.starts.tolist()):
        sums = LatentSums(job.layout.latent_shape)
        for index in range(first, last):
            views = [cache.latents([index], [flipped]) for flipped in (False, True)[: len(job.layout.views)]]
            sums.add(torch.cat(views))
        total.merge(sums)
    write_tables(job, total, labels, keys)
    if problems := bad_tables(job.output, manifest):
        raise InputError(
            f"{job.output}: {'; '.join(problems)}; made anew they differ: delete the folder and encode again"
        )


def manifest_of(job: Job, records: list[dict[str, Any]]) -> Manifest:
    """What the cache says of itself. Nothing in it depends on when or where it was made."""
    recipe = job.recipe
    shards = [{key: record[key] for key in ("name", "samples", "bytes", "sha256")} for record in records]
    fields = {
        "encoder": recipe.encoder.model_dump(),
        "image_size": recipe.image_size,
        "latent_shape": job.layout.latent_shape,
        "dtype": recipe.dtype,
        "precision": recipe.precision,
        "views": recipe.views,
        "classes": job.source.classes,
        "samples": sum(record["samples"] for record in records),
        "samples_per_shard": recipe.samples_per_shard,
        "seed": recipe.seed,
        "source_sha256": job.source.fingerprint(),
        "shards": shards,
        "index_sha256": sha256_of(job.output / INDEX),
        "statistics_sha256": sha256_of(job.output / STATISTICS),
        "skipped": sorted(
            (entry for record in records for entry in record["skipped"]), key=lambda entry: entry["source"]
        ),
    }
    return Manifest.model_validate(tuples(fields))


def check_repaired(job: Job, manifest: Manifest, made: list[int]) -> None:
    """A shard made anew in a finished cache has to be the shard it replaces."""
    changed = [
        manifest.shards[shard].name
        for shard in made
        if sha256_of(job.shard_file(shard)) != manifest.shards[shard].sha256
    ]
    if changed:
        raise InputError(
            f"{job.output}: {', '.join(changed)} made anew differ from what the manifest tells (another machine, "
            "torch or batch size?); delete the folder and encode again"
        )


def remove_records(job: Job) -> None:
    """Take away what only an unfinished cache needs."""
    (job.output / PLAN).unlink(missing_ok=True)
    for shard in range(job.shards):
        job.record_file(shard).unlink(missing_ok=True)
        job.sums_file(shard).unlink(missing_ok=True)

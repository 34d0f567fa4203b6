"""`rae encode-cache`: reads images and a frozen encoder; writes a latent cache.

Shards are encoded whole, in batches of fixed make-up, so a shard's bytes depend on neither ranks nor restarts. A
finished shard has a record beside it; the manifest comes last, and then the records go. Decoding, the encoder, and
writing each have a thread, and go on across the ends of shards.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raecli.data.decode import Decoded, Decoder
from raecli.data.encoding_job import (
    TIE,
    Job,
    batches_of,
    finished_cache,
    is_done_by_any,
    make_job,
    name_of,
    prepare_output,
    remove_records,
    shards_to_make,
)
from raecli.data.feed import ahead, behind
from raecli.data.images import ImageItem
from raecli.errors import InputError, NonFiniteError, counted
from raecli.models.build import FrozenEncoder, encoder_of
from raecli.recipe.recipes import EncodeCacheRecipe
from raecli.store.atomic import atomic_file, sha256_of, write_json
from raecli.store.json_file import read_json
from raecli.store.latent_cache import INDEX, LatentCache, bad_tables, write_index
from raecli.store.lock import Claims, one_at_a_time, share_folder
from raecli.store.manifest import MANIFEST, Manifest, tuples
from raecli.store.shards import READ_DTYPES, ShardWriter
from raecli.store.statistics import STATISTICS, LatentSums
from raecli.training.distributed import Ranks, decode_threads
from raecli.training.progress import Progress
from raecli.training.result import tell_result


def run(recipe: EncodeCacheRecipe, ranks: Ranks) -> None:
    """Encode all images that have no latents yet, then tie the cache together."""
    job = make_job(recipe)
    with holding_output(job, ranks):
        finished = finished_cache(job)
        claims = Claims(job.output) if recipe.join else None
        made = encode_shards(job, shards_to_make(job, finished, ranks.rank, ranks.world, claims), ranks, claims)
        made = sorted(shard for part in ranks.gather(made) for shard in part)
        ranks.main_first(lambda: finish(job, finished, made))


@contextlib.contextmanager
def holding_output(job: Job, ranks: Ranks) -> Iterator[None]:
    """Hold the output for this job alone, or with --join for it and its like; prepared for work."""
    if not job.recipe.join:
        with ranks.holding(job.output):
            ranks.main_first(lambda: prepare_output(job, alone=True))
            yield
        return
    with contextlib.ExitStack() as stack:
        shared = share_folder(job.output, lambda alone: prepare_output(job, alone=alone))
        ranks.main_first(lambda: stack.enter_context(shared))
        yield


def finish(job: Job, finished: Manifest | None, made: list[int]) -> None:
    """Write or check what ties the shards together, and say what there is. Of jobs that share, the last one does."""
    with one_at_a_time(job.output / TIE):
        if not all(is_done_by_any(job, shard, finished) for shard in range(job.shards)):
            told = f"{job.output}: {len(made)} of {job.shards} shards made here; the jobs beside this one finish it"
            tell_result(told, {"output": str(job.output), "finished": False, "made": len(made), "shards": job.shards})
            return
        manifest = finished or finished_cache(job)
        if manifest is None:
            manifest = tie_together(job)
        elif finished is not None:
            check_repaired(job, manifest, made)
            if bad_tables(job.output, manifest):
                mend_tables(job, manifest)
        remove_records(job)
    shards, skipped = len(manifest.shards), len(manifest.skipped)
    tell_result(
        f"{job.output}: {counted(manifest.samples, 'sample')} in {counted(shards, 'shard')}, "
        f"{counted(skipped, 'image')} skipped",
        {
            "output": str(job.output),
            "finished": True,
            "samples": manifest.samples,
            "shards": shards,
            "skipped": skipped,
        },
    )


@dataclass(frozen=True)
class Encoded:
    """One batch on its way to its shard."""

    shard: int
    items: list[int]  # source indices
    views: list[Tensor]  # each [B, C, H, W], on the encoder's device
    skipped: list[dict[str, str]]


@torch.inference_mode()
def encode_shards(job: Job, shards: Iterator[int], ranks: Ranks, claims: Claims | None) -> list[int]:
    """Encode shards: a thread decodes ahead of the encoder, another one writes behind it. Returns which were made."""
    first = next(shards, None)
    if first is None:
        return []
    encoder = encoder_of(job.recipe.encoder).to(ranks.device)
    decoder = Decoder(
        job.source,
        job.recipe.image_size,
        threads=decode_threads(),
        skip_bad=job.recipe.on_bad_image == "skip",
        resample_on=ranks.device if ranks.device.type == "cuda" else None,
    )
    progress = Progress(images_to_make(job, ranks), "images", "encode-cache", shown=ranks.is_main)
    made: list[int] = []
    with behind(lambda batches: save_shards(job, batches, ranks, claims, made)) as put:
        work = batches_of(job, itertools.chain([first], shards))
        for shard, decoded in ahead(lambda batch: (batch[0], decoder.batch(batch[1])), work):
            put(Encoded(shard, decoded.indices, encode_views(job, encoder, decoded, ranks), decoded.skipped))
            progress.advance(len(decoded.indices) + len(decoded.skipped))
    return made


def images_to_make(job: Job, ranks: Ranks) -> int:
    """How many images of this rank's share have no record yet."""
    own = range(ranks.rank, job.shards, ranks.world)
    return sum(len(job.indices(shard)) for shard in own if not job.record_file(shard).exists())


def encode_views(job: Job, encoder: FrozenEncoder, decoded: Decoded, ranks: Ranks) -> list[Tensor]:
    """Latents of each view, [B, C, H, W], in the dtype of the disk, float32 for int8; none of an empty batch."""
    if not decoded.indices:
        return []
    images = decoded.images.to(ranks.device, non_blocking=True)
    views = [images] if len(job.layout.views) == 1 else [images, images.flip(3)]
    dtype = torch.float32 if job.layout.quantised else READ_DTYPES[job.layout.dtype]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=job.recipe.precision == "bf16"):
        return [encoder(view.float() / 255).to(dtype) for view in views]


@torch.inference_mode()
def save_shards(job: Job, batches: Iterator[Encoded], ranks: Ranks, claims: Claims | None, made: list[int]) -> None:
    """Write shards out of the batches that come in, one shard after the other; each goes to `made` when it is whole."""
    for shard, own in itertools.groupby(batches, key=lambda batch: batch.shard):
        save_shard(job, shard, own, ranks)
        made.append(shard)
        if claims:
            claims.release(name_of(shard))


def save_shard(job: Job, shard: int, batches: Iterable[Encoded], ranks: Ranks) -> None:
    """Write one shard, its sums, and last its record."""
    sums, errors = LatentSums(job.layout.latent_shape, ranks.device), [0.0, 0.0]
    keys: list[str] = []
    labels: list[int] = []
    skipped: list[dict[str, str]] = []
    with atomic_file(job.shard_file(shard)) as scratch:
        writer = ShardWriter(scratch, job.layout)
        for batch in batches:
            items = [job.source.items[index] for index in batch.items]
            check_finite(batch.views, items)
            skipped += batch.skipped
            keys += [job.keys[index] for index in batch.items]
            labels += [item.label for item in items]
            if items:
                stored = writer.add(keys[-len(items) :], labels[-len(items) :], batch.views)
                add_sums(sums, errors, stored, batch.views)
        writer.close()
    with atomic_file(job.sums_file(shard)) as scratch:
        sums.save(scratch)
    file = job.shard_file(shard)
    record = {"name": file.name, "samples": len(keys), "bytes": file.stat().st_size, "sha256": sha256_of(file)}
    record |= {"keys": keys, "labels": labels, "skipped": skipped, "errors": errors}
    write_json(job.record_file(shard), record)


def add_sums(sums: LatentSums, errors: list[float], stored: list[Tensor], encoded: list[Tensor]) -> None:
    """Take in a batch sample by sample, all views of one before the next: what readers get, and how far it is off."""
    for sample in zip(*stored, strict=True):
        sums.add(torch.stack(sample))
    if stored[0] is not encoded[0]:  # int8
        for given, wanted in zip(stored, encoded, strict=True):
            difference = (given.float() - wanted).double().square().flatten(1).sum(1)
            errors[0] += sum(difference.tolist())
            errors[1] += sum(wanted.double().square().flatten(1).sum(1).tolist())


def check_finite(views: list[Tensor], items: list[ImageItem]) -> None:
    """Stop at a latent that is not a number, before it is stored."""
    for latents in views:
        bad = (~latents.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(items[row].name for row in bad)
            raise NonFiniteError(f"the encoder gives NaN or infinity for {names}; try --precision fp32 or --dtype fp32")


def tie_together(job: Job) -> Manifest:
    """Index, statistics and last the manifest, out of the shards' records."""
    records = [read_json(job.record_file(shard)) for shard in range(job.shards)]
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
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "source_sha256": job.source.fingerprint(),
        "shards": shards,
        "index_sha256": sha256_of(job.output / INDEX),
        "statistics_sha256": sha256_of(job.output / STATISTICS),
        "skipped": sorted(
            (entry for record in records for entry in record["skipped"]), key=lambda entry: entry["source"]
        ),
        "quantisation_error": quantisation_error(records) if job.layout.quantised else None,
    }
    return Manifest.model_validate(tuples(fields))


def quantisation_error(records: list[dict[str, Any]]) -> float:
    """Root of the stored latents' squared error over the encoded ones' squares, all shards."""
    wrong, square = (sum(record["errors"][part] for record in records) for part in (0, 1))
    return math.sqrt(wrong / square) if square else 0.0


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

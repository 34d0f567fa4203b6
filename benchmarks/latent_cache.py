"""A latent cache of random numbers, for the benchmarks that read one."""

from pathlib import Path

import torch

from raecli.recipe.blocks import EncoderSpec
from raecli.store.atomic import sha256_of, write_json
from raecli.store.latent_cache import INDEX, LatentCache, open_cache, write_index
from raecli.store.manifest import MANIFEST, Manifest, ShardRecord
from raecli.store.shards import ShardLayout, ShardWriter
from raecli.store.statistics import STATISTICS, LatentStatistics

SHAPE = (768, 16, 16)  # of DINOv2-B's latents at 256 pixels
PER_SHARD = 128


def make_cache(folder: Path, samples: int, dtype: str = "bf16") -> LatentCache:
    """A cache of random latents of DINOv2-B's shape."""
    layout, shards, digests = ShardLayout(SHAPE, dtype, ("latent",)), [], []
    latents = torch.randn(PER_SHARD, *SHAPE).bfloat16()
    for start in range(0, samples, PER_SHARD):
        file = folder / f"shard-{len(shards):06d}.tar"
        numbers = range(start, min(start + PER_SHARD, samples))
        writer = ShardWriter(file, layout)
        writer.add([f"{index}" for index in numbers], [index % 1000 for index in numbers], [latents[: len(numbers)]])
        writer.close()
        digests.append(sha256_of(file))
        shards.append(
            ShardRecord(name=file.name, samples=writer.samples, bytes=file.stat().st_size, sha256=digests[-1])
        )
    write_index(folder / INDEX, [index % 1000 for index in range(samples)], [str(index) for index in range(samples)])
    LatentStatistics(None, torch.ones(SHAPE), samples).save(folder / STATISTICS)
    encoder = EncoderSpec(
        name="random", family="dinov2", loader="timm", architecture="none", input_size=224, patch_size=14, width=768,
        prefix_tokens=5, norm_eps=1e-6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    manifest = Manifest(
        encoder=encoder, image_size=256, latent_shape=SHAPE, dtype=dtype, precision="fp32", views="center",
        classes=(), samples=samples, samples_per_shard=PER_SHARD, seed=0, source_sha256="", shards=tuple(shards),
        index_sha256=sha256_of(folder / INDEX),
        statistics_sha256=sha256_of(folder / STATISTICS),
    )  # fmt: skip
    write_json(folder / MANIFEST, manifest.to_dict())
    return open_cache(folder)

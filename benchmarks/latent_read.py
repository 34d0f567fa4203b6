"""PERFORMANCE rows 1 and 3: latents in global random order out of plain tars, against memcpy of the same bytes.

Alternates both sides in one process, CPU seconds, medians. One JSON line. `python benchmarks/latent_read.py [--mb 512]`
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from raecli.data.order import stream_slice
from raecli.recipe.blocks import EncoderSpec
from raecli.store.atomic import sha256_of, write_json
from raecli.store.latent_cache import INDEX, LatentCache, open_cache, write_index
from raecli.store.manifest import MANIFEST, Manifest, ShardRecord
from raecli.store.shards import ShardLayout, ShardWriter
from raecli.store.statistics import STATISTICS, LatentStatistics

SHAPE, BATCH = (768, 16, 16), 64


def make_cache(folder: Path, samples: int) -> LatentCache:
    """A cache of random bf16 latents of DINOv2-B's shape."""
    layout, size, shards = ShardLayout(SHAPE, "bf16", ("latent",)), 128, []
    for start in range(0, samples, size):
        file = folder / f"shard-{len(shards):06d}.tar"
        writer = ShardWriter(file, layout)
        for index in range(start, min(start + size, samples)):
            writer.add(f"{index}", index % 1000, [torch.randn(SHAPE).bfloat16()])
        writer.close()
        digest = sha256_of(file)
        shards.append(ShardRecord(name=file.name, samples=writer.samples, bytes=file.stat().st_size, sha256=digest))
    write_index(folder / INDEX, [index % 1000 for index in range(samples)], [str(index) for index in range(samples)])
    LatentStatistics(None, torch.ones(SHAPE), samples).save(folder / STATISTICS)
    encoder = EncoderSpec(
        name="random", family="dinov2", loader="timm", architecture="none", input_size=224, patch_size=14, width=768,
        prefix_tokens=5, norm_eps=1e-6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    manifest = Manifest(
        encoder=encoder, image_size=256, latent_shape=SHAPE, dtype="bf16", precision="fp32", views="center",
        classes=(), samples=samples, samples_per_shard=size, seed=0, source_sha256="", shards=tuple(shards),
        index_sha256=sha256_of(folder / INDEX),
        statistics_sha256=sha256_of(folder / STATISTICS),
    )  # fmt: skip
    write_json(folder / MANIFEST, manifest.to_dict())
    return open_cache(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=512, help="size of the cache")
    samples = parser.parse_args().mb * 10**6 // (2 * 768 * 256) // BATCH * BATCH
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder), samples)
        batches = [stream_slice(0, samples, start, BATCH).tolist() for start in range(0, samples, BATCH)]
        source = np.random.default_rng(0).integers(0, 256, samples * cache.layout.latent_bytes, dtype=np.uint8)
        source = source.reshape(samples, -1)
        ours, memcpy = [], []
        for _ in range(7):
            begin = time.process_time()
            for batch in batches:
                cache.latents(batch)
            ours.append(time.process_time() - begin)
            begin = time.process_time()
            for batch in batches:
                rows = np.empty((BATCH, source.shape[1]), np.uint8)
                for row, index in enumerate(batch):
                    rows[row] = source[index]
            memcpy.append(time.process_time() - begin)
    giga = source.nbytes / 1e9
    rates = giga / statistics.median(ours), giga / statistics.median(memcpy)
    line = {"row": 1, "ours_gb_per_cpu_s": rates[0], "memcpy_gb_per_cpu_s": rates[1], "ratio": rates[0] / rates[1]}
    print(json.dumps({**line, "samples": samples, "bar": ">= 0.95"}))


if __name__ == "__main__":
    main()

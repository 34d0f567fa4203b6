"""A cache whose manifest an earlier `rae` wrote: version 1, before batch sizes and int8 were told."""

import json

import pytest
import torch

from raecli.errors import InputError
from raecli.store.atomic import sha256_of
from raecli.store.latent_cache import INDEX, open_cache, write_index
from raecli.store.shards import ShardLayout, ShardWriter
from raecli.store.statistics import STATISTICS, LatentSums

# As commit 71a65c0 and its followers wrote it, key by key; what depends on the files is filled in.
WRITTEN = """{"format": "rae-latents", "version": 1, "encoder": {"name": "digits-mae", "family": "mae",
"loader": "folder", "architecture": "vit_mae", "path": "digits_mae", "weights": "digits_mae/model.safetensors",
"weights_sha256": "00", "input_size": 32, "patch_size": 8, "width": 32, "prefix_tokens": 1, "norm_eps": 1e-12,
"position_antialias": false, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "layers": "last"}, "image_size": 32,
"preprocess": "adm-center-crop", "latent_shape": [32, 4, 4], "dtype": "fp32", "precision": "fp32", "views": "center",
"classes": ["a", "b"], "samples": 5, "samples_per_shard": 5, "seed": 0, "source_sha256": "11", "skipped": []}"""


@pytest.fixture
def older(tmp_path):
    """Such a cache of 5 samples, and what its latents are."""
    latents, labels = torch.randn(5, 32, 4, 4), [0, 1, 1, 0, 1]
    writer = ShardWriter(tmp_path / "shard-000000.tar", ShardLayout((32, 4, 4), "fp32", ("latent",)))
    writer.add(keys := [f"a/{index}" for index in range(5)], labels, [latents])
    writer.close()
    write_index(tmp_path / INDEX, labels, keys)
    sums = LatentSums((32, 4, 4))
    for latent in latents:
        sums.add(latent[None])
    sums.statistics().save(tmp_path / STATISTICS)
    shard = tmp_path / "shard-000000.tar"
    record = {"name": shard.name, "samples": 5, "bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
    digests = {"index_sha256": sha256_of(tmp_path / INDEX), "statistics_sha256": sha256_of(tmp_path / STATISTICS)}
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(WRITTEN) | {"shards": [record], **digests}))
    return tmp_path, latents


def test_a_manifest_without_the_newer_fields_is_read(older):
    folder, latents = older
    cache = open_cache(folder)
    assert torch.equal(cache.latents([4, 0, 2]), latents[[4, 0, 2]]) and cache[1][1:] == (1, "a/1")
    assert cache.manifest.batch_size is None and cache.manifest.quantisation_error is None
    assert cache.manifest.encoder.scaling_factor is None and cache.bad_shards() == []


def test_a_manifest_of_a_version_to_come_is_refused_by_name(older):
    folder, _ = older
    told = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(told | {"version": 2}))
    with pytest.raises(InputError, match="version"):
        open_cache(folder)

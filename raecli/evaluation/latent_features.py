"""Features of cached latents for probe and t-SNE, read a block at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from raecli.errors import InputError
from raecli.metrics.linear_probe import Blocks
from raecli.store.latent_cache import LatentCache, open_cache

Features = Literal["pooled", "tokens"]  # the mean over tokens [C]; all of them [C h w]

BLOCK_BYTES = 64 * 2**20  # of latents read at once, as float64
HELD_BYTES = 2 * 2**30  # features of one fit that are rather kept than read again for every step


def open_labelled(path: str) -> LatentCache:
    """A latent cache of at least two classes, each shard held against its digest when it is first read."""
    cache = open_cache(Path(path))
    if len(cache.manifest.classes) < 2:
        raise InputError(f"{path}: its images have no classes; encode a folder of class folders")
    cache.verify_at_first_use = True
    return cache


def features_of(cache: LatentCache, indices: Sequence[int], kind: Features) -> Tensor:
    """Features float32 [B, D] of samples of the cache: un-normalised latents' tokens, flat or averaged."""
    latents = cache.latents(indices).float()
    found = latents.flatten(1) if kind == "tokens" else latents.mean(dim=(2, 3))
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{cache.folder}: has latents that are not finite; look at the encoder and its precision")
    return found


def feature_width(cache: LatentCache, kind: Features) -> int:
    """D."""
    channels, high, wide = cache.manifest.latent_shape
    return channels * high * wide if kind == "tokens" else channels


def feature_blocks(cache: LatentCache, indices: Sequence[int], kind: Features) -> Blocks:
    """The features and labels of these samples, a block at a time: kept in memory where they are small."""
    channels, high, wide = cache.manifest.latent_shape
    size = max(1, BLOCK_BYTES // (8 * channels * high * wide))
    parts = [list(indices[begin : begin + size]) for begin in range(0, len(indices), size)]

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            yield features_of(cache, part, kind), cache.labels[part]

    if 4 * len(indices) * feature_width(cache, kind) > HELD_BYTES:
        return read
    held = list(read())
    return lambda: iter(held)

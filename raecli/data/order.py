"""Orders and random draws, all functions of (seed, purpose, index): nothing to store, the same on any rank."""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

WINDOW_BLOCKS = 16  # runs that are mixed with each other


def key_of(seed: int, purpose: str, index: int) -> int:
    """A 64-bit key for one draw."""
    text = f"{seed}/{purpose}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=4)
def permutation(seed: int, purpose: str, index: int, size: int) -> np.ndarray:
    """A random order of range(size), int64, not to be changed: the last few are kept, an epoch asks at every step."""
    generator = np.random.Generator(np.random.Philox(key=key_of(seed, purpose, index)))
    order = generator.permutation(size)
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=4)
def block_permutation(seed: int, index: int, size: int, block: int) -> np.ndarray:
    """An order of range(size) for storage that reads runs well and single samples badly, int64, not to be changed.

    Runs of `block` neighbours come in a random order; each WINDOW_BLOCKS of them in turn are mixed sample by sample.
    So a reader works within WINDOW_BLOCKS runs at a time. Every sample comes once.
    """
    runs = permutation(seed, "blocks", index, -(-size // block))
    order = (runs[:, None] * block + np.arange(block)).ravel()
    order = order[order < size]  # the last run may be short
    generator = np.random.Generator(np.random.Philox(key=key_of(seed, "within blocks", index)))
    windows = np.arange(size) // (block * WINDOW_BLOCKS)
    order = order[np.lexsort((generator.random(size), windows))]
    order.flags.writeable = False
    return order


def stream_slice(seed: int, size: int, first: int, count: int, block: int | None = None) -> np.ndarray:
    """Samples at positions [first, first + count) of the endless stream of epochs, each a permutation of all.

    Position p is in epoch p // size; nothing is dropped at an epoch's end. block: None shuffles over all samples,
    else as block_permutation does.
    """
    parts = []
    while count > 0:
        epoch, start = divmod(first, size)
        order = (
            permutation(seed, "epoch", epoch, size) if block is None else block_permutation(seed, epoch, size, block)
        )
        part = order[start : start + count]
        parts.append(part)
        first, count = first + len(part), count - len(part)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def normal(shape: tuple[int, ...], seed: int, purpose: str, index: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32 draws. CPU and GPU streams differ; each depends on its key alone."""
    key = key_of(seed, purpose, index)
    if torch.device(device).type == "cpu":
        generator = np.random.Generator(np.random.Philox(key=key))
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(key), device=device)


def normals(shape: tuple[int, ...], seed: int, purpose: str, indices: range, device: torch.device | str) -> Tensor:
    """Standard normal draws [len(indices), *shape], each sample's by its own index."""
    return torch.stack([normal(shape, seed, purpose, index, device) for index in indices])


def uniforms(seed: int, purpose: str, indices: range) -> Tensor:
    """One uniform draw in (0, 1) for each index, float64 [len(indices)]."""
    draws = [(key_of(seed, purpose, index) + 0.5) / 2**64 for index in indices]
    return torch.tensor(draws, dtype=torch.float64).clamp(2.0**-53, 1 - 2.0**-53)

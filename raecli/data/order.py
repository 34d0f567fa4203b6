"""Orders and random draws, all functions of (seed, purpose, index): nothing to store, the same on any rank."""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor


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


def stream_slice(seed: int, size: int, first: int, count: int) -> np.ndarray:
    """Samples at positions [first, first + count) of the endless stream of epochs, each a permutation of all.

    Position p is in epoch p // size; nothing is dropped at an epoch's end.
    """
    parts = []
    while count > 0:
        epoch, start = divmod(first, size)
        part = permutation(seed, "epoch", epoch, size)[start : start + count]
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

"""Weights into a vision transformer: every key accounted for, positions resampled, nothing skipped in silence."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raecli.errors import CheckpointError

LISTED_KEYS = 20


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, floating point ones in fp32."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"encoder weights {path}: cannot be loaded: {error}") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def resample_positions(positions: Tensor, tokens: int, *, prefix: int, antialias: bool) -> Tensor:
    """Position embeddings of one square grid, bicubically resampled to another. FACTS section 1.

    positions: [1, prefix + n*n, C], fp32; tokens: m*m of the new grid. Returns [1, prefix + m*m, C].
    """
    before, after = math.isqrt(positions.shape[1] - prefix), math.isqrt(tokens)
    if before == after:
        return positions
    if before**2 != positions.shape[1] - prefix:
        raise CheckpointError(f"encoder weights: {positions.shape[1]} positions are no square grid and {prefix} more")
    grid = positions[:, prefix:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)


def match_keys(wanted: Iterable[str], found: Iterable[str], unused: re.Pattern[str], where: str) -> None:
    """Refuse a file that lacks a wanted key, or that has one which is neither wanted nor known to be unused."""
    wanted, found = set(wanted), set(found)
    missing = sorted(wanted - found)
    unknown = sorted(name for name in found - wanted if not unused.match(name))
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for names, what in ((missing, "missing"), (unknown, "unknown"))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"encoder weights {where}: keys do not fit the network, so it is another one's file; " + "; ".join(problems)
        )


def load_exactly(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into a module of the same keys; shapes that differ are refused, all of them told."""
    wrong = [
        f"{name} is {list(tensors[name].shape)}, the network's is {list(own.shape)}"
        for name, own in module.state_dict().items()
        if tensors[name].shape != own.shape
    ]
    if wrong:
        raise CheckpointError(f"encoder weights {where}: shapes do not fit the network; {_listed(wrong)}")
    module.load_state_dict(tensors)


def _listed(names: list[str]) -> str:
    """The first names, and how many more."""
    more = len(names) - LISTED_KEYS
    return ", ".join(names[:LISTED_KEYS]) + (f" and {more} more" if more > 0 else "")

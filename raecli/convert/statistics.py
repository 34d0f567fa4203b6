"""Latent statistics of a released file, of ours, or beside a model or a cache."""

from pathlib import Path

import torch

from raecli.convert.source import only_tensors, read_tensors
from raecli.errors import CheckpointError, InputError
from raecli.store.artifact import artifact_folder
from raecli.store.statistics import STATISTICS, VARIANCE_EPS, LatentStatistics, load_statistics


def statistics_at(path: Path) -> LatentStatistics:
    """stat.pt with {mean or None, var}, each [C, H, W]; statistics.safetensors; or a folder that has it."""
    if path.is_dir():
        beside = path / STATISTICS
        return load_statistics(beside if beside.is_file() else artifact_folder(path) / STATISTICS)
    if path.suffix == ".safetensors":
        return load_statistics(path)
    tensors = only_tensors(read_tensors(path), path)
    if not tensors.keys() <= {"mean", "var"} or "var" not in tensors:
        raise CheckpointError(f"{path}: not latent statistics {{mean, var}}; has {', '.join(sorted(tensors)[:8])}")
    shapes = {tuple(value.shape) for value in tensors.values()}
    if len(shapes) != 1 or tensors["var"].dim() != 3:
        raise InputError(f"{path}: statistics of shapes {sorted(shapes)}; one of channels, rows, columns is needed")
    mean = tensors.get("mean")
    return LatentStatistics(None if mean is None else mean.float(), tensors["var"].float())


def identity_statistics(shape: tuple[int, int, int]) -> LatentStatistics:
    """Statistics that change nothing: sqrt(variance + 1e-5) is 1."""
    return LatentStatistics(None, torch.full(shape, 1 - VARIANCE_EPS))

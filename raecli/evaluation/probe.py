"""The linear probe of a latent cache: its split, the choice of the L2 weight, fit and figure. Table 1d."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raecli.errors import InputError
from raecli.evaluation.latent_features import Features, feature_blocks, feature_width, open_labelled
from raecli.metrics.linear_probe import Blocks, feature_moments, fit_probe, judge_probe, wilson_interval
from raecli.store.latent_cache import LatentCache
from raecli.store.manifest import differing_fields, encoder_identity

L2_WEIGHTS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # falling, so that each fit begins at the one before
HELD_OUT = 0.2  # of the training samples, to choose the L2 weight by
TEST = 0.2  # of the cache, where no other is named to be judged on


@dataclass(frozen=True)
class Split:
    """Who is fitted, who chooses the L2 weight, who judges."""

    train: list[int]
    held_out: list[int]
    test: list[int]  # of the other cache, where one is named


def probe(path: str, val: str | None, kind: Features, seed: int, iterations: int) -> dict[str, Any]:
    """Top-1 accuracy of logistic regression on cached latents, and everything that tells how it was measured."""
    cache = open_labelled(path)
    other = open_labelled(val) if val else None
    if other:
        check_alike(cache, other)
    split = split_of(cache, other, seed)
    fitted, chooser = (feature_blocks(cache, part, kind) for part in (split.train, split.held_out))
    weights = torch.zeros(len(cache.manifest.classes), feature_width(cache, kind) + 1, dtype=torch.float64)
    l2, tried = choose_l2(fitted, chooser, weights, iterations)
    everyone = feature_blocks(cache, sorted(split.train + split.held_out), kind)
    moments = feature_moments(everyone)
    weights = fit_probe(everyone, weights, moments, l2, iterations)
    correct, count, loss = judge_probe(weights, feature_blocks(other or cache, split.test, kind), moments)
    return {
        "accuracy": correct / count,
        "interval_95": wilson_interval(correct, count),
        "correct": correct,
        "count": count,
        "cross_entropy": loss,
        "train_accuracy": judge_probe(weights, everyone, moments)[0] / len(split.train + split.held_out),
        "train_count": len(split.train + split.held_out),
        "features": kind,
        "dimension": feature_width(cache, kind),
        "classes": len(cache.manifest.classes),
        "l2": l2,
        "tried": tried,
        "seed": seed,
        "iterations": iterations,
        **protocol(cache, other),
    }


def check_alike(cache: LatentCache, other: LatentCache) -> None:
    """Refuse a second cache of another encoder or other classes."""
    fields = differing_fields(likeness(other), likeness(cache))
    if fields:
        lines = "".join(f"\n  {field}" for field in fields)
        raise InputError(f"{other.folder}: not to be judged by a probe of {cache.folder}{lines}")


def likeness(cache: LatentCache) -> dict[str, Any]:
    """What two caches share, if a probe of one may judge the other."""
    told = {"classes": cache.manifest.classes, "latent_shape": cache.manifest.latent_shape}
    return {**encoder_identity(cache.manifest.encoder), "image_size": cache.manifest.image_size, **told}


def split_of(cache: LatentCache, other: LatentCache | None, seed: int) -> Split:
    """A seeded split of the cache, each part in the cache's order."""
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(seed)).tolist()
    tests = 0 if other else max(1, round(TEST * len(order)))
    rest = order[tests:]
    held = max(1, round(HELD_OUT * len(rest)))
    if len(rest) - held < 1:
        raise InputError(f"{cache.folder}: {len(cache)} samples are too few to split")
    test = list(range(len(other))) if other else sorted(order[:tests])
    return Split(sorted(rest[held:]), sorted(rest[:held]), test)


def choose_l2(
    fitted: Blocks, chooser: Blocks, weights: Tensor, iterations: int
) -> tuple[float, list[dict[str, float]]]:
    """The L2 weight of the most held-out samples right; of several, that of the least cross entropy."""
    moments = feature_moments(fitted)
    tried = []
    for l2 in L2_WEIGHTS:
        weights = fit_probe(fitted, weights, moments, l2, iterations)
        correct, count, loss = judge_probe(weights, chooser, moments)
        tried.append({"l2": l2, "held_out_accuracy": correct / count, "held_out_cross_entropy": loss})
    best = max(tried, key=lambda row: (row["held_out_accuracy"], -row["held_out_cross_entropy"]))
    return best["l2"], tried


def protocol(cache: LatentCache, other: LatentCache | None) -> dict[str, Any]:
    """What was probed."""
    told: dict[str, Any] = {"latents": str(cache.folder), "encoder": cache.manifest.encoder.name}
    told["index_sha256"] = cache.manifest.index_sha256
    told["statistics_sha256"] = cache.manifest.statistics_sha256
    if other:
        return {**told, "val": str(other.folder), "val_index_sha256": other.manifest.index_sha256}
    return {**told, "val": f"{TEST:.0%} of the same cache, by the seed"}

"""Figures of two measured sides, as a report has them, and the rules they were computed by."""

import statistics
from typing import Any

import torch
from torch import Tensor

from raecli.errors import InputError
from raecli.metrics.feature_file import Rows
from raecli.metrics.frechet import frechet_distance
from raecli.metrics.inception_score import SPLIT
from raecli.metrics.kid import SEED, kernel_distance
from raecli.metrics.manifold import NEIGHBOUR, PrPrecision, covered, nearest_distances, radii
from raecli.metrics.statistics import Moments
from raecli.training.distributed import Ranks

PrChoice = str  # "both", "exact" or "adm"
RULES = {"exact": "float32", "adm": "float16"}  # names of the figures, as ADM's evaluator would give them


def frechet_figures(name: str, ours: Moments, theirs: Moments, ranks: Ranks) -> dict[str, Any]:
    """The distance under `name`, its two parts, and how the root's trace was found."""
    distance = frechet_distance(*on_device(ours, ranks), *on_device(theirs, ranks))
    prefix = "" if name == "fid" else f"{name}_"
    return {
        name: distance.value,
        f"{prefix}mean_part": distance.mean_part,
        f"{prefix}trace_part": distance.trace_part,
        f"{prefix}method": distance.method,
    }


def on_device(moments: Moments, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Mean and covariance where they are to be compared."""
    return moments.mean.to(ranks.device), moments.covariance.to(ranks.device)


def score_figures(scores: tuple[float, ...]) -> dict[str, Any]:
    """Mean over splits, as ADM's evaluator prints it; deviation over splits; the splits."""
    return {
        "inception_score": statistics.fmean(scores),
        "inception_score_deviation": statistics.pstdev(scores),
        "inception_score_splits": list(scores),
        "inception_score_rule": f"consecutive splits of {SPLIT} in the set's order, the last short one counted as any",
    }


def coverage_figures(samples: Rows, reference: Rows, choice: PrChoice, ranks: Ranks) -> dict[str, Any]:
    """Precision and recall. `precision`, `recall` are the exact ones, unless only ADM's were asked for."""
    if min(len(samples), len(reference)) <= NEIGHBOUR:
        raise InputError(
            f"precision and recall take the {NEIGHBOUR}rd neighbour of a point: {len(samples)} samples and "
            f"{len(reference)} of the reference are too few"
        )
    chosen: tuple[PrPrecision, ...] = ("exact", "adm") if choice == "both" else ("adm" if choice == "adm" else "exact",)
    pairs = {rule: precision_recall(samples, reference, rule, ranks) for rule in chosen}
    figures: dict[str, Any] = dict(zip(("precision", "recall"), pairs[chosen[0]], strict=True))
    for rule, pair in pairs.items():
        figures |= {f"precision_{RULES[rule]}": pair[0], f"recall_{RULES[rule]}": pair[1]}
    rule = "float16 products emulated, as ADM's evaluator on a GPU" if chosen[0] == "adm" else "float32 distances"
    return figures | {
        "precision_recall_rule": f"precision and recall: k = {NEIGHBOUR}, squared distances, <=, {rule}",
        "precision_recall_points": {"samples": len(samples), "reference": len(reference)},
    }


def precision_recall(samples: Rows, reference: Rows, rule: PrPrecision, ranks: Ranks) -> tuple[float, float]:
    """Both figures, the tiles of distances shared by the ranks."""
    share = (ranks.rank, ranks.world)
    own, other = (radii(over_ranks(nearest_distances(side, rule, share), ranks)) for side in (samples, reference))
    found = covered(samples, reference, own, other, rule, share)
    inside = (ranks.sum(side.long()) > 0 for side in (found.samples, found.reference))
    precision, recall = (side.double().mean().item() for side in inside)
    return precision, recall


def over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """[W, ...]: the values of every rank, in rank order."""
    stack = torch.zeros(ranks.world, *values.shape, device=values.device)
    stack[ranks.rank] = values
    return ranks.sum(stack)


def kernel_figures(samples: Rows, reference: Rows) -> dict[str, Any]:
    """KID and its deviation over subsets, not multiplied."""
    if min(len(samples), len(reference)) < 2:
        raise InputError("KID needs at least 2 samples on either side")
    found = kernel_distance(samples, reference)
    return {
        "kid": found.value,
        "kid_deviation": found.deviation,
        "kid_rule": f"(x . y / D + 1)^3, unbiased, {found.subsets} subsets of {found.subset_size} by position, "
        f"seed {SEED}; the table shows it x 1000",
    }

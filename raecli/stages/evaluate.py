"""`rae eval`: reads samples and a reference; prints figures, and writes them with their whole protocol as JSON.

With `write` it reads images and writes their features or statistics instead, to be read as a side later.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from raecli import __version__
from raecli.errors import InputError, UsageError
from raecli.evaluation.accuracy import accuracy_report
from raecli.evaluation.extraction import write_features, write_statistics
from raecli.evaluation.families import POOLED, Family, Findings, Taken, family_findings
from raecli.evaluation.networks import (
    DINOV2,
    DINOV2_NAME,
    LOGITS,
    POOL,
    SPATIAL,
    FeatureNetwork,
    chosen_network,
    dinov2_network,
    inception_network,
)
from raecli.evaluation.report import tell
from raecli.evaluation.sides import Side, check_kinds, open_side
from raecli.evaluation.warnings import (
    DINO_CAVEAT,
    card_warnings,
    count_warnings,
    network_warnings,
    order_warnings,
    size_warnings,
)
from raecli.recipe.recipes import EvaluateRecipe
from raecli.store.atomic import sha256_of
from raecli.training.distributed import Ranks
from raecli.training.result import tell_result


def run(recipe: EvaluateRecipe, ranks: Ranks) -> None:
    """Measure what the recipe asks for; rank 0 tells."""
    if recipe.write is not None:
        write(recipe, ranks)
        return
    samples = open_side(recipe.samples)
    reference = open_reference(recipe)
    check_kinds(samples, reference)
    findings = [
        family_findings(family, samples, reference, recipe.pr_precision, recipe.batch_size, ranks)
        for family in families(recipe, samples, reference, ranks.device)
    ]
    check_something_found(recipe, findings)
    judged = judge(recipe, samples, ranks)
    if ranks.is_main:
        tell(report(samples, reference, findings, judged, ranks), as_json=recipe.print_json, output=recipe.output)


def write(recipe: EvaluateRecipe, ranks: Ranks) -> None:
    """Pass images through the networks and write what they give."""
    side = open_side(recipe.samples)
    if side.images is None:
        raise InputError(f"{side.source}: holds no images; features and statistics are measured from images")
    assert recipe.output is not None, "the door asks for OUT"
    networks = [inception_network(recipe.inception, ranks.device, (POOL, SPATIAL, LOGITS))]
    if recipe.dinov2 is not None:
        networks.append(dinov2_network(recipe.dinov2, ranks.device))
    told = {"kind": recipe.kind, "rae": __version__, "labels": side.labels, "protocol": protocol_of(side)}
    writer = write_features if recipe.write == "features" else write_statistics
    writer(Path(recipe.output), side.images, networks, told, recipe.batch_size, ranks)
    if ranks.is_main:
        count = len(side.images)
        facts = {"output": recipe.output, "write": recipe.write, "images": count}
        tell_result(f"{recipe.output}: {recipe.write} of {count} images", facts)


def open_reference(recipe: EvaluateRecipe) -> Side | None:
    """The reference, where a metric takes one."""
    needing = [metric for metric in recipe.metrics if metric not in ("is", "accuracy")]
    if needing and recipe.reference is None:
        raise UsageError(f"{needing[0]} needs a reference: --ref REF, a folder of images or an .npz")
    return open_side(recipe.reference) if needing and recipe.reference is not None else None


def families(recipe: EvaluateRecipe, samples: Side, reference: Side | None, device: torch.device) -> list[Family]:
    """The metrics asked for, by the network that they share."""
    pooled = tuple(metric for metric in recipe.metrics if metric in POOLED)
    found = []
    if pooled and recipe.features is not None:
        network = named_network(recipe, samples, reference, device)
        found.append(Family(pooled, (POOL,), lambda layers: network, network.description))
    elif pooled:
        inception = partial(inception_network, recipe.inception, device)
        found.append(Family(pooled, (POOL, SPATIAL, LOGITS), inception, None))
    if "fdd" in recipe.metrics:
        name = {"name": DINOV2_NAME}
        found.append(Family(("fdd",), (DINOV2,), lambda layers: dinov2_network(recipe.dinov2, device), name))
    return found


def named_network(
    recipe: EvaluateRecipe, samples: Side, reference: Side | None, device: torch.device
) -> FeatureNetwork:
    """The network that --features names: a classifier of ours, or an encoder."""
    assert recipe.features is not None, "somebody names it"
    if recipe.inception is not None:
        raise UsageError("--inception and --features exclude one another: FID is measured in one network")
    sides = [side for side in (samples, reference) if side is not None]
    images = next((side.images for side in sides if side.images is not None), None)
    return chosen_network(recipe.features, None, images, device)


def check_something_found(recipe: EvaluateRecipe, findings: list[Findings]) -> None:
    """End with the reason where a metric was asked for by name, or where none could be had."""
    reasons = [error for found in findings for error in found.unavailable.values()]
    if reasons and (not recipe.optional or len(reasons) == len(recipe.metrics)):
        raise reasons[0]


def judge(recipe: EvaluateRecipe, samples: Side, ranks: Ranks) -> dict[str, Any]:
    """A classifier's verdict, where it is asked for."""
    if "accuracy" not in recipe.metrics:
        return {}
    if recipe.classifier is None:
        raise UsageError("accuracy needs a classifier: --classifier FILE")
    return accuracy_report(samples, recipe.classifier, recipe.batch_size, ranks)


def report(
    samples: Side,
    reference: Side | None,
    findings: list[Findings],
    judged: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    """Figures first, then everything that they depend on."""
    told: dict[str, Any] = {"stage": "eval", "rae": __version__}
    unavailable: dict[str, str] = {}
    for found in findings:
        told |= found.figures
        unavailable |= {metric: str(error) for metric, error in found.unavailable.items()}
    told |= {"unavailable": unavailable, "samples_path": str(samples.source)}
    if findings:
        told |= sides_told(samples, reference, findings)
    for found in (found for found in findings if found.figures):
        told["fdd_features" if found.network.get("name") == DINOV2_NAME else "features"] = found.network
    said = warnings_of(samples, reference, findings)
    return told | judged | {"world": ranks.world, "warnings": said, "protocol": protocol_of(samples)}


def sides_told(samples: Side, reference: Side | None, findings: list[Findings]) -> dict[str, Any]:
    """What was compared with what."""
    ours = findings[0].samples
    told: dict[str, Any] = {"samples": ours.count, "sides": {"samples": described(samples, ours)}}
    if reference is None:
        return told
    theirs = next((found.reference for found in findings if found.reference is not None), None)
    told["sides"]["reference"] = described(reference, theirs)
    return told | {
        "reference_samples": theirs.count if theirs else None,
        "reference_path": str(reference.source),
        "statistics": {"samples": origin(ours), "reference": origin(theirs), "ddof": 1},
    }


def described(side: Side, found: Taken | None) -> dict[str, Any]:
    """What a side is: its path and digest, how many samples it has, what it is for."""
    pixels = found.measured.sha256 if found else None
    told = {"pixels_sha256": pixels} if pixels else {}
    if side.source.is_file():
        told["file_sha256"] = sha256_of(side.source)
    if side.images is not None:
        told |= {"images": len(side.images), "size": list(side.images.size)}
    if side.provenance:
        told["provenance"] = {key: value for key, value in side.provenance.items() if key != "labels"}
    return {"path": str(side.source), "kind": side.kind, **told}


def origin(found: Taken | None) -> str:
    """Where a Gaussian is from."""
    if found is None:
        return "none"
    return "stored in the file" if found.stored else "measured from the images" if found.measured.sha256 else "features"


def protocol_of(samples: Side) -> dict[str, Any]:
    """What made the samples, without their labels, which would fill pages."""
    return {name: value for name, value in samples.card.items() if name != "labels"}


def warnings_of(samples: Side, reference: Side | None, findings: list[Findings]) -> list[str]:
    """All that makes a figure incomparable."""
    said = order_warnings(samples) + size_warnings(samples, reference) + card_warnings(samples)
    for found in findings:
        said += network_warnings(found.network) if found.figures else []
        gaussians = {name: side for name, side in (("samples", found.samples), ("reference", found.reference)) if side}
        if "fid" in found.figures:
            counts = {name: side.count for name, side in gaussians.items()}
            width = len(found.samples.moments(POOL).mean)
            said += count_warnings(counts, width, published=found.network.get("published_weights", False))
        if "fdd" in found.figures:
            said.append(DINO_CAVEAT)
    return said

"""`rae eval`: reads samples and a reference; prints figures, and writes them with their whole protocol as JSON."""

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raecli.errors import InputError, NonFiniteError, UsageError
from raecli.evaluation.moments import measured_moments, rank_batches
from raecli.evaluation.networks import (
    INCEPTION,
    FeatureNetwork,
    applied,
    classifier_network,
    encoder_network,
    inception_network,
    rgb_classifier,
)
from raecli.metrics.frechet import frechet_distance
from raecli.metrics.reference import (
    ImageSet,
    holds_images,
    locate_source,
    open_images,
    rank_slice,
    read_card,
)
from raecli.metrics.statistics import Moments, load_moments
from raecli.models.classifier import Classifier
from raecli.recipe.recipes import EvaluateRecipe
from raecli.store.atomic import sha256_of, write_json
from raecli.training.distributed import Ranks


@dataclass(frozen=True)
class Side:
    """Samples or reference: images, or statistics that somebody stored, or both."""

    source: Path
    images: ImageSet | None
    stored: Moments | None


def run(recipe: EvaluateRecipe, ranks: Ranks) -> None:
    """Measure what the recipe asks for; rank 0 tells."""
    samples = open_side(recipe.samples)
    card = read_card(samples.source)
    report: dict[str, Any] = {"stage": "eval", "samples_path": str(samples.source)}
    warnings = order_warnings(card)
    if "fid" in recipe.metrics:
        report |= fid_report(recipe, samples, ranks, warnings)
    if "accuracy" in recipe.metrics:
        report |= accuracy_report(recipe, samples, card, ranks)
    if ranks.is_main:
        protocol = {name: value for name, value in card.items() if name != "labels"}
        tell(report | {"world": ranks.world, "warnings": warnings, "protocol": protocol}, recipe)


def open_side(path: str) -> Side:
    """Images and stored statistics at `path`, as far as it has them. Looks at no image but the first."""
    source = locate_source(path)
    stored = load_moments(source) if source.suffix == ".npz" else None
    images = open_images(source) if stored is None or holds_images(source) else None
    return Side(source, images, stored)


def fid_report(recipe: EvaluateRecipe, samples: Side, ranks: Ranks, warnings: list[str]) -> dict[str, Any]:
    """The Frechet distance of samples and reference in one network's pooled features. Adds to `warnings`."""
    if recipe.reference is None:
        raise UsageError("fid needs a reference: --ref REF, a folder of images or an .npz")
    reference = open_side(recipe.reference)
    network = feature_network(recipe, samples, reference, ranks.device)
    warnings += network_warnings(network) + size_warnings(samples, reference)
    ours, told = fitted_moments(samples, network, recipe, ranks, "samples")
    theirs, reference_told = fitted_moments(reference, network, recipe, ranks, "reference")
    if not ranks.is_main:
        return {}
    warnings += count_warnings({"samples": ours, "reference": theirs}, network)
    distance = frechet_distance(*to_device(ours, ranks), *to_device(theirs, ranks))
    return {
        "fid": distance.value,
        "mean_part": distance.mean_part,
        "trace_part": distance.trace_part,
        "method": distance.method,
        "samples": ours.samples,
        "reference_samples": theirs.samples,
        "reference_path": str(reference.source),
        "statistics": {"samples": told, "reference": reference_told, "ddof": 1},
        "features": network.description,
    }


def feature_network(recipe: EvaluateRecipe, samples: Side, reference: Side, device: torch.device) -> FeatureNetwork:
    """The network that the recipe names: Inception, a classifier of ours, or an encoder."""
    if recipe.features is None:
        return inception_network(recipe.inception, device)
    if recipe.inception is not None:
        raise UsageError("--inception and --features exclude one another: FID is measured in one network")
    if recipe.features.endswith(".safetensors"):
        return classifier_network(Path(recipe.features), device)
    images = samples.images or reference.images
    if images is None:
        raise InputError(f"{samples.source} and {reference.source} hold no images for encoder {recipe.features} to see")
    return encoder_network(recipe.features, images, device)


def fitted_moments(
    side: Side, network: FeatureNetwork, recipe: EvaluateRecipe, ranks: Ranks, label: str
) -> tuple[Moments, str]:
    """A side's Gaussian in a network's features, and where it is from: stored statistics are preferred."""
    if side.stored is not None and is_of(side.stored, network):
        return side.stored, "stored in the file"
    if side.images is None:
        raise InputError(
            f"{side.source}: holds statistics of another feature network ({network_of(side.stored)['name']}, "
            f"{len(side.stored.mean)} features) and no images; measure with that network, or give images"
        )
    return measured_moments(side.images, network, recipe.batch_size, ranks, label), "measured from the images"


def network_of(stored: Moments) -> dict[str, Any]:
    """Name and sha256 of the network that statistics are of. Files that do not tell are of Inception, as ADM's are."""
    return stored.provenance.get("features", {"name": INCEPTION})


def is_of(stored: Moments, network: FeatureNetwork) -> bool:
    """True if statistics were measured in this very network, as far as they tell."""
    told = network_of(stored)
    same = all(told[key] == network.description[key] for key in ("name", "sha256") if key in told)
    return same and len(stored.mean) == network.width


def to_device(moments: Moments, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Mean and covariance where they are to be compared."""
    return moments.mean.to(ranks.device), moments.covariance.to(ranks.device)


def accuracy_report(recipe: EvaluateRecipe, samples: Side, card: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The share of samples that a classifier takes for the class that was asked for; also class by class."""
    if recipe.classifier is None:
        raise UsageError("accuracy needs a classifier: --classifier FILE")
    if samples.images is None:
        raise InputError(f"{samples.source}: holds statistics and no images; accuracy needs the images")
    path = Path(recipe.classifier)
    classifier = rgb_classifier(path).to(ranks.device)
    classes = classifier.config["classes"]
    labels = torch.tensor(labels_of(samples.images, card, classes))
    right, total = ranks.sum(class_counts(classifier, samples.images, labels, recipe.batch_size, ranks)).tolist()
    return {
        "accuracy": sum(right) / sum(total),
        "per_class": {str(label): right[label] / total[label] for label in range(classes) if total[label]},
        "per_class_samples": {str(label): total[label] for label in range(classes) if total[label]},
        "samples": sum(total),
        "classifier": {"file": str(path), "sha256": sha256_of(path), "classes": classes},
    }


def class_counts(classifier: Classifier, images: ImageSet, labels: Tensor, batch_size: int, ranks: Ranks) -> Tensor:
    """Of this rank's share: samples of each class judged right, and all of them. int64 [2, classes]."""
    counts = torch.zeros(2, classifier.config["classes"], dtype=torch.int64, device=ranks.device)
    position = rank_slice(len(images), ranks.rank, ranks.world)[0]
    for names, batch in rank_batches(images, batch_size, ranks, "accuracy"):
        wanted = labels[position : position + len(names)].to(ranks.device)
        scores = applied(classifier, batch)
        if not bool(scores.isfinite().all()):
            raise NonFiniteError(f"{names[0]}, or another image of its batch: class scores hold NaN or infinity")
        counts[0] += torch.bincount(wanted[scores.argmax(1) == wanted], minlength=counts.shape[1])
        counts[1] += torch.bincount(wanted, minlength=counts.shape[1])
        position += len(names)
    return counts


def labels_of(images: ImageSet, card: dict[str, Any], classes: int) -> list[int]:
    """The class asked for, of every image: from samples.json, else from the names of class folders."""
    labels = card.get("labels")
    if labels is None:
        labels = labels_of_folders(images, classes)
    if not isinstance(labels, list) or len(labels) != len(images):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise InputError(f"{images.path}: {len(images)} images, but samples.json has {count} labels; sample again")
    wrong = next((label for label in labels if type(label) is not int or not 0 <= label < classes), None)
    if wrong is not None:
        raise InputError(f"{images.path}: label {wrong!r}; the classifier knows classes 0 to {classes - 1}")
    return labels


def labels_of_folders(images: ImageSet, classes: int) -> list[int]:
    """Class folders numbered in the order of their names, as encode-cache does; or by number, where some are absent."""
    folders = images.folder_classes()
    if folders is None:
        raise InputError(f"{images.path}: no labels: neither in a samples.json, nor by class folders")
    names = sorted(set(folders))
    if len(names) == classes:
        return [names.index(name) for name in folders]
    if all(name.isdecimal() for name in names):
        return [int(name) for name in folders]
    raise InputError(f"{images.path}: {len(names)} class folders, but the classifier knows {classes} classes")


def order_warnings(card: dict[str, Any]) -> list[str]:
    """Say it where samples lie in the order of their classes."""
    labels = card.get("labels")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels) or len(set(labels)) < 2:
        return []
    if any(first > second for first, second in pairwise(labels)):
        return []
    return ["samples are sorted by class: FID does not care, an Inception Score of consecutive splits would be too low"]


def network_warnings(network: FeatureNetwork) -> list[str]:
    """Say it where Inception is not the published one."""
    if network.description.get("published_weights", True):
        return []
    return ["Inception's weights are not the published ones: compare this FID with no other"]


def size_warnings(samples: Side, reference: Side) -> list[str]:
    """Say it where the two sides' images have other sizes."""
    sides = [side.images.size for side in (samples, reference) if side.images is not None]
    if len(sides) < 2 or sides[0] == sides[1]:
        return []
    (height, width), (wanted_height, wanted_width) = sides
    return [f"samples are {width} x {height} pixels, the reference's images {wanted_width} x {wanted_height}"]


def count_warnings(sides: dict[str, Moments], network: FeatureNetwork) -> list[str]:
    """Say it where a covariance has no full rank."""
    few = {name: side.samples for name, side in sides.items() if side.samples and side.samples <= network.width}
    return [
        f"{name}: {count} images for {network.width} features; FID is biased upwards, compare it at equal counts only"
        for name, count in few.items()
    ]


def tell(report: dict[str, Any], recipe: EvaluateRecipe) -> None:
    """Figures on stdout, warnings on stderr, everything in the recipe's output."""
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if recipe.output is not None:
        write_json(Path(recipe.output), report)
    print(json.dumps(report, indent=2) if recipe.print_json else table(report), flush=True)


def table(report: dict[str, Any]) -> str:
    """The figures for the eye: a name and a value a line."""
    rows = {}
    if "fid" in report:
        parts = f"means {report['mean_part']:.4f} + covariances {report['trace_part']:.4f}"
        rows["fid"] = f"{report['fid']:.4f}  ({parts})"
        rows["features"] = f"{report['features']['name']}, sha256 {str(report['features']['sha256'])[:8]}"
        rows["reference"] = f"{report['reference_samples'] or 'an untold number of'} images, {report['reference_path']}"
    if "accuracy" in report:
        rows["accuracy"] = f"{report['accuracy']:.4f}"
        rows["by class"] = "  ".join(f"{label}: {share:.3f}" for label, share in report["per_class"].items())
    rows["samples"] = f"{report['samples']} images, {report['samples_path']}"
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())

"""The two sides of a comparison: images, features or statistics, whichever a path holds, and what they tell."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from raecli.errors import InputError
from raecli.evaluation.networks import DINOV2, DINOV2_NAME, INCEPTION, POOL
from raecli.evaluation.shard_images import ShardImages, holds_shards
from raecli.metrics.feature_file import FeatureFile, holds_features
from raecli.metrics.reference import ImageSet, holds_images, locate_source, open_images, read_card
from raecli.metrics.statistics import SUFFIXES, Moments, load_moments

Kind = Literal["generation", "reconstruction"]
SAMPLES_FORMAT = "rae-samples"  # of a samples.json that `rae sample` wrote


@dataclass(frozen=True)
class Side:
    """Samples or reference. `stored`: the Gaussians that a file holds, by layer; `card`: samples.json, {} without."""

    source: Path
    images: ImageSet | None
    features: FeatureFile | None
    stored: dict[str, Moments]
    card: dict[str, Any]

    @property
    def data(self) -> ImageSet | FeatureFile | None:
        """What single images' features are had from."""
        return self.features or self.images

    @property
    def provenance(self) -> dict[str, Any]:
        """What a file of ours tells of itself."""
        if self.features is not None:
            return self.features.provenance
        return next(iter(self.stored.values())).provenance if self.stored else {}

    @property
    def kind(self) -> Kind | None:
        """What the set is for, where that is told. Statistics that are not ours are ADM's: of a training set."""
        told = self.card.get("kind") or self.provenance.get("kind")
        if told is None and self.card.get("format") == SAMPLES_FORMAT:
            return "generation"
        if told is None and self.stored and not self.provenance:
            return "generation"
        return told

    @property
    def labels(self) -> list[int] | None:
        """The class of each sample, where a card or the features' provenance tells."""
        labels = self.card.get("labels", self.provenance.get("labels"))
        whole = isinstance(labels, list) and all(type(label) is int for label in labels)
        return labels if whole else None


def open_side(path: str) -> Side:
    """What `path` holds: images, features or statistics. Looks at one image at most."""
    source = locate_source(path)
    card = read_card(source)
    if holds_features(source):
        return Side(source, None, FeatureFile(source), {}, card)
    stored = stored_moments(source)
    images = open_image_set(source) if not stored or holds_images(source) else None
    return Side(source, images, None, stored, card)


def open_image_set(source: Path) -> ImageSet:
    """The images of a folder, tars, or array file."""
    return ShardImages(source) if holds_shards(source) else open_images(source)


def stored_moments(source: Path) -> dict[str, Moments]:
    """The Gaussians of an npz, by layer."""
    if source.suffix != ".npz":
        return {}
    found = {layer: load_moments(source, suffix) for layer, suffix in SUFFIXES.items()}
    return {layer: moments for layer, moments in found.items() if moments is not None}


def told_network(provenance: dict[str, Any], layer: str) -> dict[str, Any]:
    """The network that a file's features are of. Files that do not tell are of Inception, as ADM's."""
    if layer == DINOV2:
        return provenance.get(DINOV2, {"name": DINOV2_NAME})
    return provenance.get("features", {"name": INCEPTION})


def same_network(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two networks are one, as far as both tell."""
    return all(one[key] == other[key] for key in ("name", "sha256") if key in one and key in other)


def is_of(stored: Moments, layer: str, identity: dict[str, Any]) -> bool:
    """Whether statistics are of the network, as far as both tell."""
    width = identity.get("width") if layer in (POOL, DINOV2) else None
    return same_network(told_network(stored.provenance, layer), identity) and width in (None, len(stored.mean))


def check_kinds(samples: Side, reference: Side | None) -> None:
    """Refuse generated samples against a reference of reconstructions, and the other way round."""
    if reference is None or None in (samples.kind, reference.kind) or samples.kind == reference.kind:
        return
    raise InputError(
        f"{samples.source} holds {NOUNS[samples.kind]}, and {reference.source} is a reference for "
        f"{NOUNS[reference.kind]}: gFID is against statistics of the training set, rFID against the very images that "
        "were reconstructed; give a reference of the right kind, or make one with rae eval statistics --for"
    )


NOUNS = {"generation": "generated images", "reconstruction": "reconstructions"}


def is_sorted_by_class(labels: list[int] | None) -> bool:
    """Whether samples of several classes lie in the order of their classes."""
    if labels is None or len(set(labels)) < 2:
        return False
    return all(first <= second for first, second in pairwise(labels))

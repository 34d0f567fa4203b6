"""What makes a figure incomparable, said aloud."""

from typing import Any

from raecli.evaluation.sides import Side, is_sorted_by_class

PUBLISHED_SAMPLES = 50_000  # of which the field's figures are
DINO_CAVEAT = (
    "fdd is measured in DINOv2's features, which an autoencoder on DINOv2 was built on: it favours RAE; "
    "report it beside FID, not instead"
)


def order_warnings(samples: Side) -> list[str]:
    """Say it where samples lie in the order of their classes."""
    labels = samples.labels
    if labels is None and samples.images is not None:
        folders = samples.images.folder_classes()
        labels = [sorted(set(folders)).index(name) for name in folders] if folders else None
    if not is_sorted_by_class(labels):
        return []
    return ["samples are sorted by class: FID does not care, an Inception Score of consecutive splits is too low"]


def size_warnings(samples: Side, reference: Side | None) -> list[str]:
    """Say it where the two sides' images have other sizes."""
    sides = [side.images.size for side in (samples, reference) if side is not None and side.images is not None]
    if len(sides) < 2 or tuple(sides[0]) == tuple(sides[1]):
        return []
    (height, width), (wanted_height, wanted_width) = sides
    return [f"samples are {width} x {height} pixels, the reference's images {wanted_width} x {wanted_height}"]


def card_warnings(samples: Side) -> list[str]:
    """Say it where there are not as many samples as their samples.json tells."""
    told, found = samples.card.get("num"), None if samples.data is None else len(samples.data)
    if told is None or found is None or told == found:
        return []
    return [f"samples.json tells of {told} samples, found {found}"]


def network_warnings(network: dict[str, Any]) -> list[str]:
    """Say it where Inception is not the published one."""
    if network.get("published_weights", True):
        return []
    return ["Inception's weights are not the published ones: compare these figures with no other"]


def count_warnings(counts: dict[str, int | None], width: int, *, published: bool) -> list[str]:
    """Say it where a covariance has no full rank, and where published figures are of another number of samples.

    counts: samples by side. width: features. published: whether the network is the one of published figures.
    """
    said = [
        f"{name}: {count} images for {width} features; FID is biased upwards, compare it at equal counts only"
        for name, count in counts.items()
        if count and count <= width
    ]
    samples = counts.get("samples")
    if published and samples and samples != PUBLISHED_SAMPLES:
        said.append(f"{samples} samples, where published figures are of {PUBLISHED_SAMPLES}: FID falls as they grow")
    return said

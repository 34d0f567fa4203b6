"""Features and statistics of a set of images, written once and read as a side of a comparison later."""

from pathlib import Path
from typing import Any

from raecli.evaluation.measuring import DigestedImages, Wanted, check_shares, measure
from raecli.evaluation.moments import rank_batches
from raecli.evaluation.networks import DINOV2, POOL, FeatureNetwork
from raecli.metrics.feature_file import FeatureWriter
from raecli.metrics.inception_file import LAYER_WIDTHS
from raecli.metrics.reference import ImageSet, rank_slice
from raecli.metrics.statistics import SUFFIXES, save_statistics
from raecli.training.distributed import Ranks


def write_features(
    path: Path,
    images: ImageSet,
    networks: list[FeatureNetwork],
    told: dict[str, Any],
    batch_size: int,
    ranks: Ranks,
) -> None:
    """Every layer of every image, float32, in the set's order; each rank writes its rows."""
    check_shares(len(images), ranks, images.path)
    widths = {
        layer: network.width if layer in (POOL, DINOV2) else LAYER_WIDTHS[layer]
        for network in networks
        for layer in network.layers
    }
    writer = FeatureWriter(path, widths, len(images))
    digested = DigestedImages(images)
    ranks.main_first(writer.begin)
    try:
        start, _ = rank_slice(len(images), ranks.rank, ranks.world)
        for names, batch in rank_batches(digested, batch_size, ranks, "features"):
            for network in networks:
                for layer, rows in network.extract(batch).items():
                    writer.write(layer, start, rows)
            start += len(names)
        provenance = told | networks_told(networks) | {"images": str(images.path), "sha256": digested.sha256(ranks)}
        ranks.main_first(lambda: writer.finish(provenance))
    finally:
        if ranks.is_main:
            writer.remove_scratch()


def write_statistics(
    path: Path,
    images: ImageSet,
    networks: list[FeatureNetwork],
    told: dict[str, Any],
    batch_size: int,
    ranks: Ranks,
) -> None:
    """Mean and covariance of the layers that a Frechet distance compares, as ADM's reference batches name them."""
    layers, sha256 = {}, None
    for network in networks:
        wanted = Wanted(tuple(layer for layer in network.layers if layer in SUFFIXES))
        measured = measure(images, network, wanted, batch_size, ranks, "statistics")
        layers |= measured.moments
        sha256 = measured.sha256
    provenance = told | networks_told(networks) | {"images": str(images.path), "sha256": sha256}
    provenance.pop("labels", None)  # statistics have no order
    ranks.main_first(lambda: save_statistics(path, layers, provenance))


def networks_told(networks: list[FeatureNetwork]) -> dict[str, Any]:
    """Which networks the numbers are of."""
    return {DINOV2 if DINOV2 in network.layers else "features": network.description for network in networks}

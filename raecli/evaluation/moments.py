"""A set of images as a Gaussian in a network's features, each rank its share. Any batch size, any number of ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from raecli.errors import InputError
from raecli.evaluation.networks import POOL, FeatureNetwork
from raecli.evaluation.sides import is_of, told_network
from raecli.metrics.reference import ImageSet, holds_images, image_batches, locate_source, open_images, rank_slice
from raecli.metrics.statistics import FeatureStatistics, Moments, load_moments, merge_in_order
from raecli.training.distributed import Ranks
from raecli.training.progress import Progress


def reference_moments(path: str, network: FeatureNetwork, batch_size: int, ranks: Ranks) -> Moments:
    """A reference's Gaussian in the network's features: stored statistics of that network are preferred."""
    source = locate_source(path)
    stored = load_moments(source) if source.suffix == ".npz" else None
    if stored is not None and is_of(stored, POOL, network.description):
        return stored
    if stored is not None and not holds_images(source):
        told = told_network(stored.provenance, POOL)
        raise InputError(
            f"{source}: holds statistics of another feature network ({told['name']}, {len(stored.mean)} features) "
            "and no images; give statistics of that network, or images"
        )
    return measured_moments(open_images(source), network, batch_size, ranks, "reference")


def measured_moments(images: ImageSet, network: FeatureNetwork, batch_size: int, ranks: Ranks, label: str) -> Moments:
    """Pass every image through the network once, each rank its slice; every rank gets the whole's Gaussian."""
    statistics = FeatureStatistics(network.width, ranks.device)
    for names, batch in rank_batches(images, batch_size, ranks, label):
        statistics.update(network.extract(batch)[POOL], names)
    merged = merge_in_order(states_of_ranks(statistics, ranks))
    return merged.moments({"features": network.description, "images": str(images.path)})


def rank_batches(images: ImageSet, batch_size: int, ranks: Ranks, label: str) -> Iterator[tuple[list[str], Tensor]]:
    """This rank's share of the images, on its device, with progress on stderr."""
    start, stop = rank_slice(len(images), ranks.rank, ranks.world)
    progress = Progress(stop - start, "images", label, shown=ranks.is_main)
    for names, batch in image_batches(images, start, stop, batch_size):
        yield names, batch.to(ranks.device)
        progress.advance(len(names))
    progress.close()


def states_of_ranks(statistics: FeatureStatistics, ranks: Ranks) -> Iterator[FeatureStatistics]:
    """Every rank's statistics, in rank order, one at a time: a sum with the others' zeros is exact."""
    own = statistics.packed()
    for rank in range(ranks.world):
        packed = own.clone() if rank == ranks.rank else torch.zeros_like(own)
        yield FeatureStatistics.unpacked(ranks.sum(packed), statistics.mean.numel())

"""A set of images as a Gaussian in a network's features, each rank its share. Any batch size, any number of ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from raecli.evaluation.networks import POOL, FeatureNetwork
from raecli.metrics.reference import ImageSet, image_batches, rank_slice
from raecli.metrics.statistics import FeatureStatistics, Moments, merge_in_order
from raecli.training.distributed import Ranks
from raecli.training.progress import Progress


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

"""One pass over a side: its Gaussians, its Inception Score's sums, its features, each rank its share of the samples.

Sample i is on exactly one rank, so nothing is counted twice, and neither batches nor ranks change a figure.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from raecli.errors import InputError
from raecli.evaluation.moments import rank_batches, states_of_ranks
from raecli.evaluation.networks import LOGITS, FeatureNetwork
from raecli.metrics.feature_file import FeatureFile, Rows
from raecli.metrics.inception_score import InceptionScore
from raecli.metrics.reference import ImageSet, rank_slice
from raecli.metrics.statistics import FeatureStatistics, Moments, check_finite, merge_in_order
from raecli.training.distributed import Ranks

FEATURE_ROWS = 2048  # read at once from a feature file


@dataclass(frozen=True)
class Wanted:
    """What a pass is for: layers whose Gaussian is wanted, the layer whose single features are, the score."""

    moments: tuple[str, ...] = ()
    rows: str | None = None
    score: bool = False

    @property
    def layers(self) -> set[str]:
        """All layers that the pass has to have."""
        return {*self.moments, *([self.rows] if self.rows else []), *([LOGITS] if self.score else [])}


@dataclass(frozen=True)
class Measured:
    """What a pass found; the same on every rank. rows: [N, D] float32. sha256: of the pixels, where there were any."""

    moments: dict[str, Moments] = field(default_factory=dict)
    rows: Rows | None = None
    scores: tuple[float, ...] = ()
    sha256: str | None = None


class DigestedImages:
    """A set of images that hashes the pixels it hands out: the digest is of pixels, whatever file they lie in."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.path, self.size = images, images.path, images.size
        self.digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def names(self, start: int, stop: int) -> list[str]:
        """What to call images start to stop in a message."""
        return self.images.names(start, stop)

    def folder_classes(self) -> list[str] | None:
        """The class folder of each image."""
        return self.images.folder_classes()

    def read(self, start: int, stop: int) -> Tensor:
        """Images start to stop: uint8 [B, 3, H, W]."""
        batch = self.images.read(start, stop)
        for index, image in zip(range(start, stop), batch.numpy(), strict=True):
            self.digests[index] = hashlib.sha256(image.tobytes()).digest()
        return batch

    def sha256(self, ranks: Ranks) -> str:
        """Digest of all images' digests in their order, after every rank has read its share."""
        shares = ranks.gather(b"".join(self.digests[index] for index in sorted(self.digests)))
        return hashlib.sha256(b"".join(shares)).hexdigest()


Batches = Iterator[tuple[int, list[str], dict[str, Tensor]]]


class Sums:
    """What a pass has taken in so far, on one rank."""

    def __init__(self, samples: int, wanted: Wanted, device: torch.device, *, keep_rows: bool) -> None:
        """samples: of the whole set. keep_rows: False where single features can be read again from their file."""
        self.samples, self.wanted, self.device, self.keep_rows = samples, wanted, device, keep_rows
        self.statistics: dict[str, FeatureStatistics] = {}
        self.rows: Tensor | None = None
        self.score: InceptionScore | None = None

    def take(self, start: int, names: list[str], features: dict[str, Tensor]) -> None:
        """A batch of features [B, D] by layer, of the samples from `start` on."""
        for layer in self.wanted.moments:
            width = features[layer].shape[1]
            self.statistics.setdefault(layer, FeatureStatistics(width, self.device)).update(features[layer], names)
        if self.wanted.rows:
            self.take_rows(start, names, features[self.wanted.rows])
        if self.wanted.score:
            classes = features[LOGITS].shape[1]
            self.score = self.score or InceptionScore(self.samples, classes, self.device)
            self.score.update(features[LOGITS], start)

    def take_rows(self, start: int, names: list[str], found: Tensor) -> None:
        """Single features [B, D], checked, and kept at their places where they have to be."""
        check_finite(found, names, start)
        if self.keep_rows:
            if self.rows is None:
                self.rows = torch.zeros(self.samples, found.shape[1], device=self.device)
            self.rows[start : start + len(found)] = found


def measure(
    data: ImageSet | FeatureFile,
    network: FeatureNetwork | None,
    wanted: Wanted,
    batch_size: int,
    ranks: Ranks,
    label: str,
) -> Measured:
    """Take in every sample once and give every rank the whole. network: None where `data` are features already."""
    if not wanted.layers:
        return Measured()
    check_shares(len(data), ranks, data.path)
    images = None if isinstance(data, FeatureFile) else DigestedImages(data)
    sums = Sums(len(data), wanted, ranks.device, keep_rows=images is not None)
    for start, names, features in feature_batches(images or data, network, wanted.layers, batch_size, ranks, label):
        sums.take(start, names, features)
    provenance = {"images": str(data.path), **({"features": network.description} if network else {})}
    moments = {layer: merge_in_order(states_of_ranks(own, ranks)) for layer, own in sums.statistics.items()}
    stored = data.rows(wanted.rows, ranks.device) if isinstance(data, FeatureFile) and wanted.rows else None
    return Measured(
        {layer: merged.moments(provenance) for layer, merged in moments.items()},
        over_ranks(sums.rows, ranks) if stored is None else stored,
        () if sums.score is None else split_scores(sums.score, ranks),
        None if images is None else images.sha256(ranks),
    )


def over_ranks(rows: Tensor | None, ranks: Ranks) -> Tensor | None:
    """Every rank's rows on all ranks: each has zeros where the others' are, so the sum is exact."""
    return None if rows is None else ranks.sum(rows)


def split_scores(score: InceptionScore, ranks: Ranks) -> tuple[float, ...]:
    """Scores of the splits, of all ranks' sums."""
    score.sums = ranks.sum(score.sums)
    return tuple(score.scores())


def check_shares(count: int, ranks: Ranks, path: Path) -> None:
    """Refuse fewer samples than ranks: a rank without any does not know a feature's width."""
    if count < ranks.world:
        raise InputError(f"{path}: {count} samples for {ranks.world} processes; start fewer with --devices")


def feature_batches(
    data: ImageSet | FeatureFile,
    network: FeatureNetwork | None,
    layers: set[str],
    batch_size: int,
    ranks: Ranks,
    label: str,
) -> Batches:
    """This rank's share: position of the first sample, names, and features [B, D] by layer."""
    start, stop = rank_slice(len(data), ranks.rank, ranks.world)
    if isinstance(data, FeatureFile):
        for first in range(start, stop, FEATURE_ROWS):
            last = min(first + FEATURE_ROWS, stop)
            rows = {layer: data.read(layer, first, last).to(ranks.device) for layer in layers}
            yield first, data.names(first, last), rows
        return
    assert network is not None, "images have no features without a network"
    for names, batch in rank_batches(data, batch_size, ranks, label):
        yield start, names, network.extract(batch)
        start += len(names)

"""How near reconstructions are to their images: rFID, PSNR, SSIM, LPIPS, on 8-bit images, over ranks.

PSNR, SSIM and LPIPS are taken a pair at a time and their means are sums without rounding, so that they are the same to
the bit for any batch size, number of ranks and order. rFID's network sees groups of the same make-up whatever the batch
size, and its Gaussians are streamed in float64.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raecli.errors import InputError, NonFiniteError
from raecli.evaluation.moments import states_of_ranks
from raecli.evaluation.networks import POOL, FeatureNetwork, chosen_network
from raecli.losses.reconstruction import load_lpips
from raecli.metrics.frechet import frechet_distance
from raecli.metrics.full_precision import full_float32
from raecli.metrics.image_quality import psnr, ssim
from raecli.metrics.lpips_file import find_lpips
from raecli.metrics.statistics import FeatureStatistics, merge_in_order
from raecli.models.autoencoder import Autoencoder
from raecli.training.distributed import Ranks

METRICS = ("rfid", "psnr", "ssim", "lpips")
PER_PAIR = ("psnr", "ssim", "lpips")
GROUP = (
    16  # images a forward of rFID's network: another number rounds its float32 otherwise, up to 2e-6 of an rFID seen
)
CONVENTIONS = {
    "psnr": "of each image: 10 log10(1 / max(mse, 1e-10)) on 8-bit values / 255; the mean over images",
    "ssim": "of each image: Gaussian window of 11, sigma 1.5, K .01 and .03, channels apart, whole windows; the mean",
    "lpips": "of each image: VGG16 with the lpips package's linear heads, version 0.1, on [-1, 1]; the mean",
    "rfid": "Frechet distance of all reconstructions to all of their images, covariances divided by N - 1",
}


@dataclass(frozen=True)
class PairShape:
    """Where a set of images is from, and the size of each: what choosing a feature network takes."""

    path: Path
    size: tuple[int, int]  # height, width


@dataclass(frozen=True)
class Judges:
    """The metrics asked for, and the frozen networks behind them."""

    metrics: tuple[str, ...]
    lpips: nn.Module | None = None
    network: FeatureNetwork | None = None
    descriptions: dict[str, Any] = field(default_factory=dict)  # of each metric: convention, network, digest

    @property
    def per_pair(self) -> tuple[str, ...]:
        """The metrics that each pair has a figure of, in the order of their columns."""
        return tuple(name for name in PER_PAIR if name in self.metrics)


def load_judges(
    metrics: Sequence[str],
    shape: PairShape,
    device: torch.device,
    *,
    lpips_weights: str | None = None,
    inception: str | None = None,
    features: str | None = None,
) -> Judges:
    """Load what the metrics need; leaves torch's random numbers as they were.

    features: a classifier's .safetensors or an encoder's name, instead of Inception. Raises UsageError naming the file
    to bring where one is absent.
    """
    descriptions: dict[str, Any] = {name: {"convention": CONVENTIONS[name]} for name in METRICS if name in metrics}
    lpips, network = None, None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # networks are initialised, then loaded
        warnings.filterwarnings("ignore", module="torchvision.models")  # lpips names torchvision's options the old way
        if "lpips" in metrics:
            found = find_lpips(lpips_weights)
            lpips = load_lpips(found.path).to(device)
            told = {"file": str(found.path), "sha256": found.sha256, "published_weights": found.published}
            descriptions["lpips"] |= {"network": told}
        if "rfid" in metrics:
            network = chosen_network(features, inception, shape, device)
            descriptions["rfid"] |= {"network": network.description}
    return Judges(tuple(descriptions), lpips, network, descriptions)


@torch.inference_mode()
def reconstructed(
    autoencoder: Autoencoder, crops: Tensor, *, precision: str, pixel_rounding: str, names: Sequence[str]
) -> Tensor:
    """Crops through the autoencoder and back, without noise, as they are saved: uint8 [B, 3, H, W] both.

    pixel_rounding: "round" to the nearest, or "floor" as the release does. names: the crops', for NonFiniteError.
    """
    with torch.autocast(crops.device.type, torch.bfloat16, enabled=precision == "bf16"):
        images = autoencoder.decode(autoencoder.encode(crops.float() / 255)).float()
    finite = images.flatten(1).isfinite().all(1).tolist()
    if not all(finite):
        bad = ", ".join(name for name, whole in zip(names, finite, strict=True) if not whole)
        raise NonFiniteError(f"the autoencoder gives NaN or infinity for {bad}; look at its weights")
    scaled = images.clamp(0, 1) * 255
    return (scaled.round() if pixel_rounding == "round" else scaled.floor()).to(torch.uint8)


def whole_groups(batch_size: int) -> int:
    """A batch size that no group is cut by: the next multiple of GROUP."""
    return -(-batch_size // GROUP) * GROUP


class PairFigures:
    """What one rank has seen of a set of pairs."""

    def __init__(self, judges: Judges, device: torch.device) -> None:
        """Nothing seen yet."""
        self.judges, self.device = judges, device
        self.positions: list[int] = []  # of the pairs in the whole set
        self.rows: list[Tensor] = []  # a float64 figure of each of judges.per_pair
        self.digests: list[bytes] = []  # of the two images' pixels, 32 bytes each
        width = judges.network.width if judges.network else 1
        self.images, self.reconstructions = (FeatureStatistics(width, device) for _ in range(2))

    def update(self, positions: Sequence[int], images: Tensor, reconstructions: Tensor, names: Sequence[str]) -> None:
        """Take in pairs, uint8 [B, 3, H, W] both. positions: theirs in the whole set, each to be seen exactly once.

        For the same rFID from any batches, these start at multiples of GROUP.
        """
        self.positions += positions
        for image, reconstruction in zip(images, reconstructions, strict=True):
            self.digests.append(pixels_sha256(image) + pixels_sha256(reconstruction))
        images, reconstructions = images.to(self.device), reconstructions.to(self.device)
        for row, name in enumerate(names):  # one at a time: no figure depends on its batch
            figures = pair_figures(self.judges, images[row : row + 1], reconstructions[row : row + 1])
            if not bool(figures.isfinite().all()):
                raise NonFiniteError(f"{name}: a figure of it is NaN or infinite; look at the image and the weights")
            self.rows.append(figures.cpu())
        if self.judges.network:
            for start in range(0, len(names), GROUP):
                part = slice(start, start + GROUP)
                self.images.update(self.judges.network.extract(images[part])[POOL], names[part])
                self.reconstructions.update(self.judges.network.extract(reconstructions[part])[POOL], names[part])

    def means(self, count: int, ranks: Ranks) -> dict[str, Any]:
        """All ranks' figures as one, on every rank: means, rFID, and the digests of both sets' pixels.

        count: pairs in the whole set. Raises InputError if there is none.
        """
        if count == 0:
            raise InputError("no pair of images to measure")
        table = torch.stack(self.rows).numpy() if self.rows else np.empty((0, len(self.judges.per_pair)))
        parts = ranks.gather((self.positions, table, self.digests))
        positions = [position for part in parts for position in part[0]]
        assert sorted(positions) == list(range(count)), "every pair is seen exactly once"
        rows = np.concatenate([part[1] for part in parts])
        digests = [digest for part in parts for digest in part[2]]
        ordered = [digests[place] for place in np.argsort(positions)]
        report = {name: math.fsum(rows[:, column]) / count for column, name in enumerate(self.judges.per_pair)}
        sides = {"images": slice(0, 32), "reconstructions": slice(32, 64)}
        return report | self.distance(ranks) | {"pairs": count, "pixels_sha256": set_digests(ordered, sides)}

    def distance(self, ranks: Ranks) -> dict[str, Any]:
        """rFID and its parts, where it was asked for."""
        if self.judges.network is None:
            return {}
        ours, theirs = (
            merge_in_order(states_of_ranks(side, ranks)).moments() for side in (self.reconstructions, self.images)
        )
        sides = (ours.mean, ours.covariance, theirs.mean, theirs.covariance)
        distance = ranks.main_first(lambda: frechet_distance(*sides))
        parts = {"mean_part": distance.mean_part, "trace_part": distance.trace_part, "method": distance.method}
        return {"rfid": distance.value, "rfid_parts": parts}


def pair_figures(judges: Judges, image: Tensor, reconstruction: Tensor) -> Tensor:
    """float64 [K], a figure of each of judges.per_pair. uint8 [1, 3, H, W] both."""
    figures = {}
    if "psnr" in judges.metrics:
        figures["psnr"] = psnr(reconstruction, image)
    if "ssim" in judges.metrics:
        figures["ssim"] = ssim(reconstruction, image)
    if judges.lpips is not None:
        figures["lpips"] = lpips_distance(judges.lpips, reconstruction, image)
    table = [figures[name].double().flatten() for name in judges.per_pair]
    return torch.cat(table) if table else torch.empty(0, dtype=torch.float64)


@torch.no_grad()
def lpips_distance(network: nn.Module, images: Tensor, references: Tensor) -> Tensor:
    """LPIPS (Zhang et al. 2018) of uint8 images [B, 3, H, W], mapped to [-1, 1]: [B]. float32, no TF32."""
    with full_float32(images.device):
        return network(images.float() / 127.5 - 1, references.float() / 127.5 - 1).flatten()


def pixels_sha256(image: Tensor) -> bytes:
    """Digest of an image's uint8 values [3, H, W], rows of RGB pixels as a PNG has them."""
    return hashlib.sha256(image.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()).digest()


def set_digests(digests: Iterable[bytes], sides: dict[str, slice]) -> dict[str, str]:
    """Of each side, the digest of its images' digests in the set's order."""
    told = list(digests)
    return {name: hashlib.sha256(b"".join(pair[part] for pair in told)).hexdigest() for name, part in sides.items()}

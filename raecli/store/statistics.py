"""Mean and variance of latents, an element a channel and position, exact in float64. FACTS section 1."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raecli.errors import InputError
from raecli.store.tensors import save_tensors

STATISTICS = "statistics.safetensors"
VARIANCE_EPS = 1e-5  # the release's, inside the square root


@dataclass(frozen=True)
class LatentStatistics:
    """mean: float32 [C, H, W] or None (the released DINOv2-B statistics are not centred); variance: [C, H, W]."""

    mean: Tensor | None
    variance: Tensor
    count: int = 0

    def normalise(self, latents: Tensor) -> Tensor:
        """(latents - mean) / sqrt(variance + 1e-5); latents: [B, C, H, W]."""
        centred = latents if self.mean is None else latents - self.mean
        return centred / (self.variance + VARIANCE_EPS).sqrt()

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of normalise."""
        scaled = latents * (self.variance + VARIANCE_EPS).sqrt()
        return scaled if self.mean is None else scaled + self.mean

    def to(self, device: torch.device | str) -> "LatentStatistics":
        """The same on a device."""
        mean = None if self.mean is None else self.mean.to(device)
        return LatentStatistics(mean, self.variance.to(device), self.count)

    def channels_last(self) -> "LatentStatistics":
        """The same, the channels of a place side by side in memory, as latents are that tokens are made of."""
        mean = None if self.mean is None else channels_last(self.mean)
        return LatentStatistics(mean, channels_last(self.variance), self.count)

    def save(self, path: Path) -> None:
        """Write `mean` (where there is one), `variance` and `count`."""
        tensors = {"variance": self.variance, "count": torch.tensor([self.count])}
        save_tensors(tensors if self.mean is None else tensors | {"mean": self.mean}, path)


def channels_last(values: Tensor) -> Tensor:
    """[C, H, W], the channels of a place side by side in memory."""
    return values[None].contiguous(memory_format=torch.channels_last)[0]


def load_statistics(path: Path) -> LatentStatistics:
    """Read a statistics file. Raises InputError if it is not one."""
    try:
        tensors = load_file(path)
        return LatentStatistics(tensors.get("mean"), tensors["variance"], int(tensors["count"]))
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path}: no latent statistics: {error}") from None


class LatentSums:
    """Sums of latents and of their squares in float64, [C, H, W] each, taken one sample at a time.

    A fixed order makes them the same to the bit for any batch size; shards are added in the order of their names,
    which makes them the same for any number of ranks.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, latents: Tensor) -> None:
        """Take in latents [B, C, H, W] as they are stored."""
        for latent in latents.to(torch.float64):
            self.total.add_(latent)
            self.squares.addcmul_(latent, latent)
            self.count += 1

    def merge(self, other: "LatentSums") -> None:
        """Add another's sums."""
        self.total.add_(other.total)
        self.squares.add_(other.squares)
        self.count += other.count

    def statistics(self) -> LatentStatistics:
        """Mean and (population) variance, rounded to float32 at the end."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp_min(0)
        return LatentStatistics(mean.float().cpu(), variance.float().cpu(), self.count)

    def save(self, path: Path) -> None:
        """Write the sums of a shard."""
        save_tensors(
            {"total": self.total.cpu(), "squares": self.squares.cpu(), "count": torch.tensor([self.count])}, path
        )

    @classmethod
    def load(cls, path: Path) -> "LatentSums":
        """Read the sums of a shard."""
        tensors = load_file(path)
        sums = cls(tuple(tensors["total"].shape))
        sums.total, sums.squares, sums.count = tensors["total"], tensors["squares"], int(tensors["count"])
        return sums

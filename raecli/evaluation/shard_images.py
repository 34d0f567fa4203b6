"""Images of WebDataset shards as a set to be measured."""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raecli.data.images import ImageItem, ImageSource
from raecli.data.images import open_images as open_source
from raecli.errors import InputError
from raecli.metrics.reference import read_image


def holds_shards(source: Path) -> bool:
    """Whether `source` is a tar, or a folder with tars in it."""
    return source.suffix == ".tar" if source.is_file() else source.is_dir() and any(source.glob("*.tar"))


class ShardImages:
    """Images of tars in the order of their names, then of their members; all of one size."""

    def __init__(self, path: Path) -> None:
        """Reads headers, and the first image."""
        self.path = path
        self.source: ImageSource = open_source(path)
        if not self.source.items:
            raise InputError(f"{path}: no images in these tars; a latent cache is no set of images")
        self.size = self.decode(self.source.items[0]).shape[:2]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source.items)

    def names(self, start: int, stop: int) -> list[str]:
        """What to call images start to stop in a message."""
        return [f"{self.path}: {item.name}" for item in self.source.items[start:stop]]

    def read(self, start: int, stop: int) -> Tensor:
        """Images start to stop: uint8 [B, 3, H, W]."""
        return torch.from_numpy(np.stack([self.read_one(item) for item in self.source.items[start:stop]]))

    def read_one(self, item: ImageItem) -> np.ndarray:
        """One image: uint8 [3, H, W] of the set's size."""
        pixels = self.decode(item)
        if pixels.shape[:2] != self.size:
            found, first = (f"{size[1]} x {size[0]}" for size in (pixels.shape, self.size))
            raise InputError(
                f"{self.path}: {item.name} has {found} pixels, the first image {first}; a set has one size"
            )
        return pixels.transpose(2, 0, 1)

    def decode(self, item: ImageItem) -> np.ndarray:
        """One image: uint8 [H, W, 3]."""
        return read_image(io.BytesIO(item.read()), f"{self.path}: {item.name}")

    def folder_classes(self) -> list[str] | None:
        """The class number of each image, where its .cls tells."""
        return [str(item.label) for item in self.source.items] if self.source.classes else None

"""Batches of pixels, read by several threads: centre crops as the latent cache has them, or whole images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from raecli.data.feed import pooled
from raecli.data.images import ImageItem
from raecli.data.preprocess import center_square, decode_pixels
from raecli.errors import InputError, counted


def center_crops(items: Sequence[ImageItem], side: int, workers: int) -> Tensor:
    """guided-diffusion's centre crops: uint8 [B, 3, side, side].

    Raises InputError listing every image of the batch that cannot be read.
    """
    return read_batch(items, lambda item: center_square(item.read(), item.name, side), workers)


def whole_images(items: Sequence[ImageItem], workers: int) -> Tensor:
    """Images of one size as they are: uint8 [B, 3, H, W]. Raises InputError likewise."""
    return read_batch(items, lambda item: decode_pixels(item.read(), item.name), workers)


def read_batch(items: Sequence[ImageItem], pixels_of: Callable[[ImageItem], np.ndarray], workers: int) -> Tensor:
    """Pixels [H, W, 3] of each image, stacked."""

    def read(item: ImageItem) -> np.ndarray | InputError:
        try:
            return pixels_of(item)
        except InputError as error:
            return error

    pixels = pooled(read, items, workers)
    bad = [str(entry) for entry in pixels if isinstance(entry, InputError)]
    if bad:
        raise InputError(f"{counted(len(bad), 'unreadable image')}; mend or remove them\n  " + "\n  ".join(bad))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

"""DiffAug: augmentation before the discriminator, through which gradients flow. Zhao et al. 2020; App. E.2."""

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 7  # uniform numbers that an image needs
SHIFT = 0.125  # of the side, at most, either way


def diff_augment(images: Tensor, draws: Tensor, *, cutout: float) -> Tensor:
    """Move, recolour and cut each image by its own draws.

    images: [B, 3, H, W] in [-1, 1]; draws: uniform in [0, 1), [B, 7], on the CPU; cutout: the side of the square cut
    out as a share of the image's, 0: none is. What comes into view, and the square, is 0.
    """
    moved = torch.stack([translated(image, *row[:2].tolist()) for image, row in zip(images, draws, strict=True)])
    factors = draws[:, 2:5].to(images).view(-1, 3, 1, 1, 1)
    recoloured = coloured(moved, factors[:, 0] - 0.5, 2 * factors[:, 1], 0.5 + factors[:, 2])
    return recoloured * cutout_mask(images, draws[:, 5:], cutout) if cutout > 0 else recoloured


def translated(image: Tensor, down: float, across: float) -> Tensor:
    """[3, H, W] moved by a whole number of pixels, at most SHIFT of the side; down and across in [0, 1)."""
    steps = []
    for draw, side in ((down, image.shape[1]), (across, image.shape[2])):
        furthest = round(side * SHIFT)
        steps.append(int(draw * (2 * furthest + 1)) - furthest)
    rows, columns = steps
    return F.pad(image, (columns, -columns, rows, -rows))  # a negative width cuts


def coloured(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Brightness in [-.5, .5) is added; saturation in [0, 2) and contrast in [.5, 1.5) scale around the mean.

    images: [B, 3, H, W]; the factors broadcast against them.
    """
    images = images + brightness
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * saturation + grey
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - level) * contrast + level


def cutout_mask(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """[B, 1, H, W]: 0 in a square around a point drawn uniformly, which the image's edge may cut, else 1."""
    masks = []
    for draw, side in zip(draws.T, images.shape[2:], strict=True):
        size = round(side * share)
        centre = (draw * (side + 1 - size % 2)).floor().long()
        first = (centre - size // 2)[:, None]
        places = torch.arange(side)
        masks.append((places >= first) & (places < first + size))
    rows, columns = masks
    return (~(rows[:, :, None] & columns[:, None, :]))[:, None].to(images)

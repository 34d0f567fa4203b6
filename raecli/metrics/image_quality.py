"""How near a reconstruction is to its image: PSNR and SSIM, one figure for each image."""

import torch
from torch import Tensor
from torch.nn import functional

from raecli.errors import InputError

SSIM_WINDOW = 11  # pixels: 3.5 standard deviations to each side, int(3.5 * 1.5 + 0.5) * 2 + 1
SSIM_SIGMA = 1.5  # pixels
SSIM_K = (0.01, 0.03)  # Wang et al. (2004)
LEAST_MSE = 1e-10  # identical images score 100 dB


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B], float64: 10 log10(1 / mse). The figure of a set is its mean over images.

    Both [B, C, H, W], uint8 or float in [0, 1].
    """
    images, references = unit_range(images, references)
    mse = (images - references).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(LEAST_MSE).log10()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity, [B], float64, at most 1. Wang et al. (2004), eq. 13, Gaussian window, range of values 1.

    Both [B, C, H, W], uint8 or float in [0, 1], at least 11 pixels a side. Channels are compared apart and averaged;
    only pixels with a whole window count (the border of 5 is cropped).
    """
    images, references = unit_range(images, references)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise InputError(f"SSIM needs images of {SSIM_WINDOW} pixels a side or more, found {list(images.shape[-2:])}")
    mean_a, mean_b = blurred(images), blurred(references)
    variance_a = blurred(images * images) - mean_a**2
    variance_b = blurred(references * references) - mean_b**2
    covariance = blurred(images * references) - mean_a * mean_b
    c1, c2 = (k**2 for k in SSIM_K)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def unit_range(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 in [0, 1], or an InputError if they cannot be compared."""
    if images.shape != references.shape or images.dtype != references.dtype:
        raise InputError(
            f"cannot compare {images.dtype} images of shape {list(images.shape)} "
            f"with {references.dtype} references of shape {list(references.shape)}"
        )
    top = 255 if images.dtype == torch.uint8 else 1
    return images.double() / top, references.double() / top


def blurred(maps: Tensor) -> Tensor:
    """Gaussian-weighted local mean where the whole window fits: [B, C, H, W] -> [B, C, H - 10, W - 10]."""
    offsets = torch.arange(SSIM_WINDOW, dtype=maps.dtype, device=maps.device) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    flat = maps.flatten(0, 1).unsqueeze(1)
    flat = functional.conv2d(functional.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.view(*maps.shape[:2], *flat.shape[-2:])

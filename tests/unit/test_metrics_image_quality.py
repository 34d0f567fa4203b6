"""PSNR and SSIM against their formulae."""

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from raecli.errors import InputError
from raecli.metrics.image_quality import psnr, ssim


def images(seed: int, size: int = 24) -> Tensor:
    """Three random images: uint8 [3, 3, H, W]."""
    return torch.randint(0, 256, (3, 3, size, size + 2), generator=torch.Generator().manual_seed(seed)).byte()


def ssim_by_formula(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. (2004), eq. 13, of two planes in [0, 1]: local moments by 2-D convolution, whole windows only."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def local(plane: np.ndarray) -> np.ndarray:
        return scipy.signal.convolve2d(plane, window, mode="valid")

    mean_a, mean_b = local(a), local(b)
    spread_a, spread_b, shared = local(a * a) - mean_a**2, local(b * b) - mean_b**2, local(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + 0.01**2) * (2 * shared + 0.03**2)
    return float((top / ((mean_a**2 + mean_b**2 + 0.01**2) * (spread_a + spread_b + 0.03**2))).mean())


def test_psnr_of_a_known_error():
    """A constant error of 51 of 255 has mse 0.04; of 0.1 it has 0.01, 20 dB."""
    dark = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    expected = torch.full((2,), -10 * np.log10(0.04), dtype=torch.float64)
    torch.testing.assert_close(psnr(dark, dark + 51), expected)
    torch.testing.assert_close(psnr(dark.double(), dark + 0.1 + dark.double())[0].item(), 20.0)


def test_psnr_is_of_each_image_not_of_the_batch():
    a, b = images(0), images(1)
    b[1] = a[1]
    scores = psnr(a, b)
    assert scores.shape == (3,)
    torch.testing.assert_close(scores[:1], psnr(a[:1], b[:1]))
    assert scores[1] == 100  # capped at mse 1e-10


def test_psnr_of_bytes_equals_psnr_of_their_fractions():
    a, b = images(2), images(3)
    torch.testing.assert_close(psnr(a, b), psnr(a.double() / 255, b.double() / 255))


def test_ssim_equals_its_formula():
    a, b = images(4), images(5)
    b = (0.7 * a + 0.3 * b).byte()
    planes_a, planes_b = a.numpy() / 255, b.numpy() / 255
    expected = [np.mean([ssim_by_formula(planes_a[i, c], planes_b[i, c]) for c in range(3)]) for i in range(3)]
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=1e-10)


def test_ssim_of_equal_images_is_one_and_drops_with_any_change():
    a = images(6)
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))
    assert (ssim(a, images(7)) < 0.5).all()


def test_ssim_weighs_a_pixel_by_its_distance_from_a_whole_windows_middle():
    """An 11 x 11 image has one window: its corner weighs exp(-25 / 2.25) of its middle."""
    a = torch.full((1, 1, 11, 11), 0.5, dtype=torch.float64)
    corner, middle = a.clone(), a.clone()
    corner[..., 0, 0], middle[..., 5, 5] = 1, 1
    assert 1 - ssim(a, corner).item() < 1e-3 * (1 - ssim(a, middle).item())


def test_images_that_cannot_be_compared_are_refused():
    a = images(8)
    with pytest.raises(InputError, match="cannot compare"):
        psnr(a, a[:, :, 1:])
    with pytest.raises(InputError, match="cannot compare"):
        psnr(a, a.float())
    with pytest.raises(InputError, match="11 pixels"):
        ssim(a[..., :10, :], a[..., :10, :])

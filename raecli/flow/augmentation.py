"""Noise-augmented decoding: the decoder learns from latents blurred by noise. Sec. 4.3."""

from torch import Tensor


def noise_scales(draws: Tensor, *, tau: float, law: str) -> Tensor:
    """One sigma a sample, [B].

    law "halfnormal": |N(0, tau^2)| out of standard normal draws, the paper's. "uniform": tau U(0, 1) out of uniform
    draws, the release's.
    """
    if law not in ("halfnormal", "uniform"):
        raise ValueError(f"no law {law!r}")
    return tau * draws.abs()


def augmented_latents(latents: Tensor, noise: Tensor, scales: Tensor) -> Tensor:
    """latents + sigma n, before normalisation. latents, noise: [B, C, H, W]; scales: [B]."""
    return latents + scales.view(-1, 1, 1, 1) * noise

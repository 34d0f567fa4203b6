"""Rectified flow's straight path between latents (t = 0) and noise (t = 1). Sec. 4; Liu et al. 2023."""

import torch
import torch.nn.functional as F
from torch import Tensor


def noisy_latents(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """(1 - t) latents + t noise. latents, noise: [B, ...]; t: [B] in [0, 1]."""
    t = t.view(-1, *[1] * (latents.ndim - 1))
    return torch.lerp(latents, noise, t)


def target_velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """noise - latents: the path's derivative, the same at every t."""
    return noise - latents


def flow_loss(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of a predicted velocity, [B]: one number a sample, the mean over its entries."""
    squares = F.mse_loss(velocity.float(), target_velocity(latents, noise), reduction="none")
    return squares.sum(dim=tuple(range(1, squares.ndim))) / squares[0].numel()  # flattening would copy a tokens' map

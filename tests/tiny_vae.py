"""A diffusers folder with a tiny AutoencoderKL of random weights: SD-VAE's four stages, so 8 pixels a position."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn


def make_vae(folder: Path, **config: object) -> Path:
    """Save one with 16 channels at most, its biases and norms drawn too, so that nothing is 0 or 1 by default."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        **config,
    )
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    vae.save_pretrained(folder)
    return folder

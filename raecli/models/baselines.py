"""The baselines of Tables 2, 10 and 11 in the place of a representation encoder: pixels, and SD-VAE's latents."""

import importlib.util
import re
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from raecli.errors import CheckpointError, UsageError
from raecli.models.encoder_weights import load_exactly, match_keys, read_weights
from raecli.store.json_file import read_json

# diffusers before 0.17 named the attention's parts so; SD-VAE was published then.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class PixelEncoder(nn.Module):
    """No encoder: the image itself is the latent. Table 11, where a diffusion patch of 16 makes 256 tokens of it."""

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W], float in [0, 1]. Returns the same in [-1, 1]."""
        return images * 2 - 1


class Vae(nn.Module):
    """One direction of a frozen AutoencoderKL: in evaluation for good. latents = (posterior mean - shift) x scaling."""

    def __init__(self, vae: Any, *, scaling_factor: float, shift_factor: float) -> None:
        """vae: diffusers' AutoencoderKL."""
        super().__init__()
        self.vae = vae
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation, whatever the module around asks."""
        return super().train(False)


class VaeEncoder(Vae):
    """Images to an AutoencoderKL's latents. Tables 2 and 10, where a diffusion patch of 2 makes 256 tokens of them.

    The posterior's mean is taken, where DiT and SiT draw a sample each time: a cache holds one latent an image, and
    SD-VAE's posterior is narrow.
    """

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W], float in [0, 1]. Returns latents [B, C, H / 8, W / 8] for SD-VAE."""
        return (self.vae.encode(images * 2 - 1).latent_dist.mean - self.shift_factor) * self.scaling_factor


class VaeDecoder(Vae):
    """An AutoencoderKL's latents to pixels."""

    def forward(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w] as VaeEncoder gives them. Returns pixels [B, 3, 8 h, 8 w] around [-1, 1]."""
        return self.vae.decode(latents / self.scaling_factor + self.shift_factor).sample


def build_vae(*, path: str, weights: str, latent_channels: int, patch_size: int) -> nn.Module:
    """diffusers' AutoencoderKL out of a folder's config.json, every key of its weights accounted for, in fp32."""
    if importlib.util.find_spec("diffusers") is None:
        raise UsageError("AutoencoderKL needs diffusers, which is not installed: pip install 'raecli[diffusers]'")
    from diffusers import AutoencoderKL

    where = Path(path) / "config.json"
    try:
        vae: Any = AutoencoderKL.from_config(read_json(where))
    # Whatever diffusers has against a configuration.
    except (TypeError, ValueError, AttributeError, LookupError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: diffusers makes no AutoencoderKL of it: {error}") from error
    found = {"latent_channels": vae.config.latent_channels, "patch_size": 2 ** (len(vae.config.block_out_channels) - 1)}
    if found != {"latent_channels": latent_channels, "patch_size": patch_size}:
        raise CheckpointError(
            f"{where}: not the AutoencoderKL that was described: {found['latent_channels']} channels, "
            f"{found['patch_size']} pixels a position; the spec says {latent_channels} and {patch_size}"
        )
    tensors = {present_name(name): tensor for name, tensor in read_weights(weights).items()}
    match_keys(vae.state_dict(), tensors, re.compile(r"(?!)"), weights)
    load_exactly(vae, tensors, weights)
    return vae


def present_name(name: str) -> str:
    """A key as diffusers names it now: `...attentions.0.query.weight` is `...attentions.0.to_q.weight`."""
    found = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{found[1]}.{RENAMED[found[2]]}.{found[3]}" if found else name

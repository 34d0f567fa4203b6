"""A Representation Autoencoder: a frozen encoder, a trained decoder, and the statistics between them. Sec. 3."""

import torch
from torch import Tensor, nn

from raecli.models.decoder import Decoder
from raecli.models.encoder import Encoder
from raecli.store.statistics import LatentStatistics


class Autoencoder(nn.Module):
    """images [B, 3, H, W] in [0, 1] <-> normalised latents [B, C, h, w]."""

    def __init__(
        self,
        encoder: Encoder | None,
        decoder: Decoder,
        mean: Tensor | None,
        variance: Tensor,
        pixels: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("pixel_mean", pixels[0].view(3, 1, 1))
        self.register_buffer("pixel_std", pixels[1].view(3, 1, 1))
        self.use_statistics(LatentStatistics(mean, variance))

    def use_statistics(self, statistics: LatentStatistics) -> None:
        """Normalise by other statistics from now on: those of the cache that a diffusion model was trained on."""
        moved = statistics.to(self.pixel_mean.device)
        self.register_buffer("mean", moved.mean)
        self.register_buffer("variance", moved.variance)

    @property
    def statistics(self) -> LatentStatistics:
        """What latents are normalised by, where this module is."""
        return LatentStatistics(self.mean, self.variance)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Normalised latents of images; the images' side is the one that the autoencoder was trained for."""
        if self.encoder is None:
            raise RuntimeError("this autoencoder was loaded to decode only: load it with encoder=True")
        return self.statistics.normalise(self.encoder(images))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1] (not rounded) of normalised latents."""
        return self.to_images(self.decoder(self.statistics.denormalise(latents))).clamp(0, 1)

    def to_images(self, pixels: Tensor) -> Tensor:
        """The decoder's output space, the encoder's normalised pixels, to images around [0, 1], not clamped."""
        return pixels * self.pixel_std + self.pixel_mean

"""The decoder in training with its frozen encoder: what one step works on, and how latents become images."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raecli.data.crops import Crops
from raecli.data.order import normal, normals, uniforms
from raecli.flow.augmentation import augmented_latents, noise_scales
from raecli.losses.augment import DRAWS
from raecli.models.build import FrozenEncoder
from raecli.models.decoder import Decoder
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.training.distributed import Ranks


@dataclass(frozen=True)
class Part:
    """A micro-batch: what one forward takes."""

    positions: range  # of its images in the endless stream: they key every draw
    weight: float  # its share of the rank's images
    images: Tensor  # uint8 [b, 3, S, S]
    latents: Tensor  # clean, un-normalised [b, C, h, w], float32

    @property
    def targets(self) -> Tensor:
        """The images in [0, 1], float32."""
        return self.images.float() / 255

    def draws(self, seed: int, purpose: str) -> Tensor:
        """DiffAug's uniform numbers [b, 7] for one use of these images; another use has others."""
        columns = [uniforms(seed, f"{purpose} {column}", self.positions) for column in range(DRAWS)]
        return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Learner:
    """A decoder, under DDP where there are several ranks, and the frozen networks around it."""

    model: Decoder
    forward: nn.Module  # the model, under DDP where there are several ranks
    encoder: FrozenEncoder | None  # None: latents come from the cache
    encoder_side: int  # pixels of the images that the cache is of
    perceptual: nn.Module | None
    pixel_mean: Tensor  # [3, 1, 1], of the space that the decoder speaks
    pixel_std: Tensor
    recipe: TrainDecoderRecipe
    ranks: Ranks

    def autocast(self) -> torch.autocast:
        """Matrix products in the recipe's precision."""
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=enabled)

    def parts(self, crops: Crops) -> list[Part]:
        """A rank's share in micro-batches, encoded."""
        share = len(crops.positions)
        micro = self.recipe.micro_batch_size or share
        return [self.part(crops[start : start + micro], share) for start in range(0, share, micro)]

    def part(self, crops: Crops, share: int) -> Part:
        """Crops on the device, their latents from the encoder or from the cache."""
        images = crops.images.to(self.ranks.device, non_blocking=True)
        if crops.latents is None:
            latents = self.encode(images.float() / 255)
        else:
            latents = crops.latents.to(self.ranks.device, non_blocking=True).float()
        return Part(crops.positions, len(crops.positions) / share, images, latents)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images in [0, 1]. For upsampling (Table 9) the encoder sees them scaled down."""
        assert self.encoder is not None, "without an encoder latents come from the cache"
        side = (self.encoder_side, self.encoder_side)
        if images.shape[-2:] != side:
            images = F.interpolate(images, side, mode="bicubic", antialias=True).clamp(0, 1)
        with self.autocast():
            return self.encoder(images).float()

    def noisy(self, part: Part) -> Tensor:
        """The latents with the noise of Sec. 4.3, drawn by position."""
        recipe, positions = self.recipe, part.positions
        if recipe.noise_tau == 0:
            return part.latents
        if recipe.noise_sigma == "halfnormal":
            draws = torch.stack([normal((), recipe.seed, "noise sigma", position) for position in positions])
        else:
            draws = uniforms(recipe.seed, "noise sigma", positions).float()
        scales = noise_scales(draws, tau=recipe.noise_tau, law=recipe.noise_sigma).to(part.latents.device)
        shape = tuple(part.latents.shape[1:])
        noise = normals(shape, recipe.seed, "latent noise", positions, part.latents.device)
        return augmented_latents(part.latents, noise, scales)

    def decode(self, latents: Tensor, module: nn.Module) -> Tensor:
        """Images around [0, 1], not clamped, float32, by the model or its DDP wrapper."""
        with self.autocast():
            pixels = module(latents)
        return pixels.float() * self.pixel_std + self.pixel_mean

    @contextlib.contextmanager
    def reducing(self, *, last: bool) -> Iterator[None]:
        """Gradients are averaged over ranks in the backward of a step's last micro-batch alone."""
        with contextlib.nullcontext() if last or self.ranks.world == 1 else self.forward.no_sync():
            yield

"""Artifacts of a tiny diffusion model, guide and decoder, with random weights: for sampling, without training."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from raecli.models.build import decoder_of, diffusion_of
from raecli.recipe.blocks import DecoderSpec, DiffusionModelSpec
from raecli.store.checkpoint import save_final
from raecli.store.encoders import resolve_encoder
from raecli.store.statistics import LatentStatistics

NAMES = ("apple", "banana", "cherry")
FLOW = {"time_shift_dim": 512, "time_shift_base": 128}


def redrawn(module: nn.Module, seed: int, scale: float = 0.15) -> nn.Module:
    """The same module with no weight left at zero: else every velocity is 0 and a test proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale, generator=generator)
    return module


def save_diffusion(run: Path, *, seed: int = 0, depth: int = 2, classes: tuple[str, ...] = NAMES, **recipe: Any) -> str:
    """A run folder with a final DiT in it; its path."""
    encoder = resolve_encoder("digits-mae", image_size=32)
    spec = DiffusionModelSpec(
        kind="dit", width=16, depth=depth, heads=2, in_channels=32, input_size=4, num_classes=len(classes)
    )
    config = {
        "format": "rae-diffusion",
        "version": 1,
        "step": 7,
        "recipe": {"model": spec.to_dict(), "flow": FLOW, "label_dropout": 0.1} | recipe,
        "latents": latents_of(encoder) | {"classes": list(classes)},
    }
    return save(run, redrawn(diffusion_of(spec), seed), config)


def save_decoder(run: Path, seed: int = 5) -> str:
    """A run folder with a final decoder in it; its path."""
    encoder = resolve_encoder("digits-mae", image_size=32)
    spec = DecoderSpec(width=16, depth=1, heads=2, mlp_width=32, patch_size=8)
    config = {
        "format": "rae-decoder",
        "version": 1,
        "step": 7,
        "recipe": {"decoder": spec.to_dict()},
        "latents": latents_of(encoder),
    }
    return save(run, redrawn(decoder_of(spec, encoder), seed, scale=0.3), config)


def latents_of(encoder: Any) -> dict[str, Any]:
    return {"encoder": encoder.to_dict(), "shape": [32, 4, 4], "image_size": 32}


def save(run: Path, module: nn.Module, config: dict[str, Any]) -> str:
    statistics = LatentStatistics(torch.full((32, 4, 4), 0.1), torch.full((32, 4, 4), 0.9), 10)
    save_final(run, weights=module.state_dict(), statistics=statistics, config=config, card="tiny")
    return str(run)

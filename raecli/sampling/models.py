"""The models that sampling needs, loaded, held against one another, and made ready for speed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raecli.errors import InputError
from raecli.models.autoencoder import Autoencoder
from raecli.models.baseline_autoencoder import baseline_autoencoder
from raecli.models.decoder import DecoderBlock
from raecli.models.layers import Block
from raecli.models.load import load_autoencoder, load_diffusion, statistics_of
from raecli.recipe.recipes import SampleRecipe
from raecli.store.atomic import sha256_of
from raecli.store.encoder_baselines import is_baseline
from raecli.store.model_cards import check_same_latents
from raecli.store.statistics import STATISTICS, LatentStatistics
from raecli.training.distributed import Ranks


@dataclass(frozen=True)
class Models:
    """What sampling needs."""

    model: nn.Module
    guide: nn.Module | None
    autoencoder: Autoencoder


def load_models(recipe: SampleRecipe, ranks: Ranks) -> Models:
    """Load all that is named; refuse what was not made for each other. The door has compared their cards already.

    The decoder is given the latents as the diffusion model's own statistics denormalise them: the decoder's may be
    another cache's.
    """
    model = load_diffusion(recipe.model, ranks.device)
    latents, statistics = model.config["latents"], None
    if is_baseline(recipe.autoencoder) or (model.folder / STATISTICS).is_file():  # a converted model may have none
        statistics = statistics_of(model.folder)
    autoencoder = decoder_for(recipe.autoencoder, latents, statistics, ranks.device)
    check_same_latents(latents, autoencoder.config["latents"], f"{recipe.model}, {recipe.autoencoder}")
    guide = load_diffusion(recipe.guide, ranks.device) if recipe.guide else None
    if guide is not None:
        digests = {statistics_digest(one.folder) for one in (model, guide)} - {None}
        if len(digests) > 1:
            raise InputError(f"{recipe.guide}: its latents are normalised by other statistics than {recipe.model}'s")
    models = Models(model, guide, autoencoder)
    if recipe.precision == "bf16":
        halve_trunks(models)
    if recipe.compile:
        compile_blocks(models)
    return models


def decoder_for(
    name: str, latents: dict[str, Any], statistics: LatentStatistics | None, device: torch.device
) -> Autoencoder:
    """A trained decoder, or a baseline's, that is given latents as a diffusion model's statistics denormalise them.

    latents: what the model's config.json says of them. statistics: None leaves a trained decoder its own.
    """
    if is_baseline(name):
        assert statistics is not None, "a baseline has no statistics of its own"
        return baseline_autoencoder(name, latents, statistics, device, encoder=False)
    autoencoder = load_autoencoder(name, device, encoder=False)
    if statistics is not None:
        autoencoder.use_statistics(statistics)
    return autoencoder


def statistics_digest(folder: Path) -> str | None:
    """sha256 of a model's latent statistics, where it has them."""
    file = folder / STATISTICS
    return sha256_of(file) if file.is_file() else None


def blocks_of(models: Models) -> list[nn.Module]:
    """Every transformer block of model, guide and decoder."""
    parts = [part for part in (models.model, models.guide, models.autoencoder.decoder) if part is not None]
    return [module for part in parts for module in part.modules() if isinstance(module, Block | DecoderBlock)]


def halve_trunks(models: Models) -> None:
    """Keep the blocks' matrices in bfloat16: the bits that autocast would cast them to at every call, cast once."""
    for block in blocks_of(models):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


def compile_blocks(models: Models) -> None:
    """torch.compile, a block at a time: one small graph for blocks of one size, so that starting takes seconds."""
    for block in blocks_of(models):
        block.compile()

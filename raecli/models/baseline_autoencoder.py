"""`pixels` or `sdvae:FOLDER` in an autoencoder's place: nothing trained, the statistics are the diffusion model's."""

from typing import Any

import torch

from raecli.models.autoencoder import Autoencoder
from raecli.models.build import baseline_decoder_of, encoder_of
from raecli.recipe.blocks import EncoderSpec
from raecli.store.encoders import resolve_encoder
from raecli.store.statistics import LatentStatistics


def baseline_autoencoder(
    name: str,
    latents: dict[str, Any],
    statistics: LatentStatistics,
    device: torch.device | str = "cpu",
    *,
    encoder: bool = True,
) -> Autoencoder:
    """A baseline's encoder and decoder around a cache's statistics, used as a trained autoencoder is.

    name: pixels, or sdvae:FOLDER. latents: `config["latents"]` of the diffusion model, whose `statistics` these are.
    The result's `config["latents"]` names the encoder found at `name`, so that the caller can hold it against the
    model's own; its `folder` is None, and `config["step"]` too: nothing was trained.
    """
    spec = resolve_encoder(name, image_size=int(latents["image_size"]))
    pixels = (torch.tensor(spec.mean), torch.tensor(spec.std))
    model = Autoencoder(
        encoder_of(spec) if encoder else None,
        baseline_decoder_of(spec),
        statistics.mean,
        statistics.variance,
        pixels,
    )
    model.config = {"format": "rae-baseline", "step": None, "latents": baseline_latents(spec, latents)}
    model.folder, model.image_size = None, spec.input_size
    return model.to(device).eval().requires_grad_(False)


def baseline_latents(spec: EncoderSpec, latents: dict[str, Any]) -> dict[str, Any]:
    """What the autoencoder says of its latents: the encoder and shape are its own, the rest is the model's."""
    return latents | {"encoder": spec.to_dict(), "shape": list(spec.latent_shape)}

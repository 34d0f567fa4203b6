"""What sampling will cost, before it starts: evaluations, FLOPs, and the bound that a device sets."""

from typing import Any

from raecli.flow.sampler import evaluation_counts
from raecli.flow.time import time_grid
from raecli.models.flops import decoder_macs, diffusion_macs
from raecli.recipe.blocks import DiffusionModelSpec
from raecli.recipe.recipes import SampleRecipe
from raecli.store.model_cards import AutoencoderCard, DiffusionCard

PEAK = 790e12  # FLOP/s assumed of an H200 in bf16; its data sheet has 989.4e12
SIZES = ("in_channels", "input_size", "patch_size", "width", "depth", "head_width", "head_depth", "mlp_ratio")


def forward_flop(model: DiffusionModelSpec) -> int:
    """FLOPs of one image's forward, as executed."""
    return 2 * diffusion_macs(**{key: getattr(model, key) for key in SIZES}).executed


def decode_flop(card: AutoencoderCard) -> int:
    """FLOPs of one image's decoding; 0 for a baseline, which is not counted."""
    if card.decoder is None or card.latents is None:
        return 0
    channels, side, _ = card.latents["shape"]
    sizes: dict[str, Any] = card.decoder.model_dump(exclude={"heads"})
    return 2 * decoder_macs(in_channels=channels, tokens_side=side, **sizes).executed


def image_cost(
    recipe: SampleRecipe, model: DiffusionCard, guide: DiffusionCard | None, autoencoder: AutoencoderCard
) -> dict[str, int]:
    """The least an image takes: evaluations of the model, second ones of guide or null label, FLOPs in all."""
    first, second = evaluation_counts(
        time_grid(recipe.steps, kind=recipe.time_grid, time_shift=model.time_shift),
        solver=recipe.solver,
        guidance_scale=recipe.guidance_scale,
        guidance_interval=recipe.guidance_interval,
    )
    weak = forward_flop((guide or model).model)
    flop = first * forward_flop(model.model) + second * weak + decode_flop(autoencoder)
    return {"evaluations": first, "second_evaluations": second, "flop": flop}


def cost_lines(
    recipe: SampleRecipe, model: DiffusionCard, guide: DiffusionCard | None, autoencoder: AutoencoderCard
) -> list[str]:
    """The plan's lines for a person."""
    cost = image_cost(recipe, model, guide, autoencoder)
    each, weak = forward_flop(model.model) / 1e9, forward_flop((guide or model).model) / 1e9
    lines = [f"an image: {cost['evaluations']} evaluations of the model, {each:.4g} GFLOP each"]
    if cost["second_evaluations"]:
        low, high = recipe.guidance_interval
        whose = "the guide" if guide else "the null label"
        lines.append(f"  and {cost['second_evaluations']} of {whose}, {weak:.4g} GFLOP each, at t in [{low}, {high}]")
    lines.append(f"  decoding {decode_flop(autoencoder) / 1e9:.4g} GFLOP; {cost['flop'] / 1e9:.5g} GFLOP in all")
    rate = PEAK / cost["flop"]
    lines.append(
        f"at {PEAK / 1e12:.0f} TFLOP/s, assumed of an H200 in bf16, {rate:.3g} images/s; "
        "the real time is not known before it runs"
    )
    return lines

"""What a recipe would cost, for --dry-run: parameters, memory, steps, bytes. Computed, never guessed."""

from pathlib import Path

from raecli.recipe.recipes import (
    EncodeCacheRecipe,
    SampleRecipe,
    TrainDecoderRecipe,
    TrainDiffusionRecipe,
    TrainingRecipe,
)
from raecli.recipe.spec import Spec, duration_in_steps

STATE_BYTES = 4 * 5  # a parameter's float32 weight, gradient, two Adam moments and average


def plan_lines(recipe: Spec) -> list[str]:
    """A few lines for a person, by stage."""
    if isinstance(recipe, EncodeCacheRecipe):
        return cache_lines(recipe)
    if isinstance(recipe, TrainDiffusionRecipe | TrainDecoderRecipe):
        return [*model_lines(recipe), *step_lines(recipe)]
    if isinstance(recipe, SampleRecipe):
        evaluations = recipe.steps - (recipe.time_grid == "released")
        if recipe.solver == "heun":
            evaluations = 2 * evaluations - (recipe.time_grid == "paper")
        return [f"{recipe.num} images, {evaluations} evaluations of the model each, without guidance's second ones"]
    return []


def cache_lines(recipe: EncodeCacheRecipe) -> list[str]:
    """Images and bytes of a cache."""
    from raecli.data.images import open_images
    from raecli.store.latent_cache import VIEWS
    from raecli.store.shards import ShardLayout

    count = len(open_images(recipe.source).items)
    encoder = recipe.encoder
    layout = ShardLayout((encoder.width, encoder.tokens_side, encoder.tokens_side), recipe.dtype, VIEWS[recipe.views])
    shards = -(-count // recipe.samples_per_shard)
    size = layout.shard_bytes(count) / 1e9
    return [f"{count} images, latents {layout.latent_shape} in {recipe.dtype}, {shards} shards, {size:.3f} GB"]


def model_lines(recipe: TrainDiffusionRecipe | TrainDecoderRecipe) -> list[str]:
    """Parameters of the model to train, and the memory of its state on a rank."""
    import torch

    from raecli.models.build import decoder_of, diffusion_of
    from raecli.models.dit import parameter_count
    from raecli.store.manifest import read_manifest

    if not Path(recipe.cache).exists():
        return []
    with torch.device("meta"):
        if isinstance(recipe, TrainDiffusionRecipe):
            count = parameter_count(diffusion_of(recipe.model))
        else:
            decoder = decoder_of(recipe.decoder, read_manifest(recipe.cache).encoder)
            count = sum(parameter.numel() for parameter in decoder.parameters())
    return [
        f"{count} parameters; {count * STATE_BYTES / 2**30:.2f} GiB a rank for weights, gradients, Adam and average"
    ]


def step_lines(recipe: TrainingRecipe) -> list[str]:
    """Optimiser steps and images seen."""
    from raecli.store.manifest import read_manifest

    if not Path(recipe.cache).exists():
        return [f"{recipe.duration}, {recipe.batch_size} images a step"]
    samples = read_manifest(recipe.cache).samples
    if isinstance(recipe, TrainDecoderRecipe):
        from raecli.data.images import open_images

        samples = len(open_images(recipe.images).items)
    steps = duration_in_steps(recipe.duration, samples, recipe.batch_size)
    seen = steps * recipe.batch_size
    return [f"{steps} steps of {recipe.batch_size} images: {seen} of {samples}, {seen / samples:.1f} epochs"]

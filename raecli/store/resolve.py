"""A recipe held against the cache it names: what it left open is filled in, what disagrees is refused. No torch."""

from typing import Any

from raecli.errors import InputError
from raecli.recipe.recipes import TrainDecoderRecipe, TrainDiffusionRecipe
from raecli.store.manifest import Manifest


def resolve_diffusion(recipe: TrainDiffusionRecipe, manifest: Manifest) -> TrainDiffusionRecipe:
    """Fill in channels, size, classes and the dimension m of the time shift.

    Raises InputError listing every value that the cache contradicts.
    """
    channels, side, _ = manifest.latent_shape
    classes = len(manifest.classes) if recipe.model.class_conditional else 0
    found = {"in_channels": channels, "input_size": side, "num_classes": classes}
    told = recipe.model.model_dump()
    wrong = [
        f"model.{name}: the recipe says {told[name]}, the cache {recipe.cache} has {value}"
        for name, value in found.items()
        if told[name] not in (None, value)
    ]
    if side % recipe.model.patch_size:
        wrong.append(f"model.patch_size: {recipe.model.patch_size} does not divide the latents' side of {side}")
    if wrong:
        lines = "".join(f"\n  {line}" for line in wrong)
        raise InputError(
            f"recipe and cache disagree (encoder {manifest.encoder.name}); encode anew or change the recipe{lines}"
        )
    dimension = recipe.flow.time_shift_dim or channels * side * side
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=found),
            "flow": recipe.flow.model_copy(update={"time_shift_dim": dimension}),
        }
    )


def check_decoder(recipe: TrainDecoderRecipe, manifest: Manifest) -> TrainDecoderRecipe:
    """Refuse a decoder whose crops its cache's encoder was not made for."""
    output = manifest.encoder.tokens_side * recipe.decoder.patch_size
    if output % manifest.image_size:
        raise InputError(
            f"decoder.patch_size {recipe.decoder.patch_size} makes images of {output} pixels out of "
            f"{manifest.encoder.tokens_side} tokens a side; the cache {recipe.cache} is of {manifest.image_size} "
            "pixels: the first must be a multiple of the second"
        )
    return recipe


def latents_config(manifest: Manifest) -> dict[str, Any]:
    """What a trained model has to remember of the cache it learned from."""
    return {
        "shape": list(manifest.latent_shape),
        "encoder": manifest.encoder.to_dict(),
        "image_size": manifest.image_size,
        "preprocess": manifest.preprocess,
        "classes": list(manifest.classes),
    }

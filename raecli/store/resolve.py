"""A recipe held against the cache it names: what it left open is filled in, what disagrees is refused. No torch."""

from typing import Any

from raecli.errors import InputError, UsageError
from raecli.recipe.recipes import TrainDecoderRecipe, TrainDiffusionRecipe
from raecli.store.manifest import Manifest, differing_fields
from raecli.store.remote import is_url


def resolve_diffusion(recipe: TrainDiffusionRecipe, manifest: Manifest) -> TrainDiffusionRecipe:
    """Fill in channels, size, classes and the dimension m of the time shift.

    Raises InputError listing every value that the cache contradicts, UsageError for a shuffle that would fetch a
    remote cache again and again.
    """
    check_room_for_shuffle(recipe, manifest)
    channels, side, _ = manifest.latent_shape
    classes = len(manifest.classes) if recipe.model.class_conditional else 0
    if recipe.model.class_conditional and not classes:
        raise InputError(f"cache {recipe.cache}: its images have no classes; set model.class_conditional=false")
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


def check_room_for_shuffle(recipe: TrainDiffusionRecipe, manifest: Manifest) -> None:
    """Refuse batches out of all shards of a remote cache that are not all here at once."""
    size = sum(shard.bytes for shard in manifest.shards) / 1e9
    if is_url(recipe.cache) and recipe.shuffle == "global" and size > recipe.remote_cache_gb:
        raise UsageError(
            f"cache {recipe.cache}: its shards take {size:.3f} GB, remote_cache_gb keeps {recipe.remote_cache_gb:g} of "
            "them here, and with shuffle: global every batch wants all of them, so they would be fetched again and "
            f"again; set shuffle=block, or remote_cache_gb={size + 0.001:.3f}"
        )


def check_decoder(recipe: TrainDecoderRecipe, manifest: Manifest) -> TrainDecoderRecipe:
    """Refuse a decoder whose crops its cache's encoder was not made for, or larger than the images they come from."""
    if manifest.encoder.has_decoder:
        name = manifest.encoder.name
        raise InputError(
            f"cache {recipe.cache}: latents of {name} have a decoder already; train a diffusion model on them, and "
            f"sample with --autoencoder {name}"
        )
    output = manifest.encoder.tokens_side * recipe.decoder.patch_size
    if output % manifest.image_size:
        patch, rest = divmod(manifest.image_size, manifest.encoder.tokens_side)
        advice = "the first must be a multiple of the second" if rest else f"set decoder.patch_size={patch}"
        raise InputError(
            f"decoder.patch_size {recipe.decoder.patch_size} makes images of {output} pixels out of "
            f"{manifest.encoder.tokens_side} tokens a side; the cache {recipe.cache} is of {manifest.image_size} "
            f"pixels: {advice}"
        )
    if recipe.augmentation.crop == "random" and recipe.augmentation.resize < output:
        raise InputError(
            f"augmentation.resize: {recipe.augmentation.resize} leaves no room for the decoder's {output} pixels; the "
            f"paper's share is {output * 3 // 2} (384 for 256)"
        )
    if recipe.latents == "cached":
        check_cached_views(recipe, manifest, output)
    return recipe


def check_cached_views(recipe: TrainDecoderRecipe, manifest: Manifest, output: int) -> None:
    """Refuse to decode cached latents into images that they are not of."""
    augmentation, wrong = recipe.augmentation, []
    if augmentation.crop != "center":
        wrong.append(f"augmentation.crop: {augmentation.crop}; the cache has centre crops")
    if output != manifest.image_size:
        wrong.append(f"decoder.patch_size: makes {output} pixels; the cache is of {manifest.image_size}")
    if augmentation.horizontal_flip and manifest.views != "center+flip":
        wrong.append("augmentation.horizontal_flip: true; the cache has no mirrored views (--views center+flip)")
    if wrong:
        lines = "".join(f"\n  {line}" for line in wrong)
        raise InputError(f"latents: cached, but those of {recipe.cache} are not of these crops; use encoder{lines}")


def latents_config(manifest: Manifest) -> dict[str, Any]:
    """What a trained model has to remember of the cache it learned from."""
    return {
        "shape": list(manifest.latent_shape),
        "encoder": manifest.encoder.to_dict(),
        "image_size": manifest.image_size,
        "preprocess": manifest.preprocess,
        "classes": list(manifest.classes),
        "samples": manifest.samples,
        "statistics_sha256": manifest.statistics_sha256,
    }


LATER = ("perceptual_sha256",)  # once it was not told of weights in torch hub's cache


def check_same_latents_as_before(before: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Refuse to go on with a run on other latents than it began with.

    before, now: `config["latents"]` of its checkpoint and of the cache. Raises InputError listing what differs. What
    older runs did not record cannot differ.
    """
    now = {key: value for key, value in now.items() if key in before or key not in LATER}
    told = [
        {**{f"encoder.{key}": value for key, value in latents["encoder"].items()}, **latents, "encoder": None}
        for latents in (before, now)
    ]
    moved = ("encoder.name:", "encoder.path:", "encoder.weights:")
    fields = [field for field in differing_fields(*told) if not field.startswith(moved)]
    if fields:
        lines = "".join(f"\n  {field}" for field in fields)
        raise InputError(f"{where}: its checkpoint is of other latents than the cache now holds{lines}")

"""What trained models say of themselves, and whether they were made for each other. No torch: for the door."""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raecli.errors import CheckpointError, InputError, UsageError
from raecli.recipe.blocks import DecoderSpec, DiffusionModelSpec, EncoderSpec, FlowSpec
from raecli.store.artifact import read_config
from raecli.store.encoder_baselines import is_baseline
from raecli.store.manifest import differing_fields, tuples

UNREADABLE = (KeyError, TypeError, AttributeError, ValueError, OverflowError, ValidationError)
MOST_PIXELS = 16384  # a side: no encoder comes near it


@dataclass(frozen=True)
class DiffusionCard:
    """A diffusion model's config.json."""

    path: str
    latents: dict[str, Any]  # as store/resolve.latents_config wrote them
    model: DiffusionModelSpec
    time_shift: float
    label_dropout: float | None  # None: a converted model does not tell
    classes: tuple[str, ...]  # names by label

    @property
    def num_classes(self) -> int:
        """0: unconditional."""
        return self.model.num_classes or 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of classes; a converted model's are its labels, which name nothing."""
        return () if self.classes == tuple(map(str, range(len(self.classes)))) else self.classes


@dataclass(frozen=True)
class AutoencoderCard:
    """A decoder's config.json; or what a baseline's name tells."""

    path: str
    latents: dict[str, Any] | None  # None: a baseline, whose latents are the model's
    decoder: DecoderSpec | None
    image_size: int  # pixels a side of what it decodes to


def read_diffusion_card(path: str) -> DiffusionCard:
    """Raises CheckpointError where there is no such model, or its config.json is not whole."""
    config = read_config(path, "rae-diffusion")
    try:
        recipe, latents = config["recipe"], config["latents"]
        return DiffusionCard(
            path,
            {"encoder": told_encoder(latents), "shape": list(latents["shape"]), "image_size": side_of(latents)},
            DiffusionModelSpec.model_validate(tuples(recipe["model"])),
            FlowSpec.model_validate(tuples(recipe["flow"])).time_shift,
            recipe.get("label_dropout"),
            tuple(map(str, latents["classes"])),
        )
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: its config.json is not a diffusion model's: {error}") from None


def told_encoder(latents: dict[str, Any]) -> dict[str, Any] | None:
    """The encoder's identity; None: a converted model may not tell."""
    encoder = latents["encoder"]
    if encoder is not None and not isinstance(encoder, dict):
        raise ValueError(f"latents.encoder is {str(encoder)[:40]!r}, expected its fields")
    return encoder


def side_of(latents: dict[str, Any]) -> int:
    """Pixels a side of the images that the latents are of."""
    side = int(latents["image_size"])
    if not 0 < side <= MOST_PIXELS:
        raise ValueError(f"latents.image_size is {side}, expected 1 to {MOST_PIXELS} pixels")
    return side


def read_autoencoder_card(name: str, model: DiffusionCard) -> AutoencoderCard:
    """A trained decoder's, or a baseline's around the latents of the diffusion model."""
    if is_baseline(name):
        return AutoencoderCard(name, None, None, int(model.latents["image_size"]))
    config = read_config(name, "rae-decoder")
    try:
        latents, decoder = config["latents"], DecoderSpec.model_validate(tuples(config["recipe"]["decoder"]))
        encoder = EncoderSpec.model_validate(tuples(latents["encoder"]))
        told = {"encoder": told_encoder(latents), "shape": list(latents["shape"])}
        return AutoencoderCard(name, told, decoder, encoder.tokens_side * decoder.patch_size)
    except UNREADABLE as error:
        raise CheckpointError(f"{name}: its config.json is not a decoder's: {error}") from None


def check_same_latents(one: dict[str, Any], other: dict[str, Any], names: str) -> None:
    """Two artifacts have to speak of one encoder, size and shape, as far as they tell. Each: `config["latents"]`."""
    both = None not in (one["encoder"], other["encoder"])  # a converted model may not tell: then the shape alone
    told = [
        {**({f"encoder.{key}": value for key, value in latents["encoder"].items()} if both else {})}
        | {"shape": list(latents["shape"])}
        for latents in (one, other)
    ]
    moved = ("encoder.name:", "encoder.path:", "encoder.weights:")
    fields = [field for field in differing_fields(told[1], told[0]) if not field.startswith(moved)]
    if fields:
        lines = "".join(f"\n  {field}" for field in fields)
        raise InputError(f"{names} were not made for the same latents{lines}")


def check_guide(model: DiffusionCard, guide: DiffusionCard) -> None:
    """A guide answers for the same latents and the same labels."""
    check_same_latents(model.latents, guide.latents, f"{model.path} and {guide.path}")
    if guide.num_classes != model.num_classes:
        raise InputError(
            f"guide {guide.path} knows {guide.num_classes} classes, {model.path} {model.num_classes}: "
            "one label would mean two things; train the guide on the same cache"
        )
    if model.num_classes and model.names and guide.names and guide.names != model.names:
        pairs = enumerate(zip_longest(guide.names, model.names))  # a list may be shorter than its model's labels
        label, (there, here) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
        raise InputError(
            f"guide {guide.path} has other classes than {model.path}: label {label} is {there!r} there and {here!r} "
            "here; train the guide on the same cache"
        )


def check_null_label(model: DiffusionCard) -> None:
    """Refuse classifier-free guidance where there is no null label to guide by."""
    if model.num_classes == 0:
        raise UsageError(f"{model.path}: has no classes to guide by; use --guide WEAKER_MODEL, or no --guidance-scale")
    if model.label_dropout == 0:
        raise UsageError(f"{model.path}: trained with label_dropout 0, so it never saw the null label; use --guide")


def is_there(path: str) -> bool:
    """Whether a model or a baseline can be looked at already."""
    return is_baseline(path) or Path(path).exists()

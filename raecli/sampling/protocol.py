"""What samples depend on: their labels, and the protocol that is written beside them."""

from typing import Any

from torch import nn

from raecli import __version__
from raecli.data.order import permutation
from raecli.models.autoencoder import Autoencoder
from raecli.recipe.recipes import SampleRecipe
from raecli.sampling.models import Models, statistics_digest
from raecli.store.atomic import sha256_of
from raecli.store.checkpoint import EMA, MODEL

TOLD = (
    "num",
    "seed",
    "steps",
    "solver",
    "time_grid",
    "guidance_scale",
    "guidance_interval",
    "batch_size",
    "precision",
    "compile",
    "pixel_rounding",
)


def balanced_labels(recipe: SampleRecipe, *, num_classes: int) -> list[int]:
    """A label for each image: every class as often as any other (or once more), in a seeded random order of all `num`.

    Label i is a function of (seed, num, i). Order matters: Inception Score is computed over consecutive splits. The
    whole list is permuted, as the release does; blocks of one image a class would make `num` drop out, but even out
    every split and raise the score.
    """
    if num_classes == 0 or recipe.unconditional:
        return [num_classes] * recipe.num  # the null label
    classes = [int(label) for label in recipe.classes or range(num_classes)]  # the door made names numbers
    order = permutation(recipe.seed, "labels", recipe.num, recipe.num)
    return [classes[place % len(classes)] for place in order.tolist()]


def protocol_of(recipe: SampleRecipe, models: Models, labels: list[int]) -> dict[str, Any]:
    """Everything that the images depend on, and where it came from."""
    told = recipe.to_dict()
    sde = {"sde_diffusion": recipe.sde_diffusion} if recipe.solver == "sde" else {}
    with_labels = models.model.num_classes and not recipe.unconditional
    return {
        "format": "rae-samples",
        "version": 1,
        "rae": __version__,
        **{key: told[key] for key in TOLD},
        **sde,
        "time_shift": models.model.time_shift,
        "guidance": "none" if recipe.guidance_scale == 1 else "autoguidance" if models.guide else "classifier-free",
        "model": source_of(models.model),
        "guide": source_of(models.guide) if models.guide else None,
        "autoencoder": source_of(models.autoencoder),
        "statistics_sha256": statistics_digest(models.model.folder),
        "label_order": "balanced, permuted by the seed" if with_labels else "unconditional",
        "classes": list(models.model.classes),
        "labels": labels,
    }


def source_of(model: nn.Module | Autoencoder) -> dict[str, Any]:
    """A model's step and the digest of its weights; not its folder, which may move. A baseline's: its encoder's."""
    if model.folder is None:
        encoder = model.config["latents"]["encoder"]
        return {"sha256": encoder["weights_sha256"], "step": None, "encoder": encoder["family"]}
    file = model.folder / (MODEL if (model.folder / MODEL).exists() and not (model.folder / EMA).exists() else EMA)
    return {"sha256": sha256_of(file), "step": model.config["step"]}

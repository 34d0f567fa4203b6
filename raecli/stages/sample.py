"""`rae sample`: reads a diffusion model and an autoencoder; writes images and the protocol that made them.

Image i is a function of (seed, i), of its label and of the models; batches are the same whatever the number of ranks,
and a restart makes only those that are not whole yet.
"""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raecli import __version__
from raecli.data.order import normals, permutation
from raecli.errors import InputError, NonFiniteError, UsageError
from raecli.flow.sampler import sample
from raecli.models.autoencoder import Autoencoder
from raecli.models.load import load_autoencoder, load_diffusion
from raecli.recipe.recipes import SampleRecipe
from raecli.store.atomic import sha256_of
from raecli.store.checkpoint import EMA, MODEL
from raecli.store.lock import hold_folder
from raecli.store.manifest import differing_fields
from raecli.store.samples import (
    GRID,
    begin_samples,
    by_label,
    finish_samples,
    image_file,
    is_whole_png,
    read_png,
    write_grid,
    write_npz,
    write_png,
)
from raecli.training.distributed import Ranks, decode_threads
from raecli.training.progress import Progress


@dataclass(frozen=True)
class Models:
    """What sampling needs."""

    model: nn.Module
    guide: nn.Module | None
    autoencoder: Autoencoder


def run(recipe: SampleRecipe, ranks: Ranks) -> None:
    """Make the images that are missing, then the sheet, the npz and the protocol."""
    with hold_folder(Path(recipe.output)) if ranks.is_main else contextlib.nullcontext():
        generate(recipe, ranks)


def generate(recipe: SampleRecipe, ranks: Ranks) -> None:
    """Models, labels, batches, images."""
    folder = Path(recipe.output)
    models = load_models(recipe, ranks)
    labels = balanced_labels(recipe, models.model)
    protocol = protocol_of(recipe, models, labels)
    if ranks.is_main:
        begin_samples(folder, protocol)
    ranks.barrier()
    batches = [
        range(start, min(start + recipe.batch_size, recipe.num)) for start in range(0, recipe.num, recipe.batch_size)
    ]
    missing = [batch for batch in batches if not all(is_whole_png(image_file(folder, index)) for index in batch)]
    make_images(recipe, models, labels, missing[ranks.rank :: ranks.world], folder, ranks)
    ranks.barrier()
    if ranks.is_main:
        finish(recipe, folder, protocol, labels)


def load_models(recipe: SampleRecipe, ranks: Ranks) -> Models:
    """Load all that is named; refuse what was not made for each other."""
    model = load_diffusion(recipe.model, ranks.device)
    autoencoder = load_autoencoder(recipe.autoencoder, ranks.device, encoder=False)
    guide = load_diffusion(recipe.guide, ranks.device) if recipe.guide else None
    check_same_latents(model.config, autoencoder.config, f"{recipe.model} and {recipe.autoencoder}")
    if guide is not None:
        check_same_latents(model.config, guide.config, f"{recipe.model} and {recipe.guide}")
    return Models(model, guide, autoencoder)


def check_same_latents(one: dict[str, Any], other: dict[str, Any], names: str) -> None:
    """Two artifacts have to speak of one encoder, size and shape."""
    latents = [
        {
            **{f"encoder.{key}": value for key, value in config["latents"]["encoder"].items()},
            "shape": config["latents"]["shape"],
        }
        for config in (one, other)
    ]
    fields = [
        field
        for field in differing_fields(latents[1], latents[0])
        if not field.startswith(("encoder.name:", "encoder.path:", "encoder.weights:"))
    ]
    if fields:
        lines = "".join(f"\n  {field}" for field in fields)
        raise InputError(f"{names} were not made for the same latents{lines}")


def balanced_labels(recipe: SampleRecipe, model: nn.Module) -> list[int]:
    """A label for each image: every class as often as any other (or once more), in a seeded random order.

    Order matters: Inception Score is computed over consecutive splits.
    """
    if model.num_classes == 0:
        return [model.null_label] * recipe.num
    classes = recipe.classes or tuple(range(model.num_classes))
    unknown = [label for label in classes if not 0 <= label < model.num_classes]
    if unknown:
        raise UsageError(
            f"--classes {', '.join(map(str, unknown))}: the model has classes 0 to {model.num_classes - 1}"
        )
    order = permutation(recipe.seed, "labels", recipe.num, recipe.num)
    return [classes[place % len(classes)] for place in order.tolist()]


def protocol_of(recipe: SampleRecipe, models: Models, labels: list[int]) -> dict[str, Any]:
    """Everything that the images depend on, and where it came from."""
    told = recipe.to_dict()
    keys = (
        "num",
        "seed",
        "steps",
        "solver",
        "time_grid",
        "guidance_scale",
        "guidance_interval",
        "batch_size",
        "precision",
        "pixel_rounding",
    )
    return {
        "format": "rae-samples",
        "version": 1,
        "rae": __version__,
        **{key: told[key] for key in keys},
        "time_shift": models.model.time_shift,
        "guidance": "none" if recipe.guidance_scale == 1 else "autoguidance" if models.guide else "classifier-free",
        "model": source_of(models.model),
        "guide": source_of(models.guide) if models.guide else None,
        "autoencoder": source_of(models.autoencoder),
        "label_order": "balanced, permuted by the seed" if models.model.num_classes else "unconditional",
        "classes": list(models.model.classes),
        "labels": labels,
    }


def source_of(model: nn.Module) -> dict[str, Any]:
    """A model's step and the digest of its weights; not its folder, which may move."""
    file = model.folder / (MODEL if (model.folder / MODEL).exists() and not (model.folder / EMA).exists() else EMA)
    return {"sha256": sha256_of(file), "step": model.config["step"]}


def make_images(
    recipe: SampleRecipe, models: Models, labels: list[int], batches: list[range], folder: Path, ranks: Ranks
) -> None:
    """Solve, decode, write; files are written while the next batch is solved."""
    progress = Progress(sum(map(len, batches)), "images", "sample", shown=ranks.is_main)
    with ThreadPoolExecutor(decode_threads()) as pool:
        writing: list[Future[None]] = []
        for batch in batches:
            pixels = to_bytes(solve(recipe, models, labels, batch, ranks), recipe.pixel_rounding)
            for future in writing:
                future.result()
            writing = [
                pool.submit(write_png, image_file(folder, index), image)
                for index, image in zip(batch, pixels, strict=True)
            ]
            progress.advance(len(batch))
        for future in writing:
            future.result()
    progress.close()


@torch.inference_mode()
def solve(recipe: SampleRecipe, models: Models, labels: list[int], batch: range, ranks: Ranks) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of one batch. Noise is drawn on the CPU: the same on every device."""
    noise = normals(models.model.latent_shape, recipe.seed, "sample", batch, "cpu").to(ranks.device)
    wanted = torch.tensor([labels[index] for index in batch], device=ranks.device)
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        latents = sample(
            models.model,
            noise,
            wanted,
            steps=recipe.steps,
            solver=recipe.solver,
            time_grid=recipe.time_grid,
            guidance_scale=recipe.guidance_scale,
            guidance_interval=recipe.guidance_interval,
            guide=models.guide,
        )
        images = models.autoencoder.decode(latents).float()
    if not images.isfinite().all():
        raise NonFiniteError(f"images {batch.start} to {batch.stop - 1}: the model gives NaN or infinity")
    return images


def to_bytes(images: Tensor, rounding: str) -> np.ndarray:
    """uint8 [B, H, W, 3] of images in [0, 1]. "round" to the nearest; "floor" as the release does."""
    scaled = images.clamp(0, 1) * 255
    whole = scaled.round() if rounding == "round" else scaled.floor()
    return whole.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def finish(recipe: SampleRecipe, folder: Path, protocol: dict[str, Any], labels: list[int]) -> None:
    """Sheet, npz, and last samples.json."""
    if recipe.grid:
        shown = by_label(labels, min(recipe.grid, recipe.num))
        write_grid(folder / GRID, [read_png(image_file(folder, index)) for index in shown])
    if recipe.format != "png":
        write_npz(folder, recipe.num)
    finish_samples(folder, protocol)
    if recipe.format == "npz":
        for index in range(recipe.num):
            image_file(folder, index).unlink()
    print(f"{folder}: {recipe.num} images, {recipe.steps} steps of {recipe.solver}, guidance {recipe.guidance_scale}")

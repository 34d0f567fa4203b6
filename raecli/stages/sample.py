"""`rae sample`: reads a diffusion model and an autoencoder; writes images and the protocol that made them.

Image i is a function of (seed, i), of its label and of the models; batches are the same whatever the number of ranks,
and a restart makes only those that are not whole yet.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raecli import __version__
from raecli.data.order import normals, permutation
from raecli.errors import InputError, NonFiniteError, StorageError, UsageError
from raecli.flow.sampler import sample
from raecli.models.autoencoder import Autoencoder
from raecli.models.baseline_autoencoder import baseline_autoencoder
from raecli.models.load import load_autoencoder, load_diffusion, statistics_of
from raecli.recipe.recipes import SampleRecipe
from raecli.store.atomic import sha256_of
from raecli.store.checkpoint import EMA, MODEL
from raecli.store.encoder_baselines import is_baseline
from raecli.store.manifest import differing_fields
from raecli.store.samples import (
    GRID,
    NPZ,
    PROTOCOL,
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
from raecli.store.statistics import STATISTICS
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
    folder = Path(recipe.output)
    with ranks.holding(folder):
        models = load_models(recipe, ranks)
        labels = balanced_labels(recipe, models.model)
        protocol = protocol_of(recipe, models, labels)
        ranks.main_first(lambda: begin_samples(folder, protocol))
        if not ranks.main_first(lambda: is_finished(folder, recipe)):
            own = range(ranks.rank * recipe.batch_size, recipe.num, ranks.world * recipe.batch_size)
            batches = [range(start, min(start + recipe.batch_size, recipe.num)) for start in own]
            missing = [batch for batch in batches if not all(is_whole_png(image_file(folder, i)) for i in batch)]
            make_images(recipe, models, labels, missing, folder, ranks)
            ranks.barrier()
            ranks.main_first(lambda: finish(recipe, folder, protocol, labels))
        if ranks.is_main:
            told = f"{recipe.num} images, {recipe.steps} steps of {recipe.solver}, guidance {recipe.guidance_scale}"
            print(f"{folder}: {told}")


def is_finished(folder: Path, recipe: SampleRecipe) -> bool:
    """Whether an .npz without its images is there, whole: it is renamed into place, and the protocol after it."""
    return recipe.format == "npz" and (folder / PROTOCOL).is_file() and (folder / NPZ).is_file()


def load_models(recipe: SampleRecipe, ranks: Ranks) -> Models:
    """Load all that is named; refuse what was not made for each other.

    The decoder is given the latents as the diffusion model's own statistics denormalise them: the decoder's may be
    another cache's.
    """
    model = load_diffusion(recipe.model, ranks.device)
    autoencoder = decoder_for(recipe.autoencoder, model, ranks)
    check_same_latents(model.config, autoencoder.config, f"{recipe.model} and {recipe.autoencoder}")
    if (model.folder / STATISTICS).is_file():  # a converted model may have none: then the decoder's are its own
        autoencoder.use_statistics(statistics_of(model.folder))
    check_guidance(recipe, model)
    guide = load_diffusion(recipe.guide, ranks.device) if recipe.guide else None
    if guide is not None:
        check_same_latents(model.config, guide.config, f"{recipe.model} and {recipe.guide}")
        digests = {statistics_digest(one.folder) for one in (model, guide)} - {None}
        if len(digests) > 1:
            raise InputError(f"{recipe.guide}: its latents are normalised by other statistics than {recipe.model}'s")
    return Models(model, guide, autoencoder)


def check_guidance(recipe: SampleRecipe, model: nn.Module) -> None:
    """Refuse guidance that has nothing to steer by."""
    if recipe.guidance_scale == 1 or recipe.guide:
        return
    if model.num_classes == 0:
        raise UsageError(
            f"{recipe.model}: has no classes to guide by; use --guide WEAKER_MODEL, or no --guidance-scale"
        )
    if model.config["recipe"].get("label_dropout") == 0:
        raise UsageError(f"{recipe.model}: trained with label_dropout 0, so it never saw the null label; use --guide")


def statistics_digest(folder: Path) -> str | None:
    """sha256 of a model's latent statistics, where it has them."""
    file = folder / STATISTICS
    return sha256_of(file) if file.is_file() else None


def decoder_for(name: str, model: nn.Module, ranks: Ranks) -> Autoencoder:
    """A trained autoencoder; or a baseline's around the statistics that the diffusion model was trained with."""
    if not is_baseline(name):
        return load_autoencoder(name, ranks.device, encoder=False)
    statistics = statistics_of(model.folder)
    return baseline_autoencoder(name, model.config["latents"], statistics, ranks.device, encoder=False)


def check_same_latents(one: dict[str, Any], other: dict[str, Any], names: str) -> None:
    """Two artifacts have to speak of one encoder, size and shape, as far as they tell."""
    told = [config["latents"]["encoder"] for config in (one, other)]
    both = None not in told  # a converted model may not tell its encoder: then the shape alone is compared
    latents = [
        {
            **({f"encoder.{key}": value for key, value in encoder.items()} if both else {}),
            "shape": config["latents"]["shape"],
        }
        for encoder, config in zip(told, (one, other), strict=True)
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
    """A label for each image: every class as often as any other (or once more), in a seeded random order of all `num`.

    Order matters: Inception Score is computed over consecutive splits. The whole list is permuted, as the release
    does; blocks of one image a class would even out every split and raise the score.
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
        "statistics_sha256": statistics_digest(models.model.folder),
        "label_order": "balanced, permuted by the seed" if models.model.num_classes else "unconditional",
        "classes": list(models.model.classes),
        "labels": labels,
    }


def source_of(model: nn.Module) -> dict[str, Any]:
    """A model's step and the digest of its weights; not its folder, which may move. A baseline's: its encoder's."""
    if model.folder is None:
        encoder = model.config["latents"]["encoder"]
        return {"sha256": encoder["weights_sha256"], "step": None, "encoder": encoder["family"]}
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
    missing = [index for index in range(recipe.num) if not is_whole_png(image_file(folder, index))]
    if missing:
        raise StorageError(f"{image_file(folder, missing[0])}: {len(missing)} images are missing; run the same command")
    if recipe.grid:
        shown = by_label(labels, min(recipe.grid, recipe.num))
        write_grid(folder / GRID, [read_png(image_file(folder, index)) for index in shown])
    if recipe.format != "png":
        write_npz(folder, recipe.num)
    finish_samples(folder, protocol)
    if recipe.format == "npz":
        for index in range(recipe.num):
            image_file(folder, index).unlink()

"""`rae reconstruct`: reads images and an autoencoder; writes the images as it gives them back, and the protocol.

Batches are the same whatever the number of ranks, and a restart makes only those that are not whole yet.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raecli import __version__
from raecli.data.center_crops import center_crops
from raecli.data.feed import ahead
from raecli.data.images import ImageItem, ImageSource, open_images, unique_keys
from raecli.errors import InputError, StorageError, UsageError
from raecli.evaluation.reconstruction import reconstructed
from raecli.models.autoencoder import Autoencoder
from raecli.models.baseline_autoencoder import baseline_autoencoder
from raecli.models.load import load_autoencoder
from raecli.recipe.blocks import EncoderSpec
from raecli.recipe.recipes import ReconstructRecipe
from raecli.store.atomic import sha256_of
from raecli.store.checkpoint import EMA, MODEL
from raecli.store.encoder_baselines import is_baseline
from raecli.store.manifest import PREPROCESS, encoder_identity, tuples
from raecli.store.reconstructions import (
    FORMAT,
    ORIGINALS,
    PROTOCOL,
    RECONSTRUCTIONS,
    SHEET,
    begin_reconstructions,
    finish_reconstructions,
    write_sheet,
)
from raecli.store.samples import is_whole_png, read_png, write_png
from raecli.store.statistics import STATISTICS, LatentStatistics
from raecli.training.distributed import Ranks, decode_threads
from raecli.training.progress import Progress
from raecli.training.result import tell_result

BASELINE_SIZE = 256  # pixels a side, where neither an autoencoder nor --image-size tells


@dataclass(frozen=True)
class Job:
    """What all ranks go by."""

    recipe: ReconstructRecipe
    source: ImageSource
    keys: list[str]
    autoencoder: Autoencoder
    output_size: int  # pixels a side that the decoder makes: more than image_size where it also magnifies

    @property
    def image_size(self) -> int:
        """Pixels a side that the encoder is shown."""
        return int(self.autoencoder.config["latents"]["image_size"])

    def files(self, batch: range) -> list[Path]:
        """What a batch writes."""
        kinds = [RECONSTRUCTIONS, ORIGINALS] if self.recipe.save_originals else [RECONSTRUCTIONS]
        return [Path(self.recipe.output) / kind / f"{self.keys[index]}.png" for kind in kinds for index in batch]


@dataclass(frozen=True)
class Batch:
    """Source indices, and their crops as the encoder and as the comparison sees them: uint8 [B, 3, S, S]."""

    indices: range
    crops: Tensor
    originals: Tensor


def run(recipe: ReconstructRecipe, ranks: Ranks) -> None:
    """Make the reconstructions that are missing, then the sheet and the protocol."""
    folder = Path(recipe.output)
    ranks.main_first(lambda: check_inputs(recipe))
    with ranks.holding(folder):
        job = make_job(recipe, ranks)
        protocol = protocol_of(job)
        ranks.main_first(lambda: begin_reconstructions(folder, protocol))
        count, size = len(job.keys), recipe.batch_size
        own = range(ranks.rank * size, count, ranks.world * size)
        batches = [range(start, min(start + size, count)) for start in own]
        missing = [batch for batch in batches if not all(map(is_whole_png, job.files(batch)))]
        if missing:
            make_images(job, missing, ranks)
        ranks.barrier()
        ranks.main_first(lambda: finish(job, folder, protocol))
        if ranks.is_main:
            told = f"{count} images of {job.output_size} pixels, by {recipe.autoencoder}"
            facts = {"output": str(folder), "images": count, "pixels": job.output_size}
            tell_result(f"{folder}: {told}", facts | {"autoencoder": recipe.autoencoder})


def check_inputs(recipe: ReconstructRecipe) -> None:
    """Open the images; refuse an output among them, which the next run would take for images."""
    open_images(recipe.source)
    if Path(os.path.realpath(recipe.output)).is_relative_to(os.path.realpath(recipe.source)):
        raise UsageError(f"{recipe.output}: lies in the images' own folder; choose a place outside {recipe.source}")


def make_job(recipe: ReconstructRecipe, ranks: Ranks) -> Job:
    """List the images and load the autoencoder."""
    source = open_images(recipe.source)
    autoencoder = autoencoder_of(recipe, ranks.device)
    latents, decoder = autoencoder.config["latents"], autoencoder.config.get("recipe", {}).get("decoder")
    patch_size = decoder["patch_size"] if decoder else latents["encoder"]["patch_size"]
    side = int(latents["shape"][-1]) * int(patch_size)
    return Job(recipe, source, unique_keys(item.name for item in source.items), autoencoder, side)


def autoencoder_of(recipe: ReconstructRecipe, device: torch.device) -> Autoencoder:
    """A trained autoencoder with its encoder; or a baseline's, whose latents need no statistics to be decoded."""
    if is_baseline(recipe.autoencoder):
        unit = LatentStatistics(None, torch.ones(1))
        told = {"image_size": recipe.image_size or BASELINE_SIZE}
        return baseline_autoencoder(recipe.autoencoder, told, unit, device)
    autoencoder = load_autoencoder(recipe.autoencoder, device)
    if recipe.image_size not in (None, autoencoder.image_size):
        raise UsageError(
            f"--image-size {recipe.image_size}: {recipe.autoencoder} was trained on images of "
            f"{autoencoder.image_size} pixels; leave the option out"
        )
    return autoencoder


def protocol_of(job: Job) -> dict[str, Any]:
    """Everything that the images depend on, and where it came from; not the folders, which may move."""
    encoder = EncoderSpec.model_validate(tuples(job.autoencoder.config["latents"]["encoder"]))
    return {
        "format": FORMAT,
        "version": 1,
        "rae": __version__,
        "kind": "reconstruction",
        "count": len(job.keys),
        "crop": PREPROCESS,
        "image_size": job.image_size,
        "output_size": job.output_size,
        "latent_noise": "none",
        **{key: getattr(job.recipe, key) for key in ("batch_size", "precision", "pixel_rounding")},
        "autoencoder": weights_of(job.autoencoder),
        "encoder": encoder_identity(encoder),
        "source_sha256": job.source.fingerprint(),
        "classes": list(job.source.classes),
    }


def weights_of(autoencoder: Autoencoder) -> dict[str, Any]:
    """The digests of a trained decoder and of its statistics, and its step. A baseline has its encoder's alone."""
    folder = autoencoder.folder
    if folder is None:
        return {"sha256": None, "statistics_sha256": None, "step": None}
    file = folder / (MODEL if (folder / MODEL).exists() and not (folder / EMA).exists() else EMA)
    return {
        "sha256": sha256_of(file),
        "statistics_sha256": sha256_of(folder / STATISTICS),
        "step": autoencoder.config["step"],
    }


def make_images(job: Job, batches: list[range], ranks: Ranks) -> None:
    """Crop, encode, decode, write; crops are read ahead, and files are written while the next batch is computed."""
    progress = Progress(sum(map(len, batches)), "images", "reconstruct", shown=ranks.is_main)
    with ThreadPoolExecutor(decode_threads()) as pool:
        writing: list[Future[None]] = []
        for batch in ahead(lambda indices: read_batch(job, indices), batches):
            names = [job.source.items[index].name for index in batch.indices]
            told = {"precision": job.recipe.precision, "pixel_rounding": job.recipe.pixel_rounding}
            made = reconstructed(job.autoencoder, batch.crops.to(ranks.device), **told, names=names)
            for future in writing:
                future.result()
            pictures = [*pixels_of(made.cpu()), *(pixels_of(batch.originals) if job.recipe.save_originals else ())]
            files = job.files(batch.indices)
            writing = [pool.submit(save, path, pixels) for path, pixels in zip(files, pictures, strict=True)]
            progress.advance(len(names))
        for future in writing:
            future.result()
    progress.close()


def read_batch(job: Job, indices: range) -> Batch:
    """A batch's crops."""
    items = [job.source.items[index] for index in indices]
    crops = center_crops(items, job.image_size, decode_threads())
    same = job.output_size == job.image_size
    return Batch(indices, crops, crops if same else center_crops(items, job.output_size, decode_threads()))


def pixels_of(images: Tensor) -> Iterator[np.ndarray]:
    """Images [B, 3, H, W] as arrays [H, W, 3]."""
    return iter(images.permute(0, 2, 3, 1).contiguous().numpy())


def save(path: Path, pixels: np.ndarray) -> None:
    """Write an image into its class's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, pixels)


def finish(job: Job, folder: Path, protocol: dict[str, Any]) -> None:
    """Sheet, and last reconstructions.json."""
    everything = range(len(job.keys))
    missing = [path for path in job.files(everything) if not is_whole_png(path)]
    if missing:
        raise StorageError(f"{missing[0]}: {len(missing)} images are missing; run the same command")
    check_nothing_else(folder, {path.relative_to(folder) for path in job.files(everything)})
    shown = min(job.recipe.sheet, len(job.keys))
    if shown and not ((folder / PROTOCOL).exists() and is_whole_png(folder / SHEET)):
        indices = [place * len(job.keys) // shown for place in range(shown)]  # spread over the classes
        items: list[ImageItem] = [job.source.items[index] for index in indices]
        originals = list(pixels_of(center_crops(items, job.output_size, decode_threads())))
        made = [read_png(folder / RECONSTRUCTIONS / f"{job.keys[index]}.png") for index in indices]
        write_sheet(folder / SHEET, originals, made)
    finish_reconstructions(folder, protocol)


def check_nothing_else(folder: Path, expected: set[Path]) -> None:
    """Refuse images that are not ours among the reconstructions: an evaluation would take them for some."""
    found = {path.relative_to(folder) for path in (folder / RECONSTRUCTIONS).rglob("*.png")}
    foreign = sorted(path for path in found - expected if path.parts[0] == RECONSTRUCTIONS)
    if foreign:
        raise InputError(f"{folder / foreign[0]}: is no image of this source ({len(foreign)} like it); remove it")

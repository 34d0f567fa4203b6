"""Noise to pixels: one batch is solved while the one before is decoded and written."""

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raecli.data.feed import ahead
from raecli.data.order import normals
from raecli.errors import NonFiniteError, UsageError
from raecli.flow.sampler import Watch, sample
from raecli.recipe.recipes import SampleRecipe
from raecli.sampling.models import Models
from raecli.store.samples import image_file, write_png
from raecli.training.distributed import Ranks, decode_threads
from raecli.training.progress import Progress


def make_images(
    recipe: SampleRecipe,
    models: Models,
    labels: list[int],
    batches: dict[range, list[int]],
    folder: Path,
    ranks: Ranks,
) -> None:
    """Solve each batch whole, so that its bits do not depend on what was there; write the images it lacks.

    batches: indices solved together, and which of them are missing. Of decoded batches, one waits at most.
    """
    progress = Progress(sum(map(len, batches.values())), "images", "sample", shown=ranks.is_main)
    stream = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None
    with ThreadPoolExecutor(1) as decoder, ThreadPoolExecutor(decode_threads()) as writers:

        def finish(batch: range, missing: list[int], latents: Tensor, solved: torch.cuda.Event | None) -> int:
            with after(solved, stream, latents):
                pixels = to_bytes(decode(recipe, models, latents, batch), recipe.pixel_rounding)
            files = [image_file(folder, index) for index in missing]
            list(writers.map(write_png, files, [pixels[index - batch.start] for index in missing]))
            return len(missing)

        waiting: deque[Future[int]] = deque()
        for batch, missing in batches.items():
            latents = solve(recipe, models, labels, batch, ranks)
            solved = torch.cuda.current_stream(ranks.device).record_event() if stream else None
            waiting.append(decoder.submit(finish, batch, missing, latents, solved))
            if len(waiting) > 1:
                progress.advance(waiting.popleft().result())
        for future in waiting:
            progress.advance(future.result())
    progress.close()


@contextlib.contextmanager
def after(solved: torch.cuda.Event | None, stream: torch.cuda.Stream | None, latents: Tensor) -> Iterator[None]:
    """On a GPU: work on a stream of its own, from the moment that the latents are solved. On a CPU: nothing."""
    if stream is None or solved is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        stream.wait_event(solved)
        latents.record_stream(stream)  # the solver's stream must not reuse their memory before
        yield


@torch.inference_mode()
def solve(
    recipe: SampleRecipe,
    models: Models,
    labels: list[int],
    batch: range,
    ranks: Ranks,
    watch: Watch | None = None,
) -> Tensor:
    """Normalised latents [B, C, H, W] of one batch. Noise is drawn on the CPU: the same on every device."""
    shape, device = models.model.latent_shape, ranks.device
    noise = normals(shape, recipe.seed, "sample", batch, "cpu").to(device)
    wanted = torch.tensor([labels[index] for index in batch], device=device)
    drawn = range(recipe.steps - 1 if recipe.solver == "sde" else 0)
    with (
        contextlib.closing(
            ahead(lambda step: normals(shape, recipe.seed, f"sde/{step}", batch, "cpu"), drawn)
        ) as draws,
        torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"),
        told_out_of_memory(len(batch)),
    ):
        return sample(
            models.model,
            noise,
            wanted,
            steps=recipe.steps,
            solver=recipe.solver,
            time_grid=recipe.time_grid,
            guidance_scale=recipe.guidance_scale,
            guidance_interval=recipe.guidance_interval,
            guide=models.guide,
            diffusion=recipe.sde_diffusion,
            step_noise=lambda step: next(draws).to(device),
            watch=watch,
        )


@contextlib.contextmanager
def told_out_of_memory(count: int) -> Iterator[None]:
    """A GPU's refusal in words of the user's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        raise UsageError(f"--batch-size {count} is more than this GPU's memory holds: take less ({first})") from None


@torch.inference_mode()
def decode(recipe: SampleRecipe, models: Models, latents: Tensor, batch: range) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], float32, of normalised latents."""
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        images = models.autoencoder.decode(latents).float()
    if not images.isfinite().all():
        raise NonFiniteError(f"images {batch.start} to {batch.stop - 1}: the model gives NaN or infinity")
    return images


def to_bytes(images: Tensor, rounding: str) -> np.ndarray:
    """uint8 [B, H, W, 3] of images in [0, 1]. "round" to the nearest; "floor" as the release does."""
    scaled = images.clamp(0, 1) * 255
    whole = scaled.round() if rounding == "round" else scaled.floor()
    return whole.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

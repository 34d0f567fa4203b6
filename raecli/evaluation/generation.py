"""Images out of a diffusion model and a decoder, over ranks: samples and FID of a model that is still in training.

Images are those that `rae sample` makes with the same settings, and the FID is that of `rae eval fid` over them: image
i is a function of (seed, i), of its label and of the models. No image is written but the sheet.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raecli.data.order import normals, permutation
from raecli.errors import InputError, NonFiniteError, UsageError
from raecli.evaluation.moments import measured_moments, states_of_ranks
from raecli.evaluation.networks import INCEPTION, POOL, FeatureNetwork, classifier_network, inception_network
from raecli.flow.sampler import sample
from raecli.metrics.frechet import frechet_distance
from raecli.metrics.inception_file import find_inception
from raecli.metrics.reference import holds_images, locate_source, open_images
from raecli.metrics.statistics import FeatureStatistics, Moments, load_moments, merge_in_order
from raecli.models.autoencoder import Autoencoder
from raecli.models.baseline_autoencoder import baseline_autoencoder
from raecli.models.load import artifact_folder, load_autoencoder
from raecli.recipe.blocks import GenerationSpec
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.store.atomic import sweep_scratch
from raecli.store.checkpoint import CONFIG
from raecli.store.encoder_baselines import is_baseline
from raecli.store.encoders import resolve_encoder
from raecli.store.latent_cache import LatentCache
from raecli.store.manifest import Manifest, differing_fields
from raecli.store.resolve import latents_config
from raecli.store.samples import by_label, write_grid
from raecli.training.distributed import Ranks
from raecli.training.progress import Progress

EVALUATED = "evaluate_seconds"  # the key of metrics.jsonl by which a step is known to be evaluated
MOVED = ("encoder.name:", "encoder.path:", "encoder.weights:")  # may differ: where an encoder's files lie


@dataclass(frozen=True)
class Generation:
    """All that evaluation needs beside the model, loaded before training starts."""

    spec: GenerationSpec
    run: Path
    every_steps: int
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    labels: list[int]  # one an image
    network: FeatureNetwork | None  # None: pictures alone
    reference: Moments | None
    ranks: Ranks

    def is_due(self, step: int, total_steps: int) -> bool:
        """After every `every_steps` steps, and at the end of a run that has any."""
        return step > 0 and (step % self.every_steps == 0 or step == total_steps)

    def measure(self, model: nn.Module, step: int) -> tuple[dict[str, float | int], Path | None]:
        """Figures of the model's images, the same on all ranks, and the sheet, on rank 0. All ranks take part."""
        spec, ranks = self.spec, self.ranks
        shown = by_label(self.labels, min(spec.grid, spec.num))
        statistics = FeatureStatistics(self.network.width, ranks.device) if self.network else None
        kept: dict[int, np.ndarray] = {}
        batches = rank_batches(spec.num, spec.batch_size, ranks)
        progress = Progress(sum(map(len, batches)), "images", f"evaluate step {step}", shown=ranks.is_main)
        for batch in batches:
            pixels = quantised(self.images(model, batch), spec.pixel_rounding)
            if self.network and statistics:
                statistics.update(self.network.extract(pixels)[POOL], [f"generated image {index}" for index in batch])
            for index in set(shown).intersection(batch):
                kept[index] = pixels[index - batch.start].permute(1, 2, 0).cpu().numpy()
            progress.advance(len(batch))
        progress.close()
        figures: dict[str, float | int] = {"evaluate_images": spec.num}
        if statistics is not None:
            figures["fid"] = self.distance(statistics)
        return figures, self.write_sheet(shown, kept, step)

    def images(self, model: nn.Module, batch: range) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of one batch, as the spec tells."""
        spec = self.spec
        return generated_images(
            model,
            self.autoencoder,
            [self.labels[index] for index in batch],
            batch,
            latent_shape=self.latent_shape,
            seed=spec.seed,
            steps=spec.steps,
            solver=spec.solver,
            time_grid=spec.time_grid,
            guidance_scale=spec.guidance_scale,
            guidance_interval=spec.guidance_interval,
            precision=spec.precision,
            device=self.ranks.device,
        )

    def distance(self, statistics: FeatureStatistics) -> float:
        """FID of all ranks' images to the reference."""
        assert self.reference is not None, "whoever has a network has a reference"
        ours, theirs = merge_in_order(states_of_ranks(statistics, self.ranks)).moments(), self.reference
        sides = [part.to(self.ranks.device) for side in (ours, theirs) for part in (side.mean, side.covariance)]
        return self.ranks.main_first(lambda: frechet_distance(*sides).value)

    def write_sheet(self, shown: list[int], kept: dict[int, np.ndarray], step: int) -> Path | None:
        """samples/step-0001000.png of the run, the first images by class; None where none is asked for."""
        if not shown:
            return None
        parts = self.ranks.gather(kept)
        images = {index: image for part in parts for index, image in part.items()}
        path = self.run / "samples" / f"step-{step:07d}.png"
        self.ranks.main_first(lambda: write_grid(path, [images[index] for index in shown]))
        return path


def prepare_generation(
    spec: GenerationSpec, recipe: TrainDiffusionRecipe, cache: LatentCache, ranks: Ranks
) -> Generation:
    """Load all that evaluation needs, and measure the reference where it has no stored statistics.

    Raises on all ranks together, before training, what is wrong or missing. Leaves torch's random state as it was.
    """
    run = Path(recipe.output)
    ranks.main_first(lambda: check_generation(recipe, cache.manifest))
    ranks.main_first(lambda: prepare_folder(run / "samples"))
    with torch.random.fork_rng(devices=[]):
        autoencoder = decoder_of_cache(str(spec.autoencoder), cache, ranks.device)
        network = feature_network(spec, ranks.device) if spec.reference else None
    return Generation(
        spec=spec,
        run=run,
        every_steps=duration_in_steps(spec.every, len(cache), recipe.batch_size),
        autoencoder=autoencoder,
        latent_shape=cache.manifest.latent_shape,
        labels=balanced_labels(spec.num, spec.seed, num_classes=recipe.model.num_classes or 0),
        network=network,
        reference=reference_moments(spec.reference, network, spec.batch_size, ranks) if network else None,
        ranks=ranks,
    )


def prepare_folder(folder: Path) -> None:
    """Make the folder, and sweep what killed processes left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep_scratch(folder)


def check_generation(recipe: TrainDiffusionRecipe, manifest: Manifest) -> None:
    """Look for all that `evaluation` names, without loading what is large. For the door, and again on rank 0.

    Raises UsageError (a file to bring, guidance without classes), InputError (a path that is not there, a decoder of
    other latents) or CheckpointError.
    """
    spec = recipe.evaluation
    if spec is None:
        return
    check_decoder_of_cache(str(spec.autoencoder), recipe.cache, manifest)
    if spec.guidance_scale != 1 and (not recipe.model.num_classes or recipe.label_dropout == 0):
        raise UsageError(
            f"evaluation.guidance_scale is {spec.guidance_scale}, but the model "
            + ("never sees the null label: label_dropout is 0" if recipe.model.num_classes else "has no classes")
            + "; set evaluation.guidance_scale=1"
        )
    if spec.reference is None:
        return
    source = locate_source(spec.reference)
    if holds_images(source):
        open_images(source)
    if spec.features is None:
        find_inception(spec.inception)
    elif not spec.features.endswith(".safetensors") or not Path(spec.features).is_file():
        raise UsageError(f"evaluation.features: {spec.features} is no classifier's file (*.safetensors) that is there")


def check_decoder_of_cache(name: str, cache: str, manifest: Manifest) -> None:
    """Refuse a decoder that is not there, or that was trained for other latents than the cache's."""
    latents = latents_config(manifest)
    if is_baseline(name):
        spec = resolve_encoder(name, image_size=manifest.image_size)
        config = {"latents": latents | {"encoder": spec.to_dict(), "shape": list(spec.latent_shape)}}
    elif not Path(name).exists():
        raise InputError(f"evaluation.autoencoder: {name} is not there; give a decoder run, pixels or sdvae:FOLDER")
    else:
        config = json.loads((artifact_folder(name) / CONFIG).read_text(encoding="utf-8"))
    check_same_latents({"latents": latents}, config, f"the cache {cache} and evaluation.autoencoder {name}")


def check_same_latents(one: dict[str, Any], other: dict[str, Any], names: str) -> None:
    """Two artifacts have to speak of one encoder, size and shape, as far as they tell."""
    told = [config.get("latents", {}).get("encoder") for config in (one, other)]
    both = None not in told  # a converted model may not tell its encoder: then the shape alone is compared
    latents = [
        {
            **({f"encoder.{key}": value for key, value in encoder.items()} if both else {}),
            "shape": config.get("latents", {}).get("shape"),
        }
        for encoder, config in zip(told, (one, other), strict=True)
    ]
    fields = [field for field in differing_fields(latents[1], latents[0]) if not field.startswith(MOVED)]
    if fields:
        lines = "".join(f"\n  {field}" for field in fields)
        raise InputError(f"{names} were not made for the same latents{lines}")


def decoder_of_cache(name: str, cache: LatentCache, device: torch.device) -> Autoencoder:
    """A trained decoder, or a baseline's, that is given latents as the cache's statistics denormalise them."""
    if is_baseline(name):
        return baseline_autoencoder(name, latents_config(cache.manifest), cache.statistics, device, encoder=False)
    autoencoder = load_autoencoder(name, device, encoder=False)
    autoencoder.use_statistics(cache.statistics)
    return autoencoder


def feature_network(spec: GenerationSpec, device: torch.device) -> FeatureNetwork:
    """Inception, or a classifier of the user's."""
    return (
        classifier_network(Path(spec.features), device) if spec.features else inception_network(spec.inception, device)
    )


def reference_moments(path: str | None, network: FeatureNetwork, batch_size: int, ranks: Ranks) -> Moments:
    """The reference's Gaussian in the network's features: stored statistics of it are preferred."""
    source = locate_source(str(path))
    stored = load_moments(source) if source.suffix == ".npz" else None
    if stored is not None:
        told = stored.provenance.get("features", {"name": INCEPTION})  # ADM's files do not tell
        same = all(told[key] == network.description[key] for key in ("name", "sha256") if key in told)
        if same and len(stored.mean) == network.width:
            return stored
        if not holds_images(source):
            raise InputError(
                f"{source}: holds statistics of another feature network ({told['name']}, {len(stored.mean)} features) "
                "and no images; give statistics of that network, or images"
            )
    return measured_moments(open_images(source), network, batch_size, ranks, "reference")


def rank_batches(num: int, batch_size: int, ranks: Ranks) -> list[range]:
    """This rank's batches of images: the batches are the same for any number of ranks, and so are the images' bits."""
    starts = range(ranks.rank * batch_size, num, ranks.world * batch_size)
    return [range(start, min(start + batch_size, num)) for start in starts]


def balanced_labels(num: int, seed: int, *, num_classes: int, classes: Sequence[int] | None = None) -> list[int]:
    """A label for each image: every class as often as any other (or once more), in a seeded random order of all `num`.

    The whole list is permuted, as the release does: Inception Score is computed over consecutive splits, and blocks of
    one image a class would even them out. classes: those wanted; None: all. Without classes, the null label.
    """
    wanted = list(classes) if classes else list(range(num_classes)) or [0]
    order = permutation(seed, "labels", num, num)
    return [wanted[place % len(wanted)] for place in order.tolist()]


@torch.inference_mode()
def generated_images(
    model: nn.Module,
    autoencoder: Autoencoder,
    labels: Sequence[int],
    indices: range,
    *,
    latent_shape: tuple[int, int, int],
    seed: int,
    steps: int,
    solver: str,
    time_grid: str,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
    precision: str,
    device: torch.device,
    guide: nn.Module | None = None,
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] with these indices and labels [B].

    Noise is drawn on the CPU: the same on every device. Raises NonFiniteError if the model gives none.
    """
    noise = normals(latent_shape, seed, "sample", indices, "cpu").to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        latents = sample(
            model,
            noise,
            torch.tensor(list(labels), device=device),
            steps=steps,
            solver=solver,
            time_grid=time_grid,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guide=guide,
        )
        images = autoencoder.decode(latents).float()
    if not images.isfinite().all():
        raise NonFiniteError(f"images {indices.start} to {indices.stop - 1}: the model gives NaN or infinity")
    return images


def quantised(images: Tensor, rounding: str) -> Tensor:
    """uint8 [B, 3, H, W] of images in [0, 1]. "round" to the nearest; "floor" as the release does."""
    scaled = images.clamp(0, 1) * 255
    return (scaled.round() if rounding == "round" else scaled.floor()).to(torch.uint8)

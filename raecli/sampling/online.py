"""Images out of a diffusion model and a decoder, over ranks: samples and FID of a model that is still in training.

Images are those that `rae sample` makes with the same settings, and the FID is that of `rae eval fid` over them: image
i is a function of (seed, i), of its label and of the models. No image is written but the sheet.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from raecli.errors import InputError, UsageError
from raecli.evaluation.moments import reference_moments, states_of_ranks
from raecli.evaluation.networks import POOL, FeatureNetwork, chosen_network
from raecli.metrics.frechet import frechet_distance
from raecli.metrics.inception_file import find_inception
from raecli.metrics.reference import holds_images, locate_source, open_images
from raecli.metrics.statistics import FeatureStatistics, Moments, merge_in_order
from raecli.models.autoencoder import Autoencoder
from raecli.recipe.blocks import GenerationSpec
from raecli.recipe.recipes import SampleRecipe, TrainDiffusionRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.sampling.images import decode, solve, to_bytes
from raecli.sampling.models import Models, decoder_for
from raecli.sampling.protocol import balanced_labels
from raecli.store.artifact import read_config
from raecli.store.atomic import sweep_scratch
from raecli.store.encoder_baselines import is_baseline
from raecli.store.encoders import resolve_encoder
from raecli.store.latent_cache import LatentCache
from raecli.store.manifest import Manifest
from raecli.store.model_cards import check_same_latents
from raecli.store.resolve import latents_config
from raecli.store.samples import by_label, write_grid
from raecli.training.distributed import Ranks
from raecli.training.progress import Progress

EVALUATED = "evaluate_seconds"  # the key of metrics.jsonl by which a step is known to be evaluated


@dataclass(frozen=True)
class Generation:
    """All that evaluation needs beside the model, loaded before training starts."""

    spec: GenerationSpec
    recipe: SampleRecipe  # of `rae sample` with the same settings
    run: Path
    every_steps: int
    autoencoder: Autoencoder
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
        models = Models(model, None, self.autoencoder)
        shown = by_label(self.labels, min(spec.grid, spec.num))
        statistics = FeatureStatistics(self.network.width, ranks.device) if self.network else None
        kept: dict[int, np.ndarray] = {}
        batches = rank_batches(spec.num, spec.batch_size, ranks)
        progress = Progress(sum(map(len, batches)), "images", f"evaluate step {step}", shown=ranks.is_main)
        for batch in batches:
            latents = solve(self.recipe, models, self.labels, batch, ranks)
            pixels = to_bytes(decode(self.recipe, models, latents, batch), spec.pixel_rounding)
            if self.network and statistics:
                images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(ranks.device)
                statistics.update(self.network.extract(images)[POOL], [f"generated image {index}" for index in batch])
            for index in set(shown).intersection(batch):
                kept[index] = pixels[index - batch.start]
            progress.advance(len(batch))
        progress.close()
        figures: dict[str, float | int] = {"evaluate_images": spec.num}
        if statistics is not None:
            figures["fid"] = self.distance(statistics)
        return figures, self.write_sheet(shown, kept, step)

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
        latents = latents_config(cache.manifest)
        autoencoder = decoder_for(str(spec.autoencoder), latents, cache.statistics, ranks.device)
        network = chosen_network(spec.features, spec.inception, None, ranks.device) if spec.reference else None
    told = sample_recipe(spec, recipe)
    return Generation(
        spec=spec,
        recipe=told,
        run=run,
        every_steps=duration_in_steps(spec.every, len(cache), recipe.batch_size),
        autoencoder=autoencoder,
        labels=balanced_labels(told, num_classes=recipe.model.num_classes or 0),
        network=network,
        reference=reference_moments(str(spec.reference), network, spec.batch_size, ranks) if network else None,
        ranks=ranks,
    )


def sample_recipe(spec: GenerationSpec, recipe: TrainDiffusionRecipe) -> SampleRecipe:
    """What `rae sample` would be told to make the same images."""
    shared = spec.model_dump(include=SampleRecipe.model_fields.keys() & GenerationSpec.model_fields.keys())
    return SampleRecipe(**shared | {"stage": "sample", "model": recipe.output, "output": f"{recipe.output}/samples"})


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
        config = read_config(name, "rae-decoder")
    check_same_latents(latents, config["latents"], f"the cache {cache} and evaluation.autoencoder {name}")


def rank_batches(num: int, batch_size: int, ranks: Ranks) -> list[range]:
    """This rank's batches of images: the batches are the same for any number of ranks, and so are the images' bits."""
    starts = range(ranks.rank * batch_size, num, ranks.world * batch_size)
    return [range(start, min(start + batch_size, num)) for start in starts]

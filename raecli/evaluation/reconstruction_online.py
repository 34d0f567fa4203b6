"""A decoder in training, measured every so often on images that it is not trained on.

Its averaged weights run in a copy that is neither compiled nor under DDP, without latent noise, on 8-bit images, as
`rae reconstruct` and `rae eval reconstruction` do it afterwards. All ranks take part.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raecli.data.center_crops import center_crops
from raecli.data.feed import ahead
from raecli.data.images import ImageItem, open_images
from raecli.data.order import permutation
from raecli.errors import UsageError
from raecli.evaluation.reconstruction import Judges, PairFigures, PairShape, load_judges, reconstructed, whole_groups
from raecli.metrics.inception_file import find_inception
from raecli.metrics.lpips_file import find_lpips
from raecli.models.autoencoder import Autoencoder
from raecli.models.build import encoder_of
from raecli.models.load import located
from raecli.recipe.blocks import EncoderSpec, ValidationSpec
from raecli.recipe.recipes import TrainDecoderRecipe
from raecli.recipe.spec import duration_in_steps
from raecli.store.latent_cache import LatentCache
from raecli.store.reconstructions import write_sheet
from raecli.store.statistics import LatentStatistics
from raecli.training.distributed import Ranks, decode_threads

SEED = 0  # of the choice of images: the same for every run, so that runs compare


@dataclass(frozen=True)
class Validation:
    """The images, what measures them, and what turns latents into images beside the decoder."""

    spec: ValidationSpec
    items: list[ImageItem]
    judges: Judges
    every: int  # steps
    encoder: EncoderSpec
    statistics: LatentStatistics
    image_size: int  # pixels a side that the encoder is shown
    output_size: int  # pixels a side that the decoder makes
    precision: str
    pictures: Path
    ranks: Ranks

    def is_due(self, step: int, total: int) -> bool:
        """Whether step `step` of `total` is one to measure after."""
        return step % self.every == 0 or step == total

    def measure(
        self, step: int, decoder: nn.Module, weights: dict[str, Tensor], encoder: nn.Module | None
    ) -> tuple[dict[str, float | int], Path | None]:
        """Measure `decoder` with other `weights`, its average's: figures for the log on every rank, rank 0's picture.

        encoder: None where training itself has the cache's latents. All ranks take part. Neither the decoder nor
        torch's random numbers are touched.
        """
        autoencoder = averaged_autoencoder(self, decoder, weights, encoder)
        figures, picture = PairFigures(self.judges, self.ranks.device), None
        for positions, crops, originals in self.batches():
            names = [self.items[position].name for position in positions]
            told = {"precision": self.precision, "pixel_rounding": "round", "names": names}
            made = reconstructed(autoencoder, crops.to(self.ranks.device), **told)
            figures.update(positions, originals, made, names)
            if positions.start == 0 and self.spec.pictures:
                picture = self.write_picture(step, originals, made.cpu())
        report = figures.means(len(self.items), self.ranks)
        told = {f"validation_{name}": report[name] for name in self.judges.metrics}
        return {"validation_images": len(self.items), **told}, picture

    def batches(self) -> Iterator[tuple[range, Tensor, Tensor]]:
        """This rank's batches, the same for any world: positions; crops for the encoder, and as the decoder makes."""
        size, count = whole_groups(self.spec.batch_size), len(self.items)

        def read(start: int) -> tuple[range, Tensor, Tensor]:
            items = self.items[start : start + size]
            crops = center_crops(items, self.image_size, decode_threads())
            same = self.output_size == self.image_size
            originals = crops if same else center_crops(items, self.output_size, decode_threads())
            return range(start, start + len(items)), crops, originals

        return ahead(read, range(self.ranks.rank * size, count, self.ranks.world * size))

    def write_picture(self, step: int, originals: Tensor, made: Tensor) -> Path:
        """samples/step-0000100.png: pairs of the first batch."""
        self.pictures.mkdir(exist_ok=True)
        sides = (images[: self.spec.pictures].permute(0, 2, 3, 1).numpy() for images in (originals, made))
        path = self.pictures / f"step-{step:07d}.png"
        write_sheet(path, *(list(side) for side in sides))
        return path


def open_validation(recipe: TrainDecoderRecipe, cache: LatentCache, samples: int, ranks: Ranks) -> Validation | None:
    """List the images and load the networks, where the recipe wants a validation. samples: images of an epoch."""
    spec = recipe.validation
    if spec is None:
        return None
    metrics = ranks.main_first(lambda: usable_metrics(spec))
    items = open_images(spec.images).items
    chosen = permutation(SEED, "validation", 0, len(items))[: spec.num].tolist()
    manifest = cache.manifest
    output_size = manifest.encoder.tokens_side * recipe.decoder.patch_size
    judges = load_judges(
        metrics,
        PairShape(Path(spec.images), (output_size, output_size)),
        ranks.device,
        lpips_weights=spec.lpips_weights,
        inception=spec.inception,
        features=spec.features,
    )
    return Validation(
        spec,
        [items[index] for index in chosen],
        judges,
        duration_in_steps(spec.every, samples, recipe.batch_size),
        manifest.encoder,
        cache.statistics,
        manifest.image_size,
        output_size,
        recipe.precision,
        Path(recipe.output) / "samples",
        ranks,
    )


def usable_metrics(spec: ValidationSpec) -> tuple[str, ...]:
    """The metrics asked for; or psnr, ssim, and those whose weights are here or were told. Checks the images too."""
    open_images(spec.images)
    if spec.metrics is not None:
        return spec.metrics
    found = ["psnr", "ssim"]
    if spec.lpips_weights is not None or is_here(find_lpips):
        found.append("lpips")
    if spec.features is not None or spec.inception is not None or is_here(find_inception):
        found.append("rfid")
    return tuple(found)


def is_here(find: Any) -> bool:
    """Whether a network's weights lie where they are looked for."""
    try:
        find()
    except UsageError:
        return False
    return True


def averaged_autoencoder(
    validation: Validation, decoder: nn.Module, weights: dict[str, Tensor], encoder: nn.Module | None
) -> Autoencoder:
    """A copy of the decoder with these weights, between the encoder and the statistics it is used with."""
    averaged = copy.deepcopy(decoder)  # drops what compile() put into the modules, and draws nothing
    averaged.load_state_dict(weights)
    averaged.eval().requires_grad_(False)
    pixels = (torch.tensor(validation.encoder.mean), torch.tensor(validation.encoder.std))
    statistics = validation.statistics
    if encoder is None:
        encoder = encoder_of(located(validation.encoder, validation.image_size))
    autoencoder = Autoencoder(encoder, averaged, statistics.mean, statistics.variance, pixels)
    return autoencoder.to(validation.ranks.device)

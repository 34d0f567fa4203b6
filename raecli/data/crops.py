"""Crops of training images for the decoder, by position in the endless stream: any rank, any batch, the same crop."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raecli.data.feed import pooled
from raecli.data.images import ImageSource, unique_keys
from raecli.data.order import stream_slice, uniforms
from raecli.data.preprocess import center_crop, decode_pixels, random_crop
from raecli.errors import InputError
from raecli.recipe.blocks import AugmentationSpec
from raecli.store.latent_cache import LatentCache


@dataclass(frozen=True)
class Crops:
    """One rank's share of an optimiser step."""

    positions: range  # in the endless stream of images
    names: list[str]
    images: Tensor  # uint8 [B, 3, S, S], S the decoder's output side
    latents: Tensor | None  # the cache's [B, C, h, w], un-normalised; None: the encoder has to run

    def __getitem__(self, part: slice) -> "Crops":
        """Some of them, in order."""
        latents = None if self.latents is None else self.latents[part]
        return Crops(self.positions[part], self.names[part], self.images[part], latents)


@dataclass(frozen=True)
class CropSource:
    """Where crops come from, and how they are cut. `rows`: of each image in the cache, where its latents are used."""

    source: ImageSource
    side: int
    seed: int
    augmentation: AugmentationSpec
    threads: int
    cache: LatentCache | None = None
    rows: tuple[int, ...] = ()

    def crops(self, positions: range) -> Crops:
        """Decoded, cropped, flipped: all that is random about one is drawn by its position."""
        items = self.source.items
        indices = stream_slice(self.seed, len(items), positions.start, len(positions)).tolist()
        across, down = uniforms(self.seed, "crop across", positions), uniforms(self.seed, "crop down", positions)
        mirrored = uniforms(self.seed, "flip", positions) < (0.5 if self.augmentation.horizontal_flip else 0.0)

        def crop(row: int) -> np.ndarray:
            item = items[indices[row]]
            whole = decode_pixels(item.read(), item.name)
            if self.augmentation.crop == "random":
                room = float(across[row]), float(down[row])
                pixels = random_crop(whole, self.augmentation.resize, self.side, *room)
            else:
                pixels = center_crop(whole, self.side)
            return pixels[:, ::-1] if mirrored[row] else pixels

        pixels = np.stack(pooled(crop, range(len(positions)), self.threads))
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        latents = None
        if self.cache is not None:
            latents = self.cache.latents([self.rows[index] for index in indices], mirrored.tolist())
        return Crops(positions, [items[index].name for index in indices], images, latents)


def with_cached_latents(crops: CropSource, cache: LatentCache) -> CropSource:
    """The same crops with the cache's latents beside them; images that the cache has skipped are left out.

    Raises InputError if the cache was not made of these images.
    """
    source = crops.source
    if cache.manifest.source_sha256 != source.fingerprint():
        raise InputError(
            f"cache {cache.folder}: was not made of the images in {source.path} as they are now (names or sizes "
            "differ), so its latents are not theirs; encode anew, or use latents=encoder"
        )
    row_of = {key: row for row, key in enumerate(cache.keys)}
    keys = unique_keys(item.name for item in source.items)
    kept = [(item, row_of[key]) for item, key in zip(source.items, keys, strict=True) if key in row_of]
    items, rows = tuple(item for item, _ in kept), tuple(row for _, row in kept)
    return replace(crops, source=replace(source, items=items), cache=cache, rows=rows)

"""Crops by position: the same on any rank, and beside them the cache's latents of those very images."""

from dataclasses import replace

import pytest
import torch

from raecli.data.crops import CropSource, with_cached_latents
from raecli.data.images import open_images
from raecli.errors import InputError
from raecli.models.build import encoder_of
from raecli.recipe.blocks import AugmentationSpec
from raecli.store.latent_cache import open_cache

CENTER = AugmentationSpec(resize=32, crop="center", horizontal_flip=True)
RANDOM = AugmentationSpec(resize=36, crop="random", horizontal_flip=True)


def test_a_slice_of_positions_has_the_crops_of_the_whole(images):
    crops = CropSource(open_images(images), 32, 0, RANDOM, 1)
    whole, part = crops.crops(range(20, 32)), crops.crops(range(24, 28))  # over the end of the epoch
    assert torch.equal(whole[4:8].images, part.images) and whole[4:8].names == part.names
    assert whole[4:8].positions == part.positions == range(24, 28)
    assert not torch.equal(whole.images, replace(crops, seed=1).crops(range(20, 32)).images)


def test_cached_latents_are_those_of_their_images_mirrored_ones_too(images, cache):
    opened = open_cache(cache)
    crops = with_cached_latents(CropSource(open_images(images), 32, 0, CENTER, 1), opened).crops(range(24))
    encoder = encoder_of(opened.manifest.encoder)
    with torch.no_grad():
        expected = encoder(crops.images.float() / 255)
    assert len(set(crops.names)) == 24
    torch.testing.assert_close(crops.latents, expected, atol=1e-4, rtol=1e-4)


def test_what_the_cache_skipped_is_left_out_and_other_images_are_refused(images, cache):
    opened, crops = open_cache(cache), CropSource(open_images(images), 32, 0, CENTER, 1)
    gone = opened.keys.pop()  # as if it had been skipped
    found = with_cached_latents(crops, opened)
    assert len(found.source.items) == len(found.rows) == 23
    assert gone not in {item.name.rpartition(".")[0] for item in found.source.items}
    other = replace(crops.source, items=crops.source.items[1:])
    with pytest.raises(InputError, match="was not made of the images"):
        with_cached_latents(replace(crops, source=other), opened)

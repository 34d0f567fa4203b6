"""Encoders' choices from outside: baselines in the cache and the trainer, summed layers, 512 pixels both ways."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import raecli
from raecli.data.preprocess import center_crop, decode_rgb
from raecli.models.baseline_autoencoder import baseline_autoencoder
from raecli.models.build import encoder_of
from raecli.models.load import statistics_of
from tests.conftest import TINY_DECODER, TINY_DIFFUSION, tree
from tests.tiny_vae import make_vae


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A tiny AutoencoderKL."""
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.mark.parametrize(("name", "patch_size"), [("pixels", 8), ("sdvae", 2)])
def test_a_baseline_is_cached_trained_on_and_decoded(name, patch_size, tmp_path, rae, images, vae_folder):
    encoder = f"sdvae:{vae_folder}" if name == "sdvae" else name
    rae("encode-cache", "--encoder", encoder, images, "cache", "--image-size", "32", "--views", "center+flip")
    cache = raecli.open_cache(tmp_path / "cache")
    assert cache.manifest.latent_shape == {"pixels": (3, 32, 32), "sdvae": (4, 4, 4)}[name]
    assert cache.manifest.encoder.name == encoder and len(cache) == 24
    shared = ("cache=cache", "output=run", "duration=4 steps", f"model.patch_size={patch_size}", *TINY_DIFFUSION)
    rae("train-diffusion", "digits/diffusion", *shared)
    model = raecli.load_diffusion(tmp_path / "run")
    assert (model.patch_size, model.latent_shape) == (patch_size, cache.manifest.latent_shape)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    autoencoder = baseline_autoencoder(encoder, model.config["latents"], statistics_of(model.folder))
    assert autoencoder.config["latents"] == model.config["latents"]
    generated = autoencoder.decode(raecli.sample(model, noise, torch.tensor([0, 1]), steps=2))
    assert generated.shape == (2, 3, 32, 32) and generated.std() > 0.01
    assert generated.min() >= 0 and generated.max() <= 1
    rae("sample", "run", "samples", "--autoencoder", encoder, "--num", "6", "--steps", "2")
    assert len(tree(tmp_path / "samples")) == 6 + 2  # the sheet and the protocol
    assert Image.open(tmp_path / "samples" / "000005.png").size == (32, 32)
    if name == "sdvae":
        refused = rae("sample", "run", "mixed", "--autoencoder", "pixels", "--num", "6", code=3)
        assert "were not made for the same latents" in refused.stderr and "encoder.family" in refused.stderr


def test_a_pixel_cache_holds_the_images_to_the_bit(tmp_path, rae, images):
    rae("encode-cache", "--encoder", "pixels", images, "cache", "--image-size", "40")  # as large as the images are
    cache = raecli.open_cache(tmp_path / "cache")
    told = {"image_size": 40, "encoder": cache.manifest.encoder.to_dict()}
    autoencoder = baseline_autoencoder("pixels", told, cache.statistics)
    latents = torch.stack([cache[index][0].float() for index in range(24)])
    decoded = (autoencoder.decode(cache.statistics.normalise(latents)) * 255).round().byte()
    for index in range(24):
        stored = np.asarray(Image.open(images / f"{cache.keys[index]}.png").convert("RGB"))
        left = (stored.shape[1] - 40) // 2
        np.testing.assert_array_equal(decoded[index].permute(1, 2, 0), stored[:, left : left + 40])


def test_a_decoder_for_pixels_is_refused(tmp_path, rae, images):
    rae("encode-cache", "--encoder", "pixels", images, "cache", "--image-size", "32")
    result = rae("train-decoder", "digits/decoder", f"images={images}", "cache=cache", "output=run", code=3)
    assert "sample with --autoencoder pixels" in result.stderr
    assert not (tmp_path / "run").exists()


def test_summed_layers_are_recorded_and_make_another_cache(tmp_path, rae, images):
    encode = ("encode-cache", "--encoder", "digits-mae", images, "cache", "--dtype", "fp32")
    rae(*encode, "--layers", "sum:2")
    cache = raecli.open_cache(tmp_path / "cache")
    assert cache.manifest.encoder.layers == "sum:2"
    item = next(path for path in images.rglob("*.png") if str(path).endswith(f"{cache.keys[0]}.png"))
    pixels = torch.from_numpy(center_crop(np.asarray(decode_rgb(item.read_bytes(), item.name)), 32).copy())
    latents = encoder_of(cache.manifest.encoder)(pixels.permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(cache[0][0], latents[0], atol=1e-5, rtol=0)  # another batch size
    refused = rae(*encode, code=3)
    assert "encoder.layers: found 'sum:2', expected 'last'" in refused.stderr
    beyond = rae(*encode, "--layers", "sum:4", code=2)
    assert "layers is sum:4, but it has 3 blocks" in beyond.stderr


def test_512_pixels_of_dinov2_are_planned_as_1024_tokens(tmp_path, rae, images):
    save_file({"tensor": torch.zeros(1)}, tmp_path / "w.safetensors")  # the door does not look into it
    encode = ("encode-cache", "--encoder", "dinov2-b", "--weights", "w.safetensors", images, "cache")
    shown = rae(*encode, "--image-size", "512", "--dry-run")
    assert "input_size: 448" in shown.stdout
    assert "latents (768, 32, 32)" in shown.stdout + shown.stderr


def test_an_upsampling_decoder_gives_images_twice_as_large(tmp_path, rae, images, cache):
    """p_d = 2 p_e: 4 x 4 tokens of 32-pixel images to 64 pixels, from crops of 64."""
    recipe = (f"images={images}", f"cache={cache}", "output=run", "duration=6 steps", "decoder.patch_size=16")
    options = (*recipe, "loss.perceptual=none", "loss.perceptual_weights=null", *TINY_DECODER)
    crops = ("augmentation.crop=random", "augmentation.resize=96")
    rae("train-decoder", "digits/decoder", *options, *crops)
    autoencoder = raecli.load_autoencoder(tmp_path / "run", encoder=False)
    reconstructions = autoencoder.decode(torch.zeros(2, 32, 4, 4))
    assert reconstructions.shape == (2, 3, 64, 64) and reconstructions.std() > 0
    too_small = rae("train-decoder", "digits/decoder", *options, "augmentation.crop=random", "output=other", code=3)
    assert "32 leaves no room for the decoder's 64 pixels" in too_small.stderr
    odd = rae("train-decoder", "digits/decoder", *options, "decoder.patch_size=12", "output=other", code=3)
    assert "makes images of 48 pixels" in odd.stderr

"""The baselines of Tables 2, 10 and 11: pixels and an AutoencoderKL as encoders, and diffusion patches above 1."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from raecli.errors import CheckpointError, InputError, UsageError
from raecli.models.baseline_autoencoder import baseline_autoencoder
from raecli.models.build import encoder_of
from raecli.models.dit import DiT, DiTDH
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDecoderRecipe, TrainDiffusionRecipe
from raecli.store.encoder_baselines import VAE_WEIGHTS
from raecli.store.encoders import resolve_encoder
from raecli.store.manifest import Manifest, encoder_identity, tuples
from raecli.store.resolve import check_decoder, resolve_diffusion
from raecli.store.statistics import LatentStatistics
from tests.conftest import environment
from tests.tiny_vae import make_vae


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A tiny AutoencoderKL; not to be changed."""
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def spoiled(vae_folder, tmp_path):
    """A copy to be changed."""
    return Path(shutil.copytree(vae_folder, tmp_path / "vae"))


def change_config(folder, **values):
    """Rewrite keys of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def images_of(side, count=2):
    """[count, 3, side, side] in [0, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def manifest_of(spec, image_size):
    """What a cache of that encoder would say."""
    fields = {
        "encoder": spec.model_dump(),
        "image_size": image_size,
        "latent_shape": spec.latent_shape,
        "dtype": "bf16",
        "precision": "fp32",
        "views": "center",
        "classes": tuple(map(str, range(1000))),
        "samples": 8,
        "samples_per_shard": 8,
        "seed": 0,
        "source_sha256": "0",
        "shards": (),
        "index_sha256": "0",
        "statistics_sha256": "0",
    }
    return Manifest.model_validate(tuples(fields))


def dinov2(tmp_path, image_size):
    """DINOv2-B's spec; the door does not look into the weights."""
    save_file({"tensor": torch.zeros(1)}, tmp_path / "w.safetensors")
    return resolve_encoder("dinov2-b", image_size=image_size, weights=str(tmp_path / "w.safetensors"))


def statistics_of(shape):
    """Some statistics of latents."""
    generator = torch.Generator().manual_seed(1)
    return LatentStatistics(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1, 8)


# pixels


def test_pixels_are_their_own_latents_between_minus_one_and_one():
    spec = resolve_encoder("pixels", image_size=256)
    assert spec.latent_shape == (3, 256, 256) and spec.has_decoder
    assert encoder_identity(spec)["family"] == "pixels" and spec.weights_sha256 is None
    images = images_of(256)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 1
    latents = encoder_of(spec)(images)
    assert (latents.min(), latents.max()) == (-1, 1)
    torch.testing.assert_close((latents + 1) / 2, images)


def test_all_256_levels_of_a_pixel_survive_bf16():
    """Its 8 bits are half a level at worst, near -1 and 1."""
    levels = torch.arange(256.0)
    stored = encoder_of(resolve_encoder("pixels", image_size=16))((levels / 255).view(1, 1, 16, 16)).bfloat16()
    assert torch.equal(((stored.float() + 1) / 2 * 255).round().flatten(), levels)


@pytest.mark.parametrize("name", ["pixels", "vae"])
def test_a_baseline_autoencoder_goes_round_with_its_statistics(name, vae_folder):
    name = f"sdvae:{vae_folder}" if name == "vae" else name
    spec = resolve_encoder(name, image_size=32)
    told = {"image_size": 32, "encoder": spec.to_dict(), "shape": list(spec.latent_shape), "classes": []}
    statistics = statistics_of(spec.latent_shape)
    autoencoder, images = baseline_autoencoder(name, told, statistics), images_of(32)
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, statistics.normalise(encoder_of(spec)(images)), atol=1e-6, rtol=1e-6)
    decoded = autoencoder.decode(latents)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    if name == "pixels":
        torch.testing.assert_close(decoded, images, atol=1e-6, rtol=0)  # fp32, two affine maps and back
    else:
        vae = AutoencoderKL.from_pretrained(vae_folder).eval()
        with torch.no_grad():
            expected = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        assert expected.std() > 0.01  # no trivial image
        torch.testing.assert_close(decoded, expected.clamp(0, 1), atol=1e-5, rtol=0)
    assert autoencoder.config["latents"] == told
    only = baseline_autoencoder(name, told, statistics, encoder=False)
    assert torch.equal(only.decode(latents), decoded)
    with pytest.raises(RuntimeError, match="decode only"):
        only.encode(images)


# AutoencoderKL


@pytest.mark.parametrize("scale", [{}, {"scaling_factor": 1.5}, {"scaling_factor": 0.3611, "shift_factor": 0.1159}])
def test_latents_are_the_scaled_mean_of_the_posterior(scale, tmp_path):
    folder = make_vae(tmp_path / "vae", **scale)
    spec = resolve_encoder(f"sdvae:{folder}", image_size=48)
    assert (spec.latent_shape, spec.patch_size, spec.family) == ((4, 6, 6), 8, "vae")
    assert (spec.scaling_factor, spec.shift_factor) == (
        scale.get("scaling_factor", 0.18215),
        scale.get("shift_factor"),
    )
    vae, images = AutoencoderKL.from_pretrained(folder).eval(), images_of(48)
    with torch.no_grad():
        mean = vae.encode(images * 2 - 1).latent_dist.mean
    expected = (mean - scale.get("shift_factor", 0)) * scale.get("scaling_factor", 0.18215)
    assert expected.std() > 1e-3
    torch.testing.assert_close(encoder_of(spec)(images), expected, atol=1e-6, rtol=0)


def test_a_configuration_without_a_scaling_factor_has_sd_vaes(spoiled):
    change_config(spoiled, scaling_factor=None)  # sd-vae-ft-mse's config.json has none
    assert resolve_encoder(f"sdvae:{spoiled}", image_size=32).scaling_factor == 0.18215


def test_weights_of_before_diffusers_017_are_read(spoiled, vae_folder):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in load_file(vae_folder / VAE_WEIGHTS).items():
        for new, old in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[key] = tensor
    assert sum(".query." in key or ".proj_attn." in key for key in renamed) == 8  # encoder's and decoder's
    save_file(renamed, spoiled / VAE_WEIGHTS)
    images = images_of(32)
    old, new = (encoder_of(resolve_encoder(f"sdvae:{folder}", image_size=32)) for folder in (spoiled, vae_folder))
    assert torch.equal(old(images), new(images))


def test_the_vae_is_frozen_and_stays_in_evaluation(vae_folder):
    encoder = encoder_of(resolve_encoder(f"sdvae:{vae_folder}", image_size=32))
    module = nn.Sequential(encoder).train()
    assert not any(part.training for part in encoder.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not encoder(images_of(32)).requires_grad


def test_missing_and_unknown_keys_are_refused(spoiled):
    tensors = load_file(spoiled / VAE_WEIGHTS)
    del tensors["quant_conv.bias"]
    save_file(tensors | {"adapter.weight": torch.zeros(1)}, spoiled / VAE_WEIGHTS)
    spec = resolve_encoder(f"sdvae:{spoiled}", image_size=32)
    with pytest.raises(CheckpointError, match=r"1 missing: quant_conv\.bias; 1 unknown: adapter\.weight"):
        encoder_of(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 8}, "8 channels, 8 pixels a position; the spec says 4 and 8"),
        ({"block_out_channels": [8, 16]}, "diffusers makes no AutoencoderKL of it"),
        (
            {
                "block_out_channels": [8, 16],
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
            },
            "4 channels, 2 pixels a position; the spec says 4 and 8",
        ),
        ({"norm_num_groups": 3}, "diffusers makes no AutoencoderKL of it"),
    ],
)
def test_a_config_changed_after_the_spec_was_made_is_refused(change, message, spoiled):
    spec = resolve_encoder(f"sdvae:{spoiled}", image_size=32)
    change_config(spoiled, **change)
    with pytest.raises(CheckpointError, match=message):
        encoder_of(spec)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"_class_name": "VQModel"}, UsageError, "_class_name is 'VQModel'"),
        ({"block_out_channels": 4}, InputError, "block_out_channels is 4"),
        ({"latent_channels": "4"}, InputError, "latent_channels is '4'"),
        ({"scaling_factor": 0}, InputError, "scaling_factor is 0"),
        ({"scaling_factor": True}, InputError, "scaling_factor is True"),
        ({"shift_factor": "a"}, InputError, "shift_factor is 'a'"),
    ],
)
def test_a_config_of_no_autoencoder_is_refused(change, error, message, spoiled):
    change_config(spoiled, **change)
    with pytest.raises(error, match=message):
        resolve_encoder(f"sdvae:{spoiled}", image_size=32)


@pytest.mark.parametrize(
    ("missing", "instead", "message"),
    [
        ("config.json", None, "no config.json.*bring the whole diffusers folder"),
        ("config.json", "vae/config.json", "give sdvae:.*/vae"),
        (VAE_WEIGHTS, None, "no diffusion_pytorch_model.safetensors; bring it, or give it with --weights FILE"),
        (VAE_WEIGHTS, "diffusion_pytorch_model.bin", "only a pickle, which is not read"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(missing, instead, message, spoiled):
    (spoiled / missing).unlink()
    if instead:
        (spoiled / instead).parent.mkdir(exist_ok=True)
        (spoiled / instead).touch()
    with pytest.raises(UsageError, match=message):
        resolve_encoder(f"sdvae:{spoiled}", image_size=32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pixels", {"weights": "w.safetensors"}, "has no weights"),
        ("pixels", {"input_size": 64}, "leave --input-size out"),
        ("pixels", {"layers": "sum:2"}, "leave --layers out"),
        ("vae", {"image_size": 36}, "no multiple of 8; the nearest sizes: 32 or 40"),
        ("vae", {"input_size": 64}, "leave --input-size out"),
        ("vae", {"layers": "sum:2"}, "leave --layers out"),
        ("pixel", {}, "did you mean pixels"),
    ],
)
def test_options_that_mean_nothing_to_a_baseline_are_refused(name, options, message, vae_folder):
    name = f"sdvae:{vae_folder}" if name == "vae" else name
    with pytest.raises(UsageError, match=message):
        resolve_encoder(name, **{"image_size": 32, **options})


def test_without_diffusers_the_extra_is_named(vae_folder, monkeypatch):
    spec = resolve_encoder(f"sdvae:{vae_folder}", image_size=32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for attempt in (lambda: resolve_encoder(f"sdvae:{vae_folder}", image_size=32), lambda: encoder_of(spec)):
        with pytest.raises(UsageError, match=r"pip install 'raecli\[diffusers\]'"):
            attempt()


def test_the_door_resolves_a_vae_without_torch(vae_folder):
    code = (
        "import sys\nfrom raecli.store.encoders import resolve_encoder\n"
        f"assert resolve_encoder({f'sdvae:{vae_folder}'!r}, image_size=32).width == 4\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


# what a recipe makes of them


@pytest.mark.parametrize(
    ("recipe", "dimension", "alpha"),
    [("dit_xl_sdvae", 4096, 1.0), ("dith_xl_pixels", 196608, 48**0.5), ("dith_xl_512", 786432, 192**0.5)],
)
def test_the_time_shift_comes_of_all_dimensions_of_the_latents(recipe, dimension, alpha, vae_folder, tmp_path):
    """1024 tokens of DINOv2-B: alpha 13.86. SD-VAE: 1, the base's own."""
    size = 512 if recipe.endswith("512") else 256
    specs = {
        "dit_xl_sdvae": lambda: resolve_encoder(f"sdvae:{vae_folder}", image_size=size),
        "dith_xl_pixels": lambda: resolve_encoder("pixels", image_size=size),
        "dith_xl_512": lambda: dinov2(tmp_path, size),
    }
    manifest = manifest_of(specs[recipe](), size)
    resolved = resolve_diffusion(load_recipe(TrainDiffusionRecipe, recipe), manifest)
    assert resolved.flow.time_shift_dim == dimension
    assert resolved.flow.time_shift == pytest.approx(alpha, rel=1e-12)
    assert (resolved.model.in_channels, resolved.model.input_size) == manifest.latent_shape[:2]
    with pytest.raises(InputError, match=r"model.in_channels: the recipe says"):
        resolve_diffusion(load_recipe(TrainDiffusionRecipe, recipe, ["model.in_channels=5"]), manifest)


def test_dinov2_sees_448_of_512_pixels(tmp_path):
    spec = dinov2(tmp_path, 512)
    assert (spec.input_size, spec.latent_shape) == (448, (768, 32, 32))


@pytest.mark.parametrize(
    ("name", "image_size"), [("decoder_xl_dinov2b_512", 512), ("decoder_xl_dinov2b_upsample", 256)]
)
def test_decoders_to_512_pixels_fit_their_caches(name, image_size, tmp_path):
    manifest = manifest_of(dinov2(tmp_path, image_size), image_size)
    recipe = load_recipe(TrainDecoderRecipe, name)
    assert check_decoder(recipe, manifest) == recipe
    with pytest.raises(InputError, match=r"set decoder\.patch_size=16"):
        check_decoder(load_recipe(TrainDecoderRecipe, name, ["decoder.patch_size=12"]), manifest)
    small = load_recipe(TrainDecoderRecipe, name, ["augmentation.resize=384"])
    with pytest.raises(InputError, match="384 leaves no room for the decoder's 512 pixels; the paper's share is 768"):
        check_decoder(small, manifest)


def test_a_decoder_for_latents_that_have_one_is_refused():
    manifest = manifest_of(resolve_encoder("pixels", image_size=256), 256)
    with pytest.raises(InputError, match=r"have a decoder already.*--autoencoder pixels"):
        check_decoder(load_recipe(TrainDecoderRecipe, "decoder_xl_dinov2b"), manifest)


# diffusion patches


def make(kind, **sizes):
    """A small DiT or DiT-DH, its zero layers drawn: else every velocity is 0."""
    torch.manual_seed(0)
    head = {"head_width": 32, "head_depth": 1, "head_heads": 2} if kind is DiTDH else {}
    model = kind(**sizes, width=16, depth=1, heads=2, num_classes=3, **head).double()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("kind", [DiT, DiTDH])
@pytest.mark.parametrize(("channels", "side", "patch"), [(4, 16, 2), (3, 32, 16)], ids=["sdvae", "pixels"])
def test_patches_are_tokens_of_as_many_channels(kind, channels, side, patch):
    """A model of patches p on C channels is the model of patch 1 on the p p C channels of the unshuffled map."""
    model = make(kind, in_channels=channels, input_size=side, patch_size=patch)
    flat = make(kind, in_channels=channels * patch**2, input_size=side // patch)
    flat.load_state_dict(model.state_dict())  # the same shapes, so the same parameters
    noisy = torch.randn(2, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([0.2, 0.8]).double(), torch.tensor([0, 3])
    velocity = model(noisy, t, labels)
    assert velocity.shape == noisy.shape and velocity.std() > 0.01
    tokens = flat(torch.pixel_unshuffle(noisy, patch) if patch > 1 else noisy, t, labels)
    # In come channels (channel, row, column), out go (row, column, channel), as released.
    expected = tokens.unflatten(1, (patch, patch, channels)).permute(0, 3, 4, 1, 5, 2).reshape(noisy.shape)
    torch.testing.assert_close(velocity, expected)


@pytest.mark.parametrize("kind", [DiT, DiTDH])
def test_a_model_takes_1024_tokens(kind):
    model = make(kind, in_channels=8, input_size=32)
    noisy = torch.randn(1, 8, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    velocity = model(noisy, torch.tensor([0.5]).double(), torch.tensor([1]))
    assert velocity.shape == noisy.shape and velocity.std() > 0.01
    assert model.positions.shape == (1024, 16)

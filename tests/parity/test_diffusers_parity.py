"""Our autoencoder and diffusers' AutoencoderRAE are the same function, converted either way.

diffusers 0.42.1 builds SigLIP2 with transformers up to 5.4 alone: later ones have no `vision_model` in the tower, which
is all that breaks, so the test gives it back. The folder's names are those of the transformers that runs here; that the
published names (transformers 5.3) convert to the same artifact is tested too.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import raecli
from raecli import errors
from raecli.convert.conversion import convert
from raecli.convert.encoder_names import name_for, published_name
from raecli.convert.settings import Request
from raecli.models.load import read_artifact

AGREE = {"atol": 1e-5, "rtol": 0}  # fp32 sums in another order; seen: 4e-6
# type: family, hidden size, patch, input size
TYPES = {"dinov2": ("dinov2", 64, 14, 224), "siglip2": ("siglip", 128, 16, 256), "mae": ("mae", 64, 16, 256)}
VECTORS = Path(__file__).parent / "vectors"


def build(kind: str):
    """A small AutoencoderRAE with random weights and statistics."""
    from diffusers import AutoencoderRAE
    from transformers import SiglipVisionModel

    if not hasattr(SiglipVisionModel, "vision_model") and kind == "siglip2":
        SiglipVisionModel.vision_model = property(lambda self: self)
    _, width, patch, side = TYPES[kind]
    generator = torch.Generator().manual_seed(7)
    shape = (width, 16, 16)
    mean = None if kind == "dinov2" else torch.randn(shape, generator=generator)  # released DINOv2-B has no mean
    half = [0.5, 0.5, 0.5]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoencoderRAE(
            encoder_type=kind,
            encoder_hidden_size=width,
            encoder_patch_size=patch,
            encoder_num_hidden_layers=2,
            decoder_hidden_size=48,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=3,
            decoder_intermediate_size=80,
            patch_size=16,
            encoder_input_size=side,
            encoder_norm_mean=half if kind == "siglip2" else None,
            encoder_norm_std=half if kind == "siglip2" else None,
            latents_mean=mean,
            latents_std=0.2 + torch.rand(shape, generator=generator),
            noise_tau=0.8,
        )
        for parameter in model.parameters():  # zero biases and unit norms would hide a wrong name
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="module", params=list(TYPES))
def pair(request, tmp_path_factory):
    """kind, diffusers' model, its folder, our artifact."""
    folder = tmp_path_factory.mktemp(request.param)
    model = build(request.param)
    model.save_pretrained(folder / "theirs")
    convert(Request(folder / "theirs", folder / "ours"))
    return request.param, model, folder / "theirs", folder / "ours"


def tensors_of(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_latents_and_images_agree(pair):
    _, theirs, _, ours = pair
    autoencoder = raecli.load_autoencoder(ours)
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = theirs.encode(images).latent
        decoded = theirs.decode(latents).sample
    assert latents.std() > 0.5 and decoded.std() > 0.05
    torch.testing.assert_close(autoencoder.encode(images), latents, **AGREE)
    torch.testing.assert_close(autoencoder.decode(latents), decoded.clamp(0, 1), **AGREE)


def test_the_artifact_is_self_contained(pair, tmp_path):
    _, _, theirs, ours = pair
    ours.rename(tmp_path / "moved")
    hidden = theirs.rename(tmp_path / "hidden")
    try:
        assert raecli.load_autoencoder(tmp_path / "moved").encode(torch.rand(1, 3, 256, 256)).isfinite().all()
        (tmp_path / "moved" / "encoder" / "model.safetensors").rename(tmp_path / "gone")
        with pytest.raises(errors.CheckpointError, match="is gone"):
            raecli.load_autoencoder(tmp_path / "moved")
        (tmp_path / "gone").rename(tmp_path / "moved" / "encoder" / "model.safetensors")
    finally:
        (tmp_path / "moved").rename(ours)
        hidden.rename(theirs)


def test_the_way_back_loads_and_agrees(pair, tmp_path):
    from diffusers import AutoencoderRAE

    _, theirs, _, ours = pair
    convert(Request(ours, tmp_path / "back", to="diffusers"))
    loaded, told = AutoencoderRAE.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = theirs.encode(images).latent
        torch.testing.assert_close(loaded.encode(images).latent, latents, **AGREE)
        torch.testing.assert_close(loaded.decode(latents).sample, theirs.decode(latents).sample, **AGREE)
    assert loaded.config.noise_tau == 0.8


def test_there_and_back_changes_no_bit(pair, tmp_path):
    _, _, folder, ours = pair
    convert(Request(ours, tmp_path / "back", to="diffusers"))
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=0, rtol=0, msg=name)
    convert(Request(tmp_path / "back", tmp_path / "again"))
    for name in ("model.safetensors", "encoder/model.safetensors", "statistics.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (ours / name).read_bytes(), name


def test_published_names_give_the_same_artifact(pair, tmp_path):
    kind, _, folder, ours = pair
    family = TYPES[kind][0]
    published = {
        f"encoder.{published_name(name.removeprefix('encoder.'), family)}"
        if name.startswith("encoder.")
        else name: value
        for name, value in tensors_of(folder).items()
    }
    assert published.keys() != tensors_of(folder).keys()
    (tmp_path / "published").mkdir()
    save_file(published, tmp_path / "published" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "published" / "config.json").write_text((folder / "config.json").read_text())
    convert(Request(tmp_path / "published", tmp_path / "ours"))
    for name in ("model.safetensors", "encoder/model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (ours / name).read_bytes()
    convert(Request(ours, tmp_path / "old", to="diffusers", settings={"transformers": "5.3.0"}))
    assert tensors_of(tmp_path / "old").keys() == published.keys()
    assert {
        name_for(name.removeprefix("encoder."), family, (5, 3)) for name in published if name.startswith("encoder.")
    }


def test_official_to_ours_to_diffusers_to_ours_changes_no_bit_of_the_weights(pair, tmp_path):
    """The issue's round trip, with the encoder kept inside on the way."""
    _, _, _, ours = pair
    convert(Request(ours, tmp_path / "model.pt", to="official"))
    convert(Request(ours, tmp_path / "stat.pt", to="official", kind="statistics"))
    asked = {"kind": "autoencoder", "encoder": str(ours), "statistics": str(tmp_path / "stat.pt")}
    convert(Request(tmp_path / "model.pt", tmp_path / "one", **asked, settings={"heads": 3}))
    convert(Request(tmp_path / "one", tmp_path / "theirs", to="diffusers"))
    convert(Request(tmp_path / "theirs", tmp_path / "two"))
    for name in ("model.safetensors", "encoder/model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    convert(Request(tmp_path / "two", tmp_path / "again.pt", to="official"))
    first, last = (torch.load(tmp_path / name, weights_only=True) for name in ("model.pt", "again.pt"))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    one, two = (load_file(tmp_path / name / "statistics.safetensors")["variance"] for name in ("one", "two"))
    # A square root keeps half the digits apart: the variance may move by one unit in its last place.
    torch.testing.assert_close(two, one, atol=0, rtol=2**-22)


def test_released_decoder_survives_both_ways(tmp_path):
    """On the vectors of the released code, whose encoder has heads of 32 channels, which diffusers cannot build."""
    encoder = VECTORS / "encoder_dinov2"
    settings = {"heads": 4}
    torch.save({"mean": None, "var": torch.rand(64, 16, 16)}, tmp_path / "stat.pt")
    asked = {"encoder": str(encoder), "statistics": str(tmp_path / "stat.pt"), "settings": settings}
    convert(Request(VECTORS / "decoder_dinov2.pt", tmp_path / "ours", **asked))
    convert(Request(tmp_path / "ours", tmp_path / "back.pt", to="official"))
    before, after = (
        torch.load(path, weights_only=True) for path in (VECTORS / "decoder_dinov2.pt", tmp_path / "back.pt")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(errors.UsageError, match="2 heads of 32 channels, diffusers has 64"):
        convert(Request(tmp_path / "ours", tmp_path / "theirs", to="diffusers"))


def test_configuration_says_what_diffusers_has_to_know(pair):
    _, _, folder, ours = pair
    theirs = json.loads((folder / "config.json").read_text())
    _, config, weights = read_artifact(ours, "rae-decoder")
    assert config["recipe"]["decoder"]["heads"] == theirs["decoder_num_attention_heads"] == 3
    assert config["recipe"]["noise_tau"] == 0.8
    assert config["latents"]["encoder"]["input_size"] == theirs["encoder_input_size"]
    assert config["latents"]["image_size"] == 256
    assert config["converted"]["from"] == "diffusers" and len(config["converted"]["sha256"]) == 64
    assert sum(value.numel() for value in weights.values()) > 0


def test_a_preset_of_timm_becomes_diffusers_encoder(tmp_path):
    """DINOv2-S by timm's weights: the class token's position is folded into it there, and stays so."""
    import timm
    from diffusers import AutoencoderRAE

    from raecli.convert.official import decoder_to_official
    from raecli.models.decoder import Decoder

    with torch.random.fork_rng():
        torch.manual_seed(5)
        backbone = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0)
        for parameter in backbone.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
        decoder = Decoder(
            in_channels=384, tokens_side=16, width=48, depth=1, heads=3, mlp_width=64, patch_size=16
        ).state_dict()
    save_file(backbone.state_dict(), tmp_path / "dinov2.safetensors")
    torch.save(decoder_to_official(decoder, {}), tmp_path / "model.pt")
    torch.save({"mean": None, "var": torch.rand(384, 16, 16) + 0.5}, tmp_path / "stat.pt")
    asked = {"encoder": "dinov2-s", "encoder_weights": str(tmp_path / "dinov2.safetensors")}
    asked |= {"statistics": str(tmp_path / "stat.pt"), "settings": {"heads": 3}}
    convert(Request(tmp_path / "model.pt", tmp_path / "ours", **asked))
    convert(Request(tmp_path / "ours", tmp_path / "theirs", to="diffusers"))
    loaded, told = AutoencoderRAE.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    ours = raecli.load_autoencoder(tmp_path / "ours")
    with torch.no_grad():
        latents = loaded.encode(images).latent
        torch.testing.assert_close(ours.encode(images), latents, **AGREE)
        torch.testing.assert_close(ours.decode(latents), loaded.decode(latents).sample.clamp(0, 1), **AGREE)

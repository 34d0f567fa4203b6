"""The encoder as a module: shapes of the presets, properties of its latents, weights that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from raecli.errors import CheckpointError
from raecli.models.build import ENCODER_FIELDS
from raecli.models.encoder import Encoder, build_encoder, make_timm_backbone
from raecli.recipe.blocks import EncoderSpec
from raecli.store.encoders import PRESETS, resolve_encoder

VECTORS = Path(__file__).parents[1] / "parity" / "vectors"


def build(spec: EncoderSpec, **changes: object) -> Encoder:
    """An encoder of a spec, some of its values changed."""
    return build_encoder(**spec.model_dump(include=set(ENCODER_FIELDS)) | changes)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """MAE of width 32 with 6x6 tokens of 8 pixels, in fp64."""
    return build(resolve_encoder(str(VECTORS / "vit_mae"), image_size=48)).double()


@pytest.fixture
def images() -> torch.Tensor:
    """[3, 3, 48, 48], fp64 in [0, 1]."""
    return torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Hugging Face folder to be spoiled."""
    return Path(shutil.copytree(VECTORS / "vit_mae", tmp_path / "vit_mae"))


@pytest.mark.parametrize("name", list(PRESETS))
def test_preset_table_is_what_timm_builds(name):
    preset = PRESETS[name]
    side = 224 if preset.patch_size == 14 else 256
    with torch.device("meta"):
        model = timm.create_model(preset.architecture, num_classes=0, global_pool="", img_size=side)
        tokens = model.forward_features(torch.empty(2, 3, side, side))
    assert isinstance(model.norm, nn.LayerNorm)
    assert tokens.shape == (2, preset.prefix_tokens + 256, preset.width)
    assert len(model.blocks) == preset.depth
    assert model.patch_embed.patch_size == (preset.patch_size, preset.patch_size)
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == preset.statistics
    assert model.pretrained_cfg["hf_hub_id"] == f"timm/{preset.architecture}"


@pytest.mark.parametrize("name", list(PRESETS))
def test_preset_runs_transformers_activation_and_epsilon(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        backbone = make_timm_backbone(
            preset.architecture, family=preset.family, input_size=224, norm_eps=preset.norm_eps
        )
    norms = [module.eps for module in backbone.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * len(backbone.blocks)  # the last one is the encoder's
    assert set(norms) == {{"mae": 1e-12, "dinov3": 1e-5}.get(preset.family, 1e-6)} == {preset.norm_eps}
    activation = backbone.blocks[0].mlp.act
    values = torch.linspace(-3, 3, 31)
    approximate = "tanh" if preset.family == "siglip" else "none"
    torch.testing.assert_close(activation(values), F.gelu(values, approximate=approximate), atol=0, rtol=0)


def test_latents_have_zero_mean_and_unit_variance_over_channels(encoder, images):
    latents = encoder(images)
    assert latents.shape == (3, 32, 6, 6)
    zeros = torch.zeros(3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(latents.mean(1), zeros)
    torch.testing.assert_close(latents.var(1, correction=0), zeros + 1)


def test_latents_of_an_image_do_not_depend_on_its_batch(encoder, images):
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(encoder(images), alone)


def test_tokens_lie_row_by_row(encoder, images):
    """Without positions the network does not know an order: patches that change places take their tokens along."""
    positions = encoder.backbone.pos_embed.data
    kept = positions.clone()
    positions.zero_()
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # [B, 3, 36, 8, 8], row by row
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    shuffled = patches[:, :, order].unflatten(2, (6, 6)).permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    latents = encoder(images).flatten(2)[:, :, order].unflatten(2, (6, 6))
    torch.testing.assert_close(encoder(shuffled), latents)
    positions.copy_(kept)


def test_image_of_another_size_is_resized_bicubically_without_antialias(encoder, images):
    small = F.interpolate(images, size=(48, 48), mode="bicubic", align_corners=False)
    large = F.interpolate(images, size=(96, 96), mode="nearest")
    assert torch.equal(encoder(images), encoder(small))
    by_hand = F.interpolate(large, size=(48, 48), mode="bicubic", align_corners=False, antialias=False)
    assert by_hand.min() < 0 or by_hand.max() > 1  # not clamped
    torch.testing.assert_close(encoder(large), encoder(by_hand))


def test_encoder_is_frozen_and_stays_in_evaluation(encoder):
    module = nn.Sequential(encoder).train()
    assert not any(part.training for part in encoder.modules())
    assert sum(1 for _ in module.parameters()) > 0
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_fp16_weights_are_run_in_fp32():
    encoder = build(resolve_encoder(str(VECTORS / "vit_mae"), image_size=48))
    stored = load_file(VECTORS / "vit_mae" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}


def test_missing_and_unknown_keys_are_all_listed(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["vit.encoder.layer.1.attention.attention.key.weight"], tensors["vit.embeddings.cls_token"]
    tensors |= {"adapter.weight": torch.zeros(1), "vit.encoder.layer.2.layernorm_after.bias": torch.zeros(32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        build(resolve_encoder(str(folder), image_size=48))
    missing, unknown = str(caught.value).split("2 missing: ")[1].split("; 2 unknown: ")
    assert missing == "embeddings.cls_token, encoder.layer.1.attention.attention.key.weight"
    assert unknown == "adapter.weight, encoder.layer.2.layernorm_after.bias"


def test_shapes_that_do_not_fit_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.mlp\.fc1\.weight is \[72, 32\], the network's is \[80, 32\]"
    ):
        build(resolve_encoder(str(folder), image_size=48))


def test_positions_that_are_no_square_grid_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["vit.embeddings.position_embeddings"] = torch.zeros(1, 1 + 15, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="16 positions are no square grid and 1 more"):
        build(resolve_encoder(str(folder), image_size=48))


def test_config_changed_after_the_spec_was_made_is_refused(folder):
    spec = resolve_encoder(str(folder), image_size=48)
    with pytest.raises(CheckpointError, match="width is 32, the spec says 64"):
        build(spec, width=64)


def test_weights_file_that_vanished_is_refused(folder):
    spec = resolve_encoder(str(folder), image_size=48)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build(spec)


def test_timm_weights_give_what_timm_gives(tmp_path):
    """With a head, and with positions for 160 pixels used at 96, antialiased as timm does it."""
    torch.manual_seed(0)
    published = timm.create_model("test_vit").eval()
    nn.init.normal_(published.pos_embed)
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    spec = resolve_encoder("timm:test_vit", image_size=96, weights=str(tmp_path / "model.safetensors"))
    published.set_input_size((96, 96))
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        tokens = published.forward_features((images - 0.5) / 0.5)[:, 1:]  # its last norm's affine is 1 and 0
    assert spec.mean == spec.std == (0.5, 0.5, 0.5)
    latents = tokens.transpose(1, 2).unflatten(2, (6, 6))
    torch.testing.assert_close(build(spec)(images), latents, atol=1e-5, rtol=0)  # fp32 sums of 64 terms
    smooth = build(spec, position_antialias=False)(images) - latents
    assert smooth.abs().max() > 1e-2  # the choice of antialiasing arrives


def test_unknown_keys_of_timm_weights_are_refused(tmp_path):
    tensors = load_file(VECTORS / "vit_mae" / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    spec = resolve_encoder("timm:test_vit", image_size=96, weights=str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.0.* unknown: .*decoder_norm"):
        build(spec)

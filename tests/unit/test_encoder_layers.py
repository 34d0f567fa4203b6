"""`layers: sum:K`: the last K blocks' tokens added up, then one LayerNorm; recorded, and refused where too many."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from raecli.errors import CheckpointError, UsageError
from raecli.models.build import encoder_of
from raecli.recipe.blocks import EncoderSpec
from raecli.store.encoders import resolve_encoder
from raecli.store.manifest import encoder_identity

VECTORS = Path(__file__).parents[1] / "parity" / "vectors"
FOLDERS = {"vit_mae": 48, "siglip": 48, "dinov2": 48, "encoder_dinov2": 256}


def images_of(side: int) -> torch.Tensor:
    """[2, 3, side, side] in [0, 1]."""
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def by_hand(encoder: torch.nn.Module, images: torch.Tensor, count: int) -> torch.Tensor:
    """Latents from hooks on the last `count` blocks, their outputs added and normalised once."""
    outputs: list[torch.Tensor] = []
    blocks = list(encoder.backbone.blocks)[-count:]
    hooks = [block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in blocks]
    side = (encoder.input_size, encoder.input_size)
    pixels = F.interpolate(images, side, mode="bicubic") if images.shape[-2:] != side else images
    encoder.backbone.forward_features((pixels - encoder.mean) / encoder.std)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == count
    tokens = torch.stack(outputs).sum(0)[:, encoder.prefix_tokens :]
    tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=encoder.norm_eps)
    return tokens.transpose(1, 2).unflatten(2, (encoder.tokens_side, encoder.tokens_side))


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_sum_of_two_blocks_is_that_of_hooks(name):
    spec = resolve_encoder(str(VECTORS / name), image_size=FOLDERS[name], layers="sum:2")
    encoder, images = encoder_of(spec), images_of(FOLDERS[name])
    latents = encoder(images)
    # The same sum in another order of two addends: exact but for the LayerNorm's fp32.
    torch.testing.assert_close(latents, by_hand(encoder, images, 2), atol=1e-6, rtol=0)
    last = encoder_of(spec.model_copy(update={"layers": "last"}))(images)
    assert (latents - last).abs().max() > 1e-2  # the choice arrives
    zeros = torch.zeros_like(latents[:, 0])
    torch.testing.assert_close(latents.mean(1), zeros, atol=1e-5, rtol=0)  # tokens stay normalised
    torch.testing.assert_close(latents.var(1, correction=0), zeros + 1, atol=1e-3, rtol=0)  # eps within the root


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_sum_of_one_block_is_the_last(name):
    spec = resolve_encoder(str(VECTORS / name), image_size=FOLDERS[name])
    images = images_of(FOLDERS[name])
    one = encoder_of(spec.model_copy(update={"layers": "sum:1"}))(images)
    torch.testing.assert_close(one, encoder_of(spec)(images), atol=0, rtol=0)
    assert resolve_encoder(str(VECTORS / name), image_size=FOLDERS[name], layers="sum:1") == spec


def test_a_timm_encoder_sums_its_blocks(tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    spec = resolve_encoder("timm:test_vit", image_size=96, weights=str(tmp_path / "w.safetensors"), layers="sum:3")
    encoder, images = encoder_of(spec), images_of(96)
    torch.testing.assert_close(encoder(images), by_hand(encoder, images, 3), atol=1e-6, rtol=0)


def test_rotary_blocks_are_summed_too(tmp_path):
    """DINOv3's class in timm is another one."""
    torch.manual_seed(0)
    encoder = encoder_of(dinov3_spec(tmp_path))
    images = images_of(32)
    torch.testing.assert_close(encoder(images), by_hand(encoder, images, 4), atol=1e-6, rtol=0)


def dinov3_spec(folder: Path) -> EncoderSpec:
    """DINOv3-S with random weights, 2 x 2 tokens."""
    model = timm.create_model("vit_small_patch16_dinov3.lvd1689m", pretrained=False, num_classes=0)
    save_file(model.state_dict(), folder / "w.safetensors")
    return resolve_encoder("dinov3-s", image_size=32, weights=str(folder / "w.safetensors"), layers="sum:4")


def test_layers_are_a_part_of_an_encoders_identity():
    last = resolve_encoder(str(VECTORS / "vit_mae"), image_size=48)
    summed = resolve_encoder(str(VECTORS / "vit_mae"), image_size=48, layers="sum:2")
    assert (last.layers, summed.layers) == ("last", "sum:2")
    assert EncoderSpec.model_validate_json(summed.model_dump_json()) == summed
    differing = {key for key, value in encoder_identity(summed).items() if encoder_identity(last)[key] != value}
    assert differing == {"layers"}


@pytest.mark.parametrize("layers", ["", "4", "sum", "sum:", "sum:0", "sum:-1", "sum:1.5", "sum:02", "mean:2", "Last"])
def test_layers_that_read_otherwise_are_refused(layers):
    with pytest.raises(UsageError, match=r"layers is .*it reads .*sum:K"):
        resolve_encoder(str(VECTORS / "vit_mae"), image_size=48, layers=layers)


def test_more_blocks_than_there_are_are_refused(tmp_path):
    folder = Path(shutil.copytree(VECTORS / "vit_mae", tmp_path / "vit_mae"))
    depth = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    spec = resolve_encoder(str(folder), image_size=48, layers=f"sum:{depth}")
    with pytest.raises(UsageError, match=f"layers is sum:{depth + 1}, but it has {depth} blocks"):
        resolve_encoder(str(folder), image_size=48, layers=f"sum:{depth + 1}")
    with pytest.raises(CheckpointError, match=f"it has {depth} blocks"):
        encoder_of(spec.model_copy(update={"layers": f"sum:{depth + 1}"}))


@pytest.mark.parametrize(("name", "depth"), [("dinov2-b", 12), ("dinov2-l", 24), ("siglip2-so", 27)])
def test_more_blocks_than_a_preset_has_are_refused(name, depth, tmp_path):
    save_file({"tensor": torch.zeros(1)}, tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    assert resolve_encoder(name, image_size=256, weights=weights, layers=f"sum:{depth}").layers == f"sum:{depth}"
    with pytest.raises(UsageError, match=f"has {depth} blocks"):
        resolve_encoder(name, image_size=256, weights=weights, layers=f"sum:{depth + 1}")


def test_a_manifest_of_before_layers_and_baselines_still_reads():
    told = resolve_encoder(str(VECTORS / "vit_mae"), image_size=48).to_dict()
    old = {key: value for key, value in told.items() if key not in ("layers", "scaling_factor", "shift_factor")}
    assert EncoderSpec.model_validate_json(json.dumps(old)).to_dict() == told
    with pytest.raises(ValueError, match="layers"):
        EncoderSpec.model_validate_json(json.dumps(old | {"layers": "first"}))

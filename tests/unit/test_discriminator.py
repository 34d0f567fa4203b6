"""The discriminator: its released size, its heads' formula, its norms over batch and ranks, and the files it reads."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from raecli.convert.conversion import convert
from raecli.convert.settings import Request
from raecli.errors import CheckpointError, UsageError
from raecli.models import discriminator as module
from raecli.models.discriminator import (
    Backbone,
    BatchNorm,
    Discriminator,
    Head,
    InstanceNorm,
    SpectralConv1d,
    load_backbone,
)
from raecli.models.discriminator_file import find_backbone


def tiny() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=1, num_classes=0)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_on_dino_vit_s8_it_has_the_released_number_of_trained_parameters(norm):
    with torch.device("meta"):
        network = timm.create_model("vit_small_patch8_224.dino", pretrained=False, num_classes=0)
        found = Discriminator(Backbone(network), norm=norm)
    assert sum(p.numel() for p in found.parameters() if p.requires_grad) == 7_386_245
    assert found.backbone.taps == [2, 5, 8, 11] and len(found.heads) == 5 and found.backbone.side == 224


def test_the_network_built_from_the_files_shapes_is_timms_dino(tmp_path):
    with torch.device("meta"):
        published = timm.create_model("vit_small_patch8_224.dino", pretrained=False, num_classes=0)
        ours = module.plain_transformer(published.state_dict(), tmp_path)
    published.norm = nn.Identity()
    assert repr(ours.blocks) == repr(published.blocks) and repr(ours.patch_embed) == repr(published.patch_embed)
    assert ours.blocks[0].attn.num_heads == published.blocks[0].attn.num_heads == 6
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in published.state_dict().items()
    }


def test_a_converted_discriminator_is_loaded_and_gives_the_tokens_of_its_blocks(tmp_path):
    network = tiny().eval()
    torch.save(network.state_dict(), tmp_path / "released.pth")
    convert(Request(tmp_path / "released.pth", tmp_path / "dino.safetensors"))
    backbone = load_backbone(find_backbone(str(tmp_path / "dino.safetensors")))
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    small = F.interpolate(images, (16, 16), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (module.MEAN, module.STD))
    x = network._pos_embed(network.patch_embed(((small + 1) / 2 - mean) / std))
    found = backbone(images)
    assert len(found) == 5
    for block, tokens in zip(network.blocks, found, strict=False):
        x = block(x)
        torch.testing.assert_close(tokens, x[:, 1:].transpose(1, 2))
    assert torch.equal(found[4], found[3])  # the last output, before the last norm


def test_what_is_no_backbone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    with pytest.raises(UsageError, match=r"model.safetensors of timm/vit_small_patch8_224.dino.*adversarial.backbone"):
        find_backbone(None)
    with pytest.raises(UsageError, match="is not at"):
        find_backbone(str(tmp_path / "none.safetensors"))
    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="no plain vision transformer"):
        load_backbone(file)
    weights = tiny().state_dict()
    del weights["blocks.3.mlp.fc2.bias"]
    save_file(weights | {"blocks.0.ls1.gamma": torch.zeros(16)}, file)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.3\.mlp\.fc2\.bias.*unknown: blocks\.0\.ls1\.gamma"):
        load_backbone(file)


def test_a_head_is_the_formula_of_facts_section_4():
    torch.manual_seed(1)
    head = Head(16, "instance").double()
    tokens = torch.randn(2, 16, 20, dtype=torch.float64)

    def spectral(layer):
        sigma = layer.left @ layer.weight.flatten(1) @ layer.right
        return layer.weight / sigma

    def normalised(x):
        x = x.float()  # the norms' statistics are in float32
        return ((x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()).double()

    head.point_norm.float(), head.line_norm.float()
    x = F.leaky_relu(normalised(F.conv1d(tokens, spectral(head.point), head.point.bias)), 0.2)
    ring = torch.cat([x[..., -4:], x, x[..., :4]], dim=2)  # nine tokens, the first beside the last
    line = F.leaky_relu(normalised(F.conv1d(ring, spectral(head.line), head.line.bias)), 0.2)
    expected = F.conv1d((line + x) / math.sqrt(2), spectral(head.score), head.score.bias)[:, 0]
    point = head.point_norm
    head.point_norm = nn.Sequential(point, Double())
    head.line_norm = nn.Sequential(head.line_norm, Double())
    torch.testing.assert_close(head(tokens), expected.float(), atol=1e-5, rtol=1e-5)


class Double(nn.Module):
    def forward(self, x):
        return x.double()


def test_spectral_norm_bounds_the_largest_singular_value_and_moves_only_when_told():
    torch.manual_seed(2)
    layer = SpectralConv1d(8, 6, 3).double()
    before = layer.left.clone()
    layer(torch.randn(1, 8, 10, dtype=torch.float64))
    assert torch.equal(layer.left, before)  # a forward changes nothing: micro-batches and ranks may differ in number
    for _ in range(200):
        layer.iterate()
    matrix = layer.weight.flatten(1)
    sigma = (matrix * layer.left[:, None] * layer.right).sum()
    torch.testing.assert_close(sigma, torch.linalg.svdvals(matrix)[0])
    assert set(layer.state_dict()) == {"weight", "bias", "left", "right"}  # a checkpoint has them


def test_batch_norm_is_pytorchs_in_training_and_in_evaluation():
    torch.manual_seed(3)
    ours, theirs = BatchNorm(5), nn.BatchNorm1d(5, eps=module.NORM_EPS)
    for x in torch.randn(3, 4, 5, 7) * 2 + 1:
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(value) for norm, value in zip((ours, theirs), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        weights = torch.randn_like(x)
        gradients = [torch.autograd.grad((y * weights).sum(), v) for y, v in zip(outputs, inputs, strict=True)]
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_instance_norm_sees_one_image_alone():
    norm, images = InstanceNorm(5), torch.randn(4, 5, 7)
    torch.testing.assert_close(norm(images)[1:2], norm(images[1:2]))
    assert norm(images).mean(dim=2).abs().max() < 1e-6


def test_gradients_reach_the_images_through_the_frozen_network():
    found = Discriminator(Backbone(tiny()), norm="batch").eval()
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    assert found(images).shape == (2, 5 * 16)
    (gradient,) = torch.autograd.grad(found(images).sum(), images)
    assert gradient.abs().min() > 0
    assert not found.train().backbone.network.training


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_bias_before_a_norm_has_no_gradient_so_none_is_taken(norm):
    torch.manual_seed(4)
    head, tokens = Head(8, norm), torch.randn(3, 8, 12)
    before = head(tokens)
    with torch.no_grad():
        head.point.bias += 0.5
        head.line.bias -= 0.5
    torch.testing.assert_close(head(tokens), before, atol=1e-5, rtol=1e-5)
    head(tokens).square().mean().backward()
    without = {name for name, parameter in head.named_parameters() if parameter.grad is None}
    assert without == {"point.bias", "line.bias"}


def test_a_checkpoint_of_it_holds_no_frozen_weights():
    found = Discriminator(Backbone(tiny()), norm="batch")
    names = set(found.heads.state_dict())
    assert any("running_mean" in name for name in names) and any("left" in name for name in names)
    assert not any("backbone" in name for name in names)

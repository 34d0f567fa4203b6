"""Reconstruction losses: zero at the target, their gradients, and LPIPS on weights of a local file."""

import pytest
import torch
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from raecli.errors import CheckpointError, UsageError
from raecli.losses.reconstruction import feature_loss, l1_loss, load_lpips, lpips_loss
from raecli.metrics.lpips_file import locate_vgg


def layers(images):
    return [images.square().mean(dim=1), images[..., ::2, ::2] * 3]


def test_losses_are_zero_at_the_target_and_positive_elsewhere():
    images, targets = torch.rand(2, 2, 3, 8, 8)
    assert l1_loss(images, images) == 0 == feature_loss(layers, images, images)
    assert l1_loss(images, images + 0.25).item() == pytest.approx(0.25)
    assert feature_loss(layers, images, targets) > 0


def test_the_feature_loss_is_the_mean_over_its_layers():
    images, targets = torch.rand(2, 2, 3, 8, 8)
    first = (layers(images)[0] - layers(targets)[0]).square().mean()
    second = (layers(images)[1] - layers(targets)[1]).square().mean()
    torch.testing.assert_close(feature_loss(layers, images, targets), (first + second) / 2)


def test_gradients_in_float64():
    images = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: l1_loss(x, targets), (images,))
    assert torch.autograd.gradcheck(lambda x: feature_loss(layers, x, targets), (images,))
    (gradient,) = torch.autograd.grad(l1_loss(images, targets), images)
    torch.testing.assert_close(gradient, (images - targets).sign() / images.numel())


def test_half_precision_is_compared_in_float32():
    images = torch.rand(1, 3, 8, 8).bfloat16()
    assert l1_loss(images, images + 0.25).dtype == feature_loss(layers, images, images).dtype == torch.float32


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16's convolutions with random weights, in torchvision's published layout."""
    torch.manual_seed(0)
    features = nn.Module()
    features.features = make_layers(cfgs["D"])
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(features.state_dict(), path)
    return path, features.features


def test_lpips_stands_on_the_weights_of_the_file(vgg_file):
    path, features = vgg_file
    network = load_lpips(path)
    images, targets = torch.rand(2, 2, 3, 32, 32)
    assert lpips_loss(network, images, images) == 0
    assert lpips_loss(network, images, targets) > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
    scaled = network.scaling_layer(images * 2 - 1)
    torch.testing.assert_close(network.net(scaled)[-1], features[:30](scaled))  # relu5_3


def test_the_gradient_of_lpips_in_float64(vgg_file):
    network = load_lpips(vgg_file[0]).double()
    for name in ("shift", "scale"):
        setattr(network.scaling_layer, name, getattr(network.scaling_layer, name).double())
    images, targets = torch.rand(2, 1, 3, 16, 16, dtype=torch.float64)
    images.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lpips_loss(network, x, targets), (images,), fast_mode=True)


def test_what_is_not_vgg_is_refused(tmp_path):
    with pytest.raises(UsageError, match="perceptual_weights"):
        locate_vgg(str(tmp_path / "none.pth"), "loss.perceptual_weights")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not VGG16"):
        load_lpips(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="read safely"):
        load_lpips(tmp_path / "text.pth")

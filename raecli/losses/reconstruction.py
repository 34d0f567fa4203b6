"""Reconstruction losses of the decoder: L1, and perceptual distances. App. E.2, Table 12."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from raecli.errors import CheckpointError
from raecli.store.foreign import PICKLES

Layers = Callable[[Tensor], list[Tensor]]  # images [B, 3, H, W] in [0, 1] -> feature maps


def l1_loss(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference of images around [0, 1], a scalar."""
    return (full(images) - full(targets)).abs().mean()


def feature_loss(layers: Layers, images: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference in the layers of a network of the user's, averaged over layers, a scalar."""
    pairs = zip(layers(images), layers(targets), strict=True)
    return torch.stack([(full(ours) - full(theirs)).square().mean() for ours, theirs in pairs]).mean()


def lpips_loss(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """LPIPS (Zhang et al. 2018), VGG, on images mapped to [-1, 1]; a scalar."""
    return network(full(images) * 2 - 1, full(targets) * 2 - 1).mean()


def full(values: Tensor) -> Tensor:
    """bf16 and fp16 in float32, where sums are taken; others as they are."""
    return values.float() if values.dtype.itemsize < 4 else values


def load_lpips(vgg_weights: Path) -> nn.Module:
    """The lpips package's network with its own linear heads and VGG16's published weights, frozen."""
    import lpips

    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    try:
        published = torch.load(vgg_weights, map_location="cpu", weights_only=True)
    except PICKLES as error:
        raise CheckpointError(f"{vgg_weights}: not a weights file that can be read safely: {error}") from None
    missing = []
    for slice_name, layer_slice in network.net.named_children():
        for name, parameter in layer_slice.named_parameters():
            key = f"features.{name}"
            if key not in published or published[key].shape != parameter.shape:
                missing.append(f"{slice_name}.{name}")
                continue
            parameter.data.copy_(published[key])
    if missing:
        raise CheckpointError(f"{vgg_weights}: not VGG16's weights: {', '.join(missing)} have no match")
    return network.eval().requires_grad_(False)

"""Frozen networks that images are compared in: Inception, DINOv2, a classifier of the user's, an encoder.

torch-fidelity and timm are imported where a network is loaded: figures of features and statistics need neither, and
the two cost 200 MB and seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raecli.errors import CheckpointError, InputError
from raecli.metrics.full_precision import full_float32
from raecli.metrics.inception_file import LAYER_WIDTHS, find_inception
from raecli.models.classifier import Classifier, load_classifier
from raecli.store.atomic import sha256_of

INCEPTION = "inception-v3-compat"  # torch-fidelity's name of it
DINOV2_NAME = "dinov2 without registers, class token"
POOL, SPATIAL, LOGITS, DINOV2 = (
    "pool",
    "spatial",
    "logits",
    "dinov2",
)  # layers; POOL is the one whose features FID compares: one vector an image


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network: `extract` maps uint8 images [B, 3, H, W] to features [B, D], by the layer's name."""

    extract: Callable[[Tensor], dict[str, Tensor]]
    width: int  # D of the pooled layer
    description: dict[str, Any]  # plain JSON values; name and sha256 say whether two sets of statistics may be compared
    layers: tuple[str, ...] = (POOL,)  # what `extract` gives


class Sized(Protocol):
    """Images that an encoder is chosen for: where they are from, and the size of each."""

    @property
    def path(self) -> Path:
        """For messages."""

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""


def chosen_network(
    features: str | None, inception: str | None, images: Sized | None, device: torch.device
) -> FeatureNetwork:
    """Inception; or what `features` names in its place: a classifier's file (.safetensors), or an encoder of images."""
    if features is None:
        return inception_network(inception, device)
    if features.endswith(".safetensors"):
        return classifier_network(Path(features), device)
    if images is None:
        raise InputError(f"encoder {features} has no images to see; name a classifier's file (*.safetensors) instead")
    return encoder_network(features, images, device)


def inception_network(path: str | None, device: torch.device, layers: tuple[str, ...] = (POOL,)) -> FeatureNetwork:
    """Inception's layers, as ADM's evaluator has them: among pool, spatial and logits."""
    from raecli.metrics.inception import load_inception

    found = find_inception(path)
    description = {
        "name": INCEPTION,
        "file": str(found.path),
        "sha256": found.sha256,
        "published_weights": found.published,
        "width": LAYER_WIDTHS[POOL],
        "resize": "to 299 x 299 as TensorFlow 1: bilinear, corners aligned, no antialias; then (x - 128) / 128",
        "precision": "float32, TF32 and autocast off",
    }
    network = load_inception(found.path, layers).to(device)
    return FeatureNetwork(network, LAYER_WIDTHS[POOL], description, layers)


def dinov2_network(path: str | None, device: torch.device) -> FeatureNetwork:
    """DINOv2's class token, as FDD compares it."""
    from raecli.evaluation.dinov2 import find_dinov2, load_dinov2

    found = find_dinov2(path)
    network = load_dinov2(found).to(device)
    description = {
        "name": DINOV2_NAME,
        "file": str(found),
        "sha256": sha256_of(found),
        "width": network.width,
        "depth": len(network.network.blocks),
        "resize": "to 224 x 224, bicubic with antialias, float32, not rounded; / 255, ImageNet's mean and deviation",
        "precision": "float32, TF32 and autocast off",
    }
    return FeatureNetwork(lambda images: {DINOV2: network(images)}, network.width, description, (DINOV2,))


def classifier_network(path: Path, device: torch.device) -> FeatureNetwork:
    """What a classifier's class scores are linear in."""
    classifier = rgb_classifier(path).to(device)
    side, width = classifier.image_size, classifier.config["feature_width"]
    description = {
        "name": "classifier",
        "file": str(path),
        "sha256": sha256_of(path),
        "width": width,
        "resize": f"to {side} x {side}, bilinear with antialias, where images have another size",
        "precision": "float32, TF32 and autocast off",
    }
    return FeatureNetwork(lambda images: {POOL: applied(classifier.features, images)}, width, description)


def encoder_network(name: str, images: Sized, device: torch.device) -> FeatureNetwork:
    """A representation encoder's tokens, averaged over the image."""
    from raecli.models.build import encoder_of
    from raecli.store.encoders import resolve_encoder

    if images.size[0] != images.size[1]:
        raise InputError(
            f"{images.path}: {images.size[1]} x {images.size[0]} pixels; encoder {name} needs square images"
        )
    spec = resolve_encoder(name, image_size=images.size[0])
    encoder = encoder_of(spec).to(device)
    description = {
        "name": f"{spec.name}, tokens averaged",
        "file": spec.weights,
        "sha256": spec.weights_sha256,
        "width": spec.width,
        "resize": f"to {spec.input_size} x {spec.input_size}, bicubic, no antialias, where images have another size",
        "precision": "float32, TF32 and autocast off",
    }
    return FeatureNetwork(lambda batch: {POOL: applied(encoder, batch).flatten(2).mean(2)}, spec.width, description)


def rgb_classifier(path: Path) -> Classifier:
    """A classifier of colour images: samples are always read as RGB."""
    classifier = load_classifier(path)
    if classifier.config["channels"] != 3:
        raise CheckpointError(f"{path}: takes {classifier.config['channels']} channels; samples are read as RGB, of 3")
    return classifier


@torch.no_grad()
def applied(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A network's answer to uint8 images [B, 3, H, W], shown to it as float in [0, 1]."""
    with full_float32(images.device):
        return network(images.float() / 255)

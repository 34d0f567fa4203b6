"""A small image classifier: judge of generated images, feature network of a Frechet distance, perceptual loss."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from raecli.errors import CheckpointError
from raecli.store.atomic import atomic_file
from raecli.store.json_file import parse_json


class Classifier(nn.Module):
    """Convolutions of stride 2, one hidden layer, and class scores. A design of this project, not of the paper."""

    def __init__(
        self,
        *,
        image_size: int,
        classes: int,
        channels: int = 3,
        widths: tuple[int, ...] = (24, 48, 64),
        feature_width: int = 64,
    ) -> None:
        """`image_size`: pixels a side the network works at; `widths`: channels after each convolution."""
        super().__init__()
        self.config = {
            "image_size": image_size,
            "classes": classes,
            "channels": channels,
            "widths": list(widths),
            "feature_width": feature_width,
        }
        self.image_size = image_size
        sides = -(-image_size // 2 ** len(widths))  # each convolution halves the side, rounding up
        inputs = (channels, *widths[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(inputs, widths, strict=True)
        )
        self.hidden = nn.Linear(widths[-1] * sides**2, feature_width)
        self.scores = nn.Linear(feature_width, classes)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Maps after each convolution and its ReLU: [B, widths[i], s, s], s = side / 2^(i + 1).

        images: [B, C, H, W] in [0, 1]; another side than the network's own is resized bilinearly.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        maps = []
        for convolution in self.convolutions:
            images = convolution(images).relu()
            maps.append(images)
        return maps

    def features(self, images: Tensor) -> Tensor:
        """[B, feature_width], not negative: what the class scores are linear in. Images as for `layers`."""
        return self.hidden(self.layers(images)[-1].flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores before the softmax: [B, classes]. Images as for `layers`."""
        return self.scores(self.features(images))


def save_classifier(path: Path, model: Classifier) -> None:
    """One safetensors file, its header holding what `load_classifier` builds from; complete or absent."""
    header = {"config": json.dumps({"kind": "classifier", **model.config}, sort_keys=True)}
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_file(path) as scratch:
        scratch.write_bytes(save(weights, metadata=header))


def load_classifier(path: Path) -> Classifier:
    """The classifier of a file of `save_classifier`: on the CPU, in eval mode, its weights frozen."""
    config, weights = read_file(path)
    try:
        model = Classifier(**{**config, "widths": tuple(config["widths"])})
        model.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: header and weights of this classifier do not fit together: {error}") from error
    return model.eval().requires_grad_(False)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights, or a CheckpointError that says why the file is not a classifier."""
    wanted = "a classifier is one safetensors file, as raecli's save_classifier writes it"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {wanted}")
    try:
        with safe_open(path, framework="pt") as file:
            config = parse_json(
                (file.metadata() or {}).get("config", "{}"), f"{path}: its header, a classifier's", CheckpointError
            )
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {wanted}") from error
    if config.pop("kind", None) != "classifier":
        raise CheckpointError(f"{path}: safetensors, but its header does not say kind: classifier; {wanted}")
    return config, weights

"""The Inception network of FID: torch-fidelity's port of inception-2015-12-05, without a download."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from raecli.errors import CheckpointError
from raecli.metrics.full_precision import full_float32
from raecli.metrics.inception_file import WEIGHTS_NAME
from raecli.store.foreign import PICKLES

SPATIAL_CHANNELS = 7  # of mixed_6/conv's 192: Nash et al. (2021) keep the first 7, 17 x 17 x 7 = 2023 features


class Inception(nn.Module):
    """images uint8 [B, 3, H, W] of any size -> the layers asked for, float.

    pool:    [B, 2048], pool_3 of the graph.
    spatial: [B, 2023], the first 7 channels of mixed_6's 1x1 branch after its ReLU, in (row, column, channel) order.
    logits:  [B, 1008], without bias, as ADM's Inception Score takes them; float64.

    The network resizes to 299 as TensorFlow 1 did (bilinear, corners aligned, no antialias), then (x - 128) / 128.
    Always float32: TF32 and autocast are off inside, whatever they are outside.
    """

    def __init__(self, network: FeatureExtractorInceptionV3, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.layers = layers
        self.spatial: Tensor | None = None
        if "spatial" in layers:
            network.Mixed_6d.branch1x1.register_forward_hook(self.keep_spatial)  # mixed_6 of the graph is Mixed_6d here

    def keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook: [B, 192, 17, 17] to [B, 2023]. reshape copies, so the map itself can be freed."""
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).reshape(len(output), -1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features by layer name, of uint8 images [B, 3, H, W]."""
        with full_float32(images.device):
            pool = self.network(images)[0]
        features = {"pool": pool}
        if "logits" in self.layers:  # in float64: no setting of matrix products can touch it
            features["logits"] = pool.double() @ self.network.fc.weight.double().T
        if self.spatial is not None:
            features["spatial"], self.spatial = self.spatial, None
        return {name: features[name] for name in self.layers}


def load_inception(path: Path, layers: tuple[str, ...] = ("pool",)) -> Inception:
    """The network in eval mode with the weights of `path`, on the CPU. layers: among pool, spatial and logits."""
    wanted = f"expected {WEIGHTS_NAME} of torch-fidelity's release v0.2.0"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except PICKLES as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({type(error).__name__}); {wanted}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path}: holds something else than a state dict of tensors; {wanted}")
    checked = io.BytesIO()  # the constructor unpickles whatever it is given: give it our own copy of plain tensors
    torch.save(weights, checked)
    checked.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], checked)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: these weights do not fit Inception; {wanted}: {error}"[:600]) from error
    return Inception(network, layers).eval()

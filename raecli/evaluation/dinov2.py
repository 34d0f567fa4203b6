"""DINOv2 ViT-L/14 without registers as FDD takes it: its class token after the last norm. Stein et al. (2023)."""

import os
import re
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from raecli.errors import CheckpointError, UsageError
from raecli.metrics.full_precision import full_float32
from raecli.metrics.inception_file import hub_folder
from raecli.models.encoder_weights import load_exactly, match_keys, read_weights
from raecli.store.encoder_config import IMAGENET
from raecli.store.foreign import PICKLES

SIDE, PATCH, HEAD_WIDTH = 224, 14, 64
OFFSET = 0.1  # of DINOv2's own resampling of positions: the networks without registers were trained and run with it
WEIGHTS_NAME = "dinov2_vitl14_pretrain.pth"
ENVIRONMENT_VARIABLE = "RAE_DINOV2"
UNUSED = re.compile(r"mask_token$")


def find_dinov2(path: str | None = None) -> Path:
    """The weight file: `path`, else $RAE_DINOV2, else torch hub's cache. Never downloads."""
    told = path or os.environ.get(ENVIRONMENT_VARIABLE)
    found = Path(told) if told else hub_folder() / WEIGHTS_NAME
    if not found.is_file():
        raise UsageError(
            f"FDD needs DINOv2's weights, and {found} does not exist: bring {WEIGHTS_NAME} of facebookresearch/dinov2, "
            "or model.safetensors of timm/vit_large_patch14_dinov2.lvd142m, and say --dinov2 FILE or set "
            f"${ENVIRONMENT_VARIABLE}"
        )
    return found


class DinoV2(nn.Module):
    """images uint8 [B, 3, H, W] of any size -> class token [B, 1024], float32.

    Resized to 224 x 224 by torch's bicubic with antialias, in float32 without rounding; / 255; ImageNet's mean and
    deviation. TF32 and autocast are off inside.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.network = network
        self.width: int = network.embed_dim
        self.register_buffer("mean", torch.tensor(IMAGENET[0]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET[1]).view(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Class tokens of uint8 images."""
        with full_float32(images.device):
            resized = images.float()
            if images.shape[-2:] != (SIDE, SIDE):
                resized = F.interpolate(resized, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
            return self.network.forward_features((resized / 255 - self.mean) / self.std)[:, 0]


def load_dinov2(path: Path) -> DinoV2:
    """The network in eval mode, on the CPU; its width and depth are those of the weights (1024 and 24 of ViT-L)."""
    tensors = read_tensors(path)
    width, depth = sizes_of(tensors, path)
    network = VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=width // HEAD_WIDTH,
        init_values=1e-5,
    )
    own = network.state_dict()
    match_keys(own, tensors, UNUSED, str(path))
    tensors["pos_embed"] = resampled_positions(tensors["pos_embed"], SIDE // PATCH)
    load_exactly(network, {name: tensors[name] for name in own}, str(path))
    return DinoV2(network).eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a .pth as published, in float32."""
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except PICKLES as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({type(error).__name__})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path}: holds something else than a state dict of tensors; expected {WEIGHTS_NAME}")
    return {name: tensor.float() for name, tensor in tensors.items()}


def sizes_of(tensors: dict[str, Tensor], path: Path) -> tuple[int, int]:
    """Width and depth of the network that a state dict is of; one with registers is refused."""
    if "reg_token" in tensors or "register_tokens" in tensors:
        raise CheckpointError(f"{path}: has registers; FDD is measured in DINOv2 ViT-L/14 without, {WEIGHTS_NAME}")
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
    width = tensors["cls_token"].shape[-1] if "cls_token" in tensors else 0
    if not blocks or width == 0 or width % HEAD_WIDTH:
        raise CheckpointError(f"{path}: no weights of a DINOv2; expected {WEIGHTS_NAME} (timm {timm.__version__})")
    return width, max(blocks) + 1


def resampled_positions(positions: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + n*n, C] as [1, 1 + side*side, C], as DINOv2 without registers does it.

    Bicubic without antialias, by a scale of (side + 0.1) / n: the 0.1 moves the grid a little.
    """
    before = round((positions.shape[1] - 1) ** 0.5)
    if before == side:
        return positions
    grid = positions[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / before
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)

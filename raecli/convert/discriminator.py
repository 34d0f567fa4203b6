"""The frozen DINO backbone of the released discriminator: its names are timm's. FACTS section 4."""

from pathlib import Path

import torch
from torch import Tensor

from raecli.errors import CheckpointError
from raecli.models.load import check_layout

OPTIONAL = ("norm.", "head.", "fc.")  # after the last block: the discriminator reads blocks


def check_dino(weights: dict[str, Tensor], path: Path) -> tuple[int, int]:
    """Depth and width of a plain ViT in timm's layout. CheckpointError with every key that does not belong."""
    patch = weights.get("patch_embed.proj.weight")
    if patch is None or patch.dim() != 4:
        raise CheckpointError(f"{path}: no patch_embed.proj.weight of a vision transformer")
    width = patch.shape[0]
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    shapes = {
        "patch_embed.proj.weight": tuple(patch.shape),
        "patch_embed.proj.bias": (width,),
        "cls_token": (1, 1, width),
    }
    shapes["pos_embed"] = (1, weights["pos_embed"].shape[1] if "pos_embed" in weights else 0, width)
    for index in range(depth):
        for name, outputs, inputs in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"blocks.{index}.{name}.weight"] = (outputs * width, inputs * width)
            shapes[f"blocks.{index}.{name}.bias"] = (outputs * width,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{index}.{name}"] = (width,)
    found = {name: value for name, value in weights.items() if not name.startswith(OPTIONAL)}
    check_layout(found, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, path)
    return depth, width

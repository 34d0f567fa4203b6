"""A Hugging Face folder's weights into timm's VisionTransformer, for DINOv2, SigLIP and MAE of any size."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from raecli.models.encoder_weights import load_exactly, match_keys, read_weights, resample_positions
from raecli.store.encoder_config import FolderConfig, read_folder_config

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}

# timm's name of a module in a block to Hugging Face's, or to the three that timm keeps as one.
Names = dict[str, tuple[str, ...]]

QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
DINOV2_BLOCK: Names = {
    "norm1": ("norm1",),
    "attn.qkv": QKV,
    "attn.proj": ("attention.output.dense",),
    "ls1": ("layer_scale1",),
    "norm2": ("norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
    "ls2": ("layer_scale2",),
}
SWIGLU_BLOCK: Names = DINOV2_BLOCK | {"mlp.fc1": ("mlp.weights_in",), "mlp.fc2": ("mlp.weights_out",)}
SIGLIP_BLOCK: Names = {
    "norm1": ("layer_norm1",),
    "attn.qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "attn.proj": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
MAE_BLOCK: Names = {
    "norm1": ("layernorm_before",),
    "attn.qkv": QKV,
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
STEM: Names = {
    "cls_token": ("embeddings.cls_token",),
    "reg_token": ("embeddings.register_tokens",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj.weight": ("embeddings.patch_embeddings.projection.weight",),
    "patch_embed.proj.bias": ("embeddings.patch_embeddings.projection.bias",),
}
SIGLIP_STEM: Names = {
    "pos_embed": ("embeddings.position_embedding.weight",),
    "patch_embed.proj.weight": ("embeddings.patch_embedding.weight",),
    "patch_embed.proj.bias": ("embeddings.patch_embedding.bias",),
}

# What stands before the vision tower's names where a larger model was saved.
TOWERS = {"dinov2": ("dinov2_with_registers.", "dinov2."), "siglip": ("vision_model.",), "mae": ("vit.",)}
# The last LayerNorm's affine, pooling heads, classifiers, mask tokens, MAE's decoder, SigLIP's text tower.
UNUSED = re.compile(
    r"(layernorm|post_layernorm|head|classifier|decoder|text_model)\."
    r"|embeddings\.(mask_token|position_ids)$|logit_(scale|bias)$"
)


def build_folder_backbone(
    path: str | Path, weights: str | Path, *, input_size: int, position_antialias: bool
) -> VisionTransformer:
    """The folder's network with its weights, without its last LayerNorm. input_size: pixels a side."""
    config = read_folder_config(Path(path))
    backbone = make_folder_backbone(config, input_size)
    tensors = _without_tower(read_weights(weights), TOWERS[config.family])
    names = {own: _hugging_face_names(own, config) for own in backbone.state_dict()}
    match_keys([name for parts in names.values() for name in parts], tensors, UNUSED, str(weights))
    own = {own: torch.cat([tensors[part] for part in parts]) for own, parts in names.items()}
    _place_positions(own, backbone.patch_embed.num_patches, position_antialias)
    load_exactly(backbone, own, str(weights))
    return backbone


def make_folder_backbone(config: FolderConfig, input_size: int) -> VisionTransformer:
    """timm's network of the folder's sizes, its weights not set. The encoder has the last LayerNorm instead."""
    mlp_width = 2 * config.mlp_width if config.swiglu else config.mlp_width  # SwiGLU's two halves lie in one matrix
    mlp_layer: Any = SwiGLUPacked if config.swiglu else Mlp
    backbone = VisionTransformer(
        img_size=input_size,
        patch_size=config.patch_size,
        num_classes=0,
        global_pool="",
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=(mlp_width + 0.5) / config.width,  # timm truncates the product: half a channel more keeps it exact
        qkv_bias=config.qkv_bias,
        init_values=1.0 if config.family == "dinov2" else None,
        class_token=config.prefix_tokens > 0,
        no_embed_class=True,
        reg_tokens=config.registers,
        weight_init="skip",
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        act_layer="silu" if config.swiglu else ACTIVATIONS[config.activation],
        mlp_layer=mlp_layer,
    )
    backbone.norm = nn.Identity()
    return backbone


def _hugging_face_names(own: str, config: FolderConfig) -> tuple[str, ...]:
    """Where timm's tensor `own` comes from: one name, or query, key and value to be joined."""
    if not own.startswith("blocks."):
        return (SIGLIP_STEM if config.family == "siglip" else STEM)[own]
    _, index, rest = own.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    blocks = {"dinov2": SWIGLU_BLOCK if config.swiglu else DINOV2_BLOCK, "siglip": SIGLIP_BLOCK, "mae": MAE_BLOCK}
    layer = "encoder.layers" if config.family == "siglip" else "encoder.layer"
    kind = "lambda1" if kind == "gamma" else kind
    return tuple(f"{layer}.{index}.{name}.{kind}" for name in blocks[config.family][module])


def _place_positions(own: dict[str, Tensor], tokens: int, antialias: bool) -> None:
    """Fold the class token's position into it, which timm's layout asks for, and resample the grid's."""
    positions = own["pos_embed"].reshape(1, -1, own["pos_embed"].shape[-1])  # SigLIP's is [N, C]
    prefix = int("cls_token" in own)
    positions = resample_positions(positions, tokens, prefix=prefix, antialias=antialias)
    if prefix:
        own["cls_token"] = own["cls_token"] + positions[:, :1]
    own["pos_embed"] = positions[:, prefix:]


def _without_tower(tensors: dict[str, Tensor], towers: tuple[str, ...]) -> dict[str, Tensor]:
    """Take the vision tower's prefix off the names that have it."""
    pattern = re.compile("|".join(re.escape(tower) for tower in towers))
    return {pattern.sub("", name, count=1) if pattern.match(name) else name: tensor for name, tensor in tensors.items()}

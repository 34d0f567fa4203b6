"""Names of a Hugging Face encoder's tensors: as published, and as later versions of transformers hold them.

diffusers saves the names of the transformers that it runs with. Published folders have the ones of transformers 5.3;
later versions renamed the modules, family by family, and diffusers 0.42 does not translate. Read in the modelling files
of 5.3.0, 5.4.0, 5.6.0, 5.9.0, 5.16.1, 5.20.2 and 5.23.0: where a version between two of them changed, the later counts.
"""

import math
import re

import torch
from torch import Tensor

from raecli.errors import UsageError

PUBLISHED = "5.3.0"
RENAMED = {"dinov2": (5, 20), "mae": (5, 9), "siglip": (5, 6)}  # first known transformers with the later names

ATTENTION = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
LATER: dict[str, dict[str, str]] = {
    "dinov2": ATTENTION,
    "mae": ATTENTION | {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"},
    "siglip": {},
}
LAYER = re.compile(r"(?:encoder\.layers?|layers)\.(\d+)\.(.+)\.([a-z0-9]+)")


def published_name(name: str, family: str) -> str:
    """A tensor's name as in the published folders, whatever transformers wrote it."""
    if family == "siglip":
        return name if name.startswith("vision_model.") else f"vision_model.{name}"
    layer = LAYER.fullmatch(name)
    if layer is None:
        return name
    modules = {later: published for published, later in LATER[family].items()}
    return f"encoder.layer.{layer[1]}.{modules.get(layer[2], layer[2])}.{layer[3]}"


def name_for(name: str, family: str, version: tuple[int, ...]) -> str:
    """A published name as this version of transformers holds it."""
    if version < RENAMED[family]:
        return name
    if family == "siglip":
        return name.removeprefix("vision_model.")
    layer = LAYER.fullmatch(name)
    if layer is None:
        return name
    stack = "layers" if family == "mae" else "encoder.layer"
    return f"{stack}.{layer[1]}.{LATER[family].get(layer[2], layer[2])}.{layer[3]}"


def version_numbers(version: str) -> tuple[int, ...]:
    """(5, 23) of "5.23.0"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise UsageError(f"--set transformers={version}: a version reads like {PUBLISHED}")
    return int(match[1]), int(match[2])


# timm's modules in a block to Hugging Face's; qkv apart.
TIMM_BLOCK: dict[str, dict[str, str]] = {
    "dinov2": {"attn.proj": "attention.output.dense"},
    "mae": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "siglip": {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"},
}
TIMM_STEM = {
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
}
TIMM_SIGLIP_STEM = {
    "patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
}


def published_from_timm(weights: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """timm's weights under the published names; the last LayerNorm, pooling and heads are left out."""
    siglip = family == "siglip"
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.([a-z0-9]+)", name)
        if block is None:
            stem = (TIMM_SIGLIP_STEM if siglip else TIMM_STEM).get(name)
            renamed |= {} if stem is None else {stem: value}
            continue
        index, module, kind = block[1], block[2], block[3]
        prefix = f"vision_model.encoder.layers.{index}" if siglip else f"encoder.layer.{index}"
        if module == "attn.qkv":
            parts = [f"self_attn.{part}_proj" for part in "qkv"] if siglip else list(ATTENTION)[:3]
            for part, tensor in zip(parts, value.chunk(3), strict=True):
                renamed[f"{prefix}.{part}.{kind}"] = tensor
        elif kind == "gamma":
            renamed[f"{prefix}.layer_scale{module[-1]}.lambda1"] = value
        else:
            renamed[f"{prefix}.{TIMM_BLOCK[family].get(module, module)}.{kind}"] = value
    return renamed | timm_positions(weights, family)


def timm_positions(weights: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Position embeddings and class token; where timm has the class token's position folded into it, that is 0."""
    positions = weights["pos_embed"]
    if family == "siglip":
        return {"vision_model.embeddings.position_embedding.weight": positions[0]}
    if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        none = torch.zeros_like(positions[:, :1])
        positions = torch.cat([none, positions], dim=1)
    return {"embeddings.position_embeddings": positions, "embeddings.cls_token": weights["cls_token"]}

"""Names of the authors' released state dicts, and ours. FACTS from bytetriper/RAE, January 2026."""

import re

import torch
from torch import Tensor

from raecli.errors import CheckpointError

# Tables and buffers that we compute instead of loading.
COMPUTED = re.compile(r"pos_embed|decoder_pos_embed|(enc_|dec_)?feat_rope\.freqs_(cos|sin)")

BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.w12": "mlp.gate_and_value",
    "mlp.w3": "mlp.out",
    "adaLN_modulation.1": "modulation",
}
SHARED = {
    "t_embedder.W": "time_embed.frequencies",
    "t_embedder.mlp": "time_embed.mlp",
    "y_embedder.embedding_table": "label_embed",
    "final_layer.norm_final": "final.norm",
    "final_layer.linear": "final.linear",
    "final_layer.adaLN_modulation.1": "final.modulation",
}
DIT = SHARED | {"x_embedder.proj": "patch_embed.linear"}
DIT_DH = SHARED | {
    "x_embedder.proj": "head_patch_embed.linear",
    "s_embedder.proj": "patch_embed.linear",
    "s_projector": "project",
}
DECODER_LAYER = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attention.out",
    "intermediate.dense": "mlp_in",
    "output.dense": "mlp_out",
}
QKV = ("query", "key", "value")
DECODER = {
    "trainable_cls_token": "class_token",
    "decoder_embed": "embed",
    "decoder_norm": "norm",
    "decoder_pred": "predict",
}


def renamed(key: str, names: dict[str, str]) -> str | None:
    """The key with its longest known beginning replaced; None if none is known."""
    for old in sorted(names, key=len, reverse=True):
        if key == old or key.startswith(old + "."):
            return names[old] + key[len(old) :]
    return None


def diffusion_from_official(weights: dict[str, Tensor], *, backbone_depth: int | None) -> dict[str, Tensor]:
    """A released DiT (backbone_depth None) or DiT-DH state dict under our names.

    DiT-DH counts backbone and head blocks in one list: the first `backbone_depth` are the backbone's.
    Raises CheckpointError with the list of keys that have no place.
    """
    names = DIT if backbone_depth is None else DIT_DH
    ours, unknown = {}, []
    for key, value in weights.items():
        if COMPUTED.fullmatch(key):
            continue
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        name = renamed(block[2], BLOCK) if block else renamed(key, names)
        if name is None:
            unknown.append(key)
            continue
        if block:
            name = f"{block_home(int(block[1]), backbone_depth)}.{name}"
        ours[name] = value.flatten(1) if key.endswith("embedder.proj.weight") else value
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys are not a DiT's: {', '.join(sorted(unknown))}")
    return ours


def block_home(index: int, backbone_depth: int | None) -> str:
    """Where block `index` of the released list lives in ours."""
    if backbone_depth is None:
        return f"blocks.{index}"
    return f"backbone.{index}" if index < backbone_depth else f"head.{index - backbone_depth}"


def decoder_from_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released ViT decoder's state dict under our names; query, key and value become one qkv."""
    ours, unknown = {}, []
    for key, value in weights.items():
        layer = re.fullmatch(r"decoder_layers\.(\d+)\.(.+)", key)
        if COMPUTED.fullmatch(key) or (
            layer and layer[2].startswith(("attention.attention.key.", "attention.attention.value."))
        ):
            continue
        if layer and layer[2].startswith("attention.attention.query."):
            names = [key.replace(".query.", f".{part}.") for part in QKV]
            missing = [name for name in names if name not in weights]
            if missing:
                raise CheckpointError(f"{len(missing)} keys of a decoder are missing: {', '.join(missing)}")
            parts = [weights[name] for name in names]
            ours[f"blocks.{layer[1]}.attention.qkv.{key.rpartition('.')[2]}"] = torch.cat(parts)
            continue
        name = renamed(layer[2], DECODER_LAYER) if layer else renamed(key, DECODER)
        if name is None:
            unknown.append(key)
            continue
        ours[f"blocks.{layer[1]}.{name}" if layer else name] = value
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys are not a decoder's: {', '.join(sorted(unknown))}")
    return ours


def inverse(names: dict[str, str]) -> dict[str, str]:
    """Our names to the release's."""
    return {ours: released for released, ours in names.items()}


def diffusion_to_official(
    weights: dict[str, Tensor], *, backbone_depth: int | None, patch_size: int, tables: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Our DiT (backbone_depth None) or DiT-DH under the released names, with the tables that the release saves."""
    names = inverse(DIT if backbone_depth is None else DIT_DH)
    released = dict(tables)
    for key, value in weights.items():
        block = re.fullmatch(r"(blocks|backbone|head)\.(\d+)\.(.+)", key)
        if block:
            index = int(block[2]) + ((backbone_depth or 0) if block[1] == "head" else 0)
            name = f"blocks.{index}.{renamed(block[3], inverse(BLOCK))}"
        else:
            name = str(renamed(key, names))
        if name.endswith("embedder.proj.weight"):
            value = value.unflatten(1, (-1, patch_size, patch_size))
        released[name] = value
    return released


def decoder_to_official(weights: dict[str, Tensor], tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our decoder under the released names; qkv becomes query, key and value."""
    released = dict(tables)
    for key, value in weights.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if block is None:
            released[str(renamed(key, inverse(DECODER)))] = value
        elif block[2].startswith("attention.qkv."):
            kind = block[2].rpartition(".")[2]
            for part, tensor in zip(QKV, value.chunk(3), strict=True):
                released[f"decoder_layers.{block[1]}.attention.attention.{part}.{kind}"] = tensor
        else:
            released[f"decoder_layers.{block[1]}.{renamed(block[2], inverse(DECODER_LAYER))}"] = value
    return released

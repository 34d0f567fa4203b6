"""Names of the authors' released state dicts, and ours. FACTS from bytetriper/RAE, January 2026."""

import re

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
    import torch

    ours, unknown = {}, []
    for key, value in weights.items():
        layer = re.fullmatch(r"decoder_layers\.(\d+)\.(.+)", key)
        if COMPUTED.fullmatch(key) or (
            layer and layer[2].startswith(("attention.attention.key.", "attention.attention.value."))
        ):
            continue
        if layer and layer[2].startswith("attention.attention.query."):
            parts = [weights[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
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

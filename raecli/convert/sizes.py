"""Sizes of a released model, told by the shapes of its tensors. FACTS sections 1 and 2."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from raecli.convert.settings import Settings
from raecli.errors import CheckpointError, UsageError

# (width, depth, mlp_width) -> heads of the released decoders, Table 1b: their files tell no heads
DECODER_HEADS = {(768, 12, 3072): 12, (1024, 24, 4096): 16, (1152, 28, 4096): 16}


def shape_of(weights: dict[str, Tensor], names: tuple[str, ...], path: Path) -> list[tuple[int, ...]]:
    """Shapes of tensors that the sizes are read from. CheckpointError with all that are missing."""
    missing = [name for name in names if name not in weights]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} keys are missing: {', '.join(missing)}")
    return [tuple(weights[name].shape) for name in names]


def depth_of(weights: dict[str, Tensor], prefix: str) -> int:
    """Blocks under a prefix, told by their numbers."""
    numbers = {int(name.split(".")[1]) for name in weights if name.startswith(prefix) and name.split(".")[1].isdigit()}
    return max(numbers) + 1 if numbers else 0


def side_of(tokens: int, what: str, path: Path) -> int:
    """Tokens along one side of a square."""
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise CheckpointError(f"{path}: {what} has {tokens} tokens, which is no square")
    return side


def decoder_sizes(weights: dict[str, Tensor], settings: Settings, path: Path) -> dict[str, Any]:
    """DecoderSpec's fields, and `in_channels` and `tokens_side` (None where the file has no positions)."""
    names = ("decoder_embed.weight", "decoder_pred.weight", "decoder_layers.0.intermediate.dense.weight")
    embed, predict, mlp = shape_of(weights, names, path)
    width, depth, mlp_width = embed[0], depth_of(weights, "decoder_layers."), mlp[0]
    heads = settings.get("heads") or DECODER_HEADS.get((width, depth, mlp_width))
    if heads is None:
        raise UsageError(
            f"{path}: a decoder of width {width}, depth {depth}, mlp width {mlp_width} is none of the released; "
            "its file does not tell its attention heads: give --set heads=N"
        )
    if width % heads:
        raise UsageError(f"--set heads={heads}: does not divide the decoder's width of {width}")
    positions = weights.get("decoder_pos_embed")
    tokens = None if positions is None else side_of(positions.shape[1] - 1, "decoder_pos_embed", path)
    patch_size = side_of(predict[0] // 3, "a patch of decoder_pred", path)
    return {
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_width": mlp_width,
        "patch_size": patch_size,
        "in_channels": embed[1],
        "tokens_side": tokens,
    }


def diffusion_sizes(weights: dict[str, Tensor], settings: Settings, path: Path) -> dict[str, Any]:
    """DiffusionModelSpec's fields. Heads come from the RoPE tables, whose last dimension is a head's channels."""
    is_head = "s_embedder.proj.weight" in weights
    backbone = "s_embedder.proj.weight" if is_head else "x_embedder.proj.weight"
    names = (backbone, "x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight")
    embed, final, positions, labels = shape_of(weights, (*names[:2], *names[2:]), path)
    (width, channels, patch_size, _), head_width = embed, final[0]
    depth, head_depth = depths_of(weights, width, head_width, is_head, settings, path)
    sizes = {
        "kind": "dit_dh" if is_head else "dit",
        "width": width,
        "depth": depth,
        "heads": heads_of(weights, "enc_feat_rope" if is_head else "feat_rope", width, "heads", settings, path),
        "patch_size": patch_size,
        "mlp_ratio": mlp_ratio_of(weights, width, settings, path),
        "in_channels": channels,
        "input_size": side_of(positions[1], "pos_embed", path) * patch_size,
        "num_classes": labels[0] - 1,  # the last row is the null label
    }
    if is_head:
        sizes["head_width"], sizes["head_depth"] = head_width, head_depth
        sizes["head_heads"] = heads_of(weights, "dec_feat_rope", head_width, "head_heads", settings, path)
    return sizes


def depths_of(
    weights: dict[str, Tensor], width: int, head_width: int, is_head: bool, settings: Settings, path: Path
) -> tuple[int, int]:
    """Blocks of the backbone and of the head, which the release counts in one list; the head's are as wide as it is."""
    total = depth_of(weights, "blocks.")
    if not is_head:
        return total, 0
    if width == head_width:
        head_depth = settings.get("head_depth", 2)  # the release's default
    else:
        norms = [weights.get(f"blocks.{index}.norm1.weight") for index in range(total)]
        head_depth = sum(norm is not None and norm.shape[0] == head_width for norm in norms)
    if not 0 < head_depth < total:
        raise CheckpointError(f"{path}: of {total} blocks {head_depth} are the head's; a DiT-DH has backbone and head")
    return total - head_depth, head_depth


def heads_of(weights: dict[str, Tensor], table: str, width: int, key: str, settings: Settings, path: Path) -> int:
    """Attention heads: the width divided by the channels of the rotary table."""
    cosines = weights.get(f"{table}.freqs_cos")
    told = settings.get(key)
    if cosines is None and told is None:
        raise UsageError(f"{path}: no {table}.freqs_cos, which tells the attention heads; give --set {key}=N")
    heads = told if cosines is None else width // cosines.shape[-1]
    if heads is None or heads < 1 or width % heads:
        raise CheckpointError(f"{path}: {heads} attention heads do not divide a width of {width}")
    if told is not None and told != heads:
        raise UsageError(f"--set {key}={told}: the table {table}.freqs_cos tells {heads}")
    return int(heads)


def mlp_ratio_of(weights: dict[str, Tensor], width: int, settings: Settings, path: Path) -> float:
    """The feed-forward's ratio: SwiGLU's hidden width is int(2/3 int(ratio width))."""
    ratio = float(settings.get("mlp_ratio", 4.0))
    (gate,) = shape_of(weights, ("blocks.0.mlp.w12.weight",), path)
    hidden = int(2 / 3 * int(ratio * width))
    if gate[0] != 2 * hidden:
        raise UsageError(
            f"{path}: blocks.0.mlp.w12 has {gate[0]} rows; mlp_ratio {ratio:g} gives {2 * hidden}: "
            f"give --set mlp_ratio=R (near {gate[0] / 2 * 1.5 / width:.4g})"
        )
    return ratio

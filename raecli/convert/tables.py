"""Position tables that the release saves with its weights and that we compute."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from raecli.errors import CheckpointError
from raecli.models.layers import rotary_angles, sincos_positions
from raecli.recipe.blocks import DiffusionModelSpec


def rotary_tables(name: str, side: int, head_channels: int) -> dict[str, Tensor]:
    """Cosines and sines [N, head_channels]: each angle twice, for the pair of channels that it turns."""
    angles = rotary_angles(side, head_channels).repeat_interleave(2, dim=-1)
    return {f"{name}.freqs_cos": angles.cos(), f"{name}.freqs_sin": angles.sin()}


def diffusion_tables(spec: DiffusionModelSpec) -> dict[str, Tensor]:
    """Tables of a DiT or DiT-DH under the released names."""
    assert spec.input_size is not None, "the spec is resolved"
    side = spec.input_size // spec.patch_size
    tables = {"pos_embed": sincos_positions(side, spec.width)[None]}
    if spec.kind == "dit":
        return tables | rotary_tables("feat_rope", side, spec.width // spec.heads)
    assert spec.head_width is not None and spec.head_heads is not None, "checked by the spec"
    tables |= rotary_tables("enc_feat_rope", side, spec.width // spec.heads)
    return tables | rotary_tables("dec_feat_rope", side, spec.head_width // spec.head_heads)


def decoder_tables(side: int, width: int) -> dict[str, Tensor]:
    """The decoder's positions [1, 1 + N, width]; the class token's row is 0."""
    return {"decoder_pos_embed": F.pad(sincos_positions(side, width), (0, 0, 1, 0))[None]}


def check_tables(found: dict[str, Tensor], tables: dict[str, Tensor], path: Path) -> None:
    """Refuse a model whose positions are not the ones that we compute: its outputs would differ."""
    for name, table in tables.items():
        if name not in found:
            continue
        tolerance = 1e-4 if found[name].dtype.itemsize >= 4 else 1e-2  # bf16 has a step of 4e-3 below 1
        furthest = float((found[name].float() - table).abs().max())
        if not furthest <= tolerance:
            raise CheckpointError(f"{path}: {name} is not the released table: it differs by up to {furthest:.3g}")

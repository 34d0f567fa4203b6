"""The authors' released code, from a checkout of bytetriper/RAE that the user names, with a model's weights as ours.

Its own requirements: pip install einops torchdiffeq omegaconf transformers regex. Nothing of it is copied here.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from raecli.convert.official import diffusion_to_official
from raecli.recipe.blocks import DiffusionModelSpec

TABLES = ("pos_embed", "feat_rope")  # what the release saves and we compute


def released_code(checkout: Path) -> SimpleNamespace:
    """What a step needs of it: the two models, `create_transport` and `update_ema`."""
    sys.path.insert(0, str(checkout / "src"))
    from stage2.models.DDT import DiTwDDTHead
    from stage2.models.lightningDiT import LightningDiT
    from stage2.transport import create_transport
    from utils.train_utils import update_ema

    return SimpleNamespace(
        dit_dh=DiTwDDTHead, dit=LightningDiT, create_transport=create_transport, update_ema=update_ema
    )


def released_model(code: SimpleNamespace, spec: DiffusionModelSpec, weights: dict[str, Tensor]) -> nn.Module:
    """The released model of a spec (resolved) with our weights. Label dropout is off: both sides get labels dropped."""
    shared = {
        "input_size": spec.input_size,
        "in_channels": spec.in_channels,
        "num_classes": spec.num_classes,
        "mlp_ratio": spec.mlp_ratio,
        "patch_size": spec.patch_size,
    }
    if spec.kind == "dit_dh":
        model = code.dit_dh(
            hidden_size=[spec.width, spec.head_width],
            depth=[spec.depth, spec.head_depth],
            num_heads=[spec.heads, spec.head_heads],
            **shared,
        )
    else:
        model = code.dit(hidden_size=spec.width, depth=spec.depth, num_heads=spec.heads, **shared)
    tables = {name: value for name, value in model.state_dict().items() if any(word in name for word in TABLES)}
    depth = spec.depth if spec.kind == "dit_dh" else None
    model.load_state_dict(
        diffusion_to_official(weights, backbone_depth=depth, patch_size=spec.patch_size, tables=tables)
    )
    model.y_embedder.dropout_prob = 0.0
    return model


def largest_difference(ours: nn.Module, theirs: nn.Module, latents: Tensor, t: Tensor, labels: Tensor) -> float:
    """Of the two velocities, on the same input, eval mode."""
    with torch.no_grad():
        difference = ours(latents, t, labels) - theirs.eval()(latents, t, labels)
    theirs.train()
    return float(difference.abs().max())

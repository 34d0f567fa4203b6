"""The frozen representation encoder: images to a map of latents. App. E.1; FACTS section 1.

timm takes as long to import as torch: it is where a network is built, for stages that only know the class.
"""

import re
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raecli.errors import CheckpointError, UsageError
from raecli.models.encoder_weights import load_exactly, match_keys, read_weights, resample_positions

# Of timm's layout: the last LayerNorm's affine, pooling and classifying heads, mask tokens, rotary tables.
UNUSED = re.compile(r"(norm|fc_norm|head|head_dist|pre_logits|attn_pool|lm_head)\.|mask_token$|rope\.(periods|freqs)$")


class Encoder(nn.Module):
    """A vision transformer without its head and prefix tokens, frozen and in evaluation for good."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Any,
        *,
        input_size: int,
        patch_size: int,
        width: int,
        prefix_tokens: int,
        norm_eps: float,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        layers: str = "last",
    ) -> None:
        """backbone: `forward_features` gives tokens [B, prefix_tokens + h*w, width] before the last LayerNorm.

        layers: "last", or "sum:K" for the sum of the last K blocks.
        """
        super().__init__()
        self.backbone = backbone
        self.input_size, self.tokens_side = input_size, input_size // patch_size
        self.width, self.prefix_tokens, self.norm_eps = width, prefix_tokens, norm_eps
        self.summed_blocks = 0 if layers == "last" else int(layers.removeprefix("sum:"))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation, whatever the module around asks."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W], float in [0, 1]. Returns latents [B, width, h, w], un-normalised, rows first.

        Each token has mean 0 and variance 1 over its channels: the last LayerNorm keeps no affine. That holds for a
        sum of blocks too, because the LayerNorm comes once, after the sum.
        """
        side = (self.input_size, self.input_size)
        if images.shape[-2:] != side:
            images = F.interpolate(images, size=side, mode="bicubic", align_corners=False, antialias=False)
        tokens = F.layer_norm(self.tokens((images - self.mean) / self.std), (self.width,), eps=self.norm_eps)
        return tokens.transpose(1, 2).reshape(len(images), self.width, self.tokens_side, self.tokens_side).contiguous()

    def tokens(self, pixels: Tensor) -> Tensor:
        """Tokens [B, h*w, width] before the last LayerNorm. pixels: [B, 3, input_size, input_size], standardised.

        The paper takes the last block's. A sum adds up the hidden states of the last blocks, each as it is on the
        residual stream, un-normalised: the earlier ones keep detail that the last one drops.
        """
        if not self.summed_blocks:
            return self.backbone.forward_features(pixels)[:, self.prefix_tokens :]
        hidden = self.backbone.forward_intermediates(
            pixels, indices=self.summed_blocks, output_fmt="NLC", intermediates_only=True
        )
        return sum(hidden[1:], hidden[0])


def build_encoder(
    *,
    loader: Literal["timm", "folder"],
    architecture: str,
    path: str | None,
    weights: str,
    family: str,
    input_size: int,
    patch_size: int,
    width: int,
    prefix_tokens: int,
    norm_eps: float,
    position_antialias: bool,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    layers: str = "last",
) -> Encoder:
    """Build an encoder as its EncoderSpec tells, in fp32 on the CPU, every key of its weights accounted for."""
    if loader == "folder":
        from raecli.models.encoder_folder import build_folder_backbone

        assert path is not None, "a folder's encoder has a path"
        backbone: nn.Module = build_folder_backbone(
            path, weights, input_size=input_size, position_antialias=position_antialias
        )
    else:
        backbone = make_timm_backbone(architecture, family=family, input_size=input_size, norm_eps=norm_eps)
        load_timm_weights(backbone, weights, position_antialias=position_antialias)
    _check_shape(backbone, architecture, width=width, patch_size=patch_size, prefix_tokens=prefix_tokens)
    _check_depth(backbone, architecture, layers)
    return Encoder(
        backbone,
        input_size=input_size,
        patch_size=patch_size,
        width=width,
        prefix_tokens=prefix_tokens,
        norm_eps=norm_eps,
        mean=mean,
        std=std,
        layers=layers,
    )


def make_timm_backbone(architecture: str, *, family: str, input_size: int, norm_eps: float) -> nn.Module:
    """timm's network, its weights not set, without its last LayerNorm, which the encoder has.

    Two families are turned into what transformers runs, because the released autoencoders ran that: SigLIP2 has
    tanh's GELU (its config says gelu_pytorch_tanh; timm's two models of ours have the exact one), MAE has norm_eps
    1e-12 in every block (timm: 1e-6). DINOv2 and DINOv3 are the same in both.
    """
    import timm

    options: dict[str, Any] = {"act_layer": "gelu_tanh"} if family == "siglip" else {}
    if not timm.is_model(architecture):
        raise UsageError(f"encoder {architecture}: this machine's timm {timm.__version__} has no such model")
    backbone = timm.create_model(
        architecture, pretrained=False, num_classes=0, global_pool="", img_size=input_size, **options
    )
    backbone.norm = nn.Identity()
    if family == "mae":
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
    return backbone


def load_timm_weights(backbone: Any, weights: str, *, position_antialias: bool) -> None:
    """Weights in timm's layout, their position embeddings resampled where the grid differs."""
    own = backbone.state_dict()
    tensors = read_weights(weights)
    match_keys(own, tensors, UNUSED, weights)
    if "pos_embed" in own:
        prefix = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
        tokens = own["pos_embed"].shape[1] - prefix
        positions = tensors["pos_embed"]
        tensors["pos_embed"] = resample_positions(positions, tokens, prefix=prefix, antialias=position_antialias)
    load_exactly(backbone, {name: tensors[name] for name in own}, weights)


def _check_shape(backbone: Any, architecture: str, **told: int) -> None:
    """Refuse a network that is not as the spec tells: its config.json was changed, or timm was."""
    found = {
        "width": backbone.embed_dim,
        "patch_size": backbone.patch_embed.patch_size[0],
        "prefix_tokens": backbone.num_prefix_tokens,
    }
    wrong = [f"{name} is {found[name]}, the spec says {value}" for name, value in told.items() if found[name] != value]
    if wrong:
        raise CheckpointError(f"encoder {architecture}: not the network that was described; {'; '.join(wrong)}")


def _check_depth(backbone: Any, architecture: str, layers: str) -> None:
    """Refuse a sum of more blocks than there are."""
    depth = len(backbone.blocks)
    if layers != "last" and int(layers.removeprefix("sum:")) > depth:
        raise CheckpointError(f"encoder {architecture}: layers is {layers}, but it has {depth} blocks")

"""The ViT decoder of a Representation Autoencoder: ViT-MAE's decoder, from a latent map to pixels. App. E.2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raecli.models.layers import sincos_positions, unpatchify

NORM_EPS = 1e-12  # as the release's configuration says


class DecoderAttention(nn.Module):
    """Plain self-attention with fused, biased qkv."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.out(mixed.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = DecoderAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))


class Decoder(nn.Module):
    """Latents [B, C, h, w] to pixels [B, 3, h p, w p] in the encoder's normalised pixel space, p the patch size.

    Sizes of Table 1b: B 768/12/12/3072, L 1024/24/16/4096, XL 1152/28/16/4096 (width, depth, heads, mlp_width).
    """

    def __init__(
        self, *, in_channels: int, tokens_side: int, width: int, depth: int, heads: int, mlp_width: int, patch_size: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Linear(in_channels, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, mlp_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predict = nn.Linear(width, patch_size**2 * 3)
        positions = F.pad(sincos_positions(tokens_side, width), (0, 0, 1, 0))  # the class token's row is 0
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """latents: un-normalised, [B, C, h, w]."""
        tokens = self.embed(latents.flatten(2).transpose(1, 2))
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1).type_as(tokens), tokens], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return unpatchify(self.predict(self.norm(x))[:, 1:], self.patch_size)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradient balances the adversarial term in the release."""
        return self.predict.weight

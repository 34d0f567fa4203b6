"""The pieces that transformers here share: positions, normalisation, attention, feed-forward, conditioning."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raecli.models.fused import gated_hidden, gated_sum, modulated_norm, rotated_heads
from raecli.models.products import Linear


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, float32 [side * side, width], row-major. MAE (He et al. 2021), App. A.

    The first half of the channels tells the column, the second the row; each half is [sin | cos] with
    frequencies 10000^(-i / (width/4)). Computed in float64, as the release does.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    phase = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [side, width/4]
    line = torch.cat([phase.sin(), phase.cos()], dim=1)  # [side, width/2]
    columns = line.repeat(side, 1)
    rows = line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def rotary_angles(side: int, head_channels: int) -> Tensor:
    """Angles of 2-D rotary positions, float32 [side * side, head_channels / 2], one a channel pair.

    The first half of the pairs turns with the row, the second with the column: the opposite of sincos_positions.
    """
    pairs = head_channels // 4
    frequencies = 10000.0 ** -(torch.arange(pairs, dtype=torch.float32) * 2 / (head_channels // 2))
    phase = torch.arange(side, dtype=torch.float32)[:, None] * frequencies  # [side, pairs]
    rows = phase.repeat_interleave(side, dim=0)
    columns = phase.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


def norm_dtype(x: Tensor) -> torch.dtype:
    """float32 at least: a norm of bfloat16 is taken in float32, one of float64 stays what it is."""
    return torch.promote_types(x.dtype, torch.float32)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32 times its weight, then adaLN's x (1 + scale) + shift. eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x: [B, N, width]; shift, scale: [B, 1, width], or [B, N, width] in the DDT head. Out in float32."""
        return modulated_norm(*(tensor.to(norm_dtype(x)) for tensor in (x, self.weight, shift, scale)))


class Attention(nn.Module):
    """Self-attention with fused qkv (biased) and 2-D rotary positions, no qk-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]; cos, sin: [N, width / heads / 2]."""
        projected = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, heads, channels]
        mixed = F.scaled_dot_product_attention(*rotated_heads(projected, cos, sin))  # [B, heads, N, channels]
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward: silu(first half) x second half; hidden = int(2/3 x int(ratio x width))."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 / 3 * int(ratio * width))
        self.gate_and_value = Linear(width, 2 * hidden)
        self.out = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.out(gated_hidden(self.gate_and_value(x)))


class PatchEmbed(nn.Module):
    """A map cut into patches, each a token. The channels of a patch are ordered (channel, row, column)."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear = Linear(channels * patch_size**2, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H W / patch^2, width], row-major."""
        patches = F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x
        return self.linear(patches.flatten(2).transpose(1, 2))


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """[B, N, patch^2 C], channels last inside a patch, to [B, C, side patch, side patch]."""
    side = math.isqrt(tokens.shape[1])
    patches = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (side, side))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimeEmbed(nn.Module):
    """Gaussian Fourier features of t, then a two-layer perceptron. Song et al. 2021; App. F.

    256 frozen frequencies W ~ N(0, 1), as the released code draws them (its vectors have deviation 1.00 to 1.07).
    """

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(frequencies))  # saved with the weights
        self.mlp = nn.Sequential(Linear(2 * frequencies, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t: [B] in [0, 1] -> [B, width]. In float32, whatever the autocast: one row an image costs nothing."""
        phase = 2 * math.pi * t.float()[:, None] * self.frequencies
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(torch.cat([phase.sin(), phase.cos()], dim=-1))


class Block(nn.Module):
    """Transformer block with adaLN: one (shift, scale, gate) an image, or one a token in the DDT head."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_ratio)
        self.modulation = Linear(width, 6 * width)
        self.recomputes = False  # its activations in the backward pass, instead of keeping them

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, N, width]; condition: [B, 1 or N, width], through SiLU already: once for all blocks."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.body, x, condition, cos, sin, use_reentrant=False, preserve_rng_state=False)
        return self.body(x, condition, cos, sin)

    def body(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The block itself."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = gated_sum(x, gate1, self.attention(self.norm1(x, shift1, scale1), cos, sin))
        return gated_sum(x, gate2, self.mlp(self.norm2(x, shift2, scale2)))


class FinalLayer(nn.Module):
    """Norm, adaLN and the output projection, whose input width decides Theorem 1's bound."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = Linear(width, 2 * width)
        self.linear = Linear(width, out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: [B, N, width]; condition: as a block's -> [B, N, out_channels]."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm(x, shift, scale))

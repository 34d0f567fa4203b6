"""The pieces that transformers here share: positions, normalisation, attention, feed-forward, conditioning."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved channel pairs by their angles. x: [..., tokens, channels]; cos, sin: [tokens, channels / 2]."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32, cast back, then times the weight. eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6).type_as(x) * self.weight


class Attention(nn.Module):
    """Self-attention with fused qkv (biased) and 2-D rotary positions, no qk-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]; cos, sin: [N, width / heads / 2]."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys = rotate(queries, cos, sin).type_as(values), rotate(keys, cos, sin).type_as(values)
        mixed = F.scaled_dot_product_attention(queries, keys, values)  # [B, heads, N, channels]
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward: silu(first half) x second half; hidden = int(2/3 x int(ratio x width))."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 / 3 * int(ratio * width))
        self.gate_and_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class PatchEmbed(nn.Module):
    """A map cut into patches, each a token. The channels of a patch are ordered (channel, row, column)."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(channels * patch_size**2, width)

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
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t: [B] in [0, 1] -> [B, width]. The phase 2 pi t W is taken in float32, whatever the autocast."""
        phase = 2 * math.pi * t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([phase.sin(), phase.cos()], dim=-1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift; shift and scale: [B, 1, width], or [B, N, width] in the DDT head."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """Transformer block with adaLN: one (shift, scale, gate) an image, or one a token in the DDT head."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_ratio)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, N, width]; condition: [B, 1 or N, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attention(modulate(self.norm1(x), shift1, scale1), cos, sin))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Norm, adaLN and the output projection, whose input width decides Theorem 1's bound."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: [B, N, width], condition: [B, 1 or N, width] -> [B, N, out_channels]."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))

"""The pieces that transformers here share: positions, normalisation, attention, feed-forward, conditioning."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RMS_EPS = 1e-6


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
    """Turn interleaved channel pairs by their angles. x: [..., channels], float; cos, sin: [..., channels / 2].

    A complex product: one pass where the real form takes four. A compiler fuses the real form and knows no complex.
    """
    if torch.compiler.is_compiling():
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


class ScaledNorm(torch.autograd.Function):
    """x / rms(x) times a scale plus a shift, in as few passes over memory as it takes, forward and backward.

    With n = x / rms and p = grad n: the gradient of the scale is p, of the shift grad, both summed over tokens where
    they are one an image; of x it is (grad scale - n mean(p scale)) / rms.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x: float32 [B, N, width]; scale, shift: float32 [B, 1 or N, width]."""
        width = x.shape[-1]
        inverse = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / width + RMS_EPS).rsqrt()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, scale)
        return torch.addcmul(shift, normed, scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, scale and shift."""
        normed, inverse, scale = ctx.saved_tensors
        product = gradient * normed
        if scale.shape[1] == 1:  # one an image: the mean is a matrix-vector product, the gradients are sums
            along = product @ scale.mT
            of_scale, of_shift = product.sum(1, keepdim=True), gradient.sum(1, keepdim=True)
        else:
            along = torch.linalg.vecdot(product, scale)[..., None]
            of_scale, of_shift = product, gradient
        of_x = torch.addcmul(gradient * scale, normed, along, value=-1 / normed.shape[-1]) * inverse
        return of_x, of_scale, of_shift


def norm_dtype(x: Tensor) -> torch.dtype:
    """float32 at least: a norm of bfloat16 is taken in float32, one of float64 stays what it is."""
    return torch.promote_types(x.dtype, torch.float32)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32 times its weight, then adaLN's x (1 + scale) + shift. eps 1e-6.

    Weight and scale are multiplied first: one an image, that is a row instead of a pass over all tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x: [B, N, width]; shift, scale: [B, 1, width], or [B, N, width] in the DDT head. Out in float32."""
        weight, x, scale, shift = (tensor.to(norm_dtype(x)) for tensor in (self.weight, x, scale, shift))
        scale = torch.addcmul(weight, weight, scale)
        if not torch.compiler.is_compiling():
            return ScaledNorm.apply(x, scale, shift)
        return torch.addcmul(shift, F.rms_norm(x, (x.shape[-1],), eps=RMS_EPS), scale)


class Attention(nn.Module):
    """Self-attention with fused qkv (biased) and 2-D rotary positions, no qk-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]; cos, sin: [N, width / heads / 2]."""
        projected = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, heads, channels]
        pair, values = projected.split((2, 1), dim=2)
        turned = rotate(pair.type_as(cos), cos[:, None, None], sin[:, None, None]).type_as(values)
        queries, keys, values = (part.transpose(1, 2) for part in (*turned.unbind(2), values.squeeze(2)))
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
        self.modulation = nn.Linear(width, 6 * width)
        self.recomputes = False  # its activations in the backward pass, instead of keeping them

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, N, width]; condition: [B, 1 or N, width]."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.body, x, condition, cos, sin, use_reentrant=False, preserve_rng_state=False)
        return self.body(x, condition, cos, sin)

    def body(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The block itself."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attention(self.norm1(x, shift1, scale1), cos, sin))
        return torch.addcmul(x, gate2, self.mlp(self.norm2(x, shift2, scale2)))


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
        return self.linear(self.norm(x, shift, scale))

"""The transformers' operations between matrix products, with their derivatives, in few passes over memory.

Autograd's own derivatives of the plain forms keep more and pass over it more often. A compiler does better than both
from the plain form, so that is what it is given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RMS_EPS = 1e-6


def modulated_norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x / rms(x) weight (1 + scale) + shift. x: [B, N, width]; weight: [width]; shift, scale: [B, 1 or N, width].

    Weight and scale are multiplied first: one an image, that is a row instead of a pass over all tokens.
    """
    if torch.compiler.is_compiling():
        return torch.addcmul(shift, F.rms_norm(x, (x.shape[-1],), eps=RMS_EPS), torch.addcmul(weight, weight, scale))
    return ModulatedNorm.apply(x, weight, shift, scale)


def gated_sum(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate branch. x, branch: [B, N, width]; gate: [B, 1 or N, width]."""
    if torch.compiler.is_compiling():
        return torch.addcmul(x, gate, branch)
    return GatedSum.apply(x, gate, branch)


def gated_hidden(gate_and_value: Tensor) -> Tensor:
    """silu(first half) x second half, of the last axis: [..., 2 hidden] -> [..., hidden]."""
    if torch.compiler.is_compiling():
        gate, value = gate_and_value.chunk(2, dim=-1)
        return F.silu(gate) * value
    return GatedHidden.apply(gate_and_value)


def rotated_heads(projected: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned to their positions, and values, each [B, heads, N, channels].

    projected: [B, N, 3, heads, channels]; cos, sin: [N, channels / 2]. Turned in the angles' dtype.
    """
    if torch.compiler.is_compiling():
        queries, keys, values = projected.unbind(2)
        queries, keys = (rotate(x.type_as(cos), cos[:, None], sin[:, None]).type_as(x) for x in (queries, keys))
    else:
        queries, keys, values = RotatedHeads.apply(projected, torch.complex(cos, sin)[:, None])
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved channel pairs by their angles. x: [..., channels], float; cos, sin: [..., channels / 2].

    A complex product: one pass where the real form takes four. A compiler fuses the real form and knows no complex.
    """
    if torch.compiler.is_compiling():
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    return turned(x, torch.complex(cos, sin))


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """Channel pairs times complex numbers. x: [..., channels], real; rotation: [..., channels / 2], complex."""
    pairs = x.type(rotation.real.dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * rotation).flatten(-2)


class ModulatedNorm(torch.autograd.Function):
    """With n = x / rms, s = weight (1 + scale) and p = grad n: the gradient of s is p, of the shift grad, both summed
    over tokens where they are one an image; of x it is (grad s - n mean(p s)) / rms.
    """  # fmt: skip

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """As modulated_norm."""
        width = x.shape[-1]
        inverse = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / width + RMS_EPS).rsqrt()
        normed, factor = x * inverse, torch.addcmul(weight, weight, scale)
        ctx.save_for_backward(normed, inverse, factor, weight, scale)
        return torch.addcmul(shift, normed, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, weight, shift and scale."""
        normed, inverse, factor, weight, scale = ctx.saved_tensors
        product, of_shift = gradient * normed, gradient
        if factor.shape[1] == 1:  # one an image: the mean is a matrix-vector product, the gradients are sums
            along = product @ factor.mT
            product, of_shift = product.sum(1, keepdim=True), gradient.sum(1, keepdim=True)
        else:
            along = torch.linalg.vecdot(product, factor)[..., None]
        of_x = (gradient * factor).addcmul_(normed, along, value=-1 / normed.shape[-1]).mul_(inverse)
        of_weight = torch.addcmul(product, product, scale).sum((0, 1))
        return of_x, of_weight, of_shift, product * weight


class GatedSum(torch.autograd.Function):
    """The gradient of the gate is grad branch, summed over tokens where it is one an image."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        """As gated_sum."""
        ctx.save_for_backward(gate, branch)
        return torch.addcmul(x, gate, branch)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, gate and branch."""
        gate, branch = ctx.saved_tensors
        of_gate = gradient * branch
        if gate.shape[1] == 1:
            of_gate = of_gate.sum(1, keepdim=True)
        return gradient, of_gate, gradient * gate


class GatedHidden(torch.autograd.Function):
    """Both halves' gradients are written where the gradient of the whole has them, not copied there."""

    @staticmethod
    def forward(ctx, gate_and_value: Tensor) -> Tensor:
        """As gated_hidden."""
        gate, value = gate_and_value.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(gate_and_value, opened)
        return opened * value

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        """The gradient of both halves."""
        gate_and_value, opened = ctx.saved_tensors
        gate, value = gate_and_value.chunk(2, dim=-1)
        whole = torch.empty_like(gate_and_value)
        of_gate, of_value = whole.chunk(2, dim=-1)
        torch.mul(gradient, opened, out=of_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return whole


class RotatedHeads(torch.autograd.Function):
    """[B, N, 3, heads, channels] -> three of [B, N, heads, channels]. A rotation's derivative is the one backwards."""

    @staticmethod
    def forward(ctx, projected: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rotation: complex [N, 1, channels / 2]."""
        ctx.save_for_backward(rotation)
        pair = turned(projected[:, :, :2], rotation[:, None]).type_as(projected)
        return pair[:, :, 0], pair[:, :, 1], projected[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_queries: Tensor, of_keys: Tensor, of_values: Tensor) -> tuple[Tensor, None]:
        """The gradient of what was projected, each part written in its place."""
        (rotation,) = ctx.saved_tensors
        back = rotation.conj().resolve_conj()
        batch, tokens, *rest = of_values.shape
        whole = of_values.new_empty(batch, tokens, 3, *rest)
        for target, gradient in zip(whole[:, :, :2].unbind(2), (of_queries, of_keys), strict=True):
            target.copy_(turned(gradient.contiguous(), back))
        whole[:, :, 2] = of_values
        return whole, None

"""Linear layers whose products are oneDNN's in a training step on a CPU.

PyTorch gives float32 products to MKL, at nine tenths of the speed of oneDNN on an AMD core (docs/measurements.md).
What is not trained, not in float32 or not on a CPU takes PyTorch's own way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# asked once: inside a block the question would break its graph. The operation is PyTorch's own, and not documented
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear with the same weights, names and values."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if by_onednn(x, self.weight):
            return Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer's products are oneDNN's: trained, in float32, on a CPU."""
    trained = HAS_ONEDNN and weight.requires_grad and torch.is_grad_enabled()
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return trained and plain and not torch.is_autocast_enabled("cpu")


@torch.library.custom_op("rae::linear_product", mutates_args=())
def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, of any strides. x: [..., K], weight: [N, K], bias: [N]. Opaque to a compiler."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@linear_product.register_fake
def product_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a compiler has to know of it."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Product(torch.autograd.Function):
    """The weight's gradient stays MKL's: its operands are transposed, where oneDNN is no quicker."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As Linear."""
        ctx.save_for_backward(x, weight)
        return linear_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        of_x = linear_product(gradient, weight.mT, None) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        of_bias = rows.new_ones(len(rows)) @ rows if ctx.needs_input_grad[2] else None  # half the time of a sum
        return of_x, rows.mT @ x.flatten(0, -2), of_bias

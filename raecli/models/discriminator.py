"""The discriminator of decoder training: a frozen DINO ViT-S/8 with five trained heads. App. E.2; FACTS section 4."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raecli.errors import CheckpointError
from raecli.models.discriminator_file import REPOSITORY
from raecli.models.encoder_weights import load_exactly, match_keys, read_weights

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer  # slow to import: where it is built

UNUSED = re.compile(r"(norm|head|fc)\.")  # after the last block: the heads read the blocks
CHANNELS_A_HEAD = 64  # of the attention of every DINO
TAPS = 4  # blocks 2, 5, 8, 11 of 12: the last of each quarter
KERNEL = 9
NORM_EPS = 1e-6  # the release's
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over ranks, with its gradient: the mean is its own adjoint. One process: the identity."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        """Any shape; the same result on every rank."""
        return mean_over_ranks(values)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        """The gradient of the sum over ranks of their losses; averaging a parameter's over ranks comes later."""
        return mean_over_ranks(gradients[0])


def mean_over_ranks(values: Tensor) -> Tensor:
    """A new tensor; without a process group a copy."""
    values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


class BatchNorm(nn.Module):
    """Batch normalisation with the statistics of the batch of all ranks, which have equal shares of it.

    In training as nn.BatchNorm1d on the whole batch; in evaluation by the running statistics, which are so the same
    on every rank. Statistics in float32.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, width: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, L], B this rank's share -> the same."""
        x = x.float()
        mean, variance = self.batch_statistics(x) if self.training else (self.running_mean, self.running_variance)
        scale = self.weight * (variance + NORM_EPS).rsqrt()
        return x * scale[:, None] + (self.bias - mean * scale)[:, None]

    def batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over batch, length and ranks, [width] each; the running ones follow."""
        mean = MeanOverRanks.apply(x.mean(dim=(0, 2)))
        variance = MeanOverRanks.apply((x - mean[:, None]).square().mean(dim=(0, 2)))
        count = len(x) * x.shape[2] * (dist.get_world_size() if dist.is_initialized() else 1)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_variance.lerp_(variance * count / max(1, count - 1), self.momentum)
        return mean, variance


class InstanceNorm(nn.InstanceNorm1d):
    """Each image and channel by its own mean and variance over the tokens: the release's "virtual batch of 1"."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, L] -> the same, in float32."""
        return super().forward(x.float())


class SpectralConv1d(nn.Module):
    """A circular convolution whose weight is divided by its largest singular value. Miyato et al. 2018.

    The singular vectors are followed by power iteration, one a call of `iterate`: once an optimiser step and not once
    a forward, so that neither micro-batches nor ranks change them.

    normed: a norm follows, which takes the bias out again, so its gradient is 0. Adam would blow the rounding error
    that is left of it up to whole steps, others on every number of ranks: the bias stays where it began.
    """

    left: Tensor
    right: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, normed: bool = False) -> None:
        super().__init__()
        self.normed = normed
        plain = nn.Conv1d(in_channels, out_channels, kernel)
        self.weight, self.bias, self.padding = plain.weight, plain.bias, kernel // 2
        self.register_buffer("left", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("right", F.normalize(torch.randn(in_channels * kernel), dim=0))
        for _ in range(15):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        """One power iteration."""
        matrix = self.weight.flatten(1)
        self.right.copy_(F.normalize(matrix.T @ self.left, dim=0))
        self.left.copy_(F.normalize(matrix @ self.right, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, L] -> [B, out, L]; the last token's neighbour is the first."""
        # Sums of products and no matrix product, which autocast would take in bf16.
        sigma = (self.weight.flatten(1) * self.left[:, None] * self.right).sum()
        x = F.pad(x, (self.padding, self.padding), mode="circular") if self.padding else x
        return F.conv1d(x, self.weight / sigma, self.bias.detach() if self.normed else self.bias)


class Head(nn.Module):
    """A score for every token from one block's tokens."""

    def __init__(self, width: int, norm: Literal["batch", "instance"]) -> None:
        super().__init__()
        normalisation = BatchNorm if norm == "batch" else InstanceNorm
        self.point = SpectralConv1d(width, width, 1, normed=True)
        self.point_norm = normalisation(width)
        self.line = SpectralConv1d(width, width, KERNEL, normed=True)
        self.line_norm = normalisation(width)
        self.score = SpectralConv1d(width, 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, width, L] -> scores [B, L], in float32."""
        x = F.leaky_relu(self.point_norm(self.point(tokens)), 0.2)
        x = (F.leaky_relu(self.line_norm(self.line(x)), 0.2) + x) / math.sqrt(2)
        return self.score(x)[:, 0].float()


class Backbone(nn.Module):
    """A plain vision transformer, frozen and in evaluation for good: images to the tokens of some of its blocks."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: "VisionTransformer") -> None:
        super().__init__()
        self.network = network
        self.side = network.patch_embed.img_size[0]
        depth = len(network.blocks)
        self.taps = [depth * (quarter + 1) // TAPS - 1 for quarter in range(TAPS)]
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation, whatever the module around asks."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: [B, 3, H, W] in [-1, 1], resized bilinearly to 224. Five of [B, width, L]: the taps, the last output.

        The last output is the last tap's once more, before the last LayerNorm, as the release has it.
        """
        images = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)
        pixels = ((images + 1) / 2 - self.mean) / self.std
        tokens = self.network.forward_intermediates(
            pixels, indices=self.taps, output_fmt="NLC", intermediates_only=True
        )
        maps = [block.transpose(1, 2) for block in tokens]
        return [*maps, maps[-1]]


class Discriminator(nn.Module):
    """Scores of images, one for each token and head. The heads alone are trained: 7,386,245 parameters on ViT-S/8."""

    def __init__(self, backbone: Backbone, *, norm: Literal["batch", "instance"]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(Head(backbone.network.embed_dim, norm) for _ in range(TAPS + 1))

    def iterate(self) -> None:
        """One power iteration of every convolution's spectral norm."""
        for module in self.heads.modules():
            if isinstance(module, SpectralConv1d):
                module.iterate()

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] in [-1, 1] -> scores [B, 5 L]."""
        return torch.cat([head(tokens) for head, tokens in zip(self.heads, self.backbone(images), strict=True)], dim=1)


def load_backbone(path: Path) -> Backbone:
    """The frozen network of a file in timm's layout, as `rae convert` and the hub have it; its sizes are the file's."""
    weights = read_weights(path)
    network = plain_transformer(weights, path)
    own = network.state_dict()
    match_keys(own, weights, UNUSED, str(path))
    load_exactly(network, {name: weights[name] for name in own}, str(path))
    return Backbone(network)


def plain_transformer(weights: dict[str, Tensor], path: Path) -> "VisionTransformer":
    """A vision transformer of the sizes that the weights' shapes tell, without its last LayerNorm."""
    patch, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    blocks = {int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))}
    if patch is None or patch.dim() != 4 or positions is None or positions.dim() != 3 or len(blocks) < TAPS:
        raise CheckpointError(
            f"{path}: no plain vision transformer in timm's layout of at least {TAPS} blocks; bring {REPOSITORY}'s "
            "file, or convert the released one with rae convert --kind discriminator"
        )
    side = math.isqrt(positions.shape[1] - 1)
    return transformer(width=patch.shape[0], depth=len(blocks), patch_size=patch.shape[-1], tokens_side=side)


def transformer(
    *, width: int = 384, depth: int = 12, patch_size: int = 8, tokens_side: int = 28
) -> "VisionTransformer":
    """A plain vision transformer without its last LayerNorm; DINO's ViT-S/8 unless told otherwise."""
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=tokens_side * patch_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=max(1, width // CHANNELS_A_HEAD),
        num_classes=0,
        global_pool="",
    )
    network.norm = nn.Identity()
    return network

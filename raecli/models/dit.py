"""DiT (LightningDiT's form) and DiT-DH, its backbone with a wide shallow DDT head. Sec. 5, App. F, Table 13."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raecli.models.layers import (
    Block,
    FinalLayer,
    PatchEmbed,
    TimeEmbed,
    rotary_angles,
    sincos_positions,
    unpatchify,
)
from raecli.models.products import Linear


class DiffusionTransformer(nn.Module):
    """What both models share: embeddings, positions, the output's way back to a map."""

    def __init__(self, *, in_channels: int, input_size: int, patch_size: int, width: int, num_classes: int) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is no multiple of patch_size {patch_size}")
        self.in_channels, self.input_size, self.patch_size = in_channels, input_size, patch_size
        self.num_classes = num_classes
        self.tokens_side = input_size // patch_size
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.time_embed = TimeEmbed(width)
        self.label_embed = nn.Embedding(num_classes + 1, width)  # the last row is the null label
        self.register_buffer("positions", sincos_positions(self.tokens_side, width), persistent=False)

    @property
    def null_label(self) -> int:
        """The label of "no class"."""
        return self.num_classes

    def add_rotary(self, name: str, head_channels: int) -> None:
        """Keep cosines and sines of the rotary angles, [N, head_channels / 2], as buffers that are not saved."""
        angles = rotary_angles(self.tokens_side, head_channels)
        self.register_buffer(f"{name}_cos", angles.cos(), persistent=False)
        self.register_buffer(f"{name}_sin", angles.sin(), persistent=False)

    def initialise(self) -> None:
        """Patches xavier, labels and the time perceptron N(0, .02), modulation and output zero. LightningDiT."""
        for module in self.modules():
            if isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)
            elif isinstance(module, Block | FinalLayer):
                nn.init.zeros_(module.modulation.weight)
                nn.init.zeros_(module.modulation.bias)
                if isinstance(module, FinalLayer):
                    nn.init.zeros_(module.linear.weight)
                    nn.init.zeros_(module.linear.bias)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.mlp[0].weight, std=0.02)
        nn.init.normal_(self.time_embed.mlp[2].weight, std=0.02)


class DiT(DiffusionTransformer):
    """Diffusion transformer of one width: (noisy [B, C, H, W], t [B], labels [B]) -> velocity [B, C, H, W]."""

    def __init__(
        self,
        *,
        in_channels: int,
        input_size: int,
        patch_size: int = 1,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int,
    ) -> None:
        super().__init__(
            in_channels=in_channels, input_size=input_size, patch_size=patch_size, width=width, num_classes=num_classes
        )
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.final = FinalLayer(width, patch_size**2 * in_channels)
        self.add_rotary("rotary", width // heads)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.initialise()

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Velocity of a noisy map. t: [B] in [0, 1]; labels: [B], num_classes is the null label."""
        condition = F.silu(self.time_embed(t) + self.label_embed(labels))[:, None]
        x = self.patch_embed(noisy) + self.positions
        for block in self.blocks:
            x = block(x, condition, self.rotary_cos, self.rotary_sin)
        return unpatchify(self.final(x, condition), self.patch_size)


class DiTDH(DiffusionTransformer):
    """DiT with a wide DDT head: z = M(noisy | t, y), velocity = H(noisy | z, t). Sec. 5.

    The head reads the same noisy map anew and is conditioned a token at a time by the backbone's output. Its width,
    not the backbone's, has to reach the width of a token (Theorem 1).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        input_size: int,
        patch_size: int = 1,
        width: int,
        depth: int,
        heads: int,
        head_width: int = 2048,
        head_depth: int = 2,
        head_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int,
    ) -> None:
        super().__init__(
            in_channels=in_channels, input_size=input_size, patch_size=patch_size, width=width, num_classes=num_classes
        )
        self.backbone = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.project = Linear(width, head_width) if width != head_width else nn.Identity()
        self.head_patch_embed = PatchEmbed(in_channels, head_width, patch_size)
        self.head = nn.ModuleList(Block(head_width, head_heads, mlp_ratio) for _ in range(head_depth))
        self.final = FinalLayer(head_width, patch_size**2 * in_channels)
        self.add_rotary("rotary", width // heads)
        self.add_rotary("head_rotary", head_width // head_heads)
        self.initialise()

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Velocity of a noisy map. t: [B] in [0, 1]; labels: [B], num_classes is the null label."""
        time = self.time_embed(t)[:, None]
        condition = F.silu(F.silu(time + self.label_embed(labels)[:, None]))  # twice, as released
        noisy = noisy.contiguous(memory_format=torch.channels_last)  # read twice
        z = self.patch_embed(noisy) + self.positions
        for block in self.backbone:
            z = block(z, condition, self.rotary_cos, self.rotary_sin)
        z = self.project(F.silu(z + time))  # no label here, as released
        condition = F.silu(z)
        x = self.head_patch_embed(noisy)  # no positions either: App. F
        for block in self.head:
            x = block(x, condition, self.head_rotary_cos, self.head_rotary_sin)
        return unpatchify(self.final(x, condition), self.patch_size)


def parameter_count(model: nn.Module) -> int:
    """Parameters as the release counts them: the frozen positions and time frequencies are among them."""
    frozen = [buffer for name, buffer in model.named_buffers() if name in ("positions", "time_embed.frequencies")]
    return sum(tensor.numel() for tensor in [*model.parameters(), *frozen])

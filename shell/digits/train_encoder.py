"""The shipped encoder: a small masked autoencoder (He et al., 2021) on the digits' training split, without labels.

Writes a Hugging Face `vit_mae` folder, encoder only, fp16: config.json, model.safetensors, preprocessor_config.json.
About a minute on one core. The same seed on the same machine gives the same bytes.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from raecli.store.atomic import atomic_folder

from data import IMAGE_SIZE, random_affine, split_tensors

ASSET = Path(__file__).parents[2] / "raecli" / "assets" / "digits_mae"
PATCH, WIDTH, DEPTH, HEADS, MLP_WIDTH = 8, 32, 3, 4, 128
SIDE = IMAGE_SIZE // PATCH
VISIBLE = SIDE**2 // 2  # half of the tokens are masked
NORM_EPS = 1e-12  # as ViT-MAE's
MEAN = STD = 0.5


def sincos_positions(width: int) -> Tensor:
    """Fixed positions [1, 1 + tokens, width], the class token's zero: column then row, each [sin | cos]. As ViT-MAE."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(SIDE, dtype=torch.float64), omega)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [SIDE, width / 2]
    grid = torch.cat([line.repeat(SIDE, 1), line.repeat_interleave(SIDE, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), grid])[None].float()


def make_blocks(depth: int) -> nn.Sequential:
    """Pre-norm transformer blocks with qkv bias and exact GELU."""
    norm = partial(nn.LayerNorm, eps=NORM_EPS)
    return nn.Sequential(
        *(Block(WIDTH, HEADS, MLP_WIDTH / WIDTH, qkv_bias=True, norm_layer=norm) for _ in range(depth))
    )


class MaskedAutoencoder(nn.Module):
    """Encoder of the visible patches, decoder of all of them."""

    def __init__(self) -> None:
        """Xavier for every Linear, as the MAE code initialises; the last norm has no affine: loaders drop it."""
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.register_buffer("positions", sincos_positions(WIDTH))
        self.blocks = make_blocks(DEPTH)
        self.norm = nn.LayerNorm(WIDTH, eps=NORM_EPS, elementwise_affine=False)
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.mask_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.decoder = make_blocks(2)
        self.pixels = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PATCH**2))  # grey: one of three channels
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.weight.view(WIDTH, -1))

    def encode(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Tokens [B, K, WIDTH] of the patches `kept` [B, K], or of all in row order; images [B, 3, H, W] in [0, 1]."""
        tokens = self.patches((images - MEAN) / STD).flatten(2).mT + self.positions[:, 1:]
        if kept is not None:
            tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, WIDTH))
        class_token = self.cls_token.expand(len(tokens), -1, -1)  # its position is zero
        return self.norm(self.blocks(torch.cat([class_token, tokens], dim=1)))[:, 1:]

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """Normalised grey pixels of every patch [B, tokens, PATCH^2], from the patches `kept` [B, K]."""
        seen = self.enter(self.encode(images, kept))
        places = kept[:, :, None].expand(-1, -1, WIDTH)
        tokens = self.mask_token.expand(len(images), SIDE**2, -1).scatter(1, places, seen)
        return self.pixels(self.decoder(tokens + self.positions[:, 1:]))


def grey_patches(images: Tensor) -> Tensor:
    """[B, tokens, PATCH^2] of images [B, 3, H, W], normalised like the encoder's input."""
    grey = (images[:, :1] - MEAN) / STD
    return nn.functional.unfold(grey, PATCH, stride=PATCH).mT


def train(
    steps: int, seed: int, batch_size: int = 96, learning_rate: float = 3e-3, warmup: int = 30
) -> MaskedAutoencoder:
    """Squared error of the masked patches' pixels; AdamW, linear warm-up, cosine to 0. No label is read."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, _ = split_tensors("train")
    model = MaskedAutoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        scale = min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        batch = random_affine(batch, generator)
        order = torch.rand(batch_size, SIDE**2, generator=generator).argsort(dim=1)
        error = (model(batch, order[:, :VISIBLE]) - grey_patches(batch)).square().mean(dim=2)
        loss = error.gather(1, order[:, VISIBLE:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def huggingface_weights(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """The encoder's weights under the names of Hugging Face's ViTMAE, in fp16."""
    weights = {
        "vit.embeddings.cls_token": model.cls_token,
        "vit.embeddings.position_embeddings": model.positions,
        "vit.embeddings.patch_embeddings.projection.weight": model.patches.weight,
        "vit.embeddings.patch_embeddings.projection.bias": model.patches.bias,
        "vit.layernorm.weight": torch.ones(WIDTH),
        "vit.layernorm.bias": torch.zeros(WIDTH),
    }
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for i, block in enumerate(model.blocks):
        layer = f"vit.encoder.layer.{i}"
        for kind in ("weight", "bias"):
            for ours, theirs in names.items():
                weights[f"{layer}.{theirs}.{kind}"] = getattr(block.get_submodule(ours), kind)
            for part, name in zip(getattr(block.attn.qkv, kind).chunk(3), ("query", "key", "value"), strict=True):
                weights[f"{layer}.attention.attention.{name}.{kind}"] = part
    return {name: value.detach().half().contiguous() for name, value in weights.items()}


CONFIG = {
    "architectures": ["ViTMAEModel"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": WIDTH,
    "image_size": IMAGE_SIZE,
    "intermediate_size": MLP_WIDTH,
    "layer_norm_eps": NORM_EPS,
    "mask_ratio": 0.0,
    "model_type": "vit_mae",
    "num_attention_heads": HEADS,
    "num_channels": 3,
    "num_hidden_layers": DEPTH,
    "patch_size": PATCH,
    "qkv_bias": True,
    "torch_dtype": "float16",
}
PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [MEAN] * 3,
    "image_std": [STD] * 3,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}


def write_folder(model: MaskedAutoencoder, out: Path) -> None:
    """The three files of a Hugging Face folder; in full or not at all."""
    with atomic_folder(out) as folder:
        (folder / "model.safetensors").write_bytes(save(huggingface_weights(model), metadata={"format": "pt"}))
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


@torch.no_grad()
def measure(model: MaskedAutoencoder) -> dict[str, float]:
    """Linear probes on the tokens, pooled and all, with test accuracy; and the PCs that hold 90 % of the variance."""
    (images, labels), (test_images, test_labels) = split_tensors("train"), split_tensors("test")
    tokens, test_tokens = model.encode(images), model.encode(test_images)
    views = {"pooled": lambda x: x.mean(1), "all tokens": lambda x: x.flatten(1)}
    figures = {}
    for name, view in views.items():
        probe = LogisticRegression(max_iter=2000).fit(view(tokens).numpy(), labels.numpy())
        figures[f"linear probe, {name}"] = float(probe.score(view(test_tokens).numpy(), test_labels.numpy()))
    flat = tokens.flatten(1).double()
    held = torch.linalg.svdvals(flat - flat.mean(0)).square().cumsum(0).numpy()
    figures["PCs with 90 % of the variance"] = int(np.searchsorted(held, 0.9 * held[-1])) + 1
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Command line: train_encoder.py [OUT]."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ASSET, help="a folder that does not exist yet")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out.exists():
        print(f"error: {options.out}: exists; move it away first", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    model = train(options.steps, options.seed)
    write_folder(model, options.out)
    for name, value in measure(model).items():
        print(f"{name}: {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

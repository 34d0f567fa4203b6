"""Make tests/parity/vectors/{dinov2,dinov2_swiglu,siglip,vit_mae} with Hugging Face's own models. Not run by the tests.

`transformers` is no dependency of ours: put it into a folder of its own and run, with no network needed after that,

    pip install --target /tmp/hf --no-deps transformers tokenizers regex
    PYTHONPATH=/tmp/hf python tests/parity/make_encoder_goldens.py

Each vector is a folder as `save_pretrained` writes it (weights in fp16) and `io.safetensors`: images (fp16, [0, 1]) and
latents (fp32), made as the released code makes them: bicubic resize, normalise, the model, the last LayerNorm without
affine, prefix tokens dropped. Made with transformers 5.23.0, torch 2.15, fp32 on a CPU.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

VECTORS = Path(__file__).parent / "vectors"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def redraw(model: torch.nn.Module, seed: int, embeddings: float = 1.0) -> torch.nn.Module:
    """Draw every parameter anew, large enough that each one shows in the output, and representable in fp16.

    embeddings: a factor for patches, positions and class token.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2
        scale *= embeddings if ".embeddings." in name else 1.0
        values = torch.randn(parameter.shape, generator=generator) * scale
        centre = 1.0 if ("norm" in name and name.endswith("weight")) or "lambda1" in name else 0.0
        parameter.data = (values + centre).half().float()
    return model.eval()


def prepare(images: torch.Tensor, side: int, statistics: dict[str, list[float]]) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] as the released encoder gives them to the model."""
    mean, std = (torch.tensor(statistics[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    if images.shape[-1] != side:
        images = F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)
    return (images - mean) / std


def write(name: str, model: torch.nn.Module, statistics: dict, images: torch.Tensor, tokens: torch.Tensor) -> None:
    """Save the folder, the images and the latents of tokens [B, N, C]."""
    folder = VECTORS / name
    model.half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics) + "\n")
    side = round(tokens.shape[1] ** 0.5)
    latents = tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous()
    save_file({"images": images.half(), "latents": latents}, folder / "io.safetensors")


def without_affine(norm: torch.nn.LayerNorm) -> torch.nn.LayerNorm:
    """The same norm without weight and bias, as the released code has it."""
    return torch.nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)


def make_dinov2(name: str, images: torch.Tensor, *, swiglu: bool) -> None:
    """No registers; trained on 5x5 tokens, used on 4x4: 64 pixels become 56."""
    config = Dinov2Config(**SIZES, image_size=70, mlp_ratio=2, use_swiglu_ffn=swiglu)
    model = redraw(Dinov2Model(config), seed=1)
    norm, model.layernorm = model.layernorm, without_affine(model.layernorm)
    tokens = model(prepare(images, 56, IMAGENET)).last_hidden_state[:, 1:]
    model.layernorm = norm
    write(name, model, IMAGENET, images, tokens)


def make_siglip(images: torch.Tensor) -> None:
    """Both towers and the pooling head; trained on 4x4 tokens, used on 6x6."""
    vision = SIZES | {"image_size": 32, "patch_size": 8, "intermediate_size": 72}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 8, "max_position_embeddings": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = redraw(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)), seed=2)
    tower = model.vision_model
    norm, tower.post_layernorm = tower.post_layernorm, without_affine(tower.post_layernorm)
    tokens = tower(prepare(images, 48, HALF), interpolate_pos_encoding=True).last_hidden_state
    tower.post_layernorm = norm
    write("siglip", model, HALF, images, tokens)


def make_vit_mae(images: torch.Tensor) -> None:
    """With its decoder; trained on 4x4 tokens, used on 6x6; nothing masked, the noise in order.

    Its embeddings are small, so that an epsilon of 1e-6 in place of 1e-12 would show.
    """
    decoder = {f"decoder_{key}": value for key, value in SIZES.items()} | {"decoder_intermediate_size": 16}
    decoder |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    config = ViTMAEConfig(**SIZES, **decoder, image_size=32, patch_size=8, intermediate_size=72, mask_ratio=0.0)
    model = redraw(ViTMAEForPreTraining(config), seed=3, embeddings=0.01)
    norm, model.vit.layernorm = model.vit.layernorm, without_affine(model.vit.layernorm)
    noise = torch.arange(36.0).expand(len(images), -1)
    tokens = model.vit(prepare(images, 48, IMAGENET), noise=noise, interpolate_pos_encoding=True).last_hidden_state
    model.vit.layernorm = norm
    write("vit_mae", model, IMAGENET, images, tokens[:, 1:])


@torch.no_grad()
def main() -> None:
    """Write all vectors."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 64, generator=generator).half().float()
    make_dinov2("dinov2", images, swiglu=False)
    make_dinov2("dinov2_swiglu", images, swiglu=True)
    make_siglip(images[..., :48, :48])
    make_vit_mae(images[..., :48, :48])


if __name__ == "__main__":
    main()

"""A diffusers AutoencoderRAE folder and ours: names, statistics, configuration. FACTS section 1; diffusers 0.42.1."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raecli.errors import CheckpointError
from raecli.store.encoder_config import IMAGENET
from raecli.store.json_file import read_json
from raecli.store.statistics import VARIANCE_EPS, LatentStatistics

CLASS, WEIGHTS, CONFIG = "AutoencoderRAE", "diffusion_pytorch_model.safetensors", "config.json"
DIFFUSERS_EPS = 1e-5  # added to its standard deviation, whatever that already has in it
FAMILIES = {"dinov2": "dinov2", "siglip2": "siglip", "mae": "mae"}  # encoder_type to ours
HEAD_CHANNELS = 64  # of every encoder
MLP_WIDTH = 3072  # of SigLIP and MAE, whatever their width; DINOv2's is 4 times its width
# Pixels a side of the images that diffusers' position embeddings are for.
POSITION_SIDES = {"dinov2": 518, "siglip": 256, "mae": 224}
MODEL_TYPES = {"dinov2": "dinov2_with_registers", "siglip": "siglip_vision_model", "mae": "vit_mae"}
# diffusers divides the positions of its decoder by side / 16, the release does not: they agree at side 16 alone.
POSITION_BASE = 16
OTHER_POSITIONS = (
    "the latents have {side} tokens a side: diffusers 0.42.1 scales the decoder's positions by 16/{side}, the released "
    "code does not, so their images differ. Ours are the released code's"
)
NORM_EPS = {"dinov2": 1e-6, "siglip": 1e-6, "mae": 1e-12}
ACTIVATION = {"dinov2": "gelu", "siglip": "gelu_pytorch_tanh", "mae": "gelu"}
# diffusers' defaults of the keys that we read.
DEFAULTS: dict[str, Any] = {
    "encoder_type": "dinov2",
    "encoder_hidden_size": 768,
    "encoder_patch_size": 14,
    "encoder_num_hidden_layers": 12,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
    "patch_size": 16,
    "encoder_input_size": 224,
    "num_channels": 3,
    "noise_tau": 0.0,
    "reshape_to_2d": True,
    "scaling_factor": 1.0,
}
ATTENTION = {f"attention.attention.{part}.": f"attention.to_{part[0]}." for part in ("query", "key", "value")}
ATTENTION |= {"attention.output.dense.": "attention.to_out.0."}


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a folder's config.json tells of an AutoencoderRAE."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("_class_name") == CLASS


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration, defaults filled in, and weights."""
    config = DEFAULTS | read_json(folder / CONFIG)
    known = config["encoder_type"] in FAMILIES
    if not known or config["num_channels"] != 3 or not config["reshape_to_2d"]:
        told = {key: config[key] for key in ("encoder_type", "num_channels", "reshape_to_2d")}
        raise CheckpointError(f"{folder / CONFIG}: {told}; known are {', '.join(FAMILIES)}, with 3 channels, as 2-D")
    try:
        return config, load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be read: {error}") from None


def decoder_names_from(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder of a folder under the released names."""
    inner = {name.removeprefix("decoder."): value for name, value in weights.items() if name.startswith("decoder.")}
    return {replaced(name, {new: old for old, new in ATTENTION.items()}): value for name, value in inner.items()}


def decoder_names_to(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released names as diffusers has them; the positions are not saved there."""
    kept = {name: value for name, value in released.items() if name != "decoder_pos_embed"}
    return {f"decoder.{replaced(name, ATTENTION)}": value for name, value in kept.items()}


def replaced(name: str, parts: dict[str, str]) -> str:
    """A layer's name with its module renamed; attention's alone."""
    layer = re.fullmatch(r"(decoder_layers\.\d+\.)(.+)", name)
    if layer is None:
        return name
    for old, new in parts.items():
        if layer[2].startswith(old):
            return layer[1] + new + layer[2].removeprefix(old)
    return name


def statistics_from(
    weights: dict[str, Tensor], config: dict[str, Any], shape: tuple[int, int, int]
) -> LatentStatistics:
    """Ours, so that sqrt(variance + 1e-5) is diffusers' (std + 1e-5) / scaling_factor; its zero mean is none."""
    std, mean = (mapped(weights[f"_latents_{name}"], shape) for name in ("std", "mean"))
    scale = (std.double() + DIFFUSERS_EPS) / float(config["scaling_factor"])
    variance = (scale.square() - VARIANCE_EPS).float()
    return LatentStatistics(mean.float() if mean.any() else None, variance)


def mapped(value: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A statistic of any shape that diffusers broadcasts, as [C, H, W]."""
    try:
        return value.reshape(value.shape[1:] if value.dim() == 4 else value.shape).expand(shape).contiguous()
    except RuntimeError:
        raise CheckpointError(f"latent statistics {tuple(value.shape)} do not fit latents {shape}") from None


def statistics_to(statistics: LatentStatistics) -> dict[str, Tensor]:
    """diffusers' buffers: the standard deviation lacks the 1e-5 that diffusers adds once more."""
    std = (statistics.variance.double() + VARIANCE_EPS).sqrt() - DIFFUSERS_EPS
    mean = torch.zeros(1) if statistics.mean is None else statistics.mean
    return {"_latents_mean": mean.float(), "_latents_std": std.float()}


def image_statistics_from(weights: dict[str, Tensor], config: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of an image's channels: the buffers, told in the configuration's digits."""
    found = []
    for key, default in zip(("mean", "std"), IMAGENET, strict=True):
        told = config.get(f"encoder_norm_{key}") or list(default)
        buffer = weights[f"encoder_{key}"].flatten().float()
        same = torch.equal(torch.tensor(told, dtype=torch.float32), buffer)
        found.append([float(value) for value in (told if same else buffer.tolist())])
    return found[0], found[1]


def encoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the encoder alone, as a Hugging Face folder has it."""
    family, width = FAMILIES[config["encoder_type"]], config["encoder_hidden_size"]
    mlp = {"mlp_ratio": 4} if family == "dinov2" else {"intermediate_size": MLP_WIDTH}
    registers = {"num_register_tokens": 4, "use_swiglu_ffn": False} if family == "dinov2" else {}
    return {
        "model_type": MODEL_TYPES[family],
        "hidden_size": width,
        "num_hidden_layers": config["encoder_num_hidden_layers"],
        "num_attention_heads": width // HEAD_CHANNELS,
        "patch_size": config["encoder_patch_size"],
        "image_size": POSITION_SIDES[family],
        "hidden_act": ACTIVATION[family],
        "layer_norm_eps": NORM_EPS[family],
        **({} if family == "siglip" else {"qkv_bias": True}),
        **mlp,
        **registers,
    }

"""A Hugging Face folder's config.json and preprocessor_config.json, read strictly and without torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raecli.errors import InputError, UsageError
from raecli.store.json_file import read_json

Family = Literal["dinov2", "siglip", "mae"]
Triple = tuple[float, float, float]

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# What transformers fills in for a key that config.json leaves out: SigLIP's published files leave out most.
COMMON: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3}
DINOV2 = COMMON | {
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
SIGLIP = COMMON | {
    "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "patch_size": 16,
}
MAE = SIGLIP | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}
DEFAULTS: dict[str, dict[str, Any]] = {
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2 | {"patch_size": 16, "num_register_tokens": 4},
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "vit_mae": MAE,
}
FAMILIES: dict[str, Family] = {
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "vit_mae": "mae",
}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


@dataclass(frozen=True)
class FolderConfig:
    """The vision transformer that a folder's config.json tells of."""

    model_type: str
    family: Family
    width: int
    depth: int
    heads: int
    mlp_width: int  # with swiglu: of one half, after its rounding to a multiple of 8
    patch_size: int
    registers: int
    qkv_bias: bool
    activation: str  # Hugging Face's name
    norm_eps: float  # of every LayerNorm
    swiglu: bool
    mean: Triple
    std: Triple

    @property
    def prefix_tokens(self) -> int:
        """The class token and the registers; SigLIP has neither."""
        return 0 if self.family == "siglip" else 1 + self.registers

    @property
    def position_antialias(self) -> bool:
        """Whether transformers smooths the positions when it resamples them: for DINOv2 with registers alone."""
        return self.model_type == "dinov2_with_registers"


def read_folder_config(folder: Path) -> FolderConfig:
    """Read `folder`/config.json, and the image statistics of preprocessor_config.json where that is there."""
    where = folder / "config.json"
    if not where.is_file():
        raise UsageError(f"encoder folder {folder}: no config.json; bring the whole Hugging Face folder")
    config = read_json(where)
    model_type = config.get("model_type")
    if model_type not in DEFAULTS:
        raise UsageError(f"{where}: model_type is {model_type!r}; known are {', '.join(sorted(DEFAULTS))}")
    if model_type == "siglip":
        config = config.get("vision_config", {})
        if not isinstance(config, dict):
            raise InputError(f"{where}: vision_config is not a mapping")
    return _folder_config(model_type, DEFAULTS[model_type] | config, where)


def _folder_config(model_type: str, config: dict[str, Any], where: Path) -> FolderConfig:
    """Check each value that the network is built from."""
    family = FAMILIES[model_type]
    width, heads = _count(config, "hidden_size", where), _count(config, "num_attention_heads", where)
    if width % heads:
        raise InputError(f"{where}: hidden_size {width} does not divide into num_attention_heads {heads}")
    if _count(config, "num_channels", where) != 3:
        raise InputError(f"{where}: num_channels is {config['num_channels']}; images have 3")
    if config["hidden_act"] not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act is {config['hidden_act']!r}; known are {', '.join(ACTIVATIONS)}")
    swiglu = _flag(config, "use_swiglu_ffn", where) if family == "dinov2" else False
    mean, std = read_image_statistics(where.parent, HALF if family == "siglip" else IMAGENET)
    return FolderConfig(
        model_type=model_type,
        family=family,
        width=width,
        depth=_count(config, "num_hidden_layers", where),
        heads=heads,
        mlp_width=_mlp_width(config, width, swiglu, where),
        patch_size=_side(config, "patch_size", where),
        registers=_count(config, "num_register_tokens", where, least=0) if "with_registers" in model_type else 0,
        qkv_bias=_flag(config, "qkv_bias", where) if family != "siglip" else True,
        activation=config["hidden_act"],
        norm_eps=_positive(config, "layer_norm_eps", where),
        swiglu=swiglu,
        mean=mean,
        std=std,
    )


def read_image_statistics(folder: Path, family: tuple[Triple, Triple]) -> tuple[Triple, Triple]:
    """Mean and standard deviation of an image's channels in [0, 1]; the family's where the folder says nothing."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return family
    config = read_json(path)
    mean, std = (
        _triple(config, key, path, other) for key, other in zip(("image_mean", "image_std"), family, strict=True)
    )
    if min(std) <= 0:
        raise InputError(f"{path}: image_std is {list(std)}; each is above 0")
    return mean, std


def _mlp_width(config: dict[str, Any], width: int, swiglu: bool, where: Path) -> int:
    """SigLIP and MAE state it; DINOv2 states a ratio, of which SwiGLU keeps two thirds."""
    if "mlp_ratio" not in config:
        return _count(config, "intermediate_size", where)
    hidden = int(width * _positive(config, "mlp_ratio", where))
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden


def _count(config: dict[str, Any], key: str, where: Path, least: int = 1) -> int:
    """A whole number, at least `least`."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{where}: {key} is {value!r}; it is a whole number of at least {least}")
    return value


def _side(config: dict[str, Any], key: str, where: Path) -> int:
    """A square's side, told as N or as [N, N]."""
    value = config[key]
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return _count({key: value}, key, where)


def _positive(config: dict[str, Any], key: str, where: Path) -> float:
    """A finite number above 0."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{where}: {key} is {value!r}; it is a number above 0")
    return float(value)


def _flag(config: dict[str, Any], key: str, where: Path) -> bool:
    """True or false."""
    value = config[key]
    if not isinstance(value, bool):
        raise InputError(f"{where}: {key} is {value!r}; it is true or false")
    return value


def _triple(config: dict[str, Any], key: str, where: Path, default: Triple) -> Triple:
    """Three finite numbers, one a channel."""
    value = config.get(key, default)
    numbers = isinstance(value, list | tuple) and len(value) == 3
    if not numbers or not all(isinstance(v, int | float) and math.isfinite(v) for v in value):
        raise InputError(f"{where}: {key} is {value!r}; it is three numbers, one a channel")
    return (float(value[0]), float(value[1]), float(value[2]))

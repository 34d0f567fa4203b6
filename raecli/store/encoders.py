"""An encoder's name to a complete EncoderSpec, weights found and hashed. torch is imported for `timm:` names alone."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raecli.errors import UsageError
from raecli.recipe.blocks import EncoderSpec, check_layers
from raecli.store.atomic import sha256_of
from raecli.store.encoder_baselines import PIXELS, SDVAE, is_baseline, resolve_baseline
from raecli.store.encoder_config import HALF, IMAGENET, Triple, read_folder_config
from raecli.store.encoder_weights import check_safetensors, weights_from_hub, weights_in_folder

DIGITS_FOLDER = Path(__file__).parent.parent / "assets" / "digits_mae"


@dataclass(frozen=True)
class Preset:
    """A published encoder, by timm's name. Shapes are told here, so that nothing is asked of the hub."""

    family: Literal["dinov2", "dinov3", "siglip", "mae", "timm"]
    architecture: str
    width: int
    depth: int
    patch_size: int
    prefix_tokens: int  # class token + registers
    norm_eps: float  # as in Hugging Face transformers, which the released autoencoders were trained with
    position_antialias: bool  # likewise
    statistics: tuple[Triple, Triple] = IMAGENET  # mean, standard deviation


def _dinov2(size: str, width: int, depth: int) -> Preset:
    """DINOv2 with registers."""
    return Preset("dinov2", f"vit_{size}_patch14_reg4_dinov2.lvd142m", width, depth, 14, 5, 1e-6, True)


def _dinov3(size: str, width: int, depth: int) -> Preset:
    """DINOv3: rotary positions, so none are resampled."""
    return Preset("dinov3", f"vit_{size}_patch16_dinov3.lvd1689m", width, depth, 16, 5, 1e-5, True)


PRESETS: dict[str, Preset] = {
    "dinov2-s": _dinov2("small", 384, 12),
    "dinov2-b": _dinov2("base", 768, 12),
    "dinov2-l": _dinov2("large", 1024, 24),
    "siglip2-b": Preset("siglip", "vit_base_patch16_siglip_256.v2_webli", 768, 12, 16, 0, 1e-6, False, HALF),
    "siglip2-so": Preset("siglip", "vit_so400m_patch14_siglip_224.v2_webli", 1152, 27, 14, 0, 1e-6, False, HALF),
    "mae-b": Preset("mae", "vit_base_patch16_224.mae", 768, 12, 16, 1, 1e-12, False),
    "dinov3-s": _dinov3("small", 384, 12),
    "dinov3-b": _dinov3("base", 768, 12),
    "dinov3-l": _dinov3("large", 1024, 24),
}
EMBEDDED = "digits-mae"


def resolve_encoder(
    name: str,
    *,
    image_size: int,
    weights: str | None = None,
    input_size: int | None = None,
    layers: str = "last",
    offline: bool = False,
) -> EncoderSpec:
    """Complete an encoder's description, so that the workers need neither names nor network.

    name: a preset, `digits-mae`, `timm:NAME`, a Hugging Face folder, `pixels`, or `sdvae:FOLDER`. image_size: pixels a
    side of the data. weights: a safetensors file to use instead of the name's own. input_size: pixels a side that the
    encoder sees. layers: `last`, or `sum:K` for the sum of the last K blocks' tokens; `sum:1` is `last`.
    """
    try:
        check_layers(layers)
    except ValueError as error:
        raise UsageError(f"encoder {name}: layers is {layers!r}; {error}") from None
    layers = "last" if layers == "sum:1" else layers
    if is_baseline(name):
        if layers != "last":
            raise UsageError(f"encoder {name}: has no blocks to add up; leave --layers out")
        return resolve_baseline(name, image_size=image_size, weights=weights, input_size=input_size)
    spec, depth = _resolve_transformer(name, image_size, weights, input_size, offline)
    if layers != "last" and int(layers.removeprefix("sum:")) > depth:
        raise UsageError(f"encoder {name}: layers is {layers}, but it has {depth} blocks")
    return spec.model_copy(update={"layers": layers})


def _resolve_transformer(
    name: str, image_size: int, weights: str | None, input_size: int | None, offline: bool
) -> tuple[EncoderSpec, int]:
    """The spec of a vision transformer, and how many blocks it has."""
    if name in PRESETS:
        preset = PRESETS[name]
        repository: str | None = f"timm/{preset.architecture}"
        return _from_preset(name, preset, repository, image_size, weights, input_size, offline), preset.depth
    if name.startswith("timm:"):
        preset, repository = describe_timm(name, image_size, input_size)
        return _from_preset(name, preset, repository, image_size, weights, input_size, offline), preset.depth
    if name == EMBEDDED:
        return _from_folder(name, DIGITS_FOLDER, image_size, weights, input_size)
    if Path(name).is_dir():
        return _from_folder(name, Path(name), image_size, weights, input_size)
    raise UsageError(_unknown(name))


def encoder_input_size(name: str, image_size: int, patch_size: int, input_size: int | None) -> int:
    """Pixels a side that the encoder sees: a patch of 14 stands for 16 of the image's pixels, so 256 gives 224."""
    scale = 14 / 16 if patch_size == 14 else 1
    side = image_size * scale if input_size is None else input_size
    if side < patch_size or side % patch_size:
        told = (
            f"input size {side:g}" if input_size is not None else f"image size {image_size} gives input size {side:g}"
        )
        below = max(1, int(side // patch_size))
        fits = " or ".join(f"{patch_size * n / (1 if input_size is not None else scale):g}" for n in (below, below + 1))
        raise UsageError(
            f"encoder {name}: {told}, which patches of {patch_size} do not tile; the nearest sizes: {fits}"
        )
    return int(side)


def describe_timm(name: str, image_size: int, input_size: int | None) -> tuple[Preset, str | None]:
    """Shapes of `timm:NAME`, read from a model without storage, and the hub's repository of its weights, if any."""
    import timm
    import torch

    architecture = name.removeprefix("timm:")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise UsageError(f"encoder {name}: timm has no such model" + (f"; near are {', '.join(near)}" if near else ""))
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "global_pool": ""}
    try:
        with torch.device("meta"), torch.no_grad():
            model: Any = timm.create_model(architecture, **options)
            patch_size = int(model.patch_embed.patch_size[0])
            side = encoder_input_size(name, image_size, patch_size, input_size)
            model = timm.create_model(architecture, img_size=side, **options)
            tokens = tuple(model.forward_features(torch.empty(1, 3, side, side)).shape)
        width, prefix, norm = int(model.embed_dim), int(model.num_prefix_tokens), model.norm
        depth = len(model.blocks)
    # A model of another build lacks an attribute or refuses an option.
    except (AttributeError, TypeError, RuntimeError, AssertionError) as error:
        raise UsageError(f"encoder {name}: not a plain vision transformer ({error})") from error
    if tokens != (1, prefix + (side // patch_size) ** 2, width) or not isinstance(norm, torch.nn.LayerNorm):
        raise UsageError(f"encoder {name}: not a plain vision transformer: gives {tokens} and ends in {norm}")
    published = model.pretrained_cfg
    statistics = (_triple(published["mean"]), _triple(published["std"]))
    preset = Preset("timm", architecture, width, depth, patch_size, prefix, norm.eps, True, statistics)
    return preset, published.get("hf_hub_id")


def _from_preset(
    name: str,
    preset: Preset,
    repository: str | None,
    image_size: int,
    weights: str | None,
    input_size: int | None,
    offline: bool,
) -> EncoderSpec:
    """A timm encoder: weights as told, else from the Hugging Face cache, else from the hub."""
    side = encoder_input_size(name, image_size, preset.patch_size, input_size)
    if not weights and not repository:
        raise UsageError(f"encoder {name}: timm publishes no weights of it on the hub; give a file with --weights FILE")
    path = Path(weights) if weights else weights_from_hub(name, str(repository), offline=offline)
    check_safetensors(path)
    return EncoderSpec(
        name=name,
        family=preset.family,
        loader="timm",
        architecture=preset.architecture,
        weights=str(path.absolute()),
        weights_sha256=sha256_of(path),
        input_size=side,
        patch_size=preset.patch_size,
        width=preset.width,
        prefix_tokens=preset.prefix_tokens,
        norm_eps=preset.norm_eps,
        position_antialias=preset.position_antialias,
        mean=preset.statistics[0],
        std=preset.statistics[1],
    )


def _from_folder(
    name: str, folder: Path, image_size: int, weights: str | None, input_size: int | None
) -> tuple[EncoderSpec, int]:
    """A Hugging Face folder: shapes from its config.json, weights from its model.safetensors. Also its depth."""
    config = read_folder_config(folder)
    side = encoder_input_size(name, image_size, config.patch_size, input_size)
    path = Path(weights) if weights else weights_in_folder(folder)
    check_safetensors(path)
    spec = EncoderSpec(
        name=name,
        family=config.family,
        loader="folder",
        architecture=config.model_type,
        path=str(folder.absolute()),
        weights=str(path.absolute()),
        weights_sha256=sha256_of(path),
        input_size=side,
        patch_size=config.patch_size,
        width=config.width,
        prefix_tokens=config.prefix_tokens,
        norm_eps=config.norm_eps,
        position_antialias=config.position_antialias,
        mean=config.mean,
        std=config.std,
    )
    return spec, config.depth


def _unknown(name: str) -> str:
    """Say what the name may have meant."""
    names = [*PRESETS, EMBEDDED, PIXELS]
    if os.sep in name or name.startswith("."):
        kinds = f"a Hugging Face folder, timm:NAME, {SDVAE}FOLDER, or {', '.join(names)}"
        return f"encoder {name}: no such folder; an encoder is {kinds}"
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(names)}."
    return f"encoder {name}: unknown, and no such folder; {hint} Or give timm:NAME, or a Hugging Face folder"


def _triple(values: tuple[float, ...]) -> Triple:
    """Three floats."""
    return (float(values[0]), float(values[1]), float(values[2]))

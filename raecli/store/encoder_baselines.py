"""`pixels` and `sdvae:FOLDER` to a complete EncoderSpec: the baselines of Tables 2, 10 and 11. No torch."""

import importlib.util
from pathlib import Path
from typing import Any

from raecli.errors import InputError, UsageError
from raecli.recipe.blocks import EncoderSpec
from raecli.store.atomic import sha256_of
from raecli.store.encoder_config import HALF
from raecli.store.encoder_weights import check_safetensors
from raecli.store.json_file import read_json

PIXELS = "pixels"
SDVAE = "sdvae:"
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
SCALING_FACTOR = 0.18215  # diffusers' own where config.json has none, as SD-VAE's first ones


def is_baseline(name: str) -> bool:
    """Whether a name means latents with a decoder of their own: pixels, or sdvae:FOLDER."""
    return name == PIXELS or name.startswith(SDVAE)


def resolve_baseline(name: str, *, image_size: int, weights: str | None, input_size: int | None) -> EncoderSpec:
    """The spec of a baseline; both see the images as large as they are."""
    if input_size not in (None, image_size):
        raise UsageError(f"encoder {name}: sees images of {image_size} pixels as they are; leave --input-size out")
    if name == PIXELS:
        return _pixels(image_size, weights)
    return _vae(name, Path(name.removeprefix(SDVAE)), image_size, weights)


def _pixels(image_size: int, weights: str | None) -> EncoderSpec:
    """Images in [-1, 1] as their own latents."""
    if weights:
        raise UsageError("encoder pixels: has no weights; leave --weights out")
    return EncoderSpec(
        name=PIXELS,
        family="pixels",
        loader="pixels",
        architecture="pixels",
        input_size=image_size,
        patch_size=1,
        width=3,
        prefix_tokens=0,
        norm_eps=None,
        mean=HALF[0],
        std=HALF[1],
    )


def _vae(name: str, folder: Path, image_size: int, weights: str | None) -> EncoderSpec:
    """A diffusers AutoencoderKL: its shapes from config.json."""
    config = _read_config(name, folder)
    where = folder / "config.json"
    stages = config.get("block_out_channels")
    if not isinstance(stages, list) or not stages:
        raise InputError(f"{where}: block_out_channels is {stages!r}; it is a list of whole numbers")
    patch_size = 2 ** (len(stages) - 1)
    if image_size % patch_size:
        near = image_size // patch_size * patch_size
        raise UsageError(
            f"encoder {name}: image size {image_size} is no multiple of {patch_size}; the nearest sizes: "
            f"{near or patch_size} or {near + patch_size}"
        )
    if importlib.util.find_spec("diffusers") is None:
        raise UsageError(f"encoder {name}: needs diffusers, which is not installed: pip install 'raecli[diffusers]'")
    path = _weights_of(folder, weights)
    return EncoderSpec(
        name=name,
        family="vae",
        loader="diffusers",
        architecture="AutoencoderKL",
        path=str(folder.absolute()),
        weights=str(path.absolute()),
        weights_sha256=sha256_of(path),
        input_size=image_size,
        patch_size=patch_size,
        width=_number(config, "latent_channels", 4, where, whole=True),
        prefix_tokens=0,
        norm_eps=None,
        mean=HALF[0],
        std=HALF[1],
        scaling_factor=float(_number(config, "scaling_factor", SCALING_FACTOR, where)),
        shift_factor=_shift_factor(config, where),
    )


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    """config.json of an AutoencoderKL."""
    if not (folder / "config.json").is_file():
        inside = folder / "vae"
        hint = f"give {SDVAE}{inside}" if (inside / "config.json").is_file() else "bring the whole diffusers folder"
        raise UsageError(f"encoder {name}: no config.json in {folder}; {hint}")
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "AutoencoderKL":
        found = config.get("_class_name")
        raise UsageError(f"{folder / 'config.json'}: _class_name is {found!r}; an AutoencoderKL is read here")
    return config


def _weights_of(folder: Path, weights: str | None) -> Path:
    """The folder's own file, or another that was told."""
    path = Path(weights) if weights else folder / VAE_WEIGHTS
    if not weights and not path.is_file():
        pickled = (folder / "diffusion_pytorch_model.bin").is_file()
        also = ", only a pickle, which is not read" if pickled else ""
        raise UsageError(f"encoder {SDVAE}{folder}: no {VAE_WEIGHTS}{also}; bring it, or give it with --weights FILE")
    check_safetensors(path)
    return path


def _number(config: dict[str, Any], key: str, default: float, where: Path, *, whole: bool = False) -> Any:
    """A number above 0 of the configuration."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > 0:
        raise InputError(f"{where}: {key} is {value!r}; it is a {'whole ' if whole else ''}number above 0")
    return value


def _shift_factor(config: dict[str, Any], where: Path) -> float | None:
    """What is taken off a latent before it is scaled; SD-VAE has none."""
    value = config.get("shift_factor")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: shift_factor is {value!r}; it is a number, or null")
    return float(value)

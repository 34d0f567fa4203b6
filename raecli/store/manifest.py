"""manifest.json of a latent cache: what it holds, what made it, and how to know that it is whole. No torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from raecli.errors import InputError
from raecli.recipe.blocks import Dtype, EncoderSpec, Precision
from raecli.recipe.spec import Count, Spec
from raecli.store.json_file import read_json
from raecli.store.remote import local_folder

MANIFEST = "manifest.json"
PREPROCESS: Literal["adm-center-crop"] = (
    "adm-center-crop"  # guided-diffusion's: halve by BOX while twice too large, BICUBIC, crop the centre
)


SHARD = r"[A-Za-z0-9_-]+\.tar"  # a plain name: nothing outside the folder


class ShardRecord(Spec):
    """A finished shard."""

    name: str = Field(pattern=rf"^{SHARD}$")
    samples: Count
    bytes: Count
    sha256: str


class SkippedImage(Spec):
    """An image that could not be read, and why."""

    source: str
    reason: str


class Manifest(Spec):
    """A latent cache. Latents are stored un-normalised; `statistics.safetensors` has their mean and variance."""

    format: Literal["rae-latents"] = "rae-latents"
    version: Literal[1] = 1
    encoder: EncoderSpec
    image_size: Count
    preprocess: Literal["adm-center-crop"] = PREPROCESS
    latent_shape: tuple[int, int, int]
    dtype: Dtype
    precision: Precision  # of the encoder
    views: Literal["center", "center+flip"]
    classes: tuple[str, ...]  # names by label; empty: the images have no classes
    samples: int
    samples_per_shard: Count
    batch_size: Count | None = None  # of the encoder's forwards, on which a latent's last bits depend; None: not told
    seed: int
    source_sha256: str  # of the list of image names and sizes
    shards: tuple[ShardRecord, ...]
    index_sha256: str
    statistics_sha256: str
    skipped: tuple[SkippedImage, ...] = ()
    quantisation_error: float | None = None  # of int8: sqrt(sum (stored - encoded)^2 / sum encoded^2), all latents


def read_manifest(cache: str | Path) -> Manifest:
    """The manifest of a cache, in a folder or at a URL. Raises InputError if there is none, or it is not one."""
    folder = local_folder(cache)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make the cache with rae encode-cache --encoder E IMAGES {folder}")
    if not path.is_file():
        if (folder / "plan.json").is_file():
            raise InputError(f"{folder}: no finished latent cache; run the same rae encode-cache again to finish it")
        raise InputError(f"{folder}: no latent cache (no {MANIFEST}); rae encode-cache --encoder E IMAGES OUT makes it")
    try:
        return Manifest.model_validate(tuples(read_json(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest that this version reads: {reason(error)}") from None


def tuples(value: Any) -> Any:
    """JSON's lists as tuples, as the frozen specs hold them."""
    if isinstance(value, list):
        return tuple(tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return value


def reason(error: Exception) -> str:
    """The first thing that is wrong, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def encoder_identity(encoder: EncoderSpec) -> dict[str, Any]:
    """What makes two encoders the same: everything but where their files lie and how they were named."""
    return {key: value for key, value in encoder.to_dict().items() if key not in ("name", "path", "weights")}


def differing_fields(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """`field: found X, expected Y` for each field that differs."""
    return [
        f"{key}: found {found.get(key)!r}, expected {expected.get(key)!r}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]

"""The encoder of a converted autoencoder: found by name, or kept inside the artifact."""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raecli.errors import CheckpointError, UsageError
from raecli.models.load import located
from raecli.recipe.blocks import EncoderSpec
from raecli.store.artifact import artifact_folder
from raecli.store.checkpoint import CONFIG
from raecli.store.encoders import resolve_encoder
from raecli.store.json_file import read_json
from raecli.store.manifest import tuples

FOLDER = "encoder"  # inside an artifact
WEIGHTS = "model.safetensors"


def resolved_encoder(
    name: str, *, image_size: int, weights: str | None, input_size: int | None, offline: bool = False
) -> EncoderSpec:
    """An encoder by preset, `timm:NAME` or Hugging Face folder; or the one of an autoencoder artifact of ours."""
    artifact = artifact_config(Path(name))
    if artifact is None:
        return resolve_encoder(name, image_size=image_size, weights=weights, input_size=input_size, offline=offline)
    folder, config = artifact
    try:
        spec = EncoderSpec.model_validate(tuples(config["latents"]["encoder"]))
        return located(spec, int(config["latents"]["image_size"]), folder, offline=offline)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{folder / CONFIG}: tells no encoder: {error}") from None


def artifact_config(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and configuration of an artifact of ours; None if the path is none."""
    try:
        folder = artifact_folder(path)
    except CheckpointError:
        return None
    config = read_json(folder / CONFIG)
    return (folder, config) if str(config.get("format", "")).startswith("rae-") else None


def copy_inside(spec: EncoderSpec, scratch: Path) -> None:
    """Copy an encoder's files into an artifact, where relative() tells them."""
    inside = scratch / FOLDER
    inside.mkdir()
    shutil.copyfile(str(spec.weights), inside / WEIGHTS)
    if spec.path is not None:
        for name in (CONFIG, "preprocessor_config.json"):
            if (Path(spec.path) / name).is_file():
                shutil.copyfile(Path(spec.path) / name, inside / name)


def relative(spec: EncoderSpec) -> EncoderSpec:
    """The same encoder, its files told relative to the artifact that they are in. UsageError if it has none."""
    if spec.weights is None:
        raise UsageError(f"encoder {spec.name}: has no weights to keep")
    path = None if spec.path is None else FOLDER
    return spec.model_copy(update={"path": path, "weights": f"{FOLDER}/{WEIGHTS}"})


def write_folder(folder: Path, config: dict[str, Any], preprocessor: dict[str, Any]) -> None:
    """config.json and preprocessor_config.json of a Hugging Face folder; its weights are the caller's."""
    folder.mkdir()
    for name, value in ((CONFIG, config), ("preprocessor_config.json", preprocessor)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

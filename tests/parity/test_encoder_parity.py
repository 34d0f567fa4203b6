"""Encoders against vectors of the released code and of Hugging Face's own models (see make_encoder_goldens.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raecli.models.build import ENCODER_FIELDS
from raecli.models.encoder import Encoder, build_encoder
from raecli.store.encoders import resolve_encoder

VECTORS = Path(__file__).parent / "vectors"

# fp32 on a CPU: the same operations, but a matrix product may sum in another order. Measured here: 2.4e-6 and less.
TOLERANCE = 1e-5


def encoder_of(folder: Path, image_size: int) -> Encoder:
    """The folder's encoder, by the way that a user's goes."""
    spec = resolve_encoder(str(folder), image_size=image_size)
    return build_encoder(**spec.model_dump(include=set(ENCODER_FIELDS)))


def assert_same_latents(folder: Path, vector: dict[str, torch.Tensor]) -> None:
    """The folder's encoder gives the vector's latents."""
    images = vector["images"].float()
    latents = encoder_of(folder, images.shape[-1])(images)
    assert latents.std() > 0.5  # the vector is no trivial one
    torch.testing.assert_close(latents, vector["latents"], atol=TOLERANCE, rtol=0)


def test_released_dinov2_latents_agree():
    folder = VECTORS / "encoder_dinov2"
    vector = load_file(folder / "io.safetensors")
    latents = encoder_of(folder, 256)(vector["images"].float())
    normalised = latents / (vector["variance"] + 1e-5).sqrt()  # that release's mean is None
    torch.testing.assert_close(normalised, vector["latents"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_swiglu", "siglip", "vit_mae"])
def test_hugging_face_model_agrees(name):
    assert_same_latents(VECTORS / name, load_file(VECTORS / name / "io.safetensors"))


def test_vision_tower_saved_alone_agrees(tmp_path):
    source = VECTORS / "siglip"
    tower = {key.removeprefix("vision_model."): value for key, value in load_file(source / "model.safetensors").items()}
    tower = {key: value for key, value in tower.items() if not key.startswith(("text_model.", "logit_"))}
    save_file(tower, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config["model_type"] == "siglip_vision_model"
    assert_same_latents(tmp_path, load_file(source / "io.safetensors"))


def test_backbone_inside_a_classifier_agrees(tmp_path):
    source = VECTORS / "dinov2"
    tensors = {f"dinov2.{key}": value for key, value in load_file(source / "model.safetensors").items()}
    save_file(tensors | {"classifier.weight": torch.zeros(10, 64)}, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    assert_same_latents(tmp_path, load_file(source / "io.safetensors"))


def test_keys_that_siglip_leaves_out_have_its_defaults(tmp_path):
    source = VECTORS / "siglip"
    shutil.copy(source / "model.safetensors", tmp_path)
    config = json.loads((source / "config.json").read_text())
    for key in ("hidden_act", "layer_norm_eps", "num_channels"):
        del config["vision_config"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_latents(tmp_path, load_file(source / "io.safetensors"))

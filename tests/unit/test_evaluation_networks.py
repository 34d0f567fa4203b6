"""Images through Inception and DINOv2 with random weights: the whole of `rae eval`, and files that stand for images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from raecli.errors import CheckpointError, InputError, UsageError
from raecli.evaluation.dinov2 import find_dinov2, load_dinov2, resampled_positions
from raecli.recipe.recipes import EvaluateRecipe
from raecli.stages import evaluate
from raecli.training.distributed import Ranks
from tests import adm_reference
from tests.unit.test_metrics_inception import random_network

ALONE = Ranks(0, 1, torch.device("cpu"))
EVERY = ("fid", "sfid", "is", "precision-recall", "kid", "fdd")
PIXELS = np.random.default_rng(3).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)


def run(output: Path, samples: Path, reference: Path | None = None, **told) -> None:
    """The stage in this process."""
    recipe = EvaluateRecipe(
        stage="eval",
        **{"metrics": (), "samples": str(samples), "output": str(output), **told},
        reference=str(reference) if reference else None,
    )
    evaluate.run(recipe, ALONE)


def tiny_dinov2(positions: int = 37 * 37) -> dict[str, torch.Tensor]:
    """A state dict as published, 64 wide and 2 deep, every tensor drawn."""
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=224, patch_size=14, num_classes=0, embed_dim=64, depth=2, num_heads=1, init_values=1e-5
    )
    tensors = {name: torch.randn_like(value) * 0.1 for name, value in network.state_dict().items()}
    tensors["pos_embed"] = torch.randn(1, 1 + positions, 64) * 0.1
    return tensors | {"mask_token": torch.zeros(1, 64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights of both networks, samples.npz of 6 images and reference.npz of 5, and all their reports and files."""
    root = tmp_path_factory.mktemp("networks")
    torch.save(random_network().state_dict(), root / "inception.pth")
    torch.save(tiny_dinov2(), root / "dinov2.pth")
    np.savez(root / "samples.npz", arr_0=PIXELS[:6])
    np.savez(root / "reference.npz", arr_0=PIXELS[6:])
    weights = {"inception": str(root / "inception.pth"), "dinov2": str(root / "dinov2.pth")}
    told = {"metrics": EVERY, "optional": True, "batch_size": 4, **weights}
    run(root / "report.json", root / "samples.npz", root / "reference.npz", **told)
    run(root / "sample_features.npz", root / "samples.npz", write="features", **weights)
    run(root / "reference_statistics.npz", root / "reference.npz", write="statistics", **weights)
    return root


def test_every_figure_comes_from_images(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["unavailable"] == {}
    for name in ("fid", "sfid", "inception_score", "precision", "recall", "kid", "fdd"):
        assert np.isfinite(report[name]), name
    assert report["features"]["sha256"] != report["fdd_features"]["sha256"]
    assert any("favours RAE" in warning for warning in report["warnings"])
    assert any("not the published ones" in warning for warning in report["warnings"])
    assert (report["samples"], report["reference_samples"]) == (6, 5)


def test_a_feature_file_holds_the_layers_and_stands_for_its_images(folder, tmp_path):
    with np.load(folder / "sample_features.npz") as file:
        shapes = {name: file[name].shape for name in file if name != "provenance"}
        types = {file[name].dtype for name in shapes}
        pool, told = file["pool"], json.loads(str(file["provenance"]))
    assert shapes == {"pool": (6, 2048), "spatial": (6, 2023), "logits": (6, 1008), "dinov2": (6, 64)}
    assert types == {np.dtype(np.float32)}
    assert (told["kind"], told["features"]["name"]) == ("generation", "inception-v3-compat")
    assert not list(folder.glob(".partial*"))
    whole = json.loads((folder / "report.json").read_text())
    run(
        tmp_path / "report.json",
        folder / "sample_features.npz",
        folder / "reference_statistics.npz",
        metrics=("fid", "sfid", "is", "fdd"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("fid", "sfid", "inception_score", "fdd"):
        # Batches of 4 and of 64: float32 convolutions may round otherwise.
        assert report[name] == pytest.approx(whole[name], rel=1e-4), name
    assert report["sides"]["reference"]["kind"] == "generation"
    assert pool.std(0).min() > 0


def test_the_statistics_are_those_of_the_features(folder):
    images = folder / "reference.npz"
    run(folder / "reference_features.npz", images, write="features", inception=str(folder / "inception.pth"))
    with np.load(folder / "reference_features.npz") as file, np.load(folder / "reference_statistics.npz") as stored:
        for layer, suffix in (("pool", ""), ("spatial", "_s")):
            np.testing.assert_allclose(stored[f"mu{suffix}"], file[layer].mean(0, np.float64), rtol=1e-4, atol=1e-5)
            expected = np.cov(file[layer].astype(np.float64), rowvar=False)
            np.testing.assert_allclose(stored[f"sigma{suffix}"], expected, rtol=1e-3, atol=1e-4)
        assert int(stored["n"]) == 5


def test_only_images_are_extracted_from(folder):
    with pytest.raises(InputError, match="holds no images"):
        run(folder / "again.npz", folder / "sample_features.npz", write="features")


def test_fdd_compares_class_tokens_after_the_last_norm(folder):
    """Resize, normalisation, positions and token written down again."""
    tensors = tiny_dinov2()
    tensors.pop("mask_token")
    tensors["pos_embed"] = resampled_positions(tensors["pos_embed"], 16)
    network = VisionTransformer(
        img_size=224, patch_size=14, num_classes=0, embed_dim=64, depth=2, num_heads=1, init_values=1e-5
    ).eval()
    network.load_state_dict(tensors)
    images = F.interpolate(
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float(), (224, 224), mode="bicubic", antialias=True
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        tokens = network.forward_features((images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))[:, 0].numpy()
    report = json.loads((folder / "report.json").read_text())
    assert report["fdd"] == pytest.approx(adm_reference.frechet(tokens[:6], tokens[6:]), rel=1e-3)


def test_dinov2s_positions_are_resampled_by_its_own_scale():
    """A ramp stays a ramp: place i of 16 lies at (i + .5) * 37 / 16.1 - .5 of the 37, inside the border."""
    ramp = torch.arange(37.0).repeat_interleave(37).view(1, -1, 1)
    positions = torch.cat([torch.full((1, 1, 1), 7.0), ramp], 1)
    found = resampled_positions(positions, 16)[0, :, 0]
    assert found[0] == 7
    found_ramp, places = found[1:].view(16, 16)[1:15, 0], (torch.arange(16) + 0.5)[1:15]
    # torch's cubic (a = -.75) bends a ramp by .05 between its points; a scale of 37 / 16 would be off by .2.
    assert (found_ramp - (places * 37 / 16.1 - 0.5)).abs().max() < 0.06
    assert (found_ramp - (places * 37 / 16 - 0.5)).abs().max() > 0.15
    assert torch.equal(resampled_positions(found[None, :, None], 16)[0, :, 0], found)


def test_dinov2_is_read_from_both_published_forms_and_others_are_refused(tmp_path, monkeypatch):
    tensors = tiny_dinov2()
    torch.save(tensors, tmp_path / "hub.pth")
    save_file(tensors, tmp_path / "timm.safetensors")
    images = torch.from_numpy(PIXELS[:2]).permute(0, 3, 1, 2)
    assert torch.equal(load_dinov2(tmp_path / "hub.pth")(images), load_dinov2(tmp_path / "timm.safetensors")(images))
    torch.save(tensors | {"register_tokens": torch.zeros(1, 4, 64)}, tmp_path / "registers.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    for name, said in (("registers", "has registers"), ("other", "no weights of a DINOv2"), ("list", "state dict")):
        with pytest.raises(CheckpointError, match=said):
            load_dinov2(tmp_path / f"{name}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("RAE_DINOV2", raising=False)
    with pytest.raises(UsageError, match=r"dinov2_vitl14_pretrain\.pth.*--dinov2 FILE"):
        find_dinov2()
    monkeypatch.setenv("RAE_DINOV2", str(tmp_path / "hub.pth"))
    assert find_dinov2() == tmp_path / "hub.pth"

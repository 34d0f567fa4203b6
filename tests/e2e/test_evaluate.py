"""`rae eval` on small sets of images: figures, reports, ranks, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from raecli.errors import CheckpointError, InputError, NonFiniteError, UsageError
from raecli.metrics.statistics import Moments, save_statistics
from raecli.models.build import encoder_of
from raecli.models.classifier import Classifier, load_classifier, save_classifier
from raecli.recipe.recipes import EvaluateRecipe
from raecli.stages import evaluate
from raecli.store.atomic import sha256_of
from raecli.store.encoders import resolve_encoder
from raecli.training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
GENERATOR = np.random.default_rng(0)
SAMPLES = GENERATOR.integers(0, 256, (25, 16, 16, 3), dtype=np.uint8)
REFERENCE = GENERATOR.integers(60, 256, (40, 16, 16, 3), dtype=np.uint8)
WIDTH, CLASSES = 6, 3


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with samples/ as PNGs, reference.npz, and a random classifier."""
    root = tmp_path_factory.mktemp("eval")
    write_images(root / "samples", SAMPLES)
    np.savez(root / "reference.npz", arr_0=REFERENCE)
    torch.manual_seed(0)
    model = Classifier(image_size=16, classes=CLASSES, widths=(8, 8), feature_width=WIDTH)
    torch.nn.init.constant_(model.hidden.bias, 1.0)  # few features are cut off by the ReLU
    save_classifier(root / "judge.safetensors", model)
    return root


def write_images(folder: Path, pixels: np.ndarray) -> None:
    """Pixels as 000000.png and so on."""
    folder.mkdir(parents=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:06d}.png")


def evaluated(capsys, **told) -> dict:
    """The report of one run in this process, as printed on stdout."""
    recipe = EvaluateRecipe(stage="eval", print_json=True, **{"metrics": ("fid",), **told})
    evaluate.run(recipe, ALONE)
    return json.loads(capsys.readouterr().out)


def fid_of(files: Path, capsys, **told) -> dict:
    """The report of samples against the reference in the classifier's features."""
    standard = {"samples": "samples", "reference": "reference.npz", "features": "judge.safetensors"}
    paths = {name: str(files / value) for name, value in (standard | told).items() if isinstance(value, str)}
    return evaluated(capsys, **{**told, **paths})


def features_of(files: Path, pixels: np.ndarray) -> torch.Tensor:
    """The classifier's features of pixels [N, H, W, 3], float64."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return load_classifier(files / "judge.safetensors").features(images).detach().double()


def door(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`rae eval ...` in a process of its own."""
    command = [sys.executable, "-m", "raecli", "eval", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_fid_is_that_of_the_features_means_and_covariances(files, capsys):
    """Closed form by scipy's square root of a matrix; the report says how it came about."""
    a, b = features_of(files, SAMPLES), features_of(files, REFERENCE)
    cov_a, cov_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    mean_part = (a.mean(0) - b.mean(0)).square().sum().item()
    report = fid_of(files, capsys)
    assert report["mean_part"] == pytest.approx(mean_part, rel=1e-4)  # float32 features of another batch size
    assert report["trace_part"] == pytest.approx(np.trace(cov_a + cov_b - 2 * root), rel=1e-4)
    assert report["fid"] == report["mean_part"] + report["trace_part"]
    assert (report["samples"], report["reference_samples"]) == (25, 40)
    assert report["features"]["sha256"] == sha256_of(files / "judge.safetensors")
    assert report["features"]["width"] == WIDTH


@pytest.mark.parametrize("batch_size", [1, 7])
def test_fid_does_not_depend_on_the_batch_size(files, capsys, batch_size):
    assert fid_of(files, capsys, batch_size=batch_size)["fid"] == pytest.approx(fid_of(files, capsys)["fid"], rel=1e-6)


def test_the_door_on_two_ranks_gives_the_figures_of_one(files, capsys):
    words = ["fid", str(files / "samples"), "--ref", str(files / "reference.npz"), "--batch-size", "7"]
    out = files / "two.json"
    done = door(*words, "--features", str(files / "judge.safetensors"), "--devices", "2", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report, alone = json.loads(done.stdout), fid_of(files, capsys, batch_size=7)
    assert json.loads(out.read_text()) == report
    assert (report["world"], report["samples"], report["reference_samples"]) == (2, 25, 40)
    # The same float32 features up to the make-up of a batch, merged in float64.
    assert report["fid"] == pytest.approx(alone["fid"], rel=1e-6)


def test_without_inceptions_weights_the_door_ends_with_2_and_says_what_to_bring(files):
    done = door("fid", str(files / "samples"), "--ref", str(files / "reference.npz"), TORCH_HOME=str(files / "none"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "weights-inception-2015-12-05-6726825d.pth" in done.stderr
    assert "--features FILE" in done.stderr


def test_stored_statistics_of_this_network_replace_the_images(files, capsys):
    whole = fid_of(files, capsys)
    features = features_of(files, REFERENCE)
    arrays = {"mu": features.mean(0).numpy(), "sigma": torch.cov(features.T).numpy()}
    told = json.dumps({"features": whole["features"]})
    np.savez(files / "statistics.npz", n=np.array(40), provenance=np.array(told), **arrays)
    stored = fid_of(files, capsys, reference="statistics.npz")
    assert stored["fid"] == pytest.approx(whole["fid"], rel=1e-4)  # float32 features of another batch size
    assert stored["statistics"]["reference"] == "stored in the file"
    assert stored["reference_samples"] == 40


def test_statistics_of_another_network_are_not_used(files, capsys):
    """ADM's reference batch holds Inception's: with images beside them those are measured, without it is refused."""
    inceptions = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(files / "adm.npz", arr_0=REFERENCE, **inceptions)
    np.savez(files / "adm_statistics.npz", **inceptions)
    report = fid_of(files, capsys, reference="adm.npz")
    assert report["fid"] == fid_of(files, capsys)["fid"]
    assert report["statistics"]["reference"] == "measured from the images"
    with pytest.raises(InputError, match=r"inception-v3-compat, 2048 features.*no images"):
        fid_of(files, capsys, reference="adm_statistics.npz")


def test_statistics_of_the_same_kind_of_network_with_other_weights_are_not_used(files, capsys):
    told = {"features": {"name": "classifier", "sha256": "0" * 64}}
    eye = torch.eye(WIDTH, dtype=torch.float64)
    save_statistics(files / "other.npz", {"pool": Moments(eye[0], eye, 9)}, told)
    with pytest.raises(InputError, match="another feature network"):
        fid_of(files, capsys, reference="other.npz")


def test_an_encoders_averaged_tokens_serve_as_features(capsys, tmp_path):
    pixels = GENERATOR.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels[:5])
    np.savez(tmp_path / "b.npz", arr_0=pixels[5:])
    paths = {"samples": str(tmp_path / "a.npz"), "reference": str(tmp_path / "b.npz")}
    report = evaluated(capsys, features="digits-mae", **paths)
    encoder = encoder_of(resolve_encoder("digits-mae", image_size=32))
    tokens = encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).mean((2, 3)).double()
    mean_part = (tokens[:5].mean(0) - tokens[5:].mean(0)).square().sum().item()
    assert report["mean_part"] == pytest.approx(mean_part, rel=1e-4)  # float32 tokens of another batch size
    assert report["features"]["width"] == tokens.shape[1]


def test_accuracy_counts_the_samples_judged_as_the_class_asked_for(files, capsys, tmp_path):
    images = torch.from_numpy(SAMPLES).permute(0, 3, 1, 2).float() / 255
    labels = load_classifier(files / "judge.safetensors")(images).argmax(1).tolist()
    for index in (0, 3, 4):
        labels[index] = (labels[index] + 1) % CLASSES
    write_images(tmp_path / "samples", SAMPLES)
    (tmp_path / "samples" / "samples.json").write_text(json.dumps({"labels": labels, "seed": 7}))
    told = {"samples": str(tmp_path / "samples"), "classifier": str(files / "judge.safetensors")}
    report = evaluated(capsys, metrics=("accuracy",), batch_size=4, **told)
    assert report["accuracy"] == 22 / 25
    assert sum(report["per_class_samples"].values()) == report["samples"] == 25
    right = sum(share * report["per_class_samples"][label] for label, share in report["per_class"].items())
    assert right == pytest.approx(22)
    assert report["protocol"] == {"seed": 7}


def test_class_folders_tell_the_class_asked_for(files, capsys, tmp_path):
    images = torch.from_numpy(SAMPLES).permute(0, 3, 1, 2).float() / 255
    judged = load_classifier(files / "judge.safetensors")(images).argmax(1).numpy()
    label = int(np.bincount(judged).argmax())
    chosen = SAMPLES[judged == label]
    told = {"metrics": ("accuracy",), "classifier": str(files / "judge.safetensors")}
    write_images(tmp_path / "by_number" / str(label), chosen)
    assert evaluated(capsys, samples=str(tmp_path / "by_number"), **told)["accuracy"] == 1
    for index, name in enumerate(("ant", "bee", "cat")):
        write_images(tmp_path / "by_name" / name, chosen if index == label else chosen[:1])
    report = evaluated(capsys, samples=str(tmp_path / "by_name"), **told)
    assert report["per_class"] == {str(index): float(index == label) for index in range(CLASSES)}
    with pytest.raises(InputError, match="no labels"):
        evaluated(capsys, samples=str(files / "samples"), **told)
    write_images(tmp_path / "by_few_names" / "ant", chosen)
    with pytest.raises(InputError, match="1 class folders, but the classifier knows 3"):
        evaluated(capsys, samples=str(tmp_path / "by_few_names"), **told)


@pytest.mark.parametrize(
    ("labels", "said"),
    [([0, 1], "25 images, but samples.json has 2 labels"), ([9] * 25, "label 9"), ("0", "no list of labels")],
)
def test_labels_that_do_not_fit_are_refused(files, capsys, tmp_path, labels, said):
    write_images(tmp_path / "samples", SAMPLES)
    (tmp_path / "samples" / "samples.json").write_text(json.dumps({"labels": labels}))
    told = {"samples": str(tmp_path / "samples"), "classifier": str(files / "judge.safetensors")}
    with pytest.raises(InputError, match=said):
        evaluated(capsys, metrics=("accuracy",), **told)


def test_few_samples_sorted_classes_and_unequal_sizes_are_said(files, capsys, tmp_path):
    write_images(tmp_path / "samples", SAMPLES[:WIDTH, :8])
    (tmp_path / "samples" / "samples.json").write_text(json.dumps({"labels": [0, 0, 0, 1, 1, 2]}))
    warnings = fid_of(files, capsys, samples=str(tmp_path / "samples"))["warnings"]
    assert len(warnings) == 3
    for word in ("sorted by class", "16 x 8 pixels", f"{WIDTH} images for {WIDTH} features"):
        assert any(word in warning for warning in warnings)
    assert fid_of(files, capsys)["warnings"] == []


def test_the_table_holds_the_figures(files, capsys):
    told = {"samples": str(files / "samples"), "reference": str(files / "reference.npz")}
    expected = fid_of(files, capsys)["fid"]
    recipe = EvaluateRecipe(stage="eval", metrics=("fid",), features=str(files / "judge.safetensors"), **told)
    evaluate.run(recipe, ALONE)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(lines["fid"].split()[0]) == pytest.approx(expected, abs=1e-4)
    assert lines["samples"].startswith("25 images")


def test_what_cannot_be_measured_is_refused(files, capsys, tmp_path):
    with pytest.raises(UsageError, match="--ref"):
        evaluated(capsys, samples=str(files / "samples"))
    with pytest.raises(UsageError, match="--classifier"):
        evaluated(capsys, samples=str(files / "samples"), metrics=("accuracy",))
    with pytest.raises(UsageError, match="exclude one another"):
        fid_of(files, capsys, inception="judge.safetensors")
    with pytest.raises(CheckpointError):
        fid_of(files, capsys, features="absent.safetensors")
    save_classifier(tmp_path / "grey.safetensors", Classifier(image_size=16, classes=2, channels=1))
    with pytest.raises(CheckpointError, match="takes 1 channels"):
        fid_of(files, capsys, features=str(tmp_path / "grey.safetensors"))
    model = load_classifier(files / "judge.safetensors")
    torch.nn.init.constant_(model.hidden.bias, float("nan"))
    save_classifier(tmp_path / "nan.safetensors", model)
    with pytest.raises(NonFiniteError, match=r"000000\.png"):
        fid_of(files, capsys, features=str(tmp_path / "nan.safetensors"))

"""`rae eval` gives the ADM evaluator's figures; and each way to get them wrong moves one of them.

Two cases: shared/parity/inception beside the repository, features of TensorFlow's Inception scored by the unmodified
evaluator, where that folder is there; and a small one of our own, always, scored by tests/adm_reference.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raecli.metrics import inception_score, statistics
from raecli.recipe.recipes import EvaluateRecipe
from raecli.stages import evaluate
from raecli.training.distributed import Ranks
from tests import adm_reference

ADM = Path(__file__).parents[3] / "shared" / "parity" / "inception"
METRICS = ("fid", "sfid", "is", "precision-recall", "kid", "fdd")
PLACES, CHANNELS, CLASSES, WIDTH = 9, 7, 11, 24
# FID and sFID: 1e-3 of the printed, whose sqrtm is off by 6.5e-4 where there are fewer images than features. Score:
# the evaluator sums in float32. Precision and recall: counts, so exact.
TOLERANCES = {"fid": 1e-3, "sfid": 1e-3, "inception_score": 1e-5, "precision": 1e-12, "recall": 1e-12}


def report_of(samples: Path, reference: Path, folder: Path, **told) -> dict:
    """The report of `rae eval all`."""
    recipe = EvaluateRecipe(
        stage="eval",
        metrics=METRICS,
        optional=True,
        samples=str(samples),
        reference=str(reference),
        output=str(folder / "report.json"),
        **told,
    )
    evaluate.run(recipe, Ranks(0, 1, torch.device("cpu")))
    return json.loads((folder / "report.json").read_text())


def make_features(seed: int, count: int, weights: np.ndarray, shift: float) -> dict[str, np.ndarray]:
    """Layers that are no two alike: pool of mean 1, spatial of another scale in each channel, logits of the pool."""
    generator = np.random.default_rng(seed)
    pool = np.abs(generator.normal(1 + shift, 0.5, (count, WIDTH))).astype(np.float32)
    spatial = generator.normal(0, np.arange(1, CHANNELS + 1) + shift, (count, PLACES, CHANNELS))
    return {
        "pool": pool,
        "spatial": spatial.astype(np.float32).reshape(count, -1),
        "logits": (pool @ weights).astype(np.float32),
    }


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A folder with samples.npz and reference.npz, and what is in them."""
    folder = tmp_path_factory.mktemp("own")
    weights = np.random.default_rng(0).normal(0, 1, (WIDTH, CLASSES))
    samples, reference = make_features(1, 130, weights, 0.1), make_features(2, 90, weights, 0.0)
    np.savez(folder / "samples.npz", **samples)
    np.savez(folder / "reference.npz", **reference)
    return folder, samples, reference


def expected_of(samples: dict[str, np.ndarray], reference: dict[str, np.ndarray], split: int = 5000) -> dict:
    """The evaluator's figures by the slow transcription."""
    precision, recall = adm_reference.precision_recall(samples["pool"], reference["pool"], half=False)
    return {
        "fid": adm_reference.frechet(samples["pool"], reference["pool"]),
        "sfid": adm_reference.frechet(samples["spatial"], reference["spatial"]),
        "inception_score": adm_reference.inception_score(samples["logits"], split),
        "precision": precision,
        "recall": recall,
    }


def misses(report: dict, expected: dict) -> set[str]:
    """Figures beyond their tolerance: absolute of distances and counts, relative of the score."""
    return {
        name
        for name, tolerance in TOLERANCES.items()
        if abs(report[name] - expected[name]) > tolerance * (expected[name] if name == "inception_score" else 1)
    }


def test_own_features_give_the_evaluators_figures(own, tmp_path):
    folder, samples, reference = own
    report = report_of(folder / "samples.npz", folder / "reference.npz", tmp_path)
    assert misses(report, expected_of(samples, reference)) == set()
    assert report["fid"] == pytest.approx(expected_of(samples, reference)["fid"], rel=1e-6)
    half = adm_reference.precision_recall(samples["pool"], reference["pool"], half=True)
    assert (report["precision_float16"], report["recall_float16"]) == pytest.approx(half, abs=1e-12)
    assert len({*half, report["precision"], report["recall"]}) > 2  # neither swapped nor all one by chance
    assert list(report["unavailable"]) == ["fdd"]


@pytest.mark.parametrize("folder", [None, *filter(Path.is_dir, [ADM])])  # None: our own, so that it never goes unrun
def test_printed_figures_are_reproduced(folder, own, tmp_path):
    """ADM's: 129.80045 is the FID without sqrtm's error, .75 and .65 the float16 pair by a GPU's rule (its README)."""
    if folder is None:
        report = report_of(own[0] / "samples.npz", own[0] / "reference.npz", tmp_path)
        printed = expected_of(*own[1:])
    else:
        report = report_of(folder / "sample_features.npz", folder / "reference_features.npz", tmp_path)
        printed = json.loads((folder / "metrics.json").read_text())
        printed |= {name: printed[f"{name}_float32"] for name in ("precision", "recall")}
        assert report["fid"] == pytest.approx(129.80045, abs=2e-5)
        assert (report["precision_float16"], report["recall_float16"]) == (0.75, 0.65)
    assert misses(report, printed) == set()


def wrong_order(samples: dict, patch: pytest.MonkeyPatch) -> None:
    """Spatial features as (channel, row, column): invisible between two sets of one mistake, not against ADM's."""
    maps = samples["spatial"].reshape(-1, PLACES, CHANNELS)
    samples["spatial"] = maps.transpose(0, 2, 1).reshape(len(maps), -1)


def wrong_layer(samples: dict, patch: pytest.MonkeyPatch) -> None:
    """The next seven channels of the layer, or another layer: other scales."""
    samples["spatial"] = samples["spatial"] * np.float32(1.05)


def bias(samples: dict, patch: pytest.MonkeyPatch) -> None:
    """Logits with the bias of the last layer."""
    samples["logits"] = samples["logits"] + np.linspace(-1, 1, CLASSES, dtype=np.float32)


def ten_splits(samples: dict, patch: pytest.MonkeyPatch) -> None:
    """torch-fidelity's rule."""
    patch.setattr(inception_score.InceptionScore.__init__, "__defaults__", ("cpu", -(-len(samples["pool"]) // 10)))


def swapped(samples: dict, patch: pytest.MonkeyPatch) -> None:
    """Precision for recall."""
    found = evaluate.family_findings
    names = {"precision": "recall", "recall": "precision"}

    def exchanged(*arguments):
        findings = found(*arguments)
        findings.figures = {names.get(name, name): value for name, value in findings.figures.items()}
        return findings

    patch.setattr(evaluate, "family_findings", exchanged)


def ddof_0(samples: dict, patch: pytest.MonkeyPatch) -> None:
    """Covariances divided by N."""
    patch.setattr(statistics.FeatureStatistics, "covariance", lambda self: self.scatter / self.count)


MUTATIONS = {
    wrong_order: {"sfid"},
    wrong_layer: {"sfid"},
    bias: {"inception_score"},
    ten_splits: {"inception_score"},
    swapped: {"precision", "recall"},
    ddof_0: {"fid", "sfid"},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_mistake_moves_its_figure(mutation, own, tmp_path, monkeypatch):
    folder, samples, reference = own
    mutated = dict(samples)
    mutation(mutated, monkeypatch)
    np.savez(tmp_path / "mutated.npz", **mutated)
    report = report_of(tmp_path / "mutated.npz", folder / "reference.npz", tmp_path)
    assert misses(report, expected_of(samples, reference)) == MUTATIONS[mutation]

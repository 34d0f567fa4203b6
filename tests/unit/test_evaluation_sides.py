"""What `rae eval` takes as a side, what it says of it, and what it refuses. On features of our own; no network."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raecli.errors import InputError, NonFiniteError, UsageError
from raecli.evaluation.compare import comparison, comparison_table, read_report
from raecli.evaluation.sides import open_side
from raecli.metrics.feature_file import FeatureFile, FileRows
from raecli.metrics.statistics import Moments, save_statistics
from raecli.models.classifier import Classifier, save_classifier
from raecli.recipe.recipes import EvaluateRecipe
from raecli.stages import evaluate
from raecli.training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
POOL = GENERATOR.normal(1, 1, (30, 6)).astype(np.float32)
EVERY = ("fid", "sfid", "is", "precision-recall", "kid", "fdd")


def report_of(folder: Path, samples: Path, reference: Path | None = None, metrics=EVERY, **told) -> dict:
    """The report of a run in this process."""
    recipe = EvaluateRecipe(
        stage="eval",
        metrics=metrics,
        optional=len(metrics) > 1,
        samples=str(samples),
        reference=str(reference) if reference else None,
        output=str(folder / "report.json"),
        **told,
    )
    evaluate.run(recipe, ALONE)
    return json.loads((folder / "report.json").read_text())


def features(path: Path, provenance: dict | None = None, **arrays) -> Path:
    """A feature file."""
    if provenance is not None:
        arrays["provenance"] = np.array(json.dumps(provenance))
    np.savez(path, **{"pool": POOL, **arrays})
    return path


def write_tar(path: Path, labels: list[int]) -> Path:
    """PIXELS as a WebDataset shard."""
    with tarfile.open(path, "w") as tar:
        for index, (pixels, label) in enumerate(zip(PIXELS, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            for name, data in ((f"{index:03d}.png", png.getvalue()), (f"{index:03d}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def judge(tmp_path) -> str:
    """A random classifier as a feature network."""
    torch.manual_seed(0)
    model = Classifier(image_size=16, classes=3, widths=(8, 8), feature_width=6)
    torch.nn.init.constant_(model.hidden.bias, 1.0)
    save_classifier(tmp_path / "judge.safetensors", model)
    return str(tmp_path / "judge.safetensors")


def test_folder_array_and_shards_of_the_same_pixels_are_the_same_side(tmp_path, judge):
    np.savez(tmp_path / "array.npz", arr_0=PIXELS)
    write_tar(tmp_path / "shard-000.tar", [0, 1] * 10)
    (tmp_path / "folder").mkdir()
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{index:03d}.png")
    np.savez(tmp_path / "reference.npz", arr_0=PIXELS[::-1][:15])
    reports = [
        report_of(
            tmp_path, tmp_path / name, tmp_path / "reference.npz", ("fid", "kid", "precision-recall"), features=judge
        )
        for name in ("array.npz", "shard-000.tar", "folder")
    ]
    for name in ("fid", "kid", "precision", "recall"):
        assert len({report[name] for report in reports}) == 1, name
    assert len({report["sides"]["samples"]["pixels_sha256"] for report in reports}) == 1


def test_shards_that_cannot_be_measured_are_refused(tmp_path):
    with tarfile.open(tmp_path / "latents.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.latent.npy"), io.BytesIO())
    with pytest.raises(InputError, match="no images"):
        open_side(str(tmp_path / "latents.tar"))


@pytest.mark.parametrize("store", [np.savez, np.savez_compressed])
def test_a_feature_file_is_read_by_ranges_and_by_indices(tmp_path, store):
    store(tmp_path / "f.npz", pool=POOL, logits=POOL[:, :2].astype(np.float64))
    file = FeatureFile(tmp_path / "f.npz")
    assert (len(file), file.widths) == (30, {"pool": 6, "logits": 2})
    for start, stop in [(0, 30), (7, 9), (3, 20)]:
        assert torch.equal(file.read("pool", start, stop), torch.from_numpy(POOL[start:stop]))
    rows = FileRows(file, "pool")
    assert torch.equal(rows[25:99], torch.from_numpy(POOL[25:]))
    assert torch.equal(rows[torch.tensor([4, 1, 29])], torch.from_numpy(POOL[[4, 1, 29]]))
    assert isinstance(file.rows("pool", torch.device("cpu")), FileRows) == (store is np.savez)


def test_precision_and_recall_hold_no_features_in_memory(tmp_path, monkeypatch):
    """Of a stored file no read is larger than a tile."""
    from raecli.metrics import manifold

    seen = []
    read = FeatureFile.read
    monkeypatch.setattr(manifold, "TILE", 4)
    monkeypatch.setattr("raecli.evaluation.measuring.FEATURE_ROWS", 5)
    monkeypatch.setattr(FeatureFile, "read", lambda *args: seen.append(args[3] - args[2]) or read(*args))
    features(tmp_path / "f.npz")
    report_of(tmp_path, tmp_path / "f.npz", tmp_path / "f.npz", ("precision-recall",))
    assert max(seen) == 5


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pool": POOL.astype(np.int32)}, "pool is int32"),
        ({"pool": POOL[0]}, r"shape \[6\]"),
        ({"spatial": POOL[:9]}, "unequal numbers"),
        ({"provenance": np.array("[")}, "its provenance: not JSON"),
        ({"provenance": np.array("[1]")}, "its provenance: not a JSON object"),
    ],
)
def test_files_that_hold_no_features_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "bad.npz", **{"pool": POOL, **arrays})
    with pytest.raises(InputError, match=said):
        open_side(str(tmp_path / "bad.npz"))


def test_features_that_are_not_finite_are_refused_by_row(tmp_path):
    bad = POOL.copy()
    bad[17, 2] = np.nan
    features(tmp_path / "bad.npz", pool=bad)
    features(tmp_path / "good.npz")
    for metric in ("fid", "precision-recall"):
        with pytest.raises(NonFiniteError, match="row 17"):
            report_of(tmp_path, tmp_path / "bad.npz", tmp_path / "good.npz", (metric,))


def test_statistics_alone_serve_fid_and_the_rest_is_said(tmp_path):
    """As adm_in256_stats.npz: mu and sigma. sFID, precision, recall and KID say why not; alone they end with 3."""
    features(tmp_path / "f.npz", spatial=POOL, logits=POOL)
    np.savez(tmp_path / "stats.npz", mu=POOL.mean(0), sigma=np.cov(POOL, rowvar=False))
    report = report_of(tmp_path, tmp_path / "f.npz", tmp_path / "stats.npz")
    assert report["fid"] == pytest.approx(0, abs=1e-5)
    assert "inception_score" in report
    assert set(report["unavailable"]) == {"sfid", "precision-recall", "kid", "fdd"}
    assert "mu_s" in report["unavailable"]["sfid"]
    for metric in ("sfid", "precision-recall", "kid", "fdd"):
        with pytest.raises(InputError, match=r"stats\.npz|without dinov2"):
            report_of(tmp_path, tmp_path / "f.npz", tmp_path / "stats.npz", (metric,))


def test_an_adm_reference_batch_is_preferred_to_its_images(tmp_path):
    """mu and mu_s are of the whole training set, arr_0 of 10,000 of it: FID and sFID take the former."""
    features(tmp_path / "f.npz", spatial=POOL, logits=POOL)
    moments = {"mu": POOL.mean(0), "sigma": np.cov(POOL, rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=PIXELS, **moments, mu_s=moments["mu"] + 1, sigma_s=moments["sigma"])
    report = report_of(tmp_path, tmp_path / "f.npz", tmp_path / "adm.npz")
    assert report["sfid"] == pytest.approx(6, abs=1e-4)  # six features, each one apart
    assert report["statistics"]["reference"] == "stored in the file"
    assert "Inception's weights" in report["unavailable"]["precision-recall"]  # its images have to pass the network


def test_features_and_statistics_of_another_network_are_refused(tmp_path):
    ours = features(tmp_path / "f.npz", {"features": {"name": "inception-v3-compat", "sha256": "a" * 64}})
    other = features(tmp_path / "g.npz", {"features": {"name": "inception-v3-compat", "sha256": "b" * 64}})
    with pytest.raises(InputError, match="extract both with one network"):
        report_of(tmp_path, ours, other, ("fid",))
    eye = torch.eye(6, dtype=torch.float64)
    told = {"features": {"name": "classifier", "sha256": "c" * 64}}
    save_statistics(tmp_path / "s.npz", {"pool": Moments(eye[0], eye, 9)}, told)
    with pytest.raises(InputError, match="another feature network"):
        report_of(tmp_path, ours, tmp_path / "s.npz", ("fid",))


@pytest.mark.parametrize("exchanged", [False, True])
def test_references_for_generations_and_reconstructions_are_not_interchangeable(tmp_path, exchanged):
    kinds = ("generation", "reconstruction")
    ours = features(tmp_path / "f.npz", {"kind": kinds[exchanged]})
    eye = torch.eye(6, dtype=torch.float64)
    save_statistics(tmp_path / "s.npz", {"pool": Moments(eye[0], eye, 9)}, {"kind": kinds[not exchanged]})
    with pytest.raises(InputError, match="reference of the right kind"):
        report_of(tmp_path, ours, tmp_path / "s.npz", ("fid",))
    save_statistics(tmp_path / "s.npz", {"pool": Moments(eye[0], eye, 9)}, {"kind": kinds[exchanged]})
    assert report_of(tmp_path, ours, tmp_path / "s.npz", ("fid",))["fid"] > 0


def test_cards_tell_kinds_and_adms_statistics_are_for_generations(tmp_path):
    np.savez(tmp_path / "adm.npz", mu=POOL.mean(0), sigma=np.cov(POOL, rowvar=False))
    assert open_side(str(tmp_path / "adm.npz")).kind == "generation"
    for card, kind in (({"format": "rae-samples"}, "generation"), ({"kind": "reconstruction"}, "reconstruction")):
        (tmp_path / "made").mkdir(exist_ok=True)
        np.savez(tmp_path / "made" / "samples.npz", arr_0=PIXELS)
        (tmp_path / "made" / "samples.json").write_text(json.dumps(card))
        assert open_side(str(tmp_path / "made")).kind == kind
    with pytest.raises(InputError, match="holds reconstructions"):
        report_of(tmp_path, tmp_path / "made", tmp_path / "adm.npz", ("fid",))


def test_samples_in_order_of_class_and_missing_ones_are_said(tmp_path, judge):
    write_tar(tmp_path / "sorted.tar", [0] * 10 + [1] * 10)
    (tmp_path / "samples.json").write_text(json.dumps({"num": 21}))
    warnings = report_of(tmp_path, tmp_path / "sorted.tar", tmp_path / "sorted.tar", ("fid",), features=judge)[
        "warnings"
    ]
    assert any("sorted by class" in warning for warning in warnings)
    assert any("tells of 21 samples, found 20" in warning for warning in warnings)


def test_a_metric_without_what_it_needs_is_refused(tmp_path, judge):
    few = features(tmp_path / "few.npz", pool=POOL[:3])
    with pytest.raises(InputError, match="too few"):
        report_of(tmp_path, few, few, ("precision-recall",))
    with pytest.raises(UsageError, match="--ref"):
        report_of(tmp_path, few, None, ("kid",))
    np.savez(tmp_path / "images.npz", arr_0=PIXELS)
    with pytest.raises(InputError, match="names another network"):
        report_of(tmp_path, tmp_path / "images.npz", tmp_path / "images.npz", ("sfid",), features=judge)


def test_a_comparison_tells_protocol_first_and_then_figures(tmp_path):
    features(tmp_path / "f.npz", logits=POOL)
    features(tmp_path / "g.npz", pool=POOL[:20], logits=POOL[:20])
    first = report_of(tmp_path, tmp_path / "f.npz", tmp_path / "g.npz")
    second = report_of(tmp_path, tmp_path / "g.npz", tmp_path / "f.npz")
    assert comparison(first, first)["protocol"] == []
    found = comparison(first, second)
    fields = {row["field"] for row in found["protocol"]}
    assert {"samples", "samples_path", "sides.samples.file_sha256"} <= fields
    assert not fields & {"fid", "inception_score", "precision", "kid"}
    figures = {row["name"]: row for row in found["figures"]}
    assert figures["inception_score"]["difference"] == second["inception_score"] - first["inception_score"]
    told = comparison_table(found, "A.json", "B.json")
    assert told.index("protocol differs in") < told.index("B - A") < told.index("inception_score ")
    assert "protocol: no difference" in comparison_table(comparison(first, first), "A", "A")


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_what_is_no_report_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(str(tmp_path / "report.json"))

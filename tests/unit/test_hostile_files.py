"""Files that claim what cannot be: each is refused in words, before memory or a figure is spent on it."""

import io
import json
import zipfile

import numpy as np
import pytest

from raecli.cli.plot import curves_of, read_runs
from raecli.data.images import open_images as open_source
from raecli.errors import CheckpointError, InputError
from raecli.evaluation.compare import read_report
from raecli.metrics.reference import open_images, read_card
from raecli.metrics.statistics import is_covariance, load_moments
from raecli.models.load import read_artifact
from raecli.store.artifact import read_config
from raecli.store.checkpoint import read_checkpoint
from raecli.store.json_file import read_json
from raecli.store.reconstructions import read_protocol as read_reconstructions
from raecli.store.run_folder import MetricsLog
from raecli.store.samples import read_protocol as read_samples
from tests.conftest import make_images

DEEP = "[" * 100_000


def header(shape, descr):
    """The bytes of an .npy without its values."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_that_claims_a_trillion_images_is_refused_as_it_is_opened(tmp_path, compression):
    claim = header((10**12, 256, 256, 3), "|u1")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", compression) as archive:
        archive.writestr("arr_0.npy", claim + bytes(100))
    (tmp_path / "bomb.npy").write_bytes(claim)
    for name in ("bomb.npz", "bomb.npy"):
        with pytest.raises(InputError, match=rf"{name}.*damaged"):
            open_images(tmp_path / name)


@pytest.mark.parametrize("side", [10**5, 10**7])
def test_statistics_that_claim_more_than_memory_are_refused(tmp_path, side):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("mu.npy", header((side,), "<f8"))
        archive.writestr("sigma.npy", header((side, side), "<f8"))
    with pytest.raises(InputError, match=r"bomb\.npz"):
        load_moments(tmp_path / "bomb.npz")


def test_statistics_that_would_unpack_to_more_than_memory_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", mu=np.zeros(64), sigma=np.zeros((64, 64)))
    assert load_moments(tmp_path / "bomb.npz") is not None
    monkeypatch.setattr("raecli.metrics.statistics.MOST_BYTES", 10_000)
    with pytest.raises(InputError, match="no network's statistics do"):
        load_moments(tmp_path / "bomb.npz")


@pytest.mark.parametrize(
    ("sigma", "said"),
    [
        (np.diag([1.0, -0.5]), "no covariance"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "no covariance"),  # eigenvalues 3 and -1
        (np.array([[1.0, 0.9], [0.1, 1.0]]), "no covariance"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "NaN"),
    ],
)
def test_a_covariance_that_cannot_be_is_refused(tmp_path, sigma, said):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=sigma)
    with pytest.raises(InputError, match=said):
        load_moments(tmp_path / "stats.npz")


def test_statistics_of_fewer_samples_than_features_and_in_float32_are_covariances(tmp_path):
    features = np.random.default_rng(0).standard_normal((20, 64)) * 30
    for sigma in (np.cov(features, rowvar=False), np.zeros((64, 64))):
        np.savez(tmp_path / "stats.npz", mu=np.zeros(64), sigma=sigma.astype(np.float32))
        moments = load_moments(tmp_path / "stats.npz")
        assert is_covariance(moments.covariance)


def test_a_tar_beside_class_folders_is_refused(tmp_path):
    source = make_images(tmp_path / "train", classes=2, each=1)
    assert len(open_source(source).items) == 2
    (source / "stray.tar").write_bytes(bytes(10_240))
    with pytest.raises(InputError, match=r"stray\.tar.*beside them.*class"):
        open_source(source)


@pytest.mark.parametrize("content", [DEEP, "[1]", "{", "", '"\ud800"', None], ids=range(6))
def test_json_that_is_none_is_refused_by_whoever_reads_it(tmp_path, content):
    for name in ("config.json", "state.json", "samples.json", "reconstructions.json"):
        if content is not None:
            (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    for read in (read_json, read_samples, read_reconstructions, read_report):
        with pytest.raises(InputError, match=r"samples\.json"):
            read(tmp_path / "samples.json")
    if content is not None:
        with pytest.raises(InputError, match=r"samples\.json"):
            read_card(tmp_path)
    for read in (read_checkpoint, lambda path: read_config(path, "rae-decoder"), lambda p: read_artifact(p, "rae-x")):
        with pytest.raises(CheckpointError):
            read(tmp_path)


def test_junk_in_a_log_is_passed_over_by_plots_and_by_who_goes_on(tmp_path):
    good = [{"step": 5, "loss": 1.0}, {"step": 10, "loss": 0.5}]
    junk = [
        '{"step": "7", "loss": 1}',
        '{"step": 1e999}',
        '{"step": true}',
        DEEP,
        "[1]",
        "null",
        '{"loss": 2}',
        "\x00",
        "{",
    ]
    lines = [json.dumps(good[0]), *junk, json.dumps(good[1])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert curves_of(read_runs([str(tmp_path)]), None) == {"loss": {tmp_path.name: ([5, 10], [1.0, 0.5])}}
    MetricsLog(tmp_path, first_step=9).close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == good[:1]

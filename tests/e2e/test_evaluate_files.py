"""`rae eval` on feature files through the real command: one process and two, reports compared, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

FIGURES = ("fid", "sfid", "inception_score", "precision", "recall", "precision_float16", "recall_float16", "kid")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two small feature files."""
    folder = tmp_path_factory.mktemp("features")
    generator = np.random.default_rng(0)
    for name, count, shift in (("samples", 41, 0.2), ("reference", 33, 0.0)):
        layers = {
            layer: generator.normal(1 + shift, 1, (count, width)) for layer, width in (("pool", 12), ("spatial", 21))
        }
        layers["logits"] = layers["pool"] @ np.random.default_rng(1).normal(0, 1, (12, 5))
        np.savez(folder / f"{name}.npz", **{layer: rows.astype(np.float32) for layer, rows in layers.items()})
    return folder


def test_two_processes_give_the_figures_of_one_and_compare_says_so(rae, files, tmp_path):
    words = ("eval", "all", files / "samples.npz", "--ref", files / "reference.npz", "--json")
    alone = json.loads(rae(*words, "--out", "one.json").stdout)
    shared = json.loads(rae(*words, "--devices", "2", "--out", "two.json").stdout)
    assert (alone["world"], shared["world"]) == (1, 2)
    for name in FIGURES:
        assert shared[name] == pytest.approx(alone[name], rel=1e-9), name
    found = json.loads(rae("eval", "compare", "one.json", "two.json", "--json").stdout)
    assert [row["field"] for row in found["protocol"]] == ["world"]
    table = rae("eval", "compare", "one.json", "two.json").stdout
    assert table.index("world") < table.index("inception_score")
    rae("eval", "compare", "one.json", "absent.json", code=3)


def test_the_door_refuses_what_it_can_see(rae, files, tmp_path):
    assert "--ref REF" in rae("eval", "kid", files / "samples.npz", code=2).stderr
    assert "no such file" in rae("eval", "kid", files / "samples.npz", "--ref", "absent", code=3).stderr
    (tmp_path / "images").mkdir()
    told = rae("eval", "features", "images", "out.npz", code=2, TORCH_HOME=str(tmp_path))
    assert "weights-inception-2015-12-05-6726825d.pth" in told.stderr
    assert "end in .npz" in rae("eval", "statistics", "images", "out.pt", code=2).stderr

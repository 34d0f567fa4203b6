"""The linear probe and t-SNE: scikit-learn's solution, known intervals, caches that can and cannot be told apart."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from raecli.cli.probe import probe as probe_command
from raecli.cli.probe import tsne as tsne_command
from raecli.errors import InputError, UsageError
from raecli.evaluation import latent_features
from raecli.evaluation.probe import probe, split_of
from raecli.evaluation.tsne import principal
from raecli.metrics.linear_probe import feature_moments, fit_probe, judge_probe, scores, wilson_interval
from raecli.recipe.recipes import EncodeCacheRecipe
from raecli.stages.encode_cache import run as encode
from raecli.store.encoders import resolve_encoder
from raecli.training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
CLASSES = 3
COLOURS = np.eye(3) * 120 + 60  # of classes that can be told apart


def make_cache(folder, *, each, seed, separable, classes=CLASSES):
    """Images of noise, 8 x 8, around their class's colour or around grey; cached as pixels."""
    generator = np.random.default_rng(seed)
    for label in range(classes):
        (folder / "images" / f"c{label}").mkdir(parents=True)
        centre = COLOURS[label] if separable else np.full(3, 128.0)
        for number in range(each):
            pixels = centre + generator.normal(0, 8, 3) + generator.normal(0, 20, (8, 8, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / "images" / f"c{label}" / f"{number}.png")
    encode_folder(folder / "images", folder / "cache")
    return str(folder / "cache")


def encode_folder(source, output):
    recipe = {"stage": "encode-cache", "source": str(source), "output": str(output), "image_size": 8, "dtype": "fp32"}
    spec = resolve_encoder("pixels", image_size=8)
    encode(EncodeCacheRecipe(**recipe, encoder=spec, precision="fp32", samples_per_shard=50), ALONE)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Name to cache; not to be changed."""
    made = {}
    for name, separable in (("clear", True), ("grey", False)):
        for part, each, seed in (("train", 40, 0), ("val", 60, 1)):
            folder = tmp_path_factory.mktemp(f"{name}-{part}")
            made[f"{name}-{part}"] = make_cache(folder, each=each, seed=seed, separable=separable)
    return made


def problem(count=90, width=6, seed=0):
    """Overlapping classes, features of unequal scale, the last one constant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    features = torch.randn(count, width, generator=generator, dtype=torch.float64)
    features[:, :CLASSES] += torch.nn.functional.one_hot(labels, CLASSES)
    features = features * torch.logspace(-2, 2, width) + 3
    features[:, -1] = 7
    return features, labels


def blocks_of(features, labels, size):
    return lambda: zip(features.split(size), labels.split(size), strict=True)


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_the_fit_is_scikit_learns_logistic_regression(l2):
    features, labels = problem()
    blocks = blocks_of(features, labels, 32)
    moments = feature_moments(blocks)
    weights = fit_probe(blocks, torch.zeros(CLASSES, 7, dtype=torch.float64), moments, l2, 500)
    standard = ((features - moments[0]) / moments[1]).numpy()
    theirs = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-10, max_iter=5000).fit(standard, labels.numpy())
    np.testing.assert_allclose(weights[:, :-1].numpy(), theirs.coef_, atol=1e-4)
    chances = torch.softmax(scores(weights, features, moments), dim=1).numpy()
    np.testing.assert_allclose(chances, theirs.predict_proba(standard), atol=1e-4)


def test_the_fit_does_not_depend_on_the_size_of_blocks():
    features, labels = problem()
    fits = []
    for size in (1, 17, 90):
        blocks = blocks_of(features, labels, size)
        start = torch.zeros(CLASSES, 7, dtype=torch.float64)
        fits.append(fit_probe(blocks, start, feature_moments(blocks), 0.01, 300))
    torch.testing.assert_close(fits[0], fits[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(fits[1], fits[2], atol=1e-5, rtol=0)


def test_moments_are_those_of_all_samples_and_a_constant_feature_is_left_out():
    features, labels = problem()
    mean, std = feature_moments(blocks_of(features, labels, 17))
    torch.testing.assert_close(mean, features.mean(dim=0))
    torch.testing.assert_close(std[:-1], features.std(dim=0, correction=0)[:-1])
    assert std[-1] == float("inf")
    assert feature_moments(blocks_of(features * 0 + 2, labels, 17))[1].isinf().all()


def test_a_judge_counts_what_is_right():
    features = torch.tensor([[1.0], [2.0], [-1.0], [-3.0]])
    labels = torch.tensor([1, 0, 0, 0])
    weights = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    moments = (torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    correct, count, loss = judge_probe(weights, blocks_of(features, labels, 3), moments)
    expected = np.mean([np.log1p(np.exp(-2 * x)) for x in (1, -2, 1, 3)])
    assert (correct, count) == (3, 4)
    assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("correct", "count", "interval"),
    [(5, 10, (0.2366, 0.7634)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (329, 360, (0.8804, 0.9387))],
)
def test_wilsons_interval(correct, count, interval):
    assert wilson_interval(correct, count) == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize("features", ["pooled", "tokens"])
def test_classes_that_can_be_told_apart_are(caches, features):
    report = probe(caches["clear-train"], caches["clear-val"], features, 0, 50)
    assert (report["accuracy"], report["correct"], report["count"]) == (1.0, 180, 180)
    assert report["dimension"] == {"pooled": 3, "tokens": 192}[features]
    assert report["train_count"] == 120


@pytest.mark.parametrize("features", ["pooled", "tokens"])
def test_classes_that_cannot_be_told_apart_are_guessed(caches, features):
    report = probe(caches["grey-train"], caches["grey-val"], features, 0, 50)
    low, high = report["interval_95"]
    assert low < 1 / CLASSES < high


def test_a_probe_is_deterministic_and_the_same_when_it_reads_again_for_every_step(caches, monkeypatch):
    kept = [probe(caches["grey-train"], None, "pooled", 3, 50) for _ in range(2)]
    monkeypatch.setattr(latent_features, "HELD_BYTES", 0)
    monkeypatch.setattr(latent_features, "BLOCK_BYTES", 8 * 192 * 7)  # seven samples
    read_again = probe(caches["grey-train"], None, "pooled", 3, 50)
    assert kept[0] == kept[1]
    assert read_again["correct"] == kept[0]["correct"]
    assert read_again["cross_entropy"] == pytest.approx(kept[0]["cross_entropy"], rel=1e-6)
    assert kept[0]["count"] + kept[0]["train_count"] == 120


def test_who_is_fitted_neither_chooses_nor_judges(caches):
    cache = latent_features.open_labelled(caches["grey-train"])
    split = split_of(cache, None, 0)
    parts = [set(split.train), set(split.held_out), set(split.test)]
    assert [len(part) for part in parts] == [77, 19, 24]
    assert set.union(*parts) == set(range(120))
    assert split_of(cache, None, 1) != split


def test_a_cache_of_other_classes_or_of_none_is_refused(caches, tmp_path):
    two = make_cache(tmp_path / "two", each=2, seed=0, separable=True, classes=2)
    with pytest.raises(InputError, match="classes"):
        probe(caches["clear-train"], two, "pooled", 0, 5)
    encode_folder(tmp_path / "two" / "images" / "c0", tmp_path / "none")
    with pytest.raises(InputError, match="no classes"):
        probe(str(tmp_path / "none"), None, "pooled", 0, 5)


def test_a_shard_that_changed_is_not_probed(tmp_path):
    cache = make_cache(tmp_path, each=4, seed=0, separable=True)
    shard = tmp_path / "cache" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="shard-000000"):
        probe(cache, None, "pooled", 0, 5)


def test_the_command_tells_figure_count_and_interval(caches, tmp_path, capsys):
    out = tmp_path / "report.json"
    options = {"features": "pooled", "seed": 0, "iterations": 50, "out": str(out)}
    probe_command(caches["clear-train"], caches["clear-val"], as_json=False, **options)
    assert "top-1 accuracy  100.00%  (180 of 180)" in (shown := capsys.readouterr().out)
    assert "97.91% to 100.00%" in shown
    probe_command(caches["clear-train"], caches["clear-val"], as_json=True, **options)
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    with pytest.raises(UsageError, match="no such folder"):
        probe_command(caches["clear-train"], out=str(tmp_path / "nowhere" / "x.json"))


def test_the_tsne_picture_is_the_same_twice_and_puts_a_class_together(caches, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        tsne_command(caches["clear-train"], str(tmp_path / name), 8, 100, 5.0, 0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "24 images of 3 classes" in capsys.readouterr().out
    with pytest.raises(InputError, match="perplexity"):
        tsne_command(caches["clear-train"], str(tmp_path / "c.png"), 8, 100, 24.0, 0)


def test_principal_components_keep_distances():
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    found = principal(features)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(features, features), atol=1e-4, rtol=0)

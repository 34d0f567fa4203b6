"""Inception Score, precision and recall, KID: closed forms, and a slow transcription of the evaluator's formulas."""

import numpy as np
import pytest
import torch
import torch_fidelity.metric_kid
from torch import Tensor

from raecli.errors import NonFiniteError
from raecli.metrics import manifold
from raecli.metrics.inception_score import InceptionScore
from raecli.metrics.kid import kernel_distance
from raecli.metrics.manifold import PrPrecision, Rows, covered, nearest_distances, radii
from tests import adm_reference


def precision_and_recall(samples: Rows, reference: Rows, precision: PrPrecision) -> tuple[float, float]:
    """Both figures of two sets of features [N, D] and [M, D], at least 4 points each, on one process."""
    own, other = (radii(nearest_distances(side, precision)[None]) for side in (samples, reference))
    found = covered(samples, reference, own, other, precision)
    return found.samples.double().mean().item(), found.reference.double().mean().item()


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal draws, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score_of(logits: Tensor, batch_size: int = 1000, split: int = 5000) -> list[float]:
    """Scores of logits taken in by batches."""
    score = InceptionScore(len(logits), logits.shape[1], split=split)
    for start in range(0, len(logits), batch_size):
        score.update(logits[start : start + batch_size], start)
    return score.scores()


def test_equal_probabilities_score_1_and_certain_ones_the_number_of_classes():
    assert score_of(torch.zeros(100, 10)) == [pytest.approx(1)]
    certain = torch.nn.functional.one_hot(torch.arange(100) % 10, 10) * 1e4  # probabilities of exactly 0: no NaN
    assert score_of(certain) == [pytest.approx(10)]


def test_splits_are_consecutive_and_a_short_last_one_counts_as_much():
    logits = 3 * draw(12_345, 5, seed=0)
    scores = score_of(logits)
    assert len(scores) == 3
    expected = [adm_reference.inception_score(part.numpy()) for part in logits.split(5000)]
    assert scores == pytest.approx(expected, rel=1e-9)
    assert np.mean(scores) == pytest.approx(adm_reference.inception_score(logits.numpy()), rel=1e-9)
    tenths = score_of(logits, split=1235)  # the mutation: 10 splits
    assert np.mean(tenths) != pytest.approx(np.mean(scores), rel=1e-5)


def test_samples_sorted_by_class_score_lower():
    classes = torch.arange(15_000) % 30
    logits = 8 * torch.nn.functional.one_hot(classes, 30) + draw(15_000, 30, seed=1)
    in_order = logits[classes.argsort(stable=True)]
    assert np.mean(score_of(in_order)) < 0.5 * np.mean(score_of(logits))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_score_depends_on_neither_batches_nor_ranks(batch_size):
    logits = 2 * draw(100, 8, seed=2)
    whole = score_of(logits, split=30)
    assert score_of(logits, batch_size, split=30) == pytest.approx(whole, rel=1e-12)
    ranks = [InceptionScore(100, 8, split=30) for _ in range(2)]
    ranks[0].update(logits[:41], 0)
    ranks[1].update(logits[41:], 41)
    ranks[0].sums += ranks[1].sums
    assert ranks[0].scores() == pytest.approx(whole, rel=1e-12)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="samples 3 to 4"):
        InceptionScore(9, 2).update(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), 3)


def test_a_line_worked_out_by_hand():
    """Reference 0 1 2 3 10: third neighbours at 3 2 2 3 9; samples -3 and -3.5: inside at the border, and outside."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    squared = radii(nearest_distances(reference, "exact")[None])
    assert squared.tolist() == [9, 4, 4, 9, 81]
    samples = torch.tensor([[-3.0], [-3.5]])
    found = covered(samples, reference, torch.tensor([9.0, 0.0]), squared, "exact")
    assert found.samples.tolist() == [True, False]
    assert found.reference.tolist() == [True, False, False, False, False]


def test_collapse_is_precise_and_recalls_nothing():
    """Fails if the two are swapped."""
    reference = draw(300, 6, seed=3)
    collapsed = reference[:1] + 1e-3 * draw(100, 6, seed=4)
    precision, recall = precision_and_recall(collapsed, reference, "exact")
    assert precision == 1
    assert recall < 0.05


@pytest.mark.parametrize("rule", ["exact", "adm"])
def test_equal_sets_cover_each_other_and_distant_ones_do_not(rule):
    features = draw(60, 8, seed=5)
    assert precision_and_recall(features, features, rule) == (1, 1)
    assert precision_and_recall(features, features + 50, rule) == (0, 0)
    assert precision_and_recall(features[:20], features, rule)[0] == 1


@pytest.mark.parametrize("rule", ["exact", "adm"])
@pytest.mark.parametrize("shift", [0.0, 10.0])  # 10: norms near 4000, where halves are 2 to 4 apart, so ties appear
def test_both_rules_equal_the_evaluators_formulas(rule, shift):
    samples, reference = draw(90, 40, seed=6) + shift, draw(70, 40, seed=7) + 0.1 + shift
    expected = adm_reference.precision_recall(samples.numpy(), reference.numpy(), rule == "adm")
    assert precision_and_recall(samples, reference, rule) == pytest.approx(expected, abs=1e-12)


def test_ties_of_float16_raise_both_figures():
    """As published: the evaluator's precision and recall lie above those of float32 distances."""
    samples, reference = draw(90, 40, seed=6) + 10, draw(70, 40, seed=7) + 10.1
    exact, half = (precision_and_recall(samples, reference, rule) for rule in ("exact", "adm"))
    assert half[0] > exact[0]
    assert half[1] > exact[1]


@pytest.mark.parametrize("rule", ["exact", "adm"])
def test_tiles_and_ranks_change_nothing(rule, monkeypatch):
    samples, reference = 8 * draw(50, 16, seed=8), 8 * draw(33, 16, seed=9)
    whole = precision_and_recall(samples, reference, rule)
    monkeypatch.setattr(manifold, "TILE", 7)
    assert precision_and_recall(samples, reference, rule) == whole
    sides = [
        radii(torch.stack([nearest_distances(side, rule, (rank, 3)) for rank in range(3)]))
        for side in (samples, reference)
    ]
    parts = [covered(samples, reference, sides[0], sides[1], rule, (rank, 3)) for rank in range(3)]
    precision = torch.stack([part.samples for part in parts]).any(0).double().mean().item()
    recall = torch.stack([part.reference for part in parts]).any(0).double().mean().item()
    assert (precision, recall) == whole


def test_a_block_that_overflows_float16_is_float32_as_a_whole(monkeypatch):
    """Blocks of 20: the last samples are 100 times larger, their squares pass 65504, and their blocks fall back."""
    samples, reference = 8 * draw(60, 16, seed=10), 8 * draw(40, 16, seed=11)
    samples[40:] *= 100
    monkeypatch.setattr(manifold, "TILE", 5)
    monkeypatch.setattr(manifold, "ADM_BLOCK", 20)
    expected = adm_reference.precision_recall(samples.numpy(), reference.numpy(), True, block=20)
    assert precision_and_recall(samples, reference, "adm") == pytest.approx(expected, abs=1e-12)
    distances = manifold.Distances(reference, samples, "adm")
    assert [distances.fits_half(0, block) for block in range(3)] == [True, True, False]


def test_norms_near_the_largest_half_are_looked_at_one_by_one(monkeypatch):
    """Squared norms near 20000: sums may pass 65504 or not, which only the entries tell."""
    monkeypatch.setattr(manifold, "TILE", 4)
    base = torch.full((8, 16), 35.0)
    near, opposite = base + draw(8, 16, seed=12), -base + draw(8, 16, seed=13)
    assert manifold.Distances(near, near, "adm").fits_half(0, 0)
    assert not manifold.Distances(near, opposite, "adm").fits_half(0, 0)


def test_kid_is_torch_fidelitys_on_the_same_features():
    samples, reference = draw(120, 16, seed=14), draw(90, 16, seed=15) + 0.2
    options = {"kid_subsets": 7, "kid_subset_size": 50, "rng_seed": 2020, "verbose": False}
    theirs = torch_fidelity.metric_kid.kid_features_to_metric(samples.double(), reference.double(), **options)
    ours = kernel_distance(samples, reference, subsets=7, size=50)
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert ours.deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)


def test_kid_is_unbiased():
    """Of one distribution its mean is 0 within its error; the biased estimate would be 0.2 above it at 50 samples."""
    found = [kernel_distance(draw(50, 8, seed=s), draw(50, 8, seed=s + 500), subsets=1).value for s in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / len(found) ** 0.5
    assert 4 * np.std(found) / len(found) ** 0.5 < 0.05


def test_small_sets_are_taken_whole():
    found = kernel_distance(draw(20, 4, seed=16), draw(30, 4, seed=17), subsets=3)
    assert (found.subset_size, found.subsets) == (20, 3)

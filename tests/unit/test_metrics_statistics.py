"""Streaming statistics: what they equal, and what they do not depend on."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from raecli.errors import InputError, NonFiniteError
from raecli.metrics.statistics import FeatureStatistics, Moments, load_moments, merge_in_order, save_statistics

FEATURES = torch.randn(103, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5


def streamed(features: Tensor, batch_size: int) -> FeatureStatistics:
    """Statistics of features taken in by batches."""
    statistics = FeatureStatistics(features.shape[1])
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


def assert_same(a: FeatureStatistics, b: FeatureStatistics) -> None:
    """Equal but for the order of float64 sums."""
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.covariance(), b.covariance(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 10, 103])
def test_any_batch_size_equals_numpy_with_ddof_1(batch_size):
    statistics = streamed(FEATURES, batch_size)
    np.testing.assert_allclose(statistics.mean.numpy(), FEATURES.numpy().mean(0), rtol=1e-12)
    expected = np.cov(FEATURES.numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [[0, 0, 103], [0, 1, 50, 103], [0, 25, 25, 26, 103]])
def test_merged_ranks_equal_one_pass_even_where_a_rank_has_nothing(cuts):
    ranks = []
    for start, stop in pairwise(cuts):
        rank = FeatureStatistics(7)
        rank.update(FEATURES[start:stop])
        ranks.append(rank)
    assert_same(merge_in_order(ranks), streamed(FEATURES, 103))
    assert_same(merge_in_order(ranks[::-1]), streamed(FEATURES, 103))
    sent = (FeatureStatistics.unpacked(rank.packed(), 7) for rank in ranks)
    assert torch.equal(merge_in_order(sent).packed(), merge_in_order(ranks).packed())


def test_order_of_samples_does_not_matter():
    shuffled = FEATURES[torch.randperm(103, generator=torch.Generator().manual_seed(1))]
    assert_same(streamed(shuffled, 10), streamed(FEATURES, 10))


def test_a_mean_far_from_zero_costs_no_digits():
    """Sums of outer products would lose 8 of 16 digits here: the squared mean is 1e8 times the variance."""
    far = streamed(FEATURES + 3e4, 10).covariance()
    torch.testing.assert_close(far, streamed(FEATURES, 10).covariance(), rtol=1e-10, atol=1e-10)


def test_float32_features_are_accumulated_in_float64():
    narrow = FEATURES.float()
    assert_same(streamed(narrow, 10), streamed(narrow.double(), 103))
    assert streamed(narrow, 10).mean.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_names_its_sample(bad):
    features = FEATURES[:4].clone()
    features[2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"c\.png"):
        FeatureStatistics(7).update(features, ["a.png", "b.png", "c.png", "d.png"])
    statistics = streamed(FEATURES[:10], 10)
    with pytest.raises(NonFiniteError, match="sample 12"):
        statistics.update(features)


def test_one_sample_has_no_covariance():
    with pytest.raises(InputError, match="at least 2 samples, found 1"):
        streamed(FEATURES[:1], 1).covariance()


def test_saved_moments_come_back_bit_for_bit(tmp_path):
    moments = streamed(FEATURES, 10).moments({"features": {"name": "inception", "sha256": "ab"}})
    save_statistics(tmp_path / "statistics.npz", {"pool": moments}, moments.provenance)
    loaded = load_moments(tmp_path / "statistics.npz")
    assert isinstance(loaded, Moments)
    assert torch.equal(loaded.mean, moments.mean)
    assert torch.equal(loaded.covariance, moments.covariance)
    assert (loaded.samples, loaded.provenance) == (103, moments.provenance)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]


def test_adm_statistics_are_read_by_suffix_without_count_or_provenance(tmp_path):
    arrays = {"mu": np.ones(3, np.float32), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": 2 * np.eye(2)}
    np.savez(tmp_path / "adm.npz", **arrays)
    pool, spatial = load_moments(tmp_path / "adm.npz"), load_moments(tmp_path / "adm.npz", "_s")
    assert pool is not None
    assert spatial is not None
    assert (pool.samples, pool.provenance, pool.mean.dtype) == (None, {}, torch.float64)
    assert torch.equal(spatial.covariance, 2 * torch.eye(2, dtype=torch.float64))


def test_a_file_without_statistics_has_none(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert load_moments(tmp_path / "images.npz") is None


@pytest.mark.parametrize(
    ("mean", "covariance", "said"),
    [
        (np.zeros(3), np.eye(4), r"expected \[D\] and \[D, D\]"),
        (np.zeros(3, np.int64), np.eye(3), "expected floats"),
        (np.full(3, np.nan), np.eye(3), "NaN or infinity"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, mean, covariance, said):
    np.savez(tmp_path / "bad.npz", mu=mean, sigma=covariance)
    with pytest.raises(InputError, match=said):
        load_moments(tmp_path / "bad.npz")


def test_pickled_or_torn_statistics_are_refused(tmp_path):
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(InputError, match="cannot be read"):
        load_moments(tmp_path / "pickled.npz")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "pickled.npz").read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        load_moments(tmp_path / "torn.npz")

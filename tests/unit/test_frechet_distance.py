"""Closed forms and invariances of the Frechet distance, in float64."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from raecli.errors import InputError, NonFiniteError
from raecli.metrics.frechet import frechet_distance
from raecli.metrics.statistics import FeatureStatistics

DIM = 24


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal draws, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int, dim: int = DIM) -> Tensor:
    """A random positive definite matrix of moderate condition."""
    root = draw(dim, dim, seed=seed)
    return root @ root.T / dim + 0.1 * torch.eye(dim, dtype=torch.float64)


def moments_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance, by numpy rather than by our own accumulator."""
    return features.mean(0), torch.from_numpy(np.cov(features.numpy(), rowvar=False))


def test_equal_covariances_leave_the_squared_distance_of_means():
    mean_a, mean_b, cov = draw(DIM, seed=0), draw(DIM, seed=1), covariance(2)
    distance = frechet_distance(mean_a, cov, mean_b, cov)
    assert distance.value == pytest.approx((mean_a - mean_b).square().sum().item(), rel=1e-12)
    assert distance.mean_part == pytest.approx(distance.value, rel=1e-12)
    assert distance.trace_part == pytest.approx(0, abs=1e-12 * cov.trace().item())


def test_diagonal_covariances_leave_the_squared_distance_of_standard_deviations():
    a, b = draw(DIM, seed=3).exp(), draw(DIM, seed=4).exp()
    zero = torch.zeros(DIM, dtype=torch.float64)
    distance = frechet_distance(zero, a.diag(), zero, b.diag())
    assert distance.value == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-12)
    assert distance.method == "cholesky"


def test_non_commuting_covariances_with_a_known_root():
    """With b = M a M and M positive definite, (a b)^(1/2) = a M, whatever commutes."""
    a, m = covariance(5), covariance(6)
    b = m @ a @ m
    assert not torch.allclose(a @ b, b @ a)
    zero = torch.zeros(DIM, dtype=torch.float64)
    expected = (a.trace() + b.trace() - 2 * (m @ a).trace()).item()
    assert frechet_distance(zero, a, zero, b).value == pytest.approx(expected, rel=1e-11)


def test_known_root_survives_an_ill_conditioned_side():
    """Condition 1e13: Cholesky of the better side keeps 1e-9, where eigenvalues of a product of matrices lose 1e-5."""
    scales = torch.logspace(0, -13, DIM, dtype=torch.float64)
    basis = torch.linalg.qr(draw(DIM, DIM, seed=7)).Q
    a, m = basis @ scales.diag() @ basis.T, covariance(8)
    b = m @ a @ m
    zero = torch.zeros(DIM, dtype=torch.float64)
    expected = (a.trace() + b.trace() - 2 * (m @ a).trace()).item()
    assert frechet_distance(zero, a, zero, b).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("samples", [400, 10])
def test_rotation_of_both_sides_changes_nothing(samples):
    features_a, features_b = draw(samples, DIM, seed=9), 2 * draw(samples, DIM, seed=10) + 1
    rotation = torch.linalg.qr(draw(DIM, DIM, seed=11)).Q
    plain = frechet_distance(*moments_of(features_a), *moments_of(features_b)).value
    turned = frechet_distance(*moments_of(features_a @ rotation), *moments_of(features_b @ rotation)).value
    assert turned == pytest.approx(plain, rel=1e-9)  # a root of an eigenvalue that is 0 costs sqrt(eps) of the largest


@pytest.mark.parametrize("samples", [400, 10])
def test_scaling_both_sides_scales_by_the_square(samples):
    features_a, features_b = draw(samples, DIM, seed=12), 2 * draw(samples, DIM, seed=13) + 1
    plain = frechet_distance(*moments_of(features_a), *moments_of(features_b)).value
    scaled = frechet_distance(*moments_of(3 * features_a), *moments_of(3 * features_b)).value
    assert scaled == pytest.approx(9 * plain, rel=1e-9)


@pytest.mark.parametrize("samples", [400, 10])
def test_a_set_is_at_distance_zero_of_itself(samples):
    mean, cov = moments_of(draw(samples, DIM, seed=14))
    assert abs(frechet_distance(mean, cov, mean, cov).value) < 1e-6 * cov.trace().item()


@pytest.mark.parametrize(("samples_a", "samples_b"), [(400, 300), (10, 15), (10, 400)])
def test_sides_may_be_exchanged(samples_a, samples_b):
    a, b = moments_of(draw(samples_a, DIM, seed=15)), moments_of(2 * draw(samples_b, DIM, seed=16) + 1)
    assert frechet_distance(*a, *b).value == pytest.approx(frechet_distance(*b, *a).value, rel=1e-9)


def test_fewer_samples_than_features_equals_the_nuclear_norm():
    """tr (cov_a cov_b)^(1/2) is the nuclear norm of A B^T / sqrt((n_a - 1)(n_b - 1)), A and B centred features."""
    features_a, features_b = draw(10, DIM, seed=17), 2 * draw(15, DIM, seed=18) + 1
    centred_a, centred_b = features_a - features_a.mean(0), features_b - features_b.mean(0)
    root = torch.linalg.matrix_norm(centred_a @ centred_b.T, "nuc") / (9 * 14) ** 0.5
    (mean_a, cov_a), (mean_b, cov_b) = moments_of(features_a), moments_of(features_b)
    expected = ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()
    distance = frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert distance.method == "pivoted cholesky"
    assert distance.value == pytest.approx(expected, rel=1e-10)  # 1e-8 if the side of larger rank were factored


@pytest.mark.parametrize("exchanged", [False, True])
def test_one_side_of_low_rank_leaves_the_factor_of_the_other(exchanged):
    """tr (cov_a cov_b)^(1/2) is also that of the small matrix A cov_b A^T / (n_a - 1), A being 10 centred features."""
    features_a, features_b = draw(10, DIM, seed=30), 2 * draw(400, DIM, seed=31) + 1
    a, b = moments_of(features_a), moments_of(features_b)
    centred = features_a - a[0]
    small = torch.linalg.eigvalsh(centred @ b[1] @ centred.T / 9)[1:]  # the first is 0: centring costs a rank
    expected = (a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * small.sqrt().sum()
    distance = frechet_distance(*b, *a) if exchanged else frechet_distance(*a, *b)
    assert distance.method == "cholesky"
    assert distance.value == pytest.approx(expected.item(), rel=1e-7)  # 14 eigenvalues of 0 are each sqrt(eps) wrong


def test_a_side_without_spread_leaves_the_other_sides_trace():
    mean, cov = draw(DIM, seed=19), covariance(20)
    distance = frechet_distance(mean, cov, mean, torch.zeros_like(cov))
    assert distance.value == pytest.approx(cov.trace().item(), rel=1e-12)
    assert frechet_distance(mean, torch.zeros_like(cov), mean, torch.zeros_like(cov)).value == 0


def test_equals_the_textbook_square_root_of_a_matrix():
    a, b = moments_of(draw(400, DIM, seed=21)), moments_of(2 * draw(300, DIM, seed=22) + 1)
    root = scipy.linalg.sqrtm(a[1].numpy() @ b[1].numpy()).real
    expected = (a[0] - b[0]).square().sum().item() + (a[1].trace() + b[1].trace()).item() - 2 * np.trace(root)
    assert frechet_distance(*a, *b).value == pytest.approx(expected, rel=1e-9)


def test_streamed_statistics_give_the_unbiased_distance():
    """ddof 1 on both sides: with ddof 0 the trace part would be 29/30 of this."""
    features_a, features_b = draw(30, 4, seed=23), 2 * draw(30, 4, seed=24)
    a, b = FeatureStatistics(4), FeatureStatistics(4)
    a.update(features_a)
    b.update(features_b)
    streamed = frechet_distance(a.mean, a.covariance(), b.mean, b.covariance()).value
    whole = frechet_distance(*moments_of(features_a), *moments_of(features_b)).value
    assert streamed == pytest.approx(whole, rel=1e-11)


def test_float32_statistics_are_computed_in_float64():
    a, b = moments_of(draw(400, DIM, seed=25)), moments_of(2 * draw(300, DIM, seed=26) + 1)
    narrow = frechet_distance(*(part.float() for part in (*a, *b))).value
    assert narrow == pytest.approx(frechet_distance(*a, *b).value, rel=1e-6)  # 1e-7 is float32's rounding of the input


def test_features_of_two_networks_are_refused():
    a, b = covariance(27, 3), covariance(28, 4)
    with pytest.raises(InputError, match="3 features, the other 4"):
        frechet_distance(torch.zeros(3), a, torch.zeros(4), b)


def test_infinite_statistics_are_refused():
    cov = covariance(29)
    with pytest.raises(NonFiniteError):
        frechet_distance(torch.full((DIM,), torch.inf), cov, torch.zeros(DIM), cov)

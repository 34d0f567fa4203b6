"""The Frechet distance between two Gaussians: FID on Inception's pooled features, sFID on its spatial ones."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from raecli.errors import InputError, NonFiniteError

EPSILON = torch.finfo(torch.float64).eps
WELL_CONDITIONED = 1e-6  # smallest over largest squared pivot, above which the other side's factor is not looked for
Method = Literal["cholesky", "pivoted cholesky"]


@dataclass(frozen=True)
class FrechetDistance:
    """`value` = mean_part + trace_part. `method`: the factorisation that gave the root's trace."""

    value: float
    mean_part: float
    trace_part: float
    method: Method


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> FrechetDistance:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). Heusel et al. (2017), eq. 6.

    means: [D], covariances: [D, D], any float type, one device; computed in float64. Not clamped: where both Gaussians
    are equal the value is 0 within rounding, of either sign. Symmetric in its two sides.
    """
    check_shapes(mean_a, cov_a, mean_b, cov_b)
    cov_a, cov_b = symmetrised(cov_a.double()), symmetrised(cov_b.double())
    mean_part = (mean_a.double() - mean_b.double()).square().sum().item()
    root_trace, method = trace_of_root(cov_a, cov_b)
    trace_part = (cov_a.trace() + cov_b.trace()).item() - 2 * root_trace
    return FrechetDistance(mean_part + trace_part, mean_part, trace_part, method)


def check_shapes(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> None:
    """Refuse two sides of unequal width, and NaN or infinity."""
    if mean_a.shape != mean_b.shape or cov_a.shape != cov_b.shape:
        raise InputError(
            f"one side has {mean_a.numel()} features, the other {mean_b.numel()}: they come from different networks"
        )
    if not all(bool(part.isfinite().all()) for part in (mean_a, cov_a, mean_b, cov_b)):
        raise NonFiniteError("a mean or covariance of the Frechet distance holds NaN or infinity")


def symmetrised(matrix: Tensor) -> Tensor:
    """[D, D] with its two halves averaged: stored float32 statistics are symmetric only to rounding."""
    return (matrix + matrix.T) / 2


def trace_of_root(cov_a: Tensor, cov_b: Tensor) -> tuple[float, Method]:
    """tr (cov_a cov_b)^(1/2), and how it was found.

    With cov_a = F F^T the product has the eigenvalues of F^T cov_b F, which is symmetric, so the trace is the sum of
    their roots. F is the Cholesky factor of the better-conditioned side; where neither has a usable one (fewer samples
    than features), that of the side of lower rank, by Cholesky with pivoting.
    """
    factor_a, pivots_a = cholesky_factor(cov_a)
    if pivots_a > WELL_CONDITIONED:
        return sum_of_roots(triangular_congruence(factor_a, cov_b)), "cholesky"
    factor_b, pivots_b = cholesky_factor(cov_b)
    if max(pivots_a, pivots_b) > len(cov_a) * EPSILON:
        factor, other = (factor_a, cov_b) if pivots_a >= pivots_b else (factor_b, cov_a)
        return sum_of_roots(triangular_congruence(factor, other)), "cholesky"
    factor_a, factor_b = low_rank_factor(cov_a), low_rank_factor(cov_b)
    factor, other = (factor_a, cov_b) if factor_a.shape[1] <= factor_b.shape[1] else (factor_b, cov_a)
    return sum_of_roots(factor.T @ other @ factor), "pivoted cholesky"


def cholesky_factor(matrix: Tensor) -> tuple[Tensor, float]:
    """L [D, D] with L L^T = matrix, and the ratio of its smallest to its largest squared pivot; 0 if there is no L."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if int(failed) or not bool(pivots.isfinite().all()):
        return factor, 0.0
    return factor, (pivots.min() / pivots.max()).item()


def triangular_congruence(lower: Tensor, matrix: Tensor) -> Tensor:
    """L^T S L [D, D] of a lower triangular L and a symmetric S. BLAS's triangular product halves the work on a CPU."""
    if matrix.is_cuda:
        return lower.T @ matrix @ lower
    factor = np.asfortranarray(lower.numpy())
    right = scipy.linalg.blas.dtrmm(1.0, factor, matrix.numpy().T, side=1, lower=1)  # S is its own transpose
    both = scipy.linalg.blas.dtrmm(1.0, factor, right, side=0, lower=1, trans_a=1, overwrite_b=1)
    return torch.from_numpy(both)


def low_rank_factor(matrix: Tensor) -> Tensor:
    """F [D, R] with F F^T = matrix, R its numerical rank: pivots under D * eps * the largest variance are rounding.

    LAPACK's dpstrf: Higham, "Analysis of the Cholesky decomposition of a semi-definite matrix" (1990). R^2 D operations
    where an eigendecomposition takes 9 D^3.
    """
    packed, order, rank, info = scipy.linalg.lapack.dpstrf(np.asfortranarray(matrix.cpu().numpy()), lower=1)
    assert info >= 0, "an argument of dpstrf is wrong"
    if not bool(matrix.diagonal().max() > 0):  # LAPACK calls a matrix of zeros of rank 1
        rank = 0
    factor = np.empty((len(packed), rank))
    factor[order - 1] = np.tril(packed[:, :rank])
    return torch.from_numpy(factor).to(matrix.device)


def sum_of_roots(matrix: Tensor) -> float:
    """Sum of the square roots of a symmetric matrix's eigenvalues, those that rounding made negative taken as 0."""
    if matrix.numel() == 0:  # a side without any spread
        return 0.0
    return torch.linalg.eigvalsh(matrix).clamp_min(0).sqrt().sum().item()

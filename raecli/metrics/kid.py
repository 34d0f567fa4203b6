"""Kernel Inception Distance: the unbiased squared MMD of a cubic kernel, over random subsets."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raecli.metrics.feature_file import Rows

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # torch-fidelity's defaults


@dataclass(frozen=True)
class KernelDistance:
    """Mean over subsets, not multiplied by anything; their standard deviation; how many, and of how many samples."""

    value: float
    deviation: float
    subsets: int
    subset_size: int


def kernel_distance(
    samples: Rows, reference: Rows, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> KernelDistance:
    """Binkowski et al. (2018), with k(x, y) = (x . y / D + 1)^3; features [N, D] and [M, D], computed in float64.

    Subsets are drawn without replacement by position, with the generator and the order of torch-fidelity, so that the
    figures agree. Sets smaller than `size` are taken whole, in subsets of the smaller one's count.
    """
    size = min(size, len(samples), len(reference))
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        chosen = [
            side[torch.from_numpy(generator.choice(len(side), size, replace=False)).to(side.device)].double()
            for side in (samples, reference)
        ]
        values.append(unbiased_mmd(*chosen))
    return KernelDistance(float(np.mean(values)), float(np.std(values)), subsets, size)


def unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of x and y, both [m, D]: pairs of a point with itself are left out."""
    count = len(x)
    within = [(kernel(side, side).sum() - kernel_diagonal(side).sum()) / (count * (count - 1)) for side in (x, y)]
    return (within[0] + within[1] - 2 * kernel(x, y).mean()).item()


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / D + 1)^3, [m, n]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_diagonal(x: Tensor) -> Tensor:
    """k(x_i, x_i), [m]."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3

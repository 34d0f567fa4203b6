"""A linear classifier on frozen features: how well a representation tells classes apart. Table 1d."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

Blocks = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # anew each time: (features [B, D], labels [B]), always in order

CONSTANT = 1e-6  # a standard deviation below this part of the largest one: the feature tells nothing


def feature_moments(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, float64 [D]; a constant feature's is infinite, so it gives 0."""
    count, mean, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for features, _ in blocks():
        block = features.double()
        shift = block.mean(dim=0) - mean
        total = count + len(block)
        squares = squares + (block - block.mean(dim=0)).square().sum(dim=0) + shift**2 * (count * len(block) / total)
        mean, count = mean + shift * (len(block) / total), total
    std = (squares / count).sqrt()
    return mean, torch.where(std > CONSTANT * std.max(), std, torch.full_like(std, math.inf))


def fit_probe(blocks: Blocks, weights: Tensor, moments: tuple[Tensor, Tensor], l2: float, iterations: int) -> Tensor:
    """Multinomial logistic regression by L-BFGS on all samples: mean cross entropy + l2 / 2 |W|^2, convex.

    weights: [classes, D + 1], float64, where to begin; the last column is the bias, which l2 leaves alone. Features
    are standardised by `moments`. Every evaluation passes over the blocks once, so memory holds one of them. Returns
    weights of the same shape. Deterministic: nothing is drawn.
    """
    weights = weights.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=iterations, max_eval=2 * iterations, history_size=10, line_search_fn="strong_wolfe"
    )
    count = sum(len(labels) for _, labels in blocks())

    def closure() -> Tensor:
        optimizer.zero_grad()
        objective = l2 / 2 * weights[:, :-1].square().sum()
        objective.backward()
        for features, labels in blocks():
            loss = functional.cross_entropy(scores(weights, features, moments), labels, reduction="sum") / count
            loss.backward()
            objective = objective.detach() + loss.detach()
        return objective

    optimizer.step(closure)
    return weights.detach()


def scores(weights: Tensor, features: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    """Class scores [B, classes], float64, of un-standardised features [B, D]."""
    mean, std = moments
    return (features.double() - mean) / std @ weights[:, :-1].T + weights[:, -1]


@torch.no_grad()
def judge_probe(weights: Tensor, blocks: Blocks, moments: tuple[Tensor, Tensor]) -> tuple[int, int, float]:
    """How many samples get their label's class first, of how many, and the mean cross entropy."""
    correct, count, loss = 0, 0, 0.0
    for features, labels in blocks():
        found = scores(weights, features, moments)
        correct += int((found.argmax(dim=1) == labels).sum())
        loss += float(functional.cross_entropy(found, labels, reduction="sum"))
        count += len(labels)
    return correct, count, loss / count


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a proportion; z of 1.96: 95 %. Also sensible at 0 and at 1."""
    share = correct / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)

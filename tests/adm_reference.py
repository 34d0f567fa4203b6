"""The ADM evaluator's figures written down slowly in numpy from its formulas; what tests hold the fast ones against."""

import numpy as np
import scipy.linalg


def frechet(a: np.ndarray, b: np.ndarray, ddof: int = 1) -> float:
    """Frechet distance of features [N, D] and [M, D], by the square root of a matrix."""
    mean_a, mean_b = a.astype(np.float64).mean(0), b.astype(np.float64).mean(0)
    cov_a, cov_b = (np.cov(side.astype(np.float64), rowvar=False, ddof=ddof) for side in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


def inception_score(logits: np.ndarray, split: int = 5000) -> float:
    """Mean over consecutive splits of exp(mean_i sum_c p (log p - log mean p)), by probabilities kept whole."""
    exponents = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    probabilities = exponents / exponents.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(logits), split):
        part = probabilities[start : start + split]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return float(np.mean(scores))


def distances(a: np.ndarray, b: np.ndarray, half: bool) -> np.ndarray:
    """Squared distances [N, M]; half: of float16 features, each step rounded to float16."""
    with np.errstate(over="ignore", invalid="ignore"):
        if half:
            a, b = a.astype(np.float16), b.astype(np.float16)
        norms = [(side * side).astype(np.float32).sum(1).astype(side.dtype) for side in (a, b)]
        product = (a.astype(np.float32) @ b.astype(np.float32).T).astype(a.dtype)
        found = np.maximum(norms[0][:, None] - 2 * product + norms[1][None], 0)
    return found.astype(np.float32)


def block_distances(a: np.ndarray, b: np.ndarray, half: bool, block: int = 10_000) -> np.ndarray:
    """Distances by blocks of the evaluator's grid: one with an entry that is not finite is float32 as a whole."""
    whole = np.empty((len(a), len(b)), np.float32)
    for top in range(0, len(a), block):
        for left in range(0, len(b), block):
            rows, columns = a[top : top + block], b[left : left + block]
            found = distances(rows, columns, half)
            if not np.isfinite(found).all():
                found = distances(rows, columns, False)
            whole[top : top + block, left : left + block] = found
    return whole


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, half: bool, block: int = 10_000
) -> tuple[float, float]:
    """Share of samples in a reference ball, share of the reference in a sample's ball; third neighbours, `<=`."""
    radii = [np.sort(block_distances(side, side, half, block), 1)[:, 3] for side in (samples, reference)]
    between = block_distances(reference, samples, half, block)
    precision = (between <= radii[1][:, None]).any(0).mean()
    recall = (between <= radii[0][None]).any(1).mean()
    return float(precision), float(recall)

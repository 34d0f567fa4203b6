"""Inception Score over consecutive splits, summed online: no logits are kept, and ranks may share the samples."""

import torch
from torch import Tensor

from raecli.errors import NonFiniteError

SPLIT = 5000  # samples, in the order of the set; a last short split counts as much as any other


class InceptionScore:
    """exp of the mean divergence of class probabilities from their mean. Salimans et al. (2016); ADM's evaluator.

    With p_i a sample's probabilities, a split's score is exp(mean_i sum_c p_ic log p_ic - sum_c m_c log m_c), m their
    mean: sums over samples alone, so a split may be shared by batches and ranks. All in float64.
    """

    def __init__(self, samples: int, classes: int, device: torch.device | str = "cpu", split: int = SPLIT) -> None:
        """samples: N of the whole set, over all ranks. classes: C, 1008 of Inception."""
        splits = -(-samples // split)
        self.split = split
        self.sums = torch.zeros(splits, classes + 2, dtype=torch.float64, device=device)  # p; sum p log p; count

    def update(self, logits: Tensor, start: int) -> None:
        """Take in logits [B, C] without bias, of the samples from `start` on in the set's order."""
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"logits of samples {start} to {start + len(logits) - 1} hold NaN or infinity")
        logs = logits.to(self.sums).log_softmax(1)
        probabilities = logs.exp()
        negentropy = (probabilities * logs).sum(1, keepdim=True)
        rows = torch.cat([probabilities, negentropy, torch.ones_like(negentropy)], 1)
        places = (torch.arange(len(logits), device=rows.device) + start) // self.split
        self.sums.index_add_(0, places, rows)

    def scores(self) -> list[float]:
        """The score of each split. `sums` of several ranks are added before."""
        classes = self.sums.shape[1] - 2
        mean = self.sums[:, :classes] / self.sums[:, -1:]
        divergence = self.sums[:, classes] / self.sums[:, -1] - torch.special.xlogy(mean, mean).sum(1)
        return divergence.exp().tolist()

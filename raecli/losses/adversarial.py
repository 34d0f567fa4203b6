"""The adversarial term of decoder training: hinge loss, and the weight that balances it. App. E.2, Table 12."""

import torch.nn.functional as F
from torch import Tensor

LAMBDA_EPS = 1e-6
LAMBDA_MAX = 1e4  # the release's clamp


def hinge_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """The discriminator's: half of mean max(0, 1 - real) + mean max(0, 1 + fake), a scalar. Scores of any shape."""
    return (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()) / 2


def generator_loss(fake_scores: Tensor) -> Tensor:
    """The decoder's: minus the mean score, a scalar."""
    return -fake_scores.mean()


def adaptive_weight(reconstruction_norm: Tensor, adversarial_norm: Tensor) -> Tensor:
    """lambda = |gradient of the reconstruction| / (|gradient of the adversarial term| + 1e-6), in [0, 1e4], detached.

    Both norms are of gradients at the reconstructed images (the paper, App. E.2) or at the decoder's last layer
    (Esser et al. 2021, the release). Scalars.
    """
    return (reconstruction_norm / (adversarial_norm + LAMBDA_EPS)).clamp(0, LAMBDA_MAX).detach()

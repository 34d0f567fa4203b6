"""What a narrow output layer cannot learn: Theorem 1's floor under the loss, and its certificate. Sec. 4.1, App. C.

Let the last layer be out_i = B h_i + b for token i, B of shape [n, d], h_i in R^d any function of the whole noisy
map, of t, of the labels, even of latents and noise; P the orthogonal projector on Im(B), of rank d at most. A token's
target is W_i = noise_i - x_i, and its noise ~ N(0, I_n) is independent of (x, t). Then, FOR EACH t,

    E[ ||out_i - W_i||^2 | t ]  >=  tr((I - P) Cov W_i) + ||(I - P)(E x_i + b)||^2  >=  n - d,

because out_i - b never leaves Im(B), and Cov W_i = I + Cov x_i holds no t. So the floor is the same for any time
distribution and time shift (as long as t is drawn independently of x), and only the OUTPUT projection's width d
decides: depth, heads, learning rate and the input projection do not enter. In DiT-DH that is the head's width.

All of it per channel, as flow_loss is (divided by n), and in float64.
"""

import torch
from torch import Tensor


def width_bound(channels: int, width: int) -> float:
    """The floor max(0, (n - d) / n) of the mean squared error of a velocity. n: channels of a token; d: output width.

    For one latent of N tokens with N - 1 <= d it is the exact infimum over all trunks h and all B, b; for a single
    point x it is Theorem 1, whose covariance's eigenvalues are all 1. It bounds the expected loss: a mean over finitely
    many draws may lie below it by chance.
    """
    return max(0, channels - width) / channels


def tail_bound(tokens: Tensor, width: int) -> float:
    """The sharper floor (1/n) sum_{k > d} lambda_k(I + S) when B and b serve many tokens. tokens: [N, n].

    S is the covariance of one latent's tokens, centred by their mean (the output bias is shared by all of them) and
    divided by N; the eigenvalues fall. Never below width_bound, and equal to it if and only if S has at least n - d
    zero eigenvalues: always when N - 1 <= d, since its rank is at most N - 1.
    """
    tokens = tokens.double()
    centred = tokens - tokens.mean(dim=0)
    covariance = centred.T @ centred / len(tokens)
    eigenvalues = 1 + torch.linalg.eigvalsh(covariance)  # rising
    return float(eigenvalues[: max(0, tokens.shape[1] - width)].sum() / tokens.shape[1])


def complement(weight: Tensor) -> Tensor:
    """Orthonormal basis Q of what the output cannot reach: I - P = Q Q^T. weight: [n, d] -> float64 [n, n - rank].

    The rank counts singular values above max(n, d) float64 roundings of the largest one: a direction is given up as
    unreachable only when it is so exactly, which keeps the certificate below the true loss.
    """
    left, singular, _ = torch.linalg.svd(weight.detach().double())
    smallest = singular.max() * max(weight.shape) * torch.finfo(torch.float64).eps
    return left[:, int((singular > smallest).sum()) :]


def certificate(weight: Tensor, bias: Tensor, tokens: Tensor) -> float:
    """A floor under a trained model's loss from its last layer alone: (tr(I-P) + mean_i ||(I-P)(x_i + b)||^2) / n.

    weight: [n, d], bias: [n]: the output projection; tokens: [N, n], the one latent's. No sampling is needed.
    width_bound <= tail_bound <= certificate <= the model's expected loss, and no other trunk under this same last layer
    can go below the certificate, while some trunk (that knows the noise, as a point mass allows) reaches it.
    """
    outside = complement(weight)
    offset = (tokens.double() + bias.detach().double()) @ outside  # [N, n - rank]
    return float((outside.shape[1] + offset.square().sum(dim=1).mean()) / weight.shape[0])


def unremoved_noise(weight: Tensor, tokens: Tensor, samples: Tensor) -> float:
    """The part of samples' error that no trunk can remove: mean ||(I-P)(z_0 - x)||^2 / n. The sampling corollary.

    weight: [n, d]; tokens: [N, n]; samples: [M, N, n], solved from noise z_1 ~ N(0, I). A velocity's part outside
    Im(B) is the constant (I-P) b, and the step weights of Euler's method on any grid from t = 1 to t = 0 add to -1
    (so do Heun's). So (I-P) z_0 = (I-P)(z_1 - b) exactly, whatever the trunk: noise in n - d directions is never
    removed, the expectation of this value is the certificate, and the full error ||z_0 - x||^2 / n cannot be less.
    """
    error = samples.double() - tokens.double()
    return float((error @ complement(weight)).square().sum(dim=-1).mean() / tokens.shape[1])

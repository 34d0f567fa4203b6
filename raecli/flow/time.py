"""Where training looks along the path, and the shift that high-dimensional latents need. Sec. 4.2."""

import math

import torch
from torch import Tensor


def shift_time(t: Tensor, alpha: float) -> Tensor:
    """Move time towards noise: adds log(alpha) to logit(t). Sec. 4.2.

    t: any shape, in [0, 1], 0 = latents, 1 = noise; the ends stay fixed.
    """
    return alpha * t / (1 + (alpha - 1) * t)


def logit_normal_time(uniform: Tensor, *, mean: float = 0.0, std: float = 1.0, maximum: float = 1.0) -> Tensor:
    """Time with logit(t) ~ N(mean, std^2), cut at `maximum`, by the inverse distribution function.

    uniform: any shape, in (0, 1). The release cuts at .999, the paper not at all. Before the shift.
    """
    if maximum < 1:
        below = (math.log(maximum / (1 - maximum)) - mean) / std
        uniform = uniform * torch.special.ndtr(torch.tensor(below, dtype=uniform.dtype))
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


def training_time(
    uniform: Tensor, *, distribution: str, mean: float, std: float, maximum: float, time_shift: float
) -> Tensor:
    """Shifted training times out of uniform draws, same shape. distribution: "logit_normal" or "uniform"."""
    if distribution == "logit_normal":
        t = logit_normal_time(uniform, mean=mean, std=std, maximum=maximum)
    else:
        t = uniform * maximum
    return shift_time(t, time_shift)


def time_grid(steps: int, *, kind: str, time_shift: float) -> Tensor:
    """The times a solver visits, from noise to latents, float64.

    kind "paper": steps + 1 times from 1 to 0, so `steps` evaluations. kind "released": `steps` times, so steps - 1
    evaluations, ending short of 0 (at .00689 for 256 tokens of 768 channels and 50 steps). FACTS section 3.
    """
    if kind == "paper":
        line = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    elif kind == "released" and steps < 2:
        raise ValueError(f"the released time grid makes steps - 1 steps: none of {steps}, so images would be noise")
    elif kind == "released":
        line = 1 - torch.linspace(0, 0.999, steps, dtype=torch.float64)
    else:
        raise ValueError(f"no time grid {kind!r}")
    return shift_time(line, time_shift)

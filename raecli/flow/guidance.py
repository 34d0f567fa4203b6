"""Guided velocities: classifier-free guidance in an interval, and AutoGuidance. App. D."""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (noisy [B, C, H, W], t [B], labels [B]) -> [B, C, H, W]


def extrapolate(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """weak + scale (strong - weak); scale 1 is the strong one itself."""
    return weak + scale * (strong - weak)


def guided_velocity(
    model: Velocity,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    guide: Velocity | None = None,
    null_label: int | None = None,
) -> Velocity:
    """A velocity that steers by a weaker one where low <= t <= high, in shifted time, ends included.

    With a guide: AutoGuidance (Karras et al. 2025), same labels. Without: classifier-free guidance (Ho & Salimans
    2022) against the null label, in one doubled batch. Outside the interval, or at scale 1, only `model` runs.
    All samples of a batch are at one time.
    """
    if scale == 1.0:
        return model
    if guide is None and null_label is None:
        raise ValueError("classifier-free guidance needs the null label")
    low, high = torch.tensor(interval).tolist()  # rounded to float32, as t is: the ends are included

    def velocity(noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if not low <= float(t[0]) <= high:
            return model(noisy, t, labels)
        if guide is not None:
            return extrapolate(guide(noisy, t, labels), model(noisy, t, labels), scale)
        both = model(noisy.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, torch.full_like(labels, null_label)]))
        conditional, unconditional = both.chunk(2)
        return extrapolate(unconditional, conditional, scale)

    return velocity

"""Guided velocities: classifier-free guidance in an interval, and AutoGuidance. App. D."""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (noisy [B, C, H, W], t [B], labels [B]) -> [B, C, H, W]


def extrapolate(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """weak + scale (strong - weak); scale 1 is the strong one itself."""
    return weak + scale * (strong - weak)


def in_interval(t: float, interval: tuple[float, float]) -> bool:
    """low <= t <= high in shifted time, both ends included whatever their rounding: compared in float32, as t is."""
    low, now, high = torch.tensor((interval[0], t, interval[1])).tolist()
    return low <= now <= high


def steered_velocity(
    model: Velocity, *, scale: float, guide: Velocity | None = None, null_label: int | None = None
) -> Velocity:
    """A velocity that steers by a weaker one, at every time.

    With a guide: AutoGuidance (Karras et al. 2025), same labels, each model once. Without: classifier-free guidance
    (Ho & Salimans 2022) against the null label, both halves in one call of the model.
    """
    if guide is None and null_label is None:
        raise ValueError("classifier-free guidance needs the null label")

    def by_guide(noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return extrapolate(guide(noisy, t, labels), model(noisy, t, labels), scale)  # type: ignore[misc]

    def by_null_label(noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        both = model(noisy.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, torch.full_like(labels, null_label)]))
        conditional, unconditional = both.chunk(2)
        return extrapolate(unconditional, conditional, scale)

    return by_guide if guide is not None else by_null_label


def guided_velocity(
    model: Velocity,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    guide: Velocity | None = None,
    null_label: int | None = None,
) -> Callable[[Tensor, float, Tensor], Tensor]:
    """A velocity (noisy, t, labels) that steers where low <= t <= high; t: one number for the whole batch.

    Outside the interval, or at scale 1, only `model` runs, on the batch as it is. t stays on the host, so that a GPU
    never waits to be asked for it.
    """
    steered = None if scale == 1 else steered_velocity(model, scale=scale, guide=guide, null_label=null_label)

    def velocity(noisy: Tensor, t: float, labels: Tensor) -> Tensor:
        chosen = steered if steered is not None and in_interval(t, interval) else model
        return chosen(noisy, noisy.new_full((len(noisy),), t), labels)

    return velocity
